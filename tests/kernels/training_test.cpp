// The kernels of training, of every instruction set, against the reference at awkward sizes; and the reference against finite differences.
#include "tinyllama/kernels/training.hpp"

#include "tests/kernels/agree.hpp"
#include "tinyllama/kernels/cpu/training_kernels.hpp"
#include "tinyllama/kernels/reference_training.hpp"

namespace {

using namespace tinyllama;
using namespace tinyllama::test;

template <class F>
void for_each_training_table(F&& f) {
  REQUIRE(!all_cpu_training_kernels().empty());
  for (const TrainingKernels* k : all_cpu_training_kernels()) {
    CAPTURE(std::string(k->instruction_set));
    f(*k);
  }
}

/// ||a - b|| / ||b||
double relative(const std::vector<float>& a, const std::vector<float>& b) {
  double difference = 0, norm = 0;
  for (std::size_t i = 0; i < b.size(); ++i) difference += std::pow(static_cast<double>(a[i]) - b[i], 2), norm += std::pow(static_cast<double>(b[i]), 2);
  return std::sqrt(difference / norm);
}

/// An operand as it lies, in rows or transposed, with room between its rows.
struct Lying {
  std::vector<float> data;
  Operand operand;
  Lying(index_t rows, index_t k, bool transposed, Random& random) {
    const index_t ld = (transposed ? rows : k) + 3;
    data = random.vector((transposed ? k : rows) * ld);
    operand = {data.data(), transposed ? 1 : ld, transposed ? ld : 1, rows, k};
  }
  template <class E>
  std::vector<E> packed(void (*pack)(E*, const Operand&, index_t, index_t)) const {
    const index_t panels = (operand.rows + 15) / 16;
    std::vector<E> to(static_cast<std::size_t>(panels * panel_elements(operand.k)), static_cast<E>(not_a_number));
    pack(to.data(), operand, 0, panels);
    return to;
  }
};

template <class E>
void check_gemm(const TrainingKernels& kernels, index_t m, index_t n, index_t k, int transposed, bool accumulate) {
  CAPTURE(m);
  CAPTURE(n);
  CAPTURE(k);
  CAPTURE(transposed);
  CAPTURE(accumulate);
  Random random(static_cast<std::uint64_t>(m * 1009 + n * 31 + k));
  const Lying a(m, k, transposed & 1, random), b(n, k, transposed & 2, random);
  std::vector<E> pa, pb;
  if constexpr (std::is_same_v<E, float>) {
    pa = a.packed(kernels.pack_f32), pb = b.packed(kernels.pack_f32);
    check_same(pa, a.packed(&reference::pack_f32)), check_same(pb, b.packed(&reference::pack_f32));
  } else {
    pa = a.packed(kernels.pack_bf16), pb = b.packed(kernels.pack_bf16);
    check_same(pa, a.packed(&reference::pack_bf16)), check_same(pb, b.packed(&reference::pack_bf16));
  }
  const index_t ldy = n + 5;
  std::vector<float> got = random.vector(m * ldy), expected = got;
  GemmTask t{reinterpret_cast<const std::byte*>(pa.data()), reinterpret_cast<const std::byte*>(pb.data()), m, n, k, got.data(), ldy, accumulate};
  const auto run = [&](const TrainingKernels& with, float* y) {
    t.y = y;
    // In two halves of rows and of panels, as threads share it.
    const index_t rows = (m / 2 + 15) / 16 * 16, panels = (n + 15) / 16;
    for (const auto& [r0, r1] : {std::pair{index_t{0}, rows}, std::pair{rows, m}})
      for (const auto& [p0, p1] : {std::pair{index_t{0}, panels / 2}, std::pair{panels / 2, panels}})
        (std::is_same_v<E, float> ? with.gemm_f32 : with.gemm_bf16)(t, r0, std::min(r1, m), p0, p1);
  };
  run(kernels, got.data());
  run(reference::training_kernels, expected.data());
  // Outside [m, n] nothing is touched: the bound is 0 there.
  std::vector<double> size(got.size(), 0.0);
  for (index_t i = 0; i < m; ++i)
    for (index_t j = 0; j < n; ++j) {
      double total = accumulate ? std::fabs(expected[static_cast<std::size_t>(i * ldy + j)]) : 0;
      for (index_t l = 0; l < k; ++l) total += std::fabs(reference::detail::at(a.operand, i, l) * reference::detail::at(b.operand, j, l));
      size[static_cast<std::size_t>(i * ldy + j)] = total;
    }
  check_close(got, expected, [&](index_t i) { return sum_bound * size[static_cast<std::size_t>(i)]; });
}

/// One attention head with its gradient, in memory of its own.
struct Head {
  index_t tokens, dim, ld, ldo;
  std::vector<float> qkv, d_o, o, lse, dq, dk, dv;
  std::vector<std::byte> scratch;
  Head(index_t T, index_t hd, std::uint64_t seed = 1) : tokens(T), dim(hd), ld(3 * hd + 5), ldo(hd + 3) {
    Random random(seed);
    qkv = random.vector(T * ld), d_o = random.vector(T * ldo);
    o.assign(static_cast<std::size_t>(T * ldo), 0.0f), lse.assign(static_cast<std::size_t>(T), not_a_number);
    dq = dk = dv = std::vector<float>(static_cast<std::size_t>(T * hd), not_a_number);
    scratch.resize(flash_scratch(T, hd, true) + 64, std::byte{0xff});
  }
  FlashGradTask task(bool bf16) {
    auto* aligned = reinterpret_cast<std::byte*>((reinterpret_cast<std::uintptr_t>(scratch.data()) + 63) / 64 * 64);
    const FlashTask f{qkv.data(), qkv.data() + dim, qkv.data() + 2 * dim, ld, tokens, dim, 1.0f / std::sqrt(static_cast<float>(dim)), bf16, o.data(), ldo,
                      lse.data(), 1, aligned};
    return {f, d_o.data(), dq.data(), dk.data(), dv.data(), dim, dim};
  }
  void run(const TrainingKernels& k, bool bf16) {
    const FlashGradTask t = task(bf16);
    k.flash_forward(t.forward);
    k.flash_backward(t);
  }
};

}  // namespace

