// The CPU as a device: memory, threads, and each operation split over them.
#pragma once

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <span>
#include <string_view>
#include <vector>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "tinyllama/device/cores.hpp"
#include "tinyllama/device/operands.hpp"
#include "tinyllama/device/thread_pool.hpp"
#include "tinyllama/kernels/cpu/kernels.hpp"
#include "tinyllama/kernels/reference.hpp"
#include "tinyllama/quant/codec.hpp"

namespace tinyllama {

/// A device that owns its threads. One thread at a time may call its operations; models and sessions refer to it and must not outlive it.
/// Results are bit-identical for any number of threads: work is split over outputs, never inside a sum.
class Cpu {
 public:
  struct Options {
    int threads = 0;                   ///< 0: one for each core that the process may use (device/cores.hpp)
    const Kernels* kernels = nullptr;  ///< null: the best for this machine (or, with static dispatch, for the unit's flags)
  };

  using activation = float;
  static constexpr bool host_memory = true;  // what it computes on may be a mapped file
  static constexpr bool packed_embedding = false;
  static constexpr int cache_order = 0;
  static constexpr std::size_t packed_bytes(Format f, index_t rows, index_t columns) { return tinyllama::packed_bytes(f, rows, columns); }

  /// A step's ids and sequences, as they are.
  struct Batch {
    std::span<const std::int32_t> ids;
    std::span<const Sequence> sequences;
    operator std::span<const std::int32_t>() const { return ids; }
    operator std::span<const Sequence>() const { return sequences; }
  };
  struct Staging {};  // nothing needs to be copied to be read

  Cpu() : Cpu(Options()) {}
  // The default argument is evaluated in the caller's unit, so that static dispatch means that unit's flags.
  explicit Cpu(Options options, const Kernels& unit = cpu_kernels())
      : kernels_(options.kernels ? options.kernels : &unit), pool_(std::make_unique<ThreadPool>(options.threads > 0 ? options.threads : available_cores())) {}
  Cpu(const Cpu&) = delete;
  Cpu& operator=(const Cpu&) = delete;
  ~Cpu() { deallocate(scratch_); }

  int threads() const { return pool_->size(); }
  /// Name of the instruction set whose kernels run, e.g. "AVX3_BF16"; "EMU128" or "SCALAR" mean a build that is some 30 times slower.
  std::string_view instruction_set() const { return kernels_->instruction_set; }
  const Kernels& kernels() const { return *kernels_; }

  /// `bytes` of 64-byte aligned memory, on huge pages where it is large and the system gives them.
  std::byte* allocate(std::size_t bytes) const {
    constexpr std::size_t huge = std::size_t{2} << 20;
    const std::size_t align = bytes >= 2 * huge ? huge : 64, size = (std::max<std::size_t>(bytes, 1) + 63) / 64 * 64;
    constexpr std::size_t most = static_cast<std::size_t>(-1) / 4;  // above it the sums here would overflow
    auto* p = bytes > most ? nullptr : static_cast<std::byte*>(std::aligned_alloc(align, (size + align - 1) / align * align));
    if (!p) throw Error("memory", "", std::to_string(bytes) + " bytes", "out of memory");
#if defined(__linux__) && defined(MADV_HUGEPAGE)
    if (align == huge) madvise(p, size / huge * huge, MADV_HUGEPAGE);  // whole pages only, so that resident memory stays what was asked for
#endif
    return p;
  }
  void deallocate(std::byte* p) const noexcept { std::free(p); }

  void upload(void* to, const void* from, std::size_t bytes) const { copy_bytes(to, from, bytes); }
  void download(void* to, const void* from, std::size_t bytes) const { copy_bytes(to, from, bytes); }
  void copy_bytes(void* to, const void* from, std::size_t bytes) const {
    if (bytes) std::memcpy(to, from, bytes);
  }
  void zero(void* to, std::size_t bytes) const {
    if (bytes) std::memset(to, 0, bytes);
  }
  template <class T, index_t... E>
  View<const T, E...> host(View<T, E...> v, Staging&) const { return v; }

  /// f(begin, end) on disjoint ranges that cover [0, n), each but the last a multiple of `grain` long.
  template <class F>
  void parallel_for(index_t n, index_t grain, F&& f) const {
    grain = std::max<index_t>(1, grain);
    pool_->run((n + grain - 1) / grain, [&](index_t i) { f(i * grain, std::min(n, (i + 1) * grain)); });
  }

