// Another unit of the same program, with another config.
#include <tinyllama/config/parameters.hpp>

namespace {
struct mine : tinyllama::tinyllama_1b {
  static constexpr int layers = 12, hidden = 768, heads = 12, kv_heads = 4, ffn = 2048;
};
}  // namespace

double second();
double second() { return static_cast<double>(tinyllama::parameter_count<mine>()) / 1e6; }
