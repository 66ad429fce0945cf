// Matrix products of every instruction set and format against the reference, at sizes that leave tails of rows, columns and panels.
#include "tests/kernels/agree.hpp"

#include <tuple>

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
      reference::quantise_activations(q.data() + i * k, scale.data() + i * k / 32, sum32.data() + i * k / 32, sum16.data() + i * k / 16, x.data() + i * ldx, k);
  }
};

const std::vector<index_t>& row_counts() {
  static const std::vector<index_t> m = {1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 33};
  return m;
}

// The kernel on the ranges of panels that the units of a device's fork take: all, from the first, from the middle, none. Rows of y are n + 5 apart.
void check_ranges(Matmul kernel, MatmulTask t, const std::vector<float>& expected, const std::vector<double>& bound) {
  CAPTURE(std::string(name(t.format)));
  CAPTURE(t.n);
  CAPTURE(t.k);
  CAPTURE(t.m);
  const index_t ldy = t.ldy, panels = (t.n + panel_rows - 1) / panel_rows;
  for (const auto& range : {std::pair{index_t{0}, panels}, std::pair{index_t{1}, panels}, std::pair{index_t{0}, panels - 1}, std::pair{panels, panels}}) {
    const index_t first = range.first, last = range.second;  // clang 14 captures no structured binding
    if (first > last) continue;
    CAPTURE(first);
    CAPTURE(last);
    std::vector<float> got(expected.size(), canary), within = expected;
    t.y = got.data();
    kernel(t, first, last);
    for (index_t i = 0; i < t.m; ++i)
      for (index_t j = 0; j < t.n; ++j)
        if (j < first * panel_rows || j >= last * panel_rows) within[static_cast<std::size_t>(i * ldy + j)] = canary;  // not this range's: untouched
    check_close(got, within, [&](index_t i) { return within[static_cast<std::size_t>(i)] == canary ? 0.0 : bound[static_cast<std::size_t>(i)]; });
  }
}


void check_matmul(Matmul kernel, Matmul reference, const TestMatrix& w, const Activations& a) {
  const index_t ldy = w.n + 5, panels = (w.n + panel_rows - 1) / panel_rows;
  std::vector<float> expected(static_cast<std::size_t>(a.m * ldy), canary);
  MatmulTask t{};
  t.w = w.packed.data(), t.format = w.format, t.m = a.m, t.n = w.n, t.k = w.k, t.ldy = ldy, t.ldx = a.ldx;
  t.x = a.x.data(), t.x_bf16 = a.x_bf16.data(), t.x_q8 = a.q.data();
  t.x_scale = a.scale.data(), t.x_sum32 = a.sum32.data(), t.x_sum16 = a.sum16.data();
  t.y = expected.data();
  reference(t, 0, panels);
  std::vector<double> bound(expected.size(), 0.0);
  for (index_t j = 0; j < w.n; ++j) {
    const auto row = w.row(j);
    for (index_t i = 0; i < a.m; ++i) bound[static_cast<std::size_t>(i * ldy + j)] = sum_bound * magnitude(w.format, row.data(), a.x.data() + i * a.ldx, w.k);
  }
  check_ranges(kernel, t, expected, bound);
}

// Activations as tiles of integers take them, and the values that they stand for.
struct Columns {
  std::vector<Int8Columns> columns;  // [chunks][m]
  std::vector<float> values;         // [m, k]

  Columns(const float* x, index_t ldx, index_t m, index_t k) : columns(static_cast<std::size_t>((k + int8_columns - 1) / int8_columns * m)) {
    for (index_t i = 0; i < m; ++i) {
      reference::quantise_columns(columns.data() + i, m, x + i * ldx, k);
      for (index_t c = 0; c < k; ++c) {
        const Int8Columns& at = columns[static_cast<std::size_t>(c / int8_columns * m + i)];
        values.push_back(at.scale / 32768 * static_cast<float>(half_of(at.ratios, c % int8_columns / 32) * at.codes[c % int8_columns]));
      }
    }
  }
};

