// A card as a device: its memory, its stream, and each operation as kernels on it. Declared here for any compiler; the operations that launch kernels
// are defined in cuda_operations.cuh and cuda_products.cuh, for nvcc.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstring>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "tinyllama/device/cuda_graph.cuh"
#include "tinyllama/device/cuda_runtime.cuh"
#include "tinyllama/device/cuda_upload.cuh"
#include "tinyllama/device/operands.hpp"
#include "tinyllama/device/operations.hpp"
#include "tinyllama/kernels/cuda/attention_plan.hpp"
#include "tinyllama/kernels/cuda/batch.hpp"
#include "tinyllama/kernels/cuda/blas.cuh"
#include "tinyllama/kernels/cuda/model.hpp"
#include "tinyllama/kernels/cuda/pack.cuh"

namespace tinyllama {

template <class A>
class CudaTraining;  // device/cuda_training.cuh
namespace cuda {
struct StreamTask;
struct SplitNorm;
struct RowScale;
}

/// One card, one stream, activations of type A between products (bf16, or float for exactness). One thread at a time may call its operations, which return
/// before their work is done; models and sessions refer to the device and must not outlive it. Any number of devices may share a card.
template <class A>
class CudaDevice {
  static_assert(std::is_same_v<A, bf16> || std::is_same_v<A, float>);

 public:
  struct Options {
    int card = 0;  ///< as the CUDA runtime numbers them
  };
  using activation = A;
  static constexpr bool host_memory = false;
  static constexpr bool packed_embedding = true;
  static constexpr int cache_order = 1;
  static constexpr std::size_t packed_bytes(Format f, index_t rows, index_t columns) { return cuda::packed_matrix_bytes(f, rows, columns); }

  /// A step on the card; `sequences` are the caller's.
  struct Batch : cuda::BatchView {
    std::span<const Sequence> host_sequences;
  };
  using Staging = cuda::Pinned;

  CudaDevice() : CudaDevice(Options()) {}
  explicit CudaDevice(Options options) : card_(checked(options.card)), stream_(card_), pool_(card_), blas_(card_), batch_upload_(card_, pool_.get(), stream_.get()), draws_(card_, pool_.get(), stream_.get()),
                                        few_(card_, pool_.get(), stream_.get()), many_(card_, pool_.get(), stream_.get()), counters_(card_, pool_.get(), stream_.get()), stream_flags_(card_, pool_.get(), stream_.get()),
                                        squares_(card_, pool_.get(), stream_.get()) {
    cudaDeviceProp p;
    cuda::check(cudaGetDeviceProperties(&p, card_), "cudaGetDeviceProperties");
    name_ = p.name, multiprocessors_ = p.multiProcessorCount, capability_ = 10 * p.major + p.minor;
    if (p.major < 8) throw Error("CUDA", name_, "compute capability 8.0 or more", std::to_string(p.major) + "." + std::to_string(p.minor));
  }
  CudaDevice(const CudaDevice&) = delete;
  CudaDevice& operator=(const CudaDevice&) = delete;
  ~CudaDevice() {
    deallocate(scratch_);
    cudaStreamSynchronize(stream_.get());
  }

  /// "NVIDIA H100 80GB HBM3"
  const std::string& name() const { return name_; }
  int card() const { return card_; }
  int multiprocessors() const { return multiprocessors_; }
  /// 90 for compute capability 9.0
  int capability() const { return capability_; }
  cudaStream_t stream() const { return stream_.get(); }
  cudaMemPool_t pool() const { return pool_.get(); }
  /// Bytes of the card that this device has given out, its own scratch included; and the most that it ever had.
  std::size_t bytes_in_use() const { return pool_.used(); }
  std::size_t most_bytes_in_use() const { return pool_.most_used(); }
  /// Bytes of the card that are taken, by whomever: CUDA's own and other libraries' included.
  std::size_t card_bytes_in_use() const {
    const cuda::Current here(card_);
    std::size_t free = 0, total = 0;
    cuda::check(cudaMemGetInfo(&free, &total), "cudaMemGetInfo", name_);
    return total - free;
  }
  /// Waits for all that was asked for.
  void synchronize() const { stream_.synchronize(); }

