// safetensors: named tensors behind a JSON header, read in place; and the streaming writer.
#pragma once

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <filesystem>
#include <limits>
#include <map>
#include <optional>
#include <set>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "tinyllama/io/file.hpp"
#include "tinyllama/io/json.hpp"
#include "tinyllama/tensor/view.hpp"

namespace tinyllama {

struct SafeTensor {
  std::string name, dtype;            // dtype as in the file: "F32", "BF16", ...
  std::vector<index_t> shape;         // outermost first
  std::span<const std::byte> bytes;   // not necessarily aligned: old writers did not pad the header
};

/// The storage format of a safetensors dtype, where the library reads it.
constexpr std::optional<Format> format_of_safetensors(std::string_view dtype) {
  for (const FormatInfo& f : formats)
    if (!f.safetensors.empty() && f.safetensors == dtype) return f.format;
  return std::nullopt;
}

namespace detail {

/// Bits of an element of each dtype of the format, 0 for others.
constexpr std::uint64_t safetensors_bits(std::string_view dtype) {
  struct Row { std::string_view name; std::uint64_t bits; };
  constexpr Row rows[] = {{"F32", 32}, {"BF16", 16}, {"F16", 16}, {"F64", 64}, {"I64", 64}, {"I32", 32}, {"I16", 16}, {"I8", 8}, {"U8", 8},
                          {"BOOL", 8}, {"U16", 16}, {"U32", 32}, {"U64", 64}, {"F8_E4M3", 8}, {"F8_E5M2", 8}, {"F8_E8M0", 8},
                          {"F6_E2M3", 6}, {"F6_E3M2", 6}, {"F4", 4}, {"C64", 64}};
  for (const Row& r : rows)
    if (r.name == dtype) return r.bits;
  return 0;
}

/// What the header says of one tensor.
struct SafetensorsEntry {
  std::string name;
  std::optional<std::string> dtype;
  std::optional<std::vector<std::uint64_t>> shape, offsets;
};

/// Takes the header's events from nlohmann-json's SAX parser. No tree is built, so the depth is bounded here and a
/// name that stands twice is seen.
class SafetensorsHeader {
 public:
  explicit SafetensorsHeader(std::string_view file) : file_(file) {}
  std::vector<SafetensorsEntry> entries;
  std::map<std::string, std::string> metadata;

  bool null() { throw wrong("null"); }
  bool boolean(bool) { throw wrong("a bool"); }
  bool number_integer(std::int64_t v) { throw wrong(std::to_string(v)); }
  bool number_float(double, const std::string& s) { throw wrong(s); }
  bool binary(std::vector<std::uint8_t>&) { throw wrong("binary"); }
  bool number_unsigned(std::uint64_t v) {
    if (place_ != Place::array) throw wrong(std::to_string(v));
    array_->push_back(v);
    return true;
  }
  bool string(std::string& s) {
    if (place_ == Place::metadata) metadata[key_] = std::move(s);
    else if (place_ == Place::tensor && key_ == "dtype") entries.back().dtype = std::move(s);
    else throw wrong("a string");
    return true;
  }
  bool start_object(std::size_t) {
    if (place_ == Place::outside && !done_) place_ = Place::top;
    else if (place_ == Place::top && key_ == "__metadata__") place_ = Place::metadata;
    else if (place_ == Place::top) {
      place_ = Place::tensor;
      entries.push_back({key_, {}, {}, {}});
    } else throw wrong("an object");
    return true;
  }
  bool key(std::string& k) {
    const bool once = place_ == Place::top ? names_.insert(k).second
                      : place_ == Place::metadata ? !metadata.contains(k)
                      : k == "dtype" ? !entries.back().dtype
                      : k == "shape" ? !entries.back().shape
                      : k == "data_offsets" ? !entries.back().offsets
                                            : throw Error(file_, entries.back().name, "dtype, shape and data_offsets", "the key '" + k + "'");
    if (!once) throw Error(file_, k, place_ == Place::top ? "the tensor once" : "the key once", "it twice");
    key_ = std::move(k);
    return true;
  }
  bool end_object() {
    done_ = place_ == Place::top;
    place_ = place_ == Place::top ? Place::outside : Place::top;
    return true;
  }
  bool start_array(std::size_t) {
    if (place_ != Place::tensor || key_ == "dtype") throw wrong("an array");
    place_ = Place::array;
    array_ = &(key_ == "shape" ? entries.back().shape : entries.back().offsets).emplace();
    return true;
  }
  bool end_array() {
    place_ = Place::tensor;
    return true;
  }
  bool parse_error(std::size_t, const std::string&, const json::exception& e) { throw Error(file_, "header", "valid JSON", std::string(e.what()).substr(0, 200)); }

