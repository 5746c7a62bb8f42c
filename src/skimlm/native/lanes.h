// Packed codes in AVX-512 registers, with VBMI: 64 codes are 8 b whole bytes whatever their width b.
//
// A byte permutation gives each 64-bit lane the b bytes of eight codes, a multishift brings every code
// to the bottom of a field, and a second permutation looks the field up in the row's table, copies of
// which fill the register so that what stands above the code does not matter.
#pragma once
#include <cstdint>

#include "codes.h"

#if defined(__AVX512F__) || defined(__AVX2__)
#include <immintrin.h>
#endif

constexpr int64_t CHUNK = 64;  // codes
constexpr int PLANES = 3;      // of x as integers, a byte each (product.h)
constexpr int64_t PAIR = 2 * CHUNK;
// Rows follow each other in memory, but the processor's own prefetcher stops at every page.
constexpr int64_t AHEAD = 8192;

namespace {

// Of 128 columns, the one in a byte of the first or second half as 16 codes of up to 4 bits come out of a
// 64-bit lane; see matmul.cpp.
inline int64_t column_of(int64_t half, int64_t byte) { return byte / 8 * 16 + half * 8 + byte % 8; }

// Puts the rows of width b, ascending, to `order`; returns how many there are.
inline int64_t rows_of_width(int b, const uint8_t* widths, int64_t r, int32_t* order) {
  int64_t count = 0, i = 0;
#if defined(__AVX512F__)
  for (const __m512i want = _mm512_set1_epi8(char(b)); i + 64 <= r; i += 64)
    for (uint64_t m = _mm512_cmpeq_epi8_mask(_mm512_loadu_si512(widths + i), want); m; m &= m - 1)
      order[count++] = int32_t(i + __builtin_ctzll(m));
#endif
  for (; i < r; ++i)
    if (widths[i] == b) order[count++] = int32_t(i);
  return count;
}

}  // namespace

#if defined(__AVX512F__)
namespace {

#define VBMI __attribute__((target("avx512vbmi,avx512vnni,avx512bf16,gfni")))

// Byte k of lane i takes byte i * b + k of the chunk; 16-bit fields begin at multiples of b bits.
struct Controls {
  __m512i spread, low, high, copies;
  __mmask64 bytes, entries;  // of a chunk, of a table
};

VBMI inline Controls controls(int b) {
  alignas(64) uint8_t spread[64], low[64], high[64], copies[64];
  for (int i = 0; i < 64; ++i) {
    spread[i] = uint8_t(i / 8 * b + i % 8);
    low[i] = uint8_t(i % 8 / 2 * b);         // 16-bit fields: codes 0..3 of the lane,
    high[i] = uint8_t((4 + i % 8 / 2) * b);  // and 4..7
    copies[i] = uint8_t(i & ((1 << b) - 1));
  }
  return {_mm512_load_si512(spread), _mm512_load_si512(low), _mm512_load_si512(high),
          _mm512_load_si512(copies),
          b == 8 ? ~__mmask64(0) : (__mmask64(1) << 8 * b) - 1,
          b > 5 ? 0 : (__mmask64(1) << (1 << b)) - 1};
}

// sum += unsigned bytes a times signed bytes b, four to a lane. As an instruction: around the intrinsic
// GCC 12 copies every sum twice.
VBMI inline void add_dot(__m512i& sum, __m512i a, __m512i b) {
  asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(a), "v"(b));
}

// Bytes of chunk k of a row: masked, for the file may end with them.
VBMI inline __m512i load_chunk(const uint8_t* at, __mmask64 mask) {
  return _mm512_maskz_loadu_epi8(mask, at);
}

inline __mmask64 first_bytes(int64_t n) {
  return n >= 64 ? ~__mmask64(0) : n <= 0 ? 0 : (__mmask64(1) << n) - 1;
}

// Of the last chunk of a row of `stride` bytes.
inline __mmask64 last_mask(int64_t stride, int64_t chunks, int b) {
  return first_bytes(stride - (chunks - 1) * 8 * b);
}

// A table of 2^b bytes, copied until it fills the register.
VBMI inline __m512i byte_table(const int8_t* levels, const Controls& c) {
  return _mm512_permutexvar_epi8(c.copies, _mm512_maskz_loadu_epi8(c.entries, levels));
}

VBMI inline __m512i bf16_table(const int8_t* levels, const Controls& c) {
  const __m512i bytes = byte_table(levels, c);
  const __m512 low = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm512_castsi512_si128(bytes)));
  const __m512 high =
      _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm512_extracti32x4_epi32(bytes, 1)));
  return (__m512i)_mm512_cvtne2ps_pbh(high, low);
}

