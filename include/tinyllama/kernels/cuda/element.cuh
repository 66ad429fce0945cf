// Elements as device code sees them: floats of 8, 16 and 32 bits to and from float, alone and in pairs.
#pragma once

#include <cstdint>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>

#include "tinyllama/tensor/dtype.hpp"

namespace tinyllama::cuda {

// tinyllama::bf16 and f16 convert in constexpr host code; here the same bits go through the hardware's conversions (to nearest even).
__device__ inline float to_float(float x) { return x; }
__device__ inline float to_float(bf16 x) { return __uint_as_float(static_cast<std::uint32_t>(x.bits) << 16); }
__device__ inline float to_float(f16 x) { return __half2float(__ushort_as_half(x.bits)); }

/// Two e4m3 as a word of two f16, which hold them exactly.
__device__ inline std::uint32_t e4m3_pair_to_f16(std::uint32_t two) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 890
  std::uint32_t r;
  asm("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(r) : "h"(static_cast<std::uint16_t>(two)));
  return r;
#else
  // As f16 the bits are 2^8 too small, subnormals too; a NaN's would be 480.
  const std::uint32_t w = __byte_perm(two, 0, 0x4140), magnitude = w & 0x007f007fu;
  std::uint32_t r;
  asm("mul.f16x2 %0, %1, %2;" : "=r"(r) : "r"((w & 0x00800080u) << 8 | magnitude << 7), "r"(0x5c005c00u));
  return r | (__vcmpeq2(magnitude, 0x007f007fu) & 0x7fff7fffu);
#endif
}
/// Two floats as two e4m3, `low` in the lower byte: saturated at +-448, a NaN stays one.
__device__ inline std::uint32_t e4m3_pair(float low, float high) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 890
  std::uint16_t r;
  asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(r) : "f"(high), "f"(low));
  return r;
#else
  return __nv_cvt_float2_to_fp8x2(make_float2(low, high), __NV_SATFINITE, __NV_E4M3);
#endif
}
__device__ inline float to_float(e4m3 x) { return __half2float(__ushort_as_half(static_cast<unsigned short>(e4m3_pair_to_f16(x.bits) & 0xffffu))); }

template <class T>
__device__ inline T from_float(float x) {
  if constexpr (std::is_same_v<T, float>) {
    return x;
  } else {
    T r;
    if constexpr (std::is_same_v<T, bf16>) r.bits = __bfloat16_as_ushort(__float2bfloat16_rn(x));
    else if constexpr (std::is_same_v<T, e4m3>) r.bits = static_cast<std::uint8_t>(e4m3_pair(x, 0.0f));
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
