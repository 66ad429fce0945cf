// tensor_tour: the tensor layer on its own. Tensors, one lambda over many, reductions, a quantised matrix, views without a copy.
#include <tinyllama/tensor.hpp>

#include <cstdio>

namespace tl = tinyllama;
using tl::dyn;

int main() {
  tl::Cpu dev;
  constexpr tl::index_t tokens = 4, hidden = 256, ffn = 512;

  // Static extents are checked by the compiler, dynamic ones when it runs.
  tl::Tensor<tl::Cpu, float, dyn, ffn> gate(dev, tokens), up(dev, tokens), h(dev, tokens);  // [tokens, ffn]
  for (tl::index_t i = 0; i < gate.size(); ++i) gate.data()[i] = 0.01f * static_cast<float>(i % 700) - 3.0f;
  tl::fill(dev, up, 0.5f);

  // One lambda over any number of inputs; it runs over SIMD vectors, split over the threads of the device.
  tl::map(dev, h, [](auto g, auto u) { return tl::silu(g) * u; }, gate, up);
  std::printf("swiglu:     h(1, 7) = %.6f; the same function of one float: %.6f\n", double(h(1, 7)), double(tl::silu(gate(1, 7)) * up(1, 7)));

  // Reductions along an axis: the same bits for any number of threads.
  tl::Tensor<tl::Cpu, float, dyn> mean(dev, tokens);
  tl::Tensor<tl::Cpu, int, dyn> best(dev, tokens);
  tl::mean(dev, mean, h, 1);
  tl::argmax(dev, best, h, 1);
  std::printf("reductions: row 2 has mean %.6f and its maximum at %d\n", double(mean(2)), best(2));

  // Views: a slice of rows, a vector repeated down the rows, the transposed matrix. No element moves until map reads it.
  tl::Tensor<tl::Cpu, float, ffn> bias(dev);
  tl::fill(dev, bias, 1.0f);
  tl::map(dev, tl::slice(h.view(), 2, 4), [](auto x, auto b) { return x + b; }, tl::slice(h.view(), 2, 4), tl::broadcast_rows(bias.view(), 2));
  std::printf("views:      rows 2 and 3 have a bias now: h(1, 0) = %.4f, h(2, 0) = %.4f\n", double(h(1, 0)), double(h(2, 0)));

  // A weight matrix in a storage format; matmul reads it as it is.
  tl::Tensor<tl::Cpu, float, hidden, ffn> w(dev);
  for (tl::index_t i = 0; i < w.size(); ++i) w.data()[i] = static_cast<float>(i * 2654435761u % 1000u) * 1e-4f - 0.05f;
  const auto bytes = tl::quantise(dev, tl::Format::q4_K, w);
  tl::Tensor<tl::Cpu, float, dyn, hidden> y(dev, tokens), exact(dev, tokens);
  tl::matmul(dev, y, h, tl::as_matrix(tl::Format::q4_K, bytes, hidden, ffn));
  tl::matmul(dev, exact, h, w);
  std::printf("matmul:     %zu bytes of q4_K give %.4f, %zu bytes of f32 give %.4f\n", bytes.size(), double(y(3, 3)), w.span().size_bytes(), double(exact(3, 3)));

  // bf16 is an element type like any other.
  tl::Tensor<tl::Cpu, tl::bf16, hidden, dyn> t(dev, tokens);
  tl::cast(dev, t, tl::transposed(exact.view()));
  tl::softmax(dev, t, t);
  std::printf("bf16:       softmax over tokens of column 0: %.4f %.4f %.4f %.4f\n", double(t(0, 0)), double(t(0, 1)), double(t(0, 2)), double(t(0, 3)));

  // An arena: the same code plans its memory, then uses it.
  const auto step = [&](auto& arena) { return arena.template take<float, dyn, hidden>(tokens); };
  tl::Arena<tl::Cpu> plan;
  step(plan);
  tl::Arena arena(dev, plan.peak());
  tl::gather(dev, step(arena), tl::columns(w.view(), 0, hidden), std::vector<std::int32_t>{7, 7, 0, 255});
  std::printf("arena:      %zu bytes planned, %zu used\n", plan.peak(), arena.used());

  // Mistakes name the operand and both shapes.
  try {
    tl::map(dev, h, [](auto x, auto g) { return x * g; }, h, tl::slice(gate.view(), 0, 3));
  } catch (const tl::Error& e) {
    std::printf("errors:     %s\n", e.what());
  }
}
