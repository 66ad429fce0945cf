// DataLoader: blocks once an epoch, shares of sources, ramps, ranks, resuming, held-out blocks, and data that is not sound.
#include "tinyllama/train/loader.hpp"

#include <doctest/doctest.h>

#include <algorithm>
#include <cmath>
#include <fstream>
#include <limits>
#include <map>
#include <numeric>
#include <set>

#include "tests/io/small_model.hpp"

namespace {

using namespace tinyllama;
using namespace tinyllama::test;
namespace fs = std::filesystem;

/// Source s: `blocks` blocks of T + 1 ids in files of three blocks. The ids tell where they stand: 1000 s + block, then their place.
DataSource make_source(const TempFolder& tmp, int s, std::int64_t blocks, std::int64_t T, double weight = 1) {
  const std::string prefix = "s" + std::to_string(s);
  PackedWriter writer(tmp.path(), prefix, 65000, {.block = T + 1, .chunk_blocks = 3});
  for (std::int64_t b = 0; b < blocks; ++b)
    for (std::int64_t t = 0; t <= T; ++t) writer.add(std::vector<std::int32_t>{static_cast<std::int32_t>(t == 0 ? 1000 * s + b : 60000 + t)});
  writer.finish();
  return {.files = packed_files(tmp.path(), prefix), .weight = weight};
}

struct Batch {
  std::vector<std::int32_t> inputs, targets;
  bool operator==(const Batch&) const = default;
};
Batch batch(const DataLoader& loader, std::int64_t step) {
  const auto n = static_cast<std::size_t>(loader.rows(step) * loader.tokens());
  Batch b{std::vector<std::int32_t>(n, -7), std::vector<std::int32_t>(n, -7)};
  loader.batch(step, b.inputs, b.targets);
  return b;
}
/// The first id of each row.
std::vector<std::int32_t> firsts(const DataLoader& loader, std::int64_t step) {
  const Batch b = batch(loader, step);
  std::vector<std::int32_t> ids;
  for (std::size_t i = 0; i < b.inputs.size(); i += static_cast<std::size_t>(loader.tokens())) ids.push_back(b.inputs[i]);
  return ids;
}
/// Rows of each source in steps [from, to).
std::vector<double> counts(const DataLoader& loader, std::int64_t from, std::int64_t to) {
  std::vector<double> n(loader.sources(), 0);
  for (std::int64_t t = from; t < to; ++t)
    for (std::int64_t r = 0; r < loader.global_rows(t); ++r) ++n[loader.locate(t, r).source];
  return n;
}

}  // namespace

TEST_CASE("loader: inputs, and targets shifted by one") {
  const TempFolder tmp;
  const DataLoader loader(make_source(tmp, 1, 7, 4), 2, {.tokens = 4});
  CHECK(loader.steps() == -1);
  CHECK(loader.blocks(0) == 7);
  for (std::int64_t step = 0; step < 9; ++step) {
    const Batch b = batch(loader, step);
    for (std::int64_t r = 0; r < 2; ++r) {
      const auto row = loader.locate(step, r);
      const std::vector<std::int32_t> ids{static_cast<std::int32_t>(1000 + row.block), 60001, 60002, 60003, 60004};
      CHECK(std::equal(ids.begin(), ids.end() - 1, b.inputs.begin() + r * 4));
      CHECK(std::equal(ids.begin() + 1, ids.end(), b.targets.begin() + r * 4));
      CHECK(row.file == static_cast<std::size_t>(row.block / 3));
      CHECK(row.position == row.block % 3 * 5);
    }
  }
}

TEST_CASE("loader: each block once an epoch, in another order each time, and another for another seed") {
  const TempFolder tmp;
  const DataSource source = make_source(tmp, 0, 20, 3);
  const auto epochs = [&](std::uint64_t seed) {
    const DataLoader loader(source, 3, {.tokens = 3, .seed = seed});
    std::vector<std::int32_t> all;
    for (std::int64_t step = 0; step < 20; ++step)  // 60 rows; epochs end inside steps
      for (const std::int32_t id : firsts(loader, step)) all.push_back(id);
    return all;
  };
  const auto a = epochs(1), b = epochs(2);
  CHECK(a == epochs(1));
  CHECK(a != b);
  std::set<std::vector<std::int32_t>> orders;
  for (int e = 0; e < 3; ++e) {
    std::vector<std::int32_t> epoch(a.begin() + 20 * e, a.begin() + 20 * (e + 1));
    orders.insert(epoch);
    std::sort(epoch.begin(), epoch.end());
    std::vector<std::int32_t> expected(20);
    std::iota(expected.begin(), expected.end(), 0);
    CHECK(epoch == expected);
  }
  CHECK(orders.size() == 3);
}