// What a tile may cut off a product: of each group of columns with one scale of W half of 2^cut steps of its codes, in steps of its activations, and as
// much in steps of the loudest activations of the chunk; of its minimum a 16th of such a step. Encoders use nearly the whole range of their codes, by
// which steps are known. Scales and minima are rounded to 13 bits beside the largest of their row in the chunk.
double cut_bound(Format format, const float* w, const Int8Columns* x, index_t m, index_t k) {
  const auto [bits, offset, columns, exact, mins] = visit(format, []<Format F>() {
    constexpr PanelBlock P = panel_block<F>;
    return std::tuple(P.bits, P.offset, P.groups == 16 ? 16 : 32, P.groups > 1, P.mins != 0);
  });
  const int cut = bits == 8 ? 4 : bits == 4 && offset ? 0 : bits == 5 && !offset ? 2 : 1;
  double bound = 0;
  for (index_t chunk = 0; chunk < k; chunk += 256, x += m) {
    double most = 0, most_min = 0, size = 0;
    for (index_t c = chunk; c < std::min(k, chunk + 256); c += columns) {
      const double ratio = half_of(x->ratios, (c - chunk) / 32) / 32768.0;
      double largest = 0;
      for (index_t j = c; j < c + columns; ++j) largest = std::max<double>(largest, std::fabs(w[j])), size += std::abs(x->codes[j - chunk]) * ratio;
      const double step = 1.3 * (offset ? largest / (offset == 128 ? 127 : offset) : 2 * largest / ((1 << bits) - 1));
      bound += x->scale * ((1 << cut) * (0.5 + 0.5 * (cut ? ratio : 0)) * step + (mins ? 1.3 * largest / 16 : 0.0));
      most = std::max(most, step), most_min = std::max(most_min, mins ? 1.3 * largest : 0.0);
    }
    if (!exact) bound += x->scale * size * (most * (offset ? offset : 1 << bits) + most_min) / 8192;
  }
  return bound;
}

// Up to int8_stream_rows rows against the reference; more against exact sums.
void check_int8(const Kernels& kernels, const TestMatrix& w, const Activations& a) {
  if (a.m <= kernels.int8_stream_rows) return check_matmul(kernels.matmul_int8, reference::matmul_int8, w, a);
  const Columns columns(a.x.data(), a.ldx, a.m, w.k);
  MatmulTask t{};
  t.w = w.packed.data(), t.format = w.format, t.m = a.m, t.n = w.n, t.k = w.k, t.ldy = w.n + 5, t.x_columns = columns.columns.data(), t.columns_stride = a.m;
  std::vector<float> expected(static_cast<std::size_t>(a.m * t.ldy), canary);
  std::vector<double> bound(expected.size(), 0.0);
  for (index_t j = 0; j < w.n; ++j) {
    const auto row = w.row(j);
    for (index_t i = 0; i < a.m; ++i) {
      double sum = 0, size = 0;
      for (index_t c = 0; c < w.k; ++c) {
        const double product = static_cast<double>(row[static_cast<std::size_t>(c)]) * columns.values[static_cast<std::size_t>(i * w.k + c)];
        sum += product, size += std::fabs(product);
      }
      const auto at = static_cast<std::size_t>(i * t.ldy + j);
      expected[at] = static_cast<float>(sum), bound[at] = sum_bound * size + cut_bound(w.format, row.data(), columns.columns.data() + i, a.m, w.k);
    }
  }
  check_ranges(kernels.matmul_int8, t, expected, bound);
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
      for (const index_t k : {format.block, format.block == 32 ? 288 : 512})
        for (const index_t n : {1, 15, 16, 17, 70}) {
          Random random(static_cast<std::uint64_t>(k * 100 + n));
          const TestMatrix w(format.format, n, k, random);
          const bool every = k > format.block && n == 17;
          for (const index_t m : every ? row_counts() : std::vector<index_t>{1, 3, 17}) check_int8(kernels, w, Activations(m, k, random));
          if (k == 32 && n == 70) check_int8(kernels, w, Activations(515, k, random));  // more rows than share a chunk of weights
        }
      Random random(5632);
      const TestMatrix w(format.format, 20, 5632, random);
      for (const index_t m : {1, 5, 16}) check_int8(kernels, w, Activations(std::min(m, kernels.int8_stream_rows), w.k, random));
    }
  });
}

