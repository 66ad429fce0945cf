// Who attends to what: a batch of sequences as a list of tiles of query rows and ranges of pages, dealt to blocks on the host once a step.
#pragma once

#include <algorithm>
#include <cstdint>
#include <queue>
#include <span>
#include <vector>

#include "tinyllama/device/operands.hpp"

namespace tinyllama::cuda {

/// Rows of one KV head against pages of one sequence. Row r of a sequence is head r % group of token r / group, as on the CPU.
struct AttentionItem {
  std::int32_t first_row;              // of the sequence in q and out
  std::int32_t position;               // of its first new token
  std::int32_t length;                 // positions of it that exist
  std::int32_t pages;                  // its first page in the batch's page table
  std::int32_t kv_head, row, rows;     // rows [row, row + rows) of the sequence
  std::int32_t page_begin, page_end;   // pages to attend to
  std::int32_t first_part, part, parts;  // parts of the same rows; partial results at first_part + part
};
static_assert(sizeof(AttentionItem) == 48);

/// Items of block b: items[first[b]] .. items[first[b + 1] - 1]. Upload both once a step; layers differ in their offsets only.
struct AttentionPlan {
  std::vector<AttentionItem> items;
  std::vector<std::int32_t> first{0};
  std::int32_t tile_rows = 0;  // no item has more rows
  std::int32_t parts = 0;      // partial results of split tiles

  int blocks() const { return static_cast<int>(first.size()) - 1; }
  bool empty() const { return items.empty(); }
  /// Bytes of scratch for head_dim, and counters (zeroed once; the kernels leave them zero) for attention.
  std::size_t scratch_bytes(index_t head_dim) const {
    return static_cast<std::size_t>(parts) * static_cast<std::size_t>(tile_rows) * static_cast<std::size_t>(head_dim + 2) * sizeof(float);
  }
};

namespace detail {
/// f(item) for each tile of `tile_rows` rows and each KV head, with all the pages that it sees. The page table is the sequences' pages one after the other.
template <class Take, class F>
void for_each_tile(std::span<const Sequence> batch, index_t kv_heads, index_t group, index_t tile_rows, Take&& take, F&& f) {
  index_t table = 0;
  for (const Sequence& s : batch) {
    const index_t length = s.position + s.tokens, rows = s.tokens * group;
    if (take(s))
      for (index_t row = 0; row < rows; row += tile_rows)
        for (index_t h = 0; h < kv_heads; ++h) {
          const index_t count = std::min(tile_rows, rows - row), seen = s.position + (row + count - 1) / group + 1;
          const auto i = [](index_t x) { return static_cast<std::int32_t>(x); };
          f(AttentionItem{i(s.first_row), i(s.position), i(length), i(table), i(h), i(row), i(count), 0, i((seen + page_tokens - 1) / page_tokens), 0, 0, 1});
        }
    table += (length + page_tokens - 1) / page_tokens;
  }
}
}  // namespace detail

/// Pages dealt evenly: all tiles' pages in a row, cut into `blocks` runs of equal length, so that a run that ends inside a tile splits it. Every block reads the
/// same number of bytes whatever the lengths, and the cuts depend on the batch and on `blocks` alone: the same bits every run.
template <class Take>
AttentionPlan plan_even(std::span<const Sequence> batch, index_t kv_heads, index_t group, index_t tile_rows, index_t blocks, Take&& take) {
  AttentionPlan plan;
  plan.tile_rows = static_cast<std::int32_t>(tile_rows);
  index_t total = 0;
  detail::for_each_tile(batch, kv_heads, group, tile_rows, take, [&](const AttentionItem& t) { total += t.page_end; });
  blocks = std::min(blocks, total);
  if (total == 0) return plan;
  index_t done = 0, block = 0;  // pages dealt; the block that takes the next one
  const auto block_end = [&](index_t b) { return (b + 1) * total / blocks; };
  detail::for_each_tile(batch, kv_heads, group, tile_rows, take, [&](const AttentionItem& t) {
    const std::size_t first_item = plan.items.size();
    std::int32_t parts = 0;
    for (index_t page = 0; page < t.page_end;) {
      const index_t count = std::min<index_t>(t.page_end - page, block_end(block) - done);
      AttentionItem part = t;
      part.page_begin = static_cast<std::int32_t>(page), part.page_end = static_cast<std::int32_t>(page + count), part.part = parts++;
      plan.items.push_back(part);
      page += count, done += count;
      if (done == block_end(block)) plan.first.push_back(static_cast<std::int32_t>(plan.items.size())), ++block;
    }
    for (std::size_t i = first_item; i < plan.items.size(); ++i) plan.items[i].first_part = plan.parts, plan.items[i].parts = parts;
    if (parts > 1) plan.parts += parts;
  });
  return plan;
}

/// Whole tiles, longest first, each to the block with the least work so far (longest processing time first): for prefill, where a tile keeps a block busy.
template <class Take>
AttentionPlan plan_whole(std::span<const Sequence> batch, index_t kv_heads, index_t group, index_t tile_rows, index_t blocks, Take&& take) {
  AttentionPlan plan;
  plan.tile_rows = static_cast<std::int32_t>(tile_rows);
  std::vector<AttentionItem> tiles;
  detail::for_each_tile(batch, kv_heads, group, tile_rows, take, [&](const AttentionItem& t) { tiles.push_back(t); });
  std::stable_sort(tiles.begin(), tiles.end(), [](const AttentionItem& a, const AttentionItem& b) { return a.page_end > b.page_end; });
  blocks = std::min<index_t>(blocks, static_cast<index_t>(tiles.size()));
  constexpr index_t fixed_cost = 2;  // pages' worth of loading queries and storing results
  using Load = std::pair<index_t, index_t>;  // work, block
  std::priority_queue<Load, std::vector<Load>, std::greater<>> loads;
  for (index_t b = 0; b < blocks; ++b) loads.emplace(0, b);
  std::vector<std::vector<std::int32_t>> dealt(static_cast<std::size_t>(blocks));
  for (std::size_t i = 0; i < tiles.size(); ++i) {
    const auto [work, b] = loads.top();
    loads.pop();
    dealt[static_cast<std::size_t>(b)].push_back(static_cast<std::int32_t>(i));
    loads.emplace(work + tiles[i].page_end + fixed_cost, b);
  }
  for (const auto& list : dealt) {
    for (const std::int32_t i : list) plan.items.push_back(tiles[static_cast<std::size_t>(i)]);
    plan.first.push_back(static_cast<std::int32_t>(plan.items.size()));
  }
  return plan;
}

/// One launch of attention. Pointers are the device's. Q: bf16 (tensor cores) or float (f32 arithmetic throughout); O: bf16 or float.
template <class Q, class O>
struct AttentionArgs {
  const Q* q;                       // [T, kv_heads * group * head_dim]; rows start at multiples of 16 bytes
  O* out;                           // the same shape
  std::int64_t ldq, ldo;
  int head_dim, group;
  float scale;                      // 1 / sqrt(head_dim)
  Format format;
  const std::byte* const* pages;    // page table of the batch
  std::int64_t k_offset, v_offset;  // bytes of the layer's KV head 0 in a page
  std::int64_t head_bytes;          // from one KV head to the next
  const AttentionItem* items;       // of the plan
  const std::int32_t* first;        // [blocks + 1]
  int blocks, tile_rows, parts;     // of the plan
  float* scratch;                   // plan.scratch_bytes()
  unsigned* counters;               // [plan.parts], zero
};

}  // namespace tinyllama::cuda
