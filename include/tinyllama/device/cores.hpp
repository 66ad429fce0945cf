// How many threads are worth starting: cores that the process may use, counted once where two threads share one, without the small ones of a
// big/little machine, and no more than its control group may use at once.
#pragma once

#include <filesystem>
#include <vector>

#include "tinyllama/compiled.hpp"

#if TINYLLAMA_WITH_DEFINITIONS
#include <algorithm>
#include <cmath>
#include <fstream>
#include <limits>
#include <set>
#include <sstream>
#include <string>
#include <thread>

#if defined(__linux__)
#include <sched.h>
#endif
#endif

namespace tinyllama {

/// Threads that a Cpu starts when it is not told how many. `root` is where /proc and /sys are.
TINYLLAMA_COMPILED int available_cores(const std::filesystem::path& root = "/");
/// Of `cpus`, as numbered under root/sys: cores, each once, of at least half the largest one's capacity, and no efficiency cores of a hybrid.
TINYLLAMA_COMPILED int cores_of(std::vector<int> cpus, const std::filesystem::path& root);
/// Cores' worth of time that the control groups (v2, v1) of this process leave; infinity without a limit.
TINYLLAMA_COMPILED double cgroup_cores(const std::filesystem::path& root);

#if TINYLLAMA_WITH_DEFINITIONS
namespace detail {

inline std::string first_line(const std::filesystem::path& path) {
  std::ifstream in(path);
  std::string line;
  std::getline(in, line);
  return line;
}

/// "0-3,8" as numbers; what is no such list is empty.
inline std::vector<int> parse_cpu_list(const std::string& text) {
  std::vector<int> cpus;
  std::istringstream in(text);
  for (std::string part; std::getline(in, part, ',');) {
    int first = 0, last = 0;
    char dash = 0;
    std::istringstream range(part);
    if (!(range >> first)) return {};
    if (!(range >> dash >> last)) last = first;
    for (int c = first; c <= last && c - first < 65536; ++c) cpus.push_back(c);
  }
  return cpus;
}

}  // namespace detail

TINYLLAMA_COMPILED double cgroup_cores(const std::filesystem::path& root) {
  using detail::first_line;
  double least = std::numeric_limits<double>::infinity();
  const auto limit = [&](double quota, double period) {
    if (quota > 0 && period > 0) least = std::min(least, quota / period);
  };
  const auto v2 = [&](const std::filesystem::path& folder) {
    std::istringstream in(first_line(folder / "cpu.max"));  // "QUOTA PERIOD" or "max PERIOD", in microseconds
    double quota = 0, period = 0;
    if (in >> quota >> period) limit(quota, period);
  };
  const auto v1 = [&](const std::filesystem::path& folder) {
    std::istringstream quota(first_line(folder / "cpu.cfs_quota_us")), period(first_line(folder / "cpu.cfs_period_us"));
    double q = 0, p = 0;
    if (quota >> q && period >> p) limit(q, p);
  };
  const std::filesystem::path groups = root / "sys/fs/cgroup";
  v2(groups), v1(groups / "cpu");  // what a container sees as its root
  std::ifstream in(root / "proc/self/cgroup");
  for (std::string line; std::getline(in, line);) {  // "0::/a/b", or in v1 "4:cpu,cpuacct:/a/b"
    const std::size_t one = line.find(':'), two = line.find(':', one + 1);
    if (one == line.npos || two == line.npos) continue;
    const std::string controllers = "," + line.substr(one + 1, two - one - 1) + ",";
    const bool unified = controllers == ",,";
    if (!unified && controllers.find(",cpu,") == controllers.npos) continue;
    const std::filesystem::path base = unified ? groups : groups / "cpu";
    for (std::filesystem::path group = line.substr(two + 1); group.has_relative_path(); group = group.parent_path()) {
      if (unified) v2(base / group.relative_path());
      else v1(base / group.relative_path());
    }
  }
  return least;
}

TINYLLAMA_COMPILED int cores_of(std::vector<int> cpus, const std::filesystem::path& root) {
  using detail::first_line, detail::parse_cpu_list;
  const std::filesystem::path system = root / "sys/devices/system/cpu";
  const std::vector<int> performance = parse_cpu_list(first_line(root / "sys/devices/cpu_core/cpus"));  // Intel's hybrids
  const auto is_performance = [&](int c) { return std::find(performance.begin(), performance.end(), c) != performance.end(); };
  if (std::any_of(cpus.begin(), cpus.end(), is_performance)) std::erase_if(cpus, [&](int c) { return !is_performance(c); });
  const auto folder = [&](int c) { return system / ("cpu" + std::to_string(c)); };
  const auto capacity = [&](int c) {
    double v = 0;
    std::istringstream in(first_line(folder(c) / "cpu_capacity"));  // Arm
    return in >> v ? v : 1024.0;
  };
  double most = 0;
  for (const int c : cpus) most = std::max(most, capacity(c));
  std::set<std::string> cores;
  for (const int c : cpus) {
    if (2 * capacity(c) < most) continue;
    const std::string siblings = first_line(folder(c) / "topology/thread_siblings_list");
    cores.insert(siblings.empty() ? std::to_string(c) : siblings);
  }
  return static_cast<int>(cores.size());
}

TINYLLAMA_COMPILED int available_cores(const std::filesystem::path& root) {
  std::vector<int> cpus;
#if defined(__linux__)
  cpu_set_t set;
  if (sched_getaffinity(0, sizeof set, &set) == 0)
    for (int c = 0; c < CPU_SETSIZE; ++c)
      if (CPU_ISSET(c, &set)) cpus.push_back(c);
#endif
  const int cores = cpus.empty() ? static_cast<int>(std::thread::hardware_concurrency()) : cores_of(std::move(cpus), root);
  return std::max(1, static_cast<int>(std::min<double>(cores, std::ceil(cgroup_cores(root)))));
}
#endif

}  // namespace tinyllama
