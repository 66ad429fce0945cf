// What each unit computes, with the kernels that it means.
#pragma once

#include <vector>

#include <tinyllama/device/cpu.hpp>

namespace {
inline float rms(tinyllama::Cpu& dev) {
  constexpr tinyllama::index_t n = 1003;
  std::vector<float> x(n), gain(n, 2.0f), out(n);
  for (int i = 0; i < n; ++i) x[static_cast<std::size_t>(i)] = static_cast<float>(i % 17) - 8.0f;
  dev.rmsnorm({out.data(), {1, n}}, {x.data(), {1, n}}, gain.data(), 1e-5f);
  float sum = 0.0f;
  for (float v : out) sum += v * v;
  return sum;
}
}  // namespace
