// tokenize: JSON lines {"text": ...} to {"ids": [...]} and, with --decode, back.
#include <tinyllama/io/tokenizer_file.hpp>

#include <CLI/CLI.hpp>
#include <nlohmann/json.hpp>

#include <cstdint>
#include <iostream>
#include <string>
#include <vector>

namespace tl = tinyllama;
using nlohmann::json;

namespace {

/// The member `key` of a line's object, as a T; an Error naming the line where it is something else.
template <class T>
T member(const std::string& line, std::size_t number, const char* key) {
  const std::string where = "standard input, line " + std::to_string(number);
  try {
    return json::parse(line).at(key).get<T>();
  } catch (const json::exception&) {
    throw tl::Error(where, "", std::string("a JSON object with \"") + key + "\"", line.substr(0, 60));
  }
}

void run(const tl::Tokenizer& tokenizer, bool decode, const tl::EncodeOptions& options) {
  std::string line;
  for (std::size_t number = 1; std::getline(std::cin, line); ++number) {
    if (line.find_first_not_of(" \t\r") == line.npos) continue;
    json out;
    if (decode) out["text"] = tokenizer.decode(member<std::vector<std::int32_t>>(line, number, "ids"), options.special);
    else out["ids"] = tokenizer.encode(member<std::string>(line, number, "text"), options);
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
  try {
    app.parse(argc, argv);
  } catch (const CLI::ParseError& e) {
    return app.exit(e) == 0 ? 0 : 2;
  }
  try {
    std::ios::sync_with_stdio(false);
    run(tl::load_tokenizer(model), decode, options);
  } catch (const tl::Error& e) {
    std::cerr << "error: " << e.what() << '\n';
    return 1;
  }
}
