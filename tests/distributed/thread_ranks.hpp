// ThreadRanks: ranks as threads of one process, a communicator for tests. It finds what real wires would only make wrong now and then: an input that is changed,
// or a result that is read, between start and wait.
#pragma once

#include <condition_variable>
#include <cstring>
#include <functional>
#include <limits>
#include <map>
#include <mutex>
#include <thread>
#include <vector>

#include "tinyllama/distributed/communicator.hpp"

namespace tinyllama::test {

/// What the ranks share.
class ThreadWires {
 public:
  explicit ThreadWires(int ranks) : ranks_(ranks) {}
  int ranks() const { return ranks_; }

  void put(std::int64_t id, int rank, std::vector<std::byte> input) {
    const std::lock_guard lock(mutex_);
    auto& all = operations_[id];
    all.inputs.resize(static_cast<std::size_t>(ranks_));
    all.inputs[static_cast<std::size_t>(rank)] = std::move(input);
    if (++all.arrived == ranks_) changed_.notify_all();
  }
  /// f(inputs of all ranks), when all are there.
  template <class F>
  void take(std::int64_t id, F&& f) {
    std::unique_lock lock(mutex_);
    changed_.wait(lock, [&] { return failed_ || operations_[id].arrived == ranks_; });
    if (failed_) throw Error("ThreadRanks", "wait", "all ranks", "one that failed");
    f(operations_[id].inputs);
    if (++operations_[id].taken == ranks_) operations_.erase(id);
  }
  void fail() {
    const std::lock_guard lock(mutex_);
    failed_ = true;
    changed_.notify_all();
  }

 private:
  struct Operation {
    std::vector<std::vector<std::byte>> inputs;
    int arrived = 0, taken = 0;
  };
  const int ranks_;
  std::mutex mutex_;
  std::condition_variable changed_;
  std::map<std::int64_t, Operation> operations_;
  bool failed_ = false;
};

class ThreadRank {
 public:
  struct Request {
    std::function<void()> finish;
  };
  ThreadRank(ThreadWires& wires, int rank) : wires_(&wires), rank_(rank) {}
  int rank() const { return rank_; }
  int size() const { return wires_->ranks(); }
  /// Bytes that this rank handed over.
  std::size_t sent() const { return sent_; }

  Request start_all_reduce(void* out, index_t n, Format f, Reduction how, std::string_view) {
    return typed(f, [&]<class T>(T) {
      auto* const values = static_cast<T*>(out);
      return start(values, n, [=](const auto& inputs) { fold(values, inputs, {0, n}, how); });
    });
  }
  Request start_reduce_scatter(void* out, const void* in, const Shards& s, Format f, Reduction how, std::string_view) {
    return typed(f, [&]<class T>(T) {
      auto* const to = static_cast<T*>(out);
      const Interval mine = s.of(rank_);
      std::fill_n(to, mine.size(), T(nan));
      return start(static_cast<const T*>(in), s.n, [=](const auto& inputs) { fold(to, inputs, mine, how); });
    });
  }
  Request start_all_gather(void* out, const void* in, const Shards& s, Format f, std::string_view) {
    return typed(f, [&]<class T>(T) {
      auto* const to = static_cast<T*>(out);
      const Interval mine = s.of(rank_);
      Request r = start(static_cast<const T*>(in), mine.size(), [=, this](const auto& inputs) {
        for (int i = 0; i < size(); ++i) {
          const auto& bytes = inputs[static_cast<std::size_t>(i)];
          if (!bytes.empty()) std::memcpy(to + s.of(i).begin, bytes.data(), bytes.size());
        }
      });
      for (index_t i = 0; i < s.n; ++i)
        if (i < mine.begin || i >= mine.end) to[i] = T(nan);
      if (in != to + mine.begin) std::fill_n(to + mine.begin, mine.size(), T(nan));
      return r;
    });
  }
  Request start_broadcast(void* out, index_t n, Format f, int root, std::string_view) {
    return typed(f, [&]<class T>(T) {
      auto* const values = static_cast<T*>(out);
      return start(values, n, [=](const auto& inputs) { std::memcpy(values, inputs[static_cast<std::size_t>(root)].data(), static_cast<std::size_t>(n) * sizeof(T)); });
    });
  }
  void wait(Request& r) {
    if (auto finish = std::exchange(r.finish, nullptr)) finish();
  }
  void progress() {}
  void reduce(std::span<double> numbers, Reduction how, std::string_view) {
    const auto bytes = std::as_bytes(std::span(numbers.data(), numbers.size()));
    const std::int64_t id = next_++;
    wires_->put(id, rank_, {bytes.begin(), bytes.end()});
    wires_->take(id, [&](const auto& inputs) {
      for (std::size_t i = 0; i < numbers.size(); ++i) {
        double sum = 0, most = -std::numeric_limits<double>::infinity(), x = 0;
        for (const auto& input : inputs) std::memcpy(&x, input.data() + i * sizeof x, sizeof x), sum += x, most = std::max(most, x);
        numbers[i] = how == Reduction::max ? most : how == Reduction::mean ? sum / size() : sum;
      }
    });
  }
  void broadcast(std::span<std::byte> bytes, int root, std::string_view) {
    const std::int64_t id = next_++;
    wires_->put(id, rank_, {bytes.begin(), bytes.end()});
    wires_->take(id, [&](const auto& inputs) { std::copy_n(inputs[static_cast<std::size_t>(root)].begin(), bytes.size(), bytes.begin()); });
  }
  void barrier(std::string_view) {
    double nothing = 0;
    reduce({&nothing, 1}, Reduction::sum, "");
  }

