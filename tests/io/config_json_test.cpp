// config.json: what is understood, what is refused, and that what is written is read back.
#include "tinyllama/io/config_json.hpp"

#include <doctest/doctest.h>

#include "tests/io/small_model.hpp"
#include "tinyllama/config/presets.hpp"

namespace {

using namespace tinyllama;
using namespace tinyllama::test;

constexpr const char* tiny = R"({"model_type": "llama", "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
  "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 40, "max_position_embeddings": 32, "rms_norm_eps": 1e-05)";

any_llama with(const std::string& more) { return parse_config_json(tiny + (more.empty() ? "" : ", " + more) + "}"); }
void refused(const std::string& more, std::initializer_list<std::string_view> words) { check_error([&] { with(more); }, words); }

}  // namespace

TEST_CASE("the keys of a config.json") {
  const any_llama plain = with("");
  CHECK(plain == small_config());
  CHECK(with(R"("tie_word_embeddings": true)").tied);
  CHECK(with(R"("rope_theta": 100000)").rope_base == 100000.0f);
  CHECK(with(R"("rope_scaling": null, "attention_bias": false, "mlp_bias": false, "hidden_act": "silu", "head_dim": 16, "pretraining_tp": 1)") == plain);
  CHECK(with(R"("rope_scaling": {"type": "linear", "factor": 4.0})").rope_scale == 4.0f);
  CHECK(with(R"("rope_scaling": {"rope_type": "linear", "factor": 2})").rope_scale == 2.0f);
  CHECK(with(R"("rope_scaling": {"rope_type": "default"})") == plain);
  CHECK(with(R"("rope_parameters": {"rope_type": "linear", "rope_theta": 5000.0, "factor": 2})").rope_base == 5000.0f);
  CHECK(with(R"("rope_parameters": {"rope_type": "linear", "rope_theta": 5000.0, "factor": 2})").rope_scale == 2.0f);
  CHECK(with(R"("sliding_window": 4096)") == plain);

  const any_llama defaults = parse_config_json(R"({"model_type": "mistral", "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
    "num_attention_heads": 4, "vocab_size": 40})");
  CHECK(defaults.kv_heads == 4);
  CHECK(defaults.context == 2048);
  CHECK(defaults.norm_eps == 1e-6f);
  CHECK(defaults.rope_base == 10000.0f);
}

TEST_CASE("what is not a Llama is refused by name") {
  refused(R"("head_dim": 32)", {"head_dim", "hidden_size / num_attention_heads = 16", "found 32"});
  refused(R"("hidden_act": "gelu")", {"hidden_act", "expected silu", "gelu"});
  refused(R"("attention_bias": true)", {"attention_bias", "found true"});
  refused(R"("mlp_bias": true)", {"mlp_bias"});
  refused(R"("mlp_bias": "no")", {"mlp_bias", "true or false"});
  refused(R"("rope_scaling": {"rope_type": "llama3", "factor": 8.0})", {"rope_scaling", "default or linear", "llama3"});
  refused(R"("rope_scaling": {"type": "linear"})", {"factor", "a number", "nothing"});
  refused(R"("rope_scaling": 4)", {"rope_scaling", "an object", "found 4"});
  refused(R"("rope_parameters": {"rope_type": "yarn"})", {"rope_parameters", "yarn"});
  refused(R"("sliding_window": 16)", {"sliding_window", "found 16"});
  refused(R"("quantization_config": {"bits": 4})", {"quantization_config"});
  refused(R"("partial_rotary_factor": 0.5)", {"partial_rotary_factor", "expected 1"});
  check_error([] { parse_config_json(R"({"model_type": "gpt2"})"); }, {"config.json: model_type", "llama or mistral", "gpt2"});
  check_error([] { parse_config_json("{}", "x"); }, {"x: model_type", "nothing"});
}

TEST_CASE("implausible numbers are refused") {
  const auto refused_size = [](const std::string& key, const std::string& value, std::initializer_list<std::string_view> words) {
    std::string j = tiny + std::string("}");
    const auto at = j.find("\"" + key + "\": ") + key.size() + 4;
    j.replace(at, j.find_first_of(",}", at) - at, value);
    check_error([&] { parse_config_json(j); }, words);
  };
  for (const char* key : {"hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size"}) {
    for (const char* value : {"-1", "1.5", "\"8\"", "3000000000", "[1]", "null", "1e3"}) refused_size(key, value, {key, "an integer"});
    refused_size(key, "0", {"between 1 and"});
    refused_size(key, "2000000000", {"between 1 and"});
  }
  refused_size("num_attention_heads", "3", {"heads", "a divisor of hidden = 64", "found 3"});
  refused_size("num_key_value_heads", "3", {"kv_heads", "a divisor of heads = 4"});
  refused_size("rms_norm_eps", "0", {"norm_eps"});
  refused_size("rms_norm_eps", "1e300", {"norm_eps"});
  refused(R"("rope_theta": -1)", {"rope_base"});
  refused(R"("rope_theta": 1e400)", {"JSON"});
  refused(R"("rope_scaling": {"type": "linear", "factor": 0})", {"rope_scale"});
}

TEST_CASE("broken JSON is refused") {
  check_error([] { parse_config_json(R"({"model_type": )"); }, {"config.json: JSON", "valid JSON"});
  check_error([] { parse_config_json("[1]"); }, {"an object", "array"});
  refused(R"("vocab_size": 41)", {"vocab_size", "once", "twice"});
  refused(R"("x": {"y": 1, "z": {"y": 1}, "y": 2})", {"y", "once", "twice"});
  std::string deep = "\"x\": ";
  for (int i = 0; i < 300000; ++i) deep += '[';
  refused(deep, {"JSON", "at most 64 levels"});
}

TEST_CASE("what is written is read back") {
  presets::any([]<class C>() {
    INFO(std::string(C::name));
    CHECK(parse_config_json(config_json(describe<C>())) == describe<C>());
    return false;
  });
  any_llama odd = small_config(true);
  odd.norm_eps = 1e-6f, odd.rope_base = 12345.678f, odd.rope_scale = 2.5f;
  CHECK(parse_config_json(config_json(odd)) == odd);
  CHECK(config_json(odd).find("1e-06") != std::string::npos);
  CHECK(config_json(odd, {.dtype = "bfloat16", .bos = 7, .eos = 8}).find("\"bos_token_id\": 7") != std::string::npos);
}
