// The one way work is split over threads: a pool that outlives the call, since a decoding model makes
// hundreds of calls per token and starting threads would cost more than most of them.
//
// A worker that has nothing to do spins for a moment, then sleeps. A caller never waits for a worker
// that has not begun: when the blocks run out it closes the job, and who comes late finds nothing.
#pragma once
#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <mutex>
#include <thread>

#if defined(__unix__) || defined(__APPLE__)
#include <unistd.h>
#endif

#include "kernels.h"

namespace parallel {

inline void relax() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#else
  std::this_thread::yield();
#endif
}

struct Job {
  void (*run)(const void*);
  const void* body;
};

struct Pool {
  static constexpr uint64_t OPEN = 1 << 15, ONE_MORE = 1 << 16;  // low bits: workers inside
  static constexpr std::chrono::microseconds SPIN{300};  // Python takes about 100 between two calls

  std::mutex busy;
  Job job{};
  int workers = 0;
  std::atomic<uint64_t> state{0};
  std::atomic<uint32_t> turn{0};

  bool enter(uint64_t& seen) {
    uint64_t now = state.load(std::memory_order_acquire);
    while ((now & OPEN) && now / ONE_MORE != seen)
      if (state.compare_exchange_weak(now, now + 1, std::memory_order_acq_rel)) {
        seen = now / ONE_MORE;
        return true;
      }
    return false;
  }

  void work() {
    uint64_t seen = 0;
    for (uint32_t known = 0;;) {
      const auto until = std::chrono::steady_clock::now() + SPIN;
      while (turn.load(std::memory_order_acquire) == known) {
        for (int i = 0; i < 64; ++i) relax();
        std::this_thread::yield();  // to whoever else may need this core
        if (std::chrono::steady_clock::now() > until) turn.wait(known, std::memory_order_acquire);
      }
      known = turn.load(std::memory_order_acquire);
      if (enter(seen)) {
        job.run(job.body);
        state.fetch_sub(1, std::memory_order_acq_rel);
      }
    }
  }

  // Runs `next` here and on up to `extra` workers until it returns everywhere.
  void run(const Job& next, int extra) {
    for (; workers < extra; ++workers) std::thread([this] { work(); }).detach();
    job = next;
    const uint64_t number = state.load(std::memory_order_relaxed) / ONE_MORE + 1;
    state.store(number * ONE_MORE | OPEN, std::memory_order_release);
    turn.fetch_add(1, std::memory_order_release);
    turn.notify_all();
    next.run(next.body);
    state.fetch_and(~OPEN, std::memory_order_acq_rel);
    for (int i = 0; state.load(std::memory_order_acquire) & (OPEN - 1); ++i)
      i < 10000 ? relax() : std::this_thread::yield();
  }
};

inline int process() {
#if defined(__unix__) || defined(__APPLE__)
  return getpid();
#else
  return 1;
#endif
}

// Never destroyed: its threads sleep until the process ends. A forked child has none and starts its own.
inline Pool& pool() {
  static std::atomic<Pool*> current{nullptr};
  static std::atomic<int> owner{0};
  static std::mutex making;
  const int me = process();
  if (owner.load(std::memory_order_acquire) != me) {
    std::lock_guard<std::mutex> guard(making);
    if (owner.load() != me) current = new Pool, owner = me;
  }
  return *current;
}

}  // namespace parallel

namespace parallel {
// GOMP_parallel of the OpenMP that torch has loaded, or null: one set of threads for torch and for us.
using Fork = void (*)(void (*)(void*), void*, unsigned, unsigned);
inline std::atomic<Fork> fork{nullptr};
inline std::atomic<int (*)()> team_size{nullptr};  // omp_get_num_threads of the same
inline std::atomic<int> fork_owner{0};  // GNU's threads hang in a forked child: it takes the pool
}  // namespace parallel

// Calls body(first, last) on blocks of rows until all are done. A call from a second thread at the same
// time runs on that thread alone.
template <class Body>
static void parallel_rows(int64_t rows, int64_t block, int threads, const Body& body) {
  std::atomic<int64_t> next{0};
  auto work = [&] {
    for (int64_t i; (i = next.fetch_add(block)) < rows;) body(i, std::min(i + block, rows));
  };
  const auto fork = parallel::fork.load(std::memory_order_relaxed);
  if (fork && parallel::fork_owner == parallel::process()) {
    const int64_t blocks = (rows + block - 1) / block;
    if (threads < 2 || blocks < 2) return work();
    fork([](void* w) { (*static_cast<decltype(work)*>(w))(); }, &work,
         unsigned(std::min<int64_t>(threads, blocks)), 0);
    return;
  }
  const int extra = int(std::min<int64_t>(threads, (rows + block - 1) / block)) - 1;
  parallel::Pool& pool = parallel::pool();
  std::unique_lock<std::mutex> mine(pool.busy, std::defer_lock);
  if (extra < 1 || !mine.try_lock()) return work();
  pool.run({[](const void* w) { (*static_cast<decltype(work)*>(const_cast<void*>(w)))(); }, &work},
           extra);
}

// Threads that run the same code side by side and wait for each other between two steps of it: where
// steps take some microseconds, starting threads for each would take as long again.
class Team {
 public:
  int size = 1;

  // All threads have come here: what they wrote before can be read after.
  void wait() {
    if (size == 1) return;
    const int turn = turn_.load(std::memory_order_acquire);
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == size) {
      arrived_.store(0, std::memory_order_relaxed);
      turn_.store(turn + 1, std::memory_order_release);
      return;
    }
    for (int i = 0; turn_.load(std::memory_order_acquire) == turn; ++i)
      i < 4000 ? parallel::relax() : std::this_thread::yield();
  }

 private:
  std::atomic<int> arrived_{0}, turn_{0};
};

// Calls body(team, index of the thread) on up to `threads` threads: on torch's, where they can be had,
// since those of the pool may come late; else on this one alone.
template <class Body>
static void run_team(int threads, const Body& body) {
  const auto fork = parallel::fork.load(std::memory_order_relaxed);
  const auto team_size = parallel::team_size.load(std::memory_order_relaxed);
  Team team;
  if (threads < 2 || !fork || !team_size || parallel::fork_owner != parallel::process())
    return body(team, 0);
  std::atomic<int> next{0};
  std::atomic<int> ready{0};
  auto work = [&] {
    const int index = next.fetch_add(1);
    if (index == 0) {
      team.size = team_size();
      ready.store(1, std::memory_order_release);
    }
    while (!ready.load(std::memory_order_acquire)) parallel::relax();
    body(team, index);
  };
  fork([](void* w) { (*static_cast<decltype(work)*>(w))(); }, &work, unsigned(threads), 0);
}
