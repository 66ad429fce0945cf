// Zip archives of stored (not compressed) entries, as PyTorch writes them: read in place, and a streaming writer; zip64 for big files.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <map>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "tinyllama/io/file.hpp"
#include "tinyllama/io/gguf.hpp"

namespace tinyllama {

struct ZipEntry {
  std::string name;
  std::span<const std::byte> bytes;
};

namespace detail {

/// Signatures and sizes of .ZIP File Format Specification 6.3 (APPNOTE), sections 4.3.7 to 4.3.16.
inline constexpr std::uint32_t zip_local = 0x04034b50, zip_descriptor = 0x08074b50, zip_central = 0x02014b50, zip64_end = 0x06064b50,
                               zip64_locator = 0x07064b50, zip_end = 0x06054b50;
inline constexpr std::uint64_t zip_end_bytes = 22, zip64_locator_bytes = 20;

/// CRC-32 (IEEE, reflected). Eight tables take eight bytes at a time, some five times as fast as one by one: models are gigabytes.
class Crc32 {
 public:
  void add(std::span<const std::byte> bytes) {
    const std::byte* p = bytes.data();
    std::size_t n = bytes.size();
    for (; n >= 8; n -= 8, p += 8) {
      std::uint64_t word;
      std::memcpy(&word, p, 8);
      word ^= state_;
      state_ = 0;
      for (std::size_t k = 0; k < 8; ++k) state_ ^= tables[7 - k][word >> 8 * k & 255];
    }
    for (; n > 0; --n, ++p) state_ = state_ >> 8 ^ tables[0][(state_ ^ std::to_integer<std::uint32_t>(*p)) & 255];
  }
  std::uint32_t value() const { return ~state_; }

 private:
  static constexpr auto tables = [] {
    std::array<std::array<std::uint32_t, 256>, 8> t{};
    for (std::uint32_t i = 0; i < 256; ++i) {
      std::uint32_t c = i;
      for (int bit = 0; bit < 8; ++bit) c = c >> 1 ^ (c & 1 ? 0xedb88320u : 0);
      t[0][i] = c;
    }
    for (std::size_t k = 1; k < 8; ++k)
      for (std::size_t i = 0; i < 256; ++i) t[k][i] = t[k - 1][i] >> 8 ^ t[0][t[k - 1][i] & 255];
    return t;
  }();
  std::uint32_t state_ = ~0u;
};

}  // namespace detail

/// The entries of an archive. Checksums are not looked at: PyTorch can be told not to write them.
class ZipArchive {
 public:
  /// `bytes` is the caller's to keep alive; `name` is for messages. Throws Error where it is no sound archive of stored entries.
  ZipArchive(std::string name, std::span<const std::byte> bytes) : name_(std::move(name)) { parse(bytes); }

  std::span<const ZipEntry> entries() const { return entries_; }
  const ZipEntry* find(std::string_view entry) const {
    const auto it = by_name_.find(entry);
    return it == by_name_.end() ? nullptr : &entries_[it->second];
  }

 private:
  struct Directory { std::uint64_t count, size, offset; };

  template <class T>
  static T load(std::span<const std::byte> bytes, std::uint64_t at) {
    T v;
    std::memcpy(&v, bytes.data() + at, sizeof v);
    return v;
  }

  Directory directory(std::span<const std::byte> bytes) const {
    const Error none(name_, "end of central directory", "the end of a zip archive",
                     "none: truncated, or not a file of torch.save since PyTorch 1.6");
    if (bytes.size() < detail::zip_end_bytes) throw none;
    std::uint64_t end = bytes.size() - detail::zip_end_bytes;
    for (const std::uint64_t last = end > 0xffff ? end - 0xffff : 0;; --end) {  // a comment may follow
      if (load<std::uint32_t>(bytes, end) == detail::zip_end && load<std::uint16_t>(bytes, end + 20) == bytes.size() - end - detail::zip_end_bytes) break;
      if (end == last) throw none;
    }
    Directory d{load<std::uint16_t>(bytes, end + 10), load<std::uint32_t>(bytes, end + 12), load<std::uint32_t>(bytes, end + 16)};
    if (d.count != 0xffff && d.size != 0xffffffff && d.offset != 0xffffffff) return d;
    if (end < detail::zip64_locator_bytes || load<std::uint32_t>(bytes, end - detail::zip64_locator_bytes) != detail::zip64_locator) return d;
    const auto at = load<std::uint64_t>(bytes, end - detail::zip64_locator_bytes + 8);
    if (bytes.size() < 56 || at > bytes.size() - 56 || load<std::uint32_t>(bytes, at) != detail::zip64_end)
      throw Error(name_, "end of central directory", "the zip64 record inside the file", "offset " + std::to_string(at));
    return {load<std::uint64_t>(bytes, at + 32), load<std::uint64_t>(bytes, at + 40), load<std::uint64_t>(bytes, at + 48)};
  }

