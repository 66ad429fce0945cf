// The CPU device against plain loops in double, with the same bits for any number of threads.
#include "tinyllama/device/cpu.hpp"

#include <memory>
#include <numeric>

#include "tests/kernels/agree.hpp"
#include "tinyllama/device/memory.hpp"

namespace {

using namespace tinyllama;
using namespace tinyllama::test;

static_assert(Device<Cpu>);

View<float, dyn, dyn> matrix(std::vector<float>& v, index_t rows, index_t columns) { return {v.data(), {rows, columns}}; }
View<const float, dyn, dyn> matrix(const std::vector<float>& v, index_t rows, index_t columns) { return {v.data(), {rows, columns}}; }

// Devices of 1, 2, 3 and 5 threads on the best kernels; results must have the bits of the first.
const std::vector<std::unique_ptr<Cpu>>& devices() {
  static const auto all = [] {
    std::vector<std::unique_ptr<Cpu>> d;
    for (const int threads : {1, 2, 3, 5}) d.push_back(std::make_unique<Cpu>(Cpu::Options{.threads = threads}));
    return d;
  }();
  return all;
}

// f(device, out) on each device; all results are the same bits; the first is returned.
template <class F>
std::vector<float> same_on_all(std::size_t size, F&& f) {
  std::vector<float> first;
  for (const auto& dev : devices()) {
    std::vector<float> out(size, not_a_number);
    f(*dev, out);
    CAPTURE(dev->threads());
    if (first.empty()) first = out;
    check_same(out, first);
  }
  return first;
}

// What rounding the activations costs: half a step of the largest of each 32, or half a unit of bf16's last place.
double activation_error(Compute c, const float* w, const float* x, index_t k) {
  double total = 0;
  for (index_t g = 0; g < k; g += 32) {
    double most = 0;
    for (index_t i = g; i < std::min(k, g + 32); ++i) most = std::max(most, std::fabs(static_cast<double>(x[i])));
    for (index_t i = g; i < std::min(k, g + 32); ++i)
      total += std::fabs(static_cast<double>(w[i])) * (c == Compute::int8 ? 0.501 * most / 127 : c == Compute::bf16 ? std::fabs(static_cast<double>(x[i])) / 256 : 0.0);
  }
  return total;
}

struct Weights {
  std::vector<TestMatrix> parts;
  Linear packed, rows;

