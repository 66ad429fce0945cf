// What the example programs share: exit codes, a progress bar, thread and model options, peak memory.
#pragma once

#include <tinyllama/error.hpp>

#include <CLI/CLI.hpp>

#include <cstdio>
#include <fstream>
#include <functional>
#include <iostream>
#include <string>

#include <unistd.h>

namespace example {

/// Parses the command line and runs `body`. Exit status: 0 success, 2 bad usage, 1 an Error, as one line on standard error.
template <class F>
int run_main(int argc, char** argv, CLI::App& app, F&& body) {
  try {
    app.parse(argc, argv);
  } catch (const CLI::ParseError& e) {
    return app.exit(e) == 0 ? 0 : 2;
  }
  try {
    body();
    std::cout.flush();
    if (!std::cout) throw tinyllama::Error("standard output", "", "a place to write to", "an error");
    return 0;
  } catch (const std::exception& e) {
    std::cerr << "error: " << e.what() << std::endl;
    return 1;
  }
}

/// A bar on standard error while a person watches, nothing otherwise: `progress("loading")` goes into a progress option.
inline std::function<void(std::size_t, std::size_t)> progress(std::string what) {
  if (!isatty(STDERR_FILENO)) return {};
  return [what = std::move(what), shown = -1](std::size_t done, std::size_t total) mutable {
    const int percent = total ? static_cast<int>(100.0 * static_cast<double>(done) / static_cast<double>(total)) : 100;
    if (percent == shown) return;
    shown = percent;
    std::fprintf(stderr, "\r%s [%-25.*s] %3d%%%s", what.c_str(), percent / 4, "=========================", percent, done == total ? "\r\033[K" : "");
    std::fflush(stderr);
  };
}

/// Bytes from a line of /proc/self/status ("VmHWM": the peak of resident memory, "VmRSS": now); 0 where there is none.
inline std::size_t status_bytes(const std::string& key) {
  std::ifstream in("/proc/self/status");
  for (std::string line; std::getline(in, line);)
    if (line.starts_with(key + ":")) return std::stoull(line.substr(key.size() + 1)) * 1024;
  return 0;
}

}  // namespace example
