// Bytes that a model needs, as constants: weights by format, KV cache, activations.
#pragma once

#include <algorithm>

#include "tinyllama/config/parameters.hpp"
#include "tinyllama/device/cpu.hpp"

namespace tinyllama {

/// What the plan is for.
struct PlanOptions {
  index_t batch = 1;                 ///< sequences
  index_t tokens = 2048;             ///< positions of each, prompt and answer
  index_t chunk = 512;               ///< tokens of a prefill step
  Format weights = Format::bf16;     ///< of the matrices; gains are f32
  Format cache = Format::f16;
  index_t logits_rows = 1;           ///< rows of logits kept of a step, for each sequence
};

/// In bytes of the device's memory.
struct MemoryPlan {
  std::size_t weights = 0, cache = 0, activations = 0;
  constexpr std::size_t total() const { return weights + cache + activations; }
};

constexpr std::size_t aligned(std::size_t bytes) { return (bytes + 63) / 64 * 64; }

/// The activations of one step, the one list: f(Activation, rows, columns). `rows` tokens, `logits` rows of logits.
enum class Activation : std::uint8_t { residual, normed, projected, qkv, attended, gate_up, gated, cos, sin, selected, logits };
template <Config C, class F>
constexpr void for_each_activation(const C& c, index_t rows, index_t logits, F&& f) {
  const index_t d = c.hidden, hd = head_dim(c), kv = c.kv_heads * hd;
  f(Activation::residual, rows, d);             // x
  f(Activation::normed, rows, d);               // what a block reads
  f(Activation::projected, rows, d);            // what a block adds to x
  f(Activation::qkv, rows, d + 2 * kv);
  f(Activation::attended, rows, d);
  f(Activation::gate_up, rows, index_t{2} * c.ffn);
  f(Activation::gated, rows, index_t{c.ffn});
  f(Activation::cos, rows, hd / 2);
  f(Activation::sin, rows, hd / 2);
  f(Activation::selected, logits, d);           // rows whose logits are wanted
  f(Activation::logits, logits, index_t{c.vocab});
}

/// Bytes of an element: what products read and write inside a block is the device's D::activation, the rest float.
template <class D>
constexpr std::size_t element_bytes(Activation a) {
  switch (a) {
    case Activation::normed: case Activation::qkv: case Activation::attended: case Activation::gate_up: case Activation::gated: case Activation::selected:
      return sizeof(typename D::activation);
    default: return sizeof(float);
  }
}

template <class D = Cpu, Config C>
constexpr std::size_t activation_bytes(const C& c, index_t rows, index_t logits) {
  std::size_t bytes = 0;
  for_each_activation(c, rows, logits, [&](Activation a, index_t r, index_t n) { bytes += aligned(static_cast<std::size_t>(r * n) * element_bytes<D>(a)); });
  return bytes;
}

/// Whether a tensor is kept in the order that the device's matmul reads. An untied embedding is only looked up: the CPU keeps it as in the file.
template <class D = Cpu>
constexpr bool packs(const Parameter& p, bool tied) { return p.role != Role::gain && (p.role != Role::embedding || tied || D::packed_embedding); }

/// The format in which a device keeps a matrix: the CPU, which has no arithmetic of 8-bit floats, expands them to bf16, row scales and all.
template <class D = Cpu>
constexpr Format kept_format(Format f) { return D::host_memory && f == Format::f8_e4m3 ? Format::bf16 : f; }

/// Bytes of one tensor as the model keeps it: gains f32, matrices packed.
template <class D = Cpu>
constexpr std::size_t stored_bytes(const Parameter& p, Format f, bool tied) {
  if (p.role == Role::gain) return aligned(static_cast<std::size_t>(p.columns) * sizeof(float));
  f = kept_format<D>(f);
  return aligned(packs<D>(p, tied) ? D::packed_bytes(f, p.rows, p.columns) : static_cast<std::size_t>(p.rows) * row_bytes(f, p.columns));
}

template <Config C>
constexpr CacheShape cache_shape(const C& c, Format f) { return {f, c.layers, c.kv_heads, head_dim(c)}; }

/// Scratch of the device for one step of `rows` tokens.
template <class D = Cpu, Config C>
constexpr std::size_t step_scratch(const C& c, const CacheShape& cache, index_t rows, index_t split_rows, index_t length) {
  return D::step_scratch(cache, c.heads, std::max(c.ffn, c.hidden), rows, split_rows, length);
}

/// The plan, with the format of each tensor given by `format_of(const Parameter&)`, as files may mix them.
template <class D = Cpu, Config C, class F>
constexpr MemoryPlan memory_plan(const C& c, const PlanOptions& o, F&& format_of) {
  MemoryPlan plan;
  for_each_parameter(c, [&](const Parameter& p) { plan.weights += stored_bytes<D>(p, format_of(p), c.tied); });
  const CacheShape cache = cache_shape(c, o.cache);
  plan.cache = static_cast<std::size_t>(o.batch * ((o.tokens + page_tokens - 1) / page_tokens)) * aligned(static_cast<std::size_t>(cache.page_bytes()));
  const index_t rows = std::max(o.batch, std::min(o.chunk, o.tokens));
  plan.activations = activation_bytes<D>(c, rows, o.batch * o.logits_rows) + step_scratch<D>(c, cache, rows, o.batch, o.tokens);
  return plan;
}
template <class D = Cpu, Config C>
constexpr MemoryPlan memory_plan(const C& c, const PlanOptions& o) {
  return memory_plan<D>(c, o, [&](const Parameter& p) { return p.columns % info(o.weights).block == 0 ? o.weights : Format::f16; });
}
template <StaticConfig C, class D = Cpu>
constexpr MemoryPlan memory_plan(const PlanOptions& o = {}) { return memory_plan<D>(C{}, o); }

static_assert(memory_plan<tinyllama_1b>({.tokens = 64, .weights = Format::bf16}).cache == 64 * 22'528);  // 22,528 bytes a token at 16 bits
static_assert(memory_plan<tinyllama_1b>({.weights = Format::bf16}).weights == std::size_t{2} * 1'100'048'384 + 2 * 45 * 2048);  // the 45 gains are f32

}  // namespace tinyllama
