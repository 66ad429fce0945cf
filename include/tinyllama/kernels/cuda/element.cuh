// Elements as device code sees them: 16-bit floats and float to and from float, alone and in pairs.
#pragma once

#include <cstdint>
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "tinyllama/tensor/dtype.hpp"

namespace tinyllama::cuda {

// tinyllama::bf16 and f16 convert in constexpr host code; here the same bits go through the hardware's conversions (to nearest even).
__device__ inline float to_float(float x) { return x; }
__device__ inline float to_float(bf16 x) { return __uint_as_float(static_cast<std::uint32_t>(x.bits) << 16); }
__device__ inline float to_float(f16 x) { return __half2float(__ushort_as_half(x.bits)); }

template <class T>
__device__ inline T from_float(float x) {
  if constexpr (std::is_same_v<T, float>) {
    return x;
  } else {
    T r;
    if constexpr (std::is_same_v<T, bf16>) r.bits = __bfloat16_as_ushort(__float2bfloat16_rn(x));
    else r.bits = __half_as_ushort(__float2half_rn(x));
    return r;
  }
}

/// Two floats as a word of 16-bit elements, `low` in the lower half.
template <class T>
__device__ inline std::uint32_t pair(float low, float high) {
  std::uint32_t r;
  if constexpr (std::is_same_v<T, bf16>) asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
  else asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
  return r;
}

/// A word of two bf16 as a word of two T.
template <class T>
__device__ inline std::uint32_t convert_pair(std::uint32_t w) {
  if constexpr (std::is_same_v<T, bf16>) return w;
  else return pair<f16>(__uint_as_float(w << 16), __uint_as_float(w & 0xffff0000u));
}

}  // namespace tinyllama::cuda
