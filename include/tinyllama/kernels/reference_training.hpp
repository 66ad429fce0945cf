// Each training kernel as a plain loop in double: its meaning, and the oracle of every test.
#pragma once

#include <cmath>
#include <vector>

#include "tinyllama/kernels/reference.hpp"
#include "tinyllama/kernels/training.hpp"

namespace tinyllama::reference {

namespace detail {

inline double at(const Operand& a, index_t r, index_t i) { return a.data[r * a.row_stride + i * a.column_stride]; }

/// Place of element (r, i) in panels of an operand of k columns.
template <class E>
constexpr index_t panel_place(index_t r, index_t i, index_t k) {
  const index_t in = std::is_same_v<E, bf16> ? i / 2 * 32 + r % 16 * 2 + i % 2 : i * 16 + r % 16;
  return r / 16 * panel_elements(k) + in;
}

template <class E>
void pack(E* panels, const Operand& from, index_t first, index_t last) {
  for (index_t r = first * panel_rows; r < last * panel_rows; ++r)
    for (index_t i = 0; i < even(from.k); ++i)
      panels[panel_place<E>(r, i, from.k)] = static_cast<E>(r < from.rows && i < from.k ? static_cast<float>(at(from, r, i)) : 0.0f);
}

template <class E>
void gemm(const GemmTask& t, index_t first_row, index_t last_row, index_t first, index_t last) {
  const auto *a = reinterpret_cast<const E*>(t.a), *b = reinterpret_cast<const E*>(t.b);
  for (index_t i = first_row; i < std::min(t.m, last_row); ++i)
    for (index_t j = first * panel_rows; j < std::min(t.n, last * panel_rows); ++j) {
      double sum = t.accumulate ? t.y[i * t.ldy + j] : 0.0;
      for (index_t k = 0; k < t.k; ++k)
        sum += static_cast<double>(static_cast<float>(a[panel_place<E>(i, k, t.k)])) * static_cast<float>(b[panel_place<E>(j, k, t.k)]);
      t.y[i * t.ldy + j] = static_cast<float>(sum);
    }
}

}  // namespace detail

inline void pack_f32(float* panels, const Operand& from, index_t first, index_t last) { detail::pack(panels, from, first, last); }
inline void pack_bf16(bf16* panels, const Operand& from, index_t first, index_t last) { detail::pack(panels, from, first, last); }
inline void gemm_f32(const GemmTask& t, index_t r0, index_t r1, index_t p0, index_t p1) { detail::gemm<float>(t, r0, r1, p0, p1); }
inline void gemm_bf16(const GemmTask& t, index_t r0, index_t r1, index_t p0, index_t p1) { detail::gemm<bf16>(t, r0, r1, p0, p1); }

// s_j = scale q . k_j for j <= t;  lse = log sum_j exp(s_j);  o = sum_j exp(s_j - lse) v_j
inline void flash_forward(const FlashTask& t) {
  std::vector<double> s(static_cast<std::size_t>(t.tokens)), o(static_cast<std::size_t>(t.head_dim));
  for (index_t i = 0; i < t.tokens; ++i) {
    double max = -std::numeric_limits<double>::infinity(), sum = 0;
    for (index_t j = 0; j <= i; ++j) {
      double dot = 0;
      for (index_t d = 0; d < t.head_dim; ++d) dot += static_cast<double>(t.q[i * t.ld + d]) * t.k[j * t.ld + d];
      max = std::max(max, s[static_cast<std::size_t>(j)] = dot * t.scale);
    }
    std::fill(o.begin(), o.end(), 0.0);
    for (index_t j = 0; j <= i; ++j) {
      const double e = std::exp(s[static_cast<std::size_t>(j)] - max);
      sum += e;
      for (index_t d = 0; d < t.head_dim; ++d) o[static_cast<std::size_t>(d)] += e * t.v[j * t.ld + d];
    }
    for (index_t d = 0; d < t.head_dim; ++d) t.o[i * t.ldo + d] = static_cast<float>(o[static_cast<std::size_t>(d)] / sum);
    t.lse[i * t.ld_lse] = static_cast<float>(max + std::log(sum));
  }
}

// p = exp(s - lse);  dv_j = sum_i p_ij do_i;  dp_ij = do_i . v_j;  ds_ij = p_ij (dp_ij - do_i . o_i);  dq_i = scale sum_j ds_ij k_j, dk alike
inline void flash_backward(const FlashGradTask& g) {
  const FlashTask& t = g.forward;
  const auto n = static_cast<std::size_t>(t.tokens * t.head_dim);
  std::vector<double> dq(n), dk(n), dv(n);
  const auto at = [&](index_t i, index_t d) { return static_cast<std::size_t>(i * t.head_dim + d); };
  for (index_t i = 0; i < t.tokens; ++i) {
    double delta = 0;
    for (index_t d = 0; d < t.head_dim; ++d) delta += static_cast<double>(g.d_o[i * t.ldo + d]) * t.o[i * t.ldo + d];
    for (index_t j = 0; j <= i; ++j) {
      double dot = 0, dp = 0;
      for (index_t d = 0; d < t.head_dim; ++d) {
        dot += static_cast<double>(t.q[i * t.ld + d]) * t.k[j * t.ld + d];
        dp += static_cast<double>(g.d_o[i * t.ldo + d]) * t.v[j * t.ld + d];
      }
      const double p = std::exp(dot * t.scale - t.lse[i * t.ld_lse]), ds = p * (dp - delta) * t.scale;
      for (index_t d = 0; d < t.head_dim; ++d) {
        dv[at(j, d)] += p * g.d_o[i * t.ldo + d];
        dk[at(j, d)] += ds * t.q[i * t.ld + d];
        dq[at(i, d)] += ds * t.k[j * t.ld + d];
      }
    }
  }
  for (index_t i = 0; i < t.tokens; ++i)
    for (index_t d = 0; d < t.head_dim; ++d) {
      g.dq[i * g.ld_dq + d] = static_cast<float>(dq[at(i, d)]);
      g.dk[i * g.ld_dkv + d] = static_cast<float>(dk[at(i, d)]);
      g.dv[i * g.ld_dkv + d] = static_cast<float>(dv[at(i, d)]);
    }
}

// y_i = gain_i x_i r, r = 1 / sqrt(mean(x^2) + eps):  dx_i += r gain_i dy_i - x_i r^3 / n sum_j gain_j dy_j x_j
inline void rmsnorm_backward(float* dx, const float* dy, const float* x, const float* gain, index_t n, float eps, float* rms) {
  double squares = 0, dot = 0;
  for (index_t i = 0; i < n; ++i) squares += static_cast<double>(x[i]) * x[i], dot += static_cast<double>(gain[i]) * dy[i] * x[i];
  const double r = 1.0 / std::sqrt(squares / static_cast<double>(n) + eps);
  for (index_t i = 0; i < n; ++i) dx[i] = static_cast<float>(dx[i] + r * gain[i] * dy[i] - x[i] * r * r * r * dot / static_cast<double>(n));
  *rms = static_cast<float>(r);
}

// dgain_i += sum_t dy_ti x_ti r_t
inline void gain_backward(float* dgain, const float* dy, index_t ld_dy, const float* x, index_t ld_x, const float* rms, index_t rows, index_t n) {
  for (index_t i = 0; i < n; ++i) {
    double sum = 0;
    for (index_t t = 0; t < rows; ++t) sum += static_cast<double>(dy[t * ld_dy + i]) * x[t * ld_x + i] * rms[t];
    dgain[i] = static_cast<float>(dgain[i] + sum);
  }
}

// h = g s u, s = sigmoid(g):  du = dh g s;  dg = dh u s (1 + g (1 - s))
inline void swiglu_backward(float* dgate, float* dup, const float* dh, const float* gate, const float* up, index_t n) {
  for (index_t i = 0; i < n; ++i) {
    const double g = gate[i], u = up[i], d = dh[i], s = 1.0 / (1.0 + std::exp(-g));
    dgate[i] = static_cast<float>(d * u * s * (1.0 + g * (1.0 - s)));
    dup[i] = static_cast<float>(d * g * s);
  }
}

// loss = log sum_i exp(x_i) - x_target;  gradient_i = weight (softmax(x)_i - [i = target])
inline void cross_entropy(float* gradient, const float* logits, index_t n, std::int32_t target, float weight, float* loss) {
  double max = -std::numeric_limits<double>::infinity(), sum = 0;
  for (index_t i = 0; i < n; ++i) max = std::max(max, static_cast<double>(logits[i]));
  for (index_t i = 0; i < n; ++i) sum += std::exp(logits[i] - max);
  *loss = static_cast<float>(max + std::log(sum) - logits[target]);
  if (gradient)
    for (index_t i = 0; i < n; ++i) gradient[i] = static_cast<float>(weight * (std::exp(logits[i] - max) / sum - (i == target ? 1.0 : 0.0)));
}

inline void adamw(const AdamwTask& t) {
  for (index_t at = 0; at < t.n; at += moment_block) {
    const index_t n = std::min(moment_block, t.n - at);
    float m[moment_block], v[moment_block];
    decode_moment(t.m.from(at), false, m, n), decode_moment(t.v.from(at), true, v, n);
    for (index_t i = 0; i < n; ++i) {
      const double g = static_cast<double>(t.gradient[at + i]) * t.scale;
      const double m1 = static_cast<double>(t.beta1) * m[i] + (1.0 - t.beta1) * g, v1 = static_cast<double>(t.beta2) * v[i] + (1.0 - t.beta2) * g * g;
      const double p = t.p[at + i] * (1.0 - static_cast<double>(t.lr) * t.decay);
      m[i] = static_cast<float>(m1), v[i] = static_cast<float>(v1);
      t.p[at + i] = static_cast<float>(p - t.lr * (m1 / t.correction1) / (std::sqrt(v1 / t.correction2) + t.eps));
    }
    const auto bits = [&](index_t i) { return rounding_bits(t.key, t.place + static_cast<std::uint32_t>(at + i)); };
    encode_moment(t.m.from(at), false, m, n, [&](index_t i) { return bits(i) & 0xffffu; });
    encode_moment(t.v.from(at), true, v, n, [&](index_t i) { return bits(i) >> 16; });
  }
}

inline void sum_of_squares(const float* x, index_t n, double* sum) {
  double s = 0;
  for (index_t i = 0; i < n; ++i) s += static_cast<double>(x[i]) * x[i];
  *sum = s;
}

/// The reference as a table.
inline constexpr TrainingKernels training_kernels = {
    "reference", true,
#define TINYLLAMA_KERNEL_ENTRY(name, ...) &reference::name,
    TINYLLAMA_TRAINING_KERNELS(TINYLLAMA_KERNEL_ENTRY)
#undef TINYLLAMA_KERNEL_ENTRY
};

}  // namespace tinyllama::reference
