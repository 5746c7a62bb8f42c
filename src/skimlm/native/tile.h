// Tiles of a matrix H that many rows share: H does not fit in the caches where models are large, and every
// row of a weight needs all of it.
#pragma once
#include <algorithm>
#include <cstdint>
#include <cstring>

namespace {

constexpr int64_t SIDE = 64;                // of a tile of H: 16 KB
constexpr int64_t MANY = 256;               // rows that share it

// Sixteen floats wherever they stand; of several registers where they are shorter.
using Floats = float __attribute__((vector_size(64), aligned(4), may_alias));

inline int64_t sides(int64_t c) { return (c + SIDE - 1) / SIDE; }

// H from row j and column t on: rows may be read as they stand, or are copied next to each other (a
// distance of a power of two would put them all into the same few places of the first cache), with
// zeros past the last column.
struct Tile {
  alignas(64) float own[SIDE * SIDE];
  const float* at;
  int64_t stride;

  void view(const float* h, int64_t c, int64_t j, int64_t t) {
    if (t + SIDE > c) return copy(h, c, j, t);
    at = h + j * c + t;
    stride = c;
  }
  void copy(const float* h, int64_t c, int64_t j, int64_t t) {
    const int64_t rows = std::min(SIDE, c - j), columns = std::min(SIDE, c - t);
    if (columns < SIDE) std::fill(own, own + SIDE * SIDE, 0.f);
    for (int64_t k = 0; k < rows; ++k)
      std::memcpy(own + k * SIDE, h + (j + k) * c + t, columns * sizeof(float));
    at = own;
    stride = SIDE;
  }
  // The tile that comes after this one is on its way while this one is in use.
  static void expect(const float* h, int64_t c, int64_t j, int64_t t) {
    for (int64_t k = j; k < std::min(j + SIDE, c) && t < c; ++k)
      for (int64_t e = 0; e < SIDE; e += 16) __builtin_prefetch(h + k * c + t + e);
  }
  const float* row(int64_t k) const { return at + k * stride; }
};

struct Change {
  int32_t column;  // within its 64
  float step;      // of the weight
};

// g [64] += the changes times their rows of H.
inline void add_changes(const Change* change, int count, const Tile& tile, float* gradient) {
  Floats* g = reinterpret_cast<Floats*>(gradient);
  Floats g0 = g[0], g1 = g[1], g2 = g[2], g3 = g[3];
  for (int k = 0; k < count; ++k) {
    const float step = change[k].step;
    const Floats* from = reinterpret_cast<const Floats*>(tile.row(change[k].column));
    g0 += step * from[0];
    g1 += step * from[1];
    g2 += step * from[2];
    g3 += step * from[3];
  }
  g[0] = g0, g[1] = g1, g[2] = g2, g[3] = g3;
}

// Rows that a thread takes at once: all threads have work, many rows share H.
inline int64_t rows_at_once(int64_t r, int64_t most, int threads) {
  return std::clamp<int64_t>(r / (4 * std::max(threads, 1)), 4, std::max<int64_t>(most, 4));
}

}  // namespace
