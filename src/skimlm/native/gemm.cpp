// out = x W^T for a packed W and more than one token, with VBMI and BF16: rows become bfloat16 in cache,
// once for all tokens, and are multiplied there by `vdpbf16ps`.
//
//   few lines of x   four rows at a time, times six lines: sums over columns in every lane
//   more             32 rows at a time, pairs of columns side by side, times twelve lines: a lane per
//                    row, no sums across lanes, but turning rows into columns takes longer
//
// Levels are integers of at most 8 bits and x is one bfloat16 piece, or three (their sum is x), so
// products are exact in float: only the order of the additions differs from a float32 reference.
#include <algorithm>
#include <cstring>
#include <deque>

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
constexpr int FEW_LINES = 6;         // times four rows: 24 sums

// x as bfloat16, one line per token and piece. Lines are not a multiple of 4 KB apart, which would put
// all of them into the same few places of the first cache.
struct Pieces {
  int64_t n, pieces, stride;
  const uint16_t* x;        // [n, pieces, stride]
  Lines<uint16_t> own;      // unless the caller's x will do
  std::vector<float> sums;  // [n], where rows of 6 bits and more need them
};

Pieces to_pieces(const void* x, bool bf16, const uint16_t* in_scale, int64_t n, int64_t c,
                 bool sums, int threads) {
  const int64_t padded = (c + CHUNK - 1) / CHUNK * CHUNK;
  Pieces out{n, bf16 && !in_scale ? 1 : 3, padded + 32, nullptr, {}, {}};
  const bool aligned = reinterpret_cast<uintptr_t>(x) % 64 == 0;
  if (out.pieces == 1 && !sums && c == padded && c % 2048 && aligned) {
    out.x = static_cast<const uint16_t*>(x);
    out.stride = c;
    return out;
  }
  out.own = Lines<uint16_t>(n * out.pieces * out.stride);
  out.x = out.own.data();
  out.sums.assign(sums ? n : 0, 0.f);
  parallel_rows(n, 8, threads, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      const char* token = static_cast<const char*>(x) + t * c * (bf16 ? 2 : 4);
      uint16_t* to = &out.own[t * out.pieces * out.stride];
      for (int64_t p = 0; p < out.pieces; ++p)
        std::fill(to + p * out.stride + c, to + p * out.stride + padded, uint16_t(0));
      if (out.pieces == 1) std::memcpy(to, token, c * 2);
      if (out.pieces == 1 && !sums) continue;
      std::vector<float> rest = to_floats(token, bf16, in_scale, 1, c);
      if (sums)
        for (float v : rest) out.sums[t] += v;
      for (int64_t p = 0; out.pieces > 1 && p < out.pieces; ++p, to += out.stride)
        for (int64_t j = 0; j < c; ++j) {
          to[j] = to_bf16(rest[j]);
          rest[j] -= from_bf16(to[j]);
        }
    }
  });
  return out;
}

// How the rows of one width become bfloat16.
struct Cutting {
  Controls controls;
  __m512i places, mixed;  // of planes, if they are a trellis,
  Bf16Trellis trellis;    // which they share
};

// Where the codes and levels of a row stand.
struct Place {
  const Group* group;
  int64_t at;  // in the group
  const Cutting* cutting;
};

// A row being turned into bfloat16.
struct Row {
  const uint8_t* at;  // its next chunk
  int64_t step;       // bytes of a chunk
  const Cutting* cutting;
  __mmask64 last;  // of the last chunk
  int width;
  RowCode code;
  Planes planes;  // if it is a trellis,
  int64_t chunk;  // and its next one
};

