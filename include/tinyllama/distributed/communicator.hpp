// The concept Communicator: what a training asks of the wires between its ranks; and Single, the communicator of one.
#pragma once

#include <concepts>
#include <cstddef>
#include <cstring>
#include <span>
#include <string_view>

#include "tinyllama/device/memory.hpp"
#include "tinyllama/train/partition.hpp"

namespace tinyllama {

/// How the ranks' values become one.
enum class Reduction : std::uint8_t { sum, max, mean };

/// What f32 is turned into for its way, and `room` for the operation's numbers in that format. A communicator that can (Nccl) sums `out` [n], or a rank's shard of `in`, by
///   start_all_reduce(out, n, wire, what)   start_reduce_scatter(out, in, shards, wire, what)
struct Wire {
  Format format = Format::f32;
  void* room = nullptr;
};

/// M connects `size` ranks. Every operation is collective: all ranks call it, in the same order, with the same sizes. start_... takes pointers into memory
/// that M can reach (the host's for Mpi, the card's for Nccl) and returns at once: the memory is M's until wait(). What the device was asked to do before a
/// start is done before the operation reads; what it is asked after a wait comes after the operation's result. Formats: f32 and bf16, whose sums are rounded
/// at each addition. `what` is for errors, and outlives the request: they name this rank, the operation, and the rank that is gone. After an Error
/// only the destructor may be called.
template <class M>
concept Communicator = requires(M& m, const M& c, typename M::Request& request, void* out, const void* in, index_t n, Format format, Reduction how,
                                const Shards& shards, int root, std::span<double> numbers, std::span<std::byte> bytes, std::string_view what) {
  { c.rank() } -> std::same_as<int>;
  { c.size() } -> std::same_as<int>;
  { m.start_all_reduce(out, n, format, how, what) } -> std::same_as<typename M::Request>;              // [n], in place
  { m.start_reduce_scatter(out, in, shards, format, how, what) } -> std::same_as<typename M::Request>; // own shard of the sum; in [n]
  { m.start_all_gather(out, in, shards, format, what) } -> std::same_as<typename M::Request>;          // out [n]; in: own shard, or its place in out
  { m.start_broadcast(out, n, format, root, what) } -> std::same_as<typename M::Request>;              // [n]
  m.wait(request);                                                                                     // nothing where there is no request
  m.progress();                                                                                        // now and then between start and wait
  m.reduce(numbers, how, what);                                                                        // the host's, in place; there on return
  m.broadcast(bytes, root, what);
  m.barrier(what);
};

/// One rank: copies where a result has another place, and nothing else.
template <class D>
class Single {
 public:
  struct Request {};
  explicit Single(D& dev) : dev_(&dev) {}
  int rank() const { return 0; }
  int size() const { return 1; }
  Request start_all_reduce(void*, index_t, Format, Reduction, std::string_view) { return {}; }
  Request start_reduce_scatter(void* out, const void* in, const Shards& s, Format f, Reduction, std::string_view) { return copy(out, in, s.n, f); }
  Request start_all_gather(void* out, const void* in, const Shards& s, Format f, std::string_view) { return copy(out, in, s.n, f); }
  Request start_broadcast(void*, index_t, Format, int, std::string_view) { return {}; }
  void wait(Request&) {}
  void progress() {}
  void reduce(std::span<double>, Reduction, std::string_view) {}
  void broadcast(std::span<std::byte>, int, std::string_view) {}
  void barrier(std::string_view) {}

 private:
  Request copy(void* out, const void* in, index_t n, Format f) {
    if (out != in) dev_->copy_bytes(out, in, row_bytes(f, n));
    return {};
  }
  D* dev_;
};

}  // namespace tinyllama
