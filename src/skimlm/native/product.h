// What the products with packed weights share: x as integers, and where results go.
//
// x of one token becomes 24-bit integers in units of a power of two. A bfloat16 x is then exact but for
// entries 2^14 below the largest, any x is within 2^-23 of its largest entry; codes and levels are
// integers too, so sums are exact, and the same on every instruction set and for any split of the work.
#pragma once
#include <atomic>
#include <cstdint>
#include <functional>
#include <memory>
#include <new>
#include <vector>

#include "codes.h"
#include "kernels.h"
#include "layout.h"
#include "parallel.h"

constexpr int64_t WORK = 1 << 14;  // bytes of weights that one turn of a thread takes, at least
constexpr int64_t TURNS = 4;       // of each thread, where there is more

// Numbers that begin on a cache line, not initialised: a load of 64 bytes then touches one line.
template <class T>
struct Lines {
  Lines() = default;
  explicit Lines(int64_t size) {
    at.reset(static_cast<T*>(::operator new((size * sizeof(T) + 63) / 64 * 64, std::align_val_t(64))));
  }
  T* data() const { return at.get(); }
  T& operator[](int64_t i) const { return at.get()[i]; }
  explicit operator bool() const { return bool(at); }

  struct Free {
    void operator()(T* p) const { ::operator delete(p, std::align_val_t(64)); }
  };
  std::unique_ptr<T, Free> at;
};

// x of n tokens as integers. Columns are padded with zeros to whole chunks.
struct Integers {
  int64_t n, c, chunks;
  Lines<int8_t> planes;  // with VBMI: [n, chunks / 2, 3, 128], x = p0 + 2^8 p1 + 2^16 p2, columns as the
                         // codes of a packed row come out; in lines [n, chunks, 3, 64], as they are
  std::vector<int16_t> digits;  // elsewhere: [n, 2, chunks, 64], x = d0 + 2^12 d1
  std::vector<int64_t> sums;    // [n] of the integers
  std::vector<double> steps;    // [n] their unit; NaN if x is not finite
};

// x [n, c] times in_scale [c] unless it is null, as floats.
std::vector<float> to_floats(const void* x, bool bf16, const uint16_t* in_scale, int64_t n, int64_t c);

// x [n, c] for packed rows; or, each token cut into `lines` lines of equal length with one unit (n
// becomes n * lines), for tables.
Integers to_integers(const float* x, int64_t n, int64_t c, int lines = 0);

// The same in two steps: room for n tokens of c columns, and one of them, x [c].
Integers room_for(int64_t n, int64_t c, int lines = 0);
void fill(Integers& out, int64_t token, const float* x, int lines = 0);

// x of n tokens rounded to int8, padded with zeros to whole pairs of chunks.
struct Rounded {
  int64_t n, c, pairs;
  std::vector<int8_t> x;      // [n, pairs, 2, 64] in the order of column_of
  std::vector<float> scales;  // [n, pairs]
  std::vector<float> sums;    // [n]: sum of the rounded x
};

Rounded to_rounded(const float* x, int64_t n, int64_t c);

// What a sum of integers is worth: less the zero point times the sum of x, in units.
inline float to_value(int64_t total, int64_t zero, int64_t sum, float scale, double step) {
  return float(double(total - zero * sum) * (double(scale) * step));
}

struct Output {
  void* data;  // [n, r]
  bool bf16;
  int64_t r;
  const float* bias;  // or null
  void put(int64_t token, int64_t row, float value) const {
    if (bias) value += bias[row];
    if (bf16)
      static_cast<uint16_t*>(data)[token * r + row] = to_bf16(value);
    else
      static_cast<float*>(data)[token * r + row] = value;
  }
  // Rows from `row` on; values change.
  void put(int64_t token, int64_t row, float* values, int64_t count) const {
    if (bias)
      for (int64_t i = 0; i < count; ++i) values[i] += bias[row + i];
    from_float(values, bf16, count, static_cast<char*>(data) + (token * r + row) * (bf16 ? 2 : 4));
  }
};

// One product of several, of a plain layer.
struct Product {
  const SkimlmLayer& layer;
  const Matrix& matrix;
  const Integers& x;
  Output out;
};

// Few tokens: every weight is read once and multiplied in registers. With `next`, by all threads of a
// team that call it with the same arguments and the same counter at 0; else on threads of its own.
void multiply(const Product* products, int64_t count, int threads, std::atomic<int64_t>* next = nullptr);

// Several tokens of exact products, with VBMI (panels.cpp): stored rows begin..end, PANEL at most.
constexpr int64_t PANEL = 32;
bool takes_panels(const Integers& x);
void multiply_panel(const Product& product, int64_t begin, int64_t end);

// The same for layers of any kind: one token, in_scale left out.
struct SparseProduct {
  const SkimlmLayer& layer;
  float* u;  // [rank], room for x A^T that the team shares
  Output out;  // float
};

// By all threads of a team that call it with the same arguments and both counters at 0.
void multiply(const SparseProduct* products, int64_t count, const float* x, Team& team,
              std::atomic<int64_t>* next);

// What layer.cpp chooses from, its layout being known; x and out as in skimlm_layer_matmul.
void matmul_plain(const SkimlmLayer& w, const Matrix& m, const void* x, bool bf16, int64_t n, int64_t exact,
                 const Output& out, int threads);
void matmul_any(const SkimlmLayer& w, const Matrix& m, const Matrix& a, const void* x, bool bf16, int64_t n,
                const Output& out, int threads);
void unpack(const SkimlmLayer& w, const Matrix& m, void* out, bool bf16, int64_t begin, int64_t end,
            bool stored, int threads);

// The same for one stored row after the other, wherever each stands: `places` are below m.r.
void unpack_each(const SkimlmLayer& w, const Matrix& m, const int32_t* places, int64_t count, void* out, bool bf16,
                 int threads);

// Tokens in bfloat16 from which that costs less than integers do.
constexpr int64_t IN_BF16 = 6;

// One product of several of the same x, of a plain layer without in_scale.
struct ManyProduct {
  const SkimlmLayer& layer;
  const Matrix& matrix;
  Output out;
};

// Many tokens, with VBMI: a few rows at a time become bfloat16 in cache. x [n, c] bfloat16.
void multiply_many(const std::vector<ManyProduct>& products, const void* x, int64_t n, int threads);

// Rows of bytes in memory.
struct StoredBytes {
  const int8_t* at;  // [., stride], whole chunks of every row
  int64_t stride;
};

// Rows of integers -128..127 that are made when they are needed, with a scale for every `span` columns,
// whole chunks unless there is one scale.
struct ByteRows {
  int64_t r, c, scales, span;
  const int32_t* order;  // which row of `out` they are, null if the same
  // Rows begin..end to `room`, if they are not to be had as they are, and their scales to [., scales].
  std::function<StoredBytes(int64_t begin, int64_t end, int8_t* room, int64_t stride, float* scale)> make;
};

// The same for such rows, x float or bfloat16; in_scale may be null.
void multiply_many(const ByteRows& rows, const void* x, bool bf16, const uint16_t* in_scale, int64_t n,
                   const Output& out, int threads);
