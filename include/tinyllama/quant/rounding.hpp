// Turning a float into an integer code: what the encoders of every family share.
#pragma once

#include <cmath>
#include <limits>

#include "tinyllama/quant/blocks.hpp"

namespace tinyllama::detail {

/// The value itself, out of the optimiser's reach: g++ fuses `a * b + c` across statements wherever the target has FMA, and an
/// encoder has to write the same bytes on every target. Costs 1-2 ns.
inline float unfused(float x) {
  volatile float v = x;
  return v;
}

/// floor(x) held within [0, top]; a NaN becomes 0, so that no conversion is undefined.
inline int code_floor(float x, int top) {
  if (!(x >= 1.0f)) return 0;
  return x >= static_cast<float>(top) ? top : static_cast<int>(x);
}

/// The nearest integer (halves to even) held within [low, high]; a NaN becomes low.
inline int code_nearest(float x, int low, int high) {
  if (!(x > static_cast<float>(low))) return low;
  if (x >= static_cast<float>(high)) return high;
  return static_cast<int>(std::nearbyint(x));
}

/// 1/x, and 0 for a scale of 0.
inline float inverse(float x) { return x != 0.0f ? 1.0f / x : 0.0f; }

/// True when every element is a number: a block with a NaN or an infinity is stored with the scale NaN, so that the fault shows
/// wherever the block is used instead of turning into a plausible weight.
template <int N>
inline bool all_finite(const float* in) {
  float probe = 0.0f;  // 0 x is 0 for a number and NaN for the rest
  for (int k = 0; k < N; ++k) probe += in[k] * 0.0f;
  return probe == 0.0f;
}

inline f16 nan_scale() { return f16(std::numeric_limits<float>::quiet_NaN()); }

}  // namespace tinyllama::detail
