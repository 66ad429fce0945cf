// All that training on a card needs: `tl::Cuda dev; tl::Trainer<C, tl::Cuda> trainer(dev)`. For a .cu unit, or any unit of a program with the CMake target
// tinyllama::cuda_training.
#pragma once

#include "tinyllama/cuda.hpp"
#include "tinyllama/device/cuda_training.cuh"
#include "tinyllama/training.hpp"

#if defined(TINYLLAMA_CUDA)  // compiled in another unit: device/cuda_training.cu
namespace tinyllama {
extern template class CudaTraining<bf16>;
extern template class CudaTraining<float>;
}  // namespace tinyllama
#elif defined(__CUDACC__)
#include "tinyllama/device/cuda_training_operations.cuh"
#endif
