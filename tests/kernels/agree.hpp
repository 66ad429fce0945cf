// What the kernel tests share: random operands, every table of kernels, and one check for a whole array against its bounds.
#pragma once

#include <doctest/doctest.h>

#include <cmath>
#include <cstring>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "tinyllama/kernels/cpu/kernels.hpp"
#include "tinyllama/kernels/reference.hpp"
#include "tinyllama/quant/codec.hpp"

namespace tinyllama::test {

inline constexpr double eps = std::numeric_limits<float>::epsilon();  // 2^-23: two roundings to nearest
inline constexpr float not_a_number = std::numeric_limits<float>::quiet_NaN();

/// Repeatable numbers.
class Random {
 public:
  explicit Random(std::uint64_t seed) : engine_(seed) {}
  float normal() { return normal_(engine_); }
  index_t below(index_t n) { return static_cast<index_t>(engine_() % static_cast<std::uint64_t>(n)); }
  std::byte byte() { return static_cast<std::byte>(engine_() & 255); }
  std::vector<float> vector(index_t n, float size = 1.0f) {
    std::vector<float> v(static_cast<std::size_t>(n));
    for (float& x : v) x = size * normal();
    return v;
  }

 private:
  std::mt19937_64 engine_;
  std::normal_distribution<float> normal_;
};

/// 16 bits of pairs (Int8Columns).
inline int half_of(const std::int32_t* pairs, index_t i) { return static_cast<std::int16_t>(static_cast<std::uint32_t>(pairs[i / 2]) >> (i % 2 ? 0 : 16)); }

/// f(kernels) for each instruction set that this machine has.
template <class F>
void for_each_table(F&& f) {
  for (const Kernels* k : all_cpu_kernels()) {
    CAPTURE(std::string(k->instruction_set));
    f(*k);
  }
}

/// Every |got[i] - expected[i]| <= bound(i), a NaN only where a NaN is expected. One assertion for the whole array.
template <class Bound>
void check_close(const float* got, const float* expected, index_t n, Bound&& bound) {
  for (index_t i = 0; i < n; ++i) {
    const double g = got[i], e = expected[i], b = bound(i);
    if (std::isnan(e) ? std::isnan(g) : g == e || std::fabs(g - e) <= b) continue;
    CAPTURE(i);
    CAPTURE(n);
    CAPTURE(b);
    CHECK_MESSAGE(g == e, "outside its bound");
    return;
  }
  CHECK(n >= 0);
}
template <class Bound>
void check_close(const std::vector<float>& got, const std::vector<float>& expected, Bound&& bound) {
  REQUIRE(got.size() == expected.size());
  check_close(got.data(), expected.data(), static_cast<index_t>(got.size()), bound);
}

/// The same bits throughout.
template <class T>
void check_same(const std::vector<T>& got, const std::vector<T>& expected) {
  REQUIRE(got.size() == expected.size());
  for (std::size_t i = 0; i < got.size(); ++i) {
    if (std::memcmp(&got[i], &expected[i], sizeof(T)) == 0) continue;
    CAPTURE(i);
    CHECK(static_cast<float>(got[i]) == static_cast<float>(expected[i]));
    CHECK_MESSAGE(false, "bits differ");
    return;
  }
  CHECK(true);
}

/// Sizes at the edges of every vector length, and some of the model's.
inline const std::vector<index_t>& awkward_sizes() {
  static const std::vector<index_t> sizes = {1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65, 100, 127, 129, 288, 2048, 5632};
  return sizes;
}

/// A weight matrix in some format, in rows as in a file, and packed.
struct TestMatrix {
  Format format;
  index_t n, k;
  std::vector<std::byte> stored, packed;
  std::vector<float> scale;  // of the rows; empty: 1

  TestMatrix(Format f, index_t rows, index_t columns, Random& random, float size = 1.0f) : format(f), n(rows), k(columns) {
    const std::size_t stride = row_bytes(f, k);
    stored.resize(static_cast<std::size_t>(n) * stride);
    packed.resize(packed_bytes(f, n, k));
    for (index_t j = 0; j < n; ++j) encode_row(f, random.vector(k, size).data(), stored.data() + static_cast<std::size_t>(j) * stride, k);
    visit(f, [&]<Format F>() {
      for (index_t j = 0; j < n; j += panel_rows)
        pack_panel<F>(stored.data() + static_cast<std::size_t>(j) * stride, stride, static_cast<int>(std::min(panel_rows, n - j)), k,
                      packed.data() + static_cast<std::size_t>(j / panel_rows) * panel_bytes<F>(k));
    });
  }
  std::vector<float> row(index_t j) const {
    std::vector<float> w(static_cast<std::size_t>(k));
    decode_row(format, stored.data() + static_cast<std::size_t>(j) * row_bytes(format, k), w.data(), k);
    if (!scale.empty())
      for (float& v : w) v *= scale[static_cast<std::size_t>(j)];
    return w;
  }
  /// Where the format has a scale a row, which kernels know nothing of.
  const float* with_scales(Random& random) {
    if (format != Format::f8_e4m3) return nullptr;
    scale = random.vector(n);
    for (float& s : scale) s = 0.25f + std::fabs(s);
    return scale.data();
  }
};

/// Sum over k of a bound of |w_k| |x_k|, where a weight of a block format counts with all that is added up in its place: scale times code,
/// scale times offset and the minimum, of which none exceeds the largest weight of its 32 by more than a factor of 2, and all three by more than 3.
inline double magnitude(Format f, const float* w, const float* x, index_t k) {
  double total = 0;
  if (!is_quantised(f)) {
    for (index_t i = 0; i < k; ++i) total += std::fabs(static_cast<double>(w[i]) * x[i]);
    return total;
  }
  for (index_t g = 0; g < k; g += 32) {
    double most = 0, sum = 0;
    for (index_t i = g; i < std::min(k, g + 32); ++i) most = std::max(most, std::fabs(static_cast<double>(w[i]))), sum += std::fabs(static_cast<double>(x[i]));
    total += 3 * most * sum;
  }
  return total;
}

// Rounding errors of a sum in f32: each partial sum adds up to half an eps of itself. Partial sums of products with random signs grow like
// sqrt(k), so that the errors of k additions walk to about eps / 2 sum |w x|, standard deviation included; 4 eps is eight times that, and
// a hundred times less than one product left out of 5632.
inline constexpr double sum_bound = 4 * eps;

}  // namespace tinyllama::test
