// Several samples in one row of a batch, each a sequence of its own: no attention crosses their borders, and little of a row is padding.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <numeric>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "tinyllama/device/operands.hpp"
#include "tinyllama/train/conversations.hpp"

namespace tinyllama {

/// A sample's place in its row: positions [first_row, first_row + tokens).
struct PackedSample {
  std::size_t sample = 0;  // index in the list that was packed
  index_t first_row = 0, tokens = 0;
  bool operator==(const PackedSample&) const = default;
};

/// Which samples stand in which row.
struct Packing {
  index_t tokens = 0;                           // T of a row
  std::vector<std::vector<PackedSample>> rows;  // each without gaps, from position 0
  index_t used(std::size_t row) const { return rows[row].back().first_row + rows[row].back().tokens; }

  /// Share of all positions that hold a sample, 0 to 1.
  double fill_rate() const {
    double sum = 0;
    for (std::size_t r = 0; r < rows.size(); ++r) sum += static_cast<double>(used(r));
    return rows.empty() ? 0 : sum / (static_cast<double>(tokens) * static_cast<double>(rows.size()));
  }
};

struct PackingOptions {
  index_t tokens = 2048;   // T of a row
  std::uint64_t seed = 0;  // of the order: rows, and which of equally long samples goes first; an epoch takes one of its own
};

namespace detail {

/// A random number below `n` (64-bit multiply and shift; the bias is n / 2^64), from splitmix64. Standard distributions differ between libraries.
class PackingRandom {
 public:
  explicit PackingRandom(std::uint64_t seed) : state_(seed) {}
  template <class T>
  void shuffle(std::vector<T>& v) {
    for (std::size_t n = v.size(); n > 1; --n) std::swap(v[n - 1], v[below(n)]);
  }

 private:
  std::size_t below(std::size_t n) {
    std::uint64_t z = state_ += 0x9e3779b97f4a7c15u;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    __extension__ using wide = unsigned __int128;
    return static_cast<std::size_t>((static_cast<wide>(z ^ (z >> 31)) * n) >> 64);
  }
  std::uint64_t state_;
};

/// The room left in up to `rows` rows; finds the first with enough in O(log rows): a tree of maxima, the rows being its leaves.
class RoomTree {
 public:
  RoomTree(std::size_t rows, index_t room) {
    while (leaves_ < rows) leaves_ *= 2;
    most_.assign(2 * leaves_, room);
  }
  std::size_t first_with(index_t tokens) const {
    std::size_t node = 1;
    while (node < leaves_) node = most_[2 * node] >= tokens ? 2 * node : 2 * node + 1;
    return node - leaves_;
  }
  /// Takes from the row, and returns where in it the free part began.
  index_t take(std::size_t row, index_t tokens, index_t capacity) {
    std::size_t node = leaves_ + row;
    const index_t begin = capacity - most_[node];
    most_[node] -= tokens;
    while (node /= 2) most_[node] = std::max(most_[2 * node], most_[2 * node + 1]);
    return begin;
  }

 private:
  std::size_t leaves_ = 1;
  std::vector<index_t> most_;
};

}  // namespace detail

/// First-fit decreasing: longest first, each into the first row with room for it. Takes at most 11/9 of the fewest rows possible, plus one (Dosa
/// 2007). Every sample stands in exactly one row. The same lengths and seed give the same rows. Throws Error for a length outside 1 to T.
inline Packing pack_samples(std::span<const index_t> lengths, const PackingOptions& options = {}) {
  if (options.tokens < 1) throw Error("pack_samples", "tokens", "1 or more", std::to_string(options.tokens));
  for (std::size_t i = 0; i < lengths.size(); ++i)
    if (lengths[i] < 1 || lengths[i] > options.tokens)
      throw Error("pack_samples", "sample " + std::to_string(i), "1 to " + std::to_string(options.tokens) + " tokens", std::to_string(lengths[i]));
  detail::PackingRandom random(options.seed);
  std::vector<std::size_t> order(lengths.size());
  std::iota(order.begin(), order.end(), std::size_t{0});
  random.shuffle(order);
  std::stable_sort(order.begin(), order.end(), [&](std::size_t a, std::size_t b) { return lengths[a] > lengths[b]; });

  Packing out{.tokens = options.tokens, .rows = {}};
  detail::RoomTree room(lengths.size(), options.tokens);
  for (const std::size_t i : order) {
    const std::size_t row = room.first_with(lengths[i]);
    if (row == out.rows.size()) out.rows.emplace_back();
    out.rows[row].push_back({i, room.take(row, lengths[i], options.tokens), lengths[i]});
  }
  random.shuffle(out.rows);  // else the first steps would see the longest samples
  return out;
}

/// The same from samples.
inline Packing pack_samples(std::span<const Sample> samples, const PackingOptions& options = {}) {
  std::vector<index_t> lengths;
  for (const Sample& s : samples) lengths.push_back(s.tokens());
  return pack_samples(lengths, options);
}

/// Writes row `row`: inputs [T], and targets [T], which are -100 in the padding. `padding` is any id of the vocabulary. Allocates nothing.
inline void write_packed_row(const Packing& p, std::size_t row, std::span<const Sample> samples, std::span<std::int32_t> inputs,
                             std::span<std::int32_t> targets, std::int32_t padding = 0) {
  const auto wrong = [](const char* what, std::size_t expected, std::size_t found) {
    return Error("write_packed_row", what, std::to_string(expected), std::to_string(found));
  };
  const auto tokens = static_cast<std::size_t>(p.tokens);
  if (row >= p.rows.size()) throw Error("write_packed_row", "row", "below " + std::to_string(p.rows.size()), std::to_string(row));
  if (inputs.size() != tokens) throw wrong("inputs", tokens, inputs.size());
  if (targets.size() != tokens) throw wrong("targets", tokens, targets.size());
  std::fill(inputs.begin(), inputs.end(), padding);
  std::fill(targets.begin(), targets.end(), not_counted);
  for (const PackedSample& s : p.rows[row]) {
    if (s.sample >= samples.size()) throw wrong("samples", s.sample + 1, samples.size());
    const Sample& from = samples[s.sample];
    if (from.tokens() != s.tokens || from.targets.size() != from.ids.size())
      throw wrong("tokens of a sample", static_cast<std::size_t>(s.tokens), from.ids.size());
    std::copy(from.ids.begin(), from.ids.end(), inputs.begin() + s.first_row);
    std::copy(from.targets.begin(), from.targets.end(), targets.begin() + s.first_row);
  }
}

/// Appends the row's sequences to those of a batch in which the row begins at `first_row`. The padding is a sequence too: what no sequence covers
/// attention leaves unwritten, and whatever stood there, times a gradient of zero, would be NaN where it is not finite.
inline void append_sequences(const Packing& p, std::size_t row, index_t first_row, std::vector<Sequence>& batch) {
  for (const PackedSample& s : p.rows[row]) batch.push_back({.first_row = first_row + s.first_row, .tokens = s.tokens});
  const index_t used = p.used(row);
  if (used < p.tokens) batch.push_back({.first_row = first_row + used, .tokens = p.tokens - used});
}

}  // namespace tinyllama
