// out = x W^T + (x A^T) B for a sparse or grid W and an adapter as FORMAT.md stores them, few tokens.
//
// x is made of 24-bit integers (product.h). The sum over the columns that share a scale is an integer,
// exact; times the scale they are added in double, in their order: the same bits on every instruction
// set and for any number of threads. A 4-bit A is a dense grid of `rank` rows, and is multiplied as one.
//
//   any processor   a row becomes integers, 0 where pruned, then one dot product per scale and token
//   VBMI            four rows become bytes in L1, offset so that pruned ones count nothing; from five
//                   tokens on 32 rows do, and from there go to bfloat16 and float sums (gemm.cpp)
//   VBMI, one token 2:4: nothing is expanded, x is permuted to the kept columns in registers instead,
//                   half the products and look-ups; dense grids: nothing leaves the registers
#include <algorithm>
#include <cmath>
#include <cstring>
#include <deque>
#include <optional>

#include "lanes.h"
#include "parallel.h"
#include "product.h"
#include "vector.h"

namespace {

enum Sparsity { DENSE, PAIRS, BITMAP };
constexpr int64_t UNIT = 2 * CHUNK;        // columns; of 2:4 rows 64 codes and 32 patterns
constexpr int64_t ADAPTER = 128;           // columns that share a scale of a 4-bit adapter
constexpr int64_t PER_THREAD = 1 << 16;    // bytes
constexpr int64_t SEVERAL = 5;             // tokens that are worth turning rows into bfloat16
constexpr int64_t PATTERN_BYTES = 12;      // of a unit
constexpr uint8_t FIRST[8] = {0, 0, 0, 1, 1, 2, 2, 2}, SECOND[8] = {1, 2, 3, 2, 3, 3, 3, 3};

int64_t divide_up(int64_t a, int64_t b) { return a ? (a - 1) / b + 1 : 0; }

// W, or a 4-bit A.
struct Matrix {
  Sparsity sparsity;
  bool grid;  // levels are code - 2^(width - 1)
  int64_t r, c, kept;
  const uint8_t* positions;
  int64_t places;             // bytes of them in a row
  const uint16_t* row_scale;  // [r, scales]
  int64_t scales, span;       // how many a row has, and the columns of one
  const int32_t* order;       // which row stands at a stored place; null: the same
  std::vector<int32_t> found;
  std::vector<Group> groups;

