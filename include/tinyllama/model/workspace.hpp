// The activations of one step, in one block of device memory that grows to the largest step seen.
#pragma once

#include <array>

#include "tinyllama/model/memory_plan.hpp"
#include "tinyllama/device/memory.hpp"

namespace tinyllama {

/// Views of for_each_activation's list for a step of T rows and L rows of logits; 0 allocations once it is large enough.
template <Config C, Device D>
class Workspace {
  using X = extents<C>;
  using A = typename D::activation;

 public:
  void prepare(D& dev, const C& c, index_t rows, index_t logits) {
    const std::size_t bytes = activation_bytes<D>(c, rows, logits);
    if (bytes > memory_.bytes()) {
      memory_ = Memory<D>();  // not both at once
      memory_ = Memory<D>(dev, bytes);
    }
    std::byte* at = memory_.data();
    for_each_activation(c, rows, logits, [&](Activation a, index_t r, index_t n) {
      slots_[static_cast<std::size_t>(a)] = {at, {r, n}};
      at += aligned(static_cast<std::size_t>(r * n) * element_bytes<D>(a));
    });
  }

  View<float, dyn, X::hidden> x() const { return get(Activation::residual); }           // [T, hidden]
  View<A, dyn, X::hidden> normed() const { return get<A>(Activation::normed); }         // [T, hidden]
  View<float, dyn, X::hidden> projected() const { return get(Activation::projected); }  // [T, hidden]
  View<A, dyn, X::qkv> qkv() const { return get<A>(Activation::qkv); }                  // [T, (heads + 2 kv_heads) head_dim]
  View<A, dyn, X::hidden> attended() const { return get<A>(Activation::attended); }     // [T, hidden]
  View<A, dyn, X::gate_up> gate_up() const { return get<A>(Activation::gate_up); }      // [T, 2 ffn]
  View<A, dyn, X::ffn> gated() const { return get<A>(Activation::gated); }              // [T, ffn]
  View<float, dyn, dyn> cos() const { return get(Activation::cos); }                    // [T, head_dim / 2]
  View<float, dyn, dyn> sin() const { return get(Activation::sin); }
  View<A, dyn, X::hidden> selected() const { return get<A>(Activation::selected); }     // [L, hidden]
  View<float, dyn, X::vocab> logits() const { return get(Activation::logits); }         // [L, vocab]
  /// The same where the host can read them, once the step is done; valid until the next call or step.
  View<const float, dyn, X::vocab> host_logits(D& dev) { return dev.host(View<const float, dyn, X::vocab>(logits()), staging_); }

 private:
  struct Slot {
    std::byte* data = nullptr;
    std::array<index_t, 2> shape{};
  };
  template <class T = float>
  View<T, dyn, dyn> get(Activation a) const {
    const Slot& s = slots_[static_cast<std::size_t>(a)];
    return {reinterpret_cast<T*>(s.data), s.shape};
  }
  Memory<D> memory_;
  [[no_unique_address]] typename D::Staging staging_;
  std::array<Slot, static_cast<std::size_t>(Activation::logits) + 1> slots_;
};

}  // namespace tinyllama
