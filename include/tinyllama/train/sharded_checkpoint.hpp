// Checkpoints of several ranks, which load on any number of them: the folder of checkpoint.hpp, where each rank writes the optimizer state of its shards.
//
//   ROOT/step-00001234/model.safetensors ...             as ever: what reads a model reads it
//                      training_state-00001-of-00004.safetensors   of each rank: its shards of each array, one behind the other
//                      training_state.json               also how the flat arrays were cut: {"shards": {"ranks": 4, "parts": [..], "chunks": [..]}}
#pragma once

#include <map>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "tinyllama/train/checkpoint.hpp"
#include "tinyllama/train/stored_state.hpp"
#include "tinyllama/train/trainer.hpp"

namespace tinyllama {

namespace detail {

/// f() on each rank; where one of them fails, all do: with its own Error, or with one that says so.
template <class D, class F>
void together(Peers<D>& peers, const std::filesystem::path& where, F&& f) {
  std::exception_ptr error;
  try {
    f();
  } catch (...) {
    error = std::current_exception();
  }
  double failures = error ? 1 : 0;
  peers.sum({&failures, 1});
  if (error) std::rethrow_exception(error);
  if (failures > 0) throw Error(where.string(), "checkpoint", "all ranks to do their part", std::to_string(static_cast<int>(failures)) + " that could not");
}

/// Each rank's text.
template <class D>
std::vector<std::string> exchange(Peers<D>& peers, const std::string& mine) {
  std::vector<std::string> all(static_cast<std::size_t>(peers.ranks()));
  for (int r = 0; r < peers.ranks(); ++r) {
    std::string& text = all[static_cast<std::size_t>(r)];
    if (r == peers.rank()) text = mine;
    auto size = static_cast<std::uint64_t>(text.size());
    peers.broadcast(std::as_writable_bytes(std::span(&size, 1)), r);
    text.resize(static_cast<std::size_t>(size));
    peers.broadcast(std::as_writable_bytes(std::span(text.data(), text.size())), r);
  }
  return all;
}

/// f(flat interval, place in `array`) for what a trainer's array holds: all of it, or this rank's shards.
template <Config C, class D, class F>
void each_interval(const Trainer<C, D>& trainer, std::span<float> array, F&& f) {
  const Partition& p = trainer.partition();
  if (static_cast<index_t>(array.size()) == p.size()) return f(Interval{0, p.size()}, array.data());
  for (int i = 0; i < p.parts(); ++i)
    if (const Interval mine = p.shard(i, trainer.peers()->rank()); !mine.empty()) f(mine, array.data() + p.own_offset(i));
}

/// This rank's shards of an array, one behind the other, for the host.
template <Config C, class D>
std::vector<float> own_shards(const Trainer<C, D>& trainer, std::span<float> array) {
  const Partition& p = trainer.partition();
  const bool whole = static_cast<index_t>(array.size()) == p.size();
  std::vector<float> own(static_cast<std::size_t>(p.own_size()), 0.0f);
  for (int i = 0; i < p.parts(); ++i) {
    const Interval mine = p.shard(i, trainer.peers()->rank());
    trainer.device().download(own.data() + p.own_offset(i), array.data() + (whole ? mine.begin : p.own_offset(i)), static_cast<std::size_t>(mine.size()) * sizeof(float));
  }
  return own;
}

/// The same of a moment, decoded.
template <Config C, class D>
std::vector<float> own_shards(Trainer<C, D>& trainer, const StoredMoment& moment) {
  if (moment.array.format == Moments::f32) return own_shards(trainer, static_cast<std::span<float>>(moment));
  const Partition& p = trainer.partition();
  const HostArray h = trainer.host(moment);
  if (static_cast<index_t>(h.values.size()) != p.size()) return {h.values.begin(), h.values.end()};
  std::vector<float> own(static_cast<std::size_t>(p.own_size()), 0.0f);
  for (int i = 0; i < p.parts(); ++i) {
    const Interval mine = p.shard(i, trainer.peers()->rank());
    std::copy(h.values.begin() + mine.begin, h.values.begin() + mine.end, own.begin() + p.own_offset(i));
  }
  return own;
}

/// A model whose parts are gathered from the ranks' shards as its tensors are asked for, in their order, each once: a source for save_safetensors on one
/// rank, while the others call gather_rest().
template <Config C, class D>
class GatheredModel {
 public:
  any_llama config;
  RopeLayout rope = RopeLayout::half;
  std::string path = "model", source = "memory";

