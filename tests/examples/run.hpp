// Runs one of the project's programs as a script would.
#pragma once

#include <algorithm>
#include <cstdlib>
#include <fstream>
#include <iterator>
#include <string>
#include <vector>

#include <sys/wait.h>

#include "tests/support.hpp"

namespace tinyllama::test {

struct Result {
  int status = -1;
  std::string out, err;
};

inline std::string content(const std::filesystem::path& path) {
  std::ifstream in(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(in), {}};
}

inline std::string quoted(const std::string& s) {
  std::string q = "'";
  for (char c : s) q += c == '\'' ? std::string("'\\''") : std::string(1, c);
  return q + "'";
}

inline Result run(const std::string& program, const std::vector<std::string>& arguments, const std::string& input = "") {
  const TempFolder folder;
  std::ofstream(folder / "in", std::ios::binary) << input;
  std::string line = quoted((std::filesystem::path(TINYLLAMA_TEST_PROGRAMS) / program).string());
  for (const auto& a : arguments) line += " " + quoted(a);
  line += " <" + quoted((folder / "in").string()) + " >" + quoted((folder / "out").string()) + " 2>" + quoted((folder / "err").string());
  const int status = std::system(line.c_str());
  return {WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status), content(folder / "out"), content(folder / "err")};
}

inline bool one_error_line(const std::string& err) { return err.starts_with("error: ") && std::count(err.begin(), err.end(), '\n') == 1; }

}  // namespace tinyllama::test
