// PyTorch's files (.pth, .pt, .ckpt, .bin): the tensors of a state dict, read in place without running anything, and written for torch.load.
#pragma once

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <map>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "tinyllama/io/file.hpp"
#include "tinyllama/io/pickle.hpp"
#include "tinyllama/io/zip.hpp"
#include "tinyllama/tensor/view.hpp"

namespace tinyllama {

struct TorchTensor {
  std::string name, storage;        // storage as in the file: "FloatStorage", "BFloat16Storage", ...
  std::optional<Format> format;     // where the library reads it
  std::vector<index_t> shape;       // outermost first
  std::span<const std::byte> bytes;
};

namespace detail {

struct TorchStorage {
  std::string_view global;
  std::size_t bytes;                // of an element
  std::optional<Format> format;
};
inline constexpr TorchStorage torch_storages[] = {
    {"torch FloatStorage", 4, Format::f32}, {"torch BFloat16Storage", 2, Format::bf16}, {"torch HalfStorage", 2, Format::f16},
    {"torch DoubleStorage", 8, {}}, {"torch LongStorage", 8, {}}, {"torch IntStorage", 4, {}}, {"torch ShortStorage", 2, {}},
    {"torch CharStorage", 1, {}}, {"torch ByteStorage", 1, {}}, {"torch BoolStorage", 1, {}}};

inline constexpr std::string_view rebuild_tensor = "torch._utils _rebuild_tensor_v2", rebuild_parameter = "torch._utils _rebuild_parameter";

/// All that a pickle may mention.
inline constexpr auto torch_globals = [] {
  std::array<std::string_view, std::size(torch_storages) + 3> all{"collections OrderedDict", rebuild_tensor, rebuild_parameter};
  for (std::size_t i = 0; i < std::size(torch_storages); ++i) all[3 + i] = torch_storages[i].global;
  return all;
}();

}  // namespace detail

/// A file of torch.save: a dict of tensors, or one that has such a dict under "model" or "state_dict" and may hold an optimizer's state and
/// settings beside it. The zip form that PyTorch writes since version 1.6.
class TorchFile {
 public:
  /// Maps the file. Throws Error where it is not sound, or mentions anything but tensors, containers, numbers and strings.
  explicit TorchFile(const std::filesystem::path& path) : file_(path), name_(path.string()) { parse(file_->bytes()); }

  /// Reads bytes that the caller keeps alive; `name` is for messages.
  TorchFile(std::string name, std::span<const std::byte> bytes) : name_(std::move(name)) { parse(bytes); }

  const std::string& name() const { return name_; }
  /// The key of the state dict in the file's dict: "model", "state_dict", or "" where it is the whole.
  const std::string& key() const { return key_; }
  /// In the order of the dict.
  std::span<const TorchTensor> tensors() const { return tensors_; }
  const MappedFile* file() const { return file_ ? &*file_ : nullptr; }

  const TorchTensor* find(std::string_view tensor) const {
    const auto it = by_name_.find(tensor);
    return it == by_name_.end() ? nullptr : &tensors_[it->second];
  }

  /// The tensor's storage format; an Error naming the tensor where it is one that the library does not read.
  Format format(const TorchTensor& t) const {
    if (t.format) return *t.format;
    throw Error(name_, t.name, "float32, bfloat16 or float16", t.storage);
  }

 private:
  using Value = detail::PickleValue;
  using Kind = Value::Kind;

  void parse(std::span<const std::byte> bytes) {
    const ZipArchive zip(name_, bytes);
    const ZipEntry* data = nullptr;
    for (const ZipEntry& e : zip.entries())  // ARCHIVE/data.pkl, where ARCHIVE is the file's first name
      if (const auto slash = e.name.find('/'); slash != e.name.npos && e.name.substr(slash) == "/data.pkl") data = &e;
    if (!data) throw Error(name_, "archive", "an entry NAME/data.pkl", "none: not a file of torch.save");
    const std::string prefix = data->name.substr(0, data->name.find('/') + 1);
    const ZipEntry* const order = zip.find(prefix + "byteorder");
    if (order && std::string_view(reinterpret_cast<const char*>(order->bytes.data()), order->bytes.size()) != "little")
      throw Error(name_, "byteorder", "little", "another");

    const detail::Pickle pickle(name_, data->bytes, detail::torch_globals);
    if (pickle.root().kind != Kind::dict) throw Error(name_, "pickle", "a dict", "another value");
    const Value* state = &pickle.root();
    for (const char* const key : {"model", "state_dict"})
      if (const Value* v = pickle.find(pickle.root(), key); v && v->kind == Kind::dict && key_.empty()) state = v, key_ = key;
    for (std::size_t i = 0; i < state->items.size(); i += 2) {
      const Value &key = pickle[state->items[i]], &value = pickle[state->items[i + 1]];
      if (key.kind == Kind::string && value.kind == Kind::call) add(zip, prefix, pickle, std::string(key.text), value);
    }
    if (tensors_.empty()) throw Error(name_, key_.empty() ? "dict" : key_, "tensors", "none");
  }

