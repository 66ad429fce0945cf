// Nccl: the communicator of cards, one a rank, over NCCL on a stream of its own beside the device's. There where NCCL's header is (TINYLLAMA_NCCL); the library is found at run time.
//
// start: this stream waits for what the device's was asked so far, then runs the operation. wait: the device's stream waits for the operation; the host for
// nothing. A rank that is gone leaves the kernels of the others waiting on the card, and the host behind them: a thread watches, and ends NCCL's work
// when the ranks' processes, NCCL or the clock say so; the next call throws.
#pragma once

#include "tinyllama/distributed/nccl_api.cuh"

#if defined(TINYLLAMA_NCCL)
#include <atomic>
#include <chrono>
#include <deque>
#include <mutex>
#include <optional>
#include <string>
#include <thread>
#include <vector>

#include "tinyllama/device/cuda_narrow.cuh"
#include "tinyllama/device/cuda_runtime.cuh"
#include "tinyllama/distributed/communicator.hpp"

namespace tinyllama {

struct NcclOptions {
  /// How long an operation may take on the card, from when the host asked; 0: for ever.
  std::chrono::duration<double> timeout = std::chrono::seconds(25);
};

/// `Control` is the communicator of the same ranks for the host's values, in practice Mpi: it introduces the ranks to each other, and knows whose process has
/// ended. It, and the device whose stream is given, outlive this.
template <Communicator Control>
class Nccl {
 public:
  struct Request {
    std::size_t event = none;
    std::string_view operation = {}, what = {};
  };

  Nccl(Control& control, int card, cudaStream_t device, const NcclOptions& options = {})
      : nccl_(&cuda::NcclApi::get()), control_(&control), card_(card), device_(device), options_(options), stream_(card), asked_for_(event_on(card)) {
    ncclUniqueId id{};
    if (rank() == 0) check(nccl_->get_unique_id(&id), "ncclGetUniqueId", "");
    control.broadcast(std::as_writable_bytes(std::span(&id, 1)), 0, "NCCL's identity");
    const cuda::Current here(card_);
    check(nccl_->init_rank(&comm_, size(), id, rank()), "ncclCommInitRank", "");
    watch_ = std::thread([this] { watch(); });
  }
  Nccl(const Nccl&) = delete;
  Nccl& operator=(const Nccl&) = delete;
  ~Nccl() {
    stop_ = true;
    watch_.join();
    if (lost_) return;
    if (std::uncaught_exceptions() > exceptions_) nccl_->abort(comm_);
    else cudaStreamSynchronize(stream_.get()), nccl_->destroy(comm_);
  }

  int rank() const { return control_->rank(); }
  int size() const { return control_->size(); }

  Request start_all_reduce(void* out, index_t n, Format format, Reduction how, std::string_view what) {
    return start("all_reduce", what, [&] { return nccl_->all_reduce(out, out, count(n), type(format), op(how), comm_, stream_.get()); });
  }
  /// Of the device's doubles.
  Request start_all_reduce(std::span<double> x, Reduction how, std::string_view what) {
    return start("all_reduce", what, [&] { return nccl_->all_reduce(x.data(), x.data(), x.size(), ncclFloat64, op(how), comm_, stream_.get()); });
  }
  Request start_reduce_scatter(void* out, const void* in, const Shards& s, Format format, Reduction how, std::string_view what) {
    return start("reduce_scatter", what, [&] { return reduce_scatter(out, in, s, format, how); });
  }
  // Sums that travel in another format: rounded and widened on this stream, beside the device's work. NCCL rounds each sum of two to it.
  Request start_all_reduce(float* out, index_t n, const Wire& wire, std::string_view what) {
    return start("all_reduce", what, [&] {
      auto* const room = narrow(wire, out, n);
      const ncclResult_t result = nccl_->all_reduce(room, room, count(n), ncclBfloat16, ncclSum, comm_, stream_.get());
      cuda::Narrow<bf16>::widen(stream_.get(), out, room, n);
      return result;
    });
  }
  Request start_reduce_scatter(float* out, const float* in, const Shards& s, const Wire& wire, std::string_view what) {
    return start("reduce_scatter", what, [&] {
      auto* const room = narrow(wire, in, s.n);
      const Interval mine = s.of(rank());
      const ncclResult_t result = reduce_scatter(room + mine.begin, room, s, Format::bf16, Reduction::sum);
      cuda::Narrow<bf16>::widen(stream_.get(), out, room + mine.begin, mine.size());
      return result;
    });
  }
  Request start_all_gather(void* out, const void* in, const Shards& s, Format format, std::string_view what) {
    return start("all_gather", what, [&] {
      if (even(s)) return nccl_->all_gather(in, out, count(s.chunk), type(format), comm_, stream_.get());
      return grouped([&](int r) {
        const Interval part = s.of(r);
        if (part.empty()) return ncclSuccess;
        return nccl_->broadcast(in, static_cast<std::byte*>(out) + row_bytes(format, part.begin), count(part.size()), type(format), r, comm_, stream_.get());
      });
    });
  }
  Request start_broadcast(void* out, index_t n, Format format, int root, std::string_view what) {
    return start("broadcast", what, [&] { return nccl_->broadcast(out, out, count(n), type(format), root, comm_, stream_.get()); });
  }
  void wait(Request& r) {
    if (r.event == none) return;
    look(r.operation, r.what);
    const std::lock_guard lock(mutex_);
    Done& d = done_[r.event];
    cuda::check(cudaStreamWaitEvent(device_, d.event.get()), "cudaStreamWaitEvent", r.what);
    d.waited = true;
    if (d.over) free_.push_back(r.event);
    r.event = none;
  }
  void progress() {}  // the card goes on by itself