  int64_t row(int64_t stored) const { return order ? order[stored] : stored; }
  int64_t end_of(int64_t scale) const { return scale + 1 == scales ? c : (scale + 1) * span; }
};

// False if the sizes are not those of the widths and of what the linear has.
bool lay_out(const SkimlmSparse& w, Matrix& m) {
  if (w.r < 1 || w.c < 1 || w.sparsity < DENSE || w.sparsity > BITMAP || w.group < 0) return false;
  m = {Sparsity(w.sparsity), w.group > 0, w.r, w.c, w.c, w.positions, 0, w.row_scale, 1, w.c,
       w.order, {}, {}};
  if (m.sparsity != DENSE) m.kept = w.kept;
  if (m.kept < 1 || m.kept > w.c) return false;
  if (m.sparsity == PAIRS) {
    if (w.c % 4 || w.kept != w.c / 2) return false;
    m.places = divide_up(w.c / 4 * 3, 8);
  }
  if (m.sparsity == BITMAP) m.places = divide_up(w.c, 8);
  if (m.grid) {
    m.span = std::min(w.group, w.c);
    m.scales = divide_up(w.c, m.span);
  }
  if (!w.order) {
    m.found.resize(w.r);
    m.order = m.found.data();
  }
  int64_t rows = 0, bytes = 0, levels = 0, zeros = 0;
  for (int b = 1; b <= MAX_B; ++b) {
    const int64_t count =
        w.order ? w.counts[b] : rows_of_width(b, w.widths, w.r, m.found.data() + rows);
    const int64_t stride = divide_up(m.kept * b, 8);
    if (count)
      m.groups.push_back({b, count, rows, w.weight + bytes, w.codebook + levels, w.row_zero + zeros,
                          stride});
    rows += count;
    bytes += count * stride;
    if (!m.grid) (b <= 5 ? levels : zeros) += b <= 5 ? count << b : count;
  }
  return rows == w.r && bytes == w.weight_size && levels == w.codebook_size &&
         zeros == w.zeros_size && w.positions_size == w.r * m.places &&
         w.scale_size == w.r * m.scales;
}

// A of 4 bits. False if the sizes of the adapter are wrong.
bool lay_out_adapter(const SkimlmSparse& w, Matrix& m) {
  if (!w.rank) return !w.a_size && !w.b_size && !w.a_scale_size && !w.b_scale_size;
  if (w.rank < 1 || w.rank > 1 << 16) return false;
  const bool four = w.adapter_bits == 4;
  if (!four && w.adapter_bits != 16) return false;
  const int64_t a = four ? divide_up(w.c, 2) : w.c, b = four ? divide_up(w.r, 2) : w.r;
  const int64_t groups = four ? divide_up(w.c, ADAPTER) : 0;
  if (w.a_size != w.rank * a || w.b_size != w.rank * b || w.a_scale_size != w.rank * groups ||
      w.b_scale_size != w.rank * (four ? divide_up(w.r, ADAPTER) : 0))
    return false;
  if (four)
    m = {DENSE, true, w.rank, w.c, w.c, nullptr, 0, w.lora_a_scale, groups, ADAPTER, nullptr, {},
         {{4, w.rank, 0, static_cast<const uint8_t*>(w.lora_a), nullptr, nullptr, a}}};
  return true;
}

// x as matrices read it that have the same columns in a scale.
struct Input {
  const Integers& x;
  Sparsity sparsity;
  bool narrow;
  int64_t span;
  // with planes:
  std::vector<int64_t> sums;   // [n, scales] over the columns of a scale
  Lines<int32_t> lanes;        // [n, scales, 16] of them, for scales of one or two chunks: mod 2^32
  Lines<uint8_t> biased;       // [units, 3, 128] of one token: b0 + 2^8 b1 + 2^16 (b2 - 128), unsigned
  Lines<int8_t> paired;        // the same of x itself, signed, in the order of `column_of`
  Lines<int32_t> paired_lanes;  // [units, 16] sums of it
};

// Of 128 columns, the one in a byte of the first or second half as 16 codes of up to 4 bits come out.
int64_t column_of(int64_t half, int64_t byte) { return byte / 8 * 16 + half * 8 + byte % 8; }

// Scales for which four rows at a time of a grid of up to 4 bits are summed in 32 bits: see `Narrow`.
bool is_narrow(const Matrix& m) { return m.grid && (m.span == CHUNK || m.span == UNIT); }

Input to_input(const Integers& x, const Matrix& m) {
  Input in{x, m.sparsity, is_narrow(m), m.span, {}, {}, {}, {}, {}};
  if (!x.planes) return in;
  const int64_t padded = x.chunks * CHUNK;
  in.sums.resize(x.n * m.scales);
  if (is_narrow(m)) in.lanes = Lines<int32_t>(x.n * m.scales * 16);
  std::vector<int32_t> whole(padded + CHUNK);
  for (int64_t t = 0; t < x.n; ++t) {
    for (int64_t k = 0; k < x.chunks; ++k) {
      const int8_t* p = &x.planes[(t * x.chunks + k) * PLANES * CHUNK];
      for (int64_t j = 0; j < CHUNK; ++j)
        whole[k * CHUNK + j] = p[j] + p[CHUNK + j] * 256 + p[2 * CHUNK + j] * 65536;
    }
    for (int64_t s = 0; s < m.scales; ++s) {
      int64_t sum = 0;
      for (int64_t j = s * m.span, end = m.end_of(s); j < end; ++j) sum += whole[j];
      in.sums[t * m.scales + s] = sum;
      if (!in.lanes) continue;
      uint32_t lane[16] = {};
      for (int64_t j = 0; j < m.span && s * m.span + j < padded; j += CHUNK)
        for (int64_t i = 0; i < CHUNK; ++i) lane[i / 4] += uint32_t(whole[s * m.span + j + i]);
      std::memcpy(&in.lanes[(t * m.scales + s) * 16], lane, sizeof lane);
    }
  }
  if (m.sparsity == PAIRS && x.n == 1) {
    const int64_t units = divide_up(x.chunks, 2);
    in.biased = Lines<uint8_t>(units * PLANES * UNIT);
    for (int64_t k = 0; k < units; ++k)
      for (int p = 0; p < PLANES; ++p) {
        uint8_t* to = &in.biased[(k * PLANES + p) * UNIT];
        const int32_t* from = &whole[k * UNIT];
        for (int64_t j = 0; j < UNIT; ++j) to[j] = uint8_t((from[j] + (1 << 23)) >> 8 * p);
      }
  }
  if (m.sparsity == DENSE && x.n == 1 && is_narrow(m)) {
    const int64_t units = divide_up(x.chunks, 2);
    in.paired = Lines<int8_t>(units * PLANES * UNIT);
    in.paired_lanes = Lines<int32_t>(units * 16);
    for (int64_t k = 0; k < units; ++k) {
      uint32_t lane[16] = {};
      for (int64_t j = 0; j < UNIT; j += 8) {  // eight columns that stay side by side
        const int64_t at = k * UNIT + column_of(j / CHUNK, j % CHUNK);
        const int8_t* p = &x.planes[at / CHUNK * PLANES * CHUNK + at % CHUNK];
        for (int q = 0; q < PLANES; ++q) {
          int8_t* to = &in.paired[(k * PLANES + q) * UNIT + j];
          if (at < padded)
            std::memcpy(to, p + q * CHUNK, 8);
          else
            std::memset(to, 0, 8);
        }
        for (int64_t i = 0; i < 8; ++i) lane[(j + i) % CHUNK / 4] += uint32_t(whole[at + i]);
      }
      std::memcpy(&in.paired_lanes[k * 16], lane, sizeof lane);
    }
  }
  return in;
}

// One row's sum over its scales, in units of x. Products are exact but for more than 2^15 columns of
// one scale; fma all the same, as some compilers would put it there and others not.
struct Value {
  double sum = 0;
  void add(int64_t total, uint16_t scale) {
    sum = std::fma(double(total), double(from_bf16(scale)), sum);
  }
};

// ---- any processor

// Patterns or bits as the columns they keep; `each` must refuse more than it has room for.
template <class Each>
void positions_any(Sparsity sparsity, const uint8_t* at, int64_t c, const Each& each) {
  if (sparsity == BITMAP) {
    for (int64_t j = 0; j < c; ++j)
      if (at[j / 8] >> j % 8 & 1) each(j);
    return;
  }
  for (int64_t j = 0; j < c; j += 4) {
    const int64_t bit = j / 4 * 3;
    uint32_t pair = at[bit / 8];
    if (bit % 8 > 5) pair |= uint32_t(at[bit / 8 + 1]) << 8;
    const uint32_t pattern = pair >> bit % 8 & 7;
    each(j + FIRST[pattern]);
    each(j + SECOND[pattern]);
  }
}

// to[j] = of a kept column its level from `from` [kept], in order; others are left.
template <class T>
void spread_any(const Matrix& m, int64_t stored, const T* from, T* to) {
  int64_t k = 0;
  positions_any(m.sparsity, m.positions + stored * m.places, m.c, [&](int64_t j) {
    if (k < m.kept) to[j] = from[k++];
  });
}

int64_t dot(const int16_t* level, const int16_t* digit, int64_t begin, int64_t end) {
  int64_t sum = 0;
  for (int64_t j = begin; j < end; j += 512) {  // 512 products of 9 and 12 bits fit 32
    int32_t part = 0;
    const int64_t stop = std::min(j + 512, end);
    for (int64_t t = j; t < stop; ++t) part += int32_t(level[t]) * digit[t];
    sum += part;
  }
  return sum;
}

// Rows as numbers, with room for one.
template <class T>
struct Numbers {
  std::vector<uint8_t> code;
  std::vector<T> kept, dense;
  explicit Numbers(const Matrix& m)
      : code(m.kept + 8), kept(m.kept), dense(m.sparsity ? m.c : 0) {}

