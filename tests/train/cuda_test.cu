// Training on a card: each operation against the CPU's, the goldens' losses, gradients and steps, loss parity with PyTorch, adapters, what must not change a
// result.
#include "tinyllama/cuda_training.hpp"

#include <doctest/doctest.h>

#include <cmath>
#include <fstream>
#include <nlohmann/json.hpp>
#include <random>

#include "tests/device/card.hpp"
#include "tests/train/golden.hpp"
#include "tinyllama/device/cuda_narrow.cuh"

namespace tl = tinyllama;
using namespace tinyllama::test;

namespace {

template <class D>
inline constexpr bool exact_device = std::is_same_v<D, tl::CudaF32>;
/// Of one operation whose sums are f32: f32 rounding of some thousand terms, or of operands and result at 2^-9.
template <class D>
constexpr double tolerance = exact_device<D> ? 3e-6 : 6e-3;

using Floats = std::vector<float>;
template <class T>
using M = tl::View<T, tl::dyn, tl::dyn>;

/// Values in [-1, 1], as D's activations can hold them.
template <class D>
Floats random(tl::index_t n, std::uint32_t seed, float by = 1.0f) {
  std::mt19937 bits(seed);
  std::uniform_real_distribution<float> some(-by, by);
  Floats v(static_cast<std::size_t>(n));
  for (float& x : v) x = static_cast<float>(static_cast<typename D::activation>(some(bits)));
  return v;
}

/// An array on the card in type T, for the host in f32.
template <class D, class T>
struct OnCard {
  D* dev;
  tl::Memory<D> memory;
  tl::index_t n;
  OnCard(D& d, const Floats& values) : dev(&d), memory(d, values.size() * sizeof(T)), n(static_cast<tl::index_t>(values.size())) {
    const std::vector<T> as(values.begin(), values.end());
    d.upload(memory.data(), as.data(), as.size() * sizeof(T));
  }
  OnCard(D& d, tl::index_t count) : OnCard(d, Floats(static_cast<std::size_t>(count), std::numeric_limits<float>::quiet_NaN())) {}
  T* data() const { return reinterpret_cast<T*>(memory.data()); }
  M<T> matrix(tl::index_t rows, tl::index_t columns) const { return {data(), {rows, columns}}; }
  operator Floats() const {
    std::vector<T> v(static_cast<std::size_t>(n));
    dev->download(v.data(), memory.data(), v.size() * sizeof(T));
    Floats f;
    for (const T x : v) f.push_back(static_cast<float>(x));
    return f;
  }
};
M<float> matrix(Floats& v, tl::index_t rows, tl::index_t columns) { return {v.data(), {rows, columns}}; }
M<const float> matrix(const Floats& v, tl::index_t rows, tl::index_t columns) { return {v.data(), {rows, columns}}; }

bool no_fp8() {
  if (tl::Cuda().capability() >= 90) return false;
  MESSAGE("skipped: fp8 needs compute capability 9.0");
  return true;
}

tl::Cpu reference() { return tl::Cpu({.threads = 1, .kernels = &tl::reference::kernels}); }

constexpr tl::index_t T = golden_tokens;
tl::TrainerOptions as_golden() { return {.peak_lr = 1e-3f, .tokens = T, .logits_rows = 40}; }

template <class D, class C>
Floats two_steps(const tl::TrainerOptions& options, bool plain = true) {
  const Golden<C> g;
  D dev;
  tl::training_of(dev).plain_attention = plain;
  tl::Trainer<C, D> t(dev, g.file, options);
  for (int i = 0; i < 2; ++i) t.step(g.inputs, g.targets);
  return t.host(t.weights()).own;
}

}  // namespace

TEST_CASE_TEMPLATE("cuda training: products of matrices as they lie, transposed, added to", D, tl::CudaF32, tl::Cuda) {
  if (no_card()) return;
  using A = typename D::activation;
  D dev;
  for (const auto& [m, n, k] : {std::array<tl::index_t, 3>{8, 16, 24}, {96, 64, 352}, {200, 8, 40}, {8, 1000, 8}, {1, 64, 32}, {2048, 512, 1024}}) {
    for (int which = 0; which < 4; ++which) {
      CAPTURE(m); CAPTURE(n); CAPTURE(k); CAPTURE(which);
      const bool ta = which & 1, tb = which & 2;
      const Floats a = random<D>(m * k, 1), b = random<D>(n * k, 2), y0 = random<D>(m * n, 3);
      const auto side = [](auto v, bool t) { return t ? decltype(v)(tl::transposed(v)) : v; };
      const OnCard<D, A> ca(dev, a), cb(dev, b), cy(dev, y0), out(dev, m * n);
      const OnCard<D, float> sums(dev, y0);
      const auto left = side(M<const A>(ta ? ca.matrix(k, m) : ca.matrix(m, k)), ta), right = side(M<const A>(tb ? cb.matrix(k, n) : cb.matrix(n, k)), tb);
      Floats expected(y0.size());
      const auto ha = side(ta ? matrix(a, k, m) : matrix(a, m, k), ta), hb = side(tb ? matrix(b, k, n) : matrix(b, n, k), tb);
      for (tl::index_t i = 0; i < m; ++i)
        for (tl::index_t j = 0; j < n; ++j) {
          double sum = 0;
          for (tl::index_t l = 0; l < k; ++l) sum += static_cast<double>(ha(i, l)) * hb(j, l);
          expected[static_cast<std::size_t>(i * n + j)] = static_cast<float>(sum);
        }
      tl::gemm(dev, out.matrix(m, n), left, right);
      CHECK(relative_error(Floats(out), expected) < tolerance<D>);
      tl::gemm(dev, cy.matrix(m, n), left, right, {.accumulate = true});
      tl::gemm(dev, sums.matrix(m, n), left, right, {.accumulate = true});
      for (std::size_t i = 0; i < expected.size(); ++i) expected[i] += y0[i];
      CHECK(relative_error(Floats(cy), expected) < tolerance<D>);
      CHECK(relative_error(Floats(sums), expected) < 3e-6);
    }
  }
}