TEST_CASE("training: matrix products of operands as they lie, transposed or not") {
  for_each_training_table([](const TrainingKernels& k) {
    for (int transposed = 0; transposed < 4; ++transposed)
      for (const auto& [m, n, l] : {std::array<index_t, 3>{1, 1, 1}, {3, 17, 2}, {16, 16, 16}, {17, 33, 31}, {8, 48, 64}, {33, 97, 100}, {50, 49, 129}, {5, 16, 4500}}) {
        check_gemm<float>(k, m, n, l, transposed, transposed % 2);
        check_gemm<bf16>(k, m, n, l, transposed, transposed / 2);
      }
  });
}

TEST_CASE("training: attention without a T x T matrix, forward and backward") {
  for_each_training_table([](const TrainingKernels& k) {
    for (const auto& shape : {std::array<index_t, 2>{1, 2}, {2, 8}, {7, 16}, {63, 16}, {64, 64}, {65, 20}, {127, 64}, {130, 36}, {200, 128}, {193, 64}, {70, 256}}) {
      const index_t T = shape[0], hd = shape[1];
      CAPTURE(T);
      CAPTURE(hd);
      Head expected(T, hd), got(T, hd), rounded(T, hd);
      expected.run(reference::training_kernels, false);
      got.run(k, false);
      // f32: errors of some hundred roundings of 6e-8 each in sums of random signs.
      CHECK(relative(got.o, expected.o) < 2e-6);
      CHECK(relative(got.lse, expected.lse) < 1e-6);
      if (T > 1) {  // one key's weight is 1 whatever q and k are
        CHECK(relative(got.dq, expected.dq) < 4e-6);
        CHECK(relative(got.dk, expected.dk) < 4e-6);
      }
      CHECK(relative(got.dv, expected.dv) < 4e-6);
      if (!k.bf16_dot) continue;
      // bf16 rounds each operand to 2^-9; q k sums hd products, so that an exponent is off by some 2^-9 |q||k| / sqrt(hd).
      rounded.run(k, true);
      CHECK(relative(rounded.o, expected.o) < 1e-2);
      if (T > 2) {  // of two keys dp - do . o is next to nothing, and all rounding
        CHECK(relative(rounded.dq, expected.dq) < 1.5e-2);
        CHECK(relative(rounded.dk, expected.dk) < 1.5e-2);
      }
      CHECK(relative(rounded.dv, expected.dv) < 1.5e-2);
    }
  });
}

