// Matrix products of every instruction set and format against the reference, at sizes that leave tails of rows, columns and panels.
#include "tests/kernels/agree.hpp"

namespace {

using namespace tinyllama;
using namespace tinyllama::test;

constexpr float canary = 12345.0f;
using Matmul = void (*)(const MatmulTask&, index_t, index_t);

// Activations in each form that a kernel takes.
struct Activations {
  index_t m, k, ldx;
  std::vector<float> x;       // [m, ldx], as f32, 0 in the padding
  std::vector<bf16> x_bf16;
  std::vector<std::int8_t> q;
  std::vector<float> scale, sum32, sum16;

  Activations(index_t rows, index_t columns, Random& random) : m(rows), k(columns), ldx(even(columns) + 2 * (rows % 2)) {
    x.resize(static_cast<std::size_t>((m - 1) * ldx + even(k)), not_a_number);  // NaN between the rows: nobody may read there
    x_bf16.resize(x.size());
    for (index_t i = 0; i < m; ++i)
      for (index_t c = 0; c < even(k); ++c) {
        const auto at = static_cast<std::size_t>(i * ldx + c);
        x[at] = c < k ? random.normal() : 0.0f;
        x_bf16[at] = bf16(x[at]);
      }
    if (k % 32) return;
    q.resize(static_cast<std::size_t>(m * k));
    scale.resize(q.size() / 32), sum32.resize(q.size() / 32), sum16.resize(q.size() / 16);
    for (index_t i = 0; i < m; ++i)
      reference::quantise_activations(q.data() + i * k, scale.data() + i * k / 32, sum32.data() + i * k / 32, sum16.data() + i * k / 16, x.data() + i * ldx, k, false);
  }
};

const std::vector<index_t>& row_counts() {
  static const std::vector<index_t> m = {1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 33};
  return m;
}

// The kernel on the ranges of panels that the units of a device's fork take: all, from the first, from the middle, none.
// More than `signed_rows` rows of int8 are handed to the kernel with 128 added.
void check_matmul(Matmul kernel, Matmul reference, const TestMatrix& w, const Activations& a, index_t signed_rows = std::numeric_limits<index_t>::max()) {
  CAPTURE(std::string(name(w.format)));
  CAPTURE(w.n);
  CAPTURE(w.k);
  CAPTURE(a.m);
  const index_t ldy = w.n + 5, panels = (w.n + panel_rows - 1) / panel_rows;
  std::vector<float> expected(static_cast<std::size_t>(a.m * ldy), canary);
  MatmulTask t{};
  t.w = w.packed.data(), t.format = w.format, t.m = a.m, t.n = w.n, t.k = w.k, t.ldy = ldy, t.ldx = a.ldx;
  t.x = a.x.data(), t.x_bf16 = a.x_bf16.data(), t.x_q8 = a.q.data();
  t.x_scale = a.scale.data(), t.x_sum32 = a.sum32.data(), t.x_sum16 = a.sum16.data();
  t.y = expected.data();
  reference(t, 0, panels);
  auto codes = a.q;
  if (a.m > signed_rows) {
    for (std::int8_t& q : codes) q = static_cast<std::int8_t>(q ^ -128);
    t.x_q8 = codes.data();
  }
  std::vector<double> bound(expected.size(), 0.0);
  for (index_t j = 0; j < w.n; ++j) {
    const auto row = w.row(j);
    for (index_t i = 0; i < a.m; ++i) bound[static_cast<std::size_t>(i * ldy + j)] = sum_bound * magnitude(w.format, row.data(), a.x.data() + i * a.ldx, w.k);
  }
  for (const auto& range : {std::pair{index_t{0}, panels}, std::pair{index_t{1}, panels}, std::pair{index_t{0}, panels - 1}, std::pair{panels, panels}}) {
    const index_t first = range.first, last = range.second;  // clang 14 captures no structured binding
    if (first > last) continue;
    CAPTURE(first);
    CAPTURE(last);
    std::vector<float> got(expected.size(), canary), within = expected;
    t.y = got.data();
    kernel(t, first, last);
    for (index_t i = 0; i < a.m; ++i)
      for (index_t j = 0; j < w.n; ++j)
        if (j < first * panel_rows || j >= last * panel_rows) within[static_cast<std::size_t>(i * ldy + j)] = canary;  // not this range's: untouched
    check_close(got, within, [&](index_t i) { return within[static_cast<std::size_t>(i)] == canary ? 0.0 : bound[static_cast<std::size_t>(i)]; });
  }
}

}  // namespace

TEST_CASE("matmul_f32 on floats: odd k, tails of n, every m") {
  for_each_table([](const Kernels& kernels) {
    for (const Format f : {Format::f32, Format::f16, Format::bf16})
      for (const index_t k : {1, 2, 3, 31, 64, 131})
        for (const index_t n : {1, 15, 16, 17, 48, 70}) {
          Random random(static_cast<std::uint64_t>(k * 100 + n));
          const TestMatrix w(f, n, k, random);
          for (const index_t m : row_counts()) check_matmul(kernels.matmul_f32, reference::matmul_f32, w, Activations(m, k, random));
        }
  });
}

