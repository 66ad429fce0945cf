// Attention and the KV cache on the GPU against the reference in float64: formats, head dimensions, groups, lengths, starts inside pages, mixed batches.
#include <doctest/doctest.h>

#include <cmath>
#include <cstring>
#include <limits>
#include <memory>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "tinyllama/kernels/cuda/attention_launch.cuh"
#include "tinyllama/kernels/reference.hpp"

namespace {

using namespace tinyllama;

void check_cuda(cudaError_t e, const char* what) {
  if (e != cudaSuccess) throw Error("test", what, "success", cudaGetErrorString(e));
}

/// Whether there is a GPU; says so where there is none.
bool has_gpu() {
  int n = 0;
  if (cudaGetDeviceCount(&n) == cudaSuccess && n > 0) return true;
  MESSAGE("skipped: no GPU");
  return false;
}
int multiprocessors() {
  int n = 0;
  check_cuda(cudaDeviceGetAttribute(&n, cudaDevAttrMultiProcessorCount, 0), "attribute");
  return n;
}
bool is_hopper() {
  int major = 0;
  check_cuda(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, 0), "attribute");
  return major == 9;
}

template <class T>
class DeviceArray {
 public:
  explicit DeviceArray(std::size_t n, int fill = 0xff) : n_(n) {
    check_cuda(cudaMalloc(&data_, std::max<std::size_t>(1, n) * sizeof(T)), "cudaMalloc");
    check_cuda(cudaMemset(data_, fill, n * sizeof(T)), "cudaMemset");
  }
  explicit DeviceArray(const std::vector<T>& v) : DeviceArray(v.size()) { check_cuda(cudaMemcpy(data_, v.data(), n_ * sizeof(T), cudaMemcpyHostToDevice), "upload"); }
  DeviceArray(const DeviceArray&) = delete;
  ~DeviceArray() { cudaFree(data_); }
  T* data() const { return data_; }
  std::size_t size() const { return n_; }
  std::vector<T> host() const {
    std::vector<T> v(n_);
    check_cuda(cudaMemcpy(v.data(), data_, n_ * sizeof(T), cudaMemcpyDeviceToHost), "download");
    return v;
  }

 private:
  T* data_ = nullptr;
  std::size_t n_;
};

template <class T>
std::vector<T> random_values(std::size_t n, std::uint64_t seed, float size = 1.0f) {
  std::vector<T> v(n);
  std::minstd_rand engine(static_cast<unsigned>(seed * 7919 + 17));
  for (T& x : v) {
    float sum = 0;  // of six uniform numbers: near enough to normal, and fast
    for (int i = 0; i < 6; ++i) sum += static_cast<float>(engine() & 0xffff) * 0x1p-16f - 0.5f;
    x = T(sum * 1.41421356f * size);
  }
  return v;
}

struct Part { index_t position, tokens; };  // a sequence: new tokens from `position` on

/// A batch with its cache on the device and, in the CPU's order, on the host. Pages lie in no order; bytes that nobody wrote are NaNs.
struct TestBatch {
  CacheShape shape;
  index_t group, table_pages = 0, tokens = 0;
  static constexpr index_t layer = 1;
  std::vector<Sequence> sequences;
  std::vector<std::vector<std::byte>> memory;      // host pages, CPU's order
  std::vector<std::vector<std::byte*>> host_pages;  // of each sequence
  std::unique_ptr<DeviceArray<std::byte>> pages;
  std::unique_ptr<DeviceArray<const std::byte*>> table;
  std::vector<int> page_first;  // of each sequence

