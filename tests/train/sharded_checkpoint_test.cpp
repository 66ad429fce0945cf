// Sharded checkpoints: whatever was shared among however many ranks goes on among any other number; and what is damaged, missing or of another cut is
// refused by name.
#include "tinyllama/train/sharded_checkpoint.hpp"

#include <doctest/doctest.h>

#include <random>

#include "tests/distributed/thread_ranks.hpp"
#include "tests/support.hpp"
#include "tinyllama/distributed/parallel.hpp"

namespace {

using namespace tinyllama;
using namespace tinyllama::test;
namespace fs = std::filesystem;

struct small : llama_defaults {
  static constexpr int layers = 2, hidden = 40, heads = 4, kv_heads = 2, ffn = 56, vocab = 30, context = 16;
};
constexpr index_t T = 8;

TrainerOptions how() { return {.peak_lr = 3e-3f, .precision = Precision::f32, .tokens = T, .seed = 5}; }

std::vector<std::int32_t> ids(std::uint32_t seed) {
  std::mt19937 random(seed);
  std::vector<std::int32_t> all(6 * T);
  for (auto& id : all) id = static_cast<std::int32_t>(random() % small::vocab);
  return all;
}

/// All that a training is, whole.
struct State {
  std::vector<float> weights, first, second;
  std::int64_t step = 0;
  bool operator==(const State&) const = default;
};
State state_of(Trainer<small>& t) { return {t.whole(t.weights()), t.whole(t.first_moment()), t.whole(t.second_moment()), t.steps()}; }

/// f(trainer) on each rank.
template <class F>
void on_trainers(int ranks, Sharding sharding, F&& f) {
  on_ranks(ranks, [&](ThreadRank& m) {
    Cpu dev({.threads = 1, .kernels = nullptr});
    Parallel<Cpu, ThreadRank> peers(m, {.sharding = sharding});
    Trainer<small> t(dev, how(), {}, &peers);
    f(t, m.rank());
  });
}
State train_and_save(const fs::path& root, int ranks, Sharding sharding, const SaveCheckpointOptions& options = {}) {
  State state;
  on_trainers(ranks, sharding, [&](Trainer<small>& t, int rank) {
    const auto inputs = ids(1), targets = ids(2);
    const std::size_t first = 6 * static_cast<std::size_t>(rank) / static_cast<std::size_t>(ranks) * T, end = 6 * static_cast<std::size_t>(rank + 1) / static_cast<std::size_t>(ranks) * T;
    for (int i = 0; i < 3; ++i) t.step(std::span(inputs).subspan(first, end - first), std::span(targets).subspan(first, end - first));
    const fs::path folder = save_sharded_checkpoint(root, t, "{\"note\": 7}", options);
    const State s = state_of(t);
    if (rank == 0) state = s;
    if (folder != root / "step-00000003") throw Error("another folder");
  });
  return state;
}
/// What rank 0 has behind loading.
State load(const fs::path& folder, int ranks, Sharding sharding) {
  State state;
  on_trainers(ranks, sharding, [&](Trainer<small>& t, int rank) {
    if (load_sharded_checkpoint(folder, t) != "{\"note\":7}") throw Error("another state");
    const State s = state_of(t);
    if (rank == 0) state = s;
  });
  return state;
}

std::string refusal(const fs::path& folder, int ranks = 1) {
  try {
    load(folder, ranks, Sharding::fsdp);
  } catch (const Error& e) {
    return e.what();
  }
  return "none";
}


}  // namespace

TEST_CASE("sharded checkpoint: saved by 1 to 4 ranks, loaded by 1 to 4, whatever they share") {
  constexpr Sharding shardings[] = {Sharding::ddp, Sharding::zero1, Sharding::fsdp};
  for (const Sharding saved : shardings)
    for (const int ranks : {1, 2, 4}) {
      const TempFolder tmp;
      const State expected = train_and_save(tmp.path(), ranks, saved);
      const auto newest = latest_checkpoint(tmp.path());
      REQUIRE(newest);
      for (const Sharding loaded : shardings)
        for (const int others : {1, 3, 4}) {
          CAPTURE(ranks);
          CAPTURE(others);
          CHECK(load(*newest, others, loaded) == expected);
        }
      // A trainer that is alone, too; and a reader of models.
      Cpu dev({.threads = 1, .kernels = nullptr});
      Trainer<small> t(dev, how());
      load_sharded_checkpoint(*newest, t);
      CHECK(state_of(t) == expected);
      std::vector<float> model(expected.weights.size());
      read_flat(open_checkpoint(*newest), model);
      CHECK(model == expected.weights);
    }
}

TEST_CASE("sharded checkpoint: one of a single process, and one whose model is rounded") {
  const TempFolder tmp;
  Cpu dev({.threads = 1, .kernels = nullptr});
  Trainer<small> t(dev, how());
  t.step(ids(1), ids(2));
  const std::vector<NamedArray> arrays{{"first_moment", t.first_moment()}, {"second_moment", t.second_moment()}};
  const auto folder = save_checkpoint(tmp / "one", 1, describe<small>(), t.weights(), arrays, "{\"note\": 7}");
  CHECK(load(folder, 3, Sharding::fsdp) == state_of(t));

  const State expected = train_and_save(tmp / "rounded", 2, Sharding::fsdp, {.format = Format::bf16});
  CHECK(load(tmp / "rounded" / "step-00000003", 3, Sharding::zero1) == expected);
}