 private:
  static constexpr float nan = std::numeric_limits<float>::quiet_NaN();
  /// f(an element of the format)
  template <class F>
  static Request typed(Format format, F&& f) {
    if (format == Format::f32) return f(float{});
    if (format == Format::bf16) return f(bf16{});
    throw Error("ThreadRank", "format", "f32 or bf16", std::string(name(format)));
  }
  /// `then(inputs)` at the wait, before which `in` must not change.
  template <class T, class F>
  Request start(const T* in, index_t n, F then) {
    const auto bytes = std::as_bytes(std::span(in, static_cast<std::size_t>(n)));
    std::vector<std::byte> copy(bytes.begin(), bytes.end());
    const std::int64_t id = next_++;
    sent_ += copy.size();
    wires_->put(id, rank_, copy);
    return {[=, this, copy = std::move(copy)] {
      if (!std::equal(copy.begin(), copy.end(), bytes.begin())) throw Error("ThreadRank", "input", "as it was at the start", "changed before the wait");
      wires_->take(id, then);
    }};
  }
  template <class T>
  static void fold(T* to, const std::vector<std::vector<std::byte>>& inputs, const Interval& part, Reduction how) {
    for (index_t i = part.begin; i < part.end; ++i) {
      float sum = 0, most = -std::numeric_limits<float>::infinity();
      for (const auto& input : inputs) {
        T x;
        std::memcpy(&x, input.data() + static_cast<std::size_t>(i) * sizeof x, sizeof x);
        sum += static_cast<float>(x), most = std::max(most, static_cast<float>(x));
      }
      to[i - part.begin] = T(how == Reduction::max ? most : how == Reduction::mean ? sum / static_cast<float>(inputs.size()) : sum);
    }
  }
  ThreadWires* wires_;
  int rank_;
  std::int64_t next_ = 0;
  std::size_t sent_ = 0;
};
static_assert(Communicator<ThreadRank>);

/// f(communicator) on each of `ranks` threads; the first Error of one of them is thrown here.
template <class F>
void on_ranks(int ranks, F&& f) {
  ThreadWires wires(ranks);
  std::exception_ptr error;
  std::mutex mutex;
  std::vector<std::thread> threads;
  for (int r = 0; r < ranks; ++r)
    threads.emplace_back([&, r] {
      ThreadRank m(wires, r);
      try {
        f(m);
      } catch (...) {
        const std::lock_guard lock(mutex);
        if (!error) error = std::current_exception();
        wires.fail();
      }
    });
  for (std::thread& t : threads) t.join();
  if (error) std::rethrow_exception(error);
}

}  // namespace tinyllama::test
