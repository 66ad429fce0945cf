// Training's operations on the CPU, split over threads: over outputs, never inside a sum, so that the bits do not depend on how many.
#pragma once

#include <algorithm>
#include <cmath>
#include <span>
#include <string>
#include <string_view>

#include "tinyllama/config/parameters.hpp"
#include "tinyllama/device/cpu.hpp"
#include "tinyllama/kernels/cpu/training_kernels.hpp"

namespace tinyllama {

/// How a product is computed. bf16: operands rounded to nearest even, sums in f32; where the CPU has no such instruction, f32, which is then
/// no slower.
struct GemmOptions {
  bool bf16 = false;
  bool accumulate = false;  ///< y += rather than y =
  bool fp8 = false;         ///< operands of a learned matrix in 8-bit floats, where the device has them
  bool passing = false;     ///< its weights come for one product after the other, and go: nothing made of them is kept
};

/// A learned matrix in products of 8-bit floats. What is known of its magnitudes is kept under `id`, its own as long as it is learned, wherever its weights are now.
template <class A>
struct Fp8Weights {
  View<const A, dyn, dyn> values;
  const void* id;
  bool passing = false;
};

/// How the columns of qkv [T, (heads + 2 kv_heads) head_dim] are heads.
struct HeadShape {
  index_t heads = 0, kv_heads = 0, head_dim = 0;
};

/// The training kernels of the device's instruction set.
inline const TrainingKernels& training_kernels(const Cpu& dev) {
  const std::string_view name = dev.instruction_set();
  if (name == reference::training_kernels.instruction_set) return reference::training_kernels;
  const auto all = all_cpu_training_kernels();
  for (const TrainingKernels* k : all)
    if (name == k->instruction_set) return *k;
  return *all.front();
}

namespace detail {

template <class T>
T* row_of(View<T, dyn, dyn> v, index_t t) { return v.data() + t * v.stride(0); }

/// f(t) for each of `count` rows of `length` elements; small work stays on the caller's thread.
template <class F>
void each_row(const Cpu& dev, index_t count, index_t length, F&& f) {
  dev.parallel_for(count, std::max<index_t>(1, 8192 / std::max<index_t>(1, length)), [&](index_t begin, index_t end) {
    for (index_t t = begin; t < end; ++t) f(t);
  });
}

constexpr std::size_t whole_lines(std::size_t bytes) { return (bytes + 63) / 64 * 64; }
// Panels of B that are packed at a time, and the rows of A and panels of B of a thread's unit. 64 rows of 2048 columns in bf16 stay in a core's L2 for all
// panels of a unit; A as a whole, 46 MB for a gradient of gate and up, passes once for 48 panels (once for 3 had left dx at 53% and dW at 56% of the peak).
inline constexpr index_t gemm_packed_panels = 48, gemm_unit_rows = 64, gemm_unit_panels = 12;
inline constexpr index_t stretch = index_t{1} << 16;  // weights that one thread takes at a time

inline Operand operand(std::string_view which, View<const float, dyn, dyn> v) {
  const Operand o{v.data(), v.stride(0), v.stride(1), v.extent(0), v.extent(1)};
  if (o.row_stride != 1 && o.column_stride != 1 && o.rows > 1 && o.k > 1)
    throw Error("gemm", which, "adjacent elements along one axis", "strides " + shape_text(v.strides()));
  // Strides of an axis of one element say nothing; a row must look like a row.
  if (o.rows == 1) return {o.data, std::max<index_t>(2, o.k), o.k > 1 ? o.column_stride : 1, 1, o.k};
  return o;
}

}  // namespace detail

/// Scratch of gemm for [m, k] times [., k].
constexpr std::size_t gemm_scratch(index_t m, index_t k, bool narrow) {
  const auto panel = static_cast<std::size_t>(panel_elements(k)) * (narrow ? sizeof(bf16) : sizeof(float));
  return static_cast<std::size_t>((m + panel_rows - 1) / panel_rows + detail::gemm_packed_panels) * panel + 64;
}

/// y [M, N] (+)= a [M, K] b [N, K]^T, all f32. a and b may be transposed views. With W [N, K] and x [T, K]: y = x W^T is gemm(y, x, W),
/// dx = dy W is gemm(dx, dy, transposed(W)), dW += dy^T x is gemm(dW, transposed(dy), transposed(x)).
inline void gemm(Cpu& dev, View<float, dyn, dyn> y, View<const float, dyn, dyn> a, View<const float, dyn, dyn> b, const GemmOptions& o = {}) {
  const Operand left = detail::operand("a", a), right = detail::operand("b", b);
  const index_t m = y.extent(0), n = y.extent(1), k = left.k;
  if (left.rows != m || right.rows != n || right.k != k)
    throw Error("gemm", "shapes", "y [M, N] = a [M, K] b [N, K]^T",
                "[" + std::to_string(m) + ", " + std::to_string(n) + "] = " + detail::shape_text(a.shape()) + " " + detail::shape_text(b.shape()) + "^T");
  if (n > 1 && y.stride(1) != 1) throw Error("gemm", "y", "rows of adjacent elements", "strides " + detail::shape_text(y.strides()));
  if (m == 0 || n == 0) return;
  const TrainingKernels& kernels = training_kernels(dev);
  const bool narrow = o.bf16 && kernels.bf16_dot;
  const std::size_t panel_bytes = static_cast<std::size_t>(panel_elements(k)) * (narrow ? sizeof(bf16) : sizeof(float));
  const index_t a_panels = (m + panel_rows - 1) / panel_rows, b_panels = (n + panel_rows - 1) / panel_rows;
  std::byte* packed = dev.scratch(gemm_scratch(m, k, narrow));
  std::byte* packed_b = packed + detail::whole_lines(static_cast<std::size_t>(a_panels) * panel_bytes);
  const bool fork = m * n * k >= 32768;  // below it a fork would cost more
  const auto units = [&](index_t count, auto&& f) {
    if (fork) dev.parallel_for(count, 1, [&](index_t begin, index_t) { f(begin); });
    else
      for (index_t i = 0; i < count; ++i) f(i);
  };
  // Panels [first, last) of an operand. Transposed: near a kilobyte of each row at a time.
  const auto pack = [&](std::byte* to, const Operand& from, index_t first, index_t last) {
    const index_t grain = std::max<index_t>(from.row_stride == 1 ? 12 : 1, 16384 / panel_elements(k));
    units((last - first + grain - 1) / grain, [&](index_t unit) {
      const index_t begin = unit * grain, count = std::min(last - first - begin, grain);
      Operand part = from;
      part.data += (first + begin) * panel_rows * from.row_stride, part.rows -= (first + begin) * panel_rows;
      std::byte* at = to + static_cast<std::size_t>(begin) * panel_bytes;
      if (narrow) kernels.pack_bf16(reinterpret_cast<bf16*>(at), part, 0, count);
      else kernels.pack_f32(reinterpret_cast<float*>(at), part, 0, count);
    });
  };
  pack(packed, left, 0, a_panels);
  for (index_t p = 0; p < b_panels; p += detail::gemm_packed_panels) {
    const index_t count = std::min(b_panels - p, detail::gemm_packed_panels), parts = (count + detail::gemm_unit_panels - 1) / detail::gemm_unit_panels;
    pack(packed_b, right, p, p + count);
    const GemmTask t{packed, packed_b, m, n - p * panel_rows, k, y.data() + p * panel_rows, y.stride(0), o.accumulate};
    units((m + detail::gemm_unit_rows - 1) / detail::gemm_unit_rows * parts, [&](index_t unit) {
      const index_t row = unit / parts * detail::gemm_unit_rows, first = unit % parts * detail::gemm_unit_panels;
      (narrow ? kernels.gemm_bf16 : kernels.gemm_f32)(t, row, std::min(m, row + detail::gemm_unit_rows), first, std::min(count, first + detail::gemm_unit_panels));
    });
  }
}

namespace detail {

inline FlashTask flash_task(View<const float, dyn, dyn> qkv, const Sequence& s, const HeadShape& shape, index_t head, bool narrow) {
  const index_t hd = shape.head_dim, kv = head * shape.kv_heads / shape.heads;
  const float* rows = row_of(qkv, s.first_row);
  FlashTask t{};
  t.q = rows + head * hd, t.k = rows + (shape.heads + kv) * hd, t.v = rows + (shape.heads + shape.kv_heads + kv) * hd, t.ld = qkv.stride(0);
  t.tokens = s.tokens, t.head_dim = hd, t.scale = 1.0f / std::sqrt(static_cast<float>(hd)), t.bf16 = narrow;
  return t;
}
/// f(task, sequence, head) for each head of each sequence, with scratch.
template <class F>
void each_head(Cpu& dev, std::span<const Sequence> batch, const HeadShape& shape, bool backward, F&& f) {
  index_t longest = 0;
  for (const Sequence& s : batch) longest = std::max(longest, s.tokens);
  const std::size_t bytes = whole_lines(flash_scratch(longest, shape.head_dim, backward));
  std::byte* scratch = dev.scratch(bytes * static_cast<std::size_t>(dev.threads()));
  dev.parallel_units(static_cast<index_t>(batch.size()) * shape.heads, [&](index_t unit, index_t worker) {
    const Sequence& s = batch[static_cast<std::size_t>(unit / shape.heads)];
    if (s.tokens > 0) f(s, unit % shape.heads, scratch + static_cast<std::size_t>(worker) * bytes);
  });
}

}  // namespace detail

/// out [T, heads head_dim] = causal attention of each sequence's rows over its own keys; qkv [T, (heads + 2 kv_heads) head_dim], rotated.
/// lse [T, heads]: the log of each softmax's sum, for the backward pass.
inline void flash_attention(Cpu& dev, View<float, dyn, dyn> out, View<float, dyn, dyn> lse, View<const float, dyn, dyn> qkv, std::span<const Sequence> batch,
                            const HeadShape& shape, const GemmOptions& o) {
  const TrainingKernels& kernels = training_kernels(dev);
  detail::each_head(dev, batch, shape, false, [&](const Sequence& s, index_t head, std::byte* scratch) {
    FlashTask t = detail::flash_task(qkv, s, shape, head, o.bf16 && kernels.bf16_dot);
    t.o = detail::row_of(out, s.first_row) + head * shape.head_dim, t.ldo = out.stride(0);
    t.lse = detail::row_of(lse, s.first_row) + head, t.ld_lse = lse.stride(0), t.scratch = scratch;
    kernels.flash_forward(t);
  });
}

/// Floats that flash_attention_backward needs beside its results.
constexpr index_t flash_backward_floats(const Cpu*, index_t T, const HeadShape& shape) { return 2 * T * shape.heads * shape.head_dim; }

/// dqkv [T, (heads + 2 kv_heads) head_dim] from d_out, and out and lse as the forward pass left them. `heads_kv`: memory for
/// 2 T heads head_dim floats, where each query head leaves its gradient of K and V before those that share a head are summed.
inline void flash_attention_backward(Cpu& dev, View<float, dyn, dyn> dqkv, View<const float, dyn, dyn> d_out, View<const float, dyn, dyn> qkv,
                                     View<const float, dyn, dyn> out, View<const float, dyn, dyn> lse, std::span<const Sequence> batch,
                                     const HeadShape& shape, float* heads_kv, const GemmOptions& o) {
  const TrainingKernels& kernels = training_kernels(dev);
  const index_t T = dqkv.extent(0), hd = shape.head_dim, group = shape.heads / shape.kv_heads, width = shape.heads * hd;
  detail::each_head(dev, batch, shape, true, [&](const Sequence& s, index_t head, std::byte* scratch) {
    FlashGradTask g{};
    g.forward = detail::flash_task(qkv, s, shape, head, o.bf16 && kernels.bf16_dot);
    // The forward pass wrote these; backward reads them.
    g.forward.o = const_cast<float*>(detail::row_of(out, s.first_row)) + head * hd, g.forward.ldo = out.stride(0);
    g.forward.lse = const_cast<float*>(detail::row_of(lse, s.first_row)) + head, g.forward.ld_lse = lse.stride(0), g.forward.scratch = scratch;
    g.d_o = detail::row_of(d_out, s.first_row) + head * hd;
    g.dq = detail::row_of(dqkv, s.first_row) + head * hd, g.ld_dq = dqkv.stride(0);
    g.dk = heads_kv + s.first_row * width + head * hd, g.dv = g.dk + T * width, g.ld_dkv = width;
    kernels.flash_backward(g);
  });
  detail::each_row(dev, T, 2 * width, [&](index_t t) {
    for (index_t part = 0; part < 2; ++part)
      for (index_t h = 0; h < shape.kv_heads; ++h) {
        float* to = detail::row_of(dqkv, t) + (shape.heads + part * shape.kv_heads + h) * hd;
        const float* from = heads_kv + (part * T + t) * width + h * group * hd;
        std::copy_n(from, hd, to);
        for (index_t i = 1; i < group; ++i) dev.kernels().add(to, from + i * hd, hd);
      }
  });
}

/// dx [T, n] += the gradient of rmsnorm's input; dgain [n] += that of its gain (null: not wanted). x is the norm's input; `rms` holds T floats. The second
/// view is dx as products read it, here dx itself. The last receives the norm once more (of no rows: not wanted).
inline void rmsnorm_backward(Cpu& dev, View<float, dyn, dyn> dx, View<float, dyn, dyn>, View<const float, dyn, dyn> dy, View<const float, dyn, dyn> x, const float* gain, float* dgain,
                             float eps, float* rms, View<float, dyn, dyn> normed) {
  const TrainingKernels& kernels = training_kernels(dev);
  if (normed.extent(0) > 0) dev.rmsnorm(normed, x, gain, eps);
  const index_t T = dx.extent(0), n = dx.extent(1);
  detail::each_row(dev, T, n, [&](index_t t) { kernels.rmsnorm_backward(detail::row_of(dx, t), detail::row_of(dy, t), detail::row_of(x, t), gain, n, eps, rms + t); });
  if (!dgain) return;
  dev.parallel_for(n, std::max<index_t>(64, 65536 / std::max<index_t>(1, T) / 16 * 16), [&](index_t begin, index_t end) {
    kernels.gain_backward(dgain + begin, dy.data() + begin, dy.stride(0), x.data() + begin, x.stride(0), rms, T, end - begin);
  });
}

/// The gradients of swiglu's gate and up [T, ffn] from dh; they may take the places of gate and up. h receives swiglu once more (of no rows: not wanted).
inline void swiglu_backward(Cpu& dev, View<float, dyn, dyn> dgate, View<float, dyn, dyn> dup, View<const float, dyn, dyn> dh, View<const float, dyn, dyn> gate,
                            View<const float, dyn, dyn> up, View<float, dyn, dyn> h) {
  const TrainingKernels& kernels = training_kernels(dev);
  if (h.extent(0) > 0) dev.swiglu(h, gate, up);
  detail::each_row(dev, dh.extent(0), dh.extent(1), [&](index_t t) {
    kernels.swiglu_backward(detail::row_of(dgate, t), detail::row_of(dup, t), detail::row_of(dh, t), detail::row_of(gate, t), detail::row_of(up, t), dh.extent(1));
  });
}

/// losses [R] = log sum exp(logits) - logits[target] for each row of logits [R, vocab]; gradient (may be logits; of no rows: not wanted) =
/// weights[row] (softmax - onehot). A target below 0 does not count: loss and gradient are 0.
inline void cross_entropy(Cpu& dev, View<float, dyn, dyn> gradient, View<const float, dyn, dyn> logits, std::span<const std::int32_t> targets, const float* weights,
                          float* losses) {
  const TrainingKernels& kernels = training_kernels(dev);
  const index_t n = logits.extent(1);
  const bool wanted = gradient.extent(0) > 0;
  detail::each_row(dev, logits.extent(0), n, [&](index_t r) {
    const std::int32_t target = targets[static_cast<std::size_t>(r)];
    if (target >= 0) return kernels.cross_entropy(wanted ? detail::row_of(gradient, r) : nullptr, detail::row_of(logits, r), n, target, weights[r], losses + r);
    losses[r] = 0;
    if (wanted) std::fill_n(detail::row_of(gradient, r), n, 0.0f);
  });
}

/// table [vocab, hidden] += dx [T, hidden] at the rows of ids. Split over columns: equal ids meet in their order.
constexpr index_t id_rows_words(const Cpu*, index_t /*rows*/, index_t /*vocab*/) { return 0; }  // ids as they are will do
inline void id_rows(const Cpu&, std::int32_t*, std::span<const std::int32_t>, index_t) {}
inline Cpu::Batch ids_on(const Cpu&, std::span<const std::int32_t> ids) { return {ids, {}}; }
inline void embedding_backward(Cpu& dev, View<float, dyn, dyn> table, std::span<const std::int32_t> ids, const std::int32_t*, View<const float, dyn, dyn> dx) {
  dev.parallel_for(table.extent(1), 256, [&](index_t begin, index_t end) {
    for (std::size_t t = 0; t < ids.size(); ++t)
      dev.kernels().add(detail::row_of(table, ids[t]) + begin, detail::row_of(dx, static_cast<index_t>(t)) + begin, end - begin);
  });
}

namespace detail {
/// The task of elements [begin, end) of t, where a block begins.
inline AdamwTask part_of(const AdamwTask& t, index_t begin, index_t end) {
  AdamwTask part = t;
  part.p += begin, part.m = t.m.from(begin), part.v = t.v.from(begin), part.gradient += begin, part.n = end - begin, part.place += static_cast<std::uint32_t>(begin);
  return part;
}
}  // namespace detail

/// One step of AdamW on task.n weights.
inline void adamw(Cpu& dev, const AdamwTask& task) {
  static_assert(detail::stretch % moment_block == 0);
  const TrainingKernels& kernels = training_kernels(dev);
  dev.parallel_for(task.n, detail::stretch, [&](index_t begin, index_t end) { kernels.adamw(detail::part_of(task, begin, end)); });
}

/// The same on the ranges that make up the flat arrays of `task`, of which task.decay is where a range decays. Products read the weights themselves.
inline void adamw(Cpu& dev, const AdamwTask& task, std::span<const AdamwRange> ranges, float*) {
  if (task.at) {
    AdamwTask known = task;
    known.lr = task.at->lr, known.correction1 = task.at->correction1, known.correction2 = task.at->correction2, known.key = task.at->key, known.scale = task.at->scale, known.at = nullptr;
    return adamw(dev, known, ranges, nullptr);
  }
  if (std::isnan(task.scale)) return;
  const index_t block = info(task.m.format).block;
  index_t done = 0, begin = 0;
  for (std::size_t r = 0; r < ranges.size(); begin += ranges[r++].n) {
    const index_t end = begin + ranges[r].n, whole = end == task.n ? end : end / block * block;
    if (done < begin && begin < task.n) {  // the block in which the range before ends, and others may: weights decay by themselves there
      const index_t block_end = std::min(task.n, done + block);
      index_t from = 0;
      for (const AdamwRange& other : ranges) {
        const index_t first = std::max(from, done), last = std::min(from + other.n, block_end);
        if (other.decays)
          for (index_t i = first; i < last; ++i) task.p[i] *= 1.0f - task.lr * task.decay;
        from += other.n;
      }
      AdamwTask mixed = detail::part_of(task, done, block_end);
      mixed.decay = 0.0f;
      adamw(dev, mixed);
      done = block_end;
    }
    if (whole <= done) continue;
    AdamwTask t = detail::part_of(task, done, whole);
    t.decay = ranges[r].decays ? task.decay : 0.0f;
    adamw(dev, t);
    done = whole;
  }
}

/// The weights as products read them: here themselves.
inline void round_to(Cpu&, float*, const float*, index_t) {}

/// Rows of logits that are there at a time: 64 MB of TinyLlama's.
constexpr index_t default_logits_rows(const Cpu*) { return 512; }

/// What the memory of a training pass depends on, beside the model.
struct TrainingWork {
  index_t rows = 0, tokens = 0, logits_rows = 0;  // of a micro-batch; of a sequence; at a time
  int threads = 1;
  bool bf16 = true, fp8 = false;                  // products
  bool passing = false;                           // weights that come for a product and go
};
/// Bytes that a pass takes beside its activations.
template <Config C>
constexpr std::size_t training_scratch(const Cpu*, const C& c, const TrainingWork& w) {
  const index_t d = c.hidden, f = c.ffn, qkv = d + 2 * static_cast<index_t>(c.kv_heads) * head_dim(c), V = c.vocab;
  std::size_t most = static_cast<std::size_t>(w.threads) * detail::whole_lines(flash_scratch(w.tokens, head_dim(c), true));
  const auto product = [&](index_t m, index_t k) { most = std::max(most, gemm_scratch(m, k, w.bf16)); };
  for (const index_t k : {d, f, qkv, 2 * f}) product(w.rows, k);  // forward, and the gradients of inputs
  for (const index_t m : {qkv, d, 2 * f}) product(m, w.rows);     // of weights
  product(w.logits_rows, V), product(V, w.logits_rows);
  return most;
}

/// What the scales of the next step's 8-bit floats are made for, where there are such: ranks agree on its maximum before AdamW.
inline std::span<float> magnitudes(Cpu&) { return {}; }

/// x [T, n] += y
inline void add(Cpu& dev, View<float, dyn, dyn> x, View<const float, dyn, dyn> y) { dev.add(x, y); }

/// Sum of x_i^2, in stretches whose sums are added in their order.
inline double sum_of_squares(Cpu& dev, const float* x, index_t n) {
  const TrainingKernels& kernels = training_kernels(dev);
  const index_t stretches = (n + detail::stretch - 1) / detail::stretch;
  auto* sums = reinterpret_cast<double*>(dev.scratch(static_cast<std::size_t>(stretches) * sizeof(double)));
  dev.parallel_for(n, detail::stretch, [&](index_t begin, index_t end) { kernels.sum_of_squares(x + begin, end - begin, sums + begin / detail::stretch); });
  double total = 0;
  for (index_t i = 0; i < stretches; ++i) total += sums[i];
  return total;
}

/// sums.loss += sum_i weights_i x_i
inline void add_loss(Cpu&, StepSums* sums, const float* x, const float* weights, index_t n) {
  for (index_t i = 0; i < n; ++i) sums->loss += static_cast<double>(x[i]) * weights[i];
}

/// The factor that clips a gradient's norm to `most` (0: to any); NaN for one that is not finite.
inline float clip_scale(float norm, float most) {
  if (!std::isfinite(norm)) return std::numeric_limits<float>::quiet_NaN();
  return most > 0 ? std::min(1.0f, most / (norm + 1e-6f)) : 1.0f;
}

/// sums.squares += sum_i x_i^2
inline void add_squares(Cpu& dev, StepSums* sums, const float* x, index_t n) { sums->squares += sum_of_squares(dev, x, n); }
/// Norm and scale from the squares.
inline void clip(Cpu&, StepSums* sums, float most) {
  sums->norm = static_cast<float>(std::sqrt(sums->squares));
  sums->adamw.scale = clip_scale(sums->norm, most);
}

/// x [T, n] *= by
inline void scale(Cpu& dev, View<float, dyn, dyn> x, float by) {
  detail::each_row(dev, x.extent(0), x.extent(1), [&](index_t t) {
    float* row = detail::row_of(x, t);
    for (index_t i = 0; i < x.extent(1); ++i) row[i] *= by;
  });
}

/// out = x / (1 - p) where the element is kept, 0 where it is dropped (arXiv 1207.0580), out and x [T, n], in place allowed. Which those are
/// follows from the key and the element's place alone: the backward pass is the same call.
inline void dropout(Cpu& dev, View<float, dyn, dyn> out, View<const float, dyn, dyn> x, float p, std::uint64_t key) {
  const auto threshold = static_cast<std::uint32_t>(static_cast<double>(p) * 4294967296.0);
  const float keep = 1.0f / (1.0f - p);
  detail::each_row(dev, x.extent(0), x.extent(1), [&](index_t t) {
    float* to = detail::row_of(out, t);
    const float* from = detail::row_of(x, t);
    for (index_t i = 0; i < x.extent(1); ++i) {
      std::uint64_t z = key + static_cast<std::uint64_t>(t * x.extent(1) + i) * 0x9e3779b97f4a7c15u;  // splitmix64 as a function of its count
      z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
      z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
      to[i] = static_cast<std::uint32_t>((z ^ (z >> 31)) >> 32) < threshold ? 0.0f : from[i] * keep;
    }
  });
}

/// x_i = value
inline void fill(Cpu& dev, float* x, index_t n, float value) {
  dev.parallel_for(n, detail::stretch, [&](index_t begin, index_t end) { std::fill(x + begin, x + end, value); });
}

}  // namespace tinyllama
