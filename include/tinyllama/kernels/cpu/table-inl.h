// Every kernel for one instruction set, as a table; under foreach_target, for each of them, and once more for AVX-512 with BF16 and VNNI.

#if defined(TINYLLAMA_TABLE_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef TINYLLAMA_TABLE_INL_H_
#undef TINYLLAMA_TABLE_INL_H_
#else
#define TINYLLAMA_TABLE_INL_H_
#endif

#undef TINYLLAMA_ISA_INL_H_
#include "tinyllama/kernels/cpu/elementwise-inl.h"
#include "tinyllama/kernels/cpu/attention-inl.h"
#include "tinyllama/kernels/cpu/tile-inl.h"
#include "tinyllama/kernels/cpu/matmul-inl.h"
#include "tinyllama/kernels/cpu/blocks-inl.h"
#include "tinyllama/kernels/cpu/block_tiles-inl.h"
#include "tinyllama/kernels/cpu/prefill-inl.h"

namespace tinyllama::TINYLLAMA_ISA {
#define TINYLLAMA_KERNEL_ENTRY(name, ...) &name,
[[maybe_unused]] static constexpr Kernels table = {HWY_STR(TINYLLAMA_ISA_NAME), TINYLLAMA_BF16_VNNI != 0, stream_rows,
                                                  TINYLLAMA_KERNELS(TINYLLAMA_KERNEL_ENTRY)};
#undef TINYLLAMA_KERNEL_ENTRY
}

// AVX-512 with BF16 and VNNI: its own dot products, all else as in AVX3.
#if defined(TINYLLAMA_DISPATCH_UNIT) && HWY_TARGET == HWY_AVX3 && HWY_ARCH_X86 && !TINYLLAMA_BF16_VNNI
#define TINYLLAMA_EXTRA_PASS
#undef TINYLLAMA_ISA_INL_H_
#include "tinyllama/kernels/cpu/tile-inl.h"
#include "tinyllama/kernels/cpu/matmul-inl.h"
#include "tinyllama/kernels/cpu/blocks-inl.h"
#include "tinyllama/kernels/cpu/block_tiles-inl.h"
#include "tinyllama/kernels/cpu/prefill-inl.h"
namespace tinyllama::TINYLLAMA_ISA {
static constexpr Kernels table = [] {
  Kernels t = HWY_NAMESPACE::table;
  t.instruction_set = HWY_STR(TINYLLAMA_ISA_NAME), t.bf16_dot = true, t.int8_stream_rows = stream_rows;
  t.matmul_bf16 = &matmul_bf16, t.matmul_int8 = &matmul_int8, t.attention_bf16 = &attention_bf16;
  return t;
}();
}
#undef TINYLLAMA_EXTRA_PASS
#define TINYLLAMA_HAVE_EXTRA_PASS
#endif

#endif