TEST_CASE("training: attention's reference gradient against finite differences") {
  Head h(9, 8);
  const FlashGradTask t = h.task(false);
  const auto objective = [&] {  // sum of d_o . o
    reference::flash_forward(t.forward);
    double sum = 0;
    for (index_t i = 0; i < h.tokens; ++i)
      for (index_t c = 0; c < h.dim; ++c) sum += static_cast<double>(h.d_o[static_cast<std::size_t>(i * h.ldo + c)]) * h.o[static_cast<std::size_t>(i * h.ldo + c)];
    return sum;
  };
  objective();
  reference::flash_backward(t);
  for (int part = 0; part < 3; ++part) {
    const std::vector<float>& gradient = part == 0 ? h.dq : part == 1 ? h.dk : h.dv;
    std::vector<float> numeric(gradient.size());
    for (index_t i = 0; i < h.tokens; ++i)
      for (index_t c = 0; c < h.dim; ++c) {
        float& x = h.qkv[static_cast<std::size_t>(i * h.ld + part * h.dim + c)];
        const float before = x, step = 1.0f / 64;
        x = before + step;
        const double up = objective();
        x = before - step;
        const double down = objective();
        x = before;
        numeric[static_cast<std::size_t>(i * h.dim + c)] = static_cast<float>((up - down) / (2 * step));
      }
    CHECK(relative(gradient, numeric) < 1e-3);  // of the step's third derivative, 1/64^2, and o's rounding / step
  }
}

TEST_CASE("training: gradients of the small operations, and AdamW") {
  for_each_training_table([](const TrainingKernels& k) {
    for (const index_t n : awkward_sizes()) {
      CAPTURE(n);
      Random random(static_cast<std::uint64_t>(n));
      const auto x = random.vector(n, 2.0f), dy = random.vector(n), gain = random.vector(n), before = random.vector(n);
      auto got = before, expected = before;
      float rms = 0, expected_rms = 0;
      k.rmsnorm_backward(got.data(), dy.data(), x.data(), gain.data(), n, 1e-5f, &rms);
      reference::rmsnorm_backward(expected.data(), dy.data(), x.data(), gain.data(), n, 1e-5f, &expected_rms);
      CHECK(std::fabs(rms - expected_rms) <= 8 * eps * expected_rms);
      double dots = 0;
      for (std::size_t i = 0; i < x.size(); ++i) dots += std::fabs(static_cast<double>(dy[i]) * gain[i] * x[i]);
      check_close(got, expected, [&](index_t i) {
        const auto u = static_cast<std::size_t>(i);
        const double r = rms, own = std::fabs(r * dy[u] * gain[u]), shared = std::fabs(x[u]) * r * r * r * dots / static_cast<double>(n);
        return 16 * eps * (own + shared + std::fabs(before[u]));
      });

      const index_t rows = 37, ld_dy = n + 2, ld_x = n + 5;
      const auto many_dy = random.vector(rows * ld_dy), many_x = random.vector(rows * ld_x), each_rms = random.vector(rows);
      got = expected = before;
      k.gain_backward(got.data(), many_dy.data(), ld_dy, many_x.data(), ld_x, each_rms.data(), rows, n);
      reference::gain_backward(expected.data(), many_dy.data(), ld_dy, many_x.data(), ld_x, each_rms.data(), rows, n);
      check_close(got, expected, [&](index_t i) {
        double size = std::fabs(before[static_cast<std::size_t>(i)]);
        for (index_t t = 0; t < rows; ++t)
          size += std::fabs(static_cast<double>(many_dy[static_cast<std::size_t>(t * ld_dy + i)]) * many_x[static_cast<std::size_t>(t * ld_x + i)] * each_rms[static_cast<std::size_t>(t)]);
        return sum_bound * size;
      });

      const auto up = random.vector(n, 3.0f);
      std::vector<float> dgate = x, dup = up, expected_dgate(x.size()), expected_dup(x.size());  // in place
      k.swiglu_backward(dgate.data(), dup.data(), dy.data(), dgate.data(), dup.data(), n);
      reference::swiglu_backward(expected_dgate.data(), expected_dup.data(), dy.data(), x.data(), up.data(), n);
      check_close(dgate, expected_dgate, [&](index_t i) {
        const auto u = static_cast<std::size_t>(i);
        return 8 * eps * std::fabs(dy[u] * up[u]) * (1 + std::fabs(x[u]));  // 1 + g (1 - s) cancels near g = -1.28
      });
      check_close(dup, expected_dup, [&](index_t i) { return 8 * eps * std::fabs(expected_dup[static_cast<std::size_t>(i)]); });

      const auto target = static_cast<std::int32_t>(random.below(n));
      std::vector<float> gradient = x, expected_gradient(x.size());
      float loss = 0, expected_loss = 0, alone = 0;
      k.cross_entropy(nullptr, x.data(), n, target, 0.25f, &alone);
      k.cross_entropy(gradient.data(), gradient.data(), n, target, 0.25f, &loss);  // in place
      reference::cross_entropy(expected_gradient.data(), x.data(), n, target, 0.25f, &expected_loss);
      CHECK(loss == alone);
      CHECK(std::fabs(loss - expected_loss) <= 8 * eps * (std::fabs(expected_loss) + std::fabs(x[static_cast<std::size_t>(target)]) + 10));
      check_close(gradient, expected_gradient, [&](index_t i) { return 16 * eps * (std::fabs(expected_gradient[static_cast<std::size_t>(i)]) + (i == target ? 0.25 : 0)); });

      double sum = 0, expected_sum = 0;
      k.sum_of_squares(x.data(), n, &sum);
      reference::sum_of_squares(x.data(), n, &expected_sum);
      CHECK(std::fabs(sum - expected_sum) <= sum_bound * expected_sum);

      std::vector<float> p = x, m = random.vector(n, 0.1f), v = random.vector(n, 0.1f);
      for (float& s : v) s *= s;
      std::vector<float> p2 = p, m2 = m, v2 = v;
      AdamwTask t{p.data(), m.data(), v.data(), dy.data(), n, 1e-2f, 0.9f, 0.95f, 1e-8f, 0.1f, 0.3f, 0.2f, 0.5f};
      k.adamw(t);
      t.p = p2.data(), t.m = m2.data(), t.v = v2.data();
      reference::adamw(t);
      check_close(m, m2, [&](index_t i) { return 4 * eps * (std::fabs(m2[static_cast<std::size_t>(i)]) + std::fabs(dy[static_cast<std::size_t>(i)])); });
      check_close(v, v2, [&](index_t i) { return 4 * eps * v2[static_cast<std::size_t>(i)]; });
      check_close(p, p2, [&](index_t i) {
        const auto u = static_cast<std::size_t>(i);
        return 2 * eps * std::fabs(p2[u]) + 16 * eps * 1e-2 * (std::fabs(m2[u]) + std::fabs(dy[u])) / (std::sqrt(v2[u]) + 1e-8);
      });
    }
  });
}

