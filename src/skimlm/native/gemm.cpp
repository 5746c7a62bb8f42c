// out = x W^T for plain packed layers and several tokens in bfloat16, with VBMI and BF16 (gemm.h): codes become
// bfloat16 in cache, once for all tokens.
#include <deque>

#include "gemm.h"

#if defined(__AVX512F__)
namespace {

constexpr int64_t FEW_AHEAD = 8;  // rows

// How the rows of one width become bfloat16.
struct Cutting {
  Controls controls;
  __m512i places, end;  // of planes, if they are a trellis, and in the last chunk,
  Bf16Trellis trellis;  // which they share
};

// Where the codes and levels of a row stand.
struct Place {
  const Group* group;
  int64_t at;  // in the group
  const Cutting* cutting;
};

// 64 codes of a trellis row, of the planes of their windows, in the order of bf16_chunk.
VBMI inline void bf16_windows(const Cutting& cutting, __m512i planes, __m512i* low, __m512i* high) {
  cutting.trellis(_mm512_shuffle_epi32(turned(planes), _MM_PERM_DBCA), low, high);
}

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
  if (row.code == TRELLIS)
    return bf16_windows(*row.cutting, row.planes.chunk(row.chunk, row.cutting->places), low, high);
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

VBMI inline void put_windows(const Cutting& cutting, __m512i planes, uint16_t* to) {
  __m512i low, high;
  bf16_windows(cutting, planes, &low, &high);
  _mm512_store_si512(to, low);
  _mm512_store_si512(to + 32, high);
}

// Chunks first..last of a trellis row, whole ones: its end is never in memory, as that of `Planes` is.
VBMI void fill_trellis(const Place& place, int64_t first, int64_t last, int64_t c, uint16_t* to) {
  const auto& [g, at, cutting] = place;
  const int b = g->width;
  const uint8_t* row = g->packed + at * g->stride;
  const __mmask64 some = first_bytes(14 * b), all = first_bytes(8 * b);
  const __m512i places = cutting->places;
  const int64_t whole = std::min(last, c / CHUNK - 1);
  const uint8_t* from = row + first * 8 * b;
  for (int64_t k = first; k < whole; ++k, from += 8 * b, to += CHUNK)
    put_windows(*cutting, _mm512_permutexvar_epi8(places, _mm512_maskz_loadu_epi8(some, from)), to);
  if (whole == last) return;
  const __m256i begin = _mm256_maskz_loadu_epi8(__mmask32(all), row);
  const __m512i behind = _mm512_zextsi256_si512(halved(begin));
  put_windows(*cutting, _mm512_permutex2var_epi8(_mm512_maskz_loadu_epi8(all, from), cutting->end, behind), to);
}

// Chunks first..last of a row, columns as bf16_chunk gives them.
VBMI void fill_row(const Place& place, int64_t first, int64_t last, int64_t c, uint16_t* to) {
  const int64_t chunks = (c + CHUNK - 1) / CHUNK;
  if (place.group->code == TRELLIS && c % CHUNK == 0) return fill_trellis(place, first, last, c, to);
  Row row = row_at(place, first, chunks, c);
  const __m512i table = table_at(place);
  const Controls& cut = place.cutting->controls;
  for (int64_t k = first; k < last; ++k, to += CHUNK, row.at += row.step, ++row.chunk) {
    __m512i low, high;
    bf16_chunk(row, k + 1 == chunks ? row.last : cut.bytes, table, &low, &high);
    _mm512_store_si512(to, low);
    _mm512_store_si512(to + 32, high);
  }
}

// A product, where its rows stand, and how to cut their codes.
struct Part {
  const ManyProduct& product;
  int64_t first;  // of its panels, of those of all products
  std::vector<int32_t> stored;   // [r]: where a row is stored
  std::deque<Cutting> cuttings;  // of its groups; where they stand does not change

  Part(const ManyProduct& product, int64_t first) : product(product), first(first), stored(product.layer.rows) {
    const Matrix& m = product.matrix;
    for (int64_t i = 0; i < m.r; ++i) stored[m.row(i)] = int32_t(i);
    for (const Group& group : m.groups) {
      const bool trellis = group.code == TRELLIS;
      cuttings.push_back({controls(group.width), trellis ? plane_places(group.width) : __m512i{},
                          trellis ? end_places(group.width) : __m512i{},
                          trellis ? Bf16Trellis(group.levels, 1.f) : Bf16Trellis()});
    }
  }

  Place place(int64_t row) const {
    const Group* groups = product.matrix.groups.data();
    int64_t g = 0;
    while (stored[row] >= groups[g].first + groups[g].rows) ++g;
    return {groups + g, stored[row] - groups[g].first, &cuttings[g]};
  }

