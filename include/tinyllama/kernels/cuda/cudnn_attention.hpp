// Causal attention and its gradients as graphs of cuDNN, for batches of equally long sequences in 16 bits: the shape in which its fused kernels know them.
// Host code.
#pragma once

#include "tinyllama/kernels/cuda/batch.hpp"
#include "tinyllama/kernels/cuda/cudnn.hpp"
#include "tinyllama/tensor/dtype.hpp"

#if defined(TINYLLAMA_CUDNN)
#include <compare>
#include <limits>
#include <map>

namespace tinyllama::cuda {

/// B sequences of T rows behind each other; qkv [B T, (heads + 2 kv_heads) head_dim].
struct CudnnAttentionShape {
  std::int64_t batch, tokens, heads, kv_heads, head_dim, ld_qkv, ld_out;
  auto operator<=>(const CudnnAttentionShape&) const = default;
};

/// The library's handle on a stream and its plans for the shapes that have come so far.
class CudnnAttention {
 public:
  CudnnAttention(const CudnnApi& api, cudaStream_t stream) : api_(&api) {
    api.check(api.create(&handle_), "cudnnCreate");
    api.check(api.set_stream(handle_, stream), "cudnnSetStream");
  }
  /// Plans for a card that needs not be there.
  CudnnAttention(const CudnnApi& api, const CudnnDescriptor& card) : api_(&api), card_(&card) {}
  CudnnAttention(const CudnnAttention&) = delete;
  CudnnAttention& operator=(const CudnnAttention&) = delete;
  ~CudnnAttention() {
    for (auto* plans : {&forward_, &backward_}) plans->clear();
    if (handle_) api_->destroy(handle_);
  }

  /// Whether there are plans for both passes.
  bool takes(const CudnnAttentionShape& s) { return forward(s) && backward(s); }
  const std::string& failure() const { return failure_; }
  std::size_t forward_workspace(const CudnnAttentionShape& s) { return forward(s)->workspace(); }
  std::size_t backward_workspace(const CudnnAttentionShape& s) { return rounded(backward(s)->workspace()) + dq_bytes(s) + delta_bytes(s); }

  /// out [B T, heads head_dim]; lse [B, heads, T]
  void forward(const CudnnAttentionShape& s, const bf16* qkv, bf16* out, float* lse, std::byte* workspace) {
    auto* q = const_cast<bf16*>(qkv);
    const std::int64_t d = s.head_dim;
    float scale = scale_of(s), none = nothing;
    forward(s)->execute(handle_, {Q, K, V, O, Lse, Scale, None}, {q, q + s.heads * d, q + (s.heads + s.kv_heads) * d, out, lse, &scale, &none}, workspace);
  }
  /// dqkv like qkv, from d_out like out.
  void backward(const CudnnAttentionShape& s, const bf16* qkv, const bf16* out, const float* lse, const bf16* d_out, bf16* dqkv, std::byte* workspace) {
    auto* q = const_cast<bf16*>(qkv);
    const std::int64_t d = s.head_dim, k = s.heads * d, v = k + s.kv_heads * d;
    float scale = scale_of(s), none = nothing, one = 1;
    std::byte *sums = workspace + rounded(backward(s)->workspace()), *delta = sums + dq_bytes(s);
    backward(s)->execute(handle_, {Q, K, V, O, Lse, Scale, None, One, DO, DQ, DK, DV, DQSum, Delta},
                         {q, q + k, q + v, const_cast<bf16*>(out), const_cast<float*>(lse), &scale, &none, &one, const_cast<bf16*>(d_out), dqkv, dqkv + k, dqkv + v, sums, delta}, workspace);
  }

 private:
  enum Id : std::int64_t { Q = 1, K, V, O, Lse, Scale, None, One, DO, DQ, DK, DV, DQSum, Delta };
  using Plans = std::map<CudnnAttentionShape, std::unique_ptr<CudnnGraph>>;
  static constexpr float nothing = -std::numeric_limits<float>::infinity();
  static float scale_of(const CudnnAttentionShape& s) { return static_cast<float>(1.0 / std::sqrt(static_cast<double>(s.head_dim))); }
  static constexpr std::size_t rounded(std::size_t bytes) { return (bytes + 255) / 256 * 256; }
  static std::size_t delta_bytes(const CudnnAttentionShape& s) { return rounded(static_cast<std::size_t>(s.batch * s.heads * s.tokens) * sizeof(float)); }
  static std::size_t dq_bytes(const CudnnAttentionShape& s) { return delta_bytes(s) * static_cast<std::size_t>(s.head_dim); }

