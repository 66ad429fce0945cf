// TensorBoard event files: scalars by step, as TFRecords of tensorflow.Event messages, written without either library.
#pragma once

#include <unistd.h>

#include <array>
#include <bit>
#include <chrono>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <initializer_list>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <system_error>

#include "tinyllama/train/run_log.hpp"

namespace tinyllama {

namespace detail {

/// CRC-32C (Castagnoli; RFC 3720, appendix B.4).
constexpr std::uint32_t crc32c(std::string_view bytes) {
  constexpr auto table = [] {
    std::array<std::uint32_t, 256> t{};
    for (std::uint32_t i = 0; i < 256; ++i) {
      t[i] = i;
      for (int bit = 0; bit < 8; ++bit) t[i] = (t[i] >> 1) ^ (t[i] & 1 ? 0x82f63b78u : 0u);
    }
    return t;
  }();
  std::uint32_t crc = ~0u;
  for (const char c : bytes) crc = (crc >> 8) ^ table[(crc ^ static_cast<unsigned char>(c)) & 0xff];
  return ~crc;
}
static_assert(crc32c("123456789") == 0xe3069283u);

/// TFRecord's check: a CRC of bytes that hold CRCs themselves would be weak, so it is turned and shifted.
constexpr std::uint32_t masked_crc(std::string_view bytes) { return std::rotr(crc32c(bytes), 15) + 0xa282ead8u; }

/// `n` bytes of an integer, the lowest first.
inline void append_little(std::string& s, std::uint64_t v, int n) {
  for (int i = 0; i < n; ++i) s.push_back(static_cast<char>((v >> (8 * i)) & 0xff));
}

/// Writes the fields of one protocol buffer message.
class ProtoWriter {
 public:
  ProtoWriter& integer(int field, std::int64_t v) { return key(field, 0), varint(static_cast<std::uint64_t>(v)), *this; }
  ProtoWriter& number(int field, double v) { return key(field, 1), append_little(bytes_, std::bit_cast<std::uint64_t>(v), 8), *this; }
  ProtoWriter& number(int field, float v) { return key(field, 5), append_little(bytes_, std::bit_cast<std::uint32_t>(v), 4), *this; }
  ProtoWriter& bytes(int field, std::string_view v) { return key(field, 2), varint(v.size()), bytes_.append(v), *this; }
  const std::string& text() const { return bytes_; }

 private:
  void key(int field, unsigned type) { varint(static_cast<std::uint64_t>(field) << 3 | type); }
  void varint(std::uint64_t v) {
    for (; v >= 0x80; v >>= 7) bytes_.push_back(static_cast<char>(v | 0x80));
    bytes_.push_back(static_cast<char>(v));
  }
  std::string bytes_;
};

/// length (8 bytes), its check, the data, its check.
inline std::string tf_record(std::string_view data) {
  std::string s;
  append_little(s, data.size(), 8);
  append_little(s, masked_crc(s), 4);
  s.append(data);
  append_little(s, masked_crc(data), 4);
  return s;
}

inline double seconds_now() { return std::chrono::duration<double>(std::chrono::system_clock::now().time_since_epoch()).count(); }

}  // namespace detail

/// A scalar of one step: "train/loss" stands with the others of "train".
struct Scalar {
  std::string_view tag;
  float value;
};

/// One event file in a folder that `tensorboard --logdir` is pointed at; every run, resumed ones too, writes a file of its own there. Events are on
/// disk when a call returns (in the system's hands, not synced).
class TensorBoardLog {
 public:
  /// Makes the folder and a new file in it. `first_step` is that of a resumed run: TensorBoard forgets what earlier files say of it and later
  /// ones. Throws Error where the file cannot be written.
  explicit TensorBoardLog(const std::filesystem::path& folder, std::optional<std::int64_t> first_step = std::nullopt) {
    std::error_code error;
    std::filesystem::create_directories(folder, error);
    if (error) throw Error(folder.string(), "", "a folder that can be made", error.message());
    char host[256] = {};
    if (::gethostname(host, sizeof host - 1) != 0 || host[0] == '\0') host[0] = 'h', host[1] = '\0';
    const double now = detail::seconds_now();
    // TensorBoard reads a folder's files in the order of their names, and looks for "tfevents" in them.
    const auto file =
        folder / ("events.out.tfevents." + std::to_string(static_cast<std::int64_t>(now * 1e6)) + "." + host + "." + std::to_string(::getpid()));
    file_ = detail::AppendFile(file, O_EXCL);
    path_ = file;
    write(detail::ProtoWriter().number(1, now).bytes(3, "brain.Event:2"));  // which version: has to be first
    if (first_step) {
      constexpr int session_log = 7, status = 1, start = 1;
      write(detail::ProtoWriter().number(1, now).integer(2, *first_step).bytes(session_log, detail::ProtoWriter().integer(status, start).text()));
    }
  }

  /// One event with all scalars of a step. `wall_time`: seconds since 1970, default now.
  void scalars(std::int64_t step, std::span<const Scalar> values, std::optional<double> wall_time = std::nullopt) {
    detail::ProtoWriter summary;
    for (const Scalar& v : values) summary.bytes(1, detail::ProtoWriter().bytes(1, v.tag).number(2, v.value).text());
    write(detail::ProtoWriter().number(1, wall_time ? *wall_time : detail::seconds_now()).integer(2, step).bytes(5, summary.text()));
  }
  void scalars(std::int64_t step, std::initializer_list<Scalar> values, std::optional<double> wall_time = std::nullopt) {
    scalars(step, std::span(values.begin(), values.size()), wall_time);
  }

  const std::filesystem::path& path() const { return path_; }

 private:
  void write(const detail::ProtoWriter& event) { file_.append(detail::tf_record(event.text())); }
  detail::AppendFile file_;
  std::filesystem::path path_;
};

}  // namespace tinyllama
