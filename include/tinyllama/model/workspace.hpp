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

 public:
  void prepare(D& dev, const C& c, index_t rows, index_t logits) {
    const std::size_t bytes = activation_bytes(c, rows, logits);
    if (bytes > memory_.bytes()) {
      memory_ = Memory<D>();  // not both at once
      memory_ = Memory<D>(dev, bytes);
    }
    std::byte* at = memory_.data();
    for_each_activation(c, rows, logits, [&](Activation a, index_t r, index_t n) {
      views_[static_cast<std::size_t>(a)] = View<float, dyn, dyn>(reinterpret_cast<float*>(at), {r, n});
      at += aligned(static_cast<std::size_t>(r * n) * sizeof(float));
    });
  }

  View<float, dyn, X::hidden> x() const { return get(Activation::residual); }           // [T, hidden]
  View<float, dyn, X::hidden> normed() const { return get(Activation::normed); }        // [T, hidden]
  View<float, dyn, X::hidden> projected() const { return get(Activation::projected); }  // [T, hidden]
  View<float, dyn, X::qkv> qkv() const { return get(Activation::qkv); }                 // [T, (heads + 2 kv_heads) head_dim]
  View<float, dyn, X::hidden> attended() const { return get(Activation::attended); }    // [T, hidden]
  View<float, dyn, X::gate_up> gate_up() const { return get(Activation::gate_up); }     // [T, 2 ffn]
  View<float, dyn, X::ffn> gated() const { return get(Activation::gated); }             // [T, ffn]
  View<float, dyn, dyn> cos() const { return get(Activation::cos); }                    // [T, head_dim / 2]
  View<float, dyn, dyn> sin() const { return get(Activation::sin); }
  View<float, dyn, X::hidden> selected() const { return get(Activation::selected); }    // [L, hidden]
  View<float, dyn, X::vocab> logits() const { return get(Activation::logits); }         // [L, vocab]

 private:
  View<float, dyn, dyn> get(Activation a) const { return views_[static_cast<std::size_t>(a)]; }
  struct Slot2d : View<float, dyn, dyn> {
    Slot2d() : View(nullptr, {0, 0}) {}
    Slot2d& operator=(View<float, dyn, dyn> v) { return static_cast<View&>(*this) = v, *this; }
  };
  Memory<D> memory_;
  std::array<Slot2d, static_cast<std::size_t>(Activation::logits) + 1> views_;
};

}  // namespace tinyllama