  // Row i of a group [c]: the entries of its codes, 0 where pruned.
  const T* row(const Matrix& m, const Group& g, int64_t i, const T* entry) {
    cut_row[g.width](g.packed + i * g.stride, code.data(), m.kept);
    for (int64_t k = 0; k < m.kept; ++k) kept[k] = entry[code[k]];
    if (!m.sparsity) return kept.data();
    std::fill(dense.begin(), dense.end(), T(0));
    spread_any(m, g.first + i, kept.data(), dense.data());
    return dense.data();
  }
};

// to[j] = 1 at the columns of a row that have a code, 0 elsewhere.
template <class T>
void ones_any(const Matrix& m, int64_t stored, T* to) {
  std::fill_n(to, m.c, T(m.sparsity ? 0 : 1));
  if (m.sparsity)
    positions_any(m.sparsity, m.positions + stored * m.places, m.c, [&](int64_t j) { to[j] = 1; });
}

void rows_any(const Matrix& m, const Group& g, int64_t begin, int64_t end, const Input& in,
              const Output& out) {
  const Integers& x = in.x;
  const int64_t padded = x.chunks * CHUNK;
  const bool affine = !m.grid && g.width > 5;
  Numbers<int16_t> numbers(m);
  std::vector<int16_t> ones(affine ? m.c : 0);
  for (int64_t i = begin; i < end; ++i) {
    const int64_t stored = g.first + i, row = m.row(stored);
    int16_t entry[256];
    for (int k = 0; k < 1 << g.width; ++k)
      entry[k] = int16_t(m.grid ? k - (1 << (g.width - 1)) : affine ? k : g.levels[(i << g.width) + k]);
    const int16_t* level = numbers.row(m, g, i, entry);
    if (affine) ones_any(m, stored, ones.data());
    for (int64_t t = 0; t < x.n; ++t) {
      const int16_t* digit = &x.digits[t * 2 * padded];
      Value value;
      for (int64_t s = 0; s < m.scales; ++s) {
        const int64_t from = s * m.span, to = m.end_of(s);
        auto times = [&](const int16_t* l) {
          return dot(l, digit, from, to) + dot(l, digit + padded, from, to) * 4096;
        };
        int64_t total = times(level);
        if (affine) total -= g.zeros[i] * times(ones.data());
        value.add(total, m.row_scale[stored * m.scales + s]);
      }
      out.put(t, row, float(value.sum * x.steps[t]));
    }
  }
}

// ---- AVX-512 with VBMI: rows as bytes in L1

#if defined(__AVX512F__)
#define VBMI2 __attribute__((target("avx512vbmi,avx512vbmi2,avx512vnni,avx512bf16")))

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
  // 64 codes in the low bits of bytes
  VBMI __m512i chunk(const uint8_t* at, int64_t left) const {
    const __m512i bytes = _mm512_maskz_loadu_epi8(first_bytes(std::min<int64_t>(left, 8 * width)), at);
    return _mm512_multishift_epi64_epi8(fields, _mm512_permutexvar_epi8(spread, bytes));
  }
};

