// DataLoader: batches of token ids from packed files as a pure function of the step, so that training resumes anywhere at once.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <filesystem>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "tinyllama/train/data_order.hpp"
#include "tinyllama/train/packed.hpp"

namespace tinyllama {

// Which block is row r of step t, without any history:
//   1. Rows are numbered through all steps. A stage deals its rows to the sources so that, of its first n rows, each source has its share of n
//      to within a few rows, for every n: rounded cumulative sums, a closed form. While the weights ramp, the same closed form first deals
//      rows to the old and the new mix. So the how-manieth row of its source a row is follows from its number.
//   2. A source's blocks come in an order that a keyed permutation gives for each epoch (a Feistel network): O(1), no table, all of the
//      source mixed. lit-gpt shuffles within 8 files, which mixes only what stands close; reading in order is not needed: a block is
//      some 4 KB for 2048 tokens of training, fewer random reads a second than any disk serves, and prefetch() hides them.
// All of it is integer arithmetic (weights become multiples of 2^-32 first): the order is the same on every machine, and a part of
// the file format of training checkpoints. Change it, and change `order_version`.

/// Blocks of one kind of text.
struct DataSource {
  std::vector<std::filesystem::path> files = {};  // packed_files(folder, prefix)
  double weight = 1;                              // for stages that name no weights
  double held_out_fraction = 0;                   // of the blocks, the last ones, for validation; rounded up
  std::int64_t held_out_blocks = 0;               // or a number; the larger counts
};

/// A stretch of training with one mix and one batch size.
struct DataStage {
  std::int64_t steps = 0;            // 0, in the last stage: without end
  std::int64_t rows = 1;             // sequences of a step over all ranks: micro-batch x accumulation x ranks
  std::vector<double> weights = {};  // [sources], of the rows, need not sum to 1; empty: the sources' own
  std::int64_t ramp_steps = 0;       // so many steps lead linearly from the mix of the stage before to this one
};

struct DataLoaderOptions {
  std::int64_t tokens = 2048;  // T: a block is T + 1 ids
  std::uint64_t seed = 0;
  int rank = 0, ranks = 1;  // this process gets rows [rank, rank + 1) * rows / ranks of each step
  int vocab = 0;            // ids of a batch are checked to be below; 0: they are not
  bool trust_ends = false;  // false: blocks that reach into a run of 32 or more equal ids at a file's end, lit-gpt's padding, are left out
};

/// Immutable; any number of threads may read batches.
class DataLoader {
 public:
  static constexpr std::uint64_t order_version = 1;

  /// Where a row comes from.
  struct Row {
    std::size_t source, file;     // index in the source's files
    std::int64_t epoch, block;    // how often the source has been read whole before; number of the block within the source
    std::int64_t position;        // of the block's first id in its file
  };

  /// Maps all files. Throws Error where one is not sound, has another block size, or a source with weight has no block to train on.
  /// The system limits how many files a process may map, on Linux to about 65,000: make larger files for more data.
  DataLoader(const std::vector<DataSource>& sources, const std::vector<DataStage>& stages, DataLoaderOptions options = {}) : options_(options) {
    if (options_.tokens < 1) throw wrong("tokens", "at least 1", options_.tokens);
    if (options_.ranks < 1) throw wrong("ranks", "at least 1", options_.ranks);
    if (options_.rank < 0 || options_.rank >= options_.ranks) throw wrong("rank", "0 to " + std::to_string(options_.ranks - 1), options_.rank);
    if (options_.vocab < 0) throw wrong("vocab", "a size, or 0", options_.vocab);
    if (sources.empty()) throw Error("DataLoader", "sources", "at least one", "none");
    if (stages.empty()) throw Error("DataLoader", "stages", "at least one", "none");
    for (const DataSource& s : sources) open(s);
    for (std::size_t i = 0; i < stages.size(); ++i) plan(stages[i], i, i + 1 == stages.size(), sources);
  }
  /// One source, one batch size, without end.
  DataLoader(const DataSource& source, std::int64_t rows, DataLoaderOptions options = {})
      : DataLoader(std::vector<DataSource>{source}, std::vector<DataStage>{{.rows = rows}}, options) {}

