// One token each of some sequences through all decoder blocks of a model of the llama family (runtime/decode.py), in
// one call: on a small model the way from one product to the next takes longer than the products. A token's numbers
// are the same whatever others go with it.
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

// The tokens of a call: each is the next one of a sequence of its own.
struct Batch {
  const SkimlmSequence* sequences;
  int64_t n, rotary;
};

// Tokens on the short way from one product to the next.
struct Tokens {
  std::vector<float> state, normed, turn;  // of every token
  std::vector<Integers> inputs;            // of products, one for every number of columns there is
  Integers& columns(int64_t c) {
    return *std::find_if(inputs.begin(), inputs.end(), [&](const Integers& x) { return x.c == c; });
  }
};

// What the threads of a team share: results of one step that the next step reads whole.
struct Shared {
  Tokens tokens;  // where there are several
  std::vector<float> qkv, mixed, attended, routed, gate_up, out, u;
  std::vector<std::atomic<int64_t>> next;  // per token and step: the part whose turn it is
};

// What each thread has for itself.
struct Own {
  Tokens tokens;  // a single one goes the short way on every thread
  std::vector<float> weight, gated;
  std::vector<std::pair<float, int64_t>> chosen;  // experts, and what each counts
  std::vector<const SkimlmLayer*> layers;         // of the chosen ones
  std::vector<Matrix> matrices;
  std::vector<Integers> x;  // of experts
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

// What the products of `layers` take of token t, x [cols].
void prepare(const SkimlmLayer* const* layers, int64_t count, const float* x, int64_t t, Tokens& at) {
  if (std::any_of(layers, layers + count, [](const SkimlmLayer* w) { return is_plain(*w); }))
    fill(at.columns(layers[0]->cols), t, x);
}

// Products of several layers with the same tokens, x [n, cols], once prepared: their outputs one after the other
// for each token, `stride` numbers apart; this thread's share. `u` holds the ranks of all of them for every token.
void times(const SkimlmLayer* const* layers, int64_t count, const float* x, int64_t n, Tokens& at, Own& own,
           float* out, int64_t stride, float* u, Team& team, std::atomic<int64_t>* next, int64_t apart) {
  own.products.clear();
  own.matrices.resize(std::max(own.matrices.size(), size_t(count)));
  float* to = out;
  for (int64_t i = 0; i < count; to += layers[i++]->rows) {
    const SkimlmLayer& w = *layers[i];
    if (!is_plain(w)) continue;
    lay_out(w, own.matrices[i]);
    own.products.push_back({w, own.matrices[i], at.columns(w.cols), Output{to, false, stride, w.bias}});
  }
  if (!own.products.empty())
    multiply(own.products.data(), int64_t(own.products.size()), team.size, next);
  if (int64_t(own.products.size()) == count) return;
  for (int64_t t = 0; t < n; ++t) {
    own.sparse.clear();
    to = out + t * stride;
    for (int64_t i = 0; i < count; to += layers[i++]->rows) {
      if (is_plain(*layers[i])) continue;
      own.sparse.push_back({*layers[i], u, Output{to, false, layers[i]->rows, layers[i]->bias}});
      u += layers[i]->rank;
    }
    multiply(own.sparse.data(), int64_t(own.sparse.size()), x + t * layers[0]->cols, team, next + t * apart + 1);
  }
}

// The same for one token and experts, whose x are `apart` numbers apart, or the same if that is 0.
void times_each(const SkimlmLayer* const* layers, int64_t count, const float* x, int64_t apart, Own& own,
                float* out, Team& team, std::atomic<int64_t>* next) {
  own.products.clear();
  own.matrices.resize(std::max(own.matrices.size(), size_t(count)));
  own.x.resize(std::max(own.x.size(), size_t(count)));
  for (int64_t i = 0; i < count; ++i) {
    const SkimlmLayer& w = *layers[i];
    if (!lay_out(w, own.matrices[i])) throw std::invalid_argument("an expert's sizes do not fit each other");
    if (apart || !i) own.x[i] = to_integers(x + i * apart, 1, w.cols);
    own.products.push_back({w, own.matrices[i], own.x[apart ? i : 0], Output{out, false, w.rows, w.bias}});
    out += w.rows;
  }
  multiply(own.products.data(), count, team.size, next);
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

// The experts' part of a block: what those of one token, normed [width], add to its state; by one thread if it is
// shared.
void run_experts(const SkimlmBlock& b, const SkimlmBody& m, const float* normed, float* state, bool adds,
                 Shared& shared, Own& own, Team& team, std::atomic<int64_t>* next) {
  const int64_t inner = b.down[0]->cols, size = m.bf16 ? 2 : 4;
  for (int64_t e; (e = next[13].fetch_add(1)) < b.experts;) {
    const void* row = static_cast<const char*>(b.router) + e * m.width * size;
    shared.routed[e] = m.bf16 ? dot(normed, static_cast<const uint16_t*>(row), m.width)
                              : dot(normed, static_cast<const float*>(row), m.width);
  }
  team.wait();
  choose(b, shared.routed.data(), own.chosen);
  const auto of_chosen = [&](const SkimlmLayer* const* all) {
    own.layers.clear();
    for (const auto& [share, e] : own.chosen) own.layers.push_back(all[e]);
    return own.layers.data();
  };
  times_each(of_chosen(b.mlp), b.chosen, normed, 0, own, shared.gate_up.data(), team, next + 7);
  team.wait();
  own.gated.resize(b.chosen * inner);
  for (int64_t i = 0; i < b.chosen; ++i) gated(&shared.gate_up[2 * i * inner], inner, &own.gated[i * inner]);
  times_each(of_chosen(b.down), b.chosen, own.gated.data(), inner, own, shared.out.data(), team, next + 10);
  team.wait();
  for (int64_t i = 0; adds && i < b.chosen; ++i)
    for (int64_t j = 0; j < m.width; ++j) state[j] += own.chosen[i].first * shared.out[i * m.width + j];
}

// Calls each(t) for every token: on every thread if there is only one, else shared out and waited for.
template <class Each>
void each_token(int64_t n, Team& team, int thread, const Each& each) {
  if (n == 1) return each(0);
  for (int64_t t = thread; t < n; t += team.size) each(t);
  team.wait();
}

// Query head h of a token's q, k and v attends; what comes is [head_dim].
void run_head(const SkimlmBody& m, const SkimlmBlock& b, int64_t index, int64_t h, const SkimlmSequence& past,
              float* q, const float* cos, const float* sin, int64_t rotary, Own& own, float* out) {
  const int64_t d = m.head_dim, size = m.bf16 ? 2 : 4, kv = h / (m.heads / m.kv_heads);
  if (b.q_norm) rms_norm(q, d, b.q_norm, m.bf16, m.eps, own.weight, q);
  rotate(q, cos, sin, rotary);
  const int64_t at = kv * past.capacity * d * size;
  const char* keys = static_cast<char*>(past.places[index]) + at;
  const char* values = static_cast<char*>(past.places[m.count + index]) + at;
  const SkimlmPrefix before = past.prefix ? past.prefix[index * m.kv_heads + kv] : SkimlmPrefix{};
  const auto as = [&](auto type) {
    using T = decltype(type);
    attend(q, reinterpret_cast<const T*>(keys), reinterpret_cast<const T*>(values), past.length + 1, before, d,
           float(m.scale), out);
  };
  m.bf16 ? as(uint16_t()) : as(float());
}

void run(const SkimlmBody& m, int64_t index, const Batch& batch, Shared& shared, Own& own, Team& team,
         int thread) {
  const SkimlmBlock& b = m.blocks[index];
  const int64_t n = batch.n, d = m.head_dim, nq = m.heads * d, nk = m.kv_heads * d, row = nq + 2 * nk;
  const int64_t inner = b.down[0]->cols, width = m.width, size = m.bf16 ? 2 : 4;
  const int64_t apart = STEPS * m.count;  // counters of a token and of the next
  std::atomic<int64_t>* next = &shared.next[index * STEPS];
  Tokens& at = n == 1 ? own.tokens : shared.tokens;
  float *state = at.state.data(), *normed = at.normed.data(), *u = shared.u.data();
  const auto turn = [&](int64_t t) { return &at.turn[2 * t * batch.rotary]; };
  const auto add = [&](int64_t t, const float* more) {
    for (int64_t j = 0; j < width; ++j) state[t * width + j] += more[t * width + j];
  };

  each_token(n, team, thread, [&](int64_t t) {
    rms_norm(state + t * width, width, b.norm, m.bf16, m.eps, own.weight, normed + t * width);
    prepare(b.in, b.in_count, normed + t * width, t, at);
  });
  times(b.in, b.in_count, normed, n, at, own, shared.qkv.data(), row, u, team, next, apart);
  team.wait();
  for (int64_t i = thread; i < n * m.kv_heads; i += team.size) {
    const int64_t t = i / m.kv_heads, h = i % m.kv_heads;
    const SkimlmSequence& past = batch.sequences[t];
    float* head = &shared.qkv[t * row + nq + h * d];
    if (b.k_norm) rms_norm(head, d, b.k_norm, m.bf16, m.eps, own.weight, head);
    rotate(head, turn(t), turn(t) + batch.rotary, batch.rotary);
    const int64_t to = (h * past.capacity + past.length) * d * size;
    from_float(head, m.bf16, d, static_cast<char*>(past.places[index]) + to);
    from_float(head + nk, m.bf16, d, static_cast<char*>(past.places[m.count + index]) + to);
  }
  team.wait();
  for (int64_t i; (i = next[3].fetch_add(1)) < n * m.heads;) {
    const int64_t t = i / m.heads, h = i % m.heads;
    run_head(m, b, index, h, batch.sequences[t], &shared.qkv[t * row + h * d], turn(t), turn(t) + batch.rotary,
             batch.rotary, own, &shared.mixed[t * nq + h * d]);
  }
  team.wait();
  each_token(n, team, thread, [&](int64_t t) { prepare(&b.o, 1, &shared.mixed[t * nq], t, at); });
  times(&b.o, 1, shared.mixed.data(), n, at, own, shared.attended.data(), width, u, team, next + 4, apart);
  team.wait();
  each_token(n, team, thread, [&](int64_t t) {
    add(t, shared.attended.data());
    rms_norm(state + t * width, width, b.mlp_norm, m.bf16, m.eps, own.weight, normed + t * width);
    if (!b.experts) prepare(b.mlp, b.mlp_count, normed + t * width, t, at);
  });
  if (b.experts) {
    for (int64_t t = 0; t < n; ++t)
      run_experts(b, m, normed + t * width, state + t * width, n == 1 || !thread, shared, own, team,
                  next + t * apart);
    if (n > 1) team.wait();
    return;
  }
  times(b.mlp, b.mlp_count, normed, n, at, own, shared.gate_up.data(), 2 * inner, u, team, next + 7, apart);
  team.wait();
  each_token(n, team, thread, [&](int64_t t) {
    gated(&shared.gate_up[2 * t * inner], inner, normed + t * inner);
    prepare(b.down, 1, normed + t * inner, t, at);
  });
  times(b.down, 1, normed, n, at, own, shared.out.data(), width, u, team, next + 10, apart);
  team.wait();
  each_token(n, team, thread, [&](int64_t t) { add(t, shared.out.data()); });
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
  std::vector<const SkimlmLayer*> kinds;  // plain ones, one for every number of columns

  void take(const SkimlmLayer* const* layers, int64_t count) {
    for (int64_t i = 0; i < count; ++i) {
      const auto same = [&](const SkimlmLayer* w) { return w->cols == layers[i]->cols; };
      if (is_plain(*layers[i]) && std::none_of(kinds.begin(), kinds.end(), same)) kinds.push_back(layers[i]);
    }
  }
};

// A single token with its own room on every thread, or several that all share.
Tokens tokens_of(const SkimlmBody& m, const Room& room, int64_t n, int64_t rotary) {
  Tokens at{std::vector<float>(n * m.width), std::vector<float>(n * std::max(room.inner, m.width)),
            std::vector<float>(2 * n * rotary), {}};
  for (const SkimlmLayer* w : room.kinds) at.inputs.push_back(room_for(n, w->cols));
  return at;
}

void decode(const SkimlmBody& m, const void* x, const void* cos, const void* sin, const Batch& batch,
            const Room& room, void* out, int threads) {
  const int64_t n = batch.n, nq = m.heads * m.head_dim, nk = m.kv_heads * m.head_dim, size = m.bf16 ? 2 : 4;
  const int64_t rotary = batch.rotary, width = m.width;
  Shared shared{n == 1 ? Tokens{} : tokens_of(m, room, n, rotary),
                std::vector<float>(n * (nq + 2 * nk)),
                std::vector<float>(n * nq),
                std::vector<float>(n * width),
                std::vector<float>(room.experts),
                std::vector<float>(2 * n * room.inner),
                std::vector<float>(std::max(n, room.mlps) * width),
                std::vector<float>(n * room.rank),
                std::vector<std::atomic<int64_t>>(STEPS * m.count * n)};
  const auto of = [&](const void* all, int64_t at) { return static_cast<const char*>(all) + at * size; };
  run_team(threads, [&](Team& team, int thread) {
    Own own;
    if (n == 1) own.tokens = tokens_of(m, room, 1, rotary);
    Tokens& at = n == 1 ? own.tokens : shared.tokens;
    each_token(n, team, thread, [&](int64_t t) {
      to_float(of(x, t * width), m.bf16, width, &at.state[t * width]);
      to_float(of(cos, t * rotary), m.bf16, rotary, &at.turn[2 * t * rotary]);
      to_float(of(sin, t * rotary), m.bf16, rotary, &at.turn[(2 * t + 1) * rotary]);
    });
    for (int64_t i = 0; i < m.count; ++i) run(m, i, batch, shared, own, team, thread);
    if (n == 1 && thread) return;
    for (int64_t t = thread; t < n; t += team.size) {
      rms_norm(&at.state[t * width], width, m.norm, m.bf16, m.eps, own.weight, &at.normed[t * width]);
      from_float(&at.normed[t * width], m.bf16, width, static_cast<char*>(out) + t * width * size);
    }
  });
}

}  // namespace

int skimlm_decode(const SkimlmBody* m, const void* x, const void* cos, const void* sin, int64_t rotary,
                  const SkimlmSequence* sequences, int64_t n, void* out, int threads) {
  return guarded([&] {
    if (n < 1 || rotary > m->head_dim || rotary % 2 || m->heads % m->kv_heads) return MISFIT;
    for (int64_t t = 0; t < n; ++t)
      if (sequences[t].length < 0 || sequences[t].length >= sequences[t].capacity) return MISFIT;
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
      room.take(b.in, b.in_count);
      room.take(&b.o, 1);
      if (!b.experts) room.take(b.mlp, b.mlp_count), room.take(b.down, 1);
    }
    decode(*m, x, cos, sin, {sequences, n, rotary}, room, out, threads);
    return DONE;
  });
}
