// Adapters: their list, their files in PEFT's layout both ways, and files that are damaged or of something else.
#include <doctest/doctest.h>

#include <cmath>
#include <fstream>
#include <numeric>

#include "tests/support.hpp"
#include "tinyllama/train/adapter_file.hpp"

using namespace tinyllama;
using namespace tinyllama::test;
using nlohmann::json;

namespace {

constexpr any_llama small{.layers = 2, .hidden = 16, .heads = 4, .kv_heads = 2, .ffn = 24, .vocab = 40, .context = 32};
const LoraOptions two{.rank = 2, .alpha = 8, .dropout = 0.05f, .slots = {Slot::v, Slot::down}};

std::vector<float> numbers(std::size_t n) {
  std::vector<float> v(n);
  for (std::size_t i = 0; i < n; ++i) v[i] = static_cast<float>(i) / 64 - 3;  // exact in bf16 where i is small
  return v;
}


/// Adapters `two` of the small model, and a way to change what the folder says of them.
struct Saved {
  TempFolder folder;
  std::vector<float> flat = numbers(static_cast<std::size_t>(adapter_parameter_count(small, two)));
  Saved() { save_adapters(folder.path(), small, two, flat, "base"); }
  template <class F>
  void config(F&& change) {
    json j = json::parse(read_file(folder / "adapter_config.json"));
    change(j);
    std::ofstream(folder / "adapter_config.json") << j.dump();
  }
  /// Rewrites the tensors: `change(SafeTensor&)` says whether one stays.
  template <class F>
  void tensors(F&& change) {
    const std::string bytes = read_file(folder / "adapter_model.safetensors");
    const Safetensors file("copy", std::as_bytes(std::span(bytes.data(), bytes.size())));
    std::vector<SafeTensor> kept;
    for (SafeTensor t : file.tensors())
      if (change(t)) kept.push_back(std::move(t));
    write_safetensors(folder / "adapter_model.safetensors", kept);
  }
};

void refuses(const Saved& saved, const std::string& what) {
  CHECK_THROWS_WITH_AS(load_adapters(saved.folder.path(), small), doctest::Contains(what.c_str()), Error);
}

}  // namespace

TEST_CASE("adapters: one list, A then B, without gaps") {
  const LoraOptions every{.rank = 3, .slots = AdapterSlots::every()};
  index_t end = 0;
  std::vector<std::string> stems;
  for_each_adapter(small, every, [&](const Adapter& a) {
    CHECK(a.rank == 3);
    CHECK(a.a == end);
    CHECK(a.b == a.a + 3 * a.target.columns);
    CHECK(a.end() == a.b + a.target.rows * 3);
    end = a.end();
    stems.emplace_back(a.target.hf_stem);
  });
  CHECK(adapter_parameter_count(small, every) == end);
  CHECK(stems.size() == 14);
  CHECK(std::vector(stems.begin(), stems.begin() + 7) == std::vector<std::string>{"self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj",
                                                                                  "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj",
                                                                                  "mlp.down_proj"});
  // q: 16x16, k and v: 8x16, o: 16x16, gate and up: 24x16, down: 16x24
  CHECK(end == 2 * 3 * (32 + 24 + 24 + 32 + 40 + 40 + 40));
  CHECK(adapter_parameter_count(tinyllama_1b{}, {}) == 22 * 8 * (4096 + 2048 + 256));  // q and v at rank 8
  CHECK(LoraOptions{.rank = 4, .alpha = 2}.scale() == 0.5f);
  CHECK_THROWS_WITH_AS((AdapterSlots{Slot::q, Slot::head}), doctest::Contains("slot"), Error);
  CHECK(AdapterSlots{Slot::q}.contains(Slot::q));
  CHECK(!AdapterSlots{Slot::q}.contains(Slot::k));
}

TEST_CASE("adapters: initial values") {
  const auto flat = initial_adapters(small, two), again = initial_adapters(small, two);
  CHECK(flat == again);
  LoraOptions other = two;
  other.seed = 1;
  CHECK(flat != initial_adapters(small, other));
  for_each_adapter(small, two, [&](const Adapter& a) {
    const float bound = 1 / std::sqrt(static_cast<float>(a.target.columns));
    float least = 0, most = 0;
    for (index_t i = a.a; i < a.b; ++i) {
      const float x = flat[static_cast<std::size_t>(i)];
      CHECK(std::abs(x) <= bound);
      least = std::min(least, x), most = std::max(most, x);
    }
    CHECK(least < -0.5f * bound);  // 32 draws or more: a chance of 1e-4 each, and the seed is fixed
    CHECK(most > 0.5f * bound);
    for (index_t i = a.b; i < a.end(); ++i) CHECK(flat[static_cast<std::size_t>(i)] == 0.0f);
  });
}

