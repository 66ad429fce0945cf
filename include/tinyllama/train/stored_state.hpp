// StoredState: the flat arrays of a training checkpoint, whole or in the shards of any number of ranks, read where they are wanted.
#pragma once

#include <algorithm>
#include <cstring>
#include <filesystem>
#include <map>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "tinyllama/train/checkpoint.hpp"
#include "tinyllama/train/partition.hpp"

namespace tinyllama {

namespace detail {

inline std::string shard_file(int rank, int ranks) {
  const auto number = [](int n) { return std::string(5 - std::min<std::size_t>(5, std::to_string(n).size()), '0') + std::to_string(n); };
  return state_shards + number(rank + 1) + "-of-" + number(ranks) + ".safetensors";
}

}  // namespace detail

/// The flat arrays of a checkpoint, whole or in the shards of any number of ranks, to be read an interval at a time. What is read is checked first, by
/// checksum too. Throws Error naming file and array.
class StoredState {
 public:
  StoredState(std::filesystem::path folder, const any_llama& config) : folder_(std::move(folder)), json_file_((folder_ / detail::state_json_file).string()) {
    const std::string config_file = (folder_ / "config.json").string();
    detail::check_same_config(config, read_config_json(config_file), config_file);
    json_ = detail::read_json(json_file_);
    const detail::JsonObject o(json_, json_file_);
    if (o.string("format", "") != detail::state_format) throw o.wrong("format", detail::state_format);
    const detail::json* const step = o.find("step");
    if (!step || !step->is_number_unsigned()) throw o.wrong("step", "0 or more");
    step_ = step->get<std::int64_t>();
    size_ = parameter_count(config);
    const detail::json& checksums = detail::object_at(json_, "checksums", json_file_);
    if (o.find("shards")) {
      read_cut(detail::JsonObject(detail::object_at(json_, "shards", json_file_), json_file_));
      const auto it = checksums.find("shards");
      if (it == checksums.end() || !it->is_array() || static_cast<int>(it->size()) != ranks_)
        throw Error(json_file_, "checksums of shards", std::to_string(ranks_), it == checksums.end() ? "none" : std::to_string(it->size()));
      for (int r = 0; r < ranks_; ++r) files_.push_back({folder_ / detail::shard_file(r, ranks_), &(*it)[static_cast<std::size_t>(r)], {}, {}});
    } else {
      shards_ = {{size_, size_}}, own_ = size_;
      files_.push_back({folder_ / detail::state_arrays_file, &detail::object_at(checksums, "arrays", json_file_), {}, {}});
    }
    model_checksums_ = &detail::object_at(checksums, "model", json_file_);
  }

  std::int64_t step() const { return step_; }
  /// The JSON object that was given when it was saved.
  std::string state() const { return detail::object_at(json_, "state", json_file_).dump(); }

  /// The interval of the flat array `name` into `to`, in the host's memory. "parameters": the weights.
  void read(const std::string& name, const Interval& wanted, float* to) {
    if (name == detail::master_weights && !open(files_.front()).find(name)) return read_model(wanted, to);
    index_t begin = 0, offset = 0;
    for (const Shards& s : shards_) {
      for (int r = 0; r < ranks_; ++r) {
        const Interval here{begin + s.of(r).begin, begin + s.of(r).end}, part = common(here, wanted);
        if (part.empty()) continue;
        const std::span<const std::byte> bytes = array(files_[static_cast<std::size_t>(r)], name);
        std::memcpy(to + (part.begin - wanted.begin), bytes.data() + static_cast<std::size_t>(offset + part.begin - here.begin) * sizeof(float),
                    static_cast<std::size_t>(part.size()) * sizeof(float));
      }
      begin += s.n, offset += s.chunk;
    }
  }

 private:
  struct File {
    std::filesystem::path path;
    const detail::json* checksums;
    std::unique_ptr<Safetensors> content;
    std::map<std::string, std::span<const std::byte>> checked;
  };

  void read_cut(const detail::JsonObject& o) {
    ranks_ = static_cast<int>(std::clamp<std::int64_t>(o.integer("ranks"), 0, 1 << 20));
    const detail::json *parts = o.find("parts"), *chunks = o.find("chunks");
    const auto numbers = [](const detail::json* j) { return j && j->is_array() && std::all_of(j->begin(), j->end(), [](const auto& n) { return n.is_number_unsigned(); }); };
    bool sound = ranks_ > 0 && numbers(parts) && numbers(chunks) && parts->size() == chunks->size();
    index_t all = 0;
    for (std::size_t i = 0; sound && i < parts->size(); ++i) {
      const auto n = (*parts)[i].get<std::uint64_t>(), chunk = (*chunks)[i].get<std::uint64_t>();
      sound = n <= static_cast<std::uint64_t>(size_) && chunk <= 2 * static_cast<std::uint64_t>(size_) + 64 && chunk * static_cast<std::uint64_t>(ranks_) >= n;
      shards_.push_back({static_cast<index_t>(n), static_cast<index_t>(chunk)});
      all += shards_.back().n, own_ += shards_.back().chunk;
    }
    if (!sound || all != size_) throw Error(json_file_, "shards", "ranks, and parts and chunks that cut " + std::to_string(size_) + " weights", "others");
  }
  static const Safetensors& open(File& f) {
    if (!f.content) f.content = std::make_unique<Safetensors>(f.path);
    return *f.content;
  }
  std::span<const std::byte> array(File& f, const std::string& name) {
    if (const auto it = f.checked.find(name); it != f.checked.end()) return it->second;
    const SafeTensor* const t = open(f).find(name);
    const std::string expected = "F32 [" + std::to_string(own_) + "]";
    if (!t) throw Error(f.path.string(), name, expected, "none");
    if (t->dtype != "F32" || t->shape != std::vector<index_t>{own_}) throw Error(f.path.string(), name, expected, t->dtype + " " + detail::shape_text(t->shape));
    return f.checked[name] = detail::checked(f.path.string(), name, t->bytes, *f.checksums, json_file_);
  }
  void read_model(const Interval& wanted, float* to) {
    if (!model_) model_.emplace(open_checkpoint(folder_));
    index_t begin = 0;
    for_each_parameter(model_->config, [&](const Parameter& p) {
      const Interval here{begin, begin + p.size()}, part = common(here, wanted);
      begin = here.end;
      if (part.empty()) return;
      const StoredTensor& t = model_->tensor(p);
      if (t.format != Format::f32)
        throw Error(t.file, t.name, "f32, or '" + std::string(detail::master_weights) + "' among the arrays", std::string(tinyllama::name(t.format)));
      const auto bytes = detail::checked(t.file, t.name, t.bytes, *model_checksums_, json_file_);
      std::memcpy(to + (part.begin - wanted.begin), bytes.data() + static_cast<std::size_t>(part.begin - here.begin) * sizeof(float),
                  static_cast<std::size_t>(part.size()) * sizeof(float));
    });
  }

  std::filesystem::path folder_;
  std::string json_file_;
  detail::json json_;
  std::int64_t step_ = 0;
  index_t size_ = 0, own_ = 0;
  int ranks_ = 1;
  std::vector<Shards> shards_;  // of each part
  std::vector<File> files_;     // of each rank
  const detail::json* model_checksums_ = nullptr;
  std::optional<Checkpoint> model_;
};

}  // namespace tinyllama
