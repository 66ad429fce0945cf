// A model's weights on a device: one block of memory, matrices packed, QKV one matrix and gate and up one.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>
#include <filesystem>
#include <functional>
#include <memory>
#include <optional>
#include <vector>

#include "tinyllama/device/memory.hpp"
#include "tinyllama/io/checkpoint.hpp"
#include "tinyllama/model/block.hpp"
#include "tinyllama/model/memory_plan.hpp"
#include "tinyllama/model/packed_file.hpp"
#include "tinyllama/quant/codec.hpp"
#include "tinyllama/quant/e4m3.hpp"

namespace tinyllama {

/// How a checkpoint becomes a model.
struct LoadOptions {
  /// Arithmetic of the matrix products. `automatic` multiplies models narrower than 1024 in f32: they are small enough, and rounding their
  /// activations to 8 bits shows (SmolLM2-135M in Q4_1 then loses its answers, under llama.cpp too).
  Compute compute = Compute::automatic;
  Format cache = Format::f16;            ///< of keys and values: f32, f16, bf16, f8_e4m3 or q8_0
  bool tokenizer = true;                 ///< load the checkpoint's tokenizer too
  /// A file that keeps the packed weights (CPU only): mapped where it is this checkpoint's, so that nothing is read or packed before it is
  /// used; written, or written anew, where not. Mapped pages are 4 KB, not huge ones, which decoding may feel.
  std::filesystem::path packed = {};
  std::function<void(std::size_t done, std::size_t total)> progress = {};  ///< bytes read
};

using LayerWeights = Layer<Linear>;

/// base^(-2 i / head_dim) / scale for each of the head_dim / 2 pairs.
template <Config C>
std::vector<double> rope_frequencies(const C& c) {
  std::vector<double> f;
  const int hd = head_dim(c);
  for (int i = 0; i < hd / 2; ++i) f.push_back(std::pow(static_cast<double>(c.rope_base), -2.0 * i / hd) / static_cast<double>(c.rope_scale));
  return f;
}

namespace detail {
template <class D>
struct Prepared {
  struct type {};
};
template <class D>
  requires requires { typename D::Prepared; }
struct Prepared<D> {
  using type = typename D::Prepared;
};
}  // namespace detail

/// All weights, and what follows from them. Immutable once built; models share it.
template <Config C, Device D>
struct Weights {
  C config;
  D* device = nullptr;
  RopeLayout rope = RopeLayout::half;
  CacheShape cache;
  Matrix embedding;                  // [vocab, hidden]
  std::vector<LayerWeights> layers;
  const float* final_norm = nullptr; // [hidden]
  Linear head;                       // [vocab, hidden]; the embedding where tied
  std::vector<double> frequencies;   // [head_dim / 2]
  Memory<D> memory;                  // empty where the weights are mapped
  std::optional<MappedFile> mapped;
  [[no_unique_address]] typename detail::Prepared<D>::type prepared;  // what a device that takes whole steps works out once
  std::span<const std::byte> bytes;  // all weights, in the device's memory or mapped

  /// Reads every tensor of `file`, a Checkpoint or what looks like one (path, rope, tensor(), release()), in slices, packs each and gives its
  /// pages back, so that the peak is this model and one slice.
  template <class Source>
  static std::shared_ptr<const Weights> from(D& dev, const C& config, const Source& file, const LoadOptions& options) {
    auto w = std::make_shared<Weights>();
    w->config = config, w->device = &dev, w->rope = file.rope;
    if (!is_cache_format(options.cache)) throw Error("load", "cache format", cache_format_names, name(options.cache));
    w->cache = cache_shape(config, options.cache);
    if (head_stride(head_dim(config)) > max_head_stride)
      throw Error(file.path, "head dimension", "at most " + std::to_string(max_head_stride), std::to_string(head_dim(config)));
    const Compute compute = options.compute == Compute::automatic && config.hidden < 1024 ? Compute::f32 : options.compute;
    w->layers.resize(static_cast<std::size_t>(config.layers));
    if (options.packed.empty()) {
      w->read(file, options);
    } else if constexpr (D::host_memory) {
      const PackedHeader header = packed_header(config, file);
      if (!w->map(file, options.packed, header)) {
        w->read(file, options);
        write_packed(options.packed, header, w->bytes);
      }
    } else {
      throw Error("load", "packed", "no path: only the CPU computes on mapped weights", options.packed.string());
    }
    const std::byte* at = w->bytes.data();
    for_each_parameter(config, [&](const Parameter& p) {
      const StoredTensor t = file.tensor(p);
      w->place(p, t, at, compute);
      at += stored_bytes<D>(p, t.format, config.tied);
    });
    if (config.tied) w->head = Linear(w->embedding, compute);
    // Who multiplies by rounded weights or activations loses nothing more by keys and values of bf16.
    const Format weights = w->layers.front().qkv.part[0].format;
    if (compute != Compute::f32 && options.cache != Format::f32 && weights != Format::f32 && weights != Format::f16) w->cache.compute = Compute::bf16;
    w->frequencies = rope_frequencies(config);
    if constexpr (requires { dev.prepare(*w); }) w->prepared = dev.prepare(*w);
    return w;
  }

 private:
  static constexpr std::size_t slice_bytes = std::size_t{8} << 20;

  bool packs(const Parameter& p) const { return tinyllama::packs<D>(p, config.tied); }

