// GGUF v2 and v3: typed metadata and tensors, read in place and checked before use.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <filesystem>
#include <limits>
#include <map>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "tinyllama/io/file.hpp"
#include "tinyllama/tensor/view.hpp"

namespace tinyllama {

/// Types of a metadata value; the numbers are the file's.
enum class GgufType : std::uint32_t { u8, i8, u16, i16, u32, i32, f32, boolean, string, array, u64, i64, f64 };

/// A metadata value as it lies in the file.
struct GgufValue {
  GgufType type;
  GgufType element = GgufType::u8;      // of an array
  std::uint64_t count = 0;              // of an array
  std::span<const std::byte> payload;   // the value; of an array its elements
  std::span<const std::byte> raw;       // the payload with an array's element type and count in front: what copying writes
};

struct GgufTensor {
  std::string name;
  std::uint32_t type;                   // ggml's number
  std::vector<index_t> dims;            // innermost first: a matrix is [columns, rows]
  std::span<const std::byte> bytes;     // empty where the type is none of `formats`
};

namespace detail {

/// Takes values off the front of a file's bytes; says where it ran out of them.
class ByteReader {
 public:
  ByteReader(std::string_view file, std::span<const std::byte> bytes) : file_(file), rest_(bytes), size_(bytes.size()) {}
  std::size_t position() const { return size_ - rest_.size(); }
  std::size_t remaining() const { return rest_.size(); }
  const std::byte* here() const { return rest_.data(); }

  std::span<const std::byte> take(std::uint64_t n, std::string_view what) {
    if (n > rest_.size())
      throw Error(file_, what, std::to_string(n) + " bytes at offset " + std::to_string(position()), std::to_string(rest_.size()) + " (truncated or damaged)");
    const auto part = rest_.first(static_cast<std::size_t>(n));
    rest_ = rest_.subspan(static_cast<std::size_t>(n));
    return part;
  }
  template <class T>
  T value(std::string_view what) {
    T v;
    std::memcpy(&v, take(sizeof(T), what).data(), sizeof(T));
    return v;
  }
  std::string_view string(std::string_view what) {
    const auto bytes = take(value<std::uint64_t>(what), what);
    return {reinterpret_cast<const char*>(bytes.data()), bytes.size()};
  }

 private:
  std::string_view file_;
  std::span<const std::byte> rest_;
  std::size_t size_;
};

constexpr std::size_t gguf_scalar_bytes(GgufType t) {
  switch (t) {
    case GgufType::u8: case GgufType::i8: case GgufType::boolean: return 1;
    case GgufType::u16: case GgufType::i16: return 2;
    case GgufType::u32: case GgufType::i32: case GgufType::f32: return 4;
    case GgufType::u64: case GgufType::i64: case GgufType::f64: return 8;
    default: return 0;
  }
}

constexpr std::string_view gguf_type_name(GgufType t) {
  constexpr std::string_view names[] = {"u8", "i8", "u16", "i16", "u32", "i32", "f32", "bool", "string", "array", "u64", "i64", "f64"};
  return static_cast<std::size_t>(t) < std::size(names) ? names[static_cast<std::size_t>(t)] : "an unknown type";
}

inline const FormatInfo* format_of_ggml(std::uint32_t type) {
  for (const FormatInfo& f : formats)
    if (f.ggml == type && f.in_gguf()) return &f;
  return nullptr;
}

}  // namespace detail

/// One GGUF file. The layout is that of ggml's docs/gguf.md.
class Gguf {
 public:
  /// Maps the file. Throws Error where it is not a sound GGUF v2 or v3.
  explicit Gguf(const std::filesystem::path& path) : file_(path), name_(path.string()) { parse(file_->bytes()); }

  /// Reads bytes that the caller keeps alive; `name` is for messages.
  Gguf(std::string name, std::span<const std::byte> bytes) : name_(std::move(name)) { parse(bytes); }

  const std::string& name() const { return name_; }
  std::uint32_t version() const { return version_; }
  const std::map<std::string, GgufValue, std::less<>>& metadata() const { return metadata_; }
  std::span<const GgufTensor> tensors() const { return tensors_; }
  const MappedFile* file() const { return file_ ? &*file_ : nullptr; }

  const GgufTensor* find(std::string_view tensor) const {
    const auto it = by_name_.find(tensor);
    return it == by_name_.end() ? nullptr : &tensors_[it->second];
  }

