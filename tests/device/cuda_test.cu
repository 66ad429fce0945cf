// Each operation of CudaDevice against the CPU's reference kernels, at awkward sizes, for both types of activations.
#include "tinyllama/cuda.hpp"
#include "tinyllama/generate/sampler.hpp"

#include "tests/device/card.hpp"
#include "tests/kernels/agree.hpp"

namespace {

using namespace tinyllama;
using namespace tinyllama::test;

/// Numbers that A holds.
template <class A>
std::vector<float> rounded(std::vector<float> v) {
  for (float& x : v) x = static_cast<float>(A(x));
  return v;
}
template <class A>
std::vector<float> numbers(Random& random, index_t n, float size = 1.0f) { return rounded<A>(random.vector(n, size)); }

/// A matrix on the card; `ld` columns lie from one row to the next, and the rest holds NaN.
template <class D, class T>
struct OnCard {
  D& dev;
  index_t rows, columns, ld;
  Memory<D> memory;

  OnCard(D& d, index_t r, index_t c, index_t stride = 0) : dev(d), rows(r), columns(c), ld(std::max(c, stride)), memory(d, static_cast<std::size_t>(r * ld) * sizeof(T)) {
    put(std::vector<float>(static_cast<std::size_t>(r * c), not_a_number));
  }
  OnCard(D& d, const std::vector<float>& v, index_t r, index_t c, index_t stride = 0) : OnCard(d, r, c, stride) { put(v); }
  void put(const std::vector<float>& v) {
    std::vector<T> t(static_cast<std::size_t>(rows * ld), T(not_a_number));
    for (index_t i = 0; i < rows; ++i)
      for (index_t j = 0; j < columns; ++j) t[static_cast<std::size_t>(i * ld + j)] = T(v[static_cast<std::size_t>(i * columns + j)]);
    dev.upload(memory.data(), t.data(), t.size() * sizeof(T));
  }
  /// The matrix; what lies beside its rows must be as it was.
  std::vector<float> get() const {
    std::vector<T> t(static_cast<std::size_t>(rows * ld));
    dev.download(t.data(), memory.data(), t.size() * sizeof(T));
    std::vector<float> v;
    for (index_t i = 0; i < rows; ++i)
      for (index_t j = 0; j < ld; ++j) {
        const float x = static_cast<float>(t[static_cast<std::size_t>(i * ld + j)]);
        if (j < columns) v.push_back(x);
        else REQUIRE(std::isnan(x));
      }
    return v;
  }
  View<T, dyn, dyn> view() const { return {reinterpret_cast<T*>(memory.data()), {rows, columns}, {ld, 1}}; }
};

template <class A>
inline constexpr double rounding = std::is_same_v<A, float> ? 0 : 0x1p-8;  // of a result, relative: half a unit in the last place and a little more

Cpu& reference_device() {
  static Cpu dev({.threads = 2, .kernels = &reference::kernels});
  return dev;
}
View<float, dyn, dyn> matrix(std::vector<float>& v, index_t rows, index_t columns) { return {v.data(), {rows, columns}}; }
View<const float, dyn, dyn> matrix(const std::vector<float>& v, index_t rows, index_t columns) { return {v.data(), {rows, columns}}; }

}  // namespace

TEST_CASE("cuda: memory, and what cannot be had") {
  if (no_card()) return;
  Cuda dev;
  CHECK(dev.capability() >= 80);
  CHECK_FALSE(dev.name().empty());
  const std::vector<float> v{1, 2, 3, 4, 5};
  Memory<Cuda> a(dev, 20), b(dev, 20);
  dev.upload(a.data(), v.data(), 20);
  dev.copy_bytes(b.data(), a.data(), 20);
  dev.zero(a.data(), 8);
  std::vector<float> w(5);
  dev.download(w.data(), b.data(), 20);
  CHECK(w == v);
  Cuda::Staging staging;
  const auto h = dev.host(View<const float, dyn>(reinterpret_cast<const float*>(a.data()), {5}), staging);
  CHECK(std::vector<float>(h.data(), h.data() + 5) == std::vector<float>{0, 0, 3, 4, 5});
  CHECK_THROWS_WITH_AS(static_cast<void>(dev.allocate(std::size_t{1} << 50)), doctest::Contains("out of memory"), Error);
  CHECK_THROWS_WITH_AS(Cuda({.card = 1000}), doctest::Contains("CUDA: card: expected 0.."), Error);
  int before = -1, after = -1;
  cudaGetDevice(&before);
  CudaF32 other;
  other.zero(Memory<CudaF32>(other, 100).data(), 100);
  cudaGetDevice(&after);
  CHECK(before == after);
}

TEST_CASE("cuda: the memory plan counts what a card holds") {
  constexpr PlanOptions o{.batch = 1, .tokens = 64, .weights = Format::bf16};
  constexpr MemoryPlan cpu = memory_plan<tinyllama_1b>(o), card = memory_plan<tinyllama_1b, Cuda>(o);
  static_assert(card.weights == cpu.weights && card.cache == cpu.cache);
  static_assert(card.activations < cpu.activations + Cuda::blas_workspace + Cuda::weights_scratch);
  if (no_card()) return;
  Cuda dev;
  for (const FormatInfo& f : formats) {
    Random random(9);
    const TestMatrix w(f.format, 48, 512, random);
    const Memory<Cuda> memory(dev, Cuda::packed_bytes(f.format, 48, 512));
    const Matrix m = dev.pack(memory.data(), {f.format, false, 48, 512, w.stored.data()});
    CHECK(m.packed);
    const auto end = static_cast<std::size_t>(cuda::row_end_bytes(f.format));
    CHECK(memory.bytes() <= 48 * ((static_cast<std::size_t>(row_bytes(f.format, 512)) + 15) / 16 * 16 + end));  // nothing but the padding of rows, and their scales
  }
}

