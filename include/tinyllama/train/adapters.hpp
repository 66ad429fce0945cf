// LoRA adapters (arXiv 2106.09685): their options, and the one list of their matrices in a flat array.
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <initializer_list>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "tinyllama/config/parameters.hpp"

namespace tinyllama {

/// Which of a layer's matrices have adapters: AdapterSlots{Slot::q, Slot::v}.
class AdapterSlots {
 public:
  constexpr AdapterSlots() = default;
  /// Throws Error for a slot that is no matrix of a layer.
  constexpr AdapterSlots(std::initializer_list<Slot> slots) {
    for (const Slot s : slots) add(s);
  }
  static constexpr std::array<Slot, 7> all{Slot::q, Slot::k, Slot::v, Slot::o, Slot::gate, Slot::up, Slot::down};
  static constexpr AdapterSlots every() {
    AdapterSlots s;
    for (const Slot slot : all) s.add(slot);
    return s;
  }
  constexpr void add(Slot s) {
    if (std::find(all.begin(), all.end(), s) == all.end())
      throw Error("adapters", "slot", "q, k, v, o, gate, up or down", std::to_string(static_cast<int>(s)));
    bits_ |= bit(s);
  }
  constexpr bool contains(Slot s) const { return (bits_ & bit(s)) != 0; }
  constexpr bool empty() const { return bits_ == 0; }
  bool operator==(const AdapterSlots&) const = default;

 private:
  static constexpr std::uint32_t bit(Slot s) { return std::uint32_t{1} << static_cast<unsigned>(s); }
  std::uint32_t bits_ = 0;
};

/// W x becomes W x + (alpha / rank) B (A dropout(x)).
struct LoraOptions {
  int rank = 8;
  float alpha = 16;
  float dropout = 0;  // probability, in training only
  AdapterSlots slots = {Slot::q, Slot::v};
  std::uint64_t seed = 0;  // of A's initial values

  float scale() const { return alpha / static_cast<float>(rank); }
  bool operator==(const LoraOptions&) const = default;
};

/// The adapter of one matrix W [rows, columns]: A [rank, columns] and, right after it, B [rows, rank], at these places of the flat array.
struct Adapter {
  Parameter target;
  index_t rank = 0;
  index_t a = 0, b = 0;  // offsets
  constexpr index_t a_size() const { return rank * target.columns; }
  constexpr index_t b_size() const { return target.rows * rank; }
  constexpr index_t end() const { return b + b_size(); }
};

/// Calls f(Adapter) for every adapter, in the order of for_each_parameter.
template <Config C, class F>
void for_each_adapter(const C& c, const LoraOptions& options, F&& f) {
  index_t offset = 0;
  for_each_parameter(c, [&](const Parameter& p) {
    if (!options.slots.contains(p.slot)) return;
    const Adapter adapter{p, options.rank, offset, offset + options.rank * p.columns};
    offset = adapter.end();
    f(adapter);
  });
}

/// Number of weights of all adapters: the length of the flat array.
template <Config C>
std::int64_t adapter_parameter_count(const C& c, const LoraOptions& options) {
  std::int64_t n = 0;
  for_each_adapter(c, options, [&](const Adapter& a) { n = a.end(); });
  return n;
}

/// Throws Error for options that make no adapters of this model.
template <Config C>
void check(const LoraOptions& o, const C& c, std::string_view where = "LoRA") {
  const int most = std::min<int>(c.hidden, c.ffn);  // a higher rank adds nothing to q, o, gate, up, down
  if (o.rank < 1 || o.rank > most) throw Error(where, "rank", "1 to " + std::to_string(most), std::to_string(o.rank));
  if (!(std::isfinite(o.alpha) && o.alpha > 0)) throw Error(where, "alpha", "above 0", std::to_string(o.alpha));
  if (!(o.dropout >= 0 && o.dropout < 1)) throw Error(where, "dropout", "0 to below 1", std::to_string(o.dropout));
  if (o.slots.empty()) throw Error(where, "slots", "at least one matrix", "none");
}

/// The flat array at the beginning of a training: A uniform within 1 / sqrt(columns), as PEFT draws it, and B zero, so that the model is the base
/// model still. The same on every platform.
template <Config C>
std::vector<float> initial_adapters(const C& c, const LoraOptions& options) {
  check(options, c);
  std::vector<float> flat(static_cast<std::size_t>(adapter_parameter_count(c, options)), 0.0f);
  std::uint64_t state = options.seed;
  for_each_adapter(c, options, [&](const Adapter& adapter) {
    const double bound = 1 / std::sqrt(static_cast<double>(adapter.target.columns));
    for (float& x : std::span(flat).subspan(static_cast<std::size_t>(adapter.a), static_cast<std::size_t>(adapter.a_size()))) {
      std::uint64_t z = state += 0x9e3779b97f4a7c15u;  // splitmix64
      z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
      z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
      x = static_cast<float>((static_cast<double>((z ^ (z >> 31)) >> 11) * 0x1p-52 - 1) * bound);
    }
  });
  return flat;
}

}  // namespace tinyllama
