// Tensor maps: arrays of bf16, or f32, as the copy engine of Hopper sees them, in boxes that land in shared memory in the 128-byte swizzle. Host code.
#pragma once

#include <cudaTypedefs.h>

#include "tinyllama/device/cuda_runtime.cuh"
#include "tinyllama/tensor/dtype.hpp"

namespace tinyllama::cuda {

/// `sizes`: of each dimension, the innermost first; `strides`: bytes between neighbours along the others, multiples of 16. What lies outside reads as zeros.
template <int Rank>
CUtensorMap tensor_map(const void* p, const cuuint64_t (&sizes)[Rank], const cuuint64_t (&strides)[Rank - 1], const cuuint32_t (&box)[Rank], CUtensorMapDataType type = CU_TENSOR_MAP_DATA_TYPE_BFLOAT16) {
  static const auto encode = [] {
    void* f = nullptr;
    cudaDriverEntryPointQueryResult found{};
    check(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &f, 12000, cudaEnableDefault, &found), "cudaGetDriverEntryPointByVersion", "cuTensorMapEncodeTiled");
    if (found != cudaDriverEntryPointSuccess) throw Error("CUDA", "cuTensorMapEncodeTiled", "a driver that has it", "none");
    return reinterpret_cast<PFN_cuTensorMapEncodeTiled_v12000>(f);
  }();
  CUtensorMap map;
  cuuint32_t ones[Rank];
  for (cuuint32_t& one : ones) one = 1;
  const CUresult r = encode(&map, type, Rank, const_cast<void*>(p), sizes, strides, box, ones, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                            CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (r != CUDA_SUCCESS) throw Error("CUDA", "cuTensorMapEncodeTiled", "success", "error " + std::to_string(static_cast<int>(r)));
  return map;
}

/// A matrix [rows, columns] of bf16, in boxes of [box, 64].
inline CUtensorMap tensor_map(const bf16* p, index_t rows, index_t columns, index_t ld, int box) {
  return tensor_map<2>(p, {static_cast<cuuint64_t>(columns), static_cast<cuuint64_t>(rows)}, {static_cast<cuuint64_t>(ld) * 2}, {64, static_cast<cuuint32_t>(box)});
}
/// The same of f32, in boxes of [box, 32].
inline CUtensorMap tensor_map_f32(const float* p, index_t rows, index_t columns, index_t ld, int box) {
  return tensor_map<2>(p, {static_cast<cuuint64_t>(columns), static_cast<cuuint64_t>(rows)}, {static_cast<cuuint64_t>(ld) * 4}, {32, static_cast<cuuint32_t>(box)}, CU_TENSOR_MAP_DATA_TYPE_FLOAT32);
}

}  // namespace tinyllama::cuda
