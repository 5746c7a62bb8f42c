// What the processor can run; asked of the portable library before another one is loaded.
#include <iterator>

#include "guard.h"
#include "kernels.h"
#include "parallel.h"

int64_t skimlm_abi(int64_t what) {
  constexpr int64_t found[] = {7, sizeof(SkimlmLayer), sizeof(SkimlmBlock), sizeof(SkimlmBody),
                               sizeof(SkimlmPrefix), sizeof(SkimlmSequence)};
  return what >= 0 && what < int64_t(std::size(found)) ? found[what] : -1;
}

void skimlm_use_openmp(void* gomp_parallel, void* omp_get_num_threads) {
  parallel::fork = reinterpret_cast<parallel::Fork>(gomp_parallel);
  parallel::team_size = reinterpret_cast<int (*)()>(omp_get_num_threads);
  parallel::fork_owner = parallel::process();
}

int skimlm_read(const uint64_t* data, int64_t bytes, uint64_t* sum, int threads) {
  std::atomic<uint64_t> total{0};
  const int status = guarded([&] {
    parallel_rows(bytes / 8, 1 << 17, threads, [&](int64_t begin, int64_t end) {
      uint64_t part[64] = {};
      int64_t i = begin;
      for (; i + 64 <= end; i += 64)
        for (int t = 0; t < 64; ++t) part[t] += data[i + t];
      for (; i < end; ++i) part[0] += data[i];
      for (int t = 1; t < 64; ++t) part[0] += part[t];
      total += part[0];
    });
  });
  *sum = total;
  return status;
}

int skimlm_has_vbmi() {
#if defined(__AVX512F__)
  static const bool have = __builtin_cpu_supports("avx512vbmi") &&
                           __builtin_cpu_supports("avx512vnni") &&
                           __builtin_cpu_supports("avx512bf16") &&
                           __builtin_cpu_supports("gfni");
  return have;
#else
  return 0;
#endif
}

// 0 = portable, 1 = avx2, 2 = avx512
int skimlm_best_isa() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512cd"))
    return 2;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
      __builtin_cpu_supports("f16c") && __builtin_cpu_supports("bmi2"))
    return 1;
#endif
  return 0;
}
