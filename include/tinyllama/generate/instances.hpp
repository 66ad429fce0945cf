// Under TINYLLAMA_DISPATCH: loading, the forward pass and generation of any_llama and of each preset on a Cpu are compiled once a program, in
// generate/instances.cpp, and not in each unit that uses them.
#pragma once

#include "tinyllama/generate/generate.hpp"
#include "tinyllama/model/load.hpp"

#if defined(TINYLLAMA_DISPATCH)
#if defined(TINYLLAMA_INSTANCES_UNIT)
#define TINYLLAMA_INSTANCE template
#else
#define TINYLLAMA_INSTANCE extern template
#endif

#define TINYLLAMA_INSTANCES(C)                                                                                                                  \
  TINYLLAMA_INSTANCE Model<C, Cpu> load<C, Cpu>(Cpu&, const Checkpoint&, const LoadOptions&);                                                   \
  TINYLLAMA_INSTANCE void forward<C, Cpu, NoObserver&>(const Weights<C, Cpu>&, std::span<const std::int32_t>, std::span<const Sequence>,        \
                                                       Workspace<C, Cpu>&, Logits, NoObserver&);                                                \
  TINYLLAMA_INSTANCE void forward<C, Cpu, NoObserver>(const Weights<C, Cpu>&, std::span<const std::int32_t>, std::span<const Sequence>,         \
                                                      Workspace<C, Cpu>&, Logits, NoObserver&&);                                                \
  TINYLLAMA_INSTANCE class Session<C, Cpu>;                                                                                                     \
  TINYLLAMA_INSTANCE class Generation<C, Cpu>;                                                                                                  \
  TINYLLAMA_INSTANCE Generation<C, Cpu> generate<C, Cpu>(Session<C, Cpu>&, std::vector<std::int32_t>, GenerateOptions);                         \
  TINYLLAMA_INSTANCE Generation<C, Cpu> generate<C, Cpu>(Session<C, Cpu>&, std::string_view, GenerateOptions);

namespace tinyllama {
TINYLLAMA_INSTANCES(any_llama)
TINYLLAMA_PRESETS(TINYLLAMA_INSTANCES, TINYLLAMA_INSTANCES)
}  // namespace tinyllama

#undef TINYLLAMA_INSTANCE
#undef TINYLLAMA_INSTANCES
#endif
