// Finds pieces that stand as such in a text: the longest of a set of strings that starts at a position.
#pragma once

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace tinyllama::detail {

class PrefixMatcher {
 public:
  struct Match {
    std::size_t length = 0;  // 0: none
    std::int32_t id = -1;
  };

  PrefixMatcher() = default;
  /// Strings with their ids; empty ones are left out.
  explicit PrefixMatcher(std::vector<std::pair<std::string, std::int32_t>> entries) : entries_(std::move(entries)) {
    std::erase_if(entries_, [](const auto& e) { return e.first.empty(); });
    std::sort(entries_.begin(), entries_.end());
    for (const auto& e : entries_) first_[static_cast<unsigned char>(e.first[0])] = true;
  }

  bool empty() const { return entries_.empty(); }

  /// The longest entry that `text` has at `start`.
  Match match(std::string_view text, std::size_t start) const {
    Match found;
    if (start >= text.size() || !first_[static_cast<unsigned char>(text[start])]) return found;
    // Entries that agree with the text so far are neighbours in the sorted list; each further byte narrows the range.
    auto low = entries_.begin(), high = entries_.end();
    for (std::size_t depth = 0; start + depth < text.size() && low != high; ++depth) {
      const auto byte = static_cast<unsigned char>(text[start + depth]);
      const auto at = [&](const auto& e) { return e.first.size() <= depth ? -1 : static_cast<int>(static_cast<unsigned char>(e.first[depth])); };
      low = std::partition_point(low, high, [&](const auto& e) { return at(e) < byte; });
      high = std::partition_point(low, high, [&](const auto& e) { return at(e) <= byte; });
      if (low != high && low->first.size() == depth + 1) found = {depth + 1, low->second};
    }
    return found;
  }

  /// The next entry at or after `start`, as (position, match); the position is text.size() where there is none.
  std::pair<std::size_t, Match> search(std::string_view text, std::size_t start) const {
    if (!entries_.empty())
      for (std::size_t i = start; i < text.size(); ++i)
        if (const Match m = match(text, i); m.length > 0) return {i, m};
    return {text.size(), {}};
  }

 private:
  std::vector<std::pair<std::string, std::int32_t>> entries_;  // sorted
  std::array<bool, 256> first_{};
};

}  // namespace tinyllama::detail