  GatheredModel(Trainer<C, D>& trainer, std::filesystem::path tokenizer_folder)
      : config(describe(trainer.config())), trainer_(&trainer), own_(trainer.weights()), folder_(std::move(tokenizer_folder)) {
    index_t at = 0;
    for_each_parameter(config, [&](const Parameter& p) { offsets_[{p.layer, p.slot}] = std::exchange(at, at + p.size()); });
  }
  FlatModel::Tensor tensor(const Parameter& p) const {
    const index_t at = offsets_.at({p.layer, p.slot});
    while (at >= trainer_->partition().part(std::max(now_, 0)).end || now_ < 0) gather_next();
    const index_t begin = at - trainer_->partition().part(now_).begin;
    return {path, p.hf_name(), part_.subspan(static_cast<std::size_t>(begin), static_cast<std::size_t>(p.size())), p.columns};
  }
  void gather_rest() const {
    while (now_ + 1 < trainer_->partition().parts()) gather_next();
  }
  void release(const FlatModel::Tensor&) const {}
  const Gguf* gguf() const { return nullptr; }
  const std::filesystem::path& folder() const { return folder_; }

 private:
  void gather_next() const { part_ = trainer_->peers()->gather(++now_, own_.data()); }
  Trainer<C, D>* trainer_;
  std::span<const float> own_;
  std::filesystem::path folder_;
  std::map<std::pair<int, Slot>, index_t> offsets_;
  mutable int now_ = -1;
  mutable std::span<const float> part_;
};

/// Writes the model on rank 0, and notes the checksums of its tensors.
template <ModelSource Source>
void write_model(const Source& model, const std::filesystem::path& folder, Format format, json& checksums) {
  /// The same source; it sees each tensor on its way.
  struct Noting {
    const Source& from;
    json* checksums;
    any_llama config = from.config;
    RopeLayout rope = from.rope;
    std::string path = from.path, source = from.source;
    auto tensor(const Parameter& p) const {
      auto t = from.tensor(p);
      if (checksums && !checksums->contains(t.name)) (*checksums)[t.name] = checksum(std::as_bytes(t.weights));
      return t;
    }
    void release(const FlatModel::Tensor& t) const { from.release(t); }
    const Gguf* gguf() const { return nullptr; }
    const std::filesystem::path& folder() const { return from.folder(); }
  };
  save_safetensors(Noting{model, format == Format::f32 ? &checksums : nullptr}, folder, {.format = format});
}

}  // namespace detail

/// save_checkpoint() of a trainer with peers: collective; all return the folder, or all throw Error. Moments of any format are written as the f32 that they decode
/// to: what loads them in the same format goes on bit by bit, in another it rounds to the nearest.
template <Config C, class D>
std::filesystem::path save_sharded_checkpoint(const std::filesystem::path& root, Trainer<C, D>& trainer, std::string_view state, const SaveCheckpointOptions& options = {}) {
  namespace fs = std::filesystem;
  Peers<D>& peers = *trainer.peers();
  const bool first = peers.rank() == 0;
  const std::int64_t step = trainer.steps();
  const std::string name = detail::step_prefix + detail::step_digits(step);
  const fs::path part = AtomicFolder::part_path(root, name);
  std::optional<AtomicFolder> folder;
  detail::together(peers, root, [&] {
    if (first) folder.emplace(root, detail::step_prefix, detail::step_digits(step));
  });

  detail::json mine = detail::json::object();
  std::span<float> weights = trainer.weights();
  detail::together(peers, root, [&] {
    std::vector<std::pair<std::string, std::vector<float>>> arrays;
    arrays.emplace_back("first_moment", detail::own_shards(trainer, trainer.first_moment()));
    arrays.emplace_back("second_moment", detail::own_shards(trainer, trainer.second_moment()));
    if (options.format != Format::f32) arrays.emplace_back(detail::master_weights, detail::own_shards(trainer, weights));
    std::vector<SafeTensor> tensors;
    for (const auto& [what, values] : arrays) {
      const auto bytes = std::as_bytes(std::span(values));
      tensors.push_back({what, "F32", {static_cast<index_t>(values.size())}, bytes});
      mine[what] = detail::checksum(bytes);
    }
    write_safetensors(part / detail::shard_file(peers.rank(), peers.ranks()), tensors);
  });

  const std::vector<std::string> checksums = detail::exchange(peers, mine.dump());
  detail::together(peers, root, [&] {
    std::error_code error;
    const bool tokenizer_folder = fs::is_directory(options.tokenizer, error);
    if (trainer.shards_values() && !first) {
      detail::GatheredModel<C, D>(trainer, {}).gather_rest();
      return;
    }
    if (!first) return;
    detail::json j;
    j["format"] = detail::state_format;
    j["step"] = step;
    detail::json& model_checksums = j["checksums"]["model"] = detail::json::object();
    const fs::path tokenizer = tokenizer_folder ? options.tokenizer : fs::path();
    if (trainer.shards_values()) {
      const detail::GatheredModel<C, D> model(trainer, tokenizer);
      try {
        detail::write_model(model, part, options.format, model_checksums);
      } catch (...) {
        model.gather_rest();  // the others count on it
        throw;
      }
    } else {
      const HostArray host = trainer.host(weights);
      detail::write_model(FlatModel(describe(trainer.config()), host.values, tokenizer), part, options.format, model_checksums);
    }
    if (!options.tokenizer.empty() && !tokenizer_folder) detail::copy_tokenizer(options.tokenizer, part);
    j["state"] = detail::parse_json(state, "training state");
    j["checksums"]["shards"] = detail::json::array();
    for (const std::string& c : checksums) j["checksums"]["shards"].push_back(detail::parse_json(c, "checksums"));
    detail::json &parts = j["shards"]["parts"] = detail::json::array(), &chunks = j["shards"]["chunks"] = detail::json::array();
    j["shards"]["ranks"] = peers.ranks();
    for (int p = 0; p < trainer.partition().parts(); ++p) parts.push_back(trainer.partition().shards(p).n), chunks.push_back(trainer.partition().shards(p).chunk);
    write_file_atomically(part / detail::state_json_file, [&](FileWriter& file) { file.write(j.dump(2) + "\n"); });
    if (options.also) options.also(part);
    folder->commit();
    detail::keep_newest(*folder, root, options.keep, step);
  });
  return root / name;
}

/// What of a checkpoint, of one process or of any number of ranks, this rank's arrays hold; the trainer goes on behind its step. Returns the saved state.
template <Config C, class D>
std::string load_sharded_checkpoint(const std::filesystem::path& folder, Trainer<C, D>& trainer) {
  StoredState stored(folder, describe(trainer.config()));
  std::vector<float> host;
  const auto read = [&](const std::string& name, std::span<float> array) {
    detail::each_interval(trainer, array, [&](const Interval& flat, float* to) {
      if constexpr (D::host_memory) {
        stored.read(name, flat, to);
      } else {
        host.resize(static_cast<std::size_t>(flat.size()));
        stored.read(name, flat, host.data());
        trainer.device().upload(to, host.data(), host.size() * sizeof(float));
      }
    });
  };
  const auto read_moment = [&](const std::string& name, const StoredMoment& moment) {
    if (moment.array.format == Moments::f32) return read(name, moment);
    std::vector<float> values(static_cast<std::size_t>(moment.n), 0.0f);
    detail::each_interval(trainer, std::span(values), [&](const Interval& flat, float* to) { stored.read(name, flat, to); });
    trainer.put(moment, values);
  };
  read(detail::master_weights, trainer.weights()), read_moment("first_moment", trainer.first_moment()), read_moment("second_moment", trainer.second_moment());
  trainer.values_changed();
  trainer.resume(stored.step());
  return stored.state();
}

}  // namespace tinyllama
