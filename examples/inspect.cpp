// inspect: what is in a checkpoint, without reading its weights.
#include <tinyllama/io/checkpoint_tokenizer.hpp>
#include <tinyllama/model/load.hpp>

#include <CLI/CLI.hpp>
#include <nlohmann/json.hpp>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <iostream>
#include <map>
#include <string>

#include "common.hpp"

namespace tl = tinyllama;
using json = nlohmann::json;

namespace {

/// 1e-05 and not the float's exact value.
double rounded(float x) {
  char text[32];
  std::snprintf(text, sizeof text, "%.7g", static_cast<double>(x));
  return std::stod(text);
}

struct Share { int tensors = 0; std::uint64_t bytes = 0; };

std::string tokenizer_kind(const tl::Checkpoint& c) {
  try {
    const auto t = tl::checkpoint_tokenizer(c);
    if (!t) return "none";
    return (t->vocabulary().kind == tl::Vocabulary::Kind::sentencepiece_bpe ? "SentencePiece BPE, " : "byte-level BPE, ") + std::to_string(t->size()) + " pieces";
  } catch (const tl::Error& e) {
    return std::string("none: ") + e.what();
  }
}

json describe(const tl::Checkpoint& c, tl::PlanOptions plan, bool list) {
  std::map<std::string, Share> by_format;
  std::uint64_t bytes = 0;
  for (const tl::StoredTensor& t : c.tensors()) {
    Share& s = by_format[std::string(tl::name(t.format))];
    ++s.tensors, s.bytes += t.bytes.size(), bytes += t.bytes.size();
  }
  const tl::any_llama& m = c.config;
  json j{{"path", c.path}, {"source", c.source}, {"rope_layout", tl::name(c.rope)}, {"preset", tl::preset_name(m)}, {"tokenizer", tokenizer_kind(c)},
         {"parameters", tl::parameter_count(m)}, {"tensors", c.tensors().size()}, {"bytes", bytes},
         {"config", {{"layers", m.layers}, {"hidden", m.hidden}, {"heads", m.heads}, {"kv_heads", m.kv_heads}, {"ffn", m.ffn}, {"vocab", m.vocab}, {"context", m.context},
                     {"norm_eps", rounded(m.norm_eps)}, {"rope_base", rounded(m.rope_base)}, {"rope_scale", rounded(m.rope_scale)}, {"tied", m.tied}}}};
  for (const auto& [format, share] : by_format) j["formats"][format] = {{"tensors", share.tensors}, {"bytes", share.bytes}};
  if (list)
    for (const tl::StoredTensor& t : c.tensors()) j["list"].push_back({{"name", t.name}, {"format", tl::name(t.format)}, {"shape", {t.rows, t.columns}}});
  if (plan.tokens <= 0) plan.tokens = std::min(2048, m.context);
  const tl::MemoryPlan memory = tl::memory_plan(c, plan);
  j["plan"] = {{"batch", plan.batch}, {"tokens", plan.tokens}, {"weights", memory.weights}, {"cache", memory.cache}, {"activations", memory.activations}, {"total", memory.total()}};
  return j;
}

void print(const json& j) {
  const auto mb = [](const json& v) {
    char text[32];
    std::snprintf(text, sizeof text, "%.1f MB", v.get<double>() * 1e-6);
    return std::string(text);
  };
  const std::string preset = j["preset"];
  std::cout << j["path"].get<std::string>() << " (" << j["source"].get<std::string>() << ")\n"
            << "preset      " << (preset.empty() ? "none: a shape of its own" : preset) << '\n'
            << "parameters  " << j["parameters"] << " in " << j["tensors"] << " tensors, " << mb(j["bytes"]) << '\n';
  for (const auto& [format, share] : j["formats"].items()) std::cout << "            " << format << ": " << share["tensors"] << " tensors, " << mb(share["bytes"]) << '\n';
  std::cout << "config     ";
  for (const auto& [key, value] : j["config"].items()) std::cout << ' ' << key << ' ' << value;
  std::cout << "\nRoPE        " << j["rope_layout"].get<std::string>() << " layout\ntokenizer   " << j["tokenizer"].get<std::string>() << '\n';
  const json& plan = j["plan"];
  std::cout << "memory      " << mb(plan["total"]) << " for " << plan["batch"] << " x " << plan["tokens"] << " tokens: weights " << mb(plan["weights"]) << ", KV cache "
            << mb(plan["cache"]) << ", activations " << mb(plan["activations"]) << '\n';
  if (j.contains("list"))
    for (const json& t : j["list"]) std::cout << t["name"].get<std::string>() << "  " << t["format"].get<std::string>() << "  " << t["shape"] << '\n';
}

}  // namespace

int main(int argc, char** argv) {
  CLI::App app("Shows what is in a checkpoint, without reading its weights.");
  std::string model;
  bool as_json = false, list = false;
  tl::PlanOptions plan{.tokens = 0};
  app.add_option("--model,model", model, "a GGUF file, a folder in Hugging Face layout, a .safetensors file or a llama2.c .bin")->required();
  app.add_flag("--json", as_json, "one JSON object, for programs");
  app.add_flag("--list", list, "also each tensor");
  app.add_option("--batch", plan.batch, "memory for so many sequences")->check(CLI::Range(1, 4096));
  app.add_option("--tokens", plan.tokens, "of so many tokens each; the default is the context, at most 2048")->check(CLI::Range(1, 1 << 26));
  return example::run_main(argc, argv, app, [&] {
    const json j = describe(tl::open_checkpoint(model), plan, list);
    if (as_json) std::cout << j.dump(-1, ' ', false, json::error_handler_t::replace) << '\n';
    else print(j);
  });
}
