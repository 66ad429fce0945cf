// Under TINYLLAMA_DISPATCH: loading, the forward pass and generation of any_llama and of each preset on a Cpu are compiled once a program, in
// generate/instances.cpp, and not in each unit that uses them.
#pragma once

#include "tinyllama/generate/generate.hpp"
#include "tinyllama/model/load.hpp"

// HOW is `template` or `extern template`.
#define TINYLLAMA_INSTANCES(HOW, C, D)                                                                                                           \
  HOW Model<C, D> load<C, D>(D&, const Checkpoint&, const LoadOptions&);                                                                         \
  HOW void forward<C, D, NoObserver&>(const Weights<C, D>&, std::span<const std::int32_t>, std::span<const Sequence>, Workspace<C, D>&, Logits,  \
                                      NoObserver&);                                                                                              \
  HOW void forward<C, D, NoObserver>(const Weights<C, D>&, std::span<const std::int32_t>, std::span<const Sequence>, Workspace<C, D>&, Logits,   \
                                     NoObserver&&);                                                                                              \
  HOW class Session<C, D>;                                                                                                                       \
  HOW class Generation<C, D>;                                                                                                                    \
  HOW Generation<C, D> generate<C, D>(Session<C, D>&, std::vector<std::int32_t>, GenerateOptions);                                               \
  HOW Generation<C, D> generate<C, D>(Session<C, D>&, std::string_view, GenerateOptions);

#if defined(TINYLLAMA_DISPATCH)
#if defined(TINYLLAMA_INSTANCES_UNIT)
#define TINYLLAMA_CPU_INSTANCES(C) TINYLLAMA_INSTANCES(template, C, Cpu)
#else
#define TINYLLAMA_CPU_INSTANCES(C) TINYLLAMA_INSTANCES(extern template, C, Cpu)
#endif

namespace tinyllama {
TINYLLAMA_CPU_INSTANCES(any_llama)
TINYLLAMA_PRESETS(TINYLLAMA_CPU_INSTANCES, TINYLLAMA_CPU_INSTANCES)
}  // namespace tinyllama

#undef TINYLLAMA_CPU_INSTANCES
#endif