TEST_CASE_TEMPLATE("cuda training: gradients of rmsnorm", D, tl::CudaF32, tl::Cuda) {
  if (no_card()) return;
  using A = typename D::activation;
  D dev;
  tl::Cpu cpu = reference();
  for (const auto& [rows, n] : {std::pair<tl::index_t, tl::index_t>{1, 4}, {3, 7}, {40, 64}, {1500, 100}, {70, 2048}, {5, 4096}, {9, 2047}}) {
    CAPTURE(rows); CAPTURE(n);
    const Floats dy = random<D>(rows * n, 1), x = random<D>(rows * n, 2), gain = random<D>(n, 3);
    Floats dx = random<D>(rows * n, 4), dgain = random<D>(n, 5), rms(static_cast<std::size_t>(rows));
    const OnCard<D, float> cdx(dev, dx), cx(dev, x), cgain(dev, gain), cdgain(dev, dgain);
    const OnCard<D, A> cdy(dev, dy), rounded(dev, rows * n), normed(dev, rows * n);
    Floats again(dx.size());
    const M<A> second = [&] {
      if constexpr (exact_device<D>) return cdx.matrix(rows, n);
      else return rounded.matrix(rows, n);
    }();
    tl::rmsnorm_backward(dev, cdx.matrix(rows, n), second, cdy.matrix(rows, n), cx.matrix(rows, n), cgain.data(), cdgain.data(), 1e-5f, nullptr, normed.matrix(rows, n));
    tl::rmsnorm_backward(cpu, matrix(dx, rows, n), matrix(dx, rows, n), matrix(dy, rows, n), matrix(x, rows, n), gain.data(), dgain.data(), 1e-5f, rms.data(), matrix(again, rows, n));
    CHECK(relative_error(Floats(normed), again) < tolerance<D>);
    CHECK(relative_error(Floats(cdx), dx) < 1e-6);
    CHECK(relative_error(Floats(cdgain), dgain) < 2e-6);
    if (!exact_device<D>) CHECK(relative_error(Floats(rounded), dx) < 4e-3);
  }
}

TEST_CASE("cuda training: a sum whose second part is bf16, and its norm") {
  if (no_card()) return;
  tl::Cuda dev;
  for (const auto& [rows, n] : {std::pair<tl::index_t, tl::index_t>{1, 5}, {3, 64}, {2, 2048}, {2, 3001}, {2, 8192}}) {
    CAPTURE(rows); CAPTURE(n);
    const Floats x = random<tl::CudaF32>(rows * n, 1), added = random<tl::Cuda>(rows * n, 2), gain = random<tl::CudaF32>(n, 3);
    const OnCard<tl::Cuda, float> cx(dev, x), cgain(dev, gain), sum(dev, rows * n);
    const OnCard<tl::Cuda, tl::bf16> cadded(dev, added), normed(dev, rows * n);
    tl::add_rmsnorm(dev, normed.matrix(rows, n), sum.matrix(rows, n), cx.matrix(rows, n), cadded.matrix(rows, n), cgain.data(), 1e-5f);
    Floats expected(x.size()), norm(x.size());
    for (std::size_t i = 0; i < x.size(); ++i) expected[i] = x[i] + added[i];
    reference().rmsnorm(matrix(norm, rows, n), matrix(std::as_const(expected), rows, n), gain.data(), 1e-5f);
    CHECK(Floats(sum) == expected);
    CHECK(relative_error(Floats(normed), norm) < 4e-3);
  }
}

TEST_CASE_TEMPLATE("cuda training: gradients of swiglu, in place", D, tl::CudaF32, tl::Cuda) {
  if (no_card()) return;
  using A = typename D::activation;
  D dev;
  tl::Cpu cpu = reference();
  for (const auto& [rows, n] : {std::pair<tl::index_t, tl::index_t>{1, 1}, {3, 13}, {5, 176}, {2, 5632}}) {
    CAPTURE(rows); CAPTURE(n);
    const Floats dh = random<D>(rows * n, 1);
    Floats gate_up = random<D>(rows * 2 * n, 2, 6.0f);
    const OnCard<D, A> cdh(dev, dh), both(dev, gate_up);
    const auto parts = [&](auto whole) { return std::pair{tl::columns(whole, 0, n), tl::columns(whole, n, 2 * n)}; };
    const auto [g, u] = parts(both.matrix(rows, 2 * n));
    const OnCard<D, A> again(dev, rows * n);
    Floats h(dh.size());
    tl::swiglu_backward(dev, g, u, cdh.matrix(rows, n), g, u, again.matrix(rows, n));
    const auto [hg, hu] = parts(matrix(gate_up, rows, 2 * n));
    tl::swiglu_backward(cpu, hg, hu, matrix(dh, rows, n), hg, hu, matrix(h, rows, n));
    CHECK(relative_error(Floats(again), h) < tolerance<D>);
    CHECK(relative_error(Floats(both), gate_up) < tolerance<D>);
  }
}

TEST_CASE_TEMPLATE("cuda training: cross-entropy and its gradient in the place of the logits", D, tl::CudaF32, tl::Cuda) {
  if (no_card()) return;
  using A = typename D::activation;
  D dev;
  tl::Cpu cpu = reference();
  for (const tl::index_t n : {tl::index_t{1}, tl::index_t{5}, tl::index_t{320}, tl::index_t{1001}, tl::index_t{32000}, tl::index_t{49152}}) {
    CAPTURE(n);
    constexpr tl::index_t rows = 4;
    Floats logits = random<D>(rows * n, 1, 9.0f), losses(rows);
    const std::vector<std::int32_t> targets{0, -100, static_cast<std::int32_t>(n - 1), static_cast<std::int32_t>(n / 2)};
    const Floats weights{1.0f, 1.0f, 0.5f, -2.0f};
    const OnCard<D, A> c(dev, logits);
    const OnCard<D, float> w(dev, weights), l(dev, rows);
    const tl::Memory<D> t(dev, sizeof(std::int32_t) * rows);
    dev.upload(t.data(), targets.data(), sizeof(std::int32_t) * rows);
    const std::span<const std::int32_t> on_card(reinterpret_cast<const std::int32_t*>(t.data()), rows);
    tl::cross_entropy(dev, tl::slice(c.matrix(rows, n), 0, 0), c.matrix(rows, n), on_card, w.data(), l.data());
    const Floats first = l;
    tl::cross_entropy(dev, c.matrix(rows, n), c.matrix(rows, n), on_card, w.data(), l.data());
    CHECK(Floats(l) == first);
    tl::cross_entropy(cpu, matrix(logits, rows, n), matrix(logits, rows, n), targets, weights.data(), losses.data());
    if (n > 1) CHECK(relative_error(Floats(l), losses) < 1e-6);
    if (n > 1) CHECK(relative_error(Floats(c), logits) < tolerance<D>);
  }
}