  /// The tensor's storage format; an Error naming the tensor where it is one that the library does not read.
  Format format(const GgufTensor& t) const {
    const FormatInfo* f = detail::format_of_ggml(t.type);
    if (f) return f->format;
    std::string known;
    for (const FormatInfo& k : formats)
      if (k.in_gguf()) known.append(known.empty() ? "" : ", ").append(k.name);
    throw Error(name_, t.name, "a tensor in one of " + known, "ggml type " + std::to_string(t.type));
  }

  bool has(std::string_view key) const { return metadata_.find(key) != metadata_.end(); }

  // The getters return nothing (or an empty vector) where the key is absent and throw Error where its type is another.
  std::optional<std::uint64_t> get_uint(std::string_view key) const {
    const GgufValue* v = value(key);
    if (!v) return std::nullopt;
    const auto i = integer(v->type, v->payload.data());
    if (v->type == GgufType::u64) return static_cast<std::uint64_t>(*i);
    if (!i || *i < 0) throw wrong_type(key, "a non-negative integer", *v);
    return static_cast<std::uint64_t>(*i);
  }
  std::optional<double> get_float(std::string_view key) const {
    const GgufValue* v = value(key);
    if (!v) return std::nullopt;
    const std::optional<double> x = real(v->type, v->payload.data());
    if (!x) throw wrong_type(key, "a floating-point number", *v);
    return x;
  }
  std::optional<bool> get_bool(std::string_view key) const {
    const GgufValue* v = value(key);
    if (!v) return std::nullopt;
    if (v->type != GgufType::boolean) throw wrong_type(key, "a bool", *v);
    return v->payload[0] != std::byte{0};
  }
  std::optional<std::string> get_string(std::string_view key) const {
    const GgufValue* v = value(key);
    if (!v) return std::nullopt;
    if (v->type != GgufType::string) throw wrong_type(key, "a string", *v);
    return std::string(detail::ByteReader(name_, v->payload).string(key));
  }
  std::vector<std::string> get_strings(std::string_view key) const {
    std::vector<std::string> out;
    const GgufValue* v = value(key);
    if (!v) return out;
    if (v->type != GgufType::array || v->element != GgufType::string) throw wrong_type(key, "an array of strings", *v);
    detail::ByteReader r(name_, v->payload);
    out.reserve(static_cast<std::size_t>(v->count));  // parse() saw that many strings
    for (std::uint64_t i = 0; i < v->count; ++i) out.emplace_back(r.string(key));
    return out;
  }
  std::vector<float> get_floats(std::string_view key) const {
    return elements<float>(key, "an array of floating-point numbers", [](GgufType t, const std::byte* at) { return real(t, at); });
  }
  std::vector<std::int32_t> get_ints(std::string_view key) const {
    return elements<std::int32_t>(key, "an array of 32-bit integers", [](GgufType t, const std::byte* at) -> std::optional<std::int64_t> {
      const auto i = integer(t, at);
      if (!i || (t == GgufType::u64 && *i < 0)) return std::nullopt;
      return *i >= std::numeric_limits<std::int32_t>::min() && *i <= std::numeric_limits<std::int32_t>::max() ? i : std::nullopt;
    });
  }

 private:
  const GgufValue* value(std::string_view key) const {
    const auto it = metadata_.find(key);
    return it == metadata_.end() ? nullptr : &it->second;
  }
  Error wrong_type(std::string_view key, std::string_view expected, const GgufValue& v) const {
    std::string found(detail::gguf_type_name(v.type));
    if (v.type == GgufType::array) found.append(" of ").append(detail::gguf_type_name(v.element));
    else if (const auto i = integer(v.type, v.payload.data())) found.append(" ").append(std::to_string(*i));
    return Error(name_, key, expected, found);
  }

  template <class T>
  static T load(const std::byte* at) {
    T v;
    std::memcpy(&v, at, sizeof v);
    return v;
  }
  /// A u64 comes as the int64 of the same bits: callers tell by the type.
  static std::optional<std::int64_t> integer(GgufType t, const std::byte* at) {
    switch (t) {
      case GgufType::u8: return load<std::uint8_t>(at);
      case GgufType::i8: return load<std::int8_t>(at);
      case GgufType::u16: return load<std::uint16_t>(at);
      case GgufType::i16: return load<std::int16_t>(at);
      case GgufType::u32: return load<std::uint32_t>(at);
      case GgufType::i32: return load<std::int32_t>(at);
      case GgufType::u64: case GgufType::i64: return load<std::int64_t>(at);
      default: return std::nullopt;
    }
  }
  static std::optional<double> real(GgufType t, const std::byte* at) {
    if (t == GgufType::f32) return load<float>(at);
    if (t == GgufType::f64) return load<double>(at);
    return std::nullopt;
  }
  template <class T, class Read>
  std::vector<T> elements(std::string_view key, std::string_view expected, Read read) const {
    std::vector<T> out;
    const GgufValue* v = value(key);
    if (!v) return out;
    const std::size_t size = detail::gguf_scalar_bytes(v->element);
    if (v->type != GgufType::array || size == 0) throw wrong_type(key, expected, *v);
    out.reserve(static_cast<std::size_t>(v->count));
    for (std::size_t at = 0; at < v->payload.size(); at += size) {
      const auto x = read(v->element, v->payload.data() + at);
      if (!x) throw wrong_type(key, expected, *v);
      out.push_back(static_cast<T>(*x));
    }
    return out;
  }

