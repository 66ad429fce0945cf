// train_tokenizer: a new SentencePiece BPE vocabulary from one's own text, with Llama's settings. Needs the sentencepiece library to train.
#include <tinyllama/io/tokenizer_file.hpp>
#include <tinyllama/train/documents.hpp>

#include <nlohmann/json.hpp>

#include "common.hpp"

#include <algorithm>
#include <cstdint>
#include <filesystem>
#include <iostream>
#include <optional>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

// Debian: libsentencepiece-dev; linked with -lsentencepiece_train -lsentencepiece.
#if !defined(TINYLLAMA_SENTENCEPIECE)
#if __has_include(<sentencepiece_trainer.h>)
#define TINYLLAMA_SENTENCEPIECE 1
#else
#define TINYLLAMA_SENTENCEPIECE 0
#endif
#endif
#if TINYLLAMA_SENTENCEPIECE
#include <sentencepiece_processor.h>
#include <sentencepiece_trainer.h>
#endif

namespace tl = tinyllama;

namespace {

struct Options {
  std::string out;
  std::vector<std::string> files;
  tl::DocumentOptions documents;
  int vocab = 4096, threads = 0;
  std::size_t max_bytes = std::size_t{64} << 20;
  double coverage = 0.9995;
  bool json = false;
};

#if TINYLLAMA_SENTENCEPIECE

/// The text in pieces that the trainer takes: a line, and of a long line stretches cut at spaces. Llama's vocabulary has no newline either:
/// it becomes a byte piece.
class Lines : public sentencepiece::SentenceIterator {
 public:
  static constexpr std::size_t longest = 4000;  // the trainer silently leaves out what is longer than 4192 bytes

  explicit Lines(const Options& o) : options_(o) { Next(); }

  bool done() const override { return done_; }
  const std::string& value() const override { return value_; }
  sentencepiece::util::Status status() const override { return {}; }
  void Next() override {
    while (!done_ && !take()) read();
  }
  std::uint64_t bytes() const { return bytes_; }

 private:
  bool take() {
    while (at_ < text_.size()) {
      const std::size_t end = std::min(text_.find('\n', at_), text_.size());
      std::size_t cut = end;
      if (cut - at_ > longest) {
        cut = text_.rfind(' ', at_ + longest);
        if (cut == text_.npos || cut <= at_)  // no space: between two characters
          for (cut = at_ + longest; cut > at_ + 1 && (static_cast<unsigned char>(text_[cut]) & 0xc0) == 0x80;) --cut;
      }
      value_.assign(text_, at_, cut - at_);
      at_ = cut + (cut < text_.size() && (text_[cut] == '\n' || text_[cut] == ' '));
      if (value_.find_first_not_of(" \t\r\f\v") != value_.npos) return true;
    }
    return false;
  }
  void read() {
    while (bytes_ < options_.max_bytes) {
      if (!reader_ && file_ == options_.files.size()) break;
      if (!reader_) reader_.emplace(options_.files[file_++], options_.documents);
      if (auto document = reader_->next()) {
        text_ = std::move(document->text);
        at_ = 0;
        bytes_ += text_.size();
        return;
      }
      reader_.reset();
    }
    done_ = true;
  }

