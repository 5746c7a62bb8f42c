// Rows of packed codes as the bytes that are multiplied, with VBMI and VNNI.
//
// 128 codes are 16 B whole bytes whatever their width B. A byte permutation gives each 64-bit lane the
// bytes of sixteen codes (eight above 4 bits), two multishifts bring the codes to the bottom of bytes,
// and a second permutation looks them up in the row's table, copies of which fill the register so that
// what stands above a code does not matter. x stands in the order in which the codes come out.
//
// Of a trellis the byte permutation gives each lane the seven planes of the windows of eight codes, which a
// product of bits turns; the two registers that all rows share are looked up. Planes behind the end of the stored
// groups are the first ones of the row, a bit further down.

#pragma once
#include <algorithm>
#include <cstdint>

#include "lanes.h"
#include "layout.h"

#if defined(__AVX512F__)
namespace {

// What is behind the stored groups of a trellis row whose end is no group's, or one that is short.
__attribute__((noinline)) inline VBMI __m256i behind_any(int b, const uint8_t* row, int64_t c) {
  alignas(32) uint8_t bytes[32] = {};
  uint8_t taps[8];
  taps_behind(b, row, c, taps);
  for (int i = 0; i < 8; ++i) bytes[i * b + b - 1] = taps[i];
  return _mm256_load_si256(reinterpret_cast<const __m256i*>(bytes));
}

// R rows of width B, of a trellis if T: their tables (levels plus 128 up to 5 bits) and how to cut codes
// out of bytes.
template <int B, int R, bool T>
struct Rows {
  __m512i table[T ? 2 : R], spread[2], fields[2];
  const uint8_t* at;
  int64_t stride, c;

  VBMI Rows(const Group& g, int64_t i, int64_t c) : at(g.packed + i * g.stride), stride(g.stride), c(c) {
    if constexpr (T) {
      static constexpr PlanePlaces places[2] = {{B, 0, 2}, {B, 1, 2}};
      for (int h = 0; h < 2; ++h) {
        spread[h] = _mm512_load_si512(places[h].at);
        table[h] = _mm512_xor_si512(_mm512_loadu_si512(g.levels + 64 * h), _mm512_set1_epi8(char(128)));
      }
    } else {
      alignas(64) uint8_t bytes[2][64], bits[2][64], copies[64];
      for (int h = 0; h < 2; ++h)
        for (int j = 0; j < 64; ++j) {
          bytes[h][j] = uint8_t(j / 8 * 2 * B + (B <= 4 ? 0 : h * B) + j % 8);
          bits[h][j] = uint8_t((B <= 4 ? 8 * h + j % 8 : j % 8) * B);
          copies[j] = uint8_t(j & ((1 << B) - 1));
        }
      for (int h = 0; h < 2; ++h)
        spread[h] = _mm512_load_si512(bytes[h]), fields[h] = _mm512_load_si512(bits[h]);
      const __m512i copy = _mm512_load_si512(copies), half = _mm512_set1_epi8(char(128));
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) {
        if constexpr (B <= 5) {
          const __mmask64 entries = (__mmask64(1) << (1 << B)) - 1;
          const __m512i levels = _mm512_maskz_loadu_epi8(entries, g.levels + ((i + r) << B));
          table[r] = _mm512_xor_si512(_mm512_permutexvar_epi8(copy, levels), half);
        } else {
          table[r] = _mm512_set1_epi8(char((1 << B) - 1));
        }
      }
    }
  }

  // Where the planes of the last pairs of a trellis row are, what is behind its stored groups being from byte
  // BEHIND on.
  struct Ends {
    __m512i first, second;
  };
  static constexpr int BEHIND = B == 4 ? 96 : 64;


  VBMI Ends ends(int64_t k) const {
    constexpr uint64_t taps = (~uint64_t(0) / 255) * ((2 << (8 - B)) - 2);  // bytes of lanes that are taps
    const int64_t end = (c / 8 - 16 * k) * B;
    const __m512i from = _mm512_set1_epi8(char(std::clamp<int64_t>(end, 0, 127)));
    const __m512i by = _mm512_set1_epi8(char(BEHIND - end));
    const __mmask64 one = _mm512_mask_cmpge_epu8_mask(taps, spread[0], from);
    const __mmask64 two = _mm512_mask_cmpge_epu8_mask(taps, spread[1], from);
    return {_mm512_mask_add_epi8(spread[0], one, spread[0], by), _mm512_mask_add_epi8(spread[1], two, spread[1], by)};
  }

  // What is behind the stored groups of row r, each at the last of the bytes that its group would have.
  VBMI __m512i behind(int r) const {
    const uint8_t* row = at + r * stride;
    const __m256i found = c % 8 || c < 64 ? behind_any(B, row, c) : behind_whole(row);
    return B == 4 ? _mm512_inserti64x4(_mm512_setzero_si512(), found, 1) : _mm512_zextsi256_si512(found);
  }

