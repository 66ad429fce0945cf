// Training's operations on a card. Declared here for any compiler; defined in cuda_training_operations.cuh, for nvcc.
#pragma once

#include <array>
#include <cstdint>
#include <map>
#include <memory>
#include <span>
#include <type_traits>
#include <vector>

#include "tinyllama/device/cuda.cuh"
#include "tinyllama/device/cuda_recording.cuh"
#include "tinyllama/device/training.hpp"
#include "tinyllama/kernels/cuda/cudnn_attention.hpp"

namespace tinyllama {

/// What training keeps on a card beside the device's own: plans of products and of attention, small arrays on their way there. Operations as in
/// device/training.hpp; they return before their work is done.
template <class A>
class CudaTraining {
  template <class T>
  using M = View<T, dyn, dyn>;

 public:
  explicit CudaTraining(CudaDevice<A>& dev);

  void gemm(M<A> y, M<const A> a, M<const A> b, bool accumulate);
  void gemm(M<float> y, M<const A> a, M<const A> b, bool accumulate)
    requires(!std::is_same_v<A, float>);
  // Products of a matrix in 8-bit floats: y = x w^T; dx = dy w; dw (+)= dy^T x with the dy of the last dx.
  void gemm_fp8(M<A> y, M<const A> x, const Fp8Weights<A>& w)
    requires std::is_same_v<A, bf16>;
  void gemm_fp8_input(M<A> dx, M<const A> dy, const Fp8Weights<A>& w)
    requires std::is_same_v<A, bf16>;
  void gemm_fp8_weight(M<float> dw, M<const A> x, const Fp8Weights<A>& w, bool accumulate)
    requires std::is_same_v<A, bf16>;
  void flash_attention(M<A> out, M<float> lse, M<const A> qkv, std::span<const Sequence> batch, const HeadShape& shape);
  void flash_attention_backward(M<A> dqkv, M<const A> d_out, M<const A> qkv, M<const A> out, M<const float> lse, std::span<const Sequence> batch, const HeadShape& shape, float* delta);
  void rmsnorm_backward(M<float> dx, M<A> rounded, M<const A> dy, M<const float> x, const float* gain, float* dgain, float eps, M<A> normed);
  void add_rmsnorm(M<A> normed, M<float> sum, M<const float> x, M<const A> added, const float* gain, float eps);
  void swiglu_backward(M<A> dgate, M<A> dup, M<const A> dh, M<const A> gate, M<const A> up, M<A> h);
  void cross_entropy(M<A> gradient, M<const A> logits, std::span<const std::int32_t> targets, const float* weights, float* losses);
  void embedding_backward(M<float> table, std::span<const std::int32_t> ids, const std::int32_t* id_rows, M<const float> dx);
  void id_rows(std::int32_t* to, std::span<const std::int32_t> ids, index_t vocab);
  void adamw(const AdamwTask& task, std::span<const AdamwRange> ranges, A* rounded);
  void round_to(A* to, const float* from, index_t n);
  double sum_of_squares(const float* x, index_t n);
  void add_loss(StepSums* sums, const float* losses, const float* weights, index_t n);
  void add_squares(StepSums* sums, const float* x, index_t n);
  void clip(StepSums* sums, float most);
  /// Of all matrices in 8-bit floats, with their scales, which adamw makes anew.
  std::span<float> magnitudes() const;
  void fill(float* x, index_t n, float value);
  void scale(M<A> x, float by);
  void scale(M<float> x, float by)
    requires(!std::is_same_v<A, float>);
  void add(M<A> x, M<const A> y);
  void dropout(M<A> out, M<const A> x, float p, std::uint64_t key);

  /// Whether attention of so many equally long sequences runs in cuDNN's kernels; and why not, where it was asked.
  bool uses_cudnn(index_t sequences, index_t tokens, const HeadShape& shape);
  const std::string& cudnn_failure() const { return cudnn_failure_; }
  /// Attention by the plain kernels, as where there is no cuDNN: for tests.
  bool plain_attention = false;

  // ---- for Recording (device/cuda_recording.cuh)

