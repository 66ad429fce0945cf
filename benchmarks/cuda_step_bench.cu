// Where the time of a step on a card goes: each operation of all layers alone, in a row, norms with the products before them, beside the card's limits (a copy, a large bf16 product).
//   make_checkpoint --preset tinyllama_1b --format bf16 --out M.gguf; cuda_step_bench M.gguf [SEQUENCES:NEW_TOKENS:POSITION ...]
#include <tinyllama/cuda.hpp>
#include <tinyllama/tinyllama.hpp>

#include <cstdio>
#include <functional>
#include <string>

namespace tl = tinyllama;
using tl::index_t;

namespace {

/// Median seconds of f(), of which `repeats` are timed together by events.
double seconds(tl::Cuda& dev, const std::function<void()>& f, int repeats) {
  f();
  std::vector<double> all;
  for (int i = 0; i < 5; ++i) {
    const tl::cuda::Event begin(true), end(true);
    begin.record(dev.stream());
    for (int r = 0; r < repeats; ++r) f();
    end.record(dev.stream());
    end.synchronize();
    all.push_back(end.since(begin) / repeats);
  }
  std::sort(all.begin(), all.end());
  return all[all.size() / 2];
}

struct Case {
  index_t sequences, tokens, position;
};

}  // namespace

int main(int argc, char** argv) {
  if (argc < 2) {
    std::fprintf(stderr, "usage: cuda_step_bench MODEL [SEQUENCES:NEW_TOKENS:POSITION ...]\n");
    return 2;
  }
  using M = tl::any_llama;
  using A = tl::bf16;
  std::vector<Case> cases;
  for (int i = 2; i < argc; ++i) {
    long long s = 0, t = 0, p = 0;
    if (std::sscanf(argv[i], "%lld:%lld:%lld", &s, &t, &p) != 3) throw tl::Error("cuda_step_bench", "case", "SEQUENCES:NEW_TOKENS:POSITION", argv[i]);
    cases.push_back({static_cast<index_t>(s), static_cast<index_t>(t), static_cast<index_t>(p)});
  }
  if (cases.empty()) cases = {{16, 1, 512}, {100, 1, 512}, {1, 512, 0}, {1, 2048, 0}};
  tl::Cuda dev;
  const auto model = tl::load<M>(dev, argv[1], {.cache = tl::Format::bf16, .tokenizer = false});
  const auto& w = model.weights();
  const M& c = w.config;

  const std::size_t big = std::size_t{1} << 30;
  double copied = 0, multiplied = 0;
  {
    const tl::Memory<tl::Cuda> a(dev, big), b(dev, big);
    copied = 2.0 * static_cast<double>(big) / seconds(dev, [&] { dev.copy_bytes(a.data(), b.data(), big); }, 3);
    constexpr index_t n = 8192;
    std::vector<A> random(static_cast<std::size_t>(n * n));
    std::uint32_t state = 1;
    for (A& x : random) x = A(static_cast<float>(static_cast<std::int32_t>(state = state * 1664525u + 1013904223u)) * 0x1p-31f);
    dev.upload(a.data(), random.data(), random.size() * sizeof(A)), dev.upload(b.data(), random.data(), random.size() * sizeof(A));
    const tl::Memory<tl::Cuda> y(dev, static_cast<std::size_t>(n * n) * sizeof(A));
    const tl::View<A, tl::dyn, tl::dyn> out(reinterpret_cast<A*>(y.data()), {n, n});
    const tl::View<const A, tl::dyn, tl::dyn> in(reinterpret_cast<const A*>(a.data()), {n, n});
    const tl::Linear weights(tl::Matrix{tl::Format::bf16, true, n, n, b.data()});
    multiplied = 2.0 * n * n * n / seconds(dev, [&] { dev.matmul(out, in, weights); }, 3);
  }
  std::printf("%s: copy %.0f GB/s read and written, bf16 product 8192 cubed %.0f TFLOP/s\n", dev.name().c_str(), copied * 1e-9, multiplied * 1e-12);

  for (const Case& k : cases) {
    std::vector<tl::Session<M, tl::Cuda>> sessions;
    std::vector<tl::Sequence> batch;
    std::vector<std::int32_t> ids;
    for (index_t i = 0; i < k.sequences; ++i) {
      auto& s = sessions.emplace_back(model.start());
      std::vector<std::int32_t> prompt(static_cast<std::size_t>(k.position));
      for (std::size_t t = 0; t < prompt.size(); ++t) prompt[t] = static_cast<std::int32_t>((t * 7919 + static_cast<std::size_t>(i)) % static_cast<std::size_t>(c.vocab));
      if (k.position) s.prefill(prompt, {.logits = tl::Logits::none});
    }
    for (auto& s : sessions) {
      batch.push_back({static_cast<index_t>(ids.size()), k.tokens, k.position, s.cache().open(k.tokens)});
      for (index_t t = 0; t < k.tokens; ++t) ids.push_back(static_cast<std::int32_t>((t * 31 + 7) % c.vocab));
    }
    const index_t T = static_cast<index_t>(ids.size()), S = k.sequences, L = c.layers, kv = static_cast<index_t>(c.kv_heads) * tl::head_dim(c), q = c.hidden;
    tl::Workspace<M, tl::Cuda> work;
    work.prepare(dev, c, T, S);
    for (int i = 0; i < 2; ++i) tl::forward(w, std::span<const std::int32_t>(ids), std::span<const tl::Sequence>(batch), work, tl::Logits::last);
    const auto step = dev.batch(ids, batch);
    const auto qkv = work.qkv(), gate_up = work.gate_up();
    const tl::View<A, tl::dyn, tl::dyn> vq = tl::columns(qkv, 0, q);

    double total = 0;
    std::printf("\n%lld sequences, %lld new tokens each behind %lld: us of all layers, share of the step's sum, limit\n", static_cast<long long>(S), static_cast<long long>(k.tokens),
                static_cast<long long>(k.position));
    const auto line = [&](const char* name, double s, double bytes, double flops) {
      total += s;
      const double memory = bytes / s / copied, products = flops / s / multiplied;
      std::printf("  %-15s %9.1f us  %6.0f GB/s %6.1f TFLOP/s  %5.1f%% of %s\n", name, s * 1e6, bytes / s * 1e-9, flops / s * 1e-12, 100 * std::max(memory, products), memory > products ? "memory" : "products");
    };
    const auto each = [&](const char* name, double bytes, double flops, const std::function<void(int)>& f) {
      line(name, seconds(dev, [&] { for (int l = 0; l < c.layers; ++l) f(l); }, 2), bytes * static_cast<double>(L), flops * static_cast<double>(L));
    };
    const auto layer = [&](int l) -> const tl::LayerWeights& { return w.layers[static_cast<std::size_t>(l)]; };
    const auto product = [&](const char* name, const tl::Linear& shape, double out_bytes, const std::function<void(int)>& f) {
      const double n = static_cast<double>(shape.rows()), m = static_cast<double>(shape.columns()), t = static_cast<double>(T);
      double weights = 0;
      for (int i = 0; i < shape.parts; ++i) weights += static_cast<double>(tl::Cuda::packed_bytes(shape.part[static_cast<std::size_t>(i)].format, shape.part[static_cast<std::size_t>(i)].rows, shape.columns()));
      each(name, weights + t * (2 * m + out_bytes * n), 2 * t * n * m, f);
    };
    const double t = static_cast<double>(T), h = static_cast<double>(c.hidden);
    product("qkv, rope", layer(0).qkv, 2, [&](int l) { dev.matmul_rope_store_kv(qkv, work.normed(), layer(l).qkv, work.cos(), work.sin(), w.rope, w.cache, l, step); });
    double positions = 0;
    for (index_t i = 0; i < k.tokens; ++i) positions += static_cast<double>((k.position + i + 1) * S);
    each("attention", (static_cast<double>(k.position + k.tokens) * static_cast<double>(S * 2 * kv) + 2 * t * h) * 2, 4 * positions * h, [&](int l) { dev.attention(work.attended(), vq, w.cache, l, step); });
    product("o, norm", layer(0).o, 10, [&](int l) {
      dev.matmul_add_rmsnorm(work.projected(), work.normed(), work.attended(), layer(l).o, work.x(), layer(l).ffn_norm, c.norm_eps, layer(l).gate_up);
    });
    product("gate, up, gated", layer(0).gate_up, 1, [&](int l) { dev.matmul_swiglu(work.gated(), gate_up, work.normed(), layer(l).gate_up); });
    product("down, norm", layer(0).down, 10, [&](int l) {
      dev.matmul_add_rmsnorm(work.projected(), work.normed(), work.gated(), layer(l).down, work.x(), layer(l).attn_norm, c.norm_eps, layer(l).qkv);
    });
    {
      const double v = static_cast<double>(c.vocab), s = static_cast<double>(S);
      line("head", seconds(dev, [&] { tl::matmul(dev, work.logits(), work.selected(), w.head); }, 4), v * h * 2 + s * (2 * h + 4 * v), 2 * s * v * h);
    }
    const tl::Memory<tl::Cuda> chosen(dev, static_cast<std::size_t>(S) * 4);
    line("argmax", seconds(dev, [&] { dev.argmax(reinterpret_cast<std::int32_t*>(chosen.data()), work.logits()); }, 4), static_cast<double>(S * c.vocab) * 4, 0);
    const double whole = seconds(dev, [&] { tl::forward(w, std::span<const std::int32_t>(ids), std::span<const tl::Sequence>(batch), work, tl::Logits::last); }, 3);
    std::printf("  %-15s %9.1f us;  whole step %.1f us, %.0f tokens/s\n", "sum", total * 1e6, whole * 1e6, t / whole);
  }
}
