// quantize: writes a checkpoint again in another format, to one GGUF file or to a folder in Hugging Face layout.
#include <tinyllama/io/checkpoint_tokenizer.hpp>
#include <tinyllama/io/convert.hpp>

#include <CLI/CLI.hpp>

#include <iostream>
#include <optional>
#include <string>

#include "common.hpp"

namespace tl = tinyllama;

namespace {

void run(const std::string& model, const std::string& out, const std::string& format, double shard_gb) {
  const tl::Checkpoint from = tl::open_checkpoint(model);
  if (!out.ends_with(".gguf")) {
    tl::save_safetensors(from, out, {.format = tl::parse_format(format), .max_shard_bytes = static_cast<std::uint64_t>(shard_gb * 1e9), .progress = example::progress("writing")});
    return;
  }
  std::optional<tl::Tokenizer> tokenizer;  // a GGUF source's own is copied
  if (!from.gguf()) {
    tokenizer = tl::checkpoint_tokenizer(from);
    if (!tokenizer) std::cerr << "warning: no tokenizer beside " << model << "; writing a file without one\n";
  }
  tl::save_gguf(from, out, {.mixture = tl::parse_mixture(format), .vocabulary = tokenizer ? &tokenizer->vocabulary() : nullptr, .progress = example::progress("writing")});
}

}  // namespace

int main(int argc, char** argv) {
  CLI::App app("Writes a checkpoint again in another format. A path that ends in .gguf becomes a GGUF file, any other a folder.");
  std::string model, out, format;
  double shard_gb = 5;
  app.add_option("--model", model, "a GGUF file, a folder in Hugging Face layout, a .safetensors file or a llama2.c .bin")->required();
  app.add_option("--out", out, "what to write")->required();
  app.add_option("--format", format, "f32, f16, bf16; in a folder also f8_e4m3; in a GGUF file q8_0, q4_0, ..., q4_K_M, q5_K_M")->required()->check([](const std::string& text) {
    try {
      tl::parse_mixture(text);
      return std::string();
    } catch (const tl::Error& e) {
      return std::string(e.what());
    }
  });
  app.add_option("--max-shard-gb", shard_gb, "cut a folder's weights into files of at most this size")->check(CLI::Range(0.001, 1e6))->capture_default_str();
  return example::run_main(argc, argv, app, [&] { run(model, out, format, shard_gb); });
}
