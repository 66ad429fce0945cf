// Numbers in f32 to a narrower format and back, on any stream: for what travels between cards. Declared here for any compiler; defined in cuda_training_operations.cuh, for nvcc.
#pragma once

#include "tinyllama/device/cuda_runtime.cuh"
#include "tinyllama/tensor/dtype.hpp"
#include "tinyllama/tensor/view.hpp"

namespace tinyllama::cuda {

template <class T>
struct Narrow {
  static void narrow(cudaStream_t stream, T* to, const float* from, index_t n);  // to nearest even
  static void widen(cudaStream_t stream, float* to, const T* from, index_t n);
};

}  // namespace tinyllama::cuda