// 64 codes of a row as bfloat16: levels, or codes minus half their range. 16-bit lane 4 i + q of the
// first register holds column 8 i + q, of the second 8 i + 4 + q.
VBMI inline void bf16_chunk(const Row& row, __mmask64 mask, __m512i table, __m512i* low,
                            __m512i* high) {
  if (row.code == TRELLIS) {
    const __m512i window = turned(row.planes.chunk(row.chunk, row.cutting->places));
    return row.cutting->trellis(_mm512_shuffle_epi32(window, _MM_PERM_DBCA), low, high);
  }
  const Controls& c = row.cutting->controls;
  const __m512i lanes = _mm512_permutexvar_epi8(c.spread, load_chunk(row.at, mask));
  *low = _mm512_multishift_epi64_epi8(c.low, lanes);
  *high = _mm512_multishift_epi64_epi8(c.high, lanes);
  if (__builtin_expect(row.width <= 5, 1)) {
    *low = _mm512_permutexvar_epi16(*low, table);
    *high = _mm512_permutexvar_epi16(*high, table);
    return;
  }
  for (__m512i* v : {low, high}) {
    *v = _mm512_and_si512(*v, _mm512_set1_epi16((1 << row.width) - 1));
    *v = _mm512_sub_epi16(*v, _mm512_set1_epi16(1 << (row.width - 1)));
    const __m512 first = _mm512_cvtepi32_ps(_mm512_cvtepi16_epi32(_mm512_castsi512_si256(*v)));
    const __m512 second =
        _mm512_cvtepi32_ps(_mm512_cvtepi16_epi32(_mm512_extracti64x4_epi64(*v, 1)));
    *v = (__m512i)_mm512_cvtne2ps_pbh(second, first);
  }
}

VBMI Row row_at(const Place& place, int64_t first, int64_t chunks, int64_t c) {
  const auto& [g, at, cutting] = place;
  const int64_t step = 8 * g->width;
  const uint8_t* row = g->packed + at * g->stride;
  return {row + first * step, step, cutting, last_mask(g->stride, chunks, g->width), g->width, g->code,
          g->code == TRELLIS ? Planes(row, g->width, c) : Planes(), first};
}

VBMI __m512i table_at(const Place& place) {
  const auto& [g, at, cutting] = place;
  return g->code == TABLE ? bf16_table(g->levels + (at << g->width), cutting->controls)
                          : _mm512_setzero_si512();
}

// Chunks first..last of up to 16 rows as pairs of columns: panel [pair, 32, 2], half of the 32.
VBMI void fill_pairs(const Place* places, int64_t count, int64_t first, int64_t last, int64_t c,
                     uint16_t* panel) {
  const int64_t chunks = (c + CHUNK - 1) / CHUNK;
  alignas(64) __m512i table[16];
  Row row[16];
  static const uint8_t nothing[64] = {};
  static const Cutting none = {};
  for (int64_t r = 0; r < 16; ++r) {
    const bool real = r < count;  // rows past the last one are zeros
    row[r] = real ? row_at(places[r], first, chunks, c) : Row{nothing, 0, &none, 0, 1, TABLE, Planes(), 0};
    table[r] = real ? table_at(places[r]) : _mm512_setzero_si512();
  }
  for (int64_t k = first; k < last; ++k, panel += CHUNK * ROWS) {
    alignas(64) __m512i half[2][16];
    const bool end = k + 1 == chunks;
    for (int r = 0; r < 16; ++r) {
      bf16_chunk(row[r], end ? row[r].last : row[r].cutting->controls.bytes, table[r], &half[0][r],
                 &half[1][r]);
      row[r].at += row[r].step;
      ++row[r].chunk;
    }
    for (int h = 0; h < 2; ++h) {
      transpose(half[h]);
#pragma GCC unroll 16
      for (int i = 0; i < 16; ++i)
        _mm512_store_si512(panel + (i / 2 * 4 + h * 2 + i % 2) * 2 * ROWS, half[h][i]);
    }
  }
}

