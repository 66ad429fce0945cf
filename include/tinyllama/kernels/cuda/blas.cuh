// Matrix products by cuBLASLt: y [m, n] (+)= x [m, k] w [n, k]^T (+ add), sums in f32; which of its kernels takes a shape is measured and kept. Host code.
#pragma once

#include <array>
#include <compare>
#include <cstdint>
#include <limits>
#include <map>
#include <vector>

#include "tinyllama/device/cuda_runtime.cuh"
#include "tinyllama/tensor/dtype.hpp"

namespace tinyllama::cuda {

/// One product; rows of w, x and y lie ld elements apart, and where one is `_transposed` the rows of its transpose, [k, n] or [k, m]. x and w are of the same type.
struct BlasTask {
  const void* w;
  const void* x;
  void* y;
  index_t ldw, ldx, ldy;
  index_t m, n, k;
  cudaDataType_t in, out;
  const void* add = nullptr;     // of y's shape and type, rows ldy apart; not y itself
  bool w_transposed = false, x_transposed = false;
  bool accumulate = false;       // y +=
  int measure = 2;               // the use of the shape at which the library's kernels are timed; 0: never, for bits that do not change from the first use to the second
  cudaDataType_t in_x = in;      // of x, where it is another than w's: both are then 8-bit floats
  const float *w_scale = nullptr, *x_scale = nullptr;  // on the card: what 8-bit w and x are multiplied by: one number each, or
  bool row_scales = false;       // one for each row, [n] and [m]
  bool fast_sums = false;        // of 8-bit floats: in the tensor cores' own precision, some 14 bits
};

template <class T>
constexpr cudaDataType_t blas_type() { return std::is_same_v<T, float> ? CUDA_R_32F : std::is_same_v<T, bf16> ? CUDA_R_16BF : CUDA_R_16F; }

/// The library's handle and what it has said about shapes so far.
class BlasPlans {
 public:
  explicit BlasPlans(int card) : handle_(card) {}

  /// Starts the product; false where the library has no kernel for it (rows at odd addresses). The library guesses which of its kernels is best; a shape
  /// that comes again (BlasTask::measure) is worth some milliseconds of measuring them: 10 to 30% at few rows. `workspace` [workspace_bytes]: for the kernels.
  bool multiply(cudaStream_t stream, const BlasTask& t, std::byte* workspace, std::size_t workspace_bytes) {
    Plan& p = plan(t, workspace_bytes);
    if (p.algorithms.empty()) return false;
    if (!p.measured && t.measure > 0 && ++p.used >= t.measure && p.algorithms.size() > 1 && !recorded(stream)) {
      p.best = fastest(stream, p, t, workspace, workspace_bytes);
      p.measured = true;
    }
    check(start(stream, p, p.algorithms[p.best].value, t, t.y, workspace, workspace_bytes), "cublasLtMatmul", text(t));
    return true;
  }

 private:
  using Layout = Owned<cublasLtMatrixLayout_t, cublasLtMatrixLayoutDestroy>;
  struct Algorithm {  // a name of our own: nvcc 13 falls over a vector of the library's unnamed struct
    cublasLtMatmulAlgo_t value;
  };
  struct Plan {
    Owned<cublasLtMatmulDesc_t, cublasLtMatmulDescDestroy> product;
    Layout w, x, y;
    std::vector<Algorithm> algorithms;  // the library's guess first
    std::size_t best = 0;
    int used = 0;
    bool measured = false;
  };
  static constexpr int most_algorithms = 16;
  struct Key {
    index_t m, n, k, ldw, ldx, ldy;
    int in, in_x, out;
    bool w_transposed, x_transposed, accumulate;
    std::uint32_t align_w, align_x, align_y;
    bool add, row_scales, fast_sums;
    auto operator<=>(const Key&) const = default;
  };

