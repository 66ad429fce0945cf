// Steps of decoding as graphs: recorded where a step looks like an earlier one, replayed from then on, so that the host launches one thing a step.
#pragma once

#include <array>
#include <cstdint>
#include <vector>

#include "tinyllama/device/cuda_runtime.cuh"

namespace tinyllama::cuda {

/// Graphs of one model's steps. What kernels are given (pointers, sizes, grids) is fixed in a graph; what changes from step to step lies in arrays on the card.
class StepGraphs {
 public:
  /// All that a step's kernels are given and that is not the same for every step of the model.
  using Key = std::array<std::uintptr_t, 12>;

  /// Does what `enqueue()` puts into the stream. The first two times for a key it is called as it is, so that what is made once exists and what is
  /// measured the second time (products) is known; the third time it is recorded.
  template <class F>
  void run(cudaStream_t stream, const Key& key, F&& enqueue) {
    for (Step& s : steps_)
      if (s.key == key) {
        if (s.seen++ < 2) return enqueue();
        if (!s.graph) record(stream, s.graph, enqueue);
        return s.graph.launch(stream);
      }
    if (steps_.size() >= most) steps_.erase(steps_.begin());
    enqueue();
    steps_.push_back({key, 1, {}});
  }

 private:
  static constexpr std::size_t most = 64;  // batches that grow and shrink have as many keys as sizes; prompts, as lengths
  struct Step {
    Key key;
    unsigned seen;
    Graph graph;
  };
  template <class F>
  static void record(cudaStream_t stream, Graph& graph, F&& enqueue) {
    Graph::begin(stream);
    Graph recorded;
    try {
      enqueue();
    } catch (...) {
      Graph::abandon(stream);
      throw;
    }
    recorded.end(stream);
    graph = std::move(recorded);
  }
  std::vector<Step> steps_;
};

}  // namespace tinyllama::cuda
