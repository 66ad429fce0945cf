// The arithmetic behind the order of training data: a keyed permutation, and dealing rows to sources by weight, both without history.
#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <span>
#include <utility>
#include <vector>

// Integers only, once the weights are rounded to multiples of 2^-32: the same on every machine.

namespace tinyllama {
namespace detail {

/// SplitMix64's finaliser: every bit of the result depends on every bit of x.
constexpr std::uint64_t mix_bits(std::uint64_t x) {
  x += 0x9e3779b97f4a7c15u;
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
  return x ^ (x >> 31);
}
constexpr std::uint64_t mix_bits(std::uint64_t a, std::uint64_t b) { return mix_bits(mix_bits(a) ^ b); }

/// A permutation of [0, n) chosen by `key`: four Feistel rounds on the next even number of bits (Luby and Rackoff 1988), walked until the
/// value is below n, under four times on average.
constexpr std::int64_t permuted(std::int64_t i, std::int64_t n, std::uint64_t key) {
  const int half = std::max(2, (static_cast<int>(std::bit_width(static_cast<std::uint64_t>(n - 1))) + 1) / 2);
  const std::uint64_t mask = (std::uint64_t{1} << half) - 1;
  auto x = static_cast<std::uint64_t>(i);
  do {
    std::uint64_t left = x >> half, right = x & mask;
    for (std::uint64_t round = 0; round < 4; ++round) left = std::exchange(right, left ^ (mix_bits(key + round, right) & mask));
    x = left << half | right;
  } while (x >= static_cast<std::uint64_t>(n));
  return static_cast<std::int64_t>(x);
}

/// Deals rows to sources by fixed weights: source 0 takes its share of all, source 1 its share of what is left, and so on.
class Deal {
 public:
  Deal() = default;
  explicit Deal(std::span<const double> weights) : share_(weights.size()) {
    double left = 0;
    for (std::size_t s = weights.size(); s-- > 0;) {
      left += weights[s];
      share_[s] = left > 0 ? static_cast<std::uint64_t>(std::llround(weights[s] / left * 4294967296.0)) : 0;  // of what is left, in 2^-32
    }
  }
  /// Of the first n rows, how many are of source s.
  std::uint64_t count(std::uint64_t n, std::size_t s) const {
    for (std::size_t i = 0; i < s; ++i) n -= taken(n, share_[i]);
    return taken(n, share_[s]);
  }
  /// The source of row n.
  std::size_t source(std::uint64_t n) const {
    for (std::size_t s = 0; s + 1 < share_.size(); ++s) {
      const std::uint64_t before = taken(n, share_[s]);
      if (taken(n + 1, share_[s]) > before) return s;
      n -= before;
    }
    return share_.size() - 1;
  }
  std::span<const std::uint64_t> shares() const { return share_; }

 private:
  /// n * share / 2^32, rounded. Grows by 0 or 1 with n, since a share is at most 2^32.
  static std::uint64_t taken(std::uint64_t n, std::uint64_t share) {
    return (n >> 32) * share + (((n & 0xffffffff) * share + 0x80000000) >> 32);
  }
  std::vector<std::uint64_t> share_;
};

}  // namespace detail

}  // namespace tinyllama
