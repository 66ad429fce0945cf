// rmsnorm, rope, swiglu, softmax and conversions of every instruction set against the reference.
#include "tests/kernels/agree.hpp"

namespace {

using namespace tinyllama;
using namespace tinyllama::test;

constexpr float canary = 12345.0f;

// n outputs and a few that must stay as they are.
std::vector<float> guarded(index_t n) { return std::vector<float>(static_cast<std::size_t>(n + 3), canary); }
void check_guard(const std::vector<float>& v, index_t n) {
  for (std::size_t i = static_cast<std::size_t>(n); i < v.size(); ++i) CHECK(v[i] == canary);
}

// A sum of n squares in f32 is off by eps sqrt(n) / 2 at most in practice (eps n / 2 in theory), its root by half that; scale, gain, root, division: 3 eps.
double norm_bound(index_t n, float expected) { return eps * (3 + 0.25 * std::sqrt(static_cast<double>(n))) * std::fabs(static_cast<double>(expected)); }

}  // namespace

TEST_CASE("rmsnorm and add_rmsnorm") {
  for_each_table([](const Kernels& kernels) {
    for (const index_t n : awkward_sizes())
      for (const float size : {1.0f, 1e-3f, 3e3f}) {
        CAPTURE(n);
        CAPTURE(size);
        Random random(static_cast<std::uint64_t>(n));
        const auto x = random.vector(n, size), gain = random.vector(n), residual = random.vector(n, size);
        auto expected = guarded(n), got = guarded(n);
        reference::rmsnorm(expected.data(), x.data(), gain.data(), n, 1e-5f);
        kernels.rmsnorm(got.data(), x.data(), gain.data(), n, 1e-5f);
        check_close(got, expected, [&](index_t i) { return norm_bound(n, expected[static_cast<std::size_t>(i)]); });

        auto in_place = x;
        kernels.rmsnorm(in_place.data(), in_place.data(), gain.data(), n, 1e-5f);
        check_same(in_place, std::vector<float>(got.begin(), got.begin() + n));

        auto expected_x = x, got_x = x;
        reference::add_rmsnorm(expected.data(), expected_x.data(), residual.data(), gain.data(), n, 1e-5f);
        kernels.add_rmsnorm(got.data(), got_x.data(), residual.data(), gain.data(), n, 1e-5f);
        check_same(got_x, expected_x);
        check_close(got, expected, [&](index_t i) { return norm_bound(n, expected[static_cast<std::size_t>(i)]); });
        check_guard(got, n);

        auto sum = x;
        kernels.add(sum.data(), residual.data(), n);
        check_same(sum, expected_x);
      }
  });
}

TEST_CASE("rope in both layouts") {
  for_each_table([](const Kernels& kernels) {
    for (const index_t head_dim : {2, 4, 6, 8, 10, 16, 30, 32, 34, 48, 64, 66, 96, 128})
      for (const index_t heads : {1, 3})
        for (const RopeLayout layout : {RopeLayout::half, RopeLayout::interleaved}) {
          CAPTURE(head_dim);
          CAPTURE(heads);
          Random random(static_cast<std::uint64_t>(head_dim));
          const auto x = random.vector(heads * head_dim);
          std::vector<float> c(static_cast<std::size_t>(head_dim / 2)), s(c);
          for (std::size_t i = 0; i < c.size(); ++i) c[i] = std::cos(0.7f * static_cast<float>(i)), s[i] = std::sin(0.7f * static_cast<float>(i));
          auto expected = x, got = x;
          reference::rope(expected.data(), c.data(), s.data(), heads, head_dim, layout);
          kernels.rope(got.data(), c.data(), s.data(), heads, head_dim, layout);
          check_close(got, expected, [&](index_t i) {
            const index_t in_head = i % head_dim, base = i - in_head;
            const bool half = layout == RopeLayout::half;
            const auto pair = static_cast<std::size_t>(half ? in_head % (head_dim / 2) : in_head / 2);
            const auto other = static_cast<std::size_t>(base + (half ? (in_head + head_dim / 2) % head_dim : in_head ^ 1));
            return eps * (std::fabs(x[static_cast<std::size_t>(i)] * c[pair]) + std::fabs(x[other] * s[pair]));
          });
        }
  });
}

TEST_CASE("swiglu, extremes included") {
  for_each_table([](const Kernels& kernels) {
    for (const index_t n : awkward_sizes()) {
      CAPTURE(n);
      Random random(static_cast<std::uint64_t>(n));
      auto gate = random.vector(n, 8.0f);
      const auto up = random.vector(n);
      const float extremes[] = {0.0f, -0.0f, 1e-30f, -20.0f, 80.0f, -80.0f, 500.0f, -500.0f, 3e38f, -3e38f, not_a_number};
      for (std::size_t i = 0; n >= 32 && i < std::size(extremes); ++i) gate[i * 2 + 3] = extremes[i];
      auto expected = guarded(n), got = guarded(n);
      reference::swiglu(expected.data(), gate.data(), up.data(), n);
      kernels.swiglu(got.data(), gate.data(), up.data(), n);
      // silu is within 2 ulp, or within 4e-37 below -87 (math-inl.h); the product rounds once more.
      check_close(got, expected, [&](index_t i) {
        return 3 * eps * std::fabs(static_cast<double>(expected[static_cast<std::size_t>(i)])) + 4e-37 * (1 + std::fabs(up[static_cast<std::size_t>(i % n)]));
      });
      check_guard(got, n);
      kernels.swiglu(gate.data(), gate.data(), up.data(), n);
      check_close(gate.data(), got.data(), n, [](index_t) { return 0.0; });
    }
  });
}

