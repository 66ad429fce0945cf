// The programs as scripts see them: fixed options, JSON on standard output, exit status 0, 1 for an Error in one line, 2 for bad usage.
#include <doctest/doctest.h>

#include <cmath>
#include <cstring>
#include <fstream>
#include <sstream>

#include <nlohmann/json.hpp>

#include <tinyllama/tinyllama.hpp>

#include "tests/examples/run.hpp"

using namespace tinyllama::test;
using nlohmann::json;
namespace fs = std::filesystem;
namespace tl = tinyllama;

namespace {

std::vector<json> json_lines(const std::string& text) {
  std::vector<json> all;
  std::istringstream in(text);
  for (std::string line; std::getline(in, line);) all.push_back(json::parse(line));
  return all;
}

/// A .npy file of f32 in C order: its shape, and its values.
std::pair<std::string, std::vector<float>> npy(const fs::path& path) {
  const std::string file = read_file(path);
  REQUIRE(file.starts_with("\x93NUMPY"));
  const std::size_t length = static_cast<unsigned char>(file[8]) + 256u * static_cast<unsigned char>(file[9]);
  const std::string header = file.substr(10, length);
  REQUIRE(header.find("'<f4'") != header.npos);
  std::vector<float> values((file.size() - 10 - length) / sizeof(float));
  std::memcpy(values.data(), file.data() + 10 + length, values.size() * sizeof(float));
  const auto at = header.find('(');
  return {header.substr(at, header.find(')') - at + 1), values};
}

constexpr const char* no_stories = "skipped: models/stories260K is not under TINYLLAMA_TEST_DATA";

}  // namespace

TEST_CASE("programs: bad usage is status 2, an Error is status 1 and one line") {
  const std::vector<std::string> programs = {"generate", "chat", "tokenize", "inspect", "quantize", "logits", "perplexity", "train_step", "finetune", "pretrain", "pack", "convert"};
  for (const auto& program : programs) {
    CAPTURE(program);
    CHECK(run(program, {"--no-such-option"}).status == 2);
    CHECK(run(program, {}).status == 2);
    CHECK(run(program, {"--help"}).status == 0);
  }
  const std::string nothing = "/no/such/model.gguf";
  for (const auto& [program, arguments] : std::vector<std::pair<std::string, std::vector<std::string>>>{
           {"generate", {"--model", nothing, "--prompt", "x"}}, {"chat", {"--model", nothing, "--once", "x"}}, {"tokenize", {"--model", nothing}},
           {"inspect", {"--model", nothing}}, {"logits", {"--model", nothing, "--ids", "1", "--out", "/no/such/folder/x.npy"}}}) {
    CAPTURE(program);
    const Result r = run(program, arguments);
    CHECK(r.status == 1);
    CHECK_MESSAGE(one_error_line(r.err), r.err);
    CHECK(r.err.find(nothing) != r.err.npos);
    CHECK(r.out.empty());
  }
}

TEST_CASE("generate: one JSON object, greedy text as other software generates it, the same for any number of threads") {
  const auto model = test_data("models/stories260K/stories260K.gguf"), expected = test_data("models/stories260K/greedy.txt");
  if (!model || !expected) {
    MESSAGE(no_stories);
    return;
  }
  std::string first;
  for (const char* threads : {"1", "3"}) {
    const Result r = run("generate", {"--model", *model, "--prompt", "Once upon a time", "--max-tokens", "200", "--temperature", "0", "--seed", "1", "--threads", threads, "--json"});
    REQUIRE_MESSAGE(r.status == 0, r.err);
    const json j = json::parse(r.out);
    for (const char* key : {"tokens", "prompt_tokens", "prefill_tokens_per_second", "decode_tokens_per_second", "peak_bytes", "planned_bytes"}) {
      CAPTURE(key);
      REQUIRE(j.contains(key));
      CHECK(j[key].get<double>() > 0);
    }
    CHECK(j["tokens"].get<int>() <= 200);
    const auto text = j["text"].get<std::string>();
    CHECK(text.size() > 200);
    CHECK(read_file(*expected).starts_with("Once upon a time" + text));
    if (first.empty()) first = text;
    CHECK(text == first);
  }
}