TEST_CASE_TEMPLATE("cuda: rmsnorm, add and add_rmsnorm", A, float, bf16) {
  if (no_card()) return;
  using D = CudaDevice<A>;
  D dev;
  Random random(1);
  for (const index_t n : awkward_sizes())
    for (const index_t rows : {1, 3}) {
      CAPTURE(n);
      const auto gain = random.vector(n), residual = random.vector(rows * n);
      auto x = random.vector(rows * n);
      const OnCard<D, float> g(dev, gain, 1, n), r(dev, residual, rows, n, n + n % 3), xs(dev, x, rows, n);
      const OnCard<D, A> out(dev, rows, n, n + n % 5);
      std::vector<float> expected(x.size());
      const auto near = [&](index_t i) { return (rounding<A> + 8 * eps) * std::fabs(expected[static_cast<std::size_t>(i)]); };
      dev.rmsnorm(out.view(), xs.view(), g.view().data(), 1e-5f);
      for (index_t t = 0; t < rows; ++t) reference::rmsnorm(expected.data() + t * n, x.data() + t * n, gain.data(), n, 1e-5f);
      check_close(out.get(), expected, near);
      dev.add_rmsnorm(out.view(), xs.view(), r.view(), g.view().data(), 1e-5f);
      for (index_t t = 0; t < rows; ++t) reference::add_rmsnorm(expected.data() + t * n, x.data() + t * n, residual.data() + t * n, gain.data(), n, 1e-5f);
      check_close(out.get(), expected, near);
      check_same(xs.get(), x);
      dev.add(xs.view(), r.view());
      reference::add(x.data(), residual.data(), rows * n);
      check_same(xs.get(), x);
    }
}

TEST_CASE_TEMPLATE("cuda: rope in both layouts, and its angles", A, float, bf16) {
  if (no_card()) return;
  using D = CudaDevice<A>;
  D dev;
  Random random(2);
  constexpr index_t rows = 5;
  for (const index_t head_dim : {2, 6, 16, 48, 64, 128})
    for (const index_t heads : {1, 3, 9})
      for (const RopeLayout layout : {RopeLayout::half, RopeLayout::interleaved}) {
        CAPTURE(head_dim);
        CAPTURE(heads);
        std::vector<double> frequencies;
        for (index_t i = 0; i < head_dim / 2; ++i) frequencies.push_back(std::pow(10000.0, -2.0 * static_cast<double>(i) / static_cast<double>(head_dim)));
        const Sequence batch[] = {{0, 3, 1, nullptr}, {3, 2, 123456, nullptr}};
        const OnCard<D, float> cos(dev, rows, head_dim / 2), sin(dev, rows, head_dim / 2);
        dev.rope_angles(cos.view(), sin.view(), frequencies, dev.batch({}, batch));
        std::vector<float> c(static_cast<std::size_t>(rows * head_dim / 2)), s(c);
        reference_device().rope_angles(matrix(c, rows, head_dim / 2), matrix(s, rows, head_dim / 2), frequencies, batch);
        check_close(cos.get(), c, [](index_t) { return 2e-7; });
        check_close(sin.get(), s, [](index_t) { return 2e-7; });
        auto x = numbers<A>(random, rows * heads * head_dim);
        const OnCard<D, A> xs(dev, x, rows, heads * head_dim, heads * head_dim + 2 * (heads % 2));
        dev.rope(xs.view(), cos.view(), sin.view(), heads, layout);
        for (index_t t = 0; t < rows; ++t) reference::rope(x.data() + t * heads * head_dim, c.data() + t * head_dim / 2, s.data() + t * head_dim / 2, heads, head_dim, layout);
        check_close(xs.get(), x, [&](index_t i) { return rounding<A> * std::fabs(x[static_cast<std::size_t>(i)]) + 4e-6; });
      }
}

TEST_CASE_TEMPLATE("cuda: swiglu and softmax", A, float, bf16) {
  if (no_card()) return;
  using D = CudaDevice<A>;
  D dev;
  Random random(3);
  for (const index_t n : awkward_sizes()) {
    CAPTURE(n);
    constexpr index_t rows = 3;
    auto both = numbers<A>(random, rows * 2 * n, 4.0f);
    both[0] = -100, both[static_cast<std::size_t>(n - 1)] = 88;
    both = rounded<A>(both);
    const OnCard<D, A> in(dev, both, rows, 2 * n), out(dev, rows, n);
    dev.swiglu(out.view(), columns(in.view(), 0, n), columns(in.view(), n, 2 * n));
    std::vector<float> expected(static_cast<std::size_t>(rows * n));
    for (index_t t = 0; t < rows; ++t) reference::swiglu(expected.data() + t * n, both.data() + t * 2 * n, both.data() + t * 2 * n + n, n);
    check_close(out.get(), expected, [&](index_t i) { return (rounding<A> + 16 * eps) * std::fabs(expected[static_cast<std::size_t>(i)]) + 1e-30; });

    const auto x = random.vector(rows * n, 5.0f);
    const OnCard<D, float> xs(dev, x, rows, n, n + 1);
    dev.softmax(xs.view(), xs.view(), 0.7f);
    for (index_t t = 0; t < rows; ++t) reference::softmax(expected.data() + t * n, x.data() + t * n, n, 0.7f);
    check_close(xs.get(), expected, [&](index_t i) { return 60 * eps * expected[static_cast<std::size_t>(i)] + 1e-9; });
  }
}

