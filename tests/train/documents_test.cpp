// Documents: text split in each way, JSONL, zstd of both as a stream, and input that is not sound.
#include "tinyllama/train/documents.hpp"

#include <doctest/doctest.h>

#include <fstream>
#include <random>

#include "tests/io/small_model.hpp"

namespace {

using namespace tinyllama;
using namespace tinyllama::test;
namespace fs = std::filesystem;
using Split = DocumentOptions::Split;
using Kind = DocumentOptions::Kind;
using Documents = std::vector<std::pair<std::uint64_t, std::string>>;

void put(const fs::path& path, std::string_view bytes) { std::ofstream(path, std::ios::binary) << bytes; }

Documents read(const fs::path& path, DocumentOptions options = {}) {
  DocumentReader reader(path, std::move(options));
  Documents all;
  while (auto d = reader.next()) all.emplace_back(d->line, d->text);
  CHECK_FALSE(reader.next());  // and stays so
  return all;
}

}  // namespace

TEST_CASE("documents: a text file as one document, byte for byte but for the last newline") {
  const TempFolder tmp;
  for (const char* text : {"one", "one\n", "\n\n  one\r\n\ntwo \xff\n\n"}) {
    put(tmp / "a.txt", text);
    const std::string expected = std::string_view(text).ends_with('\n') ? std::string(text, std::strlen(text) - 1) : text;
    CHECK(read(tmp / "a.txt") == Documents{{1, expected}});
  }
  put(tmp / "a.txt", "\xef\xbb\xbfone");
  CHECK(read(tmp / "a.txt") == Documents{{1, "one"}});
  for (const char* nothing : {"", "\n", " \r\n\t\n"}) {
    put(tmp / "a.txt", nothing);
    CHECK(read(tmp / "a.txt").empty());
  }
}

TEST_CASE("documents: text split at blank lines and at a separator") {
  const TempFolder tmp;
  put(tmp / "a.txt", "\n\none\nmore\n\n \t\r\ntwo\r\n\n\nthree");
  CHECK(read(tmp / "a.txt", {.split = Split::blank_lines}) == Documents{{3, "one\nmore"}, {7, "two\r"}, {10, "three"}});
  put(tmp / "a.txt", "<|end|>\none\n\nmore\n<|end|>\r\n<|end|>\n<|end|> not\n<|end|>\n");
  CHECK(read(tmp / "a.txt", {.split = Split::separator, .separator = "<|end|>"}) == Documents{{2, "one\n\nmore"}, {7, "<|end|> not"}});
}

TEST_CASE("documents: JSONL by name or by option, other fields, escapes, blank lines") {
  const TempFolder tmp;
  const std::string lines = "{\"meta\": {\"text\": 1}, \"text\": \"a\\nb\\u00e9\"}\n\n  {\"text\":\"\"}\r\n{\"text\":\"c\",\"body\":\"d\"}";
  for (const char* name : {"a.jsonl", "a.ndjson", "a.json"}) {
    put(tmp / name, lines);
    CHECK(read(tmp / name) == Documents{{1, "a\nb\xc3\xa9"}, {4, "c"}});
  }
  put(tmp / "a.txt", lines.substr(lines.rfind('{')));
  CHECK(read(tmp / "a.txt", {.kind = Kind::jsonl, .field = "body"}) == Documents{{1, "d"}});
  CHECK(read(tmp / "a.jsonl", {.kind = Kind::text}).size() == 1);
}

TEST_CASE("documents: bad JSON, bad fields and long lines name file and line") {
  const TempFolder tmp;
  const auto refused = [&](std::string_view line, std::initializer_list<std::string_view> words) {
    put(tmp / "a.jsonl", "{\"text\":\"fine\"}\n\n" + std::string(line) + "\n");
    check_error([&] { read(tmp / "a.jsonl", {.max_bytes = 1000}); }, {"a.jsonl:3: "});
    check_error([&] { read(tmp / "a.jsonl", {.max_bytes = 1000}); }, words);
  };
  refused("{\"text\":\"fine\"", {"valid JSON"});
  refused("{\"text\":\"\xff\"}", {"valid JSON"});
  refused("{\"text\":\"a\"} {}", {"valid JSON"});
  refused("[1]", {"an object", "found an array"});
  refused("{\"other\":\"a\"}", {"text: expected a string, found nothing"});
  refused("{\"text\":null}", {"found nothing"});
  refused("{\"text\":7}", {"text: expected a string, found 7"});
  refused("{\"text\":\"a\",\"text\":\"b\"}", {"once"});
  refused(std::string(900, '['), {"64 levels"});
  refused("{\"text\":\"" + std::string(1000, 'x') + "\"}", {"a line of at most 1000 bytes"});
  put(tmp / "a.txt", "\n\nshort\n" + std::string(600, 'x') + "\n" + std::string(600, 'y'));
  check_error([&] { read(tmp / "a.txt", {.split = Split::blank_lines, .max_bytes = 1000}); }, {"a.txt:3: ", "a document of at most 1000 bytes"});
  put(tmp / "a.txt", std::string(1 << 20, 'x'));  // no newline: over the limit long before the end
  check_error([&] { read(tmp / "a.txt", {.max_bytes = 1000}); }, {"a.txt:1: ", "a line of at most"});
  check_error([&] { read(tmp / "none.txt"); }, {"none.txt", "readable"});
  check_error([&] { read(tmp.path()); }, {"a folder"});
}