TEST_CASE("generate: a seed makes a sampled text the same again") {
  const auto model = test_data("models/stories260K/stories260K.gguf");
  if (!model) {
    MESSAGE(no_stories);
    return;
  }
  const auto text = [&](const char* seed) {
    const Result r = run("generate", {"--model", *model, "--prompt", "One day", "--max-tokens", "60", "--temperature", "1", "--seed", seed, "--json"});
    REQUIRE_MESSAGE(r.status == 0, r.err);
    return json::parse(r.out)["text"].get<std::string>();
  };
  const auto a = text("7");
  CHECK(text("7") == a);
  CHECK(text("8") != a);
}

TEST_CASE("tokenize: JSON lines there and back") {
  const auto model = test_data("tokenizer/tokenizer.model"), vectors = test_data("tokenizer/llama2_spm_vectors_visible.jsonl");
  if (!model || !vectors) {
    MESSAGE("skipped: tokenizer/ is not under TINYLLAMA_TEST_DATA");
    return;
  }
  const auto expected = json_lines(read_file(*vectors));
  std::string texts, ids;
  for (const json& v : expected) {
    texts += json{{"text", v["text"]}}.dump() + "\n";
    ids += json{{"ids", v["ids"]}}.dump() + "\n";
  }
  const Result encoded = run("tokenize", {"--model", *model}, texts);
  REQUIRE_MESSAGE(encoded.status == 0, encoded.err);
  const auto lines = json_lines(encoded.out);
  REQUIRE(lines.size() == expected.size());
  for (std::size_t i = 0; i < lines.size(); ++i) {
    CAPTURE(expected[i].dump());
    CHECK(lines[i]["ids"] == expected[i]["ids"]);
  }
  const auto with_bos = json_lines(run("tokenize", {"--model", *model, "--bos"}, "{\"text\": \"a\"}\n").out);
  REQUIRE(with_bos.size() == 1);
  CHECK(with_bos[0]["ids"].size() == 2);
  CHECK(with_bos[0]["ids"][0] == 1);

  const Result decoded = run("tokenize", {"--model", *model, "--decode"}, ids);
  REQUIRE_MESSAGE(decoded.status == 0, decoded.err);
  CHECK(json_lines(decoded.out).size() == expected.size());

  const Result bad = run("tokenize", {"--model", *model}, "{\"text\": \"a\"}\nnot json\n");
  CHECK(bad.status == 1);
  CHECK_MESSAGE(one_error_line(bad.err), bad.err);
}

TEST_CASE("perplexity: of the second half of each chunk, as the logits say") {
  const auto model = test_data("models/stories260K/stories260K.gguf"), text = test_data("models/stories260K/greedy.txt");
  if (!model || !text) {
    MESSAGE(no_stories);
    return;
  }
  const auto perplexity = [&](std::vector<std::string> more) {
    std::vector<std::string> arguments = {"--model", *model, "--text", *text, "--context", "32", "--chunks", "2", "--json"};
    arguments.insert(arguments.end(), more.begin(), more.end());
    const Result r = run("perplexity", arguments);
    REQUIRE_MESSAGE(r.status == 0, r.err);
    return json::parse(r.out);
  };
  const json got = perplexity({"--cache", "f32"});
  CHECK(got["chunks"] == 2);
  CHECK(got["tokens_scored"] == 2 * 15);
  tl::Cpu dev({.threads = 1, .kernels = nullptr});
  const auto m = tl::load<tl::stories_260k>(dev, *model, {.cache = tl::Format::f32});
  std::ifstream in(*text, std::ios::binary);
  const auto ids = m.tokenizer().encode(std::string(std::istreambuf_iterator<char>(in), {}), {.bos = true});
  double loss = 0;
  for (std::size_t chunk = 0; chunk < 2; ++chunk) {
    std::vector<std::int32_t> part(ids.begin() + static_cast<std::ptrdiff_t>(chunk * 32), ids.begin() + static_cast<std::ptrdiff_t>(chunk * 32 + 32));
    part[0] = m.tokenizer().bos();
    auto session = m.start();
    const auto l = session.logits_of(part);
    for (tl::index_t i = 16; i < 31; ++i) {
      double sum = 0;
      for (tl::index_t v = 0; v < 512; ++v) sum += std::exp(static_cast<double>(l(i, v)));
      loss += (std::log(sum) - l(i, part[static_cast<std::size_t>(i + 1)])) / 30;
    }
  }
  CHECK(std::abs(got["loss"].get<double>() - loss) < 1e-5);
  CHECK(std::abs(got["perplexity"].get<double>() - std::exp(loss)) < 1e-4);
  const double narrow = perplexity({"--cache", "q8_0"})["loss"];
  CHECK(std::abs(narrow - loss) < 0.02);  // 8 bits for keys and values
  CHECK(narrow != got["loss"]);
  CHECK(run("perplexity", {"--model", *model, "--text", *text, "--context", "4096"}).status == 1);
}