TEST_CASE("cuda: sampling draws what the host's sampler draws") {
  if (no_card()) return;
  Cuda dev;
  struct Options { float temperature, top_p, min_p; int top_k; };
  const std::vector<Options> all{{0.0f, 1, 0, 0}, {1.0f, 1, 0, 0}, {0.8f, 0.95f, 0, 0}, {1.5f, 0.5f, 0, 0}, {0.7f, 1, 0, 40}, {1.0f, 0.9f, 0.05f, 20}, {1.0f, 0.01f, 0, 0}, {2.0f, 0.99f, 0.001f, 1}, {1.0f, 1, 0.5f, 100000}};
  for (const index_t n : {1, 5, 331, 32000, 50257})
    for (const bool ties : {false, true}) {
      CAPTURE(n);
      CAPTURE(ties);
      Random random(static_cast<std::uint32_t>(n));
      const auto rows = static_cast<index_t>(all.size());
      auto logits = random.vector(rows * n, 4.0f);
      if (ties)
        for (float& x : logits) x = std::round(x);
      OnCard<Cuda, float> x(dev, logits, rows, n, n + 3);
      OnCard<Cuda, float> ids(dev, rows, 1);
      for (std::uint64_t seed = 0; seed < 12; ++seed) {
        std::vector<Draw> draws;
        std::vector<std::int32_t> expected, found(all.size());
        for (std::size_t r = 0; r < all.size(); ++r) {
          SamplingOptions o{.temperature = all[r].temperature, .top_k = all[r].top_k, .top_p = all[r].top_p, .min_p = all[r].min_p, .seed = seed};
          draws.push_back(*Sampler(o).draw());
          expected.push_back(Sampler(o).sample(std::span<const float>(logits).subspan(r * static_cast<std::size_t>(n), static_cast<std::size_t>(n))));
        }
        dev.sample(reinterpret_cast<std::int32_t*>(ids.memory.data()), x.view(), draws);
        dev.download(found.data(), ids.memory.data(), found.size() * sizeof(std::int32_t));
        REQUIRE(found == expected);
      }
    }
  // Bad rows say so.
  std::vector<float> bad(200, -INFINITY);
  bad[150] = not_a_number;
  OnCard<Cuda, float> x(dev, bad, 2, 100);
  OnCard<Cuda, float> ids(dev, 2, 1);
  const std::vector<Draw> draws{{1.0f, 1, 0, 0, 0.5}, {0.0f, 1, 0, 0, 0}};
  dev.sample(reinterpret_cast<std::int32_t*>(ids.memory.data()), x.view(), draws);
  std::int32_t found[2];
  dev.download(found, ids.memory.data(), sizeof found);
  CHECK(found[0] == -1);
  CHECK(found[1] == -1);
}

TEST_CASE_TEMPLATE("cuda: embedding, last rows and argmax", A, float, bf16) {
  if (no_card()) return;
  using D = CudaDevice<A>;
  D dev;
  Random random(4);
  const std::vector<std::int32_t> ids = {0, 99, 17, 17, 31, 98, 0};
  const auto rows = static_cast<index_t>(ids.size());
  const Sequence batch[] = {{0, 2, 0, nullptr}, {2, 1, 9, nullptr}, {3, 4, 0, nullptr}};
  for (const FormatInfo& f : formats)
    for (const index_t k : {256, 4352, 33}) {
      if (k % f.block) continue;
      CAPTURE(std::string(f.name));
      CAPTURE(k);
      TestMatrix table(f.format, 100, k, random);
      const float* const scale = table.with_scales(random);
      const Memory<D> memory(dev, D::packed_bytes(f.format, 100, k));
      const Matrix m = dev.pack(memory.data(), {f.format, false, 100, k, table.stored.data(), scale});
      const OnCard<D, float> out(dev, rows, k);
      dev.embedding(out.view(), m, dev.batch(ids, batch));
      const auto got = out.get();
      for (index_t i = 0; i < rows; ++i) {
        const auto expected = table.row(ids[static_cast<std::size_t>(i)]);
        float most = 0;
        for (const float e : expected) most = std::max(most, std::fabs(e));
        check_close(got.data() + i * k, expected.data(), k, [&](index_t) { return is_quantised(f.format) ? 4 * eps * most : 0.0; });
      }
    }
  const auto x = numbers<A>(random, rows * 77);
  const OnCard<D, A> xs(dev, x, rows, 77), last(dev, 3, 77);
  dev.last_rows(last.view(), xs.view(), dev.batch(ids, batch));
  std::vector<float> expected(3 * 77);
  reference_device().last_rows(matrix(expected, 3, 77), matrix(x, rows, 77), batch);
  check_same(last.get(), expected);
  for (const index_t n : {1, 31, 1025, 32000}) {
    auto logits = random.vector(4 * n);
    const std::vector<std::int32_t> top{0, static_cast<std::int32_t>(n - 1), static_cast<std::int32_t>(n / 2), static_cast<std::int32_t>(n / 3)};
    for (index_t r = 0; r < 4; ++r) {
      logits[static_cast<std::size_t>(r * n + top[static_cast<std::size_t>(r)])] = 100;
      if (top[static_cast<std::size_t>(r)] + 40 < n) logits[static_cast<std::size_t>(r * n + top[static_cast<std::size_t>(r)] + 40)] = 100;  // an equal one behind
    }
    const OnCard<D, float> l(dev, logits, 4, n);
    const Memory<D> to(dev, 16);
    dev.argmax(reinterpret_cast<std::int32_t*>(to.data()), l.view());
    std::vector<std::int32_t> got(4);
    dev.download(got.data(), to.data(), 16);
    CHECK(got == top);
  }
}

