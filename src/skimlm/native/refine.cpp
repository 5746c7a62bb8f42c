// Refinement of codes, masks and codebooks under a full matrix H; the objective of row i is
// (w_hat - w) H (w_hat - w). No step raises it. Readable versions: quantize/refine.py.
//
// H does not fit in the caches where models are large, and every row of a weight needs all of it. So
// many rows go through a tile of H while it is there: columns are taken 64 at a time, changes within
// them at once, what they do to the gradient of all other columns afterwards. Every sum is made in the
// order of the columns, as if rows came one by one.
#include <algorithm>
#include <cmath>
#include <cstring>

#include <vector>

#include "guard.h"
#include "parallel.h"
#include "product.h"
#include "tile.h"

#if defined(__AVX512F__)
#include <immintrin.h>
#endif

constexpr uint8_t PRUNED = 255;  // the code of a weight that is 0

namespace {

constexpr int64_t SUMS = int64_t(1) << 23;  // floats that a thread may hold of `step_rows`

// A row's codebook: entry m is nearest between middle[m - 1] and middle[m].
struct Book {
  const float* entry;
  int lanes;
  float middle[32];

  Book(const float* entry, int size) : entry(entry), lanes((size + 7) / 8 * 8) {
    for (int m = 0; m < 32; ++m)
      middle[m] = m + 1 < size ? 0.5f * (entry[m] + entry[m + 1]) : INFINITY;
  }
  int nearest(float value) const {
#if defined(__AVX512F__)
    const __m512 v = _mm512_set1_ps(value);
    int m = __builtin_popcount(_mm512_cmp_ps_mask(v, _mm512_loadu_ps(middle), _CMP_GT_OQ));
    if (lanes > 16)
      m += __builtin_popcount(_mm512_cmp_ps_mask(v, _mm512_loadu_ps(middle + 16), _CMP_GT_OQ));
    return m;
#else
    int m = 0;
    for (int t = 0; t < lanes; ++t) m += value > middle[t];
    return m;
#endif
  }
};

// Best codes of the columns of a corner of H, one after the other; g [64] and `change` follow.
int descend_corner(const Book& book, const Tile& corner, int64_t columns, float* g, uint8_t* code,
                   Change* change) {
  int count = 0;
  for (int64_t j = 0; j < columns; ++j) {
    const float hjj = corner.row(j)[j];
    if (!(hjj > 0)) continue;  // a dead input channel: any code is as good
    const float old = book.entry[code[j]], want = old - g[j] / hjj;
    const int m = book.nearest(want);
    const float value = book.entry[m];
    // Move only for a strictly smaller error: ties and rounding noise keep the code.
    if (m == code[j] || !(std::fabs(want - value) < std::fabs(want - old))) continue;
    code[j] = static_cast<uint8_t>(m);
    change[count] = {int32_t(j), value - old};
    add_changes(change + count++, 1, corner, g);
  }
  return count;
}

// `sweeps` passes over rows of the same H; gradient and codes [rows, c].
void descend_rows(const float* h, float* gradient, const std::vector<Book>& books, uint8_t* codes,
                  int64_t c, int64_t sweeps) {
  const int64_t rows = int64_t(books.size());
  const Lines<float> g(sides(c) * rows * SIDE);  // [sides, rows, 64]: see `Tile`
  auto each_side = [&](auto copy) {
    for (int64_t t = 0; t < c; t += SIDE)
      for (int64_t i = 0; i < rows; ++i)
        copy(gradient + i * c + t, &g[t * rows + i * SIDE], std::min(SIDE, c - t));
  };
  std::fill(g.data(), g.data() + sides(c) * rows * SIDE, 0.f);
  each_side([](const float* from, float* to, int64_t n) { std::copy(from, from + n, to); });
  std::vector<Change> changes(rows * SIDE);
  std::vector<int> count(rows);
  std::vector<int64_t> changed(rows, 1);  // in the last sweep
  Tile tile;
  for (int64_t sweep = 0; sweep < sweeps; ++sweep) {
    std::vector<int64_t> before(rows, 0);
    before.swap(changed);
    for (int64_t j = 0; j < c; j += SIDE) {
      int64_t total = 0;
      tile.copy(h, c, j, j);
      for (int64_t i = 0; i < rows; ++i) {
        count[i] = 0;
        if (!before[i]) continue;
        count[i] = descend_corner(books[i], tile, std::min(SIDE, c - j), &g[j * rows + i * SIDE],
                                  codes + i * c + j, &changes[i * SIDE]);
        changed[i] += count[i];
        total += count[i];
      }
      for (int64_t t = 0; t < c && total; t += SIDE) {
        if (t == j) continue;
        total < SIDE ? tile.view(h, c, j, t) : tile.copy(h, c, j, t);
        Tile::expect(h, c, j, t + SIDE);
        for (int64_t i = 0; i < rows; ++i)
          if (count[i]) add_changes(&changes[i * SIDE], count[i], tile, &g[t * rows + i * SIDE]);
      }
    }
  }
  each_side([](float* to, const float* from, int64_t n) { std::copy(from, from + n, to); });
}

// Columns of a row in the order of their codes, 64 at a time; what is pruned is left out.
struct Sorted {
  int size;
  std::vector<uint8_t> column;  // [sides, 64], within its 64
  std::vector<uint8_t> begin;   // [sides, size + 1]