  void parse(std::span<const std::byte> bytes) {
    const Directory d = directory(bytes);
    if (d.offset > bytes.size() || d.size > bytes.size() - d.offset)
      throw Error(name_, "central directory", "a place inside the " + std::to_string(bytes.size()) + " bytes of the file",
                  std::to_string(d.size) + " bytes at " + std::to_string(d.offset));
    detail::ByteReader r(name_, bytes.subspan(static_cast<std::size_t>(d.offset), static_cast<std::size_t>(d.size)));
    for (std::uint64_t i = 0; i < d.count; ++i) {  // each takes 46 bytes of the file, whatever the count says
      const auto head = r.take(46, "central directory");
      if (load<std::uint32_t>(head, 0) != detail::zip_central) throw Error(name_, "central directory", "an entry", "other bytes");
      const auto name_bytes = r.take(load<std::uint16_t>(head, 28), "name of an entry");
      const auto extra = r.take(load<std::uint16_t>(head, 30), "extra field of an entry");
      r.take(load<std::uint16_t>(head, 32), "comment of an entry");
      const std::string entry(reinterpret_cast<const char*>(name_bytes.data()), name_bytes.size());
      if (load<std::uint16_t>(head, 8) & 1) throw Error(name_, entry, "an entry that is not encrypted", "an encrypted one");
      if (load<std::uint16_t>(head, 10) != 0) throw Error(name_, entry, "a stored entry", "a compressed one: not a file of torch.save");
      std::uint64_t packed = load<std::uint32_t>(head, 20), size = load<std::uint32_t>(head, 24), offset = load<std::uint32_t>(head, 42);
      widen(extra, entry, {&size, &packed, &offset});
      if (packed != size) throw Error(name_, entry, "a stored entry of " + std::to_string(size) + " bytes", std::to_string(packed) + " bytes");
      if (!by_name_.emplace(entry, entries_.size()).second) throw Error(name_, entry, "the entry once", "it twice");
      entries_.push_back({entry, content(bytes, entry, offset, size)});
    }
  }

  /// Takes those of the values that do not fit 32 bits from the zip64 extra field (APPNOTE 4.5.3), in this order.
  void widen(std::span<const std::byte> extra, const std::string& entry, std::array<std::uint64_t*, 3> values) const {
    detail::ByteReader fields(name_, extra);
    while (fields.remaining() >= 4) {
      const auto id = fields.value<std::uint16_t>(entry);
      const auto field = fields.take(fields.value<std::uint16_t>(entry), entry);
      if (id != 1) continue;
      detail::ByteReader wide(name_, field);
      for (std::uint64_t* v : values)
        if (*v == 0xffffffff) *v = wide.value<std::uint64_t>(entry);
      return;
    }
  }

  std::span<const std::byte> content(std::span<const std::byte> bytes, const std::string& entry, std::uint64_t offset, std::uint64_t size) const {
    const auto outside = [&](std::uint64_t at, std::uint64_t n) {
      return Error(name_, entry, "content inside the " + std::to_string(bytes.size()) + " bytes of the file",
                   std::to_string(n) + " bytes at " + std::to_string(at));
    };
    if (bytes.size() < 30 || offset > bytes.size() - 30) throw outside(offset, 30);
    if (load<std::uint32_t>(bytes, offset) != detail::zip_local) throw Error(name_, entry, "its header at " + std::to_string(offset), "other bytes");
    const std::uint64_t at = offset + 30 + load<std::uint16_t>(bytes, offset + 26) + load<std::uint16_t>(bytes, offset + 28);
    if (at > bytes.size() || size > bytes.size() - at) throw outside(at, size);
    return bytes.subspan(static_cast<std::size_t>(at), static_cast<std::size_t>(size));
  }

  std::string name_;
  std::vector<ZipEntry> entries_;
  std::map<std::string, std::size_t, std::less<>> by_name_;
};

/// Streams an archive. Sizes must be known before, checksums need not: they follow the content.
class ZipWriter {
 public:
  /// Sizes and offsets from `zip64_from` on are written as zip64; a test sets it low.
  explicit ZipWriter(FileWriter& file, std::uint64_t zip64_from = 0xffffffff) : file_(file), zip64_from_(zip64_from), start_(file.position()) {}

  /// The bytes of the entry, as they come.
  class Sink {
   public:
    explicit Sink(FileWriter& file) : file_(file) {}
    void write(std::span<const std::byte> bytes) {
      crc_.add(bytes);
      file_.write(bytes);
    }
    std::uint32_t crc() const { return crc_.value(); }

