// Sessions as values: forks, undo, saving, errors, and what a step allocates.
#include "tinyllama/model/model.hpp"

#include <doctest/doctest.h>

#include <fstream>

#include "tests/model/golden.hpp"

namespace tl = tinyllama;
using namespace tinyllama::test;

namespace {

struct Fixture {
  tl::Cpu dev{{.threads = 2, .kernels = nullptr}};
  tl::Model<golden_gqa, tl::Cpu> model = tl::load<golden_gqa>(dev, golden_folder<golden_gqa>());
  std::vector<std::int32_t> ids = Reference(golden_folder<golden_gqa>()).ids("input_ids");
  std::span<const std::int32_t> prompt(std::size_t n, std::size_t from = 0) const { return std::span<const std::int32_t>(ids).subspan(from, n); }
};
std::vector<float> copy(std::span<const float> l) { return {l.begin(), l.end()}; }

}  // namespace

TEST_CASE_FIXTURE(Fixture, "session: a copy is a fork that shares pages until one writes") {
  auto a = model.start();
  a.prefill(prompt(90));  // one whole page, and a part of the next
  auto b = a;
  CHECK(a.cache().pages()[0] == b.cache().pages()[0]);
  CHECK(a.cache().pages()[1] == b.cache().pages()[1]);
  const auto la = copy(a.decode(5));
  CHECK(a.cache().pages()[0] == b.cache().pages()[0]);
  CHECK(a.cache().pages()[1] != b.cache().pages()[1]);
  const auto lb = copy(b.decode(6));
  CHECK(la != lb);
  auto c = model.start();
  c.prefill(prompt(90));
  CHECK(copy(c.decode(6)) == lb);
}

TEST_CASE_FIXTURE(Fixture, "session: truncate undoes") {
  auto s = model.start();
  s.prefill(prompt(70));
  const auto before = copy(s.decode(3));
  s.prefill(prompt(20, 9));
  s.truncate(70);
  CHECK(s.length() == 70);
  CHECK(copy(s.decode(3)) == before);
  CHECK_THROWS_AS(s.truncate(1000), tl::Error);
  s.truncate(0);
  CHECK(s.tokens().empty());
}

TEST_CASE_FIXTURE(Fixture, "session: a deferred token is read with the next ones") {
  auto a = model.start(), b = model.start();
  a.prefill(prompt(10));
  b.prefill(prompt(10));
  a.defer(4);
  CHECK(a.length() == 11);
  CHECK(a.cache().length() == 10);
  b.decode(4);
  CHECK(relative_error(copy(a.prefill(prompt(5, 20))), copy(b.prefill(prompt(5, 20)))) < 1e-3);  // an f16 cache, other chunks
  CHECK(a.cache().length() == 16);
  a.defer(4);
  a.truncate(16);
  CHECK(a.length() == 16);
}

TEST_CASE_FIXTURE(Fixture, "session: greedy decoding is decoding and taking the best") {
  auto a = model.start(), b = model.start();
  const auto l = copy(a.prefill(prompt(10)));
  b.prefill(prompt(10));
  const auto first = static_cast<std::int32_t>(std::max_element(l.begin(), l.end()) - l.begin());
  const auto all = greedy(a, std::span<const std::int32_t>(&first, 1), 6);
  CHECK(b.decode_greedy(first, 6) == all);
  CHECK(b.length() == 16);
  CHECK(copy(b.logits()) == copy(a.logits()));
  CHECK(b.decode_greedy(first, 0).empty());
}

TEST_CASE_FIXTURE(Fixture, "sessions: greedy decoding of several is that of each") {
  std::vector<std::vector<std::int32_t>> expected;
  std::vector<std::vector<float>> logits;
  const std::int32_t first[] = {3, 5, 7};
  for (int i = 0; i < 3; ++i) {
    auto s = model.start();
    s.prefill(prompt(4 + 30 * i, i));
    expected.push_back(s.decode_greedy(first[i], 8));
    logits.push_back(copy(s.logits()));
  }
  auto a = model.start(), b = model.start(), c = model.start();
  a.prefill(prompt(4, 0)), b.prefill(prompt(34, 1)), c.prefill(prompt(64, 2));
  tl::Session<golden_gqa, tl::Cpu>* all[] = {&a, &b, &c};
  CHECK(tl::decode_batch_greedy<golden_gqa, tl::Cpu>(all, first, 8) == expected);
  CHECK(b.length() == 42);
  CHECK(relative_error(copy(c.logits()), logits[2]) < 1e-3);
  tl::Session<golden_gqa, tl::Cpu>* twice[] = {&a, &b, &a};
  CHECK_THROWS_WITH_AS((tl::decode_batch_greedy<golden_gqa, tl::Cpu>(twice, first, 1)), doctest::Contains("each session once"), tl::Error);
}

