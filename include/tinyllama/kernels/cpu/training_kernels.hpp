// Where a unit finds the kernels of training, as kernels/cpu/kernels.hpp does for the others.
#pragma once

#include <span>

#include "tinyllama/kernels/cpu/kernels.hpp"
#include "tinyllama/kernels/reference_training.hpp"

#if defined(TINYLLAMA_DISPATCH)

namespace tinyllama {
/// Every table that this CPU can run, best first; defined in kernels/cpu/training_dispatch.cpp, which one unit of the program compiles.
std::span<const TrainingKernels* const> all_cpu_training_kernels();
}  // namespace tinyllama

#else

#include "tinyllama/kernels/cpu/training_table-inl.h"

namespace tinyllama {
static inline std::span<const TrainingKernels* const> all_cpu_training_kernels() {
  static constexpr const TrainingKernels* all[] = {&TINYLLAMA_ISA::training_table};
  return all;
}
}  // namespace tinyllama

#endif