  // ---- memory

  /// At least `bytes`, 256-byte aligned, in the stream's order; kernels may read 32 bytes past them.
  std::byte* allocate(std::size_t bytes) const {
    const cuda::Current here(card_);
    void* p = nullptr;
    const cudaError_t e = cudaMallocFromPoolAsync(&p, std::max<std::size_t>(bytes, 1) + 32, pool_.get(), stream_.get());
    if (e == cudaErrorMemoryAllocation) {
      cudaGetLastError();
      std::size_t free = 0, total = 0;
      cudaMemGetInfo(&free, &total);
      throw Error("CUDA memory", name_, std::to_string(bytes) + " bytes", "out of memory (" + std::to_string(free) + " of " + std::to_string(total) + " free)");
    }
    cuda::check(e, "cudaMallocFromPoolAsync", std::to_string(bytes) + " bytes");
    return static_cast<std::byte*>(p);
  }
  void deallocate(std::byte* p) const noexcept {
    if (p) cudaFreeAsync(p, stream_.get());
  }
  void upload(void* to, const void* from, std::size_t bytes) const { copy(to, from, bytes, cudaMemcpyHostToDevice), synchronize(); }
  void download(void* to, const void* from, std::size_t bytes) const { copy(to, from, bytes, cudaMemcpyDeviceToHost), synchronize(); }
  void copy_bytes(void* to, const void* from, std::size_t bytes) const { copy(to, from, bytes, cudaMemcpyDeviceToDevice); }
  void zero(void* to, std::size_t bytes) const {
    const cuda::Current here(card_);
    if (bytes) cuda::check(cudaMemsetAsync(to, 0, bytes, stream_.get()), "cudaMemsetAsync", std::to_string(bytes) + " bytes");
  }
  /// A copy in pinned memory, of contiguous elements; waits for the stream.
  template <class T, index_t... E>
  View<const T, E...> host(View<T, E...> v, Staging& staging) const {
    const auto elements = v.span();
    auto* to = reinterpret_cast<std::remove_const_t<T>*>(staging.reserve(std::max<std::size_t>(1, elements.size_bytes())));
    download(to, elements.data(), elements.size_bytes());
    return View<const T, E...>(to, v.shape());
  }
  /// At least `bytes` that an operation may use until the next one; grows on demand.
  std::byte* scratch(std::size_t bytes) {
    if (bytes > scratch_bytes_) {
      deallocate(std::exchange(scratch_, nullptr));
      scratch_bytes_ = 0;
      scratch_ = allocate(bytes);
      scratch_bytes_ = bytes;
    }
    return scratch_;
  }
  void reserve_scratch(std::size_t bytes) { scratch(bytes); }

  static constexpr std::size_t blas_workspace = std::size_t{32} << 20;  // what NVIDIA recommends for Hopper
  /// A matrix in another format than the activations' becomes one of theirs in scratch before a product of many rows, so many bytes at a time: they stay in
  /// the second-level cache until the product reads them.
  static constexpr std::size_t weights_scratch = std::size_t{32} << 20;
  static constexpr std::size_t step_scratch(const CacheShape&, index_t, index_t columns, index_t rows, index_t, index_t) {
    return rows > 1 ? blas_workspace + weights_scratch : static_cast<std::size_t>(columns) * 2 + 64;
  }
  /// Up to so many rows a product with weights of another format than the activations' reads each weight once and multiplies as it goes; above, and for
  /// more than one row with weights of their format, tensor cores do it.
  static constexpr index_t few_rows = 8;
  /// Tokens of a prefill step where nobody says otherwise: products of so many rows fill the card.
  static constexpr index_t prefill_rows = 2048;

  /// Tokens of a prefill step up to which it may become a graph.
  static constexpr index_t graph_rows = prefill_rows;

  /// Rows from which products with plain matrices have their ends in kernels of our own on Hopper (kernels/cuda/tile_matmul.cuh).
  static constexpr index_t tile_rows = 512;

