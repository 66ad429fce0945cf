// The CPU as a device: memory, threads, and each operation split over them.
#pragma once

#include <algorithm>
#include <array>
#include <atomic>
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

#include "tinyllama/compiled.hpp"
#include "tinyllama/device/cores.hpp"
#include "tinyllama/device/operands.hpp"
#include "tinyllama/device/thread_pool.hpp"
#include "tinyllama/kernels/cpu/kernels.hpp"

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
  void rope_angles(View<float, dyn, dyn> cos, View<float, dyn, dyn> sin, std::span<const double> frequencies, std::span<const Sequence> batch) const;

  /// out [sequences, n] = the last row of each sequence of x [T, n].
  void last_rows(View<float, dyn, dyn> out, View<const float, dyn, dyn> x, std::span<const Sequence> batch) const {
    for (std::size_t s = 0; s < batch.size(); ++s)
      std::copy_n(at(x, batch[s].first_row + batch[s].tokens - 1), x.extent(1), at(out, static_cast<index_t>(s)));
  }

  /// out [T, hidden] = rows `ids` of the table [vocab, hidden].
  void embedding(View<float, dyn, dyn> out, const Matrix& table, std::span<const std::int32_t> ids) const;

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
  void store_kv(View<const float, dyn, dyn> k, View<const float, dyn, dyn> v, const CacheShape& shape, index_t layer, std::span<const Sequence> batch) const;

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
  std::vector<float> attention_probabilities(View<const float, dyn, dyn> q, const CacheShape& shape, index_t layer, const Sequence& s) const;

  /// y [T, N] = x [T, K] w^T. Matrices in rows are packed as they are read, a few panels at a time: right, and slower than weights packed once.
  void matmul(View<float, dyn, dyn> y, View<const float, dyn, dyn> x, const Linear& w);

  /// The packed form of `from` (in rows), written to `to`, which has packed_bytes() of room.
  Matrix pack(std::byte* to, const Matrix& from) const;

  /// Bytes that matmul and attention need beside their operands, for `rows` rows of up to `columns` columns. Grown on demand; reserve it so
  /// that nothing is allocated later.
  void reserve_scratch(std::size_t bytes) { scratch(bytes); }
  static constexpr std::size_t matmul_scratch(index_t rows, index_t columns) {
    const auto floats = static_cast<std::size_t>(columns % 2 ? 4 * even(columns) : 2 * columns);  // bf16; or (odd columns) f32
    return static_cast<std::size_t>(rows) * std::max(floats, columns % 32 ? 0 : int8_bytes(columns)) + 64;
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

  // Of a row of X in int8: codes, a scale and a sum for 32, two sums for 16; or as Int8Columns.
  static constexpr std::size_t int8_bytes(index_t columns) {
    const std::size_t tiles = static_cast<std::size_t>((columns + int8_columns - 1) / int8_columns) * sizeof(Int8Columns);
    return (std::max(static_cast<std::size_t>(columns) / 2 * 3, tiles) + 63) / 64 * 64;
  }

  // Panels [first, last) of `from` to their place in `to`.
  static void pack_panels(std::byte* to, const Matrix& from, index_t first, index_t last);

  // Many rows in blocks, one for each thread to begin with, so that from one operation to the next a thread finds its rows in its own second-level cache: what two
  // threads lose beside two processes of one each (Zen 5, q4_0, 512 rows in three rounds: 677 to 713 tokens/s without, 689 to 724 with, 673 to 716 by two
  // processes). Blocks begin at whole tiles of products, or sums would depend on how many there are.
  static constexpr index_t most_blocks = 64;
  index_t row_blocks(index_t rows) const { return std::clamp<index_t>(rows / 128, 1, std::min<index_t>(threads(), most_blocks)); }
  static constexpr index_t block_row(index_t rows, index_t blocks, index_t block) { return block < blocks ? rows * block / blocks / 24 * 24 : rows; }

  // f(block, unit) for each of the units of each block.
  template <class F>
  void in_blocks(index_t blocks, index_t units, F&& f) const {
    std::array<std::atomic<index_t>, most_blocks> next{};
    pool_->run(units * blocks, [&](index_t, int worker) {
      for (index_t i = 0; i < blocks; ++i) {
        const index_t block = (worker + i) % blocks, unit = next[static_cast<std::size_t>(block)].fetch_add(1, std::memory_order_relaxed);
        if (unit < units) return f(block, unit);
      }
    });
  }

  // A row each; small work stays on the caller's thread, where a fork would cost more.
  template <class F>
  void rows(index_t count, index_t length, F&& f) const {
    const index_t grain = std::max<index_t>(1, 8192 / std::max<index_t>(1, length)), blocks = row_blocks(count);
    if (blocks == 1)
      return parallel_for(count, grain, [&](index_t begin, index_t end) {
        for (index_t t = begin; t < end; ++t) f(t);
      });
    index_t most = 0;
    for (index_t b = 0; b < blocks; ++b) most = std::max(most, block_row(count, blocks, b + 1) - block_row(count, blocks, b));
    in_blocks(blocks, (most + grain - 1) / grain, [&](index_t block, index_t unit) {
      const index_t begin = block_row(count, blocks, block) + unit * grain, end = std::min(begin + grain, block_row(count, blocks, block + 1));
      for (index_t t = begin; t < end; ++t) f(t);
    });
  }

  const Kernels* kernels_;
  std::unique_ptr<ThreadPool> pool_;
  std::byte* scratch_ = nullptr;
  std::size_t scratch_bytes_ = 0;
};

}  // namespace tinyllama

#if TINYLLAMA_WITH_DEFINITIONS
#include "tinyllama/device/cpu_attention.hpp"
#include "tinyllama/device/cpu_matrices.hpp"
#endif