TEST_CASE("softmax: large values, -infinity, in place") {
  for_each_table([](const Kernels& kernels) {
    for (const index_t n : awkward_sizes())
      for (const float size : {1.0f, 30.0f, 3e4f})
        for (const float scale : {1.0f, 0.125f})  // powers of two, so that scaling is exact
          for (const bool masked : {false, true}) {
            CAPTURE(n);
            CAPTURE(size);
            CAPTURE(scale);
            Random random(static_cast<std::uint64_t>(n));
            auto x = random.vector(n, size);
            for (index_t i = 0; masked && i < n; ++i)
              if (i % 3 == 0 && i != n - 1) x[static_cast<std::size_t>(i)] = -std::numeric_limits<float>::infinity();
            auto expected = guarded(n), got = guarded(n);
            reference::softmax(expected.data(), x.data(), n, scale);
            kernels.softmax(got.data(), x.data(), n, scale);
            const double top = static_cast<double>(*std::max_element(x.begin(), x.end())) * scale;
            // x - max rounds to half an eps of itself, and e^t multiplies that; exp 1 ulp; a division and a product. The sum: small terms after a
            // large one round the same way again and again; 2 eps sqrt(n) is the most in one chain (scalar), a tenth of one term left out of 5632.
            // Results below the normal range lose bits of their own.
            check_close(got, expected, [&](index_t i) {
              const double t = i < n ? std::min(110.0, top - static_cast<double>(x[static_cast<std::size_t>(i)]) * scale) : 0.0;
              return eps * (3 + 0.5 * t + 2 * std::sqrt(static_cast<double>(n))) * static_cast<double>(expected[static_cast<std::size_t>(i)]) + 3e-38;
            });
            check_guard(got, n);
            kernels.softmax(x.data(), x.data(), n, scale);
            check_close(x.data(), got.data(), n, [](index_t) { return 0.0; });
          }
  });
}

TEST_CASE("round_bf16: nearest even, infinities and NaN") {
  for_each_table([](const Kernels& kernels) {
    for (const index_t n : awkward_sizes()) {
      CAPTURE(n);
      Random random(static_cast<std::uint64_t>(n));
      auto x = random.vector(n);
      for (std::size_t i = 0; i < x.size(); ++i) {
        if (i % 5 == 1) x[i] = std::bit_cast<float>(std::bit_cast<std::uint32_t>(x[i]) << 16 | 0x8000u);  // half way between two
        if (i % 11 == 2) x[i] = not_a_number;
        if (i % 13 == 3) x[i] = 3.4e38f;
        if (i % 17 == 4) x[i] = -std::numeric_limits<float>::infinity();
        if (i % 19 == 5) x[i] = std::bit_cast<float>(0x7f800001u);  // a NaN whose upper bits alone say infinity
      }
      std::vector<bf16> expected(static_cast<std::size_t>(n + 2)), got(expected);
      reference::round_bf16(expected.data(), x.data(), n);
      kernels.round_bf16(got.data(), x.data(), n);
      check_same(got, expected);
    }
  });
}

TEST_CASE("quantise_activations") {
  for_each_table([](const Kernels& kernels) {
    for (const index_t n : {32, 64, 96, 2048}) {
      CAPTURE(n);
      Random random(static_cast<std::uint64_t>(n));
      auto x = random.vector(n);
      for (index_t i = 0; i < 32; ++i) {
        x[static_cast<std::size_t>(i)] = static_cast<float>(i - 16) * 0.5f;  // ties, when scaled by the whole number 127 / 8 / ...
        if (n >= 96) x[static_cast<std::size_t>(32 + i)] = 0.0f;
        if (n >= 2048) {
          x[static_cast<std::size_t>(64 + i)] = static_cast<float>(i) * 1e-39f;  // 127 / max would overflow
          x[static_cast<std::size_t>(96 + i)] = i == 17 ? not_a_number : static_cast<float>(i);
          x[static_cast<std::size_t>(128 + i)] = i == 5 ? -std::numeric_limits<float>::infinity() : 1.0f;
          x[static_cast<std::size_t>(160 + i)] = static_cast<float>(2 * i - 31) * (127.0f / 62.0f);
        }
      }
      const auto groups = static_cast<std::size_t>(n / 32);
      struct Result {
        std::vector<std::int8_t> q;
        std::vector<float> scale, sum32, sum16;
      };
      const Result empty{std::vector<std::int8_t>(32 * groups + 1, 77), std::vector<float>(groups + 1, canary), std::vector<float>(groups + 1, canary),
                         std::vector<float>(2 * groups + 1, canary)};
      Result expected = empty, got = empty;
      reference::quantise_activations(expected.q.data(), expected.scale.data(), expected.sum32.data(), expected.sum16.data(), x.data(), n);
      kernels.quantise_activations(got.q.data(), got.scale.data(), got.sum32.data(), got.sum16.data(), x.data(), n);
      // Each step is one rounding of the same numbers: nothing may differ.
      check_same(got.q, expected.q);
      const auto exact = [](index_t) { return 0.0; };
      check_close(got.scale, expected.scale, exact);
      check_close(got.sum32, expected.sum32, exact);
      check_close(got.sum16, expected.sum16, exact);
      // And what it is for: each value within half a step, a NaN or an infinity nowhere lost.
      for (std::size_t i = 0; i < 32 * groups; ++i) {
        const float value = got.scale[i / 32] * static_cast<float>(got.q[i]);
        bool finite = true;
        for (std::size_t j = i / 32 * 32; j < i / 32 * 32 + 32; ++j) finite = finite && std::isfinite(x[j]);
        if (!finite) {
          REQUIRE(!std::isfinite(value));
        } else {
          REQUIRE(std::fabs(value - x[i]) <= std::max(0.5001f * got.scale[i / 32], 4e-37f));
        }
      }
    }
  });
}

