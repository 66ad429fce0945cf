// pack and train_tokenizer as scripts see them: what they write is what the library's own readers and tokenizer make of the same text.
#include "tinyllama/train/packed.hpp"

#include <doctest/doctest.h>

#include <algorithm>
#include <cstdlib>
#include <fstream>

#include <nlohmann/json.hpp>

#include "tests/examples/run.hpp"
#include "tinyllama/io/tokenizer_file.hpp"

namespace {

using namespace tinyllama;
using namespace tinyllama::test;
using nlohmann::json;
namespace fs = std::filesystem;

void put(const fs::path& path, const std::string& bytes) { std::ofstream(path, std::ios::binary) << bytes; }

std::vector<std::int32_t> packed_ids(const fs::path& folder, const std::string& prefix) {
  std::vector<std::int32_t> all;
  for (const auto& path : packed_files(folder, prefix)) {
    const PackedFile file(path);
    std::vector<std::int32_t> ids(static_cast<std::size_t>(file.size()));
    file.read(0, ids);
    all.insert(all.end(), ids.begin(), ids.end());
  }
  return all;
}

const std::string model = (fixture("tokenizer/sentencepiece") / "llama.model").string();

}  // namespace

TEST_CASE("pack: the ids of all documents in order, with BOS, EOS and separator as asked") {
  const TempFolder tmp;
  put(tmp / "a.jsonl", "{\"text\":\"Hello world\"}\n{\"text\":\"\"}\n{\"text\":\"again\\n\"}\n");
  put(tmp / "b.txt", "one paragraph\nof two lines\n\nanother\n");
  const Tokenizer tokenizer = load_tokenizer(model);
  const std::vector<std::string> texts{"Hello world", "again\n", "one paragraph\nof two lines", "another"};
  for (const auto& [flags, bos, eos, separator] : std::vector<std::tuple<std::string, bool, bool, int>>{
           {"", false, false, -1}, {"--bos", true, false, -1}, {"--bos --eos", true, true, -1},
           {"--separator eos", false, false, 2}, {"--separator bos", false, false, 1}}) {
    CAPTURE(flags);
    std::vector<std::int32_t> expected;
    for (const std::string& text : texts) {
      if (separator >= 0 && !expected.empty()) expected.push_back(separator);
      const auto ids = tokenizer.encode(text, {.bos = bos, .eos = eos});
      expected.insert(expected.end(), ids.begin(), ids.end());
    }
    const Result r = run_shell("pack", "--json --overwrite --split blank --block 4 --chunk-blocks 2 " + flags + " --tokenizer '" + model + "' --out " +
                                     (tmp / "out").string() + " " + (tmp / "a.jsonl").string() + " " + (tmp / "b.txt").string());
    REQUIRE_MESSAGE(r.status == 0, r.err);
    const json j = json::parse(r.out);
    CHECK(j["documents"] == 4);
    CHECK(j["tokens"] == expected.size());
    CHECK(j["leftover"] == expected.size() % 4);
    expected.resize(expected.size() / 4 * 4);
    CHECK(packed_ids(tmp / "out", "train") == expected);
    CHECK(j["files"].size() == (expected.size() + 7) / 8);
  }
}

TEST_CASE("pack: the same files for any number of threads; validation documents are whole, and drawn by the seed") {
  const TempFolder tmp;
  std::string text;
  for (int i = 0; i < 300; ++i) text += "document " + std::to_string(i) + " says so\n\n";
  put(tmp / "a.txt", text);
  const auto pack = [&](const std::string& out, const std::string& more) {
    const Result r = run_shell("pack", "--json --bos --split blank --block 5 --chunk-blocks 50 --validation-fraction 0.2 --tokenizer '" + model +
                                     "' --out " + (tmp / out).string() + " " + more + " " + (tmp / "a.txt").string());
    REQUIRE_MESSAGE(r.status == 0, r.err);
    json j = json::parse(r.out);
    CHECK(j["documents"].get<int>() + j["validation"]["documents"].get<int>() == 300);
    CHECK(std::abs(j["validation"]["documents"].get<int>() - 60) < 35);  // five deviations of a fair draw
    return std::pair(packed_ids(tmp / out, "train"), packed_ids(tmp / out, "validation"));
  };
  const auto one = pack("t1", "--threads 1"), three = pack("t3", "--threads 3"), other = pack("s", "--seed 1");
  CHECK(one == three);
  CHECK(one.second != other.second);
  const std::string train = load_tokenizer(model).decode(one.first), validation = load_tokenizer(model).decode(one.second);
  for (int i = 0; i < 299; ++i) {
    const std::string name = "document " + std::to_string(i) + " says";
    CHECK((train.find(name) == train.npos) != (validation.find(name) == validation.npos));
  }
}

