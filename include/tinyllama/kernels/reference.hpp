// Each kernel as a plain loop in double: its meaning, and the oracle of every test.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "tinyllama/kernels/kernels.hpp"

namespace tinyllama::reference {

// out_i = gain_i x_i / sqrt(mean(x^2) + eps)
inline void rmsnorm(float* out, const float* x, const float* gain, index_t n, float eps) {
  double squares = 0;
  for (index_t i = 0; i < n; ++i) squares += static_cast<double>(x[i]) * x[i];
  const double scale = 1.0 / std::sqrt(squares / static_cast<double>(n) + eps);
  for (index_t i = 0; i < n; ++i) out[i] = static_cast<float>(x[i] * scale * gain[i]);
}

inline void add(float* x, const float* residual, index_t n) {
  for (index_t i = 0; i < n; ++i) x[i] += residual[i];
}

inline void add_rmsnorm(float* out, float* x, const float* residual, const float* gain, index_t n, float eps) {
  add(x, residual, n);
  rmsnorm(out, x, gain, n, eps);
}

// (a, b) -> (a cos - b sin, b cos + a sin) for each pair of the layout; cos and sin are [head_dim / 2] of the token's position
inline void rope(float* x, const float* cos, const float* sin, index_t heads, index_t head_dim, RopeLayout layout) {
  const index_t half = head_dim / 2;
  for (index_t h = 0; h < heads; ++h)
    for (index_t i = 0; i < half; ++i) {
      float& a = x[h * head_dim + (layout == RopeLayout::half ? i : 2 * i)];
      float& b = x[h * head_dim + (layout == RopeLayout::half ? i + half : 2 * i + 1)];
      const double u = a, v = b;
      a = static_cast<float>(u * cos[i] - v * sin[i]);
      b = static_cast<float>(v * cos[i] + u * sin[i]);
    }
}

inline void swiglu(float* out, const float* gate, const float* up, index_t n) {
  for (index_t i = 0; i < n; ++i) out[i] = static_cast<float>(gate[i] / (1.0 + std::exp(-static_cast<double>(gate[i]))) * up[i]);
}

inline void softmax(float* out, const float* x, index_t n, float scale) {
  double max = -std::numeric_limits<double>::infinity(), sum = 0;
  for (index_t i = 0; i < n; ++i) max = std::max(max, static_cast<double>(x[i]) * scale);
  std::vector<double> e(static_cast<std::size_t>(n));
  for (index_t i = 0; i < n; ++i) sum += e[static_cast<std::size_t>(i)] = std::exp(static_cast<double>(x[i]) * scale - max);
  for (index_t i = 0; i < n; ++i) out[i] = static_cast<float>(e[static_cast<std::size_t>(i)] / sum);
}

inline float load(Format f, const std::byte* at, index_t i) {
  if (f == Format::f32) return detail::get<float>(at, i);
  if (f == Format::f16) return detail::get<f16>(at, i);
  return detail::get<bf16>(at, i);
}
inline void store(Format f, std::byte* at, index_t i, float v) {
  if (f == Format::f32) return detail::put(at, i, v);
  if (f == Format::f16) return detail::put(at, i, f16(v));
  detail::put(at, i, bf16(v));
}

inline void store_kv(const StoreTask& t) {
  for (index_t d = 0; d < t.head_dim; ++d) store(t.format, t.k_page, d * page_tokens + t.slot, t.k[d]);
  for (index_t d = 0; d < head_stride(t.head_dim); ++d) store(t.format, t.v_page, t.slot * head_stride(t.head_dim) + d, d < t.head_dim ? t.v[d] : 0.0f);
}

// s_p = scale q . k_p;  max = max_p s_p;  sum = sum_p exp(s_p - max);  o = sum_p exp(s_p - max) v_p
inline void attention(const AttentionTask& t) {
  const index_t stride = head_stride(t.head_dim);
  std::vector<double> s(static_cast<std::size_t>(std::max<index_t>(0, t.end - t.begin))), o(static_cast<std::size_t>(stride));
  for (index_t r = 0; r < t.rows; ++r) {
    const float* q = t.q + r / t.group * t.ldq + r % t.group * t.head_dim;
    const index_t last = std::min(t.end, t.position + r / t.group + 1);
    double max = -std::numeric_limits<double>::infinity(), sum = 0;
    for (index_t p = t.begin; p < last; ++p) {
      const std::byte* k = t.pages[p / page_tokens] + t.k_offset;
      double dot = 0;
      for (index_t d = 0; d < t.head_dim; ++d) dot += static_cast<double>(q[d]) * load(t.format, k, d * page_tokens + p % page_tokens);
      max = std::max(max, s[static_cast<std::size_t>(p - t.begin)] = dot * t.scale);
    }
    std::fill(o.begin(), o.end(), 0.0);
    for (index_t p = t.begin; p < last; ++p) {
      const std::byte* v = t.pages[p / page_tokens] + t.v_offset;
      const double e = std::exp(s[static_cast<std::size_t>(p - t.begin)] - max);
      sum += e;
      for (index_t d = 0; d < stride; ++d) o[static_cast<std::size_t>(d)] += e * load(t.format, v, p % page_tokens * stride + d);
    }
    for (index_t d = 0; d < stride; ++d) t.o[r * stride + d] = static_cast<float>(o[static_cast<std::size_t>(d)]);
    t.max[r] = static_cast<float>(max);
    t.sum[r] = static_cast<float>(sum);
  }
}

inline void round_bf16(bf16* out, const float* x, index_t n) {
  for (index_t i = 0; i < n; ++i) out[i] = bf16(x[i]);
}

// groups of 32: q = round(x / scale), scale = max|x| / 127; the sums are of scale q. A NaN or an infinity makes its group NaN or infinite.
inline void quantise_activations(std::int8_t* q, float* scale, float* sum32, float* sum16, const float* x, index_t n) {
  for (index_t g = 0; g < n / 32; ++g) {
    float max = 0;
    for (index_t i = 0; i < 32; ++i)
      if (const float a = std::fabs(x[g * 32 + i]); !(a <= max) && max == max) max = a;  // a NaN stays
    const float d = max / 127.0f, inverse = quantise_inverse(max);
    scale[g] = d;
    for (index_t h = 0; h < 2; ++h) {
      int sum = 0;
      for (index_t i = h * 16; i < h * 16 + 16; ++i) {
        const float code = x[g * 32 + i] * inverse;
        sum += q[g * 32 + i] = code == code ? static_cast<std::int8_t>(std::nearbyint(code)) : std::int8_t{0};
      }
      sum16[2 * g + h] = d * static_cast<float>(sum);
    }
    sum32[g] = sum16[2 * g] + sum16[2 * g + 1];
  }
}

namespace detail {
template <class X>
void matmul(const MatmulTask& t, index_t first, index_t last, X&& x) {
  std::vector<float> row(static_cast<std::size_t>(t.k));
  for (index_t j = first * panel_rows; j < std::min(t.n, last * panel_rows); ++j) {
    visit(t.format, [&]<Format F>() {
      unpack_row<F>(t.w + static_cast<std::size_t>(j / panel_rows) * panel_bytes<F>(t.k), static_cast<int>(j % panel_rows), t.k, row.data());
    });
    for (index_t i = 0; i < t.m; ++i) {
      double sum = 0;
      for (index_t k = 0; k < t.k; ++k) sum += static_cast<double>(row[static_cast<std::size_t>(k)]) * x(i, k);
      t.y[i * t.ldy + j] = static_cast<float>(sum);
    }
  }
}
}  // namespace detail

inline void matmul_f32(const MatmulTask& t, index_t first, index_t last) {
  detail::matmul(t, first, last, [&](index_t i, index_t k) { return t.x[i * t.ldx + k]; });
}
inline void matmul_bf16(const MatmulTask& t, index_t first, index_t last) {
  detail::matmul(t, first, last, [&](index_t i, index_t k) { return static_cast<float>(t.x_bf16[i * t.ldx + k]); });
}
inline void matmul_int8(const MatmulTask& t, index_t first, index_t last) {
  detail::matmul(t, first, last, [&](index_t i, index_t k) { return t.x_scale[(i * t.k + k) / 32] * static_cast<float>(t.x_q8[i * t.k + k]); });
}

/// The reference as a table: `Cpu dev({.kernels = &reference::kernels})` runs a whole model on it.
inline constexpr Kernels kernels = {
    "reference", true,
#define TINYLLAMA_KERNEL_ENTRY(name, ...) &reference::name,
    TINYLLAMA_KERNELS(TINYLLAMA_KERNEL_ENTRY)
#undef TINYLLAMA_KERNEL_ENTRY
};

}  // namespace tinyllama::reference
