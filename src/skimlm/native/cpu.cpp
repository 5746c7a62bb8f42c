// What the processor can run; asked of the portable library before another one is loaded.
#include "kernels.h"
#include "parallel.h"

void skimlm_use_openmp(void* gomp_parallel) {
  parallel::fork = reinterpret_cast<parallel::Fork>(gomp_parallel);
}

int skimlm_has_vbmi() {
#if defined(__AVX512F__)
  static const bool have = __builtin_cpu_supports("avx512vbmi") &&
                           __builtin_cpu_supports("avx512vnni") &&
                           __builtin_cpu_supports("avx512bf16");
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
