// Sixteen floats at a time: a register with AVX-512, plain loops elsewhere, the same sums in both.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

#include "codes.h"

#if defined(__AVX512F__)
#include <immintrin.h>
#endif

namespace {

struct Vector {
  static constexpr int64_t N = 16;
#if defined(__AVX512F__)
  __m512 v = _mm512_setzero_ps();

  static Vector load(const float* x) { return {_mm512_loadu_ps(x)}; }
  static Vector load(const uint16_t* x) {  // bfloat16
    const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)x));
    return {_mm512_castsi512_ps(_mm512_slli_epi32(wide, 16))};
  }
  void store(float* x) const { _mm512_storeu_ps(x, v); }
  void add_product(Vector a, Vector b) { v = _mm512_fmadd_ps(a.v, b.v, v); }
  void add_product(float a, Vector b) { v = _mm512_fmadd_ps(_mm512_set1_ps(a), b.v, v); }
  float sum() const { return _mm512_reduce_add_ps(v); }
#else
  float v[N] = {};

  static Vector load(const float* x) {
    Vector out;
    std::memcpy(out.v, x, sizeof out.v);
    return out;
  }
  static Vector load(const uint16_t* x) {
    Vector out;
    for (int i = 0; i < N; ++i) out.v[i] = from_bf16(x[i]);
    return out;
  }
  void store(float* x) const { std::memcpy(x, v, sizeof v); }
  void add_product(Vector a, Vector b) {
    for (int i = 0; i < N; ++i) v[i] = std::fma(a.v[i], b.v[i], v[i]);
  }
  void add_product(float a, Vector b) {
    for (int i = 0; i < N; ++i) v[i] = std::fma(a, b.v[i], v[i]);
  }
  float sum() const {  // halves onto halves, as the other does
    float part[N];
    store(part);
    for (int half = N / 2; half; half /= 2)
      for (int i = 0; i < half; ++i) part[i] += part[i + half];
    return part[0];
  }
#endif
};

}  // namespace
