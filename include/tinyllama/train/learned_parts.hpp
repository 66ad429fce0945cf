// Where a pass finds the matrices and gains of a part of the weights, and their gradients, in flat arrays.
#pragma once

#include <initializer_list>
#include <type_traits>

#include "tinyllama/model/gradient.hpp"
#include "tinyllama/train/adapters.hpp"
#include "tinyllama/train/partition.hpp"

namespace tinyllama {

/// The arrays of a part, each in the order of for_each_parameter.
template <class A>
struct PartArrays {
  const A* products = nullptr;     // what products read
  float* gradient = nullptr;       // null: none
  const float* gains = nullptr;    // the part's gains, one behind the other; null: at their places in
  const float* values = nullptr;   // the part in f32; null: in `products`, where A is float
  GemmOptions how = {};
};

/// Points the part's matrices and gains at them. Q, K and V lie one behind the other, and gate and up, so that they are one matrix each.
template <Config C, class A>
void place_part(LearnedWeights<C, A>& to, int part, PartArrays<A> a) {
  const C& c = to.config;
  LearnedLayer<A>* const l = part > 0 && part <= c.layers ? &to.layers[static_cast<std::size_t>(part - 1)] : nullptr;
  const auto pass_by = [&](index_t n) {
    a.products += n;
    if (a.values) a.values += n;
    if (a.gradient) a.gradient += n;
  };
  const auto matrix = [&](LearnedMatrix<A>& m, std::initializer_list<index_t> rows, index_t columns) {
    m.value = a.products, m.gradient = a.gradient, m.columns = columns, m.how = a.how, m.rows = 0;
    for (const index_t r : rows) m.rows += r;
    pass_by(m.rows * columns);
  };
  const index_t d = c.hidden, kv = static_cast<index_t>(c.kv_heads) * head_dim(c), f = c.ffn;
  const auto gain = [&](const float*& value, float*& gradient_of) {
    if constexpr (std::is_same_v<A, float>) value = a.products;
    else value = a.gains ? a.gains : a.values;
    gradient_of = a.gradient;
    if (a.gains) a.gains += d;
    pass_by(d);
  };
  if (l) {
    gain(l->attn_norm, l->d_attn_norm);
    matrix(l->qkv, {d, kv, kv}, d), matrix(l->o, {d}, d);
    gain(l->ffn_norm, l->d_ffn_norm);
    matrix(l->gate_up, {f, f}, d), matrix(l->down, {d}, f);
  } else if (part == 0) {
    matrix(to.embedding, {index_t{c.vocab}}, d);
    if (c.tied) to.head = to.embedding;
  } else {
    gain(to.final_norm, to.d_final_norm);
    if (!c.tied) matrix(to.head, {index_t{c.vocab}}, d);
  }
}

/// The adapters beside their matrices: `values` as products read them and `gradients`, in the order of for_each_adapter.
template <Config C, class A>
void place_adapters(LearnedWeights<C, A>& to, const LoraOptions& o, const A* values, float* gradients) {
  const C& c = to.config;
  for_each_adapter(c, o, [&](const Adapter& a) {
    LearnedLayer<A>& l = to.layers[static_cast<std::size_t>(a.target.layer)];
    const index_t d = c.hidden, kv = static_cast<index_t>(c.kv_heads) * head_dim(c);
    LearnedMatrix<A>* m = nullptr;
    index_t first_row = 0;
    switch (a.target.slot) {
      case Slot::q: m = &l.qkv; break;
      case Slot::k: m = &l.qkv, first_row = d; break;
      case Slot::v: m = &l.qkv, first_row = d + kv; break;
      case Slot::o: m = &l.o; break;
      case Slot::gate: m = &l.gate_up; break;
      case Slot::up: m = &l.gate_up, first_row = c.ffn; break;
      default: m = &l.down; break;
    }
    m->adapters[static_cast<std::size_t>(m->adapter_count++)] = {first_row, a.target.rows, a.rank, values + a.a, values + a.b, gradients + a.a, gradients + a.b, o.scale(), 0.0f, 0};
  });
}

}  // namespace tinyllama
