// Generation: ranges and callbacks, stops, cancellation, seeds, and real models' texts.
#include "tinyllama/generate/generate.hpp"

#include <doctest/doctest.h>

#include <nlohmann/json.hpp>

#include <sstream>
#include <thread>

#include "tests/model/golden.hpp"
#include "tinyllama/text/chat_template.hpp"

namespace tl = tinyllama;
using namespace tinyllama::test;

namespace {

/// A vocabulary for a golden model: control pieces, all bytes, and letters that make words of some kind.
tl::Vocabulary letters(int size) {
  tl::Vocabulary v;
  v.pieces = {{"<unk>", 0, tl::PieceType::unknown}, {"<s>", 0, tl::PieceType::control}, {"</s>", 0, tl::PieceType::control}};
  for (int b = 0; b < 256; ++b) {
    char text[8];
    std::snprintf(text, sizeof text, "<0x%02X>", b);
    v.pieces.push_back({text, 0, tl::PieceType::byte});
  }
  for (int i = 0; static_cast<int>(v.pieces.size()) < size; ++i)
    v.pieces.push_back({std::string(i % 3 ? "" : "\xe2\x96\x81") + static_cast<char>('a' + i % 26) + static_cast<char>('a' + i / 26), -static_cast<float>(i), tl::PieceType::normal});
  v.bos = 1, v.eos = 2, v.unk = 0;
  return v;
}

struct Golden {
  tl::Cpu dev{{.threads = 2, .kernels = nullptr}};
  tl::Model<golden_gqa, tl::Cpu> model{tl::load<golden_gqa>(dev, golden_folder<golden_gqa>()).shared_weights(), tl::Tokenizer(letters(512))};
};


}  // namespace

TEST_CASE_FIXTURE(Golden, "generate: range, callback and text() agree, and the same seed gives the same text") {
  const tl::GenerateOptions options{.max_tokens = 40, .temperature = 1.0f, .seed = 3, .ignore_eos = true};
  auto a = model.start(), b = model.start(), c = model.start(), d = model.start();
  std::string range, callback;
  for (std::string_view piece : tl::generate(a, "ab cd", options)) {
    CHECK_FALSE(piece.empty());
    range += piece;
  }
  int tokens = 0;
  const auto finish = tl::generate(b, "ab cd", options, [&](const tl::Token& t) {
    tokens += t.id >= 0;
    callback += t.text;
  });
  CHECK(finish == tl::Finish::max_tokens);
  CHECK(tokens == 40);
  CHECK(range == callback);
  CHECK(tl::generate(c, "ab cd", options).text() == range);
  auto other = options;
  other.seed = 4;
  CHECK(tl::generate(d, "ab cd", other).text() != range);
  CHECK(a.length() == static_cast<tl::index_t>(model.tokenizer().encode("ab cd", {.bos = true}).size()) + 40);
}

TEST_CASE_FIXTURE(Golden, "generate: the text is what the ids decode to, in whole characters") {
  auto s = model.start();
  auto g = tl::generate(s, "x", {.max_tokens = 100, .temperature = 2.0f, .top_p = 1.0f, .seed = 5, .ignore_eos = true});
  std::string all;
  g.run([&](const tl::Token& t) { all += t.text; });
  std::vector<std::int32_t> ids(s.tokens().begin(), s.tokens().end());
  const std::string whole = model.tokenizer().decode(ids), prompt = model.tokenizer().decode(g.prompt());
  CHECK(whole.substr(0, prompt.size()) == prompt);
  CHECK(whole.substr(prompt.size()) == all);
}

TEST_CASE_FIXTURE(Golden, "generate: stops") {
  const tl::GenerateOptions base{.max_tokens = 30, .temperature = 0.0f, .ignore_eos = true};
  auto s = model.start();
  auto g = tl::generate(s, "ab", base);
  std::vector<tl::Token> tokens;
  g.run([&](const tl::Token& t) { tokens.push_back(t); });
  REQUIRE(tokens.size() >= 10);
  SUBCASE("a stop id is not part of the text or the session") {
    auto options = base;
    options.stop_ids = {tokens[4].id};
    auto t = model.start();
    auto h = tl::generate(t, "ab", options);
    int n = 0;
    CHECK(h.run([&](const tl::Token&) { ++n; }) == tl::Finish::stop_id);
    int first = 0;
    while (tokens[static_cast<std::size_t>(first)].id != tokens[4].id) ++first;
    CHECK(n == first);
    CHECK(t.length() == static_cast<tl::index_t>(h.prompt().size()) + first);
  }
  SUBCASE("a stop string ends before it, also across tokens") {
    std::string text;
    for (const auto& t : tokens) text += t.text;
    const std::string stop = text.substr(text.size() / 2, 3);
    auto options = base;
    options.stop_strings = {"never\x01", stop};
    auto t = model.start();
    auto h = tl::generate(t, "ab", options);
    CHECK(h.text() == text.substr(0, text.find(stop)));
    CHECK(h.finish() == tl::Finish::stop_string);
  }
  SUBCASE("max_tokens 0, and a full context") {
    auto t = model.start();
    CHECK(tl::generate(t, "ab", {.max_tokens = 0}).text().empty());
    auto h = tl::generate(t, "ab", {.max_tokens = 1000, .ignore_eos = true});
    h.text();
    CHECK(h.finish() == tl::Finish::context_full);
    CHECK(t.length() == 128);
  }
  SUBCASE("the callback and a stop token end it") {
    auto t = model.start();
    int n = 0;
    CHECK(tl::generate(t, "ab", base, [&](const tl::Token&) { return ++n < 3; }) == tl::Finish::cancelled);
    CHECK(n == 3);
    std::stop_source stop;
    auto options = base;
    options.max_tokens = 100;
    options.stop = stop.get_token();
    auto u = model.start();
    auto h = tl::generate(u, "ab", options);
    h.next();
    std::thread([&] { stop.request_stop(); }).join();
    CHECK(h.next() == nullptr);
    CHECK(h.finish() == tl::Finish::cancelled);
  }
}

