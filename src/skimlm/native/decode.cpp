// One token through all decoder blocks of a model of the llama family (runtime/decode.py), in one call: on a
// small model the way from one product to the next takes longer than the products.
//
//   norm -> q, k, v -> (norm of heads) -> rotation -> cache -> attention -> o -> + x
//        -> norm -> silu(gate) * up -> down -> + x
//
// Numbers are rounded to bfloat16 where they are kept, in the cache, and at the end; all else is float.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>

#include "guard.h"
#include "parallel.h"
#include "product.h"
#include "vector.h"

namespace {

inline float value(float x) { return x; }
inline float value(uint16_t x) { return from_bf16(x); }

// n is a multiple of Vector::N, or small: what is left over goes one by one.
template <class T>
inline float dot(const float* a, const T* b, int64_t n) {
  Vector sum;
  int64_t j = 0;
  for (; j + Vector::N <= n; j += Vector::N) sum.add_product(Vector::load(a + j), Vector::load(b + j));
  float total = sum.sum();
  for (; j < n; ++j) total += a[j] * value(b[j]);
  return total;
}

// e^x within 2 ulp for x <= 0, 0 below -87; in arithmetic that vectorises.
inline float exp_negative(float x) {
  x = std::max(x, -87.f);
  const float n = float(int32_t(x * 1.44269504f - 0.5f));
  const float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.f;
  const int32_t bits = (int32_t(n) + 127) << 23;
  float power;
  std::memcpy(&power, &bits, 4);
  return p * power;
}

// Of this token: where a block's keys and values are, [kv_heads, capacity, head_dim], and how many.
struct Past {
  void *const *keys, *const *values;
  int64_t capacity, length, rotary;
};

// What the threads of a team share: results of one step that the next step reads whole.
struct Shared {
  std::vector<float> qkv, mixed, attended, gate_up, out, u;
  std::vector<std::atomic<int64_t>> next;  // per step: the part whose turn it is
};

// What each thread has for itself. The short way from one product to the next every thread goes alone.
struct Own {
  std::vector<float> state, normed, weight, turn;
  std::vector<Matrix> matrices{3};
  Integers x;
  std::vector<Product> products;
  std::vector<SparseProduct> sparse;
};

// x / rms(x) * weight
void rms_norm(const float* x, int64_t n, const void* weight, bool bf16, double eps,
              std::vector<float>& scratch, float* out) {
  scratch.resize(n);
  to_float(weight, bf16, n, scratch.data());
  const float inverse = 1 / std::sqrt(dot(x, x, n) / float(n) + float(eps));
  for (int64_t j = 0; j < n; ++j) out[j] = x[j] * inverse * scratch[j];
}

// Products of several layers with the same x, their outputs one after the other; this thread's share.
// `u` holds the ranks of all of them; `next` are three counters.
void times(const SkimlmLayer* const* layers, int64_t count, const float* x, Own& own, float* out, float* u,
           Team& team, std::atomic<int64_t>* next) {
  own.products.clear();
  own.sparse.clear();
  const bool plain = std::any_of(layers, layers + count, [](auto* w) { return is_plain(*w); });
  if (plain) own.x = to_integers(x, 1, layers[0]->cols);
  for (int64_t i = 0; i < count; ++i) {
    const SkimlmLayer& w = *layers[i];
    const Output to{out, false, w.rows, w.bias};
    if (is_plain(w)) {
      lay_out(w, own.matrices[i]);
      own.products.push_back({w, own.matrices[i], own.x, to});
    } else {
      own.sparse.push_back({w, u, to});
      u += w.rank;
    }
    out += w.rows;
  }
  if (!own.products.empty())
    multiply(own.products.data(), int64_t(own.products.size()), team.size, next);
  if (!own.sparse.empty())
    multiply(own.sparse.data(), int64_t(own.sparse.size()), x, team, next + 1);
}

void rotate(float* x, const float* cos, const float* sin, int64_t n) {
  const int64_t half = n / 2;
  for (int64_t j = 0; j < half; ++j) {
    const float a = x[j], b = x[j + half];
    x[j] = a * cos[j] - b * sin[j];
    x[j + half] = b * cos[j + half] + a * sin[j + half];
  }
}

// One head: softmax(scale q K^T) V; keys and values [length, d].
template <class T>
void attend(const float* q, const T* keys, const T* values, int64_t length, int64_t d, float scale,
            float* out) {
  std::vector<float> score(length);
  float top = -INFINITY, total = 0;
  for (int64_t t = 0; t < length; ++t) {
    score[t] = scale * dot(q, keys + t * d, d);
    top = std::max(top, score[t]);
  }
  for (int64_t t = 0; t < length; ++t) score[t] = exp_negative(score[t] - top);
  for (int64_t t = 0; t < length; ++t) total += score[t];
  const float inverse = 1 / total;
  int64_t j = 0;
  for (; j + 4 * Vector::N <= d; j += 4 * Vector::N) {
    Vector sum[4];
    for (int64_t t = 0; t < length; ++t)
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i)
        sum[i].add_product(score[t], Vector::load(values + t * d + j + i * Vector::N));
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) sum[i].store(out + j + i * Vector::N);
  }
  for (; j < d; ++j) {
    out[j] = 0;
    for (int64_t t = 0; t < length; ++t) out[j] += score[t] * value(values[t * d + j]);
  }
  for (int64_t i = 0; i < d; ++i) out[i] *= inverse;
}