  TestBatch(Format format, index_t head_dim, index_t kv_heads, index_t group_, const std::vector<Part>& parts) : shape{format, 2, kv_heads, head_dim}, group(group_) {
    for (const Part& p : parts) {
      page_first.push_back(static_cast<int>(table_pages));
      sequences.push_back({tokens, p.tokens, p.position, nullptr});
      tokens += p.tokens, table_pages += (p.position + p.tokens + page_tokens - 1) / page_tokens;
    }
    const auto bytes = static_cast<std::size_t>(shape.page_bytes());
    pages = std::make_unique<DeviceArray<std::byte>>(bytes * static_cast<std::size_t>(table_pages));
    std::vector<const std::byte*> order;
    for (index_t p = 0; p < table_pages; ++p) order.push_back(pages->data() + static_cast<std::size_t>(p) * bytes);
    std::shuffle(order.begin(), order.end(), std::minstd_rand(1));
    table = std::make_unique<DeviceArray<const std::byte*>>(order);
    // All positions of all sequences are stored by the kernel under test, in f32 from the same numbers as the reference.
    std::vector<int> first, position;
    for (std::size_t s = 0; s < sequences.size(); ++s) {
      const Sequence& q = sequences[s];
      host_pages.emplace_back();
      for (index_t p = 0; p < q.position + q.tokens; ++p) {
        first.push_back(page_first[s]), position.push_back(static_cast<int>(p));
        if (p % page_tokens == 0) memory.emplace_back(bytes, std::byte{0xff}), host_pages.back().push_back(memory.back().data());
      }
    }
    const std::size_t rows = first.size(), width = static_cast<std::size_t>(kv_heads * head_dim);
    const auto k = random_values<float>(rows * width, 3), v = random_values<float>(rows * width, 5);
    std::size_t row = 0;
    for (std::size_t s = 0; s < sequences.size(); ++s)
      for (index_t p = 0; p < sequences[s].position + sequences[s].tokens; ++p, ++row)
        for (index_t h = 0; h < kv_heads; ++h) {
          std::byte* page = host_pages[s][static_cast<std::size_t>(p / page_tokens)];
          const std::size_t at = row * width + static_cast<std::size_t>(h * head_dim);
          reference::store_kv({&k[at], &v[at], head_dim, p % page_tokens, page + shape.k_offset(layer, h), page + shape.v_offset(layer, h), format});
        }
    DeviceArray<float> dk(k), dv(v);
    DeviceArray<int> df(first), dp(position);
    cuda::StoreKvArgs<float> a{};
    a.k = dk.data(), a.v = dv.data(), a.ldk = a.ldv = static_cast<std::int64_t>(width), a.tokens = static_cast<int>(rows);
    a.kv_heads = static_cast<int>(kv_heads), a.head_dim = static_cast<int>(head_dim), a.format = format, a.pages = table->data();
    a.page_first = df.data(), a.position = dp.data(), a.k_offset = shape.k_offset(layer, 0), a.v_offset = shape.v_offset(layer, 0), a.head_bytes = shape.head_bytes();
    cuda::store_kv(nullptr, a);
    check_cuda(cudaDeviceSynchronize(), "store_kv");
  }
  TestBatch(const TestBatch&) = delete;
  std::span<const Sequence> span() const { return sequences; }
  index_t heads() const { return shape.kv_heads * group; }
};

/// A plan on the device.
struct DevicePlan {
  DeviceArray<cuda::AttentionItem> items;
  DeviceArray<std::byte> scratch;
  DeviceArray<unsigned> counters;
  DevicePlan(const cuda::AttentionPlan& plan, index_t head_dim) : items(plan.items), scratch(plan.scratch_bytes(head_dim)),
      counters(static_cast<std::size_t>(plan.parts), 0) {}
};

