// x as sparse rows and grids read it.
#include <algorithm>
#include <cstring>

#include "sparse.h"

Input to_input(const Integers& x, const Matrix& m) {
  Input in{x, m.sparsity, is_narrow(m), m.span, {}, {}, {}, {}, {}};
  if (!x.planes) return in;
  const int64_t padded = x.chunks * CHUNK;
  in.sums.resize(x.n * m.scales);
  if (is_narrow(m)) in.lanes = Lines<int32_t>(x.n * m.scales * 16);
  std::vector<int32_t> whole(padded + CHUNK);
  for (int64_t t = 0; t < x.n; ++t) {
    for (int64_t k = 0; k < x.chunks; ++k) {
      const int8_t* p = &x.planes[(t * x.chunks + k) * PLANES * CHUNK];
      for (int64_t j = 0; j < CHUNK; ++j)
        whole[k * CHUNK + j] = p[j] + p[CHUNK + j] * 256 + p[2 * CHUNK + j] * 65536;
    }
    for (int64_t s = 0; s < m.scales; ++s) {
      int64_t sum = 0;
      for (int64_t j = s * m.span, end = m.end_of(s); j < end; ++j) sum += whole[j];
      in.sums[t * m.scales + s] = sum;
      if (!in.lanes) continue;
      uint32_t lane[16] = {};
      for (int64_t j = 0; j < m.span && s * m.span + j < padded; j += CHUNK)
        for (int64_t i = 0; i < CHUNK; ++i) lane[i / 4] += uint32_t(whole[s * m.span + j + i]);
      std::memcpy(&in.lanes[(t * m.scales + s) * 16], lane, sizeof lane);
    }
  }
  if (m.sparsity == PAIRS && x.n == 1) {
    const int64_t units = divide_up(x.chunks, 2);
    in.biased = Lines<uint8_t>(units * PLANES * UNIT);
    for (int64_t k = 0; k < units; ++k)
      for (int p = 0; p < PLANES; ++p) {
        uint8_t* to = &in.biased[(k * PLANES + p) * UNIT];
        const int32_t* from = &whole[k * UNIT];
        for (int64_t j = 0; j < UNIT; ++j) to[j] = uint8_t((from[j] + (1 << 23)) >> 8 * p);
      }
  }
  if (m.sparsity == DENSE && x.n == 1 && is_narrow(m)) {
    const int64_t units = divide_up(x.chunks, 2);
    in.paired = Lines<int8_t>(units * PLANES * UNIT);
    in.paired_lanes = Lines<int32_t>(units * 16);
    for (int64_t k = 0; k < units; ++k) {
      uint32_t lane[16] = {};
      for (int64_t j = 0; j < UNIT; j += 8) {  // eight columns that stay side by side
        const int64_t at = k * UNIT + column_of(j / CHUNK, j % CHUNK);
        const int8_t* p = &x.planes[at / CHUNK * PLANES * CHUNK + at % CHUNK];
        for (int q = 0; q < PLANES; ++q) {
          int8_t* to = &in.paired[(k * PLANES + q) * UNIT + j];
          if (at < padded)
            std::memcpy(to, p + q * CHUNK, 8);
          else
            std::memset(to, 0, 8);
        }
        for (int64_t i = 0; i < 8; ++i) lane[(j + i) % CHUNK / 4] += uint32_t(whole[at + i]);
      }
      std::memcpy(&in.paired_lanes[k * 16], lane, sizeof lane);
    }
  }
  return in;
}
