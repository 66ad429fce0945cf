// Moments in each of their formats: what the code of 8 bits holds and how it rounds; AdamW of every instruction set against the reference; and that small updates of an
// average are not lost.
#include "tinyllama/kernels/moments.hpp"

#include <algorithm>
#include <numeric>

#include "tests/kernels/agree.hpp"
#include "tinyllama/kernels/cpu/training_kernels.hpp"
#include "tinyllama/kernels/reference_training.hpp"

namespace {

using namespace tinyllama;
using namespace tinyllama::test;

/// A moment of n weights with its memory.
struct Stored {
  std::vector<std::byte> memory;
  MomentArray array;
  bool second;
  index_t n;
  Stored(Moments format, bool v, const std::vector<float>& values) : memory(moment_bytes(format, static_cast<index_t>(values.size()))), array(format, memory.data(), static_cast<index_t>(values.size())),
                                                                    second(v), n(static_cast<index_t>(values.size())) {
    encode_moment(array, second, values.data(), n);
  }
  std::vector<float> values() const {
    std::vector<float> f(static_cast<std::size_t>(n));
    decode_moment(array, second, f.data(), n);
    return f;
  }
};

/// Moments as they are in a training: v over seven orders of magnitude, m below its root.
std::pair<std::vector<float>, std::vector<float>> averages(index_t n, Random& random) {
  std::vector<float> m = random.vector(n), v = random.vector(n, 4.0f);
  for (std::size_t i = 0; i < v.size(); ++i) v[i] = 1e-6f * std::exp(v[i]), m[i] *= 0.5f * std::sqrt(v[i]);
  return {m, v};
}

}  // namespace

TEST_CASE("moments: a code of 8 bits stands for itself, larger codes for more") {
  for (const float scale : {1.0f, 0x1p-40f, 0x1p20f})
    for (int c = 0; c < 256; ++c) {
      const auto code = static_cast<std::uint8_t>(c);
      for (const std::uint32_t random : {0u, nearest, 0xffffu}) {
        CHECK(encode_v(decode_v(code, scale), inverse_scale(scale), random) == code);
        if (c != 128) CHECK(encode_m(decode_m(code, scale), inverse_scale(scale), random) == code);  // 128 is -0
      }
      if (c > 0) CHECK(decode_v(code, scale) > decode_v(static_cast<std::uint8_t>(code - 1), scale));
      if (c > 0 && c < 128) CHECK(decode_m(code, scale) > decode_m(static_cast<std::uint8_t>(code - 1), scale));
    }
  CHECK(decode_v(255, 1.0f) == 1.875f);
  CHECK(decode_m(0xff, 1.0f) == -1.875f);
}

TEST_CASE("moments: rounding in 8 bits is to a neighbour, right in the mean, and never to v = 0") {
  Random random(3);
  for (int i = 0; i < 200; ++i) {
    const float most = std::exp(10 * random.normal()), scale = moment_scale(most), inverse = inverse_scale(scale);
    CHECK(most / scale > 0.9375f);
    CHECK(most / scale <= 1.875f);
    const float x = most * std::exp(-std::fabs(3 * random.normal())) * (i % 2 ? 1.0f : -1.0f), v = std::fabs(x) * 1e-3f, small = 5e-6f * scale;
    double sum_m = 0, sum_v = 0, sum_small = 0, worst = 0;
    for (std::uint32_t r = 0; r < 0x10000; ++r) {
      const float m1 = decode_m(encode_m(x, inverse, r), scale), v1 = decode_v(encode_v(v, inverse, r), scale);
      sum_m += m1, sum_v += v1, sum_small += decode_m(encode_m(small, inverse, r), scale);
      worst = std::max({worst, std::fabs(m1 / x - 1.0), std::fabs(v1 / v - 1.0)});
    }
    CHECK(worst <= 0.125);
    CHECK(std::fabs(sum_m / 0x10000 / x - 1) < 1e-5);
    CHECK(std::fabs(sum_v / 0x10000 / v - 1) < 1e-5);
    CHECK(std::fabs(sum_small / 0x10000 / small - 1) < 1e-3);  // to 0 or to code 1, 34e-6 of the scale
    CHECK(encode_v(1e-30f * scale, inverse, 0) == 1);
  }
  CHECK(moment_scale(0.0f) == 0.0f);
  CHECK(encode_m(0.0f, inverse_scale(0.0f), 0xffffu) == 0);
  CHECK(encode_v(0.0f, inverse_scale(0.0f), 0xffffu) == 0);
  static_assert(decode_m(encode_m(0.75f, 1.0f, 0), 1.0f) == 0.75f);
}

