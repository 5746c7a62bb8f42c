// Refinement of codes, masks and codebooks under a full matrix H; the objective of row i is
// (w_hat - w) H (w_hat - w). No step raises it. Readable versions: weights/refine.py.
#include <cmath>
#include <cstring>

#include <vector>

#include "parallel.h"

constexpr uint8_t PRUNED = 255;  // the code of a weight that is 0

void skimlm_coordinate_descent(const float* h, float* gradient, const float* codebook,
                                       const int32_t* sizes, uint8_t* codes, int64_t r, int64_t c,
                                       int64_t k, int64_t sweeps, int threads) {
  parallel_rows(r, 4, threads, [&](int64_t first, int64_t last) {
    float middle[32];  // entry m is nearest between middle[m - 1] and middle[m]
    for (int64_t i = first; i < last; ++i) {
      const float* entry = codebook + i * k;
      uint8_t* code = codes + i * c;
      float* g = gradient + i * c;
      for (int m = 0; m < 32; ++m)
        middle[m] = m + 1 < sizes[i] ? 0.5f * (entry[m] + entry[m + 1]) : INFINITY;
      const int lanes = (sizes[i] + 7) / 8 * 8;
      for (int64_t sweep = 0; sweep < sweeps; ++sweep) {
        int64_t changed = 0;
        for (int64_t j = 0; j < c; ++j) {
          const float hjj = h[j * c + j];
          if (!(hjj > 0)) continue;  // a dead input channel: any code is as good
          const float old = entry[code[j]], want = old - g[j] / hjj;
          int m = 0;
          for (int t = 0; t < lanes; ++t) m += want > middle[t];
          const float value = entry[m];
          // Move only for a strictly smaller error: ties and rounding noise keep the code.
          if (m == code[j] || !(std::fabs(want - value) < std::fabs(want - old))) continue;
          code[j] = static_cast<uint8_t>(m);
          const float step = value - old;
          const float* column = h + j * c;
          for (int64_t t = 0; t < c; ++t) g[t] += step * column[t];
          ++changed;
        }
        if (!changed) break;
      }
    }
  });
}

void skimlm_codebook_step(const float* h, const float* w, const int32_t* sizes,
                                  uint8_t* codes, float* codebook, int64_t r, int64_t c, int64_t k,
                                  double ridge, int threads) {
  parallel_rows(r, 2, threads, [&](int64_t first, int64_t last) {
    std::vector<float> sums;  // [size, c]: sum of the rows of H that share a code
    double a[32][32], b[32], x[32];
    int count[32];
    for (int64_t i = first; i < last; ++i) {
      const int n = sizes[i];
      uint8_t* code = codes + i * c;
      float* entry = codebook + i * k;
      sums.assign(n * c, 0.f);
      std::fill(count, count + n, 0);
      for (int64_t j = 0; j < c; ++j) {
        if (code[j] == PRUNED) continue;
        float* to = sums.data() + code[j] * c;
        const float* from = h + j * c;
        for (int64_t t = 0; t < c; ++t) to[t] += from[t];
        ++count[code[j]];
      }
      double trace = 0;
      for (int m = 0; m < n; ++m) {
        std::fill(a[m], a[m] + n, 0.0);
        b[m] = 0;
        const float* s = sums.data() + m * c;
        for (int64_t t = 0; t < c; ++t) {
          if (code[t] != PRUNED) a[m][code[t]] += s[t];
          b[m] += double(s[t]) * w[i * c + t];
        }
        trace += a[m][m];
      }
      if (!(trace > 0)) continue;
      // Ridge towards the current entries; an unused entry has an empty row and stays where it is.
      for (int m = 0; m < n; ++m) {
        const double pull = count[m] ? ridge * trace / n : trace / n;
        a[m][m] += pull;
        b[m] += pull * entry[m];
      }
      bool ok = true;  // Cholesky in place, lower triangle
      for (int m = 0; m < n && ok; ++m) {
        for (int t = 0; t <= m; ++t) {
          double v = 0.5 * (a[m][t] + a[t][m]);
          if (t == m) v = a[m][m];
          for (int u = 0; u < t; ++u) v -= a[m][u] * a[t][u];
          if (t < m) {
            a[m][t] = v / a[t][t];
          } else if (v > 1e-12 * trace / n) {
            a[m][m] = std::sqrt(v);
          } else {
            ok = false;
          }
        }
      }
      if (!ok) continue;  // singular to working precision: the current entries stay
      for (int m = 0; m < n; ++m) {
        double v = b[m];
        for (int u = 0; u < m; ++u) v -= a[m][u] * x[u];
        x[m] = v / a[m][m];
      }
      for (int m = n - 1; m >= 0; --m) {
        double v = x[m];
        for (int u = m + 1; u < n; ++u) v -= a[u][m] * x[u];
        x[m] = v / a[m][m];
      }
      int order[32], rank[32];
      for (int m = 0; m < n; ++m) order[m] = m;
      std::stable_sort(order, order + n, [&](int p, int q) { return x[p] < x[q]; });
      for (int m = 0; m < n; ++m) rank[order[m]] = m;
      for (int m = 0; m < n; ++m) entry[rank[m]] = static_cast<float>(x[m]);
      for (int64_t j = 0; j < c; ++j)
        if (code[j] != PRUNED) code[j] = static_cast<uint8_t>(rank[code[j]]);
    }
  });
}

