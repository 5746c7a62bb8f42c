// Codes to values and back: look-up, nearest entry, sums per code, packed rows to dense rows.
#include <cmath>
#include <cstring>

#include "parallel.h"

namespace {

inline uint16_t to_bf16(float x) {  // round to nearest, ties to even; NaN is never passed in
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

inline float from_bf16(uint16_t x) {
  uint32_t bits = uint32_t(x) << 16;
  float out;
  std::memcpy(&out, &bits, 4);
  return out;
}

}  // namespace

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

void skimlm_unpack_rows(const uint8_t* packed, const int64_t* offsets, const uint8_t* widths,
                                const int64_t* target, const float* table, const float* scale,
                                const float* zero, const float* in_scale, void* out, int64_t out_bf16,
                                int64_t r, int64_t c, int threads) {
  parallel_rows(r, 16, threads, [&](int64_t first, int64_t last) {
    std::vector<uint8_t> bytes(c + 8), code(c + 8);
    std::vector<float> value(c + 8);
    for (int64_t i = first; i < last; ++i) {
      const int b = widths[i];
      const int64_t n = (c * b + 7) / 8, whole = n / b * b;
      const uint8_t* row = packed + offsets[i];
      const uint64_t mask = (1u << b) - 1;
      // Eight codes are b whole bytes; the rest of the row goes through a padded copy.
      int64_t at = 0, j = 0;
      uint8_t tail[16] = {0};
      for (; j < c; j += 8, at += b) {
        uint64_t word = 0;
        if (at + b <= whole) {
          std::memcpy(&word, row + at, b);
        } else {
          std::memcpy(tail, row + at, n - at);
          std::memcpy(&word, tail, b);
        }
        for (int t = 0; t < 8; ++t) code[j + t] = uint8_t((word >> (b * t)) & mask);
      }
      if (b <= 5) {
        const float* entry = table + i * 32;
        for (int64_t t = 0; t < c; ++t) value[t] = entry[code[t]];
      } else {
        for (int64_t t = 0; t < c; ++t) value[t] = (float(code[t]) - zero[i]) * scale[i];
      }
      if (in_scale)
        for (int64_t t = 0; t < c; ++t) value[t] *= in_scale[t];
      if (out_bf16) {
        uint16_t* to = static_cast<uint16_t*>(out) + target[i] * c;
        for (int64_t t = 0; t < c; ++t) to[t] = to_bf16(value[t]);
      } else {
        std::memcpy(static_cast<float*>(out) + target[i] * c, value.data(), c * sizeof(float));
      }
    }
  });
}