TEST_CASE("loader: every step is the same whenever it is asked for, whatever was before") {
  const TempFolder tmp;
  const std::vector<DataSource> sources{make_source(tmp, 0, 13, 3, 0.7), make_source(tmp, 1, 5, 3, 0.3)};
  const std::vector<DataStage> stages{{.steps = 10, .rows = 4}, {.steps = 20, .rows = 6, .weights = {1, 3}, .ramp_steps = 8}};
  const DataLoader loader(sources, stages, {.tokens = 3, .seed = 5});
  std::vector<Batch> forward;
  for (std::int64_t t = 0; t < 30; ++t) forward.push_back(batch(loader, t));
  for (std::int64_t t = 30; t-- > 0;) CHECK(batch(DataLoader(sources, stages, {.tokens = 3, .seed = 5}), t) == forward[static_cast<std::size_t>(t)]);
  CHECK(loader.steps() == 30);
  CHECK(loader.rows_before(0) == 0);
  CHECK(loader.rows_before(12) == 52);
  CHECK(loader.rows_before(30) == 160);
}

TEST_CASE("loader: draws of a source are gapless through stages and ramps: each epoch has each block once") {
  const TempFolder tmp;
  const std::vector<DataSource> sources{make_source(tmp, 0, 13, 1), make_source(tmp, 1, 4, 1), make_source(tmp, 2, 7, 1)};
  const std::vector<DataStage> stages{{.steps = 11, .rows = 3, .weights = {1, 0, 0}},
                                      {.steps = 40, .rows = 5, .weights = {75, 15, 10}, .ramp_steps = 17},
                                      {.rows = 8, .weights = {0, 1, 1}, .ramp_steps = 9}};
  const DataLoader loader(sources, stages, {.tokens = 1, .seed = 3});
  std::map<std::pair<std::size_t, std::int64_t>, std::multiset<std::int64_t>> seen;
  std::vector<std::int64_t> last(3, 0);
  for (std::int64_t t = 0; t < 200; ++t)
    for (std::int64_t r = 0; r < loader.global_rows(t); ++r) {
      const auto row = loader.locate(t, r);
      CHECK((row.epoch == last[row.source] || row.epoch == last[row.source] + 1));
      last[row.source] = row.epoch;
      seen[{row.source, row.epoch}].insert(row.block);
    }
  for (const auto& [key, blocks] : seen) {
    if (key.second == last[key.first]) continue;  // not finished
    std::multiset<std::int64_t> expected;
    for (std::int64_t b = 0; b < loader.blocks(key.first); ++b) expected.insert(b);
    CHECK(blocks == expected);
  }
  CHECK(last[1] > 20);
}

TEST_CASE("loader: sources by weight in every step, and linearly changing on a ramp") {
  const TempFolder tmp;
  const std::vector<DataSource> sources{make_source(tmp, 0, 9, 1, 0.693584), make_source(tmp, 1, 9, 1, 0.306416), make_source(tmp, 2, 9, 1, 0)};
  const std::vector<DataStage> stages{{.steps = 50, .rows = 100}, {.steps = 100, .rows = 200, .weights = {0.5, 0, 0.5}, .ramp_steps = 60}};
  const DataLoader loader(sources, stages, {.tokens = 1});
  for (std::int64_t t = 0; t < 50; ++t) {
    const auto n = counts(loader, t, t + 1);
    CHECK(std::abs(n[0] - 69.3584) <= 1);
    CHECK(n[2] == 0);
  }
  CHECK(std::abs(counts(loader, 0, 50)[0] - 3467.92) <= 1);
  for (std::int64_t t = 50; t < 150; ++t) {
    const double now = std::min(1.0, (static_cast<double>(t - 50) + 0.5) / 60);  // the middle of the step
    const auto n = counts(loader, t, t + 1);
    CAPTURE(t);
    CHECK(std::abs(n[0] - 200 * ((1 - now) * 0.693584 + now * 0.5)) <= 3);
    CHECK(std::abs(n[1] - 200 * (1 - now) * 0.306416) <= 3);
    CHECK(std::abs(n[2] - 200 * now * 0.5) <= 3);
  }
  CHECK(std::abs(counts(loader, 50, 110)[2] - 60 * 200 * 0.25) <= 2);
}

