// Refinement of codes and codebooks under a full matrix H; the objective of row i is
// (w_hat - w) H (w_hat - w). Both steps never raise it. Readable versions: weights/refine.py.
#include <cmath>
#include <cstring>

#include <vector>

#include "parallel.h"

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
          a[m][code[t]] += s[t];
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
      for (int64_t j = 0; j < c; ++j) code[j] = static_cast<uint8_t>(rank[code[j]]);
    }
  });
}