  /// Query rows of a KV head and sequence from which attention is prefill's on Hopper.
  static constexpr index_t flash_rows = 64;

  // ---- the operations of the concept Device

  Matrix pack(std::byte* to, const Matrix& from) const;
  Batch batch(std::span<const std::int32_t> ids, std::span<const Sequence> sequences);
  /// The same with ids [T] that are in the device's memory, which other work in its order has written.
  Batch batch(DeviceIds ids, std::span<const Sequence> sequences);
  void embedding(View<float, dyn, dyn> out, const Matrix& table, const Batch& batch);
  void rope_angles(View<float, dyn, dyn> cos, View<float, dyn, dyn> sin, std::span<const double> frequencies, const Batch& batch);
  void rmsnorm(View<A, dyn, dyn> out, View<const float, dyn, dyn> x, const float* gain, float eps);
  void add_rmsnorm(View<A, dyn, dyn> out, View<float, dyn, dyn> x, View<const float, dyn, dyn> residual, const float* gain, float eps);
  void add(View<float, dyn, dyn> x, View<const float, dyn, dyn> residual);
  void rope(View<A, dyn, dyn> x, View<const float, dyn, dyn> cos, View<const float, dyn, dyn> sin, index_t heads, RopeLayout layout);
  void store_kv(View<const A, dyn, dyn> k, View<const A, dyn, dyn> v, const CacheShape& shape, index_t layer, const Batch& batch);
  void attention(View<A, dyn, dyn> out, View<const A, dyn, dyn> q, const CacheShape& shape, index_t layer, const Batch& batch);
  /// Probabilities of attention [heads, tokens, position + tokens] of one sequence of the batch that came last, for observers.
  std::vector<float> attention_probabilities(View<const A, dyn, dyn> q, const CacheShape& shape, index_t layer, const Sequence& s);
  void last_rows(View<A, dyn, dyn> out, View<const A, dyn, dyn> x, const Batch& batch);
  void swiglu(View<A, dyn, dyn> out, View<const A, dyn, dyn> gate, View<const A, dyn, dyn> up);
  void softmax(View<float, dyn, dyn> out, View<const float, dyn, dyn> x, float scale = 1.0f);
  void matmul(View<A, dyn, dyn> y, View<const A, dyn, dyn> x, const Linear& w);
  void matmul(View<float, dyn, dyn> y, View<const A, dyn, dyn> x, const Linear& w)
    requires(!std::is_same_v<A, float>);
  /// y = x W^T + residual, which is another array of y's shape: the library adds on its way.
  void matmul_add(View<float, dyn, dyn> y, View<const A, dyn, dyn> x, const Linear& w, View<const float, dyn, dyn> residual);
  /// y = x W^T + residual and normed = rmsnorm(y), which only products with `reader` read: where they can, normed is left as gain y and the product with `reader` multiplies by the rest
  /// (cuda::SplitNorm), so that decoding and long prompts have no kernels for norms.
  void matmul_add_rmsnorm(View<float, dyn, dyn> y, View<A, dyn, dyn> normed, View<const A, dyn, dyn> x, const Linear& w, View<const float, dyn, dyn> residual, const float* gain, float eps,
                          const Linear& reader);
  /// out = silu(x W_gate^T) (x W_up^T), w's two parts; gate_up [T, 2 ffn] has both factors if they are to be kept, else it is scratch.
  void matmul_swiglu(View<A, dyn, dyn> out, View<A, dyn, dyn> gate_up, View<const A, dyn, dyn> x, const Linear& w, bool keep = false);
  /// The same of plain matrices by one kernel; false, and nothing done, where there is none for them.
  bool gated_product(View<A, dyn, dyn> out, View<A, dyn, dyn> gate_up, View<const A, dyn, dyn> x, View<const A, dyn, dyn> gate, View<const A, dyn, dyn> up, bool keep);

  // ---- beside the concept

