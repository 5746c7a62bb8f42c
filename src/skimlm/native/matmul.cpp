// out = x W^T for a packed W (FORMAT.md) and few tokens: the weights are read once, as they are stored.
//
// With VBMI codes are cut and looked up in registers. Elsewhere a row becomes integers in L1 first.
//
//   exact   x as 24-bit integers (product.h): three planes of a byte each, multiplied one by one
//   8 bit   x is rounded to int8 with one scale per token and 128 columns; sums are integers within
//           those columns
#include <algorithm>
#include <cmath>
#include <cstring>

#include "lanes.h"
#include "parallel.h"
#include "product.h"

namespace {

constexpr int64_t PER_THREAD = 1 << 16;  // bytes
constexpr int64_t TOKENS = 4;             // that are multiplied by the same codes
constexpr int64_t MANY = 2;              // tokens from which rows are turned into bfloat16 (gemm.cpp)

// ---- any processor: a row becomes integers, then one dot product per token

int64_t dot(const int16_t* level, const int16_t* digit, int64_t c) {
  int64_t sum = 0;
  for (int64_t j = 0; j < c; j += 512) {  // 512 products of 8 and 12 bits fit 32
    int32_t part = 0;
    const int64_t end = std::min(j + 512, c);
    for (int64_t t = j; t < end; ++t) part += int32_t(level[t]) * digit[t];
    sum += part;
  }
  return sum;
}

float dot_rounded(const int16_t* level, const Rounded& x, int64_t token) {
  float sum = 0;
  for (int64_t k = 0; k < x.pairs; ++k, level += PAIR) {
    const int64_t at = token * x.pairs + k;
    int32_t part = 0;
    for (int h = 0; h < 2; ++h)
      for (int j = 0; j < CHUNK; ++j)
        part += int32_t(level[column_of(h, j)]) * x.x[at * PAIR + h * CHUNK + j];
    sum += float(part) * x.scales[at];
  }
  return sum;
}

// Calls each(stored row, its levels or codes [padded c], its zero point) for rows begin..end.
template <class Each>
void rows_any(const Group& g, int64_t begin, int64_t end, int64_t c, const Each& each) {
  const int64_t padded = (c + PAIR - 1) / PAIR * PAIR;
  std::vector<uint8_t> code(padded + 8);
  std::vector<int16_t> level(padded);
  for (int64_t i = begin; i < end; ++i) {
    g.indices(i, c, code.data());
    int16_t entry[256];
    g.entries(i, entry);
    for (int64_t j = 0; j < c; ++j) level[j] = entry[code[j]];
    each(i, level.data(), g.zero(i));
  }
}

void exact_any(const Group& g, int64_t begin, int64_t end, const Integers& x,
               const uint16_t* row_scale, const int32_t* order, const Output& out) {
  const int64_t padded = x.chunks * CHUNK;
  rows_any(g, begin, end, x.c, [&](int64_t i, const int16_t* level, int64_t zero) {
    for (int64_t t = 0; t < x.n; ++t) {
      const int16_t* digit = &x.digits[t * 2 * padded];
      const int64_t total = dot(level, digit, padded) + dot(level, digit + padded, padded) * 4096;
      const float scale = from_bf16(row_scale[g.first + i]);
      out.put(t, order[g.first + i], to_value(total, zero, x.sums[t], scale, x.steps[t]));
    }
  });
}

void rounded_any(const Group& g, int64_t begin, int64_t end, const Rounded& x,
                 const uint16_t* row_scale, const int32_t* order, const Output& out) {
  rows_any(g, begin, end, x.c, [&](int64_t i, const int16_t* level, int64_t zero) {
    for (int64_t t = 0; t < x.n; ++t) {
      const float sum = dot_rounded(level, x, t);
      const float scale = from_bf16(row_scale[g.first + i]);
      out.put(t, order[g.first + i], scale * (sum - float(zero) * x.sums[t]));
    }
  });
}

// ---- AVX-512 with VBMI and VNNI
//
// 128 codes are 16 B whole bytes whatever their width B. A byte permutation gives each 64-bit lane the
// bytes of sixteen codes (eight above 4 bits), two multishifts bring the codes to the bottom of bytes,
// and a second permutation looks them up in the row's table, copies of which fill the register so that
// what stands above a code does not matter. x stands in the order in which the codes come out.
//
// Of a trellis the byte permutation gives each lane the seven planes of the windows of eight codes, which a
// product of bits turns; the two registers that all rows share are looked up. Planes behind the end of the stored
// groups are the first ones of the row, a bit further down.

#if defined(__AVX512F__)
// What is behind the stored groups of a trellis row whose end is no group's, or one that is short.
__attribute__((noinline)) VBMI __m256i behind_any(int b, const uint8_t* row, int64_t c) {
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

template <int B, int R, int N, bool T, bool MASK, bool FAR>
VBMI inline __attribute__((always_inline)) void exact_pairs(const Rows<B, R, T>& rows, int64_t begin,
                                                            int64_t end, const int8_t* x, int64_t apart,
                                                            __m512i (&sum)[N * R][PLANES]) {
  for (int64_t k = begin; k < end; ++k) {
    const int8_t* xs = x + k * PLANES * PAIR;
    rows.template prefetch<FAR>(k);
    typename Rows<B, R, T>::Ends ends;
    if constexpr (T && MASK) ends = rows.ends(k);
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      __m512i half[2];
      rows.template pair<MASK>(r, k, ends, half);
#pragma GCC unroll 4
      for (int n = 0; n < N; ++n)
#pragma GCC unroll 3
        for (int p = 0; p < PLANES; ++p) {
          add_dot(sum[n * R + r][p], half[0], _mm512_load_si512(xs + n * apart + p * PAIR));
          add_dot(sum[n * R + r][p], half[1], _mm512_load_si512(xs + n * apart + p * PAIR + CHUNK));
        }
    }
  }
}

// R rows of one width times N tokens: codes are cut and looked up once for all of them.
template <int B, int R, int N, bool T, bool FAR>
VBMI void block_exact(const Group& g, int64_t i, const Integers& x, int64_t token,
                      const uint16_t* row_scale, const int32_t* order, const Output& out) {
  const Rows<B, R, T> rows(g, i, x.c);
  __m512i sum[N * R][PLANES];
#pragma GCC unroll 8
  for (__m512i(&planes)[PLANES] : sum) planes[0] = planes[1] = planes[2] = _mm512_setzero_si512();
  const int64_t pairs = x.chunks / 2, full = rows.inside(pairs, i + R < g.rows), apart = pairs * PLANES * PAIR;
  const int8_t* xs = &x.planes[token * apart];
  exact_pairs<B, R, N, T, false, FAR>(rows, 0, full, xs, apart, sum);
  exact_pairs<B, R, N, T, true, FAR>(rows, full, pairs, xs, apart, sum);
  int64_t total[N * R];
  add_planes<N * R>(sum, total);
  for (int n = 0; n < N; ++n, ++token)
    for (int r = 0; r < R; ++r) {
      const float scale = from_bf16(row_scale[g.first + i + r]);
      out.put(token, order[g.first + i + r],
              to_value(total[n * R + r], rows.zero(g, i + r), x.sums[token], scale, x.steps[token]));
    }
}

template <int B, int R, bool T, bool MASK, bool FAR>
VBMI inline __attribute__((always_inline)) void rounded_pairs(const Rows<B, R, T>& rows, int64_t begin,
                                                              int64_t end, const Rounded& x,
                                                              int64_t token, __m512 (&sum)[R]) {
  for (int64_t k = begin; k < end; ++k) {
    const int64_t at = token * x.pairs + k;
    const __m512i x0 = _mm512_loadu_si512(&x.x[at * PAIR]);
    const __m512i x1 = _mm512_loadu_si512(&x.x[at * PAIR + CHUNK]);
    const __m512 scale = _mm512_set1_ps(x.scales[at]);
    rows.template prefetch<FAR>(k);
    typename Rows<B, R, T>::Ends ends;
    if constexpr (T && MASK) ends = rows.ends(k);
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      __m512i half[2], dot = _mm512_setzero_si512();
      rows.template pair<MASK>(r, k, ends, half);
      add_dot(dot, half[0], x0);
      add_dot(dot, half[1], x1);
      sum[r] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(dot), scale, sum[r]);
    }
  }
}