  void reduce(std::span<double> numbers, Reduction how, std::string_view what) { look("reduce", what), control_->reduce(numbers, how, what); }
  void broadcast(std::span<std::byte> bytes, int root, std::string_view what) { look("broadcast", what), control_->broadcast(bytes, root, what); }
  void barrier(std::string_view what) { look("barrier", what), control_->barrier(what); }
  /// Throws the Error of what was lost while the host waited for the device.
  void confirm(std::string_view what) const { look("the wait", what); }

 private:
  static constexpr auto none = static_cast<std::size_t>(-1);
  /// Behind an operation. To be used again when it is over and was waited for: an event that is recorded anew before would tell the watch of the new one.
  struct Done {
    cuda::Event event;
    bool over = false, waited = false;
  };
  /// An operation that the host has asked for, for the watch.
  struct Asked {
    std::size_t event;
    std::chrono::steady_clock::time_point when;
    std::string_view operation, what;
  };

  static std::size_t count(index_t n) { return static_cast<std::size_t>(n); }
  bool even(const Shards& s) const { return s.chunk * size() == s.n; }
  ncclDataType_t type(Format f) const {
    if (f == Format::f32) return ncclFloat32;
    if (f == Format::bf16) return ncclBfloat16;
    throw Error(where(), "format", "f32 or bf16", std::string(name(f)));
  }
  static ncclRedOp_t op(Reduction how) { return how == Reduction::max ? ncclMax : how == Reduction::mean ? ncclAvg : ncclSum; }
  std::string where() const { return "NCCL rank " + std::to_string(rank()) + " of " + std::to_string(size()); }
  void check(ncclResult_t result, std::string_view operation, std::string_view what) const {
    if (result == ncclSuccess || result == ncclInProgress) return;
    throw Error(where(), std::string(operation) + (what.empty() ? "" : " of ") + std::string(what), "success", nccl_->error_string(result));
  }
  /// f(rank) for all ranks, as one operation.
  template <class F>
  ncclResult_t grouped(F&& f) {
    ncclResult_t result = nccl_->group_start();
    for (int r = 0; r < size() && result == ncclSuccess; ++r) result = f(r);
    const ncclResult_t end = nccl_->group_end();
    return result == ncclSuccess ? end : result;
  }