namespace {

/// Parts of one Linear, behind each other in memory as in a model.
template <class D>
struct WeightsOnCard {
  std::vector<TestMatrix> parts;
  std::vector<Memory<D>> memory;
  Linear linear;
  WeightsOnCard(D& dev, std::initializer_list<std::pair<Format, index_t>> list, index_t k, Compute compute = Compute::automatic) {
    Random random(static_cast<std::uint64_t>(k));
    linear.compute = compute;
    std::size_t bytes = 0;
    for (auto [f, n] : list) bytes += D::packed_bytes(f, n, k);
    memory.emplace_back(dev, bytes);
    std::byte* at = memory.back().data();
    for (auto [f, n] : list) {
      TestMatrix& m = parts.emplace_back(f, n, k, random);
      linear.part[static_cast<std::size_t>(linear.parts++)] = dev.pack(at, {f, false, n, k, m.stored.data(), m.with_scales(random)});
      at += D::packed_bytes(f, n, k);
    }
  }
};

// What rounding the activations to 8 bits costs: half a step of the largest of each 32.
double int8_error(const float* w, const float* x, index_t k) {
  double total = 0;
  for (index_t g = 0; g < k; g += 32) {
    double most = 0;
    for (index_t i = g; i < std::min(k, g + 32); ++i) most = std::max(most, std::fabs(static_cast<double>(x[i])));
    for (index_t i = g; i < std::min(k, g + 32); ++i) total += std::fabs(static_cast<double>(w[i])) * 0.501 * most / 127;
  }
  return total;
}

// The same for rows of e4m3: half a step of each number, and of the smallest ones, which are fixed in relation to the row's largest.
double e4m3_error(const float* w, const float* x, index_t k) {
  double total = 0, most = 0;
  for (index_t i = 0; i < k; ++i) most = std::max(most, std::fabs(static_cast<double>(x[i])));
  for (index_t i = 0; i < k; ++i) total += std::fabs(static_cast<double>(w[i])) * (std::fabs(static_cast<double>(x[i])) * 0x1p-4 + most / 448 * 0x1p-10);
  return total;
}

template <class A, class Y>
void check_matmul(CudaDevice<A>& dev, const WeightsOnCard<CudaDevice<A>>& w, index_t m, index_t pad = 0) {
  const index_t k = w.linear.columns(), n = w.linear.rows();
  CAPTURE(m);
  CAPTURE(k);
  CAPTURE(n);
  Random random(static_cast<std::uint64_t>(m));
  const auto x = numbers<A>(random, m * k);
  std::vector<float> expected(static_cast<std::size_t>(m * n));
  std::vector<double> bound(expected.size());
  index_t column = 0;
  for (const TestMatrix& part : w.parts) {
    for (index_t j = 0; j < part.n; ++j) {
      const auto row = part.row(j);
      for (index_t i = 0; i < m; ++i) {
        const float* xi = x.data() + i * k;
        double sum = 0, size = 0;
        for (index_t a = 0; a < k; ++a) sum += static_cast<double>(row[static_cast<std::size_t>(a)]) * xi[a], size += std::fabs(static_cast<double>(row[static_cast<std::size_t>(a)]) * xi[a]);
        const auto at = static_cast<std::size_t>(i * n + column + j);
        expected[at] = static_cast<float>(sum);
        bound[at] = 2 * sum_bound * magnitude(part.format, row.data(), xi, k) + rounding<Y> * std::fabs(sum) + 1e-30;
        if (std::is_same_v<A, float>) continue;
        if (m > 8 && part.format != Format::bf16) bound[at] += 0x1p-8 * size / 2;  // weights rounded to bf16
        if (is_quantised(part.format) && w.linear.compute != Compute::f32) bound[at] += int8_error(row.data(), xi, k);
        if (part.format == Format::f8_e4m3 && m > 1 && w.linear.compute != Compute::f32) bound[at] += e4m3_error(row.data(), xi, k);  // where the library takes the shape
      }
    }
    column += part.n;
  }
  const OnCard<CudaDevice<A>, A> xs(dev, x, m, k, k + pad);
  const OnCard<CudaDevice<A>, Y> y(dev, m, n, n + pad);
  dev.matmul(y.view(), xs.view(), w.linear);
  check_close(y.get(), expected, [&](index_t i) { return bound[static_cast<std::size_t>(i)]; });
}

}  // namespace

TEST_CASE_TEMPLATE("cuda: matmul in each format, few rows and many", A, float, bf16) {
  if (no_card()) return;
  CudaDevice<A> dev;
  for (const FormatInfo& f : formats) {
    CAPTURE(std::string(f.name));
    for (const Compute c : {Compute::automatic, Compute::f32}) {
      const WeightsOnCard<CudaDevice<A>> w(dev, {{f.format, 133}}, 512, c), wide(dev, {{f.format, 40}}, 2304, c);
      for (const index_t m : {1, 2, 5, 8, 9, 33}) {
        check_matmul<A, float>(dev, w, m);
        check_matmul<A, A>(dev, wide, m, 8);
      }
    }
  }
}

