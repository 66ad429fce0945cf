// Writes a checkpoint with random weights, of a preset or any shape: a folder in Hugging Face layout, or one GGUF file.
#include <CLI/CLI.hpp>

#include <cmath>
#include <cstdint>
#include <iostream>
#include <string>
#include <vector>

#include "tinyllama/io/convert.hpp"
#include "tinyllama/io/tokenizer_file.hpp"

namespace tl = tinyllama;

namespace {

/// SplitMix64: a stream for each seed, and quick enough for a billion weights.
struct Random {
  std::uint64_t state;
  std::uint64_t next() {
    std::uint64_t z = state += 0x9e3779b97f4a7c15u;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
  }
  /// About N(0, 1): the sum of four uniform numbers of 16 bits.
  float normal() {
    const std::uint64_t u = next();
    const auto sum = static_cast<std::int64_t>((u & 0xffff) + ((u >> 16) & 0xffff) + ((u >> 32) & 0xffff) + (u >> 48)) - 2 * 65535;
    return static_cast<float>(sum) * (1.7320508f / 65536.0f);  // the variance of the sum is 4 * 65536^2 / 12
  }
};

/// Rows of a model's tensors, encoded. With `distinct` > 0 a tensor has that many different rows, each encoded once and used
/// again and again: encoding a billion weights in a K format takes minutes, and speed and memory do not depend on the values.
class Weights {
 public:
  Weights(const tl::any_llama& c, std::uint64_t seed, int distinct) : config_(c), seed_(seed), distinct_(distinct) {}

  /// The scales of the rows written last, of f8_e4m3.
  std::span<const float> scales() const { return scales_; }
  void write(const tl::Parameter& p, tl::Format format, tl::RopeLayout rope, tl::FileWriter& file) {
    scales_.clear();
    std::vector<float> pool_scales(static_cast<std::size_t>(std::max(1, distinct_)));
    const std::size_t size = tl::row_bytes(format, p.columns);
    std::vector<float> floats(static_cast<std::size_t>(p.columns));
    std::vector<std::byte> pool(size * static_cast<std::size_t>(distinct_ > 0 ? distinct_ : 1));
    for (int i = 0; i < distinct_; ++i) pool_scales[static_cast<std::size_t>(i)] = encode(p, i, format, floats, pool.data() + static_cast<std::size_t>(i) * size);
    for (tl::index_t r = 0; r < p.rows; ++r) {
      const bool rotated = p.slot == tl::Slot::q || p.slot == tl::Slot::k;
      const tl::index_t row = rotated ? tl::detail::permuted_row(r, head_dim(config_), tl::RopeLayout::half, rope) : r;
      if (distinct_ > 0) {
        const std::uint64_t pick = Random{stream(p, row) ^ 1}.next() % static_cast<std::uint64_t>(distinct_);
        file.write({pool.data() + pick * size, size});
        scales_.push_back(pool_scales[pick]);
      } else {
        scales_.push_back(encode(p, row, format, floats, pool.data()));
        file.write(pool);
      }
    }
  }

