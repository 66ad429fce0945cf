// Prefill and decode of a whole model, beside the machine's limits measured in the same run.
//   make_checkpoint --preset tinyllama_1b --out DIR_OR_GGUF ... ; model_bench [--device=cuda] --model=PATH [--model=PATH ...]
#include <benchmark/benchmark.h>

#if defined(TINYLLAMA_CUDA)
#include <tinyllama/cuda.hpp>
#endif
#include <tinyllama/tinyllama.hpp>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>

#include "limits.hpp"

namespace tl = tinyllama;

namespace {

tl::bench::Limits limits;
tl::Format cache = tl::LoadOptions().cache;
tl::index_t chunk = 0;  // tokens of a step of prefill; 0: the device's own

template <class D>
struct Loaded {
  D dev;
  tl::Checkpoint file;
  tl::Model<tl::any_llama, D> model;
  std::size_t read_bytes = 0;  // weights that a decoded token reads
  tl::Memory<D> copy;
  explicit Loaded(const std::string& path)
      : file(tl::open_checkpoint(path)), model(tl::load<tl::any_llama>(dev, file, {.cache = cache, .tokenizer = false})) {
    tl::for_each_parameter(file.config, [&](const tl::Parameter& p) {
      if (p.role != tl::Role::embedding || file.config.tied) read_bytes += tl::stored_bytes<D>(p, file.tensor(p).format, file.config.tied);
    });
  }
};

std::vector<std::int32_t> ids(tl::index_t n, int vocab) {
  std::vector<std::int32_t> v;
  for (tl::index_t i = 0; i < n; ++i) v.push_back(static_cast<std::int32_t>((i * 7919 + 13) % vocab));
  return v;
}

template <class D>
tl::index_t step_tokens() { return tl::prefill_chunk<D>(chunk); }

/// What an iteration computes and reads of the weights: a point for roofline.py.
template <class D>
void rates(benchmark::State& state, const Loaded<D>& m, double flops, tl::index_t passes) {
  state.counters["GFLOP/s"] = benchmark::Counter(flops * 1e-9, benchmark::Counter::kIsIterationInvariantRate);
  state.counters["GB/s"] = benchmark::Counter(static_cast<double>(m.read_bytes) * static_cast<double>(passes) * 1e-9, benchmark::Counter::kIsIterationInvariantRate);
}

template <class D>
void prefill(benchmark::State& state, Loaded<D>& m, tl::index_t n) {
  auto session = m.model.start();
  const auto prompt = ids(n, m.file.config.vocab);
  for (auto _ : state) {
    session.truncate(0);
    benchmark::DoNotOptimize(session.prefill(prompt, {.chunk = chunk}).data());
  }
  state.counters["tokens/s"] = benchmark::Counter(static_cast<double>(n), benchmark::Counter::kIsIterationInvariantRate);
  const double flops = static_cast<double>(n) * (2.0 * static_cast<double>(tl::matmul_parameter_count(m.file.config)) -
                                                 2.0 * m.file.config.vocab * m.file.config.hidden +
                                                 2.0 * m.file.config.layers * m.file.config.hidden * static_cast<double>(n)) +
                       2.0 * m.file.config.vocab * m.file.config.hidden;
  rates(state, m, flops, (n + step_tokens<D>() - 1) / step_tokens<D>());
}

/// Seconds to read as many bytes of the weights as a step reads, with the same threads; on a card, to copy half of them, which moves as many.
template <class D>
double read_weights(Loaded<D>& m) {
  const std::byte* from = m.model.weights().memory.data() + (m.model.weights().memory.bytes() - m.read_bytes) / 64 * 64;
  if constexpr (D::host_memory) {
    constexpr std::size_t unit = std::size_t{256} << 10;
    const double start = tl::bench::now();
    m.dev.parallel_for(static_cast<tl::index_t>(m.read_bytes / unit), 1, [&](tl::index_t begin, tl::index_t) {
      tl::bench::detail::read(reinterpret_cast<const float*>(from + static_cast<std::size_t>(begin) * unit), unit / sizeof(float));
    });
    return (tl::bench::now() - start) * static_cast<double>(m.read_bytes) / static_cast<double>(m.read_bytes / unit * unit);
  } else {
    if (m.copy.bytes() == 0) m.copy = tl::Memory<D>(m.dev, m.read_bytes / 2);
    m.dev.synchronize();
    const double start = tl::bench::now();
    m.dev.copy_bytes(m.copy.data(), from, m.read_bytes / 2);
    m.dev.synchronize();
    return tl::bench::now() - start;
  }
}

/// One token for each of `batch` sequences that stand at `position`, greedy sampling included. The bandwidth of a shared machine changes within
/// seconds, so each step is followed by a plain read of the same weights; the share is the median of the pairs' ratios.
template <class D>
void decode(benchmark::State& state, Loaded<D>& m, tl::index_t position, std::size_t batch) {
  std::vector<tl::Session<tl::any_llama, D>> sessions;
  sessions.push_back(m.model.start());
  sessions.front().prefill(ids(position, m.file.config.vocab));
  while (sessions.size() < batch) sessions.push_back(sessions.front());
  std::vector<tl::Session<tl::any_llama, D>*> each;
  for (auto& s : sessions) each.push_back(&s);
  std::vector<std::int32_t> next = ids(static_cast<tl::index_t>(batch), m.file.config.vocab);
  const auto step = [&] {
    for (auto& s : sessions) s.truncate(position);
    const auto logits = tl::decode_batch<tl::any_llama, D>(each, next);
    for (std::size_t i = 0; i < batch; ++i) {
      const float* row = &logits(static_cast<tl::index_t>(i), 0);
      next[i] = static_cast<std::int32_t>(std::max_element(row, row + logits.extent(1)) - row);
    }
  };
  step(), read_weights(m);
  std::vector<double> shares;
  for (auto _ : state) {
    const double start = tl::bench::now();
    step();
    const double seconds = tl::bench::now() - start;
    state.SetIterationTime(seconds);
    shares.push_back(read_weights(m) / seconds);
  }
  std::sort(shares.begin(), shares.end());
  state.counters["tokens/s"] = benchmark::Counter(static_cast<double>(batch), benchmark::Counter::kIsIterationInvariantRate);
  state.counters["share_of_read"] = shares[shares.size() / 2];
  rates(state, m,
        static_cast<double>(batch) * (2.0 * static_cast<double>(tl::matmul_parameter_count(m.file.config)) +
                                      4.0 * m.file.config.layers * m.file.config.hidden * static_cast<double>(position + 1)), 1);
}

/// The same at batch 1 with the choice of the token left to the device: 64 tokens a call.
template <class D>
void greedy(benchmark::State& state, Loaded<D>& m, tl::index_t position) {
  constexpr tl::index_t tokens = 64;
  auto session = m.model.start();
  session.prefill(ids(position, m.file.config.vocab));
  session.decode_greedy(1, tokens);
  for (auto _ : state) {
    session.truncate(position);
    benchmark::DoNotOptimize(session.decode_greedy(1, tokens).data());
  }
  state.counters["tokens/s"] = benchmark::Counter(static_cast<double>(tokens), benchmark::Counter::kIsIterationInvariantRate);
}

/// The same for `batch` sequences: 32 steps a call.
template <class D>
void batch_greedy(benchmark::State& state, Loaded<D>& m, tl::index_t position, std::size_t batch) {
  constexpr tl::index_t tokens = 32;
  std::vector<tl::Session<tl::any_llama, D>> sessions;
  sessions.push_back(m.model.start());
  sessions.front().prefill(ids(position, m.file.config.vocab));
  while (sessions.size() < batch) {
    sessions.push_back(m.model.start());
    sessions.back().prefill(ids(position, m.file.config.vocab));
  }
  std::vector<tl::Session<tl::any_llama, D>*> each;
  for (auto& s : sessions) each.push_back(&s);
  const std::vector<std::int32_t> next = ids(static_cast<tl::index_t>(batch), m.file.config.vocab);
  for (auto _ : state) {
    for (auto& s : sessions) s.truncate(position);
    benchmark::DoNotOptimize(tl::decode_batch_greedy<tl::any_llama, D>(each, next, tokens).data());
  }
  state.counters["tokens/s"] = benchmark::Counter(static_cast<double>(tokens) * static_cast<double>(batch), benchmark::Counter::kIsIterationInvariantRate);
}

/// The benchmarks of one model, which they refer to.
template <class D>
std::shared_ptr<void> register_model(const std::string& path) {
  const std::string name = path.substr(path.find_last_of('/') + 1);
  const auto loaded = std::make_shared<Loaded<D>>(path);
  Loaded<D>& m = *loaded;
  for (const tl::index_t n : {128, 512, 2048})
    benchmark::RegisterBenchmark((name + "/prefill/" + std::to_string(n)).c_str(), [&m, n](benchmark::State& s) { prefill(s, m, n); })
        ->Unit(benchmark::kMillisecond)->UseRealTime();
  for (const tl::index_t n : {16, 1024})
    benchmark::RegisterBenchmark((name + "/decode/" + std::to_string(n)).c_str(), [&m, n](benchmark::State& s) { decode(s, m, n, 1); })
        ->Unit(benchmark::kMillisecond)->UseManualTime();
  if constexpr (!D::host_memory)
    benchmark::RegisterBenchmark((name + "/decode_greedy/16").c_str(), [&m](benchmark::State& s) { greedy(s, m, 16); })->Unit(benchmark::kMillisecond)->UseRealTime();
  for (const std::size_t n : {1, 2, 4, 8, 16, 32})
    benchmark::RegisterBenchmark((name + "/batch/" + std::to_string(n)).c_str(), [&m, n](benchmark::State& s) { decode(s, m, 64, n); })
        ->Unit(benchmark::kMillisecond)->UseManualTime();
  if constexpr (!D::host_memory)
    for (const std::size_t n : {2, 8, 16, 32, 64, 100, 256})
      benchmark::RegisterBenchmark((name + "/batch_greedy/" + std::to_string(n) + "/512").c_str(), [&m, n](benchmark::State& s) { batch_greedy(s, m, 512 - 16, n); })
          ->Unit(benchmark::kMillisecond)->UseRealTime();
  return loaded;
}

}  // namespace