// Chunks first..last of a trellis row, in order.
VBMI void fill_trellis(const Place& place, int64_t first, int64_t last, int64_t c, uint16_t* to) {
  const auto& [g, at, cutting] = place;
  const Planes planes(g->packed + at * g->stride, g->width, c);
  for (int64_t k = first; k < last; ++k, to += CHUNK) {
    __m512i low, high;
    cutting->trellis(turned(planes.chunk(k, cutting->mixed)), &low, &high);
    _mm512_store_si512(to, low);
    _mm512_store_si512(to + 32, high);
  }
}

// Chunks first..last of a row, in order.
VBMI void fill_row(const Place& place, int64_t first, int64_t last, int64_t c, uint16_t* to) {
  const int64_t chunks = (c + CHUNK - 1) / CHUNK;
  if (place.group->code == TRELLIS) return fill_trellis(place, first, last, c, to);
  Row row = row_at(place, first, chunks, c);
  const __m512i table = table_at(place);
  const __m512i begin = _mm512_setr_epi64(0, 8, 1, 9, 2, 10, 3, 11);
  const __m512i end = _mm512_setr_epi64(4, 12, 5, 13, 6, 14, 7, 15);
  const Controls& cut = place.cutting->controls;
  for (int64_t k = first; k < last; ++k, to += CHUNK, row.at += row.step) {
    __m512i low, high;
    bf16_chunk(row, k + 1 == chunks ? row.last : cut.bytes, table, &low, &high);
    _mm512_store_si512(to, _mm512_permutex2var_epi64(low, begin, high));
    _mm512_store_si512(to + 32, _mm512_permutex2var_epi64(low, end, high));
  }
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
void all_lines(const Times* times, int64_t most, const uint16_t* weights, int64_t length,
               const Pieces& x, int64_t column, bool add, float* sums) {
  const int64_t lines = x.n * x.pieces, turns = (lines + most - 1) / most;
  for (int64_t turn = 0; turn < turns; ++turn) {
    const int64_t t = lines * turn / turns, next = lines * (turn + 1) / turns;
    times[next - t](weights, length, &x.x[t * x.stride + column], x.stride, add, sums + t * ROWS);
  }
}

// Whether rows are taken four at a time.
bool is_few(const Pieces& x, int64_t c) { return x.n * x.pieces <= (c > LONG ? FEW_LONG : FEW); }

// Up to 32 rows from `begin`; `scratch` holds ROWS * SPAN, `sums` [lines, ROWS].
void rows_many(const SkimlmLayer& w, const Place* places, int64_t begin, int64_t count,
               const Pieces& x, uint16_t* scratch, float* sums, const Output& out) {
  const int64_t c = w.cols, chunks = (c + CHUNK - 1) / CHUNK;
  const bool few = is_few(x, c);
  const int64_t span = (few ? FEW_SPAN : SPAN) / CHUNK;
  places += begin;
  for (int64_t first = 0; first < chunks; first += span) {
    const int64_t last = std::min(first + span, chunks), column = first * CHUNK;
    const int64_t length = std::min(last * CHUNK, c) - column;
    if (few) {
      for (int64_t r = 0; r < count; r += 4) {
        for (int64_t i = 0; i < 4; ++i)  // a row past the last one is the last one again
          fill_row(places[std::min(r + i, count - 1)], first, last, c, scratch + i * FEW_ROW);
        all_lines(rows, FEW_LINES, scratch, length, x, column, column > 0, sums + r);
      }
    } else {
      for (int64_t r = 0; r < ROWS; r += 16)
        fill_pairs(places + r, count - r, first, last, c, scratch + 2 * r);
      all_lines(panel, LINES, scratch, (length + 1) / 2, x, column, column > 0, sums);
    }
  }
  float scale[ROWS] = {}, zero[ROWS] = {};
  for (int64_t r = 0; r < count; ++r) {
    const auto& [group, at, cutting] = places[r];
    scale[r] = from_bf16(w.row_scale[group->first + at]);
    zero[r] = group->code == AFFINE ? float(group->zeros[at] - (1 << (group->width - 1))) : 0.f;
  }
  for (int64_t t = 0; t < x.n; ++t) {
    float* value = sums + t * x.pieces * ROWS;
    for (int64_t piece = 1; piece < x.pieces; ++piece)
      for (int r = 0; r < ROWS; ++r) value[r] += value[piece * ROWS + r];
    if (!x.sums.empty())
      for (int r = 0; r < ROWS; ++r) value[r] -= zero[r] * x.sums[t];
    for (int r = 0; r < ROWS; ++r) value[r] *= scale[r];
    out.put(t, begin, value, count);
  }
}

// ---- rows of bytes

// 64 bytes in order as bfloat16.
VBMI inline void bf16_bytes(const int8_t* from, __m512i* low, __m512i* high) {
  __m512 part[4];
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + 16 * i));
    part[i] = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(bytes));
  }
  *low = (__m512i)_mm512_cvtne2ps_pbh(part[1], part[0]);
  *high = (__m512i)_mm512_cvtne2ps_pbh(part[3], part[2]);
}