  /// A step's work is recorded and repeated as graphs; false: each kernel is launched each time.
  bool records = true;
  int repeated = 0;  ///< how often a graph was launched
  /// The arrays of the device's own that work is given, those of the batch's sequences if it has one; with another of them a graph is no longer right.
  using Places = std::array<std::uintptr_t, 8>;
  Places places(bool batch);
  /// What the host does for work with `batch` before it, recorded or not.
  void expect(std::span<const Sequence> batch);
  /// Their copies in 8 bits are made anew where they are next read.
  void expect_new_weights() { ++weights_version_; }
  /// What the host remembers of work: matrices whose weights it quantised, and how often it began an update.
  struct Noted {
    std::vector<std::uint64_t*> quantised;
    std::uint64_t updates = 0;
  };
  /// While it is recorded it is noted in `to`, until null.
  void note(Noted* to) { noted_ = to, measured_ = false; }
  /// Whether the recording ended because a scale was to be made, as in a first step only.
  bool measured() const { return measured_; }
  /// It has been repeated.
  void repeat(const Noted& noted) {
    for (std::uint64_t* version : noted.quantised) *version = weights_version_;
    weights_version_ += noted.updates, steps_ += noted.updates;
    ++repeated;
  }
  /// It was noted, and is yet to be done, or will not be.
  void undo(const Noted& noted) { weights_version_ -= noted.updates, steps_ -= noted.updates; }

 private:
  template <class Y>
  void product(M<Y> y, M<const A> a, M<const A> b, bool accumulate);
  /// False where the library does not take it.
  bool start(const cuda::BlasTask& t);

  // ---- 8-bit floats

  /// A matrix's weights, unless they are passing, and the scales of its weights, inputs and output's gradients.
  struct Fp8Matrix {
    std::unique_ptr<cuda::PoolMemory> weights;  // in rows, then transposed
    std::uint64_t version = 0;                  // of the weights that are there
    int scale = 0;                              // of w; behind it x's and dy's
    std::uint64_t w_first = 0, x_first = 0, dy_first = 0;  // the step in which their scales were first made
  };
  static constexpr int most_scales = 3 * 4096;
  Fp8Matrix& fp8(const Fp8Weights<A>& w);
  /// Its weights in 8 bits, made where they are not there.
  const std::uint8_t* weights_8(Fp8Matrix& m, const Fp8Weights<A>& w, bool transposed);
  const float* inverse(int scale) const;
  /// By a scale for what the step before has seen; in the step `first` (0: not yet) by one for all that it has seen so far, this x included.
  void rescale(int only = -1);  // the scales, or one, for what was seen
  void quantise(M<const A> x, bool gradient, std::uint8_t* q, std::uint8_t* transposed, int scale, std::uint64_t& first);
  std::uint8_t* place(std::unique_ptr<cuda::PoolMemory>& memory, index_t bytes);
  std::map<const void*, Fp8Matrix> fp8_;
  std::unique_ptr<cuda::PoolMemory> scales_;
  std::unique_ptr<cuda::PoolMemory> x_, dy_rows_, dy_columns_, passing_;
  std::uint8_t* dy_transposed_ = nullptr;  // of the last dx
  index_t dy_tokens_ = 0;
  std::uint64_t weights_version_ = 1;
  std::uint64_t weights_put_ = 0;          // how often weights came from elsewhere than AdamW
  std::uint64_t steps_ = 1;                // of AdamW, of all trainers, and the present one
  bool measured_ = false;                  // while recording
  Noted* noted_ = nullptr;
  /// On the card, uploaded where it is another than the last.
  const cuda::BatchSequence* sequences(std::span<const Sequence> batch, int& most_tokens);