TEST_CASE_FIXTURE(Golden, "generate: log-probabilities, and a conversation that goes on") {
  auto s = model.start();
  auto g = tl::generate(s, "ab", {.max_tokens = 3, .temperature = 0.0f, .ignore_eos = true, .log_probabilities = 2});
  while (const tl::Token* t = g.next()) {
    REQUIRE(t->top.size() == 2);
    CHECK(t->top[0].id == t->id);  // greedy
    CHECK(t->top[0].log_probability == t->log_probability);
    CHECK(t->top[1].log_probability <= t->log_probability);
    CHECK(t->log_probability < 0);
  }
  // Going on from where it stopped gives what one run gives.
  auto once = model.start();
  auto h = tl::generate(once, "ab", {.max_tokens = 8, .temperature = 0.0f, .ignore_eos = true});
  h.text();
  auto rest = tl::generate(s, std::vector<std::int32_t>{}, {.max_tokens = 5, .temperature = 0.0f, .ignore_eos = true});
  rest.text();
  CHECK(std::equal(s.tokens().begin(), s.tokens().end(), once.tokens().begin(), once.tokens().end()));
}

TEST_CASE_FIXTURE(Golden, "generate: nothing to begin with is an Error") {
  auto s = model.start();
  CHECK_THROWS_AS(tl::generate(s, "", {.bos = false}).text(), tl::Error);
  auto t = model.start();
  CHECK_NOTHROW(tl::generate(t, "", {.max_tokens = 1}).text());
}

TEST_CASE("generate: stop strings hold back what could still become one") {
  tl::StopStrings s({"###", "abc"});
  CHECK(s.push("hello #") == "hello ");
  CHECK(s.push("#x") == "##x");
  CHECK(s.push("zab") == "z");
  CHECK(s.push("ab") == "ab");
  CHECK(s.push("c!") == "");
  CHECK(s.stopped());
  CHECK(s.push("more") == "");
  CHECK(s.finish() == "");
  tl::StopStrings t({"end"});
  CHECK(t.push("the en") == "the ");
  CHECK(t.finish() == "en");
}

TEST_CASE("generate: stories260K writes what llama2.c and llama.cpp write") {
  const auto gguf = test_data("models/stories260K/stories260K.gguf"), expected = test_data("models/stories260K/greedy.txt");
  if (!gguf || !expected) {
    MESSAGE("skipped: no stories260K");
    return;
  }
  std::string text = read_file(*expected);
  while (text.ends_with('\n')) text.pop_back();
  tl::Cpu dev;
  const auto model = tl::load<tl::stories_260k>(dev, *gguf);
  for (const std::string prompt : {"", "Once upon a time"}) {
    auto s = model.start();
    std::string all = prompt;
    for (std::string_view piece : tl::generate(s, prompt, {.max_tokens = 256, .temperature = 0.0f})) all += piece;
    CHECK(all.substr(0, text.size()) == text);
  }
}

TEST_CASE("generate: SmolLM2's greedy text is llama.cpp's") {
  const auto gguf = smollm2_gguf();
  if (!gguf) {
    MESSAGE("skipped: no SmolLM2");
    return;
  }
  tl::Cpu dev;
  const auto model = tl::load<tl::smollm2_135m>(dev, *gguf);
  std::istringstream lines(read_file(fixture("generate/smollm2_llama_cpp.jsonl")));
  int count = 0;
  for (std::string line; std::getline(lines, line); ++count) {
    const auto j = nlohmann::json::parse(line);
    const auto expected = j.at("ids").get<std::vector<std::int32_t>>();
    CAPTURE(j.at("prompt").get<std::string>());
    auto s = model.start();
    std::vector<std::int32_t> ids;
    tl::generate(s, j.at("prompt").get<std::string>(), {.max_tokens = 32, .temperature = 0.0f, .special = true}, [&](const tl::Token& t) {
      if (t.id >= 0) ids.push_back(t.id);
    });
    REQUIRE(ids.size() >= std::min<std::size_t>(32, expected.size()));
    ids.resize(std::min(ids.size(), expected.size()));
    CHECK(ids == std::vector<std::int32_t>(expected.begin(), expected.begin() + static_cast<std::ptrdiff_t>(ids.size())));
  }
  CHECK(count == 5);
}

TEST_CASE("generate: SmolLM2 knows the capital of France") {
  const auto gguf = smollm2_gguf();
  if (!gguf) {
    MESSAGE("skipped: no SmolLM2");
    return;
  }
  tl::Cpu dev;
  const auto model = tl::load<tl::smollm2_135m>(dev, *gguf);
  auto s = model.start();
  const std::vector<tl::Message> messages{{"user", "What is the capital of France?"}};
  const auto format = tl::detect_chat_template(model.tokenizer().vocabulary());
  auto g = tl::generate(s, tl::render(model.tokenizer(), format, messages, true), {.max_tokens = 32, .temperature = 0.0f, .stop_ids = tl::stop_ids(model.tokenizer(), format)});
  CHECK(g.text() == "The capital of France is Paris.");
}
