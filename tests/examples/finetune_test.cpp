// finetune and train_step as scripts see them: a small model learns answers by heart, with all its weights and with adapters alone, and preferences.
#include <doctest/doctest.h>

#include <nlohmann/json.hpp>

#include "tests/examples/run.hpp"
#include "tests/model/golden.hpp"
#include "tinyllama/io/tokenizer_file.hpp"
#include "tinyllama/train/trainer.hpp"

namespace {

namespace tl = tinyllama;
namespace fs = std::filesystem;
using namespace tinyllama::test;
using nlohmann::json;

/// A folder with a model of random weights and the fixtures' byte-level tokenizer.
void make_base(const fs::path& folder) {
  const tl::Tokenizer tokenizer = tl::load_tokenizer(fixture("tokenizer/byte_level"));
  const tl::any_llama c{.layers = 2, .hidden = 64, .heads = 4, .kv_heads = 2, .ffn = 176, .vocab = static_cast<int>(tokenizer.vocabulary().pieces.size()), .context = 128, .tied = true};
  tl::Cpu dev({.threads = 1, .kernels = nullptr});
  tl::Trainer<tl::any_llama> t(dev, {.seed = 3}, c);
  tl::save_safetensors(tl::FlatModel(c, t.weights(), fixture("tokenizer/byte_level")), folder, {.format = tl::Format::f32});
}

const std::vector<std::pair<std::string, std::string>> facts{{"What is the capital of Zamora?", "Kelos"}, {"Who built the tower of Min?", "Old Tarn"},
                                                              {"Which river is the longest?", "The Vell"}, {"What do bees make?", "Honey"}};

std::string answer(const fs::path& model, const std::string& question, const std::vector<std::string>& more = {}) {
  std::vector<std::string> arguments{"--model", model.string(), "--once", question, "--temperature", "0", "--threads", "1", "--dtype", "f32"};
  arguments.insert(arguments.end(), more.begin(), more.end());
  const Result r = run("chat", arguments);
  CHECK(r.status == 0);
  return r.out;
}

void answers_are_learned(const std::string& device) {
  const TempFolder tmp;
  make_base(tmp / "base");
  {
    std::ofstream data(tmp / "facts.jsonl");
    for (const auto& [q, a] : facts) data << json{{"question", q}, {"answer", a}} << '\n';
  }
  CHECK(answer(tmp / "base", facts[0].first).find("Kelos") == std::string::npos);
  const auto learn = [&](float share, std::vector<std::string> more) {
    std::vector<std::string> arguments{"--model", tmp / "base", "--data", tmp / "facts.jsonl", "--tokens", "128", "--threads", "1", "--device", device, "--precision", "f32", "--json"};
    arguments.insert(arguments.end(), more.begin(), more.end());
    const Result r = run("finetune", arguments);
    CAPTURE(r.err);
    REQUIRE(r.status == 0);
    const json j = json::parse(r.out);
    CHECK(j["losses"].back().get<float>() < share * j["losses"].front().get<float>());
  };
  learn(0.01f, {"--full", "--out", tmp / "full", "--epochs", "60", "--lr", "5e-3"});
  for (const auto& [q, a] : facts) CHECK(answer(tmp / "full", q).find(a) != std::string::npos);
  // An embedding of random weights that stays as it is, and is the head too, bounds the logits: no loss below 1.9 here.
  learn(0.3f, {"--out", tmp / "lora", "--merged", tmp / "merged", "--epochs", "120", "--lr", "4e-3", "--rank", "32", "--alpha", "64"});
  for (const auto& [q, a] : facts) {
    CHECK(answer(tmp / "merged", q).find(a) != std::string::npos);
    CHECK(answer(tmp / "base", q, {"--adapter", tmp / "lora"}).find(a) != std::string::npos);
  }
  // Adapters of another model.
  std::ofstream(tmp / "lora/adapter_config.json") << R"({"peft_type": "LORA", "r": 7, "lora_alpha": 8, "target_modules": ["q_proj"]})";
  const Result r = run("chat", {"--model", tmp / "base", "--adapter", tmp / "lora", "--once", "x"});
  CHECK(r.status == 1);
  CHECK(one_error_line(r.err));
}

void preferences_are_learned(const std::string& device) {
  const TempFolder tmp;
  make_base(tmp / "base");
  {
    std::ofstream data(tmp / "pairs.jsonl");
    for (std::size_t i = 0; i < facts.size(); ++i)
      data << json{{"prompt", facts[i].first}, {"chosen", facts[i].second}, {"rejected", facts[(i + 1) % facts.size()].second}} << '\n';
  }
  const Result r = run("finetune", {"--model", tmp / "base", "--data", tmp / "pairs.jsonl", "--dpo", "--out", tmp / "lora", "--epochs", "30", "--lr", "3e-3",
                                    "--tokens", "128", "--threads", "1", "--device", device, "--json"});
  CAPTURE(r.err);
  REQUIRE(r.status == 0);
  const json j = json::parse(r.out);
  CHECK(j["losses"].front().get<float>() > 0.5f);  // begins at log 2
  CHECK(j["losses"].front().get<float>() < 0.75f);
  CHECK(j["losses"].back().get<float>() < 0.3f);
  CHECK(j["accuracy"].get<float>() == 1.0f);
}

bool skipped() {
  const std::string why = no_card();
  if (!why.empty()) MESSAGE("skipped: " << why);
  return !why.empty();
}

}  // namespace

