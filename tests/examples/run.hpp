// Runs one of the project's programs as a script would.
#pragma once

#include <algorithm>
#include <cstdlib>
#include <fstream>
#include <string>
#include <vector>

#include <sys/wait.h>

#include "tests/support.hpp"

namespace tinyllama::test {

struct Result {
  int status = -1;
  std::string out, err;
};

/// Whether a file that a program is writing, or will, has come to hold `text`.
inline bool has(const std::filesystem::path& file, std::string_view text) { return std::filesystem::exists(file) && read_file(file).find(text) != std::string::npos; }

inline std::string quoted(const std::string& s) {
  std::string q = "'";
  for (char c : s) q += c == '\'' ? std::string("'\\''") : std::string(1, c);
  return q + "'";
}

/// A line of the shell: what it wrote, and how it ended.
inline Result run_line(const std::string& line) {
  const TempFolder folder;
  const int status = std::system((line + " >" + quoted((folder / "out").string()) + " 2>" + quoted((folder / "err").string())).c_str());
  return {WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status), read_file(folder / "out"), read_file(folder / "err")};
}

inline std::string program_path(const std::string& program) { return (std::filesystem::path(TINYLLAMA_TEST_PROGRAMS) / program).string(); }

inline Result run(const std::string& program, const std::vector<std::string>& arguments, const std::string& input = "") {
  const TempFolder folder;
  std::ofstream(folder / "in", std::ios::binary) << input;
  std::string line = quoted(program_path(program));
  for (const auto& a : arguments) line += " " + quoted(a);
  return run_line(line + " <" + quoted((folder / "in").string()));
}

/// The same with arguments that go through the shell; no path of a TempFolder has a character that it would take for more.
inline Result run_shell(const std::string& program, const std::string& arguments) { return run_line(quoted(program_path(program)) + " " + arguments); }

/// Why no program can use a card; "" where one can.
inline std::string no_card() {
  if (run_line("nvidia-smi -L").status != 0) return "no card";
  return run("train_step", {"--help"}).out.find("cpu or cuda") == std::string::npos ? "built without CUDA" : "";
}

inline bool one_error_line(const std::string& err) { return err.starts_with("error: ") && std::count(err.begin(), err.end(), '\n') == 1; }

}  // namespace tinyllama::test
