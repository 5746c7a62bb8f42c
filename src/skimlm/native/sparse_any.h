// Sparse rows as numbers, on any processor.
#pragma once
#include <algorithm>

#include "sparse.h"

namespace {

// Patterns or bits as the columns they keep; `each` must refuse more than it has room for.
template <class Each>
void positions_any(Sparsity sparsity, const uint8_t* at, int64_t c, const Each& each) {
  if (sparsity == BITMAP) {
    for (int64_t j = 0; j < c; ++j)
      if (at[j / 8] >> j % 8 & 1) each(j);
    return;
  }
  for (int64_t j = 0; j < c; j += 4) {
    const int64_t bit = j / 4 * 3;
    uint32_t pair = at[bit / 8];
    if (bit % 8 > 5) pair |= uint32_t(at[bit / 8 + 1]) << 8;
    const uint32_t pattern = pair >> bit % 8 & 7;
    each(j + FIRST[pattern]);
    each(j + SECOND[pattern]);
  }
}

// to[j] = of a kept column its level from `from` [kept], in order; others are left.
template <class T>
void spread_any(const Matrix& m, int64_t stored, const T* from, T* to) {
  int64_t k = 0;
  positions_any(m.sparsity, m.positions + stored * m.places, m.c, [&](int64_t j) {
    if (k < m.kept) to[j] = from[k++];
  });
}

// Rows as numbers, with room for one.
template <class T>
struct Numbers {
  std::vector<uint8_t> code;
  std::vector<T> kept, dense;
  explicit Numbers(const Matrix& m)
      : code(m.kept + 8), kept(m.kept), dense(m.sparsity ? m.c : 0) {}

  // Row i of a group [c]: the entries of its codes, 0 where pruned.
  const T* row(const Matrix& m, const Group& g, int64_t i, const T* entry) {
    g.indices(i, m.kept, code.data());
    for (int64_t k = 0; k < m.kept; ++k) kept[k] = entry[code[k]];
    if (!m.sparsity) return kept.data();
    std::fill(dense.begin(), dense.end(), T(0));
    spread_any(m, g.first + i, kept.data(), dense.data());
    return dense.data();
  }
};

// to[j] = 1 at the columns of a row that have a code, 0 elsewhere.
template <class T>
void ones_any(const Matrix& m, int64_t stored, T* to) {
  std::fill_n(to, m.c, T(m.sparsity ? 0 : 1));
  if (m.sparsity)
    positions_any(m.sparsity, m.positions + stored * m.places, m.c, [&](int64_t j) { to[j] = 1; });
}

}  // namespace
