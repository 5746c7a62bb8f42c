// out = x W^T for a packed W (FORMAT.md) and few tokens: the weights are read once, as they are stored.
//
// With VBMI one routine serves all widths (lanes.h). Elsewhere a row becomes integers in L1 first.
//
//   exact   x as 24-bit integers (product.h): three planes of a byte each, multiplied one by one
//   8 bit   x is rounded to int8 with one scale per token and 64 columns; sums are integers within
//           those columns
#include <algorithm>
#include <cmath>
#include <cstring>

#include "lanes.h"
#include "parallel.h"
#include "product.h"

namespace {

constexpr int64_t WORK = 1 << 14;  // bytes of packed rows that one turn of a thread takes, at least
constexpr int64_t PER_THREAD = 1 << 16;
constexpr int64_t TURNS = 4;        // of each thread, where there is more
constexpr int64_t MANY = 2;         // tokens from which rows are turned into bfloat16 (gemm.cpp)
constexpr int64_t LONGEST = 1 << 16;  // columns whose sums of bytes fit 32 bits
constexpr int64_t PLANES = 3;

// x of n tokens rounded to int8, padded with zeros to whole chunks.
struct Rounded {
  int64_t n, c, chunks;
  std::vector<int8_t> x;      // [n, padded c]
  std::vector<float> scales;  // [n, chunks]
  std::vector<float> sums;    // [n]: sum of the rounded x
};

inline float to_value(int64_t total, int64_t zero, int64_t sum, float scale, double step) {
  return float(double(total - zero * sum) * (double(scale) * step));
}

// ---- any processor: a row becomes integers, then one dot product per token

void cut_any(int b, const uint8_t* row, uint8_t* code, int64_t c) {
#if defined(__BMI2__)
  const uint64_t mask = 0x0101010101010101u * ((1u << b) - 1);
  int64_t j = 0;
  for (; j + 16 <= c; j += 8, row += b) {  // reads 8 bytes: the last codes are left to cut_row
    uint64_t word;
    std::memcpy(&word, row, 8);
    word = _pdep_u64(word, mask);
    std::memcpy(code + j, &word, 8);
  }
  cut_row[b](row, code + j, c - j);
#else
  cut_row[b](row, code, c);
#endif
}

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

float dot_rounded(const int16_t* level, const int8_t* x, const float* scale, int64_t chunks) {
  float sum = 0;
  for (int64_t k = 0; k < chunks; ++k, level += CHUNK, x += CHUNK) {
    int32_t part = 0;
    for (int t = 0; t < CHUNK; ++t) part += int32_t(level[t]) * x[t];
    sum += float(part) * scale[k];
  }
  return sum;
}

// Calls each(stored row, its levels or codes [padded c], its zero point) for rows begin..end.
template <class Each>
void rows_any(const Group& g, int64_t begin, int64_t end, int64_t c, const Each& each) {
  const int64_t padded = (c + CHUNK - 1) / CHUNK * CHUNK;
  std::vector<uint8_t> code(padded + 8);
  std::vector<int16_t> level(padded);
  for (int64_t i = begin; i < end; ++i) {
    cut_any(g.width, g.packed + i * g.stride, code.data(), c);
    int16_t entry[256];
    for (int m = 0; m < 1 << g.width; ++m)
      entry[m] = g.width <= 5 ? int16_t(g.levels[(i << g.width) + m]) : int16_t(m);
    for (int64_t j = 0; j < c; ++j) level[j] = entry[code[j]];
    each(i, level.data(), g.width <= 5 ? 0 : g.zeros[i]);
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
      const float sum =
          dot_rounded(level, &x.x[t * x.chunks * CHUNK], &x.scales[t * x.chunks], x.chunks);
      const float scale = from_bf16(row_scale[g.first + i]);
      out.put(t, order[g.first + i], scale * (sum - float(zero) * x.sums[t]));
    }
  });
}

// ---- AVX-512 with VBMI and VNNI

#if defined(__AVX512F__)
// Rows follow each other in memory, but the processor's own prefetcher stops at every page.
constexpr int64_t AHEAD = 8192;

// Codes of R rows as unsigned bytes, a chunk of columns at a time: levels plus 128 up to 5 bits (T).
// Everything that may differ inside a chunk's loop is a template parameter, or sums leave registers.
template <int R, bool T>
struct Bytes {
  __m512i table[R];
  const uint8_t* at;
  const char* ahead;
  int64_t stride, step;

