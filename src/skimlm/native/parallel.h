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
#include <exception>
#include <mutex>
#include <system_error>
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
    try {
      for (; workers < extra; ++workers) std::thread([this] { work(); }).detach();
    } catch (const std::system_error&) {  // no more threads are to be had: the job gets by with fewer
    }
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

// The first exception of several threads, thrown again on the thread that started them.
class Failure {
 public:
  template <class Body>
  void guard(const Body& body) noexcept {
    try {
      body();
    } catch (...) {
      if (!failed_.exchange(true, std::memory_order_acq_rel)) first_ = std::current_exception();
    }
  }
  explicit operator bool() const { return failed_.load(std::memory_order_acquire); }
  void rethrow() const {  // once all threads are done
    if (first_) std::rethrow_exception(first_);
  }

 private:
  std::atomic<bool> failed_{false};
  std::exception_ptr first_;
};

// Calls body(first, last) on blocks of rows until all are done, or one has thrown: that is thrown here. A call
// from a second thread at the same time runs on that thread alone.
template <class Body>
static void parallel_rows(int64_t rows, int64_t block, int threads, const Body& body) {
  std::atomic<int64_t> next{0};
  Failure failure;
  auto work = [&] {
    failure.guard([&] {
      for (int64_t i; (i = next.fetch_add(block)) < rows && !failure;) body(i, std::min(i + block, rows));
    });
  };
  const int64_t blocks = (rows + block - 1) / block;
  const auto fork = parallel::fork.load(std::memory_order_relaxed);
  parallel::Pool* pool = nullptr;
  if (threads < 2 || blocks < 2) {
    work();
  } else if (fork && parallel::fork_owner == parallel::process()) {
    fork([](void* w) { (*static_cast<decltype(work)*>(w))(); }, &work,
         unsigned(std::min<int64_t>(threads, blocks)), 0);
  } else if ((pool = &parallel::pool())->busy.try_lock()) {
    std::lock_guard<std::mutex> mine(pool->busy, std::adopt_lock);
    pool->run({[](const void* w) { (*static_cast<decltype(work)*>(const_cast<void*>(w)))(); }, &work},
              int(std::min<int64_t>(threads, blocks)) - 1);
  } else {
    work();
  }
  failure.rethrow();
}

// Threads that run the same code side by side and wait for each other between two steps of it: where
// steps take some microseconds, starting threads for each would take as long again.
class Team {
 public:
  int size = 1;
  Failure failure;  // of one of them: the others end at their next wait

  // All threads have come here: what they wrote before can be read after.
  void wait() {
    if (size == 1) return;
    const int turn = turn_.load(std::memory_order_acquire);
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == size) {
      arrived_.store(0, std::memory_order_relaxed);
      turn_.store(turn + 1, std::memory_order_release);
      return;
    }
    for (int i = 0; turn_.load(std::memory_order_acquire) == turn; ++i) {
      if (failure) throw Abandoned();
      i < 4000 ? parallel::relax() : std::this_thread::yield();
    }
  }

 private:
  struct Abandoned {};
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
    team.failure.guard([&] { body(team, index); });
  };
  fork([](void* w) { (*static_cast<decltype(work)*>(w))(); }, &work, unsigned(threads), 0);
  team.failure.rethrow();
}