  Weights(std::initializer_list<std::pair<Format, index_t>> list, index_t k, Compute compute = Compute::automatic) {
    Random random(static_cast<std::uint64_t>(k));
    for (auto [f, n] : list) parts.emplace_back(f, n, k, random).with_scales(random);
    for (Linear* l : {&packed, &rows}) {
      l->compute = compute;
      for (const TestMatrix& m : parts)
        l->part[static_cast<std::size_t>(l->parts++)] = {m.format, l == &packed, m.n, k, l == &packed ? m.packed.data() : m.stored.data(), m.scale.empty() ? nullptr : m.scale.data()};
    }
  }
};

void check_matmul(const Weights& w, index_t m) {
  const index_t k = w.packed.columns(), n = w.packed.rows();
  CAPTURE(m);
  CAPTURE(k);
  CAPTURE(n);
  Random random(static_cast<std::uint64_t>(m));
  const auto x = random.vector(m * k);
  std::vector<float> expected(static_cast<std::size_t>(m * n));
  std::vector<double> bound(expected.size());
  index_t column = 0;
  for (const TestMatrix& part : w.parts) {
    // The loosest arithmetic that may run here; bf16 only where the machine has it, which the narrow bound of f32 on others includes.
    const Compute c = w.packed.compute == Compute::f32 ? Compute::f32 : is_quantised(part.format) ? Compute::int8 : part.format == Format::bf16 ? Compute::bf16 : Compute::f32;
    for (index_t j = 0; j < part.n; ++j) {
      const auto row = part.row(j);
      for (index_t i = 0; i < m; ++i) {
        const float* xi = x.data() + i * k;
        const auto at = static_cast<std::size_t>(i * n + column + j);
        double sum = 0;
        for (index_t a = 0; a < k; ++a) sum += static_cast<double>(row[static_cast<std::size_t>(a)]) * xi[a];
        expected[at] = static_cast<float>(sum);
        bound[at] = activation_error(c, row.data(), xi, k) + sum_bound * magnitude(part.format, row.data(), xi, k);
      }
    }
    column += part.n;
  }
  const auto close = [&](const std::vector<float>& got) { check_close(got, expected, [&](index_t i) { return bound[static_cast<std::size_t>(i)]; }); };
  const auto got = same_on_all(expected.size(), [&](Cpu& dev, auto& y) { dev.matmul(matrix(y, m, n), matrix(x, m, k), w.packed); });
  close(got);
  // In rows: packed on the way, by the same kernels in the same order.
  check_same(same_on_all(expected.size(), [&](Cpu& dev, auto& y) { dev.matmul(matrix(y, m, n), matrix(x, m, k), w.rows); }), got);
  Cpu reference({.threads = 2, .kernels = &reference::kernels});
  std::vector<float> y(expected.size(), not_a_number);
  reference.matmul(matrix(y, m, n), matrix(x, m, k), w.packed);
  close(y);
  // Into and from columns of wider matrices.
  std::vector<float> wide_x(static_cast<std::size_t>(m * (k + 3)), not_a_number), wide_y(static_cast<std::size_t>(m * (n + 5)), -7.0f);
  for (index_t i = 0; i < m; ++i) std::copy_n(x.data() + i * k, k, wide_x.data() + i * (k + 3) + 2);
  devices()[1]->matmul(columns(matrix(wide_y, m, n + 5), 4, n + 4), columns(matrix(std::as_const(wide_x), m, k + 3), 2, k + 2), w.packed);
  for (index_t i = 0; i < m; ++i) {
    REQUIRE(std::memcmp(wide_y.data() + i * (n + 5) + 4, got.data() + i * n, static_cast<std::size_t>(n) * sizeof(float)) == 0);
    for (const index_t c : {index_t{0}, index_t{3}, n + 4}) REQUIRE(wide_y[static_cast<std::size_t>(i * (n + 5) + c)] == -7.0f);
  }
}

struct Cache {
  CacheShape shape;
  std::vector<std::vector<std::byte>> memory;
  std::vector<std::vector<std::byte*>> pages;  // of each sequence
  std::vector<Sequence> batch;
  index_t rows = 0;