  static std::uint32_t alignment(const void* p) {
    const auto a = reinterpret_cast<std::uintptr_t>(p) | 256u;
    return static_cast<std::uint32_t>(a & (~a + 1));
  }
  static Key key(const BlasTask& t) {
    return {t.m, t.n, t.k, t.ldw, t.ldx, t.ldy, t.in, t.in_x, t.out, t.w_transposed, t.x_transposed, t.accumulate, alignment(t.w), alignment(t.x), alignment(t.y), t.add != nullptr,
            t.row_scales, t.fast_sums};
  }
  static std::string text(const BlasTask& t) {
    return "[" + std::to_string(t.m) + ", " + std::to_string(t.k) + "] by [" + std::to_string(t.n) + ", " + std::to_string(t.k) + "]^T";
  }
  static Layout layout(cudaDataType_t type, index_t rows, index_t columns, index_t ld) {
    cublasLtMatrixLayout_t l = nullptr;
    check(cublasLtMatrixLayoutCreate(&l, type, static_cast<std::uint64_t>(rows), static_cast<std::uint64_t>(columns), ld), "cublasLtMatrixLayoutCreate");
    return Layout(l);
  }

  static void set_scales(cublasLtMatmulDesc_t d, const BlasTask& t) {
    check(cublasLtMatmulDescSetAttribute(d, CUBLASLT_MATMUL_DESC_A_SCALE_POINTER, &t.w_scale, sizeof t.w_scale), "cublasLtMatmulDescSetAttribute");
    check(cublasLtMatmulDescSetAttribute(d, CUBLASLT_MATMUL_DESC_B_SCALE_POINTER, &t.x_scale, sizeof t.x_scale), "cublasLtMatmulDescSetAttribute");
  }
  /// False where the library is too old to know scales of rows.
  static bool set_8_bits(cublasLtMatmulDesc_t d, const BlasTask& t) {
    set_scales(d, t);
    const std::int8_t fast = t.fast_sums ? 1 : 0;
    check(cublasLtMatmulDescSetAttribute(d, CUBLASLT_MATMUL_DESC_FAST_ACCUM, &fast, sizeof fast), "cublasLtMatmulDescSetAttribute");
    if (!t.row_scales) return true;
#if CUDART_VERSION >= 12090
    const cublasLtMatmulMatrixScale_t rows = CUBLASLT_MATMUL_MATRIX_SCALE_OUTER_VEC_32F;
    return cublasLtMatmulDescSetAttribute(d, CUBLASLT_MATMUL_DESC_A_SCALE_MODE, &rows, sizeof rows) == CUBLAS_STATUS_SUCCESS &&
           cublasLtMatmulDescSetAttribute(d, CUBLASLT_MATMUL_DESC_B_SCALE_MODE, &rows, sizeof rows) == CUBLAS_STATUS_SUCCESS;
#else
    return false;
#endif
  }

  static bool recorded(cudaStream_t stream) {
    cudaStreamCaptureStatus s = cudaStreamCaptureStatusNone;
    check(cudaStreamIsCapturing(stream, &s), "cudaStreamIsCapturing");
    return s != cudaStreamCaptureStatusNone;
  }
  cublasStatus_t start(cudaStream_t stream, const Plan& p, const cublasLtMatmulAlgo_t& a, const BlasTask& t, void* y, std::byte* workspace, std::size_t workspace_bytes) {
    const float one = 1, beta = t.add || t.accumulate ? 1 : 0;
    if (t.w_scale) set_scales(p.product.get(), t);
    return cublasLtMatmul(handle_.get(), p.product.get(), &one, t.w, p.w.get(), t.x, p.x.get(), &beta, t.add ? t.add : y, p.y.get(), y, p.y.get(), &a, workspace, workspace_bytes, stream);
  }
  /// The least of three times each on the task's own operands, with the second-level cache full of other things before each: weights of a layer are not there
  /// when their turn comes. What is added to is spared: the sum goes to memory of its own then.
  std::size_t fastest(cudaStream_t stream, const Plan& p, const BlasTask& t, std::byte* workspace, std::size_t workspace_bytes) {
    void* y = t.y;
    Owned<void*, cudaFree> other;
    if (t.accumulate) {
      if (cudaMalloc(&y, static_cast<std::size_t>(t.m * t.ldy) * (t.out == CUDA_R_32F ? 4 : 2)) != cudaSuccess) {
        cudaGetLastError();
        return 0;
      }
      other = Owned<void*, cudaFree>(y);
    }
    const Event begin(true), end(true);
    std::size_t best = 0;
    double least = std::numeric_limits<double>::infinity();
    for (std::size_t i = 0; i < p.algorithms.size(); ++i)
      for (int r = 0; r < 3; ++r) {
        check(cudaMemsetAsync(workspace, 0, workspace_bytes, stream), "cudaMemsetAsync");
        begin.record(stream);
        if (start(stream, p, p.algorithms[i].value, t, y, workspace, workspace_bytes) != CUBLAS_STATUS_SUCCESS) break;
        end.record(stream);
        end.synchronize();
        if (const double s = end.since(begin); s < least) least = s, best = i;
      }
    return best;
  }