// Four rows of `length` bytes.
VBMI void fill_bytes(const int8_t* rows, int64_t stride, int64_t length, uint16_t* to) {
  for (int64_t r = 0; r < 4; ++r, rows += stride, to += FEW_ROW)
    for (int64_t j = 0; j < length; j += CHUNK) {
      __m512i low, high;
      bf16_bytes(rows + j, &low, &high);
      _mm512_store_si512(to + j, low);
      _mm512_store_si512(to + j + 32, high);
    }
}

// Sixteen of them as pairs of columns: panel [pair, 32, 2], half of the 32.
VBMI void fill_byte_pairs(const int8_t* rows, int64_t stride, int64_t length, uint16_t* panel) {
  for (int64_t j = 0; j < length; j += CHUNK, panel += CHUNK * ROWS) {
    alignas(64) __m512i half[2][16];
    for (int r = 0; r < 16; ++r) bf16_bytes(rows + r * stride + j, &half[0][r], &half[1][r]);
    for (int h = 0; h < 2; ++h) {
      transpose(half[h]);
#pragma GCC unroll 16
      for (int i = 0; i < 16; ++i) _mm512_store_si512(panel + (h * 16 + i) * 2 * ROWS, half[h][i]);
    }
  }
}

// What a thread needs for 32 rows.
struct ByteRoom {
  int64_t stride;
  Lines<int8_t> bytes;
  Lines<uint16_t> scratch;
  Lines<float> part, sums;  // [lines, ROWS]: of one scale, of all
  std::vector<float> scale;
  ByteRoom(const ByteRows& w, const Pieces& x)
      : stride((w.c + CHUNK - 1) / CHUNK * CHUNK + 2 * CHUNK), bytes(ROWS * stride),
        scratch(ROWS * std::min(SPAN, 64 + stride)), part(x.n * x.pieces * ROWS),
        sums(x.n * x.pieces * ROWS), scale(ROWS * w.scales) {
    std::memset(bytes.data(), 0, ROWS * stride);  // rows past the last one, columns past the last one
  }
};