  VBMI Bytes(const Group& g, int64_t i, const Controls& c) {
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r)
      table[r] = T ? _mm512_xor_si512(byte_table(g.levels + ((i + r) << g.width), c),
                                           _mm512_set1_epi8(char(128)))
                        : _mm512_set1_epi8(char((1 << g.width) - 1));
    at = g.packed + i * g.stride;
    ahead = reinterpret_cast<const char*>(at) + AHEAD;
    stride = g.stride, step = 8 * g.width;
  }
  VBMI void prefetch(int64_t k) const {
    for (int64_t line = 0; line < R * step; line += 64)
      _mm_prefetch(ahead + k * R * step + line, _MM_HINT_T0);
  }
  VBMI __m512i chunk(int r, int64_t k, __mmask64 mask, const Controls& c) const {
    const __m512i lanes =
        _mm512_permutexvar_epi8(c.spread, load_chunk(at + r * stride + k * step, mask));
    const __m512i field = _mm512_multishift_epi64_epi8(c.fields, lanes);
    return T ? _mm512_permutexvar_epi8(field, table[r]) : _mm512_and_si512(field, table[r]);
  }
};

// R rows of one width, N tokens.
template <bool T, int R, int N>
VBMI void block_exact(const Group& g, int64_t i, const Controls& c, const Integers& x,
                      int64_t token, const uint16_t* row_scale, const int32_t* order,
                      const Output& out) {
  const Bytes<R, T> rows(g, i, c);
  __m512i sum[R * N][PLANES];
#pragma GCC unroll 8
  for (int s = 0; s < R * N; ++s) sum[s][0] = sum[s][1] = sum[s][2] = _mm512_setzero_si512();
  const int64_t per_token = x.chunks * PLANES * CHUNK;
  const int8_t* xs = x.planes.data() + token * per_token;
  const __mmask64 last = last_mask(g.stride, x.chunks, g.width);
  for (int64_t k = 0; k < x.chunks; ++k, xs += PLANES * CHUNK) {
    const __mmask64 mask = k + 1 == x.chunks ? last : c.bytes;
    rows.prefetch(k);
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      const __m512i level = rows.chunk(r, k, mask, c);
#pragma GCC unroll 4
      for (int t = 0; t < N; ++t)
#pragma GCC unroll 3
        for (int p = 0; p < PLANES; ++p)
          add_dot(sum[r * N + t][p], level,
                  _mm512_loadu_si512(xs + t * per_token + p * CHUNK));
    }
  }
  int32_t total[PLANES][R * N];
#pragma GCC unroll 3
  for (int p = 0; p < PLANES; ++p) {
    if constexpr (R * N % 4 == 0) {
#pragma GCC unroll 2
      for (int s = 0; s < R * N; s += 4)
        add_lanes(quarters(sum[s][p], sum[s + 1][p], sum[s + 2][p], sum[s + 3][p]), &total[p][s]);
    } else {
      for (int s = 0; s < R * N; ++s) total[p][s] = _mm512_reduce_add_epi32(sum[s][p]);
    }
  }
  for (int r = 0; r < R; ++r) {
    const int64_t zero = T ? 128 : g.zeros[i + r];
    const float scale = from_bf16(row_scale[g.first + i + r]);
    for (int t = 0; t < N; ++t) {
      const int s = r * N + t;
      const int64_t all =
          int64_t(total[2][s]) * 65536 + int64_t(total[1][s]) * 256 + int64_t(total[0][s]);
      out.put(token + t, order[g.first + i + r],
              to_value(all, zero, x.sums[token + t], scale, x.steps[token + t]));
    }
  }
}