// Levels of a row plus 128, or its codes; [kept], padded to chunks.
VBMI void bytes_of(const Matrix& m, const Group& g, int64_t i, const Bytes& cut, uint8_t* to) {
  const uint8_t* at = g.packed + i * g.stride;
  const int64_t step = 8 * g.width;
  if (!m.grid && g.width <= 5) {
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

// Of a row: three sums of bytes of x times levels, and the sum of the levels.
struct Sums {
  __m512i byte[PLANES], levels;
};

VBMI inline void total_of(const Sums (&sum)[4], int64_t (&total)[4]) {
  __m512i bytes[4][PLANES];
  for (int r = 0; r < 4; ++r) std::copy_n(sum[r].byte, PLANES, bytes[r]);
  add_planes<4>(bytes, total);
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

// Sum of a byte times 24 bits in every lane, codes unsigned: C chunks.
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

// Rows i.. of a group; past `end` the last one again, and not put out.
VBMI void block_bytes(const Matrix& m, const Group& g, int64_t i, int64_t end, const Bytes& cut,
                      const Input& in, Room& room, const Output& out) {
  const Integers& x = in.x;
  const bool affine = !m.grid && g.width > 5, ones = affine && m.sparsity;
  const int64_t offset = affine ? 0 : m.grid ? 1 << (g.width - 1) : 128;
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

VBMI void rows_bytes(const Matrix& m, const Group& g, int64_t begin, int64_t end, const Input& in,
                     const Output& out) {
  const Bytes cut(g.width);
  Room room(m.c);
  for (int64_t i = begin; i < end; i += 4) block_bytes(m, g, i, end, cut, in, room, out);
}

// ---- AVX-512 with VBMI: 2:4 rows times one token
//
// A unit is 128 columns: 64 codes, 32 patterns. Each code's column within the unit is looked up from its
// pattern, and the bytes of x are permuted there. x is unsigned then, and levels are the signed operand:
// the other way around a sum of the kept x would be due, three more products. The bias of its highest
// byte costs one: the sum of the levels. Rows expanded to bytes by vpexpandb took 3.2 times as long (512
// rows of 4096 columns in the second cache, 4-bit codebooks: 218 us, here 67).

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

using Rows = void (*)(const Matrix&, const Group&, int64_t, int64_t, const Input&,
                           const Output&);
constexpr Rows pairs_of_width[2][MAX_B + 1] = {
    {nullptr, rows_pairs<1, false>, rows_pairs<2, false>, rows_pairs<3, false>,
     rows_pairs<4, false>, rows_pairs<5, false>, nullptr, nullptr, nullptr},
    {nullptr, rows_pairs<1, true>, rows_pairs<2, true>, rows_pairs<3, true>, rows_pairs<4, true>,
     rows_pairs<5, true>, rows_pairs<6, true>, rows_pairs<7, true>, rows_pairs<8, true>}};

// ---- AVX-512 with VBMI: dense rows of such a grid times one token, in registers

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

constexpr Rows dense_of_width[5] = {nullptr, rows_dense<1>, rows_dense<2>, rows_dense<3>,
                                         rows_dense<4>};
#endif

void multiply_rows(const Matrix& m, const Group& g, int64_t begin, int64_t end, const Input& in,
                   const Output& out) {
#if defined(__AVX512F__)
  const bool units = m.scales == 1 || m.span % UNIT == 0 || (m.span == CHUNK && g.width <= 4);
  const auto pairs = units ? pairs_of_width[m.grid][g.width] : nullptr;
  if (in.biased && pairs) return pairs(m, g, begin, end, in, out);
  if (in.paired && g.width <= 4) return dense_of_width[g.width](m, g, begin, end, in, out);
  if (in.x.planes) return rows_bytes(m, g, begin, end, in, out);
#endif
  rows_any(m, g, begin, end, in, out);
}

// ---- AVX-512 with VBMI: rows for several tokens

#if defined(__AVX512F__)
// Whether rows of a group become bytes that `ByteRows` may have.
bool is_bytes(const Matrix& m, const Group& g) {
  return (m.grid || g.width <= 5) && (m.scales == 1 || m.span % CHUNK == 0);
}

// The rows of all groups that do: they stand first.
ByteRows byte_rows(const Matrix& m) {
  int64_t rows = 0;
  for (const Group& g : m.groups) rows += is_bytes(m, g) ? g.rows : 0;
  auto make = [&m](int64_t begin, int64_t end, int8_t* bytes, int64_t stride, float* scale) {
    Room room(m.c);
    for (const Group& g : m.groups) {
      const int64_t first = std::max(begin - g.first, int64_t(0));
      const int64_t last = std::min(end - g.first, g.rows);
      if (first >= last) continue;
      const Bytes cut(g.width);
      const uint8_t offset = m.grid ? 1 << (g.width - 1) : 128;
      for (int64_t i = first; i < last; ++i) {
        const int64_t at = g.first + i;
        int8_t* to = bytes + (at - begin) * stride;
        row_bytes(m, g, i, cut, offset, room, reinterpret_cast<uint8_t*>(to));
        for (int64_t j = 0; j < stride; ++j) to[j] = int8_t(to[j] - offset);  // mod 2^8
        for (int64_t s = 0; s < m.scales; ++s)
          scale[(at - begin) * m.scales + s] = from_bf16(m.row_scale[at * m.scales + s]);
      }
    }
  };
  return {rows, m.c, m.scales, m.span, m.order, make};
}
#endif

// ---- rows as floats

// Levels of one row after the other: float [c], 0 where pruned.
struct Levels {
  const Matrix& m;
  Numbers<float> numbers;
  std::vector<float> level;
  explicit Levels(const Matrix& m) : m(m), numbers(m), level(m.c) {}

  const float* row(const Group& g, int64_t i) {
    const bool affine = !m.grid && g.width > 5;
#if defined(__AVX512F__)
    if (skimlm_has_vbmi()) {
      if (cut.width != g.width) cut = Bytes(g.width);
      const int offset = affine ? g.zeros[i] : m.grid ? 1 << (g.width - 1) : 128;
      const uint8_t* bytes = room.rows.data();
      row_bytes(m, g, i, cut, affine ? 0 : uint8_t(offset), room, room.rows.data());
      if (affine && m.sparsity) {
        room.ones.resize(m.c);
        const uint8_t* ones = room.ones.data();
        ones_any(m, g.first + i, room.ones.data());
        for (int64_t j = 0; j < m.c; ++j) level[j] = float(bytes[j] - offset * ones[j]);
      } else {
        for (int64_t j = 0; j < m.c; ++j) level[j] = float(bytes[j] - offset);
      }
      return level.data();
    }
#endif
    float entry[256];
    for (int k = 0; k < 1 << g.width; ++k)
      entry[k] = float(m.grid   ? k - (1 << (g.width - 1))
                       : affine ? k - g.zeros[i]
                                : g.levels[(i << g.width) + k]);
    return numbers.row(m, g, i, entry);
  }

 private:
#if defined(__AVX512F__)
  Bytes cut{1};
  Room room{m.c};
#endif
};

// ---- adapter

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
void add_nibbles(const SkimlmSparse& w, const float* u, int64_t block, float* value) {
  const __m512 level = _mm512_setr_ps(-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7);
  const int64_t bytes = divide_up(w.r, 2), blocks = divide_up(w.r, ADAPTER);
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

// out [n, r] = y + u B, columns begin..end of a block of 128.
void add_adapter(const SkimlmSparse& w, const float* u, const float* y, int64_t n, int64_t begin,
                 int64_t end, const Output& out) {
  const bool four = w.adapter_bits == 4;
  const Factor b{four, w.lora_b, four ? divide_up(w.r, 2) : w.r};
  const int64_t blocks = divide_up(w.r, ADAPTER);
  constexpr int64_t TOKENS = 2, PARTS = ADAPTER / Vector::N;
  auto put = [&](int64_t t, const float* value) {
    for (int64_t j = begin; j < end; ++j) out.put(t, j, y[t * w.r + j] + value[j - begin]);
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

// Rows of one width, as one turn of a thread takes them; no matrix: of a 16-bit A.
struct Part {
  const Matrix* matrix;
  const Group* group;
  const Input* input;
  const Output* out;
  int64_t begin, end;
};

void split(const Matrix& m, const Input& in, const Output& out, int64_t turn, std::vector<Part>& to) {
  for (const Group& g : m.groups) {
    const int64_t bytes = g.stride + m.places + m.scales * 2;
    const int64_t step = std::max<int64_t>(4, turn / bytes / 4 * 4);
    for (int64_t i = 0; i < g.rows; i += step)
      to.push_back({&m, &g, &in, &out, i, std::min(i + step, g.rows)});
  }
}

// The numbers of x, and what matrices read of them: those that read the same share it.
struct Inputs {
  const float* x;  // [n, c]
  Integers whole;
  std::deque<Input> made;  // where they stand does not change
  Inputs(const float* x, int64_t n, int64_t c) : x(x), whole(to_integers(x, n, c, 1)) {}

  const Input& of(const Matrix& m) {
    for (const Input& in : made)
      if (in.sparsity == m.sparsity && in.narrow == is_narrow(m) && in.span == m.span) return in;
    made.push_back(to_input(whole, m));
    return made.back();
  }
};

// One linear times x: turns that may go in any order, then, of an adapter, blocks that add its part.
// Neither copied nor moved once it is made: turns point into it.
struct Work {
  const SkimlmSparse& w;
  const Matrix &m, &a;
  const float* x;  // [n, c], in_scale left out
  int64_t n, bytes;
  float *u, *y;  // [n, rank] and, with an adapter, [n, r]: x A^T, x W^T
  Output components, sparse, result;
  std::vector<Part> turns;

  Work(const SkimlmSparse& w, const Matrix& m, const Matrix& a, Inputs& scaled, Inputs& plain,
       int64_t n, float* u, float* y, const Output& out, int threads)
      : w(w), m(m), a(a), x(plain.x), n(n), bytes(size(w)), u(u), y(y),
        components{u, false, w.rank, nullptr},
        sparse(w.rank ? Output{y, false, w.r, nullptr} : out), result(out) {
    const int64_t turn = std::max(WORK, bytes / (TURNS * threads));
    if (!a.groups.empty()) split(a, plain.of(a), components, turn, turns);
    if (w.rank && a.groups.empty())
      for (int64_t k = 0, step = std::max<int64_t>(1, turn / (2 * w.c)); k < w.rank; k += step)
        turns.push_back({nullptr, nullptr, nullptr, &components, k, std::min(k + step, w.rank)});
    split(m, scaled.of(m), sparse, turn, turns);
  }
  Work(const Work&) = delete;

  static int64_t size(const SkimlmSparse& w) {
    return w.weight_size + w.positions_size + 2 * w.scale_size +
           (w.a_size + w.b_size) * (w.adapter_bits == 4 ? 1 : 2);
  }

  void turn(int64_t at) const {
    const Part& p = turns[at];
    if (p.matrix) return multiply_rows(*p.matrix, *p.group, p.begin, p.end, *p.input, *p.out);
    const Factor factor{false, w.lora_a, w.c};
    for (int64_t t = 0; t < n; ++t)
      for (int64_t k = p.begin; k < p.end; ++k)
        u[t * w.rank + k] = dot_bf16(factor, k, x + t * w.c, w.c);
  }

  int64_t blocks() const { return w.rank ? divide_up(w.r, ADAPTER) : 0; }
  void block(int64_t at) const {
    add_adapter(w, u, y, n, at * ADAPTER, std::min((at + 1) * ADAPTER, w.r), result);
  }
};

}  // namespace

bool fits(const SkimlmSparse& w) {
  Matrix m{}, a{};
  return lay_out(w, m) && lay_out_adapter(w, a);
}

void multiply(const SparseProduct* products, int64_t count, const float* x, Team& team,
              std::atomic<int64_t>* next) {
  Inputs inputs(x, 1, products[0].linear.c);
  std::deque<Matrix> matrices;
  std::deque<Work> works;
  bool adapters = false;
  for (int64_t i = 0; i < count; ++i) {
    const auto& [w, u, out] = products[i];
    Matrix &m = matrices.emplace_back(), &a = matrices.emplace_back();
    lay_out(w, m);
    lay_out_adapter(w, a);
    // y stands where the sum goes: a block reads what it replaces
    works.emplace_back(w, m, a, inputs, inputs, 1, u, static_cast<float*>(out.data), out, team.size);
    adapters |= w.rank > 0;
  }
  auto all = [&](auto size, auto run, std::atomic<int64_t>& from) {
    int64_t first = 0, at = from.fetch_add(1);
    for (const Work& work : works) {
      for (; at < first + size(work); at = from.fetch_add(1)) run(work, at - first);
      first += size(work);
    }
  };
  all([](const Work& w) { return int64_t(w.turns.size()); },
      [](const Work& w, int64_t at) { w.turn(at); }, next[0]);
  if (!adapters) return;
  team.wait();
  all([](const Work& w) { return w.blocks(); }, [](const Work& w, int64_t at) { w.block(at); },
      next[1]);
}

#if defined(__AVX512F__)
// Several tokens: rows become bfloat16 in cache (gemm.cpp), but for those of 6 bits and more of codebooks.
void multiply_several(const SkimlmSparse& w, const Matrix& m, const Matrix& a, const void* x, bool bf16,
                      int64_t n, const Output& out, int threads) {
  std::vector<float> u(n * w.rank), y(w.rank ? n * w.r : 0);
  const Output sparse = w.rank ? Output{y.data(), false, w.r, nullptr} : out;
  const ByteRows rows = byte_rows(m);
  multiply_many(rows, x, bf16, w.in_scale, n, sparse, threads);
  if (rows.r < m.r) {
    const std::vector<float> values = to_floats(x, bf16, w.in_scale, n, w.c);
    Inputs inputs(values.data(), n, w.c);
    const Input& in = inputs.of(m);
    for (const Group& g : m.groups)
      if (!is_bytes(m, g))
        parallel_rows(g.rows, 4, threads, [&](int64_t from, int64_t to) {
          multiply_rows(m, g, from, to, in, sparse);
        });
  }
  if (!w.rank) return;
  if (!a.groups.empty()) {
    multiply_many(byte_rows(a), x, bf16, nullptr, n, {u.data(), false, w.rank, nullptr}, threads);
  } else {
    const std::vector<float> plain = to_floats(x, bf16, nullptr, n, w.c);
    const Factor factor{false, w.lora_a, w.c};
    parallel_rows(w.rank, 4, threads, [&](int64_t from, int64_t to) {
      for (int64_t t = 0; t < n; ++t)
        for (int64_t k = from; k < to; ++k)
          u[t * w.rank + k] = dot_bf16(factor, k, &plain[t * w.c], w.c);
    });
  }
  parallel_rows(divide_up(w.r, ADAPTER), 1, threads, [&](int64_t from, int64_t to) {
    for (int64_t at = from; at < to; ++at)
      add_adapter(w, u.data(), y.data(), n, at * ADAPTER, std::min((at + 1) * ADAPTER, w.r), out);
  });
}
#endif

int skimlm_sparse_matmul(const SkimlmSparse* linear, const void* x, int64_t x_bf16, void* out,
                         int64_t n, int threads) {
  const SkimlmSparse& w = *linear;
  Matrix m{}, a{};
  if (!lay_out(w, m) || !lay_out_adapter(w, a)) return 1;
#if defined(__AVX512F__)
  if (n >= SEVERAL && skimlm_has_vbmi() && is_bytes(m, m.groups.front())) {
    multiply_several(w, m, a, x, x_bf16, n, {out, x_bf16 != 0, w.r, w.bias}, threads);
    return 0;
  }
#endif
  const std::vector<float> values = to_floats(x, x_bf16, w.in_scale, n, w.c);
  Inputs scaled(values.data(), n, w.c);
  std::vector<float> raw;
  std::optional<Inputs> own;
  if (w.rank && w.in_scale) {
    raw = to_floats(x, x_bf16, nullptr, n, w.c);
    own.emplace(raw.data(), n, w.c);
  }
  // A second thread for a few microseconds of work costs more than it brings.
  threads = int(std::clamp<int64_t>(Work::size(w) / PER_THREAD, 1, threads));
  std::vector<float> u(n * w.rank), y(w.rank ? n * w.r : 0);
  const Work work(w, m, a, scaled, own ? *own : scaled, n, u.data(), y.data(),
                  {out, x_bf16 != 0, w.r, w.bias}, threads);
  parallel_rows(int64_t(work.turns.size()), 1, threads, [&](int64_t from, int64_t to) {
    for (int64_t at = from; at < to; ++at) work.turn(at);
  });
  parallel_rows(work.blocks(), 1, threads, [&](int64_t from, int64_t to) {
    for (int64_t at = from; at < to; ++at) work.block(at);
  });
  return 0;
}

int skimlm_sparse_unpack(const SkimlmSparse* linear, void* out, int64_t out_bf16, int64_t begin,
                         int64_t end, int64_t stored, int threads) {
  const SkimlmSparse& w = *linear;
  Matrix m{};
  if (!lay_out(w, m) || begin < 0 || begin > end || end > w.r) return 1;
  std::vector<float> column(w.in_scale ? w.c : 0);
  for (size_t j = 0; j < column.size(); ++j) column[j] = from_fp16(w.in_scale[j]);
  parallel_rows(end - begin, 16, threads, [&](int64_t from, int64_t to) {
    Levels levels(m);
    std::vector<float> value(m.c);
    for (const Group& g : m.groups) {
      const int64_t last = std::min(begin + to - g.first, g.rows);
      for (int64_t i = std::max<int64_t>(begin + from - g.first, 0); i < last; ++i) {
        const int64_t at = g.first + i, target = (stored ? at - begin : m.row(at)) * m.c;
        const float* level = levels.row(g, i);
        for (int64_t s = 0; s < m.scales; ++s) {
          const float scale = from_bf16(m.row_scale[at * m.scales + s]);
          for (int64_t j = s * m.span; j < m.end_of(s); ++j) value[j] = level[j] * scale;
        }
        if (w.in_scale)
          for (int64_t j = 0; j < m.c; ++j) value[j] *= column[j];
        from_float(value.data(), out_bf16, m.c,
                   static_cast<char*>(out) + target * (out_bf16 ? 2 : 4));
      }
    }
  });
  return 0;
}
