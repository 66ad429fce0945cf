// Reading GGUF: values of every type, and a word for each way in which a file can be wrong.
#include "tinyllama/io/gguf.hpp"

#include <doctest/doctest.h>

#include "tests/io/small_model.hpp"

namespace {

using namespace tinyllama;
using namespace tinyllama::test;

std::string text(std::string_view s) { return raw<std::uint64_t>(s.size()) + std::string(s); }
std::string key(std::string_view k, std::uint32_t type, const std::string& value) { return text(k) + raw(type) + value; }

struct TensorBytes {
  std::string name = "t";
  std::vector<std::uint64_t> dims{4, 2};
  std::uint32_t type = 0;
  std::uint64_t offset = 0;
  std::string bytes() const {
    std::string s = text(name) + raw(static_cast<std::uint32_t>(dims.size()));
    for (std::uint64_t d : dims) s += raw(d);
    return s + raw(type) + raw(offset);
  }
};

/// A file of which each part can be set to something wrong.
struct FileBytes {
  std::string magic = "GGUF";
  std::uint32_t version = 3;
  std::vector<std::string> keys;
  std::vector<TensorBytes> tensors;
  std::size_t data = 0;
  std::optional<std::uint64_t> key_count, tensor_count;
  std::string bytes() const {
    std::string s = magic + raw(version) + raw(tensor_count.value_or(tensors.size())) + raw(key_count.value_or(keys.size()));
    for (const auto& k : keys) s += k;
    for (const auto& t : tensors) s += t.bytes();
    s.resize((s.size() + 31) / 32 * 32);
    for (std::size_t i = 0; i < data; ++i) s += static_cast<char>(i);
    return s;
  }
};

void refused(const FileBytes& f, std::initializer_list<std::string_view> words) {
  const std::string bytes = f.bytes();
  check_error([&] { Gguf("file.gguf", bytes_of(bytes)); }, words);
}

}  // namespace

TEST_CASE("metadata of every type, in versions 2 and 3") {
  for (std::uint32_t version : {2u, 3u}) {
    FileBytes f;
    f.version = version;
    f.keys = {key("u8", 0, raw<std::uint8_t>(200)), key("i8", 1, raw<std::int8_t>(-3)), key("u16", 2, raw<std::uint16_t>(60000)), key("i16", 3, raw<std::int16_t>(7)),
              key("u32", 4, raw<std::uint32_t>(4000000000u)), key("i32", 5, raw<std::int32_t>(9)), key("f32", 6, raw(0.5f)), key("bool", 7, raw<std::uint8_t>(1)),
              key("text", 8, text("caf\xc3\xa9")), key("u64", 10, raw<std::uint64_t>(~0ull)), key("i64", 11, raw<std::int64_t>(1ll << 40)), key("f64", 12, raw(0.1)),
              key("words", 9, raw(8u) + raw<std::uint64_t>(2) + text("a") + text("")), key("reals", 9, raw(6u) + raw<std::uint64_t>(2) + raw(1.5f) + raw(-2.0f)),
              key("ints", 9, raw(5u) + raw<std::uint64_t>(2) + raw(-1) + raw(5)), key("bytes", 9, raw(0u) + raw<std::uint64_t>(1) + "\x07"),
              key("nested", 9, raw(9u) + raw<std::uint64_t>(1) + raw(5u) + raw<std::uint64_t>(1) + raw(1)), key("none", 9, raw(8u) + raw<std::uint64_t>(0)),
              key("wide", 9, raw(10u) + raw<std::uint64_t>(1) + raw(~0ull))};
    const std::string bytes = f.bytes();
    const Gguf g("file", bytes_of(bytes));
    CHECK(g.version() == version);
    CHECK(g.metadata().size() == f.keys.size());
    CHECK(g.get_uint("u8") == 200u);
    CHECK(g.get_uint("u16") == 60000u);
    CHECK(g.get_uint("i16") == 7u);
    CHECK(g.get_uint("u32") == 4000000000u);
    CHECK(g.get_uint("i32") == 9u);
    CHECK(g.get_uint("u64") == ~0ull);
    CHECK(g.get_uint("i64") == 1ull << 40);
    CHECK(g.get_float("f32") == 0.5);
    CHECK(g.get_float("f64") == 0.1);
    CHECK(g.get_bool("bool") == true);
    CHECK(g.get_string("text") == "caf\xc3\xa9");
    CHECK(g.get_strings("words") == std::vector<std::string>{"a", ""});
    CHECK(g.get_strings("none").empty());
    CHECK(g.get_floats("reals") == std::vector<float>{1.5f, -2.0f});
    CHECK(g.get_ints("ints") == std::vector<std::int32_t>{-1, 5});
    CHECK(g.get_ints("bytes") == std::vector<std::int32_t>{7});
    CHECK(g.has("nested"));
    CHECK_FALSE(g.has("absent"));
    CHECK_FALSE(g.get_uint("absent"));
    CHECK_FALSE(g.get_string("absent"));
    CHECK(g.get_strings("absent").empty());

    check_error([&] { (void)g.get_uint("i8"); }, {"file: i8", "a non-negative integer", "i8 -3"});
    check_error([&] { (void)g.get_uint("text"); }, {"text", "a non-negative integer", "found string"});
    check_error([&] { (void)g.get_float("u32"); }, {"u32", "a floating-point number", "found u32"});
    check_error([&] { (void)g.get_bool("u8"); }, {"u8", "a bool"});
    check_error([&] { (void)g.get_string("f32"); }, {"f32", "a string", "found f32"});
    check_error([&] { (void)g.get_strings("reals"); }, {"reals", "an array of strings", "array of f32"});
    check_error([&] { (void)g.get_floats("ints"); }, {"ints", "an array of floating-point numbers", "array of i32"});
    check_error([&] { (void)g.get_ints("nested"); }, {"nested", "an array of 32-bit integers", "array of array"});
    check_error([&] { (void)g.get_ints("wide"); }, {"wide", "32-bit"});
    check_error([&] { (void)g.get_ints("words"); }, {"words", "array of string"});
  }
}