TEST_CASE("matmul_int8 at the ends of the codes: nothing saturates") {
  for_each_table([](const Kernels& kernels) {
    for (const FormatInfo& format : formats) {
      if (format.block == 1) continue;
      Random random(3);
      const index_t k = 256, n = 16;
      TestMatrix w(format.format, n, k, random);
      Activations a(20, k, random);  // by tiles, and its first rows as a stream
      // All activations at +-127; all codes at 0 or at their largest, but for the scales.
      for (index_t i = 0; i < a.m; ++i)
        for (index_t c = 0; c < k; ++c) a.x[static_cast<std::size_t>(i * a.ldx + c)] = i % 4 == 0 ? 1.0f : i % 4 == 1 ? -1.0f : c % 2 ? 1.0f : -1.0f;
      for (index_t i = 0; i < a.m; ++i)
        reference::quantise_activations(a.q.data() + i * k, a.scale.data() + i * k / 32, a.sum32.data() + i * k / 32, a.sum16.data() + i * k / 16,
                                        a.x.data() + i * a.ldx, k);
      for (const float value : {1.0f, -1.0f}) {
        const std::size_t stride = row_bytes(format.format, k);
        for (index_t j = 0; j < n; ++j) {
          std::vector<float> row(static_cast<std::size_t>(k), value);
          if (j % 3)
            for (std::size_t c = 0; c < row.size(); c += 16) row[c] = j % 2 ? -value : 0.0f;  // so that the minimum is not the value
          encode_row(format.format, row.data(), w.stored.data() + static_cast<std::size_t>(j) * stride, k);
        }
        visit(format.format, [&]<Format F>() { pack_panel<F>(w.stored.data(), stride, 16, k, w.packed.data()); });
        check_int8(kernels, w, a);
        Activations few = a;
        few.m = 4;
        check_int8(kernels, w, few);
      }
    }
  });
}

TEST_CASE("matmul_int8 in tiles: what is cut off adds up to nothing") {
  for_each_table([](const Kernels& kernels) {
    for (const FormatInfo& format : formats) {
      if (format.block == 1) continue;
      CAPTURE(std::string(name(format.format)));
      Random random(11);
      const TestMatrix w(format.format, 32, 512, random);
      const Activations a(24, 512, random);
      const Columns columns(a.x.data(), a.ldx, a.m, w.k);
      std::vector<float> y(static_cast<std::size_t>(a.m * w.n));
      MatmulTask t{};
      t.w = w.packed.data(), t.format = w.format, t.m = a.m, t.n = w.n, t.k = w.k, t.y = y.data(), t.ldy = w.n, t.x_columns = columns.columns.data(), t.columns_stride = a.m;
      if (a.m <= kernels.int8_stream_rows) continue;
      kernels.matmul_int8(t, 0, 2);
      double sum = 0, size = 0;
      for (index_t j = 0; j < w.n; ++j) {
        const auto row = w.row(j);
        for (index_t i = 0; i < a.m; ++i) {
          double error = y[static_cast<std::size_t>(i * w.n + j)];
          for (index_t c = 0; c < w.k; ++c) error -= static_cast<double>(row[static_cast<std::size_t>(c)]) * columns.values[static_cast<std::size_t>(i * w.k + c)];
          sum += error, size += std::fabs(error);
        }
      }
      CHECK(std::fabs(sum) <= 0.25 * size);
    }
  });
}
