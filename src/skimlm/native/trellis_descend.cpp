// Descent over the symbols of trellis rows under a full matrix H, a run of them at once (quantize/trellis.py).
//
// Columns stand in the order of the stream. As in refine.cpp many rows go through a tile of H: the runs that begin
// in a stripe of 48 columns change weights in 64, and what changes there goes to the gradient of all columns
// afterwards.
#include <cmath>
#include <vector>

#include "guard.h"
#include "parallel.h"
#include "product.h"
#include "tile.h"
#include "trellis.h"

#if defined(__AVX512F__) || defined(__AVX2__)
#include <immintrin.h>
#endif

namespace {

constexpr int64_t STRIPE = 48;  // columns of a tile where runs begin
constexpr int64_t BEFORE = 8;   // columns of a tile before them: symbols reach back by 6
constexpr float LEAST = 1e-6f;  // of x H x, that a change must gain: rounding must not make two take turns

// What descent sees of a row: a tile of H, and the gradient and codes there.
struct Here {
  const Tile& h;
  float* g;            // [64] half the gradient; it follows what changes
  uint8_t* code;       // from the tile's first column on; the row has c columns from there
  int64_t c;
  const float* level;  // [128] by window
  float* step;         // [64] how much each weight has changed
};

// Weight j takes another level: the gradient of the tile follows.
inline void change(const Here& row, int64_t j, float step) {
  const Change one{int32_t(j), step};
  row.step[j] += step;
  add_changes(&one, 1, row.h, row.g);
}

// What stands for the classes of windows, a class to a lane; lanes that are none cost infinity.
template <class T>
struct Classes {
  static constexpr int K = T::CLASSES, N = std::max(K, LANES), VECTORS = N / LANES;
  static constexpr int PLAINS = 1 << T::PLAIN;
  using Float = FloatLanes[VECTORS];
  using Int = IntLanes[VECTORS];

  // By the tap of a window's symbol, of the window that leaves class k: whom it comes from, and its tap.
  Int from[2], taps[2];
  FloatLanes level[T::SYMBOLS][VECTORS];  // of `leaving(k, m)`

  explicit Classes(const float* levels) {
    for (int k = 0; k < N; ++k) {
      for (int tap = 0; tap < 2; ++tap) {
        from[tap][k / LANES][k % LANES] = k < K ? (k + tap * K) / 2 : k;
        taps[tap][k / LANES][k % LANES] = (k + tap * K) % 2;
      }
      for (int m = 0; m < T::SYMBOLS; ++m)
        level[m][k / LANES][k % LANES] = k < K ? levels[T::leaving(k, m)] : 0;
    }
  }