constexpr int64_t STEPS = 13;  // of a block: three of every product, and attention

void run(const SkimlmBody& m, int64_t index, const Past& past, Shared& shared, Own& own, Team& team,
         int thread) {
  const SkimlmBlock& b = m.blocks[index];
  char *keys = static_cast<char*>(past.keys[index]), *values = static_cast<char*>(past.values[index]);
  const int64_t d = m.head_dim, nq = m.heads * d, nk = m.kv_heads * d, length = past.length;
  const int64_t size = m.bf16 ? 2 : 4, group = m.heads / m.kv_heads, inner = b.down->cols;
  const float *cos = own.turn.data(), *sin = cos + past.rotary;
  std::atomic<int64_t>* next = &shared.next[index * STEPS];
  float *state = own.state.data(), *normed = own.normed.data(), *u = shared.u.data();

  rms_norm(state, m.width, b.norm, m.bf16, m.eps, own.weight, normed);
  times(b.in, b.in_count, normed, own, shared.qkv.data(), u, team, next);
  team.wait();
  for (int64_t h = thread; h < m.kv_heads; h += team.size) {
    float* head = &shared.qkv[nq + h * d];
    if (b.k_norm) rms_norm(head, d, b.k_norm, m.bf16, m.eps, own.weight, head);
    rotate(head, cos, sin, past.rotary);
    const int64_t at = (h * past.capacity + length) * d * size;
    from_float(head, m.bf16, d, keys + at);
    from_float(head + nk, m.bf16, d, values + at);
  }
  team.wait();
  for (int64_t h; (h = next[3].fetch_add(1)) < m.heads;) {
    float* q = &shared.qkv[h * d];
    if (b.q_norm) rms_norm(q, d, b.q_norm, m.bf16, m.eps, own.weight, q);
    rotate(q, cos, sin, past.rotary);
    const int64_t at = h / group * past.capacity * d * size;
    const float scale = float(m.scale);
    if (m.bf16)
      attend(q, reinterpret_cast<const uint16_t*>(keys + at),
             reinterpret_cast<const uint16_t*>(values + at), length + 1, d, scale,
             &shared.mixed[h * d]);
    else
      attend(q, reinterpret_cast<const float*>(keys + at),
             reinterpret_cast<const float*>(values + at), length + 1, d, scale, &shared.mixed[h * d]);
  }
  team.wait();
  times(&b.o, 1, shared.mixed.data(), own, shared.attended.data(), u, team, next + 4);
  team.wait();
  for (int64_t j = 0; j < m.width; ++j) state[j] += shared.attended[j];
  rms_norm(state, m.width, b.mlp_norm, m.bf16, m.eps, own.weight, normed);
  times(b.mlp, b.mlp_count, normed, own, shared.gate_up.data(), u, team, next + 7);
  team.wait();
  const float *gate = shared.gate_up.data(), *up = gate + inner;
  for (int64_t j = 0; j < inner; ++j) {  // x / (1 + e^-x), with the exponential of what is negative
    const float e = exp_negative(-std::fabs(gate[j]));
    normed[j] = gate[j] * up[j] * (gate[j] >= 0 ? 1.f : e) / (1 + e);
  }
  times(&b.down, 1, normed, own, shared.out.data(), u, team, next + 10);
  team.wait();
  for (int64_t j = 0; j < m.width; ++j) state[j] += shared.out[j];
}

