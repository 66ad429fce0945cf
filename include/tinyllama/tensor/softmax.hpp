// Softmax over the last axis, of views in any element type and layout.
#pragma once

#include <algorithm>
#include <limits>

#include "tinyllama/tensor/reduce.hpp"

HWY_BEFORE_NAMESPACE();
namespace tinyllama {
inline namespace TINYLLAMA_VEC_NAMESPACE {

/// out = e^(scale x - m) / sum e^(scale x - m) along the last axis, m its largest scale x; out may be in. Sums are f32, in a fixed
/// order. A row whose largest element is infinite gives NaNs. Throws Error where the shapes differ.
template <class Device, class Out, class In>
void softmax(const Device& device, Out&& out_like, const In& in_like, float scale = 1.0f) {
  const auto out = as_view(out_like);
  const auto in = as_view(in_like);
  using T = typename decltype(out)::element_type;
  using U = typename decltype(in)::value_type;
  constexpr std::size_t rank = decltype(out)::rank;
  static_assert(rank >= 1 && decltype(in)::rank == rank, "softmax: input and output have the same rank, at least 1");
  static_assert(vec_detail::is_float_element<T> && vec_detail::is_float_element<U>, "softmax works on float, bf16 and f16");
  vec_detail::check_same_shape("softmax", 0, out.shape(), in.shape());
  vec_detail::check_writable("softmax", out.shape(), out.strides());
  if (out.size() == 0) return;
  const index_t n = out.extent(rank - 1), rows = out.size() / n;
  const index_t out_step = out.stride(rank - 1), in_step = in.stride(rank - 1);
  const vec_detail::Layout<rank - 1, 2> layout(vec_detail::without(out.shape(), rank - 1),
                                               {vec_detail::without(out.strides(), rank - 1), vec_detail::without(in.strides(), rank - 1)});
  device.parallel_for(rows, std::max<index_t>(1, vec_detail::task_elements / n), [&](index_t begin, index_t end) {
    using vec_detail::Run;
    for (index_t r = begin; r < end; ++r) {
      const index_t run = r / layout.inner(), k = r % layout.inner();
      const Run<const U> x{in.data() + layout.offset(1, run) + k * layout.inner_stride(1), in_step};
      const Run<T> y{out.data() + layout.offset(0, run) + k * layout.inner_stride(0), out_step};
      const vec_detail::Larger larger;
      const auto scaled = [scale](Vec v) HWY_ATTR { return v * Vec(scale); };
      const Vec none(-std::numeric_limits<float>::infinity());
      const float most = vec_detail::reduce_lanes(vec_detail::reduce_tree(x, n, none, scaled, larger), larger);
      const auto shifted = [scale, most](Vec v) HWY_ATTR {
        return Vec(HWY_NAMESPACE::ExpNonPositive(vec_detail::Tag(), (v * Vec(scale) - Vec(most)).raw));
      };
      // The exponentials are taken twice where the output is narrower than f32, so that the sum is not of rounded values.
      constexpr bool exact = std::is_same_v<T, float>;
      if constexpr (exact) vec_detail::map_run(n, shifted, y, x);
      const vec_detail::Plus plus;
      float total;
      if constexpr (exact)
        total = vec_detail::reduce_lanes(vec_detail::reduce_tree(Run<const T>{y.p, y.stride}, n, Vec(0.0f), vec_detail::Same(), plus), plus);
      else
        total = vec_detail::reduce_lanes(vec_detail::reduce_tree(x, n, Vec(0.0f), shifted, plus), plus);
      const float inverted = 1.0f / total;
      if constexpr (exact)
        vec_detail::map_run(n, [inverted](Vec v) HWY_ATTR { return v * Vec(inverted); }, y, Run<const T>{y.p, y.stride});
      else
        vec_detail::map_run(n, [&](Vec v) HWY_ATTR { return shifted(v) * Vec(inverted); }, y, x);
    }
  });
}

}  // namespace TINYLLAMA_VEC_NAMESPACE
}  // namespace tinyllama
HWY_AFTER_NAMESPACE();