template <int B, int R, bool T, bool FAR>
VBMI void block_rounded(const Group& g, int64_t i, const Rounded& x, int64_t token,
                        const uint16_t* row_scale, const int32_t* order, const Output& out) {
  const Rows<B, R, T> rows(g, i, x.c);
  __m512 sum[R];
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r) sum[r] = _mm512_setzero_ps();
  const int64_t full = rows.inside(x.pairs, i + R < g.rows);
  rounded_pairs<B, R, T, false, FAR>(rows, 0, full, x, token, sum);
  rounded_pairs<B, R, T, true, FAR>(rows, full, x.pairs, x, token, sum);
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r) {
    const float scale = from_bf16(row_scale[g.first + i + r]);
    const float zero = float(rows.zero(g, i + r));
    out.put(token, order[g.first + i + r],
            scale * (_mm512_reduce_add_ps(sum[r]) - zero * x.sums[token]));
  }
}

template <int B, bool T>
VBMI void exact_vbmi(const Group& g, int64_t begin, int64_t end, const Integers& x,
                     const uint16_t* row_scale, const int32_t* order, const Output& out) {
  const auto four = 4 * g.stride > AHEAD ? block_exact<B, 4, 1, T, true> : block_exact<B, 4, 1, T, false>;
  const int64_t many = x.n / TOKENS * TOKENS;
  for (int64_t t = 0; t < many; t += TOKENS)  // x of these stays in the first cache
    for (int64_t i = begin; i < end; i += 2) {
      const auto block = i + 2 <= end ? block_exact<B, 2, TOKENS, T, false> : block_exact<B, 1, TOKENS, T, false>;
      block(g, i, x, t, row_scale, order, out);
    }
  int64_t i = begin;
  for (; i + 4 <= end; i += 4)
    for (int64_t t = many; t < x.n; ++t) four(g, i, x, t, row_scale, order, out);
  for (; i < end; ++i)
    for (int64_t t = many; t < x.n; ++t) block_exact<B, 1, 1, T, false>(g, i, x, t, row_scale, order, out);
}