TEST_CASE("moments: what was decoded comes back as it was, whatever the length") {
  Random random(4);
  for (const MomentFormat& f : moment_formats)
    for (const index_t n : {1, 100, 255, 256, 257, 1000}) {
      const auto [m, v] = averages(n, random);
      for (const bool second : {false, true}) {
        const Stored once(f.moments, second, second ? v : m), twice(f.moments, second, once.values());
        check_same(twice.values(), once.values());
        const double bound = f.moments == Moments::f32 ? 0 : f.moments == Moments::bf16 ? 0x1p-8 : 0x1p-4;
        // What is below code 1 goes to it, or m's to 0.
        const auto& values = second ? v : m;
        double most = 0;
        for (const float x : values) most = std::max(most, static_cast<double>(std::fabs(x)));
        const double least = f.moments == Moments::int8 ? (second ? v_code_least : m_code_least / 2) * most * 16 / 15 : 0;
        check_close(once.values(), values, [&](index_t i) { return bound * std::fabs(values[static_cast<std::size_t>(i)]) + least; });
      }
    }
  CHECK(moment_bytes(Moments::f32, 1000) == 4000);
  CHECK(moment_bytes(Moments::bf16, 1024) == 2048);
  CHECK(moment_bytes(Moments::int8, 1024) == 1024 + 64);
  CHECK(moment_bytes(Moments::int8, 1025) == 1280 + 64);
}

TEST_CASE("moments: AdamW in each format, of every instruction set, against the reference") {
  for (const TrainingKernels* k : all_cpu_training_kernels()) {
    CAPTURE(std::string(k->instruction_set));
    for (const MomentFormat& f : moment_formats)
      for (const index_t n : {index_t{1}, index_t{7}, index_t{16}, index_t{33}, index_t{255}, index_t{256}, index_t{257}, index_t{777}, index_t{5632}}) {
        CAPTURE(std::string(f.name));
        CAPTURE(n);
        Random random(static_cast<std::uint64_t>(n));
        const auto moments = averages(n, random);
        const auto p = random.vector(n), gradient = random.vector(n, 1e-3f);
        const auto run = [&](void (*adamw)(const AdamwTask&), std::vector<float>& weights, index_t cut) {
          weights = p;
          const Stored ms(f.moments, false, moments.first), vs(f.moments, true, moments.second);
          for (index_t begin = 0; begin < n; begin += cut) {
            AdamwTask t{weights.data() + begin, ms.array.from(begin), vs.array.from(begin), gradient.data() + begin, std::min(cut, n - begin), 1e-2f, 0.9f, 0.95f, 1e-8f, 0.1f, 0.3f, 0.2f, 0.5f};
            t.key = 99, t.place = static_cast<std::uint32_t>(7 + begin);
            adamw(t);
          }
          return std::pair{ms.values(), vs.values()};
        };
        std::vector<float> got_p, expected_p, parts_p;
        const auto got = run(k->adamw, got_p, n), expected = run(&reference::adamw, expected_p, n), parts = run(k->adamw, parts_p, moment_block);
        check_same(parts_p, got_p), check_same(parts.first, got.first), check_same(parts.second, got.second);  // as threads share it
        // Sums that differ in their last bits may fall on either side of where the code changes: a step of the code, for few.
        const double step = f.moments == Moments::f32 ? 4 * eps : f.moments == Moments::bf16 ? 0x1p-7 : 0x1p-3;
        int other = 0;
        const auto same = [&](const std::vector<float>& a, const std::vector<float>& b, double least) {
          check_close(a, b, [&](index_t i) { return step * std::fabs(b[static_cast<std::size_t>(i)]) + least; });
          for (std::size_t i = 0; i < a.size(); ++i) other += std::fabs(a[i] - b[i]) > 1e-5 * std::fabs(b[i]);
        };
        const float most = *std::max_element(expected.second.begin(), expected.second.end());
        same(got.first, expected.first, f.moments == Moments::int8 ? 2e-5 * std::sqrt(most) : 4 * eps * 1e-4), same(got.second, expected.second, 0);
        CHECK(other <= 2 + n / 500);
        check_close(got_p, expected_p, [&](index_t i) { return 4 * eps * std::fabs(p[static_cast<std::size_t>(i)]) + 1e-2 * 2e-5; });
        CHECK(got_p != p);
      }
  }
}

// g = 1 for ever: v goes to 1 - beta2^t. To the nearest, v stands still where (1 - beta2)(1 - v) is below half a step: at 0.34 in bf16, at 0.02 in 8 bits.
TEST_CASE("moments: updates of v far below a step of its code add up") {
  for (const TrainingKernels* k : all_cpu_training_kernels()) {
    CAPTURE(std::string(k->instruction_set));
    for (const Moments format : {Moments::bf16, Moments::int8}) {
      constexpr index_t n = 4096;
      std::vector<float> p(n, 0.0f), g(n, 1.0f);
      const Stored m(format, false, std::vector<float>(n, 0.0f)), v(format, true, std::vector<float>(n, 0.0f));
      for (std::uint32_t step = 0; step < 1500; ++step) {
        AdamwTask t{p.data(), m.array, v.array, g.data(), n, 1e-4f, 0.9f, 0.999f, 1e-8f, 0.0f, 1.0f, 1.0f, 1.0f};
        t.key = step * 2654435761u;
        k->adamw(t);
      }
      const auto now = v.values();
      const double mean = std::accumulate(now.begin(), now.end(), 0.0) / n, expected = 1 - std::pow(0.999, 1500);
      CHECK(std::fabs(mean / expected - 1) < (format == Moments::bf16 ? 0.002 : 0.05));
    }
  }
}
