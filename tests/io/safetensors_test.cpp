// safetensors: what is written is read back, and each rule of the format is held.
#include "tinyllama/io/safetensors.hpp"

#include <doctest/doctest.h>

#include "tests/io/small_model.hpp"

namespace {

using namespace tinyllama;
using namespace tinyllama::test;

std::string file_of(std::string_view header, std::size_t data) { return raw<std::uint64_t>(header.size()) + std::string(header) + std::string(data, 'd'); }

void refused(std::string_view header, std::size_t data, std::initializer_list<std::string_view> words) {
  const std::string bytes = file_of(header, data);
  check_error([&] { Safetensors("file", bytes_of(bytes)); }, words);
}

}  // namespace

TEST_CASE("what is written is read back") {
  const TempFolder tmp;
  const SmallModel model(small_config());
  write_safetensors(tmp / "m.safetensors", model.tensors);
  const Safetensors file(tmp / "m.safetensors");
  CHECK(file.metadata().at("format") == "pt");
  CHECK(file.tensors().size() == model.tensors.size());
  std::uint64_t length = 0;
  std::memcpy(&length, file.file()->bytes().data(), 8);
  CHECK(length % 8 == 0);
  for (const SafeTensor& t : model.tensors) {
    const SafeTensor* found = file.find(t.name);
    REQUIRE(found);
    CHECK(file.format(*found) == Format::f32);
    CHECK(found->shape == t.shape);
    REQUIRE(found->bytes.size() == t.bytes.size());
    CHECK(std::memcmp(found->bytes.data(), t.bytes.data(), t.bytes.size()) == 0);
  }
  CHECK(file.find("nothing") == nullptr);
}

TEST_CASE("writing refuses a name twice and content of another size") {
  const TempFolder tmp;
  const std::vector<SafeTensorPlan> plan{{"a", "F32", {2}, 8}};
  check_error([&] { write_safetensors(tmp / "m", plan, [](std::size_t, FileWriter& w) { w.write("1234"); }); }, {"a", "8 bytes written", "found 4"});
  const std::vector<SafeTensorPlan> twice{{"a", "F32", {2}, 8}, {"a", "F32", {2}, 8}};
  check_error([&] { write_safetensors(tmp / "m", twice, [](std::size_t, FileWriter& w) { w.write("12345678"); }); }, {"a", "once", "twice"});
  CHECK_FALSE(std::filesystem::exists(tmp / "m"));
}

TEST_CASE("dtypes, scalars, empty tensors and escaped names") {
  const std::string bytes = file_of(R"({"bf":{"dtype":"BF16","shape":[2,3],"data_offsets":[0,12]},"none":{"dtype":"F16","shape":[0,4],"data_offsets":[12,12]},)"
                                    R"("\u00e9":{"dtype":"I64","shape":[],"data_offsets":[12,20]},"new":{"dtype":"X7","shape":[5],"data_offsets":[20,23]}}  )", 23);
  const Safetensors f("file", bytes_of(bytes));
  CHECK(f.format(*f.find("bf")) == Format::bf16);
  CHECK(f.find("bf")->bytes.size() == 12);
  CHECK(f.find("none")->bytes.empty());
  CHECK(f.find("\xc3\xa9")->shape.empty());
  check_error([&] { (void)f.format(*f.find("\xc3\xa9")); }, {"dtype F32, F16, BF16 or F8_E4M3", "found I64"});
  check_error([&] { (void)f.format(*f.find("new")); }, {"file: new", "found X7"});
}

TEST_CASE("a wrong length is refused") {
  check_error([] { Safetensors("file", bytes_of("1234567")); }, {"header length", "8 bytes", "found 7"});
  for (std::uint64_t length : {0ull, 1ull, 3ull, 1ull << 63, ~0ull})
    check_error([&] { const std::string b = raw(length) + "{}"; Safetensors("file", bytes_of(b)); }, {"file: header length", std::to_string(length)});
  check_error([] { const std::string b = raw<std::uint64_t>(2) + "[]"; Safetensors("file", bytes_of(b)); }, {"header", "not a safetensors file"});
}

