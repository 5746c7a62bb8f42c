// Exact weighted 1-D k-means of every row, all cluster counts from one dynamic programme.
//
// Sorted and centred row, prefix sums S0 = sum f, S1 = sum f w (S2 = sum f w^2 cancels out of the
// search). With D_k[i] = least cost of the first i points in k clusters minus S2[i],
//   D_k[i] = min_j D_{k-1}[j] - (S1[i] - S1[j])^2 / (S0[i] - S0[j]),
// and the best j does not fall as i grows, nor as k grows. Divide and conquer over i needs
// O(c log c) candidates per k, and the candidates of one i are contiguous: 8 per AVX-512 step.
//
// With `edges` clusters of long rows may begin at so many places only, and the programme is exact over
// those: they lie as close together as the levels of the best quantizer of that many would.
#include <cfloat>
#include <cmath>
#include <numeric>

#if defined(__AVX512F__) || defined(__AVX2__)
#include <immintrin.h>
#endif

#include <vector>

#include "guard.h"
#include "parallel.h"

namespace {

struct Row {
  std::vector<double> s0, s1;
  double tiny;                                 // below this an interval's weight is rounding error
  std::vector<double> before, after;           // D_{k-1}, D_k
  std::vector<std::vector<int32_t>> split;     // split[k][i]: where the last of k clusters begins
  std::vector<std::pair<float, float>> points; // (w, f), ascending w
  std::vector<int32_t> place;                  // place[i]: how many points lie before boundary i
};

// Least value over j in [lo, hi] of d[j] - (s1i - s1[j])^2 / (s0i - s0[j]); the first j wins ties.
// An interval lighter than `tiny`, the rounding error of s0, has no mean to speak of and counts as
// weighing that much: its share of the cost is below what the sums resolve, but dividing by a weight
// that rounded to nothing would turn it into a fortune.
inline double best_split(const double* d, const double* s0, const double* s1, int lo, int hi,
                         double s0i, double s1i, double tiny, int* arg) {
  double best = INFINITY;
  int at = lo, j = lo;
#if defined(__AVX512F__)
  if (hi - lo >= 7) {
    const __m512d v0 = _mm512_set1_pd(s0i), v1 = _mm512_set1_pd(s1i), least_weight = _mm512_set1_pd(tiny);
    __m512d least = _mm512_set1_pd(INFINITY);
    __m512i where = _mm512_set1_epi64(lo), index = _mm512_add_epi64(_mm512_set1_epi64(lo),
        _mm512_set_epi64(7, 6, 5, 4, 3, 2, 1, 0));
    for (; j + 7 <= hi; j += 8, index = _mm512_add_epi64(index, _mm512_set1_epi64(8))) {
      __m512d a = _mm512_sub_pd(v1, _mm512_loadu_pd(s1 + j));
      __m512d b = _mm512_max_pd(_mm512_sub_pd(v0, _mm512_loadu_pd(s0 + j)), least_weight);
      __m512d v = _mm512_sub_pd(_mm512_loadu_pd(d + j), _mm512_div_pd(_mm512_mul_pd(a, a), b));
      __mmask8 m = _mm512_cmp_pd_mask(v, least, _CMP_LT_OQ);
      least = _mm512_mask_mov_pd(least, m, v);
      where = _mm512_mask_mov_epi64(where, m, index);
    }
    best = _mm512_reduce_min_pd(least);
    __mmask8 m = _mm512_cmp_pd_mask(least, _mm512_set1_pd(best), _CMP_EQ_OQ);
    at = static_cast<int>(_mm512_mask_reduce_min_epi64(m, where));
  }
#elif defined(__AVX2__)
  if (hi - lo >= 3) {
    const __m256d v0 = _mm256_set1_pd(s0i), v1 = _mm256_set1_pd(s1i), least_weight = _mm256_set1_pd(tiny);
    __m256d least = _mm256_set1_pd(INFINITY), where = _mm256_set1_pd(lo);
    __m256d index = _mm256_add_pd(where, _mm256_set_pd(3, 2, 1, 0));
    for (; j + 3 <= hi; j += 4, index = _mm256_add_pd(index, _mm256_set1_pd(4))) {
      __m256d a = _mm256_sub_pd(v1, _mm256_loadu_pd(s1 + j));
      __m256d b = _mm256_max_pd(_mm256_sub_pd(v0, _mm256_loadu_pd(s0 + j)), least_weight);
      __m256d v = _mm256_sub_pd(_mm256_loadu_pd(d + j), _mm256_div_pd(_mm256_mul_pd(a, a), b));
      __m256d m = _mm256_cmp_pd(v, least, _CMP_LT_OQ);
      least = _mm256_blendv_pd(least, v, m);
      where = _mm256_blendv_pd(where, index, m);
    }
    double value[4], place[4];
    _mm256_storeu_pd(value, least);
    _mm256_storeu_pd(place, where);
    for (int t = 0; t < 4; ++t)
      if (value[t] < best || (value[t] == best && place[t] < at))
        best = value[t], at = static_cast<int>(place[t]);
  }
#endif
  for (; j <= hi; ++j) {
    double a = s1i - s1[j], b = std::max(s0i - s0[j], tiny), v = d[j] - a * a / b;
    if (v < best) best = v, at = j;
  }
  *arg = at;
  return best;
}

// Fills after[i], split[k][i] for i in [lo, hi] knowing that the split lies in [from, to].
void divide(Row& row, int k, int lo, int hi, int from, int to) {
  while (lo <= hi) {
    int mid = (lo + hi) / 2, at;
    int first = std::max({from, k - 1, row.split[k - 1][mid]}), last = std::min(to, mid - 1);
    row.after[mid] = best_split(row.before.data(), row.s0.data(), row.s1.data(), first, last,
                                row.s0[mid], row.s1[mid], row.tiny, &at);
    row.split[k][mid] = at;
    divide(row, k, lo, mid - 1, from, at);
    lo = mid + 1;
    from = at;
  }
}

// Weighted mean of a cluster, from the points: differences of the prefix sums lose its last digits.
// One without weight still stands for its points, by their plain middle. Adds what it costs.
double centre(const std::pair<float, float>* first, const std::pair<float, float>* last, double* cost) {
  const double low = first->first, high = last[-1].first;
  double mass = 0, sum = 0;
  for (auto p = first; p < last; ++p) mass += p->second, sum += p->second * (p->first - low);
  const double mean = mass > 0 ? std::min(low + sum / mass, high) : 0.5 * (low + high);
  for (auto p = first; p < last; ++p) *cost += p->second * (p->first - mean) * (p->first - mean);
  return mean;
}

// Where clusters may begin: everywhere, or where the integral of density^(1/3) passes another of `edges`
// equal steps (Panter and Dite 1951); far-off points then have a place of their own.
void choose_places(Row& row, int c, int edges) {
  row.place.clear();
  row.place.push_back(0);
  std::vector<double> passed(c, 0);
  if (edges && c > 2 * edges)
    for (int j = 1; j < c; ++j) {
      const double gap = double(row.points[j].first) - row.points[j - 1].first;
      const double weight = 0.5 * (double(row.points[j].second) + row.points[j - 1].second);
      passed[j] = passed[j - 1] + std::cbrt(weight * gap * gap);
    }
  const double step = passed[c - 1] / std::max(edges, 1);
  int64_t last = 0;
  for (int j = 1; j < c; ++j) {
    const int64_t now = step > 0 ? int64_t(passed[j] / step) : j;
    if (now > last) row.place.push_back(j), last = now;
  }
  row.place.push_back(c);
}

void fit_row(Row& row, const float* w, const float* f, int count, int max_bits, int edges,
             float* centroids, double* costs) {
  double mass = 0, mean = 0;
  for (int j = 0; j < count; ++j) mass += f[j], mean += double(f[j]) * w[j];
  const bool flat = !(mass > 0);  // no weight anywhere: every point counts the same
  if (flat) mean = std::accumulate(w, w + count, 0.0), mass = count;
  mean /= mass;
  row.points.resize(count);
  for (int j = 0; j < count; ++j) row.points[j] = {w[j], flat ? 1.f : f[j]};
  std::sort(row.points.begin(), row.points.end());
  choose_places(row, count, edges);
  const int c = int(row.place.size()) - 1;  // what the programme takes for points

  row.s0.assign(c + 1, 0), row.s1.assign(c + 1, 0);
  row.before.assign(c + 1, 0), row.after.assign(c + 1, 0);
  double s0 = 0, s1 = 0;
  for (int i = 0; i < c; ++i) {
    for (int j = row.place[i]; j < row.place[i + 1]; ++j) {
      const double x = row.points[j].first - mean, weight = row.points[j].second;
      s0 += weight, s1 += weight * x;
    }
    row.s0[i + 1] = s0, row.s1[i + 1] = s1;
  }
  row.tiny = count * DBL_EPSILON * row.s0[c];
  const int top = std::min(1 << max_bits, c);  // more clusters than points are never needed
  row.split.resize(top + 1);
  for (auto& s : row.split) s.assign(c + 1, 0);
  for (int i = 1; i <= c; ++i) {
    double a = row.s1[i];
    row.before[i] = -a * a / std::max(row.s0[i], row.tiny);
  }
  for (int k = 2; k <= top; ++k) {
    divide(row, k, k == top ? c : k, c, k - 1, c - 1);  // the last count is asked at i = c only
    std::swap(row.before, row.after);
  }
  float* out = centroids;
  for (int b = 1; b <= max_bits; ++b) {
    const int k = 1 << b, used = std::min(k, top);
    costs[b - 1] = 0;
    for (int m = used, end = c; m >= 1; --m) {
      const int begin = m == 1 ? 0 : row.split[m][end];
      const auto* points = row.points.data();
      const double x = centre(points + row.place[begin], points + row.place[end], &costs[b - 1]);
      out[m - 1] = static_cast<float>(x);
      end = begin;
    }
    for (int m = used; m < k; ++m) out[m] = out[used - 1];
    std::sort(out, out + k);
    out += k;
  }
}

}  // namespace

int skimlm_kmeans_rows(const float* w, const float* f, int64_t r, int64_t c, int64_t max_bits,
                       int64_t edges, float* centroids, double* costs, int threads) {
  return guarded([&] {
    const int64_t width = (2 << max_bits) - 2;
    parallel_rows(r, 8, threads, [&](int64_t first, int64_t last) {
      Row row;
      for (int64_t i = first; i < last; ++i)
        fit_row(row, w + i * c, f + i * c, int(c), int(max_bits), int(edges), centroids + i * width,
                costs + i * max_bits);
    });
  });
}
