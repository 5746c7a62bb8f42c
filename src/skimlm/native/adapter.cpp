// The part of an adapter, as FORMAT.md stores it: out = y + (x A^T) B, in float.
#include "adapter.h"

#include <algorithm>
#include <cstring>

#include "vector.h"

namespace {

// Sixteen values of a row of B [r] from column j on, an even one; unscaled at 4 bits.
struct Factor {
  bool four;
  const void* at;
  int64_t size;  // of a row, in elements as stored
  Vector load(int64_t row, int64_t j, int64_t left) const {
    if (four) {
      const uint8_t* from = static_cast<const uint8_t*>(at) + row * size + j / 2;
      uint8_t bytes[8] = {};
      std::memcpy(bytes, from, left < 16 ? (left + 1) / 2 : 8);
#if defined(__AVX512F__)
      const __m128i v = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(bytes));
      const __m128i low = _mm_and_si128(v, _mm_set1_epi8(15));
      const __m128i high = _mm_and_si128(_mm_srli_epi16(v, 4), _mm_set1_epi8(15));
      const __m512i code = _mm512_cvtepu8_epi32(_mm_unpacklo_epi8(low, high));
      return {_mm512_cvtepi32_ps(_mm512_sub_epi32(code, _mm512_set1_epi32(8)))};
#else
      float value[16];
      for (int k = 0; k < 16; ++k) value[k] = float((bytes[k / 2] >> k % 2 * 4 & 15) - 8);
      return Vector::load(value);
#endif
    }
    const uint16_t* from = static_cast<const uint16_t*>(at) + row * size + j;
    if (left >= 16) return Vector::load(from);
    uint16_t part[16] = {};
    std::memcpy(part, from, left * 2);
    return Vector::load(part);
  }
};

// A row of a 16-bit A times x, in a fixed order.
float dot_bf16(const Factor& a, int64_t row, const float* x, int64_t c) {
  Vector sum[2];
  for (int64_t j = 0, k = 0; j < c; j += Vector::N, k ^= 1) {
    const int64_t left = c - j;
    float part[Vector::N] = {};
    std::memcpy(part, x + j, std::min<int64_t>(left, Vector::N) * sizeof(float));
    sum[k].add_product(Vector::load(part), a.load(row, j, left));
  }
  return sum[0].sum() + sum[1].sum();
}

#if defined(__AVX512F__)
// value [128] = u B of one token for a whole block of 4-bit columns. Lane l of sum p is column 8 l + p: a
// permutation of floats looks up the low four bits of a lane.
void add_nibbles(const SkimlmLayer& w, const float* u, int64_t block, float* value) {
  const __m512 level = _mm512_setr_ps(-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7);
  const int64_t bytes = divide_up(w.rows, 2), blocks = divide_up(w.rows, ADAPTER);
  const uint8_t* at = static_cast<const uint8_t*>(w.lora_b) + block * ADAPTER / 2;
  Vector s0, s1, s2, s3, s4, s5, s6, s7;
  for (int64_t k = 0; k < w.rank; ++k, at += bytes) {
    const __m512 factor = _mm512_set1_ps(u[k] * from_bf16(w.lora_b_scale[k * blocks + block]));
    const __m512i nibbles = _mm512_loadu_si512(at);
    _mm_prefetch(reinterpret_cast<const char*>(at) + 8 * bytes, _MM_HINT_T0);
    auto add = [&](Vector& sum, int shift) {
      const __m512i index = _mm512_srli_epi32(nibbles, shift);
      sum.v = _mm512_fmadd_ps(factor, _mm512_permutexvar_ps(index, level), sum.v);
    };
    add(s0, 0);
    add(s1, 4);
    add(s2, 8);
    add(s3, 12);
    add(s4, 16);
    add(s5, 20);
    add(s6, 24);
    add(s7, 28);
  }
  const Vector* sums[8] = {&s0, &s1, &s2, &s3, &s4, &s5, &s6, &s7};
  for (int p = 0; p < 8; ++p) {
    float lane[Vector::N];
    sums[p]->store(lane);
    for (int l = 0; l < 16; ++l) value[8 * l + p] = lane[l];
  }
}
#endif

}  // namespace

float dot_adapter(const SkimlmLayer& w, int64_t row, const float* x) {
  return dot_bf16({false, w.lora_a, w.cols}, row, x, w.cols);
}

void add_adapter(const SkimlmLayer& w, const float* u, const float* y, int64_t n, int64_t begin,
                 int64_t end, const Output& out) {
  const bool four = w.adapter_bits == 4;
  const Factor b{four, w.lora_b, four ? divide_up(w.rows, 2) : w.rows};
  const int64_t blocks = divide_up(w.rows, ADAPTER);
  constexpr int64_t TOKENS = 2, PARTS = ADAPTER / Vector::N;
  auto put = [&](int64_t t, const float* value) {
    for (int64_t j = begin; j < end; ++j) out.put(t, j, y[t * w.rows + j] + value[j - begin]);
  };
  float value[ADAPTER];
#if defined(__AVX512F__)
  for (int64_t t = 0; four && end - begin == ADAPTER && t < n; ++t) {
    add_nibbles(w, u + t * w.rank, begin / ADAPTER, value);
    put(t, value);
  }
  if (four && end - begin == ADAPTER) return;
#endif
  for (int64_t t = 0; t < n; t += TOKENS) {
    const int64_t tokens = std::min(TOKENS, n - t);
    Vector sum[TOKENS][PARTS];
    for (int64_t k = 0; k < w.rank; ++k) {
      const float scale = four ? from_bf16(w.lora_b_scale[k * blocks + begin / ADAPTER]) : 1.f;
      float factor[TOKENS];
      for (int64_t s = 0; s < tokens; ++s) factor[s] = u[(t + s) * w.rank + k] * scale;
      for (int64_t p = 0; p < PARTS && begin + p * Vector::N < end; ++p) {
        const int64_t j = begin + p * Vector::N;
        const Vector v = b.load(k, j, end - j);
        for (int64_t s = 0; s < tokens; ++s) sum[s][p].add_product(factor[s], v);
      }
    }
    for (int64_t s = 0; s < tokens; ++s) {
      for (int64_t p = 0; p < PARTS; ++p) sum[s][p].store(value + p * Vector::N);
      put(t + s, value);
    }
  }
}
