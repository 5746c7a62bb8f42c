// AVX-512 with VBMI: 2:4 rows times one token, in registers
//
// A unit is 128 columns: 64 codes, 32 patterns. Each code's column within the unit is looked up from its
// pattern, and the bytes of x are permuted there. x is unsigned then, and levels are the signed operand:
// the other way around a sum of the kept x would be due, three more products. The bias of its highest
// byte costs one: the sum of the levels. Rows expanded to bytes by vpexpandb took 3.2 times as long (512
// rows of 4096 columns in the second cache, 4-bit codebooks: 218 us, here 67).

#include "sparse_bytes.h"

#if defined(__AVX512F__)
namespace {

constexpr int64_t PATTERN_BYTES = 12;  // of a unit

// Which columns of a unit the codes of a row stand in.
struct Places {
  __m512i spread, fields, second, table, base;
  VBMI Places() {
    alignas(64) uint8_t bytes[64], bits[64], odd[64], pair[64], four[64];
    for (int j = 0; j < 64; ++j) {  // eight codes, four patterns: 12 bits of a lane
      bytes[j] = uint8_t(j / 8 * 12 / 8 + j % 8);
      bits[j] = uint8_t(j / 8 * 12 % 8 + j % 8 / 2 * 3);
      odd[j] = uint8_t(j % 2 * 8);
      pair[j] = j % 16 < 8 ? FIRST[j % 8] : SECOND[j % 8];
      four[j] = uint8_t(j / 2 * 4);
    }
    spread = _mm512_load_si512(bytes);
    fields = _mm512_load_si512(bits);
    second = _mm512_load_si512(odd);
    table = _mm512_load_si512(pair);
    base = _mm512_load_si512(four);
  }
  VBMI __m512i columns(__m128i patterns) const {
    __m512i v = _mm512_permutexvar_epi8(spread, _mm512_castsi128_si512(patterns));
    v = _mm512_multishift_epi64_epi8(fields, v);
    v = _mm512_ternarylogic_epi64(v, _mm512_set1_epi8(7), second, 0xea);  // (v & 7) | second
    return _mm512_or_si512(_mm512_shuffle_epi8(table, v), base);
  }
};

template <int B, bool MASK>
VBMI inline __m512i load_codes(const uint8_t* at, int64_t left) {
  if constexpr (MASK)
    return _mm512_maskz_loadu_epi8(first_bytes(std::min<int64_t>(left, 8 * B)), at);
  else if constexpr (B == 1)
    return _mm512_zextsi128_si512(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(at)));
  else if constexpr (B == 2)
    return _mm512_zextsi128_si512(_mm_loadu_si128(reinterpret_cast<const __m128i*>(at)));
  else if constexpr (B == 4)
    return _mm512_zextsi256_si512(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(at)));
  else
    return _mm512_maskz_loadu_epi8(first_bytes(8 * B), at);
}

// R 2:4 rows of width B. Levels are looked up, or on a grid of more than 5 bits computed.
template <int B, bool GRID, int R>
struct Kept {
  __m512i spread, fields, table[R];
  const uint8_t *codes[R], *positions[R];
  int64_t stride, places;

  VBMI Kept(const Matrix& m, const Group& g, const int64_t (&row)[R], const Bytes& cut)
      : spread(cut.spread), fields(cut.fields), stride(g.stride), places(m.places) {
    static_assert(GRID || B <= 5);
    for (int r = 0; r < R; ++r) {
      codes[r] = g.packed + row[r] * g.stride;
      positions[r] = m.positions + (g.first + row[r]) * m.places;
    }
    if constexpr (GRID) {
      alignas(64) int8_t level[64];
      for (int j = 0; j < 64; ++j) level[j] = int8_t((j & ((1 << B) - 1)) - (1 << (B - 1)));
      table[0] = _mm512_load_si512(level);
    } else {
      const __mmask64 entries = (__mmask64(1) << (1 << B)) - 1;
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r)
        table[r] = _mm512_permutexvar_epi8(
            cut.copies, _mm512_maskz_loadu_epi8(entries, g.levels + (row[r] << B)));
    }
  }

  // Levels and columns of unit k of row r. MASK: the row ends in this unit or the next.
  template <bool MASK>
  VBMI void unit(const Places& at, int r, int64_t k, __m512i& level, __m512i& column) const {
    __m512i code = load_codes<B, MASK>(codes[r] + k * 8 * B, stride - k * 8 * B);
    code = _mm512_multishift_epi64_epi8(fields, _mm512_permutexvar_epi8(spread, code));
    if constexpr (!GRID)
      level = _mm512_permutexvar_epi8(code, table[r]);
    else if constexpr (B <= 6)
      level = _mm512_permutexvar_epi8(code, table[0]);
    else
      level = _mm512_sub_epi8(_mm512_and_si512(code, _mm512_set1_epi8(char((1 << B) - 1))),
                              _mm512_set1_epi8(char(1 << (B - 1))));
    const auto* from = reinterpret_cast<const __m128i*>(positions[r] + k * PATTERN_BYTES);
    const __mmask16 some = __mmask16(first_bytes(places - k * PATTERN_BYTES));
    column = at.columns(MASK ? _mm_maskz_loadu_epi8(some, from) : _mm_loadu_si128(from));
  }

  // Inlined by force: GCC 12 drops a call of a function that only prefetches, as it returns nothing;
  // 4096x4096 with 4-bit codebooks took 850 us on one core then, and 510 with it.
  VBMI __attribute__((always_inline)) void prefetch(int64_t k) const {
    const char* code = reinterpret_cast<const char*>(codes[0]) + std::max(AHEAD, R * stride);
    const char* place = reinterpret_cast<const char*>(positions[0]) + std::max(AHEAD, R * places);
#pragma GCC unroll 8
    for (int64_t line = 0; line < R * 8 * B; line += 64)
      _mm_prefetch(code + k * R * 8 * B + line, _MM_HINT_T0);
    _mm_prefetch(place + k * R * PATTERN_BYTES, _MM_HINT_T0);
  }
};

