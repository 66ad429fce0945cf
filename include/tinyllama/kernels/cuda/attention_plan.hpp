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
  std::int32_t first_part;             // place of the first partial result, where the rows' pages are in several parts
  std::int16_t part, parts;
  std::int32_t next;                   // the block's next item, -1 behind the last
};
static_assert(sizeof(AttentionItem) == 48);

/// Block b begins with items[b] and follows `next`: one load less in a chain that a short launch waits for. Upload the items once a step; layers differ in their offsets only.
struct AttentionPlan {
  std::vector<AttentionItem> items;
  std::int32_t blocks = 0;
  std::int32_t tile_rows = 0;  // no item has more rows
  std::int32_t parts = 0;      // partial results of split tiles

  bool empty() const { return items.empty(); }
  /// Makes it `count` blocks, of which the last have nothing to do: for a launch in a graph, whose grid stays as it was.
  void pad(std::int32_t count) {
    if (count <= blocks) return;
    const std::int32_t more = count - blocks;
    for (AttentionItem& i : items)
      if (i.next >= 0) i.next += more;
    AttentionItem nothing{};
    nothing.next = -1;
    items.insert(items.begin() + blocks, static_cast<std::size_t>(more), nothing);
    blocks = count;
  }
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
          f(AttentionItem{i(s.first_row), i(s.position), i(length), i(table), i(h), i(row), i(count), 0, i((seen + page_tokens - 1) / page_tokens), 0, 0, 1, -1});
        }
    table += (length + page_tokens - 1) / page_tokens;
  }
}

/// The lists of the blocks as one array: first items first.
inline void chain(AttentionPlan& plan, const std::vector<std::vector<AttentionItem>>& lists) {
  plan.blocks = static_cast<std::int32_t>(lists.size());
  std::size_t rest = lists.size();
  for (const auto& list : lists) {
    plan.items.push_back(list[0]);
    if (list.size() > 1) plan.items.back().next = static_cast<std::int32_t>(rest);
    rest += list.size() - 1;
  }
  for (const auto& list : lists)
    for (std::size_t i = 1; i < list.size(); ++i) {
      plan.items.push_back(list[i]);
      if (i + 1 < list.size()) plan.items.back().next = static_cast<std::int32_t>(plan.items.size());
    }
}
}  // namespace detail

/// Pages dealt evenly: all tiles' pages in a row, cut into `blocks` runs of equal length, so that a run that ends inside a tile splits it. Every block reads the
/// same number of bytes whatever the lengths. Where the tiles are fewer than the blocks, each is cut into parts of its own instead, so that no block has two
/// (to finish one takes some 3 us). The cuts depend on the batch and on `blocks` alone: the same bits every run.
template <class Take>
AttentionPlan plan_even(std::span<const Sequence> batch, index_t kv_heads, index_t group, index_t tile_rows, index_t blocks, Take&& take) {
  AttentionPlan plan;
  plan.tile_rows = static_cast<std::int32_t>(tile_rows);
  index_t total = 0, tiles = 0;
  detail::for_each_tile(batch, kv_heads, group, tile_rows, take, [&](const AttentionItem& t) { total += t.page_end, ++tiles; });
  if (total == 0) return plan;
  if (tiles < blocks) {
    std::vector<std::vector<AttentionItem>> lists;
    // Parts of equal length as near as pages allow, over all tiles: the shortest that the blocks suffice for.
    index_t most = (total + blocks - 1) / blocks;
    const auto needed = [&](index_t pages) {
      index_t n = 0;
      detail::for_each_tile(batch, kv_heads, group, tile_rows, take, [&](const AttentionItem& t) { n += (t.page_end + pages - 1) / pages; });
      return n;
    };
    while (needed(most) > blocks) ++most;
    detail::for_each_tile(batch, kv_heads, group, tile_rows, take, [&](AttentionItem t) {
      const index_t pages = t.page_end, parts = (pages + most - 1) / most;
      t.parts = static_cast<std::int16_t>(parts), t.first_part = parts > 1 ? plan.parts : 0;
      if (parts > 1) plan.parts += static_cast<std::int32_t>(parts);
      for (index_t p = 0; p < parts; ++p) {
        t.part = static_cast<std::int16_t>(p), t.page_begin = static_cast<std::int32_t>(p * pages / parts), t.page_end = static_cast<std::int32_t>((p + 1) * pages / parts);
        lists.push_back({t});
      }
    });
    detail::chain(plan, lists);
    return plan;
  }
  std::vector<std::vector<AttentionItem>> lists(static_cast<std::size_t>(blocks));
  index_t done = 0, block = 0;  // pages dealt; the block that takes the next one
  const auto block_end = [&](index_t b) { return (b + 1) * total / blocks; };
  detail::for_each_tile(batch, kv_heads, group, tile_rows, take, [&](AttentionItem t) {
    // The blocks of the tile are [block, last]; how many parts that makes is known before they are dealt.
    index_t last = block;
    while (block_end(last) < done + t.page_end) ++last;
    const index_t pages = t.page_end, parts = last - block + 1;
    t.parts = static_cast<std::int16_t>(parts), t.first_part = parts > 1 ? plan.parts : 0;
    if (parts > 1) plan.parts += static_cast<std::int32_t>(parts);
    for (index_t page = 0; page < pages; ++t.part) {
      const index_t count = std::min(pages - page, block_end(block) - done);
      t.page_begin = static_cast<std::int32_t>(page), t.page_end = static_cast<std::int32_t>(page + count);
      lists[static_cast<std::size_t>(block)].push_back(t);
      page += count, done += count;
      if (done == block_end(block)) ++block;
    }
  });
  detail::chain(plan, lists);
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
  std::vector<std::vector<AttentionItem>> lists(static_cast<std::size_t>(blocks));
  for (const AttentionItem& t : tiles) {
    const auto [work, b] = loads.top();
    loads.pop();
    lists[static_cast<std::size_t>(b)].push_back(t);
    loads.emplace(work + t.page_end + fixed_cost, b);
  }
  detail::chain(plan, lists);
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
  int blocks, tile_rows, parts;     // of the plan
  float* scratch;                   // plan.scratch_bytes()
  unsigned* counters;               // [plan.parts], zero
};

}  // namespace tinyllama::cuda
