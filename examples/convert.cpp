// convert: writes a model again for other programs: between Hugging Face folders, lit-gpt checkpoints and GGUF files, training checkpoints too.
#include <tinyllama/io/checkpoint_tokenizer.hpp>
#include <tinyllama/io/convert.hpp>
#include <tinyllama/io/lit.hpp>
#include <tinyllama/io/tokenizer_file.hpp>
#include <tinyllama/train/checkpoint.hpp>

#include <CLI/CLI.hpp>
#include <nlohmann/json.hpp>

#include <filesystem>
#include <iostream>
#include <optional>
#include <string>

#include "common.hpp"

namespace tl = tinyllama;
namespace fs = std::filesystem;
using json = nlohmann::json;

namespace {

struct Options {
  std::string from, to, to_format, dtype = "f32", config, key;
  double shard_gb = 5;
  bool as_json = false;
};

std::string format_of(const std::string& path) { return path.ends_with(".gguf") ? "gguf" : tl::has_torch_extension(path) ? "lit" : "hf"; }

/// For a lit checkpoint: a config.json, or the name of a preset.
std::optional<tl::any_llama> given_config(const std::string& text) {
  if (text.empty()) return std::nullopt;
  std::optional<tl::any_llama> found;
  std::string names;
  tl::presets::any([&]<class C>() {
    names.append(names.empty() ? "" : ", ").append(C::name);
    if (C::name == text) found = tl::describe<C>();
    return found.has_value();
  });
  if (found) return found;
  std::error_code ignored;
  if (!fs::exists(text, ignored)) throw tl::Error("--config", "", "a config.json, or one of " + names, "'" + text + "'");
  return tl::read_config_json(text);
}

std::optional<tl::Tokenizer> tokenizer_of(const tl::Checkpoint& from) { return from.gguf() ? std::nullopt : tl::checkpoint_tokenizer(from); }
std::optional<tl::Tokenizer> tokenizer_of(const tl::LitCheckpoint& from) {
  std::error_code ignored;
  for (const char* const name : {"tokenizer.json", "tokenizer.model"})
    if (fs::exists(from.folder() / name, ignored)) return tl::load_tokenizer(from.folder());
  return std::nullopt;
}

template <class Source>
void write(const Source& from, const Options& o) {
  const auto progress = example::progress("writing");
  if (o.to_format == "hf") {
    const auto shard = static_cast<std::uint64_t>(o.shard_gb * 1e9);
    tl::save_safetensors(from, o.to, {.format = tl::parse_format(o.dtype), .max_shard_bytes = shard, .progress = progress});
  } else if (o.to_format == "lit") {
    tl::save_lit(from, o.to, {.format = tl::parse_format(o.dtype), .key = o.key, .progress = progress});
  } else {
    const std::optional<tl::Tokenizer> tokenizer = tokenizer_of(from);  // a GGUF source's own is copied
    if (!tokenizer && !from.gguf()) std::cerr << "warning: no tokenizer beside " << from.path << "; writing a file without one\n";
    const tl::Vocabulary* const vocabulary = tokenizer ? &tokenizer->vocabulary() : nullptr;
    tl::save_gguf(from, o.to, {.mixture = tl::parse_mixture(o.dtype), .vocabulary = vocabulary, .progress = progress});
  }
  if (!o.as_json) return;
  const json j{{"from", from.path}, {"from_format", from.source}, {"to", o.to}, {"to_format", o.to_format}, {"dtype", o.dtype},
               {"preset", tl::preset_name(from.config)}, {"parameters", tl::parameter_count(from.config)}};
  std::cout << j.dump(-1, ' ', false, json::error_handler_t::replace) << '\n';
}

void run(Options o) {
  if (o.to_format.empty()) o.to_format = format_of(o.to);
  if (tl::is_lit(o.from)) return write(tl::open_lit(o.from, given_config(o.config)), o);
  if (!o.config.empty()) throw tl::Error("--config", "", "a lit checkpoint to be converted: others have their own", o.from);
  if (const auto newest = tl::latest_checkpoint(o.from)) o.from = newest->string();  // the folder of a training run
  write(tl::open_checkpoint(o.from), o);
}

}  // namespace

int main(int argc, char** argv) {
  CLI::App app("Writes a model again for other programs. Without --to-format, a path that ends in .gguf becomes a GGUF file,\n"
               "one in .pth, .pt or .ckpt a lit-gpt checkpoint, any other a folder in Hugging Face layout.");
  Options o;
  const auto format = [](const std::string& text) {
    try {
      tl::parse_mixture(text);
      return std::string();
    } catch (const tl::Error& e) {
      return std::string(e.what());
    }
  };
  app.add_option("--from", o.from, "a Hugging Face folder, a lit or GGUF file, a llama2.c .bin, or a training run: its newest checkpoint")->required();
  app.add_option("--to", o.to, "what to write")->required();
  app.add_option("--to-format", o.to_format, "hf, lit (a folder, or one .pth file) or gguf")->check(CLI::IsMember({"hf", "lit", "gguf"}));
  app.add_option("--dtype", o.dtype, "f32, bf16 or f16; for a folder also f8_e4m3; for GGUF also q8_0, q4_K_M, ...")->check(format)->capture_default_str();
  app.add_option("--config", o.config, "for a lit checkpoint without lit_config.json: a config.json or the name of a preset");
  app.add_option("--key", o.key, "in a lit file, put the tensors under this key, as training does under \"model\"");
  app.add_option("--max-shard-gb", o.shard_gb, "cut a folder's weights into files of at most this size")->check(CLI::Range(0.001, 1e6));
  app.add_flag("--json", o.as_json, "say what was written as one JSON object, for programs");
  return example::run_main(argc, argv, app, [&] { run(o); });
}