  // Sequences of (position, tokens).
  Cache(CacheShape s, const std::vector<std::pair<index_t, index_t>>& sequences) : shape(s) {
    for (auto [position, tokens] : sequences) {
      auto& p = pages.emplace_back();
      for (index_t at = 0; at < position + tokens; at += page_tokens) {
        memory.emplace_back(static_cast<std::size_t>(shape.page_bytes()), std::byte{0xff});
        p.push_back(memory.back().data());
      }
    }
    for (std::size_t i = 0; i < sequences.size(); ++i) {
      auto [position, tokens] = sequences[i];
      batch.push_back({rows, tokens, position, pages[i].data()});
      rows += tokens;
    }
  }
};

void check_attention(Format format, index_t heads, index_t kv_heads, index_t head_dim, const std::vector<std::pair<index_t, index_t>>& sequences,
                     Compute compute = Compute::f32) {
  CAPTURE(std::string(name(format)));
  CAPTURE(heads);
  CAPTURE(kv_heads);
  CAPTURE(head_dim);
  constexpr index_t layers = 2, layer = 1;
  Cache cache({format, layers, kv_heads, head_dim, compute}, sequences);
  const double rounding = compute == Compute::bf16 ? 0x1p-8 : 0;  // as in tests/kernels/attention_test.cpp
  Random random(11);
  // All keys and values up to each sequence's end, as the model would have stored them: the past first, then the batch.
  struct Past {
    std::vector<float> k, v;
  };
  std::vector<Past> all;
  const index_t width = kv_heads * head_dim;
  const auto round = [&](float x) { return format == Format::f32 ? x : format == Format::f16 ? static_cast<float>(f16(x)) : static_cast<float>(bf16(x)); };
  std::vector<float> new_k(static_cast<std::size_t>(cache.rows * width)), new_v(new_k);
  for (const Sequence& s : cache.batch) {
    const index_t length = s.position + s.tokens;
    Past p{random.vector(length * width), random.vector(length * width)};
    for (auto* x : {&p.k, &p.v})
      for (float& e : *x) e = round(e);
    Sequence past = s;
    past.first_row = 0, past.tokens = s.position, past.position = 0;
    if (s.position > 0) devices()[1]->store_kv(matrix(std::as_const(p.k), length, width), matrix(std::as_const(p.v), length, width), cache.shape, layer, {&past, 1});
    std::copy_n(p.k.data() + s.position * width, s.tokens * width, new_k.data() + s.first_row * width);
    std::copy_n(p.v.data() + s.position * width, s.tokens * width, new_v.data() + s.first_row * width);
    all.push_back(std::move(p));
  }
  devices()[2]->store_kv(matrix(std::as_const(new_k), cache.rows, width), matrix(std::as_const(new_v), cache.rows, width), cache.shape, layer, cache.batch);

  const auto q = random.vector(cache.rows * heads * head_dim, 1.5f);
  std::vector<float> expected(q.size());
  std::vector<double> bound(q.size());
  for (std::size_t n = 0; n < cache.batch.size(); ++n) {
    const Sequence& s = cache.batch[n];
    for (index_t t = 0; t < s.tokens; ++t)
      for (index_t h = 0; h < heads; ++h) {
        const float* qh = q.data() + ((s.first_row + t) * heads + h) * head_dim;
        const index_t kv = h * kv_heads / heads, seen = s.position + t + 1;
        std::vector<double> score(static_cast<std::size_t>(seen));
        double most = 0, top = -1e300, sum = 0;
        for (index_t p = 0; p < seen; ++p) {
          double dot = 0, size = 0;
          for (index_t d = 0; d < head_dim; ++d) {
            const double term = static_cast<double>(qh[d]) * all[n].k[static_cast<std::size_t>(p * width + kv * head_dim + d)];
            dot += term, size += std::fabs(term);
          }
          score[static_cast<std::size_t>(p)] = dot / std::sqrt(static_cast<double>(head_dim));
          most = std::max(most, size / std::sqrt(static_cast<double>(head_dim)));
          top = std::max(top, score[static_cast<std::size_t>(p)]);
        }
        for (double& e : score) sum += e = std::exp(e - top);
        for (index_t d = 0; d < head_dim; ++d) {
          double o = 0, size = 0;
          for (index_t p = 0; p < seen; ++p) {
            const double term = score[static_cast<std::size_t>(p)] / sum * all[n].v[static_cast<std::size_t>(p * width + kv * head_dim + d)];
            o += term, size += std::fabs(term);
          }
          const auto at = static_cast<std::size_t>(qh - q.data() + d);
          expected[at] = static_cast<float>(o);
          bound[at] = (sum_bound + rounding) * (2 * most + 3) * size;
        }
      }
  }
  const index_t columns = heads * head_dim;
  const auto close = [&](const std::vector<float>& got) { check_close(got, expected, [&](index_t i) { return bound[static_cast<std::size_t>(i)]; }); };
  close(same_on_all(q.size(), [&](Cpu& dev, auto& out) { dev.attention(matrix(out, cache.rows, columns), matrix(q, cache.rows, columns), cache.shape, layer, cache.batch); }));
  Cpu reference({.threads = 2, .kernels = &reference::kernels});
  std::vector<float> out(q.size(), not_a_number);
  reference.attention(matrix(out, cache.rows, columns), matrix(q, cache.rows, columns), cache.shape, layer, cache.batch);
  close(out);

  // The observers' probabilities are the same softmax: each row sums to 1, nothing beyond the row's own position, and times V is the output.
  const Sequence& s = cache.batch.back();
  const index_t length = s.position + s.tokens;
  const auto p = devices()[1]->attention_probabilities(matrix(q, cache.rows, columns), cache.shape, layer, s);
  REQUIRE(p.size() == static_cast<std::size_t>(heads * s.tokens * length));
  for (index_t h = 0; h < heads; ++h)
    for (index_t t = 0; t < s.tokens; ++t) {
      const float* row = p.data() + (h * s.tokens + t) * length;
      CHECK(std::fabs(std::accumulate(row, row + length, 0.0) - 1) <= 1e-5);
      for (index_t i = s.position + t + 1; i < length; ++i) REQUIRE(row[i] == 0.0f);
      double o = 0;
      for (index_t i = 0; i < length; ++i) o += static_cast<double>(row[i]) * all.back().v[static_cast<std::size_t>(i * width + h * kv_heads / heads * head_dim)];
      const auto at = static_cast<std::size_t>((s.first_row + t) * columns + h * head_dim);
      REQUIRE(std::fabs(o - expected[at]) <= bound[at]);
    }
}

}  // namespace

