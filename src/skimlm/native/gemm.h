// Lines of x in bfloat16 times rows that have become it in cache, by `vdpbf16ps`.
//
//   few lines of x   four rows at a time, times six lines: sums over columns in every lane
//   more             32 rows at a time, pairs of columns side by side, times twelve lines: a lane per
//                    row, no sums across lanes, but turning rows into columns takes longer
//
// Levels are integers of at most 8 bits and x is one bfloat16 piece, or three (their sum is x), so
// products are exact in float: only the order of the additions differs from a float32 reference.
#pragma once
#include <algorithm>
#include <cstring>

#include "lanes.h"
#include "parallel.h"
#include "product.h"

#if defined(__AVX512F__)
namespace {

constexpr int ROWS = 32;             // of a panel: two registers hold two columns of it
constexpr int64_t SPAN = 4096;       // columns of it: 256 KB, which stay in the second cache
constexpr int LINES = 12;            // of x, times two registers: 24 sums
constexpr int64_t FEW = 32;          // lines up to which four rows are taken,
constexpr int64_t FEW_LONG = 96;     // if rows are long: what sums across lanes cost hardly counts
constexpr int64_t LONG = 2048;       // columns
constexpr int64_t FEW_SPAN = 1024;   // columns of them: 8 KB, and 12 KB of x, in the first cache
constexpr int64_t FEW_ROW = FEW_SPAN + 32;
constexpr int64_t ALONE = 1 << 16;   // numbers of x that a second thread would come too late for
constexpr int FEW_LINES = 6;         // times four rows: 24 sums

// x as bfloat16, one line per token and piece, columns in order or as `bf16_chunk` gives those of a row. Lines are
// not a multiple of 4 KB apart, which would put all of them into the same few places of the first cache.
struct Pieces {
  int64_t n, pieces, stride;
  const uint16_t* x;        // [n, pieces, stride]
  Lines<uint16_t> own;      // unless the caller's x will do
  std::vector<float> sums;  // [n], where rows of 6 bits and more need them
};

// 64 columns to where bf16_chunk has them.
VBMI inline void mix(uint16_t* columns) {
  const __m512i first = _mm512_setr_epi64(0, 2, 4, 6, 8, 10, 12, 14);
  const __m512i second = _mm512_setr_epi64(1, 3, 5, 7, 9, 11, 13, 15);
  const __m512i a = _mm512_load_si512(columns), b = _mm512_load_si512(columns + 32);
  _mm512_store_si512(columns, _mm512_permutex2var_epi64(a, first, b));
  _mm512_store_si512(columns + 32, _mm512_permutex2var_epi64(a, second, b));
}

inline Pieces to_pieces(const void* x, bool bf16, const uint16_t* in_scale, int64_t n, int64_t c,
                 bool sums, bool in_order, int threads) {
  const int64_t padded = (c + CHUNK - 1) / CHUNK * CHUNK;
  Pieces out{n, bf16 && !in_scale ? 1 : 3, padded + 32, nullptr, {}, {}};
  const bool aligned = reinterpret_cast<uintptr_t>(x) % 64 == 0;
  if (out.pieces == 1 && in_order && !sums && c == padded && c % 2048 && aligned) {
    out.x = static_cast<const uint16_t*>(x);
    out.stride = c;
    return out;
  }
  out.own = Lines<uint16_t>(n * out.pieces * out.stride);
  out.x = out.own.data();
  out.sums.assign(sums ? n : 0, 0.f);
  parallel_rows(n, std::max<int64_t>(8, ALONE / c), threads, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      const char* token = static_cast<const char*>(x) + t * c * (bf16 ? 2 : 4);
      uint16_t* to = &out.own[t * out.pieces * out.stride];
      for (int64_t p = 0; p < out.pieces; ++p)
        std::fill(to + p * out.stride + c, to + p * out.stride + padded, uint16_t(0));
      if (out.pieces == 1) std::memcpy(to, token, c * 2);
      if (out.pieces > 1 || sums) {
        std::vector<float> rest = to_floats(token, bf16, in_scale, 1, c);
        if (sums)
          for (float v : rest) out.sums[t] += v;
        for (int64_t p = 0; out.pieces > 1 && p < out.pieces; ++p)
          for (int64_t j = 0; j < c; ++j) {
            to[p * out.stride + j] = to_bf16(rest[j]);
            rest[j] -= from_bf16(to[p * out.stride + j]);
          }
      }
      for (int64_t p = 0; !in_order && p < out.pieces; ++p, to += out.stride)
        for (int64_t j = 0; j < padded; j += CHUNK) mix(to + j);
    }
  });
  return out;
}

