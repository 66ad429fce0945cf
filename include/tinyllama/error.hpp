// The one exception type of the library: what was expected, what was found, and where.
#pragma once

#include <stdexcept>
#include <string>
#include <string_view>
#include <utility>

namespace tinyllama {

/// Everything the library throws. `what()` is one line: "FILE: SUBJECT: expected X, found Y".
class Error : public std::runtime_error {
 public:
  explicit Error(const std::string& message) : std::runtime_error(message) {}

  /// `where` is a file (or an operation), `subject` the tensor, key or argument concerned; either may be empty.
  Error(std::string_view where, std::string_view subject, std::string_view expected, std::string_view found)
      : std::runtime_error(line(where, subject, expected, found)), where_(where), subject_(subject), expected_(expected), found_(found) {}

  const std::string& where() const { return where_; }
  const std::string& subject() const { return subject_; }
  const std::string& expected() const { return expected_; }
  const std::string& found() const { return found_; }

 private:
  static std::string line(std::string_view where, std::string_view subject, std::string_view expected, std::string_view found) {
    std::string s;
    for (std::string_view part : {where, subject})
      if (!part.empty()) s.append(part).append(": ");
    s.append("expected ").append(expected).append(", found ").append(found);
    for (char& c : s)
      if (static_cast<unsigned char>(c) < 0x20 || c == 0x7f) c = '?';  // names come from files that may be hostile
    return s;
  }
  std::string where_, subject_, expected_, found_;
};

}  // namespace tinyllama