  /// Steps of all stages, or -1: without end.
  std::int64_t steps() const { return stages_.back().steps == 0 ? -1 : stages_.back().first_step + stages_.back().steps; }
  /// Sequences of a step, over all ranks and of this one.
  std::int64_t global_rows(std::int64_t step) const { return stage_of(step).rows; }
  std::int64_t rows(std::int64_t step) const { return stage_of(step).rows / options_.ranks; }
  /// Sequences, over all ranks, of all steps before this one. Times T: tokens trained on.
  std::int64_t rows_before(std::int64_t step) const {
    const Plan& p = step == steps() ? stages_.back() : stage_of(step);
    return p.first_row + (step - p.first_step) * p.rows;
  }
  std::int64_t tokens() const { return options_.tokens; }

  std::size_t sources() const { return sources_.size(); }
  std::int64_t blocks(std::size_t source) const { return sources_.at(source).train; }              // to train on, in an epoch
  std::int64_t held_out(std::size_t source) const { return sources_.at(source).blocks() - blocks(source); }

  /// inputs[r][t], targets[r][t] = the id after it; both [rows(step), T], row by row. A function of the step alone. Allocates nothing.
  /// Throws Error for a step outside the stages, spans of another size, or an id outside the vocabulary, naming file and position.
  void batch(std::int64_t step, std::span<std::int32_t> inputs, std::span<std::int32_t> targets) const {
    const std::int64_t n = rows(step);
    check_spans(n, inputs, targets);
    for (std::int64_t r = 0; r < n; ++r) {
      const Row row = locate(step, options_.rank * n + r);
      copy(sources_[row.source], row, r, inputs, targets);
    }
  }

  /// Asks the system to read a later step's blocks while this one is computed. A step after the last is none.
  void prefetch(std::int64_t step) const {
    if (step == steps()) return;
    const std::int64_t n = rows(step);
    for (std::int64_t r = 0; r < n; ++r) {
      const Row row = locate(step, options_.rank * n + r);
      sources_[row.source].files[row.file].prefetch(row.position, options_.tokens + 1);
    }
  }

  /// Where row `row` of [0, global_rows(step)) comes from.
  Row locate(std::int64_t step, std::int64_t row) const {
    const Plan& p = stage_of(step);
    if (row < 0 || row >= p.rows) throw wrong("row", "0 to " + std::to_string(p.rows - 1), row);
    const auto i = static_cast<std::uint64_t>((step - p.first_step) * p.rows + row);
    const std::uint64_t now = p.of_new(i), before = i - now;
    const bool is_new = p.of_new(i + 1) > now;
    const std::size_t s = is_new ? p.now.source(now) : p.before.source(before);
    const auto draw = static_cast<std::int64_t>(p.count(i, s)) + p.drawn[s];
    const Source& source = sources_[s];
    const std::int64_t epoch = draw / source.train;
    const std::uint64_t key = detail::mix_bits(detail::mix_bits(options_.seed, s), static_cast<std::uint64_t>(epoch));
    return at_block(s, epoch, detail::permuted(draw % source.train, source.train, key));
  }

  /// Held-out blocks first, first + 1 ... of a source in the order of its files, as many as the spans have rows [n, T]. The first of them may
  /// begin inside a document whose beginning was trained on; data that was packed apart has no such seam.
  void validation(std::size_t source, std::int64_t first, std::span<std::int32_t> inputs, std::span<std::int32_t> targets) const {
    const auto n = static_cast<std::int64_t>(inputs.size()) / options_.tokens;
    check_spans(n, inputs, targets);
    if (first < 0 || first > held_out(source) || n > held_out(source) - first)
      throw Error("DataLoader", "validation", "rows inside the " + std::to_string(held_out(source)) + " held out",
                  std::to_string(n) + " from " + std::to_string(first));
    for (std::int64_t r = 0; r < n; ++r) copy(sources_[source], at_block(source, 0, blocks(source) + first + r), r, inputs, targets);
  }

  /// A number that changes with whatever changes the order of the data up to the end: seed, T, blocks, stages; not with the number of ranks,
  /// nor with the length of the last stage. Kept in a checkpoint, it tells whether resuming goes on with the same data.
  std::uint64_t fingerprint() const {
    std::uint64_t h = detail::mix_bits(order_version, options_.seed);
    const auto add = [&](std::uint64_t x) { h = detail::mix_bits(h, x); };
    add(static_cast<std::uint64_t>(options_.tokens));
    for (const Source& s : sources_) {
      add(static_cast<std::uint64_t>(s.train));
      for (const std::int64_t end : s.ends) add(static_cast<std::uint64_t>(end));
    }
    for (const Plan& p : stages_) {
      add(static_cast<std::uint64_t>(p.first_step)), add(static_cast<std::uint64_t>(p.rows)), add(p.ramp);
      for (const std::uint64_t share : p.now.shares()) add(share);
    }
    return h;
  }

