// Attention on a Cpu: the angles of its positions, its cache, and the split of prefill over queries and of decoding over keys. Compiled once a program under
// TINYLLAMA_DISPATCH.
#pragma once

#include <cmath>

#include "tinyllama/device/cpu.hpp"
#include "tinyllama/kernels/reference.hpp"

namespace tinyllama {

TINYLLAMA_COMPILED void Cpu::rope_angles(View<float, dyn, dyn> cos, View<float, dyn, dyn> sin, std::span<const double> frequencies, std::span<const Sequence> batch) const {
  for (const Sequence& s : batch)
    for (index_t t = 0; t < s.tokens; ++t)
      for (std::size_t i = 0; i < frequencies.size(); ++i) {
        const double angle = static_cast<double>(s.position + t) * frequencies[i];
        cos(s.first_row + t, i) = static_cast<float>(std::cos(angle));
        sin(s.first_row + t, i) = static_cast<float>(std::sin(angle));
      }
}

TINYLLAMA_COMPILED void Cpu::store_kv(View<const float, dyn, dyn> k, View<const float, dyn, dyn> v, const CacheShape& shape, index_t layer, std::span<const Sequence> batch) const {
  for (const Sequence& s : batch)
    // One task for a head, not for a token: neighbouring positions share the cache lines of K.
    parallel_for(shape.kv_heads, s.tokens * shape.head_dim > 2048 ? 1 : shape.kv_heads, [&](index_t begin, index_t end) {
      for (index_t h = begin; h < end; ++h)
        for (index_t t = 0; t < s.tokens; ++t) {
          const index_t p = s.position + t;
          std::byte* page = s.pages[p / page_tokens];
          kernels_->store_kv({at(k, s.first_row + t) + h * shape.head_dim, at(v, s.first_row + t) + h * shape.head_dim, shape.head_dim, p % page_tokens,
                              page + shape.k_offset(layer, h), page + shape.v_offset(layer, h), shape.format});
        }
    });
}

TINYLLAMA_COMPILED void Cpu::attention(View<float, dyn, dyn> out, View<const float, dyn, dyn> q, const CacheShape& shape, index_t layer, std::span<const Sequence> batch) {
  const index_t hd = shape.head_dim, stride = head_stride(hd), heads = q.extent(1) / hd, group = heads / shape.kv_heads;
  const float scale = 1.0f / std::sqrt(static_cast<float>(hd));
  const auto task_for = [&](const Sequence& s, index_t h, index_t token, index_t tokens) {
    AttentionTask t{};
    t.q = at(q, s.first_row + token) + h * group * hd, t.ldq = q.stride(0), t.head_dim = hd, t.group = group, t.rows = tokens * group;
    t.position = s.position + token, t.pages = s.pages, t.k_offset = shape.k_offset(layer, h), t.v_offset = shape.v_offset(layer, h);
    t.format = shape.format, t.scale = scale, t.begin = 0, t.end = t.position + tokens;
    return t;
  };
  // Divides by the sum and drops the padding; parts (of a split sequence) are first brought to their common maximum.
  const auto finish = [&](float* to, const float* o, const float* max, const float* sum, index_t parts, index_t part_stride, index_t part_rows) {
    float top = max[0];
    for (index_t p = 1; p < parts; ++p) top = std::max(top, max[p * part_rows]);
    float total = 0;
    for (index_t p = 0; p < parts; ++p) total += sum[p * part_rows] * std::exp(max[p * part_rows] - top);
    for (index_t p = 0; p < parts; ++p) {
      const float f = std::exp(max[p * part_rows] - top) / total;
      for (index_t d = 0; d < hd; ++d) to[d] = (p ? to[d] : 0.0f) + f * o[p * part_stride + d];
    }
  };
  // Prefill: blocks of queries, each over all of its keys.
  const bool narrow = shape.compute == Compute::bf16 && kernels_->bf16_dot;
  const index_t most_rows = narrow ? prefill_rows(hd) : 64, block = std::max<index_t>(1, most_rows / group);
  index_t split_rows = 0, longest = 0;
  for (const Sequence& s : batch) {
    if (s.tokens < split_tokens || group > most_rows) {
      split_rows += s.tokens, longest = std::max(longest, s.position + s.tokens);
      continue;
    }
    const index_t blocks = (s.tokens + block - 1) / block;
    pool_->run(blocks * shape.kv_heads, [&](index_t unit) {
      // Long blocks first: they are what the others would wait for.
      const index_t h = unit % shape.kv_heads, token = (blocks - 1 - unit / shape.kv_heads) * block, tokens = std::min(block, s.tokens - token);
      alignas(64) float o[prefill_elements], max[prefill_rows(1)], sum[prefill_rows(1)];
      AttentionTask t = task_for(s, h, token, tokens);
      t.o = o, t.max = max, t.sum = sum;
      narrow ? kernels_->attention_bf16(t) : kernels_->attention(t);
      for (index_t r = 0; r < t.rows; ++r)
        finish(at(out, s.first_row + token + r / group) + (h * group + r % group) * hd, o + r * stride, max + r, sum + r, 1, 0, 0);
    });
  }
  if (split_rows == 0) return;
  // Decoding: few queries and many keys, so the keys are split; one fork for all parts of all sequences.
  struct Split {
    index_t length, parts, r_kv, r_all;  // rows of one KV head and of all
    float *o, *max, *sum;
  };
  auto* memory = reinterpret_cast<float*>(scratch(attention_scratch(shape, heads, split_rows, longest)));
  const auto split_of = [&](const Sequence& s, float* at) {
    const index_t length = s.position + s.tokens, parts = (length + split_positions - 1) / split_positions, r_all = s.tokens * heads;
    return Split{length, parts, s.tokens * group, r_all, at, at + r_all * parts * stride, at + r_all * parts * (stride + 1)};
  };
  // f(sequence, its split) for each sequence that is split.
  const auto for_each_split = [&](auto&& f) {
    float* at = memory;
    for (const Sequence& s : batch)
      if (s.tokens < split_tokens || group > most_rows) {
        const Split split = split_of(s, at);
        at += split.r_all * split.parts * (stride + 2);
        f(s, split);
      }
  };
  index_t units = 0, keys = 0;
  for_each_split([&](const Sequence&, const Split& split) { units += split.parts * shape.kv_heads, keys += split.length; });
  const auto run = [&](index_t unit) {
    for_each_split([&](const Sequence& s, const Split& split) {
      const index_t here = unit;
      unit -= split.parts * shape.kv_heads;
      if (here < 0 || unit >= 0) return;
      const index_t h = here % shape.kv_heads, p = here / shape.kv_heads, r = p * split.r_all + h * split.r_kv;
      AttentionTask t = task_for(s, h, 0, s.tokens);
      t.begin = p * split_positions, t.end = std::min(t.end, t.begin + split_positions);
      t.o = split.o + r * stride, t.max = split.max + r, t.sum = split.sum + r;
      kernels_->attention(t);
    });
  };
  if (keys * heads * hd < 65536) {
    for (index_t unit = 0; unit < units; ++unit) run(unit);
  } else {
    pool_->run(units, run);
  }
  for_each_split([&](const Sequence& s, const Split& split) {
    for (index_t h = 0; h < shape.kv_heads; ++h)
      for (index_t r = 0; r < split.r_kv; ++r) {
        // A row that ends before the last part sees nothing there: its maximum is -infinity and its share 0.
        const index_t i = h * split.r_kv + r;
        finish(at(out, s.first_row + r / group) + (h * group + r % group) * hd, split.o + i * stride, split.max + i, split.sum + i, split.parts,
               split.r_all * stride, split.r_all);
      }
  });
}

TINYLLAMA_COMPILED std::vector<float> Cpu::attention_probabilities(View<const float, dyn, dyn> q, const CacheShape& shape, index_t layer, const Sequence& s) const {
  const index_t hd = shape.head_dim, heads = q.extent(1) / hd, length = s.position + s.tokens;
  std::vector<float> p(static_cast<std::size_t>(heads * s.tokens * length), 0.0f);
  parallel_for(heads, 1, [&](index_t h, index_t) {
    for (index_t t = 0; t < s.tokens; ++t) {
      float* to = p.data() + (h * s.tokens + t) * length;
      const index_t seen = s.position + t + 1;
      for (index_t i = 0; i < seen; ++i) {
        const std::byte* k = s.pages[i / page_tokens] + shape.k_offset(layer, h * shape.kv_heads / heads);
        for (index_t d = 0; d < hd; ++d) to[i] += at(q, s.first_row + t)[h * hd + d] * reference::load_k(shape.format, k, hd, i % page_tokens, d);
      }
      kernels_->softmax(to, to, seen, 1.0f / std::sqrt(static_cast<float>(hd)));
    }
  });
  return p;
}

}  // namespace tinyllama