template <class Q, class O>
std::vector<O> run(const TestBatch& b, const cuda::AttentionPlan& plan, const DeviceArray<Q>& q, index_t ld, cuda::AttentionKernel kernel, int repeats = 1) {
  DeviceArray<O> out(static_cast<std::size_t>(b.tokens * ld));
  const DevicePlan p(plan, b.shape.head_dim);
  cuda::AttentionArgs<Q, O> a{};
  a.q = q.data(), a.out = out.data(), a.ldq = a.ldo = ld, a.head_dim = static_cast<int>(b.shape.head_dim), a.group = static_cast<int>(b.group);
  a.scale = 1.0f / std::sqrt(static_cast<float>(b.shape.head_dim)), a.format = b.shape.format, a.pages = b.table->data();
  a.k_offset = b.shape.k_offset(TestBatch::layer, 0), a.v_offset = b.shape.v_offset(TestBatch::layer, 0), a.head_bytes = b.shape.head_bytes();
  a.items = p.items.data(), a.blocks = plan.blocks, a.tile_rows = plan.tile_rows, a.parts = plan.parts;
  a.scratch = reinterpret_cast<float*>(p.scratch.data()), a.counters = p.counters.data();
  std::unique_ptr<DeviceArray<std::byte>> expanded;
  std::unique_ptr<DeviceArray<const std::byte*>> expanded_table;
  if (kernel == cuda::AttentionKernel::flash && a.format != Format::bf16 && a.format != Format::f16) {
    expanded = std::make_unique<DeviceArray<std::byte>>(static_cast<std::size_t>(b.table_pages * cuda::expanded_page_bytes(b.shape.kv_heads, a.head_dim)));
    expanded_table = std::make_unique<DeviceArray<const std::byte*>>(static_cast<std::size_t>(b.table_pages));
    cuda::ExpandArgs e{};
    e.format = a.format, e.head_dim = a.head_dim, e.kv_heads = static_cast<int>(b.shape.kv_heads), e.count = static_cast<int>(b.table_pages), e.pages = a.pages;
    e.k_offset = a.k_offset, e.v_offset = a.v_offset, e.head_bytes = a.head_bytes, e.out = expanded->data(), e.out_pages = expanded_table->data();
    cuda::expand_cache(nullptr, e);
    a.format = Format::bf16, a.pages = expanded_table->data(), a.k_offset = 0, a.head_bytes = cuda::expanded_head_bytes(a.head_dim), a.v_offset = a.head_bytes / 2;
  }
  for (int i = 0; i < repeats; ++i) {
    if (kernel == cuda::AttentionKernel::any) cuda::attention_any(nullptr, a);
    if constexpr (std::is_same_v<Q, bf16>) {
      if (kernel == cuda::AttentionKernel::paged) cuda::attention_paged(nullptr, a);
      if (kernel == cuda::AttentionKernel::flash) cuda::attention_flash(nullptr, a);
    }
  }
  check_cuda(cudaDeviceSynchronize(), "attention");
  for (const unsigned c : p.counters.host()) REQUIRE(c == 0);
  return out.host();
}

/// Tokens of a sequence that are compared: all of a few, else those around the edges of tiles and pages, and some between.
std::vector<index_t> sample(index_t tokens) {
  std::vector<index_t> t;
  for (index_t i = 0; i < tokens; ++i)
    if (tokens <= 24 || i < 3 || i >= tokens - 3 || i % 61 == 7) t.push_back(i);
  return t;
}

