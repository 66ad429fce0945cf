// One block of the architecture, forward and backward side by side, over any Device and any kind of weight (arXiv 2401.02385, section 2.2).
//
//   mid = x   + Wo attention(rope(Wq n), rope(Wk n), Wv n),   n = rmsnorm(x)
//   out = mid + Wdown (silu(Wgate m) * Wup m),                m = rmsnorm(mid)
//
// Each half leaves what it adds where its sum will be; the norm that reads the sum adds the rest on its way, which saves a pass; or the product does,
// where the device can, which saves another.
#pragma once

#include "tinyllama/config/config.hpp"
#include "tinyllama/device/operations.hpp"

namespace tinyllama {

/// Weights of one layer. W is how a matrix is kept: Linear (packed, to be read) or LearnedMatrix (with its gradient).
template <class W>
struct Layer {
  const float* attn_norm = nullptr;  // [hidden]
  W qkv;                             // [(heads + 2 kv_heads) head_dim, hidden]
  W o;                               // [hidden, hidden]
  const float* ffn_norm = nullptr;   // [hidden]
  W gate_up;                         // [2 ffn, hidden]
  W down;                            // [hidden, ffn]
};

/// Where a block finds and leaves its activations, whose elements between products are A's. In inference all blocks share them, and out takes
/// the place of x.
template <Config C, class A = float>
struct BlockActivations {
  using X = extents<C>;
  View<float, dyn, X::hidden> x;         // [T, hidden], complete
  View<A, dyn, X::hidden> normed;        // [T, hidden]: n
  View<A, dyn, X::qkv> qkv;              // [T, (heads + 2 kv_heads) head_dim], rotated
  View<A, dyn, X::hidden> attended;      // [T, hidden]
  View<float, dyn, X::hidden> mid;       // [T, hidden]
  View<A, dyn, X::hidden> ffn_normed;    // [T, hidden]: m
  View<A, dyn, X::gate_up> gate_up;      // [T, 2 ffn]
  View<A, dyn, X::ffn> gated;            // [T, ffn]
  View<float, dyn, X::hidden> out;       // [T, hidden]; unless products add (detail::AddsToResidual), without mid until the next norm
  bool keeps_gate_up = true;             // else gate_up is scratch

