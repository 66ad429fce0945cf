// Every kernel at TinyLlama's shapes through the CPU device, beside the machine's own limits.
//
// "share" is the least time that the limits allow (bytes over read bandwidth, or operations over the multiply units' rate, whichever is longer)
// over the time taken. Weights and caches rotate through more memory than the caches hold; activations stay in cache, as they do in a model,
// so that the shares of operations on activations may exceed 1. --threads=N and Google Benchmark's own options.
#include <benchmark/benchmark.h>

#include <array>
#include <cstring>
#include <memory>
#include <random>
#include <string>

#include "limits.hpp"
#include "tinyllama/quant/codec.hpp"

namespace {

using namespace tinyllama;

constexpr index_t hidden = 2048, ffn = 5632, heads = 32, kv_heads = 4, head_dim = 64, vocab = 32000, context = 2048, layers = 22;

std::unique_ptr<Cpu> dev;
bench::Limits limits;

/// Device memory for n floats with values of a model's size.
struct Floats {
  Memory<Cpu> memory;
  explicit Floats(index_t n, float value = 0.1f) : memory(*dev, static_cast<std::size_t>(n) * sizeof(float)) {
    std::minstd_rand random(1);
    for (index_t i = 0; i < n; ++i) data()[i] = value * (static_cast<float>(random() % 2001) / 1000.0f - 1.0f);
  }
  float* data() const { return reinterpret_cast<float*>(memory.data()); }
  View<float, dyn, dyn> view(index_t rows, index_t columns) const { return {data(), {rows, columns}}; }
};

/// Times f(i) and reports what an iteration moves and computes. `peak`: the units' rate that bounds it.
template <class F>
void measure(benchmark::State& state, double bytes, double operations, double peak, F&& f) {
  f(0);  // scratch grows, caches fill
  index_t i = 0;
  const double start = bench::now();
  for (auto _ : state) f(++i);
  const double seconds = (bench::now() - start) / static_cast<double>(i);
  if (bytes > 0) state.counters["GB/s"] = bytes / seconds * 1e-9;
  if (operations > 0) state.counters["GFLOP/s"] = operations / seconds * 1e-9;
  state.counters["share"] = std::max(bytes / limits.read.best, operations > 0 ? operations / peak : 0.0) / seconds;
}

// ---- operations on activations -------------------------------------------------------------------------------------------------------

void rmsnorm(benchmark::State& state) {
  const index_t t = state.range(0);
  const Floats x(t * hidden), out(t * hidden), gain(hidden);
  measure(state, 8.0 * static_cast<double>(t * hidden), 0, 1, [&](index_t) { dev->rmsnorm(out.view(t, hidden), x.view(t, hidden), gain.data(), 1e-5f); });
}
void add_rmsnorm(benchmark::State& state) {
  const index_t t = state.range(0);
  const Floats x(t * hidden), r(t * hidden, 0.0f), out(t * hidden), gain(hidden);
  measure(state, 16.0 * static_cast<double>(t * hidden), 0, 1,
          [&](index_t) { dev->add_rmsnorm(out.view(t, hidden), x.view(t, hidden), r.view(t, hidden), gain.data(), 1e-5f); });
}
void rope(benchmark::State& state) {
  const index_t t = state.range(0);
  const auto layout = state.range(1) ? RopeLayout::interleaved : RopeLayout::half;
  const Floats x(t * hidden), angle(t * head_dim / 2);
  std::fill_n(angle.data(), t * head_dim / 2, 0.7071f);  // x keeps its size however often it is turned
  measure(state, 8.0 * static_cast<double>(t * hidden), 0, 1,
          [&](index_t) { dev->rope(x.view(t, hidden), angle.view(t, head_dim / 2), angle.view(t, head_dim / 2), heads, layout); });
}
void swiglu(benchmark::State& state) {
  const index_t t = state.range(0);
  const Floats gate(t * ffn, 4.0f), up(t * ffn), out(t * ffn);
  measure(state, 12.0 * static_cast<double>(t * ffn), 0, 1, [&](index_t) { dev->swiglu(out.view(t, ffn), gate.view(t, ffn), up.view(t, ffn)); });
}
void softmax(benchmark::State& state) {
  const index_t t = state.range(0);
  const Floats x(t * vocab, 10.0f), out(t * vocab);
  measure(state, 8.0 * static_cast<double>(t * vocab), 0, 1, [&](index_t) { dev->softmax(out.view(t, vocab), x.view(t, vocab)); });
}

// ---- matrices ------------------------------------------------------------------------------------------------------------------------

/// Packed weights [n, k]: as many copies as exceed 256 MB.
struct Weights {
  Matrix matrix;
  index_t copies;
  Memory<Cpu> memory;

