// A training step's work as graphs: recorded where it comes the second time, repeated from then on, so that the host launches one thing a micro-batch. Host code.
#pragma once

#include <algorithm>
#include <cstdint>
#include <span>
#include <utility>
#include <vector>

#include "tinyllama/device/cuda.cuh"
#include "tinyllama/device/training.hpp"

namespace tinyllama {

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
    training.expect(batch);
    if (new_weights) training.expect_new_weights();  // the graph's to quantise, though something else may have read them since they were updated
    const auto known = std::find_if(works_.begin(), works_.end(), [&](const Work& w) { return std::equal(kind.begin(), kind.end(), w.kind.begin(), w.kind.end()); });
    if (known == works_.end() || known->places != training.places()) {
      work();
      if (known != works_.end()) works_.erase(known);
      else if (works_.size() >= most) works_.erase(works_.begin());
      works_.push_back({{kind.begin(), kind.end()}, training.places(), {}, {}, false});
      return;
    }
    if (!known->graph && !known->refused) record(dev, training, *known, work);
    if (!known->graph) return work();
    known->graph.launch(dev.stream());
    training.repeat(known->quantised);
    std::rotate(known, known + 1, works_.end());  // the last to go
  }
  void clear() { works_.clear(); }

 private:
  static constexpr std::size_t most = 16;  // batches of packed samples have as many kinds as steps
  struct Work {
    std::vector<std::uint64_t> kind;
    typename CudaTraining<A>::Places places;
    cuda::Graph graph;
    std::vector<std::uint64_t*> quantised;
    bool refused;
  };

  template <class F>
  static void record(CudaDevice<A>& dev, CudaTraining<A>& training, Work& to, F& work) {
    cuda::Graph graph;
    cuda::Graph::begin(dev.stream());
    training.note(&to.quantised);
    try {
      work();
      graph.end(dev.stream());
    } catch (...) {  // what is wrong with the work itself comes again without a recording
      cuda::Graph::abandon(dev.stream());
      to.quantised.clear();
      training.expect_new_weights();
      to.refused = !training.measured();
    }
    training.note(nullptr);
    to.graph = std::move(graph);
  }
  std::vector<Work> works_;
};

}  // namespace tinyllama