bool fits(const SkimlmLayer& w, int64_t cols) { return w.cols == cols && !w.in_scale && ::fits(w); }

// Rows of all of them; -1 if one does not fit.
int64_t rows_of(const SkimlmLayer* const* layers, int64_t count, int64_t cols) {
  int64_t rows = 0;
  for (int64_t i = 0; i < count; ++i) {
    if (!fits(*layers[i], cols)) return -1;
    rows += layers[i]->rows;
  }
  return rows;
}

bool fits(const SkimlmBody& m, const SkimlmBlock& b) {
  const int64_t nq = m.heads * m.head_dim, nk = m.kv_heads * m.head_dim, inner = b.down->cols;
  return rows_of(b.in, b.in_count, m.width) == nq + 2 * nk && rows_of(&b.o, 1, nq) == m.width &&
         rows_of(b.mlp, b.mlp_count, m.width) == 2 * inner && rows_of(&b.down, 1, inner) == m.width;
}

int64_t ranks(const SkimlmLayer* const* layers, int64_t count) {
  int64_t sum = 0;
  for (int64_t i = 0; i < count; ++i) sum += layers[i]->rank;
  return sum;
}

void decode(const SkimlmBody& m, const void* x, const void* cos, const void* sin, const Past& past,
            int64_t inner, int64_t rank, void* out, int threads) {
  const int64_t nq = m.heads * m.head_dim, nk = m.kv_heads * m.head_dim;
  Shared shared{std::vector<float>(nq + 2 * nk), std::vector<float>(nq),
                std::vector<float>(m.width),     std::vector<float>(2 * inner),
                std::vector<float>(m.width),     std::vector<float>(rank),
                std::vector<std::atomic<int64_t>>(STEPS * m.count)};
  run_team(threads, [&](Team& team, int thread) {
    Own own;
    own.state.resize(m.width);
    own.normed.resize(std::max(inner, m.width));
    own.turn.resize(2 * past.rotary);
    to_float(x, m.bf16, m.width, own.state.data());
    to_float(cos, m.bf16, past.rotary, own.turn.data());
    to_float(sin, m.bf16, past.rotary, own.turn.data() + past.rotary);
    for (int64_t i = 0; i < m.count; ++i) run(m, i, past, shared, own, team, thread);
    if (thread) return;
    rms_norm(own.state.data(), m.width, m.norm, m.bf16, m.eps, own.weight, own.normed.data());
    from_float(own.normed.data(), m.bf16, m.width, out);
  });
}

}  // namespace

int skimlm_decode(const SkimlmBody* m, const void* x, const void* cos, const void* sin,
                  int64_t rotary, void* const* past, int64_t capacity, int64_t length, void* out,
                  int threads) {
  return guarded([&] {
    if (length < 0 || length >= capacity || rotary > m->head_dim || rotary % 2 ||
        m->heads % m->kv_heads)
      return MISFIT;
    int64_t inner = 0, rank = 0;
    for (int64_t i = 0; i < m->count; ++i) {
      const SkimlmBlock& b = m->blocks[i];
      if (!fits(*m, b)) return MISFIT;
      inner = std::max(inner, b.down->cols);
      rank = std::max({rank, ranks(b.in, b.in_count), ranks(&b.o, 1), ranks(b.mlp, b.mlp_count),
                       ranks(&b.down, 1)});
    }
    const Past places{past, past + m->count, capacity, length, rotary};
    decode(*m, x, cos, sin, places, inner, rank, out, threads);
    return DONE;
  });
}
