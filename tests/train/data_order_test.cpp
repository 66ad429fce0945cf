// The order of training data: permutations are permutations and look mixed, and every prefix of a deal has its shares.
#include "tinyllama/train/data_order.hpp"

#include <doctest/doctest.h>

#include <cmath>
#include <cstdlib>
#include <numeric>
#include <string>

using namespace tinyllama;

TEST_CASE("permuted: every index once, for any size and key; keys differ") {
  for (std::int64_t n : {1, 2, 3, 4, 5, 15, 16, 17, 63, 64, 65, 100, 1000, 4096, 4097}) {
    CAPTURE(n);
    std::vector<std::int64_t> first;
    for (std::uint64_t key : {0ull, 1ull, 2ull, ~0ull}) {
      std::vector<int> seen(static_cast<std::size_t>(n), 0);
      std::vector<std::int64_t> order;
      for (std::int64_t i = 0; i < n; ++i) {
        const std::int64_t at = detail::permuted(i, n, key);
        REQUIRE(at >= 0);
        REQUIRE(at < n);
        ++seen[static_cast<std::size_t>(at)];
        order.push_back(at);
      }
      CHECK(seen == std::vector<int>(static_cast<std::size_t>(n), 1));
      if (n >= 15) CHECK(order != first);
      first = order;
    }
  }
  const std::int64_t large = (std::int64_t{1} << 40) + 12345;
  for (std::int64_t i : {std::int64_t{0}, large / 2, large - 1}) CHECK(detail::permuted(i, large, 7) < large);
}

TEST_CASE("permuted: what stood together is far apart") {
  // Of a random permutation, neighbours are n/3 apart on average, with a deviation of n/sqrt(18 n).
  constexpr std::int64_t n = 10000;
  for (std::uint64_t key = 0; key < 5; ++key) {
    double apart = 0, correlation = 0;
    for (std::int64_t i = 0; i + 1 < n; ++i)
      apart += std::abs(static_cast<double>(detail::permuted(i, n, key) - detail::permuted(i + 1, n, key)));
    for (std::int64_t i = 0; i < n; ++i)
      correlation += (static_cast<double>(i) / n - 0.5) * (static_cast<double>(detail::permuted(i, n, key)) / n - 0.5) * 12 / n;
    CHECK(std::abs(apart / n / n - 1.0 / 3) < 5 / std::sqrt(18.0 * n));
    CHECK(std::abs(correlation) < 5 / std::sqrt(static_cast<double>(n)));
  }
}

TEST_CASE("the order is part of the format: these values never change") {
  std::vector<std::int64_t> order;
  for (std::int64_t i = 0; i < 10; ++i) order.push_back(detail::permuted(i, 10, 42));
  CHECK(detail::mix_bits(0) == 0xe220a8397b1dcdafu);  // SplitMix64's first output for seed 0, as published
  std::string text;
  for (const std::int64_t i : order) text += std::to_string(i) + " ";
  CHECK(text == "4 6 5 2 8 0 9 1 7 3 ");
  const detail::Deal deal(std::vector<double>{0.693584, 0.306416});
  text.clear();
  for (std::uint64_t i = 0; i < 20; ++i) text += std::to_string(deal.source(i));
  CHECK(text == "01001000100100100100");
}

TEST_CASE("a deal: each row has one source, each source its share of every prefix") {
  const std::vector<std::vector<double>> cases{{1}, {1, 1}, {0.693584, 0.306416}, {75, 15, 10}, {0, 3, 0, 1, 0}, {1e-9, 1}, {5, 4, 3, 2, 1},
                                               {0.1, 0.1, 0.1, 0.1, 0.1, 0.1, 0.4}};
  for (const auto& weights : cases) {
    CAPTURE(weights.size());
    const detail::Deal deal(weights);
    const double sum = std::accumulate(weights.begin(), weights.end(), 0.0);
    std::vector<std::uint64_t> count(weights.size(), 0);
    double worst = 0;
    bool agree = true;
    for (std::uint64_t n = 0; n < 5000; ++n) {
      for (std::size_t s = 0; s < weights.size(); ++s) {
        agree &= deal.count(n, s) == count[s];
        worst = std::max(worst, std::abs(static_cast<double>(count[s]) - static_cast<double>(n) * weights[s] / sum));
      }
      const std::size_t s = deal.source(n);
      REQUIRE(s < weights.size());
      CHECK(weights[s] > 0);
      ++count[s];
    }
    CHECK(agree);
    CHECK(worst <= 0.5 + 0.5 * static_cast<double>(weights.size() - 1));  // half a row for each cut before it, and its own
  }
  // Far out, where n * share needs more than 64 bits.
  const detail::Deal deal(std::vector<double>{1, 2});
  const std::uint64_t far = (std::uint64_t{1} << 49) + 12345;
  CHECK(deal.count(far, 0) + deal.count(far, 1) == far);
  CHECK(std::abs(static_cast<double>(deal.count(far, 0)) / static_cast<double>(far) - 1.0 / 3) < 1e-9);
  CHECK(deal.count(far + 1, deal.source(far)) == deal.count(far, deal.source(far)) + 1);
}
