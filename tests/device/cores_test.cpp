// Threads worth starting, of machines written down as their /proc and /sys.
#include "tinyllama/device/cores.hpp"

#include <doctest/doctest.h>

#include <fstream>
#include <limits>

#include "tests/support.hpp"

namespace tl = tinyllama;
using namespace tinyllama::test;

namespace {

struct Machine {
  TempFolder folder;
  void file(const std::string& path, const std::string& text) const {
    const auto at = folder.path() / path;
    std::filesystem::create_directories(at.parent_path());
    std::ofstream(at) << text << '\n';
  }
  void cpu(int n, const std::string& name, const std::string& text) const { file("sys/devices/system/cpu/cpu" + std::to_string(n) + "/" + name, text); }
  int cores(std::vector<int> cpus) const { return tl::cores_of(cpus, folder.path()); }
  double limit() const { return tl::cgroup_cores(folder.path()); }
};

}  // namespace

TEST_CASE("cores: without a description each CPU is one") {
  const Machine m;
  CHECK(m.cores({0, 1, 5}) == 3);
  CHECK(m.limit() == std::numeric_limits<double>::infinity());
}

TEST_CASE("cores: two threads of one core count once, and of those allowed only") {
  const Machine m;
  for (int n = 0; n < 8; ++n) m.cpu(n, "topology/thread_siblings_list", std::to_string(n % 4) + "," + std::to_string(n % 4 + 4));
  CHECK(m.cores({0, 1, 2, 3, 4, 5, 6, 7}) == 4);
  CHECK(m.cores({0, 4}) == 1);
  CHECK(m.cores({1, 2, 6}) == 2);
}

TEST_CASE("cores: little ones are left to others, unless there are no big ones") {
  const Machine m;
  for (int n = 0; n < 4; ++n) m.cpu(n, "cpu_capacity", "380");
  for (int n = 4; n < 7; ++n) m.cpu(n, "cpu_capacity", "790");
  m.cpu(7, "cpu_capacity", "1024");
  CHECK(m.cores({0, 1, 2, 3, 4, 5, 6, 7}) == 4);
  CHECK(m.cores({0, 1, 2}) == 3);
}

TEST_CASE("cores: a hybrid's performance cores") {
  const Machine m;
  m.file("sys/devices/cpu_core/cpus", "0-3");
  m.file("sys/devices/cpu_atom/cpus", "4-7");
  for (int n = 0; n < 4; ++n) m.cpu(n, "topology/thread_siblings_list", n < 2 ? "0-1" : "2-3");
  CHECK(m.cores({0, 1, 2, 3, 4, 5, 6, 7}) == 2);
  CHECK(m.cores({4, 5, 6}) == 3);
}

TEST_CASE("cores: control groups of version 2, the tightest of the path") {
  const Machine m;
  m.file("proc/self/cgroup", "0::/machine/box");
  m.file("sys/fs/cgroup/machine/cpu.max", "400000 100000");
  CHECK(m.limit() == 4);
  m.file("sys/fs/cgroup/machine/box/cpu.max", "150000 100000");
  CHECK(m.limit() == 1.5);
  m.file("sys/fs/cgroup/machine/box/cpu.max", "max 100000");
  CHECK(m.limit() == 4);
}

TEST_CASE("cores: control groups of version 1") {
  const Machine m;
  m.file("proc/self/cgroup", "5:memory:/other\n4:cpu,cpuacct:/box");
  m.file("sys/fs/cgroup/cpu/box/cpu.cfs_quota_us", "250000");
  m.file("sys/fs/cgroup/cpu/box/cpu.cfs_period_us", "100000");
  m.file("sys/fs/cgroup/cpu/cpu.cfs_quota_us", "-1");
  m.file("sys/fs/cgroup/cpu/cpu.cfs_period_us", "100000");
  CHECK(m.limit() == 2.5);
}

TEST_CASE("cores: no more threads than the limit allows at once, and at least one") {
  const Machine m;
  m.file("sys/fs/cgroup/cpu.max", "20000 100000");
  CHECK(tl::available_cores(m.folder.path()) == 1);
  CHECK(tl::available_cores() >= 1);
}
