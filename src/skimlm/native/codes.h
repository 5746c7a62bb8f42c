// Small floats and packed codes, as FORMAT.md stores them. In every file its own copy: the files are
// built once per instruction set.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "layer.h"

#if defined(__BMI2__)
#include <immintrin.h>
#endif

constexpr int WINDOW = SKIMLM_WINDOW;

inline int64_t divide_up(int64_t a, int64_t b) { return a ? (a - 1) / b + 1 : 0; }

namespace {

inline uint16_t to_bf16(float x) {  // round to nearest, ties to even; NaN is never passed in
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

inline float from_bf16(uint16_t x) {
  uint32_t bits = uint32_t(x) << 16;
  float out;
  std::memcpy(&out, &bits, 4);
  return out;
}

inline float from_fp16(uint16_t x) {
  const int exponent = (x >> 10) & 31, mantissa = x & 1023;
  const float magnitude = exponent == 0    ? std::ldexp(float(mantissa), -24)
                          : exponent == 31 ? (mantissa ? NAN : INFINITY)
                                           : std::ldexp(float(mantissa + 1024), exponent - 25);
  return x & 0x8000 ? -magnitude : magnitude;
}

// n numbers as floats.
inline void to_float(const void* x, bool bf16, int64_t n, float* out) {
  if (bf16)
    for (int64_t j = 0; j < n; ++j) out[j] = from_bf16(static_cast<const uint16_t*>(x)[j]);
  else
    std::copy_n(static_cast<const float*>(x), n, out);
}

// And back, rounded once.
inline void from_float(const float* x, bool bf16, int64_t n, void* out) {
  if (bf16)
    for (int64_t j = 0; j < n; ++j) static_cast<uint16_t*>(out)[j] = to_bf16(x[j]);
  else
    std::copy_n(x, n, static_cast<float*>(out));
}

// Codes of one row: eight of them are B whole bytes, read as one little-endian word.
template <int B>
void cut(const uint8_t* row, uint8_t* code, int64_t c) {
  constexpr uint64_t mask = (uint64_t(1) << B) - 1;
  auto eight = [&](uint64_t word, uint8_t* to) {
    for (int t = 0; t < 8; ++t) to[t] = uint8_t((word >> (B * t)) & mask);
  };
  int64_t j = 0;
  for (; j + 8 <= c; j += 8, row += B) {
    uint64_t word = 0;
    std::memcpy(&word, row, B);
    eight(word, code + j);
  }
  if (j < c) {
    uint64_t word = 0;
    std::memcpy(&word, row, ((c - j) * B + 7) / 8);
    eight(word, code + j);  // code has room for eight more
  }
}

using Cut = void (*)(const uint8_t*, uint8_t*, int64_t);
const Cut cut_of_width[9] = {nullptr, cut<1>, cut<2>, cut<3>, cut<4>, cut<5>, cut<6>, cut<7>, cut<8>};

// The same for b bits, the fastest way that the instruction set has.
inline void cut_row(int b, const uint8_t* row, uint8_t* code, int64_t c) {
#if defined(__BMI2__)
  const uint64_t mask = 0x0101010101010101u * ((1u << b) - 1);
  const uint8_t* end = row + (c * b + 7) / 8;
  int64_t j = 0;
  for (; j + 8 <= c && row + 8 <= end; j += 8, row += b) {  // reads 8 bytes, whatever b
    uint64_t word;
    std::memcpy(&word, row, 8);
    word = _pdep_u64(word, mask);
    std::memcpy(code + j, &word, 8);
  }
  cut_of_width[b](row, code + j, c - j);
#else
  cut_of_width[b](row, code, c);
#endif
}

// What stands behind the last whole group of a trellis row in its stream of taps (format/row_codes.py), as if
// groups went on: the taps of the codes that are left over, then for each eighth its next one's, a bit further
// down. A group is eight codes, b bytes.
inline void taps_behind(int b, const uint8_t* row, int64_t c, uint8_t (&to)[8]) {
  const int64_t groups = c / 8;
  const uint8_t own = uint8_t((1 << c % 8) - 1);  // eighths that have one code more than the others
  std::fill_n(to, 8, uint8_t(0));
  const auto taps = [&](int64_t g) { return g < groups ? row[g * b + b - 1] : to[g - groups]; };
  for (int i = 0; i < 8; ++i) {
    const int longer = i ? taps(i - 1) >> 1 : own ? row[groups * b + b - 1] : 0;
    to[i] = uint8_t((taps(i) >> 1 & ~own) | (longer & own));
  }
}

// The windows of a trellis row of b bits. There is room for eight more.
inline void cut_windows(int b, const uint8_t* row, uint8_t* window, int64_t c) {
  const int64_t groups = c / 8;
  uint8_t behind[8];
  taps_behind(b, row, c, behind);
  const auto spread = [](uint64_t bits) -> uint64_t {  // bit i to byte i
#if defined(__BMI2__)
    return _pdep_u64(bits, 0x0101010101010101u);
#endif
    const uint64_t apart = bits * 0x0101010101010101u & 0x8040201008040201u;
    return (apart + 0x7f7f7f7f7f7f7f7fu) >> 7 & 0x0101010101010101u;
  };
  const auto taps = [&](int64_t g) { return g < groups ? row[g * b + b - 1] : behind[g - groups]; };
  for (int64_t g = 0; g * 8 < c; ++g, window += 8) {
    uint64_t eight = 0;
    for (int m = 0; m + 1 < b; ++m) eight |= spread(row[g * b + m]) << m;
    for (int m = b - 1; m < WINDOW; ++m) eight |= spread(taps(g + m - b + 1)) << m;
    std::memcpy(window, &eight, 8);
  }
}

}  // namespace
