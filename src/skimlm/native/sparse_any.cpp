// Rows times x on any processor: a row becomes integers, 0 where pruned, then one dot product per scale and
// token.
#include "sparse_any.h"

static int64_t dot(const int16_t* level, const int16_t* digit, int64_t begin, int64_t end) {
  int64_t sum = 0;
  for (int64_t j = begin; j < end; j += 512) {  // 512 products of 9 and 12 bits fit 32
    int32_t part = 0;
    const int64_t stop = std::min(j + 512, end);
    for (int64_t t = j; t < stop; ++t) part += int32_t(level[t]) * digit[t];
    sum += part;
  }
  return sum;
}

void rows_any(const Matrix& m, const Group& g, int64_t begin, int64_t end, const Input& in,
              const Output& out) {
  const Integers& x = in.x;
  const int64_t padded = x.chunks * CHUNK;
  const bool affine = g.code == AFFINE;
  Numbers<int16_t> numbers(m);
  std::vector<int16_t> ones(affine ? m.c : 0);
  for (int64_t i = begin; i < end; ++i) {
    const int64_t stored = g.first + i, row = m.row(stored);
    int16_t entry[256];
    g.entries(i, entry);
    const int16_t* level = numbers.row(m, g, i, entry);
    if (affine) ones_any(m, stored, ones.data());
    for (int64_t t = 0; t < x.n; ++t) {
      const int16_t* digit = &x.digits[t * 2 * padded];
      Value value;
      for (int64_t s = 0; s < m.scales; ++s) {
        const int64_t from = s * m.span, to = m.end_of(s);
        auto times = [&](const int16_t* l) {
          return dot(l, digit, from, to) + dot(l, digit + padded, from, to) * 4096;
        };
        int64_t total = times(level);
        if (affine) total -= g.zeros[i] * times(ones.data());
        value.add(total, m.row_scale[stored * m.scales + s]);
      }
      out.put(t, row, float(value.sum * x.steps[t]));
    }
  }
}