  Weights(Format f, index_t n, index_t k) : matrix{f, true, n, k, nullptr} {
    const std::size_t panel = panel_bytes(f, k), bytes = packed_bytes(f, n, k);
    copies = static_cast<index_t>((std::size_t{256} << 20) / bytes + 1);
    memory = Memory<Cpu>(*dev, bytes * static_cast<std::size_t>(copies));
    // One panel of real weights, everywhere: values make no difference to the time, encoding 256 MB of them would.
    const Floats rows(panel_rows * k, 0.05f);
    std::vector<std::byte> stored(static_cast<std::size_t>(panel_rows) * row_bytes(f, k));
    for (index_t r = 0; r < panel_rows; ++r) encode_row(f, rows.data() + r * k, stored.data() + static_cast<std::size_t>(r) * row_bytes(f, k), k);
    visit(f, [&]<Format F>() { pack_panel<F>(stored.data(), row_bytes(F, k), 16, k, memory.data()); });
    dev->parallel_for(static_cast<index_t>(memory.bytes() / panel), 64, [&](index_t begin, index_t end) {
      for (index_t p = std::max<index_t>(1, begin); p < end; ++p) std::memcpy(memory.data() + static_cast<std::size_t>(p) * panel, memory.data(), panel);
    });
  }
  Matrix copy(index_t i) const {
    Matrix m = matrix;
    m.data = memory.data() + static_cast<std::size_t>(i % copies) * matrix.bytes();
    return m;
  }
};

/// The weights of the benchmark before this one, where they are the same: 256 MB at a time.
const Weights& weights(Format f, index_t n, index_t k) {
  static std::unique_ptr<Weights> last;
  if (!last || last->matrix.format != f || last->matrix.rows != n || last->matrix.columns != k) {
    last.reset();
    last = std::make_unique<Weights>(f, n, k);
  }
  return *last;
}

void matmul(benchmark::State& state, Format f, index_t n, index_t k, Compute compute) {
  const index_t m = state.range(0);
  const Weights& w = weights(f, n, k);
  const Floats x(m * k, 1.0f), y(m * n);
  const bool int8 = is_quantised(f) && compute != Compute::f32, bf16 = f == Format::bf16 && dev->kernels().bf16_dot && m > 1 && compute != Compute::f32;
  const double wanted = int8 ? limits.int8_dot.best : bf16 ? limits.bf16_dot.best : 0;
  // Where the build that measures lacks an instruction that the kernels use, the f32 rate stands in.
  measure(state, static_cast<double>(w.matrix.bytes()), 2.0 * static_cast<double>(m * n * k), wanted > 0 ? wanted : limits.f32_fma.best,
          [&](index_t i) { dev->matmul(y.view(m, n), x.view(m, k), Linear(w.copy(i), compute)); });
}

void embedding(benchmark::State& state, Format f, bool packed) {
  const index_t t = state.range(0);
  Matrix table = weights(f, vocab, hidden).copy(0);
  table.packed = packed;  // the bytes mean other numbers in rows; the time is the same
  std::vector<std::int32_t> ids(static_cast<std::size_t>(t));
  const Floats out(t * hidden);
  std::minstd_rand random(2);
  measure(state, static_cast<double>(static_cast<std::size_t>(t) * row_bytes(f, hidden)), 0, 1, [&](index_t) {
    for (auto& id : ids) id = static_cast<std::int32_t>(random() % vocab);
    dev->embedding(out.view(t, hidden), table, ids);
  });
}

// ---- attention -----------------------------------------------------------------------------------------------------------------------

/// The whole model's cache of one sequence: a step visits its layers in turn, 46 MB in f16 at 2048 positions.
struct Cache {
  CacheShape shape;
  Memory<Cpu> memory;
  std::vector<std::byte*> pages;

