// How what is learned is cut: into parts, in the order in which a pass meets them, and each part into shards, one a rank.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <optional>
#include <utility>
#include <vector>

#include "tinyllama/config/parameters.hpp"
#include "tinyllama/train/adapters.hpp"

namespace tinyllama {

/// Elements [begin, end) of a flat array.
struct Interval {
  index_t begin = 0, end = 0;
  constexpr index_t size() const { return end - begin; }
  constexpr bool empty() const { return end <= begin; }
  bool operator==(const Interval&) const = default;
};
constexpr Interval common(const Interval& a, const Interval& b) { return {std::max(a.begin, b.begin), std::min(a.end, b.end)}; }

/// n elements cut into shards of `chunk`, one a rank in their order; the last ones are shorter, or empty, where it does not come out even.
struct Shards {
  index_t n = 0, chunk = 0;
  constexpr Interval of(int rank) const { return {std::min(n, rank * chunk), std::min(n, (rank + 1) * chunk)}; }
};

/// Buffers for whole parts that fsdp goes round with, for weights and for gradients: one computes, one travels; a tied embedding stays until the head has used it.
constexpr int fsdp_buffers(bool tied) { return tied ? 3 : 2; }

/// Chunks are whole lines: cache lines of f32, or what shares a scale among quantised moments. The layers, the embedding and the head of the 1.1B model come out even for 2, 4 ... 128 ranks, which is what
/// lets NCCL take its fastest way.
inline constexpr index_t cache_line = 16;
constexpr Shards shards_of(index_t n, int ranks, index_t line = cache_line) {
  return {n, ((n + ranks - 1) / ranks + line - 1) / line * line};
}

/// What gradients may be while they are summed over ranks.
inline constexpr std::array wire_formats{Format::f32, Format::bf16};

/// What of a training is shared with other ranks.
///   none   nothing: one process
///   ddp    each has weights, gradients and moments; gradients are summed
///   zero1  each has weights and gradients, and the moments of its own shards (arXiv 1910.02054)
///   fsdp   each has its own shards of all; a part's weights are gathered while it computes (arXiv 1910.02054, stage 3; 2304.11277)
enum class Sharding : std::uint8_t { none, ddp, zero1, fsdp };

/// The part of the weights to which a parameter belongs: 0 the embedding, 1 .. layers the blocks, layers + 1 the last norm and the head.
template <Config C>
constexpr int part_of(const C& c, const Parameter& p) { return p.layer >= 0 ? p.layer + 1 : p.slot == Slot::embedding ? 0 : static_cast<int>(c.layers) + 1; }

/// f(part, elements) for the parts of the weights, which lie in their order in the flat arrays of for_each_parameter.
template <Config C, class F>
constexpr void for_each_part(const C& c, F&& f) {
  index_t size = 0;
  int part = 0;
  for_each_parameter(c, [&](const Parameter& p) {
    const int here = part_of(c, p);
    if (here != part) f(std::exchange(part, here), std::exchange(size, 0));
    size += p.size();
  });
  f(part, size);
}

/// The parts of a flat array, and who has which shard of each.
class Partition {
 public:
  Partition() = default;
  /// `sizes`: elements of each part; a part may be empty.
  Partition(const std::vector<index_t>& sizes, int ranks, index_t line = cache_line) : ranks_(ranks), line_(line) {
    for (const index_t n : sizes) {
      const index_t begin = parts_.empty() ? 0 : parts_.back().end;
      parts_.push_back({begin, begin + n});
      offsets_.push_back(own_);
      own_ += shards_of(n, ranks, line).chunk;
    }
  }
  /// Of all weights, or of their adapters.
  template <Config C>
  static Partition of(const C& c, const std::optional<LoraOptions>& lora, int ranks, index_t line = cache_line) {
    std::vector<index_t> sizes(static_cast<std::size_t>(c.layers) + 2, 0);
    if (lora) for_each_adapter(c, *lora, [&](const Adapter& a) { sizes[static_cast<std::size_t>(a.target.layer) + 1] += a.end() - a.a; });
    else for_each_part(c, [&](int part, index_t n) { sizes[static_cast<std::size_t>(part)] = n; });
    return {sizes, ranks, line};
  }

  int ranks() const { return ranks_; }
  int parts() const { return static_cast<int>(parts_.size()); }
  index_t size() const { return parts_.empty() ? 0 : parts_.back().end; }
  /// Where the part lies in the flat array.
  Interval part(int p) const { return parts_[static_cast<std::size_t>(p)]; }
  Shards shards(int p) const { return shards_of(part(p).size(), ranks_, line_); }
  /// The rank's shard of the part, in the flat array.
  Interval shard(int p, int rank) const {
    const Interval s = shards(p).of(rank);
    return {part(p).begin + s.begin, part(p).begin + s.end};
  }
  /// A rank keeps its shards one behind the other: elements of that array, and where the part's shard begins in it; the same for each rank.
  index_t own_size() const { return own_; }
  index_t own_offset(int p) const { return offsets_[static_cast<std::size_t>(p)]; }

 private:
  int ranks_ = 1;
  index_t line_ = cache_line;
  std::vector<Interval> parts_;
  std::vector<index_t> offsets_;
  index_t own_ = 0;
};

/// The same sums as constants, for the memory plan: elements of a rank's shards, and of the largest part, as gathered, and its shard.
struct PartitionSizes {
  index_t own = 0, largest_part = 0, largest_shard = 0;
};
template <Config C>
constexpr PartitionSizes partition_sizes(const C& c, int ranks, index_t line = cache_line) {
  PartitionSizes s;
  for_each_part(c, [&](int, index_t n) {
    const index_t chunk = shards_of(n, ranks, line).chunk;
    s.own += chunk, s.largest_part = std::max(s.largest_part, chunk * ranks), s.largest_shard = std::max(s.largest_shard, chunk);
  });
  return s;
}

/// Of one message of gradients in another format than f32: a part, or with ddp what lies before one that makes a bucket full, and that.
constexpr std::size_t wire_bytes(Format wire, Sharding sharding, index_t largest_part, std::size_t bucket_bytes) {
  if (wire == Format::f32 || sharding == Sharding::none) return 0;
  return row_bytes(wire, largest_part + (sharding == Sharding::ddp ? static_cast<index_t>(bucket_bytes / sizeof(float)) : 0));
}
/// ddp: what its buckets are by default.
inline constexpr std::size_t default_bucket_bytes = std::size_t{25} << 20;

}  // namespace tinyllama
