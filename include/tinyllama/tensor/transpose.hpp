// The transposed matrix, copied block by block so that both sides are read and written by whole cache lines.
#pragma once

#include <algorithm>
#include <type_traits>

#include "tinyllama/tensor/map.hpp"

HWY_BEFORE_NAMESPACE();
namespace tinyllama {
inline namespace TINYLLAMA_VEC_NAMESPACE {

namespace vec_detail {

// to[j][i] = from[i][j] for 4 x 4 elements of 32 bits, in registers.
HWY_INLINE void transpose_4x4(std::uint32_t* to, index_t to_stride, const std::uint32_t* from, index_t from_stride) {
#if HWY_TARGET == HWY_SCALAR
  for (index_t i = 0; i < 4; ++i)
    for (index_t j = 0; j < 4; ++j) to[j * to_stride + i] = from[i * from_stride + j];
#else
  const hn::CappedTag<std::uint32_t, 4> d;
  const auto a = hn::LoadU(d, from), b = hn::LoadU(d, from + from_stride);
  const auto c = hn::LoadU(d, from + 2 * from_stride), e = hn::LoadU(d, from + 3 * from_stride);
  const auto ab_low = hn::InterleaveLower(d, a, b), ab_high = hn::InterleaveUpper(d, a, b);  // a0 b0 a1 b1, a2 b2 a3 b3
  const auto ce_low = hn::InterleaveLower(d, c, e), ce_high = hn::InterleaveUpper(d, c, e);
  hn::StoreU(hn::ConcatLowerLower(d, ce_low, ab_low), d, to);
  hn::StoreU(hn::ConcatUpperUpper(d, ce_low, ab_low), d, to + to_stride);
  hn::StoreU(hn::ConcatLowerLower(d, ce_high, ab_high), d, to + 2 * to_stride);
  hn::StoreU(hn::ConcatUpperUpper(d, ce_high, ab_high), d, to + 3 * to_stride);
#endif
}

}  // namespace vec_detail

/// out [C, R] = the transpose of in [R, C], of any element type; out and in do not overlap. Throws Error where the shapes disagree.
/// Where a view will do, `transposed(v)` moves nothing.
template <class Device, class Out, class In>
void transpose(const Device& device, Out&& out_like, const In& in_like) {
  const auto out = as_view(out_like);
  const auto in = as_view(in_like);
  using T = typename decltype(out)::element_type;
  static_assert(decltype(out)::rank == 2 && decltype(in)::rank == 2, "transpose works on matrices");
  static_assert(std::is_same_v<T, typename decltype(in)::value_type>, "transpose: input and output have one element type; see cast");
  if (out.extent(0) != in.extent(1) || out.extent(1) != in.extent(0))
    throw Error("transpose", "output", "shape " + detail::shape_text(std::array{in.extent(1), in.extent(0)}), detail::shape_text(out.shape()));
  vec_detail::check_writable("transpose", out.shape(), out.strides());
  const index_t rows = in.extent(0), columns = in.extent(1);
  const bool quick = sizeof(T) == 4 && in.stride(1) == 1 && out.stride(1) == 1;
  constexpr index_t tile = 64;  // 2 x 16 KB: both tiles in the first-level cache
  device.parallel_for(columns, tile, [&](index_t first, index_t last) {
    for (index_t top = 0; top < rows; top += tile) {
      const index_t bottom = std::min(rows, top + tile);
      // Four columns, so four output rows, at a time: each is written from left to right.
      index_t j = first;
      for (; quick && j + 4 <= last; j += 4) {
        index_t i = top;
        if constexpr (sizeof(T) == 4)
          for (; i + 4 <= bottom; i += 4)
            vec_detail::transpose_4x4(reinterpret_cast<std::uint32_t*>(out.data() + j * out.stride(0) + i), out.stride(0),
                                      reinterpret_cast<const std::uint32_t*>(in.data() + i * in.stride(0) + j), in.stride(0));
        for (; i < bottom; ++i)
          for (index_t k = j; k < j + 4; ++k) out(k, i) = in(i, k);
      }
      for (; j < last; ++j)
        for (index_t i = top; i < bottom; ++i) out(j, i) = in(i, j);
    }
  });
}

}  // namespace TINYLLAMA_VEC_NAMESPACE
}  // namespace tinyllama
HWY_AFTER_NAMESPACE();