// Unit k of row r added to its sums.
template <bool MASK, int B, bool GRID, int R>
VBMI inline __attribute__((always_inline)) void add_unit(const Kept<B, GRID, R>& rows, int r,
                                                         const Places& at, const uint8_t* x,
                                                         int64_t k, Sums& sum) {
  __m512i level, column;
  rows.template unit<MASK>(at, r, k, level, column);
  add_dot(sum.byte[0],
          _mm512_permutex2var_epi8(_mm512_load_si512(x), column, _mm512_load_si512(x + CHUNK)),
          level);
  x += UNIT;
  add_dot(sum.byte[1],
          _mm512_permutex2var_epi8(_mm512_load_si512(x), column, _mm512_load_si512(x + CHUNK)),
          level);
  x += UNIT;
  add_dot(sum.byte[2],
          _mm512_permutex2var_epi8(_mm512_load_si512(x), column, _mm512_load_si512(x + CHUNK)),
          level);
  add_dot(sum.levels, _mm512_set1_epi8(1), level);
}

// Two rows whose scales are one or of whole units: more would not fit the registers.
template <bool MASK, int B, bool GRID>
VBMI inline __attribute__((always_inline)) void add_units(const Kept<B, GRID, 2>& rows,
                                                          const Places& at, const uint8_t* x,
                                                          int64_t begin, int64_t end, Sums& sum0,
                                                          Sums& sum1) {
  Sums s0 = sum0, s1 = sum1;
  for (int64_t k = begin; k < end; ++k) {
    rows.prefetch(k);
    add_unit<MASK>(rows, 0, at, x + k * PLANES * UNIT, k, s0);
    add_unit<MASK>(rows, 1, at, x + k * PLANES * UNIT, k, s1);
  }
  sum0 = s0;
  sum1 = s1;
}

template <int B, bool GRID>
VBMI void block_pairs(const Matrix& m, const Group& g, int64_t i, int64_t end, const Bytes& cut,
                      const Places& at, const Input& in, const Output& out) {
  const int64_t row[2] = {i, std::min(i + 1, end - 1)};
  const Kept<B, GRID, 2> rows(m, g, row, cut);
  const int64_t units = divide_up(m.c, UNIT), full = std::max<int64_t>(units - 2, 0);
  Value value[2];
  for (int64_t s = 0; s < m.scales; ++s) {
    Sums s0{}, s1{};
    const int64_t first = s * m.span / UNIT, last = divide_up(m.end_of(s), UNIT);
    const int64_t middle = std::clamp(full, first, last);
    add_units<false>(rows, at, in.biased.data(), first, middle, s0, s1);
    add_units<true>(rows, at, in.biased.data(), middle, last, s0, s1);
    int64_t total[4], levels[2] = {_mm512_reduce_add_epi32(s0.levels),
                                   _mm512_reduce_add_epi32(s1.levels)};
    total_of({s0, s1, Sums{}, Sums{}}, total);
    for (int r = 0; r < 2; ++r)
      value[r].add(total[r] - (levels[r] << 23), m.row_scale[(g.first + row[r]) * m.scales + s]);
  }
  for (int r = 0; r < 2 && i + r < end; ++r)
    out.put(0, m.row(g.first + i + r), float(value[r].sum * in.x.steps[0]));
}