  Plan& plan(const BlasTask& t, std::size_t workspace_bytes) {
    const Key k = key(t);
    if (const auto known = plans_.find(k); known != plans_.end()) return known->second;
    if (plans_.size() >= 4096) plans_.clear();  // a program whose shapes never repeat
    Plan p;
    cublasLtMatmulDesc_t d = nullptr;
    check(cublasLtMatmulDescCreate(&d, CUBLAS_COMPUTE_32F, CUDA_R_32F), "cublasLtMatmulDescCreate");
    p.product = Owned<cublasLtMatmulDesc_t, cublasLtMatmulDescDestroy>(d);
    // The library counts in columns: our rows of w, x and y are columns of k, k and n elements to it.
    const cublasOperation_t of_w = t.w_transposed ? CUBLAS_OP_N : CUBLAS_OP_T, of_x = t.x_transposed ? CUBLAS_OP_T : CUBLAS_OP_N;
    check(cublasLtMatmulDescSetAttribute(d, CUBLASLT_MATMUL_DESC_TRANSA, &of_w, sizeof of_w), "cublasLtMatmulDescSetAttribute");
    check(cublasLtMatmulDescSetAttribute(d, CUBLASLT_MATMUL_DESC_TRANSB, &of_x, sizeof of_x), "cublasLtMatmulDescSetAttribute");
    if (t.w_scale && !set_8_bits(d, t)) return plans_.emplace(k, std::move(p)).first->second;
    p.w = t.w_transposed ? layout(t.in, t.n, t.k, t.ldw) : layout(t.in, t.k, t.n, t.ldw);
    p.x = t.x_transposed ? layout(t.in_x, t.m, t.k, t.ldx) : layout(t.in_x, t.k, t.m, t.ldx);
    p.y = layout(t.out, t.n, t.m, t.ldy);
    cublasLtMatmulPreference_t preference = nullptr;
    check(cublasLtMatmulPreferenceCreate(&preference), "cublasLtMatmulPreferenceCreate");
    const Owned<cublasLtMatmulPreference_t, cublasLtMatmulPreferenceDestroy> owned(preference);
    const auto prefer = [&](cublasLtMatmulPreferenceAttributes_t a, const auto& v) {
      check(cublasLtMatmulPreferenceSetAttribute(preference, a, &v, sizeof v), "cublasLtMatmulPreferenceSetAttribute");
    };
    prefer(CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, workspace_bytes);
    prefer(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, k.align_w), prefer(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES, k.align_x);
    prefer(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, k.align_y), prefer(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES, k.align_y);
    std::array<cublasLtMatmulHeuristicResult_t, most_algorithms> results = {};
    int count = 0;
    const cublasStatus_t s = cublasLtMatmulAlgoGetHeuristic(handle_.get(), d, p.w.get(), p.x.get(), p.y.get(), p.y.get(), preference, most_algorithms, results.data(), &count);
    if (s != CUBLAS_STATUS_SUCCESS && s != CUBLAS_STATUS_NOT_SUPPORTED && s != CUBLAS_STATUS_INVALID_VALUE) check(s, "cublasLtMatmulAlgoGetHeuristic", text(t));
    if (s == CUBLAS_STATUS_SUCCESS)
      for (int i = 0; i < count; ++i)
        if (results[static_cast<std::size_t>(i)].state == CUBLAS_STATUS_SUCCESS) p.algorithms.push_back({results[static_cast<std::size_t>(i)].algo});
    return plans_.emplace(k, std::move(p)).first->second;
  }

  BlasLt handle_;
  std::map<Key, Plan> plans_;
};

}  // namespace tinyllama::cuda
