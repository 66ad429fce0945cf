// Prefill and decode of a whole model, beside the machine's limits measured in the same run.
//   make_checkpoint --preset tinyllama_1b --out DIR_OR_GGUF ... ; model_bench --model=PATH [--model=PATH ...]
#include <benchmark/benchmark.h>

#include <tinyllama/tinyllama.hpp>

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <memory>

#include "limits.hpp"

namespace tl = tinyllama;

namespace {

tl::bench::Limits limits;

struct Loaded {
  tl::Cpu dev;
  tl::Checkpoint file;
  tl::Model<tl::any_llama, tl::Cpu> model;
  std::size_t read_bytes = 0;  // weights that a decoded token reads
  explicit Loaded(const std::string& path)
      : file(tl::open_checkpoint(path)), model(tl::load<tl::any_llama>(dev, file, {.tokenizer = false})) {
    tl::for_each_parameter(file.config, [&](const tl::Parameter& p) {
      if (p.role != tl::Role::embedding || file.config.tied) read_bytes += tl::stored_bytes(p, file.tensor(p).format, file.config.tied);
    });
  }
};

std::vector<std::int32_t> ids(tl::index_t n, int vocab) {
  std::vector<std::int32_t> v;
  for (tl::index_t i = 0; i < n; ++i) v.push_back(static_cast<std::int32_t>((i * 7919 + 13) % vocab));
  return v;
}

void prefill(benchmark::State& state, Loaded& m, tl::index_t n) {
  auto session = m.model.start();
  const auto prompt = ids(n, m.file.config.vocab);
  for (auto _ : state) {
    session.truncate(0);
    benchmark::DoNotOptimize(session.prefill(prompt).data());
  }
  state.counters["tokens/s"] = benchmark::Counter(static_cast<double>(n), benchmark::Counter::kIsIterationInvariantRate);
  const double flops = static_cast<double>(n) * (2.0 * static_cast<double>(tl::matmul_parameter_count(m.file.config)) -
                                                 2.0 * m.file.config.vocab * m.file.config.hidden +
                                                 2.0 * m.file.config.layers * m.file.config.hidden * static_cast<double>(n)) +
                       2.0 * m.file.config.vocab * m.file.config.hidden;
  state.counters["GFLOP/s"] = benchmark::Counter(flops * 1e-9, benchmark::Counter::kIsIterationInvariantRate);
}

/// Seconds to read as many bytes of the weights as a step reads, with the same threads.
double read_weights(Loaded& m) {
  constexpr std::size_t unit = std::size_t{256} << 10;
  const std::byte* from = m.model.weights().memory.data() + (m.model.weights().memory.bytes() - m.read_bytes) / 64 * 64;
  const double start = tl::bench::now();
  m.dev.parallel_for(static_cast<tl::index_t>(m.read_bytes / unit), 1, [&](tl::index_t begin, tl::index_t) {
    tl::bench::detail::read(reinterpret_cast<const float*>(from + static_cast<std::size_t>(begin) * unit), unit / sizeof(float));
  });
  return (tl::bench::now() - start) * static_cast<double>(m.read_bytes) / static_cast<double>(m.read_bytes / unit * unit);
}

/// One token for each of `batch` sequences that stand at `position`, greedy sampling included. The bandwidth of a shared machine changes within
/// seconds, so each step is followed by a plain read of the same weights; the share is the median of the pairs' ratios.
void decode(benchmark::State& state, Loaded& m, tl::index_t position, std::size_t batch) {
  std::vector<tl::Session<tl::any_llama, tl::Cpu>> sessions;
  sessions.push_back(m.model.start());
  sessions.front().prefill(ids(position, m.file.config.vocab));
  while (sessions.size() < batch) sessions.push_back(sessions.front());
  std::vector<tl::Session<tl::any_llama, tl::Cpu>*> each;
  for (auto& s : sessions) each.push_back(&s);
  std::vector<std::int32_t> next = ids(static_cast<tl::index_t>(batch), m.file.config.vocab);
  const auto step = [&] {
    for (auto& s : sessions) s.truncate(position);
    const auto logits = tl::decode_batch<tl::any_llama, tl::Cpu>(each, next);
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
}

}  // namespace

int main(int argc, char** argv) {
  std::vector<std::unique_ptr<Loaded>> models;
  int kept = 1;
  for (int i = 1; i < argc; ++i) {
    if (std::strncmp(argv[i], "--model=", 8) != 0) {
      argv[kept++] = argv[i];
      continue;
    }
    const std::string path = argv[i] + 8, name = path.substr(path.find_last_of('/') + 1);
    Loaded& m = *models.emplace_back(std::make_unique<Loaded>(path));
    for (const tl::index_t n : {128, 512, 2048})
      benchmark::RegisterBenchmark((name + "/prefill/" + std::to_string(n)).c_str(), [&m, n](benchmark::State& s) { prefill(s, m, n); })
          ->Unit(benchmark::kMillisecond)->UseRealTime();
    for (const tl::index_t n : {16, 1024})
      benchmark::RegisterBenchmark((name + "/decode/" + std::to_string(n)).c_str(), [&m, n](benchmark::State& s) { decode(s, m, n, 1); })
          ->Unit(benchmark::kMillisecond)->UseManualTime();
    for (const std::size_t n : {1, 2, 4, 8, 16, 32})
      benchmark::RegisterBenchmark((name + "/batch/" + std::to_string(n)).c_str(), [&m, n](benchmark::State& s) { decode(s, m, 64, n); })
          ->Unit(benchmark::kMillisecond)->UseManualTime();
  }
  argc = kept;
  benchmark::Initialize(&argc, argv);
  if (models.empty()) {
    std::fprintf(stderr, "usage: model_bench --model=PATH [--model=PATH ...] [--benchmark_...]\n");
    return 2;
  }
  {
    tl::Cpu dev;
    limits = tl::bench::measure_limits(dev);
  }
  tl::bench::describe(limits, benchmark::AddCustomContext);
  benchmark::RunSpecifiedBenchmarks();
}