void bytes_many(const ByteRows& w, int64_t begin, int64_t count, const Pieces& x, ByteRoom& room,
                const Output& out) {
  const int64_t lines = x.n * x.pieces;
  const bool few = is_few(x, w.c);
  float* sums = room.sums.data();
  w.make(begin, begin + count, room.bytes.data(), room.stride, room.scale.data());
  for (int64_t s = 0; s < w.scales; ++s) {
    const int64_t first = s * w.span, end = s + 1 == w.scales ? w.c : first + w.span;
    for (int64_t column = first; column < end; column += few ? FEW_SPAN : SPAN) {
      const int64_t length = std::min(few ? FEW_SPAN : SPAN, end - column);
      const bool add = column > first;
      const int8_t* bytes = &room.bytes[column];
      for (int64_t r = 0; few && r < count; r += 4) {
        fill_bytes(bytes + r * room.stride, room.stride, length, room.scratch.data());
        all_lines(rows, FEW_LINES, room.scratch.data(), length, x, column, add, &room.part[r]);
      }
      if (few) continue;
      for (int64_t r = 0; r < ROWS; r += 16)
        fill_byte_pairs(bytes + r * room.stride, room.stride, length, &room.scratch[2 * r]);
      all_lines(panel, LINES, room.scratch.data(), (length + 1) / 2, x, column, add,
                room.part.data());
    }
    float scale[ROWS] = {};
    for (int64_t r = 0; r < count; ++r) scale[r] = room.scale[r * w.scales + s];
    for (int64_t t = 0; t < lines; ++t)
      for (int64_t r = 0; r < ROWS; ++r) {
        const float value = r < count ? room.part[t * ROWS + r] * scale[r] : 0.f;
        sums[t * ROWS + r] = s ? sums[t * ROWS + r] + value : value;
      }
  }
  for (int64_t t = 0; t < x.n; ++t) {
    float* value = sums + t * x.pieces * ROWS;
    for (int64_t piece = 1; piece < x.pieces; ++piece)
      for (int r = 0; r < ROWS; ++r) value[r] += value[piece * ROWS + r];
    for (int64_t r = 0; r < count; ++r) out.put(t, w.order[begin + r], value[r]);
  }
}

}  // namespace
#endif

void multiply_many(const ByteRows& w, const void* x, bool bf16, const uint16_t* in_scale, int64_t n,
                   const Output& out, int threads) {
#if defined(__AVX512F__)
  const Pieces pieces = to_pieces(x, bf16, in_scale, n, w.c, false, threads);
  const int64_t panels = (w.r + ROWS - 1) / ROWS;
  const int64_t turn = std::max<int64_t>(1, panels / (8 * threads));
  parallel_rows(panels, turn, threads, [&](int64_t from, int64_t to) {
    ByteRoom room(w, pieces);
    for (int64_t at = from; at < to; ++at)
      bytes_many(w, at * ROWS, std::min<int64_t>(ROWS, w.r - at * ROWS), pieces, room, out);
  });
#else
  (void)w, (void)x, (void)bf16, (void)in_scale, (void)n, (void)out, (void)threads;
#endif
}

void multiply_many(const SkimlmLayer& w, const Matrix& m, const void* x, bool bf16, int64_t n,
                   const Output& out, int threads) {
#if defined(__AVX512F__)
  const Pieces pieces = to_pieces(x, bf16, w.in_scale, n, w.cols, m.affine > 0, threads);
  std::vector<Place> places(w.rows);
  std::deque<Cutting> cuttings;  // where they stand does not change
  for (const Group& group : m.groups) {
    const bool trellis = group.code == TRELLIS;
    cuttings.push_back({controls(group.width), trellis ? plane_places(group.width) : __m512i{},
                        trellis ? mixed_places(group.width) : __m512i{},
                        trellis ? Bf16Trellis(group.levels, 1.f) : Bf16Trellis()});
    for (int64_t i = 0; i < group.rows; ++i)
      places[m.order[group.first + i]] = {&group, i, &cuttings.back()};
  }
  // Rows in the model's order, so that threads write to places far from each other.
  const int64_t panels = (w.rows + ROWS - 1) / ROWS;
  const int64_t turn = std::max<int64_t>(1, panels / (8 * threads));
  parallel_rows(panels, turn, threads, [&](int64_t from, int64_t to) {
    const Lines<uint16_t> scratch(ROWS * std::min(SPAN, 64 + (w.cols + CHUNK - 1) / CHUNK * CHUNK));
    const Lines<float> sums(n * pieces.pieces * ROWS);
    for (int64_t at = from; at < to; ++at)
      rows_many(w, places.data(), at * ROWS, std::min<int64_t>(ROWS, w.rows - at * ROWS), pieces, scratch.data(), sums.data(), out);
  });
#else
  (void)w, (void)m, (void)x, (void)bf16, (void)n, (void)out, (void)threads;
#endif
}
