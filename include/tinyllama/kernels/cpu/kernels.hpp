// Where a unit finds its kernels: at its own -m flags (static dispatch), or by run-time dispatch with TINYLLAMA_DISPATCH defined.
#pragma once

#include <span>

#include "tinyllama/kernels/kernels.hpp"

#if defined(TINYLLAMA_DISPATCH)

namespace tinyllama {
/// The best table for the CPU the program runs on; defined in kernels/cpu/dispatch.cpp, which one unit of the program compiles.
const Kernels& cpu_kernels();
/// Every table that this CPU can run, best first.
std::span<const Kernels* const> all_cpu_kernels();
}  // namespace tinyllama

#else

#include "tinyllama/kernels/cpu/table-inl.h"

namespace tinyllama {
// Internal linkage: units built with different -m flags each mean their own.
static inline const Kernels& cpu_kernels() { return TINYLLAMA_ISA::table; }
static inline std::span<const Kernels* const> all_cpu_kernels() {
  static constexpr const Kernels* all[] = {&TINYLLAMA_ISA::table};
  return all;
}
}  // namespace tinyllama

#endif