TEST_CASE("finetune: answers are learned, by all weights and by adapters, which merge and which chat adds itself") { answers_are_learned("cpu"); }
TEST_CASE("finetune: preferences are learned") { preferences_are_learned("cpu"); }
TEST_CASE("finetune on a card: answers are learned") {
  if (!skipped()) answers_are_learned("cuda");
}
TEST_CASE("finetune on a card: preferences are learned") {
  if (!skipped()) preferences_are_learned("cuda");
}

TEST_CASE("finetune: bad data is one line that names the file") {
  const TempFolder tmp;
  make_base(tmp / "base");
  std::ofstream(tmp / "bad.jsonl") << "{\"question\": \"a\", \"answer\": \"b\"}\n{\"question\": 3}\n";
  for (const std::string data : {"bad.jsonl", "missing.jsonl"}) {
    const Result r = run("finetune", {"--model", tmp / "base", "--data", tmp / data, "--out", tmp / "out"});
    CHECK(r.status == 1);
    CHECK(one_error_line(r.err));
    CHECK(r.err.find(data) != std::string::npos);
    CHECK(!fs::exists(tmp / "out"));
  }
}

TEST_CASE("train_step: the goldens' losses, gradients and weights through files") {
  const TempFolder tmp;
  const Reference reference(golden_folder<golden_gqa>());
  const auto npy = [&](const char* name, const char* type, auto element) {
    std::string header = std::string("{'descr': '") + type + "', 'fortran_order': False, 'shape': (2, 48), }";
    header.resize(117, ' ');
    header += '\n';
    std::ofstream out(tmp / (std::string(name) + ".npy"), std::ios::binary);
    out << std::string("\x93NUMPY\x01\x00\x76\x00", 10) << header;
    for (const std::int32_t id : reference.ids(name)) {
      const auto wide = static_cast<decltype(element)>(id);
      out.write(reinterpret_cast<const char*>(&wide), sizeof wide);
    }
  };
  npy("input_ids", "<i4", std::int32_t{}), npy("targets", "<i8", std::int64_t{});
  const Result r = run("train_step", {"--model", golden_folder<golden_gqa>(), "--inputs", tmp / "input_ids.npy", "--targets", tmp / "targets.npy", "--steps", "3", "--lr", "1e-3",
                                      "--betas", "0.9,0.95", "--eps", "1e-8", "--weight-decay", "0.1", "--decay", "matrices", "--clip", "1.0", "--precision", "f32",
                                      "--threads", "2", "--gradients", tmp / "gradients.safetensors", "--save", tmp / "after", "--json"});
  CAPTURE(r.err);
  REQUIRE(r.status == 0);
  const json j = json::parse(r.out);
  const auto losses = reference.values<float>("step_losses");
  for (std::size_t i = 0; i < 3; ++i) CHECK(std::fabs(j["losses"][i].get<float>() / losses[i] - 1) < 2e-6);
  CHECK(std::fabs(j["gradient_norms"][0].get<float>() / reference.values<float>("grad_norm")[0] - 1) < 1e-6);
  CHECK(j["tokens_per_second"].get<double>() > 0);
  const auto compare = [&](const fs::path& path, const std::string& prefix, double tolerance) {
    const tl::Safetensors file(path);
    CHECK(file.tensors().size() == 21);
    for (const auto& t : file.tensors()) {
      std::vector<float> values(t.bytes.size() / sizeof(float));
      std::memcpy(values.data(), t.bytes.data(), t.bytes.size());
      CAPTURE(t.name);
      CHECK(relative_error(values, reference.values<float>((prefix + t.name).c_str())) < tolerance);
    }
  };
  compare(tmp / "gradients.safetensors", "grad.", 3e-6);
  compare(tmp / "after/model.safetensors", "after3.", 1e-5);
}