// Unit k of a row of a grid of up to 4 bits as one sum in every lane.
template <bool MASK, int B>
VBMI inline __attribute__((always_inline)) __m512i whole_unit(const Kept<B, true, 4>& rows, int r,
                                                              const Places& at, const uint8_t* x,
                                                              int64_t k) {
  __m512i level, column;
  rows.template unit<MASK>(at, r, k, level, column);
  __m512i sum = _mm512_setzero_si512(), bias = sum;
  add_dot(bias, _mm512_set1_epi8(char(128)), level);
  x += 2 * UNIT;
  add_dot(sum,
          _mm512_permutex2var_epi8(_mm512_load_si512(x), column, _mm512_load_si512(x + CHUNK)),
          level);
  sum = _mm512_slli_epi32(_mm512_sub_epi32(sum, bias), 8);
  x -= UNIT;
  add_dot(sum,
          _mm512_permutex2var_epi8(_mm512_load_si512(x), column, _mm512_load_si512(x + CHUNK)),
          level);
  sum = _mm512_slli_epi32(sum, 8);
  x -= UNIT;
  add_dot(sum,
          _mm512_permutex2var_epi8(_mm512_load_si512(x), column, _mm512_load_si512(x + CHUNK)),
          level);
  return sum;
}

template <bool MASK, int B>
VBMI inline __attribute__((always_inline)) void narrow_units(const Kept<B, true, 4>& rows,
                                                             const Places& at, const uint8_t* x,
                                                             int64_t begin, int64_t end,
                                                             bool halves, int64_t scales,
                                                             Narrow& narrow) {
  for (int64_t k = begin; k < end; ++k) {
    const uint8_t* xs = x + k * PLANES * UNIT;
    rows.prefetch(k);
    const __m512i s0 = whole_unit<MASK>(rows, 0, at, xs, k);
    const __m512i s1 = whole_unit<MASK>(rows, 1, at, xs, k);
    const __m512i s2 = whole_unit<MASK>(rows, 2, at, xs, k);
    const __m512i s3 = whole_unit<MASK>(rows, 3, at, xs, k);
    const __m512i q = quarters(s0, s1, s2, s3);  // of 32 columns, 16 of them kept
    const __m256i low = _mm512_castsi512_si256(q), high = _mm512_extracti64x4_epi64(q, 1);
    if (!halves) {
      narrow.add(fold(_mm512_cvtepi32_pd(_mm256_add_epi32(low, high))), k);
    } else {
      narrow.add(fold(_mm512_cvtepi32_pd(low)), 2 * k);
      if (2 * k + 1 < scales) narrow.add(fold(_mm512_cvtepi32_pd(high)), 2 * k + 1);
    }
  }
}

template <int B>
VBMI void narrow_pairs(const Matrix& m, const Group& g, int64_t i, int64_t end, const Bytes& cut,
                       const Places& at, const Input& in, const Output& out) {
  int64_t row[4];
  Narrow narrow;
  for (int r = 0; r < 4; ++r) {
    row[r] = std::min(i + r, end - 1);
    narrow.scale[r] = m.row_scale + (g.first + row[r]) * m.scales;
  }
  const Kept<B, true, 4> rows(m, g, row, cut);
  const int64_t units = divide_up(m.c, UNIT), full = std::max<int64_t>(units - 2, 0);
  const bool halves = m.span == CHUNK;
  narrow_units<false>(rows, at, in.biased.data(), 0, full, halves, m.scales, narrow);
  narrow_units<true>(rows, at, in.biased.data(), full, units, halves, m.scales, narrow);
  double sum[4];
  _mm256_storeu_pd(sum, narrow.sum);
  for (int r = 0; r < 4 && i + r < end; ++r)
    out.put(0, m.row(g.first + i + r), float(sum[r] * in.x.steps[0]));
}

template <int B, bool GRID>
VBMI void rows_pairs(const Matrix& m, const Group& g, int64_t begin, int64_t end, const Input& in,
                     const Output& out) {
  const Bytes cut(B);
  const Places at;
  if constexpr (GRID && B <= 4)
    if (is_narrow(m)) {
      for (int64_t i = begin; i < end; i += 4) narrow_pairs<B>(m, g, i, end, cut, at, in, out);
      return;
    }
  for (int64_t i = begin; i < end; i += 2) block_pairs<B, GRID>(m, g, i, end, cut, at, in, out);
}

}  // namespace

const Rows pairs_of_width[2][MAX_B + 1] = {
    {nullptr, rows_pairs<1, false>, rows_pairs<2, false>, rows_pairs<3, false>,
     rows_pairs<4, false>, rows_pairs<5, false>, nullptr, nullptr, nullptr},
    {nullptr, rows_pairs<1, true>, rows_pairs<2, true>, rows_pairs<3, true>, rows_pairs<4, true>,
     rows_pairs<5, true>, rows_pairs<6, true>, rows_pairs<7, true>, rows_pairs<8, true>}};
#endif