template <bool T, int R, int N>
VBMI void block_rounded(const Group& g, int64_t i, const Controls& c, const Rounded& x,
                        int64_t token, const uint16_t* row_scale, const int32_t* order,
                        const Output& out) {
  const Bytes<R, T> rows(g, i, c);
  __m512 sum[R][N];
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int t = 0; t < N; ++t) sum[r][t] = _mm512_setzero_ps();
  const int64_t padded = x.chunks * CHUNK;
  const int8_t* xs = x.x.data() + token * padded;
  const float* scales = x.scales.data() + token * x.chunks;
  const __mmask64 last = last_mask(g.stride, x.chunks, g.width);
  for (int64_t k = 0; k < x.chunks; ++k, xs += CHUNK, ++scales) {
    const __mmask64 mask = k + 1 == x.chunks ? last : c.bytes;
    rows.prefetch(k);
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      const __m512i level = rows.chunk(r, k, mask, c);
#pragma GCC unroll 4
      for (int t = 0; t < N; ++t) {
        const __m512i dot = _mm512_dpbusd_epi32(_mm512_setzero_si512(), level,
                                                _mm512_loadu_si512(xs + t * padded));
        sum[r][t] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(dot),
                                    _mm512_set1_ps(scales[t * x.chunks]), sum[r][t]);
      }
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r) {
    const float zero = T ? 128.f : float(g.zeros[i + r]);
    const float scale = from_bf16(row_scale[g.first + i + r]);
#pragma GCC unroll 4
    for (int t = 0; t < N; ++t)
      out.put(token + t, order[g.first + i + r],
              scale * (_mm512_reduce_add_ps(sum[r][t]) - zero * x.sums[token + t]));
  }
}

template <bool T>
VBMI void exact_vbmi(const Group& g, int64_t begin, int64_t end, const Integers& x,
                     const uint16_t* row_scale, const int32_t* order, const Output& out) {
  const Controls c = controls(g.width);
  int64_t i = begin;
  for (; i + 4 <= end; i += 4) {
    for (int64_t t = 0; t < x.n; ++t) block_exact<T, 4, 1>(g, i, c, x, t, row_scale, order, out);
  }
  for (; i < end; ++i)
    for (int64_t t = 0; t < x.n; ++t) block_exact<T, 1, 1>(g, i, c, x, t, row_scale, order, out);
}

template <bool T>
VBMI void rounded_vbmi(const Group& g, int64_t begin, int64_t end, const Rounded& x,
                       const uint16_t* row_scale, const int32_t* order, const Output& out) {
  const Controls c = controls(g.width);
  int64_t i = begin;
  for (; i + 4 <= end; i += 4) {
    int64_t t = 0;
    for (; t + 4 <= x.n; t += 4) block_rounded<T, 4, 4>(g, i, c, x, t, row_scale, order, out);
    for (; t < x.n; ++t) block_rounded<T, 4, 1>(g, i, c, x, t, row_scale, order, out);
  }
  for (; i < end; ++i)
    for (int64_t t = 0; t < x.n; ++t) block_rounded<T, 1, 1>(g, i, c, x, t, row_scale, order, out);
}
#endif

// ---- x

// Integers of one token; returns their unit.
double integers(const float* x, int64_t c, int32_t* out) {
  int32_t top = 0;  // bits of the largest |x|: they order like the numbers, NaN above all
  for (int64_t j = 0; j < c; ++j) {
    int32_t bits;
    std::memcpy(&bits, x + j, 4);
    top = std::max(top, bits & 0x7fffffff);
  }
  float largest;
  std::memcpy(&largest, &top, 4);
  if (top >= 0x7f800000) {
    std::fill(out, out + c, 0);
    return NAN;
  }
  int exponent;
  std::frexp(largest, &exponent);
  exponent = std::max(exponent - 23, -126);
  if (std::ldexp(largest, -exponent) > 8355711.f) ++exponent;  // 0x7f7f7f: what three bytes hold
  const float inverse = std::ldexp(1.f, -exponent);
  for (int64_t j = 0; j < c; ++j) {
    const float v = x[j] * inverse;
    out[j] = int32_t(v + (v < 0 ? -0.5f : 0.5f));
  }
  return std::ldexp(1., exponent);
}

// Returns the sum of the rounded chunk, in units of `scale`.
int32_t round_chunk(const float* from, int8_t* to, float* scale) {
  float most[16] = {};
  for (int j = 0; j < CHUNK; j += 16)
    for (int t = 0; t < 16; ++t) most[t] = std::max(most[t], std::fabs(from[j + t]));
  const float top = *std::max_element(most, most + 16);
  const float inverse = top > 0 ? 127 / top : 0;
  *scale = top / 127;
  int32_t sum = 0;
  for (int j = 0; j < CHUNK; ++j) {
    const int32_t q = int32_t(std::rint(from[j] * inverse));
    to[j] = int8_t(q);
    sum += q;
  }
  return sum;
}

