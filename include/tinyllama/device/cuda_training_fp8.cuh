// Training's products in 8-bit floats on a card: weights, activations and gradients quantised with scales that the passes before have seen the need of. For nvcc.
#pragma once

#include "tinyllama/device/cuda_operations.cuh"
#include "tinyllama/device/cuda_training.cuh"
#include "tinyllama/kernels/cuda/fp8.cuh"

namespace tinyllama {

template <class A>
typename CudaTraining<A>::Fp8Matrix& CudaTraining<A>::fp8(const Fp8Weights<A>& w) {
  if (!scales_) {
    scales_ = std::make_unique<cuda::PoolMemory>(dev_->card(), dev_->pool(), dev_->stream());
    std::byte* const at = scales_->reserve(most_scales * (sizeof(cuda::Fp8Scale) + 1));
    std::vector<std::uint8_t> formats(most_scales);
    for (std::size_t i = 0; i < formats.size(); ++i) formats[i] = static_cast<std::uint8_t>(i % 3 == 2 ? cuda::Fp8::e5m2 : cuda::Fp8::e4m3);
    dev_->zero(at, most_scales * sizeof(cuda::Fp8Scale));
    dev_->upload(at + most_scales * sizeof(cuda::Fp8Scale), formats.data(), formats.size());
  }
  const auto [it, fresh] = fp8_.try_emplace(w.id);
  Fp8Matrix& m = it->second;
  if (fresh) {
    if (3 * fp8_.size() > static_cast<std::size_t>(most_scales)) throw Error("fp8", "matrices", "at most " + std::to_string(most_scales / 3), std::to_string(fp8_.size()));
    m.scale = 3 * static_cast<int>(fp8_.size() - 1);
  }
  return m;
}

template <class A>
const std::uint8_t* CudaTraining<A>::weights_8(Fp8Matrix& m, const Fp8Weights<A>& w, bool transposed) {
  const index_t n = w.values.size();
  if (w.passing) {
    std::uint8_t* const q = place(passing_, n);
    quantise(w.values, false, transposed ? nullptr : q, transposed ? q : nullptr, m.scale, m.w_first);
    return q;
  }
  std::uint8_t* const rows = place(m.weights, 2 * n);
  if (m.version != weights_version_) {
    quantise(w.values, false, rows, rows + n, m.scale, m.w_first);  // by the scale of the step before: weights move little in one
    m.version = weights_version_;
    if (noted_) noted_->quantised.push_back(&m.version);
  }
  return transposed ? rows + n : rows;
}

template <class A>
std::span<float> CudaTraining<A>::magnitudes() const {
  static_assert(sizeof(cuda::Fp8Scale) % sizeof(float) == 0);
  if (!scales_) return {};
  return {reinterpret_cast<float*>(scales_->data()), 3 * fp8_.size() * sizeof(cuda::Fp8Scale) / sizeof(float)};
}

template <class A>
void CudaTraining<A>::rescale(int only) {
  if (!scales_) return;
  auto* const scales = reinterpret_cast<cuda::Fp8Scale*>(scales_->data());
  cuda::rescale(dev_->stream(), scales, most_scales, reinterpret_cast<const std::uint8_t*>(scales + most_scales), only);
}

template <class A>
const float* CudaTraining<A>::inverse(int scale) const { return &(reinterpret_cast<const cuda::Fp8Scale*>(scales_->data()) + scale)->inverse; }

template <class A>
void CudaTraining<A>::quantise(M<const A> x, bool gradient, std::uint8_t* q, std::uint8_t* transposed, int scale, std::uint64_t& first) {
  if constexpr (std::is_same_v<A, bf16>) {
    auto* const scales = reinterpret_cast<cuda::Fp8Scale*>(scales_->data());
    const cuda::QuantiseTask t{x.data(), x.stride(0), q, transposed, scales + scale, static_cast<int>(x.extent(0)), static_cast<int>(x.extent(1))};
    if (first == 0 || first == steps_) {
      if (noted_) {
        measured_ = true;
        throw Error("fp8", "a recording", "scales from a step before", "none");
      }
      if (first == 0) dev_->zero(scales + scale, sizeof *scales);
      first = steps_;
      cuda::magnitude(dev_->stream(), t);
      rescale(scale);
    }
    cuda::quantise(dev_->stream(), gradient ? cuda::Fp8::e5m2 : cuda::Fp8::e4m3, t);
  }
}

template <class A>
std::uint8_t* CudaTraining<A>::place(std::unique_ptr<cuda::PoolMemory>& m, index_t bytes) {
  if (!m) m = std::make_unique<cuda::PoolMemory>(dev_->card(), dev_->pool(), dev_->stream());
  return reinterpret_cast<std::uint8_t*>(m->reserve(static_cast<std::size_t>(bytes)));
}

namespace cuda {
/// y [m, n] = x [m, k] w [n, k]^T of contiguous rows of 8-bit floats.
template <class Y>
BlasTask fp8_task(View<Y, dyn, dyn> y, const std::uint8_t* x, bool x_gradient, const float* x_scale, const std::uint8_t* w, bool w_gradient, const float* w_scale, index_t k) {
  BlasTask t{w, x, y.data(), k, k, y.stride(0), y.extent(0), y.extent(1), k, w_gradient ? CUDA_R_8F_E5M2 : CUDA_R_8F_E4M3, blas_type<Y>()};
  t.in_x = x_gradient ? CUDA_R_8F_E5M2 : CUDA_R_8F_E4M3;
  t.w_scale = w_scale, t.x_scale = x_scale, t.measure = 1;
  return t;
}
inline void expect_product(bool found) {
  if (!found) throw Error("fp8", "a product", "one that cuBLASLt has kernels for (Hopper, sizes in multiples of 16)", "none");
}
}  // namespace cuda

template <class A>
void CudaTraining<A>::gemm_fp8(M<A> y, M<const A> x, const Fp8Weights<A>& w)
  requires std::is_same_v<A, bf16>
{
  const cuda::Current here(dev_->card());
  Fp8Matrix& m = fp8(w);
  std::uint8_t* const q = place(x_, x.size());
  quantise(x, false, q, nullptr, m.scale + 1, m.x_first);
  const std::uint8_t* const rows = weights_8(m, w, false);
  auto t = cuda::fp8_task(y, q, false, inverse(m.scale + 1), rows, false, inverse(m.scale), w.values.extent(1));
  t.fast_sums = true;
  cuda::expect_product(start(t));
}

template <class A>
void CudaTraining<A>::gemm_fp8_input(M<A> dx, M<const A> dy, const Fp8Weights<A>& w)
  requires std::is_same_v<A, bf16>
{
  const cuda::Current here(dev_->card());
  Fp8Matrix& m = fp8(w);
  std::uint8_t* const q = place(dy_rows_, dy.size());
  dy_transposed_ = place(dy_columns_, dy.size()), dy_tokens_ = dy.extent(0);
  quantise(dy, true, q, dy_transposed_, m.scale + 2, m.dy_first);
  const std::uint8_t* const columns = weights_8(m, w, true);
  const auto t = cuda::fp8_task(dx, q, true, inverse(m.scale + 2), columns, false, inverse(m.scale), w.values.extent(0));
  cuda::expect_product(start(t));
}

template <class A>
void CudaTraining<A>::gemm_fp8_weight(M<float> dw, M<const A> x, const Fp8Weights<A>& w, bool accumulate)
  requires std::is_same_v<A, bf16>
{
  const cuda::Current here(dev_->card());
  Fp8Matrix& m = fp8(w);
  if (!dy_transposed_ || dy_tokens_ != x.extent(0)) throw Error("fp8", "a gradient of weights", "after that of the input", "another order");
  std::uint8_t* const q = place(x_, x.size());
  quantise(x, false, nullptr, q, m.scale + 1, m.x_first);
  auto t = cuda::fp8_task(dw, dy_transposed_, true, inverse(m.scale + 2), q, false, inverse(m.scale + 1), x.extent(0));
  t.accumulate = accumulate;
  cuda::expect_product(start(t));
}

}  // namespace tinyllama