/// Runs the plan and compares. Rounding: P to 16 bits (2^-8 of itself for bf16, 2^-11 for f16) where the products are the tensor cores'; scores are sums of head_dim exact
/// products in f32; the result to O. Each error of a score multiplies its exponential. The tensor cores truncate the sums, hence a whole eps a term.
template <class Q, class O>
void check_plan(const TestBatch& b, const cuda::AttentionPlan& plan, cuda::AttentionKernel kernel) {
  CAPTURE(std::string(name(b.shape.format)));
  CAPTURE(b.shape.head_dim);
  CAPTURE(b.group);
  CAPTURE(b.shape.kv_heads);
  CAPTURE(b.tokens);
  CAPTURE(b.sequences[0].position);
  CAPTURE(static_cast<int>(kernel));
  const index_t hd = b.shape.head_dim, width = b.heads() * hd, ld = (width + 8 + 7) / 8 * 8, stride = head_stride(hd);
  const auto q = random_values<Q>(static_cast<std::size_t>(b.tokens * ld), 11, 2.0f);
  const DeviceArray<Q> dq(q);
  const auto got = run<Q, O>(b, plan, dq, ld, kernel);
  CHECK_MESSAGE(std::memcmp(got.data(), run<Q, O>(b, plan, dq, ld, kernel, 2).data(), got.size() * sizeof(O)) == 0, "the same bits every run");
  index_t unwritten = 0, touched = 0;
  for (index_t t = 0; t < b.tokens; ++t)
    for (index_t c = 0; c < ld; ++c) {
      const float x = got[static_cast<std::size_t>(t * ld + c)];
      c < width ? unwritten += x != x : touched += x == x;
    }
  CHECK(unwritten == 0);
  CHECK(touched == 0);
  const bool tensor = kernel != cuda::AttentionKernel::any;
  const double p_rounding = !tensor ? 0 : b.shape.format == Format::f16 || (b.shape.format == Format::f8_e4m3 && kernel == cuda::AttentionKernel::paged) ? 0x1p-11 : 0x1p-8, eps = 0x1p-23, out_rounding = std::is_same_v<O, bf16> ? 0x1p-8 : 0;
  // A cache expanded to bf16 is rounded once more: scores err by up to 2^-8 of the sum of their terms' sizes, which multiplies numerator and denominator.
  const double k_rounding = kernel == cuda::AttentionKernel::flash && (b.shape.format == Format::q8_0 || b.shape.format == Format::f32) ? 0x1p-8 : 0;
  struct Task { std::size_t sequence; index_t token, head; };
  std::vector<Task> tasks;
  for (std::size_t s = 0; s < b.sequences.size(); ++s)
    for (const index_t t : sample(b.sequences[s].tokens))
      for (index_t h = 0; h < b.shape.kv_heads; ++h) tasks.push_back({s, t, h});
  std::vector<double> worst(tasks.size());  // error over its bound
  const auto work = [&](std::size_t begin, std::size_t step) {
    for (std::size_t i = begin; i < tasks.size(); i += step) {
      const auto [si, token, h] = tasks[i];
      const Sequence& s = b.sequences[si];
      const index_t position = s.position + token, row = (s.first_row + token) * ld + h * b.group * hd;
      std::vector<float> fq, o(static_cast<std::size_t>(b.group * stride)), max(static_cast<std::size_t>(b.group)), sum(max);
      for (index_t e = 0; e < b.group * hd; ++e) fq.push_back(static_cast<float>(q[static_cast<std::size_t>(row + e)]));
      const std::byte* const* pages = b.host_pages[si].data();
      AttentionTask t{};
      t.q = fq.data(), t.ldq = b.group * hd, t.head_dim = hd, t.group = b.group, t.rows = b.group, t.position = position, t.pages = pages;
      t.k_offset = b.shape.k_offset(TestBatch::layer, h), t.v_offset = b.shape.v_offset(TestBatch::layer, h), t.format = b.shape.format;
      t.begin = 0, t.end = position + 1, t.scale = 1.0f / std::sqrt(static_cast<float>(hd)), t.o = o.data(), t.max = max.data(), t.sum = sum.data();
      reference::attention(t);
      for (index_t r = 0; r < b.group; ++r) {
        double most = 0;
        std::vector<double> weighted(static_cast<std::size_t>(hd));
        for (index_t p = 0; p <= position; ++p) {
          const std::byte *k = pages[p / page_tokens] + t.k_offset, *v = pages[p / page_tokens] + t.v_offset;
          double dot = 0, size = 0;
          for (index_t d = 0; d < hd; ++d) {
            const double x = static_cast<double>(fq[static_cast<std::size_t>(r * hd + d)]) * reference::load_k(t.format, k, hd, p % page_tokens, d);
            dot += x, size += std::fabs(x);
          }
          most = std::max(most, size * t.scale);
          const double w = std::exp(dot * t.scale - max[static_cast<std::size_t>(r)]) / sum[static_cast<std::size_t>(r)];
          for (index_t d = 0; d < hd; ++d) weighted[static_cast<std::size_t>(d)] += w * std::fabs(reference::load_v(t.format, v, hd, p % page_tokens, d));
        }
        for (index_t d = 0; d < hd; ++d) {
          const double expected = static_cast<double>(o[static_cast<std::size_t>(r * stride + d)]) / sum[static_cast<std::size_t>(r)];
          const double found = static_cast<float>(got[static_cast<std::size_t>(row + r * hd + d)]);
          const double bound = weighted[static_cast<std::size_t>(d)] * (p_rounding * 1.05 + 16 * eps * (most + 4) + k_rounding * (2 * most + 1)) + std::fabs(expected) * (out_rounding * 1.05 + 4 * eps) + 1e-30;
          const double ratio = std::fabs(found - expected) / bound;
          if (!(ratio <= worst[i])) worst[i] = ratio;  // a NaN too
        }
      }
    }
  };
  const unsigned workers = std::max(1u, std::thread::hardware_concurrency());
  std::vector<std::thread> threads;
  for (unsigned w = 0; w < workers; ++w) threads.emplace_back(work, w, workers);
  for (auto& t : threads) t.join();
  for (std::size_t i = 0; i < tasks.size(); ++i) {
    if (worst[i] <= 1) continue;
    CAPTURE(tasks[i].sequence);
    CAPTURE(tasks[i].token);
    CAPTURE(tasks[i].head);
    CHECK(worst[i] <= 1);
    break;
  }
}