 private:
  std::uint64_t stream(const tl::Parameter& p, tl::index_t row) const {
    Random r{seed_ * 1000003 + static_cast<std::uint64_t>(p.layer + 1) * 64 + static_cast<std::uint64_t>(p.slot)};
    Random of_row{r.next() ^ static_cast<std::uint64_t>(row) * 0xd1342543de82ef95u};
    return of_row.next();  // mixed once more: states a whole step apart would make each row the one before, shifted by an element
  }
  float encode(const tl::Parameter& p, tl::index_t row, tl::Format format, std::vector<float>& floats, std::byte* out) const {
    // TinyLlama's own initialisation, with gains near one
    const bool into_residual = p.slot == tl::Slot::o || p.slot == tl::Slot::down;
    const float sigma = p.role == tl::Role::gain ? 0.02f
                        : into_residual ? 1.0f / (std::sqrt(static_cast<float>(config_.hidden)) * static_cast<float>(config_.layers))
                                        : std::sqrt(2.0f / (5.0f * static_cast<float>(config_.hidden)));
    Random random{stream(p, row)};
    for (float& x : floats) x = (p.role == tl::Role::gain ? 1.0f : 0.0f) + sigma * random.normal();
    if (format == tl::Format::f8_e4m3) return tl::encode_e4m3_row(floats, out);
    tl::encode_row(format, floats.data(), out, p.columns);
    return 1;
  }
  const tl::any_llama& config_;
  std::uint64_t seed_;
  int distinct_;
  std::vector<float> scales_;
};

/// A SentencePiece vocabulary that encodes any text as bytes, with names for the other ids.
tl::Vocabulary byte_vocabulary(int size) {
  tl::Vocabulary v;
  v.pieces = {{"<unk>", 0, tl::PieceType::unknown}, {"<s>", 0, tl::PieceType::control}, {"</s>", 0, tl::PieceType::control}};
  for (int b = 0; b < 256; ++b) {
    constexpr char hex[] = "0123456789ABCDEF";
    v.pieces.push_back({std::string("<0x") + hex[b / 16] + hex[b % 16] + '>', 0, tl::PieceType::byte});
  }
  for (int i = 259; i < size; ++i) v.pieces.push_back({"\xe2\x96\x81word" + std::to_string(i), -static_cast<float>(i), tl::PieceType::normal});
  v.unk = 0, v.bos = 1, v.eos = 2;
  return v;
}

/// The same as SentencePiece's own file: a message of pieces, each with text, score and type.
std::string sentencepiece_model(const tl::Vocabulary& v) {
  std::string out;
  const auto length = [](std::string& s, std::size_t n) {
    for (; n > 127; n >>= 7) s += static_cast<char>(n | 128);
    s += static_cast<char>(n);
  };
  for (const tl::Piece& p : v.pieces) {
    std::string piece = "\x0a";
    length(piece, p.text.size());
    char score[4];
    std::memcpy(score, &p.score, 4);
    piece.append(p.text).append("\x15").append(score, 4).append("\x18") += static_cast<char>(p.type);
    out += '\x0a';
    length(out, piece.size());
    out += piece;
  }
  // trainer_spec {model_type = BPE, byte_fallback = true}, normalizer_spec {remove_extra_whitespaces = false}
  return out + std::string("\x12\x05\x18\x02\x98\x02\x01" "\x1a\x02\x20\x00", 11);
}

void write_gguf_file(const tl::any_llama& c, Weights& weights, const std::filesystem::path& path, const tl::Mixture& mixture, const tl::Vocabulary* vocabulary) {
  tl::GgufMetadata metadata;
  set_config(metadata, c);
  metadata.set_string("general.name", "random weights");
  metadata.set_uint("general.file_type", mixture.gguf_file_type);
  metadata.set_uint("general.quantization_version", 2);
  if (vocabulary) set_vocabulary(metadata, *vocabulary);
  const auto parameters = tl::detail::parameters_of(c);
  std::vector<tl::GgufTensorPlan> plan;
  for (const tl::Parameter& p : parameters) plan.push_back({p.gguf_name(), storage_format(mixture, c, p), p.rows, p.columns, p.role == tl::Role::gain});
  tl::write_gguf(path, metadata, plan, [&](std::size_t i, tl::FileWriter& file) { weights.write(parameters[i], plan[i].format, tl::RopeLayout::interleaved, file); });
}

void write_folder(const tl::any_llama& c, Weights& weights, const std::filesystem::path& folder, tl::Format format, const tl::Vocabulary* vocabulary) {
  if (info(format).safetensors.empty()) throw tl::Error(folder.string(), "format", "f32, f16, bf16 or f8_e4m3 for a folder", std::string(name(format)));
  std::filesystem::create_directories(folder);
  const auto parameters = tl::detail::parameters_of(c);
  std::vector<tl::SafeTensorPlan> plan;
  std::vector<const tl::Parameter*> of;  // of each tensor; none where it has the scales of the one before
  for (const tl::Parameter& p : parameters) {
    const tl::Format f = tl::folder_format(format, p);
    plan.push_back({p.hf_name(), std::string(info(f).safetensors), p.role == tl::Role::gain ? std::vector{p.columns} : std::vector{p.rows, p.columns},
                    static_cast<std::uint64_t>(p.rows) * tl::row_bytes(f, p.columns)});
    of.push_back(&p);
    if (f == tl::Format::f8_e4m3) plan.push_back({p.hf_name() + "_scale", "F32", {p.rows, 1}, static_cast<std::uint64_t>(p.rows) * sizeof(float)}), of.push_back(nullptr);
  }
  tl::write_safetensors(folder / "model.safetensors", plan, [&](std::size_t i, tl::FileWriter& file) {
    if (of[i]) weights.write(*of[i], tl::folder_format(format, *of[i]), tl::RopeLayout::half, file);
    else file.write(std::as_bytes(weights.scales()));
  });
  const std::string_view torch = format == tl::Format::f32 ? "float32" : format == tl::Format::f16 ? "float16" : "bfloat16";
  tl::write_file_atomically(folder / "config.json", [&](tl::FileWriter& file) { file.write(tl::config_json(c, {torch, 1, 2, format == tl::Format::f8_e4m3})); });
  if (vocabulary && vocabulary->kind == tl::Vocabulary::Kind::sentencepiece_bpe)
    tl::write_file_atomically(folder / "tokenizer.model", [&](tl::FileWriter& file) { file.write(sentencepiece_model(*vocabulary)); });
}

}  // namespace

