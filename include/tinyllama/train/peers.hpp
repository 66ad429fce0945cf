// Peers: what a trainer asks of the processes with which it shares a training. distributed/ answers it, over any transport.
#pragma once

#include <cstdint>
#include <functional>
#include <span>

#include "tinyllama/model/gradient.hpp"
#include "tinyllama/train/partition.hpp"

namespace tinyllama {

/// The other ranks of a training on devices of type D. Every function that is said to be collective is called by all ranks, in the same order; they throw
/// Error, naming rank and operation, where a rank is gone or does not answer. A trainer alone has none.
template <class D>
class Peers {
 public:
  using A = typename D::activation;  // what products read
  /// A trainer's arrays, in the device's memory.
  struct Arrays {
    Partition partition;
    bool tied = false;            // the head is the embedding: part 0 is needed from the first row to the last
    A* products = nullptr;        // what products read, whole; null with fsdp
    const A* own = nullptr;       // the same of this rank's shards, one behind the other; null: they are at their places in `products`
    float* gradients = nullptr;   // whole; with fsdp own shards
    std::span<float> gains = {};  // f32 beside rounded products: each rank has what it owns, and zeros; their sum is what norms read
  };
  /// Where a pass finds a part's weights, and (null: not now) where it leaves their gradient, which is then to be cleared where it is always added to.
  using Place = std::function<void(int part, const A* values, float* gradients)>;

  virtual ~Peers() = default;
  virtual int rank() const = 0;
  virtual int ranks() const = 0;
  virtual Sharding sharding() const = 0;

  // ---- of the host's values; collective
  virtual void sum(std::span<double> values) = 0;
  virtual void most(std::span<double> values) = 0;
  virtual void broadcast(std::span<std::byte> bytes, int from) = 0;
  /// The same of numbers in the device's memory, whose work goes on behind it.
  virtual void most_on_device(std::span<float> values) = 0;
  virtual void sum_on_device(std::span<double> values) = 0;
  /// Behind a wait for the device: throws the Error of an operation that ended without its result.
  virtual void confirm() = 0;
  virtual void barrier() = 0;

  // ---- of the trainer's arrays
  /// Takes note of the arrays of the one trainer that it serves from now on, and allocates what sharing them takes.
  virtual void attach(D& dev, const Arrays& arrays) = 0;
  /// The arrays go: waits for what is under way in them, unless an Error is. Collective.
  virtual void detach() noexcept = 0;
  /// A step begins: no pass of it yet.
  virtual void begin_step() = 0;
  /// What the pass tells as it goes; collective for fsdp. `learning`: with gradients. `last`: of the step, whose gradients leave as they come. `place`
  /// outlives the pass.
  virtual PassHooks* begin_pass(bool learning, bool last, const Place& place) = 0;
  /// This rank's gradients summed over all, complete from part `from` on: the whole array (ddp), or its shards. Collective.
  virtual float* finish_gradients(int from) = 0;
  /// Weights were updated where they are owned: the others get them. Collective.
  virtual void begin_sharing_weights() = 0;
  virtual void finish_sharing_weights() = 0;
  /// Part p of an array of which each rank has its shards, whole, for the host; valid until the next call. Collective.
  virtual std::span<const float> gather(int part, const float* own) = 0;
  /// Of the device's memory, beside the trainer's arrays.
  virtual std::size_t bytes() const = 0;
};

}  // namespace tinyllama