// A norm between two products, whoever reads it: on Hopper half of it may be left to the product that was named, and is done in full for any other.
TEST_CASE("cuda: products that norm on their way") {
  if (no_card()) return;
  Cuda dev;
  Random random(3);
  constexpr index_t k = 264, n = 512;
  const WeightsOnCard<Cuda> w(dev, {{Format::bf16, n}}, k), plain(dev, {{Format::bf16, 96}, {Format::bf16, 40}}, n), packed(dev, {{Format::q8_0, 96}}, n);
  const auto gain = random.vector(n);
  const OnCard<Cuda, float> gains(dev, gain, 1, n);
  for (const index_t m : {1, 2, 40, 112, 150}) {
    CAPTURE(m);
    const auto x = random.vector(m * k), residual = random.vector(m * n);
    const OnCard<Cuda, bf16> xs(dev, x, m, k), normed(dev, m, n), in_full(dev, m, n), a(dev, m, 136), b(dev, m, 136), c(dev, m, 96), d(dev, m, 96);
    const OnCard<Cuda, float> rs(dev, residual, m, n), y(dev, m, n), sum(dev, m, n);
    dev.matmul_add(sum.view(), xs.view(), w.linear, rs.view());
    dev.rmsnorm(in_full.view(), sum.view(), gains.view().data(), 1e-5f);
    dev.matmul(a.view(), in_full.view(), plain.linear), dev.matmul(c.view(), in_full.view(), packed.linear);
    for (const bool named : {true, false}) {  // or another reader than was said
      dev.matmul_add_rmsnorm(y.view(), normed.view(), xs.view(), w.linear, rs.view(), gains.view().data(), 1e-5f, named ? plain.linear : packed.linear);
      check_same(y.get(), sum.get());
      dev.matmul(b.view(), normed.view(), plain.linear);
      const auto want = a.get();
      double squares = 0;
      for (const float v : want) squares += static_cast<double>(v) * v;
      const double size = std::sqrt(squares / static_cast<double>(want.size()));  // rows rounded before they are scaled or behind it: errors of terms, 2^-9 at most each, add up as the terms do
      check_close(b.get(), want, [&](index_t i) { return 0x1p-7 * std::fabs(want[static_cast<std::size_t>(i)]) + 0x1p-6 * size; });
      dev.matmul_add_rmsnorm(y.view(), normed.view(), xs.view(), w.linear, rs.view(), gains.view().data(), 1e-5f, plain.linear);
      dev.matmul(d.view(), normed.view(), packed.linear);
      check_same(d.get(), c.get());
      check_same(normed.get(), in_full.get());
    }
    // Norms in full over one that nobody read.
    dev.matmul_add_rmsnorm(y.view(), normed.view(), xs.view(), w.linear, rs.view(), gains.view().data(), 1e-5f, plain.linear);
    dev.rmsnorm(normed.view(), sum.view(), gains.view().data(), 1e-5f);
    dev.matmul(b.view(), normed.view(), plain.linear);
    check_same(b.get(), a.get());
  }
}