const auto everyone = [](const Sequence&) { return true; };

cuda::AttentionPlan plan_for(const TestBatch& b, cuda::AttentionKernel kernel, index_t tile_rows) {
  const index_t sms = multiprocessors();
  if (kernel == cuda::AttentionKernel::flash) return cuda::plan_whole(b.span(), b.shape.kv_heads, b.group, tile_rows, sms, everyone);
  return cuda::plan_even(b.span(), b.shape.kv_heads, b.group, tile_rows, cuda::paged_blocks_per_sm(b.shape.head_dim, tile_rows) * sms, everyone);
}

const std::vector<Part> mixed = {{0, 1}, {0, 63}, {511, 1}, {30, 100}, {63, 2}, {64, 1}, {100, 64}, {126, 3}, {2047, 1}, {7, 129}};

}  // namespace

TEST_CASE("cuda store_kv: every format and head dimension, byte for byte, and nothing else") {
  if (!has_gpu()) return;
  for (const Format f : {Format::f32, Format::f16, Format::bf16, Format::f8_e4m3, Format::q8_0})
    for (const index_t hd : {1, 8, 15, 32, 64, 80, 128, 256}) {
      CAPTURE(std::string(name(f)));
      CAPTURE(hd);
      const TestBatch b(f, hd, 3, 1, {{70, 3}, {0, 5}});
      const auto table = b.table->host();
      const auto device = b.pages->host();
      const auto bytes = static_cast<std::size_t>(b.shape.page_bytes());
      index_t wrong = 0, written = 0;
      for (std::size_t s = 0; s < b.sequences.size(); ++s)
        for (std::size_t p = 0; p < b.host_pages[s].size(); ++p) {
          const std::byte* got = device.data() + (table[static_cast<std::size_t>(b.page_first[s]) + p] - b.pages->data());
          const std::byte* expected = b.host_pages[s][p];
          cuda::visit_cache(f, [&]<Format F>() {
            constexpr std::size_t size = sizeof(typename cuda::cache_element<F>::type);
            const int k_width = static_cast<int>(hd), v_width = static_cast<int>(head_stride(hd));
            for (index_t h = 0; h < b.shape.kv_heads; ++h)
              for (int slot = 0; slot < 64; ++slot) {
                const std::byte *gk = got + b.shape.k_offset(1, h), *gv = got + b.shape.v_offset(1, h), *ek = expected + b.shape.k_offset(1, h), *ev = expected + b.shape.v_offset(1, h);
                for (int d = 0; d < k_width; ++d) wrong += std::memcmp(gk + cuda::cache_offset<F>(k_width, slot, d), ek + (d * 64 + slot) * static_cast<index_t>(size), size) != 0;
                for (int d = 0; d < v_width; ++d) wrong += std::memcmp(gv + cuda::cache_offset<F>(v_width, slot, d), ev + (slot * v_width + d) * static_cast<index_t>(size), size) != 0;
                if (F == Format::q8_0)
                  for (const auto& [g, e, w] : {std::tuple(gk, ek, k_width), std::tuple(gv, ev, v_width)})
                    wrong += std::memcmp(g + cuda::cache_scale_offset(w, slot), e + cuda::cache_scale_offset(w, slot), 4) != 0;
              }
          });
          for (std::size_t i = 0; i < bytes; ++i) written += got[i] != std::byte{0xff}, written -= expected[i] != std::byte{0xff};
        }
      CHECK(wrong == 0);
      CHECK(written == 0);  // as many bytes as in the reference: the rest is poison still
    }
}