  View<A, dyn, dyn> gate() const { return columns(gate_up, 0, gated.extent(1)); }
  View<A, dyn, dyn> up() const { return columns(gate_up, gated.extent(1), 2 * gated.extent(1)); }
};

/// cos and sin [T, head_dim / 2] of each row's position, and which rows they turn.
struct RopeAngles {
  View<float, dyn, dyn> cos, sin;
  RopeLayout layout = RopeLayout::half;
};

namespace detail {
/// Whether a product of D with weights W leaves the whole residual stream; else the norm that reads it adds the rest.
template <class D, class W>
concept AddsToResidual = requires(D& dev, View<float, dyn, dyn> y, View<typename D::activation, dyn, dyn> x, const W& w) { dev.matmul_add(y, x, w, y); };

/// Queries and keys of qkv, which lie side by side, turned by the angles (backward: by their opposites).
template <Config C, Device D, class V>
void rope_queries_and_keys(D& dev, const C& c, V qkv, const RopeAngles& r) {
  rope(dev, columns(qkv, 0, c.hidden + static_cast<index_t>(c.kv_heads) * head_dim(c)), r.cos, r.sin, r.layout);
}
}  // namespace detail

/// The same where what each half adds comes between as an activation, [T, hidden] of all blocks, which is less to write and to read; mid and out are then
/// the sums.
template <Config C, class A>
struct ApartActivations : BlockActivations<C, A> {
  View<A, dyn, dyn> added;
};

/// gated = silu(gate) up on the way out of the product that gives both, gate_up = x W^T; false, and nothing done, where D has no such kernel for W.
template <Device D, class Gated, class GateUp, class X, class W>
bool gates_product(D& dev, Gated gated, GateUp gate_up, X x, const W& w) {
  if constexpr (requires { dev.gated_product(gated, gate_up, x, w.view(), w.view(), true); }) {
    const index_t ffn = gated.extent(1), half = ffn * w.columns;
    return w.plain() && dev.gated_product(gated, gate_up, x, {w.value, {ffn, w.columns}}, {w.value + half, {ffn, w.columns}}, true);
  }
  return false;
}

/// What half a block adds to `x`: apart, or where its sum will be, with x in it where the product adds.
template <Device D, class Sum, class In, class W, class X, class Activations>
void half_forward(D& dev, Sum sum, In in, const W& w, X x, const Activations& a) {
  if constexpr (requires { a.added; }) matmul(dev, a.added, in, w);
  else if constexpr (detail::AddsToResidual<D, W>) dev.matmul_add(sum, in, w, x);
  else matmul(dev, sum, in, w);
}
/// sum = x + what half a block has added, by a product with W;  normed = its norm.
template <class W, Device D, class Normed, class Sum, class X, class Activations>
void half_sum(D& dev, Normed normed, Sum sum, X x, const Activations& a, const float* gain, float eps) {
  if constexpr (requires { a.added; }) add_rmsnorm(dev, normed, sum, x, a.added, gain, eps);
  else if constexpr (detail::AddsToResidual<D, W>) dev.rmsnorm(normed, sum, gain, eps);
  else dev.add_rmsnorm(normed, sum, x, gain, eps);
}

/// sum = x + what a product with W adds;  normed = its norm, which a product with `reader` reads. A device may do half of the norm in each of the two products.
template <Device D, class Sum, class Normed, class In, class W, class X, class Activations>
void half_and_norm(D& dev, Sum sum, Normed normed, In in, const W& w, X x, const Activations& a, const float* gain, float eps, const W& reader) {
  if constexpr (requires { dev.matmul_add_rmsnorm(sum, normed, in, w, x, gain, eps, reader); }) {
    dev.matmul_add_rmsnorm(sum, normed, in, w, x, gain, eps, reader);
  } else {
    half_forward(dev, sum, in, w, x, a);
    half_sum<W>(dev, normed, sum, x, a, gain, eps);
  }
}

/// a.x and a.normed are there; everything else of `a` is computed. `attend(attended, qkv)` is attention over a cache, or over the batch itself.
/// Without `output` the block stops before its last product: what backward needs to have again. With `next` a.normed becomes what the block behind reads.
template <Config C, Device D, class W, class Activations, class Attend>
void block_forward(D& dev, const C& c, const Layer<W>& w, const Activations& a, const RopeAngles& angles, Attend&& attend, bool output = true, const Layer<W>* next = nullptr) {
  if constexpr (requires { attend(a.attended, a.qkv, a.normed, w.qkv, angles); }) {  // makes queries, keys and values itself, on their way into the cache
    attend(a.attended, a.qkv, a.normed, w.qkv, angles);
  } else {
    matmul(dev, a.qkv, a.normed, w.qkv);
    detail::rope_queries_and_keys(dev, c, a.qkv, angles);
    attend(a.attended, a.qkv);
  }
  half_and_norm(dev, a.mid, a.ffn_normed, a.attended, w.o, a.x, a, w.ffn_norm, c.norm_eps, w.gate_up);

  if constexpr (requires { dev.matmul_swiglu(a.gated, a.gate_up, a.ffn_normed, w.gate_up, false); }) {
    dev.matmul_swiglu(a.gated, a.gate_up, a.ffn_normed, w.gate_up, a.keeps_gate_up);
  } else if (!gates_product(dev, a.gated, a.gate_up, a.ffn_normed, w.gate_up)) {
    matmul(dev, a.gate_up, a.ffn_normed, w.gate_up);
    swiglu(dev, a.gated, a.gate(), a.up());
  }
  if (next) half_and_norm(dev, a.out, a.normed, a.gated, w.down, a.mid, a, next->attn_norm, c.norm_eps, next->qkv);
  else if (output) half_forward(dev, a.out, a.gated, w.down, a.mid, a);
}

/// Gradients that pass through a block; all blocks share them. d[x] is the gradient of the loss by x.
template <Config C, class A = float>
struct BlockGradients {
  using X = extents<C>;
  View<float, dyn, X::hidden> x;         // [T, hidden]: d[out] on entry, d[x] on return; d[mid] between
  View<A, dyn, X::hidden> rounded;       // [T, hidden]: x as products read it; x itself where A is float
  View<A, dyn, X::hidden> normed;        // [T, hidden]: d[n], d[m]
  View<A, dyn, X::hidden> attended;      // [T, hidden]
  View<A, dyn, X::qkv> qkv;              // [T, (heads + 2 kv_heads) head_dim]
  View<A, dyn, X::ffn> gated;            // [T, ffn]
  float* rms = nullptr;                  // [T]
};

/// The gradient of all that block_forward computes. W's own gradients are where W keeps them; d[gain] go to d_attn_norm and d_ffn_norm [hidden]
/// (null: not wanted). d[gate_up] takes the place of a.gate_up. `attend_backward(d.qkv, d.attended)` turns the one into the other;
/// `opposite` are the forward angles with -sin. With `again` a.normed, a.ffn_normed and a.gated are computed again on the way.
template <Config C, class D, class W, class A, class Attend>
void block_backward(D& dev, const C& c, const Layer<W>& w, const BlockActivations<C, A>& a, const BlockGradients<C, A>& d, const RopeAngles& opposite,
                    Attend&& attend_backward, float* d_attn_norm, float* d_ffn_norm, bool again) {
  const auto wanted = [&](auto v) { return slice(v, 0, again ? v.extent(0) : 0); };
  matmul_backward_input(dev, d.gated, d.rounded, w.down);
  swiglu_backward(dev, a.gate(), a.up(), d.gated, a.gate(), a.up(), wanted(a.gated));
  matmul_backward_weight(dev, w.down, d.rounded, a.gated);
  matmul_backward_input(dev, d.normed, a.gate_up, w.gate_up);
  rmsnorm_backward(dev, d.x, d.rounded, d.normed, a.mid, w.ffn_norm, d_ffn_norm, c.norm_eps, d.rms, wanted(a.ffn_normed));
  matmul_backward_weight(dev, w.gate_up, a.gate_up, a.ffn_normed);

  matmul_backward_input(dev, d.attended, d.rounded, w.o);
  matmul_backward_weight(dev, w.o, d.rounded, a.attended);
  attend_backward(d.qkv, d.attended);
  detail::rope_queries_and_keys(dev, c, d.qkv, opposite);
  matmul_backward_input(dev, d.normed, d.qkv, w.qkv);
  rmsnorm_backward(dev, d.x, d.rounded, d.normed, a.x, w.attn_norm, d_attn_norm, c.norm_eps, d.rms, wanted(a.normed));
  matmul_backward_weight(dev, w.qkv, d.qkv, a.normed);
}

}  // namespace tinyllama