TEST_CASE("cuda training: the embedding's gradient adds equal ids in their order") {
  if (no_card()) return;
  tl::Cuda dev;
  tl::Cpu cpu = reference();
  for (const tl::index_t n : {tl::index_t{7}, tl::index_t{64}, tl::index_t{600}}) {
    CAPTURE(n);
    std::vector<std::int32_t> ids(200);
    for (std::size_t i = 0; i < ids.size(); ++i) ids[i] = static_cast<std::int32_t>(i % 7 == 0 ? 3 : i * 31 % 40);
    Floats table = random<tl::CudaF32>(40 * n, 1);
    const Floats dx = random<tl::CudaF32>(200 * n, 2);
    const OnCard<tl::Cuda, float> c(dev, table), d(dev, dx);
    std::vector<std::int32_t> rows(static_cast<std::size_t>(tl::id_rows_words(&dev, 200, 40)));
    tl::id_rows(dev, rows.data(), ids, 40);
    const tl::Memory<tl::Cuda> sent(dev, rows.size() * sizeof(std::int32_t));
    dev.upload(sent.data(), rows.data(), sent.bytes());
    tl::embedding_backward(dev, c.matrix(40, n), ids, reinterpret_cast<const std::int32_t*>(sent.data()), d.matrix(200, n));  // of ids how many they are
    tl::embedding_backward(cpu, matrix(table, 40, n), ids, nullptr, matrix(dx, 200, n));
    CHECK(Floats(c) == table);
  }
}

