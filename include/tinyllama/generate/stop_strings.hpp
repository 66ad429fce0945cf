// Text held back while it could still become a stop string.
#pragma once

#include <algorithm>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace tinyllama {

/// Feed text with push(); what it returns is safe to show. After a stop string came, stopped() holds and the rest is dropped.
class StopStrings {
 public:
  explicit StopStrings(std::vector<std::string> strings) : strings_(std::move(strings)) { std::erase(strings_, std::string()); }

  std::string push(std::string_view text) {
    if (stopped_) return {};
    held_ += text;
    std::size_t first = std::string::npos;
    for (const std::string& s : strings_) first = std::min(first, held_.find(s));
    std::size_t safe = held_.size();
    if (first != std::string::npos) {
      stopped_ = true;
      safe = first;
    } else {
      for (const std::string& s : strings_)  // the longest end of the text that begins a stop string
        for (std::size_t n = std::min(s.size() - 1, held_.size()); n > 0; --n)
          if (std::string_view(held_).substr(held_.size() - n) == std::string_view(s).substr(0, n)) {
            safe = std::min(safe, held_.size() - n);
            break;
          }
    }
    std::string out = held_.substr(0, safe);
    held_.erase(0, safe);
    return out;
  }
  /// What was held back when no more text will come.
  std::string finish() { return stopped_ ? std::string() : std::exchange(held_, {}); }
  bool stopped() const { return stopped_; }

 private:
  std::vector<std::string> strings_;
  std::string held_;
  bool stopped_ = false;
};

}  // namespace tinyllama