  /// qkv = x W^T, then rope of q, in place, and of k on its way into the pages, and store_kv, in one pass over memory; if x's norm is half done, q, k and v are multiplied by the rest there.
  void matmul_rope_store_kv(View<A, dyn, dyn> qkv, View<const A, dyn, dyn> x, const Linear& w, View<const float, dyn, dyn> cos, View<const float, dyn, dyn> sin, RopeLayout layout,
                            const CacheShape& shape, index_t layer, const Batch& batch);
  /// What is worked out once for a model whose weights are there: null where the step of one token is made of the operations above.
  struct Prepared {
    std::shared_ptr<cuda::DecodeState> decode;
    std::shared_ptr<cuda::StepGraphs> steps;
    CacheShape cache;
    index_t group = 1;  // query heads of a KV head
  };
  template <class W>
  Prepared prepare(const W& w) {
    cuda::ModelPointers m{w.config.hidden, w.config.heads, w.config.kv_heads, w.config.ffn, w.config.vocab, w.config.norm_eps, w.rope, w.cache, w.embedding, {}, w.final_norm, w.head,
                          w.frequencies};
    for (const auto& l : w.layers) m.layers.push_back({l.attn_norm, l.ffn_norm, l.qkv, l.o, l.gate_up, l.down});
    return {prepare_decode(m), std::make_shared<cuda::StepGraphs>(), w.cache, static_cast<index_t>(w.config.heads / w.config.kv_heads)};
  }
  /// Does a step's `enqueue()`; a step that looks like an earlier one (`work`: its activations, `want`: what it does) as one graph: of one token for each
  /// sequence, or of one sequence's tokens, whose kernels the host takes longer to launch than the card to run where they are few.
  template <class F>
  void repeat(const Prepared& prepared, const Batch& b, const void* work, int want, F&& enqueue) {
    if (!prepared.steps || (b.most_tokens != 1 && (b.count != 1 || b.rows > graph_rows || prepared.cache.format == Format::f8_e4m3))) return enqueue();
    const cuda::Current here(card_);
    plan_attention(prepared.cache, prepared.group, b);
    const auto address = [](const void* p) { return reinterpret_cast<std::uintptr_t>(p); };
    const auto numbers = [](auto high, auto low) { return static_cast<std::uintptr_t>(high) << 32 | static_cast<std::uintptr_t>(low); };
    // Whatever else of the batch's arrays moves, moves with these.
    prepared.steps->run(stream(), {address(work), static_cast<std::uintptr_t>(want), numbers(b.rows, b.count), address(b.ids), address(b.positions), address(scratch_), address(few_.on_card),
                                   address(many_.on_card), address(counters_.data()), address(squares_.data()), numbers(few_.plan.blocks, few_.plan.parts), numbers(many_.plan.blocks, few_.plan.tile_rows)}, enqueue);
  }
  /// `steps` tokens of one sequence in one launch, from `id` on, each the most probable after the one before; the first is written at s.position of its
  /// pages, which are there for all. logits [vocab]: of the last; tokens [steps], or null: the most probable after each. In the device's memory. False
  /// where the model was not prepared for it.
  bool decode(const Prepared& prepared, float* logits, std::int32_t id, const Sequence& s, std::int32_t* tokens = nullptr, index_t steps = 1);

  /// ids [rows] = the first of the largest in each row of x [rows, n]; in the device's memory.
  void argmax(std::int32_t* ids, View<const float, dyn, dyn> x);
  /// ids [rows], in the device's memory: of each row of logits x [rows, n] the token that how[row], in the host's memory, chooses.
  void sample(std::int32_t* ids, View<const float, dyn, dyn> x, std::span<const Draw> how);