int main(int argc, char** argv) {
  std::vector<std::string> models;
  std::string device = "cpu";
  int kept = 1;
  for (int i = 1; i < argc; ++i) {
    if (std::strncmp(argv[i], "--model=", 8) == 0) models.emplace_back(argv[i] + 8);
    else if (std::strncmp(argv[i], "--device=", 9) == 0) device = argv[i] + 9;
    else if (std::strncmp(argv[i], "--cache=", 8) == 0) cache = tl::parse_format(argv[i] + 8);
    else if (std::strncmp(argv[i], "--chunk=", 8) == 0) chunk = std::atoi(argv[i] + 8);
    else argv[kept++] = argv[i];
  }
  argc = kept;
  benchmark::Initialize(&argc, argv);
  bool known = device == "cpu";
#if defined(TINYLLAMA_CUDA)
  known = known || device == "cuda";
#endif
  if (models.empty() || !known) {
    std::fprintf(stderr, "usage: model_bench [--device=cpu|cuda (where built with CUDA)] --model=PATH [--model=PATH ...] [--cache=f16] [--chunk=512] [--benchmark_...]\n");
    return 2;
  }
  std::vector<std::shared_ptr<void>> loaded;
  if (device == "cpu") {
    for (const std::string& m : models) loaded.push_back(register_model<tl::Cpu>(m));
    tl::Cpu dev;
    limits = tl::bench::measure_limits(dev);
    tl::bench::describe(limits, benchmark::AddCustomContext);
  }
#if defined(TINYLLAMA_CUDA)
  if (device == "cuda")
    for (const std::string& m : models) loaded.push_back(register_model<tl::Cuda>(m));
#endif
  benchmark::RunSpecifiedBenchmarks();
}
