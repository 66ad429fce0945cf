// Run-time dispatch: the one unit of a program that compiles the kernels for every instruction set and picks a table.
// The CMake target tinyllama::tinyllama adds it to each program; without CMake, compile it beside yours and define TINYLLAMA_DISPATCH in both.

#define TINYLLAMA_DISPATCH_UNIT
// What lacks SSE4.1 is older than 2008; AVX3_DL: see highway-inl.h; SVE's vectors cannot be members or elements.
#define HWY_DISABLED_TARGETS (HWY_SSSE3 | HWY_AVX3_DL | HWY_SVE | HWY_SVE2 | HWY_SVE_256 | HWY_SVE2_128)

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "tinyllama/kernels/cpu/table-inl.h"
#include <hwy/foreach_target.h>

#include "tinyllama/kernels/cpu/table-inl.h"

#define TINYLLAMA_TABLE_OF(isa) isa::table
#include "tinyllama/kernels/cpu/pick-inl.h"

namespace tinyllama {

std::span<const Kernels* const> all_cpu_kernels();
std::span<const Kernels* const> all_cpu_kernels() {
  static const Tables<Kernels> t;
  return t.all();
}
const Kernels& cpu_kernels();
const Kernels& cpu_kernels() { return *all_cpu_kernels()[0]; }

}  // namespace tinyllama
