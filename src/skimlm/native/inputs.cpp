// x as the products read it: floats, integers, or rounded to int8.
#include <algorithm>
#include <cmath>
#include <cstring>

#include "lanes.h"
#include "product.h"

namespace {

constexpr int64_t LONGEST = 1 << 16;  // columns whose sums of bytes fit 32 bits

// Integers of one token; returns their unit.
double integers(const float* x, int64_t c, int32_t* out) {
  int32_t top = 0;  // bits of the largest |x|: they order like the numbers, NaN above all
  for (int64_t j = 0; j < c; ++j) {
    int32_t bits;
    std::memcpy(&bits, x + j, 4);
    top = std::max(top, bits & 0x7fffffff);
  }
  float largest;
  std::memcpy(&largest, &top, 4);
  if (top >= 0x7f800000) {
    std::fill(out, out + c, 0);
    return NAN;
  }
  int exponent;
  std::frexp(largest, &exponent);
  exponent = std::max(exponent - 23, -126);
  if (std::ldexp(largest, -exponent) > 8355711.f) ++exponent;  // 0x7f7f7f: what three bytes hold
  const float inverse = std::ldexp(1.f, -exponent);
  for (int64_t j = 0; j < c; ++j) {
    const float v = x[j] * inverse;
    out[j] = int32_t(v + (v < 0 ? -0.5f : 0.5f));
  }
  return std::ldexp(1., exponent);
}

}  // namespace

Rounded to_rounded(const float* x, int64_t n, int64_t c) {
  Rounded out{n, c, (c + PAIR - 1) / PAIR, {}, {}, {}};
  out.x.resize(n * out.pairs * PAIR);
  out.scales.resize(n * out.pairs);
  out.sums.assign(n, 0.f);
  for (int64_t t = 0; t < n; ++t)
    for (int64_t k = 0; k < out.pairs; ++k) {
      float part[PAIR] = {}, top = 0;
      std::memcpy(part, x + t * c + k * PAIR, std::min(PAIR, c - k * PAIR) * sizeof(float));
      for (float v : part) top = std::max(top, std::fabs(v));
      const float inverse = top > 0 ? 127 / top : 0;
      const int64_t at = t * out.pairs + k;
      out.scales[at] = top / 127;
      int32_t sum = 0;
      for (int h = 0; h < 2; ++h)
        for (int j = 0; j < CHUNK; ++j) {
          const int32_t q = int32_t(std::rint(part[column_of(h, j)] * inverse));
          out.x[at * PAIR + h * CHUNK + j] = int8_t(q);
          sum += q;
        }
      out.sums[t] += out.scales[at] * float(sum);
    }
  return out;
}

std::vector<float> to_floats(const void* x, bool bf16, const uint16_t* in_scale, int64_t n,
                             int64_t c) {
  std::vector<float> out(n * c);
  to_float(x, bf16, n * c, out.data());
  if (in_scale)
    for (int64_t j = 0; j < c; ++j) {
      const float scale = from_fp16(in_scale[j]);
      for (int64_t t = 0; t < n; ++t) out[t * c + j] *= scale;
    }
  return out;
}

Integers room_for(int64_t n, int64_t c, int lines) {
  const int64_t parts = std::max(lines, 1), line = c / parts, unit = lines ? CHUNK : PAIR;
  const int64_t padded = (line + unit - 1) / unit * unit;
  Integers out{n * parts, line, padded / CHUNK, {}, {}, {}, {}};
  out.sums.resize(out.n);
  out.steps.resize(out.n);
  if (skimlm_has_vbmi() && line <= LONGEST)
    out.planes = Lines<int8_t>(out.n * PLANES * padded);
  else
    out.digits.resize(out.n * 2 * padded);
  return out;
}

void fill(Integers& out, int64_t token, const float* x, int lines) {
  const bool paired = lines == 0;
  const int64_t parts = std::max(lines, 1), unit = paired ? PAIR : CHUNK;
  const int64_t line = out.c, padded = out.chunks * CHUNK;
  std::vector<int32_t> all(line * parts), whole(padded);
  const double step = integers(x, line * parts, all.data());
  for (int64_t part = 0; part < parts; ++part) {
    const int64_t t = token * parts + part;
    const int32_t* from = &all[part * line];
    int64_t sum = 0;
    for (int64_t j = 0; j < line; ++j) sum += from[j];
    out.sums[t] = sum;
    out.steps[t] = step;
    std::copy_n(from, line, whole.data());
    if (out.planes) {
      for (int64_t k = 0; k < padded; k += unit)
        for (int64_t h = 0; h < unit / CHUNK; ++h) {
          int32_t q[CHUNK];
          for (int i = 0; i < 8; ++i)  // eight columns at a time, as column_of has them
            std::memcpy(q + i * 8, &whole[k + (paired ? i * 16 + h * 8 : i * 8)], 32);
          int8_t* to = &out.planes[(t * padded + k) * PLANES + h * CHUNK];
          for (int j = 0; j < CHUNK; ++j) {
            const int8_t p0 = int8_t(q[j]);
            const int32_t rest = (q[j] - p0) >> 8;
            const int8_t p1 = int8_t(rest);
            to[j] = p0;
            to[unit + j] = p1;
            to[2 * unit + j] = int8_t((rest - p1) >> 8);
          }
        }
    } else {
      int16_t* to = &out.digits[t * 2 * padded];
      for (int64_t j = 0; j < padded; ++j) {
        const int32_t low = ((whole[j] + 2048) & 4095) - 2048;
        to[j] = int16_t(low);
        to[padded + j] = int16_t((whole[j] - low) >> 12);
      }
    }
  }
}

Integers to_integers(const float* x, int64_t n, int64_t c, int lines) {
  Integers out = room_for(n, c, lines);
  for (int64_t t = 0; t < n; ++t) fill(out, t, x + t * c, lines);
  return out;
}