  CudaDevice<A>* dev_;
  cuda::BlasPlans blas_;
  cuda::Upload sequences_upload_;
  std::vector<Sequence> last_;
  const cuda::BatchSequence* on_card_ = nullptr;
  std::vector<std::int32_t> count_;  // of each id, for id_rows
  std::string cudnn_failure_ = "no library";
#if defined(TINYLLAMA_CUDNN)
  std::unique_ptr<cuda::CudnnAttention> cudnn_;
  /// Set where cuDNN takes the batch.
  bool cudnn_shape(cuda::CudnnAttentionShape& s, std::span<const Sequence> batch, const HeadShape& shape, index_t ld_qkv, index_t ld_out);
#endif
};

template <class A>
CudaTraining<A>& training_of(CudaDevice<A>& dev) {
  if (!dev.training) dev.training = std::make_shared<CudaTraining<A>>(dev);
  return *dev.training;
}

// ---- the functions of the concept TrainingDevice

namespace detail {
template <class T>
using MatrixOf = std::type_identity_t<View<T, dyn, dyn>>;  // to be converted to, not deduced
}

/// 8192 rows of TinyLlama's logits are 524 MB in bf16: enough rows for products at full speed, an eighth of them all at 65,536 tokens.
template <class A>
constexpr index_t default_logits_rows(const CudaDevice<A>*) { return 8192; }
/// cuBLASLt's workspace, or what cuDNN's gradient of attention takes: dQ in f32, dK and dV of each head before heads that share them are added, and a number for
/// each row and head. Operands in 8-bit floats: weights in rows and transposed (passing: of one matrix, one way), inputs, gradients both
/// ways.
template <class A, Config C>
constexpr std::size_t training_scratch(const CudaDevice<A>*, const C& c, const TrainingWork& w) {
  const auto rows = static_cast<std::size_t>(w.rows), heads = static_cast<std::size_t>(c.heads), ffn = static_cast<std::size_t>(c.ffn);
  std::size_t bytes = CudaDevice<A>::blas_workspace;
  if (sizeof(A) == 2) bytes = std::max(bytes, rows * heads * (static_cast<std::size_t>(head_dim(c)) * 8 + 4));
  if (w.fp8) {
    if (w.passing) bytes += static_cast<std::size_t>(c.hidden) * std::max(2 * ffn, static_cast<std::size_t>(c.hidden + 2 * c.kv_heads * head_dim(c)));
    else for_each_parameter(c, [&](const Parameter& p) { bytes += p.layer >= 0 && p.role != Role::gain ? 2 * static_cast<std::size_t>(p.size()) : 0; });
    bytes += rows * ffn * 5;
  }
  return bytes;
}
template <class A>
constexpr index_t flash_backward_floats(const CudaDevice<A>*, index_t T, const HeadShape& shape) { return T * shape.heads; }

template <class A>
void gemm(CudaDevice<A>& dev, detail::MatrixOf<A> y, detail::MatrixOf<const A> a, detail::MatrixOf<const A> b, const GemmOptions& o = {}) { training_of(dev).gemm(y, a, b, o.accumulate); }
template <class A>
  requires(!std::is_same_v<A, float>)
void gemm(CudaDevice<A>& dev, View<float, dyn, dyn> y, detail::MatrixOf<const A> a, detail::MatrixOf<const A> b, const GemmOptions& o = {}) { training_of(dev).gemm(y, a, b, o.accumulate); }
inline void gemm_fp8(Cuda& dev, View<bf16, dyn, dyn> y, View<const bf16, dyn, dyn> x, const Fp8Weights<bf16>& w) { training_of(dev).gemm_fp8(y, x, w); }
inline void gemm_fp8_input(Cuda& dev, View<bf16, dyn, dyn> dx, View<const bf16, dyn, dyn> dy, const Fp8Weights<bf16>& w) { training_of(dev).gemm_fp8_input(dx, dy, w); }
inline void gemm_fp8_weight(Cuda& dev, View<float, dyn, dyn> dw, View<const bf16, dyn, dyn> x, const Fp8Weights<bf16>& w, bool accumulate) { training_of(dev).gemm_fp8_weight(dw, x, w, accumulate); }
template <class A>
void flash_attention(CudaDevice<A>& dev, detail::MatrixOf<A> out, detail::MatrixOf<float> lse, detail::MatrixOf<const A> qkv, std::span<const Sequence> batch, const HeadShape& shape,
                     const GemmOptions&) { training_of(dev).flash_attention(out, lse, qkv, batch, shape); }
template <class A>
void flash_attention_backward(CudaDevice<A>& dev, detail::MatrixOf<A> dqkv, detail::MatrixOf<const A> d_out, detail::MatrixOf<const A> qkv, detail::MatrixOf<const A> out,
                              detail::MatrixOf<const float> lse, std::span<const Sequence> batch, const HeadShape& shape, float* delta, const GemmOptions&) {
  training_of(dev).flash_attention_backward(dqkv, d_out, qkv, out, lse, batch, shape, delta);
}
template <class A>
void rmsnorm_backward(CudaDevice<A>& dev, detail::MatrixOf<float> dx, detail::MatrixOf<A> rounded, detail::MatrixOf<const A> dy, detail::MatrixOf<const float> x, const float* gain, float* dgain,
                      float eps, float*, detail::MatrixOf<A> normed) { training_of(dev).rmsnorm_backward(dx, rounded, dy, x, gain, dgain, eps, normed); }
/// sum = x + added;  normed = rmsnorm(sum)
template <class A>
void add_rmsnorm(CudaDevice<A>& dev, detail::MatrixOf<A> normed, detail::MatrixOf<float> sum, detail::MatrixOf<const float> x, detail::MatrixOf<const A> added, const float* gain, float eps) {
  training_of(dev).add_rmsnorm(normed, sum, x, added, gain, eps);
}
template <class A>
void swiglu_backward(CudaDevice<A>& dev, detail::MatrixOf<A> dgate, detail::MatrixOf<A> dup, detail::MatrixOf<const A> dh, detail::MatrixOf<const A> gate, detail::MatrixOf<const A> up,
                     detail::MatrixOf<A> h) {
  training_of(dev).swiglu_backward(dgate, dup, dh, gate, up, h);
}
template <class A>
void cross_entropy(CudaDevice<A>& dev, detail::MatrixOf<A> gradient, detail::MatrixOf<const A> logits, std::span<const std::int32_t> targets, const float* weights, float* losses) {
  training_of(dev).cross_entropy(gradient, logits, targets, weights, losses);
}
template <class A>
void embedding_backward(CudaDevice<A>& dev, detail::MatrixOf<float> table, std::span<const std::int32_t> ids, const std::int32_t* id_rows, detail::MatrixOf<const float> dx) {
  training_of(dev).embedding_backward(table, ids, id_rows, dx);
}
/// How many ids there are; they; where the rows of each begin; the rows.
template <class A>
constexpr index_t id_rows_words(const CudaDevice<A>*, index_t rows, index_t vocab) { return 2 * std::min(rows, vocab) + 2 + rows; }
template <class A>
void id_rows(CudaDevice<A>& dev, std::int32_t* to, std::span<const std::int32_t> ids, index_t vocab) { training_of(dev).id_rows(to, ids, vocab); }
template <class A>
typename CudaDevice<A>::Batch ids_on(const CudaDevice<A>&, std::span<const std::int32_t> ids) {
  typename CudaDevice<A>::Batch b{};
  b.ids = ids.data(), b.rows = static_cast<int>(ids.size());
  return b;
}
template <class A>
void adamw(CudaDevice<A>& dev, const AdamwTask& task, std::span<const AdamwRange> ranges, A* rounded) { training_of(dev).adamw(task, ranges, rounded); }
template <class A>
void round_to(CudaDevice<A>& dev, A* to, const float* from, index_t n) { training_of(dev).round_to(to, from, n); }
template <class A>
double sum_of_squares(CudaDevice<A>& dev, const float* x, index_t n) { return training_of(dev).sum_of_squares(x, n); }
template <class A>
void add_loss(CudaDevice<A>& dev, StepSums* sums, const float* losses, const float* weights, index_t n) { training_of(dev).add_loss(sums, losses, weights, n); }
template <class A>
void add_squares(CudaDevice<A>& dev, StepSums* sums, const float* x, index_t n) { training_of(dev).add_squares(sums, x, n); }
template <class A>
void clip(CudaDevice<A>& dev, StepSums* sums, float most) { training_of(dev).clip(sums, most); }
template <class A>
std::span<float> magnitudes(CudaDevice<A>& dev) { return training_of(dev).magnitudes(); }
template <class A>
void fill(CudaDevice<A>& dev, float* x, index_t n, float value) { training_of(dev).fill(x, n, value); }
template <class A>
void scale(CudaDevice<A>& dev, detail::MatrixOf<A> x, float by) { training_of(dev).scale(x, by); }
template <class A>
  requires(!std::is_same_v<A, float>)
void scale(CudaDevice<A>& dev, View<float, dyn, dyn> x, float by) { training_of(dev).scale(x, by); }
template <class A>
void add(CudaDevice<A>& dev, detail::MatrixOf<A> x, detail::MatrixOf<const A> y) { training_of(dev).add(x, y); }
template <class A>
void dropout(CudaDevice<A>& dev, detail::MatrixOf<A> out, detail::MatrixOf<const A> x, float p, std::uint64_t key) { training_of(dev).dropout(out, x, p, key); }

static_assert(TrainingDevice<Cuda> && TrainingDevice<CudaF32>);

}  // namespace tinyllama
