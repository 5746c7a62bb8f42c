// One token through all decoder blocks of a model of the llama family (runtime/decode.py), in one call: on a
// small model the way from one product to the next takes longer than the products.
//
//   norm -> q, k, v -> (norm of heads) -> rotation -> cache -> attention -> o -> + x
//        -> norm -> silu(gate) * up -> down -> + x
//
// or, with experts, the last line for those that the router chooses, weighted by what it gives them.
//
// Numbers are rounded to bfloat16 where they are kept, in the cache, and at the end; all else is float.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <stdexcept>
#include <utility>

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

// Of this token: where a block's keys and values are, [kv_heads, capacity, head_dim], and how many; before
// them, for every head of every block, those of a prefix.
struct Past {
  void *const *keys, *const *values;
  int64_t capacity, length, rotary;
  const SkimlmPrefix* prefix;  // null without one
};

// What the threads of a team share: results of one step that the next step reads whole.
struct Shared {
  std::vector<float> qkv, mixed, attended, routed, gate_up, out, u;
  std::vector<std::atomic<int64_t>> next;  // per step: the part whose turn it is
};

// What each thread has for itself. The short way from one product to the next every thread goes alone.
struct Own {
  std::vector<float> state, normed, weight, turn;
  std::vector<std::pair<float, int64_t>> chosen;  // experts, and what each counts
  std::vector<const SkimlmLayer*> layers;         // of the chosen ones
  std::vector<Matrix> matrices;
  std::vector<Integers> x;
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

// Products of several layers with the same x, or with `apart` columns more for each layer, their outputs one
// after the other; this thread's share. `u` holds the ranks of all of them; `next` are three counters.
void times(const SkimlmLayer* const* layers, int64_t count, const float* x, int64_t apart, Own& own, float* out,
           float* u, Team& team, std::atomic<int64_t>* next) {
  own.products.clear();
  own.sparse.clear();
  own.matrices.resize(std::max(own.matrices.size(), size_t(count)));
  own.x.resize(std::max(own.x.size(), size_t(count)));
  int64_t made = 0;  // of own.x
  for (int64_t i = 0; i < count; ++i) {
    const SkimlmLayer& w = *layers[i];
    const Output to{out, false, w.rows, w.bias};
    if (is_plain(w)) {
      if (!lay_out(w, own.matrices[i])) throw std::invalid_argument("an expert's sizes do not fit each other");
      if (apart || !made) own.x[made++] = to_integers(x + i * apart, 1, w.cols);
      own.products.push_back({w, own.matrices[i], own.x[made - 1], to});
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

// sum_t score[t] values[t] on top of out [d]; values [length, d].
template <class T>
void add_values(const float* score, const T* values, int64_t length, int64_t d, float* out) {
  int64_t j = 0;
  for (; j + 4 * Vector::N <= d; j += 4 * Vector::N) {
    Vector sum[4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) sum[i] = Vector::load(out + j + i * Vector::N);
    for (int64_t t = 0; t < length; ++t)
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i)
        sum[i].add_product(score[t], Vector::load(values + t * d + j + i * Vector::N));
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) sum[i].store(out + j + i * Vector::N);
  }
  for (; j < d; ++j)
    for (int64_t t = 0; t < length; ++t) out[j] += score[t] * value(values[t * d + j]);
}

// One head: softmax(scale q K^T) V; keys and values [length, d], and before them those of a prefix, to whose
// logits its bias is added.
template <class T>
void attend(const float* q, const T* keys, const T* values, int64_t length, const SkimlmPrefix& before,
            int64_t d, float scale, float* out) {
  const T *far_keys = static_cast<const T*>(before.keys), *far_values = static_cast<const T*>(before.values);
  const int64_t far = before.length, all = far + length;
  std::vector<float> score(all);
  for (int64_t t = 0; t < far; ++t)
    score[t] = scale * dot(q, far_keys + t * d, d) + (before.bias ? before.bias[t] : 0.f);
  for (int64_t t = 0; t < length; ++t) score[far + t] = scale * dot(q, keys + t * d, d);
  float top = -INFINITY, total = 0;
  for (int64_t t = 0; t < all; ++t) top = std::max(top, score[t]);
  for (int64_t t = 0; t < all; ++t) score[t] = exp_negative(score[t] - top);
  for (int64_t t = 0; t < all; ++t) total += score[t];
  std::fill(out, out + d, 0.f);
  add_values(score.data(), far_values, far, d, out);
  add_values(score.data() + far, values, length, d, out);
  const float inverse = 1 / total;
  for (int64_t i = 0; i < d; ++i) out[i] *= inverse;
}

// silu(gate) * up of `count` numbers: x / (1 + e^-x), with the exponential of what is negative.
void gated(const float* gate, int64_t count, float* out) {
  const float* up = gate + count;
  for (int64_t j = 0; j < count; ++j) {
    const float e = exp_negative(-std::fabs(gate[j]));
    out[j] = gate[j] * up[j] * (gate[j] >= 0 ? 1.f : e) / (1 + e);
  }
}

// The likeliest experts, each with its probability, in the order of their numbers: sums do not depend on ties.
void choose(const SkimlmBlock& b, const float* logits, std::vector<std::pair<float, int64_t>>& chosen) {
  const float top = *std::max_element(logits, logits + b.experts);
  float all = 0, kept = 0;
  chosen.clear();
  for (int64_t e = 0; e < b.experts; ++e) {
    chosen.push_back({exp_negative(logits[e] - top), e});
    all += chosen.back().first;
  }
  const auto end = chosen.begin() + b.chosen;
  std::partial_sort(chosen.begin(), end, chosen.end(), [](const auto& x, const auto& y) {
    return x.first > y.first || (x.first == y.first && x.second < y.second);
  });
  chosen.resize(b.chosen);
  for (const auto& [share, e] : chosen) kept += share;
  for (auto& [share, e] : chosen) share /= b.normalised ? kept : all;
  std::sort(chosen.begin(), chosen.end(), [](const auto& x, const auto& y) { return x.second < y.second; });
}

constexpr int64_t STEPS = 14;  // of a block: three of every product, attention, and the router

// The experts' part of a block: what the token's own add to its state.
void run_experts(const SkimlmBlock& b, const SkimlmBody& m, Shared& shared, Own& own, Team& team,
                 std::atomic<int64_t>* next) {
  const int64_t inner = b.down[0]->cols, size = m.bf16 ? 2 : 4;
  for (int64_t e; (e = next[13].fetch_add(1)) < b.experts;) {
    const void* row = static_cast<const char*>(b.router) + e * m.width * size;
    shared.routed[e] = m.bf16 ? dot(own.normed.data(), static_cast<const uint16_t*>(row), m.width)
                              : dot(own.normed.data(), static_cast<const float*>(row), m.width);
  }
  team.wait();
  choose(b, shared.routed.data(), own.chosen);
  const auto of_chosen = [&](const SkimlmLayer* const* all) {
    own.layers.clear();
    for (const auto& [share, e] : own.chosen) own.layers.push_back(all[e]);
    return own.layers.data();
  };
  times(of_chosen(b.mlp), b.chosen, own.normed.data(), 0, own, shared.gate_up.data(), nullptr, team, next + 7);
  team.wait();
  for (int64_t i = 0; i < b.chosen; ++i)
    gated(&shared.gate_up[2 * i * inner], inner, &own.normed[i * inner]);
  times(of_chosen(b.down), b.chosen, own.normed.data(), inner, own, shared.out.data(), nullptr, team, next + 10);
  team.wait();
  for (int64_t i = 0; i < b.chosen; ++i)
    for (int64_t j = 0; j < m.width; ++j) own.state[j] += own.chosen[i].first * shared.out[i * m.width + j];
}

void run(const SkimlmBody& m, int64_t index, const Past& past, Shared& shared, Own& own, Team& team,
         int thread) {
  const SkimlmBlock& b = m.blocks[index];
  char *keys = static_cast<char*>(past.keys[index]), *values = static_cast<char*>(past.values[index]);
  const int64_t d = m.head_dim, nq = m.heads * d, nk = m.kv_heads * d, length = past.length;
  const int64_t size = m.bf16 ? 2 : 4, group = m.heads / m.kv_heads;
  const float *cos = own.turn.data(), *sin = cos + past.rotary;
  std::atomic<int64_t>* next = &shared.next[index * STEPS];
  float *state = own.state.data(), *normed = own.normed.data(), *u = shared.u.data();

  rms_norm(state, m.width, b.norm, m.bf16, m.eps, own.weight, normed);
  times(b.in, b.in_count, normed, 0, own, shared.qkv.data(), u, team, next);
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
    const SkimlmPrefix before = past.prefix ? past.prefix[index * m.kv_heads + h / group] : SkimlmPrefix{};
    if (m.bf16)
      attend(q, reinterpret_cast<const uint16_t*>(keys + at),
             reinterpret_cast<const uint16_t*>(values + at), length + 1, before, d, scale,
             &shared.mixed[h * d]);
    else
      attend(q, reinterpret_cast<const float*>(keys + at),
             reinterpret_cast<const float*>(values + at), length + 1, before, d, scale,
             &shared.mixed[h * d]);
  }
  team.wait();
  times(&b.o, 1, shared.mixed.data(), 0, own, shared.attended.data(), u, team, next + 4);
  team.wait();
  for (int64_t j = 0; j < m.width; ++j) state[j] += shared.attended[j];
  rms_norm(state, m.width, b.mlp_norm, m.bf16, m.eps, own.weight, normed);
  if (b.experts) return run_experts(b, m, shared, own, team, next);
  times(b.mlp, b.mlp_count, normed, 0, own, shared.gate_up.data(), u, team, next + 7);
  team.wait();
  gated(shared.gate_up.data(), b.down[0]->cols, normed);
  times(b.down, 1, normed, 0, own, shared.out.data(), u, team, next + 10);
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

// Of experts, the first stands for all.
bool fits(const SkimlmBody& m, const SkimlmBlock& b) {
  const int64_t nq = m.heads * m.head_dim, nk = m.kv_heads * m.head_dim, inner = b.down[0]->cols;
  const bool few = b.experts ? b.mlp_count == 1 && b.chosen > 0 && b.chosen <= b.experts && b.router : !b.router;
  return few && rows_of(b.in, b.in_count, m.width) == nq + 2 * nk && rows_of(&b.o, 1, nq) == m.width &&
         rows_of(b.mlp, b.mlp_count, m.width) == 2 * inner && rows_of(b.down, 1, inner) == m.width;
}

int64_t ranks(const SkimlmLayer* const* layers, int64_t count) {
  int64_t sum = 0;
  for (int64_t i = 0; i < count; ++i) sum += layers[i]->rank;
  return sum;
}

// The most that a block needs room for.
struct Room {
  int64_t inner = 0, mlps = 1, experts = 0, rank = 0;
};

void decode(const SkimlmBody& m, const void* x, const void* cos, const void* sin, const Past& past,
            const Room& room, void* out, int threads) {
  const int64_t nq = m.heads * m.head_dim, nk = m.kv_heads * m.head_dim, inner = room.inner;
  Shared shared{std::vector<float>(nq + 2 * nk),
                std::vector<float>(nq),
                std::vector<float>(m.width),
                std::vector<float>(room.experts),
                std::vector<float>(2 * inner),
                std::vector<float>(room.mlps * m.width),
                std::vector<float>(room.rank),
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
                  int64_t rotary, void* const* past, int64_t capacity, int64_t length,
                  const SkimlmPrefix* prefix, void* out, int threads) {
  return guarded([&] {
    if (length < 0 || length >= capacity || rotary > m->head_dim || rotary % 2 ||
        m->heads % m->kv_heads)
      return MISFIT;
    Room room;
    for (int64_t i = 0; i < m->count; ++i) {
      const SkimlmBlock& b = m->blocks[i];
      if (!fits(*m, b)) return MISFIT;
      const int64_t mlps = std::max<int64_t>(b.chosen, 1);
      room.inner = std::max(room.inner, mlps * b.down[0]->cols);  // of all chosen experts together
      room.mlps = std::max(room.mlps, mlps);
      room.experts = std::max(room.experts, b.experts);
      room.rank = std::max({room.rank, ranks(b.in, b.in_count), ranks(&b.o, 1), ranks(b.mlp, b.mlp_count),
                            ranks(b.down, 1)});
    }
    const Past places{past, past + m->count, capacity, length, rotary, prefix};
    decode(*m, x, cos, sin, places, room, out, threads);
    return DONE;
  });
}
