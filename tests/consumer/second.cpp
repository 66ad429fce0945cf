// Another unit of the same program, with another config.
#include <tinyllama/model/memory_plan.hpp>

#include "shared.hpp"

namespace {
struct mine : tinyllama::tinyllama_1b {
  static constexpr int layers = 12, hidden = 768, heads = 12, kv_heads = 4, ffn = 2048;
};
static_assert(tinyllama::memory_plan<mine>({}).weights > 0);
}  // namespace

double second();
double second() {
  tinyllama::Cpu dev({.threads = 1});
  return static_cast<double>(tinyllama::parameter_count<mine>()) / 1e6 + 0.0 * static_cast<double>(rms(dev));
}