TEST_CASE("adapters: saved and loaded") {
  const Saved s;
  const LoadedAdapters back = load_adapters(s.folder.path(), small);
  CHECK(back.flat == s.flat);
  CHECK(back.options == two);
  CHECK(back.base == "base");

  const Safetensors file(s.folder / "adapter_model.safetensors");
  CHECK(file.tensors().size() == 8);
  const SafeTensor* a = file.find("base_model.model.model.layers.1.self_attn.v_proj.lora_A.weight");
  const SafeTensor* b = file.find("base_model.model.model.layers.0.mlp.down_proj.lora_B.weight");
  REQUIRE(a);
  REQUIRE(b);
  CHECK(a->shape == std::vector<index_t>{2, 16});
  CHECK(b->shape == std::vector<index_t>{16, 2});
  const json j = json::parse(read_file(s.folder / "adapter_config.json"));
  CHECK(j["peft_type"] == "LORA");
  CHECK(j["task_type"] == "CAUSAL_LM");
  CHECK(j["target_modules"] == json{"v_proj", "down_proj"});
  CHECK(j["r"] == 2);
  CHECK(j["lora_alpha"].is_number_integer());
  CHECK(j["lora_dropout"].dump() == "0.05");
  CHECK(j["bias"] == "none");

  // A folder that is not there yet, a scale that is no integer, no base model, all matrices.
  const TempFolder folder;
  const LoraOptions every{.rank = 1, .alpha = 1.5f, .slots = AdapterSlots::every()};
  const auto flat = initial_adapters(small, every);
  save_adapters(folder / "a" / "b", small, every, flat);
  const LoadedAdapters second = load_adapters(folder / "a" / "b", small);
  CHECK(second.options == every);
  CHECK(second.flat == flat);
  CHECK(second.base.empty());
}

TEST_CASE("adapters: a config as PEFT 0.21 writes it") {
  Saved s;
  std::ofstream(s.folder / "adapter_config.json") << R"({
  "alora_invocation_tokens": null, "alpha_pattern": {}, "arrow_config": null, "auto_mapping": null,
  "base_model_name_or_path": "org/model", "bias": "none",
  "corda_config": null, "ensure_weight_tying": false, "eva_config": null, "exclude_modules": null, "fan_in_fan_out": false, "inference_mode": true,
  "init_lora_weights": true, "kasa_config": null, "layer_replication": null, "layers_pattern": null, "layers_to_transform": null, "loftq_config": {},
  "lora_alpha": 8, "lora_bias": false, "lora_dropout": 0.05, "lora_ga_config": null, "megatron_config": null, "megatron_core": "megatron.core",
  "modules_to_save": null, "monteclora_config": null, "peft_type": "LORA", "peft_version": "0.21.2", "qalora_group_size": 16, "r": 2,
  "rank_pattern": {},
  "revision": null, "target_modules": ["down_proj", "v_proj"], "target_parameters": null, "task_type": "CAUSAL_LM", "trainable_token_indices": null,
  "use_bdlora": null, "use_dora": false, "use_qalora": false, "use_rslora": false, "velora_config": null})";
  const LoadedAdapters back = load_adapters(s.folder.path(), small);
  CHECK(back.options == two);
  CHECK(back.base == "org/model");
  CHECK(back.flat == s.flat);
}

