// A model's weights on a device: one block of memory, matrices packed, QKV one matrix and gate and up one.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>
#include <functional>
#include <memory>
#include <vector>

#include "tinyllama/device/memory.hpp"
#include "tinyllama/io/checkpoint.hpp"
#include "tinyllama/model/block.hpp"
#include "tinyllama/model/memory_plan.hpp"

namespace tinyllama {

/// How a checkpoint becomes a model.
struct LoadOptions {
  /// Arithmetic of the matrix products. `automatic` multiplies models narrower than 1024 in f32: they are small enough, and rounding their
  /// activations to 8 bits shows (SmolLM2-135M in Q4_1 then loses its answers, under llama.cpp too).
  Compute compute = Compute::automatic;
  Format cache = Format::f16;            ///< of keys and values: f32, f16 or bf16
  bool tokenizer = true;                 ///< load the checkpoint's tokenizer too
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
  Memory<D> memory;

  /// Reads every tensor of `file`, a Checkpoint or what looks like one (path, rope, tensor(), release()), in slices, packs each and gives its
  /// pages back, so that the peak is this model and one slice.
  template <class Source>
  static std::shared_ptr<const Weights> from(D& dev, const C& config, const Source& file, const LoadOptions& options) {
    auto w = std::make_shared<Weights>();
    w->config = config, w->device = &dev, w->rope = file.rope;
    if (options.cache != Format::f32 && options.cache != Format::f16 && options.cache != Format::bf16)
      throw Error("load", "cache format", "f32, f16 or bf16", name(options.cache));
    w->cache = cache_shape(config, options.cache);
    if (head_stride(head_dim(config)) > max_head_stride)
      throw Error(file.path, "head dimension", "at most " + std::to_string(max_head_stride), std::to_string(head_dim(config)));
    std::size_t total = 0, bytes = 0;
    for_each_parameter(config, [&](const Parameter& p) {
      const StoredTensor t = file.tensor(p);
      total += stored_bytes(p, t.format, config.tied), bytes += t.bytes.size();
    });
    w->memory = Memory<D>(dev, total);
    w->layers.resize(static_cast<std::size_t>(config.layers));
    const Compute compute = options.compute == Compute::automatic && config.hidden < 1024 ? Compute::f32 : options.compute;
    std::byte* at = w->memory.data();
    std::size_t done = 0;
    for_each_parameter(config, [&](const Parameter& p) {
      const StoredTensor t = file.tensor(p);
      w->place(p, t, at, compute, file);
      at += stored_bytes(p, t.format, config.tied);
      if (options.progress) options.progress(done += t.bytes.size(), bytes);
    });
    if (config.tied) w->head = Linear(w->embedding, compute);
    w->frequencies = rope_frequencies(config);
    return w;
  }

 private:
  static constexpr std::size_t slice_bytes = std::size_t{8} << 20;

  template <class Source>
  void place(const Parameter& p, const StoredTensor& t, std::byte* at, Compute compute, const Source& file) {
    if (p.role == Role::gain) {
      auto* gain = reinterpret_cast<float*>(at);
      decode_row(t.format, t.bytes.data(), gain, t.columns);
      (p.slot == Slot::final_norm ? final_norm : p.slot == Slot::attn_norm ? layer(p).attn_norm : layer(p).ffn_norm) = gain;
      return;
    }
    // An untied embedding is looked up and never multiplied with: rows, as in the file.
    Matrix m{t.format, p.role != Role::embedding || config.tied, t.rows, t.columns, at};
    const std::size_t row = row_bytes(t.format, t.columns);
    const index_t rows = std::max<index_t>(1, static_cast<index_t>(slice_bytes / row) / panel_rows) * panel_rows;  // whole panels
    for (index_t r = 0; r < t.rows; r += rows) {
      const auto part = t.bytes.subspan(static_cast<std::size_t>(r) * row, static_cast<std::size_t>(std::min(rows, t.rows - r)) * row);
      if (m.packed) device->pack(at + packed_bytes(t.format, r, t.columns), {t.format, false, std::min(rows, t.rows - r), t.columns, part.data()});
      else std::memcpy(at + static_cast<std::size_t>(r) * row, part.data(), part.size());
      file.release(part);
    }
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