namespace {

// One row of a sparse weight: its values are entry[code] * scale of the column's group, or 0.
struct Row {
  const float* entry;
  int size, lanes;
  const float* scale;  // per group of columns
  int64_t group;
  float middle[32];  // entry m is nearest between middle[m - 1] and middle[m]

  float value(uint8_t code, int64_t j) const {
    return code == PRUNED ? 0.f : entry[code] * scale[j / group];
  }
  uint8_t nearest(float want, int64_t j) const {
    const float level = scale[j / group] != 0 ? want / scale[j / group] : 0.f;
    int m = 0;
    for (int t = 0; t < lanes; ++t) m += level > middle[t];
    return static_cast<uint8_t>(m);
  }
};

void move(float step, const float* column, float* g, int64_t c) {
  for (int64_t t = 0; t < c; ++t) g[t] += step * column[t];
}

// The codes of four columns, two of them kept, that are best with all others fixed, if strictly better
// than the present ones: every pair of columns, each at the optimum of the pair rounded one after the
// other, the second knowing how the first was rounded. Returns whether any code changed.
bool best_pair(const Row& row, const float* h, int64_t c, int64_t j, float* g, uint8_t* code) {
  float v[4], b[4];  // values, and the gradient where all four are 0
  for (int p = 0; p < 4; ++p) v[p] = row.value(code[j + p], j + p);
  float now = 0;
  for (int p = 0; p < 4; ++p) {
    const float* line = h + (j + p) * c + j;
    float hv = 0;
    for (int q = 0; q < 4; ++q) hv += line[q] * v[q];
    b[p] = g[j + p] - hv;
    now += v[p] * (b[p] + 0.5f * hv);
  }
  float best = now;
  uint8_t to[4];
  bool found = false;
  for (int p = 0; p < 4; ++p)
    for (int q = p + 1; q < 4; ++q) {
      const float pp = h[(j + p) * c + j + p], qq = h[(j + q) * c + j + q];
      const float pq = h[(j + p) * c + j + q], det = pp * qq - pq * pq;
      if (!(pp > 0) || !(qq > 0) || !(det > 1e-6f * pp * qq)) continue;
      const float u = (pq * b[q] - qq * b[p]) / det, w = (pq * b[p] - pp * b[q]) / det;
      if (0.5f * (b[p] * u + b[q] * w) >= best) continue;  // not even unrounded
      for (int first = 0; first < 2; ++first) {
        const int s = first ? q : p, t = first ? p : q;
        const uint8_t cs = row.nearest(first ? w : u, j + s);
        const float vs = row.value(cs, j + s);
        const uint8_t ct = row.nearest(-(b[t] + pq * vs) / (first ? pp : qq), j + t);
        const float vt = row.value(ct, j + t);
        const float f = vs * (b[s] + 0.5f * (first ? qq : pp) * vs) +
                        vt * (b[t] + 0.5f * (first ? pp : qq) * vt) + pq * vs * vt;
        if (!(f < best)) continue;
        best = f;
        found = true;
        std::fill(to, to + 4, PRUNED);
        to[s] = cs;
        to[t] = ct;
      }
    }
  // Rounding noise must not make two states of equal error take turns.
  if (!found || !(best < now - 1e-6f * std::fabs(now))) return false;
  for (int p = 0; p < 4; ++p) {
    const float step = row.value(to[p], j + p) - v[p];
    code[j + p] = to[p];
    if (step != 0) move(step, h + (j + p) * c, g, c);
  }
  return true;
}

}  // namespace

void skimlm_sparse_descent(const float* h, float* gradient, const float* codebook,
                           const int32_t* sizes, const float* scale, int64_t group, uint8_t* codes,
                           int64_t r, int64_t c, int64_t k, int64_t pairs, int64_t sweeps,
                           int threads) {
  parallel_rows(r, 4, threads, [&](int64_t begin, int64_t end) {
    const int64_t groups = (c + group - 1) / group;
    for (int64_t i = begin; i < end; ++i) {
      Row row{codebook + i * k, sizes[i], (sizes[i] + 7) / 8 * 8, scale + i * groups, group, {}};
      for (int m = 0; m < 32; ++m)
        row.middle[m] = m + 1 < row.size ? 0.5f * (row.entry[m] + row.entry[m + 1]) : INFINITY;
      uint8_t* code = codes + i * c;
      float* g = gradient + i * c;
      for (int64_t sweep = 0; sweep < sweeps; ++sweep) {
        int64_t changed = 0;
        if (pairs)
          for (int64_t j = 0; j < c; j += 4) changed += best_pair(row, h, c, j, g, code);
        for (int64_t j = 0; j < c; ++j) {
          const float hjj = h[j * c + j];
          if (code[j] == PRUNED || !(hjj > 0)) continue;
          const float old = row.value(code[j], j), want = old - g[j] / hjj;
          const uint8_t m = row.nearest(want, j);
          const float value = row.value(m, j);
          if (m == code[j] || !(std::fabs(want - value) < std::fabs(want - old))) continue;
          code[j] = m;
          move(value - old, h + j * c, g, c);
          ++changed;
        }
        if (!changed) break;
      }
    }
  });
}
