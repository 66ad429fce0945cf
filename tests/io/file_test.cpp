// Mapping, releasing, and writing that leaves nothing half done.
#include "tinyllama/io/file.hpp"

#include <doctest/doctest.h>

#include "tests/io/small_model.hpp"

namespace {

using namespace tinyllama;
using namespace tinyllama::test;

std::size_t entries(const std::filesystem::path& folder) {
  return static_cast<std::size_t>(std::distance(std::filesystem::directory_iterator(folder), {}));
}


}  // namespace

TEST_CASE("a mapped file shows the file's bytes, also after a move") {
  const TempFolder tmp;
  write_file(tmp / "a", "hello");
  MappedFile a(tmp / "a");
  MappedFile b = std::move(a);
  CHECK(a.bytes().empty());
  CHECK(std::string_view(reinterpret_cast<const char*>(b.bytes().data()), b.bytes().size()) == "hello");
  CHECK(b.path() == tmp / "a");
}

TEST_CASE("release keeps the content, whatever the span") {
  const TempFolder tmp;
  std::string content(5 * 4096 + 100, '\0');
  for (std::size_t i = 0; i < content.size(); ++i) content[i] = static_cast<char>(i * 7);
  write_file(tmp / "a", content);
  const MappedFile f(tmp / "a");
  for (const auto& [from, size] : {std::pair<std::size_t, std::size_t>{0, content.size()}, {1, 10}, {4095, 4098}, {content.size(), 0}}) f.release(f.bytes().subspan(from, size));
  CHECK(std::memcmp(f.bytes().data(), content.data(), content.size()) == 0);

  std::vector<std::byte> own(3 * 4096, std::byte{1});  // dropping pages of ordinary memory would zero them
  f.release(own);
  CHECK(own[4096] == std::byte{1});
  CHECK_FALSE(f.holds(own));
}

TEST_CASE("what cannot be mapped is named") {
  const TempFolder tmp;
  check_error([&] { MappedFile(tmp / "none"); }, {(tmp / "none").string(), "expected a readable file", "No such file"});
  check_error([&] { MappedFile(tmp.path()); }, {tmp.path().string(), "expected a file", "found a folder"});
  write_file(tmp / "empty", "");
  check_error([&] { MappedFile(tmp / "empty"); }, {"empty", "found 0 bytes"});
  REQUIRE(::mkfifo((tmp / "pipe").c_str(), 0600) == 0);
  check_error([&] { MappedFile(tmp / "pipe"); }, {"pipe", "a regular file"});
}

TEST_CASE("a written file appears whole or not at all") {
  const TempFolder tmp;
  write_file(tmp / "a", "old");
  std::string big(3'000'000, 'x');
  CHECK_THROWS_AS(write_file_atomically(tmp / "a", [&](FileWriter& w) { w.write(big); throw Error("half way"); }), Error);
  CHECK(read_file(tmp / "a") == "old");
  CHECK(entries(tmp.path()) == 1);

  write_file_atomically(tmp / "a", [&](FileWriter& w) {
    w.write(big);
    w.write_value(std::uint32_t{0x64636261});
    w.write_zeros(130);
    CHECK(w.position() == 3'000'134);
  });
  CHECK(read_file(tmp / "a") == big + "abcd" + std::string(130, '\0'));
  CHECK(entries(tmp.path()) == 1);

  check_error([&] { write_file_atomically(tmp / "no" / "a", [](FileWriter&) {}); }, {"no/a", "a place that can be written"});
  std::filesystem::create_directory(tmp / "folder");
  write_file(tmp / "folder" / "b", "");
  check_error([&] { write_file_atomically(tmp / "folder", [](FileWriter& w) { w.write("x"); }); }, {"folder", "a place that can be written"});
  CHECK(entries(tmp.path()) == 2);
}
