// AVX-512 with VBMI: dense rows of a grid of up to 4 bits times one token, in registers.
#include "sparse_bytes.h"

#if defined(__AVX512F__)
namespace {

// Unit k of a row as one sum in every lane; codes come out as in matmul.cpp.
template <bool MASK, int B>
VBMI inline __attribute__((always_inline)) __m512i dense_unit(const uint8_t* row, int64_t stride,
                                                              int64_t k, __m512i spread,
                                                              __m512i fields, const int8_t* x,
                                                              __m512i zero) {
  const uint8_t* at = row + k * 16 * B;
  __m512i bytes = _mm512_maskz_loadu_epi8(
      first_bytes(MASK ? std::min<int64_t>(stride - k * 16 * B, 16 * B) : 16 * B), at);
  if constexpr (B < 4) bytes = _mm512_permutexvar_epi8(spread, bytes);
  const __m512i mask = _mm512_set1_epi8((1 << B) - 1);
  const __m512i c0 = _mm512_and_si512(_mm512_multishift_epi64_epi8(fields, bytes), mask);
  const __m512i c1 = _mm512_and_si512(
      _mm512_multishift_epi64_epi8(_mm512_add_epi8(fields, _mm512_set1_epi8(8 * B)), bytes), mask);
  __m512i sum = _mm512_setzero_si512();
  add_dot(sum, c0, _mm512_load_si512(x + 2 * UNIT));
  add_dot(sum, c1, _mm512_load_si512(x + 2 * UNIT + CHUNK));
  sum = _mm512_slli_epi32(sum, 8);
  add_dot(sum, c0, _mm512_load_si512(x + UNIT));
  add_dot(sum, c1, _mm512_load_si512(x + UNIT + CHUNK));
  sum = _mm512_slli_epi32(sum, 8);
  add_dot(sum, c0, _mm512_load_si512(x));
  add_dot(sum, c1, _mm512_load_si512(x + CHUNK));
  return _mm512_sub_epi32(sum, zero);
}

template <int B>
VBMI void rows_dense(const Matrix& m, const Group& g, int64_t begin, int64_t end, const Input& in,
                     const Output& out) {
  alignas(64) uint8_t bytes[64], bits[64];
  for (int j = 0; j < 64; ++j) {
    bytes[j] = uint8_t(j / 8 * 2 * B + j % 8);
    bits[j] = uint8_t(j % 8 * B);
  }
  const __m512i spread = _mm512_load_si512(bytes), fields = _mm512_load_si512(bits);
  const int64_t units = divide_up(m.c, UNIT), full = std::max<int64_t>(units - 2, 0);
  const bool halves = m.span == CHUNK;
  const int64_t ahead = std::max(AHEAD, 4 * g.stride);
  for (int64_t i = begin; i < end; i += 4) {
    const uint8_t* row[4];
    Narrow narrow;
    for (int r = 0; r < 4; ++r) {
      const int64_t at = std::min(i + r, end - 1);
      row[r] = g.packed + at * g.stride;
      narrow.scale[r] = m.row_scale + (g.first + at) * m.scales;
    }
    auto unit = [&]<bool MASK>(int64_t k) VBMI __attribute__((always_inline)) {
      const int8_t* x = &in.paired[k * PLANES * UNIT];
      const __m512i zero = _mm512_slli_epi32(_mm512_load_si512(&in.paired_lanes[k * 16]), B - 1);
#pragma GCC unroll 4
      for (int line = 0; line < 4 * 16 * B; line += 64)
        _mm_prefetch(reinterpret_cast<const char*>(row[0]) + ahead + k * 64 * B + line, _MM_HINT_T0);
      const __m512i q =
          quarters(dense_unit<MASK, B>(row[0], g.stride, k, spread, fields, x, zero),
                   dense_unit<MASK, B>(row[1], g.stride, k, spread, fields, x, zero),
                   dense_unit<MASK, B>(row[2], g.stride, k, spread, fields, x, zero),
                   dense_unit<MASK, B>(row[3], g.stride, k, spread, fields, x, zero));
      const __m512d low = _mm512_cvtepi32_pd(_mm512_castsi512_si256(q));
      const __m512d high = _mm512_cvtepi32_pd(_mm512_extracti64x4_epi64(q, 1));
      if (!halves) {
        narrow.add(fold(_mm512_add_pd(low, high)), k);
      } else {
        narrow.add(fold(low), 2 * k);
        if (2 * k + 1 < m.scales) narrow.add(fold(high), 2 * k + 1);
      }
    };
    for (int64_t k = 0; k < full; ++k) unit.template operator()<false>(k);
    for (int64_t k = full; k < units; ++k) unit.template operator()<true>(k);
    double sum[4];
    _mm256_storeu_pd(sum, narrow.sum);
    for (int r = 0; r < 4 && i + r < end; ++r)
      out.put(0, m.row(g.first + i + r), float(sum[r] * in.x.steps[0]));
  }
}

}  // namespace

const Rows dense_of_width[5] = {nullptr, rows_dense<1>, rows_dense<2>, rows_dense<3>,
                                         rows_dense<4>};
#endif
