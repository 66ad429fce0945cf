// The kernels of training for one instruction set, as a table; as table-inl.h, whose kernels come first.

#if defined(TINYLLAMA_TRAINING_TABLE_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef TINYLLAMA_TRAINING_TABLE_INL_H_
#undef TINYLLAMA_TRAINING_TABLE_INL_H_
#else
#define TINYLLAMA_TRAINING_TABLE_INL_H_
#endif

#include "tinyllama/kernels/reference_training.hpp"

#define TINYLLAMA_TRAINING_PASS
#undef TINYLLAMA_ISA_INL_H_
#include "tinyllama/kernels/cpu/tile-inl.h"
#include "tinyllama/kernels/cpu/gemm-inl.h"
#include "tinyllama/kernels/cpu/flash-inl.h"
#include "tinyllama/kernels/cpu/gradients-inl.h"
#include "tinyllama/kernels/cpu/adamw-inl.h"

namespace tinyllama::TINYLLAMA_ISA {
#if !TINYLLAMA_BF16_VNNI
// Without the instruction bf16 is no faster than f32: never chosen, here for whoever asks.
using reference::gemm_bf16;
#endif
#define TINYLLAMA_KERNEL_ENTRY(name, ...) &name,
[[maybe_unused]] static constexpr TrainingKernels training_table = {HWY_STR(TINYLLAMA_ISA_NAME), TINYLLAMA_BF16_VNNI != 0,
                                                                    TINYLLAMA_TRAINING_KERNELS(TINYLLAMA_KERNEL_ENTRY)};
#undef TINYLLAMA_KERNEL_ENTRY
}

// AVX-512 with BF16: its own dot products, all else as in AVX3.
#if defined(TINYLLAMA_DISPATCH_UNIT) && HWY_TARGET == HWY_AVX3 && HWY_ARCH_X86 && !TINYLLAMA_BF16_VNNI
#define TINYLLAMA_EXTRA_PASS
#undef TINYLLAMA_ISA_INL_H_
#include "tinyllama/kernels/cpu/tile-inl.h"
#include "tinyllama/kernels/cpu/gemm-inl.h"
#include "tinyllama/kernels/cpu/flash-inl.h"
namespace tinyllama::TINYLLAMA_ISA {
static constexpr TrainingKernels training_table = [] {
  TrainingKernels t = HWY_CONCAT(HWY_NAMESPACE, _TRAINING)::training_table;
  t.instruction_set = HWY_STR(TINYLLAMA_ISA_NAME), t.bf16_dot = true, t.gemm_bf16 = &gemm_bf16, t.flash_forward = &flash_forward, t.flash_backward = &flash_backward;
  return t;
}();
}
#undef TINYLLAMA_EXTRA_PASS
#define TINYLLAMA_HAVE_EXTRA_PASS
#endif
#undef TINYLLAMA_TRAINING_PASS

#endif
