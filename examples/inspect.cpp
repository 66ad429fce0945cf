// inspect: what is in a checkpoint, without reading its weights.
#include <CLI/CLI.hpp>

#include <cstdint>
#include <cstdio>
#include <iostream>
#include <map>
#include <string>

#include "tinyllama/io/checkpoint.hpp"
#include "tinyllama/io/tokenizer_file.hpp"

namespace tl = tinyllama;
using json = nlohmann::json;

namespace {

struct Share { int tensors = 0; std::uint64_t bytes = 0; };

std::string tokenizer_kind(const tl::Checkpoint& c) {
  try {
    const tl::Vocabulary v = c.gguf() ? tl::read_tokenizer_gguf(*c.gguf()) : tl::load_vocabulary(c.folder());
    return (v.kind == tl::Vocabulary::Kind::sentencepiece_bpe ? "SentencePiece BPE, " : "byte-level BPE, ") + std::to_string(v.pieces.size()) + " pieces";
  } catch (const tl::Error& e) {
    return std::string("none: ") + e.what();
  }
}

json describe(const tl::Checkpoint& c, bool list) {
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
                     {"norm_eps", tl::detail::shortest(m.norm_eps)}, {"rope_base", tl::detail::shortest(m.rope_base)}, {"rope_scale", tl::detail::shortest(m.rope_scale)}, {"tied", m.tied}}}};
  for (const auto& [format, share] : by_format) j["formats"][format] = {{"tensors", share.tensors}, {"bytes", share.bytes}};
  if (list)
    for (const tl::StoredTensor& t : c.tensors()) j["list"].push_back({{"name", t.name}, {"format", tl::name(t.format)}, {"shape", {t.rows, t.columns}}});
  // The memory plan (config/memory_plan.hpp) belongs here, as j["plan"].
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
  if (j.contains("list"))
    for (const json& t : j["list"]) std::cout << t["name"].get<std::string>() << "  " << t["format"].get<std::string>() << "  " << t["shape"] << '\n';
}

}  // namespace

int main(int argc, char** argv) {
  CLI::App app("Shows what is in a checkpoint, without reading its weights.");
  std::string model;
  bool as_json = false, list = false;
  app.add_option("--model,model", model, "a GGUF file, a folder in Hugging Face layout, a .safetensors file or a llama2.c .bin")->required();
  app.add_flag("--json", as_json, "one JSON object, for programs");
  app.add_flag("--tensors", list, "also each tensor");
  try {
    app.parse(argc, argv);
  } catch (const CLI::ParseError& e) {
    return app.exit(e) == 0 ? 0 : 2;
  }
  try {
    const json j = describe(tl::open_checkpoint(model), list);
    if (as_json) std::cout << j.dump(-1, ' ', false, json::error_handler_t::replace) << '\n';
    else print(j);
  } catch (const tl::Error& e) {
    std::cerr << "error: " << e.what() << '\n';
    return 1;
  }
}
