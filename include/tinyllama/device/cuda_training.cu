// Training's operations on a card and their kernels, compiled once for a program (the CMake target tinyllama::cuda_training adds this unit).

#include "tinyllama/device/cuda_training_operations.cuh"

template class tinyllama::CudaTraining<tinyllama::bf16>;
template class tinyllama::CudaTraining<float>;
template struct tinyllama::cuda::Narrow<tinyllama::bf16>;