TEST_CASE("sharded checkpoint: older ones go, and nothing half done stays") {
  const TempFolder tmp;
  for (int i = 0; i < 2; ++i) train_and_save(tmp.path(), 2, Sharding::fsdp, {.keep = 1});
  int entries = 0;
  for (const auto& e : fs::directory_iterator(tmp.path())) entries += !e.path().empty();
  CHECK(entries == 1);
  // One rank cannot write: all throw, and what was there is there.
  const auto before = read_file(tmp / "step-00000003" / "training_state.json");
  CHECK_THROWS_AS(on_trainers(2, Sharding::fsdp,
                              [&](Trainer<small>& trainer, int) {
                                trainer.resume(3);
                                save_sharded_checkpoint(tmp.path(), trainer, "{}", {.tokenizer = tmp / "nowhere" / "tokenizer.model"});
                              }),
                  Error);
  CHECK(read_file(tmp / "step-00000003" / "training_state.json") == before);
  CHECK(list_checkpoints(tmp.path()).size() == 1);
}

TEST_CASE("sharded checkpoint: damaged, missing and foreign parts are refused by name") {
  const TempFolder tmp;
  train_and_save(tmp.path(), 2, Sharding::zero1);
  const fs::path good = tmp / "step-00000003";
  CHECK(refusal(good) == "none");
  const auto changed = [&](auto&& change, int ranks = 1) {
    const fs::path bad = tmp / "bad";
    fs::remove_all(bad);
    fs::copy(good, bad, fs::copy_options::recursive);
    change(bad);
    return refusal(bad, ranks);
  };
  const std::string second = "training_state-00002-of-00002.safetensors";
  CHECK(changed([&](const fs::path& p) { fs::remove(p / second); }).find(second + ": expected a readable file") != std::string::npos);
  CHECK(changed([&](const fs::path& p) {
          std::string bytes = read_file(p / second);
          bytes[bytes.size() - 30] ^= 1;
          write_file(p / second, bytes);
        }).find("the file was damaged") != std::string::npos);
  CHECK(changed([&](const fs::path& p) {
          std::string bytes = read_file(p / "model.safetensors");
          bytes[bytes.size() - 30] ^= 1;
          write_file(p / "model.safetensors", bytes);
        }, 3).find("the file was damaged") != std::string::npos);
  const auto in_json = [&](const std::string& what, const std::string& with) {
    return changed([&](const fs::path& p) {
      std::string text = read_file(p / "training_state.json");
      const auto at = text.find(what);
      REQUIRE(at != std::string::npos);
      write_file(p / "training_state.json", text.replace(at, what.size(), with));
    });
  };
  CHECK(in_json("\"ranks\": 2", "\"ranks\": 3").find("checksums of shards") != std::string::npos);
  CHECK(in_json("\"ranks\": 2", "\"ranks\": -2").find("ranks: expected ") != std::string::npos);
  CHECK(in_json("\"chunks\": [", "\"chunks\": [99999999999999, ").find("shards: expected ranks") != std::string::npos);
  CHECK(in_json("\"parts\": [", "\"parts\": [1, ").find("shards: expected ranks") != std::string::npos);
  CHECK(in_json("\"step\": 3", "\"step\": -3").find("step: expected 0 or more") != std::string::npos);
  CHECK(in_json("training state 1", "training state 9").find("format: expected ") != std::string::npos);
  CHECK(changed([&](const fs::path& p) {
          std::string text = read_file(p / "config.json");
          const std::string what = "\"num_hidden_layers\": 2";
          REQUIRE(text.find(what) != std::string::npos);
          write_file(p / "config.json", text.replace(text.find(what), what.size(), "\"num_hidden_layers\": 3"));
        }).find("num_hidden_layers: expected 2") != std::string::npos);
}

// Any byte of the JSON changed: an Error, or (in a note, in a number that says the same) the state as it was.
TEST_CASE("sharded checkpoint: a changed JSON is an Error or changes nothing") {
  const TempFolder tmp;
  const State expected = train_and_save(tmp.path(), 2, Sharding::fsdp);
  const fs::path json = tmp / "step-00000003" / "training_state.json";
  const std::string good = read_file(json);
  std::mt19937 random(3);
  int refused = 0;
  for (int i = 0; i < 400; ++i) {
    std::string bad = good;
    const std::size_t at = random() % bad.size();
    if (i % 3 == 0) bad[at] = static_cast<char>(random() % 256);
    else if (i % 3 == 1) bad.erase(at, 1 + random() % 40);
    else bad.insert(at, 1, "0123456789[]{},\"-"[random() % 17]);
    write_file(json, bad);
    Cpu dev({.threads = 1, .kernels = nullptr});
    Trainer<small> t(dev, how());
    try {
      load_sharded_checkpoint(tmp / "step-00000003", t);
      State found = state_of(t);
      found.step = expected.step;
      CHECK_MESSAGE(found == expected, "at " << at);
    } catch (const Error&) {
      ++refused;
    }
  }
  CHECK(refused > 200);
}