TEST_CASE("adapters: what other programs write") {
  Saved s;
  s.config([](json& j) {
    j["target_modules"] = {"mlp.down_proj", "self_attn.v_proj"};
    j["loftq_config"] = json::object();
    j["megatron_core"] = "megatron.core";
    j["a_key_of_tomorrow"] = 5;
    j["rank_pattern"] = nullptr;
    j["init_lora_weights"] = "gaussian";
    j.erase("lora_dropout");
  });
  LoraOptions expected = two;
  expected.dropout = 0;
  CHECK(load_adapters(s.folder.path(), small).options == expected);
  s.config([](json& j) {  // all-linear as PEFT 0.21 writes it down: every module by its whole name
    j["target_modules"] = {"model.layers.0.mlp.down_proj", "model.layers.1.mlp.down_proj", "model.layers.1.self_attn.v_proj",
                           "model.layers.0.self_attn.v_proj"};
  });
  CHECK(load_adapters(s.folder.path(), small).options == expected);
  // Half-precision tensors: these values are exact in both formats.
  for (const Format f : {Format::bf16, Format::f16}) {
    Saved half;
    std::vector<float> values(half.flat.size());
    for (std::size_t i = 0; i < values.size(); ++i) values[i] = static_cast<float>(static_cast<int>(i % 200) - 100) / 8;
    save_adapters(half.folder.path(), small, two, values);
    std::vector<std::vector<std::byte>> keep;
    half.tensors([&](SafeTensor& t) {
      std::vector<float> row(t.bytes.size() / 4);
      decode_row(Format::f32, t.bytes.data(), row.data(), static_cast<index_t>(row.size()));
      keep.emplace_back(row.size() * 2);
      encode_row(f, row.data(), keep.back().data(), static_cast<index_t>(row.size()));
      t.dtype = f == Format::bf16 ? "BF16" : "F16";
      t.bytes = keep.back();
      return true;
    });
    CHECK(load_adapters(half.folder.path(), small).flat == values);
  }
  // all-linear
  const TempFolder folder;
  const LoraOptions every{.slots = AdapterSlots::every()};
  save_adapters(folder.path(), small, every, initial_adapters(small, every));
  json j = json::parse(read_file(folder / "adapter_config.json"));
  j["target_modules"] = "all-linear";
  std::ofstream(folder / "adapter_config.json") << j.dump();
  CHECK(load_adapters(folder.path(), small).options.slots == AdapterSlots::every());
}

TEST_CASE("adapters: a config that cannot be used") {
  const auto with = [](auto&& change, const char* what) {
    Saved s;
    s.config(change);
    INFO(read_file(s.folder / "adapter_config.json"));
    refuses(s, what);
    refuses(s, "adapter_config.json");
  };
  with([](json& j) { j["peft_type"] = "IA3"; }, "peft_type: expected LORA");
  with([](json& j) { j.erase("peft_type"); }, "peft_type");
  with([](json& j) { j["task_type"] = "SEQ_CLS"; }, "task_type");
  with([](json& j) { j.erase("r"); }, "r: expected");
  with([](json& j) { j["r"] = 0; }, "rank: expected 1 to 16, found 0");
  with([](json& j) { j["r"] = 17; }, "rank: expected 1 to 16, found 17");
  with([](json& j) { j["r"] = -2; }, "r: expected an integer");
  with([](json& j) { j["r"] = "8"; }, "r: expected an integer");
  with([](json& j) { j.erase("lora_alpha"); }, "lora_alpha");
  with([](json& j) { j["lora_alpha"] = 0; }, "alpha: expected above 0");
  with([](json& j) { j["lora_dropout"] = 1.0; }, "dropout");
  with([](json& j) { j.erase("target_modules"); }, "target_modules");
  with([](json& j) { j["target_modules"] = json::array(); }, "slots");
  with([](json& j) { j["target_modules"] = {"q_proj", "lm_head"}; }, "found \"lm_head\"");
  with([](json& j) { j["target_modules"] = {"q_proj", 7}; }, "target_modules");
  with(
      [](json& j) {
        j["target_modules"] = {"v_proj", "model.layers.1.mlp.down_proj"};
      },
      "in all 2 layers or in none, found 1 with model.layers.1.mlp.down_proj");
  with([](json& j) { j["target_modules"] = {"v_proj", "model.layers.2.mlp.down_proj"}; }, "found \"model.layers.2.mlp.down_proj\"");
  with([](json& j) { j["target_modules"] = ".*proj"; }, "a list of modules, or all-linear");
  with([](json& j) { j["use_rslora"] = true; }, "use_rslora: expected false, found true (not supported)");
  with([](json& j) { j["use_dora"] = true; }, "use_dora");
  with([](json& j) { j["lora_bias"] = true; }, "lora_bias");
  with([](json& j) { j["fan_in_fan_out"] = true; }, "fan_in_fan_out");
  with([](json& j) { j["bias"] = "all"; }, "bias: expected none");
  with([](json& j) { j["rank_pattern"] = {{"q_proj", 4}}; }, "rank_pattern");
  with([](json& j) { j["alpha_pattern"] = {{"q_proj", 4}}; }, "alpha_pattern");
  with([](json& j) { j["modules_to_save"] = {"lm_head"}; }, "modules_to_save");
  with([](json& j) { j["layers_to_transform"] = 1; }, "layers_to_transform");
  with([](json& j) { j["init_lora_weights"] = "pissa_niter_4"; },
       "init_lora_weights: expected true, false, gaussian, eva or orthogonal, found \"pissa_niter_4\"");
  Saved s;
  std::ofstream(s.folder / "adapter_config.json") << "{";
  refuses(s, "valid JSON");
  std::filesystem::remove(s.folder / "adapter_config.json");
  refuses(s, "adapter_config.json");
}