  // Up to `count` rows from `row` on: the processor's prefetcher does not see them coming. Inlined by force, or
  // GCC 12 drops it.
  __attribute__((always_inline)) void prefetch(int64_t row, int64_t count) const {
    for (const int64_t end = std::min(row + count, product.layer.rows); row < end; ++row) {
      const Place at = place(row);
      const char* bytes = reinterpret_cast<const char*>(at.group->packed + at.at * at.group->stride);
      for (int64_t line = 0; line < at.group->stride; line += 64) _mm_prefetch(bytes + line, _MM_HINT_T0);
    }
  }
};

// Up to 32 rows from `begin`, in the model's order, so that threads write to places far from each other; `scratch`
// holds ROWS * SPAN, `sums` [lines, ROWS].
void rows_many(const Part& part, int64_t begin, int64_t count, const Pieces& x, uint16_t* scratch, float* sums) {
  const auto& [w, m, out] = part.product;
  const int64_t c = w.cols, chunks = divide_up(c, CHUNK);
  const bool few = is_few(x.n, c);
  const int64_t span = (few ? FEW_SPAN : SPAN) / CHUNK;
  Place places[ROWS];
  for (int64_t r = 0; r < count; ++r) places[r] = part.place(begin + r);
  for (int64_t first = 0; first < chunks; first += span) {
    const int64_t last = std::min(first + span, chunks), column = first * CHUNK;
    if (few) {
      for (int64_t r = 0; r < count; r += 4) {
        if (!first) part.prefetch(begin + r + FEW_AHEAD, 4);
        for (int64_t i = 0; i < 4; ++i)  // a row past the last one is the last one again
          fill_row(places[std::min(r + i, count - 1)], first, last, c, scratch + i * FEW_ROW);
        all_lines(rows, FEW_LINES, scratch, last * CHUNK - column, x, column, column > 0, sums + r);
      }
    } else {
      const int64_t length = std::min(last * CHUNK, c) - column;
      for (int64_t r = 0; r < ROWS; r += 16)
        fill_pairs(places + r, count - r, first, last, c, scratch + 2 * r);
      if (!first) part.prefetch(begin + ROWS, ROWS);
      all_lines(panel, LINES, scratch, (length + 1) / 2, x, column, column > 0, sums);
    }
  }
  float scale[ROWS] = {}, zero[ROWS] = {};
  for (int64_t r = 0; r < count; ++r) {
    const Group& group = *places[r].group;
    scale[r] = from_bf16(w.row_scale[group.first + places[r].at]);
    zero[r] = group.code == AFFINE ? float(group.zeros[places[r].at] - (1 << (group.width - 1))) : 0.f;
  }
  for (int64_t t = 0; t < x.n; ++t) {
    float* value = sums + t * ROWS;
    if (!x.sums.empty())
      for (int r = 0; r < ROWS; ++r) value[r] -= zero[r] * x.sums[t];
    for (int r = 0; r < ROWS; ++r) value[r] *= scale[r];
    out.put(t, begin, value, count);
  }
}

}  // namespace
#endif

void multiply_many(const std::vector<ManyProduct>& products, const void* x, int64_t n, int threads) {
#if defined(__AVX512F__)
  if (products.empty()) return;
  const int64_t c = products[0].layer.cols;
  const bool sums = std::any_of(products.begin(), products.end(), [](auto& p) { return p.matrix.affine > 0; });
  const Pieces pieces = to_pieces(x, true, nullptr, n, c, sums, !is_few(n, c), threads);
  std::deque<Part> parts;
  int64_t panels = 0;
  for (const ManyProduct& product : products) {
    parts.emplace_back(product, panels);
    panels += divide_up(product.layer.rows, ROWS);
  }
  const int64_t turn = std::max<int64_t>(1, panels / (8 * threads));
  parallel_rows(panels, turn, threads, [&](int64_t from, int64_t to) {
    const Lines<uint16_t> scratch(ROWS * std::min(SPAN, 64 + divide_up(c, CHUNK) * CHUNK));
    const Lines<float> sums(n * ROWS);
    int64_t p = int64_t(parts.size()) - 1;
    while (parts[p].first > from) --p;
    for (int64_t at = from; at < to; ++at) {
      if (p + 1 < int64_t(parts.size()) && parts[p + 1].first == at) ++p;
      const int64_t begin = (at - parts[p].first) * ROWS;
      rows_many(parts[p], begin, std::min<int64_t>(ROWS, products[p].layer.rows - begin), pieces, scratch.data(),
                sums.data());
    }
  });
#else
  (void)products, (void)x, (void)n, (void)threads;
#endif
}