// sums [N, 32] of four rows [FEW_ROW] (+)= N lines of x times them.
template <int N>
VBMI void rows_times(const uint16_t* rows, int64_t columns, const uint16_t* x, int64_t stride,
                     bool add, float* sums) {
  __m512 acc[N][4];
#pragma GCC unroll 6
  for (int t = 0; t < N; ++t) acc[t][0] = acc[t][1] = acc[t][2] = acc[t][3] = _mm512_setzero_ps();
  for (int64_t j = 0; j < columns; j += 32) {
    const __m512bh w0 = (__m512bh)_mm512_load_si512(rows + j);
    const __m512bh w1 = (__m512bh)_mm512_load_si512(rows + FEW_ROW + j);
    const __m512bh w2 = (__m512bh)_mm512_load_si512(rows + 2 * FEW_ROW + j);
    const __m512bh w3 = (__m512bh)_mm512_load_si512(rows + 3 * FEW_ROW + j);
#pragma GCC unroll 6
    for (int t = 0; t < N; ++t) {
      const __m512bh xt = (__m512bh)_mm512_load_si512(x + t * stride + j);
      acc[t][0] = _mm512_dpbf16_ps(acc[t][0], w0, xt);
      acc[t][1] = _mm512_dpbf16_ps(acc[t][1], w1, xt);
      acc[t][2] = _mm512_dpbf16_ps(acc[t][2], w2, xt);
      acc[t][3] = _mm512_dpbf16_ps(acc[t][3], w3, xt);
    }
  }
#pragma GCC unroll 6
  for (int t = 0; t < N; ++t) {
    const __m512 ab = _mm512_add_ps(_mm512_unpacklo_ps(acc[t][0], acc[t][1]),
                                    _mm512_unpackhi_ps(acc[t][0], acc[t][1]));
    const __m512 cd = _mm512_add_ps(_mm512_unpacklo_ps(acc[t][2], acc[t][3]),
                                    _mm512_unpackhi_ps(acc[t][2], acc[t][3]));
    const __m512d low = _mm512_unpacklo_pd(_mm512_castps_pd(ab), _mm512_castps_pd(cd));
    const __m512d high = _mm512_unpackhi_pd(_mm512_castps_pd(ab), _mm512_castps_pd(cd));
    const __m512 four = _mm512_add_ps(_mm512_castpd_ps(low), _mm512_castpd_ps(high));
    const __m256 two =
        _mm256_add_ps(_mm512_castps512_ps256(four), _mm512_extractf32x8_ps(four, 1));
    const __m128 one = _mm_add_ps(_mm256_castps256_ps128(two), _mm256_extractf128_ps(two, 1));
    float* to = sums + t * ROWS;
    _mm_store_ps(to, add ? _mm_add_ps(_mm_load_ps(to), one) : one);
  }
}

// sums [N, 32] (+)= N lines of x times the panel.
template <int N>
VBMI void panel_times(const uint16_t* panel, int64_t pairs, const uint16_t* x, int64_t stride,
                      bool add, float* sums) {
  __m512 acc[N][2];
#pragma GCC unroll 12
  for (int t = 0; t < N; ++t) {
    acc[t][0] = add ? _mm512_load_ps(sums + t * ROWS) : _mm512_setzero_ps();
    acc[t][1] = add ? _mm512_load_ps(sums + t * ROWS + 16) : _mm512_setzero_ps();
  }
  for (int64_t p = 0; p < pairs; ++p, panel += 2 * ROWS, x += 2) {
    const __m512bh w0 = (__m512bh)_mm512_load_si512(panel);
    const __m512bh w1 = (__m512bh)_mm512_load_si512(panel + 32);
#pragma GCC unroll 12
    for (int t = 0; t < N; ++t) {
      int32_t pair;
      std::memcpy(&pair, x + t * stride, 4);
      const __m512bh xt = (__m512bh)_mm512_set1_epi32(pair);
      acc[t][0] = _mm512_dpbf16_ps(acc[t][0], w0, xt);
      acc[t][1] = _mm512_dpbf16_ps(acc[t][1], w1, xt);
    }
  }
#pragma GCC unroll 12
  for (int t = 0; t < N; ++t) {
    _mm512_store_ps(sums + t * ROWS, acc[t][0]);
    _mm512_store_ps(sums + t * ROWS + 16, acc[t][1]);
  }
}

using Times = void (*)(const uint16_t*, int64_t, const uint16_t*, int64_t, bool, float*);
const Times panel[LINES + 1] = {nullptr,        panel_times<1>,  panel_times<2>,  panel_times<3>,
                                panel_times<4>, panel_times<5>,  panel_times<6>,  panel_times<7>,
                                panel_times<8>, panel_times<9>,  panel_times<10>, panel_times<11>,
                                panel_times<12>};
const Times rows[FEW_LINES + 1] = {nullptr,       rows_times<1>, rows_times<2>, rows_times<3>,
                                   rows_times<4>, rows_times<5>, rows_times<6>};

// Up to `most` lines of x at a time, as evenly as that goes.
inline void all_lines(const Times* times, int64_t most, const uint16_t* weights, int64_t length,
               const Pieces& x, int64_t column, bool add, float* sums) {
  const int64_t lines = x.n * x.pieces, turns = (lines + most - 1) / most;
  for (int64_t turn = 0; turn < turns; ++turn) {
    const int64_t t = lines * turn / turns, next = lines * (turn + 1) / turns;
    times[next - t](weights, length, &x.x[t * x.stride + column], x.stride, add, sums + t * ROWS);
  }
}

// Whether rows are taken four at a time.
inline bool is_few(int64_t lines, int64_t c) { return lines <= (c > LONG ? FEW_LONG : FEW); }

}  // namespace
#endif