TEST_CASE("documents: pieces end anywhere") {
  const TempFolder tmp;
  std::mt19937 random(3);
  std::string text;
  Documents expected;
  for (std::uint64_t line = 1; text.size() < 3'000'000; line += 2) {
    std::string document(1 + random() % (random() % 50 == 0 ? 400'000 : 300), static_cast<char>('a' + random() % 26));
    text += document + "\n\n";
    expected.emplace_back(line, std::move(document));
  }
  put(tmp / "a.txt", text);
  CHECK(read(tmp / "a.txt", {.split = Split::blank_lines}) == expected);
}

#if TINYLLAMA_ZSTD
namespace {

std::string compressed(std::string_view text) {
  std::string out(ZSTD_compressBound(text.size()), '\0');
  out.resize(ZSTD_compress(out.data(), out.size(), text.data(), text.size(), 3));
  return out;
}

}  // namespace

TEST_CASE("documents: zstd of text and of JSONL; several frames, large ratios, skippable frames") {
  const TempFolder tmp;
  put(tmp / "a.jsonl.zst", compressed("{\"text\":\"one\"}\n{\"te") + std::string("\x50\x2a\x4d\x18\x03\0\0\0abc", 11) +
                                compressed("xt\":\"two\"}\n"));
  CHECK(read(tmp / "a.jsonl.zst") == Documents{{1, "one"}, {2, "two"}});
  put(tmp / "c.txt.zst", std::string("\x5f\x2a\x4d\x18\0\0\0\0", 8) + compressed("three"));
  CHECK(read(tmp / "c.txt.zst") == Documents{{1, "three"}});
  std::string text;
  Documents expected;
  for (std::uint64_t i = 0; i < 40; ++i) {
    std::string document(262'144 - (i % 3), static_cast<char>('a' + i % 26));  // one piece of output, and about
    text += document + "\n\n";
    expected.emplace_back(2 * i + 1, std::move(document));
  }
  const std::string small = compressed(text);
  CHECK(small.size() < 20'000);
  put(tmp / "a.txt.zst", small);
  CHECK(read(tmp / "a.txt.zst", {.split = Split::blank_lines}) == expected);
  put(tmp / "a.bin", small);  // told by content
  CHECK(read(tmp / "a.bin", {.split = Split::blank_lines}) == expected);
  for (std::size_t size : {262'144u, 524'288u}) {  // output ends with a full piece
    put(tmp / "b.txt.zst", compressed(std::string(size, 'x')));
    CHECK(read(tmp / "b.txt.zst").at(0).second.size() == size);
  }
  // A short block first, so that the last one, of 128 KB, fills a piece of output and has more when all input is taken.
  const std::string x(100 + 2 * 131'072, 'x');
  std::string frame(ZSTD_compressBound(x.size()), '\0');
  const std::unique_ptr<ZSTD_CStream, std::size_t (*)(ZSTD_CStream*)> stream(ZSTD_createCStream(), ZSTD_freeCStream);
  ZSTD_outBuffer out{frame.data(), frame.size(), 0};
  ZSTD_inBuffer first{x.data(), 100, 0}, rest{x.data() + 100, x.size() - 100, 0};
  REQUIRE(ZSTD_compressStream2(stream.get(), &out, &first, ZSTD_e_flush) == 0);
  REQUIRE(ZSTD_compressStream2(stream.get(), &out, &rest, ZSTD_e_end) == 0);
  put(tmp / "d.txt.zst", frame.substr(0, out.pos));
  CHECK(read(tmp / "d.txt.zst") == Documents{{1, x}});
}

TEST_CASE("documents: damaged zstd is refused") {
  const TempFolder tmp;
  std::mt19937 random(4);
  std::string text;
  for (int i = 0; i < 20000; ++i) text += std::to_string(random()) + "\n";
  const std::string good = compressed(text);
  put(tmp / "a.txt.zst", good.substr(0, good.size() / 2));
  check_error([&] { read(tmp / "a.txt.zst"); }, {"a.txt.zst", "zstd", "truncated"});
  put(tmp / "a.txt.zst", good.substr(0, 7));
  check_error([&] { read(tmp / "a.txt.zst"); }, {"truncated"});
  put(tmp / "a.txt.zst", good + "rubbish");
  check_error([&] { read(tmp / "a.txt.zst"); }, {"a.txt.zst", "zstd"});
  put(tmp / "a.txt.zst", "plain");
  check_error([&] { read(tmp / "a.txt.zst"); }, {"as the name says"});
  for (int i = 0; i < 200; ++i) {
    std::string bad = good;
    for (unsigned n = 1 + random() % 3; n > 0; --n) bad[random() % bad.size()] = static_cast<char>(random());
    put(tmp / "a.txt.zst", bad);
    std::size_t size = 0;
    try {
      size = read(tmp / "a.txt.zst").size();
    } catch (const Error&) {
    }
    CHECK(size <= 1);
  }
}
#else
TEST_CASE("documents: without libzstd a compressed file says what to do") {
  const TempFolder tmp;
  put(tmp / "a.txt.zst", "\x28\xb5\x2f\xfd rest");
  check_error([&] { read(tmp / "a.txt.zst"); }, {"a.txt.zst", "libzstd-dev", "zstd -d"});
}
#endif