  Sorted(const uint8_t* code, int64_t c, int size)
      : size(size), column(sides(c) * SIDE), begin(sides(c) * (size + 1)) {
    for (int64_t side = 0; side < sides(c); ++side) {
      uint8_t* first = &begin[side * (size + 1)];
      const int64_t from = side * SIDE, to = std::min(c, from + SIDE);
      for (int64_t j = from; j < to; ++j)
        if (code[j] != PRUNED) ++first[code[j] + 1];
      for (int m = 0; m < size; ++m) first[m + 1] += first[m];
      uint8_t next[32];
      std::copy(first, first + size, next);
      for (int64_t j = from; j < to; ++j)
        if (code[j] != PRUNED) column[from + next[code[j]]++] = uint8_t(j - from);
    }
  }
};

// sums [size, 64] += the rows of a tile that share a code.
void add_rows(const Sorted& row, int64_t side, const Tile& tile, float* sums) {
  const uint8_t *begin = &row.begin[side * (row.size + 1)], *column = &row.column[side * SIDE];
  for (int m = 0; m < row.size; ++m, sums += SIDE) {
    if (begin[m] == begin[m + 1]) continue;
    Floats* s = reinterpret_cast<Floats*>(sums);
    Floats s0 = s[0], s1 = s[1], s2 = s[2], s3 = s[3];
    for (int k = begin[m]; k < begin[m + 1]; ++k) {
      const Floats* from = reinterpret_cast<const Floats*>(tile.row(column[k]));
      s0 += from[0];
      s1 += from[1];
      s2 += from[2];
      s3 += from[3];
    }
    s[0] = s0, s[1] = s1, s[2] = s2, s[3] = s3;
  }
}

// The least-squares entries x [n] of a row, from its sums: line m of side s stands at sums +
// s * stride + 64 m. False if there are none.
bool solve(const float* sums, int64_t stride, const float* w, const uint8_t* code, int64_t c, int n,
           const float* entry, double ridge, double* x) {
  double a[32][32], b[32];
  int count[32] = {};
  for (int64_t j = 0; j < c; ++j)
    if (code[j] != PRUNED) ++count[code[j]];
  double trace = 0;
  for (int m = 0; m < n; ++m) {
    std::fill(a[m], a[m] + n, 0.0);
    b[m] = 0;
    for (int64_t t = 0; t < c; ++t) {
      const float s = sums[t / SIDE * stride + m * SIDE + t % SIDE];
      if (code[t] != PRUNED) a[m][code[t]] += s;
      b[m] += double(s) * w[t];
    }
    trace += a[m][m];
  }
  if (!(trace > 0)) return false;
  // Ridge towards the current entries; an unused entry has an empty row and stays where it is.
  for (int m = 0; m < n; ++m) {
    const double pull = count[m] ? ridge * trace / n : trace / n;
    a[m][m] += pull;
    b[m] += pull * entry[m];
  }
  for (int m = 0; m < n; ++m)  // Cholesky in place, lower triangle
    for (int t = 0; t <= m; ++t) {
      double v = 0.5 * (a[m][t] + a[t][m]);
      if (t == m) v = a[m][m];
      for (int u = 0; u < t; ++u) v -= a[m][u] * a[t][u];
      if (t < m) {
        a[m][t] = v / a[t][t];
      } else {
        if (!(v > 1e-12 * trace / n)) return false;  // singular to working precision
        a[m][m] = std::sqrt(v);
      }
    }
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
  return true;
}

// The codebook step of some rows of the same H; `gradient` [rows, c] follows unless it is null.
void step_rows(const float* h, const float* w, const int32_t* sizes, uint8_t* codes, float* codebook,
               float* gradient, int64_t rows, int64_t c, int64_t k, double ridge) {
  std::vector<Sorted> sorted;
  std::vector<int64_t> first(rows + 1);  // line of a row in the sums of a side
  for (int64_t i = 0; i < rows; ++i) {
    sorted.emplace_back(codes + i * c, c, sizes[i]);
    first[i + 1] = first[i] + sizes[i];
  }
  const int64_t stride = first[rows] * SIDE;
  const Lines<float> sums(sides(c) * stride);  // [sides, all entries, 64]
  std::fill(sums.data(), sums.data() + sides(c) * stride, 0.f);
  Tile tile;
  for (int64_t t = 0; t < sides(c); ++t)
    for (int64_t j = 0; j < sides(c); ++j) {
      tile.copy(h, c, j * SIDE, t * SIDE);
      Tile::expect(h, c, (j + 1) * SIDE, t * SIDE);
      for (int64_t i = 0; i < rows; ++i)
        add_rows(sorted[i], j, tile, &sums[t * stride + first[i] * SIDE]);
    }
  for (int64_t i = 0; i < rows; ++i) {
    const int n = sizes[i];
    uint8_t* code = codes + i * c;
    float* entry = codebook + i * k;
    const float* s = &sums[first[i] * SIDE];
    double x[32];
    if (!solve(s, stride, w + i * c, code, c, n, entry, ridge, x)) continue;  // the entries stay
    for (int64_t t = 0; gradient && t < c; t += SIDE)
      for (int m = 0; m < n; ++m) {
        const float step = static_cast<float>(x[m]) - entry[m];
        const float* line = s + t / SIDE * stride + m * SIDE;
        for (int64_t e = 0; e < std::min(SIDE, c - t); ++e) gradient[i * c + t + e] += step * line[e];
      }
    int order[32], rank[32];
    for (int m = 0; m < n; ++m) order[m] = m;
    std::stable_sort(order, order + n, [&](int p, int q) { return x[p] < x[q]; });
    for (int m = 0; m < n; ++m) rank[order[m]] = m;
    for (int m = 0; m < n; ++m) entry[rank[m]] = static_cast<float>(x[m]);
    for (int64_t j = 0; j < c; ++j)
      if (code[j] != PRUNED) code[j] = static_cast<uint8_t>(rank[code[j]]);
  }
}

}  // namespace

