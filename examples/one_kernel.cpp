// one_kernel: one operation on one's own memory, a std::vector and an xtensor container, without a copy.
#include <tinyllama/device/cpu.hpp>
#include <tinyllama/device/operations.hpp>
#include <tinyllama/tensor/xtensor.hpp>

#include <xtensor/xrandom.hpp>

#include <iostream>

namespace tl = tinyllama;

int main() {
  tl::Cpu dev;
  std::cout << dev.threads() << " threads, " << dev.instruction_set() << '\n';

  // Vectors: the row length is static and checked, the number of rows follows from the size.
  const std::vector<float> in(3 * 2048, 2.0f), gain(2048, 0.5f);
  std::vector<float> out(in.size());
  tl::rmsnorm(dev, tl::view<tl::dyn, 2048>(out), tl::view<tl::dyn, 2048>(in), tl::view<2048>(gain), 1e-5f);
  std::cout << "rmsnorm of twos with gain 0.5: " << out[0] << '\n';

  // xtensor: the kernel works on the container's own elements.
  xt::xtensor<float, 2> x = xt::random::randn<float>({4, 256}), w = xt::random::randn<float>({64, 256}), y = xt::zeros<float>({4, 64});
  tl::matmul(dev, tl::as_view(y), tl::as_view(x), tl::as_view(w));  // y = x w^T
  std::cout << "matmul agrees with xtensor to " << xt::amax(xt::abs(y - xt::sum(xt::view(x, xt::all(), xt::newaxis(), xt::all()) * w, {2})))() << '\n';
}