  // out[k] = x[at[k]].
  static void pick(const Float& x, const Int& at, Float& out) {
#if defined(__AVX512F__)
    for (int v = 0; v < VECTORS; ++v) {
      const __m512i where = __m512i(at[v]);
      if constexpr (VECTORS == 1) {
        out[v] = FloatLanes(_mm512_permutexvar_ps(where, __m512(x[0])));
      } else {
        __m512 one = _mm512_permutex2var_ps(__m512(x[0]), where, __m512(x[1]));
        if constexpr (VECTORS == 4) {
          const __m512 high = _mm512_permutex2var_ps(__m512(x[2]), where, __m512(x[3]));
          one = _mm512_mask_mov_ps(one, _mm512_test_epi32_mask(where, _mm512_set1_epi32(32)), high);
        }
        out[v] = FloatLanes(one);
      }
    }
#elif defined(__AVX2__)
    for (int v = 0; v < VECTORS; ++v) {
      const __m256i where = __m256i(at[v]), vector = _mm256_srli_epi32(where, 3);
      __m256 one = _mm256_permutevar8x32_ps(__m256(x[0]), where);
      for (int u = 1; u < VECTORS; ++u)
        one = _mm256_blendv_ps(one, _mm256_permutevar8x32_ps(__m256(x[u]), where),
                               _mm256_castsi256_ps(_mm256_cmpeq_epi32(vector, _mm256_set1_epi32(u))));
      out[v] = FloatLanes(one);
    }
#else
    const float* all = reinterpret_cast<const float*>(x);
    for (int v = 0; v < VECTORS; ++v)
      for (int l = 0; l < LANES; ++l) out[v][l] = all[at[v][l]];
#endif
  }
};

// Symbols begin..end (of the tile) chosen at once by Viterbi's algorithm, all others fixed. What stands for a
// class of windows carries the gradient as its own choices have made it, so its cost is exact; that one
// stands for all of its class is a heuristic. Returns whether a strictly better choice was found.
template <class T>
bool descend_run(T, const Here& row, const Classes<T>& classes, int64_t begin, int64_t end) {
  using C = Classes<T>;
  const int64_t first = std::max<int64_t>(begin - T::REACH + 1, 0);
  typename C::Float cost, next, x, at, base, gradient[SIDE];
  typename C::Int which, came;
  IntLanes back[SIDE][C::VECTORS];
  for (FloatLanes& all : cost) all = FloatLanes{} + INFINITY;
  const int behind = T::leaves(end < row.c ? T::window(row.code, row.c, end) : 0);
  cost[behind / LANES][behind % LANES] = 0;
  for (int64_t t = first; t < end; ++t)
    for (FloatLanes& all : gradient[t]) all = FloatLanes{} + row.g[t];
  for (int64_t j = end - 1; j >= first; --j) {
    const float old = row.level[T::window(row.code, row.c, j)], half = 0.5f * row.h.row(j)[j];
    const bool fixed = j < begin;  // what stands before the run keeps its symbols
    const int plain = row.code[j] % C::PLAINS, taps = row.code[j] / C::PLAINS;
    for (int v = 0; v < C::VECTORS; ++v) {
      next[v] = FloatLanes{} + INFINITY, x[v] = FloatLanes{};
      which[v] = came[v] = IntLanes{};
    }
    for (int tap = 0; tap < 2; ++tap) {
      C::pick(gradient[j], classes.from[tap], at);
      C::pick(cost, classes.from[tap], base);
      for (int v = 0; fixed && v < C::VECTORS; ++v)
        base[v] = classes.taps[tap][v] == taps ? base[v] : FloatLanes{} + INFINITY;
      for (int p = fixed ? plain : 0; p < (fixed ? plain + 1 : C::PLAINS); ++p) {
        const int m = tap * C::PLAINS + p;
        for (int v = 0; v < C::VECTORS; ++v) {
          const FloatLanes step = classes.level[m][v] - old, e = base[v] + step * (at[v] + half * step);
          const IntLanes better = e < next[v];
          next[v] = better ? e : next[v];
          x[v] = better ? step : x[v];
          which[v] = better ? IntLanes{} + m : which[v];
          came[v] = better ? classes.from[tap][v] : came[v];
        }
      }
    }
    for (int64_t t = first; t < j; ++t) {
      C::pick(gradient[t], came, at);
      const float htj = row.h.row(t)[j];
      for (int v = 0; v < C::VECTORS; ++v) gradient[t][v] = at[v] + htj * x[v];
    }
    for (int v = 0; v < C::VECTORS; ++v) cost[v] = next[v], back[j][v] = which[v];
  }
  int k = 0;
  for (int t = 1; t < C::K; ++t)
    if (cost[t / LANES][t % LANES] < cost[k / LANES][k % LANES]) k = t;
  const float gain = cost[k / LANES][k % LANES];
  if (!(gain < 0)) return false;
  float steps[SIDE], square = 0;
  uint8_t to[SIDE];
  for (int64_t j = first; j < end; ++j) {
    const int s = T::leaving(k, back[j][k / LANES][k % LANES]);
    to[j] = uint8_t(s % T::SYMBOLS);
    steps[j] = row.level[s] - row.level[T::window(row.code, row.c, j)];
    square += 0.5f * row.h.row(j)[j] * steps[j] * steps[j];
    k = s / T::SYMBOLS;
  }
  if (!(gain < -LEAST * square)) return false;
  for (int64_t j = first; j < end; ++j) {
    row.code[j] = to[j];
    if (steps[j] != 0) change(row, j, steps[j]);
  }
  return true;
}

// `sweeps` passes over rows of the same H; gradient and codes [rows, c].
template <class T>
void descend_rows(T, const float* h, float* gradient, const float* table, const float* scale, uint8_t* codes,
                  int64_t rows, int64_t c, int64_t run, int64_t stride, int64_t sweeps) {
  const int64_t wide = sides(c) * SIDE + SIDE + 16;  // no power of two: see Tile
  const Lines<float> g(rows * wide);
  std::fill(g.data(), g.data() + rows * wide, 0.f);
  for (int64_t i = 0; i < rows; ++i) std::copy(gradient + i * c, gradient + (i + 1) * c, &g[i * wide]);
  std::vector<Change> changes(rows * SIDE);
  std::vector<int> count(rows);
  std::vector<int64_t> changed(rows, 1);  // in the last sweep
  Tile tile;
  for (int64_t sweep = 0; sweep < sweeps; ++sweep) {
    std::vector<int64_t> before(rows, 0);
    before.swap(changed);
    for (int64_t stripe = 0; stripe < c; stripe += STRIPE) {
      const int64_t from = std::max<int64_t>(stripe - BEFORE, 0);
      int64_t total = 0;
      tile.copy(h, c, from, from);
      for (int64_t i = 0; i < rows; ++i) {
        count[i] = 0;
        if (!before[i]) continue;
        float level[STATES], local[SIDE], step[SIDE] = {};
        for (int s = 0; s < STATES; ++s) level[s] = table[s] * scale[i];
        std::copy(&g[i * wide + from], &g[i * wide + from] + SIDE, local);
        const Here row{tile, local, codes + i * c + from, c - from, level, step};
        const Classes<T> classes(level);
        const int64_t last = std::min(c, stripe + STRIPE) - from;
        for (int64_t j = stripe - from; j < last; j += stride)
          changed[i] += descend_run(T(), row, classes, j, std::min(c - from, j + run));
        for (int64_t j = 0; j < SIDE; ++j)
          if (step[j] != 0) changes[i * SIDE + count[i]++] = {int32_t(j), step[j]};
        total += count[i];
      }
      for (int64_t t = 0; t < c && total; t += SIDE) {
        total < SIDE ? tile.view(h, c, from, t) : tile.copy(h, c, from, t);
        Tile::expect(h, c, from, t + SIDE);
        for (int64_t i = 0; i < rows; ++i)
          if (count[i]) add_changes(&changes[i * SIDE], count[i], tile, &g[i * wide + t]);
      }
    }
  }
  for (int64_t i = 0; i < rows; ++i) std::copy(&g[i * wide], &g[i * wide] + c, gradient + i * c);
}

}  // namespace

int skimlm_trellis_descend(const float* h, float* gradient, const float* table, const float* scale,
                           uint8_t* codes, int64_t r, int64_t c, int64_t bits, int64_t run, int64_t stride,
                           int64_t sweeps, int threads) {
  return guarded([&] {
    return with_trellis(bits, [&](auto trellis) {
      parallel_rows(r, rows_at_once(r, MANY, threads), threads, [&](int64_t i, int64_t last) {
        descend_rows(trellis, h, gradient + i * c, table, scale + i, codes + i * c, last - i, c, run,
                     stride, sweeps);
      });
    });
  });
}
