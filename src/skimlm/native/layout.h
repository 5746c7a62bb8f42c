// A stored layer as rows grouped by width: what every product reads of it.
#pragma once
#include <cstdint>
#include <vector>

#include "codes.h"
#include "layer.h"

constexpr int64_t MAX_B = SKIMLM_MAX_WIDTH;
constexpr int64_t ADAPTER = SKIMLM_ADAPTER_GROUP;
enum Sparsity { DENSE, PAIRS, BITMAP };  // as layer.h counts them

// How the codes of a row become levels (format/row_codes.py has the formulas). What a code decides stands
// in three places: here, `lay_out` for what its rows add to the stored tensors, and `multiply_rows` in
// sparse.cpp for the kernels.
enum RowCode { TABLE, AFFINE, GRID, TRELLIS };

inline RowCode code_of(const SkimlmLayer& w, int64_t width) {
  return w.group ? GRID : width > SKIMLM_TRELLIS ? TRELLIS : width <= SKIMLM_MAX_TABLE_WIDTH ? TABLE : AFFINE;
}

// Bits of the codes of rows of a stored width; 0: such a layer has no such rows.
inline int code_bits(const SkimlmLayer& w, int64_t width) {
  const bool known = width <= MAX_B || (!w.group && width > SKIMLM_TRELLIS && width < SKIMLM_WIDTHS_END);
  return known ? int(width % SKIMLM_TRELLIS) : 0;
}

// Bytes of c codes of b bits: one after the other, or of a trellis a byte for each bit of eight.
inline int64_t bytes_of_row(RowCode code, int b, int64_t c) {
  return code == TRELLIS ? divide_up(c, 8) * b : divide_up(c * b, 8);
}

// What the rows of one width share.
struct Group {
  int width;  // bits of a code
  RowCode code;
  int64_t rows, first;    // how many, and the stored index of the first
  const uint8_t* packed;  // of the first row
  const int8_t* levels;   // of the first row, TABLE; of all rows, TRELLIS
  const int16_t* zeros;   // of the first row, AFFINE
  int64_t stride;         // bytes of a row

  // What is taken off the levels of row i.
  int64_t zero(int64_t i) const { return code == AFFINE ? zeros[i] : 0; }

  // What is looked up for each of the c codes of row i: the code itself or, of a trellis, its window. `to` has
  // room for eight more.
  void indices(int64_t i, int64_t c, uint8_t* to) const {
    (code == TRELLIS ? cut_windows : cut_row)(width, packed + i * stride, to, c);
  }
  int index_bits() const { return code == TRELLIS ? WINDOW : width; }

  // The levels of row i by index.
  template <class T>
  void entries(int64_t i, T* out) const {
    const int8_t* own = code == TABLE ? levels + (i << width) : levels;
    const bool stored = code == TABLE || code == TRELLIS;
    for (int k = 0; k < 1 << index_bits(); ++k)
      out[k] = T(stored ? own[k] : code == GRID ? k - (1 << (width - 1)) : k);
  }
};

// W, or a 4-bit A.
struct Matrix {
  Sparsity sparsity;
  bool grid;  // all rows are GRID
  int64_t r, c, kept;
  const uint8_t* positions;
  int64_t places;             // bytes of them in a row
  const uint16_t* row_scale;  // [r, scales]
  int64_t scales, span;       // how many a row has, and the columns of one
  int64_t affine;             // rows that are AFFINE
  const int32_t* order;       // which row stands at a stored place; null: the same
  std::vector<int32_t> found;
  std::vector<Group> groups;

  int64_t row(int64_t stored) const { return order ? order[stored] : stored; }
  int64_t end_of(int64_t scale) const { return scale + 1 == scales ? c : (scale + 1) * span; }
};

// False if the sizes are not those of the widths and of what the layer has.
bool lay_out(const SkimlmLayer& w, Matrix& m);

// A of 4 bits. False if the sizes of the adapter are wrong.
bool lay_out_adapter(const SkimlmLayer& w, Matrix& m);

// Whether both can be done.
inline bool fits(const SkimlmLayer& w) {
  Matrix m{}, a{};
  return lay_out(w, m) && lay_out_adapter(w, a);
}

// Whether a layer is a matrix of whole rows with one scale each, nothing else (matmul.cpp).
inline bool is_plain(const SkimlmLayer& w) { return w.sparsity == DENSE && !w.group && !w.rank; }