template <int B, bool T>
VBMI void rounded_vbmi(const Group& g, int64_t begin, int64_t end, const Rounded& x,
                       const uint16_t* row_scale, const int32_t* order, const Output& out) {
  const auto four = 4 * g.stride > AHEAD ? block_rounded<B, 4, T, true> : block_rounded<B, 4, T, false>;
  int64_t i = begin;
  for (; i + 4 <= end; i += 4)
    for (int64_t t = 0; t < x.n; ++t) four(g, i, x, t, row_scale, order, out);
  for (; i < end; ++i)
    for (int64_t t = 0; t < x.n; ++t) block_rounded<B, 1, T, false>(g, i, x, t, row_scale, order, out);
}

// [whether it is a trellis][bits of a code]
constexpr decltype(&exact_vbmi<1, false>) exact_of_width[2][MAX_B + 1] = {
    {nullptr, exact_vbmi<1, false>, exact_vbmi<2, false>, exact_vbmi<3, false>, exact_vbmi<4, false>,
     exact_vbmi<5, false>, exact_vbmi<6, false>, exact_vbmi<7, false>, exact_vbmi<8, false>},
    {nullptr, exact_vbmi<1, true>, exact_vbmi<2, true>, exact_vbmi<3, true>, exact_vbmi<4, true>}};
