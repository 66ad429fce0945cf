// Training of TinyLlama-1.1B on a card: tokens a second of whole steps, and each operation of a step by itself beside its limit.
//
//   cuda_training_bench [batch [tokens [steps [checkpointing: none, selective, layer [precision: bf16, fp8; then no parts [launches: plain, a kernel at a time]]]]]]
#include <tinyllama/cuda_training.hpp>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <string>
#include <vector>

namespace tl = tinyllama;

namespace {

using C = tl::tinyllama_1b;
using A = tl::bf16;
template <class T>
using M = tl::View<T, tl::dyn, tl::dyn>;

double median(std::vector<double> v) {
  std::sort(v.begin(), v.end());
  return v[v.size() / 2];
}
double now() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

void steps(tl::Cuda& dev, tl::index_t B, tl::index_t T, int count, tl::Checkpointing how, bool fp8, tl::Moments moments) {
  tl::Trainer<C, tl::Cuda> trainer(dev, {.peak_lr = 1e-4f, .precision = fp8 ? tl::Precision::fp8 : tl::Precision::bf16, .moments = moments, .checkpointing = how, .tokens = T});
  std::vector<std::int32_t> ids(static_cast<std::size_t>(B * T)), next(ids.size());
  for (std::size_t i = 0; i < ids.size(); ++i)
    ids[i] = static_cast<std::int32_t>(tl::random_bits(1, i) % C::vocab), next[i] = static_cast<std::int32_t>(tl::random_bits(1, i + 1) % C::vocab);
  std::vector<double> seconds;
  for (int i = 0; i < count; ++i) {
    const double start = now();
    const float loss = trainer.step(ids, next);
    dev.synchronize();
    if (i > 0) seconds.push_back(now() - start);
    std::printf("step %d  loss %.4f  norm %.3f  %.1f ms\n", i + 1, static_cast<double>(loss), static_cast<double>(trainer.report().gradient_norm), 1e3 * (now() - start));
  }
  const double s = median(seconds), rate = static_cast<double>(B * T) / s;
  const tl::TrainingPlan plan = tl::training_plan<C, tl::Cuda>({.batch = B, .tokens = T, .checkpointing = how, .precision = trainer.options().precision, .moments = moments});
  std::printf("graphs launched: %d\n", tl::training_of(dev).repeated);
  C seen;
  const double flops = 6.0 * static_cast<double>(tl::matmul_parameter_count(seen)) + 12.0 * C::layers * C::hidden * static_cast<double>(T);
  std::printf("B=%d T=%d  %.1f ms a step (best %.1f)  %.0f tokens/s  %.1f TFLOP/s = %.1f%% of 989  %.1f GiB in use, %.2f GiB the trainer's, %.2f of the device at most, planned %.2f and %.2f\n", static_cast<int>(B), static_cast<int>(T), 1e3 * s,
              1e3 * *std::min_element(seconds.begin(), seconds.end()), rate, rate * flops * 1e-12, rate * flops / 989e10, static_cast<double>(dev.card_bytes_in_use()) / (1 << 30),
              static_cast<double>(trainer.bytes()) / (1 << 30), static_cast<double>(dev.most_bytes_in_use()) / (1 << 30), static_cast<double>(plan.total() - plan.scratch) / (1 << 30), static_cast<double>(plan.total()) / (1 << 30));
}

/// One operation: milliseconds, times in a step, FLOPs and bytes.
struct Row {
  std::string name;
  double ms, times, flops, bytes;
};

void parts(tl::Cuda& dev, tl::index_t B, tl::index_t T) {
  const tl::index_t R = B * T, d = C::hidden, f = C::ffn, q = d + 2 * C::kv_heads * 64, V = C::vocab, L = std::min<tl::index_t>(R, tl::default_logits_rows(&dev));
  const auto halves = [&](tl::index_t n) {
    tl::Memory<tl::Cuda> m(dev, static_cast<std::size_t>(n) * 2);
    std::vector<std::uint16_t> v(std::size_t{1} << 20);
    for (std::size_t i = 0; i < v.size(); ++i) v[i] = tl::bf16(static_cast<float>(static_cast<double>(tl::random_bits(5, i) >> 11) * 0x1p-52 - 1)).bits;
    for (std::size_t at = 0; at < m.bytes(); at += 2 * v.size()) dev.upload(m.data() + at, v.data(), std::min(2 * v.size(), m.bytes() - at));
    return m;
  };
  const auto wide = halves(R * 2 * f), gated = halves(R * f), a = halves(R * d), b = halves(R * d), again = halves(R * f), qkv = halves(R * q), dqkv = halves(R * q), w = halves(std::max(V, 2 * f) * d), logits = halves(L * V);
  const tl::Memory<tl::Cuda> x(dev, static_cast<std::size_t>(R * d) * 4), y(dev, static_cast<std::size_t>(R * d) * 4), lse(dev, static_cast<std::size_t>(R) * 128), delta(dev, static_cast<std::size_t>(R) * 128),
      gradient(dev, static_cast<std::size_t>(std::max(V, 2 * f) * d) * 4), vectors(dev, static_cast<std::size_t>(R) * 8 + 65536), angles(dev, static_cast<std::size_t>(R) * 64 * 4);
  for (const auto* m : {&x, &y, &gradient, &vectors, &angles}) tl::fill(dev, reinterpret_cast<float*>(m->data()), static_cast<tl::index_t>(m->bytes() / 4), 0.5f);
  const auto half = [](const tl::Memory<tl::Cuda>& m, tl::index_t rows, tl::index_t n) { return M<A>(reinterpret_cast<A*>(m.data()), {rows, n}); };
  const auto full = [](const tl::Memory<tl::Cuda>& m, tl::index_t rows, tl::index_t n) { return M<float>(reinterpret_cast<float*>(m.data()), {rows, n}); };
  std::vector<tl::Sequence> batch;
  for (tl::index_t i = 0; i < B; ++i) batch.push_back({.first_row = i * T, .tokens = T});
  const tl::HeadShape heads{C::heads, C::kv_heads, 64};

  std::vector<Row> rows;
  const auto time = [&](std::string name, double times, double flops, double bytes, const std::function<void()>& run) {
    run();
    std::vector<double> s;
    for (int i = 0; i < 5; ++i) {
      const tl::cuda::Event begin(true), end(true);
      begin.record(dev.stream());
      run(), run();
      end.record(dev.stream());
      end.synchronize();
      s.push_back(end.since(begin) / 2);
    }
    rows.push_back({std::move(name), 1e3 * median(s), times, flops, bytes});
  };
  const double layers = C::layers;
  const auto matmul = [&](const std::string& name, double times, const tl::Memory<tl::Cuda>& in, tl::index_t k, const tl::Memory<tl::Cuda>& out, tl::index_t n, tl::index_t tokens) {
    const double flops = 2.0 * static_cast<double>(tokens * k * n);
    time(name + " forward", times, flops, 0, [&] { tl::gemm(dev, half(out, tokens, n), half(in, tokens, k), half(w, n, k)); });
    time(name + " d input", times, flops, 0, [&] { tl::gemm(dev, half(in, tokens, k), half(out, tokens, n), tl::transposed(M<const A>(half(w, n, k)))); });
    time(name + " d weight", times, flops, 0, [&] { tl::gemm(dev, full(gradient, n, k), tl::transposed(M<const A>(half(out, tokens, n))), tl::transposed(M<const A>(half(in, tokens, k)))); });
  };
  matmul("qkv", layers, a, d, qkv, q, R), matmul("o", layers, a, d, b, d, R), matmul("gate_up", layers, a, d, wide, 2 * f, R), matmul("down", layers, gated, f, b, d, R);
  matmul("head", static_cast<double>(R) / static_cast<double>(L), a, d, logits, V, L);
  const double causal = static_cast<double>(R * T) * static_cast<double>(d);
  time("attention forward", layers, 2 * causal, 0, [&] { tl::flash_attention(dev, half(a, R, d), full(lse, R, 32), half(qkv, R, q), batch, heads, {}); });
  time("attention backward", layers, 5 * causal, 0, [&] {
    tl::flash_attention_backward(dev, half(dqkv, R, q), half(b, R, d), half(qkv, R, q), half(a, R, d), full(lse, R, 32), batch, heads, reinterpret_cast<float*>(delta.data()), {});
  });
  auto* vector = reinterpret_cast<float*>(vectors.data());
  const double rd = static_cast<double>(R * d), rf = static_cast<double>(R * f);
  time("add + rmsnorm", 2 * layers, 0, 12 * rd, [&] { tl::add_rmsnorm(dev, half(a, R, d), full(x, R, d), full(y, R, d), half(b, R, d), vector, 1e-5f); });
  time("rmsnorm backward", 2 * layers, 0, 18 * rd, [&] { tl::rmsnorm_backward(dev, full(x, R, d), half(a, R, d), half(b, R, d), full(y, R, d), vector, vector + 4096, 1e-5f, nullptr, half(again, R, d)); });
  const auto gate = tl::columns(half(wide, R, 2 * f), 0, f), up = tl::columns(half(wide, R, 2 * f), f, 2 * f);
  time("swiglu", layers, 0, 6 * rf, [&] { dev.swiglu(half(gated, R, f), gate, up); });
  time("swiglu backward", layers, 0, 12 * rf, [&] { tl::swiglu_backward(dev, gate, up, half(gated, R, f), gate, up, half(again, R, f)); });
  time("rope, both ways", 2 * layers, 0, 4.0 * static_cast<double>(R) * (36 * 64), [&] {
    dev.rope(tl::columns(half(qkv, R, q), 0, 36 * 64), full(angles, R, 32), full(angles, R, 32), 36, tl::RopeLayout::half);
  });
  std::vector<std::int32_t> targets(static_cast<std::size_t>(R));
  for (std::size_t i = 0; i < targets.size(); ++i) targets[i] = static_cast<std::int32_t>(tl::random_bits(2, i) % C::vocab);
  const tl::Memory<tl::Cuda> on_card(dev, targets.size() * 4);
  dev.upload(on_card.data(), targets.data(), targets.size() * 4);
  time("cross-entropy", static_cast<double>(R) / static_cast<double>(L), 0, 4.0 * static_cast<double>(L * V), [&] {
    tl::cross_entropy(dev, half(logits, L, V), half(logits, L, V), std::span(reinterpret_cast<const std::int32_t*>(on_card.data()), static_cast<std::size_t>(L)), vector + 8192, reinterpret_cast<float*>(delta.data()));
  });
  std::vector<std::int32_t> rows_of_ids(static_cast<std::size_t>(tl::id_rows_words(&dev, R, V)));
  tl::id_rows(dev, rows_of_ids.data(), targets, V);
  const tl::Memory<tl::Cuda> id_rows(dev, rows_of_ids.size() * sizeof(std::int32_t));
  dev.upload(id_rows.data(), rows_of_ids.data(), id_rows.bytes());
  time("embedding backward", 1, 0, 12 * rd,
       [&] { tl::embedding_backward(dev, full(gradient, V, d), targets, reinterpret_cast<const std::int32_t*>(id_rows.data()), full(x, R, d)); });
  double total = 0;
  std::printf("\n%-22s %9s %6s %9s %9s %9s %7s\n", "operation", "ms", "times", "ms/step", "TFLOP/s", "GB/s", "share");
  for (const Row& r : rows) {
    const double rate = r.flops > 0 ? r.flops / r.ms * 1e-9 : r.bytes / r.ms * 1e-6;
    std::printf("%-22s %9.3f %6.0f %9.2f %9.0f %9.0f %6.0f%%\n", r.name.c_str(), r.ms, r.times, r.ms * r.times, r.flops > 0 ? rate : 0.0, r.flops > 0 ? 0.0 : rate, 100 * (r.flops > 0 ? rate / 769 : rate / 2985));
    total += r.ms * r.times;
  }
  std::printf("together %.1f ms a step, without the optimizer\n", total);
}

void optimizer(tl::Cuda& dev) {
  const auto n = static_cast<tl::index_t>(tl::parameter_count(C{}));
  const tl::Memory<tl::Cuda> state(dev, static_cast<std::size_t>(n) * 16), rounded(dev, static_cast<std::size_t>(n) * 2);
  auto* p = reinterpret_cast<float*>(state.data());
  tl::fill(dev, p, 4 * n, 1e-3f);
  const std::vector<tl::AdamwRange> ranges{{n, true}};
  const auto time = [&](const std::string& name, double bytes, auto&& run) {
    std::vector<double> s;
    for (int i = 0; i < 5; ++i) {
      const tl::cuda::Event begin(true), end(true);
      begin.record(dev.stream());
      run();
      end.record(dev.stream());
      end.synchronize();
      s.push_back(end.since(begin));
    }
    std::printf("%-22s %9.3f ms  %.0f GB/s\n", name.c_str(), 1e3 * median(s), 1e-9 * bytes * static_cast<double>(n) / median(s));
  };
  for (const tl::MomentFormat& f : tl::moment_formats) {
    const auto moment = [&](tl::index_t i) { return tl::MomentArray(f.moments, reinterpret_cast<std::byte*>(p + i), n); };
    const tl::AdamwTask t{p, moment(n), moment(2 * n), p + 3 * n, n, 1e-4f, 0.9f, 0.95f, 1e-8f, 0.1f, 0.5f, 0.5f, 1.0f};
    if (f.moments != tl::Moments::f32) dev.zero(p + n, static_cast<std::size_t>(n) * 8);
    time("adamw, moments " + std::string(f.name), 14 + 4 * static_cast<double>(tl::moment_bytes(f.moments, n)) / static_cast<double>(n), [&] { tl::adamw(dev, t, ranges, reinterpret_cast<A*>(rounded.data())); });
  }
  time("norm", 4, [&] { tl::sum_of_squares(dev, p, n); });
}

}  // namespace