TEST_CASE("cuda store_kv with rope: q in place and k on its way, both layouts") {
  if (!has_gpu()) return;
  const auto check = [&]<class A>(A, index_t hd, RopeLayout layout) {
    CAPTURE(hd);
    CAPTURE(std::string(name(layout)));
    const index_t heads = 6, kv_heads = 2, tokens = 70, ld = (heads + 2 * kv_heads) * hd + 8;
    const auto qkv = random_values<A>(static_cast<std::size_t>(tokens * ld), 4);
    const auto cos = random_values<float>(static_cast<std::size_t>(tokens * hd / 2), 6), sin = random_values<float>(static_cast<std::size_t>(tokens * hd / 2), 7);
    const CacheShape shape{Format::f32, 1, kv_heads, hd};
    DeviceArray<std::byte> pages(static_cast<std::size_t>(2 * shape.page_bytes()));
    DeviceArray<const std::byte*> table(std::vector<const std::byte*>{pages.data() + shape.page_bytes(), pages.data()});
    std::vector<int> first(static_cast<std::size_t>(tokens), 0), position;
    for (int t = 0; t < tokens; ++t) position.push_back(t + 50);
    DeviceArray<A> x(qkv);
    DeviceArray<float> c(cos), s(sin);
    DeviceArray<int> df(first), dp(position);
    cuda::StoreKvArgs<A> a{};
    a.q = x.data(), a.k = x.data() + heads * hd, a.v = a.k + kv_heads * hd, a.ldq = a.ldk = a.ldv = ld, a.cos = c.data(), a.sin = s.data(), a.ld_angles = hd / 2, a.layout = layout;
    a.tokens = static_cast<int>(tokens), a.heads = static_cast<int>(heads), a.kv_heads = static_cast<int>(kv_heads), a.head_dim = static_cast<int>(hd), a.format = Format::f32;
    a.pages = table.data(), a.page_first = df.data(), a.position = dp.data(), a.k_offset = shape.k_offset(0, 0), a.v_offset = shape.v_offset(0, 0), a.head_bytes = shape.head_bytes();
    cuda::store_kv(nullptr, a);
    check_cuda(cudaDeviceSynchronize(), "store_kv");
    const auto got = x.host();
    const auto memory = pages.host();
    double worst = 0;
    index_t v_wrong = 0;
    for (index_t t = 0; t < tokens; ++t) {
      std::vector<float> row;
      for (index_t i = 0; i < ld; ++i) row.push_back(static_cast<float>(qkv[static_cast<std::size_t>(t * ld + i)]));
      const std::vector<float> before = row;
      reference::rope(row.data(), &cos[static_cast<std::size_t>(t * hd / 2)], &sin[static_cast<std::size_t>(t * hd / 2)], heads + kv_heads, hd, layout);
      const std::byte* page = memory.data() + (1 - (t + 50) / 64) * shape.page_bytes();
      for (index_t i = 0; i < heads * hd; ++i)
        worst = std::max(worst, std::fabs(static_cast<double>(static_cast<float>(got[static_cast<std::size_t>(t * ld + i)])) - row[static_cast<std::size_t>(i)]));
      for (index_t h = 0; h < kv_heads; ++h)
        for (int d = 0; d < hd; ++d) {
          float k, v;
          const int slot = static_cast<int>((t + 50) % 64), width_v = static_cast<int>(head_stride(hd));
          std::memcpy(&k, page + shape.k_offset(0, h) + cuda::cache_offset<Format::f32>(static_cast<int>(hd), slot, d), 4);
          std::memcpy(&v, page + shape.v_offset(0, h) + cuda::cache_offset<Format::f32>(width_v, slot, d), 4);
          const double error = std::fabs(static_cast<double>(k) - row[static_cast<std::size_t>((heads + h) * hd + d)]);
          CHECK(error <= 1e-5);  // k is rounded to the cache's format only
          v_wrong += v != before[static_cast<std::size_t>((heads + kv_heads + h) * hd + d)];
        }
    }
    CHECK(v_wrong == 0);
    CHECK(worst <= (std::is_same_v<A, bf16> ? 16 * 0x1p-9 : 1e-5));
  };
  for (const index_t hd : {2, 8, 64, 80, 128})
    for (const RopeLayout layout : {RopeLayout::half, RopeLayout::interleaved}) check(bf16(), hd, layout), check(float(), hd, layout);
}