TEST_CASE("tensors: dims, format and bytes") {
  FileBytes f;
  f.tensors = {{"b", {4, 2}, 0, 32}, {"a", {8}, 1, 0}, {"c", {64, 1}, 2, 64}, {"odd", {32}, 99, 128}};
  f.data = 160;
  const std::string bytes = f.bytes();
  const Gguf g("file", bytes_of(bytes));
  REQUIRE(g.tensors().size() == 4);
  const GgufTensor& b = *g.find("b");
  CHECK(b.dims == std::vector<index_t>{4, 2});
  CHECK(g.format(b) == Format::f32);
  REQUIRE(b.bytes.size() == 32);
  CHECK(b.bytes[0] == std::byte{32});
  CHECK(g.format(*g.find("a")) == Format::f16);
  CHECK(g.find("a")->bytes.size() == 16);
  CHECK(g.format(*g.find("c")) == Format::q4_0);
  CHECK(g.find("c")->bytes.size() == 36);
  CHECK(g.find("nothing") == nullptr);
  check_error([&] { (void)g.format(*g.find("odd")); }, {"file: odd", "a tensor in one of f32, f16", "q6_K", "ggml type 99"});
}

TEST_CASE("a wrong header is refused") {
  FileBytes f;
  f.magic = "GGML";
  refused(f, {"file.gguf: magic", "not a GGUF file"});
  f = {};
  f.version = 1;
  refused(f, {"version", "expected 2 or 3", "found 1"});
  f.version = 3u << 24;
  refused(f, {"version", "big-endian"});
  f = {};
  f.key_count = 1ull << 60;
  refused(f, {"key count", "1152921504606846976"});
  f = {};
  f.tensor_count = ~0ull;
  refused(f, {"tensor count", "18446744073709551615"});
  check_error([] { Gguf("x", bytes_of("GGUF")); }, {"version", "expected 4 bytes at offset 4", "found 0 (truncated"});
  check_error([] { Gguf("x", {}); }, {"magic", "found 0"});
}