  void parse(std::span<const std::byte> bytes) {
    detail::ByteReader r(name_, bytes);
    const auto magic = r.take(4, "magic");
    if (std::memcmp(magic.data(), "GGUF", 4) != 0) throw Error(name_, "magic", "\"GGUF\"", "other bytes: not a GGUF file");
    version_ = r.value<std::uint32_t>("version");
    if (version_ != 2 && version_ != 3) {
      const bool big_endian = version_ != 0 && (version_ & 0xffffu) == 0;
      throw Error(name_, "version", "2 or 3", big_endian ? "a big-endian file" : std::to_string(version_));
    }
    const auto n_tensors = r.value<std::uint64_t>("tensor count"), n_keys = r.value<std::uint64_t>("key count");
    constexpr std::uint64_t least_key = 8 + 4 + 1, least_tensor = 8 + 4 + 8 + 4 + 8;
    if (n_keys > r.remaining() / least_key) throw Error(name_, "key count", "at most what the file can hold", std::to_string(n_keys));
    if (n_tensors > r.remaining() / least_tensor) throw Error(name_, "tensor count", "at most what the file can hold", std::to_string(n_tensors));
    for (std::uint64_t i = 0; i < n_keys; ++i) {
      const std::string_view key = r.string("key " + std::to_string(i));
      if (key.empty() || key.size() > 65535) throw Error(name_, "key " + std::to_string(i), "1 to 65535 bytes", std::to_string(key.size()));
      if (!metadata_.emplace(std::string(key), read_value(r, key)).second) throw Error(name_, key, "the key once", "it twice");
    }
    read_tensors(r, n_tensors, bytes);
  }

  GgufType read_type(detail::ByteReader& r, std::string_view key) const {
    const auto t = r.value<std::uint32_t>(key);
    if (t > static_cast<std::uint32_t>(GgufType::f64)) throw Error(name_, key, "a metadata type from 0 to 12", std::to_string(t));
    return static_cast<GgufType>(t);
  }
  GgufValue read_value(detail::ByteReader& r, std::string_view key) const {
    GgufValue v{read_type(r, key), GgufType::u8, 0, {}, {}};
    const std::byte* const raw = r.here();
    if (v.type == GgufType::array) {
      v.element = read_type(r, key);
      v.count = r.value<std::uint64_t>(key);
    }
    const std::byte* const payload = r.here();
    if (v.type == GgufType::array) skip_elements(r, key, v.element, v.count, 0);
    else if (v.type == GgufType::string) r.string(key);
    else r.take(detail::gguf_scalar_bytes(v.type), key);
    v.raw = {raw, r.here()};
    v.payload = {payload, r.here()};
    if (v.type == GgufType::boolean && static_cast<unsigned>(v.payload[0]) > 1)
      throw Error(name_, key, "a bool", "the byte " + std::to_string(static_cast<unsigned>(v.payload[0])));
    return v;
  }
  void skip_elements(detail::ByteReader& r, std::string_view key, GgufType element, std::uint64_t count, int depth) const {
    const std::size_t size = detail::gguf_scalar_bytes(element);
    const std::size_t least = size ? size : element == GgufType::string ? 8 : 12;
    if (count > r.remaining() / least) throw Error(name_, key, "at most what the file can hold", "an array of " + std::to_string(count));
    if (size) {
      r.take(count * size, key);
      return;
    }
    if (depth == 4) throw Error(name_, key, "arrays at most 4 deep", "deeper ones");
    for (std::uint64_t i = 0; i < count; ++i) {
      if (element == GgufType::string) {
        r.string(key);
      } else {
        const GgufType inner = read_type(r, key);
        skip_elements(r, key, inner, r.value<std::uint64_t>(key), depth + 1);
      }
    }
  }