  ncclResult_t reduce_scatter(void* out, const void* in, const Shards& s, Format format, Reduction how) {
    if (even(s)) return nccl_->reduce_scatter(in, out, count(s.chunk), type(format), op(how), comm_, stream_.get());
    return grouped([&](int r) {
      const Interval part = s.of(r);
      if (part.empty()) return ncclSuccess;
      return nccl_->reduce(static_cast<const std::byte*>(in) + row_bytes(format, part.begin), r == rank() ? out : nullptr, count(part.size()), type(format), op(how), r, comm_, stream_.get());
    });
  }
  /// x [n], rounded, in the wire's room.
  bf16* narrow(const Wire& wire, const float* x, index_t n) {
    if (wire.format != Format::bf16) throw Error(where(), "wire", "bf16", std::string(name(wire.format)));
    auto* const room = static_cast<bf16*>(wire.room);
    cuda::Narrow<bf16>::narrow(stream_.get(), room, x, n);
    return room;
  }
  template <class F>
  Request start(std::string_view operation, std::string_view what, F&& f) {
    look(operation, what);
    const cuda::Current here(card_);
    Request r{take_event(), operation, what};
    asked_for_.record(device_);
    cuda::check(cudaStreamWaitEvent(stream_.get(), asked_for_.get()), "cudaStreamWaitEvent", what);
    check(f(), operation, what);
    const std::lock_guard lock(mutex_);
    done_[r.event].event.record(stream_.get());
    asked_.push_back({r.event, std::chrono::steady_clock::now(), operation, what});
    return r;
  }
  std::size_t take_event() {
    const std::lock_guard lock(mutex_);
    clear();
    if (free_.empty()) {
      done_.emplace_back();
      return done_.size() - 1;
    }
    const std::size_t e = free_.back();
    free_.pop_back();
    done_[e].over = done_[e].waited = false;
    return e;
  }
  /// Takes note of what is over; under the lock.
  void clear() {
    for (; !asked_.empty() && cudaEventQuery(done_[asked_.front().event].event.get()) == cudaSuccess; asked_.pop_front()) {
      Done& d = done_[asked_.front().event];
      d.over = true;
      if (d.waited) free_.push_back(asked_.front().event);
    }
  }

  /// Throws what the watch has seen.
  void look(std::string_view operation, std::string_view what) const {
    if (!lost_) return;
    const std::lock_guard lock(mutex_);
    throw Error(where(), std::string(operation) + (what.empty() ? "" : " of ") + std::string(what), expected_, found_);
  }
  void watch() {
    cudaSetDevice(card_);
    for (; !stop_; std::this_thread::sleep_for(std::chrono::milliseconds(20))) {
      std::string expected, found;
      if (const auto gone = control_->lost()) {
        std::this_thread::sleep_for(std::chrono::milliseconds(200));  // what it sent may still be under way
        if (stop_) return;
        expected = "rank " + std::to_string(*gone) + " to take part", found = "its process has ended";
      }
      ncclResult_t state = ncclSuccess;
      if (nccl_->async_error(comm_, &state) == ncclSuccess && state != ncclSuccess && state != ncclInProgress) expected = "success", found = nccl_->error_string(state);
      if (const std::optional<Asked> late = overdue()) {
        expected = "all ranks to take part in " + std::string(late->operation) + " of " + std::string(late->what) + " within " +
                   std::to_string(static_cast<int>(options_.timeout.count())) + " s";
        found = "a rank that has not: lost, or hanging";
      }
      if (found.empty()) continue;
      {
        const std::lock_guard lock(mutex_);
        expected_ = expected, found_ = found;
      }
      lost_ = true;
      nccl_->abort(comm_);  // its kernels end, and the streams go on
      return;
    }
  }
  /// The oldest operation that is not done, where its time is up.
  std::optional<Asked> overdue() {
    const std::lock_guard lock(mutex_);
    clear();
    if (asked_.empty() || options_.timeout.count() <= 0 || std::chrono::steady_clock::now() - asked_.front().when < options_.timeout) return std::nullopt;
    return asked_.front();
  }

  static cuda::Event event_on(int card) {
    const cuda::Current here(card);
    return cuda::Event();
  }

  const cuda::NcclApi* nccl_;
  Control* control_;
  int card_;
  cudaStream_t device_;
  NcclOptions options_;
  cuda::Stream stream_;
  cuda::Event asked_for_;
  ncclComm_t comm_ = nullptr;
  int exceptions_ = std::uncaught_exceptions();
  mutable std::mutex mutex_;         // of what follows; the watch reads it
  std::deque<Done> done_;
  std::vector<std::size_t> free_;    // of these
  std::deque<Asked> asked_;          // oldest first
  std::string expected_, found_;
  std::atomic<bool> lost_{false}, stop_{false};
  std::thread watch_;
};

}  // namespace tinyllama
#endif