TEST_CASE("pack: bad usage is status 2, bad data status 1 and one line that names it") {
  const TempFolder tmp;
  put(tmp / "a.txt", "short");
  put(tmp / "b.jsonl", "{\"text\":\"fine\"}\n{\"text\":}\n");
  CHECK(run_shell("pack", "").status == 2);
  CHECK(run_shell("pack", "--help").status == 0);
  CHECK(run_shell("pack", "--no-such-option").status == 2);
  const std::string start = "--tokenizer '" + model + "' --out " + (tmp / "out").string() + " ";
  for (const auto& [arguments, words] : std::vector<std::pair<std::string, std::vector<std::string>>>{
           {(tmp / "a.txt").string(), {"at least one block of 2049 tokens"}},
           {(tmp / "none.txt").string(), {"none.txt"}},
           {"--block 2 " + (tmp / "b.jsonl").string(), {"b.jsonl:2", "valid JSON"}},
           {"--validation-fraction 0.5 --validation-prefix training " + (tmp / "a.txt").string(), {"--validation-prefix"}}}) {
    const Result r = run_shell("pack", start + arguments);
    CHECK(r.status == 1);
    CHECK(r.err.starts_with("error: "));
    CHECK(std::count(r.err.begin(), r.err.end(), '\n') == 1);
    for (const auto& word : words) CHECK_MESSAGE(r.err.find(word) != r.err.npos, r.err);
  }
}

TEST_CASE("train_tokenizer: a vocabulary of its own, encoded as by sentencepiece itself") {
  const TempFolder tmp;
  std::string text;
  const char* const words[] = {"river", "stone", "walking", "walked", "quietly", "the", "of", "and", "na\u00efve", "1848"};
  for (unsigned i = 0, x = 1; i < 4000; ++i, x = x * 1664525u + 1013904223u)
    text += std::string(words[(x >> 16) % 10]) + (i % 17 == 16 ? ".\n" : " ");
  put(tmp / "a.txt", text + std::string(9000, 'x'));  // a line longer than the trainer takes
  const Result r = run_shell("train_tokenizer", "--json --vocab 320 --out " + (tmp / "out").string() + " " + (tmp / "a.txt").string());
  if (r.err.find("libsentencepiece-dev") != r.err.npos) {
    MESSAGE("skipped: built without the sentencepiece library");
    return;
  }
  REQUIRE_MESSAGE(r.status == 0, r.err);
  const json j = json::parse(r.out);  // the program has compared every id itself
  CHECK(j["vocab"] == 320);
  CHECK(j["compared_texts"].get<int>() > 200);
  const Tokenizer tokenizer = load_tokenizer(tmp / "out");
  CHECK(tokenizer.size() == 320);
  CHECK(tokenizer.bos() == 1);
  CHECK(tokenizer.eos() == 2);
  CHECK(tokenizer.vocabulary().byte_fallback);
  CHECK(tokenizer.encode("the walking").size() <= 6);  // of 11 characters and a space
  for (const std::string s : {"unseen \u4f60 bytes", "  spaces\n\nand\tlines ", "12 34"}) CHECK(tokenizer.decode(tokenizer.encode(s)) == s);
  CHECK(tokenizer.encode("1848").size() >= 4);  // digits stay apart
  const Result large = run_shell("train_tokenizer", "--vocab 30000 --out " + (tmp / "out").string() + " " + (tmp / "a.txt").string());
  CHECK(large.status == 1);
  CHECK(large.err.find("error: sentencepiece") != large.err.npos);
}