  /// f(i, worker) for each i in [0, n), worker in [0, threads()): no two at once have the same worker, so that each may have scratch of its own.
  template <class F>
  void parallel_units(index_t n, F&& f) const {
    std::atomic<index_t> next{0};
    pool_->run(std::min<index_t>(n, threads()), [&](index_t worker) {
      for (index_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < n;) f(i, worker);
    });
  }

  /// At least `bytes` of 64-byte aligned memory that an operation may use until it returns; grows on demand.
  std::byte* scratch(std::size_t bytes) {
    if (bytes > scratch_bytes_) {
      deallocate(std::exchange(scratch_, nullptr));
      scratch_bytes_ = 0;
      scratch_ = allocate(bytes);
      scratch_bytes_ = bytes;
    }
    return scratch_;
  }

  // ---- the operations of the concept Device -----------------------------------------------------------------------------------------

  Batch batch(std::span<const std::int32_t> ids, std::span<const Sequence> sequences) const { return {ids, sequences}; }

  /// cos and sin [T, head_dim / 2] of position * frequency for each row, in double: f32 angles are off by 1e-4 at position 2000.
  void rope_angles(View<float, dyn, dyn> cos, View<float, dyn, dyn> sin, std::span<const double> frequencies, std::span<const Sequence> batch) const {
    for (const Sequence& s : batch)
      for (index_t t = 0; t < s.tokens; ++t)
        for (std::size_t i = 0; i < frequencies.size(); ++i) {
          const double angle = static_cast<double>(s.position + t) * frequencies[i];
          cos(s.first_row + t, i) = static_cast<float>(std::cos(angle));
          sin(s.first_row + t, i) = static_cast<float>(std::sin(angle));
        }
  }

  /// out [sequences, n] = the last row of each sequence of x [T, n].
  void last_rows(View<float, dyn, dyn> out, View<const float, dyn, dyn> x, std::span<const Sequence> batch) const {
    for (std::size_t s = 0; s < batch.size(); ++s)
      std::copy_n(at(x, batch[s].first_row + batch[s].tokens - 1), x.extent(1), at(out, static_cast<index_t>(s)));
  }

  /// out [T, hidden] = rows `ids` of the table [vocab, hidden].
  void embedding(View<float, dyn, dyn> out, const Matrix& table, std::span<const std::int32_t> ids) const {
    parallel_for(out.extent(0), 8, [&](index_t begin, index_t end) {
      for (index_t t = begin; t < end; ++t) {
        float* to = out.data() + t * out.stride(0);
        const index_t id = ids[static_cast<std::size_t>(t)];
        visit(table.format, [&]<Format F>() {
          if (table.packed)
            return unpack_row<F>(table.data + static_cast<std::size_t>(id / panel_rows) * panel_bytes<F>(table.columns), static_cast<int>(id % panel_rows),
                                 table.columns, to);
          decode_row(F, table.data + static_cast<std::size_t>(id) * row_bytes(F, table.columns), to, table.columns);
        });
      }
    });
  }

  /// out = gain x / sqrt(mean(x^2) + eps), for each row; all [T, n].
  void rmsnorm(View<float, dyn, dyn> out, View<const float, dyn, dyn> x, const float* gain, float eps) const {
    rows(out.extent(0), out.extent(1), [&](index_t t) { kernels_->rmsnorm(at(out, t), at(x, t), gain, out.extent(1), eps); });
  }

  /// x += residual, then the same.
  void add_rmsnorm(View<float, dyn, dyn> out, View<float, dyn, dyn> x, View<const float, dyn, dyn> residual, const float* gain, float eps) const {
    rows(out.extent(0), out.extent(1), [&](index_t t) { kernels_->add_rmsnorm(at(out, t), at(x, t), at(residual, t), gain, out.extent(1), eps); });
  }

  /// x += residual; [T, n].
  void add(View<float, dyn, dyn> x, View<const float, dyn, dyn> residual) const {
    rows(x.extent(0), x.extent(1), [&](index_t t) { kernels_->add(at(x, t), at(residual, t), x.extent(1)); });
  }

  /// Rotates the heads of x [T, heads * head_dim] in place; cos and sin are [T, head_dim / 2].
  void rope(View<float, dyn, dyn> x, View<const float, dyn, dyn> cos, View<const float, dyn, dyn> sin, index_t heads, RopeLayout layout) const {
    rows(x.extent(0), x.extent(1), [&](index_t t) { kernels_->rope(at(x, t), at(cos, t), at(sin, t), heads, 2 * cos.extent(1), layout); });
  }