constexpr decltype(&rounded_vbmi<1, false>) rounded_of_width[2][MAX_B + 1] = {
    {nullptr, rounded_vbmi<1, false>, rounded_vbmi<2, false>, rounded_vbmi<3, false>, rounded_vbmi<4, false>,
     rounded_vbmi<5, false>, rounded_vbmi<6, false>, rounded_vbmi<7, false>, rounded_vbmi<8, false>},
    {nullptr, rounded_vbmi<1, true>, rounded_vbmi<2, true>, rounded_vbmi<3, true>, rounded_vbmi<4, true>}};
#endif

// Rows of one width of one product, as one turn of a thread takes them.
struct Slice {
  const Product* product;
  const Group* group;
  int64_t begin, end;
};

std::vector<Slice> split(const Product* products, int64_t count, int* threads) {
  int64_t bytes = 0;
  for (int64_t p = 0; p < count; ++p) bytes += products[p].layer.weight_size;
  // A second thread for a few microseconds of work costs more than it brings.
  *threads = int(std::clamp<int64_t>(bytes / PER_THREAD, 1, *threads));
  const int64_t turn = std::max(WORK, bytes / (TURNS * *threads));
  std::vector<Slice> slices;
  for (int64_t p = 0; p < count; ++p)
    for (const Group& group : products[p].matrix.groups) {
      const int64_t step = std::max<int64_t>(4, turn / group.stride / 4 * 4);
      for (int64_t i = 0; i < group.rows; i += step)
        slices.push_back({products + p, &group, i, std::min(i + step, group.rows)});
    }
  return slices;
}

}  // namespace

static void multiply(const Slice& s) {
  const Product& p = *s.product;
#if defined(__AVX512F__)
  if (p.x.planes)
    return exact_of_width[s.group->code == TRELLIS][s.group->width](*s.group, s.begin, s.end, p.x, p.layer.row_scale,
                                          p.matrix.order, p.out);
#endif
  exact_any(*s.group, s.begin, s.end, p.x, p.layer.row_scale, p.matrix.order, p.out);
}

void multiply(const Product* products, int64_t count, int threads, std::atomic<int64_t>* next) {
  const std::vector<Slice> slices = split(products, count, &threads);
  const int64_t all = int64_t(slices.size());
  if (next) {
    for (int64_t at; (at = next->fetch_add(1)) < all;) multiply(slices[at]);
    return;
  }
  parallel_rows(all, 1, threads, [&](int64_t from, int64_t to) {
    for (int64_t at = from; at < to; ++at) multiply(slices[at]);
  });
}

void matmul_plain(const SkimlmLayer& w, const Matrix& m, const void* x, bool bf16, int64_t n, int64_t exact,
                  const Output& out, int threads) {
  if (exact == 1 && n >= MANY && skimlm_has_vbmi()) return multiply_many(w, m, x, bf16, n, out, threads);
  const std::vector<float> values = to_floats(x, bf16, w.in_scale, n, w.cols);
  const Integers whole = exact ? to_integers(values.data(), n, w.cols) : Integers{};
  const Product product{w, m, whole, out};
  if (exact) return multiply(&product, 1, threads);
  const Rounded rounded = to_rounded(values.data(), n, w.cols);
  const std::vector<Slice> slices = split(&product, 1, &threads);
  parallel_rows(int64_t(slices.size()), 1, threads, [&](int64_t from, int64_t to) {
    for (int64_t at = from; at < to; ++at) {
      const Slice& s = slices[at];
#if defined(__AVX512F__)
      if (skimlm_has_vbmi()) {
        rounded_of_width[s.group->code == TRELLIS][s.group->width](*s.group, s.begin, s.end, rounded, w.row_scale, m.order, out);
        continue;
      }
#endif
      rounded_any(*s.group, s.begin, s.end, rounded, w.row_scale, m.order, out);
    }
  });
}