 private:
  enum class Place { outside, top, metadata, tensor, array };
  Error wrong(std::string_view found) const {
    const bool inside = place_ == Place::tensor || place_ == Place::array;
    return Error(file_, inside ? entries.back().name : place_ == Place::outside ? "header" : key_,
                 place_ == Place::outside ? "an object"
                 : place_ == Place::top ? "an object of dtype, shape and data_offsets"
                 : place_ == Place::metadata || (inside && key_ == "dtype") ? "a string" : "an array of non-negative integers as " + key_,
                 found);
  }
  std::string_view file_;
  Place place_ = Place::outside;
  bool done_ = false;
  std::string key_;
  std::set<std::string> names_;
  std::vector<std::uint64_t>* array_ = nullptr;
};

}  // namespace detail

/// One safetensors file. The rules are those of the format's README: an 8-byte length, a JSON header, then data that the
/// tensors cover without a gap or an overlap.
class Safetensors {
 public:
  /// Maps the file. Throws Error where it is not sound.
  explicit Safetensors(const std::filesystem::path& path) : file_(path), name_(path.string()) { parse(file_->bytes()); }

  /// Reads bytes that the caller keeps alive; `name` is for messages.
  Safetensors(std::string name, std::span<const std::byte> bytes) : name_(std::move(name)) { parse(bytes); }

  const std::string& name() const { return name_; }
  std::span<const SafeTensor> tensors() const { return tensors_; }
  const std::map<std::string, std::string>& metadata() const { return metadata_; }
  const MappedFile* file() const { return file_ ? &*file_ : nullptr; }

  const SafeTensor* find(std::string_view tensor) const {
    const auto it = by_name_.find(tensor);
    return it == by_name_.end() ? nullptr : &tensors_[it->second];
  }

  /// The tensor's storage format; an Error naming the tensor where it is one that the library does not read.
  Format format(const SafeTensor& t) const {
    if (const auto f = format_of_safetensors(t.dtype)) return *f;
    throw Error(name_, t.name, "dtype F32, F16, BF16 or F8_E4M3", t.dtype);
  }

 private:
  void parse(std::span<const std::byte> bytes) {
    if (bytes.size() < 8) throw Error(name_, "header length", "8 bytes", std::to_string(bytes.size()) + " (truncated)");
    std::uint64_t length = 0;
    std::memcpy(&length, bytes.data(), 8);
    constexpr std::uint64_t most = 100'000'000;  // the format's own bound
    if (length < 2 || length > most || length > bytes.size() - 8)
      throw Error(name_, "header length", "2 to " + std::to_string(std::min<std::uint64_t>(most, bytes.size() - 8)) + " bytes", std::to_string(length));
    const char* const text = reinterpret_cast<const char*>(bytes.data()) + 8;
    if (*text != '{') throw Error(name_, "header", "a JSON object", "something else: not a safetensors file");
    detail::SafetensorsHeader header(name_);
    detail::json::sax_parse(text, text + length, &header);
    metadata_ = std::move(header.metadata);
    place(header.entries, bytes.subspan(8 + static_cast<std::size_t>(length)));
  }