  // Rows of the batch as [B, heads, T, head_dim].
  static CudnnShape shape(const CudnnAttentionShape& s, std::int64_t heads) { return {s.batch, heads, s.tokens, s.head_dim}; }
  static CudnnShape strides(const CudnnAttentionShape& s, std::int64_t ld) { return {s.tokens * ld, s.head_dim, ld, 1}; }
  static CudnnShape swapped(CudnnShape a) {
    std::swap(a[2], a[3]);
    return a;
  }
  struct Scores {
    CudnnShape all, row;  // [B, heads, T, T], [B, heads, T, 1]
    explicit Scores(const CudnnAttentionShape& s) : all{s.batch, s.heads, s.tokens, s.tokens}, row{s.batch, s.heads, s.tokens, 1} {}
  };
  /// x where the key is not behind the query, -inf elsewhere.
  static CudnnGraph::Tensor causal(CudnnGraph& g, const CudnnGraph::Tensor& x) {
    const auto query = g.pointwise(CUDNN_POINTWISE_GEN_INDEX, x, nullptr, g.between(CUDNN_DATA_INT32, x.shape, contiguous(x.shape)), nullptr, 2);
    const auto key = g.pointwise(CUDNN_POINTWISE_GEN_INDEX, x, nullptr, g.between(CUDNN_DATA_INT32, x.shape, contiguous(x.shape)), nullptr, 3);
    const auto seen = g.pointwise(CUDNN_POINTWISE_CMP_GE, query, &key, g.between(CUDNN_DATA_BOOLEAN, x.shape, contiguous(x.shape)), nullptr, -1, CUDNN_DATA_BOOLEAN);
    const auto none = g.number(None);
    return g.pointwise(CUDNN_POINTWISE_BINARY_SELECT, x, &none, g.between(x.shape), &seen);
  }

  CudnnGraph* keep(Plans& plans, const CudnnAttentionShape& s, std::unique_ptr<CudnnGraph> g) {
    if (!g->build(handle_, card_)) failure_ = g->failure(), g.reset();
    return plans.emplace(s, std::move(g)).first->second.get();
  }

  // s = scale q k^T, causal;  m = max s, l = sum exp(s - m);  lse = m + log l;  o = (exp(s - m) / l) v
  CudnnGraph* forward(const CudnnAttentionShape& s) {
    if (const auto known = forward_.find(s); known != forward_.end()) return known->second.get();
    auto owner = std::make_unique<CudnnGraph>(*api_);
    CudnnGraph& g = *owner;
    constexpr cudnnDataType_t half = CUDNN_DATA_BFLOAT16;
    const Scores of(s);
    const auto q = g.tensor(Q, half, shape(s, s.heads), strides(s, s.ld_qkv)), kt = g.tensor(K, half, swapped(shape(s, s.kv_heads)), swapped(strides(s, s.ld_qkv)));
    const auto v = g.tensor(V, half, shape(s, s.kv_heads), strides(s, s.ld_qkv)), o = g.tensor(O, half, shape(s, s.heads), strides(s, s.ld_out));
    const auto lse = g.tensor(Lse, CUDNN_DATA_FLOAT, of.row, contiguous(of.row)), scale = g.number(Scale);
    const auto scores = causal(g, g.binary(CUDNN_POINTWISE_MUL, g.matmul(q, kt, g.between(of.all)), scale));
    const auto most = g.reduce(CUDNN_REDUCE_TENSOR_MAX, scores, g.between(of.row));
    const auto e = g.unary(CUDNN_POINTWISE_EXP, g.binary(CUDNN_POINTWISE_SUB, scores, most));
    const auto sum = g.reduce(CUDNN_REDUCE_TENSOR_ADD, e, g.between(of.row));
    const auto log = g.unary(CUDNN_POINTWISE_LOG, sum);
    g.pointwise(CUDNN_POINTWISE_ADD, most, &log, lse);
    g.matmul(g.pointwise(CUDNN_POINTWISE_DIV, e, &sum, g.between(half, of.all, contiguous(of.all))), v, o);
    return keep(forward_, s, std::move(owner));
  }