// Eight planes of eight bits, turned: of a window's planes (byte 7 - m has bit m of eight codes) the windows.
VBMI inline __m512i turned(__m512i planes) {
  return _mm512_gf2p8affine_epi64_epi8(_mm512_set1_epi64(0x8040201008040201), planes, 0);
}

// Bytes shifted down by a bit.
VBMI inline __m256i halved(__m256i bytes) {
  return _mm256_gf2p8affine_epi64_epi8(bytes, _mm256_set1_epi64x(0x0204081020408000), 0);
}

// Of a trellis row of b bits, where its planes are: byte 7 - m of lane i is the place of bit m of the windows of
// group i * step + first or, mixed, of groups 0 4 1 5 2 6 3 7.
struct alignas(64) PlanePlaces {
  uint8_t at[64];
  constexpr PlanePlaces(int b, int first, int step, bool mixed = false) : at() {
    for (int j = 0; j < 64; ++j) {
      const int lane = j / 8, bit = 7 - j % 8, group = mixed ? lane / 2 + lane % 2 * 4 : lane * step + first;
      at[j] = uint8_t(bit < b ? group * b + bit : bit < WINDOW ? (group + bit - b + 1) * b + b - 1 : 0);
    }
  }
};

VBMI inline __m512i plane_places(int b) {
  static constexpr PlanePlaces places[] = {{1, 0, 1}, {2, 0, 1}, {3, 0, 1}, {4, 0, 1}};
  return _mm512_load_si512(places[b - 1].at);
}

// The same in the last chunk, a whole one: behind it are the first groups of the row, in a second register.
VBMI inline __m512i end_places(int b) {
  const __m512i places = plane_places(b), size = _mm512_set1_epi8(char(8 * b));
  const __mmask64 behind = _mm512_cmpge_epu8_mask(places, size);
  return _mm512_mask_add_epi8(places, behind, places, _mm512_set1_epi8(char(64 - 8 * b)));
}

VBMI inline __m512i mixed_places(int b) {
  static constexpr PlanePlaces places[] = {{1, 0, 1, true}, {2, 0, 1, true}, {3, 0, 1, true}, {4, 0, 1, true}};
  return _mm512_load_si512(places[b - 1].at);
}

// A trellis row as planes of bits, 64 codes at a time.
struct Planes {
  const uint8_t* row;
  int b;
  int64_t whole;      // chunks that what is stored suffices for
  uint8_t tail[192];  // from the next chunk on: what is stored, and the taps behind it

  Planes() {}
  VBMI Planes(const uint8_t* row, int b, int64_t c) : row(row), b(b) {
    const int64_t groups = c / 8;
    whole = std::max<int64_t>(groups - 6, 0) / 8;
    const int64_t left = groups - 8 * whole;  // at most 13
    if (c % 8 || c < 64) {
      add_tail(left, c);
      return;
    }
    _mm512_storeu_si512(tail, _mm512_maskz_loadu_epi8(first_bytes(left * b), row + 8 * whole * b));
    const __m256i first = _mm256_maskz_loadu_epi8(__mmask32(first_bytes(8 * b)), row);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(tail + left * b), halved(first));
  }
  // To be turned.
  VBMI __m512i chunk(int64_t k, __m512i places) const {
    const uint8_t* at = k < whole ? row + 8 * k * b : tail + 8 * (k - whole) * b;
    return _mm512_permutexvar_epi8(places, _mm512_maskz_loadu_epi8(first_bytes(14 * b), at));
  }

 private:
  // Of a row whose end is no group's, or that is short.
  void add_tail(int64_t left, int64_t c) {
    uint8_t behind[8];
    taps_behind(b, row, c, behind);
    std::copy_n(row + 8 * whole * b, (divide_up(c, 8) - 8 * whole) * b, tail);
    for (int64_t i = 0; i < 8; ++i) tail[(left + i) * b + b - 1] = behind[i];
  }
};

// The levels of a trellis plus 128, by windows.
struct ByteTrellis {
  __m512i at[2];
  VBMI explicit ByteTrellis(const int8_t* levels) {
    for (int i = 0; i < 2; ++i)
      at[i] = _mm512_xor_si512(_mm512_loadu_si512(levels + 64 * i), _mm512_set1_epi8(char(128)));
  }
  VBMI __m512i operator()(__m512i window) const { return _mm512_permutex2var_epi8(at[0], window, at[1]); }
};

