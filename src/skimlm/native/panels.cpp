// Exact products of several tokens, with VBMI and VNNI: codes are cut and looked up once for all of them.
//
// 32 rows become bytes in cache, and change places there so that a register has four columns of 16 rows. Multiplied
// by the same four of a token they give sums that stand in a lane for each row: nothing has to be added across lanes.
// All of it is in integers, so a token's results are those of one that comes alone (matmul.cpp), to the bit.
#include <algorithm>
#include <cstring>

#include "product.h"
#include "rows.h"

constexpr int64_t FROM = 3;  // tokens

bool takes_panels(const Integers& x) { return x.n >= FROM && x.planes; }

#if defined(__AVX512F__)
namespace {

constexpr int LANES = 16;     // rows of a register
constexpr int TOKENS = 4;     // at once: 24 sums
constexpr int64_t QUAD = 4;   // columns

// Row i of a group as `pairs` pairs of halves, as they come out.
template <int B, bool T>
VBMI void to_bytes(const Group& g, int64_t i, int64_t c, int64_t pairs, uint8_t* to) {
  const Rows<B, 1, T> rows(g, i, c);
  const int64_t full = rows.inside(pairs, i + 1 < g.rows);
  typename Rows<B, 1, T>::Ends ends;
  __m512i half[2];
  for (int64_t k = 0; k < pairs; ++k, to += PAIR) {
    rows.template prefetch<false>(k);
    if (k < full) {
      rows.template pair<false>(0, k, ends, half);
    } else {
      if constexpr (T) ends = rows.ends(k);
      rows.template pair<true>(0, k, ends, half);
    }
    _mm512_store_si512(to, half[0]);
    _mm512_store_si512(to + CHUNK, half[1]);
  }
}

// [whether it is a trellis][bits of a code]
constexpr decltype(&to_bytes<1, false>) bytes_of_width[2][MAX_B + 1] = {
    {nullptr, to_bytes<1, false>, to_bytes<2, false>, to_bytes<3, false>, to_bytes<4, false>, to_bytes<5, false>,
     to_bytes<6, false>, to_bytes<7, false>, to_bytes<8, false>},
    {nullptr, to_bytes<1, true>, to_bytes<2, true>, to_bytes<3, true>, to_bytes<4, true>}};

// 64 bytes of 16 rows, `apart` bytes from one to the next, as 16 registers of four bytes of every row, `step` bytes
// from one to the next.
VBMI inline void change_places(const uint8_t* from, int64_t apart, uint8_t* to, int64_t step) {
  __m512i v[LANES];
#pragma GCC unroll 16
  for (int i = 0; i < LANES; ++i) v[i] = _mm512_load_si512(from + i * apart);
  transpose(v);
#pragma GCC unroll 16
  for (int i = 0; i < LANES; ++i) _mm512_store_si512(to + i * step, v[i]);
}

// What the rows of half a panel have: what is taken off a sum, and their scale.
struct Ends {
  __m512d zero[2], scale[2];
  int32_t rows[LANES];
  int count;
};

// Sums of N tokens from `token` on, for 32 rows: tile [c / 4, 2, 16, 4].
template <int N>
VBMI void some_tokens(const uint8_t* tile, const Integers& x, int64_t token, const Ends (&ends)[2],
                      const Output& out) {
  const int64_t pairs = x.chunks / 2, apart = pairs * PLANES * PAIR;
  const int8_t* xs = &x.planes[token * apart];
  __m512i sum[N][2][PLANES];
#pragma GCC unroll 4
  for (int n = 0; n < N; ++n)
#pragma GCC unroll 2
    for (int h = 0; h < 2; ++h) sum[n][h][0] = sum[n][h][1] = sum[n][h][2] = _mm512_setzero_si512();
  for (int64_t k = 0; k < pairs; ++k, xs += PLANES * PAIR)
    for (int64_t j = 0; j < PAIR; j += QUAD, tile += 2 * LANES * QUAD) {
      const __m512i first = _mm512_load_si512(tile), second = _mm512_load_si512(tile + LANES * QUAD);
#pragma GCC unroll 4
      for (int n = 0; n < N; ++n)
#pragma GCC unroll 3
        for (int p = 0; p < PLANES; ++p) {
          int32_t four;
          std::memcpy(&four, xs + n * apart + p * PAIR + j, 4);
          const __m512i columns = _mm512_set1_epi32(four);
          add_dot(sum[n][0][p], first, columns);
          add_dot(sum[n][1][p], second, columns);
        }
    }
  alignas(64) int32_t planes[N][2][PLANES][LANES];  // or the sums would not stay in registers above
#pragma GCC unroll 4
  for (int n = 0; n < N; ++n)
#pragma GCC unroll 2
    for (int h = 0; h < 2; ++h)
#pragma GCC unroll 3
      for (int p = 0; p < PLANES; ++p) _mm512_store_si512(planes[n][h][p], sum[n][h][p]);
  for (int n = 0; n < N; ++n, ++token)
    for (int h = 0; h < 2; ++h) {
      const __m512d all = _mm512_set1_pd(double(x.sums[token])), step = _mm512_set1_pd(x.steps[token]);
      __m256 part[2];
      for (int q = 0; q < 2; ++q) {  // to_value of product.h: sums are exact in double too
        const auto plane = [&](int p) {
          const auto* at = reinterpret_cast<const __m256i*>(planes[n][h][p]) + q;
          return _mm512_cvtepi32_pd(_mm256_load_si256(at));
        };
        __m512d total = _mm512_fmadd_pd(plane(2), _mm512_set1_pd(65536), plane(0));
        total = _mm512_fmadd_pd(plane(1), _mm512_set1_pd(256), total);
        total = _mm512_fnmadd_pd(ends[h].zero[q], all, total);
        part[q] = _mm512_cvtpd_ps(_mm512_mul_pd(total, _mm512_mul_pd(ends[h].scale[q], step)));
      }
      float values[LANES];
      _mm256_storeu_ps(values, part[0]);
      _mm256_storeu_ps(values + 8, part[1]);
      for (int i = 0; i < ends[h].count; ++i) out.put(token, ends[h].rows[i], values[i]);
    }
}

VBMI void panel(const Product& product, int64_t begin, int64_t end) {
  const Integers& x = product.x;
  const Matrix& m = product.matrix;
  const int64_t pairs = x.chunks / 2, stride = pairs * PAIR + CHUNK;  // not a multiple of 4 KB
  thread_local Lines<uint8_t> room;
  thread_local int64_t size = 0;
  if (size < 2 * PANEL * stride) room = Lines<uint8_t>(size = 2 * PANEL * stride);
  uint8_t *bytes = room.data(), *tile = bytes + PANEL * stride;
  Ends ends[2];
  double zero[PANEL] = {}, scale[PANEL] = {};
  const Group* g = m.groups.data();
  for (int64_t i = begin; i < end; ++i) {
    while (i >= g->first + g->rows) ++g;
    bytes_of_width[g->code == TRELLIS][g->width](*g, i - g->first, x.c, pairs, bytes + (i - begin) * stride);
    zero[i - begin] = g->width <= 5 ? 128 : double(g->zeros[i - g->first]);
    scale[i - begin] = from_bf16(product.layer.row_scale[i]);
    ends[(i - begin) / LANES].rows[(i - begin) % LANES] = m.order[i];
  }
  for (int h = 0; h < 2; ++h) {
    ends[h].count = int(std::clamp<int64_t>(end - begin - h * LANES, 0, LANES));
    for (int q = 0; q < 2; ++q) {
      ends[h].zero[q] = _mm512_loadu_pd(zero + h * LANES + q * 8);
      ends[h].scale[q] = _mm512_loadu_pd(scale + h * LANES + q * 8);
    }
    for (int64_t k = 0; k < pairs * PAIR; k += CHUNK)
      change_places(bytes + h * LANES * stride + k, stride, tile + 2 * LANES * k + h * LANES * QUAD, 2 * LANES * QUAD);
  }
  int64_t t = 0;
  for (; t + TOKENS <= x.n; t += TOKENS) some_tokens<TOKENS>(tile, x, t, ends, product.out);
  if (x.n - t == 3) some_tokens<3>(tile, x, t, ends, product.out);
  if (x.n - t == 2) some_tokens<2>(tile, x, t, ends, product.out);
  if (x.n - t == 1) some_tokens<1>(tile, x, t, ends, product.out);
}

}  // namespace
#endif

void multiply_panel(const Product& product, int64_t begin, int64_t end) {
#if defined(__AVX512F__)
  panel(product, begin, end);
#else
  (void)product, (void)begin, (void)end;
#endif
}
