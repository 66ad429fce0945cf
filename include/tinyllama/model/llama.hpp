// The forward pass of inference, over any Device: blocks (model/block.hpp) between an embedding and a head, attention over a cache.
//
// T tokens of a batch (of one or many sequences) go through together; only attention knows the sequences apart.
//   x = E[ids];  x = block(x) for each layer;  logits = Whead rmsnorm(x)
#pragma once

#include <span>

#include "tinyllama/model/block.hpp"
#include "tinyllama/model/weights.hpp"
#include "tinyllama/model/workspace.hpp"

namespace tinyllama {

/// An observer that sees nothing: the default, which costs nothing. One of the caller's may have any of
///   void hidden(int layer, View<const float, dyn, dyn> x)                  // [T, hidden]: the residual stream behind each layer; -1: the embedding
///   void attention(int layer, const Sequence&, View<const float, dyn, dyn, dyn> p)  // [heads, tokens, position + tokens]: probabilities
struct NoObserver {};

/// Which rows of a step get logits.
enum class Logits : std::uint8_t { none, last, all };

namespace detail {
template <class O>
inline constexpr bool observes_hidden = requires(O& o, View<const float, dyn, dyn> x) { o.hidden(0, x); };
template <class O>
inline constexpr bool observes_attention = requires(O& o, const Sequence& s, View<const float, dyn, dyn, dyn> p) { o.attention(0, s, p); };
}  // namespace detail

namespace detail {
template <Config C, Device D, class Ids, class Observer>
void forward(const Weights<C, D>& w, const Ids& ids, std::span<const Sequence> batch, Workspace<C, D>& work, Logits want, Observer&& observer) {
  using O = std::remove_reference_t<Observer>;
  using X = extents<C>;
  using A = typename D::activation;
  D& dev = *w.device;
  const C& c = w.config;
  const auto T = static_cast<index_t>(ids.size()), S = static_cast<index_t>(batch.size());
  const index_t q_columns = c.hidden, kv_columns = static_cast<index_t>(c.kv_heads) * head_dim(c);
  work.prepare(dev, c, T, want == Logits::none ? 0 : want == Logits::last ? S : T);

  constexpr bool observed = observes_hidden<O> || observes_attention<O>;
  // A device may offer one token's step as a whole.
  if constexpr (!observed && requires { dev.decode(w.prepared, work.logits().data(), ids[0], batch[0]); })
    if (T == 1 && want != Logits::none && dev.decode(w.prepared, work.logits().data(), ids[0], batch[0])) return;

  const View<float, dyn, X::hidden> x = work.x(), y = work.projected();  // [T, hidden]
  const View<A, dyn, X::hidden> n = work.normed();
  const BlockActivations<C, A> a{x, n, work.qkv(), work.attended(), y, n, work.gate_up(), work.gated(), x, false};
  const RopeAngles angles{work.cos(), work.sin(), w.rope};
  const View<A, dyn, X::kv> k = columns(a.qkv, q_columns, q_columns + kv_columns);  // [T, kv_heads head_dim]
  const View<A, dyn, X::kv> v = columns(a.qkv, q_columns + kv_columns, q_columns + 2 * kv_columns);
  const View<A, dyn, X::q> q = columns(a.qkv, 0, q_columns);                        // [T, heads head_dim]

  const typename D::Batch step = dev.batch(ids, batch);
  [[maybe_unused]] typename D::Staging seen;  // what observers see
  constexpr bool rope_on_the_way = requires(const Linear& qkv) { dev.matmul_rope_store_kv(a.qkv, n, qkv, angles.cos, angles.sin, angles.layout, w.cache, 0, step); };  // into the pages
  constexpr bool complete = AddsToResidual<D, Linear>;  // x, behind a layer
  const auto enqueue = [&] {  // nvcc 13 wants braces behind each if constexpr of a lambda
    dev.rope_angles(angles.cos, angles.sin, w.frequencies, step);
    dev.embedding(x, w.embedding, step);
    if constexpr (observes_hidden<O>) observer.hidden(-1, dev.host(View<const float, dyn, dyn>(x), seen));

    for (int l = 0; l < c.layers; ++l) {
      const LayerWeights& layer = w.layers[static_cast<std::size_t>(l)];
      const LayerWeights* const next = complete && l + 1 < c.layers ? &layer + 1 : nullptr;  // whose norm the block before it does
      if (l == 0 || (!complete && observes_hidden<O>)) dev.rmsnorm(n, x, layer.attn_norm, c.norm_eps);
      else if (!complete) dev.add_rmsnorm(n, x, y, layer.attn_norm, c.norm_eps);
      const auto attend = [&](auto attended) {
        dev.attention(attended, q, w.cache, l, step);
        if constexpr (observes_attention<O>) {
          for (const Sequence& s : batch) {
            const auto p = dev.attention_probabilities(q, w.cache, l, s);  // owned, [heads, tokens, position + tokens]
            observer.attention(l, s, View<const float, dyn, dyn, dyn>(p.data(), {c.heads, s.tokens, s.position + s.tokens}));
          }
        }
      };
      if constexpr (rope_on_the_way) {
        block_forward(dev, c, layer, a, angles, [&](auto attended, auto qkv, auto normed, const Linear& w_qkv, const RopeAngles& r) {
          dev.matmul_rope_store_kv(qkv, normed, w_qkv, r.cos, r.sin, r.layout, w.cache, l, step);
          attend(attended);
        }, true, next);
      } else {
        block_forward(dev, c, layer, a, angles, [&](auto attended, auto) {
          dev.store_kv(k, v, w.cache, l, step);
          attend(attended);
        }, true, next);
      }
      if constexpr (observes_hidden<O>) {
        if constexpr (!complete) dev.add(x, y);
        observer.hidden(l, dev.host(View<const float, dyn, dyn>(x), seen));
      }
    }

    if (want == Logits::none) return;
    if constexpr (complete || observes_hidden<O>) dev.rmsnorm(n, x, w.final_norm, c.norm_eps);
    else dev.add_rmsnorm(n, x, y, w.final_norm, c.norm_eps);
    if (want == Logits::all) return matmul(dev, work.logits(), n, w.head);
    dev.last_rows(work.selected(), n, step);
    matmul(dev, work.logits(), work.selected(), w.head);
  };
  // A device may keep steps that look alike.
  if constexpr (!observed && requires { dev.repeat(w.prepared, step, x.data(), 0, enqueue); }) dev.repeat(w.prepared, step, x.data(), static_cast<int>(want), enqueue);
  else enqueue();
}
}  // namespace detail

/// One step: `ids` [T] of all sequences of `batch`, one after the other, through the model; keys and values go into the sequences' pages,
/// logits into work.logits(), [sequences, vocab] for Logits::last, [T, vocab] for Logits::all. Ids were checked against the vocabulary.
template <Config C, Device D, class Observer = NoObserver>
void forward(const Weights<C, D>& w, std::span<const std::int32_t> ids, std::span<const Sequence> batch, Workspace<C, D>& work, Logits want,
             Observer&& observer = {}) {
  detail::forward(w, ids, batch, work, want, observer);
}
/// The same with ids that a device which takes them has itself.
template <Config C, Device D>
void forward(const Weights<C, D>& w, DeviceIds ids, std::span<const Sequence> batch, Workspace<C, D>& work, Logits want) {
  detail::forward(w, ids, batch, work, want, NoObserver{});
}

}  // namespace tinyllama