  Error wrong(const std::string& tensor, std::string_view expected, std::string_view found) const { return Error(name_, tensor, expected, found); }

  void add(const ZipArchive& zip, const std::string& prefix, const detail::Pickle& pickle, std::string name, const Value& value) {
    const Value* call = &value;  // _rebuild_parameter(tensor, requires_grad, hooks)
    const auto function = [&] { return pickle[call->items[0]].text; };
    const auto arguments = [&]() -> const std::vector<std::uint32_t>& { return pickle[call->items[1]].items; };
    while (call->kind == Kind::call && function() == detail::rebuild_parameter && !arguments().empty()) call = &pickle[arguments()[0]];
    if (call->kind != Kind::call || function() != detail::rebuild_tensor || arguments().size() < 6) throw wrong(name, "a tensor", "another value");

    // _rebuild_tensor_v2(storage, offset, size, stride, requires_grad, hooks), the storage by ("storage", type, key, location, elements)
    const Value &storage = pickle[arguments()[0]], &offset = pickle[arguments()[1]];
    const Value &size = pickle[arguments()[2]], &stride = pickle[arguments()[3]];
    const Value* id = storage.kind == Kind::persistent ? &pickle[storage.items[0]] : nullptr;
    const bool sound_id = id && id->kind == Kind::tuple && id->items.size() == 5 && pickle[id->items[0]].text == "storage" &&
                          pickle[id->items[1]].kind == Kind::global && pickle[id->items[2]].kind == Kind::string;
    const bool sound = sound_id && offset.kind == Kind::integer && size.kind == Kind::tuple && stride.kind == Kind::tuple;
    if (!sound || size.items.size() != stride.items.size())
      throw wrong(name, "the parts of a tensor: storage, offset, size, stride", "other values");

    const detail::TorchStorage* type = nullptr;
    for (const auto& s : detail::torch_storages)
      if (s.global == pickle[id->items[1]].text) type = &s;
    if (!type) throw wrong(name, "a storage", "another type");
    TorchTensor t{std::move(name), std::string(type->global.substr(6)), type->format, {}, {}};
    for (const std::uint32_t extent : size.items) {
      const Value& e = pickle[extent];
      if (e.kind != Kind::integer || e.integer < 0 || e.integer > std::int64_t{1} << 48)
        throw wrong(t.name, "extents from 0 to 2^48", std::to_string(e.integer));
      t.shape.push_back(static_cast<index_t>(e.integer));
    }
    const bool empty = std::find(t.shape.begin(), t.shape.end(), 0) != t.shape.end();
    std::uint64_t count = 1;
    for (std::size_t d = t.shape.size(); d-- > 0;) {
      const Value& s = pickle[stride.items[d]];
      const bool in_order = s.kind == Kind::integer && static_cast<std::uint64_t>(s.integer) == count;
      if (!in_order && t.shape[d] != 1 && !empty)
        throw wrong(t.name, "a contiguous tensor (call .contiguous() before saving)", "stride " + std::to_string(s.integer));
      if (__builtin_mul_overflow(count, static_cast<std::uint64_t>(t.shape[d]), &count))
        throw wrong(t.name, "fewer than 2^64 weights", detail::shape_text(t.shape));
    }
    const ZipEntry* content = zip.find(prefix + "data/" + std::string(pickle[id->items[2]].text));
    if (!content) throw wrong(t.name, "its content, data/" + std::string(pickle[id->items[2]].text), "none");
    const std::uint64_t there = content->bytes.size() / type->bytes;
    if (offset.integer < 0 || static_cast<std::uint64_t>(offset.integer) > there || count > there - static_cast<std::uint64_t>(offset.integer))
      throw wrong(t.name, detail::shape_text(t.shape) + " from element " + std::to_string(offset.integer), std::to_string(there) + " elements");
    t.bytes = content->bytes.subspan(static_cast<std::size_t>(offset.integer) * type->bytes, static_cast<std::size_t>(count) * type->bytes);
    if (!by_name_.emplace(t.name, tensors_.size()).second) throw wrong(t.name, "the tensor once", "it twice");
    tensors_.push_back(std::move(t));
  }

