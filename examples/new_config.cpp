// new_config: a shape of one's own. Everything that follows from it is a constant, and it runs as soon as it is described.
#include <tinyllama/tinyllama.hpp>

#include <iomanip>
#include <iostream>

namespace tl = tinyllama;

struct my_model : tl::tinyllama_1b {
  static constexpr int layers = 12, hidden = 768, heads = 12, kv_heads = 4, ffn = 2048;
};

static_assert(tl::parameter_count<my_model>() == 124'668'672);

int main() {
  constexpr auto plan = tl::memory_plan<my_model>({.batch = 1, .tokens = 2048, .weights = tl::Format::q4_K});
  std::cout << std::fixed << std::setprecision(1) << "parameters        " << tl::parameter_count<my_model>() / 1e6 << " M in " << tl::tensor_count<my_model>()
            << " tensors\n"
            << "FLOPs a token     " << tl::inference_flops_per_token(my_model{}, 1024) / 1e6 << " M at position 1024, " << tl::training_flops_per_token<my_model>() / 1e6
            << " M in training\n"
            << "weights in q4_K   " << static_cast<double>(plan.weights) / 1e6 << " MB\n"
            << "KV cache in f16   " << static_cast<double>(plan.cache) / 1e6 << " MB for 2048 positions\n"
            << "activations       " << static_cast<double>(plan.activations) / 1e6 << " MB\n";
}
