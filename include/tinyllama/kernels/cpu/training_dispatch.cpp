// Run-time dispatch of the kernels of training: a unit of its own, so that programs that only generate do not compile it.
// The CMake target tinyllama::training adds it to each program.

#define TINYLLAMA_DISPATCH_UNIT
// As in dispatch.cpp: the same tables, in the same order.
#define HWY_DISABLED_TARGETS (HWY_SSSE3 | HWY_AVX3_DL | HWY_SVE | HWY_SVE2 | HWY_SVE_256 | HWY_SVE2_128)

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "tinyllama/kernels/cpu/training_table-inl.h"
#include <hwy/foreach_target.h>

#include "tinyllama/kernels/cpu/training_table-inl.h"

#define TINYLLAMA_TABLE_OF(isa) HWY_CONCAT(isa, _TRAINING)::training_table
#include "tinyllama/kernels/cpu/pick-inl.h"

namespace tinyllama {

std::span<const TrainingKernels* const> all_cpu_training_kernels();
std::span<const TrainingKernels* const> all_cpu_training_kernels() {
  static const Tables<TrainingKernels> t;
  return t.all();
}

}  // namespace tinyllama
