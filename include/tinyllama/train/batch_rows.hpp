// A batch as rows of tokens: what must hold of it, its micro-batches of whole rows, its rows as sequences.
#pragma once

#include <algorithm>
#include <cstdint>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "tinyllama/device/operands.hpp"
#include "tinyllama/error.hpp"

namespace tinyllama {

struct BatchRows {
  index_t tokens = 0;      ///< of a row; 0: all that come, up to `context`
  index_t micro_rows = 0;  ///< of a micro-batch; 0: all that come
  index_t context = 0, vocab = 0;

  /// Tokens of a row of a batch of `size`. Throws Error where they do not divide it.
  index_t row_tokens(std::size_t size) const {
    const auto n = static_cast<index_t>(size), each = tokens > 0 ? tokens : std::min(context, n);
    if (n == 0 || n % each) throw Error("trainer", "inputs", "rows of " + std::to_string(each) + " tokens", std::to_string(n));
    return each;
  }
  std::int64_t micro_batches(std::size_t size) const {
    if (size == 0) return 0;
    const index_t rows = static_cast<index_t>(size) / row_tokens(size), micro = micro_rows > 0 ? micro_rows : rows;
    return (rows + micro - 1) / micro;
  }
  /// f(inputs, targets) for each micro-batch of whole rows.
  template <class F>
  void each_micro(std::span<const std::int32_t> inputs, std::span<const std::int32_t> targets, F&& f) const {
    const auto each = static_cast<std::size_t>(row_tokens(inputs.size()));
    const std::size_t micro = micro_rows > 0 ? static_cast<std::size_t>(micro_rows) * each : inputs.size();
    for (std::size_t at = 0; at < inputs.size(); at += micro) {
      const std::size_t n = std::min(micro, inputs.size() - at);
      f(inputs.subspan(at, n), targets.subspan(at, n));
    }
  }
  void as_sequences(std::size_t size, std::vector<Sequence>& to) const {
    const index_t each = row_tokens(size);
    to.clear();
    for (index_t r = 0; r < static_cast<index_t>(size); r += each) to.push_back({r, each, 0, nullptr});
  }

  /// Throws Error for other sizes, and ids outside the vocabulary.
  void check(std::span<const std::int32_t> inputs, std::span<const std::int32_t> targets) const {
    if (inputs.size() != targets.size()) throw Error("trainer", "targets", std::to_string(inputs.size()) + ", as inputs", std::to_string(targets.size()));
    const auto outside = [&](std::string_view what, std::size_t i, std::int32_t id) {
      throw Error("trainer", std::string(what) + " at " + std::to_string(i), "an id below " + std::to_string(vocab), std::to_string(id));
    };
    for (std::size_t i = 0; i < inputs.size(); ++i) {
      if (inputs[i] < 0 || inputs[i] >= vocab) outside("input", i, inputs[i]);
      if (targets[i] >= vocab) outside("target", i, targets[i]);
    }
  }
  /// Targets that count: those that are ids.
  static std::int64_t counted(std::span<const std::int32_t> targets) { return std::count_if(targets.begin(), targets.end(), [](std::int32_t t) { return t >= 0; }); }
  static void check_counted(std::int64_t count, std::span<const std::int32_t> inputs) {
    if (count == 0) throw Error("trainer", "targets", "at least one that counts", inputs.empty() ? "none at all" : "only such as do not");
  }
};

}  // namespace tinyllama
