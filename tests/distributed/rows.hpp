// A batch whose rows fall to ranks.
#pragma once

#include <cstdint>
#include <random>
#include <span>
#include <utility>
#include <vector>

#include "tinyllama/tensor/view.hpp"

namespace tinyllama::test {

/// Rows of ids; some targets, and one whole row, do not count.
template <class C, index_t T>
struct Rows {
  std::vector<std::int32_t> inputs, targets;
  explicit Rows(int rows) {
    std::mt19937 random(7);
    for (int i = 0; i < rows * T; ++i) {
      inputs.push_back(static_cast<std::int32_t>(random() % C::vocab));
      targets.push_back(i / T == 1 || i % 5 == 0 ? -100 : static_cast<std::int32_t>(random() % C::vocab));
    }
  }
  /// The rank's rows.
  std::pair<std::span<const std::int32_t>, std::span<const std::int32_t>> share(int rank, int ranks) const {
    const std::size_t rows = inputs.size() / T, first = rows * static_cast<std::size_t>(rank) / static_cast<std::size_t>(ranks) * T,
                      end = rows * static_cast<std::size_t>(rank + 1) / static_cast<std::size_t>(ranks) * T;
    return {std::span(inputs).subspan(first, end - first), std::span(targets).subspan(first, end - first)};
  }
};

}  // namespace tinyllama::test
