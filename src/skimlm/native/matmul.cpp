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
#include "rows.h"

namespace {

constexpr int64_t PER_THREAD = 1 << 16;  // bytes

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

// ---- AVX-512 with VBMI and VNNI (rows.h): x stands in the order in which codes come out

#if defined(__AVX512F__)
template <int B, int R, bool T, bool MASK, bool FAR>
VBMI inline __attribute__((always_inline)) void exact_pairs(const Rows<B, R, T>& rows, int64_t begin,
                                                            int64_t end, const int8_t* x,
                                                            __m512i (&sum)[R][PLANES]) {
  for (int64_t k = begin; k < end; ++k) {
    const int8_t* xs = x + k * PLANES * PAIR;
    rows.template prefetch<FAR>(k);
    typename Rows<B, R, T>::Ends ends;
    if constexpr (T && MASK) ends = rows.ends(k);
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      __m512i half[2];
      rows.template pair<MASK>(r, k, ends, half);
#pragma GCC unroll 3
      for (int p = 0; p < PLANES; ++p) {
        add_dot(sum[r][p], half[0], _mm512_load_si512(xs + p * PAIR));
        add_dot(sum[r][p], half[1], _mm512_load_si512(xs + p * PAIR + CHUNK));
      }
    }
  }
}

// R rows of one width times one token.
template <int B, int R, bool T, bool FAR>
VBMI void block_exact(const Group& g, int64_t i, const Integers& x, int64_t token,
                      const uint16_t* row_scale, const int32_t* order, const Output& out) {
  const Rows<B, R, T> rows(g, i, x.c);
  __m512i sum[R][PLANES];
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r) sum[r][0] = sum[r][1] = sum[r][2] = _mm512_setzero_si512();
  const int64_t pairs = x.chunks / 2, full = rows.inside(pairs, i + R < g.rows);
  const int8_t* xs = &x.planes[token * pairs * PLANES * PAIR];
  exact_pairs<B, R, T, false, FAR>(rows, 0, full, xs, sum);
  exact_pairs<B, R, T, true, FAR>(rows, full, pairs, xs, sum);
  int64_t total[R];
  add_planes<R>(sum, total);
  for (int r = 0; r < R; ++r) {
    const float scale = from_bf16(row_scale[g.first + i + r]);
    out.put(token, order[g.first + i + r],
            to_value(total[r], rows.zero(g, i + r), x.sums[token], scale, x.steps[token]));
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
  const auto four = 4 * g.stride > AHEAD ? block_exact<B, 4, T, true> : block_exact<B, 4, T, false>;
  int64_t i = begin;
  for (; i + 4 <= end; i += 4)
    for (int64_t t = 0; t < x.n; ++t) four(g, i, x, t, row_scale, order, out);
  for (; i < end; ++i)
    for (int64_t t = 0; t < x.n; ++t) block_exact<B, 1, T, false>(g, i, x, t, row_scale, order, out);
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

// Rows of one width of one product, as one turn of a thread takes them; or, without a group, stored rows of any.
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
  for (int64_t p = 0; p < count; ++p) {
    const int64_t rows = products[p].matrix.r;
    if (takes_panels(products[p].x)) {
      for (int64_t i = 0; i < rows; i += PANEL)
        slices.push_back({products + p, nullptr, i, std::min(i + PANEL, rows)});
      continue;
    }
    for (const Group& group : products[p].matrix.groups) {
      const int64_t step = std::max<int64_t>(4, turn / group.stride / 4 * 4);
      for (int64_t i = 0; i < group.rows; i += step)
        slices.push_back({products + p, &group, i, std::min(i + step, group.rows)});
    }
  }
  return slices;
}

}  // namespace

static void multiply(const Slice& s) {
  const Product& p = *s.product;
  if (!s.group) return multiply_panel(p, s.begin, s.end);
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
