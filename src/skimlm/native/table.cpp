// out = x T^T for a table of 8 or 4 bits with a scale per row (runtime/tables.py, FORMAT.md).
//
// Several tokens in bfloat16 are multiplied in it (gemm.cpp), others like the packed linears (product.h): x as
// 24-bit integers, so sums are exact. At 4 bits even columns are the low nibbles and odd ones the high: x in two
// halves, one after the other.
#include <algorithm>
#include <cstring>

#include "guard.h"
#include "lanes.h"
#include "parallel.h"
#include "product.h"

namespace {

struct Table {
  const uint8_t* codes;
  int64_t bits, bytes, r;  // bytes of a row
  const uint16_t* scale;
};

int64_t dot(const Table& table, const uint8_t* row, const int16_t* digit, int64_t half) {
  int64_t sum = 0;
  for (int64_t j = 0; j < table.bytes; j += 512) {  // products of 8 and 12 bits
    int32_t part = 0;
    const int64_t end = std::min<int64_t>(j + 512, table.bytes);
    if (table.bits == 8)
      for (int64_t k = j; k < end; ++k) part += int32_t(int8_t(row[k])) * digit[k];
    else
      for (int64_t k = j; k < end; ++k)
        part += int32_t(row[k] & 15) * digit[k] + int32_t(row[k] >> 4) * digit[half + k];
    sum += part;
  }
  return sum;
}

#if defined(__AVX512F__)
// The sums of rows i.. of R, for one token.
template <int R, int BITS>
VBMI void planes(const Table& table, int64_t i, const int8_t* x, int64_t half,
                 int64_t (&total)[R]) {
  __m512i sum[R][PLANES];
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r) sum[r][0] = sum[r][1] = sum[r][2] = _mm512_setzero_si512();
  const uint8_t* at = table.codes + i * table.bytes;
  for (int64_t j = 0; j < table.bytes; j += CHUNK, x += PLANES * CHUNK) {
    const __mmask64 mask = first_bytes(table.bytes - j);
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r)
      _mm_prefetch(reinterpret_cast<const char*>(at) + AHEAD + j * R + r * CHUNK, _MM_HINT_T0);
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      const __m512i bytes = _mm512_maskz_loadu_epi8(mask, at + r * table.bytes + j);
      if constexpr (BITS == 8) {
        const __m512i code = _mm512_xor_si512(bytes, _mm512_set1_epi8(char(128)));
        for (int p = 0; p < PLANES; ++p)
          add_dot(sum[r][p], code, _mm512_loadu_si512(x + p * CHUNK));
      } else {
        const __m512i nibble = _mm512_set1_epi8(15);
        const __m512i even = _mm512_and_si512(bytes, nibble);
        const __m512i odd = _mm512_and_si512(_mm512_srli_epi16(bytes, 4), nibble);
        for (int p = 0; p < PLANES; ++p) {
          add_dot(sum[r][p], even, _mm512_loadu_si512(x + p * CHUNK));
          add_dot(sum[r][p], odd, _mm512_loadu_si512(x + half + p * CHUNK));
        }
      }
    }
  }
  add_planes<R>(sum, total);
}

template <int R>
VBMI void rows_vbmi(const Table& table, int64_t i, const Integers& x, int halves,
                    const Output& out) {
  const int64_t half = x.chunks * PLANES * CHUNK;  // x of a token is `halves` lines of this length
  const int64_t offset = table.bits == 8 ? 128 : 8;
  for (int64_t t = 0; t < x.n / halves; ++t) {
    int64_t total[R];
    (table.bits == 8 ? planes<R, 8> : planes<R, 4>)(table, i, &x.planes[t * halves * half], half,
                                                    total);
    int64_t sum = 0;
    for (int h = 0; h < halves; ++h) sum += x.sums[t * halves + h];
    for (int r = 0; r < R; ++r)
      out.put(t, i + r, to_value(total[r], offset, sum, from_bf16(table.scale[i + r]),
                                 x.steps[t * halves]));
  }
}
#endif

ByteRows byte_rows(const Table& table, int64_t c) {
  auto make = [&table, c](int64_t begin, int64_t end, int8_t* room, int64_t stride, float* scale) -> StoredBytes {
    const uint8_t* row = table.codes + begin * table.bytes;
    for (int64_t i = begin; i < end; ++i) scale[i - begin] = from_bf16(table.scale[i]);
    if (table.bits == 8 && c % CHUNK == 0 && end - begin == PANEL) return {reinterpret_cast<const int8_t*>(row), c};
    for (int8_t* to = room; begin < end; ++begin, row += table.bytes, to += stride) {
      if (table.bits == 8) {
        std::memcpy(to, row, c);
        continue;
      }
      for (int64_t j = 0; j < c; ++j) to[j] = int8_t((row[j / 2] >> j % 2 * 4 & 15) - 8);
    }
    return {room, stride};
  };
  return {table.r, c, 1, c, nullptr, make};
}

}  // namespace

int skimlm_table_matmul(const void* x, int64_t x_bf16, const uint8_t* codes, int64_t bits,
                        const uint16_t* scale, void* out, int64_t n, int64_t r, int64_t c,
                        int64_t exact, int threads) {
  return guarded([&] {
    const int halves = bits == 8 ? 1 : 2;
    const Table table{codes, bits, bits == 8 ? c : (c + 1) / 2, r, scale};
    const Output output{out, x_bf16 != 0, r, nullptr};
    if (!exact && x_bf16 && n >= IN_BF16 && skimlm_has_vbmi())
      return multiply_many(byte_rows(table, c), x, true, nullptr, n, output, threads), DONE;
    const std::vector<float> values = to_floats(x, x_bf16, nullptr, n, c);
    std::vector<float> ordered(n * halves * table.bytes);
    for (int64_t t = 0; t < n; ++t)
      for (int64_t j = 0; j < c; ++j)
        ordered[(t * halves + j % halves) * table.bytes + j / halves] = values[t * c + j];
    // both halves of a token in one unit
    const Integers integers = to_integers(ordered.data(), n, halves * table.bytes, halves);
    const int64_t turn = std::max(WORK, r * table.bytes / (TURNS * threads));
    const int64_t block = std::max<int64_t>(4, turn / table.bytes / 4 * 4);
    parallel_rows(r, block, threads, [&](int64_t begin, int64_t end) {
      int64_t i = begin;
  #if defined(__AVX512F__)
      if (integers.planes) {
        for (; i + 4 <= end; i += 4) rows_vbmi<4>(table, i, integers, halves, output);
        for (; i < end; ++i) rows_vbmi<1>(table, i, integers, halves, output);
        return;
      }
  #endif
      const int64_t padded = integers.chunks * CHUNK;
      for (; i < end; ++i)
        for (int64_t t = 0; t < n; ++t) {
          const int16_t* digit = &integers.digits[t * halves * 2 * padded];
          const uint8_t* row = codes + i * table.bytes;
          const int64_t total = dot(table, row, digit, 2 * padded) +
                                dot(table, row, digit + padded, 2 * padded) * 4096;
          int64_t sum = 0;
          for (int h = 0; h < halves; ++h) sum += integers.sums[t * halves + h];
          output.put(t, i, to_value(total, bits == 8 ? 0 : 8, sum, from_bf16(scale[i]),
                                    integers.steps[t * halves]));
        }
    });
    return DONE;
  });
}
