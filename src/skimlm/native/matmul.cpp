// out = x W^T for a packed W (FORMAT.md): the weights are read once, as they are stored.
//
// With VBMI one routine serves all widths (lanes.h). Elsewhere a row becomes bytes in L1 first.
//
//   exact   levels are at most 8 bits and x is split into bfloat16 pieces (one if it is bfloat16,
//           three if it is float), so every product is exact in float: only the order of the
//           additions differs from a float32 reference
//   8 bit   x is rounded to int8 with one scale per token and 64 columns; sums are integers within
//           those columns
#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "codes.h"
#include "lanes.h"
#include "parallel.h"

namespace {

constexpr int64_t MAX_B = 8;
constexpr int64_t WORK = 1 << 14;  // bytes of packed rows that one turn of a thread takes, at least
constexpr int64_t PER_THREAD = 1 << 17;
constexpr int64_t TURNS = 4;       // of each thread, where there is more

// What the rows of one width share.
struct Group {
  int width;
  int64_t rows, first;           // how many, and the stored index of the first
  const uint8_t* packed;         // of the first row
  const int8_t* levels;          // of the first row, widths up to 5
  const int16_t* zeros;          // of the first row, widths from 6
  int64_t stride;                // bytes of a row
};

// x of n tokens, made ready once per call. Columns are padded with zeros to whole chunks.
struct Input {
  int64_t n, c, chunks;
  std::vector<float> exact;      // [n, padded c], in_scale applied
  std::vector<float> sums;       // [n]: sum of x (8 bit: of the rounded x)
  int pieces;
  std::vector<uint16_t> split;   // [n, chunks, pieces, 64] bfloat16, in the order the lanes hold
  std::vector<int8_t> rounded;   // [n, padded c]
  std::vector<float> scales;     // [n, chunks]
};

struct Output {
  void* data;
  bool bf16;
  int64_t r;
  const float* bias;  // or null
  void put(int64_t token, int64_t row, float value) const {
    if (bias) value += bias[row];
    if (bf16)
      static_cast<uint16_t*>(data)[token * r + row] = to_bf16(value);
    else
      static_cast<float*>(data)[token * r + row] = value;
  }
};

// ---- any processor: a row becomes bytes, then one dot product per token

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

// The sum of level(j) * x[j] over j < c; 64 running sums let the compiler use vectors, and hide the
// latency of adding.
template <class Level>
inline float dot(const Level& level, const float* x, int64_t c) {
  float sum[CHUNK] = {};
  int64_t j = 0;
  for (; j + CHUNK <= c; j += CHUNK)
    for (int t = 0; t < CHUNK; ++t) sum[t] += level(j + t) * x[j + t];
  for (int t = 0; j + t < c; ++t) sum[t] += level(j + t) * x[j + t];
  for (int half = CHUNK / 2; half; half /= 2)
    for (int t = 0; t < half; ++t) sum[t] += sum[t + half];
  return sum[0];
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

void rows_any(const Group& g, int64_t begin, int64_t end, const Input& x, bool exact,
              const uint16_t* row_scale, const int32_t* order, const Output& out) {
  const int64_t padded = x.chunks * CHUNK;
  std::vector<uint8_t> code(padded + 8);
  std::vector<float> level(padded);
  std::vector<int16_t> small(padded);
  const int b = g.width;
  for (int64_t i = begin; i < end; ++i) {
    cut_any(b, g.packed + i * g.stride, code.data(), x.c);
    int16_t entry[256];
    for (int m = 0; m < 1 << b; ++m)
      entry[m] = b <= 5 ? int16_t(g.levels[(i << b) + m]) : int16_t(m);
    // a zero point may be any int16, so it is taken off the whole sum in the 8-bit case
    const float zero = b <= 5 ? 0.f : float(g.zeros[i]);
    const float scale = from_bf16(row_scale[g.first + i]);
    const int64_t row = order[g.first + i];
    if (exact) {
      float value[256];
      for (int m = 0; m < 1 << b; ++m) value[m] = float(entry[m]) - zero;
      for (int64_t j = 0; j < x.c; ++j) level[j] = value[code[j]];
      for (int64_t t = 0; t < x.n; ++t)
        out.put(t, row, scale * dot([&](int64_t j) { return level[j]; }, &x.exact[t * padded], x.c));
    } else {
      for (int64_t j = 0; j < x.c; ++j) small[j] = entry[code[j]];
      for (int64_t t = 0; t < x.n; ++t) {
        const float sum =
            dot_rounded(small.data(), &x.rounded[t * padded], &x.scales[t * x.chunks], x.chunks);
        out.put(t, row, scale * (sum - zero * x.sums[t]));
      }
    }
  }
}

// ---- AVX-512 with VBMI, VNNI and BF16

#if defined(__AVX512F__)
// Rows follow each other in memory, but the processor's own prefetcher stops at every page.
constexpr int64_t AHEAD = 8192;

// The sums over the lanes of sum[r][t] for every row r: four at a time, which halves the shuffles.
template <int R, int N>
VBMI inline void totals(const __m512 (&sum)[R][N], int t, float* total) {
  if constexpr (R == 4) {
    __m256 half[4];
    for (int r = 0; r < 4; ++r)
      half[r] = _mm256_add_ps(_mm512_castps512_ps256(sum[r][t]),
                              _mm512_extractf32x8_ps(sum[r][t], 1));
    const __m256 all = _mm256_hadd_ps(_mm256_hadd_ps(half[0], half[1]),
                                      _mm256_hadd_ps(half[2], half[3]));
    _mm_storeu_ps(total, _mm_add_ps(_mm256_castps256_ps128(all), _mm256_extractf128_ps(all, 1)));
  } else {
    for (int r = 0; r < R; ++r) total[r] = _mm512_reduce_add_ps(sum[r][t]);
  }
}

// R rows of one width, N tokens, x in P bfloat16 pieces.
template <int R, int N, int P>
VBMI void block_exact(const Group& g, int64_t i, const Controls& c, const Input& x, int64_t token,
                      const uint16_t* row_scale, const int32_t* order, const Output& out) {
  __m512i table[R];
  __m512 sum[R][N];
  for (int r = 0; r < R; ++r) {
    table[r] = bf16_table(g.levels + ((i + r) << g.width), c);
    for (int t = 0; t < N; ++t) sum[r][t] = _mm512_setzero_ps();
  }
  const uint8_t* at = g.packed + i * g.stride;
  const char* ahead = reinterpret_cast<const char*>(at) + AHEAD;
  const int64_t step = 8 * g.width, per_token = x.chunks * P * CHUNK;
  const uint16_t* xs = x.split.data() + token * per_token;
  const __mmask64 last = last_mask(g.stride, x.chunks, g.width);
  for (int64_t k = 0; k < x.chunks; ++k, at += step, xs += P * CHUNK) {
    const __mmask64 mask = k + 1 == x.chunks ? last : c.bytes;
    for (int64_t line = 0; line < R * step; line += 64)
      _mm_prefetch(ahead + k * R * step + line, _MM_HINT_T0);
    for (int r = 0; r < R; ++r) {
      const __m512i lanes =
          _mm512_permutexvar_epi8(c.spread, load_chunk(at + r * g.stride, mask));
      const __m512i low =
          _mm512_permutexvar_epi16(_mm512_multishift_epi64_epi8(c.low, lanes), table[r]);
      const __m512i high =
          _mm512_permutexvar_epi16(_mm512_multishift_epi64_epi8(c.high, lanes), table[r]);
      for (int t = 0; t < N; ++t)
        for (int p = 0; p < P; ++p) {
          const uint16_t* xp = xs + t * per_token + p * CHUNK;
          sum[r][t] = _mm512_dpbf16_ps(sum[r][t], (__m512bh)low,
                                       (__m512bh)_mm512_loadu_si512(xp));
          sum[r][t] = _mm512_dpbf16_ps(sum[r][t], (__m512bh)high,
                                       (__m512bh)_mm512_loadu_si512(xp + 32));
        }
    }
  }
  for (int t = 0; t < N; ++t) {
    float total[R];
    totals<R, N>(sum, t, total);
    for (int r = 0; r < R; ++r)
      out.put(token + t, order[g.first + i + r], from_bf16(row_scale[g.first + i + r]) * total[r]);
  }
}

// The same with x in int8: the levels are made unsigned by 128 (or the codes themselves from 6 bits
// up) and 128 (or the zero point) times the sum of x is taken off at the end.
template <int R, int N>
VBMI void block_rounded(const Group& g, int64_t i, const Controls& c, const Input& x, int64_t token,
                        const uint16_t* row_scale, const int32_t* order, const Output& out) {
  const bool tables = g.width <= 5;
  __m512i table[R];
  __m512 sum[R][N];
  for (int r = 0; r < R; ++r) {
    if (tables)
      table[r] = _mm512_xor_si512(byte_table(g.levels + ((i + r) << g.width), c),
                                  _mm512_set1_epi8(char(128)));
    else
      table[r] = _mm512_set1_epi8(char((1 << g.width) - 1));
    for (int t = 0; t < N; ++t) sum[r][t] = _mm512_setzero_ps();
  }
  const uint8_t* at = g.packed + i * g.stride;
  const char* ahead = reinterpret_cast<const char*>(at) + AHEAD;
  const int64_t step = 8 * g.width, padded = x.chunks * CHUNK;
  const int8_t* xs = x.rounded.data() + token * padded;
  const float* scales = x.scales.data() + token * x.chunks;
  const __mmask64 last = last_mask(g.stride, x.chunks, g.width);
  for (int64_t k = 0; k < x.chunks; ++k, at += step, xs += CHUNK, ++scales) {
    const __mmask64 mask = k + 1 == x.chunks ? last : c.bytes;
    for (int64_t line = 0; line < R * step; line += 64)
      _mm_prefetch(ahead + k * R * step + line, _MM_HINT_T0);
    for (int r = 0; r < R; ++r) {
      const __m512i lanes =
          _mm512_permutexvar_epi8(c.spread, load_chunk(at + r * g.stride, mask));
      const __m512i field = _mm512_multishift_epi64_epi8(c.fields, lanes);
      const __m512i level = tables ? _mm512_permutexvar_epi8(field, table[r])
                                   : _mm512_and_si512(field, table[r]);
      for (int t = 0; t < N; ++t) {
        const __m512i dot = _mm512_dpbusd_epi32(_mm512_setzero_si512(), level,
                                                _mm512_loadu_si512(xs + t * padded));
        sum[r][t] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(dot),
                                    _mm512_set1_ps(scales[t * x.chunks]), sum[r][t]);
      }
    }
  }
  for (int t = 0; t < N; ++t) {
    float total[R];
    totals<R, N>(sum, t, total);
    for (int r = 0; r < R; ++r) {
      const float zero = tables ? 128.f : float(g.zeros[i + r]);
      out.put(token + t, order[g.first + i + r],
              from_bf16(row_scale[g.first + i + r]) * (total[r] - zero * x.sums[token + t]));
    }
  }
}

template <int P>
VBMI void rows_exact(const Group& g, int64_t begin, int64_t end, const Input& x,
                     const uint16_t* row_scale, const int32_t* order, const Output& out) {
  const Controls c = controls(g.width);
  int64_t i = begin;
  for (; i + 4 <= end; i += 4) {
    int64_t t = 0;
    for (; t + 4 <= x.n; t += 4) block_exact<4, 4, P>(g, i, c, x, t, row_scale, order, out);
    for (; t < x.n; ++t) block_exact<4, 1, P>(g, i, c, x, t, row_scale, order, out);
  }
  for (; i < end; ++i)
    for (int64_t t = 0; t < x.n; ++t) block_exact<1, 1, P>(g, i, c, x, t, row_scale, order, out);
}

VBMI void rows_rounded(const Group& g, int64_t begin, int64_t end, const Input& x,
                       const uint16_t* row_scale, const int32_t* order, const Output& out) {
  const Controls c = controls(g.width);
  int64_t i = begin;
  for (; i + 4 <= end; i += 4) {
    int64_t t = 0;
    for (; t + 4 <= x.n; t += 4) block_rounded<4, 4>(g, i, c, x, t, row_scale, order, out);
    for (; t < x.n; ++t) block_rounded<4, 1>(g, i, c, x, t, row_scale, order, out);
  }
  for (; i < end; ++i)
    for (int64_t t = 0; t < x.n; ++t) block_rounded<1, 1>(g, i, c, x, t, row_scale, order, out);
}

#endif

// ---- x

// In a chunk, 16-bit lane 4 i + q of the first half holds column 8 i + q, of the second 8 i + 4 + q.
void in_lane_order(const uint16_t* from, uint16_t* to) {
  for (int half = 0; half < 2; ++half)
    for (int lane = 0; lane < 8; ++lane)
      std::memcpy(to + half * 32 + lane * 4, from + lane * 8 + half * 4, 8);
}

void split_chunk(const float* from, int pieces, uint16_t* to) {
  float rest[CHUNK];
  uint16_t piece[CHUNK];
  std::memcpy(rest, from, sizeof rest);
  for (int p = 0; p < pieces; ++p) {
    for (int j = 0; j < CHUNK; ++j) {
      piece[j] = to_bf16(rest[j]);
      rest[j] -= from_bf16(piece[j]);
    }
    in_lane_order(piece, to + p * CHUNK);
  }
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

Input prepare(const void* x, bool bf16, const uint16_t* in_scale, int64_t n, int64_t c, bool exact,
              bool vbmi, bool all_tables) {
  Input in;
  in.n = n, in.c = c, in.chunks = (c + CHUNK - 1) / CHUNK;
  in.pieces = bf16 && !in_scale ? 1 : 3;
  const int64_t padded = in.chunks * CHUNK;
  if (exact && vbmi && in.pieces == 1 && all_tables) {  // as it is, but for the order of lanes
    in.split.resize(n * padded);
    for (int64_t t = 0; t < n; ++t)
      for (int64_t k = 0; k < in.chunks; ++k) {
        const uint16_t* from = static_cast<const uint16_t*>(x) + t * c + k * CHUNK;
        uint16_t last[CHUNK] = {};
        if (k + 1 == in.chunks) {
          std::memcpy(last, from, (c - k * CHUNK) * 2);
          from = last;
        }
        in_lane_order(from, &in.split[t * padded + k * CHUNK]);
      }
    return in;
  }
  in.exact.assign(n * padded, 0.f);
  for (int64_t t = 0; t < n; ++t) {
    float* to = &in.exact[t * padded];
    if (bf16) {
      const uint16_t* from = static_cast<const uint16_t*>(x) + t * c;
      for (int64_t j = 0; j < c; ++j) to[j] = from_bf16(from[j]);
    } else {
      std::memcpy(to, static_cast<const float*>(x) + t * c, c * sizeof(float));
    }
    if (in_scale)
      for (int64_t j = 0; j < c; ++j) to[j] *= from_fp16(in_scale[j]);
  }
  if (exact && vbmi) {
    in.split.resize(n * padded * in.pieces);
    for (int64_t at = 0; at < n * in.chunks; ++at)
      split_chunk(&in.exact[at * CHUNK], in.pieces, &in.split[at * in.pieces * CHUNK]);
  }
  if (!exact) {
    in.rounded.resize(n * padded);
    in.scales.resize(n * in.chunks);
    in.sums.assign(n, 0.f);
    for (int64_t at = 0; at < n * in.chunks; ++at) {
      const int32_t sum =
          round_chunk(&in.exact[at * CHUNK], &in.rounded[at * CHUNK], &in.scales[at]);
      in.sums[at / in.chunks] += in.scales[at] * float(sum);
    }
  }
  return in;
}

}  // namespace

int skimlm_matmul(const void* x, int64_t x_bf16, const uint8_t* packed, int64_t packed_size,
                  const uint8_t* widths, const int8_t* codebook, int64_t codebook_size,
                  const uint16_t* row_scale, const int16_t* row_zero, int64_t zeros,
                  const uint16_t* in_scale, const float* bias, void* out, int64_t n, int64_t r,
                  int64_t c, int64_t exact, int threads) {
  // Which row stands at a stored place. Width by width: a histogram would wait on its own counts.
  std::vector<int32_t> order(r);
  int64_t counts[MAX_B + 1], rows = 0, bytes = 0, levels = 0, affine = 0;
  for (int b = 1; b <= MAX_B; ++b) {
    counts[b] = rows_of_width(b, widths, r, order.data() + rows);
    rows += counts[b];
    bytes += counts[b] * ((c * b + 7) / 8);
    (b <= 5 ? levels : affine) += b <= 5 ? counts[b] << b : counts[b];
  }
  if (rows != r || bytes != packed_size || levels != codebook_size || affine != zeros) return 1;

  const bool vbmi = skimlm_has_vbmi();
  const Input input = prepare(x, x_bf16, in_scale, n, c, exact, vbmi, !affine);
  const Output output{out, x_bf16 != 0, r, bias};
  struct Part {
    Group group;
    int64_t begin, end;
  };
  std::vector<Part> parts;
  // A second thread for a few microseconds of work costs more than it brings.
  threads = int(std::clamp<int64_t>(bytes / PER_THREAD, 1, threads));
  const int64_t turn = std::max(WORK, bytes / (TURNS * threads));
  int64_t first = 0;
  for (int b = 1; b <= MAX_B; ++b) {
    if (!counts[b]) continue;
    const Group group{b, counts[b], first, packed, codebook, row_zero, (c * b + 7) / 8};
    const int64_t step = std::max<int64_t>(4, turn / group.stride / 4 * 4);
    for (int64_t i = 0; i < group.rows; i += step)
      parts.push_back({group, i, std::min(i + step, group.rows)});
    packed += group.rows * group.stride;
    if (b <= 5)
      codebook += group.rows << b;
    else
      row_zero += group.rows;
    first += group.rows;
  }
  parallel_rows(int64_t(parts.size()), 1, threads, [&](int64_t from, int64_t to) {
    for (int64_t at = from; at < to; ++at) {
      const Part& p = parts[at];
#if defined(__AVX512F__)
      if (vbmi && !exact)
        rows_rounded(p.group, p.begin, p.end, input, row_scale, order.data(), output);
      else if (vbmi && p.group.width <= 5 && input.pieces == 1)
        rows_exact<1>(p.group, p.begin, p.end, input, row_scale, order.data(), output);
      else if (vbmi && p.group.width <= 5)
        rows_exact<3>(p.group, p.begin, p.end, input, row_scale, order.data(), output);
      else
#endif
        rows_any(p.group, p.begin, p.end, input, exact, row_scale, order.data(), output);
    }
  });
  return 0;
}

void skimlm_table_matmul(const void* x, int64_t x_bf16, const uint8_t* codes, int64_t bits,
                         const uint16_t* scale, void* out, int64_t n, int64_t r, int64_t c,
                         int threads) {
  // At 4 bits even columns are the low nibbles, odd ones the high: two halves of x, two dot products.
  const int64_t bytes = bits == 8 ? c : (c + 1) / 2;
  const int halves = bits == 8 ? 1 : 2;
  std::vector<float> xs(n * halves * bytes), sums(n);
  for (int64_t t = 0; t < n; ++t)
    for (int64_t j = 0; j < c; ++j) {
      const float value = x_bf16 ? from_bf16(static_cast<const uint16_t*>(x)[t * c + j])
                                 : static_cast<const float*>(x)[t * c + j];
      xs[(t * halves + j % halves) * bytes + j / halves] = value;
      sums[t] += value;
    }
  const Output output{out, x_bf16 != 0, r, nullptr};
  const int64_t block = std::max<int64_t>(1, std::max(WORK, r * bytes / (TURNS * threads)) / bytes);
  parallel_rows(r, block, threads, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const uint8_t* row = codes + i * bytes;
      for (int64_t t = 0; t < n; ++t) {
        const float* xt = &xs[t * halves * bytes];
        float sum;
        if (bits == 8) {
          sum = dot([&](int64_t j) { return float(int8_t(row[j])); }, xt, bytes);
        } else {
          sum = dot([&](int64_t j) { return float(row[j] & 15); }, xt, bytes);
          sum += dot([&](int64_t j) { return float(row[j] >> 4); }, xt + bytes, bytes);
          sum -= 8 * sums[t];
        }
        output.put(t, i, from_bf16(scale[i]) * sum);
      }
    }
  });
}
