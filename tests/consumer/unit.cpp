// A unit with static dispatch, compiled twice: at the baseline and with -mavx2. Both must give the same value by their own kernels.
#include <tinyllama/tensor/view.hpp>

#include <numeric>
#include <vector>

float UNIT();
float UNIT() {
  std::vector<float> x(1000);
  std::iota(x.begin(), x.end(), 0.0f);
  const auto v = tinyllama::View<const float, tinyllama::dyn>(x.data(), {static_cast<tinyllama::index_t>(x.size())});
  return v.data()[v.size() - 1];
}