 private:
  struct Source {
    std::vector<PackedFile> files;
    std::vector<std::int64_t> ends;  // [files] blocks up to the end of each
    std::int64_t train = 0;          // blocks to train on: the first ones
    std::int64_t blocks() const { return ends.empty() ? 0 : ends.back(); }
  };
  struct Plan {
    std::int64_t first_step = 0, steps = 0, first_row = 0, rows = 1;
    std::uint64_t ramp = 0;  // rows
    detail::Deal before, now;
    std::vector<std::int64_t> drawn;  // [sources] rows in the stages before

    /// Of the stage's first n rows, how many come from the new mix. On the ramp its share of row i is i / ramp, and the sum n^2 / (2 ramp).
    std::uint64_t of_new(std::uint64_t n) const {
      const std::uint64_t on_ramp = std::min(n, ramp);
      return (on_ramp > 0 ? (on_ramp * on_ramp + ramp) / (2 * ramp) : 0) + (n - on_ramp);
    }
    std::uint64_t count(std::uint64_t n, std::size_t source) const {
      const std::uint64_t k = of_new(n);
      return now.count(k, source) + (n > k ? before.count(n - k, source) : 0);
    }
  };

  static constexpr std::int64_t most_rows = std::int64_t{1} << 50;  // of a stage

  static Error wrong(std::string_view what, std::string_view expected, std::int64_t found) {
    return {"DataLoader", what, expected, std::to_string(found)};
  }

  void open(const DataSource& given) {
    const std::string name = "source " + std::to_string(sources_.size());
    Source s;
    const std::int64_t block = options_.tokens + 1;
    for (const auto& path : given.files) {
      const PackedFile& file = s.files.emplace_back(path);
      if (file.size() % block != 0)
        throw Error(path.string(), "size", "blocks of " + std::to_string(block) + " ids: T and the one after",
                    std::to_string(file.size()) + " ids: packed with another block size");
      std::int64_t end = file.size();
      if (const std::int64_t run = options_.trust_ends ? 0 : file.trailing_run(); run >= 32) end -= run;
      s.ends.push_back(s.blocks() + end / block);
      file.expect_random_reads();
    }
    if (!(given.held_out_fraction >= 0 && given.held_out_fraction <= 1))
      throw Error("DataLoader", name + ": held_out_fraction", "0 to 1", std::to_string(given.held_out_fraction));
    const auto part = static_cast<std::int64_t>(std::ceil(given.held_out_fraction * static_cast<double>(s.blocks())));
    const std::int64_t held = std::max(part, given.held_out_blocks);
    if (given.held_out_blocks < 0 || held > s.blocks())
      throw wrong(name + ": held_out_blocks", "0 to " + std::to_string(s.blocks()), given.held_out_blocks);
    s.train = s.blocks() - held;
    sources_.push_back(std::move(s));
  }

