// AVX-512 with VBMI: rows as bytes, and sums of four rows.
#pragma once
#include <algorithm>
#include <vector>

#include "sparse.h"

#if defined(__AVX512F__)
#define VBMI2 __attribute__((target("avx512vbmi,avx512vbmi2,avx512vnni,avx512bf16,gfni")))

// How codes of one width come out of bytes, and what they become.
struct Bytes {
  __m512i spread, fields, copies;
  int width;
  VBMI explicit Bytes(int b) : width(b) {
    alignas(64) uint8_t bytes[64], bits[64], copy[64];
    for (int j = 0; j < 64; ++j) {
      bytes[j] = uint8_t(j / 8 * b + j % 8);
      bits[j] = uint8_t(j % 8 * b);
      copy[j] = uint8_t(j & ((1 << std::min(b, 6)) - 1));
    }
    spread = _mm512_load_si512(bytes);
    fields = _mm512_load_si512(bits);
    copies = _mm512_load_si512(copy);
  }
  // 64 codes in the low bits of bytes; `left` bytes are there
  VBMI __m512i chunk(const uint8_t* at, int64_t left) const {
    const __m512i bytes = _mm512_maskz_loadu_epi8(first_bytes(std::min<int64_t>(left, 8 * width)), at);
    return _mm512_multishift_epi64_epi8(fields, _mm512_permutexvar_epi8(spread, bytes));
  }
};

// Room for some rows as bytes.
struct Room {
  int64_t stride;
  std::vector<uint8_t> codes, rows, ones;
  explicit Room(int64_t c) : stride(divide_up(c, CHUNK) * CHUNK + 2 * CHUNK) {
    codes.resize(stride);
    rows.resize(4 * stride);
  }
};

// Row i of a group as bytes [c], `pruned` where it has no code.
void row_bytes(const Matrix& m, const Group& g, int64_t i, const Bytes& cut, uint8_t pruned, Room& room,
               uint8_t* to);

namespace {

// Of a row: three sums of bytes of x times levels, and the sum of the levels.
struct Sums {
  __m512i byte[PLANES], levels;
};

VBMI inline void total_of(const Sums (&sum)[4], int64_t (&total)[4]) {
  __m512i bytes[4][PLANES];
  for (int r = 0; r < 4; ++r) std::copy_n(sum[r].byte, PLANES, bytes[r]);
  add_planes<4>(bytes, total);
}

// Sums of four rows, [sum of a, of b, of c, of d] in every four lanes, as doubles.
VBMI inline __m256d fold(__m512d v) {
  return _mm256_add_pd(_mm512_castpd512_pd256(v), _mm512_extractf64x4_pd(v, 1));
}

struct Narrow {
  const uint16_t* scale[4];
  __m256d sum = _mm256_setzero_pd();

  VBMI void add(__m256d total, int64_t s) {
    const __m128i bits = _mm_setr_epi32(scale[0][s] << 16, scale[1][s] << 16, scale[2][s] << 16,
                                        scale[3][s] << 16);
    sum = _mm256_fmadd_pd(total, _mm256_cvtps_pd(_mm_castsi128_ps(bits)), sum);
  }
};

}  // namespace
#endif