// Of many rows: a norm whose other half is done by gated products, behind the product with qkv, or in full.
TEST_CASE("cuda: products of many rows that norm on their way") {
  if (no_card()) return;
  Cuda dev;
  Random random(4);
  constexpr index_t m = 600, k = 264, n = 512, heads = 4, kv_heads = 2, head_dim = 64, all = (heads + 2 * kv_heads) * head_dim, ffn = 136;
  const WeightsOnCard<Cuda> w(dev, {{Format::bf16, n}}, k), qkv(dev, {{Format::bf16, heads * head_dim}, {Format::bf16, kv_heads * head_dim}, {Format::bf16, kv_heads * head_dim}}, n);
  const WeightsOnCard<Cuda> gate_up(dev, {{Format::bf16, ffn}, {Format::bf16, ffn}}, n), other(dev, {{Format::bf16, 96}}, n);
  const auto gain = random.vector(n, 0.05f), x = random.vector(m * k), residual = random.vector(m * n), cos = random.vector(m * head_dim / 2), sin = random.vector(m * head_dim / 2);
  const OnCard<Cuda, float> gains(dev, gain, 1, n), rs(dev, residual, m, n), y(dev, m, n), sum(dev, m, n), cs(dev, cos, m, head_dim / 2), sn(dev, sin, m, head_dim / 2);
  const OnCard<Cuda, bf16> xs(dev, x, m, k), normed(dev, m, n), in_full(dev, m, n);
  dev.matmul_add(sum.view(), xs.view(), w.linear, rs.view());
  dev.rmsnorm(in_full.view(), sum.view(), gains.view().data(), 1e-5f);
  const auto norm = [&](const Linear& reader) { dev.matmul_add_rmsnorm(y.view(), normed.view(), xs.view(), w.linear, rs.view(), gains.view().data(), 1e-5f, reader); };
  const auto close = [&](const std::vector<float>& got, const std::vector<float>& want) {  // by the size of their row
    const auto columns = static_cast<index_t>(got.size()) / m;
    for (index_t r = 0; r < m; ++r) {
      double difference = 0, size = 0;
      for (index_t i = r * columns; i < (r + 1) * columns; ++i) {
        const double e = want[static_cast<std::size_t>(i)], d = got[static_cast<std::size_t>(i)] - e;
        difference += d * d, size += e * e;
      }
      CAPTURE(r);
      REQUIRE(std::sqrt(difference / size) < 1e-2);
    }
  };
  norm(gate_up.linear);
  check_close(y.get(), sum.get(), [&](index_t) { return 2e-4; });
  const OnCard<Cuda, bf16> both(dev, m, 2 * ffn), a(dev, m, ffn), b(dev, m, ffn), c(dev, m, 96), d(dev, m, 96);
  dev.matmul_swiglu(a.view(), both.view(), in_full.view(), gate_up.linear);
  dev.matmul_swiglu(b.view(), both.view(), normed.view(), gate_up.linear);
  close(b.get(), a.get());
  dev.matmul(c.view(), in_full.view(), other.linear);
  norm(gate_up.linear);
  dev.matmul(d.view(), normed.view(), other.linear);  // who was not named
  close(d.get(), c.get()), close(normed.get(), in_full.get());
  for (const Format f : {Format::bf16, Format::f8_e4m3, Format::q8_0, Format::f32}) {
    CAPTURE(name(f));
    const CacheShape shape{f, 1, kv_heads, head_dim};
    std::vector<std::vector<float>> results;
    for (const bool halves : {false, true}) {
      std::vector<Memory<Cuda>> memory;
      std::vector<std::byte*> pages;
      for (index_t at = 0; at < m; at += page_tokens) pages.push_back(memory.emplace_back(dev, static_cast<std::size_t>(shape.page_bytes())).data());
      const Sequence s{0, m, 0, pages.data()};
      const auto batch = dev.batch({}, {&s, 1});
      const OnCard<Cuda, bf16> turned(dev, m, all), out(dev, m, heads * head_dim);
      if (halves) norm(qkv.linear);
      dev.matmul_rope_store_kv(turned.view(), halves ? normed.view() : in_full.view(), qkv.linear, cs.view(), sn.view(), RopeLayout::half, shape, 0, batch);
      const auto q = columns(turned.view(), 0, heads * head_dim);
      dev.attention(out.view(), q, shape, 0, batch);
      results.push_back(out.get());
      const OnCard<Cuda, bf16> qs(dev, m, heads * head_dim);
      for (index_t r = 0; r < m; ++r) dev.copy_bytes(qs.view().data() + r * heads * head_dim, q.data() + r * all, heads * head_dim * sizeof(bf16));
      results.push_back(qs.get());
    }
    close(results[3], results[1]);  // q
    // A key rounded to the other neighbour in 8 bits moves scores, and with them everything.
    double difference = 0, size = 0;
    for (std::size_t i = 0; i < results[0].size(); ++i) difference += std::pow(results[2][i] - results[0][i], 2.0), size += std::pow(results[0][i], 2.0);
    CHECK(std::sqrt(difference / size) < (f == Format::f8_e4m3 ? 0.2 : 0.05));
  }
}

// On Hopper x is quantised too, and by rule: with those numbers the product is exact up to the sums of the tensor cores.
TEST_CASE("cuda: matmul of 8-bit floats by 8-bit floats") {
  if (no_card()) return;
  Cuda dev;
  if (dev.capability() != 90) {
    MESSAGE("skipped: not compute capability 9.0");
    return;
  }
  double worst = 0;
  const auto check = [&]<class Y>(Y, const WeightsOnCard<Cuda>& w, index_t m, bool add) {
    const index_t k = w.linear.columns(), n = w.linear.rows();
    CAPTURE(m);
    CAPTURE(k);
    CAPTURE(n);
    Random random(static_cast<std::uint64_t>(m + k));
    auto x = numbers<bf16>(random, m * k);
    if (m > 2) std::fill_n(x.begin() + k, k, 0.0f);
    const auto residual = numbers<Y>(random, m * n);
    std::vector<float> rounded(x), expected(static_cast<std::size_t>(m * n));
    std::vector<double> bound(expected.size());
    for (index_t i = 0; i < m; ++i) {
      float most = 0;
      for (index_t a = 0; a < k; ++a) most = std::max(most, std::fabs(x[static_cast<std::size_t>(i * k + a)]));
      const float inverse = most > 1e-30f ? 448.0f / most : 0.0f, scale = most * (1.0f / 448.0f);
      for (index_t a = 0; m > 64 && a < k; ++a) {  // fewer rows of x stay as they are (stream_gemm.cuh)
        float& v = rounded[static_cast<std::size_t>(i * k + a)];
        v = static_cast<float>(e4m3(v * inverse)) * scale;
      }
    }
    index_t column = 0;
    for (const TestMatrix& part : w.parts) {
      for (index_t j = 0; j < part.n; ++j) {
        const auto row = part.row(j);
        for (index_t i = 0; i < m; ++i) {
          double sum = 0, size = 0;
          for (index_t a = 0; a < k; ++a) {
            const double term = static_cast<double>(row[static_cast<std::size_t>(a)]) * rounded[static_cast<std::size_t>(i * k + a)];
            sum += term, size += std::fabs(term);
          }
          const auto at = static_cast<std::size_t>(i * n + column + j);
          if (add) sum += residual[at];
          expected[at] = static_cast<float>(sum), bound[at] = 0x1p-10 * size + rounding<Y> * std::fabs(sum) + 1e-30;
        }
      }
      column += part.n;
    }
    const OnCard<Cuda, bf16> xs(dev, x, m, k);
    const OnCard<Cuda, Y> y(dev, m, n), r(dev, residual, m, n);
    if constexpr (std::is_same_v<Y, float>) {
      if (add) dev.matmul_add(y.view(), xs.view(), w.linear, r.view());
    }
    if (!add) dev.matmul(y.view(), xs.view(), w.linear);
    const auto got = y.get();
    for (std::size_t i = 0; i < got.size(); ++i) worst = std::max(worst, std::fabs(got[i] - static_cast<double>(expected[i])) / bound[i]);
    check_close(got, expected, [&](index_t i) { return bound[static_cast<std::size_t>(i)]; });
  };
  const WeightsOnCard<Cuda> three(dev, {{Format::f8_e4m3, 256}, {Format::f8_e4m3, 64}, {Format::f8_e4m3, 64}}, 512), one(dev, {{Format::f8_e4m3, 192}}, 5632),
      mixed(dev, {{Format::f8_e4m3, 64}, {Format::bf16, 64}, {Format::f8_e4m3, 32}}, 2048);
  for (const index_t m : {2, 7, 16, 100, 300}) {
    for (const auto* w : {&three, &one}) check(float(), *w, m, false), check(float(), *w, m, true), check(bf16(), *w, m, false);
    if (m > 8) continue;
    // Beside them weights that x is not rounded for.
    check_matmul<bf16, float>(dev, mixed, m);
  }
  MESSAGE("largest error: " << worst << " of its bound");
}

