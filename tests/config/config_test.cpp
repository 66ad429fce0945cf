// Configs: counts that follow from a shape, presets found from values, plans, and checks of run-time shapes.
#include "tinyllama/config/config.hpp"

#include <doctest/doctest.h>

#include <set>

#include "tinyllama/config/parameters.hpp"
#include "tinyllama/config/presets.hpp"

namespace tl = tinyllama;

namespace {
struct my_model : tl::tinyllama_1b {
  static constexpr int layers = 12, hidden = 768, heads = 12, kv_heads = 4, ffn = 2048;
};
}  // namespace

TEST_CASE("config: counts are constants") {
  static_assert(tl::parameter_count<tl::tinyllama_1b>() == 1'100'048'384);
  static_assert(tl::parameter_count<my_model>() == 124'668'672);
  static_assert(tl::StaticConfig<my_model> && !tl::StaticConfig<tl::any_llama> && tl::Config<tl::any_llama>);
  static_assert(tl::extents<my_model>::qkv == 768 + 2 * 256 && tl::extents<tl::any_llama>::hidden == tl::dyn);
  // FACTS: 7.32 GFLOP a token, with 1,034.5 M weights in products.
  static_assert(tl::training_flops_per_token<tl::tinyllama_1b>() == 6 * std::int64_t{1'034'420'224} + std::int64_t{12} * 22 * 2048 * 2048);
  // Tied: the head counts once, and is multiplied with.
  static_assert(tl::matmul_parameter_count<tl::stories_260k>() == tl::parameter_count<tl::stories_260k>() - 11 * 64);
  CHECK(tl::parameter_count<tl::stories_15m>() == 15'191'712);
}

TEST_CASE("config: the same numbers at run time") {
  const tl::any_llama c = tl::describe<tl::tinyllama_1b>();
  CHECK(tl::parameter_count(c) == tl::parameter_count<tl::tinyllama_1b>());
  CHECK(tl::preset_name(c) == "tinyllama_1b");
  tl::any_llama longer = c;
  longer.context = 4096;  // a longer context is the same model
  CHECK(tl::preset_name(longer) == "tinyllama_1b");
  longer.rope_scale = 4.0f;
  CHECK(tl::preset_name(longer) == "code_tinyllama_1b");
  longer.rope_base = 12345.0f;
  CHECK(tl::preset_name(longer) == "");
}

TEST_CASE("config: the parameter list names each tensor once, in both conventions") {
  std::set<std::string> hf, gguf;
  tl::for_each_parameter(tl::tinyllama_1b{}, [&](const tl::Parameter& p) { hf.insert(p.hf_name()), gguf.insert(p.gguf_name()); });
  CHECK(hf.size() == 201);
  CHECK(gguf.size() == 201);
  CHECK(hf.contains("model.layers.21.self_attn.q_proj.weight"));
  CHECK(gguf.contains("blk.21.attn_q.weight"));
  CHECK(hf.contains("lm_head.weight"));
}

TEST_CASE("config: a shape that cannot be is refused, with what is wrong") {
  const tl::any_llama good = tl::describe<tl::stories_260k>();
  CHECK_NOTHROW(tl::check(good, "f"));
  const auto message = [&](auto&& change) {
    tl::any_llama c = good;
    change(c);
    try {
      tl::check(c, "file.gguf");
    } catch (const tl::Error& e) {
      return std::string(e.what());
    }
    return std::string();
  };
  CHECK(message([](auto& c) { c.heads = 7; }) == "file.gguf: heads: expected a divisor of hidden = 64, found 7");
  CHECK(message([](auto& c) { c.kv_heads = 3; }).find("kv_heads") != std::string::npos);
  CHECK(message([](auto& c) { c.hidden = 72; }).find("head dimension: expected an even number, found 9") != std::string::npos);
  CHECK(message([](auto& c) { c.layers = 0; }).find("layers") != std::string::npos);
  CHECK(message([](auto& c) { c.vocab = 1 << 30; }).find("vocab") != std::string::npos);
  CHECK(message([](auto& c) { c.norm_eps = -1; }).find("norm_eps") != std::string::npos);
  CHECK(message([](auto& c) { c.rope_base = 0; }).find("rope_base") != std::string::npos);
}
