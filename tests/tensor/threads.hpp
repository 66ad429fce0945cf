// The least that the tensor layer asks of a device: memory and parallel_for. Compiles in a blink, unlike Cpu with its kernels.
#pragma once

#include <algorithm>
#include <cstdlib>
#include <vector>

#include "tinyllama/device/thread_pool.hpp"
#include "tinyllama/tensor/vec.hpp"

namespace tinyllama::test {

class Threads {
 public:
  explicit Threads(int n) : pool_(n) {}
  template <class F>
  void parallel_for(index_t n, index_t grain, F&& f) const {
    grain = std::max<index_t>(1, grain);
    pool_.run((n + grain - 1) / grain, [&](index_t i) { f(i * grain, std::min(n, (i + 1) * grain)); });
  }
  std::byte* allocate(std::size_t bytes) const {
    ++live;
    return static_cast<std::byte*>(std::aligned_alloc(64, (bytes + 64) / 64 * 64));
  }
  void deallocate(std::byte* p) const noexcept {
    --live;
    std::free(p);
  }
  mutable int live = 0;

 private:
  mutable ThreadPool pool_;
};

/// Sizes around everything that is counted in lanes, and one that several threads share.
inline std::vector<index_t> awkward_sizes() {
  constexpr index_t n = Vec::lanes;
  return {0, 1, n - 1, n, n + 1, 4 * n - 1, 4 * n + 1, 100, 64 * n + 3, 40007};
}

/// Reproducible numbers in about [-4, 4].
inline std::vector<float> numbers(index_t n, std::uint32_t seed = 1) {
  std::vector<float> x(static_cast<std::size_t>(n));
  for (float& v : x) {
    seed = seed * 1664525u + 1013904223u;
    v = static_cast<float>(static_cast<std::int32_t>(seed)) * 0x1p-29f;
  }
  return x;
}

template <class T>
std::vector<T> converted(const std::vector<float>& x) {
  std::vector<T> r;
  for (float v : x) r.push_back(T(v));
  return r;
}

}  // namespace tinyllama::test
