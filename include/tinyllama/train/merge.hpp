// Adapters merged into the weights they belong to, W += (alpha / rank) B A, and taken out again.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "tinyllama/train/adapters.hpp"

namespace tinyllama {

namespace detail {

/// A device without threads.
struct OneThread {
  template <class F>
  void parallel_for(index_t n, index_t, F&& f) const { f(index_t{0}, n); }
};

/// W += factor B A for rows [begin, end) of one matrix. The row of B A is summed before it meets W, over the rank in order: merging and
/// unmerging compute the same number, and the bits do not depend on the threads.
inline void add_product(float* w, const float* a, const float* b, const Adapter& adapter, float factor, index_t begin, index_t end,
                        std::vector<float>& sum) {
  const index_t columns = adapter.target.columns, rank = adapter.rank;
  sum.resize(static_cast<std::size_t>(columns));
  for (index_t r = begin; r < end; ++r) {
    std::fill(sum.begin(), sum.end(), 0.0f);
    for (index_t k = 0; k < rank; ++k) {
      const float f = factor * b[r * rank + k];
      for (index_t i = 0; i < columns; ++i) sum[static_cast<std::size_t>(i)] += f * a[k * columns + i];
    }
    for (index_t i = 0; i < columns; ++i) w[r * columns + i] += sum[static_cast<std::size_t>(i)];
  }
}

template <class Device, Config C>
void add_adapters(const Device& dev, const C& c, const LoraOptions& options, std::span<float> weights, std::span<const float> adapters,
                  float factor) {
  check(options, c, "merge_adapters");
  const auto require = [](const char* what, std::int64_t expected, std::size_t found) {
    if (static_cast<std::int64_t>(found) != expected)
      throw Error("merge_adapters", what, std::to_string(expected) + " values", std::to_string(found));
  };
  require("weights", parameter_count(c), weights.size());
  require("adapters", adapter_parameter_count(c, options), adapters.size());
  std::vector<Adapter> list;
  for_each_adapter(c, options, [&](const Adapter& a) { list.push_back(a); });
  auto adapter = list.begin();
  index_t offset = 0;
  for_each_parameter(c, [&](const Parameter& p) {
    if (adapter != list.end() && adapter->target.layer == p.layer && adapter->target.slot == p.slot) {
      const Adapter& now = *adapter++;
      dev.parallel_for(p.rows, 64, [&](index_t begin, index_t end) {
        std::vector<float> sum;
        add_product(weights.data() + offset, adapters.data() + now.a, adapters.data() + now.b, now, factor, begin, end, sum);
      });
    }
    offset += p.size();
  });
}

}  // namespace detail

/// weights: all parameters in one array, in for_each_parameter's order; adapters: the array of for_each_adapter. `dev` lends its threads. Throws
/// Error for arrays of another length.
template <class Device, Config C>
void merge_adapters(const Device& dev, const C& c, const LoraOptions& options, std::span<float> weights, std::span<const float> adapters) {
  detail::add_adapters(dev, c, options, weights, adapters, options.scale());
}

/// Takes merged adapters out again: the weights are what they were, to rounding.
template <class Device, Config C>
void unmerge_adapters(const Device& dev, const C& c, const LoraOptions& options, std::span<float> weights, std::span<const float> adapters) {
  detail::add_adapters(dev, c, options, weights, adapters, -options.scale());
}

/// The same on the calling thread.
template <Config C>
void merge_adapters(const C& c, const LoraOptions& options, std::span<float> weights, std::span<const float> adapters) {
  merge_adapters(detail::OneThread{}, c, options, weights, adapters);
}
template <Config C>
void unmerge_adapters(const C& c, const LoraOptions& options, std::span<float> weights, std::span<const float> adapters) {
  unmerge_adapters(detail::OneThread{}, c, options, weights, adapters);
}

}  // namespace tinyllama
