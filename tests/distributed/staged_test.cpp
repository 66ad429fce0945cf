// Staged: every operation gives what the communicator below it gives, several at once, with a device whose memory stands apart from what the communicator sees.
#include "tinyllama/distributed/staged.hpp"

#include <doctest/doctest.h>

#include <algorithm>
#include <cstring>
#include <vector>

#include "tests/distributed/thread_ranks.hpp"

namespace {

using namespace tinyllama;
using namespace tinyllama::test;

/// What Staged asks of a device.
struct Apart {
  struct Staging {
    std::vector<std::byte> memory;
    std::byte* reserve(std::size_t bytes) {
      memory.resize(std::max(memory.size(), bytes));
      return memory.data();
    }
  };
  void upload(void* to, const void* from, std::size_t bytes) const { std::memcpy(to, from, bytes); }
  void download(void* to, const void* from, std::size_t bytes) const { std::memcpy(to, from, bytes); }
};
static_assert(Communicator<Staged<ThreadRank, Apart>>);

void expect_all(const std::vector<float>& found, float value, const char* what) {
  if (!std::all_of(found.begin(), found.end(), [&](float x) { return x == value; })) throw Error(what, "elements", std::to_string(value), "another");
}

}  // namespace

TEST_CASE("staged: all operations, several under way, their rooms used again") {
  for (const int ranks : {1, 2, 3})
    on_ranks(ranks, [&](ThreadRank& m) {
      constexpr index_t n = 40;  // the last of 3 shards is shorter
      const Apart dev;
      Staged<ThreadRank, const Apart> staged(m, dev);
      const Shards shards = shards_of(n, ranks);
      const auto all = static_cast<float>(ranks * (ranks + 1) / 2);
      for (int round = 0; round < 2; ++round) {
        std::vector<float> sum(n, static_cast<float>(m.rank() + 1)), sent(n, static_cast<float>(m.rank())), part(static_cast<std::size_t>(shards.of(m.rank()).size())), gathered(n);
        const std::vector<float> twos(n, 2.0f);
        auto a = staged.start_all_reduce(sum.data(), n, Format::f32, Reduction::sum, "sum");
        auto b = staged.start_broadcast(sent.data(), n, Format::f32, ranks - 1, "sent");
        auto c = staged.start_reduce_scatter(part.data(), twos.data(), shards, Format::f32, Reduction::sum, "part");
        expect_all(sum, static_cast<float>(m.rank() + 1), "before the wait");
        staged.wait(c), staged.wait(a), staged.wait(b), staged.wait(a);
        expect_all(sum, all, "all_reduce"), expect_all(sent, static_cast<float>(ranks - 1), "broadcast"), expect_all(part, static_cast<float>(2 * ranks), "reduce_scatter");
        auto d = staged.start_all_gather(gathered.data(), part.data(), shards, Format::f32, "gathered");
        staged.wait(d);
        expect_all(gathered, static_cast<float>(2 * ranks), "all_gather");
      }
    });
}