int main(int argc, char** argv) {
  CLI::App app("Writes a checkpoint with random weights. A path that ends in .gguf becomes a GGUF file, any other a folder.");
  std::string preset, out, format_name = "bf16", tokenizer;
  tl::any_llama shape;
  std::uint64_t seed = 1;
  int distinct = -1;
  app.add_option("--preset", preset, "tinyllama_1b, smollm2_135m, ...; the options below change single numbers of it");
  app.add_option("--out", out, "what to write")->required();
  app.add_option("--format", format_name, "bf16, f32, f16, f8_e4m3; in a GGUF file any other format or mixture (q4_K_M)");
  app.add_option("--tokenizer", tokenizer, "take the tokenizer from this file or folder; the default encodes bytes");
  app.add_option("--seed", seed);
  app.add_option("--distinct-rows", distinct, "different rows in a tensor, 0 for all; the default is 64 in block formats and all in others");
  std::vector<std::pair<CLI::Option*, int tl::any_llama::*>> sizes;
  tl::any_llama given;
  const auto size = [&](const char* option, int tl::any_llama::*member) { sizes.emplace_back(app.add_option(option, given.*member), member); };
  size("--layers", &tl::any_llama::layers), size("--hidden", &tl::any_llama::hidden), size("--heads", &tl::any_llama::heads), size("--kv-heads", &tl::any_llama::kv_heads);
  size("--ffn", &tl::any_llama::ffn), size("--vocab", &tl::any_llama::vocab), size("--context", &tl::any_llama::context);
  CLI::Option* const tied = app.add_flag("--tied,!--untied", given.tied, "the head is the embedding");
  CLI::Option* const base = app.add_option("--rope-base", given.rope_base);
  try {
    app.parse(argc, argv);
  } catch (const CLI::ParseError& e) {
    return app.exit(e) == 0 ? 0 : 2;
  }
  try {
    const bool known = tl::presets::any([&]<class C>() {
      if (C::name != preset) return false;
      shape = tl::describe<C>();
      return true;
    });
    if (!known && !preset.empty()) throw tl::Error("--preset", "", "the name of a preset", preset);
    for (const auto& [option, member] : sizes)
      if (option->count()) shape.*member = given.*member;
    if (tied->count()) shape.tied = given.tied;
    if (base->count()) shape.rope_base = given.rope_base;
    check(shape, "shape");

    const tl::Mixture mixture = tl::parse_mixture(format_name);
    Weights weights(shape, seed, distinct >= 0 ? distinct : is_quantised(mixture.base) ? 64 : 0);
    std::optional<tl::Vocabulary> vocabulary;
    if (!tokenizer.empty()) vocabulary = tl::load_vocabulary(tokenizer);
    else if (shape.vocab >= 259) vocabulary = byte_vocabulary(shape.vocab);
    const tl::Vocabulary* v = vocabulary ? &*vocabulary : nullptr;
    if (out.ends_with(".gguf")) write_gguf_file(shape, weights, out, mixture, v);
    else write_folder(shape, weights, out, tl::parse_format(format_name), v);
    for (const char* const file : tl::detail::companion_files)  // a byte-level tokenizer is only to be had as the files it came in
      if (std::error_code ignored; !out.ends_with(".gguf") && std::filesystem::exists(std::filesystem::path(tokenizer) / file, ignored) && !tokenizer.empty())
        std::filesystem::copy_file(std::filesystem::path(tokenizer) / file, std::filesystem::path(out) / file, std::filesystem::copy_options::overwrite_existing);
  } catch (const std::exception& e) {
    std::cerr << "error: " << e.what() << '\n';
    return 1;
  }
}