  const Options& options_;
  std::optional<tl::DocumentReader> reader_;
  std::size_t file_ = 0, at_ = 0;
  std::string text_, value_;
  std::uint64_t bytes_ = 0;
  bool done_ = false;
};

[[noreturn]] void fail(const std::string& what, const sentencepiece::util::Status& status) {
  throw tl::Error("sentencepiece", what, "success", status.ToString());
}

/// The model's bytes, as tokenizer.model holds them.
std::string train(const Options& o, Lines& lines) {
  const std::unordered_map<std::string, std::string> settings{
      {"model_type", "bpe"}, {"vocab_size", std::to_string(o.vocab)}, {"character_coverage", std::to_string(o.coverage)}, {"byte_fallback", "true"},
      {"split_digits", "true"}, {"add_dummy_prefix", "true"}, {"normalization_rule_name", "identity"}, {"remove_extra_whitespaces", "false"},
      {"allow_whitespace_only_pieces", "true"}, {"unk_id", "0"}, {"bos_id", "1"}, {"eos_id", "2"}, {"pad_id", "-1"}, {"unk_surface", " \u2047 "},
      {"num_threads", std::to_string(o.threads > 0 ? o.threads : 2)}, {"minloglevel", "2"}};
  std::string model;
  const auto status = sentencepiece::SentencePieceTrainer::Train(settings, &lines, &model);
  if (!status.ok()) fail("training", status);
  return model;
}

/// Encodes text with the library and with our own code; an Error where they differ. Returns the number of texts and of tokens.
std::pair<std::size_t, std::size_t> compare(const std::string& model, const tl::Tokenizer& ours, const Options& o) {
  sentencepiece::SentencePieceProcessor theirs;
  if (const auto status = theirs.LoadFromSerializedProto(model); !status.ok()) fail("loading", status);
  std::vector<std::string> texts{"", " ", "  two  spaces ", "a\nb\n\nc\td", "1234567 3.14", "na\u00efve caf\u00e9 \u2014 \u201cquotes\u201d",
                                 "\U0001f600 \u4f60\u597d", "<s> </s> <unk> <0x0A>", "\u2581 marks \u2581\u2581", "aaaaaaaaaaaaaaaaaaaaaaaa"};
  Lines lines(o);
  for (; !lines.done() && texts.size() < 2000; lines.Next()) texts.push_back(lines.value());
  std::size_t tokens = 0;
  for (const std::string& text : texts) {
    std::vector<int> expected;
    if (const auto status = theirs.Encode(text, &expected); !status.ok()) fail("encoding", status);
    const std::vector<std::int32_t> found = ours.encode(text);
    if (!std::equal(expected.begin(), expected.end(), found.begin(), found.end()))
      throw tl::Error("encoding of", text.substr(0, 60), "the " + std::to_string(expected.size()) + " ids of sentencepiece",
                      std::to_string(found.size()) + " others");
    tokens += found.size();
  }
  return {texts.size(), tokens};
}

void run(const Options& o) {
  const std::filesystem::path folder(o.out), path = folder / "tokenizer.model";
  std::error_code error;
  std::filesystem::create_directories(folder, error);
  if (error) throw tl::Error(o.out, "", "a folder that can be made", error.message());
  Lines lines(o);
  if (lines.done()) throw tl::Error(o.files.front(), "", "text", "none");
  const std::string model = train(o, lines);
  tl::write_file_atomically(path, [&](tl::FileWriter& file) { file.write(model); });
  const tl::Tokenizer tokenizer = tl::load_tokenizer(path);
  const auto [texts, tokens] = compare(model, tokenizer, o);
  if (o.json) {
    const nlohmann::json result{{"model", path.string()}, {"vocab", tokenizer.size()}, {"bytes", lines.bytes()}, {"compared_texts", texts},
                                {"compared_tokens", tokens}};
    std::cout << result.dump() << '\n';
    return;
  }
  std::cout << path.string() << ": " << tokenizer.size() << " pieces from " << static_cast<double>(lines.bytes()) / 1e6 << " MB; " << texts
            << " texts (" << tokens << " tokens) encoded as by sentencepiece itself\n";
}

#else

void run(const Options&) {
  throw tl::Error("train_tokenizer", "", "a build with the sentencepiece library (Debian: libsentencepiece-dev)", "none when this program was built");
}

#endif

}  // namespace

int main(int argc, char** argv) {
  CLI::App app("Trains a SentencePiece BPE vocabulary as Llama's (byte fallback, digits apart, text not normalised) and writes OUT/tokenizer.model.");
  Options o;
  app.add_option("FILES", o.files, "text, JSONL, .zst of both")->required();
  app.add_option("--out", o.out, "folder to write into")->required();
  app.add_option("--vocab", o.vocab, "pieces, among them 3 control and 256 byte pieces")->check(CLI::Range(300, 1 << 20))->capture_default_str();
  app.add_option("--field", o.documents.field, "of a JSON object: its text")->capture_default_str();
  app.add_option("--max-bytes", o.max_bytes, "read no more text than this; each byte takes some 10 bytes of memory")
      ->check(CLI::PositiveNumber)->capture_default_str();
  app.add_option("--coverage", o.coverage, "share of the characters that get a piece; the others become bytes")
      ->check(CLI::Range(0.98, 1.0))->capture_default_str();
  app.add_option("--threads", o.threads, "threads; 0: two")->check(CLI::NonNegativeNumber);
  app.add_flag("--json", o.json, "print one JSON object");
  return example::run_main(argc, argv, app, [&] { run(o); });
}
