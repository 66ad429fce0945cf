// Byte-pair merging, shared by both kinds of tokenizer: repeatedly join the adjacent pair of best rank, the leftmost among equals.
#pragma once

#include <algorithm>
#include <array>
#include <bit>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <queue>
#include <utility>
#include <vector>

namespace tinyllama::detail {

struct Merge {
  std::uint32_t rank;  // smaller is better
  std::int32_t id;     // of the joined piece
};

/// (left id, right id) to Merge, by open addressing: one multiplication and mostly one cache line a question.
class MergeTable {
 public:
  void reserve(std::size_t pairs) { rehash(std::bit_ceil(pairs * 2 + 2)); }

  /// The last one of the same pair stays, as in Hugging Face's table.
  void insert(std::int32_t left, std::int32_t right, Merge merge) {
    if ((size_ + 1) * 2 > slots_.size()) rehash(std::max<std::size_t>(16, slots_.size() * 2));
    Slot& s = slots_[locate(key(left, right))];
    if (s.key == empty) ++size_;
    s = {key(left, right), merge};
  }

  /// nullptr where the two do not join. Negative ids never join.
  const Merge* find(std::int32_t left, std::int32_t right) const {
    if ((left | right) < 0 || slots_.empty()) return nullptr;
    const Slot& s = slots_[locate(key(left, right))];
    return s.key == empty ? nullptr : &s.merge;
  }

 private:
  struct Slot {
    std::uint64_t key = empty;
    Merge merge{};
  };
  static constexpr std::uint64_t empty = ~std::uint64_t{0};
  static std::uint64_t key(std::int32_t left, std::int32_t right) {
    return (static_cast<std::uint64_t>(static_cast<std::uint32_t>(left)) << 32) | static_cast<std::uint32_t>(right);
  }
  std::size_t locate(std::uint64_t k) const {
    const std::size_t mask = slots_.size() - 1;
    std::uint64_t h = k * 0x9e3779b97f4a7c15u;  // 2^64 / golden ratio; the high bits are mixed best
    std::size_t i = static_cast<std::size_t>(h ^ (h >> 32)) & mask;
    while (slots_[i].key != k && slots_[i].key != empty) i = (i + 1) & mask;
    return i;
  }
  void rehash(std::size_t capacity) {
    std::vector<Slot> old(capacity);
    old.swap(slots_);
    for (const Slot& s : old)
      if (s.key != empty) slots_[locate(s.key)] = s;
  }
  std::vector<Slot> slots_;
  std::size_t size_ = 0;
};

/// A stretch of text while it is being merged; `length` (bytes) 0 marks one that its left neighbour has taken in.
struct Symbol {
  std::int32_t id, length, prev, next;
};

/// Merges in place; the survivors are those reached from symbols[0] through `next` (-1 at the end). O(n log n).
/// `candidate(left id, right id, joined id)` hears of each pair when it becomes adjacent.
template <class Candidate>
void merge_symbols(std::vector<Symbol>& symbols, const MergeTable& table, Candidate&& candidate) {
  const auto at = [&](std::int32_t i) -> Symbol& { return symbols[static_cast<std::size_t>(i)]; };
  constexpr std::size_t few = 24;
  if (symbols.size() <= few) {  // most words: looking at all pairs each time beats a heap
    std::array<const Merge*, few> pair{};
    const auto look = [&](std::int32_t i) {
      const Merge* m = at(i).next < 0 ? nullptr : table.find(at(i).id, at(at(i).next).id);
      if (m) candidate(at(i).id, at(at(i).next).id, m->id);
      pair[static_cast<std::size_t>(i)] = m;
    };
    const auto n = static_cast<std::int32_t>(symbols.size());
    for (std::int32_t i = 0; i < n; ++i) look(i);
    for (;;) {
      std::int32_t best = -1;
      for (std::int32_t i = n ? 0 : -1; i >= 0; i = at(i).next)
        if (const Merge* m = pair[static_cast<std::size_t>(i)]; m && (best < 0 || m->rank < pair[static_cast<std::size_t>(best)]->rank)) best = i;
      if (best < 0) return;
      Symbol& left = at(best);
      Symbol& right = at(left.next);
      left.id = pair[static_cast<std::size_t>(best)]->id;
      left.length += right.length;
      left.next = right.next;
      right.length = 0;
      if (left.next >= 0) at(left.next).prev = best;
      if (left.prev >= 0) look(left.prev);
      look(best);
    }
  }
  struct Entry {
    std::uint64_t order;  // rank, then position
    std::int32_t id, length;
    bool operator<(const Entry& e) const { return order > e.order; }  // std heaps keep the largest on top
  };
  std::vector<Entry> entries;
  const auto entry = [&](std::int32_t l, std::int32_t r, auto&& sink) {
    if (const Merge* m = table.find(at(l).id, at(r).id)) {
      candidate(at(l).id, at(r).id, m->id);
      sink(Entry{(static_cast<std::uint64_t>(m->rank) << 32) | static_cast<std::uint32_t>(l), m->id, at(l).length + at(r).length});
    }
  };
  entries.reserve(symbols.size());
  for (std::int32_t i = 1; i < static_cast<std::int32_t>(symbols.size()); ++i) entry(i - 1, i, [&](Entry e) { entries.push_back(e); });
  std::priority_queue<Entry> agenda(std::less<Entry>(), std::move(entries));
  while (!agenda.empty()) {
    const Entry top = agenda.top();
    agenda.pop();
    const auto l = static_cast<std::int32_t>(top.order & 0xffffffffu);
    // Symbols only grow, so the pair is the one that was queued exactly when its length is.
    if (at(l).length == 0 || at(l).next < 0 || at(l).length + at(at(l).next).length != top.length) continue;
    Symbol& left = at(l);
    Symbol& right = at(left.next);
    left.id = top.id;
    left.length = top.length;
    left.next = right.next;
    right.length = 0;
    const auto push = [&](Entry e) { agenda.push(e); };
    if (left.prev >= 0) entry(left.prev, l, push);
    if (left.next >= 0) at(left.next).prev = l, entry(l, left.next, push);
  }
}

}  // namespace tinyllama::detail
