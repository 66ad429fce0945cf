// All of it and CUDA: `tl::Cuda dev;` in the place of `tl::Cpu dev;`. For a .cu unit, or any unit of a program with the CMake target tinyllama::cuda.
#pragma once

#include "tinyllama/device/cuda.cuh"
#include "tinyllama/tinyllama.hpp"

#if defined(TINYLLAMA_CUDA)  // the kernels, and a model of any shape, are compiled in other units: device/cuda.cu, generate/cuda_instances.cpp
namespace tinyllama {
extern template class CudaDevice<bf16>;
extern template class CudaDevice<float>;
#if defined(TINYLLAMA_CUDA_INSTANCES_UNIT)
TINYLLAMA_INSTANCES(template, any_llama, Cuda)
TINYLLAMA_INSTANCES(template, any_llama, CudaF32)
#else
TINYLLAMA_INSTANCES(extern template, any_llama, Cuda)
TINYLLAMA_INSTANCES(extern template, any_llama, CudaF32)
#endif
}  // namespace tinyllama
#elif defined(__CUDACC__)
#include "tinyllama/device/cuda_operations.cuh"
#else
#error "tinyllama/cuda.hpp: compile this unit with nvcc, or link the CMake target tinyllama::cuda"
#endif

namespace tinyllama {
static_assert(Device<Cuda> && Device<CudaF32>);
}
