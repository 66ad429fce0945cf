// quantize: writes a checkpoint again in another format, to one GGUF file or to a folder in Hugging Face layout.
#include <CLI/CLI.hpp>
#include <unistd.h>

#include <cstdio>
#include <iostream>
#include <optional>
#include <string>

#include "tinyllama/io/convert.hpp"
#include "tinyllama/io/tokenizer_file.hpp"

namespace tl = tinyllama;

namespace {

/// A bar on standard error, where a person watches.
tl::Progress progress_bar() {
  if (!::isatty(STDERR_FILENO)) return {};
  return [](std::uint64_t done, std::uint64_t total) {
    constexpr int width = 40;
    const int full = total ? static_cast<int>(done * width / total) : width;
    std::fprintf(stderr, "\r[%.*s%*s] %3d%% of %.0f MB%s", full, "########################################", width - full, "",
                 total ? static_cast<int>(done * 100 / total) : 100, static_cast<double>(total) * 1e-6, done == total ? "\n" : "");
    std::fflush(stderr);
  };
}

void run(const std::string& model, const std::string& out, const std::string& format, double shard_gb) {
  const tl::Checkpoint from = tl::open_checkpoint(model);
  if (!out.ends_with(".gguf")) {
    tl::save_safetensors(from, out, {.format = tl::parse_format(format), .max_shard_bytes = static_cast<std::uint64_t>(shard_gb * 1e9), .progress = progress_bar()});
    return;
  }
  std::optional<tl::Vocabulary> vocabulary;  // a GGUF source's own is copied
  if (!from.gguf()) {
    try {
      vocabulary = tl::load_vocabulary(from.folder());
    } catch (const tl::Error& e) {
      std::cerr << "warning: writing a file without a tokenizer: " << e.what() << '\n';
    }
  }
  tl::save_gguf(from, out, {.mixture = tl::parse_mixture(format), .vocabulary = vocabulary ? &*vocabulary : nullptr, .progress = progress_bar()});
}

}  // namespace

int main(int argc, char** argv) {
  CLI::App app("Writes a checkpoint again in another format. A path that ends in .gguf becomes a GGUF file, any other a folder.");
  std::string model, out, format;
  double shard_gb = 5;
  app.add_option("--model", model, "a GGUF file, a folder in Hugging Face layout, a .safetensors file or a llama2.c .bin")->required();
  app.add_option("--out", out, "what to write")->required();
  app.add_option("--format", format, "f32, f16, bf16; in a GGUF file also q8_0, q4_0, ..., q4_K_M, q5_K_M")->required()->check([](const std::string& text) {
    try {
      tl::parse_mixture(text);
      return std::string();
    } catch (const tl::Error& e) {
      return std::string(e.what());
    }
  });
  app.add_option("--max-shard-gb", shard_gb, "cut a folder's weights into files of at most this size")->check(CLI::Range(0.001, 1e6))->capture_default_str();
  try {
    app.parse(argc, argv);
  } catch (const CLI::ParseError& e) {
    return app.exit(e) == 0 ? 0 : 2;
  }
  try {
    run(model, out, format, shard_gb);
  } catch (const tl::Error& e) {
    std::cerr << "error: " << e.what() << '\n';
    return 1;
  }
}