TEST_CASE_TEMPLATE("cuda: matmul of several matrices, and of odd rows", A, float, bf16) {
  if (no_card()) return;
  CudaDevice<A> dev;
  using W = WeightsOnCard<CudaDevice<A>>;
  for (const index_t m : {1, 3, 17}) {
    check_matmul<A, A>(dev, W(dev, {{Format::bf16, 96}, {Format::bf16, 32}, {Format::bf16, 32}}, 256), m);  // one product
    check_matmul<A, A>(dev, W(dev, {{Format::q4_K, 96}, {Format::q4_K, 32}, {Format::q6_K, 32}}, 512), m);
    check_matmul<A, float>(dev, W(dev, {{Format::bf16, 100}, {Format::q8_0, 33}, {Format::f16, 7}}, 256), m);
    check_matmul<A, float>(dev, W(dev, {{Format::q4_1, 57}, {Format::f32, 1}}, 288), m, 3);
    for (const index_t k : {1, 3, 255, 1025}) check_matmul<A, float>(dev, W(dev, {{Format::f32, 50}, {Format::f16, 17}, {Format::bf16, 34}}, k), m);
  }
  const W w(dev, {{Format::f32, 20}}, 32);
  dev.matmul(View<float, dyn, dyn>(nullptr, {0, 20}), View<const A, dyn, dyn>(nullptr, {0, 32}), w.linear);
}

TEST_CASE_TEMPLATE("cuda: products that are gated on their way", A, float, bf16) {
  if (no_card()) return;
  using D = CudaDevice<A>;
  D dev;
  struct Shape { index_t m, n, k; };
  for (const Format f : {Format::bf16, Format::q8_0})
    for (const auto& [m, n, k] : {Shape{5, 64, 96}, Shape{511, 88, 64}, Shape{512, 88, 64}, Shape{600, 264, 160}, Shape{1030, 136, 96}, Shape{2048, 1024, 32}, Shape{520, 60, 96}}) {
      CAPTURE(std::string(name(f)));
      CAPTURE(m);
      CAPTURE(n);
      const WeightsOnCard<D> w(dev, {{f, n}, {f, n}}, k, Compute::f32);
      Random random(static_cast<std::uint64_t>(m));
      const auto x = numbers<A>(random, m * k);
      std::vector<float> expected(static_cast<std::size_t>(m * n));
      std::vector<double> bound(expected.size()), bound_of_kept(expected.size());
      // On the way the factors are rounded to A unless one kernel does both, and weights of another format to A where there are many rows.
      const bool whole = std::is_same_v<A, bf16> && f == Format::bf16 && dev.capability() == 90 && m >= 512 && n % 8 == 0;
      for (index_t j = 0; j < n; ++j) {
        const auto gate = w.parts[0].row(j), up = w.parts[1].row(j);
        for (index_t i = 0; i < m; ++i) {
          double g = 0, u = 0, size_g = 0, size_u = 0;
          for (index_t a = 0; a < k; ++a) {
            const double v = x[static_cast<std::size_t>(i * k + a)];
            g += gate[static_cast<std::size_t>(a)] * v, u += up[static_cast<std::size_t>(a)] * v;
            size_g += std::fabs(gate[static_cast<std::size_t>(a)] * v), size_u += std::fabs(up[static_cast<std::size_t>(a)] * v);
          }
          const auto at = static_cast<std::size_t>(i * n + j);
          const double silu = g / (1 + std::exp(-g)), weights = f == Format::q8_0 && std::is_same_v<A, bf16> ? 0x1p-8 : 2 * sum_bound;
          expected[at] = static_cast<float>(silu * u);
          const auto within = [&](double inner) {
            return 1.2 * (inner * std::fabs(g) + weights * size_g) * std::fabs(u) + (inner * std::fabs(u) + weights * size_u) * std::fabs(silu) + (rounding<A> + 1e-6) * std::fabs(silu * u) + 1e-12;
          };
          bound[at] = within(whole ? 0 : rounding<A>), bound_of_kept[at] = within(rounding<A>);
        }
      }
      const OnCard<D, A> xs(dev, x, m, k, k + 8), out(dev, m, n, n + 8), factors(dev, m, 2 * n, 2 * n + 16), again(dev, m, n);
      dev.matmul_swiglu(out.view(), factors.view(), xs.view(), w.linear);
      check_close(out.get(), expected, [&](index_t i) { return bound[static_cast<std::size_t>(i)]; });
      // With the factors kept it is swiglu of them, to a step of A, and they are what the product gives.
      dev.matmul_swiglu(out.view(), factors.view(), xs.view(), w.linear, true);
      dev.swiglu(again.view(), columns(factors.view(), 0, n), columns(factors.view(), n, 2 * n));
      const auto swiglu = again.get();
      check_close(out.get(), swiglu, [&](index_t i) { return (2 * rounding<A> + 4 * eps) * std::fabs(swiglu[static_cast<std::size_t>(i)]); });
      check_close(out.get(), expected, [&](index_t i) { return bound_of_kept[static_cast<std::size_t>(i)]; });
    }
}

