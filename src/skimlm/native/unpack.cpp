// The dense matrix of a stored linear, row by row.
#include <algorithm>
#include <optional>
#include <vector>

#include "parallel.h"
#include "sparse_any.h"
#include "sparse_bytes.h"

namespace {

#if defined(__AVX512F__)
// A table of 2^b levels as bfloat16, to be looked up by the low bits of 16-bit lanes.
struct Bf16Table {
  __m512i at;
  VBMI Bf16Table(const int8_t* levels, int b, float scale) {
    alignas(64) uint16_t entry[32];
    for (int m = 0; m < 32; ++m) entry[m] = to_bf16(float(levels[m & ((1 << b) - 1)]) * scale);
    at = _mm512_load_si512(entry);
  }
  VBMI __m512i operator()(__m512i code) const { return _mm512_permutexvar_epi16(code, at); }
};

// 64 columns, or the last `left` of a row.
VBMI inline void put_chunk(__m512i first, __m512i second, int64_t left, uint16_t* to) {
  const __mmask64 keep = first_bytes(left);
  _mm512_mask_storeu_epi16(to, __mmask32(keep), first);
  _mm512_mask_storeu_epi16(to + 32, __mmask32(keep >> 32), second);
}

// One row of width b <= 5 as bfloat16: its levels, scaled and rounded once, are looked up.
VBMI void dense_row(const uint8_t* row, const Bf16Table& table, int b, uint16_t* to, int64_t c, const Controls& k) {
  const __m512i first = _mm512_setr_epi64(0, 8, 1, 9, 2, 10, 3, 11);
  const __m512i second = _mm512_setr_epi64(4, 12, 5, 13, 6, 14, 7, 15);
  const int64_t stride = (c * b + 7) / 8, chunks = (c + CHUNK - 1) / CHUNK;
  for (int64_t i = 0; i < chunks; ++i, row += 8 * b, to += CHUNK) {
    const bool last = i + 1 == chunks;
    const __mmask64 mask = last ? last_mask(stride, chunks, b) : k.bytes;
    const __m512i lanes = _mm512_permutexvar_epi8(k.spread, load_chunk(row, mask));
    const __m512i low = table(_mm512_multishift_epi64_epi8(k.low, lanes));
    const __m512i high = table(_mm512_multishift_epi64_epi8(k.high, lanes));
    put_chunk(_mm512_permutex2var_epi64(low, first, high), _mm512_permutex2var_epi64(low, second, high),
              c - i * CHUNK, to);
  }
}

// The same of a trellis.
VBMI void trellis_row(const uint8_t* row, const Bf16Trellis& table, int b, uint16_t* to, int64_t c) {
  const Planes planes(row, b, c);
  const __m512i places = mixed_places(b);
  for (int64_t k = 0; k * CHUNK < c; ++k, to += CHUNK) {
    __m512i low, high;
    table(turned(planes.chunk(k, places)), &low, &high);
    put_chunk(low, high, c - k * CHUNK, to);
  }
}
#endif

// Levels of one row after the other: float [c], 0 where pruned.
struct Levels {
  const Matrix& m;
  Numbers<float> numbers;
  std::vector<float> level;
  explicit Levels(const Matrix& m) : m(m), numbers(m), level(m.c) {}

  const float* row(const Group& g, int64_t i) {
    const bool affine = g.code == AFFINE;
#if defined(__AVX512F__)
    if (skimlm_has_vbmi()) {
      if (cut.width != g.width) cut = Bytes(g.width);
      const int offset = affine ? g.zeros[i] : g.code == GRID ? 1 << (g.width - 1) : 128;
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
    g.entries(i, entry);
    for (int k = 0; affine && k < 1 << g.width; ++k) entry[k] -= float(g.zeros[i]);
    return numbers.row(m, g, i, entry);
  }

 private:
#if defined(__AVX512F__)
  Bytes cut{1};
  Room room{m.c};
#endif
};

// Rows first..last of a group, each to where `place` says.
void unpack_rows(const SkimlmLayer& w, const Matrix& m, const Group& g, int64_t first, int64_t last,
                 const std::vector<float>& column, std::optional<Levels>& levels,
                 std::vector<float>& value, bool bf16, const auto& place) {
#if defined(__AVX512F__)
  const bool dense = bf16 && skimlm_has_vbmi() && column.empty() && m.sparsity == DENSE &&
                     (g.code == TABLE || g.code == TRELLIS);
  const Controls control = dense ? controls(g.width) : Controls{};
  for (int64_t i = first; dense && i < last; ++i) {
    const float scale = from_bf16(w.row_scale[g.first + i]);
    const uint8_t* row = g.packed + i * g.stride;
    uint16_t* to = static_cast<uint16_t*>(place(g.first + i));
    if (g.code == TABLE)
      dense_row(row, Bf16Table(g.levels + (i << g.width), g.width, scale), g.width, to, m.c, control);
    else
      trellis_row(row, Bf16Trellis(g.levels, scale), g.width, to, m.c);
  }
  if (dense) return;
#endif
  if (!levels) levels.emplace(m);
  value.resize(m.c);
  for (int64_t i = first; i < last; ++i) {
    const int64_t at = g.first + i;
    const float* level = levels->row(g, i);
    for (int64_t s = 0; s < m.scales; ++s) {
      const float scale = from_bf16(w.row_scale[at * m.scales + s]);
      for (int64_t j = s * m.span; j < m.end_of(s); ++j) value[j] = level[j] * scale;
    }
    for (size_t j = 0; j < column.size(); ++j) value[j] *= column[j];
    from_float(value.data(), bf16, m.c, place(at));
  }
}

// Factors of columns; empty if there are none.
std::vector<float> columns_of(const SkimlmLayer& w) {
  std::vector<float> column(w.in_scale ? w.cols : 0);
  for (size_t j = 0; j < column.size(); ++j) column[j] = from_fp16(w.in_scale[j]);
  return column;
}

}  // namespace

void unpack(const SkimlmLayer& w, const Matrix& m, void* out, bool bf16, int64_t begin, int64_t end,
            bool stored, int threads) {
  const std::vector<float> column = columns_of(w);
  const auto place = [&](int64_t at) -> void* {
    const int64_t row = stored ? at - begin : m.row(at);
    return static_cast<char*>(out) + row * m.c * (bf16 ? 2 : 4);
  };
  parallel_rows(end - begin, 16, threads, [&](int64_t from, int64_t to) {
    std::optional<Levels> levels;
    std::vector<float> value;
    for (const Group& g : m.groups) {
      const int64_t first = std::max<int64_t>(begin + from - g.first, 0);
      const int64_t last = std::min(begin + to - g.first, g.rows);
      if (first < last) unpack_rows(w, m, g, first, last, column, levels, value, bf16, place);
    }
  });
}

void unpack_each(const SkimlmLayer& w, const Matrix& m, const int32_t* places, int64_t count, void* out, bool bf16,
                 int threads) {
  const std::vector<float> column = columns_of(w);
  parallel_rows(count, 16, threads, [&](int64_t from, int64_t to) {
    std::optional<Levels> levels;
    std::vector<float> value;
    for (int64_t k = from; k < to; ++k) {
      const auto place = [&](int64_t) -> void* { return static_cast<char*>(out) + k * m.c * (bf16 ? 2 : 4); };
      auto g = m.groups.begin();
      while (places[k] >= g->first + g->rows) ++g;
      const int64_t i = places[k] - g->first;
      unpack_rows(w, m, *g, i, i + 1, column, levels, value, bf16, place);
    }
  });
}
