// Matrix products by cuBLASLt: y [m, n] = x [m, k] w [n, k]^T, sums in f32; which of its kernels takes a shape is asked once and kept. Host code.
#pragma once

#include <compare>
#include <cstdint>
#include <map>

#include "tinyllama/device/cuda_runtime.cuh"
#include "tinyllama/tensor/dtype.hpp"

namespace tinyllama::cuda {

/// One product; rows of w, x and y lie ld elements apart. x and w are of the same type.
struct BlasTask {
  const void* w;
  const void* x;
  void* y;
  index_t ldw, ldx, ldy;
  index_t m, n, k;
  cudaDataType_t in, out;
};

template <class T>
constexpr cudaDataType_t blas_type() { return std::is_same_v<T, float> ? CUDA_R_32F : std::is_same_v<T, bf16> ? CUDA_R_16BF : CUDA_R_16F; }

/// The library's handle and what it has said about shapes so far.
class BlasPlans {
 public:
  explicit BlasPlans(int card) : handle_(card) {}

  /// Starts the product; false where the library has no kernel for it (rows at odd addresses).
  bool multiply(cudaStream_t stream, const BlasTask& t, std::byte* workspace, std::size_t workspace_bytes) {
    const Plan& p = plan(t, workspace_bytes);
    if (!p.found) return false;
    const float one = 1, zero = 0;
    check(cublasLtMatmul(handle_.get(), p.product.get(), &one, t.w, p.w.get(), t.x, p.x.get(), &zero, t.y, p.y.get(), t.y, p.y.get(), &p.algorithm, workspace, workspace_bytes, stream),
          "cublasLtMatmul", text(t));
    return true;
  }

 private:
  using Layout = Owned<cublasLtMatrixLayout_t, cublasLtMatrixLayoutDestroy>;
  struct Plan {
    Owned<cublasLtMatmulDesc_t, cublasLtMatmulDescDestroy> product;
    Layout w, x, y;
    cublasLtMatmulAlgo_t algorithm = {};
    bool found = false;
  };
  struct Key {
    index_t m, n, k, ldw, ldx, ldy;
    int in, out;
    std::uint32_t align_w, align_x, align_y;
    auto operator<=>(const Key&) const = default;
  };

  static std::uint32_t alignment(const void* p) {
    const auto a = reinterpret_cast<std::uintptr_t>(p) | 256u;
    return static_cast<std::uint32_t>(a & (~a + 1));
  }
  static std::string text(const BlasTask& t) {
    return "[" + std::to_string(t.m) + ", " + std::to_string(t.k) + "] by [" + std::to_string(t.n) + ", " + std::to_string(t.k) + "]^T";
  }
  static Layout layout(cudaDataType_t type, index_t rows, index_t columns, index_t ld) {
    cublasLtMatrixLayout_t l = nullptr;
    check(cublasLtMatrixLayoutCreate(&l, type, static_cast<std::uint64_t>(rows), static_cast<std::uint64_t>(columns), ld), "cublasLtMatrixLayoutCreate");
    return Layout(l);
  }

  const Plan& plan(const BlasTask& t, std::size_t workspace_bytes) {
    const Key key{t.m, t.n, t.k, t.ldw, t.ldx, t.ldy, t.in, t.out, alignment(t.w), alignment(t.x), alignment(t.y)};
    if (const auto known = plans_.find(key); known != plans_.end()) return known->second;
    if (plans_.size() >= 4096) plans_.clear();  // a program whose shapes never repeat
    Plan p;
    cublasLtMatmulDesc_t d = nullptr;
    check(cublasLtMatmulDescCreate(&d, CUBLAS_COMPUTE_32F, CUDA_R_32F), "cublasLtMatmulDescCreate");
    p.product = Owned<cublasLtMatmulDesc_t, cublasLtMatmulDescDestroy>(d);
    // The library counts in columns: our rows of w, x and y are columns of k, k and n elements to it.
    const cublasOperation_t transposed = CUBLAS_OP_T;
    check(cublasLtMatmulDescSetAttribute(d, CUBLASLT_MATMUL_DESC_TRANSA, &transposed, sizeof transposed), "cublasLtMatmulDescSetAttribute");
    p.w = layout(t.in, t.k, t.n, t.ldw), p.x = layout(t.in, t.k, t.m, t.ldx), p.y = layout(t.out, t.n, t.m, t.ldy);
    cublasLtMatmulPreference_t preference = nullptr;
    check(cublasLtMatmulPreferenceCreate(&preference), "cublasLtMatmulPreferenceCreate");
    const Owned<cublasLtMatmulPreference_t, cublasLtMatmulPreferenceDestroy> owned(preference);
    const auto prefer = [&](cublasLtMatmulPreferenceAttributes_t a, const auto& v) {
      check(cublasLtMatmulPreferenceSetAttribute(preference, a, &v, sizeof v), "cublasLtMatmulPreferenceSetAttribute");
    };
    prefer(CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, workspace_bytes);
    prefer(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, key.align_w), prefer(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES, key.align_x);
    prefer(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, key.align_y), prefer(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES, key.align_y);
    cublasLtMatmulHeuristicResult_t result = {};
    int count = 0;
    const cublasStatus_t s = cublasLtMatmulAlgoGetHeuristic(handle_.get(), d, p.w.get(), p.x.get(), p.y.get(), p.y.get(), preference, 1, &result, &count);
    if (s != CUBLAS_STATUS_SUCCESS && s != CUBLAS_STATUS_NOT_SUPPORTED && s != CUBLAS_STATUS_INVALID_VALUE) check(s, "cublasLtMatmulAlgoGetHeuristic", text(t));
    p.found = s == CUBLAS_STATUS_SUCCESS && count > 0 && result.state == CUBLAS_STATUS_SUCCESS;
    p.algorithm = result.algo;
    return plans_.emplace(key, std::move(p)).first->second;
  }

  BlasLt handle_;
  std::map<Key, Plan> plans_;
};

}  // namespace tinyllama::cuda
