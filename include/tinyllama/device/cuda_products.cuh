// Products of CudaDevice: which kernel, or the library, multiplies what, and the norms that lie between two of them. For nvcc; a part of cuda_operations.cuh.
#pragma once

#include "tinyllama/device/cuda.cuh"
#include "tinyllama/kernels/cuda/cluster_gemm.cuh"
#include "tinyllama/kernels/cuda/gated_matmul.cuh"
#include "tinyllama/kernels/cuda/matmul.cuh"
#include "tinyllama/kernels/cuda/matmul_e4m3.cuh"
#include "tinyllama/kernels/cuda/rmsnorm.cuh"
#include "tinyllama/kernels/cuda/stream_gemm.cuh"
#include "tinyllama/kernels/cuda/sum_matmul.cuh"

namespace tinyllama {

/// Whether all of W is one matrix of bf16 as the kernels of Hopper's own read it.
template <class A>
bool CudaDevice<A>::plain_on_hopper(const Linear& w) {
  if (!std::is_same_v<A, bf16> || !hopper()) return false;
  index_t before = 0;
  for (int i = 0; i < w.parts; ++i) {
    const Matrix& m = w.part[static_cast<std::size_t>(i)];
    if (m.format != Format::bf16 || !m.packed || m.data != w.part[0].data + before * cuda::packed_row_bytes(m.format, w.columns())) return false;
    before += m.rows;
  }
  return before % 8 == 0 && w.columns() % 8 == 0 && w.columns() > 64;
}

template <class A>
void CudaDevice<A>::matmul_add_rmsnorm(View<float, dyn, dyn> y, View<A, dyn, dyn> normed, View<const A, dyn, dyn> x, const Linear& w, View<const float, dyn, dyn> residual, const float* gain, float eps,
                                       const Linear& reader) {
  if constexpr (std::is_same_v<A, bf16>) {
    const index_t rows = y.extent(0), n = y.extent(1);
    const bool few = rows >= 2 && rows <= cuda::cluster::most_rows, many = rows >= tile_rows && cuda::sum_matmul_pays(rows, n, w.columns(), multiprocessors_);
    if ((few || many) && w.parts == 1 && plain_on_hopper(w) && plain_on_hopper(reader) && residual.stride(0) == y.stride(0)) {
      const cuda::Current here(card_);
      finish_norm(x.data());
      const int parts = many ? cuda::sum_parts(rows, n, multiprocessors_) : static_cast<int>(cuda::SplitNorm::most_parts);
      const std::size_t bytes = static_cast<std::size_t>(std::max<index_t>(rows, cuda::SplitNorm::most_rows) * parts) * sizeof(float);
      if (squares_.size() < bytes) squares_.reserve(bytes);
      if (!split_) split_ = std::make_shared<cuda::SplitNorm>();
      cuda::SplitNorm norm{reinterpret_cast<float*>(squares_.data()), normed.data(), normed.stride(0), n, gain, eps, parts, y.data(), y.stride(0), rows};
      const auto size = [](index_t i) { return static_cast<int>(i); };
      const bool done = many ? cuda::sum_matmul(stream(), {x.data(), reinterpret_cast<const bf16*>(w.part[0].data), x.stride(0), cuda::packed_row_bytes(Format::bf16, w.columns()) / 2, residual.data(),
                                                           y.data(), y.stride(0), size(rows), size(n), size(w.columns()), gain, normed.data(), normed.stride(0), norm.squares, true}, multiprocessors_)
                             : cuda::cluster_gemm(stream(), {Format::bf16, w.part[0].data, nullptr, n, w.columns(), x.data(), x.stride(0), rows, y.data(), y.stride(0), true, residual.data(), nullptr, &norm});
      if (done) {
        *split_ = norm;
        return;
      }
    }
  }
  matmul_add(y, x, w, residual);
  rmsnorm(normed, y, gain, eps);
}

/// What sums of products with x are to be multiplied by, if its norm is half done.
template <class A>
cuda::RowScale CudaDevice<A>::half_norm(View<const A, dyn, dyn> x) const {
  if constexpr (std::is_same_v<A, bf16>)
    if (split_ && split_->normed == x.data() && x.extent(0) == split_->m && x.extent(1) == split_->n)
      return {split_->squares, split_->parts, 1.0f / static_cast<float>(split_->n), split_->eps};
  return {};
}

/// `normed` gets other values than those of a norm that is half done.
template <class A>
void CudaDevice<A>::forget_norm(const A* normed) {
  if constexpr (std::is_same_v<A, bf16>)
    if (split_ && split_->normed == normed) split_->normed = nullptr;
}

/// Before x is read by what does not do the other half of its norm: all of it.
template <class A>
void CudaDevice<A>::finish_norm(const A* x) {
  if constexpr (std::is_same_v<A, bf16>) {
    if (!split_ || split_->normed != x || !x) return;
    const cuda::SplitNorm norm = *split_;
    split_->normed = nullptr;
    rmsnorm(View<A, dyn, dyn>(norm.normed, {norm.m, norm.n}, {norm.ld, 1}), View<const float, dyn, dyn>(norm.y, {norm.m, norm.n}, {norm.ld_y, 1}), norm.gain, norm.eps);
  }
}

/// A product of a step of decoding as cluster_gemm or stream_gemm does it; false where it is for another way. `memory`: of blas_workspace and weights_scratch.
template <class A>
bool CudaDevice<A>::stream_product(cuda::StreamTask t, std::byte* memory) {
  if (t.m <= 1 || !hopper()) return false;
  if (t.format == Format::bf16) {
    const bool split = split_ && split_->normed == t.x && t.m == split_->m && t.k == split_->n;
    t.scales = split ? split_.get() : nullptr;
    if (t.m > cuda::cluster::most_rows || !cuda::cluster_gemm(stream(), t)) return false;
    if (split) split_->normed = nullptr;
    return true;
  }
  if (t.m > cuda::stream::most_rows(t.format) || (t.m <= few_rows && t.format != Format::f8_e4m3)) return false;
  if (cuda::stream::partial_bytes(multiprocessors_) > blas_workspace + weights_scratch) return false;
  finish_norm(reinterpret_cast<const A*>(t.x));
  if (const std::size_t bytes = cuda::stream::flags_bytes(multiprocessors_); stream_flags_.size() < bytes) {
    stream_flags_.reserve(bytes);
    zero(stream_flags_.data(), stream_flags_.size());
  }
  return cuda::stream_gemm(stream(), t, multiprocessors_, reinterpret_cast<float*>(memory), reinterpret_cast<unsigned*>(stream_flags_.data()));
}

template <class A>
template <class Y>
void CudaDevice<A>::product(View<Y, dyn, dyn> y, View<const A, dyn, dyn> x, const Linear& w, const Y* residual) {
  const cuda::Current here(card_);
  const index_t rows = y.extent(0), columns = w.columns();
  if (rows == 0) return;
  bool quantised = false;  // activations as int8, once for all parts
  index_t column = 0;
  // 8-bit floats by 8-bit floats where the card multiplies them and nobody asked for more.
  bool e4m3_products = false;
  if constexpr (std::is_same_v<A, bf16>) e4m3_products = rows > 1 && capability_ >= 90 && w.compute != Compute::f32 && cuda::takes_e4m3(x.data(), x.stride(0), columns);
  bool any_e4m3 = false, e4m3_quantised = false;
  for (int i = 0; i < w.parts; ++i) any_e4m3 = any_e4m3 || (e4m3_products && w.part[static_cast<std::size_t>(i)].format == Format::f8_e4m3);
  std::byte* const memory = scratch(rows == 1 ? static_cast<std::size_t>(cuda::quantised_vector_bytes(columns))
                                              : blas_workspace + weights_scratch + (any_e4m3 ? cuda::E4m3Operands::bytes(rows, columns, w.rows()) : 0));
  for (int i = 0; i < w.parts;) {
    Matrix m = w.part[static_cast<std::size_t>(i++)];
    if (!m.packed) throw Error("matmul", "w", "packed by the device", "rows as in a file");
    const index_t stride = cuda::packed_row_bytes(m.format, columns);
    // Parts of one format that lie behind each other are one matrix.
    for (; i < w.parts && w.part[static_cast<std::size_t>(i)].format == m.format && w.part[static_cast<std::size_t>(i)].data == m.data + m.rows * stride; ++i)
      m.rows += w.part[static_cast<std::size_t>(i)].rows;
    Y* const to = y.data() + column;
    const Y* const add = residual ? residual + column : nullptr;
    bool added = add == nullptr;
    column += m.rows;
    bool done = false;
    if constexpr (std::is_same_v<A, bf16>) {
      done = stream_product({m.format, m.data, nullptr, m.rows, columns, x.data(), x.stride(0), rows, to, y.stride(0), std::is_same_v<Y, float>, add}, memory);
      if (!done) finish_norm(x.data());
      if (!done && e4m3_products && m.format == Format::f8_e4m3)
        done = cuda::matmul_e4m3<Y>(stream(), blas_, m.data, m.rows, columns, x.data(), x.stride(0), rows, to, y.stride(0), add,
                                    {memory + blas_workspace + weights_scratch, rows, columns}, std::exchange(e4m3_quantised, true), memory, blas_workspace);
    }
    if (done) {
      added = true;
    } else if (rows > 1 && (rows > few_rows || m.format == format_of<A>)) {
      added = cuda::matmul<A, Y>(stream(), blas_, {m.format, m.data, m.rows, columns, x.data(), x.stride(0), rows, to, y.stride(0), add}, memory, blas_workspace, memory + blas_workspace, weights_scratch);
    } else if (is_quantised(m.format) && w.compute != Compute::f32 && !std::is_same_v<A, float>) {
      if (!std::exchange(quantised, true)) cuda::quantise_vectors(stream(), x.data(), x.stride(0), static_cast<int>(rows), static_cast<int>(columns), memory);
      cuda::matvec_int8<Y>(stream(), {m.data, m.format, static_cast<int>(rows), static_cast<int>(m.rows), static_cast<int>(columns), memory, 0, to, y.stride(0)});
    } else {
      cuda::matvec_float<A, Y>(stream(), {m.data, m.format, static_cast<int>(rows), static_cast<int>(m.rows), static_cast<int>(columns), x.data(), x.stride(0), to, y.stride(0)});
    }
    cuda::launched("matmul");
    if constexpr (std::is_same_v<Y, float>)
      if (!added) cuda::add(stream(), to, y.stride(0), add, y.stride(0), rows, m.rows);
  }
}

template <class A>
void CudaDevice<A>::matmul(View<A, dyn, dyn> y, View<const A, dyn, dyn> x, const Linear& w) { product(y, x, w); }
template <class A>
void CudaDevice<A>::matmul(View<float, dyn, dyn> y, View<const A, dyn, dyn> x, const Linear& w)
  requires(!std::is_same_v<A, float>)
{ product(y, x, w); }

template <class A>
void CudaDevice<A>::matmul_add(View<float, dyn, dyn> y, View<const A, dyn, dyn> x, const Linear& w, View<const float, dyn, dyn> residual) {
  if (residual.stride(0) != y.stride(0)) throw Error("matmul_add", "residual", "rows at the distance of y's, " + std::to_string(y.stride(0)), std::to_string(residual.stride(0)));
  product(y, x, w, residual.data());
}

template <class A>
bool CudaDevice<A>::gated_product(View<A, dyn, dyn> out, View<A, dyn, dyn> gate_up, View<const A, dyn, dyn> x, View<const A, dyn, dyn> gate, View<const A, dyn, dyn> up, bool keep) {
  return gated_product(out, gate_up, x, gate, up, keep, {}, false);
}
template <class A>
bool CudaDevice<A>::gated_product(View<A, dyn, dyn> out, View<A, dyn, dyn> gate_up, View<const A, dyn, dyn> x, View<const A, dyn, dyn> gate, View<const A, dyn, dyn> up, bool keep,
                                  const cuda::RowScale& scale, bool early) {
  if constexpr (std::is_same_v<A, bf16>) {
    if (!hopper() || gate.stride(0) != up.stride(0)) return false;
    const cuda::Current here(card_);
    const auto size = [](index_t n) { return static_cast<int>(n); };
    return cuda::gated_matmul(stream(), {x.data(), gate.data(), up.data(), x.stride(0), gate.stride(0), out.data(), out.stride(0), size(x.extent(0)), size(gate.extent(0)), size(gate.extent(1)),
                                         keep ? gate_up.data() : nullptr, keep ? gate_up.stride(0) : 0, scale, early}, multiprocessors_);
  }
  return false;
}

template <class A>
void CudaDevice<A>::matmul_swiglu(View<A, dyn, dyn> out, View<A, dyn, dyn> gate_up, View<const A, dyn, dyn> x, const Linear& w, bool keep) {
  const Matrix &gate = w.part[0], &up = w.part[1];
  if constexpr (std::is_same_v<A, bf16>) {
    if (w.parts == 2 && gate.format == up.format && gate.packed && up.packed && gate.rows == up.rows && x.extent(0) > 0) {
      const cuda::Current here(card_);
      if (!keep && stream_product({gate.format, gate.data, up.data, gate.rows, w.columns(), x.data(), x.stride(0), x.extent(0), out.data(), out.stride(0), false, nullptr},
                                  scratch(blas_workspace + weights_scratch))) return;
      const auto plain = [](const Matrix& m) {
        return View<const A, dyn, dyn>(reinterpret_cast<const A*>(m.data), {m.rows, m.columns}, {cuda::packed_row_bytes(m.format, m.columns) / static_cast<index_t>(sizeof(A)), 1});
      };
      if (!half_norm(x).squares) finish_norm(x.data());
      if (gate.format == format_of<A> && gated_product(out, gate_up, x, plain(gate), plain(up), keep, half_norm(x), true)) return forget_norm(x.data());
    }
  }
  product(gate_up, x, w);  // finishes a norm that is half done
  const index_t ffn = out.extent(1);
  swiglu(out, columns(gate_up, 0, ffn), columns(gate_up, ffn, 2 * ffn));
}

template <class A>
void CudaDevice<A>::matmul_rope_store_kv(View<A, dyn, dyn> qkv, View<const A, dyn, dyn> x, const Linear& w, View<const float, dyn, dyn> cos, View<const float, dyn, dyn> sin, RopeLayout layout,
                                         const CacheShape& shape, index_t layer, const Batch& b) {
  const index_t kv = shape.kv_heads * shape.head_dim, q = qkv.extent(1) - 2 * kv;
  // Of many rows the other half of a norm waits until q, k and v are read again.
  const cuda::RowScale scale = x.extent(0) >= tile_rows ? half_norm(x) : cuda::RowScale{};
  if (scale.squares) forget_norm(x.data());
  product(qkv, x, w);
  rope_store_kv(columns(qkv, 0, q), columns(qkv, q, q + kv), columns(qkv, q + kv, q + 2 * kv), cos, sin, layout, shape, layer, b, scale);
}

}  // namespace tinyllama