TEST_CASE("adapters: tensors that are missing, misshapen or too many") {
  const std::string v = "base_model.model.model.layers.1.self_attn.v_proj.lora_B.weight";
  Saved missing;
  missing.tensors([&](SafeTensor& t) { return t.name != v; });
  refuses(missing, v + ": expected a tensor of shape [8, 2], found none");
  Saved turned;
  turned.tensors([&](SafeTensor& t) { return t.name == v ? (std::swap(t.shape[0], t.shape[1]), true) : true; });
  refuses(turned, v + ": expected [8, 2], found [2, 8]");
  Saved flat;
  flat.tensors([&](SafeTensor& t) { return t.name == v ? (t.shape = {16}, true) : true; });
  refuses(flat, v + ": expected [8, 2], found [16]");
  Saved integers;
  integers.tensors([&](SafeTensor& t) { return t.name == v ? (t.dtype = "I32", true) : true; });
  refuses(integers, v + ": expected dtype");
  Saved rank;  // another rank than the tensors have
  rank.config([](json& j) { j["r"] = 4; });
  refuses(rank, "expected [4, 16], found [2, 16]");
  Saved fewer;  // tensors that the config does not name
  fewer.config([](json& j) { j["target_modules"] = {"v_proj"}; });
  refuses(fewer, "down_proj.lora_A.weight: expected only adapters of the target modules");
  Saved truncated;
  std::filesystem::resize_file(truncated.folder / "adapter_model.safetensors", 900);
  refuses(truncated, "adapter_model.safetensors");
  std::filesystem::remove(truncated.folder / "adapter_model.safetensors");
  refuses(truncated, "adapter_model.safetensors");

  const Saved whole;
  any_llama other = small;
  other.layers = 3;
  CHECK_THROWS_WITH_AS(load_adapters(whole.folder.path(), other), doctest::Contains("layers.2"), Error);
  other.layers = 1;
  CHECK_THROWS_WITH_AS(load_adapters(whole.folder.path(), other), doctest::Contains("layers.1"), Error);
  other = small;
  other.hidden = 32;
  CHECK_THROWS_WITH_AS(load_adapters(whole.folder.path(), other), doctest::Contains("expected [2, 32], found [2, 16]"), Error);
}

TEST_CASE("adapters: what cannot be saved") {
  const TempFolder folder;
  const std::vector<float> flat(static_cast<std::size_t>(adapter_parameter_count(small, two)));
  CHECK_THROWS_WITH_AS(save_adapters(folder.path(), small, two, std::span(flat).first(3)), doctest::Contains("found 3"), Error);
  CHECK_THROWS_WITH_AS(save_adapters(folder.path(), small, LoraOptions{.rank = 99}, flat), doctest::Contains("rank"), Error);
  std::ofstream(folder / "file") << "x";
  CHECK_THROWS_WITH_AS(save_adapters(folder / "file" / "below", small, two, flat), doctest::Contains("below"), Error);
  CHECK(!std::filesystem::exists(folder / "adapter_config.json"));
  CHECK_THROWS_WITH_AS(initial_adapters(small, LoraOptions{.slots = {}}), doctest::Contains("slots"), Error);
}

TEST_CASE("adapters: damaged files give an Error or adapters, and nothing else") {
  const Saved good;
  for (const char* name : {"adapter_config.json", "adapter_model.safetensors"}) {
    const std::string bytes = read_file(good.folder / name);
    int errors = 0, successes = 0;
    const auto attempt = [&](const std::string& bad) {
      std::ofstream(good.folder / name, std::ios::binary) << bad;
      try {
        const LoadedAdapters a = load_adapters(good.folder.path(), small);
        REQUIRE(static_cast<std::int64_t>(a.flat.size()) == adapter_parameter_count(small, a.options));
        ++successes;
      } catch (const Error&) {
        ++errors;
      }
    };
    const std::size_t header = std::min<std::size_t>(bytes.size(), 1100);
    for (std::size_t i = 0; i < header; ++i)
      for (const int bit : {0, 4, 6}) {
        std::string bad = bytes;
        bad[i] = static_cast<char>(bad[i] ^ (1 << bit));
        attempt(bad);
      }
    for (std::size_t n = 0; n < bytes.size(); n += 7) attempt(bytes.substr(0, n));
    attempt(bytes);
    CHECK(errors > 1000);
    CHECK(successes > 0);
    std::ofstream(good.folder / name, std::ios::binary) << bytes;
  }
}
