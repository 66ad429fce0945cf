// Gradients of rmsnorm, swiglu and cross-entropy, a row at a time; sums of squares.

#include "tinyllama/kernels/cpu/isa-inl.h"

#include <cmath>
#include <cstring>

#include "tinyllama/kernels/training.hpp"

TINYLLAMA_BEFORE_NAMESPACE();
namespace tinyllama {
namespace TINYLLAMA_ISA {
namespace {

/// N vectors at place i of N arrays, whole or (the last `count` < lanes elements) padded with 0: what every loop below runs on.
template <class F>
HWY_INLINE void Strips(index_t n, F f) {
  index_t i = 0;
  for (; i + lanes <= n; i += lanes) f(i, lanes);
  if (i < n) f(i, n - i);
}
HWY_INLINE V LoadSome(const float* p, index_t count) {
  if (count == lanes) return hn::LoadU(D(), p);
  alignas(64) float t[lanes] = {};
  std::memcpy(t, p, static_cast<std::size_t>(count) * sizeof(float));
  return hn::Load(D(), t);
}
HWY_INLINE void StoreSome(float* p, V v, index_t count) {
  if (count == lanes) return hn::StoreU(v, D(), p);
  alignas(64) float t[lanes];
  hn::Store(v, D(), t);
  std::memcpy(p, t, static_cast<std::size_t>(count) * sizeof(float));
}

void rmsnorm_backward(float* dx, const float* dy, const float* x, const float* gain, index_t n, float eps, float* rms) {
  const D d;
  V squares = hn::Zero(d), dots = hn::Zero(d);
  Strips(n, [&](index_t i, index_t count) HWY_ATTR {
    const V a = LoadSome(x + i, count);
    squares = hn::MulAdd(a, a, squares);
    dots = hn::MulAdd(hn::Mul(LoadSome(dy + i, count), LoadSome(gain + i, count)), a, dots);
  });
  const float r = 1.0f / std::sqrt(hn::GetLane(hn::SumOfLanes(d, squares)) / static_cast<float>(n) + eps);
  const V vr = hn::Set(d, r), back = hn::Set(d, r * r * r * hn::GetLane(hn::SumOfLanes(d, dots)) / static_cast<float>(n));
  Strips(n, [&](index_t i, index_t count) HWY_ATTR {
    const V own = hn::MulAdd(hn::Mul(LoadSome(dy + i, count), LoadSome(gain + i, count)), vr, LoadSome(dx + i, count));
    StoreSome(dx + i, hn::NegMulAdd(LoadSome(x + i, count), back, own), count);
  });
  *rms = r;
}

void gain_backward(float* dgain, const float* dy, index_t ld_dy, const float* x, index_t ld_x, const float* rms, index_t rows, index_t n) {
  const D d;
  Strips(n, [&](index_t i, index_t count) HWY_ATTR {
    V sum = hn::Zero(d);
    for (index_t t = 0; t < rows; ++t)
      sum = hn::MulAdd(hn::Mul(LoadSome(dy + t * ld_dy + i, count), LoadSome(x + t * ld_x + i, count)), hn::Set(d, rms[t]), sum);
    StoreSome(dgain + i, hn::Add(LoadSome(dgain + i, count), sum), count);
  });
}

void swiglu_backward(float* dgate, float* dup, const float* dh, const float* gate, const float* up, index_t n) {
  const D d;
  const V one = hn::Set(d, 1.0f);
  Strips(n, [&](index_t i, index_t count) HWY_ATTR {
    const V g = LoadSome(gate + i, count), u = LoadSome(up + i, count), h = LoadSome(dh + i, count);
    const V s = math::Sigmoid(d, g), hs = hn::Mul(h, s);
    StoreSome(dgate + i, hn::Mul(hn::Mul(hs, u), hn::MulAdd(g, hn::Sub(one, s), one)), count);
    StoreSome(dup + i, hn::Mul(hs, g), count);
  });
}

void cross_entropy(float* gradient, const float* logits, index_t n, std::int32_t target, float weight, float* loss) {
  const D d;
  V m = hn::Set(d, logits[0]);
  index_t whole = n / lanes * lanes;
  for (index_t i = 0; i < whole; i += lanes) m = hn::Max(m, hn::LoadU(d, logits + i));
  float max = hn::GetLane(hn::MaxOfLanes(d, m));
  for (index_t i = whole; i < n; ++i) max = logits[i] > max ? logits[i] : max;
  const float chosen = logits[target];  // the gradient may overwrite it
  // Four sums: a vocabulary of 32,000 in one chain of additions would lose two digits.
  const V vmax = hn::Set(d, max);
  V sums[4] = {hn::Zero(d), hn::Zero(d), hn::Zero(d), hn::Zero(d)};
  index_t at = 0;
  Strips(n, [&](index_t i, index_t count) HWY_ATTR {
    V e = math::ExpNonPositive(d, hn::Sub(LoadSome(logits + i, count), vmax));
    if (count < lanes) e = hn::IfThenElseZero(hn::FirstN(d, static_cast<std::size_t>(count)), e);
    if (gradient) StoreSome(gradient + i, e, count);
    V& sum = sums[at++ % 4];
    sum = hn::Add(sum, e);
  });
  const float total = hn::GetLane(hn::SumOfLanes(d, hn::Add(hn::Add(sums[0], sums[1]), hn::Add(sums[2], sums[3]))));
  *loss = max + std::log(total) - chosen;
  if (!gradient) return;
  const V factor = hn::Set(d, weight / total);
  Strips(n, [&](index_t i, index_t count) HWY_ATTR { StoreSome(gradient + i, hn::Mul(LoadSome(gradient + i, count), factor), count); });
  gradient[target] -= weight;
}

// Stretches of 64 additions a lane in f32, their sum in double.
void sum_of_squares(const float* x, index_t n, double* sum) {
  const D d;
  double total = 0;
  for (index_t begin = 0; begin < n; begin += 64 * lanes) {
    V squares = hn::Zero(d);
    Strips(n - begin < 64 * lanes ? n - begin : 64 * lanes, [&](index_t i, index_t count) HWY_ATTR {
      const V v = LoadSome(x + begin + i, count);
      squares = hn::MulAdd(v, v, squares);
    });
    total += static_cast<double>(hn::GetLane(hn::SumOfLanes(d, squares)));
  }
  *sum = total;
}

}  // namespace
}  // namespace TINYLLAMA_ISA
}  // namespace tinyllama
HWY_AFTER_NAMESPACE();
