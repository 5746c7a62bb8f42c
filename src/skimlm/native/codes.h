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

// Codes of B bits, 1..4, become the WINDOW bits of the row's stream that begin with each, zeros behind the
// last one: first pairs of codes, then fours, then eights, in place. There is room for eight more.
template <int B, int STEP = 1>
void to_windows(uint8_t* code, int64_t c) {
  if constexpr (STEP == 1) std::fill_n(code + c, 8, uint8_t(0));
  for (int64_t j = 0; j < c; ++j)
    code[j] = uint8_t((code[j] | code[j + STEP] << STEP * B) & ((1 << WINDOW) - 1));
  if constexpr (2 * STEP * B < WINDOW) to_windows<B, 2 * STEP>(code, c);
}

using ToWindows = void (*)(uint8_t*, int64_t);
const ToWindows windows_of_width[5] = {nullptr, to_windows<1>, to_windows<2>, to_windows<3>, to_windows<4>};

}  // namespace