TEST_CASE("cuda attention in f32: any head dimension, format and group") {
  if (!has_gpu()) return;
  for (const Format f : {Format::f32, Format::f16, Format::bf16, Format::f8_e4m3, Format::q8_0})
    for (const index_t hd : {8, 15, 32, 64, 80, 128, 256})
      for (const index_t group : {1, 4, 12}) {
        if (group != 4 && hd != 32) continue;
        const TestBatch b(f, hd, 2, group, mixed);
        check_plan<float, float>(b, plan_for(b, cuda::AttentionKernel::any, cuda::any_tile_rows), cuda::AttentionKernel::any);
      }
  const TestBatch b(Format::bf16, 48, 2, 4, mixed);
  check_plan<bf16, bf16>(b, plan_for(b, cuda::AttentionKernel::any, cuda::any_tile_rows), cuda::AttentionKernel::any);
}

TEST_CASE("cuda attention of few rows: lengths, groups, formats") {
  if (!has_gpu()) return;
  for (const Format f : {Format::bf16, Format::f16, Format::f8_e4m3, Format::q8_0})
    for (const index_t hd : {64, 128})
      for (const auto& [group, tokens, tile] : {std::tuple<index_t, index_t, index_t>{1, 1, 8}, {4, 1, 8}, {8, 1, 8}, {12, 1, 16}, {8, 2, 16}, {8, 4, 32}, {12, 3, 32}, {3, 7, 8}}) {
        std::vector<Part> parts;
        for (const index_t length : {1, 63, 64, 65, 127, 500, 2048})
          if (length >= tokens) parts.push_back({length - tokens, tokens});
        const TestBatch b(f, hd, 2, group, parts);
        check_plan<bf16, bf16>(b, plan_for(b, cuda::AttentionKernel::paged, tile), cuda::AttentionKernel::paged);
      }
  for (const Format f : {Format::bf16, Format::f8_e4m3, Format::q8_0}) {
    const TestBatch b(f, 64, 4, 8, mixed);  // prefill before Hopper
    check_plan<bf16, float>(b, plan_for(b, cuda::AttentionKernel::paged, 32), cuda::AttentionKernel::paged);
  }
  std::vector<Part> many;
  for (index_t i = 0; i < 256; ++i) many.push_back({(i * 37) % 300, 1});
  const TestBatch b(Format::bf16, 64, 4, 8, many);
  check_plan<bf16, bf16>(b, plan_for(b, cuda::AttentionKernel::paged, 8), cuda::AttentionKernel::paged);
}