TEST_CASE("loader: ranks together see what one sees") {
  const TempFolder tmp;
  const std::vector<DataSource> sources{make_source(tmp, 0, 13, 2, 2), make_source(tmp, 1, 5, 2, 1)};
  const std::vector<DataStage> stages{{.steps = 6, .rows = 4}, {.steps = 6, .rows = 12}};
  const DataLoader one(sources, stages, {.tokens = 2, .seed = 9});
  for (std::int64_t t = 0; t < 12; ++t) {
    Batch together;
    for (int r = 0; r < 4; ++r) {
      const DataLoader loader(sources, stages, {.tokens = 2, .seed = 9, .rank = r, .ranks = 4});
      CHECK(loader.rows(t) * 4 == loader.global_rows(t));
      const Batch b = batch(loader, t);
      together.inputs.insert(together.inputs.end(), b.inputs.begin(), b.inputs.end());
      together.targets.insert(together.targets.end(), b.targets.begin(), b.targets.end());
      CHECK(loader.fingerprint() == one.fingerprint());
      loader.prefetch(t + 1);  // of the last step: nothing
    }
    CHECK(together == batch(one, t));
  }
}

TEST_CASE("loader: held-out blocks are never trained on, and are read in order") {
  const TempFolder tmp;
  DataSource source = make_source(tmp, 0, 11, 2);
  source.held_out_fraction = 0.2;  // 2.2 blocks: 3
  const DataLoader loader(source, 2, {.tokens = 2});
  CHECK(loader.blocks(0) == 8);
  REQUIRE(loader.held_out(0) == 3);
  for (std::int64_t t = 0; t < 40; ++t)
    for (const std::int32_t id : firsts(loader, t)) CHECK(id < 8);
  std::vector<std::int32_t> inputs(4), targets(4);
  loader.validation(0, 1, inputs, targets);
  CHECK(inputs == std::vector<std::int32_t>{9, 60001, 10, 60001});
  CHECK(targets == std::vector<std::int32_t>{60001, 60002, 60001, 60002});
  check_error([&] { loader.validation(0, 2, inputs, targets); }, {"the 3 held out", "2 from 2"});
  check_error([&] { loader.validation(0, -1, inputs, targets); }, {"2 from -1"});
  source.held_out_blocks = 11;
  const DataSource other = make_source(tmp, 1, 4, 2);
  const DataLoader only_validation({other, source}, {{.rows = 1, .weights = {1, 0}}}, {.tokens = 2});
  CHECK(only_validation.held_out(1) == 11);
  check_error([&] { DataLoader(source, 1, {.tokens = 2}); }, {"source 0", "at least one block to train on", "s0_0000000000.bin"});
  source.held_out_blocks = 12;
  check_error([&] { DataLoader(source, 1, {.tokens = 2}); }, {"held_out_blocks", "0 to 11", "found 12"});
}

TEST_CASE("loader: lit-gpt's padding is left out") {
  const TempFolder tmp;
  std::string file = std::string("LITPKDS") + raw<std::uint64_t>(1) + raw<std::uint8_t>(8) + raw<std::uint64_t>(400);
  for (int i = 0; i < 400; ++i) file += raw<std::uint16_t>(static_cast<std::uint16_t>(i < 115 ? 100 + i : 1));  // 11 blocks, half a block, padding
  std::ofstream(tmp / "train_0.bin", std::ios::binary) << file;
  const DataSource source{.files = packed_files(tmp.path(), "train")};
  const DataLoader loader(source, 11, {.tokens = 9});
  CHECK(loader.blocks(0) == 11);
  CHECK(DataLoader(source, 1, {.tokens = 9, .trust_ends = true}).blocks(0) == 40);
  const Batch b = batch(loader, 0);
  CHECK(std::count(b.inputs.begin(), b.inputs.end(), 1) + std::count(b.targets.begin(), b.targets.end(), 1) == 0);
}

