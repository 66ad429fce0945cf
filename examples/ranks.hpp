// The ranks of a training program: those that mpirun started, or one; and how they share the training.
#pragma once

#include <tinyllama/distributed/parallel.hpp>
#if defined(TINYLLAMA_MPI)
#include <tinyllama/distributed/mpi.hpp>
#endif

#include <csignal>
#include <memory>
#include <string>

#include "common.hpp"

namespace example {

/// The options, and behind start() the ranks.
class Ranks {
 public:
  void add_to(CLI::App& app) {
    app.add_option("--parallel", parallel_, "under mpirun, what the ranks share: none (rank 0 works alone), ddp, zero1 (optimizer state) or fsdp (everything)")
        ->check(CLI::IsMember({"none", "ddp", "zero1", "fsdp"}))->capture_default_str();
    app.add_option("--timeout", timeout_, "seconds after which a rank that does not answer is an error; 0: never")->check(CLI::NonNegativeNumber)->capture_default_str();
  }

  /// Meets the other ranks. False: this one has nothing to do.
  bool start() {
#if defined(TINYLLAMA_MPI)
    if (tinyllama::launched_by_mpi()) {
      mpi_ = std::make_unique<tinyllama::Mpi>(tinyllama::MpiOptions{std::chrono::duration<double>(timeout_)});
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
  /// Threads of this rank, where `wanted` is 0: its part of the cores that it shares with others.
  int threads(int wanted) const { return wanted > 0 ? wanted : std::max(1, tinyllama::available_cores() / neighbours_); }

  /// For a trainer on `dev`; null: it is alone. Lives until the next call.
  tinyllama::Peers<tinyllama::Cpu>* peers(tinyllama::Cpu& dev) {
    using namespace tinyllama;
    peers_.reset();
    if (sharding() == Sharding::none) return nullptr;
    const tinyllama::ParallelOptions options{.sharding = sharding()};
#if defined(TINYLLAMA_MPI)
    if (mpi_) return (peers_ = std::make_unique<Parallel<Cpu, Mpi>>(*mpi_, options)).get();
#endif
    single_ = std::make_unique<Single<Cpu>>(dev);
    return (peers_ = std::make_unique<Parallel<Cpu, Single<Cpu>>>(*single_, options)).get();
  }

  /// Of `n` things in a row, this rank's.
  tinyllama::Interval share(std::size_t n) const {
    const auto count = static_cast<tinyllama::index_t>(n);
    return {count * rank_ / size_, count * (rank_ + 1) / size_};
  }

 private:
  std::string parallel_ = "ddp";
  double timeout_ = 25;
  int rank_ = 0, size_ = 1, neighbours_ = 1;
#if defined(TINYLLAMA_MPI)
  std::unique_ptr<tinyllama::Mpi> mpi_;
#endif
  std::unique_ptr<tinyllama::Single<tinyllama::Cpu>> single_;
  std::unique_ptr<tinyllama::Peers<tinyllama::Cpu>> peers_;
};

}  // namespace example