int skimlm_coordinate_descent(const float* h, float* gradient, const float* codebook,
                              const int32_t* sizes, uint8_t* codes, int64_t r, int64_t c, int64_t k,
                              int64_t sweeps, int threads) {
  return guarded([&] {
    parallel_rows(r, rows_at_once(r, MANY, threads), threads, [&](int64_t first, int64_t last) {
      std::vector<Book> books;
      for (int64_t i = first; i < last; ++i) books.emplace_back(codebook + i * k, sizes[i]);
      descend_rows(h, gradient + first * c, books, codes + first * c, c, sweeps);
    });
  });
}

int skimlm_codebook_step(const float* h, const float* w, const int32_t* sizes, uint8_t* codes,
                         float* codebook, float* gradient, int64_t r, int64_t c, int64_t k,
                         double ridge, int threads) {
  return guarded([&] {
    const int64_t most = std::min(MANY, SUMS / (k * sides(c) * SIDE));
    parallel_rows(r, rows_at_once(r, most, threads), threads, [&](int64_t first, int64_t last) {
      step_rows(h, w + first * c, sizes + first, codes + first * c, codebook + first * k,
                gradient ? gradient + first * c : nullptr, last - first, c, k, ridge);
    });
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

int skimlm_sparse_descent(const float* h, float* gradient, const float* codebook, const int32_t* sizes,
                          const float* scale, int64_t group, uint8_t* codes, int64_t r, int64_t c,
                          int64_t k, int64_t pairs, int64_t sweeps, int threads) {
  return guarded([&] {
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
  });
}