  void place(std::vector<detail::SafetensorsEntry>& entries, std::span<const std::byte> data) {
    std::vector<std::array<std::uint64_t, 3>> order;  // from, to, entry
    for (const auto& e : entries) {
      if (!e.dtype || !e.shape || !e.offsets || e.offsets->size() != 2) throw Error(name_, e.name, "dtype, shape and two data_offsets", "less");
      order.push_back({(*e.offsets)[0], (*e.offsets)[1], order.size()});
    }
    std::sort(order.begin(), order.end());
    tensors_.reserve(entries.size());
    std::uint64_t end = 0;
    for (const auto& [from, to, i] : order) {
      auto& e = entries[static_cast<std::size_t>(i)];
      const std::string range = "[" + std::to_string(from) + ", " + std::to_string(to) + ")";
      if (from > to || to > data.size())
        throw Error(name_, e.name, "data_offsets inside the " + std::to_string(data.size()) + " bytes of data",
                    range + (to > data.size() ? " (truncated or damaged)" : ""));
      if (from != end) throw Error(name_, e.name, "data that begins where the tensor before ends, at " + std::to_string(end), range);
      end = to;
      SafeTensor t{std::move(e.name), std::move(*e.dtype), {}, data.subspan(static_cast<std::size_t>(from), static_cast<std::size_t>(to - from))};
      check_size(t, *e.shape);
      by_name_.emplace(t.name, tensors_.size());
      tensors_.push_back(std::move(t));
    }
    if (end != data.size()) throw Error(name_, "data", std::to_string(end) + " bytes", std::to_string(data.size()));
  }
  void check_size(SafeTensor& t, const std::vector<std::uint64_t>& shape) const {
    std::uint64_t bits = detail::safetensors_bits(t.dtype);
    const bool known = bits != 0;  // format() refuses other dtypes when somebody asks
    bool overflow = false;
    for (const std::uint64_t n : shape) {
      if (n > std::uint64_t{1} << 48) throw Error(name_, t.name, "extents up to 2^48", std::to_string(n));
      overflow |= __builtin_mul_overflow(bits, n, &bits);
      t.shape.push_back(static_cast<index_t>(n));
    }
    if (known && (overflow || bits % 8 || bits / 8 != t.bytes.size()))
      throw Error(name_, t.name, (overflow ? "a size below 2^64 bits" : std::to_string(bits / 8) + " bytes") + " for " + t.dtype + " " + detail::shape_text(t.shape),
                  std::to_string(t.bytes.size()) + " bytes");
  }

  std::optional<MappedFile> file_;
  std::string name_;
  std::vector<SafeTensor> tensors_;
  std::map<std::string, std::string> metadata_;
  std::map<std::string, std::size_t, std::less<>> by_name_;
};

/// A tensor to be written: its bytes come when it is its turn.
struct SafeTensorPlan {
  std::string name, dtype;
  std::vector<index_t> shape;
  std::uint64_t bytes;
};

/// Writes one file, atomically. `content(i, FileWriter&)` is called once for each tensor, in order, and writes exactly its
/// bytes. The header is padded to 8 bytes and says {"format": "pt"}, without which transformers refuses the file.
template <class Content>
void write_safetensors(const std::filesystem::path& path, std::span<const SafeTensorPlan> tensors, Content&& content) {
  detail::json header;
  header["__metadata__"] = {{"format", "pt"}};
  std::uint64_t end = 0;
  for (const SafeTensorPlan& t : tensors) {
    if (header.contains(t.name)) throw Error(path.string(), t.name, "the tensor once", "it twice");
    header[t.name] = {{"dtype", t.dtype}, {"shape", t.shape}, {"data_offsets", {end, end + t.bytes}}};
    end += t.bytes;
  }
  std::string text = header.dump();
  text.resize((text.size() + 7) / 8 * 8, ' ');
  write_file_atomically(path, [&](FileWriter& file) {
    file.write_value(static_cast<std::uint64_t>(text.size()));
    file.write(text);
    for (std::size_t i = 0; i < tensors.size(); ++i) {
      const std::uint64_t start = file.position();
      content(i, file);
      if (file.position() - start != tensors[i].bytes)
        throw Error(path.string(), tensors[i].name, std::to_string(tensors[i].bytes) + " bytes written", std::to_string(file.position() - start));
    }
  });
}

/// The same from memory.
inline void write_safetensors(const std::filesystem::path& path, std::span<const SafeTensor> tensors) {
  std::vector<SafeTensorPlan> plan;
  for (const SafeTensor& t : tensors) plan.push_back({t.name, t.dtype, t.shape, t.bytes.size()});
  write_safetensors(path, plan, [&](std::size_t i, FileWriter& file) { file.write(tensors[i].bytes); });
}

}  // namespace tinyllama
