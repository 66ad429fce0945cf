// Event files, read back by a reader of the format's rules, and checks against published values.
#include <doctest/doctest.h>

#include <algorithm>
#include <cstring>
#include <fstream>

#include "tests/support.hpp"
#include "tinyllama/train/tensorboard.hpp"

using namespace tinyllama;
using namespace tinyllama::test;

namespace {


template <class T>
T value_at(std::string_view s, std::size_t at) {
  REQUIRE(at + sizeof(T) <= s.size());
  T v;
  std::memcpy(&v, s.data() + at, sizeof v);
  return v;
}

/// The records of a TFRecord file, their checks checked bit by bit.
std::vector<std::string> records(const std::string& file) {
  const auto check = [](std::string_view bytes) {
    std::uint32_t crc = 0xffffffffu;
    for (const char c : bytes)
      for (int bit = 0; bit < 8; ++bit) {
        const bool one = (crc ^ (static_cast<unsigned char>(c) >> bit)) & 1;
        crc = (crc >> 1) ^ (one ? 0x82f63b78u : 0u);
      }
    crc = ~crc;
    return ((crc >> 15) | (crc << 17)) + 0xa282ead8u;
  };
  std::vector<std::string> out;
  for (std::size_t at = 0; at < file.size();) {
    const auto length = static_cast<std::size_t>(value_at<std::uint64_t>(file, at));
    CHECK(value_at<std::uint32_t>(file, at + 8) == check(std::string_view(file).substr(at, 8)));
    REQUIRE(at + 12 + length + 4 <= file.size());
    out.push_back(file.substr(at + 12, length));
    CHECK(value_at<std::uint32_t>(file, at + 12 + length) == check(out.back()));
    at += 12 + length + 4;
  }
  return out;
}

struct Field {
  int number = 0, type = 0;
  std::uint64_t integer = 0;  // type 0
  std::string bytes;          // of the others
};

/// The fields of a protocol buffer message.
std::vector<Field> fields(const std::string& m) {
  std::vector<Field> out;
  std::size_t at = 0;
  const auto varint = [&] {
    std::uint64_t v = 0;
    for (int shift = 0;; shift += 7) {
      REQUIRE(at < m.size());
      const auto byte = static_cast<unsigned char>(m[at++]);
      v |= static_cast<std::uint64_t>(byte & 0x7f) << shift;
      if (byte < 0x80) return v;
    }
  };
  while (at < m.size()) {
    const std::uint64_t key = varint();
    Field f{.number = static_cast<int>(key >> 3), .type = static_cast<int>(key & 7), .integer = 0, .bytes = {}};
    if (f.type == 0) f.integer = varint();
    else {
      const std::size_t n = f.type == 1 ? 8 : f.type == 5 ? 4 : static_cast<std::size_t>(varint());
      REQUIRE(at + n <= m.size());
      f.bytes = m.substr(at, n);
      at += n;
    }
    out.push_back(f);
  }
  return out;
}

}  // namespace

TEST_CASE("tensorboard: CRC-32C and its mask have the published values") {
  CHECK(detail::crc32c("123456789") == 0xe3069283u);
  CHECK(detail::crc32c("") == 0u);
  CHECK(detail::crc32c(std::string(32, '\0')) == 0x8a9136aau);  // RFC 3720, appendix B.4
  CHECK(detail::crc32c(std::string(32, '\xff')) == 0x62a8ab43u);
  std::string rising;
  for (int i = 0; i < 32; ++i) rising.push_back(static_cast<char>(i));
  CHECK(detail::crc32c(rising) == 0x46dd794eu);
}

TEST_CASE("tensorboard: an event file") {
  const TempFolder folder;
  TensorBoardLog log(folder / "runs" / "one");
  CHECK(log.path().parent_path() == folder / "runs" / "one");
  CHECK(log.path().filename().string().find("tfevents") != std::string::npos);
  log.scalars(300, {{"train/loss", 2.5f}, {"lr", 4e-4f}}, 1234.5);
  log.scalars(-1, {{"x", 0}});
  const auto r = records(read_file(log.path()));
  REQUIRE(r.size() == 3);

  const auto version = fields(r[0]);
  REQUIRE(version.size() == 2);
  CHECK(version[0].number == 1);
  CHECK(version[0].type == 1);
  CHECK(value_at<double>(version[0].bytes, 0) > 1.6e9);
  CHECK(version[1].number == 3);
  CHECK(version[1].bytes == "brain.Event:2");

  const auto event = fields(r[1]);
  REQUIRE(event.size() == 3);
  CHECK(value_at<double>(event[0].bytes, 0) == 1234.5);
  CHECK(event[1].number == 2);
  CHECK(event[1].integer == 300);
  CHECK(event[2].number == 5);
  const auto values = fields(event[2].bytes);
  REQUIRE(values.size() == 2);
  const auto first = fields(values[0].bytes), second = fields(values[1].bytes);
  CHECK(values[0].number == 1);
  CHECK(first[0].number == 1);
  CHECK(first[0].bytes == "train/loss");
  CHECK(first[1].number == 2);
  CHECK(first[1].type == 5);
  CHECK(value_at<float>(first[1].bytes, 0) == 2.5f);
  CHECK(second[0].bytes == "lr");
  CHECK(value_at<float>(second[1].bytes, 0) == 4e-4f);
  CHECK(static_cast<std::int64_t>(fields(r[2])[1].integer) == -1);
}

TEST_CASE("tensorboard: a resumed run writes a file of its own, which begins at its step") {
  const TempFolder folder;
  TensorBoardLog first(folder.path()), second(folder.path(), 200);
  CHECK(first.path() != second.path());
  CHECK(first.path().filename() < second.path().filename());
  const auto r = records(read_file(second.path()));
  REQUIRE(r.size() == 2);
  const auto start = fields(r[1]);
  REQUIRE(start.size() == 3);
  CHECK(start[1].integer == 200);
  CHECK(start[2].number == 7);
  CHECK(start[2].bytes == "\x08\x01");  // status: START
}

TEST_CASE("tensorboard: a place that cannot be written") {
  const TempFolder folder;
  std::ofstream(folder / "file") << "x";
  CHECK_THROWS_WITH_AS(TensorBoardLog(folder / "file"), doctest::Contains("file"), Error);
}
