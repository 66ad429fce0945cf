// A small fork-join pool: the caller is worker 0, the others spin for a moment and then sleep.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <exception>
#include <memory>
#include <thread>
#include <type_traits>
#include <utility>
#include <vector>

#include "tinyllama/device/shared_core.hpp"
#include "tinyllama/tensor/dtype.hpp"

namespace tinyllama {

/// Runs one job at a time on a fixed number of threads. A decode step forks about 150 times, so that a fork must cost well under a
/// microsecond: workers watch a counter for some 400 microseconds before they sleep on it. A worker joins a job only while it is open, and
/// the caller closes it when all indices are taken: it waits for workers that compute, never for one that the system has not scheduled.
class ThreadPool {
 public:
  explicit ThreadPool(int threads) {
    const int n = std::clamp(threads, 1, static_cast<int>(inside_mask));
    workers_.reserve(static_cast<std::size_t>(n - 1));
    for (int i = 1; i < n; ++i) workers_.emplace_back([this, i] { work(i); });
  }
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;
  ~ThreadPool() {
    stop_.store(true, std::memory_order_relaxed);
    state_.fetch_add(one_job, std::memory_order_seq_cst);
    state_.notify_all();
    for (std::thread& t : workers_) t.join();
  }

  int size() const { return static_cast<int>(workers_.size()) + 1; }

  /// Calls f(i), or f(i, worker) with worker in [0, size()), for each i in [0, n), each once, on any thread in any order; returns when all
  /// are done. The first exception is rethrown here, and indices not yet begun are then left out. A call from inside a job, or while
  /// another thread uses the pool, runs on the calling thread alone, as worker 0.
  template <class F>
  void run(index_t n, F&& f) {
    if (n <= 0) return;
    if (n == 1 || workers_.empty() || busy_.exchange(true, std::memory_order_acquire)) {
      for (index_t i = 0; i < n; ++i) call(f, i, 0);
      return;
    }
    using Fn = std::remove_reference_t<F>;
    call_ = [](const void* context, index_t i, int worker) { call(*static_cast<Fn*>(const_cast<void*>(context)), i, worker); };
    context_ = std::addressof(f);
    count_ = n;
    next_.store(0, std::memory_order_relaxed);
    core_.at.store(SharedCore::here(), std::memory_order_relaxed);
    caller_.start();
    state_.fetch_add(one_job | open, std::memory_order_seq_cst);  // closed and empty until here
    if (sleepers_.load(std::memory_order_seq_cst) > 0) state_.notify_all();
    drain(0, [this] {
      if (caller_.lost()) core_.wanted.store(SharedCore::here(), std::memory_order_relaxed);
      return false;
    });
    state_.fetch_and(~open, std::memory_order_acq_rel);
    for (int spin = 0; state_.load(std::memory_order_acquire) & inside_mask; ++spin) relax(spin);
    const std::exception_ptr error = std::exchange(error_, nullptr);
    failed_.store(false, std::memory_order_relaxed);
    busy_.store(false, std::memory_order_release);
    if (error) std::rethrow_exception(error);
  }

 private:
  // state_: workers inside the job (12 bits), whether it is open (1 bit), and the jobs begun (the rest, modulo 2^19). A worker that takes a new
  // job for an old one misses it, no more.
  static constexpr std::uint32_t inside_mask = 0xfff, open = 0x1000, one_job = 0x2000, job_mask = ~(inside_mask | open);
  static constexpr int spins_to_yield = 2000, spins_to_sleep = 20000;  // of some 20 ns (Zen 4)

  template <class F>
  static void call(F& f, index_t i, int worker) {
    if constexpr (std::is_invocable_v<F&, index_t, int>) f(i, worker);
    else f(i);
  }

  static void relax(int spin) {
    if (spin > spins_to_yield && spin % 64 == 0) {
      std::this_thread::yield();  // the machine is busy with other work: the thread waited for may need this core
      return;
    }
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
  }

  /// Takes indices until there are none, or until `enough` says so behind one.
  template <class F>
  void drain(int worker, F&& enough) {
    for (bool last = false; !last; last = enough()) {
      const index_t i = next_.fetch_add(1, std::memory_order_relaxed);
      if (i >= count_) return;
      if (failed_.load(std::memory_order_relaxed)) continue;
      try {
        call_(context_, i, worker);
      } catch (...) {
        if (!failed_.exchange(true, std::memory_order_relaxed)) error_ = std::current_exception();
      }
    }
  }

  void work(int worker) {
    SharedCore core;
    std::uint32_t seen = 0;
    for (;;) {
      std::uint32_t state = state_.load(std::memory_order_acquire);
      for (int spin = 0; (state & job_mask) == seen && spin < spins_to_sleep; state = state_.load(std::memory_order_acquire)) relax(spin++);
      if ((state & job_mask) == seen) {
        sleepers_.fetch_add(1, std::memory_order_seq_cst);
        while (((state = state_.load(std::memory_order_seq_cst)) & job_mask) == seen) state_.wait(state, std::memory_order_seq_cst);
        sleepers_.fetch_sub(1, std::memory_order_relaxed);
      }
      if (stop_.load(std::memory_order_relaxed)) return;
      seen = state & job_mask;
      // Only while the job is open, and counted: then its fields stay as they are until this worker has left.
      bool joined = false;
      while ((state & job_mask) == seen && (state & open) && !joined)
        joined = state_.compare_exchange_weak(state, state + 1, std::memory_order_acq_rel, std::memory_order_acquire);
      if (!joined) continue;
      core.start();
      bool rests = false;
      drain(worker, [&] { return rests = core.wants_rest(core_); });
      state_.fetch_sub(1, std::memory_order_release);
      if (rests) core.rest(core_), seen = (seen - one_job) & job_mask;  // the same job once more, where it is still open
    }
  }

  std::vector<std::thread> workers_;
  void (*call_)(const void*, index_t, int) = nullptr;
  const void* context_ = nullptr;
  index_t count_ = 0;
  std::exception_ptr error_;
  CoreLoss caller_;
  CallerCore core_;
  alignas(64) std::atomic<std::uint32_t> state_{0};
  alignas(64) std::atomic<index_t> next_{0};
  std::atomic<int> sleepers_{0};
  std::atomic<bool> busy_{false}, failed_{false}, stop_{false};
};

}  // namespace tinyllama