  /// Rows [first, first + n) of a tensor as the model keeps them, written to `to` on the device; `first` is a multiple of panel_rows. Returns
  /// their bytes.
  std::size_t store(const Parameter& p, const StoredTensor& t, index_t first, index_t n, std::byte* to) {
    if (p.role == Role::gain) {
      std::vector<float> gain(static_cast<std::size_t>(t.columns));
      decode_row(t.format, t.bytes.data(), gain.data(), t.columns);
      device->upload(to, gain.data(), gain.size() * sizeof(float));
      return static_cast<std::size_t>(t.columns) * sizeof(float);
    }
    const Format format = kept_format<D>(t.format);
    const std::size_t row = row_bytes(format, t.columns), size = static_cast<std::size_t>(n) * row;
    const std::byte* from = t.bytes.data() + static_cast<std::size_t>(first) * row;
    std::vector<std::byte> expanded;
    if (format != t.format) {
      std::vector<float> values(static_cast<std::size_t>(t.columns));
      expanded.resize(size);
      for (index_t r = 0; r < n; ++r) {
        decode_stored_row(t, first + r, values.data(), t.columns);
        encode_row(format, values.data(), expanded.data() + static_cast<std::size_t>(r) * row, t.columns);
      }
      from = expanded.data();
    }
    if (packs(p)) {
      device->pack(to, {format, false, n, t.columns, from, t.scale.empty() ? nullptr : t.scale.data() + first});
      return D::packed_bytes(format, n, t.columns);
    }
    device->upload(to, from, size);
    return size;
  }

  /// Every tensor to its place in memory of its own, in slices, giving the file's pages back.
  template <class Source>
  void read(const Source& file, const LoadOptions& options) {
    std::size_t total = 0, stored = 0, done = 0;
    for_each_parameter(config, [&](const Parameter& p) {
      const StoredTensor t = file.tensor(p);
      stored += stored_bytes<D>(p, t.format, config.tied), total += t.bytes.size();
    });
    memory = Memory<D>(*device, stored);
    bytes = {memory.data(), stored};
    std::byte* at = memory.data();
    for_each_parameter(config, [&](const Parameter& p) {
      const StoredTensor t = file.tensor(p);
      const std::size_t row = row_bytes(t.format, t.columns);
      std::byte* const end = at + stored_bytes<D>(p, t.format, config.tied);
      const index_t step = std::max<index_t>(1, static_cast<index_t>(slice_bytes / row) / panel_rows) * panel_rows;  // whole panels
      for (index_t r = 0; r < t.rows; r += step) {
        const index_t n = std::min(step, t.rows - r);
        at += store(p, t, r, n, at);
        file.release(t.bytes.subspan(static_cast<std::size_t>(r) * row, static_cast<std::size_t>(n) * row));
      }
      device->zero(at, static_cast<std::size_t>(end - at));
      at = end;
      if (options.progress) options.progress(done += t.bytes.size(), total);
    });
  }

  /// Takes the weights from the packed file where it is `file`'s: false where not.
  template <class Source>
  bool map(const Source& file, const std::filesystem::path& path, const PackedHeader& header) {
    mapped = open_packed(path, header);
    if (!mapped) return false;
    bytes = mapped->bytes().subspan(packed_file_offset);
    const std::byte* at = bytes.data();
    bool same = true;
    std::vector<std::byte> fresh;
    for_each_parameter(config, [&](const Parameter& p) {
      const StoredTensor t = file.tensor(p);
      // One panel, or as many rows: another in each matrix.
      const index_t panel = ((p.layer + 1) * 7919 + static_cast<index_t>(p.slot) * 31) % ((t.rows + panel_rows - 1) / panel_rows), first = panel * panel_rows;
      const Format format = kept_format<D>(t.format);
      fresh.resize(std::max({panel_bytes(format, t.columns), static_cast<std::size_t>(panel_rows) * row_bytes(format, t.columns),
                             static_cast<std::size_t>(t.columns) * sizeof(float)}));
      const std::size_t size = store(p, t, first, std::min(panel_rows, t.rows - first), fresh.data());
      const std::size_t offset = packs(p) ? D::packed_bytes(format, first, t.columns) : static_cast<std::size_t>(first) * row_bytes(format, t.columns);
      same = same && std::memcmp(at + offset, fresh.data(), size) == 0;
      file.release(t.bytes);
      at += stored_bytes<D>(p, t.format, config.tied);
    });
    if (!same) mapped.reset(), bytes = {};
    return same;
  }

  void place(const Parameter& p, const StoredTensor& t, const std::byte* at, Compute compute) {
    if (p.role == Role::gain) {
      const auto* gain = reinterpret_cast<const float*>(at);
      (p.slot == Slot::final_norm ? final_norm : p.slot == Slot::attn_norm ? layer(p).attn_norm : layer(p).ffn_norm) = gain;
      return;
    }
    const Matrix m{kept_format<D>(t.format), packs(p), t.rows, t.columns, at};
    if (p.role == Role::embedding) {
      embedding = m;
      return;
    }
    const auto add = [&](Linear& to) {
      to.part[static_cast<std::size_t>(to.parts++)] = m;
      to.compute = compute;
    };
    switch (p.slot) {
      case Slot::q: case Slot::k: case Slot::v: return add(layer(p).qkv);
      case Slot::o: return add(layer(p).o);
      case Slot::gate: case Slot::up: return add(layer(p).gate_up);
      case Slot::down: return add(layer(p).down);
      default: return add(head);
    }
  }
  LayerWeights& layer(const Parameter& p) { return layers[static_cast<std::size_t>(p.layer)]; }
};

}  // namespace tinyllama
