// The tensor layer beside the same expressions in xtensor with xsimd and in Eigen, in cache and in memory, with the share of the
// machine's read bandwidth, measured in the same run. Ours on one thread like the others, and on all (`/threads`).
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // g++ 12 on its own AVX-512 intrinsics, as Eigen and xsimd use them
#endif
#include <benchmark/benchmark.h>

#include <cmath>
#include <cstring>
#include <memory>
#include <string>
#include <vector>

#include <Eigen/Dense>
#if __has_include(<xtensor/containers/xtensor.hpp>)
#include <xtensor/containers/xtensor.hpp>
#include <xtensor/core/xmath.hpp>
#include <xtensor/core/xnoalias.hpp>
#include <xtensor/views/xview.hpp>
#else
#include <xtensor/xmath.hpp>
#include <xtensor/xnoalias.hpp>
#include <xtensor/xtensor.hpp>
#include <xtensor/xview.hpp>
#endif

#include "limits.hpp"
#include "tinyllama/tensor.hpp"

namespace {

using namespace tinyllama;

std::unique_ptr<Cpu> one, all;
double read_bandwidth = 0;

// Rows of 2048, in the second-level cache (three arrays of 128 KiB), and far beyond the last (three of 64 MiB).
constexpr index_t width = 2048, cached = 16, large = 8192;

using EigenMatrix = Eigen::Array<float, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>;

float value(index_t i, index_t seed) { return static_cast<float>((i * 7919 + seed * 104729) % 2003) / 250.0f - 4.0f; }

/// The operands of a benchmark in one library's type: a and b are inputs [rows, width], y the output, v [rows].
struct Ours {
  Cpu& dev;
  Tensor<Cpu, float, dyn, dyn> a, b, y, t;
  Tensor<Cpu, float, dyn> v, w;
  Tensor<Cpu, bf16, dyn, dyn> h;
  Ours(Cpu& d, index_t rows) : dev(d), a(d, rows, width), b(d, rows, width), y(d, rows, width), t(d, width, rows), v(d, rows), w(d, width), h(d, rows, width) {
    for (index_t i = 0; i < a.size(); ++i) a.data()[i] = value(i, 1), b.data()[i] = value(i, 2), y.data()[i] = 0.0f, t.data()[i] = 0.0f, h.data()[i] = bf16(0.0f);
  }
  const float* result() const { return y.data(); }
};
struct Xtensor {
  xt::xtensor<float, 2> a, b, y, t;
  xt::xtensor<float, 1> v, w;
  Xtensor(Cpu&, index_t r) {
    const auto rows = static_cast<std::size_t>(r), columns = static_cast<std::size_t>(width);
    a = b = y = xt::zeros<float>({rows, columns});
    t = xt::zeros<float>({columns, rows});
    v = xt::zeros<float>({rows}), w = xt::zeros<float>({columns});
    for (index_t i = 0; i < r * width; ++i) a.data()[i] = value(i, 1), b.data()[i] = value(i, 2);
  }
};
struct InEigen {
  EigenMatrix a, b, y, t;
  Eigen::ArrayXf v, w;
  Eigen::Array<Eigen::bfloat16, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor> h;
  InEigen(Cpu&, index_t r) : a(r, width), b(r, width), y(r, width), t(width, r), v(r), w(width), h(r, width) {
    for (index_t i = 0; i < r * width; ++i) a.data()[i] = value(i, 1), b.data()[i] = value(i, 2), y.data()[i] = 0.0f;
    t.setZero(), h.setZero();
  }
};

struct Swiglu {
  static constexpr double bytes = 12;  // read and written for each element
  static void run(Ours& o) { map(o.dev, o.y, [](auto g, auto u) { return silu(g) * u; }, o.a, o.b); }
  static void run(Xtensor& x) { xt::noalias(x.y) = x.a / (1.0f + xt::exp(-x.a)) * x.b; }
  static void run(InEigen& e) { e.y = e.a / (1.0f + (-e.a).exp()) * e.b; }
};
struct Axpy {
  static constexpr double bytes = 12;
  static void run(Ours& o) { map(o.dev, o.y, [](auto x, auto y) { return 0.5f * x + y; }, o.a, o.b); }
  static void run(Xtensor& x) { xt::noalias(x.y) = 0.5f * x.a + x.b; }
  static void run(InEigen& e) { e.y = 0.5f * e.a + e.b; }
};
struct Exp {
  static constexpr double bytes = 8;
  static void run(Ours& o) { map(o.dev, o.y, [](auto x) { return exp(x); }, o.a); }
  static void run(Xtensor& x) { xt::noalias(x.y) = xt::exp(x.a); }
  static void run(InEigen& e) { e.y = e.a.exp(); }
};
struct Tanh {
  static constexpr double bytes = 8;
  static void run(Ours& o) { map(o.dev, o.y, [](auto x) { return tanh(x); }, o.a); }
  static void run(Xtensor& x) { xt::noalias(x.y) = xt::tanh(x.a); }
  static void run(InEigen& e) { e.y = e.a.tanh(); }
};
struct BroadcastAdd {
  static constexpr double bytes = 8;
  static void run(Ours& o) { map(o.dev, o.y, [](auto x, auto b) { return x + b; }, o.a, broadcast_rows(o.w.view(), o.a.extent(0))); }
  static void run(Xtensor& x) { xt::noalias(x.y) = x.a + x.w; }
  static void run(InEigen& e) { e.y = e.a.rowwise() + e.w.transpose(); }
};
struct SumRows {
  static constexpr double bytes = 4;
  static void run(Ours& o) { sum(o.dev, o.v, o.a, 1); }
  static void run(Xtensor& x) { xt::noalias(x.v) = xt::sum(x.a, {1}, xt::evaluation_strategy::immediate); }
  static void run(InEigen& e) { e.v = e.a.rowwise().sum(); }
};
struct SumColumns {
  static constexpr double bytes = 4;
  static void run(Ours& o) { sum(o.dev, o.w, o.a, 0); }
  static void run(Xtensor& x) { xt::noalias(x.w) = xt::sum(x.a, {0}, xt::evaluation_strategy::immediate); }
  static void run(InEigen& e) { e.w = e.a.colwise().sum().transpose(); }
};
struct MaxRows {
  static constexpr double bytes = 4;
  static void run(Ours& o) { max(o.dev, o.v, o.a, 1); }
  static void run(Xtensor& x) { xt::noalias(x.v) = xt::amax(x.a, {1}, xt::evaluation_strategy::immediate); }
  static void run(InEigen& e) { e.v = e.a.rowwise().maxCoeff(); }
};
struct Softmax {
  static constexpr double bytes = 8;
  static void run(Ours& o) { softmax(o.dev, o.y, o.a); }
  static void run(Xtensor& x) {
    // Row by row, each reduction evaluated first: inside of a broadcast a lazy one would be computed again for each element.
    for (std::size_t i = 0; i < x.a.shape()[0]; ++i) {
      auto in = xt::view(x.a, i, xt::all());
      auto out = xt::view(x.y, i, xt::all());
      const float most = xt::amax(in)();
      xt::noalias(out) = xt::exp(in - most);
      const float inverted = 1.0f / xt::sum(out)();
      out *= inverted;
    }
  }
  static void run(InEigen& e) {
    for (Eigen::Index i = 0; i < e.a.rows(); ++i) {
      e.y.row(i) = (e.a.row(i) - e.a.row(i).maxCoeff()).exp();
      e.y.row(i) *= 1.0f / e.y.row(i).sum();
    }
  }
};
struct Transpose {
  static constexpr double bytes = 8;
  static void run(Ours& o) { transpose(o.dev, o.t, o.a); }
  static void run(Xtensor& x) { xt::noalias(x.t) = xt::transpose(x.a); }
  static void run(InEigen& e) { e.t = e.a.transpose(); }
};
struct CastBf16 {  // xtensor has no 16-bit floats
  static constexpr double bytes = 6;
  static void run(Ours& o) { cast(o.dev, o.h, o.a); }
  static void run(InEigen& e) { e.h = e.a.cast<Eigen::bfloat16>(); }
};

template <class Op, class Library>
void run(benchmark::State& state, Cpu& dev, index_t rows) {
  Library data(dev, rows);
  Op::run(data);
  const double start = bench::now();
  for (auto _ : state) {
    Op::run(data);
    benchmark::ClobberMemory();
  }
  const double elements = static_cast<double>(rows * width) * static_cast<double>(state.iterations()), seconds = bench::now() - start;
  state.counters["GB/s"] = Op::bytes * elements / seconds * 1e-9;
  state.counters["ns/element"] = seconds / elements * 1e9;
  state.counters["share"] = Op::bytes * elements / seconds / read_bandwidth;
}

template <class Op>
void compare(const std::string& name) {
  for (const index_t rows : {cached, large}) {
    const std::string place = rows == cached ? "/cache/" : "/memory/";
    const auto add = [&](const std::string& library, auto&& f) { benchmark::RegisterBenchmark((name + place + library).c_str(), f)->MinTime(0.1)->UseRealTime(); };
    add("tinyllama", [=](benchmark::State& s) { run<Op, Ours>(s, *one, rows); });
    if (all->threads() > 1 && rows == large) add("tinyllama/threads", [=](benchmark::State& s) { run<Op, Ours>(s, *all, rows); });
    if constexpr (requires(Xtensor& x) { Op::run(x); }) add("xtensor", [=](benchmark::State& s) { run<Op, Xtensor>(s, *one, rows); });
    if constexpr (requires(InEigen& e) { Op::run(e); }) add("eigen", [=](benchmark::State& s) { run<Op, InEigen>(s, *one, rows); });
  }
}

}  // namespace

int main(int argc, char** argv) {
  Cpu::Options single;
  single.threads = 1;
  one = std::make_unique<Cpu>(single);
  all = std::make_unique<Cpu>();
  benchmark::Initialize(&argc, argv);
  if (benchmark::ReportUnrecognizedArguments(argc, argv)) return 2;
  read_bandwidth = bench::measure_limits(*all).read.best;
  benchmark::AddCustomContext("read bandwidth, GB/s, all threads", std::to_string(read_bandwidth * 1e-9));
  benchmark::AddCustomContext("floats in a vector", std::to_string(Vec::lanes));
  compare<Swiglu>("swiglu");
  compare<Axpy>("axpy");
  compare<Exp>("exp");
  compare<Tanh>("tanh");
  compare<BroadcastAdd>("broadcast_add");
  compare<SumRows>("sum_rows");
  compare<SumColumns>("sum_columns");
  compare<MaxRows>("max_rows");
  compare<Softmax>("softmax");
  compare<Transpose>("transpose");
  compare<CastBf16>("cast_bf16");
  benchmark::RunSpecifiedBenchmarks();
  one.reset(), all.reset();
}