// The same times a scale as bfloat16, a byte each of them.
struct Bf16Trellis {
  __m512i lower[2], upper[2];
  Bf16Trellis() = default;
  VBMI Bf16Trellis(const int8_t* levels, float scale) {
    alignas(64) uint8_t entry[2][1 << WINDOW];
    for (int k = 0; k < 1 << WINDOW; ++k) {
      const uint16_t bits = to_bf16(float(levels[k]) * scale);
      entry[0][k] = uint8_t(bits);
      entry[1][k] = uint8_t(bits >> 8);
    }
    for (int i = 0; i < 2; ++i)
      lower[i] = _mm512_load_si512(entry[0] + 64 * i), upper[i] = _mm512_load_si512(entry[1] + 64 * i);
  }
  // By windows, those in the first and second halves of 128-bit lanes.
  VBMI void operator()(__m512i window, __m512i* first, __m512i* second) const {
    const __m512i low = _mm512_permutex2var_epi8(lower[0], window, lower[1]);
    const __m512i high = _mm512_permutex2var_epi8(upper[0], window, upper[1]);
    *first = _mm512_unpacklo_epi8(low, high);
    *second = _mm512_unpackhi_epi8(low, high);
  }
};

// [sum of a, of b, of c, of d] in each of four lanes of 128 bits, whose sums are still to be taken.
VBMI inline __m512i quarters(__m512i a, __m512i b, __m512i c, __m512i d) {
  const __m512i ab = _mm512_add_epi32(_mm512_unpacklo_epi32(a, b), _mm512_unpackhi_epi32(a, b));
  const __m512i cd = _mm512_add_epi32(_mm512_unpacklo_epi32(c, d), _mm512_unpackhi_epi32(c, d));
  return _mm512_add_epi32(_mm512_unpacklo_epi64(ab, cd), _mm512_unpackhi_epi64(ab, cd));
}

VBMI inline void add_lanes(__m512i v, int32_t* to) {
  const __m256i half =
      _mm256_add_epi32(_mm512_castsi512_si256(v), _mm512_extracti64x4_epi64(v, 1));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to),
                   _mm_add_epi32(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1)));
}

// v[i] lane j becomes v[j] lane i, 32 bits each.
VBMI inline void transpose(__m512i (&v)[16]) {
  __m512i u[16];
#pragma GCC unroll 8
  for (int i = 0; i < 16; i += 2) {
    u[i] = _mm512_unpacklo_epi32(v[i], v[i + 1]);
    u[i + 1] = _mm512_unpackhi_epi32(v[i], v[i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4) {
    v[i] = _mm512_unpacklo_epi64(u[i], u[i + 2]);
    v[i + 1] = _mm512_unpackhi_epi64(u[i], u[i + 2]);
    v[i + 2] = _mm512_unpacklo_epi64(u[i + 1], u[i + 3]);
    v[i + 3] = _mm512_unpackhi_epi64(u[i + 1], u[i + 3]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    u[i] = _mm512_shuffle_i32x4(v[i], v[4 + i], 0x88);
    u[4 + i] = _mm512_shuffle_i32x4(v[i], v[4 + i], 0xdd);
    u[8 + i] = _mm512_shuffle_i32x4(v[8 + i], v[12 + i], 0x88);
    u[12 + i] = _mm512_shuffle_i32x4(v[8 + i], v[12 + i], 0xdd);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    v[i] = _mm512_shuffle_i32x4(u[i], u[8 + i], 0x88);
    v[4 + i] = _mm512_shuffle_i32x4(u[4 + i], u[12 + i], 0x88);
    v[8 + i] = _mm512_shuffle_i32x4(u[i], u[8 + i], 0xdd);
    v[12 + i] = _mm512_shuffle_i32x4(u[4 + i], u[12 + i], 0xdd);
  }
}

// The sums of R rows over their lanes and planes.
template <int R>
VBMI inline __attribute__((always_inline)) void add_planes(const __m512i (&sum)[R][PLANES],
                                                           int64_t (&total)[R]) {
  int32_t plane[PLANES][R];
#pragma GCC unroll 3
  for (int p = 0; p < PLANES; ++p) {
    if constexpr (R % 4 == 0) {
#pragma GCC unroll 4
      for (int r = 0; r < R; r += 4)
        add_lanes(quarters(sum[r][p], sum[r + 1][p], sum[r + 2][p], sum[r + 3][p]), plane[p] + r);
    } else {
      static_assert(R == 1);
      plane[p][0] = _mm512_reduce_add_epi32(sum[0][p]);
    }
  }
  for (int r = 0; r < R; ++r)
    total[r] = int64_t(plane[2][r]) * 65536 + int64_t(plane[1][r]) * 256 + int64_t(plane[0][r]);
}

}  // namespace
#endif
