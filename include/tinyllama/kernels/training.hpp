// The kernels that training adds: matrix products of f32 operands as they lie, attention that keeps no T x T matrix, gradients, AdamW.
#pragma once

#include "tinyllama/kernels/kernels.hpp"
#include "tinyllama/kernels/moments.hpp"

namespace tinyllama {

/// One side of a matrix product, [rows, k]: element (r, i) is data[r row_stride + i column_stride]. One of the strides is 1, so that a
/// transposed matrix is an operand as it lies.
struct Operand {
  const float* data;
  index_t row_stride, column_stride;
  index_t rows, k;
};

/// Elements of one panel: 16 rows of an operand, as [k][16] in f32 and [k/2][16][2] in bf16; k made even, rows and columns past the operand 0.
constexpr index_t panel_elements(index_t k) { return even(k) * panel_rows; }

/// y [m, n] (+)= A [m, k] B [n, k]^T, both in panels.
struct GemmTask {
  const std::byte *a, *b;
  index_t m, n, k;
  float* y;                   // [m, n], rows ldy apart
  index_t ldy;
  bool accumulate;
};

/// Attention of one query head over its own sequence, causal. Rows of q, k, v lie ld apart.
struct FlashTask {
  const float *q, *k, *v;     // [tokens, head_dim], rotated
  index_t ld;
  index_t tokens, head_dim;
  float scale;                // 1 / sqrt(head_dim)
  bool bf16;                  // multiply in bf16; f32 otherwise
  float* o;                   // [tokens, head_dim], rows ldo apart
  index_t ldo;
  float* lse;                 // [tokens], ld_lse apart: log of the sum of exp(scale q k)
  index_t ld_lse;
  std::byte* scratch;         // flash_scratch() bytes, 64-byte aligned
};

/// Its gradient. dk and dv are those of this query head alone; heads that share them are summed by the caller.
struct FlashGradTask {
  FlashTask forward;          // o and lse as the forward pass left them
  const float* d_o;           // [tokens, head_dim], rows ldo apart
  float *dq, *dk, *dv;        // [tokens, head_dim], rows ld_dq, ld_dkv, ld_dkv apart; overwritten
  index_t ld_dq, ld_dkv;
};

inline constexpr index_t flash_block = 64;  // queries, and keys, at a time
constexpr index_t flash_padded(index_t tokens) { return (tokens + flash_block - 1) / flash_block * flash_block; }
/// Bytes of scratch for one unit of attention: operands in panels, and (backward) the gradient of Q.
constexpr std::size_t flash_scratch(index_t tokens, index_t head_dim, bool backward) {
  const auto matrix = static_cast<std::size_t>(flash_padded(tokens) * head_stride(head_dim));
  constexpr std::size_t tiles = sizeof(float) * (6 * flash_block * flash_block + 6 * flash_block * static_cast<std::size_t>(max_head_stride));
  return sizeof(float) * ((backward ? 8 : 2) * matrix + static_cast<std::size_t>(flash_padded(tokens))) + tiles;
}

/// What AdamW is given anew each step, where that lies in the device's memory: so a launch of it is the same in every step, and can be repeated as it was recorded.
struct AdamwStep {
  float lr, correction1, correction2;  // 1 - beta^step
  std::uint32_t key;
  float scale;
};

/// AdamW on n weights (arXiv 1711.05101): p -= lr decay p; m, v averages of g and g^2 for g = scale gradient; p -= lr m' / (sqrt(v') + eps).
struct AdamwTask {
  float* p;
  MomentArray m, v;                // of one format; from the first weight of a block on
  const float* gradient;
  index_t n;
  float lr, beta1, beta2, eps, decay;
  float correction1, correction2;  // 1 - beta^step
  float scale;                     // clipping
  const AdamwStep* at = nullptr;     // where the device only knows them: the place there of lr, corrections, scale and key, instead of those here
  std::uint32_t key = 0, place = 0;  // of the rounding of moments: the step's, and p's place in the flat array
  bool goes_on = false;              // another part of the step's weights came before
};

/// What a step sums up, in the device's memory: the host need not see it before the step is done.
struct StepSums {
  double loss;     // weights times losses of all micro-batches
  double squares;  // of the gradient's elements
  float norm;      // sqrt(squares)
  AdamwStep adamw; // whose scale is min(1, clip / norm); NaN where the norm is not finite: then nothing is updated
};

/// Neighbouring weights of the flat array that all decay, or all do not.
struct AdamwRange {
  index_t n;
  bool decays;
};

// name, parameters.
#define TINYLLAMA_TRAINING_KERNELS(K)                                                                                                          \
  K(pack_f32, float* panels, const Operand& from, index_t first_panel, index_t last_panel)          /* panels [first, last) of `from` */        \
  K(pack_bf16, bf16* panels, const Operand& from, index_t first_panel, index_t last_panel)          /* the same, rounded to nearest even */     \
  K(gemm_f32, const GemmTask& task, index_t first_row, index_t last_row, index_t first_panel, index_t last_panel)  /* rows of y, panels of B */ \
  K(gemm_bf16, const GemmTask& task, index_t first_row, index_t last_row, index_t first_panel, index_t last_panel)                             \
  K(flash_forward, const FlashTask& task)                                                                                                      \
  K(flash_backward, const FlashGradTask& task)                                                                                                 \
  K(rmsnorm_backward, float* dx, const float* dy, const float* x, const float* gain, index_t n, float eps, float* rms) /* dx +=; rms = 1/rms(x) */ \
  K(gain_backward, float* dgain, const float* dy, index_t ld_dy, const float* x, index_t ld_x, const float* rms, index_t rows, index_t n)      \
  K(swiglu_backward, float* dgate, float* dup, const float* dh, const float* gate, const float* up, index_t n)         /* in place allowed */   \
  K(cross_entropy, float* gradient, const float* logits, index_t n, std::int32_t target, float weight, float* loss)    /* gradient: or null */  \
  K(adamw, const AdamwTask& task)                                                                                                              \
  K(sum_of_squares, const float* x, index_t n, double* sum)

/// One instruction set's kernels for training; `instruction_set` is that of its Kernels.
struct TrainingKernels {
  const char* instruction_set;
  bool bf16_dot;  // gemm_bf16 and bf16 attention are there, and faster than f32
#define TINYLLAMA_KERNEL_MEMBER(name, ...) void (*name)(__VA_ARGS__);
  TINYLLAMA_TRAINING_KERNELS(TINYLLAMA_KERNEL_MEMBER)
#undef TINYLLAMA_KERNEL_MEMBER
};

}  // namespace tinyllama