TEST_CASE("threads and instruction set") {
  CHECK(Cpu({.threads = 3}).threads() == 3);
  CHECK(Cpu().threads() == available_cores());
  CHECK(std::string(Cpu({.kernels = &reference::kernels}).instruction_set()) == "reference");
  CHECK(Cpu().instruction_set().size() > 0);
}

TEST_CASE("memory is aligned, and large blocks can be written to the end") {
  Cpu dev({.threads = 1});
  for (const std::size_t bytes : {std::size_t{0}, std::size_t{1}, std::size_t{100}, (std::size_t{5} << 20) + 3}) {
    Memory<Cpu> m(dev, bytes);
    CHECK(reinterpret_cast<std::uintptr_t>(m.data()) % 64 == 0);
    std::memset(m.data(), 1, bytes);
    Memory<Cpu> moved(std::move(m));
    CHECK(moved.bytes() == bytes);
    CHECK(m.data() == nullptr);
  }
  for (const std::size_t bytes : {std::size_t{1} << 60, static_cast<std::size_t>(-1), static_cast<std::size_t>(-64)})
    CHECK_THROWS_AS(static_cast<void>(dev.allocate(bytes)), Error);
}

TEST_CASE("matmul: one matrix of each format, few rows and many") {
  for (const FormatInfo& f : formats) {
    CAPTURE(std::string(f.name));
    for (const index_t n : {40, 133})
      for (const Compute c : {Compute::automatic, Compute::f32}) {
        const Weights w({{f.format, n}}, 512, c);
        for (const index_t m : {1, 2, 5, 16, 33}) check_matmul(w, m);
      }
  }
}

TEST_CASE("matmul: three matrices of mixed formats, as QKV in a Q4_K_M file") {
  for (const index_t m : {1, 3, 17}) {
    check_matmul(Weights({{Format::q4_K, 96}, {Format::q4_K, 32}, {Format::q6_K, 32}}, 512), m);
    check_matmul(Weights({{Format::bf16, 100}, {Format::q8_0, 33}, {Format::f16, 7}}, 256), m);
    check_matmul(Weights({{Format::q4_1, 57}, {Format::f32, 1}}, 288), m);
    check_matmul(Weights({{Format::bf16, 20}, {Format::q5_0, 20}, {Format::f32, 20}}, 64), m);  // small: no fork
  }
}

TEST_CASE("matmul: so many rows that each thread begins with some of its own") {
  for (const index_t m : {256, 257, 517}) {
    check_matmul(Weights({{Format::q4_0, 133}, {Format::q6_K, 20}}, 512), m);
    check_matmul(Weights({{Format::q8_0, 70}, {Format::bf16, 30}, {Format::f32, 7}}, 288), m);
    check_matmul(Weights({{Format::bf16, 70}}, 64), m);
  }
}

TEST_CASE("matmul: odd columns") {
  for (const index_t m : {1, 2, 9})
    for (const index_t k : {1, 3, 255, 1025}) check_matmul(Weights({{Format::f32, 50}, {Format::f16, 17}, {Format::bf16, 34}}, k), m);
}

