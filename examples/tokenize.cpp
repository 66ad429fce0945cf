// tokenize: JSON lines {"text": ...} to {"ids": [...]} and, with --decode, back.
#include <tinyllama/io/tokenizer_file.hpp>

#include <nlohmann/json.hpp>

#include "common.hpp"

#include <cstdint>
#include <iostream>
#include <string>
#include <vector>

namespace tl = tinyllama;
using nlohmann::json;

namespace {

/// The member of a line's object; an Error naming the line where it is something else.
std::string text_of(const json& line) { return line.at("text").get<std::string>(); }
std::vector<std::int32_t> ids_of(const json& line) {
  std::vector<std::int32_t> ids;
  for (const json& id : line.at("ids").get<json::array_t>()) {
    if (!id.is_number_integer() || id.get<std::int64_t>() != id.get<std::int32_t>()) throw tl::Error("ids: expected 32-bit integers, found " + id.dump());
    ids.push_back(id.get<std::int32_t>());
  }
  return ids;
}

void run(const tl::Tokenizer& tokenizer, bool decode, const tl::EncodeOptions& options) {
  std::string line;
  for (std::size_t number = 1; std::getline(std::cin, line); ++number) {
    if (line.find_first_not_of(" \t\r") == line.npos) continue;
    json out;
    try {
      const json in = json::parse(line);
      if (decode) out["text"] = tokenizer.decode(ids_of(in), options.special);
      else out["ids"] = tokenizer.encode(text_of(in), options);
    } catch (const json::exception&) {
      throw tl::Error("standard input", "line " + std::to_string(number), decode ? R"({"ids": [...]})" : R"({"text": "..."})", line.substr(0, 60));
    }
    std::cout << out.dump(-1, ' ', true) << '\n';
  }
}

}  // namespace

int main(int argc, char** argv) {
  CLI::App app("Encodes JSON lines {\"text\": ...} from standard input to {\"ids\": [...]}, or back with --decode.");
  std::string model;
  bool decode = false;
  tl::EncodeOptions options;
  app.add_option("--model", model, "tokenizer.model, tokenizer.json, a GGUF file, or a folder with one of them")->required();
  app.add_flag("--decode", decode, "read {\"ids\": [...]} and write {\"text\": ...}");
  app.add_flag("--bos", options.bos, "put the beginning-of-text id first");
  app.add_flag("--eos", options.eos, "put the end-of-text id last");
  app.add_flag("--special", options.special, "recognise special tokens that are written in the text; with --decode, show them");
  return example::run_main(argc, argv, app, [&] {
    std::ios::sync_with_stdio(false);
    run(tl::load_tokenizer(model), decode, options);
  });
}
