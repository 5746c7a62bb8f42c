// The one way work is split over threads.
#pragma once
#include <algorithm>
#include <atomic>
#include <cstdint>
#include <thread>
#include <vector>

#include "kernels.h"

// Calls body(first, last) on blocks of rows until all are done.
template <class Body>
static void parallel_rows(int64_t rows, int64_t block, int threads, const Body& body) {
  std::atomic<int64_t> next{0};
  auto work = [&] {
    for (int64_t i; (i = next.fetch_add(block)) < rows;) body(i, std::min(i + block, rows));
  };
  int extra = static_cast<int>(std::min<int64_t>(threads, (rows + block - 1) / block)) - 1;
  std::vector<std::thread> pool;
  for (int t = 0; t < extra; ++t) pool.emplace_back(work);
  work();
  for (auto& t : pool) t.join();
}