TEST_CASE("matmul: bf16 on request for one row too, f32 on request always") {
  check_matmul(Weights({{Format::bf16, 64}}, 512, Compute::bf16), 1);
  // Weights of 1 and activations of 1 + 2^-12: lost by bf16 and by int8 activations, kept by f32.
  std::vector<float> x(1024, 1.0f + 0x1p-12f), y(32);
  for (const Format f : {Format::bf16, Format::q8_0, Format::q4_0}) {
    Weights w({{f, 32}}, 1024, Compute::f32);
    const std::vector<float> ones(1024, 1.0f);
    for (index_t j = 0; j < 32; ++j) encode_row(f, ones.data(), w.parts[0].stored.data() + static_cast<std::size_t>(j) * row_bytes(f, 1024), 1024);
    const float one = w.parts[0].row(0)[0];
    for (index_t m = 1; m <= 2; ++m) {
      const std::vector<float> xs(static_cast<std::size_t>(m * 1024), 1.0f + 0x1p-12f);
      std::vector<float> ys(static_cast<std::size_t>(m * 32));
      devices()[1]->matmul(matrix(ys, m, 32), matrix(xs, m, 1024), w.rows);
      for (const float v : ys) CHECK(std::fabs(v - 1024.25 * one) <= sum_bound * 3 * 1024.25);
    }
  }
}

TEST_CASE("matmul: nothing in, nothing out") {
  const Weights w({{Format::f32, 20}}, 32);
  devices()[1]->matmul({nullptr, {0, 20}}, {nullptr, {0, 32}}, w.packed);
  std::vector<float> y(40, 3.0f);
  devices()[1]->matmul(matrix(y, 2, 20), {nullptr, {2, 0}}, Linear(Matrix{Format::f32, true, 20, 0, nullptr}));
  for (const float v : y) CHECK(v == 0.0f);  // a sum of nothing
}

TEST_CASE("pack gives the panels that the kernels read, whatever the threads") {
  Random random(4);
  for (const FormatInfo& f : formats) {
    const TestMatrix w(f.format, 133, 512, random);
    for (const auto& dev : devices()) {
      Memory<Cpu> to(*dev, packed_bytes(f.format, w.n, w.k));
      const Matrix m = dev->pack(to.data(), {f.format, false, w.n, w.k, w.stored.data()});
      CHECK(m.packed);
      CHECK(m.bytes() == w.packed.size());
      CHECK(std::memcmp(m.data, w.packed.data(), w.packed.size()) == 0);
    }
  }
}

TEST_CASE("embedding: rows of the table, packed or not") {
  Random random(6);
  const std::vector<std::int32_t> ids = {0, 99, 17, 17, 31, 16, 15, 64, 3, 98, 0};
  for (const FormatInfo& f : formats) {
    CAPTURE(std::string(f.name));
    const TestMatrix table(f.format, 100, 256, random);
    for (const bool packed : {false, true}) {
      const auto got = same_on_all(ids.size() * 256, [&](Cpu& dev, auto& out) {
        dev.embedding(matrix(out, static_cast<index_t>(ids.size()), 256), {f.format, packed, 100, 256, packed ? table.packed.data() : table.stored.data()}, ids);
      });
      for (std::size_t i = 0; i < ids.size(); ++i) check_close(got.data() + i * 256, table.row(ids[i]).data(), 256, [](index_t) { return 0.0; });
    }
  }
}

TEST_CASE("attention: a batch of decoding and prefilling sequences of different lengths") {
  for (const Format f : {Format::f32, Format::f16, Format::bf16}) {
    check_attention(f, 6, 2, 64, {{300, 1}, {0, 20}, {65, 70}, {254, 3}, {0, 1}, {1, 4}});
    check_attention(f, 8, 1, 16, {{600, 1}, {511, 2}});
  }
}

TEST_CASE("attention: one sequence; heads of other widths, without groups, and more than 64 to a KV head") {
  check_attention(Format::f16, 4, 4, 48, {{0, 130}});
  check_attention(Format::f32, 3, 3, 8, {{700, 1}});
  check_attention(Format::f32, 9, 3, 80, {{63, 5}});
  check_attention(Format::f16, 70, 1, 16, {{10, 5}, {300, 1}});
  check_attention(Format::bf16, 2, 1, 256, {{100, 7}, {256, 1}});
}