  explicit Cache(Format f) : shape{f, layers, kv_heads, head_dim}, memory(*dev, static_cast<std::size_t>(shape.page_bytes() * (context / page_tokens))) {
    for (index_t p = 0; p < context / page_tokens; ++p) pages.push_back(memory.data() + p * shape.page_bytes());
    const index_t width = kv_heads * head_dim;
    const Floats k(context * width), v(context * width);
    const Sequence all{0, context, 0, pages.data()};
    for (index_t l = 0; l < layers; ++l) dev->store_kv(k.view(context, width), v.view(context, width), shape, l, {&all, 1});
  }
};
const Cache& cache(Format f) {
  static std::unique_ptr<Cache> last;
  if (!last || last->shape.format != f) last.reset(), last = std::make_unique<Cache>(f);
  return *last;
}

void prefill(benchmark::State& state, Format f, Compute compute) {
  const index_t t = state.range(0);
  const Cache& c = cache(f);
  CacheShape shape = c.shape;
  shape.compute = compute;
  const bool bf16 = compute == Compute::bf16 && dev->kernels().bf16_dot && limits.bf16_dot.best > 0;
  const Floats q(t * hidden, 1.0f), out(t * hidden);
  const Sequence s{0, t, 0, c.pages.data()};
  // q k^T and p v over the lower triangle, 2 operations a product each.
  const double operations = 4.0 * static_cast<double>(hidden) * static_cast<double>(t * (t + 1) / 2);
  measure(state, 0, operations, (bf16 ? limits.bf16_dot : limits.f32_fma).best,
          [&](index_t i) { dev->attention(out.view(t, hidden), q.view(t, hidden), shape, i % layers, {&s, 1}); });
}
void decode(benchmark::State& state, Format f) {
  const index_t length = state.range(0);
  const Cache& c = cache(f);
  const Floats q(hidden, 1.0f), out(hidden);
  const Sequence s{0, 1, length - 1, c.pages.data()};
  measure(state, static_cast<double>(length * 2 * kv_heads * head_dim * info(f).bytes), 4.0 * static_cast<double>(hidden * length), limits.f32_fma.best,
          [&](index_t i) { dev->attention(out.view(1, hidden), q.view(1, hidden), c.shape, i % layers, {&s, 1}); });
}
void store_kv(benchmark::State& state, Format f) {
  const index_t t = state.range(0), width = kv_heads * head_dim;
  const Cache& c = cache(f);
  const Floats k(t * width), v(t * width);
  const Sequence s{0, t, context - t, c.pages.data()};
  measure(state, static_cast<double>(t * width * 2 * (4 + info(f).bytes)), 0, 1,
          [&](index_t i) { dev->store_kv(k.view(t, width), v.view(t, width), c.shape, i % layers, {&s, 1}); });
}

// ---- what a fork costs ---------------------------------------------------------------------------------------------------------------

void fork_join(benchmark::State& state) {
  for (auto _ : state) dev->parallel_for(dev->threads(), 1, [](index_t, index_t) {});
}

void register_all() {
  const auto add = [](const std::string& name, auto&& f, std::vector<std::vector<std::int64_t>> arguments) {
    auto* b = benchmark::RegisterBenchmark(name.c_str(), f)->UseRealTime()->MinTime(0.15);
    for (const auto& a : arguments) b->Args(a);
  };
  add("fork_join", fork_join, {{}});
  add("rmsnorm[T,2048]/T", rmsnorm, {{1}, {512}});
  add("add_rmsnorm[T,2048]/T", add_rmsnorm, {{1}, {512}});
  add("rope[T,2048]/T/interleaved", rope, {{1, 0}, {512, 0}, {512, 1}});
  add("swiglu[T,5632]/T", swiglu, {{1}, {512}});
  add("softmax[T,32000]/T", softmax, {{1}, {64}});
  for (const Format f : {Format::f16, Format::f32}) {
    const std::string name(info(f).name);
    add("store_kv<" + name + ">/T", [f](benchmark::State& s) { store_kv(s, f); }, {{1}, {512}});
    add("attention_prefill<" + name + ">/T", [f](benchmark::State& s) { prefill(s, f, Compute::bf16); }, {{512}, {2048}});
    add("attention_prefill<" + name + ", computed in f32>/T", [f](benchmark::State& s) { prefill(s, f, Compute::f32); }, {{512}, {2048}});
    add("attention_decode<" + name + ">/length", [f](benchmark::State& s) { decode(s, f); }, {{512}, {2048}});
  }
  for (const Format f : {Format::bf16, Format::q6_K})
    for (const bool packed : {false, true})
      add("embedding<" + std::string(name(f)) + (packed ? ", packed" : ", rows") + ">[32000,2048]/T", [=](benchmark::State& s) { embedding(s, f, packed); }, {{512}});
  for (const FormatInfo& format : formats)
    for (const auto& [n, k] : {std::array{2 * ffn, hidden}, std::array{hidden, ffn}}) {
      const Format f = format.format;
      const std::string shape = "[" + std::to_string(n) + "," + std::to_string(k) + "]/M";
      add("matmul<" + std::string(format.name) + ">" + shape, [=, n = n, k = k](benchmark::State& s) { matmul(s, f, n, k, Compute::automatic); },
          {{1}, {16}, {128}, {512}});
      if (f == Format::q4_K && k == hidden)
        add("matmul<q4_K, computed in f32>" + shape, [=, n = n, k = k](benchmark::State& s) { matmul(s, f, n, k, Compute::f32); }, {{1}, {128}});
    }
}

}  // namespace

int main(int argc, char** argv) {
  int threads = 0, kept = 1;
  for (int i = 1; i < argc; ++i) {
    if (std::strncmp(argv[i], "--threads=", 10) == 0) threads = std::atoi(argv[i] + 10);
    else argv[kept++] = argv[i];
  }
  argc = kept;
  dev = std::make_unique<Cpu>(Cpu::Options{.threads = threads});
  limits = bench::measure_limits(*dev);
  benchmark::AddCustomContext("instruction set", std::string(dev->instruction_set()));
  benchmark::AddCustomContext("threads", std::to_string(dev->threads()));
  bench::describe(limits, benchmark::AddCustomContext);
  register_all();
  benchmark::Initialize(&argc, argv);
  if (benchmark::ReportUnrecognizedArguments(argc, argv)) return 2;
  benchmark::RunSpecifiedBenchmarks();
  benchmark::Shutdown();
  return 0;
}
