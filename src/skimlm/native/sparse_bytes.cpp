// AVX-512 with VBMI: rows times x, four at a time as bytes in L1.
#include "sparse_any.h"
#include "sparse_bytes.h"

#if defined(__AVX512F__)
namespace {

bool has_vbmi2() {
  static const bool have = __builtin_cpu_supports("avx512vbmi2");
  return have;
}

// The columns that 16 patterns keep, a bit each.
inline uint64_t mask_of_patterns(uint64_t patterns) {
  constexpr uint64_t each = 0x1111111111111111;
  const uint64_t w = _pdep_u64(patterns, 7 * each);
  const uint64_t a = w & each, b = w >> 1 & each, c = w >> 2 & each;
  const uint64_t neither = each & ~(a | b), both = a & b;
  return (each & ~(c | both)) | (neither | (both & ~c)) << 1 | ((a & ~c) | (c & (a | b))) << 2 |
         (c | (b & ~a)) << 3;
}

// Levels of a row plus 128, or its codes; [kept], padded to chunks.
VBMI void bytes_of(const Matrix& m, const Group& g, int64_t i, const Bytes& cut, uint8_t* to) {
  const uint8_t* at = g.packed + i * g.stride;
  const int64_t step = 8 * g.width;
  if (g.code == TRELLIS) {
    const ByteTrellis trellis(g.levels);
    const Planes planes(at, g.width, m.kept);
    const __m512i places = plane_places(g.width);
    for (int64_t k = 0; k < m.kept; k += CHUNK)
      _mm512_storeu_si512(to + k, trellis(turned(planes.chunk(k / CHUNK, places))));
    return;
  }
  if (g.code == TABLE) {
    const __mmask64 entries = (__mmask64(1) << (1 << g.width)) - 1;
    const __m512i levels = _mm512_maskz_loadu_epi8(entries, g.levels + (i << g.width));
    const __m512i table =
        _mm512_xor_si512(_mm512_permutexvar_epi8(cut.copies, levels), _mm512_set1_epi8(char(128)));
    for (int64_t k = 0, left = g.stride; k < m.kept; k += CHUNK, left -= step)
      _mm512_storeu_si512(to + k, _mm512_permutexvar_epi8(
                                      cut.chunk(at + g.stride - left, left), table));
    return;
  }
  const __m512i mask = _mm512_set1_epi8(char((1 << g.width) - 1));
  for (int64_t k = 0, left = g.stride; k < m.kept; k += CHUNK, left -= step)
    _mm512_storeu_si512(to + k, _mm512_and_si512(cut.chunk(at + g.stride - left, left), mask));
}

// The bytes `from` at the columns of a sparse row, `pruned` elsewhere. Both have room for all columns
// and two chunks, so that a row with more bits than codes reads no further.
VBMI2 void spread_bytes(const Matrix& m, int64_t stored, uint8_t pruned, const uint8_t* from,
                        uint8_t* to) {
  const uint8_t* at = m.positions + stored * m.places;
  const __m512i none = _mm512_set1_epi8(char(pruned));
  const int64_t bytes = m.sparsity == PAIRS ? 6 : 8;  // of 64 columns
  for (int64_t j = 0, left = m.places; j < m.c; j += CHUNK, at += bytes, left -= bytes) {
    uint64_t mask = 0;
    if (left >= 8)
      std::memcpy(&mask, at, 8);
    else
      std::memcpy(&mask, at, left);
    if (m.sparsity == PAIRS) mask = mask_of_patterns(mask & 0xffffffffffff);
    _mm512_storeu_si512(to + j, _mm512_mask_expand_epi8(none, mask, _mm512_loadu_si512(from)));
    from += __builtin_popcountll(mask);
  }
}

// Four rows. GCC 12 keeps no array in registers whose index it only knows once it has unrolled a loop,
// and stores bound the loop then: so sums of rows are spelled out here and below.
VBMI inline void dot_bytes(const uint8_t* rows, int64_t stride, const int8_t* x, int64_t begin,
                           int64_t end, int64_t (&total)[4]) {
  Sums s0{}, s1{}, s2{}, s3{};
  for (int64_t j = begin / CHUNK * CHUNK; j < end; j += CHUNK) {
    const __mmask64 mask = first_bytes(end - j) & ~first_bytes(begin - j);
    const int8_t* at = x + j * PLANES;
    const __m512i v0 = _mm512_maskz_loadu_epi8(mask, at);
    const __m512i v1 = _mm512_maskz_loadu_epi8(mask, at + CHUNK);
    const __m512i v2 = _mm512_maskz_loadu_epi8(mask, at + 2 * CHUNK);
    auto add = [&](Sums& sum, int64_t r) VBMI __attribute__((always_inline)) {
      const __m512i bytes = _mm512_loadu_si512(rows + r * stride + j);
      add_dot(sum.byte[0], bytes, v0);
      add_dot(sum.byte[1], bytes, v1);
      add_dot(sum.byte[2], bytes, v2);
    };
    add(s0, 0);
    add(s1, 1);
    add(s2, 2);
    add(s3, 3);
  }
  total_of({s0, s1, s2, s3}, total);
}

// ---- the same for a grid of up to 4 bits and scales of one or two chunks
//
// The three sums of a row become one of 32 bits in every lane, and those of four rows are added up to
// four lanes each: at most 32 columns, levels within 8 and x within 0x7f7f7f, so they fit.

template <int C>
VBMI inline __attribute__((always_inline)) __m512i whole_sum(const uint8_t* row, const int8_t* x) {
  const __m512i c0 = _mm512_loadu_si512(row);
  const __m512i c1 = C > 1 ? _mm512_loadu_si512(row + CHUNK) : c0;
  __m512i sum = _mm512_setzero_si512();
  add_dot(sum, c0, _mm512_load_si512(x + 2 * CHUNK));
  if constexpr (C > 1) add_dot(sum, c1, _mm512_load_si512(x + 5 * CHUNK));
  sum = _mm512_slli_epi32(sum, 8);
  add_dot(sum, c0, _mm512_load_si512(x + CHUNK));
  if constexpr (C > 1) add_dot(sum, c1, _mm512_load_si512(x + 4 * CHUNK));
  sum = _mm512_slli_epi32(sum, 8);
  add_dot(sum, c0, _mm512_load_si512(x));
  if constexpr (C > 1) add_dot(sum, c1, _mm512_load_si512(x + 3 * CHUNK));
  return sum;
}

template <int C>
VBMI void dot_narrow(const uint8_t* rows, int64_t stride, int width, const int8_t* x,
                     const int32_t* lanes, int64_t scales, Narrow& narrow) {
  const __m128i shift = _mm_cvtsi32_si128(width - 1);
  for (int64_t s = 0; s < scales; ++s, rows += C * CHUNK, x += C * PLANES * CHUNK) {
    const __m512i zero = _mm512_sll_epi32(_mm512_load_si512(lanes + s * 16), shift);
    const __m512i s0 = _mm512_sub_epi32(whole_sum<C>(rows, x), zero);
    const __m512i s1 = _mm512_sub_epi32(whole_sum<C>(rows + stride, x), zero);
    const __m512i s2 = _mm512_sub_epi32(whole_sum<C>(rows + 2 * stride, x), zero);
    const __m512i s3 = _mm512_sub_epi32(whole_sum<C>(rows + 3 * stride, x), zero);
    const __m512i q = quarters(s0, s1, s2, s3);
    narrow.add(fold(_mm512_add_pd(_mm512_cvtepi32_pd(_mm512_castsi512_si256(q)),
                                  _mm512_cvtepi32_pd(_mm512_extracti64x4_epi64(q, 1)))),
               s);
  }
}

}  // namespace