  void read_tensors(detail::ByteReader& r, std::uint64_t count, std::span<const std::byte> bytes) {
    const std::uint64_t alignment = get_uint("general.alignment").value_or(32);
    // gguf.md asks for a multiple of 8, ggml for a power of two; the upper bound keeps the sums below far from overflow
    if (alignment < 8 || alignment > (1u << 30) || (alignment & (alignment - 1)))
      throw Error(name_, "general.alignment", "a power of two from 8 to 2^30", std::to_string(alignment));
    tensors_.reserve(static_cast<std::size_t>(count));
    std::vector<std::uint64_t> offsets;
    offsets.reserve(static_cast<std::size_t>(count));
    for (std::uint64_t i = 0; i < count; ++i) {
      GgufTensor t;
      const std::string number = "tensor " + std::to_string(i);
      t.name = r.string(number);
      if (t.name.empty()) throw Error(name_, number, "a name", "an empty one");
      const auto rank = r.value<std::uint32_t>(t.name);
      if (rank < 1 || rank > 4) throw Error(name_, t.name, "1 to 4 dimensions", std::to_string(rank));
      for (std::uint32_t d = 0; d < rank; ++d) {
        const auto n = r.value<std::uint64_t>(t.name);
        if (n < 1 || n > std::uint64_t{1} << 48) throw Error(name_, t.name, "dimensions from 1 to 2^48", std::to_string(n));
        t.dims.push_back(static_cast<index_t>(n));
      }
      t.type = r.value<std::uint32_t>(t.name);
      offsets.push_back(r.value<std::uint64_t>(t.name));
      if (!by_name_.emplace(t.name, tensors_.size()).second) throw Error(name_, t.name, "the tensor once", "it twice");
      tensors_.push_back(std::move(t));
    }
    const std::size_t header = r.position(), pad = static_cast<std::size_t>((alignment - header % alignment) % alignment);
    const auto data = bytes.subspan(std::min(header + pad, bytes.size()));
    for (std::size_t i = 0; i < tensors_.size(); ++i) place(tensors_[i], offsets[i], alignment, data);
    reject_overlaps(offsets);
  }
  void place(GgufTensor& t, std::uint64_t offset, std::uint64_t alignment, std::span<const std::byte> data) const {
    if (offset % alignment) throw Error(name_, t.name, "an offset that is a multiple of " + std::to_string(alignment), std::to_string(offset));
    if (offset > data.size()) throw Error(name_, t.name, "an offset inside the " + std::to_string(data.size()) + " bytes of data", std::to_string(offset));
    const FormatInfo* f = detail::format_of_ggml(t.type);
    if (!f) return;  // of unknown size; format() refuses it when somebody asks
    if (t.dims[0] % f->block)
      throw Error(name_, t.name, "rows of a multiple of " + std::to_string(f->block) + " weights (" + std::string(f->name) + ")", std::to_string(t.dims[0]));
    std::uint64_t size = static_cast<std::uint64_t>(f->bytes);
    bool overflow = __builtin_mul_overflow(size, static_cast<std::uint64_t>(t.dims[0] / f->block), &size);
    for (std::size_t d = 1; d < t.dims.size(); ++d) overflow |= __builtin_mul_overflow(size, static_cast<std::uint64_t>(t.dims[d]), &size);
    if (overflow || size > data.size() - offset)
      throw Error(name_, t.name, overflow ? "a size below 2^64 bytes" : std::to_string(size) + " bytes at offset " + std::to_string(offset),
                  overflow ? "the shape " + detail::shape_text(t.dims) : std::to_string(data.size() - offset) + " (truncated or damaged)");
    t.bytes = data.subspan(static_cast<std::size_t>(offset), static_cast<std::size_t>(size));
  }
  void reject_overlaps(const std::vector<std::uint64_t>& offsets) const {
    std::vector<std::size_t> order(tensors_.size());
    for (std::size_t i = 0; i < order.size(); ++i) order[i] = i;
    std::sort(order.begin(), order.end(), [&](std::size_t a, std::size_t b) { return offsets[a] < offsets[b]; });
    for (std::size_t i = 1; i < order.size(); ++i)
      if (offsets[order[i]] < offsets[order[i - 1]] + tensors_[order[i - 1]].bytes.size())
        throw Error(name_, tensors_[order[i]].name, "data of its own", "an overlap with " + tensors_[order[i - 1]].name);
  }

  std::optional<MappedFile> file_;
  std::string name_;
  std::uint32_t version_ = 0;
  std::map<std::string, GgufValue, std::less<>> metadata_;
  std::vector<GgufTensor> tensors_;
  std::map<std::string, std::size_t, std::less<>> by_name_;
};

}  // namespace tinyllama
