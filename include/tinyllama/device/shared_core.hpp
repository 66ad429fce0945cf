// How a worker shares its core with a program that never sleeps: it gives the core up between two units of work, where nobody waits for it.
#pragma once

#include <atomic>
#include <chrono>
#include <cstdint>
#include <thread>
#include <utility>

#if defined(__linux__)
#include <sched.h>
#include <sys/resource.h>
#endif

namespace tinyllama {

/// Tells a thread that another takes its core again and again, at the price of reading the clock after each unit of work.
class CoreLoss {
 public:
  using Clock = std::chrono::steady_clock;
  static constexpr auto memory = std::chrono::milliseconds(100);

  void start() { last_ = Clock::now(); }
  /// Whether the thread was sent away for long since the last call or start(), and that not long after another time. A single one means nothing: a quiet
  /// machine has some of them each second, one that never sleeps takes a core a hundred times.
  bool lost() {
    const Clock::time_point before = std::exchange(last_, Clock::now());
    return last_ - before > std::chrono::microseconds(1500) && sent_away() && again();
  }
  bool again() { return last_ - std::exchange(loss_, last_) < memory; }
  Clock::time_point last() const { return last_; }  // when lost() or start() was called

 private:
#if defined(__linux__)
  bool sent_away() {
    rusage use{};
    getrusage(RUSAGE_THREAD, &use);
    return std::exchange(switches_, use.ru_nivcsw) != use.ru_nivcsw;
  }
  long switches_ = 0;
#else
  static bool sent_away() { return false; }
#endif
  Clock::time_point last_{}, loss_{};
};

/// The core that the caller of a job runs on, and whether a worker is asked to take its place there. -1: none.
struct CallerCore {
  std::atomic<int> at{-1}, wanted{-1};
};

/// Of a worker. A thread that computes beside a program that never sleeps has half of a core, in turns of some milliseconds that end anywhere: mostly inside a
/// unit, for which all others then wait as long. One that has lost its core therefore rests after each millisecond, between units: a sleep of microseconds where
/// nobody wants the core, else the other's turn. (sched_yield would give away more than a turn since Linux 6.18.) It keeps off the caller's core, and takes the
/// caller's place where the caller is the one who shares: without the caller no job begins.
class SharedCore {
 public:
  void start() { loss_.start(); }
  bool shares() const { return shares_; }

  /// After a unit: whether the worker is to leave the job and rest.
  bool wants_rest(const CallerCore& caller) {
    if (loss_.lost()) share();
    if (caller.wanted.load(std::memory_order_relaxed) >= 0) return true;
    return shares_ && (loss_.last() > until_ || loss_.last() - rested_ > turn);
  }

  void rest(CallerCore& caller) {
    if (const int core = caller.wanted.exchange(-1, std::memory_order_relaxed); core >= 0 && core != here()) {
      share(), move([&](int c) { return c == core; });
      moved_ = loss_.last();
    } else if (shares_ && loss_.last() > until_) {
      shares_ = false, move([](int) { return true; });
    } else if (const int at = caller.at.load(std::memory_order_relaxed); shares_ && at >= 0 && at == here() && loss_.last() - moved_ > settling) {
      move([&](int c) { return c != at; });
      moved_ = loss_.last();
    }
    const CoreLoss::Clock::time_point before = CoreLoss::Clock::now();
    std::this_thread::sleep_for(std::chrono::nanoseconds(1));
    loss_.start();
    rested_ = loss_.last();
    if (rested_ - before > std::chrono::milliseconds(1) && loss_.again()) share();  // it still does
  }

  static int here() {
#if defined(__linux__)
    return sched_getcpu();
#else
    return -1;
#endif
  }

 private:
  static constexpr auto turn = std::chrono::milliseconds(1);       // of 0.5, 1 and 2: the best (Linux 6.18, 250 Hz)
  static constexpr auto settling = std::chrono::milliseconds(20);  // until the system has moved the caller

  void share() {
    if (!shares_) rested_ = loss_.last();
    shares_ = true, until_ = loss_.last() + CoreLoss::memory;
  }

  /// Leaves this thread those of its first cores that are wanted; all of them take the limit away. None: as it was.
  template <class F>
  void move([[maybe_unused]] F&& wanted) {
#if defined(__linux__)
    if (!known_ && sched_getaffinity(0, sizeof cores_, &cores_) != 0) return;
    known_ = true;
    cpu_set_t set;
    CPU_ZERO(&set);
    for (int c = 0; c < CPU_SETSIZE; ++c)
      if (CPU_ISSET(c, &cores_) && wanted(c)) CPU_SET(c, &set);
    if (CPU_COUNT(&set) > 0) sched_setaffinity(0, sizeof set, &set);
#endif
  }

  CoreLoss loss_;
  bool shares_ = false;
  CoreLoss::Clock::time_point until_{}, rested_{}, moved_{};
#if defined(__linux__)
  cpu_set_t cores_{};
  bool known_ = false;
#endif
};

}  // namespace tinyllama
