// pack: text and JSONL files to the packed data set that training reads.
#include <tinyllama/device/cores.hpp>
#include <tinyllama/device/thread_pool.hpp>
#include <tinyllama/io/tokenizer_file.hpp>
#include <tinyllama/train/data_order.hpp>
#include <tinyllama/train/documents.hpp>
#include <tinyllama/train/packed.hpp>

#include <nlohmann/json.hpp>

#include "common.hpp"

#include <chrono>
#include <cstdint>
#include <iostream>
#include <optional>
#include <string>
#include <vector>

namespace tl = tinyllama;
using nlohmann::json;

namespace {

struct Options {
  std::string tokenizer, out, prefix = "train", validation_prefix = "validation", separator = "none", split = "file";
  std::vector<std::string> files;
  tl::EncodeOptions encode;
  tl::DocumentOptions documents;
  tl::PackedWriterOptions packed;
  double validation_fraction = 0;
  std::uint64_t seed = 0;
  int threads = 0;
  bool json = false;
};

/// One data set: the documents that belong to it, a separator between them.
struct Output {
  tl::PackedWriter writer;
  std::optional<std::int32_t> separator;
  std::int64_t documents = 0;

  void add(const std::vector<std::int32_t>& ids) {
    if (separator && documents > 0) writer.add({&*separator, 1});
    writer.add(ids);
    ++documents;
  }
  json finish() {
    const tl::PackedSummary& s = writer.finish();
    json files = json::array();
    for (const auto& f : s.files) files.push_back(f.string());
    return {{"documents", documents}, {"tokens", s.tokens}, {"files", files}, {"leftover", s.leftover}};
  }
};

std::int32_t control(const tl::Tokenizer& tokenizer, const std::string& which) {
  const std::int32_t id = which == "bos" ? tokenizer.bos() : tokenizer.eos();
  if (id < 0) throw tl::Error(tokenizer.vocabulary().source, which, "a piece of that role", "none in this vocabulary");
  return id;
}

json pack(const Options& o) {
  const tl::Tokenizer tokenizer = tl::load_tokenizer(o.tokenizer);
  std::optional<std::int32_t> separator;
  if (o.separator != "none") separator = control(tokenizer, o.separator);
  if (o.encode.bos) control(tokenizer, "bos");
  if (o.encode.eos) control(tokenizer, "eos");
  Output train{{o.out, o.prefix, tokenizer.size(), o.packed}, separator};
  std::optional<Output> validation;
  if (o.validation_fraction > 0) validation.emplace(Output{{o.out, o.validation_prefix, tokenizer.size(), o.packed}, separator});

  tl::ThreadPool pool(o.threads > 0 ? o.threads : tl::available_cores());
  std::vector<std::string> texts;
  std::vector<std::vector<std::int32_t>> ids;
  std::size_t bytes = 0, all_bytes = 0;
  std::uint64_t number = 0;  // of the document
  const auto flush = [&] {   // encoded on all threads, written in order
    ids.resize(texts.size());
    pool.run(static_cast<tl::index_t>(texts.size()), [&](tl::index_t i) {
      ids[static_cast<std::size_t>(i)] = tokenizer.encode(texts[static_cast<std::size_t>(i)], o.encode);
    });
    for (const auto& document : ids) {
      // By its number and the seed, not by its place: so a document is always on one side as a whole.
      const bool held_out = validation && static_cast<double>(tl::detail::mix_bits(o.seed, number) >> 11) < o.validation_fraction * 0x1p53;
      (held_out ? *validation : train).add(document);
      ++number;
    }
    texts.clear();
    all_bytes += std::exchange(bytes, 0);
  };
  const auto start = std::chrono::steady_clock::now();
  const auto show = example::progress("packing");
  for (std::size_t f = 0; f < o.files.size(); ++f) {
    tl::DocumentReader reader(o.files[f], o.documents);
    while (auto document = reader.next()) {
      bytes += document->text.size();
      texts.push_back(std::move(document->text));
      if (bytes >= std::size_t{16} << 20 || texts.size() >= 65536) flush();
    }
    if (show) show(f + 1, o.files.size());
  }
  flush();

  json result = train.finish();
  const std::string one_block = "at least one block of " + std::to_string(o.packed.block) + " tokens";
  if (result["files"].empty()) throw tl::Error(o.out, o.prefix, one_block, result["tokens"].dump());
  if (validation) {
    json& set = result["validation"] = validation->finish();
    if (set["files"].empty())
      throw tl::Error(o.out, o.validation_prefix, one_block + ": raise --validation-fraction, or --split the text into more documents",
                      set["tokens"].dump());
  }
  const double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  result["vocab"] = tokenizer.size();
  result["type"] = tl::name_of(tl::token_type_for(tokenizer.size()));
  result["block"] = o.packed.block;
  result["bytes"] = all_bytes;
  result["seconds"] = seconds;
  return result;
}

void print(const std::string& name, const json& set) {
  std::cout << name << ": " << set["tokens"] << " tokens of " << set["documents"] << " documents in " << set["files"].size() << " files, "
            << set["leftover"] << " tokens left over (less than a block)\n";
  for (const json& file : set["files"]) std::cout << "  " << file.get<std::string>() << '\n';
}

}  // namespace

