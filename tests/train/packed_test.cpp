// Packed data sets: the bytes of the format, every type of id, the end of the data, and files that are damaged.
#include "tinyllama/train/packed.hpp"

#include <doctest/doctest.h>

#include <numeric>
#include <random>

#include "tests/io/small_model.hpp"

namespace {

using namespace tinyllama;
using namespace tinyllama::test;
namespace fs = std::filesystem;


/// A file as the format says, made without the writer.
template <class T>
std::string packed(std::uint8_t code, const std::vector<T>& ids, std::uint64_t version = 1) {
  std::string s = "LITPKDS" + raw(version) + raw(code) + raw<std::uint64_t>(ids.size());
  for (const T id : ids) s += raw(id);
  return s;
}

std::vector<std::int32_t> read_all(const fs::path& path) {
  const PackedFile file(path);
  std::vector<std::int32_t> ids(static_cast<std::size_t>(file.size()));
  file.read(0, ids);
  return ids;
}

std::vector<std::int32_t> counting(std::int32_t from, std::int32_t to) {
  std::vector<std::int32_t> ids(static_cast<std::size_t>(to - from));
  std::iota(ids.begin(), ids.end(), from);
  return ids;
}

std::vector<std::string> names(const std::vector<fs::path>& files) {
  std::vector<std::string> all;
  for (const auto& f : files) all.push_back(f.filename().string());
  return all;
}

template <class T>
void reads(std::uint8_t code, const std::vector<T>& ids, const std::vector<std::int32_t>& expected) {
  const TempFolder tmp;
  write_file(tmp / "x.bin", packed(code, ids));
  const PackedFile file(tmp / "x.bin");
  CAPTURE(std::string(name_of(file.type())));
  CHECK(file.size() == static_cast<std::int64_t>(ids.size()));
  CHECK(read_all(tmp / "x.bin") == expected);
  std::vector<std::int32_t> part(1);
  file.read(1, part);
  CHECK(part[0] == expected[1]);
}

}  // namespace

TEST_CASE("packed: the writer's bytes are the format's") {
  const TempFolder tmp;
  PackedWriter writer(tmp.path(), "train", 32000, {.block = 3, .chunk_blocks = 2});
  writer.add(std::vector<std::int32_t>{1, 300, 31999, 4});
  writer.add(std::vector<std::int32_t>{5, 6});
  const PackedSummary summary = writer.finish();
  CHECK(summary.tokens == 6);
  CHECK(summary.leftover == 0);
  REQUIRE(names(summary.files) == std::vector<std::string>{"train_0000000000.bin"});
  const std::string expected("LITPKDS\x01\0\0\0\0\0\0\0\x08\x06\0\0\0\0\0\0\0\x01\0\x2c\x01\xff\x7c\x04\0\x05\0\x06\0", 36);
  CHECK(read_file(tmp / "train_0000000000.bin") == expected);
  CHECK(expected == packed<std::uint16_t>(8, {1, 300, 31999, 4, 5, 6}));
}

TEST_CASE("packed: the type of an id follows from the vocabulary, as in lit-gpt") {
  CHECK(token_type_for(65499) == TokenType::u16);
  CHECK(token_type_for(65500) == TokenType::i32);
  const TempFolder tmp;
  PackedWriter writer(tmp.path(), "p", 100000, {.block = 2, .chunk_blocks = 1});
  writer.add(std::vector<std::int32_t>{99999, 65536});
  CHECK(read_file(writer.finish().files.at(0)) == packed<std::int32_t>(4, {99999, 65536}));
  reads<std::uint8_t>(1, {0, 255}, {0, 255});
  reads<std::int8_t>(2, {-1, 127}, {-1, 127});
  reads<std::int16_t>(3, {-2, 32767}, {-2, 32767});
  reads<std::int32_t>(4, {-3, 2147483647}, {-3, 2147483647});
  reads<std::int64_t>(5, {7, 31999, 4294967298, -4294967295}, {7, 31999, -1, -1});  // their low 32 bits are 2 and 1
  reads<std::uint16_t>(8, {0, 65535}, {0, 65535});
}