Rounded to_rounded(const float* x, int64_t n, int64_t c) {
  Rounded out{n, c, (c + CHUNK - 1) / CHUNK, {}, {}, {}};
  out.x.resize(n * out.chunks * CHUNK);
  out.scales.resize(n * out.chunks);
  out.sums.assign(n, 0.f);
  for (int64_t t = 0; t < n; ++t)
    for (int64_t k = 0; k < out.chunks; ++k) {
      float chunk[CHUNK] = {};
      std::memcpy(chunk, x + t * c + k * CHUNK, std::min(CHUNK, c - k * CHUNK) * sizeof(float));
      const int64_t at = t * out.chunks + k;
      const int32_t sum = round_chunk(chunk, &out.x[at * CHUNK], &out.scales[at]);
      out.sums[t] += out.scales[at] * float(sum);
    }
  return out;
}

// Rows of one width of one product, as one turn of a thread takes them.
struct Part {
  const Product* product;
  const Group* group;
  int64_t begin, end;
};

std::vector<Part> split(const Product* products, int64_t count, int* threads) {
  int64_t bytes = 0;
  for (int64_t p = 0; p < count; ++p) bytes += products[p].linear.codes_size;
  // A second thread for a few microseconds of work costs more than it brings.
  *threads = int(std::clamp<int64_t>(bytes / PER_THREAD, 1, *threads));
  const int64_t turn = std::max(WORK, bytes / (TURNS * *threads));
  std::vector<Part> parts;
  for (int64_t p = 0; p < count; ++p)
    for (const Group& group : products[p].stored.groups) {
      const int64_t step = std::max<int64_t>(4, turn / group.stride / 4 * 4);
      for (int64_t i = 0; i < group.rows; i += step)
        parts.push_back({products + p, &group, i, std::min(i + step, group.rows)});
    }
  return parts;
}

}  // namespace

bool lay_out(const Packed& p, Stored& out) {
  if (!p.order) out.found.resize(p.r);
  out.order = p.order ? p.order : out.found.data();
  out.groups.clear();
  out.affine = 0;
  int64_t rows = 0, bytes = 0, levels = 0;
  // Width by width: a histogram would wait on its own counts.
  for (int b = 1; b <= MAX_B; ++b) {
    const int64_t count =
        p.order ? p.counts[b] : rows_of_width(b, p.widths, p.r, out.found.data() + rows);
    const int64_t stride = (p.c * b + 7) / 8;
    if (count)
      out.groups.push_back({b, count, rows, p.codes + bytes, p.levels + levels,
                            p.zeros + out.affine, stride});
    rows += count;
    bytes += count * stride;
    (b <= 5 ? levels : out.affine) += b <= 5 ? count << b : count;
  }
  return rows == p.r && bytes == p.codes_size && levels == p.levels_size &&
         out.affine == p.zeros_size;
}

std::vector<float> to_floats(const void* x, bool bf16, const uint16_t* in_scale, int64_t n,
                             int64_t c) {
  std::vector<float> out(n * c);
  if (bf16) {
    const uint16_t* from = static_cast<const uint16_t*>(x);
    for (int64_t j = 0; j < n * c; ++j) out[j] = from_bf16(from[j]);
  } else {
    std::memcpy(out.data(), x, n * c * sizeof(float));
  }
  if (in_scale)
    for (int64_t j = 0; j < c; ++j) {
      const float scale = from_fp16(in_scale[j]);
      for (int64_t t = 0; t < n; ++t) out[t * c + j] *= scale;
    }
  return out;
}