TEST_CASE("wrong metadata is refused") {
  FileBytes f;
  f.keys = {key("k", 4, raw(1u)), key("k", 4, raw(1u))};
  refused(f, {"file.gguf: k", "once", "twice"});
  f.keys = {key("k", 13, raw(1u))};
  refused(f, {"k", "a metadata type from 0 to 12", "found 13"});
  f.keys = {key("", 4, raw(1u))};
  refused(f, {"key 0", "1 to 65535 bytes"});
  f.keys = {key("k", 7, raw<std::uint8_t>(2))};
  refused(f, {"k", "a bool", "the byte 2"});
  f.keys = {key("k", 8, raw<std::uint64_t>(1ull << 63))};
  refused(f, {"k", "9223372036854775808 bytes"});
  f.keys = {key("k", 9, raw(10u) + raw<std::uint64_t>(1ull << 61))};  // 2^61 elements of 8 bytes: the product is 0 in 64 bits
  refused(f, {"k", "an array of 2305843009213693952"});
  f.keys = {key("k", 9, raw(8u) + raw<std::uint64_t>(1ull << 62))};
  refused(f, {"k", "an array of 4611686018427387904"});
  std::string deep;
  for (int i = 0; i < 100000; ++i) deep += raw(9u) + raw<std::uint64_t>(1);
  f.keys = {key("k", 9, deep + raw(0u) + raw<std::uint64_t>(0))};
  refused(f, {"k", "at most 4 deep"});
}

TEST_CASE("wrong tensors are refused") {
  const auto with = [](std::vector<TensorBytes> t, std::size_t data, std::vector<std::string> keys = {}) {
    FileBytes f;
    f.tensors = std::move(t);
    f.data = data;
    f.keys = std::move(keys);
    return f;
  };
  refused(with({{"a", {8}, 0, 0}, {"a", {8}, 0, 32}}, 64), {"file.gguf: a", "once", "twice"});
  refused(with({{"a", {}, 0, 0}}, 64), {"a", "1 to 4 dimensions", "found 0"});
  refused(with({{"a", {1, 1, 1, 1, 1}, 0, 0}}, 64), {"a", "1 to 4 dimensions", "found 5"});
  refused(with({{"a", {8, 0}, 0, 0}}, 64), {"a", "dimensions from 1", "found 0"});
  refused(with({{"a", {1ull << 63}, 0, 0}}, 64), {"a", "dimensions from 1 to 2^48", "9223372036854775808"});
  refused(with({{"a", {1ull << 32, 1ull << 32}, 0, 0}}, 64), {"a", "a size below 2^64 bytes", "[4294967296, 4294967296]"});
  refused(with({{"a", {8}, 0, 8}}, 64), {"a", "a multiple of 32", "found 8"});
  refused(with({{"a", {8}, 0, 96}}, 64), {"a", "inside the 64 bytes", "found 96"});
  refused(with({{"a", {8}, 0, 1ull << 63}}, 64), {"a", "inside the 64 bytes"});
  refused(with({{"a", {16}, 0, 32}}, 64), {"a", "64 bytes at offset 32", "found 32 (truncated"});
  refused(with({{"a", {33, 2}, 8, 0}}, 640), {"a", "a multiple of 32 weights (q8_0)", "found 33"});
  refused(with({{"a", {128}, 14, 0}}, 640), {"a", "a multiple of 256 weights (q6_K)", "found 128"});
  refused(with({{"a", {16}, 0, 0}, {"b", {8}, 0, 32}}, 640), {"b", "an overlap with a"});
  for (std::uint32_t alignment : {0u, 4u, 48u, 1u << 31})
    refused(with({{"a", {8}, 0, 0}}, 64, {key("general.alignment", 4, raw(alignment))}), {"general.alignment", "a power of two", std::to_string(alignment)});
  refused(with({{"a", {8}, 0, 0}}, 64, {key("general.alignment", 8, text("32"))}), {"general.alignment", "found string"});

  FileBytes f = with({{"a", {8}, 0, 0}}, 32);
  f.tensor_count = 2;  // the second would be read from the data
  refused(f, {"tensor 1", "a name", "an empty one"});
}

TEST_CASE("the alignment that the file asks for is used") {
  FileBytes f;
  f.keys = {key("general.alignment", 4, raw(8u))};
  f.tensors = {{"a", {2}, 0, 8}};
  f.data = 64;
  std::string bytes = f.bytes();
  const Gguf g("file", bytes_of(bytes));
  const std::size_t header = 24 + f.keys[0].size() + f.tensors[0].bytes().size();
  CHECK(g.find("a")->bytes.data() == bytes_of(bytes).data() + (header + 7) / 8 * 8 + 8);
}