   private:
    FileWriter& file_;
    detail::Crc32 crc_;
  };

  /// Calls content(Sink&), which writes exactly `size` bytes. They begin at a multiple of 64, as PyTorch's do, so that the file can be mapped.
  template <class Content>
  void add(const std::string& name, std::uint64_t size, Content&& content) {
    Entry e{name, size, file_.position() - start_, 0};
    const bool wide = size >= zip64_from_;
    const std::uint64_t before = e.offset + 30 + name.size() + (wide ? 20 : 0) + 4, padding = (64 - before % 64) % 64;
    value(detail::zip_local);
    common(e, wide, wide);
    value(static_cast<std::uint16_t>((wide ? 20 : 0) + 4 + padding));
    file_.write(name);
    if (wide) value(std::uint16_t{1}), value(std::uint16_t{16}), value(size), value(size);
    value(std::uint16_t{0x4246});  // "FB", PyTorch's own mark for the padding
    value(static_cast<std::uint16_t>(padding));
    file_.write_zeros(padding);
    const std::uint64_t begin = file_.position();
    Sink sink(file_);
    content(sink);
    if (file_.position() - begin != size) throw Error("zip", name, std::to_string(size) + " bytes written", std::to_string(file_.position() - begin));
    e.crc = sink.crc();
    value(detail::zip_descriptor), value(e.crc);
    if (wide) value(size), value(size);
    else value(static_cast<std::uint32_t>(size)), value(static_cast<std::uint32_t>(size));
    entries_.push_back(std::move(e));
  }
  void add(const std::string& name, std::string_view text) {
    add(name, text.size(), [&](Sink& sink) { sink.write(std::as_bytes(std::span(text.data(), text.size()))); });
  }

  /// Writes the directory; nothing may follow.
  void finish() {
    const std::uint64_t at = file_.position() - start_;
    for (const Entry& e : entries_) {
      const bool wide = e.size >= zip64_from_ || e.offset >= zip64_from_;
      value(detail::zip_central);
      value(std::uint16_t{45});
      common(e, wide, wide);
      value(static_cast<std::uint16_t>(wide ? 28 : 0));
      value(std::uint16_t{0}), value(std::uint16_t{0}), value(std::uint16_t{0}), value(std::uint32_t{0});  // comment, disk, attributes
      value(wide ? 0xffffffffu : static_cast<std::uint32_t>(e.offset));
      file_.write(e.name);
      if (wide) value(std::uint16_t{1}), value(std::uint16_t{24}), value(e.size), value(e.size), value(e.offset);
    }
    const std::uint64_t size = file_.position() - start_ - at, end = at + size, count = entries_.size();
    const bool wide = end >= zip64_from_ || count >= 0xffff;
    if (wide) {
      value(detail::zip64_end), value(std::uint64_t{44}), value(std::uint16_t{45}), value(std::uint16_t{45});
      value(std::uint32_t{0}), value(std::uint32_t{0});
      value(count), value(count), value(size), value(at);
      value(detail::zip64_locator), value(std::uint32_t{0}), value(end), value(std::uint32_t{1});
    }
    const auto few = static_cast<std::uint16_t>(wide ? 0xffff : count);
    value(detail::zip_end), value(std::uint16_t{0}), value(std::uint16_t{0}), value(few), value(few);
    value(wide ? 0xffffffffu : static_cast<std::uint32_t>(size)), value(wide ? 0xffffffffu : static_cast<std::uint32_t>(at));
    value(std::uint16_t{0});
  }

 private:
  struct Entry {
    std::string name;
    std::uint64_t size, offset;
    std::uint32_t crc;
  };
  template <class T>
  void value(T v) { file_.write_value(v); }

  /// What local header and directory share, from the version to the name's length. The local one does not know the checksum yet (0).
  void common(const Entry& e, bool wide_size, bool zip64) {
    value(static_cast<std::uint16_t>(zip64 ? 45 : 20));
    value(std::uint16_t{0x0808});  // a descriptor follows the content; names are UTF-8
    value(std::uint16_t{0}), value(std::uint16_t{0}), value(std::uint16_t{0x21});  // stored; 1 January 1980: the same model, the same bytes
    value(e.crc);
    for (int i = 0; i < 2; ++i) value(wide_size ? 0xffffffffu : static_cast<std::uint32_t>(e.size));
    value(static_cast<std::uint16_t>(e.name.size()));
  }

  FileWriter& file_;
  std::uint64_t zip64_from_, start_;
  std::vector<Entry> entries_;
};

}  // namespace tinyllama