  void plan(const DataStage& stage, std::size_t index, bool last, const std::vector<DataSource>& sources) {
    const std::string name = "stage " + std::to_string(index);
    constexpr std::int64_t most = std::int64_t{1} << 31;  // its square, of rows on the ramp, fits
    if (stage.steps < 0 || (stage.steps == 0 && !last)) throw wrong(name + ": steps", "at least 1; 0, without end, in the last stage", stage.steps);
    if (stage.rows < 1 || stage.rows > most) throw wrong(name + ": rows", "1 to " + std::to_string(most), stage.rows);
    if (stage.rows % options_.ranks != 0) throw wrong(name + ": rows", "a multiple of " + std::to_string(options_.ranks) + " ranks", stage.rows);
    if (stage.ramp_steps < 0 || (stage.steps > 0 && stage.ramp_steps > stage.steps) || stage.ramp_steps > most / stage.rows)
      throw wrong(name + ": ramp_steps", "0 to the stage's steps, and at most " + std::to_string(most / stage.rows), stage.ramp_steps);
    if (stage.ramp_steps > 0 && index == 0) throw wrong(name + ": ramp_steps", "0 in the first stage, which follows no other", stage.ramp_steps);
    if (stage.steps > most_rows / stage.rows) throw wrong(name + ": steps", "at most 2^50 rows", stage.steps);

    std::vector<double> weights = stage.weights;
    if (weights.empty())
      for (const DataSource& s : sources) weights.push_back(s.weight);
    if (weights.size() != sources.size())
      throw Error("DataLoader", name + ": weights", std::to_string(sources.size()) + ", one a source", std::to_string(weights.size()));
    double sum = 0;
    for (std::size_t s = 0; s < weights.size(); ++s) {
      if (!(weights[s] >= 0 && weights[s] <= 1e12)) throw Error("DataLoader", name + ": weights", "0 to 1e12", std::to_string(weights[s]));
      if (weights[s] > 0 && sources_[s].train == 0) throw no_data(s, sources[s]);
      sum += weights[s];
    }
    if (!(sum > 0)) throw Error("DataLoader", name + ": weights", "one above 0", "none");

    Plan p;
    p.steps = stage.steps, p.rows = stage.rows, p.ramp = static_cast<std::uint64_t>(stage.ramp_steps * stage.rows);
    p.now = detail::Deal(weights);
    p.drawn.assign(sources.size(), 0);
    if (index > 0) {
      const Plan& b = stages_.back();
      p.first_step = b.first_step + b.steps;
      p.first_row = b.first_row + b.steps * b.rows;
      p.before = b.now;
      const auto n = static_cast<std::uint64_t>(b.steps * b.rows);
      for (std::size_t s = 0; s < sources.size(); ++s) p.drawn[s] = b.drawn[s] + static_cast<std::int64_t>(b.count(n, s));
    }
    stages_.push_back(std::move(p));
  }

  static Error no_data(std::size_t s, const DataSource& source) {
    const std::string where = source.files.empty() ? "DataLoader" : source.files.front().string();
    return {where, "source " + std::to_string(s), "at least one block to train on",
            source.files.empty() ? "no files" : "none in " + std::to_string(source.files.size()) + " files, less what is held out"};
  }

  const Plan& stage_of(std::int64_t step) const {
    if (step < 0 || (steps() >= 0 && step >= steps()))
      throw wrong("step", steps() < 0 ? "at least 0" : "0 to " + std::to_string(steps() - 1), step);
    const auto after = std::upper_bound(stages_.begin(), stages_.end(), step, [](std::int64_t t, const Plan& p) { return t < p.first_step; });
    const Plan& p = *(after - 1);
    if (step - p.first_step >= most_rows / p.rows) throw wrong("step", "at most 2^50 rows", step);
    return p;
  }

  Row at_block(std::size_t source, std::int64_t epoch, std::int64_t block) const {
    const auto& ends = sources_[source].ends;
    const auto file = std::upper_bound(ends.begin(), ends.end(), block) - ends.begin();
    const std::int64_t in_file = block - (file > 0 ? ends[static_cast<std::size_t>(file - 1)] : 0);
    return {.source = source, .file = static_cast<std::size_t>(file), .epoch = epoch, .block = block, .position = in_file * (options_.tokens + 1)};
  }

  void check_spans(std::int64_t rows, std::span<std::int32_t> inputs, std::span<std::int32_t> targets) const {
    const auto n = static_cast<std::size_t>(rows * options_.tokens);
    if (inputs.size() == n && targets.size() == n) return;
    throw Error("DataLoader", "inputs and targets", std::to_string(rows) + " x " + std::to_string(options_.tokens) + " ids each",
                std::to_string(inputs.size()) + " and " + std::to_string(targets.size()));
  }

  void copy(const Source& source, const Row& row, std::int64_t r, std::span<std::int32_t> inputs, std::span<std::int32_t> targets) const {
    const PackedFile& file = source.files[row.file];
    if (options_.vocab > 0) file.check_ids(row.position, options_.tokens + 1, options_.vocab);
    const auto at = static_cast<std::size_t>(r * options_.tokens), n = static_cast<std::size_t>(options_.tokens);
    file.read(row.position, inputs.subspan(at, n));
    file.read(row.position + 1, targets.subspan(at, n));
  }

  DataLoaderOptions options_;
  std::vector<Source> sources_;
  std::vector<Plan> stages_;
};

}  // namespace tinyllama
