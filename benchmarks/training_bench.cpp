// A training step at TinyLlama's width and its parts, beside the machine's limits measured in the same run.
#include <benchmark/benchmark.h>

#include <tinyllama/training.hpp>

#include <cstdio>

#include "limits.hpp"

namespace tl = tinyllama;

namespace {

tl::bench::Limits limits;

struct width_2 : tl::tinyllama_1b { static constexpr int layers = 2; };
struct width_4 : tl::tinyllama_1b { static constexpr int layers = 4; };

/// FLOPs a second, and their share of what the multiply units give.
void report(benchmark::State& state, double flops, bool bf16) {
  const double limit = bf16 ? limits.bf16_dot.best : limits.f32_fma.best;
  state.counters["GFLOP/s"] = benchmark::Counter(flops * 1e-9, benchmark::Counter::kIsIterationInvariantRate);
  state.counters[bf16 ? "share_of_bf16" : "share_of_f32"] = benchmark::Counter(flops / limit, benchmark::Counter::kIsIterationInvariantRate);
}

void bytes(benchmark::State& state, double n) {
  state.counters["GB/s"] = benchmark::Counter(n * 1e-9, benchmark::Counter::kIsIterationInvariantRate);
  state.counters["share_of_read"] = benchmark::Counter(n / limits.read.best, benchmark::Counter::kIsIterationInvariantRate);
}

/// Floats in the device's memory, on huge pages as a trainer's are.
struct Floats {
  tl::Memory<tl::Cpu> memory;
  Floats(tl::Cpu& dev, tl::index_t n) : memory(dev, static_cast<std::size_t>(n) * sizeof(float)) { tl::fill(dev, data(), n, 0.0f); }
  float* data() const { return reinterpret_cast<float*>(memory.data()); }
};
Floats random(tl::Cpu& dev, tl::index_t n) {
  Floats v(dev, n);
  for (std::size_t i = 0; i < static_cast<std::size_t>(n); ++i) v.data()[i] = static_cast<float>(static_cast<double>(tl::random_bits(3, i) >> 11) * 0x1p-52 - 1);
  return v;
}

template <class C>
void step(benchmark::State& state, tl::index_t T, bool bf16) {
  tl::Cpu dev;
  tl::Trainer<C> trainer(dev, {.peak_lr = 1e-5f, .precision = bf16 ? tl::Precision::bf16 : tl::Precision::f32, .tokens = T});
  std::vector<std::int32_t> ids(static_cast<std::size_t>(T)), next(ids.size());
  for (std::size_t i = 0; i < ids.size(); ++i) ids[i] = static_cast<std::int32_t>(tl::random_bits(1, i) % C::vocab), next[i] = static_cast<std::int32_t>(tl::random_bits(2, i) % C::vocab);
  trainer.step(ids, next);
  for (auto _ : state) benchmark::DoNotOptimize(trainer.step(ids, next));
  // Causal: half of the T x T products of attention are there; forward 1, backward 2 times (what is computed again is not counted).
  report(state, static_cast<double>(T) * (6.0 * static_cast<double>(tl::matmul_parameter_count(C{})) + 6.0 * C::layers * C::hidden * static_cast<double>(T)), bf16);
  state.counters["tokens/s"] = benchmark::Counter(static_cast<double>(T), benchmark::Counter::kIsIterationInvariantRate);
}

void gemm(benchmark::State& state, tl::index_t m, tl::index_t n, tl::index_t k, bool a_transposed, bool b_transposed, bool bf16) {
  tl::Cpu dev;
  const Floats a = random(dev, m * k), b = random(dev, n * k), y(dev, m * n);
  using M = tl::View<const float, tl::dyn, tl::dyn>;
  const M left = a_transposed ? M(tl::transposed(M(a.data(), {k, m}))) : M(a.data(), {m, k}), right = b_transposed ? M(tl::transposed(M(b.data(), {k, n}))) : M(b.data(), {n, k});
  for (auto _ : state) tl::gemm(dev, tl::View<float, tl::dyn, tl::dyn>(y.data(), {m, n}), left, right, {.bf16 = bf16});
  report(state, 2.0 * static_cast<double>(m * n * k), bf16);
}

void attention(benchmark::State& state, tl::index_t T, bool backward, bool bf16) {
  tl::Cpu dev;
  const tl::HeadShape heads{32, 4, 64};
  using M = tl::View<float, tl::dyn, tl::dyn>;
  const Floats qkv = random(dev, T * 2560), d_out = random(dev, T * 2048), out(dev, T * 2048), lse(dev, T * 32), dqkv(dev, T * 2560), memory(dev, 2 * T * 2048);
  const std::vector<tl::Sequence> batch{{0, T, 0, nullptr}};
  const M q(qkv.data(), {T, 2560}), o(out.data(), {T, 2048}), d(d_out.data(), {T, 2048}), l(lse.data(), {T, 32}), dq(dqkv.data(), {T, 2560});
  tl::flash_attention(dev, o, l, q, batch, heads, {.bf16 = bf16});
  for (auto _ : state) {
    if (backward) tl::flash_attention_backward(dev, dq, d, q, o, l, batch, heads, memory.data(), {.bf16 = bf16});
    else tl::flash_attention(dev, o, l, q, batch, heads, {.bf16 = bf16});
  }
  report(state, (backward ? 5.0 : 2.0) * static_cast<double>(T * T) * 2048, bf16);  // causal: half of 2 T T hidden a product
}

void adamw(benchmark::State& state, tl::index_t n) {
  tl::Cpu dev;
  tl::Memory<tl::Cpu> memory(dev, static_cast<std::size_t>(n) * 16);
  auto* p = reinterpret_cast<float*>(memory.data());
  tl::fill(dev, p, 4 * n, 0.5f);
  const tl::AdamwTask t{p, p + n, p + 2 * n, p + 3 * n, n, 1e-4f, 0.9f, 0.95f, 1e-8f, 0.1f, 0.5f, 0.5f, 1.0f};
  for (auto _ : state) tl::adamw(dev, t);
  bytes(state, static_cast<double>(n) * 28);
}

template <class F>
void add(const std::string& name, F f) {
  benchmark::RegisterBenchmark(name.c_str(), f)->Unit(benchmark::kMillisecond)->UseRealTime();
}

}  // namespace

