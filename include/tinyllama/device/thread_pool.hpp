// A small fork-join pool: the caller is worker 0, the others spin for a moment and then sleep.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <exception>
#include <memory>
#include <thread>
#include <utility>
#include <vector>

#if defined(__linux__)
#include <sched.h>
#endif

#include "tinyllama/tensor/dtype.hpp"

namespace tinyllama {

/// Cores that this process may run on.
inline int available_cores() {
#if defined(__linux__)
  cpu_set_t set;
  if (sched_getaffinity(0, sizeof set, &set) == 0) return std::max(1, CPU_COUNT(&set));
#endif
  return std::max(1u, std::thread::hardware_concurrency());
}

/// Runs one job at a time on a fixed number of threads. A decode step forks about 150 times, so that a fork must cost well under a
/// microsecond: workers watch a generation counter for some ten microseconds before they sleep on it.
class ThreadPool {
 public:
  explicit ThreadPool(int threads) {
    const int n = std::max(1, threads);
    workers_.reserve(static_cast<std::size_t>(n - 1));
    for (int i = 1; i < n; ++i) workers_.emplace_back([this] { work(); });
  }
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;
  ~ThreadPool() {
    stop_.store(true, std::memory_order_relaxed);
    generation_.fetch_add(1, std::memory_order_seq_cst);
    generation_.notify_all();
    for (std::thread& t : workers_) t.join();
  }

  int size() const { return static_cast<int>(workers_.size()) + 1; }

  /// Calls f(i) for each i in [0, n), each once, on any thread in any order; returns when all are done. The first exception is
  /// rethrown here. A call from inside a job, or while another thread uses the pool, runs on the calling thread alone.
  template <class F>
  void run(index_t n, F&& f) {
    if (n <= 0) return;
    if (n == 1 || workers_.empty() || busy_.exchange(true, std::memory_order_acquire)) {
      for (index_t i = 0; i < n; ++i) f(i);
      return;
    }
    using Fn = std::remove_reference_t<F>;
    call_ = [](const void* context, index_t i) { (*static_cast<Fn*>(const_cast<void*>(context)))(i); };
    context_ = std::addressof(f);
    count_ = n;
    next_.store(0, std::memory_order_relaxed);
    pending_.store(static_cast<int>(workers_.size()), std::memory_order_relaxed);
    generation_.fetch_add(1, std::memory_order_seq_cst);
    if (sleepers_.load(std::memory_order_seq_cst) > 0) generation_.notify_all();
    drain();
    for (int spin = 0; pending_.load(std::memory_order_acquire) > 0; ++spin) relax(spin);
    const std::exception_ptr error = std::exchange(error_, nullptr);
    failed_.store(false, std::memory_order_relaxed);
    busy_.store(false, std::memory_order_release);
    if (error) std::rethrow_exception(error);
  }

 private:
  static constexpr int spins = 20000;

  static void relax(int spin) {
    if (spin > spins && spin % 64 == 0) {
      std::this_thread::yield();  // the machine is busy with other work: the thread waited for may need this core
      return;
    }
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
  }

  void drain() {
    for (;;) {
      const index_t i = next_.fetch_add(1, std::memory_order_relaxed);
      if (i >= count_) return;
      if (failed_.load(std::memory_order_relaxed)) continue;
      try {
        call_(context_, i);
      } catch (...) {
        if (!failed_.exchange(true, std::memory_order_relaxed)) error_ = std::current_exception();
      }
    }
  }

  void work() {
    std::uint32_t seen = 0;
    for (;;) {
      int spin = 0;
      while (generation_.load(std::memory_order_acquire) == seen && spin < spins) relax(spin++);
      if (generation_.load(std::memory_order_acquire) == seen) {
        sleepers_.fetch_add(1, std::memory_order_seq_cst);
        while (generation_.load(std::memory_order_seq_cst) == seen) generation_.wait(seen, std::memory_order_seq_cst);
        sleepers_.fetch_sub(1, std::memory_order_relaxed);
      }
      ++seen;  // generations are never skipped: the next job starts only after every worker has answered this one
      if (stop_.load(std::memory_order_relaxed)) return;
      drain();
      pending_.fetch_sub(1, std::memory_order_release);
    }
  }

  std::vector<std::thread> workers_;
  void (*call_)(const void*, index_t) = nullptr;
  const void* context_ = nullptr;
  index_t count_ = 0;
  std::exception_ptr error_;
  alignas(64) std::atomic<std::uint32_t> generation_{0};
  alignas(64) std::atomic<index_t> next_{0};
  alignas(64) std::atomic<int> pending_{0};
  std::atomic<int> sleepers_{0};
  std::atomic<bool> busy_{false}, failed_{false}, stop_{false};
};

}  // namespace tinyllama