TEST_CASE_TEMPLATE("cuda: attention over pages, and its probabilities", A, float, bf16) {
  if (no_card()) return;
  using D = CudaDevice<A>;
  D dev;
  Cpu& cpu = reference_device();
  struct Shape { index_t heads, kv_heads, head_dim; };
  const std::vector<std::pair<index_t, index_t>> sequences = {{300, 1}, {0, 20}, {65, 70}, {254, 3}, {0, 1}, {1, 4}};  // position, tokens
  for (const Format f : {Format::f32, Format::f16, Format::bf16, Format::f8_e4m3, Format::q8_0})
    for (const Shape& h : {Shape{6, 2, 64}, Shape{4, 4, 16}, Shape{3, 1, 48}, Shape{8, 1, 128}, Shape{2, 1, 256}}) {
      CAPTURE(std::string(name(f)));
      CAPTURE(h.head_dim);
      constexpr index_t layer = 1;
      const CacheShape shape{f, 2, h.kv_heads, h.head_dim};
      Random random(5);
      std::vector<std::vector<std::byte>> host;
      std::vector<Memory<D>> card;
      std::vector<std::vector<std::byte*>> host_pages(sequences.size()), card_pages(sequences.size());
      std::vector<Sequence> on_host, on_card;
      index_t rows = 0;
      const index_t width = h.kv_heads * h.head_dim, columns = h.heads * h.head_dim;
      for (std::size_t i = 0; i < sequences.size(); ++i) {
        const auto [position, tokens] = sequences[i];
        for (index_t at = 0; at < position + tokens; at += page_tokens) {
          host_pages[i].push_back(host.emplace_back(static_cast<std::size_t>(shape.page_bytes()), std::byte{0xff}).data());
          card_pages[i].push_back(card.emplace_back(dev, static_cast<std::size_t>(shape.page_bytes())).data());
          dev.upload(card_pages[i].back(), host.back().data(), host.back().size());
        }
        const auto past = numbers<A>(random, std::max<index_t>(1, position) * width), past_v = numbers<A>(random, std::max<index_t>(1, position) * width);
        if (position > 0) {
          const Sequence before_host{0, position, 0, host_pages[i].data()}, before_card{0, position, 0, card_pages[i].data()};
          cpu.store_kv(matrix(past, position, width), matrix(past_v, position, width), shape, layer, {&before_host, 1});
          dev.store_kv(OnCard<D, A>(dev, past, position, width).view(), OnCard<D, A>(dev, past_v, position, width).view(), shape, layer, dev.batch({}, {&before_card, 1}));
        }
        on_host.push_back({rows, tokens, position, host_pages[i].data()}), on_card.push_back({rows, tokens, position, card_pages[i].data()});
        rows += tokens;
      }
      const auto k = numbers<A>(random, rows * width), v = numbers<A>(random, rows * width), q = numbers<A>(random, rows * columns, 1.5f);
      cpu.store_kv(matrix(k, rows, width), matrix(v, rows, width), shape, layer, on_host);
      std::vector<float> expected(q.size());
      cpu.attention(matrix(expected, rows, columns), matrix(q, rows, columns), shape, layer, on_host);
      const auto batch = dev.batch({}, on_card);
      const OnCard<D, A> ks(dev, k, rows, width), vs(dev, v, rows, width), qs(dev, q, rows, columns), out(dev, rows, columns);
      dev.store_kv(ks.view(), vs.view(), shape, layer, batch);
      dev.attention(out.view(), qs.view(), shape, layer, batch);
      const auto got = out.get();
      for (index_t r = 0; r < rows; ++r) {
        double difference = 0, size = 0;
        for (index_t i = r * columns; i < (r + 1) * columns; ++i) {
          const double e = expected[static_cast<std::size_t>(i)], d = got[static_cast<std::size_t>(i)] - e;
          difference += d * d, size += e * e;
        }
        CAPTURE(r);
        REQUIRE(std::sqrt(difference / size) < (std::is_same_v<A, float> ? 5e-6 : 1e-2));  // a NaN is not less
      }
      const auto p = dev.attention_probabilities(qs.view(), shape, layer, on_card[2]), pe = cpu.attention_probabilities(matrix(q, rows, columns), shape, layer, on_host[2]);
      check_close(p, pe, [&](index_t) { return 1e-5; });
    }
}
