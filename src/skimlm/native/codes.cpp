// Codes to values and back: look-up, nearest entry, sums per code, packed rows to dense rows.
#include <cstring>
#include <vector>

#include "codes.h"
#include "lanes.h"
#include "parallel.h"

void skimlm_nearest_codes(const float* w, const float* codebook, const int32_t* sizes,
                                  uint8_t* codes, int64_t r, int64_t c, int64_t k, int threads) {
  parallel_rows(r, 16, threads, [&](int64_t first, int64_t last) {
    std::vector<uint8_t> count(c);
    for (int64_t i = first; i < last; ++i) {
      const float* entry = codebook + i * k;
      const float* x = w + i * c;
      std::fill(count.begin(), count.end(), 0);
      uint8_t* at = count.data();
      for (int m = 0; m + 1 < sizes[i]; ++m) {
        const float middle = 0.5f * (entry[m] + entry[m + 1]);
        for (int64_t j = 0; j < c; ++j) at[j] += x[j] > middle;
      }
      std::memcpy(codes + i * c, at, c);
    }
  });
}

void skimlm_lookup_bf16(const uint8_t* codes, const float* codebook, uint16_t* out, int64_t r,
                                int64_t c, int64_t k, int threads) {
  parallel_rows(r, 32, threads, [&](int64_t first, int64_t last) {
    uint16_t entry[256];
    for (int64_t i = first; i < last; ++i) {
      for (int64_t m = 0; m < k; ++m) entry[m] = to_bf16(codebook[i * k + m]);
      const uint8_t* code = codes + i * c;
      uint16_t* to = out + i * c;
      for (int64_t j = 0; j < c; ++j) to[j] = entry[code[j]];
    }
  });
}

void skimlm_reduce_bf16(const uint8_t* codes, const uint16_t* gradient, float* out, int64_t r,
                                int64_t c, int64_t k, int threads) {
  parallel_rows(r, 32, threads, [&](int64_t first, int64_t last) {
    float sum[4][256];  // four partial sums hide the latency of adding to the same entry
    for (int64_t i = first; i < last; ++i) {
      for (auto& s : sum) std::fill(s, s + k, 0.f);
      const uint8_t* code = codes + i * c;
      const uint16_t* g = gradient + i * c;
      int64_t j = 0;
      for (; j + 4 <= c; j += 4)
        for (int t = 0; t < 4; ++t) sum[t][code[j + t]] += from_bf16(g[j + t]);
      for (; j < c; ++j) sum[0][code[j]] += from_bf16(g[j]);
      for (int64_t m = 0; m < k; ++m)
        out[i * k + m] = (sum[0][m] + sum[1][m]) + (sum[2][m] + sum[3][m]);
    }
  });
}

#if defined(__AVX512F__)
namespace {

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

}  // namespace
#endif

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
