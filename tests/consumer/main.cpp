// Someone's program: two units with two configs, and two more with static kernels of different instruction sets.
#include <cmath>
#include <cstdio>

#include <tinyllama/config/parameters.hpp>

double second();    // second.cpp
float baseline();   // unit.cpp, twice
float wide();

int main() {
  const auto parameters = tinyllama::parameter_count<tinyllama::stories_260k>();
  bool runs_wide = true;
#if defined(__x86_64__)
  runs_wide = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#endif
  const float a = baseline(), b = runs_wide ? wide() : a;
  std::printf("%lld parameters, %.3f, %.6f, %.6f\n", static_cast<long long>(parameters), second(), a, b);
  return parameters > 0 && std::abs(a - b) < 1e-5f ? 0 : 1;
}
