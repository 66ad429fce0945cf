// The ranks of a training program: those that mpirun started, or one; and how they share the training.
#pragma once

#include <tinyllama/distributed/parallel.hpp>
#if defined(TINYLLAMA_MPI)
#include <tinyllama/distributed/mpi.hpp>
#endif
#if defined(TINYLLAMA_CUDA)
#include <tinyllama/cuda_training.hpp>
#include <tinyllama/distributed/nccl.cuh>
#include <tinyllama/distributed/staged.hpp>
#endif

#include <algorithm>
#include <csignal>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "common.hpp"

namespace example {

/// What a trainer on D asks, and the communicator below it; the device outlives both. get() is null where the trainer is alone.
template <class D>
struct TrainerPeers {
  std::shared_ptr<void> communicator;
  std::unique_ptr<tinyllama::Peers<D>> peers;
  tinyllama::Peers<D>* get() const { return peers.get(); }
};

/// The options, and behind start() the ranks.
class Ranks {
 public:
  void add_to(CLI::App& app) {
    app.add_option("--parallel", parallel_, "under mpirun, what the ranks share: none (rank 0 works alone), ddp, zero1 (optimizer state) or fsdp (everything)")
        ->check(CLI::IsMember({"none", "ddp", "zero1", "fsdp"}))->capture_default_str();
    app.add_option("--backend", backend_, "what connects ranks on cards: nccl, or mpi by way of the host's memory, also where ranks share a card")
        ->check(CLI::IsMember({"nccl", "mpi"}))->capture_default_str();
    app.add_option("--wire", wire_, "what gradients are while cards sum them: f32, or bf16, half the bytes, each sum of two rounded")->check(CLI::IsMember(wire_names()))->capture_default_str();
    app.add_option("--timeout", timeout_, "seconds after which a rank that does not answer is an error; 0: never")->check(CLI::NonNegativeNumber)->capture_default_str();
  }

  /// Meets the other ranks. False: this one has nothing to do.
  bool start() {
#if defined(TINYLLAMA_MPI)
    if (tinyllama::launched_by_mpi()) {
      mpi_ = std::make_shared<tinyllama::Mpi>(tinyllama::MpiOptions{std::chrono::duration<double>(timeout_)});
      rank_ = mpi_->rank(), size_ = mpi_->size(), neighbours_ = mpi_->ranks_on_these_cores();
      // When a rank dies, mpirun asks the others to end, and a second later kills them: time to say what happened.
      if (size_ > 1)
        if (const auto before = std::signal(SIGTERM, SIG_IGN); before != SIG_DFL) std::signal(SIGTERM, before);
    }
#endif
    if (parallel_ != "none") return true;
    size_ = neighbours_ = 1;
    return rank_ == 0;
  }

  int rank() const { return rank_; }
  int size() const { return size_; }
  bool first() const { return rank_ == 0; }
  const std::string& parallel() const { return parallel_; }
  tinyllama::Sharding sharding() const {
    using tinyllama::Sharding;
    return parallel_ == "fsdp" ? Sharding::fsdp : parallel_ == "zero1" ? Sharding::zero1 : parallel_ == "ddp" && size_ > 1 ? Sharding::ddp : Sharding::none;
  }
  tinyllama::Format wire() const { return *std::find_if(tinyllama::wire_formats.begin(), tinyllama::wire_formats.end(), [&](tinyllama::Format f) { return tinyllama::name(f) == wire_; }); }
  /// Threads of this rank, where `wanted` is 0: its part of the cores that it shares with others.
  int threads(int wanted) const { return wanted > 0 ? wanted : std::max(1, tinyllama::available_cores() / neighbours_); }

  /// The card of this rank, of `cards`; as many ranks on a machine as it has.
  int card(int cards) const { return cards > 0 ? rank_ % cards : 0; }

  /// For a trainer on `dev`.
  template <class D>
  TrainerPeers<D> peers(D& dev) {
    using namespace tinyllama;
    if (sharding() == Sharding::none) return {};
    const ParallelOptions options{.sharding = sharding(), .wire = wire()};
    const auto over = [&]<class M>(std::shared_ptr<M> m) { return TrainerPeers<D>{m, std::make_unique<Parallel<D, M>>(*m, options)}; };
#if defined(TINYLLAMA_MPI)
    if (mpi_) {
      if constexpr (D::host_memory) return over(std::shared_ptr<Mpi>(mpi_));
#if defined(TINYLLAMA_CUDA)
      else {
        if (backend_ == "mpi") return over(std::make_shared<Staged<Mpi, D>>(*mpi_, dev));
#if defined(TINYLLAMA_NCCL)
        return over(std::make_shared<Nccl<Mpi>>(*mpi_, dev.card(), dev.stream(), NcclOptions{std::chrono::duration<double>(timeout_)}));
#else
        throw Error("--backend", "nccl", "a program built with NCCL, or mpi", "one without");
#endif
      }
#endif
    }
#endif
    return over(std::make_shared<Single<D>>(dev));
  }

  /// Of `n` things in a row, this rank's.
  tinyllama::Interval share(std::size_t n) const {
    const auto count = static_cast<tinyllama::index_t>(n);
    return {count * rank_ / size_, count * (rank_ + 1) / size_};
  }

 private:
  static std::vector<std::string> wire_names() {
    std::vector<std::string> names;
    for (const tinyllama::Format f : tinyllama::wire_formats) names.emplace_back(tinyllama::name(f));
    return names;
  }
  std::string parallel_ = "ddp", backend_ = "nccl", wire_ = "f32";
  double timeout_ = 25;
  int rank_ = 0, size_ = 1, neighbours_ = 1;
#if defined(TINYLLAMA_MPI)
  std::shared_ptr<tinyllama::Mpi> mpi_;
#endif
};

}  // namespace example