TEST_CASE("training: the references of the small operations against finite differences") {
  constexpr index_t n = 13;
  Random random(5);
  const auto weights = random.vector(n), gain = random.vector(n);
  auto x = random.vector(n), up = random.vector(n);
  const auto numeric = [&](std::vector<float>& at, auto&& f) {
    std::vector<float> g(at.size());
    for (std::size_t i = 0; i < at.size(); ++i) {
      const float before = at[i], step = 1.0f / 128;
      at[i] = before + step;
      const double above = f();
      at[i] = before - step;
      const double below = f();
      at[i] = before;
      g[i] = static_cast<float>((above - below) / (2 * step));
    }
    return g;
  };
  const auto weighted = [&](const std::vector<float>& y) {
    double sum = 0;
    for (std::size_t i = 0; i < y.size(); ++i) sum += static_cast<double>(y[i]) * weights[i];
    return sum;
  };
  std::vector<float> y(n), dx(n, 0.0f), dup(n), dgain(n, 0.0f);
  float rms = 0, loss = 0;
  reference::rmsnorm_backward(dx.data(), weights.data(), x.data(), gain.data(), n, 1e-5f, &rms);
  reference::gain_backward(dgain.data(), weights.data(), n, x.data(), n, &rms, 1, n);
  const auto norm = [&] { return reference::rmsnorm(y.data(), x.data(), gain.data(), n, 1e-5f), weighted(y); };
  CHECK(relative(dx, numeric(x, norm)) < 1e-3);
  auto moving = gain;
  CHECK(relative(dgain, numeric(moving, [&] { return reference::rmsnorm(y.data(), x.data(), moving.data(), n, 1e-5f), weighted(y); })) < 1e-3);
  reference::swiglu_backward(dx.data(), dup.data(), weights.data(), x.data(), up.data(), n);
  const auto gated = [&] { return reference::swiglu(y.data(), x.data(), up.data(), n), weighted(y); };
  CHECK(relative(dx, numeric(x, gated)) < 1e-3);
  CHECK(relative(dup, numeric(up, gated)) < 1e-3);
  reference::cross_entropy(dx.data(), x.data(), n, 4, 1.0f, &loss);
  const auto entropy = [&] { return reference::cross_entropy(nullptr, x.data(), n, 4, 1.0f, &loss), static_cast<double>(loss); };
  CHECK(relative(dx, numeric(x, entropy)) < 1e-3);
}
