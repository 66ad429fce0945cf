// The pool runs each index once, survives exceptions, nested and concurrent use, and many small jobs.
#include "tinyllama/device/thread_pool.hpp"

#include <doctest/doctest.h>

#include <chrono>
#include <stdexcept>
#include <string>

namespace {
using namespace tinyllama;
}

TEST_CASE("every index once, for 1 to 8 threads") {
  for (int threads = 1; threads <= 8; ++threads) {
    ThreadPool pool(threads);
    CHECK(pool.size() == threads);
    for (const index_t n : {0, 1, 2, 7, 8, 9, 1000}) {
      std::vector<std::atomic<int>> seen(static_cast<std::size_t>(n));
      pool.run(n, [&](index_t i) { seen[static_cast<std::size_t>(i)].fetch_add(1); });
      bool once = true;
      for (const auto& s : seen) once = once && s == 1;
      CAPTURE(threads);
      CAPTURE(n);
      CHECK(once);
    }
  }
}

TEST_CASE("a job that asks is told which worker runs it, and no two at once are the same") {
  ThreadPool pool(3);
  std::vector<std::atomic<int>> inside(3), seen(1000);
  std::atomic<bool> wrong{false};
  pool.run(1000, [&](index_t i, int worker) {
    if (worker < 0 || worker >= 3 || inside[static_cast<std::size_t>(worker)].fetch_add(1) != 0) wrong = true;
    else inside[static_cast<std::size_t>(worker)].fetch_sub(1);
    seen[static_cast<std::size_t>(i)].fetch_add(1);
  });
  CHECK_FALSE(wrong);
  for (const auto& s : seen) REQUIRE(s == 1);
}

TEST_CASE("a pool of fewer than one thread is the caller alone") {
  ThreadPool pool(0);
  CHECK(pool.size() == 1);
  const auto self = std::this_thread::get_id();
  bool here = true;
  pool.run(5, [&](index_t) { here = here && std::this_thread::get_id() == self; });
  CHECK(here);
}

TEST_CASE("what a job wrote is seen by the caller, over many small jobs") {
  ThreadPool pool(3);
  std::vector<index_t> x(64);  // not atomic: the pool orders the accesses
  for (int job = 0; job < 20000; ++job) pool.run(64, [&](index_t i) { x[static_cast<std::size_t>(i)] += i; });
  for (index_t i = 0; i < 64; ++i) REQUIRE(x[static_cast<std::size_t>(i)] == 20000 * i);
}

TEST_CASE("run returns when the last index is done, not when it is taken") {
  ThreadPool pool(4);
  for (int job = 0; job < 300; ++job) {
    std::vector<int> x(4);
    pool.run(4, [&](index_t i) {
      const auto end = std::chrono::steady_clock::now() + std::chrono::microseconds(20);
      while (std::chrono::steady_clock::now() < end) std::this_thread::yield();
      x[static_cast<std::size_t>(i)] = 1;
    });
    REQUIRE(x == std::vector<int>(4, 1));
  }
}

TEST_CASE("workers that went to sleep wake up") {
  ThreadPool pool(2);
  for (int round = 0; round < 5; ++round) {
    std::this_thread::sleep_for(std::chrono::milliseconds(20));  // far longer than they spin
    // Both must take part: each waits for the other.
    std::atomic<int> arrived{0};
    pool.run(2, [&](index_t) {
      arrived.fetch_add(1);
      while (arrived.load() < 2) std::this_thread::yield();
    });
    CHECK(arrived == 2);
  }
}

TEST_CASE("the first exception reaches the caller and the pool goes on") {
  for (const int threads : {1, 2, 4}) {
    ThreadPool pool(threads);
    for (int round = 0; round < 100; ++round) {
      std::atomic<int> calls{0};
      CHECK_THROWS_WITH_AS(pool.run(100,
                                    [&](index_t i) {
                                      calls.fetch_add(1);
                                      if (i % 10 == 3) throw std::runtime_error("from a job");
                                    }),
                           "from a job", std::runtime_error);
      CHECK(calls <= 100);
      std::atomic<int> sum{0};
      pool.run(10, [&](index_t i) { sum.fetch_add(static_cast<int>(i)); });
      CHECK(sum == 45);
    }
  }
}

TEST_CASE("a run inside a job runs on that job's thread") {
  ThreadPool pool(4);
  std::vector<std::atomic<int>> seen(40 * 7);
  std::atomic<int> elsewhere{0};
  pool.run(40, [&](index_t i) {
    const auto self = std::this_thread::get_id();
    pool.run(7, [&](index_t j) {
      seen[static_cast<std::size_t>(i * 7 + j)].fetch_add(1);
      if (std::this_thread::get_id() != self) elsewhere.fetch_add(1);
    });
  });
  bool once = true;
  for (const auto& s : seen) once = once && s == 1;
  CHECK(once);
  CHECK(elsewhere == 0);
}

TEST_CASE("an exception inside a nested run passes through both") {
  ThreadPool pool(3);
  CHECK_THROWS_WITH_AS(pool.run(8, [&](index_t) { pool.run(3, [&](index_t j) { if (j == 2) throw std::logic_error("inner"); }); }), "inner", std::logic_error);
  std::atomic<int> calls{0};
  pool.run(8, [&](index_t) { calls.fetch_add(1); });
  CHECK(calls == 8);
}

TEST_CASE("two threads may use one pool") {
  ThreadPool pool(3);
  std::atomic<std::int64_t> sums[2] = {};
  const auto use = [&](int who) {
    for (int job = 0; job < 3000; ++job) pool.run(50, [&](index_t i) { sums[who].fetch_add(i); });
  };
  std::thread other(use, 1);
  use(0);
  other.join();
  CHECK(sums[0] == 3000 * 1225);
  CHECK(sums[1] == 3000 * 1225);
}

TEST_CASE("two pools side by side, one used from a job of the other") {
  ThreadPool outer(2), inner(2);
  std::atomic<int> calls{0};
  outer.run(20, [&](index_t) { inner.run(20, [&](index_t) { calls.fetch_add(1); }); });
  CHECK(calls == 400);
}

TEST_CASE("pools come and go, idle or just used") {
  for (int round = 0; round < 50; ++round) {
    ThreadPool pool(1 + round % 5);
    if (round % 2) pool.run(3, [](index_t) {});
  }
}
