// out = x W^T for rows of bytes and several tokens, with VBMI and BF16 (gemm.h): bytes become bfloat16 in cache,
// once for all tokens.
#include "gemm.h"

#if defined(__AVX512F__)
namespace {

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
      _mm_prefetch(reinterpret_cast<const char*>(rows) + AHEAD + j, _MM_HINT_T0);
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
  const bool few = is_few(lines, w.c);
  float* sums = room.sums.data();
  const StoredBytes stored = w.make(begin, begin + count, room.bytes.data(), room.stride, room.scale.data());
  for (int64_t s = 0; s < w.scales; ++s) {
    const int64_t first = s * w.span, end = s + 1 == w.scales ? w.c : first + w.span;
    for (int64_t column = first; column < end; column += few ? FEW_SPAN : SPAN) {
      const int64_t length = std::min(few ? FEW_SPAN : SPAN, end - column);
      const bool add = column > first;
      const int8_t* bytes = stored.at + column;
      for (int64_t r = 0; few && r < count; r += 4) {
        fill_bytes(bytes + r * stored.stride, stored.stride, length, room.scratch.data());
        all_lines(rows, FEW_LINES, room.scratch.data(), length, x, column, add, &room.part[r]);
      }
      if (few) continue;
      for (int64_t r = 0; r < ROWS; r += 16)
        fill_byte_pairs(bytes + r * stored.stride, stored.stride, length, &room.scratch[2 * r]);
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
    if (!w.order) out.put(t, begin, value, count);
    for (int64_t r = 0; w.order && r < count; ++r) out.put(t, w.order[begin + r], value[r]);
  }
}

}  // namespace
#endif

void multiply_many(const ByteRows& w, const void* x, bool bf16, const uint16_t* in_scale, int64_t n,
                   const Output& out, int threads) {
#if defined(__AVX512F__)
  const Pieces pieces = to_pieces(x, bf16, in_scale, n, w.c, false, true, threads);
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