TEST_CASE("cuda attention of prefill on Hopper: lengths, starts inside pages, groups, mixed batches") {
  if (!has_gpu()) return;
  if (!is_hopper()) {
    MESSAGE("skipped: not compute capability 9.0");
    return;
  }
  for (const Format f : {Format::bf16, Format::f16})
    for (const auto& [hd, tile] : {std::pair<index_t, index_t>{64, 64}, {64, 192}, {128, 128}}) {
      CAPTURE(tile);
      const auto check = [&, hd = hd, tile = tile](index_t kv_heads, index_t group, const std::vector<Part>& parts) {
        const TestBatch b(f, hd, kv_heads, group, parts);
        check_plan<bf16, bf16>(b, plan_for(b, cuda::AttentionKernel::flash, tile), cuda::AttentionKernel::flash);
      };
      for (const index_t length : {1, 63, 64, 65, 127, 129, 500}) check(2, 8, {{0, length}});
      check(1, 8, {{0, 2048}});
      check(2, 1, {{0, 700}});
      check(1, 12, {{100, 333}});
      check(3, 3, {{63, 70}});
      for (const index_t group : {1, 4, 12}) check(2, group, mixed);
      const TestBatch b(f, hd, 4, 8, mixed);
      check_plan<bf16, float>(b, plan_for(b, cuda::AttentionKernel::flash, tile), cuda::AttentionKernel::flash);
    }
  for (const Format f : {Format::f8_e4m3, Format::q8_0, Format::f32})  // expanded to bf16 first
    for (const index_t hd : {64, 128}) {
      const TestBatch b(f, hd, 2, 8, mixed);
      check_plan<bf16, bf16>(b, plan_for(b, cuda::AttentionKernel::flash, hd == 64 ? 192 : 128), cuda::AttentionKernel::flash);
    }
}

TEST_CASE("cuda attention plans: every page of every tile once, padding does nothing") {
  std::vector<Part> parts = mixed;
  for (index_t i = 0; i < 40; ++i) parts.push_back({(i * 131) % 900, 1 + i % 3});
  std::vector<Sequence> batch;
  index_t row = 0;
  for (const Part& p : parts) batch.push_back({row, p.tokens, p.position, nullptr}), row += p.tokens;
  for (const index_t blocks : {1, 7, 132, 396, 5000})
    for (const bool whole : {false, true}) {
      auto plan = whole ? cuda::plan_whole(std::span<const Sequence>(batch), 3, 8, 16, blocks, everyone) : cuda::plan_even(std::span<const Sequence>(batch), 3, 8, 16, blocks, everyone);
      CHECK(plan.blocks <= blocks);
      plan.pad(plan.blocks + 3);
      index_t visited = 0, seen = 0, expected = 0, parts_seen = 0;
      for (std::int32_t b = 0; b < plan.blocks; ++b)
        for (std::int32_t i = b; i >= 0; i = plan.items[static_cast<std::size_t>(i)].next) {
          const auto& item = plan.items[static_cast<std::size_t>(i)];
          ++visited, seen += item.page_end - item.page_begin;
          if (item.rows == 0) continue;
          CHECK(item.page_begin < item.page_end);
          CHECK(item.part < item.parts);
          CHECK((item.parts == 1 || item.first_part + item.parts <= plan.parts));
          parts_seen += item.parts > 1;
        }
      cuda::detail::for_each_tile(std::span<const Sequence>(batch), 3, 8, 16, everyone, [&](const cuda::AttentionItem& t) { expected += t.page_end; });
      CHECK(visited == static_cast<index_t>(plan.items.size()));
      CHECK(seen == expected);
      CHECK(parts_seen == plan.parts);
    }
}