TEST_CASE("quantise_columns: within half a step of the 32 columns' own, which are ratios to the loudest") {
  for_each_table([](const Kernels& kernels) {
    for (const index_t n : {32, 64, 256, 288, 2048}) {
      CAPTURE(n);
      Random random(static_cast<std::uint64_t>(n));
      auto x = random.vector(n);
      for (index_t i = 0; i < n; ++i) {
        float& v = x[static_cast<std::size_t>(i)];
        if (i / 32 % 8 == 1) v *= 1e-3f;
        if (i / 32 % 8 == 5) v = 0.0f;
        if (i / 32 % 8 == 6) v *= 1e-9f;
        if (i / 256 == 3) v = 0.0f;
        if (i / 256 == 4) v *= 1e-38f;  // 127 / max would overflow
        if (i / 256 == 5) v = 2.0f;     // sums as large as they can be
        if (i / 256 == 6) v = -2.0f;
      }
      constexpr index_t stride = 3;
      const Int8Columns untouched{{77}, {77}, {77}, {77}, {{77}}, canary};
      std::vector<Int8Columns> expected(static_cast<std::size_t>((n + 255) / 256 * stride), untouched), got = expected;
      reference::quantise_columns(expected.data(), stride, x.data(), n);
      kernels.quantise_columns(got.data(), stride, x.data(), n);
      for (std::size_t c = 0; c < got.size(); ++c) {
        const Int8Columns &a = got[c], &b = expected[c];
        REQUIRE(std::memcmp(a.codes, b.codes, sizeof a.codes) == 0);
        REQUIRE(std::memcmp(a.ratios, b.ratios, sizeof a.ratios) == 0);
        REQUIRE(std::memcmp(a.sums, b.sums, sizeof a.sums) == 0);
        REQUIRE(std::memcmp(a.sum32, b.sum32, sizeof a.sum32) == 0);
        REQUIRE(std::memcmp(a.sum16, b.sum16, sizeof a.sum16) == 0);
        REQUIRE(a.scale == b.scale);
      }
      for (index_t g = 0; g < n / 32; ++g) {
        const Int8Columns& c = got[static_cast<std::size_t>(g / 8 * stride)];
        float own = 0;
        int sum[2] = {};
        for (index_t j = 32 * g; j < 32 * g + 32; ++j) own = std::max(own, std::fabs(x[static_cast<std::size_t>(j)])), sum[j % 32 / 16] += c.codes[j % 256];
        REQUIRE(c.sum16[0][g % 8] == sum[0]);
        REQUIRE(c.sum16[1][g % 8] == sum[1]);
        REQUIRE(c.sum32[g % 8] == sum[0] + sum[1]);
        const int ratio = half_of(c.ratios, g % 8);
        const double scale = static_cast<double>(c.scale) * ratio / 32768;
        REQUIRE(std::fabs(half_of(c.sums, g % 8) / 8.0 - ratio * c.sum32[g % 8] / 32768.0) <= 1.0 / 16);
        REQUIRE(std::fabs(scale - own / 127.0) <= 0.51 * c.scale / 32768 + 1e-36);
        for (index_t j = 32 * g; j < 32 * g + 32; ++j) {
          const double v = x[static_cast<std::size_t>(j)];
          REQUIRE(std::fabs(own / 127.0 * c.codes[j % 256] - v) <= std::max(0.5001 * own / 127.0, 4e-37));
        }
      }
      for (const float bad : {not_a_number, std::numeric_limits<float>::infinity()}) {
        x[7] = bad;
        kernels.quantise_columns(got.data(), stride, x.data(), n);
        REQUIRE(!std::isfinite(got[0].scale));
      }
    }
  });
}
