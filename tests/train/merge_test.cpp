// Merging: W + (alpha / rank) B A in double precision, the other weights untouched, any number of threads, and back.
#include <doctest/doctest.h>

#include <cmath>
#include <limits>

#include "tinyllama/device/cpu.hpp"
#include "tinyllama/train/merge.hpp"

using namespace tinyllama;

namespace {

std::vector<float> noise(std::int64_t n, std::uint32_t x) {
  std::vector<float> v(static_cast<std::size_t>(n));
  for (float& f : v) f = static_cast<float>(static_cast<int>((x = x * 1664525u + 1013904223u) >> 9) - (1 << 22)) * 0x1p-22f;
  return v;
}

struct shape : llama_defaults {
  static constexpr int layers = 2, hidden = 96, heads = 6, kv_heads = 2, ffn = 130, vocab = 50, context = 16;
};

}  // namespace

TEST_CASE("merge: W + (alpha / rank) B A, and nothing else changes") {
  for (const LoraOptions& options : {LoraOptions{}, LoraOptions{.rank = 1, .alpha = 0.7f, .slots = AdapterSlots::every()},
                                     LoraOptions{.rank = 5, .alpha = 3, .slots = {Slot::k, Slot::down}}}) {
    const shape c;
    const auto before = noise(parameter_count(c), 1), adapters = noise(adapter_parameter_count(c, options), 2);
    auto after = before;
    merge_adapters(c, options, after, adapters);
    std::vector<double> expected(before.begin(), before.end()), size(before.size());
    index_t offset = 0;
    for_each_parameter(c, [&](const Parameter& p) {
      for_each_adapter(c, options, [&](const Adapter& a) {
        if (a.target.hf_name() != p.hf_name()) return;
        for (index_t r = 0; r < p.rows; ++r)
          for (index_t i = 0; i < p.columns; ++i) {
            const auto at = static_cast<std::size_t>(offset + r * p.columns + i);
            for (index_t k = 0; k < a.rank; ++k) {
              const double term = static_cast<double>(options.alpha) / options.rank *
                                  static_cast<double>(adapters[static_cast<std::size_t>(a.b + r * a.rank + k)]) *
                                  static_cast<double>(adapters[static_cast<std::size_t>(a.a + k * p.columns + i)]);
              expected[at] += term;
              size[at] += std::abs(term);
            }
          }
      });
      offset += p.size();
    });
    const double unit = std::numeric_limits<float>::epsilon() / 2;
    int wrong = 0, changed = 0;
    for (std::size_t i = 0; i < after.size(); ++i) {
      // a rounding of each product, of each sum and of factor x B, then of the last sum
      const double bound = unit * ((options.rank + 3) * size[i] + std::abs(expected[i]));
      wrong += !(std::abs(static_cast<double>(after[i]) - expected[i]) <= bound);
      changed += after[i] != before[i];
    }
    CHECK(wrong == 0);
    std::int64_t targets = 0;
    for_each_adapter(c, options, [&](const Adapter& a) { targets += a.target.size(); });
    CHECK(changed <= targets);
    CHECK(changed > targets * 9 / 10);

    auto threaded = before;
    merge_adapters(Cpu({.threads = 3}), c, options, threaded, adapters);
    CHECK(threaded == after);

    unmerge_adapters(c, options, after, adapters);
    double worst = 0;
    for (std::size_t i = 0; i < after.size(); ++i)
      worst = std::max(worst, std::abs(static_cast<double>(after[i]) - static_cast<double>(before[i])) /
                                  std::max(1e-3, std::abs(expected[i]) + std::abs(static_cast<double>(before[i]))));
    CHECK(worst <= 2 * unit);
  }
}

TEST_CASE("merge: adapters as they begin change nothing") {
  const shape c;
  const LoraOptions options{.slots = AdapterSlots::every()};
  const auto before = noise(parameter_count(c), 1);
  auto after = before;
  merge_adapters(c, options, after, initial_adapters(c, options));
  CHECK(after == before);
}

TEST_CASE("merge: arrays of another length") {
  const shape c;
  const LoraOptions options;
  auto weights = noise(parameter_count(c), 1);
  const auto adapters = noise(adapter_parameter_count(c, options), 2);
  CHECK_THROWS_WITH_AS(merge_adapters(c, options, std::span(weights).first(7), adapters), doctest::Contains("weights"), Error);
  CHECK_THROWS_WITH_AS(unmerge_adapters(c, options, weights, std::span(adapters).first(7)), doctest::Contains("adapters: expected"), Error);
  CHECK_THROWS_WITH_AS(merge_adapters(c, LoraOptions{.rank = 0}, weights, adapters), doctest::Contains("rank"), Error);
}