TEST_CASE_FIXTURE(Fixture, "session: saved and restored") {
  const TempFolder folder;
  auto a = model.start();
  a.prefill(prompt(75));
  a.save(folder / "cache");
  const auto next = copy(a.decode(9));
  auto b = model.start();
  b.restore(folder / "cache");
  CHECK(std::equal(b.tokens().begin(), b.tokens().end(), ids.begin(), ids.begin() + 75));
  CHECK(copy(b.decode(9)) == next);

  const auto refused = [&](const std::string& name, const std::string& part) {
    auto s = model.start();
    s.prefill(prompt(3));
    try {
      s.restore(folder / name);
    } catch (const tl::Error& e) {
      CHECK(std::string(e.what()).find(part) != std::string::npos);
      CHECK(s.length() == 3);  // unchanged
      return;
    }
    FAIL("restored " << name);
  };
  const std::string bytes = read_file(folder / "cache");
  const auto write = [&](const std::string& name, const std::string& content) { std::ofstream(folder / name, std::ios::binary) << content; };
  write("short", bytes.substr(0, bytes.size() - 1));
  refused("short", "size: expected");
  write("tiny", bytes.substr(0, 7));
  refused("tiny", "header: expected");
  write("magic", "x" + bytes.substr(1));
  refused("magic", "a saved KV cache");
  std::string layers = bytes;
  layers[16] = 3;
  write("layers", layers);
  refused("layers", "expected f16, 2 layers, 2 KV heads of 16, pages of 64, found f16, 3 layers");
  std::string length = bytes;
  length[56 + 3] = 0x7f;
  write("length", length);
  refused("length", "length: expected 0..128");
  std::string extra = bytes;
  extra[64 + 7] = '\x80';
  write("extra", extra);
  refused("extra", "size: expected");
}

TEST_CASE_FIXTURE(Fixture, "session: bad input is an Error that says what") {
  auto s = model.start();
  CHECK_THROWS_WITH(s.prefill(std::vector<std::int32_t>{1, 2, 512}), "token ids: id 2: expected 0..511, found 512");
  CHECK_THROWS_WITH(s.decode(-1), "token ids: id 0: expected 0..511, found -1");
  CHECK(s.length() == 0);
  const std::vector<std::int32_t> many(129, 1);
  CHECK_THROWS_WITH(s.prefill(many), "KvCache: positions: expected at most the context of 128, found 129");
  CHECK(s.length() == 0);
  CHECK(s.prefill({}).empty());
  tl::Session<golden_gqa, tl::Cpu>* twice[] = {&s, &s};
  const std::int32_t next[] = {1, 2};
  CHECK_THROWS_AS((tl::decode_batch<golden_gqa, tl::Cpu>(twice, next)), tl::Error);
  CHECK_THROWS_AS(model.tokenizer(), tl::Error);
}

TEST_CASE_FIXTURE(Fixture, "session: prefill reports progress and can be stopped") {
  auto s = model.start();
  std::stop_source stop;
  std::vector<std::size_t> seen;
  const auto l = s.prefill(prompt(50), {.chunk = 16,
                                        .progress =
                                            [&](std::size_t done, std::size_t total) {
                                              CHECK(total == 50);
                                              seen.push_back(done);
                                              if (done == 32) stop.request_stop();
                                            },
                                        .stop = stop.get_token()});
  CHECK(l.empty());
  CHECK(seen == std::vector<std::size_t>{16, 32});
  CHECK(s.length() == 32);
  CHECK(s.cache().length() == 32);
}

TEST_CASE_FIXTURE(Fixture, "load: the wrong config says which fits") {
  try {
    tl::load<golden_tied>(dev, golden_folder<golden_gqa>());
    FAIL("loaded");
  } catch (const tl::Error& e) {
    const std::string what = e.what();
    CHECK(what.find("expected 3 layers, hidden 96") != std::string::npos);
    CHECK(what.find("found 2 layers, hidden 64") != std::string::npos);
    CHECK(what.find("no preset fits") != std::string::npos);
  }
  const auto stories = test_data("models/stories260K/stories260K.gguf");
  if (!stories) {
    MESSAGE("skipped: no stories260K");
    return;
  }
  try {
    tl::load<tl::tinyllama_1b>(dev, *stories);
    FAIL("loaded");
  } catch (const tl::Error& e) {
    CHECK(std::string(e.what()).find("the preset stories_260k fits") != std::string::npos);
  }
}

TEST_CASE_FIXTURE(Fixture, "two models and two devices live side by side") {
  tl::Cpu other({.threads = 1, .kernels = nullptr});
  const auto tied = tl::load<golden_tied>(other, golden_folder<golden_tied>());
  auto a = model.start();
  auto b = tied.start();
  a.prefill(prompt(20));
  b.prefill(std::vector<std::int32_t>{1, 2, 3});
  auto c = model.start();
  c.prefill(prompt(20));
  CHECK(copy(a.decode(1)) == copy(c.decode(1)));
}
