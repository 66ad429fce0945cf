// Run-time dispatch: the one unit of a program that compiles the kernels for every instruction set and picks a table.
// The CMake target tinyllama::tinyllama adds it to each program; without CMake, compile it beside yours and define TINYLLAMA_DISPATCH in both.

#define TINYLLAMA_DISPATCH_UNIT
#define HWY_DISABLED_TARGETS HWY_SSSE3  // what lacks SSE4.1 is older than 2008

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "tinyllama/kernels/cpu/table-inl.h"
#include <hwy/foreach_target.h>

#include "tinyllama/kernels/cpu/table-inl.h"

#include <array>
#include <span>

#include <hwy/targets.h>

namespace tinyllama {
namespace {

struct Tables {
  std::array<const Kernels*, 16> best_first{};
  std::size_t count = 0;
  Tables() {
    const auto add = [&](bool runs, const Kernels& t) {
      if (runs && count < best_first.size()) best_first[count++] = &t;
    };
    [[maybe_unused]] const auto supported = hwy::SupportedTargets();
#if defined(TINYLLAMA_HAVE_EXTRA_PASS)
    add((supported & HWY_AVX3) != 0 && __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vnni"), N_AVX3_BF16::table);
#endif
// The target that foreach_target visits last is the one whose macros are in force here: the best that every CPU of this build has.
#if HWY_TARGETS & HWY_AVX3 && HWY_TARGET != HWY_AVX3
    add((supported & HWY_AVX3) != 0, N_AVX3::table);
#endif
#if HWY_TARGETS & HWY_AVX2 && HWY_TARGET != HWY_AVX2
    add((supported & HWY_AVX2) != 0, N_AVX2::table);
#endif
#if HWY_TARGETS & HWY_SSE4 && HWY_TARGET != HWY_SSE4
    add((supported & HWY_SSE4) != 0, N_SSE4::table);
#endif
    add(true, TINYLLAMA_ISA::table);
  }
};

const Tables& tables() {
  static const Tables t;
  return t;
}

}  // namespace

const Kernels& cpu_kernels();
const Kernels& cpu_kernels() { return *tables().best_first[0]; }
std::span<const Kernels* const> all_cpu_kernels();
std::span<const Kernels* const> all_cpu_kernels() { return {tables().best_first.data(), tables().count}; }

}  // namespace tinyllama
