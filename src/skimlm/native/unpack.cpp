// The dense matrix of a stored linear, row by row.
#include <cstring>
#include <vector>

#include "sparse_any.h"
#include "sparse_bytes.h"

namespace {

#if defined(__AVX512F__)
// One row of width b <= 5 as bfloat16: its levels are scaled and rounded once, then looked up.
VBMI void dense_row(const uint8_t* row, const int8_t* levels, int b, float scale, uint16_t* to,
                    int64_t c, const Controls& k) {
  alignas(64) uint16_t entry[32];
  for (int m = 0; m < 32; ++m) entry[m] = to_bf16(float(levels[m & ((1 << b) - 1)]) * scale);
  const __m512i table = _mm512_load_si512(entry);
  const __m512i first = _mm512_setr_epi64(0, 8, 1, 9, 2, 10, 3, 11);
  const __m512i second = _mm512_setr_epi64(4, 12, 5, 13, 6, 14, 7, 15);
  const int64_t stride = (c * b + 7) / 8, chunks = (c + CHUNK - 1) / CHUNK;
  for (int64_t i = 0; i < chunks; ++i, row += 8 * b, to += CHUNK) {
    const bool last = i + 1 == chunks;
    const __mmask64 mask = last ? last_mask(stride, chunks, b) : k.bytes;
    const __m512i lanes = _mm512_permutexvar_epi8(k.spread, load_chunk(row, mask));
    const __m512i low =
        _mm512_permutexvar_epi16(_mm512_multishift_epi64_epi8(k.low, lanes), table);
    const __m512i high =
        _mm512_permutexvar_epi16(_mm512_multishift_epi64_epi8(k.high, lanes), table);
    const int64_t left = last ? c - i * CHUNK : CHUNK;
    const uint64_t keep = left == 64 ? ~uint64_t(0) : (uint64_t(1) << left) - 1;
    _mm512_mask_storeu_epi16(to, __mmask32(keep), _mm512_permutex2var_epi64(low, first, high));
    _mm512_mask_storeu_epi16(to + 32, __mmask32(keep >> 32),
                             _mm512_permutex2var_epi64(low, second, high));
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

}  // namespace

void skimlm_unpack(const uint8_t* packed, const uint8_t* widths, const int8_t* codebook,
                   const uint16_t* row_scale, const int16_t* row_zero, const uint16_t* in_scale,
                   void* out, int64_t out_bf16, int64_t r, int64_t c, int64_t begin, int64_t end,
                   int64_t stored, int threads) {
  struct Group {
    int64_t first, bytes, levels;  // where the rows of a width begin: among rows, codes, levels or zeros
  } group[10] = {};
  std::vector<int32_t> order(r);
  int64_t rows = 0, bytes = 0, levels = 0, zeros = 0;
  for (int b = 1; b <= 8; ++b) {
    group[b] = {rows, bytes, b <= 5 ? levels : zeros};
    const int64_t count = rows_of_width(b, widths, r, order.data() + rows);
    rows += count;
    bytes += count * ((c * b + 7) / 8);
    (b <= 5 ? levels : zeros) += b <= 5 ? count << b : count;
  }
  std::vector<float> column(in_scale ? c : 0);
  for (size_t j = 0; j < column.size(); ++j) column[j] = from_fp16(in_scale[j]);

#if defined(__AVX512F__)
  const bool vbmi = skimlm_has_vbmi() && out_bf16 && !in_scale;
  Controls control[6];
  for (int b = 1; vbmi && b <= 5; ++b) control[b] = controls(b);
#endif
  parallel_rows(end - begin, 16, threads, [&](int64_t from, int64_t to) {
    std::vector<uint8_t> code(c + 8);
    std::vector<float> value(c);
    for (int64_t i = begin + from; i < begin + to; ++i) {
      const int b = widths[order[i]];
      const int64_t nth = i - group[b].first, target = (stored ? i - begin : order[i]) * c;
      const uint8_t* row = packed + group[b].bytes + nth * ((c * b + 7) / 8);
      const int64_t level = group[b].levels + (b <= 5 ? nth << b : nth);
      const float scale = from_bf16(row_scale[i]);
#if defined(__AVX512F__)
      if (vbmi && b <= 5) {
        dense_row(row, codebook + level, b, scale, static_cast<uint16_t*>(out) + target, c,
                  control[b]);
        continue;
      }
#endif
      cut_row[b](row, code.data(), c);
      float entry[32];
      if (b <= 5) {
        for (int m = 0; m < 1 << b; ++m) entry[m] = float(codebook[level + m]) * scale;
        for (int64_t j = 0; j < c; ++j) value[j] = entry[code[j]];
      } else {
        const float zero = row_zero[level];
        for (int64_t j = 0; j < c; ++j) value[j] = (float(code[j]) - zero) * scale;
      }
      if (in_scale)
        for (int64_t j = 0; j < c; ++j) value[j] *= column[j];
      from_float(value.data(), out_bf16, c, static_cast<char*>(out) + target * (out_bf16 ? 2 : 4));
    }
  });
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
