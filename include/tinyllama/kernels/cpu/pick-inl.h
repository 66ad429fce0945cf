// Behind foreach_target: the tables that this CPU can run, best first. TINYLLAMA_TABLE_OF(namespace of an instruction set) names a table.

#include <array>
#include <span>

#include <hwy/targets.h>

namespace tinyllama {
namespace {

template <class Table>
struct Tables {
  std::array<const Table*, 16> best_first{};
  std::size_t count = 0;
  Tables() {
    const auto add = [&](bool runs, const Table& t) {
      if (runs && count < best_first.size()) best_first[count++] = &t;
    };
    [[maybe_unused]] const auto supported = hwy::SupportedTargets();
#if defined(TINYLLAMA_HAVE_EXTRA_PASS)
    add((supported & HWY_AVX3) != 0 && __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vnni"), TINYLLAMA_TABLE_OF(N_AVX3_BF16));
#endif
// The target that foreach_target visits last is the one whose macros are in force here: the best that every CPU of this build has.
#if HWY_TARGETS & HWY_AVX3 && HWY_TARGET != HWY_AVX3
    add((supported & HWY_AVX3) != 0, TINYLLAMA_TABLE_OF(N_AVX3));
#endif
#if HWY_TARGETS & HWY_AVX2 && HWY_TARGET != HWY_AVX2
    add((supported & HWY_AVX2) != 0, TINYLLAMA_TABLE_OF(N_AVX2));
#endif
#if HWY_TARGETS & HWY_SSE4 && HWY_TARGET != HWY_SSE4
    add((supported & HWY_SSE4) != 0, TINYLLAMA_TABLE_OF(N_SSE4));
#endif
    add(true, TINYLLAMA_TABLE_OF(TINYLLAMA_ISA_NAME));
  }
  std::span<const Table* const> all() const { return {best_first.data(), count}; }
};

}  // namespace
}  // namespace tinyllama