TEST_CASE("packed: documents of any length, in chunks; the rest has whole blocks and a name of its own; nothing is padding") {
  const TempFolder tmp;
  PackedWriter writer(tmp.path(), "train", 32000, {.block = 5, .chunk_blocks = 2});
  for (std::int32_t at = 0, n = 0; at < 38; at += n++) writer.add(counting(at, std::min(38, at + n)));  // of 0, 1, 2 ... ids
  const PackedSummary summary = writer.finish();
  CHECK(summary.tokens == 38);
  CHECK(summary.leftover == 3);
  const std::vector<std::string> expected{"train_0000000000.bin", "train_0000000001.bin", "train_0000000002.bin", "rest_train_0000000003.bin"};
  CHECK(names(summary.files) == expected);
  CHECK(packed_files(tmp.path(), "train") == summary.files);
  std::vector<std::int32_t> all;
  for (const auto& f : summary.files) {
    const auto ids = read_all(f);
    if (f != summary.files.back()) CHECK(ids.size() == 10);
    all.insert(all.end(), ids.begin(), ids.end());
  }
  CHECK(all == counting(0, 35));
  CHECK(&writer.finish() == &writer.summary());  // again: nothing more
  check_error([&] { writer.add(counting(0, 1)); }, {"ids before finish()"});
}

TEST_CASE("packed: less than a chunk is one file of the usual name, less than a block none") {
  const TempFolder tmp;
  PackedWriter small(tmp.path(), "small", 300, {.block = 4, .chunk_blocks = 100});
  small.add(counting(0, 11));
  CHECK(names(small.finish().files) == std::vector<std::string>{"small_0000000000.bin"});
  CHECK(read_all(tmp / "small_0000000000.bin") == counting(0, 8));
  PackedWriter none(tmp.path(), "none", 300, {.block = 4});
  none.add(counting(0, 3));
  CHECK(none.finish().files.empty());
  CHECK(none.summary().leftover == 3);
  { PackedWriter lost(tmp.path(), "lost", 300, {.block = 4}); lost.add(counting(0, 9)); }
  check_error([&] { packed_files(tmp.path(), "lost"); }, {tmp.path().string(), "lost*.bin", "none"});
}

TEST_CASE("packed: files of an earlier run are refused or replaced, others are left alone") {
  const TempFolder tmp;
  const auto write = [&](const char* prefix, bool overwrite, int n) {
    PackedWriter writer(tmp.path(), prefix, 300, {.block = 2, .chunk_blocks = 2, .overwrite = overwrite});
    writer.add(counting(0, n));
    writer.finish();
  };
  write("train", false, 14);
  write("train_math", false, 4);
  check_error([&] { write("train", false, 2); }, {tmp.path().string(), "train", "overwrite", "found 4 files"});
  const auto before = packed_files(tmp.path(), "train");
  { PackedWriter lost(tmp.path(), "train", 300, {.block = 2, .chunk_blocks = 2, .overwrite = true}); lost.add(counting(0, 3)); }
  CHECK(packed_files(tmp.path(), "train") == before);  // nothing was written, so nothing was removed
  write("train", true, 4);
  CHECK(names(packed_files(tmp.path(), "train")) == std::vector<std::string>{"train_0000000000.bin", "train_math_0000000000.bin"});
  CHECK(names(packed_files(tmp.path(), "train_0")) == std::vector<std::string>{"train_0000000000.bin"});
  write("train", true, 1);  // less than a block: no file, and not the old ones
  CHECK(names(packed_files(tmp.path(), "train")) == std::vector<std::string>{"train_math_0000000000.bin"});
}

TEST_CASE("packed: wrong options and ids are refused") {
  const TempFolder tmp;
  check_error([&] { PackedWriter(tmp.path(), "a/b", 10); }, {"prefix", "'a/b'"});
  check_error([&] { PackedWriter(tmp.path(), "", 10); }, {"prefix"});
  check_error([&] { PackedWriter(tmp.path(), "a", 0); }, {"vocab", "found 0"});
  check_error([&] { PackedWriter(tmp.path(), "a", 10, {.block = 1}); }, {"block", "found 1"});
  check_error([&] { PackedWriter(tmp.path(), "a", 10, {.chunk_blocks = 0}); }, {"chunk_blocks", "found 0"});
  check_error([&] { PackedWriter(tmp.path(), "a", 10, {.chunk_blocks = std::int64_t{1} << 60}); }, {"chunk_blocks"});
  write_file(tmp / "file", "x");
  check_error([&] { PackedWriter(tmp / "file", "a", 10); }, {"file"});
  PackedWriter writer(tmp.path(), "a", 10);
  check_error([&] { writer.add(std::vector<std::int32_t>{1, 2, 10}); }, {"a: token 2", "0 to 9", "found 10"});
  check_error([&] { writer.add(std::vector<std::int32_t>{-1}); }, {"found -1"});
}