TEST_CASE("attention by products of bf16: prefill in blocks, decoding beside it") {
  for (const Format f : {Format::f16, Format::bf16}) {
    check_attention(f, 8, 1, 64, {{0, 150}, {300, 1}, {77, 40}, {0, 4}}, Compute::bf16);
    check_attention(f, 3, 3, 20, {{0, 300}}, Compute::bf16);
  }
  check_attention(Format::f16, 70, 1, 16, {{10, 5}, {300, 1}}, Compute::bf16);
  check_attention(Format::bf16, 2, 1, 256, {{100, 90}}, Compute::bf16);
}

TEST_CASE("operations by rows: strided views, the same bits for any number of threads") {
  Random random(8);
  const Kernels& kernels = devices()[0]->kernels();
  for (const index_t rows : {0, 1, 2, 7, 200, 517})
    for (const index_t n : {1, 96, 2048}) {
      CAPTURE(rows);
      CAPTURE(n);
      const index_t wide = n + 3;
      const auto x = random.vector(rows * wide), z = random.vector(rows * wide), gain = random.vector(n);
      const auto left = [&](auto& v) { return columns(matrix(v, rows, wide), 1, n + 1); };
      const auto size = static_cast<std::size_t>(rows * wide);
      // Each result is that of the kernel on each row, and what lies between the rows stays.
      const auto check = [&](auto&& operation, auto&& kernel) {
        std::vector<float> expected = x;
        for (index_t t = 0; t < rows; ++t) kernel(expected.data() + t * wide + 1, z.data() + t * wide + 1);
        for (const auto& dev : devices()) {
          std::vector<float> got = x;
          operation(*dev, left(got), left(z));
          REQUIRE(got.size() == size);
          check_same(got, expected);
        }
      };
      check([&](Cpu& dev, auto out, auto in) { dev.rmsnorm(out, in, gain.data(), 1e-5f); },
            [&](float* out, const float* in) { kernels.rmsnorm(out, in, gain.data(), n, 1e-5f); });
      check([&](Cpu& dev, auto out, auto in) { dev.add_rmsnorm(out, out, in, gain.data(), 1e-5f); },
            [&](float* out, const float* in) { kernels.add_rmsnorm(out, out, in, gain.data(), n, 1e-5f); });
      check([&](Cpu& dev, auto out, auto in) { dev.add(out, in); }, [&](float* out, const float* in) { kernels.add(out, in, n); });
      check([&](Cpu& dev, auto out, auto in) { dev.swiglu(out, out, in); }, [&](float* out, const float* in) { kernels.swiglu(out, out, in, n); });
      check([&](Cpu& dev, auto out, auto in) { dev.softmax(out, in, 0.5f); }, [&](float* out, const float* in) { kernels.softmax(out, in, n, 0.5f); });
      if (n % 2 == 0) {
        const index_t heads = 3, hd = n / heads / 2 * 2;
        const auto cos = random.vector(rows * hd / 2), sin = random.vector(rows * hd / 2);
        for (const RopeLayout layout : {RopeLayout::half, RopeLayout::interleaved}) {
          index_t t = 0;
          check([&](Cpu& dev, auto out, auto) { dev.rope(out, matrix(cos, rows, hd / 2), matrix(sin, rows, hd / 2), heads, layout); },
                [&](float* out, const float*) { kernels.rope(out, cos.data() + t * hd / 2, sin.data() + t * hd / 2, heads, hd, layout), ++t; });
        }
      }
    }
}

TEST_CASE("parallel_for covers the range in grains") {
  for (const auto& dev : devices())
    for (const index_t n : {0, 1, 9, 100})
      for (const index_t grain : {-1, 1, 3, 100, 1000}) {
        std::vector<std::atomic<int>> seen(static_cast<std::size_t>(n));
        std::atomic<bool> aligned{true};
        dev->parallel_for(n, grain, [&](index_t begin, index_t end) {
          if (begin % std::max<index_t>(1, grain)) aligned = false;
          for (index_t i = begin; i < end; ++i) seen[static_cast<std::size_t>(i)].fetch_add(1);
        });
        bool once = true;
        for (const auto& s : seen) once = once && s == 1;
        CHECK(once);
        CHECK(aligned);
      }
}
