// CudaDevice's operations and all their kernels, compiled once for a program (the CMake target tinyllama::cuda adds this unit).

#include "tinyllama/device/cuda_operations.cuh"

template class tinyllama::CudaDevice<tinyllama::bf16>;
template class tinyllama::CudaDevice<float>;
