// Codes to values and back: look-up, nearest entry, and sums per code.
#include <algorithm>
#include <vector>

#include "codes.h"
#include "guard.h"
#include "lanes.h"
#include "parallel.h"

int skimlm_nearest_codes(const float* w, const float* codebook, const int32_t* sizes, uint8_t* codes,
                         int64_t r, int64_t c, int64_t k, int threads) {
  return guarded([&] {
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
        std::copy_n(at, c, codes + i * c);
      }
    });
  });
}

// With room for another chunk.
#if defined(__AVX512F__)
VBMI static void windows_vbmi(int b, const uint8_t* row, uint8_t* to, int64_t c) {
  const Planes planes(row, b, c);
  const __m512i places = plane_places(b), seven = _mm512_set1_epi8((1 << WINDOW) - 1);
  for (int64_t k = 0; k * CHUNK < c; ++k)
    _mm512_storeu_si512(to + k * CHUNK, _mm512_and_si512(turned(planes.chunk(k, places)), seven));
}
#endif

static void windows_of_row(int b, const uint8_t* row, uint8_t* to, int64_t c) {
#if defined(__AVX512F__)
  if (skimlm_has_vbmi()) return windows_vbmi(b, row, to, c);
#endif
  cut_windows(b, row, to, c);
}

int skimlm_unpack_codes(const uint8_t* packed, uint8_t* codes, int64_t r, int64_t c, int64_t bits,
                        int threads) {
  if (bits < 1 || bits > 8) return MISFIT;
  return guarded([&] {
    const int64_t stride = (c * bits + 7) / 8;
    parallel_rows(r, 32, threads, [&](int64_t first, int64_t last) {
      std::vector<uint8_t> row(c + 8);  // writes eight at a time
      for (int64_t i = first; i < last; ++i) {
        cut_row(int(bits), packed + i * stride, row.data(), c);
        std::copy_n(row.data(), c, codes + i * c);
      }
    });
  });
}

int skimlm_unpack_windows(const uint8_t* packed, uint8_t* windows, int64_t r, int64_t c, int64_t bits,
                          int threads) {
  if (bits < 1 || bits > 4) return MISFIT;
  return guarded([&] {
    const int64_t stride = (c + 7) / 8 * bits;
    parallel_rows(r, 32, threads, [&](int64_t first, int64_t last) {
      std::vector<uint8_t> row(c + CHUNK);
      for (int64_t i = first; i < last; ++i) {
        windows_of_row(int(bits), packed + i * stride, row.data(), c);
        std::copy_n(row.data(), c, windows + i * c);
      }
    });
  });
}

int skimlm_lookup_bf16(const uint8_t* codes, const float* codebook, uint16_t* out, int64_t r, int64_t c,
                       int64_t k, int threads) {
  return guarded([&] {
    parallel_rows(r, 32, threads, [&](int64_t first, int64_t last) {
      uint16_t entry[256];
      for (int64_t i = first; i < last; ++i) {
        for (int64_t m = 0; m < k; ++m) entry[m] = to_bf16(codebook[i * k + m]);
        const uint8_t* code = codes + i * c;
        uint16_t* to = out + i * c;
        for (int64_t j = 0; j < c; ++j) to[j] = entry[code[j]];
      }
    });
  });
}

int skimlm_reduce_bf16(const uint8_t* codes, const uint16_t* gradient, float* out, int64_t r, int64_t c,
                       int64_t k, int threads) {
  return guarded([&] {
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
  });
}
