// Someone's program: two units with two configs under run-time dispatch, and two more with static kernels of different instruction sets.
#include <cmath>
#include <cstdio>

#include <tinyllama/device/cpu.hpp>
#include <tinyllama/model/memory_plan.hpp>

#include "shared.hpp"

namespace tl = tinyllama;

double second();              // second.cpp
float baseline(const char*&);  // unit.cpp, compiled twice
float wide(const char*&);

int main() {
  constexpr auto plan = tl::memory_plan<tl::stories_260k>({.batch = 1, .tokens = 256});
  tl::Cpu dev({.threads = 2});
  const float here = rms(dev);

  bool runs_wide = true;
#if defined(__x86_64__)
  runs_wide = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#endif
  const char *narrow_isa = "", *wide_isa = "not run";
  const float a = baseline(narrow_isa), b = runs_wide ? wide(wide_isa) : a;

  std::printf("%zu bytes, %.6f million; %s %.6f, %s %.6f, %s %.6f\n", plan.total(), second(), std::string(dev.instruction_set()).c_str(), static_cast<double>(here),
              narrow_isa, static_cast<double>(a), wide_isa, static_cast<double>(b));
  const auto near = [](float x, float y) { return std::abs(x - y) <= 1e-5f * std::abs(y); };
  return plan.total() > 0 && near(here, a) && near(a, b) ? 0 : 1;
}
