// A training step's work as graphs: recorded where it comes the second time, repeated from then on, so that the host launches one thing a micro-batch, or a part of one. Host code.
#pragma once

#include <algorithm>
#include <cstdint>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "tinyllama/device/cuda.cuh"
#include "tinyllama/device/training.hpp"

namespace tinyllama {

/// In page-locked memory, which the copy of a graph reads each time the graph is launched; the host writes it again when that copy is done.
template <class A>
class StepInput<CudaDevice<A>> {
 public:
  explicit StepInput(CudaDevice<A>& dev) : dev_(&dev), copied_(on_card(dev)) {}
  std::byte* begin(std::size_t bytes) {
    const cuda::Current here(dev_->card());
    copied_.synchronize();
    bytes_ = bytes;
    return pinned_.reserve(bytes);
  }
  void bring(void* to) {
    const cuda::Current here(dev_->card());
    cuda::check(cudaMemcpyAsync(to, pinned_.reserve(bytes_), bytes_, cudaMemcpyHostToDevice, dev_->stream()), "cudaMemcpyAsync", std::to_string(bytes_) + " bytes");
    copied_.record_each_time(dev_->stream());
  }

 private:
  static cuda::Event on_card(CudaDevice<A>& dev) {
    const cuda::Current here(dev.card());
    return cuda::Event();
  }
  CudaDevice<A>* dev_;
  cuda::Pinned pinned_;
  cuda::Event copied_;
  std::size_t bytes_ = 0;
};

/// Graphs of one trainer's work. The first time for a kind of work makes what is made once (plans, scratch, scales) and measures what is measured (products); the
/// second is recorded, unless what the first was given has moved. Work that does not let itself be recorded is done launch by launch.
template <class A>
class Recording<CudaDevice<A>> {
 public:
  template <class F>
  void run(CudaDevice<A>& dev, std::span<const std::uint64_t> kind, std::span<const Sequence> batch, bool new_weights, F&& work) {
    CudaTraining<A>& training = training_of(dev);
    if (!training.records) return work();
    const cuda::Current here(dev.card());
    if (!batch.empty()) training.expect(batch);
    if (new_weights) training.expect_new_weights();  // the graph's to quantise, though something else may have read them since they were updated
    const auto places = [&] { return training.places(!batch.empty()); };
    auto known = std::find_if(works_.begin(), works_.end(), [&](const Work& w) { return std::equal(kind.begin(), kind.end(), w.kind.begin(), w.kind.end()); });
    if (known == works_.end() || known->places != places()) {
      work();
      if (known == works_.end() && works_.size() < most) known = works_.emplace(works_.end());
      else if (known == works_.end()) known = std::min_element(works_.begin(), works_.end(), [](const Work& a, const Work& b) { return a.used < b.used; });
      *known = {{kind.begin(), kind.end()}, places(), ++clock_, {}, {}, false};
      return;
    }
    known->used = ++clock_;
    if (!known->graph && !known->refused) record(dev, training, *known, work);
    if (!known->graph) return work();
    known->graph.launch(dev.stream());
    training.repeat(known->noted);
  }
  void clear() { works_.clear(); }

 private:
  static constexpr std::size_t most = 1024;  // of 22 layers by themselves a pass has 48; batches of packed samples have as many kinds as steps
  struct Work {
    std::vector<std::uint64_t> kind;
    typename CudaTraining<A>::Places places;
    std::uint64_t used = 0;
    cuda::Graph graph;
    typename CudaTraining<A>::Noted noted;
    bool refused = false;
  };

  template <class F>
  static void record(CudaDevice<A>& dev, CudaTraining<A>& training, Work& to, F& work) {
    cuda::Graph graph;
    cuda::Graph::begin(dev.stream());
    training.note(&to.noted);
    try {
      work();
      graph.end(dev.stream());
    } catch (...) {  // what is wrong with the work itself comes again without a recording
      cuda::Graph::abandon(dev.stream());
      to.refused = !training.measured();
    }
    training.note(nullptr);
    training.undo(to.noted);  // it is only recorded so far
    if (!graph) training.expect_new_weights(), to.noted = {};
    to.graph = std::move(graph);
  }
  std::vector<Work> works_;
  std::uint64_t clock_ = 0;
};

}  // namespace tinyllama
