// Training's operations on a card as launches of kernels. For nvcc; units of other compilers link with one that has these (device/cuda_training.cu).
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>
#include <utility>

#include "tinyllama/device/cuda_narrow.cuh"
#include "tinyllama/device/cuda_operations.cuh"
#include "tinyllama/device/cuda_training.cuh"
#include "tinyllama/device/cuda_training_fp8.cuh"
#include "tinyllama/kernels/cuda/adamw.cuh"
#include "tinyllama/kernels/cuda/attention_gradient.cuh"
#include "tinyllama/kernels/cuda/elementwise.cuh"
#include "tinyllama/kernels/cuda/embedding_gradient.cuh"
#include "tinyllama/kernels/cuda/loss.cuh"
#include "tinyllama/kernels/cuda/rmsnorm_gradient.cuh"
#include "tinyllama/kernels/cuda/swiglu_gradient.cuh"

namespace tinyllama {

template <class A>
CudaTraining<A>::CudaTraining(CudaDevice<A>& dev)
    : dev_(&dev), blas_(dev.card()), sequences_upload_(dev.card(), dev.pool(), dev.stream()) {
#if defined(TINYLLAMA_CUDNN)
  if constexpr (std::is_same_v<A, bf16>)
    if (const cuda::CudnnApi* api = cuda::CudnnApi::find()) {
      const cuda::Current here(dev.card());
      cudnn_ = std::make_unique<cuda::CudnnAttention>(*api, dev.stream());
    }
#endif
}

template <class A>
template <class Y>
void CudaTraining<A>::product(M<Y> y, M<const A> a, M<const A> b, bool accumulate) {
  const cuda::Current here(dev_->card());
  const index_t m = y.extent(0), n = y.extent(1), k = a.extent(1);
  if (a.extent(0) != m || b.extent(0) != n || b.extent(1) != k)
    throw Error("gemm", "shapes", "y [M, N] = a [M, K] b [N, K]^T",
                "[" + std::to_string(m) + ", " + std::to_string(n) + "] = " + detail::shape_text(a.shape()) + " " + detail::shape_text(b.shape()) + "^T");
  if (m == 0 || n == 0 || k == 0) return;
  struct Side {
    index_t ld;
    bool transposed;
  };
  const auto side = [](const char* which, M<const A> v) -> Side {
    if (v.stride(1) == 1 || v.extent(1) == 1) return {std::max(v.extent(0) > 1 ? v.stride(0) : 0, v.extent(1)), false};
    if (v.stride(0) == 1 || v.extent(0) == 1) return {std::max(v.stride(1), v.extent(0)), true};
    throw Error("gemm", which, "adjacent elements along one axis", "strides " + detail::shape_text(v.strides()));
  };
  if (n > 1 && y.stride(1) != 1) throw Error("gemm", "y", "rows of adjacent elements", "strides " + detail::shape_text(y.strides()));
  const Side left = side("a", a), right = side("b", b);
  cuda::BlasTask t{b.data(), a.data(), y.data(), right.ld, left.ld, std::max(y.stride(0), n), m, n, k, cuda::blas_type<A>(), cuda::blas_type<Y>()};
  t.w_transposed = right.transposed, t.x_transposed = left.transposed, t.accumulate = accumulate, t.measure = m * n * k >= index_t{1} << 30 ? 1 : 0;
  if (!start(t)) throw Error("gemm", "operands", "rows that cuBLASLt takes: multiples of 16 bytes", "[" + std::to_string(m) + ", " + std::to_string(k) + "] by [" + std::to_string(n) + ", " + std::to_string(k) + "]^T");
}

template <class A>
bool CudaTraining<A>::start(const cuda::BlasTask& t) {
  constexpr std::size_t workspace_bytes = CudaDevice<A>::blas_workspace;
  return blas_.multiply(dev_->stream(), t, dev_->scratch(workspace_bytes), workspace_bytes);
}

template <class A>
void CudaTraining<A>::gemm(M<A> y, M<const A> a, M<const A> b, bool accumulate) { product(y, a, b, accumulate); }
template <class A>
void CudaTraining<A>::gemm(M<float> y, M<const A> a, M<const A> b, bool accumulate)
  requires(!std::is_same_v<A, float>)
{ product(y, a, b, accumulate); }

#if defined(TINYLLAMA_CUDNN)
template <class A>
bool CudaTraining<A>::cudnn_shape(cuda::CudnnAttentionShape& s, std::span<const Sequence> batch, const HeadShape& shape, index_t ld_qkv, index_t ld_out) {
  if (!cudnn_ || plain_attention || batch.empty() || shape.head_dim % 8 || shape.head_dim > 128) return false;
  const index_t tokens = batch.front().tokens, first = batch.front().first_row;
  for (std::size_t i = 0; i < batch.size(); ++i)
    if (batch[i].tokens != tokens || batch[i].first_row != first + static_cast<index_t>(i) * tokens) return false;
  s = {static_cast<std::int64_t>(batch.size()), tokens, shape.heads, shape.kv_heads, shape.head_dim, ld_qkv, ld_out};
  if (cudnn_->takes(s)) return true;
  cudnn_failure_ = cudnn_->failure();
  return false;
}
#endif

template <class A>
bool CudaTraining<A>::uses_cudnn(index_t count, index_t tokens, const HeadShape& shape) {
#if defined(TINYLLAMA_CUDNN)
  const cuda::Current here(dev_->card());
  std::vector<Sequence> batch;
  for (index_t i = 0; i < count; ++i) batch.push_back({.first_row = i * tokens, .tokens = tokens});
  cuda::CudnnAttentionShape s{};
  return cudnn_shape(s, batch, shape, (shape.heads + 2 * shape.kv_heads) * shape.head_dim, shape.heads * shape.head_dim);
#else
  return false;
#endif
}

template <class A>
const cuda::BatchSequence* CudaTraining<A>::sequences(std::span<const Sequence> batch, int& most_tokens) {
  const auto same = [](const Sequence& a, const Sequence& b) { return a.first_row == b.first_row && a.tokens == b.tokens; };
  most_tokens = 0;
  for (const Sequence& s : batch) most_tokens = std::max(most_tokens, static_cast<int>(s.tokens));
  if (on_card_ && std::equal(batch.begin(), batch.end(), last_.begin(), last_.end(), same)) return on_card_;
  last_.assign(batch.begin(), batch.end());
  auto* to = reinterpret_cast<cuda::BatchSequence*>(sequences_upload_.begin(batch.size() * sizeof(cuda::BatchSequence)));
  for (const Sequence& s : batch) *to++ = {static_cast<std::int32_t>(s.first_row), static_cast<std::int32_t>(s.tokens), 0, 0};
  return on_card_ = reinterpret_cast<const cuda::BatchSequence*>(sequences_upload_.send());
}

namespace cuda {
template <class A>
AttentionGradientTask<A> attention_task(View<const A, dyn, dyn> qkv, A* out, index_t ld_out, float* lse, const HeadShape& shape) {
  AttentionGradientTask<A> t{};
  t.qkv = qkv.data(), t.ld = qkv.stride(0), t.out = out, t.ld_out = ld_out, t.lse = lse;
  t.heads = static_cast<int>(shape.heads), t.kv_heads = static_cast<int>(shape.kv_heads), t.head_dim = static_cast<int>(shape.head_dim);
  t.scale = 1.0f / std::sqrt(static_cast<float>(shape.head_dim));
  return t;
}
}  // namespace cuda

template <class A>
void CudaTraining<A>::flash_attention(M<A> out, M<float> lse, M<const A> qkv, std::span<const Sequence> batch, const HeadShape& shape) {
  const cuda::Current here(dev_->card());
#if defined(TINYLLAMA_CUDNN)
  if constexpr (std::is_same_v<A, bf16>)
    if (cuda::CudnnAttentionShape s{}; cudnn_shape(s, batch, shape, qkv.stride(0), out.stride(0))) {
      const index_t first = batch.front().first_row;
      return cudnn_->forward(s, qkv.data() + first * qkv.stride(0), out.data() + first * out.stride(0), lse.data() + first * lse.stride(0), dev_->scratch(cudnn_->forward_workspace(s)));
    }
#endif
  auto t = cuda::attention_task<A>(qkv, out.data(), out.stride(0), lse.data(), shape);
  t.sequences = sequences(batch, t.most_tokens), t.count = static_cast<int>(batch.size());
  cuda::attention_forward_any(dev_->stream(), t);
}

template <class A>
void CudaTraining<A>::flash_attention_backward(M<A> dqkv, M<const A> d_out, M<const A> qkv, M<const A> out, M<const float> lse, std::span<const Sequence> batch, const HeadShape& shape, float* delta) {
  const cuda::Current here(dev_->card());
#if defined(TINYLLAMA_CUDNN)
  if constexpr (std::is_same_v<A, bf16>)
    if (cuda::CudnnAttentionShape s{}; dqkv.stride(0) == qkv.stride(0) && d_out.stride(0) == out.stride(0) && cudnn_shape(s, batch, shape, qkv.stride(0), out.stride(0))) {
      const index_t r = batch.front().first_row;
      return cudnn_->backward(s, qkv.data() + r * qkv.stride(0), out.data() + r * out.stride(0), lse.data() + r * lse.stride(0), d_out.data() + r * d_out.stride(0),
                              dqkv.data() + r * dqkv.stride(0), dev_->scratch(cudnn_->backward_workspace(s)));
    }
#endif
  // The forward pass wrote out and lse; backward reads them.
  auto t = cuda::attention_task<A>(qkv, const_cast<A*>(out.data()), out.stride(0), const_cast<float*>(lse.data()), shape);
  t.d_out = d_out.data(), t.ld_d_out = d_out.stride(0), t.dqkv = dqkv.data(), t.ld_dqkv = dqkv.stride(0), t.delta = delta;
  t.sequences = sequences(batch, t.most_tokens), t.count = static_cast<int>(batch.size());
  cuda::attention_backward_any(dev_->stream(), t);
}

template <class A>
void CudaTraining<A>::rmsnorm_backward(M<float> dx, M<A> rounded, M<const A> dy, M<const float> x, const float* gain, float* dgain, float eps, M<A> normed) {
  const cuda::Current here(dev_->card());
  const bool apart = static_cast<const void*>(rounded.data()) != dx.data();
  auto* partial = dgain ? reinterpret_cast<float*>(dev_->scratch(static_cast<std::size_t>(cuda::gain_blocks * dx.extent(1)) * sizeof(float))) : nullptr;
  cuda::rmsnorm_gradient<A>(dev_->stream(), {dx.data(), dx.stride(0), apart ? rounded.data() : nullptr, rounded.stride(0), normed.extent(0) ? normed.data() : nullptr, normed.stride(0),
                                             dy.data(), dy.stride(0), x.data(), x.stride(0), gain, nullptr,
                                             static_cast<int>(dx.extent(0)), static_cast<int>(dx.extent(1)), eps}, dgain, partial);
}

template <class A>
void CudaTraining<A>::add_rmsnorm(M<A> normed, M<float> sum, M<const float> x, M<const A> added, const float* gain, float eps) {
  const cuda::Current here(dev_->card());
  cuda::add_rmsnorm<A>(dev_->stream(), {normed.data(), normed.stride(0), sum.data(), sum.stride(0), x.data(), x.stride(0), added.data(), added.stride(0), gain, static_cast<int>(x.extent(0)),
                                        static_cast<int>(x.extent(1)), eps});
}

template <class A>
void CudaTraining<A>::swiglu_backward(M<A> dgate, M<A> dup, M<const A> dh, M<const A> gate, M<const A> up, M<A> h) {
  const cuda::Current here(dev_->card());
  if (dgate.stride(0) != dup.stride(0) || gate.stride(0) != up.stride(0)) throw Error("swiglu_backward", "gate and up", "rows at the same distance", "others");
  cuda::swiglu_gradient<A>(dev_->stream(), {dgate.data(), dup.data(), dgate.stride(0), dh.data(), dh.stride(0), gate.data(), up.data(), gate.stride(0), h.extent(0) ? h.data() : nullptr, h.stride(0),
                                            static_cast<int>(dh.extent(0)), static_cast<int>(dh.extent(1))});
}

template <class A>
void CudaTraining<A>::cross_entropy(M<A> gradient, M<const A> logits, std::span<const std::int32_t> targets, const float* weights, float* losses) {
  const cuda::Current here(dev_->card());
  cuda::cross_entropy<A>(dev_->stream(), {gradient.extent(0) ? gradient.data() : nullptr, gradient.stride(0), logits.data(), logits.stride(0), targets.data(), weights, losses,
                                          static_cast<int>(logits.extent(0)), static_cast<int>(logits.extent(1))});
}

template <class A>
void CudaTraining<A>::id_rows(std::int32_t* to, std::span<const std::int32_t> ids, index_t vocab) {
  // By counting: ids as they come first, starts of each, then rows in their order. The counts are 0 again behind it.
  const auto most = static_cast<std::size_t>(std::min(static_cast<index_t>(ids.size()), vocab));
  std::int32_t *const id = to + 1, *const starts = id + most, *const order = starts + most + 1;
  if (count_.size() < static_cast<std::size_t>(vocab)) count_.resize(static_cast<std::size_t>(vocab));
  const auto count = [&](std::int32_t i) -> std::int32_t& { return count_[static_cast<std::size_t>(i)]; };
  std::int32_t distinct = 0, at = 0;
  for (const std::int32_t i : ids)
    if (count(i)++ == 0) id[distinct++] = i;
  for (std::int32_t i = 0; i < distinct; ++i) starts[i] = at, at += std::exchange(count(id[i]), at);
  starts[distinct] = at, *to = distinct;
  for (std::size_t r = 0; r < ids.size(); ++r) order[count(ids[r])++] = static_cast<std::int32_t>(r);
  for (std::int32_t i = 0; i < distinct; ++i) count(id[i]) = 0;
}
template <class A>
void CudaTraining<A>::embedding_backward(M<float> table, std::span<const std::int32_t> ids, const std::int32_t* id_rows, M<const float> dx) {
  const cuda::Current here(dev_->card());
  const index_t rows = static_cast<index_t>(ids.size()), most = std::min(rows, table.extent(0));
  const std::int32_t *const id = id_rows + 1, *const starts = id + most, *const order = starts + most + 1;
  cuda::embedding_gradient(dev_->stream(), {table.data(), dx.data(), table.stride(0), dx.stride(0), id_rows, id, starts, order, static_cast<int>(rows), static_cast<int>(table.extent(1))});
}

template <class A>
void CudaTraining<A>::adamw(const AdamwTask& task, std::span<const AdamwRange> ranges, A* rounded) {
  const cuda::Current here(dev_->card());
  if (!task.goes_on) {
    ++weights_version_, ++steps_;
    if (noted_) ++noted_->updates;
    rescale();  // the scales of the next step are made for what this one has seen
  }
  if constexpr (std::is_same_v<A, bf16>) cuda::adamw(dev_->stream(), task, ranges, rounded);
  else cuda::adamw(dev_->stream(), task, ranges, nullptr);
}

template <class A>
void CudaTraining<A>::round_to(A* to, const float* from, index_t n) {
  const cuda::Current here(dev_->card());
  // Other weights, maybe of another model: nothing is known of them, nor of what they meet.
  ++weights_version_, ++weights_put_;
  for (auto& [id, m] : fp8_) m.w_first = m.x_first = m.dy_first = 0;
  if (static_cast<const void*>(to) != from) cuda::round_to(dev_->stream(), to, from, n);
}

template <class A>
double CudaTraining<A>::sum_of_squares(const float* x, index_t n) {
  const cuda::Current here(dev_->card());
  StepSums sums;
  auto* const on_card = reinterpret_cast<StepSums*>(dev_->scratch(sizeof sums + cuda::square_blocks * sizeof(double)));
  auto* const partial = reinterpret_cast<double*>(on_card + 1);
  dev_->zero(on_card, sizeof sums);
  cuda::sum_of_squares(dev_->stream(), partial, x, n);
  cuda::add_squares(dev_->stream(), on_card, partial);
  dev_->download(&sums, on_card, sizeof sums);
  return sums.squares;
}

template <class A>
void CudaTraining<A>::add_squares(StepSums* sums, const float* x, index_t n) {
  const cuda::Current here(dev_->card());
  auto* const partial = reinterpret_cast<double*>(dev_->scratch(cuda::square_blocks * sizeof(double)));
  cuda::sum_of_squares(dev_->stream(), partial, x, n);
  cuda::add_squares(dev_->stream(), sums, partial);
}

template <class A>
void CudaTraining<A>::clip(StepSums* sums, float most) {
  const cuda::Current here(dev_->card());
  cuda::clip(dev_->stream(), sums, most);
}

template <class A>
void CudaTraining<A>::add_loss(StepSums* sums, const float* losses, const float* weights, index_t n) {
  const cuda::Current here(dev_->card());
  cuda::add_loss(dev_->stream(), sums, losses, weights, n);
}

template <class A>
typename CudaTraining<A>::Places CudaTraining<A>::places(bool batch) {
  const auto address = [](const void* p) { return reinterpret_cast<std::uintptr_t>(p); };
  const auto of = [&](const std::unique_ptr<cuda::PoolMemory>& m) { return m ? address(m->data()) : 0; };
  return {batch ? address(on_card_) : 0, address(dev_->scratch(0)), of(scales_), of(x_), of(dy_rows_), of(dy_columns_), weights_put_, plain_attention};
}

template <class A>
void CudaTraining<A>::expect(std::span<const Sequence> batch) {
  const cuda::Current here(dev_->card());
  int most_tokens = 0;
  sequences(batch, most_tokens);
}

template <class A>
void CudaTraining<A>::fill(float* x, index_t n, float value) {
  const cuda::Current here(dev_->card());
  if (value == 0.0f) dev_->zero(x, static_cast<std::size_t>(n) * sizeof(float));
  else cuda::fill(dev_->stream(), x, n, value);
}
template <class A>
void CudaTraining<A>::scale(M<A> x, float by) {
  const cuda::Current here(dev_->card());
  cuda::scale(dev_->stream(), x.data(), x.stride(0), x.extent(0), x.extent(1), by);
}
template <class A>
void CudaTraining<A>::scale(M<float> x, float by)
  requires(!std::is_same_v<A, float>)
{
  const cuda::Current here(dev_->card());
  cuda::scale(dev_->stream(), x.data(), x.stride(0), x.extent(0), x.extent(1), by);
}
template <class A>
void CudaTraining<A>::add(M<A> x, M<const A> y) {
  const cuda::Current here(dev_->card());
  cuda::add_to(dev_->stream(), x.data(), x.stride(0), y.data(), y.stride(0), x.extent(0), x.extent(1));
}
template <class A>
void CudaTraining<A>::dropout(M<A> out, M<const A> x, float p, std::uint64_t key) {
  const cuda::Current here(dev_->card());
  cuda::dropout(dev_->stream(), out.data(), out.stride(0), x.data(), x.stride(0), x.extent(0), x.extent(1), p, key);
}

template <class T>
void cuda::Narrow<T>::narrow(cudaStream_t stream, T* to, const float* from, index_t n) { cuda::convert(stream, "narrow", to, from, n); }
template <class T>
void cuda::Narrow<T>::widen(cudaStream_t stream, float* to, const T* from, index_t n) { cuda::convert(stream, "widen", to, from, n); }

}  // namespace tinyllama