  VBMI static __m256i behind_whole(const uint8_t* row) {
    const __m256i first = _mm256_maskz_loadu_epi8(__mmask32(first_bytes(8 * B)), row);
    return halved(first);
  }

  // How many pairs need no mask: where windows do not reach behind the stored groups, and loads not behind what is
  // stored at all; there may be `more` rows.
  int64_t inside(int64_t pairs, bool more) const {
    constexpr int windows = 16 + WINDOW - B, loads = B <= 2 ? 32 : B == 3 ? 22 : 20;  // groups
    return T ? std::max<int64_t>(c / 8 - (more ? windows : loads) + 16, 0) / 16 : std::max<int64_t>(pairs - 2, 0);
  }

  // The 128 unsigned bytes of pair k of row r in two halves. MASK: the row ends in this pair or the
  // next.
  template <bool MASK>
  VBMI void pair(int r, int64_t k, const Ends& ends, __m512i (&half)[2]) const {
    const uint8_t* from = at + r * stride + k * 16 * B;
    const int64_t left = stride - k * 16 * B;
    if constexpr (T) {
      __m512i one, two;
      if constexpr (MASK) {
        const __m512i low = _mm512_maskz_loadu_epi8(first_bytes(left), from);
        __m512i high = behind(r);
        if constexpr (B == 4)
          high = _mm512_mask_loadu_epi8(high, first_bytes(std::min<int64_t>(left - 64, 32)), from + 64);
        one = _mm512_permutex2var_epi8(low, ends.first, high);
        two = _mm512_permutex2var_epi8(low, ends.second, high);
      } else if constexpr (B == 4) {
        const __m512i low = _mm512_loadu_si512(from);
        const __m512i high = _mm512_zextsi128_si512(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from + 64)));
        one = _mm512_permutex2var_epi8(low, spread[0], high);
        two = _mm512_permutex2var_epi8(low, spread[1], high);
      } else {
        __m512i low = B == 1 ? _mm512_zextsi256_si512(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)))
                             : _mm512_loadu_si512(from);
        asm("" : "+v"(low));  // else GCC 12 loads it twice
        one = _mm512_permutexvar_epi8(spread[0], low);
        two = _mm512_permutexvar_epi8(spread[1], low);
      }
      half[0] = turned(one);
      half[1] = turned(two);
    } else if constexpr (B <= 4) {
      __m512i bytes;
      if constexpr (MASK)
        bytes = _mm512_maskz_loadu_epi8(first_bytes(left), from);
      else if constexpr (B == 1)
        bytes = _mm512_zextsi128_si512(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
      else if constexpr (B == 2)
        bytes = _mm512_zextsi256_si512(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
      else
        bytes = _mm512_loadu_si512(from);
      if constexpr (B < 4) bytes = _mm512_permutexvar_epi8(spread[0], bytes);
      half[0] = _mm512_multishift_epi64_epi8(fields[0], bytes);
      half[1] = _mm512_multishift_epi64_epi8(fields[1], bytes);
    } else {
      const __mmask64 rest = first_bytes(MASK ? std::min<int64_t>(left, 16 * B) - 64 : 16 * B - 64);
      const __m512i low = _mm512_maskz_loadu_epi8(MASK ? first_bytes(left) : ~__mmask64(0), from);
      const __m512i high = _mm512_maskz_loadu_epi8(rest, from + 64);
      for (int h = 0; h < 2; ++h)
        half[h] = _mm512_multishift_epi64_epi8(fields[0],
                                               _mm512_permutex2var_epi8(low, spread[h], high));
    }
    for (__m512i& v : half) {
      if constexpr (T)
        v = _mm512_permutex2var_epi8(table[0], v, table[1]);
      else
        v = B <= 5 ? _mm512_permutexvar_epi8(v, table[r]) : _mm512_and_si512(v, table[r]);
    }
  }

  // FAR: R rows are longer than AHEAD, so what is fetched AHEAD comes too late for the last of them. The
  // R rows after them are fetched then, into the second cache, for x needs the first: 4096x11008 at 4
  // bits on one core of a busy machine 2.36 to 1.37 ms; into the first cache nothing is gained.
  template <bool FAR>
  VBMI void prefetch(int64_t k) const {
    constexpr int64_t bytes = R * 16 * B;
    const char* ahead = reinterpret_cast<const char*>(at) + (FAR ? R * stride : AHEAD) + k * bytes;
#pragma GCC unroll 8
    for (int64_t line = 0; line < bytes; line += 64)
      _mm_prefetch(ahead + line, FAR ? _MM_HINT_T1 : _MM_HINT_T0);
  }

  // What is taken off the sum of codes times x: this times the sum of x.
  int64_t zero(const Group& g, int64_t i) const { return B <= 5 ? 128 : g.zeros[i]; }
};

}  // namespace
#endif