  // delta = sum do o;  p = exp(scale q k^T - lse);  dv = p^T do;  ds = scale p (do v^T - delta);  dk = ds^T q;  dq = ds k; heads that share k and v are summed
  CudnnGraph* backward(const CudnnAttentionShape& s) {
    if (const auto known = backward_.find(s); known != backward_.end()) return known->second.get();
    auto owner = std::make_unique<CudnnGraph>(*api_);
    CudnnGraph& g = *owner;
    constexpr cudnnDataType_t half = CUDNN_DATA_BFLOAT16;
    const Scores of(s);
    const CudnnShape queries = shape(s, s.heads), keys = shape(s, s.kv_heads);
    const auto q = g.tensor(Q, half, queries, strides(s, s.ld_qkv)), kt = g.tensor(K, half, swapped(keys), swapped(strides(s, s.ld_qkv)));
    const auto vt = g.tensor(V, half, swapped(keys), swapped(strides(s, s.ld_qkv))), o = g.tensor(O, half, queries, strides(s, s.ld_out));
    const auto d_o = g.tensor(DO, half, queries, strides(s, s.ld_out)), lse = g.tensor(Lse, CUDNN_DATA_FLOAT, of.row, contiguous(of.row));
    const auto dq = g.tensor(DQ, half, queries, strides(s, s.ld_qkv)), dk = g.tensor(DK, half, keys, strides(s, s.ld_qkv)), dv = g.tensor(DV, half, keys, strides(s, s.ld_qkv));
    const auto dq_sum = g.tensor(DQSum, CUDNN_DATA_FLOAT, queries, contiguous(queries)), delta = g.tensor(Delta, CUDNN_DATA_FLOAT, of.row, contiguous(of.row));
    const auto scale = g.number(Scale), one = g.number(One);

    const auto product = g.binary(CUDNN_POINTWISE_MUL, d_o, o);
    const auto dots = g.reduce(CUDNN_REDUCE_TENSOR_ADD, product, g.between(of.row));
    g.pointwise(CUDNN_POINTWISE_MUL, dots, &one, delta);

    const auto scores = g.binary(CUDNN_POINTWISE_MUL, g.matmul(q, kt, g.between(of.all)), scale);
    const auto p = g.unary(CUDNN_POINTWISE_EXP, causal(g, g.binary(CUDNN_POINTWISE_SUB, scores, lse)));
    const CudnnShape turned{of.all[1] * of.all[2] * of.all[3], of.all[2] * of.all[3], 1, s.tokens};
    const auto transposed = [&](const CudnnGraph::Tensor& x) { return g.reshape(x, g.between(half, of.all, turned)); };
    // One gradient a query head first, where heads share.
    const auto to_keys = [&](const CudnnGraph::Tensor& weights, const CudnnGraph::Tensor& rows, const CudnnGraph::Tensor& to) {
      if (s.heads == s.kv_heads) g.matmul(transposed(weights), rows, to);
      else g.reduce(CUDNN_REDUCE_TENSOR_ADD, g.matmul(transposed(weights), rows, g.between(half, queries, contiguous(queries))), to);
    };
    to_keys(p, d_o, dv);
    const auto dp = g.binary(CUDNN_POINTWISE_SUB, g.matmul(d_o, vt, g.between(of.all)), delta);
    const auto ds = g.binary(CUDNN_POINTWISE_MUL, g.binary(CUDNN_POINTWISE_MUL, dp, p), scale);
    to_keys(ds, q, dk);
    g.matmul(ds, g.reshape(kt, g.between(half, keys, strides(s, s.ld_qkv))), dq_sum);
    g.pointwise(CUDNN_POINTWISE_IDENTITY, dq_sum, nullptr, dq);
    return keep(backward_, s, std::move(owner));
  }

  const CudnnApi* api_;
  cudnnHandle_t handle_ = nullptr;
  const CudnnDescriptor* card_ = nullptr;
  Plans forward_, backward_;
  std::string failure_;
};

}  // namespace tinyllama::cuda
#endif
