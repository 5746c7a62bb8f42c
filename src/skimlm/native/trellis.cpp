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
             int64_t rows, int64_t c) {
  FloatLanes cost[STATES], next[STATES], size = {};
  for (FloatLanes& start : cost) start = FloatLanes{} + INFINITY;
  cost[0] = FloatLanes{};
  for (int64_t l = 0; l < rows; ++l) size[l] = scale[l];
  const Lines<ByteLanes> back(c * T::CLASSES);  // which of the windows that leave a class came before
  for (int64_t j = c; j-- > 0;) {
    FloatLanes target = {}, weight = {};
    for (int64_t l = 0; l < rows; ++l) target[l] = w[l * c + j], weight[l] = f[l * c + j];
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
      codes[l * c + j] = uint8_t(s % T::SYMBOLS);
      const int k = s / T::SYMBOLS;
      s = T::leaving(k, back[j * T::CLASSES + k][l]);
    }
  }
}

// Columns of a row in the order of their windows.
struct ByWindow {
  int begin[STATES + 1] = {};
  std::vector<int32_t> column;

  ByWindow(const std::vector<uint8_t>& window) : column(window.size()) {
    for (const uint8_t s : window) ++begin[s + 1];
    for (int s = 0; s < STATES; ++s) begin[s + 1] += begin[s];
    int next[STATES];
    std::copy(begin, begin + STATES, next);
    for (size_t j = 0; j < window.size(); ++j) column[next[window[j]]++] = int32_t(j);
  }
};

// a [128, 128] += weight * P^T H P of one row, P [c, 128] being 1 where a weight has a window.
void add_normal(const float* h, const std::vector<uint8_t>& window, float weight, float* a) {
  const int64_t c = int64_t(window.size());
  const ByWindow order(window);
  for (int64_t t = 0; t < c; t += SIDE) {
    const int64_t width = std::min(SIDE, c - t);
    for (int s = 0; s < STATES; ++s) {
      if (order.begin[s] == order.begin[s + 1]) continue;
      float sum[SIDE] = {};
      for (int k = order.begin[s]; k < order.begin[s + 1]; ++k) {
        const float* from = h + order.column[k] * c + t;
        if (width == SIDE)
          for (int64_t e = 0; e < SIDE; ++e) sum[e] += from[e];
        else
          for (int64_t e = 0; e < width; ++e) sum[e] += from[e];
      }
      for (int64_t e = 0; e < width; ++e) a[s * STATES + window[t + e]] += weight * sum[e];
    }
  }
}

}  // namespace

int skimlm_trellis_viterbi(const float* w, const float* f, const float* table, const float* scale,
                           uint8_t* codes, int64_t r, int64_t c, int64_t bits, int64_t taps, int threads) {
  return guarded([&] {
    with_trellis(bits, taps, [&](auto trellis) {
      parallel_rows(r, LANES, threads, [&](int64_t i, int64_t last) {
        viterbi(trellis, w + i * c, f + i * c, table, scale + i, codes + i * c, last - i, c);
      });
    });
  });
}

int skimlm_trellis_normal(const float* h, const uint8_t* codes, const float* weight, double* a, int64_t r,
                          int64_t c, int64_t bits, int64_t taps, int threads) {
  return guarded([&] {
    const int64_t blocks = (r + SIDE - 1) / SIDE;  // whatever the threads: sums keep their order
    std::vector<float> part(blocks * STATES * STATES);
    with_trellis(bits, taps, [&](auto trellis) {
      parallel_rows(blocks, 1, threads, [&](int64_t block, int64_t) {
        std::vector<uint8_t> window(c);
        for (int64_t i = block * SIDE; i < std::min(r, (block + 1) * SIDE); ++i) {
          for (int64_t j = 0; j < c; ++j) window[j] = uint8_t(trellis.window(codes + i * c, c, j));
          add_normal(h, window, weight[i], &part[block * STATES * STATES]);
        }
      });
    });
    std::fill(a, a + STATES * STATES, 0.0);
    for (int64_t block = 0; block < blocks; ++block)
      for (int64_t e = 0; e < STATES * STATES; ++e) a[e] += part[block * STATES * STATES + e];
  });
}