VBMI void row_bytes(const Matrix& m, const Group& g, int64_t i, const Bytes& cut, uint8_t pruned,
                    Room& room, uint8_t* to) {
  bytes_of(m, g, i, cut, m.sparsity ? room.codes.data() : to);
  if (!m.sparsity) return;
  if (has_vbmi2()) {
    spread_bytes(m, g.first + i, pruned, room.codes.data(), to);
  } else {
    std::fill_n(to, m.c, pruned);
    spread_any(m, g.first + i, room.codes.data(), to);
  }
}

namespace {

// Rows i.. of a group; past `end` the last one again, and not put out.
VBMI void block_bytes(const Matrix& m, const Group& g, int64_t i, int64_t end, const Bytes& cut,
                      const Input& in, Room& room, const Output& out) {
  const Integers& x = in.x;
  const bool affine = g.code == AFFINE, ones = affine && m.sparsity;
  const int64_t offset = affine ? 0 : g.code == GRID ? 1 << (g.width - 1) : 128;
  int64_t row[4];
  if (ones) room.ones.assign(4 * room.stride, 0);
  for (int r = 0; r < 4; ++r) {
    row[r] = std::min(i + r, end - 1);
    row_bytes(m, g, row[r], cut, uint8_t(offset), room, &room.rows[r * room.stride]);
    if (ones) ones_any(m, g.first + row[r], &room.ones[r * room.stride]);
  }
  for (int64_t t = 0; t < x.n; ++t) {
    const int8_t* xs = &x.planes[t * x.chunks * PLANES * CHUNK];
    double sum[4];
    if (in.lanes && g.width <= 4) {
      Narrow narrow;
      for (int r = 0; r < 4; ++r) narrow.scale[r] = m.row_scale + (g.first + row[r]) * m.scales;
      // the last scale may have fewer chunks than the others
      const int64_t whole = m.span == CHUNK ? m.scales : x.chunks / 2;
      const int32_t* lanes = &in.lanes[t * m.scales * 16];
      (m.span == CHUNK ? dot_narrow<1> : dot_narrow<2>)(room.rows.data(), room.stride, g.width, xs,
                                                        lanes, whole, narrow);
      if (whole < m.scales) {
        for (const uint16_t*& scale : narrow.scale) scale += whole;
        dot_narrow<1>(room.rows.data() + whole * UNIT, room.stride, g.width,
                      xs + whole * PLANES * UNIT, lanes + whole * 16, 1, narrow);
      }
      _mm256_storeu_pd(sum, narrow.sum);
    } else {
      Value value[4];
      for (int64_t s = 0; s < m.scales; ++s) {
        int64_t total[4], kept[4];
        dot_bytes(room.rows.data(), room.stride, xs, s * m.span, m.end_of(s), total);
        if (ones) dot_bytes(room.ones.data(), room.stride, xs, s * m.span, m.end_of(s), kept);
        for (int r = 0; r < 4; ++r) {
          const int64_t zero = affine ? g.zeros[row[r]] : offset;
          const int64_t of = ones ? kept[r] : in.sums[t * m.scales + s];
          value[r].add(total[r] - zero * of, m.row_scale[(g.first + row[r]) * m.scales + s]);
        }
      }
      for (int r = 0; r < 4; ++r) sum[r] = value[r].sum;
    }
    for (int r = 0; r < 4 && i + r < end; ++r)
      out.put(t, m.row(g.first + i + r), float(sum[r] * x.steps[t]));
  }
}

}  // namespace

VBMI void rows_bytes(const Matrix& m, const Group& g, int64_t begin, int64_t end, const Input& in,
                     const Output& out) {
  const Bytes cut(g.width);
  Room room(m.c);
  for (int64_t i = begin; i < end; i += 4) block_bytes(m, g, i, end, cut, in, room, out);
}
#endif