Integers to_integers(const float* x, int64_t n, int64_t c, int parts) {
  const int64_t line = c / parts;
  Integers out{n * parts, line, (line + CHUNK - 1) / CHUNK, {}, {}, {}, {}};
  const int64_t padded = out.chunks * CHUNK;
  const bool vbmi = skimlm_has_vbmi() && line <= LONGEST;
  std::vector<int32_t> token(c), whole(padded);
  out.sums.resize(out.n);
  out.steps.resize(out.n);
  if (vbmi)
    out.planes = Lines<int8_t>(out.n * PLANES * padded);
  else
    out.digits.resize(out.n * 2 * padded);
  for (int64_t t = 0; t < out.n; ++t) {
    if (t % parts == 0) out.steps[t] = integers(x + t * line, c, token.data());
    else out.steps[t] = out.steps[t - 1];
    std::copy_n(&token[t % parts * line], line, whole.data());
    int64_t sum = 0;
    for (int64_t j = 0; j < line; ++j) sum += whole[j];
    out.sums[t] = sum;
    if (vbmi) {
      for (int64_t k = 0; k < out.chunks; ++k) {
        int8_t* to = &out.planes[(t * out.chunks + k) * PLANES * CHUNK];
        for (int j = 0; j < CHUNK; ++j) {
          int32_t q = whole[k * CHUNK + j];
          to[j] = int8_t(q);
          q = (q - to[j]) >> 8;
          to[CHUNK + j] = int8_t(q);
          to[2 * CHUNK + j] = int8_t((q - to[CHUNK + j]) >> 8);
        }
      }
    } else {
      int16_t* to = &out.digits[t * 2 * padded];
      for (int64_t j = 0; j < padded; ++j) {
        const int32_t low = ((whole[j] + 2048) & 4095) - 2048;
        to[j] = int16_t(low);
        to[padded + j] = int16_t((whole[j] - low) >> 12);
      }
    }
  }
  return out;
}

static void multiply(const Part& part, const Integers& x) {
  const Product& p = *part.product;
#if defined(__AVX512F__)
  if (x.planes)
    return (part.group->width <= 5 ? exact_vbmi<true> : exact_vbmi<false>)(
        *part.group, part.begin, part.end, x, p.linear.row_scale, p.stored.order, p.out);
#endif
  exact_any(*part.group, part.begin, part.end, x, p.linear.row_scale, p.stored.order, p.out);
}

void multiply(const Product* products, int64_t count, const Integers& x, int threads,
              std::atomic<int64_t>* next) {
  const std::vector<Part> parts = split(products, count, &threads);
  const int64_t all = int64_t(parts.size());
  if (next) {
    for (int64_t at; (at = next->fetch_add(1)) < all;) multiply(parts[at], x);
    return;
  }
  parallel_rows(all, 1, threads, [&](int64_t from, int64_t to) {
    for (int64_t at = from; at < to; ++at) multiply(parts[at], x);
  });
}

int skimlm_matmul(const void* x, int64_t x_bf16, const uint8_t* packed, int64_t packed_size,
                  const uint8_t* widths, const int8_t* codebook, int64_t codebook_size,
                  const uint16_t* row_scale, const int16_t* row_zero, int64_t zeros,
                  const uint16_t* in_scale, const float* bias, void* out, int64_t n, int64_t r,
                  int64_t c, int64_t exact, int threads) {
  const Packed linear{packed, widths,      codebook,      row_scale, row_zero, in_scale,
                      bias,   packed_size, codebook_size, zeros,     r,        c,
                      nullptr, nullptr};
  Stored stored;
  if (!lay_out(linear, stored)) return 1;
  const Product product{linear, stored, {out, x_bf16 != 0, r, bias}};
  if (exact && n >= MANY && skimlm_has_vbmi()) {
    multiply_many(product, x, x_bf16, n, threads);
    return 0;
  }
  const std::vector<float> values = to_floats(x, x_bf16, in_scale, n, c);
  if (exact) {
    multiply(&product, 1, to_integers(values.data(), n, c), threads);
    return 0;
  }
  const Rounded rounded = to_rounded(values.data(), n, c);
  const std::vector<Part> parts = split(&product, 1, &threads);
  parallel_rows(int64_t(parts.size()), 1, threads, [&](int64_t from, int64_t to) {
    for (int64_t at = from; at < to; ++at) {
      const Part& part = parts[at];
#if defined(__AVX512F__)
      if (skimlm_has_vbmi()) {
        (part.group->width <= 5 ? rounded_vbmi<true> : rounded_vbmi<false>)(
            *part.group, part.begin, part.end, rounded, row_scale, stored.order, product.out);
        continue;
      }
#endif
      rounded_any(*part.group, part.begin, part.end, rounded, row_scale, stored.order, product.out);
    }
  });
  return 0;
}
