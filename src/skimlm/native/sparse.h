// What the files of products with sparse rows, grids and adapters share (sparse.cpp).
#pragma once
#include <algorithm>
#include <cmath>
#include <cstring>

#include "lanes.h"
#include "product.h"

constexpr int64_t UNIT = 2 * CHUNK;        // columns; of 2:4 rows 64 codes and 32 patterns
constexpr uint8_t FIRST[8] = {0, 0, 0, 1, 1, 2, 2, 2}, SECOND[8] = {1, 2, 3, 2, 3, 3, 3, 3};

// x as matrices read it that have the same columns in a scale.
struct Input {
  const Integers& x;
  Sparsity sparsity;
  bool narrow;
  int64_t span;
  // with planes:
  std::vector<int64_t> sums;   // [n, scales] over the columns of a scale
  Lines<int32_t> lanes;        // [n, scales, 16] of them, for scales of one or two chunks: mod 2^32
  Lines<uint8_t> biased;       // [units, 3, 128] of one token: b0 + 2^8 b1 + 2^16 (b2 - 128), unsigned
  Lines<int8_t> paired;        // the same of x itself, signed, in the order of `column_of`
  Lines<int32_t> paired_lanes;  // [units, 16] sums of it
};

// Scales for which four rows at a time of a grid of up to 4 bits are summed in 32 bits: see `Narrow`.
inline bool is_narrow(const Matrix& m) { return m.grid && (m.span == CHUNK || m.span == UNIT); }

Input to_input(const Integers& x, const Matrix& m);

// One row's sum over its scales, in units of x. Products are exact but for more than 2^15 columns of
// one scale; fma all the same, as some compilers would put it there and others not.
struct Value {
  double sum = 0;
  void add(int64_t total, uint16_t scale) {
    sum = std::fma(double(total), double(from_bf16(scale)), sum);
  }
};

// Rows begin..end of a group times x: on any processor, and as bytes in L1.
using Rows = void (*)(const Matrix&, const Group&, int64_t begin, int64_t end, const Input&,
                      const Output&);
void rows_any(const Matrix& m, const Group& g, int64_t begin, int64_t end, const Input& in,
              const Output& out);

#if defined(__AVX512F__)
void rows_bytes(const Matrix& m, const Group& g, int64_t begin, int64_t end, const Input& in,
                const Output& out);
extern const Rows pairs_of_width[2][MAX_B + 1];  // one token, 2:4; [grid][width], null: there is none
extern const Rows dense_of_width[5];             // one token, a dense grid whose scales are narrow
#endif