int main(int argc, char** argv) {
  CLI::App app("Tokenizes text files and JSONL, also .zst, and writes them as packed blocks for training; the same for any number of threads.");
  Options o;
  app.add_option("FILES", o.files, ".jsonl, .ndjson and .json: an object a line; others: text; .zst of both")->required();
  app.add_option("--tokenizer", o.tokenizer, "tokenizer.model, tokenizer.json, a GGUF file, or a folder with one of them")->required();
  app.add_option("--out", o.out, "folder to write into")->required();
  app.add_option("--prefix", o.prefix, "files are named PREFIX_0000000000.bin")->capture_default_str();
  app.add_flag("--bos", o.encode.bos, "begin each document with the beginning-of-text id");
  app.add_flag("--eos", o.encode.eos, "end each document with the end-of-text id");
  app.add_option("--separator", o.separator, "an id between documents")->check(CLI::IsMember({"none", "bos", "eos"}))->capture_default_str();
  app.add_option("--block", o.packed.block, "tokens of a block: the sequence length and one")->check(CLI::Range(2, 1 << 24))->capture_default_str();
  app.add_option("--chunk-blocks", o.packed.chunk_blocks, "blocks of a file")->check(CLI::PositiveNumber)->capture_default_str();
  app.add_option("--field", o.documents.field, "of a JSON object: its text")->capture_default_str();
  app.add_option("--split", o.split, "documents of a text file: the file, or what stands between blank lines")
      ->check(CLI::IsMember({"file", "blank"}))->capture_default_str();
  app.add_option("--split-line", o.documents.separator, "documents of a text file end at a line that is this");
  app.add_option("--max-document-bytes", o.documents.max_bytes, "a longer document is an error")->check(CLI::PositiveNumber)->capture_default_str();
  app.add_option("--validation-fraction", o.validation_fraction, "this share of the documents, drawn by --seed, becomes a data set of its own")
      ->check(CLI::Range(0.0, 1.0));
  app.add_option("--validation-prefix", o.validation_prefix, "its prefix")->capture_default_str();
  app.add_option("--seed", o.seed, "of the draw of validation documents")->capture_default_str();
  app.add_option("--threads", o.threads, "threads; 0: one for each core")->check(CLI::NonNegativeNumber);
  app.add_flag("--overwrite", o.packed.overwrite, "replace a data set of the same prefix");
  app.add_flag("--json", o.json, "print one JSON object");
  return example::run_main(argc, argv, app, [&] {
    if (o.split == "blank") o.documents.split = tl::DocumentOptions::Split::blank_lines;
    if (!o.documents.separator.empty()) o.documents.split = tl::DocumentOptions::Split::separator;
    // lit-gpt takes all that PREFIX* matches
    if (o.validation_fraction > 0 && (o.validation_prefix.starts_with(o.prefix) || o.prefix.starts_with(o.validation_prefix)))
      throw tl::Error("--validation-prefix", "", "one that does not begin like '" + o.prefix + "', or both are read as one", o.validation_prefix);
    const json result = pack(o);
    if (o.json) {
      std::cout << result.dump() << '\n';
      return;
    }
    print(o.prefix, result);
    if (result.contains("validation")) print(o.validation_prefix, result["validation"]);
    const double seconds = result["seconds"].get<double>();
    std::cout << result["bytes"].get<double>() / 1e6 << " MB in " << seconds << " s; ids are " << result["type"].get<std::string>() << ", blocks of "
              << result["block"] << " tokens\n";
  });
}
