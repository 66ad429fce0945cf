// A thread that shares its core notices, leaves its job to rest, takes a place it is asked to take, and goes back to all of its cores afterwards.
#include "tinyllama/device/shared_core.hpp"

#include <doctest/doctest.h>

#include <vector>

#include "tinyllama/device/thread_pool.hpp"

namespace {
using namespace tinyllama;

#if defined(__linux__)
cpu_set_t cores() {
  cpu_set_t set;
  CPU_ZERO(&set);
  REQUIRE(sched_getaffinity(0, sizeof set, &set) == 0);
  return set;
}

int first_but(const cpu_set_t& set, int other) {
  for (int c = 0; c < CPU_SETSIZE; ++c)
    if (CPU_ISSET(c, &set) && c != other) return c;
  return -1;
}

void pin(int core) {
  cpu_set_t set;
  CPU_ZERO(&set);
  CPU_SET(core, &set);
  REQUIRE(sched_setaffinity(0, sizeof set, &set) == 0);
}

/// A thread that never sleeps, on one core.
class Busy {
 public:
  explicit Busy(int core)
      : thread_([this, core] {
          pin(core);
          while (!stop_.load(std::memory_order_relaxed)) {}
        }) {}
  ~Busy() {
    stop_.store(true);
    thread_.join();
  }

 private:
  std::atomic<bool> stop_{false};
  std::thread thread_;
};

template <class F>
void on_a_thread(F&& f) { std::thread(f).join(); }
#endif
}  // namespace

TEST_CASE("a quiet thread loses nothing, and one loss alone does not count") {
  CoreLoss loss;
  loss.start();
  CHECK_FALSE(loss.lost());
  CHECK_FALSE(loss.again());
  CHECK(loss.again());
}

#if defined(__linux__)
TEST_CASE("a thread beside one that never sleeps notices") {
  on_a_thread([] {
    const int core = first_but(cores(), -1);
    pin(core);
    const Busy busy(core);
    CoreLoss loss;
    loss.start();
    bool lost = false;
    for (const auto end = CoreLoss::Clock::now() + std::chrono::seconds(20); !lost && CoreLoss::Clock::now() < end;) lost = loss.lost();
    CHECK(lost);
  });
}

TEST_CASE("a worker takes the place it is asked for, rests there, and is free again when nobody else is") {
  on_a_thread([] {
    const cpu_set_t before = cores();
    SharedCore worker;
    CallerCore caller;
    worker.start();
    CHECK_FALSE(worker.wants_rest(caller));
    const int place = first_but(before, SharedCore::here());
    if (place < 0) return;  // a machine of one core
    caller.wanted = place;
    CHECK(worker.wants_rest(caller));
    worker.rest(caller);
    CHECK(caller.wanted == -1);
    const cpu_set_t there = cores();
    CHECK(CPU_COUNT(&there) == 1);
    CHECK(SharedCore::here() == place);
    CHECK(worker.shares());
    // As a worker does: a unit, a rest where one is due. A machine in use may well send the thread away meanwhile, so that it takes longer.
    for (const auto end = CoreLoss::Clock::now() + std::chrono::seconds(10); worker.shares() && CoreLoss::Clock::now() < end;)
      if (worker.wants_rest(caller)) worker.rest(caller);
    if (!worker.shares()) {
      const cpu_set_t after = cores();
      CHECK(CPU_EQUAL(&after, &before));
    }
  });
}

TEST_CASE("a worker on its caller's core goes to another") {
  on_a_thread([] {
    const cpu_set_t before = cores();
    SharedCore worker;
    CallerCore caller;
    worker.start();
    const int place = first_but(before, SharedCore::here());
    if (place < 0) return;
    caller.wanted = place;
    worker.rest(caller);
    caller.at = place;
    std::this_thread::sleep_for(std::chrono::milliseconds(30));
    worker.start();
    REQUIRE(worker.shares());
    worker.rest(caller);
    const cpu_set_t after = cores();
    CHECK_FALSE(CPU_ISSET(place, &after));
    CHECK(CPU_COUNT(&after) == CPU_COUNT(&before) - 1);
  });
}

TEST_CASE("each index once beside a thread that never sleeps, whichever core it has") {
  const cpu_set_t all = cores();
  for (int core = 0; core < CPU_SETSIZE; ++core) {
    if (!CPU_ISSET(core, &all)) continue;
    const Busy busy(core);
    ThreadPool pool(3);
    std::vector<int> seen(40);
    const auto end = CoreLoss::Clock::now() + std::chrono::milliseconds(300);
    int jobs = 0;
    for (; CoreLoss::Clock::now() < end; ++jobs)
      pool.run(40, [&](index_t i) {
        const auto until = CoreLoss::Clock::now() + std::chrono::microseconds(50);
        while (CoreLoss::Clock::now() < until) {}
        ++seen[static_cast<std::size_t>(i)];
      });
    CHECK(seen == std::vector<int>(40, jobs));
    if (core > 2) break;
  }
}
#endif
