// Each kernel as a plain loop in double: its meaning, and the oracle of every test.
#pragma once

#include <algorithm>
#include <bit>
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

namespace detail {
inline float largest_magnitude(const float* x, index_t n) {
  float max = 0;
  for (index_t i = 0; i < n; ++i)
    if (const float a = std::fabs(x[i]); !(a <= max) && max == max) max = a;  // a NaN stays
  return max;
}
// Element i of a page's K or V, which belongs to the position in `slot`; the page has `rows` values for each position.
inline float load(Format f, const std::byte* page, index_t i, index_t slot, index_t rows) {
  using tinyllama::detail::get;
  if (f == Format::f32) return get<float>(page, i);
  if (f == Format::f16) return get<f16>(page, i);
  if (f == Format::bf16) return get<bf16>(page, i);
  if (f == Format::f8_e4m3) return get<e4m3>(page, i);
  return get<float>(page + rows * page_tokens, slot) * static_cast<float>(get<std::int8_t>(page, i));
}
inline void store(Format f, std::byte* page, index_t i, float v, float inverse) {
  using tinyllama::detail::put;
  if (f == Format::f32) return put(page, i, v);
  if (f == Format::f16) return put(page, i, f16(v));
  if (f == Format::bf16) return put(page, i, bf16(v));
  if (f == Format::f8_e4m3) return put(page, i, e4m3(v));
  const float code = v * inverse;
  put(page, i, code == code ? static_cast<std::int8_t>(std::nearbyint(code)) : std::int8_t{0});
}
// Where the format has scales, the position's goes to its place; returns what values are multiplied with to become codes.
inline float store_scale(Format f, std::byte* page, const float* x, index_t n, index_t slot, index_t rows) {
  if (f != Format::q8_0) return 1;
  const float max = largest_magnitude(x, n);
  tinyllama::detail::put(page + rows * page_tokens, slot, max / 127.0f);
  return quantise_inverse(max);
}
}  // namespace detail

/// Value d of K, and of V, of the position in `slot` of a page.
inline float load_k(Format f, const std::byte* page, index_t head_dim, index_t slot, index_t d) {
  return detail::load(f, page, d * page_tokens + slot, slot, head_dim);
}
inline float load_v(Format f, const std::byte* page, index_t head_dim, index_t slot, index_t d) {
  return detail::load(f, page, slot * head_stride(head_dim) + d, slot, head_stride(head_dim));
}

inline void store_kv(const StoreTask& t) {
  const index_t stride = head_stride(t.head_dim);
  const float k = detail::store_scale(t.format, t.k_page, t.k, t.head_dim, t.slot, t.head_dim);
  for (index_t d = 0; d < t.head_dim; ++d) detail::store(t.format, t.k_page, d * page_tokens + t.slot, t.k[d], k);
  const float v = detail::store_scale(t.format, t.v_page, t.v, t.head_dim, t.slot, stride);
  for (index_t d = 0; d < stride; ++d) detail::store(t.format, t.v_page, t.slot * stride + d, d < t.head_dim ? t.v[d] : 0.0f, v);
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
      for (index_t d = 0; d < t.head_dim; ++d) dot += static_cast<double>(q[d]) * load_k(t.format, k, t.head_dim, p % page_tokens, d);
      max = std::max(max, s[static_cast<std::size_t>(p - t.begin)] = dot * t.scale);
    }
    std::fill(o.begin(), o.end(), 0.0);
    for (index_t p = t.begin; p < last; ++p) {
      const std::byte* v = t.pages[p / page_tokens] + t.v_offset;
      const double e = std::exp(s[static_cast<std::size_t>(p - t.begin)] - max);
      sum += e;
      for (index_t d = 0; d < stride; ++d) o[static_cast<std::size_t>(d)] += e * load_v(t.format, v, t.head_dim, p % page_tokens, d);
    }
    for (index_t d = 0; d < stride; ++d) t.o[r * stride + d] = static_cast<float>(o[static_cast<std::size_t>(d)]);
    t.max[r] = static_cast<float>(max);
    t.sum[r] = static_cast<float>(sum);
  }
}

inline void attention_bf16(const AttentionTask& t) { attention(t); }

inline void round_bf16(bf16* out, const float* x, index_t n) {
  for (index_t i = 0; i < n; ++i) out[i] = bf16(x[i]);
}

// groups of 32: q = round(x / scale), scale = max|x| / 127; the sums are of scale round(x / scale). A NaN or an infinity makes its group NaN or infinite.
inline void quantise_activations(std::int8_t* q, float* scale, float* sum32, float* sum16, const float* x, index_t n) {
  for (index_t g = 0; g < n / 32; ++g) {
    const float max = detail::largest_magnitude(x + g * 32, 32), d = max / 127.0f, inverse = quantise_inverse(max);
    scale[g] = d;
    int sum[2] = {};
    for (index_t i = 0; i < 32; ++i) {
      const float code = x[g * 32 + i] * inverse;
      const int nearest = code == code ? static_cast<int>(std::nearbyint(code)) : 0;
      q[g * 32 + i] = static_cast<std::int8_t>(nearest);
      sum[i / 16] += nearest;
    }
    sum32[g] = d * static_cast<float>(sum[0] + sum[1]);
    for (index_t h = 0; h < 2; ++h) sum16[2 * g + h] = d * static_cast<float>(sum[h]);
  }
}

// 256 columns: codes of 32 as above; their scales as ratios to the largest, which is kept as 2^15 times that of ratio 1
inline void quantise_columns(Int8Columns* to, index_t stride, const float* x, index_t n) {
  for (index_t c = 0; c < n; c += int8_columns, to += stride) {
    const index_t columns = std::min(int8_columns, n - c);
    const float all = detail::largest_magnitude(x + c, columns);
    *to = {};
    to->scale = all / 127.0f * (32768.0f / 32767.0f);
    for (index_t g = 0; g < columns / 32; ++g) {
      const float own = detail::largest_magnitude(x + c + 32 * g, 32), part = own * ratio_inverse(all);
      const auto ratio = part == part ? static_cast<std::int32_t>(std::nearbyint(part)) : 0;
      int sum[2] = {};
      for (index_t i = 0; i < 32; ++i) {
        const float code = x[c + 32 * g + i] * quantise_inverse(own);
        const int nearest = code == code ? static_cast<int>(std::nearbyint(code)) : 0;
        to->codes[32 * g + i] = static_cast<std::int8_t>(nearest);
        sum[i / 16] += nearest;
      }
      to->sum32[g] = sum[0] + sum[1];
      for (index_t h = 0; h < 2; ++h) to->sum16[h][g] = static_cast<std::int16_t>(sum[h]);
      const auto eighths = static_cast<std::int32_t>(std::floor(8.0 * to->sum32[g] * ratio / 32768 + 0.5));
      to->ratios[g / 2] |= g % 2 ? ratio : ratio * 65536;
      to->sums[g / 2] |= g % 2 ? eighths & 0xffff : eighths * 65536;
    }
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
    "reference", true, std::numeric_limits<index_t>::max(),
#define TINYLLAMA_KERNEL_ENTRY(name, ...) &reference::name,
    TINYLLAMA_KERNELS(TINYLLAMA_KERNEL_ENTRY)
#undef TINYLLAMA_KERNEL_ENTRY
};

}  // namespace tinyllama::reference