int main(int argc, char** argv) {
  for (const bool bf16 : {true, false}) {
    const std::string suffix = bf16 ? "/bf16" : "/f32";
    for (const tl::index_t T : {512, 2048}) {
      add("step/layers2/T" + std::to_string(T) + suffix, [=](benchmark::State& s) { step<width_2>(s, T, bf16); });
      add("step/layers4/T" + std::to_string(T) + suffix, [=](benchmark::State& s) { step<width_4>(s, T, bf16); });
      add("attention/forward/T" + std::to_string(T) + suffix, [=](benchmark::State& s) { attention(s, T, false, bf16); });
      add("attention/backward/T" + std::to_string(T) + suffix, [=](benchmark::State& s) { attention(s, T, true, bf16); });
      // gate and up: y = x W^T, dx = dy W, dW = dy^T x
      add("gemm/forward/T" + std::to_string(T) + suffix, [=](benchmark::State& s) { gemm(s, T, 11264, 2048, false, false, bf16); });
      add("gemm/d_input/T" + std::to_string(T) + suffix, [=](benchmark::State& s) { gemm(s, T, 2048, 11264, false, true, bf16); });
      add("gemm/d_weight/T" + std::to_string(T) + suffix, [=](benchmark::State& s) { gemm(s, 11264, 2048, T, true, true, bf16); });
    }
  }
  add("adamw/64M", [](benchmark::State& s) { adamw(s, 64 << 20); });
  benchmark::Initialize(&argc, argv);
  {
    tl::Cpu dev;
    limits = tl::bench::measure_limits(dev);
  }
  tl::bench::describe(limits, benchmark::AddCustomContext);
  benchmark::RunSpecifiedBenchmarks();
}
