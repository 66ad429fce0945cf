// Attention on the GPU beside its limits: prefill against the bf16 products of cuBLASLt, decoding against the read bandwidth, both measured in the same run.
//
// nvcc -std=c++20 -O3 -gencode=arch=compute_90a,code=sm_90a -Iinclude benchmarks/cuda_attention_bench.cu -lcublasLt
#include <cublasLt.h>

#include <cmath>
#include <cstdio>
#include <cstring>
#include <random>
#include <vector>

#include "tinyllama/kernels/cuda/attention_launch.cuh"

using namespace tinyllama;

namespace {

void check(cudaError_t e) {
  if (e != cudaSuccess) throw Error("cuda_attention_bench", "CUDA", "success", cudaGetErrorString(e));
}
template <class T>
T* device(std::size_t n) {
  void* p;
  check(cudaMalloc(&p, n * sizeof(T)));
  return static_cast<T*>(p);
}
template <class T>
T* upload(const std::vector<T>& v) {
  T* p = device<T>(v.size());
  check(cudaMemcpy(p, v.data(), v.size() * sizeof(T), cudaMemcpyHostToDevice));
  return p;
}

/// Numbers near normal, in T: real data is slower than zeros.
template <class T>
__global__ void fill(T* x, std::size_t n, unsigned seed) {
  for (std::size_t i = blockIdx.x * static_cast<std::size_t>(blockDim.x) + threadIdx.x; i < n; i += static_cast<std::size_t>(gridDim.x) * blockDim.x) {
    unsigned h = static_cast<unsigned>(i) * 2654435761u + seed;
    float sum = 0;
    for (int k = 0; k < 4; ++k) h ^= h >> 15, h *= 2246822519u, h ^= h >> 13, h *= 3266489917u, sum += static_cast<float>(h >> 8) * 0x1p-24f - 0.5f;
    if constexpr (std::is_same_v<T, std::int8_t>) x[i] = static_cast<std::int8_t>(sum * 60.0f);
    else x[i] = cuda::from_float<T>(sum * 1.7320508f);
  }
}
__global__ void read_all(const uint4* x, std::size_t n, unsigned* out) {
  unsigned sum = 0;
#pragma unroll 8
  for (std::size_t i = blockIdx.x * static_cast<std::size_t>(blockDim.x) + threadIdx.x; i < n; i += static_cast<std::size_t>(gridDim.x) * blockDim.x) {
    const uint4 v = __ldcs(x + i);
    sum += v.x ^ v.y ^ v.z ^ v.w;
  }
  if (sum == 123456789u) *out = sum;
}

/// Median seconds of one call of f(i, stream), from graphs of `calls` calls.
template <class F>
double seconds(int calls, F&& f) {
  cudaStream_t stream;
  cudaGraph_t graph;
  cudaGraphExec_t exec;
  check(cudaStreamCreate(&stream));
  check(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
  for (int i = 0; i < calls; ++i) f(i, stream);
  check(cudaStreamEndCapture(stream, &graph));
  check(cudaGraphInstantiate(&exec, graph, 0));
  cudaEvent_t begin, end;
  check(cudaEventCreate(&begin)), check(cudaEventCreate(&end));
  check(cudaGraphLaunch(exec, stream));
  std::vector<float> times;
  for (int i = 0; i < 11; ++i) {
    check(cudaEventRecord(begin, stream)), check(cudaGraphLaunch(exec, stream)), check(cudaEventRecord(end, stream)), check(cudaEventSynchronize(end));
    float ms;
    check(cudaEventElapsedTime(&ms, begin, end));
    times.push_back(ms);
  }
  check(cudaGraphExecDestroy(exec)), check(cudaGraphDestroy(graph)), check(cudaStreamDestroy(stream));
  std::sort(times.begin(), times.end());
  return times[times.size() / 2] * 1e-3 / calls;
}

/// bf16 matmul, 8192 cubed, FLOP/s.
double matmul_peak() {
  const int n = 8192;
  const std::size_t size = static_cast<std::size_t>(n) * n;
  bf16 *a = device<bf16>(size), *b = device<bf16>(size), *c = device<bf16>(size);
  fill<<<1024, 256>>>(a, size, 1u), fill<<<1024, 256>>>(b, size, 2u);
  cublasLtHandle_t lt;
  cublasLtMatmulDesc_t desc;
  cublasLtMatrixLayout_t la, lb, lc;
  cublasLtMatmulPreference_t preference;
  cublasLtMatmulHeuristicResult_t heuristic;
  int found = 0;
  const cublasOperation_t transposed = CUBLAS_OP_T;
  const std::size_t workspace_bytes = std::size_t{32} << 20;
  std::byte* workspace = device<std::byte>(workspace_bytes);
  const auto ok = [](cublasStatus_t s) {
    if (s != CUBLAS_STATUS_SUCCESS) throw Error("cuda_attention_bench", "cuBLASLt", "success", std::to_string(s));
  };
  ok(cublasLtCreate(&lt)), ok(cublasLtMatmulDescCreate(&desc, CUBLAS_COMPUTE_32F, CUDA_R_32F));
  ok(cublasLtMatmulDescSetAttribute(desc, CUBLASLT_MATMUL_DESC_TRANSA, &transposed, sizeof transposed));
  for (auto* l : {&la, &lb, &lc}) ok(cublasLtMatrixLayoutCreate(l, CUDA_R_16BF, n, n, n));
  ok(cublasLtMatmulPreferenceCreate(&preference));
  ok(cublasLtMatmulPreferenceSetAttribute(preference, CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, &workspace_bytes, sizeof workspace_bytes));
  ok(cublasLtMatmulAlgoGetHeuristic(lt, desc, la, lb, lc, lc, preference, 1, &heuristic, &found));
  const float one = 1, zero = 0;
  const double s = seconds(10, [&](int, cudaStream_t stream) { ok(cublasLtMatmul(lt, desc, &one, a, la, b, lb, &zero, c, lc, c, lc, &heuristic.algo, workspace, workspace_bytes, stream)); });
  for (void* p : {static_cast<void*>(a), static_cast<void*>(b), static_cast<void*>(c), static_cast<void*>(workspace)}) check(cudaFree(p));
  return 2.0 * n * n * n / s;
}
double read_bandwidth() {
  const std::size_t bytes = std::size_t{4} << 30;
  std::byte* p = device<std::byte>(bytes);
  unsigned* out = device<unsigned>(1);
  fill<<<1024, 256>>>(reinterpret_cast<bf16*>(p), bytes / 2, 3u);
  const double s = seconds(3, [&](int, cudaStream_t stream) { read_all<<<132 * 16, 512, 0, stream>>>(reinterpret_cast<const uint4*>(p), bytes / 16, out); });
  check(cudaFree(p)), check(cudaFree(out));
  return static_cast<double>(bytes) / s;
}

struct Setup {
  CacheShape shape;
  index_t group, rows = 0;
  std::vector<Sequence> sequences;
  std::byte* memory;
  const std::byte** table;
  bf16 *q, *out;
  std::vector<void*> owned;

  Setup(Format format, index_t layers, index_t kv_heads, index_t group_, index_t head_dim, const std::vector<std::pair<index_t, index_t>>& parts)
      : shape{format, layers, kv_heads, head_dim}, group(group_) {
    index_t pages = 0;
    for (const auto& [position, tokens] : parts) sequences.push_back({rows, tokens, position, nullptr}), rows += tokens, pages += (position + tokens + 63) / 64;
    const auto bytes = static_cast<std::size_t>(pages * shape.page_bytes());
    memory = device<std::byte>(bytes);
    if (format == Format::q8_0) {
      fill<<<4096, 256>>>(reinterpret_cast<float*>(memory), bytes / 4, 5u);  // scales are some floats; codes any bytes
    } else {
      fill<<<4096, 256>>>(reinterpret_cast<bf16*>(memory), bytes / 2, 5u);
    }
    std::vector<const std::byte*> order;
    for (index_t p = 0; p < pages; ++p) order.push_back(memory + p * shape.page_bytes());
    std::shuffle(order.begin(), order.end(), std::minstd_rand(1));
    table = upload(order);
    const auto size = static_cast<std::size_t>(rows * kv_heads * group * head_dim);
    q = device<bf16>(size), out = device<bf16>(size);
    fill<<<1024, 256>>>(q, size, 9u);
    check(cudaDeviceSynchronize());
    owned = {memory, table, q, out};
  }
  ~Setup() {
    for (void* p : owned) cudaFree(p);
  }
  Setup(const Setup&) = delete;

  cuda::AttentionArgs<bf16, bf16> args(const cuda::AttentionPlan& plan) {
    cuda::AttentionArgs<bf16, bf16> a{};
    a.q = q, a.out = out, a.ldq = a.ldo = shape.kv_heads * group * shape.head_dim, a.head_dim = static_cast<int>(shape.head_dim), a.group = static_cast<int>(group);
    a.scale = 1.0f / std::sqrt(static_cast<float>(shape.head_dim)), a.format = shape.format, a.pages = table;
    a.k_offset = shape.k_offset(0, 0), a.v_offset = shape.v_offset(0, 0), a.head_bytes = shape.head_bytes();
    auto* items = upload(plan.items);
    auto* scratch = device<std::byte>(plan.scratch_bytes(shape.head_dim) + 16);
    auto* counters = upload(std::vector<unsigned>(static_cast<std::size_t>(plan.parts) + 1));
    owned.insert(owned.end(), {items, scratch, counters});
    a.items = items, a.blocks = plan.blocks, a.tile_rows = plan.tile_rows, a.parts = plan.parts;
    a.scratch = reinterpret_cast<float*>(scratch), a.counters = counters;
    return a;
  }
};

const auto everyone = [](const Sequence&) { return true; };

template <class Launch>
double prefill_flops(index_t batch, index_t tokens, index_t kv_heads, index_t group, index_t head_dim, index_t tile, index_t blocks, bool whole, Launch&& launch) {
  Setup s(Format::bf16, 1, kv_heads, group, head_dim, std::vector<std::pair<index_t, index_t>>(static_cast<std::size_t>(batch), {0, tokens}));
  const auto plan = whole ? cuda::plan_whole(std::span<const Sequence>(s.sequences), kv_heads, group, tile, blocks, everyone)
                          : cuda::plan_even(std::span<const Sequence>(s.sequences), kv_heads, group, tile, blocks, everyone);
  const auto a = s.args(plan);
  const double flops = 2.0 * static_cast<double>(batch * tokens * tokens * kv_heads * group * head_dim);  // causal: half of 4 T^2 d
  const double t = seconds(std::max(2, static_cast<int>(2e12 / flops)), [&](int, cudaStream_t stream) { launch(stream, a); });
  return flops / t;
}

}  // namespace

int main(int argc, char** argv) {
  const bool quick = argc > 1 && std::strcmp(argv[1], "quick") == 0;
  cudaDeviceProp properties;
  check(cudaGetDeviceProperties(&properties, 0));
  const int sms = properties.multiProcessorCount;
  const double peak = matmul_peak(), bandwidth = read_bandwidth();
  std::printf("%s, %d SMs: bf16 matmul 8192^3 %.0f TFLOP/s, read %.0f GB/s\n", properties.name, sms, peak * 1e-12, bandwidth * 1e-9);

  struct Shape { index_t batch, tokens, kv_heads, group, head_dim; };
  std::printf("\nprefill, causal, bf16, TFLOP/s (causal FLOPs) and share of the matmul\n");
  for (const Shape& s : {Shape{1, 512, 4, 8, 64}, {1, 2048, 4, 8, 64}, {8, 2048, 4, 8, 64}, {1, 8192, 4, 8, 64}, {1, 512, 8, 4, 128}, {1, 2048, 8, 4, 128}, {8, 2048, 8, 4, 128}, {1, 8192, 8, 4, 128}}) {
    std::printf("  B %td T %5td heads %td kv %td head_dim %3td:", s.batch, s.tokens, s.kv_heads * s.group, s.kv_heads, s.head_dim);
    const auto report = [&](const char* what, double f) { std::printf("  %s %.0f (%.0f%%)", what, f * 1e-12, 100 * f / peak); };
    report("flash", prefill_flops(s.batch, s.tokens, s.kv_heads, s.group, s.head_dim, cuda::flash_tile_rows(s.head_dim, s.batch * s.tokens * s.kv_heads * s.group, sms), sms, true, [](cudaStream_t stream, const auto& a) { cuda::attention_flash(stream, a); }));
    if (!quick) report("mma.sync", prefill_flops(s.batch, s.tokens, s.kv_heads, s.group, s.head_dim, 32, sms * 2, false, [](cudaStream_t stream, const auto& a) { cuda::attention_paged(stream, a); }));
    std::printf("\n");
    std::fflush(stdout);
  }

  std::printf("\ndecode, 32 heads on 4, GB/s of K and V and share of the read bandwidth\n");
  for (const auto& [format, head_dim] : {std::pair{Format::bf16, index_t{64}}, {Format::bf16, index_t{128}}, {Format::q8_0, index_t{64}}})
    for (const index_t length : {512, 2048})
      for (const index_t batch : {1, 16, 100, 256}) {
        const std::size_t layer_bytes = static_cast<std::size_t>(batch * (length / 64) * 4) * static_cast<std::size_t>(page_k_bytes(format, head_dim) + page_v_bytes(format, head_dim));
        // As many layers as it takes for the cache to be far larger than the L2.
        const auto layers = std::clamp<index_t>(static_cast<index_t>((std::size_t{400} << 20) / layer_bytes), 2, 400);
        Setup s(format, layers, 4, 8, head_dim, std::vector<std::pair<index_t, index_t>>(static_cast<std::size_t>(batch), {length - 1, 1}));
        const auto plan = cuda::plan_even(std::span<const Sequence>(s.sequences), 4, 8, 8, cuda::paged_blocks_per_sm(head_dim, 8) * sms, everyone);
        const auto args = s.args(plan);
        const double t = seconds(static_cast<int>(layers), [&](int i, cudaStream_t stream) {
          auto a = args;
          a.k_offset = s.shape.k_offset(i, 0), a.v_offset = s.shape.v_offset(i, 0);
          cuda::attention_paged(stream, a);
        });
        const double rate = static_cast<double>(layer_bytes) / t;
        std::printf("  %s head_dim %3td, %3td sequences of %4td: %7.2f us, %5.0f GB/s (%.0f%%)\n", std::string(name(format)).c_str(), head_dim, batch, length, t * 1e6, rate * 1e-9, 100 * rate / bandwidth);
        std::fflush(stdout);
      }
}