TEST_CASE("a wrong header is refused") {
  refused(R"({"a":)", 0, {"header", "valid JSON", "parse error"});
  refused("{\"\xff\":1}", 0, {"header", "valid JSON"});
  refused(R"({} {})", 0, {"header", "valid JSON"});
  refused(R"({"a":1})", 0, {"a", "an object of dtype, shape and data_offsets", "found 1"});
  refused(R"({"a":[]})", 0, {"a", "an object of dtype"});
  refused(R"({"a":{}})", 0, {"a", "dtype, shape and two data_offsets"});
  refused(R"({"a":{"dtype":"F32","shape":[1]}})", 4, {"a", "two data_offsets"});
  refused(R"({"a":{"dtype":"F32","shape":[1],"data_offsets":[0]}})", 4, {"a", "two data_offsets"});
  refused(R"({"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4,4]}})", 4, {"a", "two data_offsets"});
  refused(R"({"a":{"dtype":5,"shape":[1],"data_offsets":[0,4]}})", 4, {"a", "a string", "found 5"});
  refused(R"({"a":{"dtype":"F32","shape":[-1],"data_offsets":[0,4]}})", 4, {"a", "non-negative integers as shape", "found -1"});
  refused(R"({"a":{"dtype":"F32","shape":[1.0],"data_offsets":[0,4]}})", 4, {"a", "as shape", "found 1.0"});
  refused(R"({"a":{"dtype":"F32","shape":[18446744073709551616],"data_offsets":[0,4]}})", 4, {"a", "as shape"});
  refused(R"({"a":{"dtype":"F32","shape":[[1]],"data_offsets":[0,4]}})", 4, {"a", "found an array"});
  refused(R"({"a":{"dtype":"F32","shape":null,"data_offsets":[0,4]}})", 4, {"a", "found null"});
  refused(R"({"a":{"dtype":"F32","shape":[true],"data_offsets":[0,4]}})", 4, {"a", "found a bool"});
  refused(R"({"a":{"dtype":"F32","shape":{},"data_offsets":[0,4]}})", 4, {"a", "found an object"});
  refused(R"({"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4],"more":1}})", 4, {"a", "the key 'more'"});
  refused(R"({"__metadata__":{"a":1}})", 0, {"a", "a string", "found 1"});
  refused(R"({"__metadata__":{"a":{}}})", 0, {"a", "found an object"});
  std::string deep = "{\"a\":";
  for (int i = 0; i < 200000; ++i) deep += '[';
  refused(deep, 0, {"a"});
}

TEST_CASE("names and keys that stand twice are refused") {
  refused(R"({"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"a":{"dtype":"F32","shape":[1],"data_offsets":[4,8]}})", 8, {"file: a", "the tensor once", "twice"});
  refused(R"({"a":{"dtype":"F32","dtype":"F16","shape":[1],"data_offsets":[0,4]}})", 4, {"dtype", "the key once"});
  refused(R"({"a":{"dtype":"F32","shape":[1],"shape":[1],"data_offsets":[0,4]}})", 4, {"shape", "the key once"});
  refused(R"({"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4],"data_offsets":[0,4]}})", 4, {"data_offsets", "the key once"});
  refused(R"({"__metadata__":{"a":"1","a":"2"}})", 0, {"a", "the key once"});
  refused(R"({"__metadata__":{},"__metadata__":{}})", 0, {"__metadata__", "once"});
}

TEST_CASE("wrong offsets and sizes are refused") {
  const auto one = [](const char* shape, const char* offsets) { return std::string(R"({"a":{"dtype":"F32","shape":)") + shape + R"(,"data_offsets":)" + offsets + "}}"; };
  refused(one("[1]", "[0,4]"), 3, {"a", "inside the 3 bytes", "[0, 4) (truncated"});
  refused(one("[1]", "[0,18446744073709551615]"), 4, {"a", "inside the 4 bytes"});
  refused(one("[1]", "[4,0]"), 4, {"a", "[4, 0)"});
  refused(one("[1]", "[4,8]"), 8, {"a", "where the tensor before ends, at 0", "[4, 8)"});
  refused(one("[1]", "[0,4]"), 8, {"data", "4 bytes", "found 8"});
  refused(one("[2]", "[0,4]"), 4, {"a", "8 bytes for F32 [2]", "found 4 bytes"});
  refused(one("[4294967296,4294967296]", "[0,4]"), 4, {"a", "a size below 2^64", "4294967296"});
  refused(one("[4611686018427387905]", "[0,4]"), 4, {"a", "extents up to 2^48"});  // times 4 bytes wraps to 4
  refused(R"({"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"b":{"dtype":"F32","shape":[1],"data_offsets":[2,6]}})", 6, {"b", "at 4", "[2, 6)"});
  refused(R"({"a":{"dtype":"F4","shape":[1],"data_offsets":[0,1]}})", 1, {"a", "F4 [1]"});
}
