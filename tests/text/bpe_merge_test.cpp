// Merging against the definition: again and again, join the leftmost pair of best rank. Short texts and long ones take different ways.
#include <doctest/doctest.h>

#include <cstdint>
#include <map>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "tinyllama/text/bpe_merge.hpp"

using namespace tinyllama::detail;

namespace {

using Ids = std::vector<std::int32_t>;
using Rules = std::map<std::pair<std::int32_t, std::int32_t>, Merge>;

Ids by_definition(Ids ids, const Rules& rules) {
  for (;;) {
    std::size_t best = ids.size();
    std::uint32_t rank = 0;
    for (std::size_t i = 0; i + 1 < ids.size(); ++i)
      if (const auto r = rules.find({ids[i], ids[i + 1]}); r != rules.end() && (best == ids.size() || r->second.rank < rank)) best = i, rank = r->second.rank;
    if (best == ids.size()) return ids;
    ids[best] = rules.at({ids[best], ids[best + 1]}).id;
    ids.erase(ids.begin() + static_cast<std::ptrdiff_t>(best) + 1);
  }
}

Ids merged(const Ids& ids, const MergeTable& table) {
  std::vector<Symbol> symbols;
  for (std::int32_t i = 0; i < static_cast<std::int32_t>(ids.size()); ++i) symbols.push_back({ids[static_cast<std::size_t>(i)], 1, i - 1, i + 1});
  if (!symbols.empty()) symbols.back().next = -1;
  merge_symbols(symbols, table, [](auto, auto, auto) {});
  Ids out;
  for (std::int32_t i = symbols.empty() ? -1 : 0; i >= 0; i = symbols[static_cast<std::size_t>(i)].next) out.push_back(symbols[static_cast<std::size_t>(i)].id);
  return out;
}

}  // namespace

TEST_CASE("bpe_merge: as the definition says, for random rules and lengths") {
  std::mt19937 random(1);
  int wrong = 0, joined = 0;
  for (int round = 0; round < 400; ++round) {
    // Pieces are strings over four letters, joined ones have the id of their text, and some ranks are equal, as scores may be.
    std::map<std::string, std::int32_t> ids{{"a", 0}, {"b", 1}, {"c", 2}, {"d", 3}};
    std::vector<std::string> texts{"a", "b", "c", "d"};
    Rules rules;
    MergeTable table;
    for (std::uint32_t rank = 0; rank < 40; ++rank) {
      const std::string l = texts[random() % texts.size()], r = texts[random() % texts.size()], both = l + r;
      if (both.size() > 8 || rules.contains({ids[l], ids[r]})) continue;
      if (ids.emplace(both, static_cast<std::int32_t>(texts.size())).second) texts.push_back(both);
      const Merge m{rank / 3, ids[both]};
      rules[{ids[l], ids[r]}] = m;
      table.insert(ids[l], ids[r], m);
    }
    for (const std::size_t length : {0u, 1u, 2u, 7u, 23u, 24u, 25u, 26u, 90u}) {
      Ids text(length);
      for (auto& id : text) id = static_cast<std::int32_t>(random() % 4);
      const Ids expected = by_definition(text, rules);
      wrong += merged(text, table) != expected;
      joined += expected.size() < text.size();
    }
  }
  CHECK(wrong == 0);
  CHECK(joined > 1000);
}

TEST_CASE("bpe_merge: the table keeps the last of equal pairs, and negative ids never join") {
  MergeTable table;
  CHECK(table.find(1, 2) == nullptr);
  for (std::int32_t i = 0; i < 1000; ++i) table.insert(i, i + 1, {static_cast<std::uint32_t>(i), 2 * i});
  table.insert(5, 6, {7, 8});
  int wrong = 0;
  for (std::int32_t i = 0; i < 1000; ++i) {
    const Merge* m = table.find(i, i + 1);
    wrong += !m || m->id != (i == 5 ? 8 : 2 * i) || table.find(i + 1, i) != nullptr;
  }
  CHECK(wrong == 0);
  CHECK(table.find(-1, 3) == nullptr);
  CHECK(table.find(3, -1) == nullptr);
}