TEST_CASE("logits: a .npy file, the same whole, in chunks and step by step") {
  const auto model = test_data("models/stories260K/stories260K.gguf");
  if (!model || !fs::exists(fs::path(TINYLLAMA_TEST_PROGRAMS) / "logits")) {
    MESSAGE(no_stories);
    return;
  }
  const TempFolder folder;
  const auto logits = [&](std::vector<std::string> more) {
    const auto out = folder / "x.npy";
    std::vector<std::string> arguments = {"--model", *model, "--ids", "1,403,407,261,378", "--out", out};
    arguments.insert(arguments.end(), more.begin(), more.end());
    const Result r = run("logits", arguments);
    REQUIRE_MESSAGE(r.status == 0, r.err);
    return npy(out);
  };
  const auto [shape, whole] = logits({});
  CHECK(shape == "(5, 512)");
  REQUIRE(whole.size() == 5 * 512);
  for (const auto& [what, other] : {std::pair{"chunks", logits({"--chunk", "2"})}, std::pair{"steps", logits({"--step"})}}) {
    CAPTURE(what);
    CHECK(other.first == shape);
    REQUIRE(other.second.size() == whole.size());
    float worst = 0;
    for (std::size_t i = 0; i < whole.size(); ++i) worst = std::max(worst, std::abs(whole[i] - other.second[i]));
    CHECK(worst <= 2e-5f);  // logits of up to 20 in f32, after 5 layers in another order of sums
  }
  CHECK(run("logits", {"--model", *model, "--ids", "1,99999", "--out", folder / "y.npy"}).status == 1);
}

TEST_CASE("inspect and quantize: a checkpoint in another format says so and still generates") {
  const auto model = test_data("models/stories260K/stories260K.gguf");
  if (!model) {
    MESSAGE(no_stories);
    return;
  }
  const TempFolder folder;
  for (const auto& [format, path] : {std::pair{"f16", folder / "half.gguf"}, std::pair{"f32", folder / "hf"}}) {
    const Result r = run("quantize", {"--model", *model, "--out", path, "--format", format});
    REQUIRE_MESSAGE(r.status == 0, r.err);
    const Result inspected = run("inspect", {"--model", path, "--json"});
    REQUIRE_MESSAGE(inspected.status == 0, inspected.err);
    const json j = json::parse(inspected.out);
    CHECK(j["preset"] == "stories_260k");
    CHECK(j["parameters"] == 260032);
    CHECK(j["formats"].contains(format));
  }
  const Result text = run("generate", {"--model", folder / "half.gguf", "--prompt", "Once upon a time", "--max-tokens", "20", "--temperature", "0", "--json"});
  REQUIRE_MESSAGE(text.status == 0, text.err);
  CHECK(json::parse(text.out)["text"].get<std::string>().starts_with(", there was a little girl named Lily"));
  CHECK(run("quantize", {"--model", *model, "--out", folder / "x.gguf", "--format", "q9_9"}).status == 2);
}

TEST_CASE("generate: TinyLlama's full geometry runs in the memory that was planned") {
  const TempFolder folder;
  for (const std::string format : {"q4_K_M", "bf16"}) {
    CAPTURE(format);
    const std::string path = (folder / (format == "bf16" ? "folder" : "mixed.gguf")).string();
    const Result made = run("make_checkpoint", {"--preset", "tinyllama_1b", "--out", path, "--format", format});
    REQUIRE_MESSAGE(made.status == 0, made.err);
    const Result r = run("generate", {"--model", path, "--prompt", "hello", "--max-tokens", "32", "--temperature", "0", "--ignore-eos", "--json"});
    REQUIRE_MESSAGE(r.status == 0, r.err);
    const json j = json::parse(r.out);
    CHECK(j.at("tokens") == 32);
    const double ratio = j.at("peak_bytes").get<double>() / j.at("planned_bytes").get<double>();
    CHECK(ratio > 0.95);
    CHECK(ratio < 1.05);
    fs::remove_all(path);
  }
}