  std::optional<MappedFile> file_;
  std::string name_, key_;
  std::vector<TorchTensor> tensors_;
  std::map<std::string, std::size_t, std::less<>> by_name_;
};

/// A tensor to be written: its bytes come when it is its turn.
struct TorchTensorPlan {
  std::string name;
  Format format;                    // f32, bf16 or f16
  std::vector<index_t> shape;
  std::uint64_t bytes() const {
    std::uint64_t n = row_bytes(format, 1);
    for (const index_t extent : shape) n *= static_cast<std::uint64_t>(extent);
    return n;
  }
};

namespace detail {

/// The pickle of a dict of contiguous tensors, the i-th with its content in data/i; inside another dict where `key` is not empty.
inline std::string torch_pickle(std::span<const TorchTensorPlan> tensors, std::string_view key) {
  std::string p;
  const auto raw = [&](auto v) { p.append(reinterpret_cast<const char*>(&v), sizeof v); };
  const auto text = [&](std::string_view s) { p += 'X', raw(static_cast<std::uint32_t>(s.size())), p += s; };
  const auto integer = [&](std::uint64_t v) {
    if (v < std::uint64_t{1} << 31) p += 'J', raw(static_cast<std::int32_t>(v));
    else p += "\x8a\x08", raw(v);
  };
  const auto global = [&](std::string_view g) {  // "module name"
    const auto space = g.find(' ');
    p += 'c', p += g.substr(0, space), p += '\n', p += g.substr(space + 1), p += '\n';
  };
  p += "\x80\x02}(";
  if (!key.empty()) text(key), p += "}(";
  for (std::size_t i = 0; i < tensors.size(); ++i) {
    const TorchTensorPlan& t = tensors[i];
    std::string_view storage;
    for (const TorchStorage& s : torch_storages)
      if (s.format == t.format) storage = s.global;
    std::uint64_t count = 1;
    std::vector<std::uint64_t> strides(t.shape.size());
    for (std::size_t d = t.shape.size(); d-- > 0; count *= static_cast<std::uint64_t>(t.shape[d])) strides[d] = count;
    text(t.name);
    global(rebuild_tensor);
    p += "((";
    text("storage"), global(storage), text(std::to_string(i)), text("cpu"), integer(count);
    p += "tQ";
    integer(0);
    p += '(';
    for (const index_t extent : t.shape) integer(static_cast<std::uint64_t>(extent));
    p += "t(";
    for (const std::uint64_t s : strides) integer(s);
    p += "t\x89";
    global("collections OrderedDict");
    p += ")RtR";
  }
  p += key.empty() ? "u." : "uu.";
  return p;
}

}  // namespace detail

/// Writes a file that torch.load reads, with weights_only too, atomically. `content(i, sink)` is called once for each tensor, in order, and writes
/// exactly its bytes with sink.write(bytes). With `key` the dict stands under that key of another one. Throws Error.
template <class Content>
void write_torch_file(const std::filesystem::path& path, std::span<const TorchTensorPlan> tensors, Content&& content, std::string_view key = {}) {
  for (const TorchTensorPlan& t : tensors)
    if (!is_plain(t.format)) throw Error(path.string(), t.name, "f32, bf16 or f16 for a PyTorch file", std::string(name(t.format)));
  write_file_atomically(path, [&](FileWriter& file) {
    ZipWriter zip(file);
    zip.add("archive/data.pkl", detail::torch_pickle(tensors, key));
    zip.add("archive/byteorder", "little");
    for (std::size_t i = 0; i < tensors.size(); ++i)
      zip.add("archive/data/" + std::to_string(i), tensors[i].bytes(), [&](auto& sink) { content(i, sink); });
    zip.add("archive/version", "3\n");
    zip.finish();
  });
}

}  // namespace tinyllama