TEST_CASE("loader: the fingerprint tells other data and other stages") {
  const TempFolder tmp;
  DataSource source = make_source(tmp, 0, 12, 2);
  const auto of = [&](std::vector<DataStage> stages, std::uint64_t seed = 1) {
    return DataLoader({source}, stages, {.tokens = 2, .seed = seed}).fingerprint();
  };
  const std::uint64_t first = of({{.steps = 10, .rows = 2}});
  CHECK(first == of({{.steps = 99, .rows = 2}}));
  CHECK(first != of({{.steps = 10, .rows = 4}}));
  CHECK(first != of({{.steps = 10, .rows = 2}}, 2));
  source.held_out_blocks = 1;
  CHECK(first != of({{.steps = 10, .rows = 2}}));
}

TEST_CASE("loader: data that is not sound is refused, with its name") {
  const TempFolder tmp;
  const DataSource good = make_source(tmp, 0, 4, 4);
  check_error([&] { DataLoader(good, 1, {.tokens = 5}); }, {"s0_0000000000.bin", "blocks of 6", "15 ids", "another block size"});
  check_error([&] { DataLoader(DataSource{}, 1); }, {"source 0", "no files"});
  check_error([&] { DataLoader(DataSource{.files = {tmp / "missing.bin"}}, 1); }, {"missing.bin"});
  const auto truncated = tmp / "t.bin";
  fs::copy_file(good.files[0], truncated);
  fs::resize_file(truncated, fs::file_size(truncated) - 3);
  check_error([&] { DataLoader(DataSource{.files = {good.files[0], truncated}}, 1, {.tokens = 4}); }, {"t.bin", "truncated"});

  const DataLoader checked(good, 4, {.tokens = 4, .vocab = 60004});
  check_error([&] { batch(checked, 0); }, {"s0_000000000", ".bin: token ", "0 to 60003", "found 60004"});
  const DataLoader unchecked(good, 4, {.tokens = 4});
  CHECK(batch(unchecked, 0).targets.size() == 16);
}

TEST_CASE("loader: wrong options, steps and spans are refused") {
  const TempFolder tmp;
  const DataSource s = make_source(tmp, 0, 4, 2);
  using Stages = std::vector<DataStage>;
  const auto refused = [&](Stages stages, DataLoaderOptions o, std::initializer_list<std::string_view> words) {
    check_error([&] { DataLoader({s}, stages, o); }, words);
  };
  const DataStage stage{.steps = 5, .rows = 2};
  const auto with = [&](auto change) { DataStage x = stage; change(x); return x; };
  refused({}, {.tokens = 2}, {"stages", "none"});
  refused({stage}, {.tokens = 0}, {"tokens"});
  refused({stage}, {.tokens = 2, .rank = 2, .ranks = 2}, {"rank", "0 to 1", "found 2"});
  refused({stage}, {.tokens = 2, .ranks = 3}, {"stage 0: rows", "a multiple of 3", "found 2"});
  refused({with([](auto& x) { x.steps = 0; }), stage}, {.tokens = 2}, {"stage 0: steps", "found 0"});
  refused({with([](auto& x) { x.rows = 0; })}, {.tokens = 2}, {"stage 0: rows", "found 0"});
  refused({with([](auto& x) { x.ramp_steps = 1; })}, {.tokens = 2}, {"stage 0: ramp_steps", "first stage"});
  refused({stage, with([](auto& x) { x.ramp_steps = 6; })}, {.tokens = 2}, {"stage 1: ramp_steps", "found 6"});
  refused({with([](auto& x) { x.weights = {1, 2}; })}, {.tokens = 2}, {"stage 0: weights", "1, one a source", "found 2"});
  refused({with([](auto& x) { x.weights = {-1}; })}, {.tokens = 2}, {"weights", "found -1"});
  refused({with([](auto& x) { x.weights = {std::nan("")}; })}, {.tokens = 2}, {"weights", "nan"});
  refused({with([](auto& x) { x.weights = {0}; })}, {.tokens = 2}, {"one above 0"});

  const DataLoader loader({s}, {stage}, {.tokens = 2});
  check_error([&] { batch(loader, 5); }, {"step", "0 to 4", "found 5"});
  check_error([&] { batch(loader, -1); }, {"step", "found -1"});
  check_error([&] { (void)loader.locate(0, 2); }, {"row", "0 to 1"});
  std::vector<std::int32_t> four(4), three(3);
  check_error([&] { loader.batch(0, four, three); }, {"inputs and targets", "2 x 2", "4 and 3"});
  const DataLoader endless(s, 1, {.tokens = 2});
  CHECK(firsts(endless, std::int64_t{1} << 40).size() == 1);
  check_error([&] { batch(endless, std::numeric_limits<std::int64_t>::max()); }, {"step"});
}
