// The best symbols of trellis rows under diagonal weights, by Viterbi's algorithm, and the normal equations
// of their table. Readable versions: quantize/trellis.py.
#include "trellis.h"

#include <cmath>
#include <vector>

#include "guard.h"
#include "parallel.h"
#include "product.h"
#include "tile.h"

namespace {

using ByteLanes = uint8_t __attribute__((vector_size(LANES)));

// A row to a lane: what windows do to each other is then the same for all of them.
template <class T>
void viterbi(T, const float* w, const float* f, const float* table, const float* scale, uint8_t* codes,
             int64_t rows, const std::vector<int64_t>& order) {
  const int64_t c = int64_t(order.size());
  FloatLanes cost[STATES], next[STATES], size = {};
  for (FloatLanes& start : cost) start = FloatLanes{} + INFINITY;
  cost[0] = FloatLanes{};
  for (int64_t l = 0; l < rows; ++l) size[l] = scale[l];
  const Lines<ByteLanes> back(c * T::CLASSES);  // which of the windows that leave a class came before
  for (int64_t j = c; j-- > 0;) {
    FloatLanes target = {}, weight = {};
    const int64_t at = order[j];
    for (int64_t l = 0; l < rows; ++l) target[l] = w[l * c + at], weight[l] = f[l * c + at];
    for (int k = 0; k < T::CLASSES; ++k) {
      FloatLanes least = cost[T::leaving(k, 0)];
      IntLanes which = {};
      for (int m = 1; m < T::SYMBOLS; ++m) {
        const FloatLanes other = cost[T::leaving(k, m)];
        which = other < least ? IntLanes{} + m : which;
        least = other < least ? other : least;
      }
      back[j * T::CLASSES + k] = __builtin_convertvector(which, ByteLanes);
      for (int u = 0; u < T::SYMBOLS; ++u) {
        const FloatLanes d = table[k * T::SYMBOLS + u] * size - target;
        next[k * T::SYMBOLS + u] = least + weight * d * d;
      }
    }
    std::copy(next, next + STATES, cost);
  }
  for (int64_t l = 0; l < rows; ++l) {
    int s = 0;
    for (int t = 1; t < STATES; ++t)
      if (cost[t][l] < cost[s][l]) s = t;
    for (int64_t j = 0; j < c; ++j) {
      codes[l * c + order[j]] = uint8_t(s % T::SYMBOLS);
      const int k = s / T::SYMBOLS;
      s = T::leaving(k, back[j * T::CLASSES + k][l]);
    }
  }
}

// Columns as the stream takes them: every eighth, from each of the first eight on.
std::vector<int64_t> stream_order(int64_t c) {
  std::vector<int64_t> order;
  for (int64_t first = 0; first < 8; ++first)
    for (int64_t j = first; j < c; j += 8) order.push_back(j);
  return order;
}

constexpr int64_t TOGETHER = 16;  // rows that share a tile of H: their sums fit the second cache

// a [128, 128] += weight * P^T H P of some rows, P [c, 128] being 1 where a weight has a window [rows, c].
void add_normal(const float* h, const uint8_t* window, const float* weight, int64_t rows, int64_t c, float* a) {
  const Lines<float> sums(rows * STATES * SIDE);  // of the rows of H that share a window
  Tile tile;
  for (int64_t t = 0; t < c; t += SIDE) {
    std::fill(sums.data(), sums.data() + rows * STATES * SIDE, 0.f);
    for (int64_t j = 0; j < c; j += SIDE) {
      tile.copy(h, c, j, t);
      for (int64_t i = 0; i < rows; ++i)
        for (int64_t k = j; k < std::min(c, j + SIDE); ++k) {
          const Floats* from = reinterpret_cast<const Floats*>(tile.row(k - j));
          Floats* to = reinterpret_cast<Floats*>(&sums[(i * STATES + window[i * c + k]) * SIDE]);
          for (int64_t e = 0; e < SIDE / 16; ++e) to[e] += from[e];
        }
    }
    for (int64_t i = 0; i < rows; ++i)
      for (int s = 0; s < STATES; ++s) {
        const float* sum = &sums[(i * STATES + s) * SIDE];
        for (int64_t e = 0; e < std::min(SIDE, c - t); ++e)
          a[s * STATES + window[i * c + t + e]] += weight[i] * sum[e];
      }
  }
}

}  // namespace

int skimlm_trellis_viterbi(const float* w, const float* f, const float* table, const float* scale,
                           uint8_t* codes, int64_t r, int64_t c, int64_t bits, int threads) {
  return guarded([&] {
    const std::vector<int64_t> order = stream_order(c);
    return with_trellis(bits, [&](auto trellis) {
      parallel_rows(r, LANES, threads, [&](int64_t i, int64_t last) {
        viterbi(trellis, w + i * c, f + i * c, table, scale + i, codes + i * c, last - i, order);
      });
    });
  });
}

int skimlm_trellis_normal(const float* h, const uint8_t* windows, const float* weight, double* a, int64_t r,
                          int64_t c, int threads) {
  return guarded([&] {
    const int64_t blocks = (r + SIDE - 1) / SIDE;  // whatever the threads: sums keep their order
    std::vector<float> part(blocks * STATES * STATES);
    parallel_rows(blocks, 1, threads, [&](int64_t block, int64_t) {
      const int64_t end = std::min(r, (block + 1) * SIDE);
      for (int64_t i = block * SIDE; i < end; i += TOGETHER)
        add_normal(h, windows + i * c, weight + i, std::min(TOGETHER, end - i), c, &part[block * STATES * STATES]);
    });
    std::fill(a, a + STATES * STATES, 0.0);
    for (int64_t block = 0; block < blocks; ++block)
      for (int64_t e = 0; e < STATES * STATES; ++e) a[e] += part[block * STATES * STATES + e];
  });
}
