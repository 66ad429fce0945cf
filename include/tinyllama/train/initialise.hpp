// Initial weights as in the paper's repository, the same on every run, platform and number of threads.
#pragma once

#include <cmath>
#include <cstdint>
#include <numbers>

#include "tinyllama/config/parameters.hpp"

namespace tinyllama {

/// A stream of random bits that is a function of (key, place): splitmix64, jumped to any place at once.
constexpr std::uint64_t random_bits(std::uint64_t key, std::uint64_t place) {
  std::uint64_t z = key + (place + 1) * 0x9e3779b97f4a7c15u;
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
  return z ^ (z >> 31);
}

/// Standard deviation of a tensor's initial weights: sqrt(2 / (5 hidden)), and 1 / (sqrt(hidden) layers) for the two matrices that write to
/// the residual stream. Gains begin at 1.
template <Config C>
double initial_deviation(const C& c, const Parameter& p) {
  const double hidden = c.hidden;
  return p.slot == Slot::o || p.slot == Slot::down ? 1.0 / (std::sqrt(hidden) * c.layers) : std::sqrt(2.0 / (5.0 * hidden));
}

/// Fills one tensor, the `tensor`th of for_each_parameter, in the host's memory. Normal deviates by Box and Muller's way.
template <Config C, class D>
void initialise(D& dev, const C& c, const Parameter& p, std::uint64_t tensor, float* weights, std::uint64_t seed) {
  const std::uint64_t key = random_bits(seed, tensor);
  const double deviation = initial_deviation(c, p);
  dev.parallel_for(p.size(), 1 << 14, [&](index_t begin, index_t end) {
    for (index_t i = begin; i < end; ++i) {
      if (p.role == Role::gain) {
        weights[i] = 1.0f;
        continue;
      }
      const std::uint64_t bits = random_bits(key, static_cast<std::uint64_t>(i));
      const double u = (static_cast<double>(bits >> 32) + 1.0) * 0x1p-32, v = static_cast<double>(bits & 0xffffffffu) * 0x1p-32;  // (0, 1], [0, 1)
      weights[i] = static_cast<float>(deviation * std::sqrt(-2.0 * std::log(u)) * std::cos(2.0 * std::numbers::pi * v));
    }
  });
}
/// Fills `weights` [parameter_count(c)], in the order of for_each_parameter.
template <Config C, class D>
void initialise(D& dev, const C& c, float* weights, std::uint64_t seed) {
  std::uint64_t tensor = 0;
  for_each_parameter(c, [&](const Parameter& p) {
    initialise(dev, c, p, tensor++, weights, seed);
    weights += p.size();
  });
}

}  // namespace tinyllama