  /// K and V [T, kv_heads * head_dim] of the batch into the pages of each sequence.
  void store_kv(View<const float, dyn, dyn> k, View<const float, dyn, dyn> v, const CacheShape& shape, index_t layer, std::span<const Sequence> batch) const {
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

  /// out [T, heads * head_dim] = softmax(q K^T / sqrt(head_dim)) V, causal, over each sequence's own positions; heads share KV heads in groups.
  void attention(View<float, dyn, dyn> out, View<const float, dyn, dyn> q, const CacheShape& shape, index_t layer, std::span<const Sequence> batch);

  /// out = gate sigmoid(gate) up; all [T, n].
  void swiglu(View<float, dyn, dyn> out, View<const float, dyn, dyn> gate, View<const float, dyn, dyn> up) const {
    rows(out.extent(0), out.extent(1), [&](index_t t) { kernels_->swiglu(at(out, t), at(gate, t), at(up, t), out.extent(1)); });
  }

  /// Rows of out = softmax(scale x).
  void softmax(View<float, dyn, dyn> out, View<const float, dyn, dyn> x, float scale = 1.0f) const {
    rows(out.extent(0), out.extent(1), [&](index_t t) { kernels_->softmax(at(out, t), at(x, t), out.extent(1), scale); });
  }

  /// Probabilities of attention [heads, tokens, position + tokens] of one sequence, for observers: plain loops, not for speed.
  std::vector<float> attention_probabilities(View<const float, dyn, dyn> q, const CacheShape& shape, index_t layer, const Sequence& s) const {
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

  /// y [T, N] = x [T, K] w^T. Matrices in rows are packed as they are read, a few panels at a time: right, and slower than weights packed once.
  void matmul(View<float, dyn, dyn> y, View<const float, dyn, dyn> x, const Linear& w);

  /// The packed form of `from` (in rows), written to `to`, which has packed_bytes() of room.
  Matrix pack(std::byte* to, const Matrix& from) const {
    Matrix m = from;
    m.packed = true;
    m.data = to;
    parallel_for((from.rows + panel_rows - 1) / panel_rows, 4, [&](index_t begin, index_t end) { pack_panels(to, from, begin, end); });
    return m;
  }

  /// Bytes that matmul and attention need beside their operands, for `rows` rows of up to `columns` columns. Grown on demand; reserve it so
  /// that nothing is allocated later.
  void reserve_scratch(std::size_t bytes) { scratch(bytes); }
  static constexpr std::size_t matmul_scratch(index_t rows, index_t columns) {
    // int8 codes, a scale and a sum for 32, two sums for 16; or bf16; or (odd columns) f32
    return static_cast<std::size_t>(rows) * static_cast<std::size_t>(columns % 2 ? 4 * even(columns) : 2 * columns) + 64;
  }
  static constexpr index_t streamed_rows = 16;    // a product of so many rows at most is split as a stream of weights
  static constexpr index_t split_tokens = 4;      // fewer new tokens than this are decoding: their attention is split over the length
  static constexpr index_t split_positions = 256; // positions of a part; fixed, so that results do not depend on the number of threads
  static_assert(split_positions % page_tokens == 0);
  static constexpr std::size_t attention_scratch(const CacheShape& shape, index_t heads, index_t rows_of_split_sequences, index_t longest) {
    const index_t parts = (longest + split_positions - 1) / split_positions;
    return static_cast<std::size_t>(rows_of_split_sequences * heads * parts * (head_stride(shape.head_dim) + 2)) * sizeof(float) + 64;
  }
  /// Of a step of `rows` tokens of a model whose widest row has `columns` values, `split_rows` of them decoding at up to `longest` positions.
  static constexpr std::size_t step_scratch(const CacheShape& shape, index_t heads, index_t columns, index_t rows, index_t split_rows, index_t longest) {
    return std::max(matmul_scratch(rows, columns), split_rows ? attention_scratch(shape, heads, split_rows, longest) : 0);
  }

 private:
  template <class T>
  static T* at(View<T, dyn, dyn> v, index_t row) { return v.data() + row * v.stride(0); }

  // Panels [first, last) of `from` to their place in `to`.
  static void pack_panels(std::byte* to, const Matrix& from, index_t first, index_t last) {
    visit(from.format, [&]<Format F>() {
      const std::size_t stride = row_bytes(F, from.columns), bytes = panel_bytes<F>(from.columns);
      for (index_t p = first; p < last; ++p)
        pack_panel<F>(from.data + static_cast<std::size_t>(p * panel_rows) * stride, stride, static_cast<int>(std::min(panel_rows, from.rows - p * panel_rows)),
                      from.columns, to + static_cast<std::size_t>(p) * bytes);
    });
  }

  // A row each; small work stays on the caller's thread, where a fork would cost more.
  template <class F>
  void rows(index_t count, index_t length, F&& f) const {
    parallel_for(count, std::max<index_t>(1, 8192 / std::max<index_t>(1, length)), [&](index_t begin, index_t end) {
      for (index_t t = begin; t < end; ++t) f(t);
    });
  }

  const Kernels* kernels_;
  std::unique_ptr<ThreadPool> pool_;
  std::byte* scratch_ = nullptr;
  std::size_t scratch_bytes_ = 0;
};

inline void Cpu::matmul(View<float, dyn, dyn> y, View<const float, dyn, dyn> x, const Linear& w) {
  const index_t m = y.extent(0), k = w.columns();
  if (m == 0) return;
  if (k == 0) return rows(m, w.rows(), [&](index_t i) { std::fill_n(at(y, i), w.rows(), 0.0f); });
  // Each part picks its arithmetic; the activations are converted once for each that occurs.
  const auto compute_of = [&](const Matrix& a) {
    if (is_quantised(a.format)) return w.compute == Compute::f32 ? Compute::f32 : Compute::int8;
    if (a.format != Format::bf16 || w.compute == Compute::f32 || !kernels_->bf16_dot) return Compute::f32;
    // One row is bound by memory: f32 activations cost nothing there and lose nothing.
    return w.compute == Compute::bf16 || m > 1 ? Compute::bf16 : Compute::f32;
  };
  std::array<Compute, 3> compute{};
  bool any_int8 = false, any_bf16 = false, any_f32 = false;
  for (int i = 0; i < w.parts; ++i) {
    const Compute c = compute[static_cast<std::size_t>(i)] = compute_of(w.part[static_cast<std::size_t>(i)]);
    any_int8 |= c == Compute::int8, any_bf16 |= c == Compute::bf16, any_f32 |= c == Compute::f32;
  }
  const auto uk = static_cast<std::size_t>(k), uk_even = static_cast<std::size_t>(even(k)), um = static_cast<std::size_t>(m);
  const bool pad = k % 2 != 0 && any_f32;
  const std::size_t q8_bytes = any_int8 ? (um * uk + um * uk / 2 + 63) / 64 * 64 : 0, bf16_bytes = any_bf16 ? (um * 2 * uk_even + 63) / 64 * 64 : 0;
  const std::size_t pad_bytes = pad ? (um * 4 * uk_even + 63) / 64 * 64 : 0;
  // Panels of matrices that are not packed, for each thread.
  const index_t unpacked_grain = m > 1 ? 3 : 1;
  std::size_t panels_bytes = 0;
  for (int i = 0; i < w.parts; ++i)
    if (const Matrix& a = w.part[static_cast<std::size_t>(i)]; !a.packed)
      panels_bytes = std::max(panels_bytes, (static_cast<std::size_t>(unpacked_grain) * panel_bytes(a.format, k) + 63) / 64 * 64);
  std::byte* s = scratch(q8_bytes + bf16_bytes + pad_bytes + panels_bytes * static_cast<std::size_t>(threads()));
  MatmulTask task{};
  task.m = m, task.k = k, task.ldy = y.stride(0), task.x = x.data(), task.ldx = x.stride(0);
  if (any_int8) {
    auto* q = reinterpret_cast<std::int8_t*>(s);
    auto* scale = reinterpret_cast<float*>(s + um * uk);
    float *sum32 = scale + um * uk / 32, *sum16 = sum32 + um * uk / 32;
    task.x_q8 = q, task.x_scale = scale, task.x_sum32 = sum32, task.x_sum16 = sum16;
    const bool tiles = m > kernels_->int8_signed_rows;
    rows(m, k, [&](index_t i) {
      kernels_->quantise_activations(q + i * k, scale + i * k / 32, sum32 + i * k / 32, tiles ? nullptr : sum16 + i * k / 16, at(x, i), k, tiles);
    });
  }
  MatmulTask narrow = task;
  if (any_bf16) {
    auto* b = reinterpret_cast<bf16*>(s + q8_bytes);
    narrow.x_bf16 = b, narrow.ldx = even(k);
    rows(m, k, [&](index_t i) {
      kernels_->round_bf16(b + i * even(k), at(x, i), k);
      if (k % 2) b[i * even(k) + k] = bf16();
    });
  }
  if (pad) {
    auto* p = reinterpret_cast<float*>(s + q8_bytes + bf16_bytes);
    for (index_t i = 0; i < m; ++i) {
      std::copy_n(at(x, i), k, p + i * even(k));
      p[i * even(k) + k] = 0;
    }
    task.x = p, task.ldx = even(k);
  }
  // One fork for all parts: a unit is some panels of one of them. Parts that lie behind each other in one format are one matrix.
  struct Share { Matrix matrix; MatmulTask task; void (*kernel)(const MatmulTask&, index_t, index_t); index_t panels, lead, grain, units; };
  std::array<Share, 3> shares{};
  std::size_t used = 0;
  index_t column = 0;
  for (int i = 0; i < w.parts; ++i) {
    const Matrix& a = w.part[static_cast<std::size_t>(i)];
    if (Matrix* before = used ? &shares[used - 1].matrix : nullptr;
        before && before->format == a.format && before->packed == a.packed && before->rows % panel_rows == 0 && before->data + before->bytes() == a.data) {
      before->rows += a.rows, shares[used - 1].task.n += a.rows;
    } else {
      Share& share = shares[used++];
      const Compute c = compute[static_cast<std::size_t>(i)];
      share.matrix = a, share.task = c == Compute::bf16 ? narrow : task;
      share.task.w = a.data, share.task.format = a.format, share.task.n = a.rows, share.task.y = y.data() + column;
      share.kernel = c == Compute::bf16 ? kernels_->matmul_bf16 : c == Compute::int8 ? kernels_->matmul_int8 : kernels_->matmul_f32;
    }
    column += a.rows;
  }
  // Few rows are bound by memory, and each break of a stream of weights costs a core 0.6 us (Zen 5, 72 GB/s; a q4_0 step at 79% of the bandwidth in units of 128 KB
  // became 92%): each thread starts with one long unit, and short ones even out the rest. Many rows: multiples of 3 panels, which the wide tiles take.
  index_t units = 0;
  for (Share& share : std::span(shares).first(used)) {
    const auto bytes = static_cast<index_t>(std::max<std::size_t>(1, panel_bytes(share.matrix.format, k)));
    share.panels = (share.matrix.rows + panel_rows - 1) / panel_rows;
    share.grain = !share.matrix.packed ? unpacked_grain : m > 1 ? 6 : std::clamp<index_t>((index_t{256} << 10) / bytes, 1, 64);
    share.lead = share.matrix.packed && m <= streamed_rows ? std::max(share.grain, share.panels * 3 / 4 / threads()) : share.grain;
    share.units = std::min<index_t>(threads(), (share.panels + share.lead - 1) / share.lead);
    share.units += std::max<index_t>(0, share.panels - share.units * share.lead + share.grain - 1) / share.grain;
    units += share.units;
  }
  const auto run = [&](index_t unit, std::byte* panels) {
    std::size_t i = 0;
    while (unit >= shares[i].units) unit -= shares[i++].units;
    const Share& share = shares[i];
    const index_t rest = unit - threads(), first = rest < 0 ? unit * share.lead : threads() * share.lead + rest * share.grain;
    const index_t last = std::min(share.panels, first + (rest < 0 ? share.lead : share.grain));
    if (share.matrix.packed) return share.kernel(share.task, first, last);
    const index_t row = first * panel_rows;
    Matrix some = share.matrix;
    some.rows = std::min(some.rows - row, (last - first) * panel_rows);
    some.data += static_cast<std::size_t>(row) * row_bytes(some.format, k);
    pack_panels(panels, some, 0, last - first);
    MatmulTask t = share.task;
    t.w = panels, t.n = some.rows, t.y += row;
    share.kernel(t, 0, last - first);
  };
  std::byte* panels = s + q8_bytes + bf16_bytes + pad_bytes;
  if (m * k * w.rows() < 32768) {  // the tiny models of tests: a fork would cost more than the product
    for (index_t u = 0; u < units; ++u) run(u, panels);
  } else if (panels_bytes == 0) {
    pool_->run(units, [&](index_t u) { run(u, nullptr); });
  } else {
    parallel_units(units, [&](index_t u, index_t worker) { run(u, panels + static_cast<std::size_t>(worker) * panels_bytes); });
  }
}

inline void Cpu::attention(View<float, dyn, dyn> out, View<const float, dyn, dyn> q, const CacheShape& shape, index_t layer, std::span<const Sequence> batch) {
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

}  // namespace tinyllama