 private:
  bool hopper();  // whether the program has code of Hopper's own for this card
  static int checked(int card) {
    const int n = cuda::card_count();
    if (card < 0 || card >= n) throw Error("CUDA", "card", n ? "0.." + std::to_string(n - 1) : "a card that the driver finds", n ? std::to_string(card) : "none");
    return card;
  }
  void copy(void* to, const void* from, std::size_t bytes, cudaMemcpyKind kind) const {
    const cuda::Current here(card_);
    if (bytes) cuda::check(cudaMemcpyAsync(to, from, bytes, kind, stream_.get()), "cudaMemcpyAsync", std::to_string(bytes) + " bytes");
  }
  /// A plan of attention, and its copy on the card.
  struct PlanOnCard {
    cuda::AttentionPlan plan;
    cuda::Upload upload;
    std::byte* on_card = nullptr;
    PlanOnCard(int card, cudaMemPool_t pool, cudaStream_t stream) : upload(card, pool, stream) {}
    void send(cuda::AttentionPlan p) {
      plan = std::move(p);
      if (plan.empty()) return;
      const std::size_t bytes = plan.items.size() * sizeof(cuda::AttentionItem);
      std::memcpy(upload.begin(bytes), plan.items.data(), bytes);
      on_card = upload.send();
    }
    cuda::AttentionArgs<A, A> of(cuda::AttentionArgs<A, A> a) const {
      a.items = reinterpret_cast<const cuda::AttentionItem*>(on_card), a.blocks = plan.blocks, a.tile_rows = plan.tile_rows, a.parts = plan.parts;
      return a;
    }
  };
  std::shared_ptr<cuda::DecodeState> prepare_decode(const cuda::ModelPointers& m);
  Batch batch(std::span<const std::int32_t> ids, const std::int32_t* on_card, index_t rows, std::span<const Sequence> sequences);
  void plan_attention(const CacheShape& shape, index_t group, const Batch& b);
  bool by_tensor_cores(const CacheShape& shape) const { return std::is_same_v<A, bf16> && (shape.head_dim == 64 || shape.head_dim == 128) && shape.format != Format::f32; }
  /// Sequences whose new rows the prefill kernel takes; a cache of e4m3 is expanded for it.
  bool by_flash(const CacheShape& shape, index_t group, const Sequence& s) {
    return by_tensor_cores(shape) && hopper() && shape.format != Format::q8_0 && s.tokens * group >= flash_rows;
  }
  bool stream_product(cuda::StreamTask t, std::byte* memory);
  bool plain_on_hopper(const Linear& w);
  void rope_store_kv(View<A, dyn, dyn> q, View<const A, dyn, dyn> k, View<const A, dyn, dyn> v, View<const float, dyn, dyn> cos, View<const float, dyn, dyn> sin, RopeLayout layout,
                     const CacheShape& shape, index_t layer, const Batch& batch, const cuda::RowScale& scale);
  cuda::RowScale half_norm(View<const A, dyn, dyn> x) const;
  bool gated_product(View<A, dyn, dyn> out, View<A, dyn, dyn> gate_up, View<const A, dyn, dyn> x, View<const A, dyn, dyn> gate, View<const A, dyn, dyn> up, bool keep,
                     const cuda::RowScale& scale, bool early);
  void forget_norm(const A* normed);
  void finish_norm(const A* x);
  template <class Y>
  void product(View<Y, dyn, dyn> y, View<const A, dyn, dyn> x, const Linear& w, const Y* residual = nullptr);

  int card_;
  cuda::Stream stream_;
  cuda::Pool pool_;
  cuda::BlasPlans blas_;
  std::string name_;
  int multiprocessors_ = 0, capability_ = 0;
  int hopper_ = -1;  // not known yet
  std::byte* scratch_ = nullptr;
  std::size_t scratch_bytes_ = 0;
  cuda::Upload batch_upload_, draws_;
  Batch last_;  // for observers
  PlanOnCard few_, many_;  // of the last batch, where attention was asked for: sequences of few and of many new rows
  bool planned_ = false;
  cuda::PoolMemory counters_, stream_flags_;  // zero between launches
  cuda::PoolMemory squares_;                  // of a SplitNorm
  std::shared_ptr<cuda::SplitNorm> split_;    // the norm that is half done, if its `normed` is not null

 public:
  std::shared_ptr<CudaTraining<A>> training;  ///< what training keeps, made at its first operation
};

using Cuda = CudaDevice<bf16>;
using CudaF32 = CudaDevice<float>;

}  // namespace tinyllama
