// The list of CPU kernels: what one thread does to its share of an operation. Each instruction set fills one table of them.
#pragma once

#include "tinyllama/config/rope_layout.hpp"
#include "tinyllama/kernels/pack.hpp"

namespace tinyllama {

/// Columns of a row of X that lie together where many rows are multiplied in integers.
inline constexpr index_t int8_columns = 256;
/// They: x = scale ratio / 2^15 code, with a ratio for each 32 columns, the largest 2^15 - 1. Columns past the end of the row are 0.
/// Pairs belong to 64 columns and hold 16 bits of each 32, the first on top.
struct alignas(64) Int8Columns {
  std::int8_t codes[int8_columns];
  std::int32_t ratios[int8_columns / 64];    // pairs
  std::int32_t sums[int8_columns / 64];      // pairs: sums of 32 codes times their ratio / 2^15, in eighths, rounded
  std::int32_t sum32[int8_columns / 32];     // of 32 codes
  std::int16_t sum16[2][int8_columns / 32];  // of 16: the first half of each 32, then the second
  float scale;
};

/// Y [m, n] = X [m, k] W^T for the rows of W in some panels; X is given in the form that the kernel takes.
struct MatmulTask {
  const std::byte* w;        // packed panels of W [n, k]
  Format format;
  index_t m, n, k;
  float* y;                  // [m, n], rows ldy apart
  index_t ldy;
  const float* x;            // matmul_f32: [m, k], rows ldx apart, 0 at column k where k is odd
  const bf16* x_bf16;        // matmul_bf16: the same in bf16
  index_t ldx;
  const std::int8_t* x_q8;   // matmul_int8, up to int8_stream_rows rows: [m, k] with a scale and a sum for each 32 columns, and a sum for each 16
  const float *x_scale, *x_sum32, *x_sum16;
  const Int8Columns* x_columns;  // matmul_int8, more rows: [k / 256, rounded up][columns_stride], of which the first m
  index_t columns_stride;
};

/// Positions a page of the KV cache holds. K lies [head_dim][page_tokens] (lanes are positions), V [page_tokens][head_stride]; in q8_0 as codes
/// of 8 bits, behind them an f32 scale for each position, the largest magnitude of its head_dim values over 127.
inline constexpr index_t page_tokens = 64;
/// Head dimension as stored in V and in attention's partial results: whole 16-lane vectors.
constexpr index_t head_stride(index_t head_dim) { return (head_dim + 15) / 16 * 16; }
inline constexpr index_t max_head_stride = 256;  // the largest head dimension that attention takes
/// Formats that a KV cache may have.
constexpr bool is_cache_format(Format f) { return is_plain(f) || f == Format::f8_e4m3 || f == Format::q8_0; }
inline constexpr const char* cache_format_names = "f32, f16, bf16, f8_e4m3 or q8_0";
/// Bytes of `rows` values for each position of a page.
constexpr index_t page_values_bytes(Format f, index_t rows) {
  return f == Format::q8_0 ? (rows + static_cast<index_t>(sizeof(float))) * page_tokens : rows * page_tokens * info(f).bytes;
}
/// Bytes of K and of V for one page of one KV head.
constexpr index_t page_k_bytes(Format f, index_t head_dim) { return page_values_bytes(f, head_dim); }
constexpr index_t page_v_bytes(Format f, index_t head_dim) { return page_values_bytes(f, head_stride(head_dim)); }

/// Query rows of an attention task of prefill, at most: with their results they stay in L1 and L2.
inline constexpr index_t prefill_elements = 128 * 128;
constexpr index_t prefill_rows(index_t head_dim) { return head_dim <= 128 ? 128 : prefill_elements / max_head_stride; }

/// Query rows that share one KV head, against a range of positions: row r is head r % group of token r / group.
struct AttentionTask {
  const float* q;                   // element [token][head in group][head_dim]; tokens ldq apart
  index_t ldq, head_dim, group, rows;
  index_t position;                 // of token 0; a row sees positions up to its own
  const std::byte* const* pages;    // base of each page
  index_t k_offset, v_offset;       // of this layer and KV head in a page, in bytes
  Format format;                    // one for which is_cache_format() holds
  index_t begin, end;               // positions to attend to; begin is a multiple of page_tokens
  float scale;                      // 1 / sqrt(head_dim)
  float* o;                         // [rows, head_stride]: sum of exp(s - max) v, not yet divided by the sum
  float *max, *sum;                 // [rows]
};

/// K and V of one token and one KV head into the cache.
struct StoreTask {
  const float *k, *v;               // [head_dim]
  index_t head_dim, slot;           // place in the page
  std::byte *k_page, *v_page;
  Format format;
};

// name, parameters. All return void and touch only what their arguments name.
#define TINYLLAMA_KERNELS(K)                                                                                                                   \
  K(rmsnorm, float* out, const float* x, const float* gain, index_t n, float eps)                        /* out = gain x / rms(x) */            \
  K(add_rmsnorm, float* out, float* x, const float* residual, const float* gain, index_t n, float eps)   /* x += residual, then the same */     \
  K(add, float* x, const float* residual, index_t n)                                                     /* x += residual */                    \
  K(rope, float* x, const float* cos, const float* sin, index_t heads, index_t head_dim, RopeLayout layout)                                    \
  K(swiglu, float* out, const float* gate, const float* up, index_t n)                                   /* out = gate sigmoid(gate) up */      \
  K(softmax, float* out, const float* x, index_t n, float scale)                                         /* of scale x; in place allowed */     \
  K(store_kv, const StoreTask& task)                                                                                                           \
  K(attention, const AttentionTask& task)                                                                                                      \
  K(attention_bf16, const AttentionTask& task)      /* the same with products of bf16, for at most prefill_rows(head_dim) rows */               \
  K(round_bf16, bf16* out, const float* x, index_t n)                                                    /* to nearest even */                  \
  K(quantise_activations, std::int8_t* q, float* scale, float* sum32, float* sum16, const float* x, index_t n)                                 \
  K(quantise_columns, Int8Columns* to, index_t stride, const float* x, index_t n)   /* one of them each `stride` elements */                    \
  K(matmul_f32, const MatmulTask& task, index_t first_panel, index_t last_panel)                                                               \
  K(matmul_bf16, const MatmulTask& task, index_t first_panel, index_t last_panel)                                                              \
  K(matmul_int8, const MatmulTask& task, index_t first_panel, index_t last_panel)

/// One instruction set's kernels.
struct Kernels {
  const char* instruction_set;
  bool bf16_dot;             // matmul_bf16 is faster than matmul_f32 here
  index_t int8_stream_rows;  // matmul_int8 takes so many rows of X as x_q8, and more as x_columns
#define TINYLLAMA_KERNEL_MEMBER(name, ...) void (*name)(__VA_ARGS__);
  TINYLLAMA_KERNELS(TINYLLAMA_KERNEL_MEMBER)
#undef TINYLLAMA_KERNEL_MEMBER
};

/// What activations are multiplied with to become int8: 127 / max, or 0 where that would overflow (max is 0 or next to nothing) or max is a NaN.
constexpr float quantise_inverse(float max) { return max > 4e-37f ? 127.0f / max : 0.0f; }
/// What scales are multiplied with to become ratios to the largest.
constexpr float ratio_inverse(float max) { return max > 1e-34f ? 32767.0f / max : 0.0f; }

/// Columns of X that a matmul kernel reads: k, made even.
constexpr index_t even(index_t k) { return k + k % 2; }

}  // namespace tinyllama