int main(int argc, char** argv) {
  const auto number = [&](int i, int otherwise) { return argc > i ? std::atoi(argv[i]) : otherwise; };
  const tl::index_t B = number(1, 16), T = number(2, 2048);
  const std::string how = argc > 4 ? argv[4] : "selective";
  tl::Moments moments = tl::Moments::f32;
  for (const tl::MomentFormat& f : tl::moment_formats)
    if (argc > 7 && f.name == argv[7]) moments = f.moments;
  try {
    tl::Cuda dev;
    tl::training_of(dev).records = !(argc > 6 && std::string(argv[6]) == "plain");
    const bool cudnn = tl::training_of(dev).uses_cudnn(B, T, {C::heads, C::kv_heads, 64});
    std::printf("%s  attention: %s\n", dev.name().c_str(), cudnn ? "cuDNN" : tl::training_of(dev).cudnn_failure().c_str());
    steps(dev, B, T, number(3, 8), how == "none" ? tl::Checkpointing::none : how == "layer" ? tl::Checkpointing::layer : tl::Checkpointing::selective, argc > 5 && std::string(argv[5]) == "fp8", moments);
  } catch (const std::exception& e) {
    std::printf("error: %s\n", e.what());
    return 1;
  }
  if (argc > 5) return 0;
  try {
    tl::Cuda dev;
    parts(dev, B, T);
  } catch (const std::exception& e) {
    std::printf("error: %s\n", e.what());
  }
  try {
    tl::Cuda dev;
    optimizer(dev);
  } catch (const std::exception& e) {
    std::printf("error: %s\n", e.what());
  }
}