TEST_CASE("packed: damaged files are refused") {
  const TempFolder tmp;
  const std::string good = packed<std::uint16_t>(8, {1, 2, 3});
  const auto refused = [&](const std::string& bytes, std::initializer_list<std::string_view> words) {
    write_file(tmp / "x.bin", bytes);
    check_error([&] { PackedFile file(tmp / "x.bin"); }, {"x.bin"});
    check_error([&] { PackedFile file(tmp / "x.bin"); }, words);
  };
  refused(good.substr(0, 23), {"header", "24 bytes", "found 23 (truncated)"});
  refused("LITPKDX" + good.substr(7), {"begins with LITPKDS"});
  refused(packed<std::uint16_t>(8, {1, 2, 3}, 2), {"version", "found 2"});
  for (int code : {0, 9, 255})
    refused(packed<std::uint16_t>(static_cast<std::uint8_t>(code), {1}), {"type", "a code from 1 to 8", std::to_string(code)});
  refused(packed<float>(6, {1}), {"integers", "f32"});
  refused(packed<double>(7, {1}), {"integers", "f64"});
  refused(good.substr(0, good.size() - 1), {"size", "3 ids of 2 bytes", "5 bytes (truncated)"});
  refused(good.substr(0, good.size() - 2), {"4 bytes (truncated)"});
  refused(good + "x", {"3 ids of 2 bytes", "found 7 bytes"});
  refused(good + "xy", {"3 ids of 2 bytes", "found 8 bytes"});
  refused(good.substr(0, 16) + raw<std::uint64_t>(~0ull) + good.substr(24), {"18446744073709551615 ids"});
  refused(good.substr(0, 16) + raw<std::uint64_t>((1ull << 63) + 3) + good.substr(24), {"ids of 2 bytes"});  // times 2 wraps to 6
  refused("", {"0 bytes"});
  check_error([&] { PackedFile file(tmp / "missing.bin"); }, {"missing.bin"});
  check_error([&] { packed_files(tmp / "missing", "train"); }, {"missing", "a readable folder"});

  std::mt19937 random(1);
  for (int i = 0; i < 2000; ++i) {
    std::string bytes = good.substr(0, random() % (good.size() + 1));
    for (unsigned n = random() % 4; n > 0 && !bytes.empty(); --n) bytes[random() % bytes.size()] = static_cast<char>(random());
    write_file(tmp / "x.bin", bytes);
    std::size_t size = 0;
    try {
      size = read_all(tmp / "x.bin").size();
    } catch (const Error&) {
    }
    CHECK(size <= 6);
  }
}

TEST_CASE("packed: ids outside the vocabulary, ranges outside the file, and a trailing run") {
  const TempFolder tmp;
  write_file(tmp / "x.bin", packed<std::uint16_t>(8, {1, 2, 500, 3, 1, 1, 1}));
  const PackedFile file(tmp / "x.bin");
  CHECK(file.find_outside(0, 7, 500) == 2);
  CHECK_FALSE(file.find_outside(0, 7, 501));
  CHECK_FALSE(file.find_outside(3, 4, 4));
  file.check_ids(501);
  check_error([&] { file.check_ids(500); }, {"x.bin", "token 2", "0 to 499", "found 500"});
  CHECK(file.trailing_run() == 3);
  file.expect_random_reads();
  file.prefetch(2, 5);
  file.prefetch(7, 0);
  std::vector<std::int32_t> ids(4);
  check_error([&] { file.read(4, ids); }, {"x.bin", "inside the 7", "4 from 4"});
  check_error([&] { file.read(-1, ids); }, {"from -1"});
  check_error([&] { file.prefetch(0, 8); }, {"8 from 0"});
  write_file(tmp / "n.bin", packed<std::int64_t>(5, {4294967298, -1}));
  check_error([&] { PackedFile(tmp / "n.bin").check_ids(10); }, {"token 0", "found 4294967298"});
  write_file(tmp / "e.bin", packed<std::uint16_t>(8, {}));
  CHECK(PackedFile(tmp / "e.bin").size() == 0);
  CHECK(PackedFile(tmp / "e.bin").trailing_run() == 0);
}
