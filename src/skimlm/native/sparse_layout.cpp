// A stored linear as rows grouped by width, and x as such rows read it.
#include <algorithm>
#include <cstring>

#include "sparse.h"

bool lay_out(const SkimlmSparse& w, Matrix& m) {
  if (w.r < 1 || w.c < 1 || w.sparsity < DENSE || w.sparsity > BITMAP || w.group < 0) return false;
  m = {Sparsity(w.sparsity), w.group > 0, w.r, w.c, w.c, w.positions, 0, w.row_scale, 1, w.c,
       w.order, {}, {}};
  if (m.sparsity != DENSE) m.kept = w.kept;
  if (m.kept < 1 || m.kept > w.c) return false;
  if (m.sparsity == PAIRS) {
    if (w.c % 4 || w.kept != w.c / 2) return false;
    m.places = divide_up(w.c / 4 * 3, 8);
  }
  if (m.sparsity == BITMAP) m.places = divide_up(w.c, 8);
  if (m.grid) {
    m.span = std::min(w.group, w.c);
    m.scales = divide_up(w.c, m.span);
  }
  if (!w.order) {
    m.found.resize(w.r);
    m.order = m.found.data();
  }
  int64_t rows = 0, bytes = 0, levels = 0, zeros = 0;
  for (int b = 1; b <= MAX_B; ++b) {
    const int64_t count =
        w.order ? w.counts[b] : rows_of_width(b, w.widths, w.r, m.found.data() + rows);
    const int64_t stride = divide_up(m.kept * b, 8);
    if (count)
      m.groups.push_back({b, count, rows, w.weight + bytes, w.codebook + levels, w.row_zero + zeros,
                          stride});
    rows += count;
    bytes += count * stride;
    if (!m.grid) (b <= 5 ? levels : zeros) += b <= 5 ? count << b : count;
  }
  return rows == w.r && bytes == w.weight_size && levels == w.codebook_size &&
         zeros == w.zeros_size && w.positions_size == w.r * m.places &&
         w.scale_size == w.r * m.scales;
}

// A of 4 bits. False if the sizes of the adapter are wrong.
bool lay_out_adapter(const SkimlmSparse& w, Matrix& m) {
  if (!w.rank) return !w.a_size && !w.b_size && !w.a_scale_size && !w.b_scale_size;
  if (w.rank < 1 || w.rank > 1 << 16) return false;
  const bool four = w.adapter_bits == 4;
  if (!four && w.adapter_bits != 16) return false;
  const int64_t a = four ? divide_up(w.c, 2) : w.c, b = four ? divide_up(w.r, 2) : w.r;
  const int64_t groups = four ? divide_up(w.c, ADAPTER) : 0;
  if (w.a_size != w.rank * a || w.b_size != w.rank * b || w.a_scale_size != w.rank * groups ||
      w.b_scale_size != w.rank * (four ? divide_up(w.r, ADAPTER) : 0))
    return false;
  if (four)
    m = {DENSE, true, w.rank, w.c, w.c, nullptr, 0, w.lora_a_scale, groups, ADAPTER, nullptr, {},
         {{4, w.rank, 0, static_cast<const uint8_t*>(w.lora_a), nullptr, nullptr, a}}};
  return true;
}

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
