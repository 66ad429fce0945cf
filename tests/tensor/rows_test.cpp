// gather, scatter, scatter_add, transpose, quantise: values, repeated ids, threads, errors.
#include "tinyllama/tensor/rows.hpp"

#include <doctest/doctest.h>

#include "tests/tensor/threads.hpp"
#include "tinyllama/tensor/quantise.hpp"
#include "tinyllama/tensor/transpose.hpp"

namespace tl = tinyllama;
using tl::dyn;
using tl::index_t;
using tl::test::numbers;
using tl::test::Threads;

TEST_CASE("gather picks rows, widening them where the types differ") {
  for (int threads : {1, 3}) {
    const Threads dev(threads);
    for (index_t width : tl::test::awkward_sizes()) {
      const auto x = tl::test::converted<tl::bf16>(numbers(5 * width));
      const tl::View<const tl::bf16, dyn, dyn> table(x.data(), {5, width});
      const std::vector<std::int32_t> ids{4, 0, 4, 2};
      std::vector<float> y(static_cast<std::size_t>(4 * width));
      const tl::View<float, dyn, dyn> out(y.data(), {4, width});
      tl::gather(dev, out, table, ids);
      int wrong = 0;
      for (index_t i = 0; i < 4; ++i)
        for (index_t j = 0; j < width; ++j) wrong += out(i, j) != static_cast<float>(table(ids[static_cast<std::size_t>(i)], j));
      CHECK(wrong == 0);
    }
  }
}

TEST_CASE("scatter and scatter_add take ids in order, whatever the threads") {
  const std::vector<std::int32_t> ids{3, 1, 3, 3};
  for (int threads : {1, 3}) {
    const Threads dev(threads);
    for (index_t width : tl::test::awkward_sizes()) {
      const auto x = numbers(4 * width, 5), before = numbers(5 * width, 6);
      const tl::View<const float, dyn, dyn> in(x.data(), {4, width});
      auto a = before, b = before;
      const tl::View<float, dyn, dyn> stored(a.data(), {5, width}), added(b.data(), {5, width});
      tl::scatter(dev, stored, ids, in);
      tl::scatter_add(dev, added, ids, in);
      int wrong = 0;
      for (index_t j = 0; j < width; ++j) {
        const auto was = [&](index_t r) { return before[static_cast<std::size_t>(r * width + j)]; };
        wrong += stored(3, j) != in(3, j) || stored(1, j) != in(1, j) || stored(0, j) != was(0);
        wrong += added(3, j) != ((was(3) + in(0, j)) + in(2, j)) + in(3, j) || added(1, j) != was(1) + in(1, j) || added(4, j) != was(4);
      }
      CHECK(wrong == 0);
    }
  }
}

TEST_CASE("ids outside of the table, and shapes that disagree, are Errors") {
  const Threads dev(1);
  std::vector<float> x(10), y(6);
  const tl::View<float, dyn, dyn> table(x.data(), {5, 2}), rows(y.data(), {3, 2}), narrow(y.data(), {3, 1});
  using Ids = std::vector<std::int32_t>;
  CHECK_THROWS_WITH_AS(tl::gather(dev, rows, table, Ids{0, 1, 5}), "gather: id: expected 0 <= id < 5, found 5", tl::Error);
  CHECK_THROWS_AS(tl::gather(dev, rows, table, Ids{0, -1, 2}), tl::Error);
  CHECK_THROWS_AS(tl::scatter(dev, table, Ids{0, 7, 2}, rows), tl::Error);
  CHECK_THROWS_AS(tl::scatter_add(dev, table, Ids{0, 1}, rows), tl::Error);
  CHECK_THROWS_AS(tl::gather(dev, narrow, table, Ids{0, 1, 2}), tl::Error);
}

TEST_CASE_TEMPLATE("transpose of every shape around the blocks", T, float, tl::bf16, std::int32_t, double) {
  const Threads dev(3);
  for (index_t rows : {0, 1, 3, 4, 5, 63, 64, 65, 130})
    for (index_t width : {0, 1, 3, 4, 7, 64, 67, 129}) {
      const auto x = tl::test::converted<T>(numbers(rows * (width + 2)));
      const auto in = tl::columns(tl::View<const T, dyn, dyn>(x.data(), {rows, width + 2}), 1, width + 1);
      std::vector<T> y(static_cast<std::size_t>(rows * width + 1), T(77));
      const tl::View<T, dyn, dyn> out(y.data(), {width, rows});
      tl::transpose(dev, out, in);
      int wrong = 0;
      for (index_t i = 0; i < rows; ++i)
        for (index_t j = 0; j < width; ++j) wrong += !(static_cast<float>(out(j, i)) == static_cast<float>(in(i, j)));
      CHECK(wrong == 0);
      CHECK(static_cast<float>(y.back()) == 77.0f);
      if (rows != width) CHECK_THROWS_AS(tl::transpose(dev, tl::View<T, dyn, dyn>(y.data(), {rows, width}), in), tl::Error);
    }
}

TEST_CASE("quantise and dequantise are the codec, row by row") {
  const Threads dev(3);
  const auto x = numbers(7 * 512);
  const tl::View<const float, dyn, dyn> m(x.data(), {7, 512});
  for (const tl::FormatInfo& f : tl::formats) {
    CAPTURE(f.name);
    const auto left = tl::columns(m, 0, 256);  // rows with a stride
    const auto bytes = tl::quantise(dev, f.format, left);
    std::vector<float> y(7 * 256), expected(256);
    tl::dequantise(dev, tl::view<7, 256>(y), f.format, bytes);
    int wrong = 0;
    for (index_t r = 0; r < 7; ++r) {
      std::vector<std::byte> row(tl::row_bytes(f.format, 256));
      tl::encode_row(f.format, &left(r, 0), row.data(), 256);
      tl::decode_row(f.format, row.data(), expected.data(), 256);
      wrong += !std::equal(expected.begin(), expected.end(), y.begin() + r * 256);
    }
    CHECK(wrong == 0);
    if (f.block > 1) CHECK_THROWS_AS(tl::quantise(dev, f.format, tl::columns(m, 0, 250)), tl::Error);
    CHECK_THROWS_AS(tl::dequantise(dev, tl::view<7, 256>(y), f.format, std::span(bytes).first(bytes.size() - 1)), tl::Error);
  }
}