TEST_CASE("cuda training: AdamW on ranges that decay and do not, with the rounded copy; sums of squares") {
  if (no_card()) return;
  tl::Cuda dev;
  tl::Cpu cpu = reference();
  for (const tl::index_t n : {tl::index_t{1}, tl::index_t{4098}, tl::index_t{100'003}}) {
    CAPTURE(n);
    Floats p = random<tl::CudaF32>(n, 1), m = random<tl::CudaF32>(n, 2), v = random<tl::CudaF32>(n, 3);
    for (float& x : v) x = std::fabs(x);
    const Floats g = random<tl::CudaF32>(n, 4);
    const OnCard<tl::Cuda, float> cp(dev, p), cm(dev, m), cv(dev, v), cg(dev, g);
    const OnCard<tl::Cuda, tl::bf16> rounded(dev, n);
    std::vector<tl::AdamwRange> ranges;
    if (n > 100) ranges = {{10, false}, {4087, true}, {n - 4097, false}};
    else ranges = {{n, true}};
    if (n > 100'000)  // as many as 200 layers have
      for (ranges.clear(); ranges.size() < 802;) ranges.push_back({ranges.size() == 801 ? n - 801 * 12 : 12, ranges.size() % 2 == 1});
    tl::AdamwTask t{p.data(), m.data(), v.data(), g.data(), n, 1e-2f, 0.9f, 0.95f, 1e-8f, 0.1f, 0.19f, 0.0975f, 0.7f};
    tl::adamw(cpu, t, ranges, nullptr);
    t.p = cp.data(), t.m = cm.data(), t.v = cv.data(), t.gradient = cg.data();
    tl::adamw(dev, t, ranges, rounded.data());
    CHECK(relative_error(Floats(cp), p) < 3e-7);
    CHECK(relative_error(Floats(cm), m) < 3e-7);
    CHECK(relative_error(Floats(cv), v) < 3e-7);
    const Floats now = cp, copy = rounded;
    bool same = true;
    for (std::size_t i = 0; i < now.size(); ++i) same = same && copy[i] == static_cast<float>(static_cast<tl::bf16>(now[i]));
    CHECK(same);
    CHECK(tl::sum_of_squares(dev, cg.data(), n) == doctest::Approx(tl::sum_of_squares(cpu, g.data(), n)).epsilon(1e-6));
  }
}

TEST_CASE("cuda training: AdamW with the step's numbers in the card's memory leaves the bits of AdamW that is told them") {
  if (no_card()) return;
  tl::Cuda dev;
  constexpr tl::index_t n = 5000;
  for (const tl::MomentFormat& f : tl::moment_formats) {
    CAPTURE(std::string(f.name));
    const Floats p0 = random<tl::CudaF32>(n, 1), g = random<tl::CudaF32>(n, 2);
    const OnCard<tl::Cuda, float> a(dev, p0), b(dev, p0), cg(dev, g);
    const std::vector<tl::AdamwRange> ranges{{64, false}, {n - 64, true}};
    const std::size_t bytes = tl::moment_bytes(f.moments, n);
    const tl::Memory<tl::Cuda> moments(dev, 4 * bytes), at(dev, sizeof(tl::AdamwStep));
    dev.zero(moments.data(), moments.bytes());
    const auto moment = [&](std::size_t i) { return tl::MomentArray(f.moments, moments.data() + i * bytes, n); };
    tl::AdamwTask told{a.data(), moment(0), moment(1), cg.data(), n, 1.37e-3f, 0.9f, 0.95f, 1e-8f, 0.1f, 0.19f, 0.0975f, 0.7f};
    told.key = 77;
    tl::AdamwTask reads{b.data(), moment(2), moment(3), cg.data(), n, 9.0f, 0.9f, 0.95f, 1e-8f, 0.1f, 9.0f, 9.0f, 9.0f};
    reads.at = reinterpret_cast<const tl::AdamwStep*>(at.data());
    const tl::AdamwStep step{1.37e-3f, 0.19f, 0.0975f, 77, 0.7f};
    dev.upload(at.data(), &step, sizeof step);
    tl::bf16* const none = nullptr;
    tl::adamw(dev, told, ranges, none), tl::adamw(dev, reads, ranges, none);
    CHECK(Floats(a) == Floats(b));
    CHECK(Floats(a) != p0);
    std::vector<std::byte> left(2 * bytes), right(2 * bytes);
    dev.download(left.data(), moments.data(), 2 * bytes), dev.download(right.data(), moments.data() + 2 * bytes, 2 * bytes);
    CHECK(left == right);
  }
}

TEST_CASE("cuda training: to bf16 and back for the wire, from any address on") {
  if (no_card()) return;
  tl::Cuda dev;
  for (const auto& [n, offset] : {std::pair<tl::index_t, tl::index_t>{1, 0}, {4, 0}, {7, 1}, {4097, 0}, {100'003, 3}, {3'000'000, 0}}) {
    CAPTURE(n); CAPTURE(offset);
    const Floats x = random<tl::CudaF32>(n + offset, 1, 1e-3f);
    const OnCard<tl::Cuda, float> from(dev, x), back(dev, n + offset);
    const OnCard<tl::Cuda, tl::bf16> to(dev, n + offset);
    tl::cuda::Narrow<tl::bf16>::narrow(dev.stream(), to.data() + offset, from.data() + offset, n);
    tl::cuda::Narrow<tl::bf16>::widen(dev.stream(), back.data() + offset, to.data() + offset, n);
    const Floats narrow = to, wide = back;
    bool same = true;
    for (auto i = static_cast<std::size_t>(offset); i < x.size(); ++i) {
      const auto expected = static_cast<float>(static_cast<tl::bf16>(x[i]));
      same = same && narrow[i] == expected && wide[i] == expected;
    }
    CHECK(same);
    if (offset > 0) CHECK(std::isnan(wide[static_cast<std::size_t>(offset) - 1]));
  }
}

// As kernels/moments_test.cpp has it on the CPU: sums that differ in their last bits may fall on either side of where a code changes.
TEST_CASE("cuda training: AdamW with moments in bf16 and 8 bits, on ranges that end inside of blocks") {
  if (no_card()) return;
  tl::Cuda dev;
  tl::Cpu cpu = reference();
  for (const tl::Moments format : {tl::Moments::bf16, tl::Moments::int8})
    for (const tl::index_t n : {tl::index_t{1}, tl::index_t{7}, tl::index_t{256}, tl::index_t{258}, tl::index_t{4098}, tl::index_t{100'003}}) {
      CAPTURE(n); CAPTURE(std::string(tl::name(format)));
      Floats p = random<tl::CudaF32>(n, 1), m = random<tl::CudaF32>(n, 2, 1e-3f), v = random<tl::CudaF32>(n, 3, 10.0f);
      for (std::size_t i = 0; i < v.size(); ++i) v[i] = 1e-5f * std::exp(v[i]), m[i] *= std::sqrt(v[i]);
      const Floats g = random<tl::CudaF32>(n, 4, 1e-3f);
      const OnCard<tl::Cuda, float> cp(dev, p), cg(dev, g);
      const OnCard<tl::Cuda, tl::bf16> rounded(dev, n);
      std::vector<tl::AdamwRange> ranges{{n, true}};
      if (n > 1000) ranges = {{10, false}, {4, true}, {800, false}, {3271, true}, {n - 4085, false}};
      const std::size_t bytes = tl::moment_bytes(format, n);
      std::vector<std::byte> hm(bytes), hv(bytes);
      const tl::MomentArray am(format, hm.data(), n), av(format, hv.data(), n);
      tl::encode_moment(am, false, m.data(), n), tl::encode_moment(av, true, v.data(), n);
      const tl::Memory<tl::Cuda> dm(dev, bytes), dv(dev, bytes);
      dev.upload(dm.data(), hm.data(), bytes), dev.upload(dv.data(), hv.data(), bytes);
      tl::AdamwTask t{p.data(), am, av, g.data(), n, 1e-2f, 0.9f, 0.95f, 1e-8f, 0.1f, 0.19f, 0.0975f, 0.7f};
      t.key = 77, t.place = 5;
      tl::adamw(cpu, t, ranges, nullptr);
      t.p = cp.data(), t.m = tl::MomentArray(format, dm.data(), n), t.v = tl::MomentArray(format, dv.data(), n), t.gradient = cg.data();
      tl::adamw(dev, t, ranges, rounded.data());
      CHECK(relative_error(Floats(cp), p) < 1e-6);
      const Floats now = cp, copy = rounded;
      bool same = true;
      for (std::size_t i = 0; i < now.size(); ++i) same = same && copy[i] == static_cast<float>(static_cast<tl::bf16>(now[i]));
      CHECK(same);
      for (const bool second : {false, true}) {
        std::vector<std::byte> found(bytes);
        dev.download(found.data(), second ? dv.data() : dm.data(), bytes);
        Floats expected(p.size()), got(p.size());
        tl::decode_moment(second ? av : am, second, expected.data(), n), tl::decode_moment(tl::MomentArray(format, found.data(), n), second, got.data(), n);
        int other = 0;
        double worst = 0, most = 0;
        for (std::size_t i = 0; i < got.size(); ++i) {
          const double difference = std::fabs(static_cast<double>(got[i]) - expected[i]);
          other += difference > 1e-5 * std::fabs(expected[i]), worst = std::max(worst, difference / (std::fabs(expected[i]) + 1e-30)), most = std::max<double>(most, std::fabs(got[i]));
        }
        CHECK(most > 0);
        CHECK(other <= 1 + n / 1000);
        if (n < 1000 || second) CHECK(worst <= (format == tl::Moments::bf16 ? 0x1p-7 : 0x1p-3));
      }
    }
}

TEST_CASE_TEMPLATE("cuda training: moments in fewer bits: what f32 learns, the same bits each time and behind a checkpoint, memory as planned", D, tl::CudaF32, tl::Cuda) {
  if (no_card()) return;
  const Golden<golden_gqa> g;
  const auto learn = [&](tl::Moments moments) {
    D dev;
    tl::training_of(dev).plain_attention = true;
    tl::TrainerOptions options = as_golden();
    options.moments = moments;
    tl::Trainer<golden_gqa, D> t(dev, g.file, options);
    const Floats before = t.host(t.weights()).own;
    for (int i = 0; i < 10; ++i) t.step(g.inputs, g.targets);
    // A restart in between, by way of the host.
    tl::Trainer<golden_gqa, D> u(dev, g.file, options);
    u.put(u.weights(), t.host(t.weights()).own), u.put(u.first_moment(), t.host(t.first_moment()).values), u.put(u.second_moment(), t.host(t.second_moment()).values);
    u.resume(10);
    for (int i = 0; i < 10; ++i) t.step(g.inputs, g.targets), u.step(g.inputs, g.targets);
    CHECK(u.host(u.weights()).own == t.host(t.weights()).own);
    CHECK(u.host(u.second_moment()).own == t.host(t.second_moment()).own);
    const auto plan = tl::training_plan<golden_gqa, D>({.batch = 2, .tokens = T, .moments = moments, .logits_rows = 40});
    CHECK(t.bytes() == plan.total() - plan.scratch);
    Floats moved = t.host(t.weights()).own;
    for (std::size_t i = 0; i < moved.size(); ++i) moved[i] -= before[i];
    return moved;
  };
  const Floats expected = learn(tl::Moments::f32);
  for (const tl::Moments moments : {tl::Moments::bf16, tl::Moments::int8}) {
    CAPTURE(std::string(tl::name(moments)));
    const Floats found = learn(moments);
    CHECK(learn(moments) == found);
    MESSAGE(tl::name(moments) << ": path " << relative_error(found, expected));
    const double products = exact_device<D> ? 0 : 0.02;  // a weight that lies between two of bf16's may round to either
    CHECK(relative_error(found, expected) < products + (moments == tl::Moments::bf16 ? 5e-3 : 7e-2));
  }
}

TEST_CASE_TEMPLATE("cuda training: dropout drops what the CPU drops; scale and add", D, tl::CudaF32, tl::Cuda) {
  if (no_card()) return;
  using A = typename D::activation;
  D dev;
  tl::Cpu cpu = reference();
  Floats x = random<D>(37 * 29, 1), out(x.size());
  const OnCard<D, A> c(dev, x), o(dev, 37 * 29);
  tl::dropout(dev, o.matrix(37, 29), c.matrix(37, 29), 0.3f, 77);
  tl::dropout(cpu, matrix(out, 37, 29), matrix(x, 37, 29), 0.3f, 77);
  const Floats found = o;
  bool same = true;
  for (std::size_t i = 0; i < out.size(); ++i) same = same && (found[i] == 0.0f) == (out[i] == 0.0f);
  CHECK(same);
  CHECK(relative_error(found, out) < tolerance<D>);
  tl::scale(dev, c.matrix(37, 29), -0.5f), tl::add(dev, c.matrix(37, 29), o.matrix(37, 29));
  for (std::size_t i = 0; i < x.size(); ++i) x[i] = found[i] - 0.5f * x[i];
  CHECK(relative_error(Floats(c), x) < tolerance<D>);
}

// Plain kernels and cuDNN's against the CPU in f32 on the same operands.
TEST_CASE_TEMPLATE("cuda training: attention and its gradients", D, tl::CudaF32, tl::Cuda) {
  if (no_card()) return;
  using A = typename D::activation;
  D dev;
  tl::Cpu cpu({.threads = 4, .kernels = nullptr});
  struct Case {
    tl::HeadShape heads;
    std::vector<tl::index_t> tokens;
  };
  for (const Case& c : {Case{{4, 2, 16}, {48, 48}}, {{6, 2, 16}, {5}}, {{8, 2, 64}, {200, 200}}, {{32, 4, 64}, {256, 256, 256}}, {{4, 4, 128}, {64}}, {{9, 3, 64}, {70, 1, 130}}, {{4, 1, 12}, {33, 40}}}) {
    CAPTURE(c.heads.head_dim); CAPTURE(c.heads.heads); CAPTURE(c.tokens.size());
    std::vector<tl::Sequence> batch;
    tl::index_t rows = 0;
    for (const tl::index_t t : c.tokens) batch.push_back({.first_row = rows, .tokens = t}), rows += t;
    const tl::index_t hd = c.heads.head_dim, width = c.heads.heads * hd, all = (c.heads.heads + 2 * c.heads.kv_heads) * hd;
    const Floats qkv = random<D>(rows * all, 1, 2.0f), d_out = random<D>(rows * width, 2);
    Floats out(d_out.size()), lse(static_cast<std::size_t>(rows * c.heads.heads)), dqkv(qkv.size()), memory(static_cast<std::size_t>(2 * rows * width));
    tl::flash_attention(cpu, matrix(out, rows, width), matrix(lse, rows, c.heads.heads), matrix(qkv, rows, all), batch, c.heads, {});
    tl::flash_attention_backward(cpu, matrix(dqkv, rows, all), matrix(d_out, rows, width), matrix(qkv, rows, all), matrix(std::as_const(out), rows, width), matrix(std::as_const(lse), rows, c.heads.heads),
                                 batch, c.heads, memory.data(), {});
    const OnCard<D, A> cqkv(dev, qkv), cd(dev, d_out), co(dev, rows * width), cdq(dev, rows * all);
    const OnCard<D, float> cl(dev, rows * c.heads.heads), delta(dev, rows * c.heads.heads);
    for (const bool plain : {true, false}) {
      CAPTURE(plain);
      tl::training_of(dev).plain_attention = plain;
      if (!plain && !tl::training_of(dev).uses_cudnn(static_cast<tl::index_t>(batch.size()), c.tokens.front(), c.heads)) {
        if (!exact_device<D>) MESSAGE("no cuDNN here: " << tl::training_of(dev).cudnn_failure());
        continue;
      }
      tl::flash_attention(dev, co.matrix(rows, width), cl.matrix(rows, c.heads.heads), cqkv.matrix(rows, all), batch, c.heads, {});
      tl::flash_attention_backward(dev, cdq.matrix(rows, all), cd.matrix(rows, width), cqkv.matrix(rows, all), co.matrix(rows, width), cl.matrix(rows, c.heads.heads), batch, c.heads, delta.data(), {});
      CHECK(relative_error(Floats(co), out) < tolerance<D>);
      CHECK(relative_error(Floats(cdq), dqkv) < 2 * tolerance<D>);  // of bf16 probabilities too
    }
  }
}

TEST_CASE_TEMPLATE("cuda training: f32 against float64: losses, every gradient, their norm, and the weights behind three steps", C, golden_gqa, golden_tied) {
  if (no_card()) return;
  const Golden<C> g;
  tl::CudaF32 dev;
  tl::Trainer<C, tl::CudaF32> t(dev, g.file, as_golden());
  const auto losses = g.reference.template values<float>("step_losses");
  for (std::size_t i = 0; i < 3; ++i) {
    CHECK(std::fabs(t.step(g.inputs, g.targets) - losses[i]) < 2e-6 * losses[i]);
    if (i > 0) continue;
    CHECK(std::fabs(t.report().gradient_norm / g.reference.template values<float>("grad_norm")[0] - 1) < 1e-6);
    CHECK(worst<C>(g.reference, "grad.", t.host(t.gradients()).values) < 3e-6);
  }
  CHECK(worst<C>(g.reference, "after3.", t.host(t.weights()).values) < 1e-5);
}

// PyTorch's bf16 autocast is off by up to 1.3% in a gradient of these models.
TEST_CASE_TEMPLATE("cuda training: bf16 products stay within what their rounding shows", C, golden_gqa, golden_tied) {
  if (no_card()) return;
  const Golden<C> g;
  tl::Cuda dev;
  for (const bool plain : {true, false}) {
    CAPTURE(plain);
    tl::training_of(dev).plain_attention = plain;
    tl::Trainer<C, tl::Cuda> t(dev, g.file, as_golden());
    const auto losses = g.reference.template values<float>("step_losses");
    for (std::size_t i = 0; i < 3; ++i) {
      CHECK(std::fabs(t.step(g.inputs, g.targets) / losses[i] - 1) < 1e-3);
      if (i > 0) continue;
      CHECK(std::fabs(t.report().gradient_norm / g.reference.template values<float>("grad_norm")[0] - 1) < 5e-3);
      const double error = worst<C>(g.reference, "grad.", t.host(t.gradients()).values);
      MESSAGE("worst gradient: " << error);
      CHECK(error < 0.02);
      CHECK(error > 1e-4);  // it did round
    }
    CHECK(worst<C>(g.reference, "after3.", t.host(t.weights()).values) < 0.005);
  }
}

TEST_CASE_TEMPLATE("cuda training: the same bits every time, and for whatever is saved or computed again", D, tl::CudaF32, tl::Cuda) {
  if (no_card()) return;
  const auto expected = two_steps<D, golden_tied>(as_golden());
  CHECK(two_steps<D, golden_tied>(as_golden()) == expected);
  for (const tl::Checkpointing how : {tl::Checkpointing::none, tl::Checkpointing::layer}) {
    tl::TrainerOptions other = as_golden();
    other.checkpointing = how;
    CHECK(two_steps<D, golden_tied>(other) == expected);
  }
}

TEST_CASE("cuda training: micro-batches and chunks of logits sum up to the batch") {
  if (no_card()) return;
  tl::TrainerOptions options = as_golden();
  const auto expected = two_steps<tl::CudaF32, golden_gqa>(options);
  options.micro_rows = 1;
  CHECK(relative_error(two_steps<tl::CudaF32, golden_gqa>(options), expected) < 1e-6);
  options.logits_rows = 7;
  CHECK(relative_error(two_steps<tl::CudaF32, golden_gqa>(options), expected) < 1e-6);
}

TEST_CASE_TEMPLATE("cuda training: the plan's memory", D, tl::CudaF32, tl::Cuda) {
  if (no_card()) return;
  const Golden<golden_gqa> g;
  for (const tl::Checkpointing how : {tl::Checkpointing::none, tl::Checkpointing::selective, tl::Checkpointing::layer}) {
    D dev;
    tl::TrainerOptions options = as_golden();
    options.checkpointing = how;
    tl::Trainer<golden_gqa, D> t(dev, g.file, options);
    t.step(g.inputs, g.targets);
    const auto plan = tl::training_plan<golden_gqa, D>({.batch = 2, .tokens = T, .checkpointing = how, .logits_rows = 40});
    CHECK(t.bytes() == plan.total() - plan.scratch);
  }
}

TEST_CASE("cuda training: what the device gives out is planned within 3%") {
  if (no_card()) return;
  using C = tl::tinyllama_120m;
  for (const tl::Precision precision : {tl::Precision::bf16, tl::Precision::fp8}) {
    tl::Cuda dev;
    if (precision == tl::Precision::fp8 && dev.capability() < 90) continue;
    tl::Trainer<C, tl::Cuda> t(dev, {.precision = precision, .tokens = 1024});
    std::vector<std::int32_t> ids(8 * 1024);
    for (std::size_t i = 0; i < ids.size(); ++i) ids[i] = static_cast<std::int32_t>(tl::random_bits(1, i) % C::vocab);
    for (int i = 0; i < 2; ++i) t.step(ids, ids);
    std::uint64_t most = 0;
    REQUIRE(cudaMemPoolGetAttribute(dev.pool(), cudaMemPoolAttrUsedMemHigh, &most) == cudaSuccess);
    const auto plan = tl::training_plan<C, tl::Cuda>({.batch = 8, .tokens = 1024, .precision = precision});
    CAPTURE(most); CAPTURE(plan.total());
    CHECK(std::fabs(static_cast<double>(most) / static_cast<double>(plan.total()) - 1) < 0.03);
  }
}

TEST_CASE("cuda training: adapters learn as on the CPU, with dropout") {
  if (no_card()) return;
  const Golden<golden_gqa> g;
  tl::TrainerOptions options = as_golden();
  options.precision = tl::Precision::f32;
  options.lora = tl::LoraOptions{.rank = 4, .dropout = 0.2f, .slots = tl::AdapterSlots::every()};
  tl::Cpu cpu({.threads = 2, .kernels = nullptr});
  tl::CudaF32 dev;
  tl::Cuda half;
  tl::Trainer<golden_gqa> a(cpu, g.file, options);
  tl::Trainer<golden_gqa, tl::CudaF32> b(dev, g.file, options);
  tl::Trainer<golden_gqa, tl::Cuda> c(half, g.file, options);
  for (int i = 0; i < 3; ++i) {
    const float expected = a.step(g.inputs, g.targets);
    CHECK(std::fabs(b.step(g.inputs, g.targets) / expected - 1) < 2e-6);
    CHECK(std::fabs(c.step(g.inputs, g.targets) / expected - 1) < 2e-3);
  }
  CHECK(relative_error(b.host(b.adapters()).values, a.adapters()) < 1e-4);
  CHECK(relative_error(c.host(c.adapters()).values, a.adapters()) < 0.1);
  CHECK(b.host(b.weights()).own == Floats(a.weights().begin(), a.weights().end()));
}

namespace {
// As in tests/train/parity_test.cpp.
struct parity_config : tl::llama_defaults {
  static constexpr int layers = 4, hidden = 128, heads = 4, kv_heads = 2, ffn = 352, vocab = 512, context = 64;
};
template <class D>
double worst_difference(tl::Precision precision = tl::Precision::bf16) {
  constexpr std::size_t rows = 8, tokens = 64;
  const tl::Schedule schedule{.decay = tl::Decay::cosine, .peak = 1e-3, .minimum = 1e-4, .warmup = 20, .steps = 200};
  nlohmann::json record;
  std::ifstream(fixture("train/parity.json")) >> record;
  const auto steps = record["steps"].get<std::vector<std::int64_t>>();
  const auto expected = record["f64"].get<std::vector<double>>();
  const tl::MappedFile file(fixture("train/tokens.u16"));
  std::vector<std::uint16_t> ids(file.bytes().size() / 2);
  std::memcpy(ids.data(), file.bytes().data(), ids.size() * 2);
  D dev;
  tl::Trainer<parity_config, D> trainer(dev, {.schedule = tl::StagedSchedule{schedule}, .precision = precision, .tokens = tokens, .seed = 1});
  std::vector<std::int32_t> inputs(rows * tokens), targets(rows * tokens);
  double most = 0;
  for (std::size_t step = 0, next = 0; next < steps.size(); ++step) {
    for (std::size_t r = 0; r < rows; ++r) {
      const std::size_t start = (step * rows + r) * tokens % (ids.size() - tokens);
      for (std::size_t i = 0; i < tokens; ++i) inputs[r * tokens + i] = ids[start + i], targets[r * tokens + i] = ids[start + i + 1];
    }
    const float loss = trainer.step(inputs, targets);
    if (trainer.steps() != steps[next]) continue;
    const double difference = std::abs(static_cast<double>(loss) / expected[next++] - 1);
    most = difference > most || std::isnan(difference) ? difference : most;
  }
  return most;
}
}  // namespace

TEST_CASE("cuda training: 200 steps lose what PyTorch's f64 run loses") {
  if (no_card()) return;
  CHECK(worst_difference<tl::CudaF32>() < 1e-5);
  CHECK(worst_difference<tl::Cuda>() < 1e-3);  // PyTorch's bf16 run stays within 2.7e-4
}

TEST_CASE("cuda training: 200 steps in fp8 stay within 1% of the curve") {
  if (no_card() || no_fp8()) return;
  const double difference = worst_difference<tl::Cuda>(tl::Precision::fp8);
  MESSAGE("fp8: " << difference);
  CHECK(difference < 1e-2);
}

namespace {
/// What ten steps leave in which nothing stays as it was: ids, learning rate, a gradient that is not finite, rows that do not count, weights put there, another shape, and other sequences
/// evaluated in between.
struct Traces {
  Floats reports, weights, first, second;
  std::vector<bool> skipped;
  int repeated;
};
template <class D>
Traces changing_steps(D& dev, bool records, tl::Precision precision) {
  const Golden<golden_gqa> g;
  tl::training_of(dev).plain_attention = true;  // cuDNN's sums have no fixed order
  tl::training_of(dev).records = records, tl::training_of(dev).repeated = 0;
  const tl::Schedule schedule{.decay = tl::Decay::cosine, .peak = 1e-3, .minimum = 1e-4, .warmup = 4, .steps = 12};
  tl::TrainerOptions options = as_golden();
  options.schedule = tl::StagedSchedule{schedule}, options.precision = precision, options.micro_rows = 1;
  tl::Trainer<golden_gqa, D> t(dev, g.file, options);
  const auto half = static_cast<std::size_t>(T);
  REQUIRE(g.inputs.size() == 2 * half);
  Traces seen;
  for (int step = 0; step < 10; ++step) {
    std::vector<std::int32_t> inputs = g.inputs, targets = g.targets;
    for (std::size_t i = 0; i < inputs.size(); ++i) {
      inputs[i] = (inputs[i] * (step + 1) + step) % golden_gqa::vocab;
      if (targets[i] >= 0) targets[i] = (targets[i] * (step + 1) + step) % golden_gqa::vocab;
    }
    const auto part = [&](const std::vector<std::int32_t>& v, std::size_t i) { return std::span<const std::int32_t>(v).subspan(i * half, half); };
    if (step == 0) {
      t.begin_step();
      for (const std::size_t i : {0, 1, 0}) t.accumulate(part(inputs, i), part(targets, i), 1e-2f);
      t.end_step(1);
    } else if (step == 3) {
      t.begin_step();
      t.accumulate(part(inputs, 0), part(targets, 0), std::numeric_limits<float>::infinity());
      t.accumulate(part(inputs, 1), part(targets, 1), 1e-2f);
      t.end_step(1);
    } else if (step == 8) {
      t.begin_step();
      t.accumulate(inputs, targets, 1e-2f);
      t.end_step(1);
    } else {
      if (step == 5) std::fill(targets.begin(), targets.begin() + 40, -100);  // the first rows of logits
      if (step == 6) {
        Floats weights = t.host(t.weights()).own;
        for (float& w : weights) w *= 8.0f;
        t.put(t.weights(), weights);
      }
      t.step(inputs, targets);
    }
    seen.skipped.push_back(t.report().skipped);
    seen.reports.insert(seen.reports.end(), {t.report().loss, t.report().gradient_norm, t.report().lr});
    const std::array<tl::Sequence, 2> others{tl::Sequence{0, 20, 0, nullptr}, tl::Sequence{20, T - 20, 7, nullptr}};
    if (step != 1)
      for (const float l : t.losses(part(inputs, 0), part(targets, 1), others)) seen.reports.push_back(l);
  }
  seen.weights = t.host(t.weights()).own, seen.first = t.host(t.first_moment()).own, seen.second = t.host(t.second_moment()).own;
  seen.repeated = tl::training_of(dev).repeated;
  return seen;
}
bool same_bits(const Floats& a, const Floats& b) { return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0; }

std::array<std::uint64_t, 3> memory_of(const tl::Cuda& dev) {
  std::array<std::uint64_t, 3> m{};
  std::size_t total = 0, free = 0;
  cudaMemPoolGetAttribute(dev.pool(), cudaMemPoolAttrUsedMemCurrent, &m[0]), cudaMemPoolGetAttribute(dev.pool(), cudaMemPoolAttrReservedMemCurrent, &m[1]);
  cudaMemGetInfo(&free, &total);
  m[2] = free;
  return m;
}
}  // namespace

TEST_CASE("cuda training: steps repeated as graphs have the bits of steps launched kernel by kernel") {
  if (no_card()) return;
  const auto check = [](auto&& dev, tl::Precision precision, int repeated) {  // one device, so that it chooses its products' kernels once
    const Traces b = changing_steps(dev, false, precision), a = changing_steps(dev, true, precision);
    CHECK(same_bits(a.reports, b.reports));
    CHECK(same_bits(a.weights, b.weights));
    CHECK(same_bits(a.first, b.first));
    CHECK(same_bits(a.second, b.second));
    CHECK(a.skipped == b.skipped);
    CHECK(a.skipped == std::vector<bool>{false, false, false, true, false, false, false, false, false, false});
    CHECK(a.repeated == repeated);
    CHECK(b.repeated == 0);
  };
  // The third of step 0's micro-batches, unless scales are to be made in a first step; two in steps 1 to 4, 6 and 7, one in step 5; all are new in steps 8 and 9 (another shape), and in step 6
  // where the weights put there were rounded. Updates: those of steps 1 to 7, without that of step 6 where weights were rounded.
  SUBCASE("f32") { check(tl::CudaF32(), tl::Precision::f32, 14 + 7); }
  SUBCASE("bf16") { check(tl::Cuda(), tl::Precision::bf16, 12 + 6); }
  SUBCASE("fp8") {
    if (!no_fp8()) check(tl::Cuda(), tl::Precision::fp8, 11 + 6);
  }
}

TEST_CASE("cuda training: no step allocates from the second on, and each from there is a graph") {
  if (no_card()) return;
  const Golden<golden_gqa> g;
  for (const tl::Precision precision : {tl::Precision::bf16, tl::Precision::fp8}) {
    if (precision == tl::Precision::fp8 && no_fp8()) continue;
    tl::Cuda dev;
    tl::TrainerOptions options = as_golden();
    options.precision = precision;
    tl::Trainer<golden_gqa, tl::Cuda> t(dev, g.file, options);
    t.step(g.inputs, g.targets);
    const auto first = memory_of(dev);
    t.step(g.inputs, g.targets);
    const auto second = memory_of(dev);  // the graph is the driver's, beside the pool
    CHECK(first[0] == second[0]);
    CHECK(first[1] == second[1]);
    for (int i = 0; i < 4; ++i) t.step(g.inputs, g.targets);
    CHECK(memory_of(dev) == second);
    CHECK(tl::training_of(dev).repeated == 10);  // passes and updates
  }
}

// e4m3 rounds to 2^-4 at most, e5m2 to 2^-3: 2.6% and 5.1% as root mean squares, of both operands.
TEST_CASE("cuda training: products in 8-bit floats") {
  if (no_card() || no_fp8()) return;
  tl::Cuda dev;
  for (const auto& [T, N, K] : {std::array<tl::index_t, 3>{96, 64, 176}, {256, 128, 128}, {208, 320, 144}, {1040, 2560, 2048}}) {
    CAPTURE(T); CAPTURE(N); CAPTURE(K);
    for (int round = 0; round < 3; ++round) {  // the last with weights that pass
      CAPTURE(round);
      const float size = round ? 3e-4f : 20.0f;
      const Floats x = random<tl::Cuda>(T * K, 1, size), w = random<tl::Cuda>(N * K, 2, 0.02f), dy = random<tl::Cuda>(T * N, 3, 1e-6f);
      const OnCard<tl::Cuda, tl::bf16> cx(dev, x), cw(dev, w), cdy(dev, dy), y(dev, T * N), dx(dev, T * K), ey(dev, T * N), edx(dev, T * K);
      const OnCard<tl::Cuda, float> dw(dev, N * K), edw(dev, N * K), weights(dev, w);
      tl::round_to(dev, cw.data(), weights.data(), N * K);  // as a trainer puts them there
      using In = M<const tl::bf16>;
      const In xs = cx.matrix(T, K), ws = cw.matrix(N, K), ds = cdy.matrix(T, N);
      const tl::Fp8Weights<tl::bf16> w8{ws, cw.data(), round == 2};
      tl::gemm_fp8(dev, y.matrix(T, N), xs, w8);
      tl::gemm_fp8_input(dev, dx.matrix(T, K), ds, w8);
      tl::gemm_fp8_weight(dev, dw.matrix(N, K), xs, w8, false);
      tl::gemm(dev, ey.matrix(T, N), xs, ws), tl::gemm(dev, edx.matrix(T, K), ds, tl::transposed(ws)), tl::gemm(dev, edw.matrix(N, K), tl::transposed(ds), tl::transposed(xs));
      CHECK(relative_error(Floats(y), Floats(ey)) < 0.05);
      CHECK(relative_error(Floats(dx), Floats(edx)) < 0.07);
      CHECK(relative_error(Floats(dw), Floats(edw)) < 0.07);
      CHECK(relative_error(Floats(y), Floats(ey)) > 1e-3);  // it did round
      tl::gemm_fp8_weight(dev, dw.matrix(N, K), xs, w8, true);
      Floats twice = edw;
      for (float& v : twice) v *= 2;
      CHECK(relative_error(Floats(dw), twice) < 0.07);
    }
  }
}

TEST_CASE_TEMPLATE("cuda training: fp8 on the goldens", C, golden_gqa, golden_tied) {
  if (no_card() || no_fp8()) return;
  const Golden<C> g;
  tl::Cuda dev;
  tl::TrainerOptions options = as_golden();
  options.precision = tl::Precision::fp8;
  tl::Trainer<C, tl::Cuda> t(dev, g.file, options);
  const auto losses = g.reference.template values<float>("step_losses");
  for (std::size_t i = 0; i < 3; ++i) {
    CHECK(std::fabs(t.step(g.inputs, g.targets) / losses[i] - 1) < 1e-2);
    if (i == 0) {
      const double error = worst<C>(g.reference, "grad.", t.host(t.gradients()).values);
      MESSAGE("worst gradient: " << error);
      CHECK(error < 0.3);
      CHECK(error > 0.02);
    }
  }
}