TEST_CASE("matmul_f32 on floats: longer than one block of k") {
  for_each_table([](const Kernels& kernels) {
    for (const Format f : {Format::f32, Format::f16, Format::bf16})
      for (const index_t k : {1023, 1024, 1025, 2049, 5632}) {
        Random random(static_cast<std::uint64_t>(k));
        const TestMatrix w(f, 52, k, random);
        for (const index_t m : {1, 2, 9}) check_matmul(kernels.matmul_f32, reference::matmul_f32, w, Activations(m, k, random));
      }
  });
}

TEST_CASE("matmul_f32 on block formats keeps the activations as they are") {
  for_each_table([](const Kernels& kernels) {
    for (const FormatInfo& format : formats) {
      if (format.block == 1) continue;
      for (const index_t blocks : {1, 3, 9})
        for (const index_t n : {1, 16, 23}) {
          Random random(static_cast<std::uint64_t>(blocks * 100 + n));
          const TestMatrix w(format.format, n, blocks * format.block, random);
          for (const index_t m : {1, 2, 3, 7, 8, 13}) check_matmul(kernels.matmul_f32, reference::matmul_f32, w, Activations(m, w.k, random));
        }
    }
  });
}

TEST_CASE("matmul_bf16: exact products of rounded activations") {
  for_each_table([](const Kernels& kernels) {
    for (const index_t k : {1, 2, 3, 31, 64, 131})
      for (const index_t n : {1, 15, 16, 17, 48, 70}) {
        Random random(static_cast<std::uint64_t>(k * 100 + n));
        const TestMatrix w(Format::bf16, n, k, random);
        for (const index_t m : row_counts()) check_matmul(kernels.matmul_bf16, reference::matmul_bf16, w, Activations(m, k, random));
      }
    for (const index_t k : {2047, 2048, 2049, 5632}) {
      Random random(static_cast<std::uint64_t>(k));
      const TestMatrix w(Format::bf16, 52, k, random);
      for (const index_t m : {1, 2, 9}) check_matmul(kernels.matmul_bf16, reference::matmul_bf16, w, Activations(m, k, random));
    }
  });
}

TEST_CASE("matmul_int8 on every block format, every m") {
  for_each_table([](const Kernels& kernels) {
    for (const FormatInfo& format : formats) {
      if (format.block == 1) continue;
      for (const index_t blocks : {1, 2, 5})
        for (const index_t n : {1, 15, 16, 17, 40}) {
          Random random(static_cast<std::uint64_t>(blocks * 100 + n));
          const TestMatrix w(format.format, n, blocks * format.block, random);
          const bool every = blocks == 2 && n == 40;
          for (const index_t m : every ? row_counts() : std::vector<index_t>{1, 3, 17})
            check_matmul(kernels.matmul_int8, reference::matmul_int8, w, Activations(m, w.k, random), kernels.int8_signed_rows);
        }
      Random random(5632);
      const TestMatrix w(format.format, 20, 5632, random);
      for (const index_t m : {1, 5, 16, 31}) check_matmul(kernels.matmul_int8, reference::matmul_int8, w, Activations(m, w.k, random), kernels.int8_signed_rows);
    }
  });
}

TEST_CASE("matmul_int8 at the ends of the codes: nothing saturates") {
  for_each_table([](const Kernels& kernels) {
    for (const FormatInfo& format : formats) {
      if (format.block == 1) continue;
      Random random(3);
      const index_t k = 2 * format.block, n = 16;
      TestMatrix w(format.format, n, k, random);
      Activations a(20, k, random);  // by tiles, and its first rows as a stream
      // All activations at +-127; all codes at 0 or at their largest, but for the scales.
      for (index_t i = 0; i < a.m; ++i)
        for (index_t c = 0; c < k; ++c) a.x[static_cast<std::size_t>(i * a.ldx + c)] = i % 4 == 0 ? 1.0f : i % 4 == 1 ? -1.0f : c % 2 ? 1.0f : -1.0f;
      for (index_t i = 0; i < a.m; ++i)
        reference::quantise_activations(a.q.data() + i * k, a.scale.data() + i * k / 32, a.sum32.data() + i * k / 32, a.sum16.data() + i * k / 16,
                                        a.x.data() + i * a.ldx, k, false);
      for (const float value : {1.0f, -1.0f}) {
        const std::size_t stride = row_bytes(format.format, k);
        for (index_t j = 0; j < n; ++j) {
          std::vector<float> row(static_cast<std::size_t>(k), value);
          for (std::size_t c = 0; c < row.size(); c += 16) row[c] = j % 2 ? -value : 0.0f;  // so that the minimum is not the value
          encode_row(format.format, row.data(), w.stored.data() + static_cast<std::size_t>(j) * stride, k);
        }
        visit(format.format, [&]<Format F>() { pack_panel<F>(w.stored.data(), stride, 16, k, w.packed.data()); });
        check_matmul(kernels.matmul_int8, reference::matmul_int8, w, a, kernels.int8_signed_rows);
        Activations few = a;
        few.m = 4;
        check_matmul(kernels.matmul_int8, reference::matmul_int8, w, few, kernels.int8_signed_rows);
      }
    }
  });
}
