// Partition: the parts cover the flat array, their shards the parts, for any number of ranks; and the constants of the plan are its sums.
#include "tinyllama/train/partition.hpp"

#include <doctest/doctest.h>

#include "tinyllama/config/presets.hpp"

namespace tl = tinyllama;

namespace {

struct odd : tl::llama_defaults {
  static constexpr int layers = 3, hidden = 20, heads = 2, kv_heads = 1, ffn = 36, vocab = 7, context = 8;
};
struct odd_tied : odd {
  static constexpr bool tied = true;
};

}  // namespace

TEST_CASE_TEMPLATE("partition: each weight belongs to one rank, and lies where its shard lies", C, odd, odd_tied, tl::stories_15m) {
  for (const int ranks : {1, 2, 3, 7, 64}) {
    const auto p = tl::Partition::of(C{}, {}, ranks);
    REQUIRE(p.parts() == C::layers + 2);
    CHECK(p.size() == tl::parameter_count<C>());
    tl::index_t at = 0, own = 0, largest = 0;
    for (int i = 0; i < p.parts(); ++i) {
      CHECK(p.part(i).begin == at);
      CHECK(p.own_offset(i) == own);
      for (int r = 0; r < ranks; ++r) {
        CHECK(p.shard(i, r).begin == at);
        CHECK(p.shard(i, r).size() <= p.shards(i).chunk);
        at = p.shard(i, r).end;
      }
      CHECK(p.part(i).end == at);
      CHECK(p.shards(i).chunk % 16 == 0);
      own += p.shards(i).chunk, largest = std::max(largest, p.shards(i).chunk * ranks);
    }
    CHECK(p.own_size() == own);
    const auto sizes = tl::partition_sizes(C{}, ranks);
    CHECK(sizes.own == own);
    CHECK(sizes.largest_part == largest);
    CHECK(sizes.largest_shard == largest / ranks);
  }
}

TEST_CASE("partition: parts are the embedding, the blocks, and last norm and head") {
  const auto p = tl::Partition::of(tl::tinyllama_1b{}, {}, 8), tied = tl::Partition::of(odd_tied{}, {}, 2);
  CHECK(p.part(0).size() == 32000 * 2048);
  CHECK(p.part(1).size() == 2 * 2048 + 2048 * (2048 + 512 + 2048 + 3 * 5632));
  CHECK(p.part(23).size() == 2048 + 32000 * 2048);
  CHECK(tied.part(4).size() == 20);
  for (int ranks = 1; ranks <= 128; ranks *= 2)  // even, which NCCL likes
    for (int i = 0; i < p.parts(); ++i) CHECK(tl::Partition::of(tl::tinyllama_1b{}, {}, ranks).shards(i).chunk * ranks == p.part(i).size());
}

TEST_CASE("partition: of adapters, those of a layer are a part") {
  const tl::LoraOptions lora{.rank = 2, .slots = tl::AdapterSlots::every()};
  const auto p = tl::Partition::of(odd{}, lora, 3);
  CHECK(p.size() == tl::adapter_parameter_count(odd{}, lora));
  CHECK(p.part(0).empty());
  CHECK(p.part(4).empty());
  CHECK(p.part(1).size() == p.size() / 3);
}
