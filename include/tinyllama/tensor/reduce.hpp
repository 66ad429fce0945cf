// Reductions along an axis: sum, mean, max, min, sum of squares, argmax, and any associative operation.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <limits>
#include <type_traits>

#include "tinyllama/tensor/map.hpp"

HWY_BEFORE_NAMESPACE();
namespace tinyllama {
inline namespace TINYLLAMA_VEC_NAMESPACE {

namespace vec_detail {

// The order of a reduction depends on its length and on the lanes, never on the threads: blocks of `block_vectors` vectors, each
// in four interleaved accumulators, and the blocks combined as a balanced tree. A sum's error so grows with log n.
inline constexpr index_t block_vectors = 128;

// init if there is nothing; else pre(x) combined over [0, n) of one run, lane by lane.
template <class T, class Pre, class Op>
HWY_INLINE Vec reduce_block(Run<const T> in, index_t n, Vec init, const Pre& pre, const Op& op) {
  constexpr index_t lanes = Vec::lanes;
  Vec a = init, b = init, c = init, d = init;
  index_t i = 0;
  if (in.stride == 1)
    for (; i + 4 * lanes <= n; i += 4 * lanes) {
      const T* p = in.p + i;
      a = op(pre(load(p)), a), b = op(pre(load(p + lanes)), b), c = op(pre(load(p + 2 * lanes)), c), d = op(pre(load(p + 3 * lanes)), d);
    }
  for (; i + lanes <= n; i += lanes) a = op(pre(load_strided(in.p + i * in.stride, in.stride)), a);
  if (i < n) {
    // The lanes beyond the end hold init after pre, so that any pre will do.
    alignas(64) float padded[lanes];
    init.store(padded);
    alignas(64) float tail[lanes];
    pre(load_partial(in.p + i * in.stride, in.stride, n - i)).store(tail);
    for (index_t k = 0; k < n - i; ++k) padded[k] = tail[k];
    b = op(Vec::load(padded), b);
  }
  return op(op(a, b), op(c, d));
}

template <class T, class Pre, class Op>
Vec reduce_tree(Run<const T> in, index_t n, Vec init, const Pre& pre, const Op& op) {
  constexpr index_t block = block_vectors * Vec::lanes;
  if (n <= block) return reduce_block(in, n, init, pre, op);
  const index_t left = (n / block + 1) / 2 * block;
  const Vec a = reduce_tree(in, left, init, pre, op);
  return op(a, reduce_tree(Run<const T>{in.p + left * in.stride, in.stride}, n - left, init, pre, op));
}

// Combines the lanes of v, by halves.
template <class Op>
HWY_INLINE float reduce_lanes(Vec v, const Op& op) {
  constexpr index_t lanes = Vec::lanes;
  alignas(64) float x[2 * lanes];
  v.store(x);
  for (index_t half = lanes / 2; half > 0; half /= 2) {
    op(Vec::load(x), Vec::load(x + half)).store(x);  // lanes from `half` on are leftovers, never read again
  }
  return x[0];
}

// Down the columns, at most `band` of them: the memory of a page and more in one piece, where hardware that fetches ahead sees the rows' ends seldom.
inline constexpr index_t band = 1024;

// sums = `count` rows of `columns` elements, `step` apart, combined column by column; eight at a time, so that sums pass through the first-level cache
// once for eight loads from memory.
template <class T, class Pre, class Op>
HWY_INLINE void reduce_rows(float* sums, const T* p, index_t step, index_t count, index_t columns, Vec init, const Pre& pre, const Op& op) {
  constexpr index_t lanes = Vec::lanes;
  const auto add = [&]<int R>(std::integral_constant<int, R>, index_t i) HWY_ATTR {
    const T* row = p + i * step;
    const auto vector = [&](index_t c, auto&& from) HWY_ATTR {
      Vec s = i ? Vec::load(sums + c) : init;
      for (int r = 0; r < R; ++r) s = op(pre(from(row + r * step + c)), s);
      s.store(sums + c);
    };
    index_t c = 0;
    for (; c + lanes <= columns; c += lanes) vector(c, [](const T* from) HWY_ATTR { return load(from); });
    if (c < columns) vector(c, [&](const T* from) HWY_ATTR { return load_partial(from, 1, columns - c); });
  };
  if (count == 0)
    for (index_t c = 0; c < columns; c += lanes) init.store(sums + c);
  index_t i = 0;
  for (; i + 8 <= count; i += 8) add(std::integral_constant<int, 8>(), i);
  for (; i < count; ++i) add(std::integral_constant<int, 1>(), i);
}
template <class T, class Pre, class Op>
void reduce_band(float* sums, const T* p, index_t step, index_t count, index_t columns, Vec init, const Pre& pre, const Op& op) {
  constexpr index_t block = 32;
  if (count <= block) return reduce_rows(sums, p, step, count, columns, init, pre, op);
  const index_t top = (count / block + 1) / 2 * block;
  reduce_band(sums, p, step, top, columns, init, pre, op);
  alignas(64) float below[band];
  reduce_band(below, p + top * step, step, count - top, columns, init, pre, op);
  for (index_t c = 0; c < columns; c += Vec::lanes) op(Vec::load(sums + c), Vec::load(below + c)).store(sums + c);
}

// The shape or strides without one axis.
template <std::size_t R>
constexpr std::array<index_t, R - 1> without(const std::array<index_t, R>& a, std::size_t axis) {
  std::array<index_t, R - 1> r{};
  for (std::size_t k = 0, j = 0; k < R; ++k)
    if (k != axis) r[j++] = a[k];
  return r;
}

template <std::size_t R>
std::size_t check_reduction(const char* operation, int axis, const std::array<index_t, R>& in, const std::array<index_t, R - 1>& out) {
  const int rank = static_cast<int>(R), a = axis < 0 ? axis + rank : axis;
  if (a < 0 || a >= rank) throw Error(operation, "axis", "one of the " + std::to_string(rank) + " axes", std::to_string(axis));
  const auto expected = without(in, static_cast<std::size_t>(a));
  if (expected != out) throw Error(operation, "output", "shape " + detail::shape_text(expected), detail::shape_text(out));
  return static_cast<std::size_t>(a);
}

template <class Device, class T, index_t... E, class U, index_t... F, class Pre, class Op, class Post>
void reduce_views(const char* operation, const Device& device, View<T, E...> out, View<U, F...> in, int axis_number, float init, const Pre& pre,
                  const Op& op, const Post& post) {
  constexpr std::size_t rank = sizeof...(F);
  static_assert(sizeof...(E) + 1 == rank, "a reduction's output has one axis less than its input");
  static_assert(is_float_element<T> && is_float_element<U> && !std::is_const_v<T>, "reductions work on float, bf16 and f16");
  using In = std::remove_const_t<U>;
  const std::size_t axis = check_reduction(operation, axis_number, in.shape(), out.shape());
  check_writable(operation, out.shape(), out.strides());
  if (out.size() == 0) return;

  const index_t count = in.extent(axis), step = in.stride(axis);
  const Layout<rank - 1, 2> layout(out.shape(), {out.strides(), without(in.strides(), axis)});
  const index_t inner = layout.inner(), total = out.size();
  // Along contiguous memory where the axis allows it; else a vector of outputs at a time, down the rows.
  const bool down = step != 1 && inner >= 2 && layout.inner_stride(1) == 1;
  const index_t unit = down ? band : 1;
  const index_t grain = std::max<index_t>(1, task_elements / std::max<index_t>(1, count) / unit) * unit;
  device.parallel_for(total, grain, [&](index_t begin, index_t end) {
    const Vec start(init);
    for (index_t run = begin / inner, first = begin % inner, n; begin < end; begin += n, ++run, first = 0) {
      n = std::min(inner - first, end - begin);
      T* to = out.data() + layout.offset(0, run) + first * layout.inner_stride(0);
      const In* from = in.data() + layout.offset(1, run) + first * layout.inner_stride(1);
      const index_t to_step = layout.inner_stride(0), from_step = layout.inner_stride(1);
      if (down) {
        for (index_t i = 0; i < n; i += band) {
          const index_t columns = std::min(band, n - i);
          alignas(64) float sums[band];
          reduce_band(sums, from + i, step, count, columns, start, pre, op);
          index_t c = 0;
          if (to_step == 1)
            for (; c + Vec::lanes <= columns; c += Vec::lanes) store(post(Vec::load(sums + c)), to + i + c);
          for (; c < columns; c += Vec::lanes) store_partial(post(Vec::load(sums + c)), to + (i + c) * to_step, to_step, std::min(Vec::lanes, columns - c));
        }
      } else {
        for (index_t i = 0; i < n; ++i) {
          const float r = reduce_lanes(reduce_tree(Run<const In>{from + i * from_step, step}, count, start, pre, op), op);
          store_partial(post(Vec(r)), to + i * to_step, to_step, 1);
        }
      }
    }
  });
}

struct Larger {
  HWY_INLINE Vec operator()(Vec x, Vec y) const { return max(x, y); }
};
struct Smaller {
  HWY_INLINE Vec operator()(Vec x, Vec y) const { return min(x, y); }
};

}  // namespace vec_detail

/// out = op over `axis` of in; out has the shape of in without that axis (negative axes count from the last). op takes and returns
/// Vec, is associative and commutative, and has `init` as its neutral element, which is also the result of an empty axis. The order
/// of operations is fixed by the shape and the instruction set: any number of threads gives the same bits.
template <class Device, class Out, class In, class Op>
void reduce(const Device& device, Out&& out, const In& in, int axis, float init, const Op& op) {
  vec_detail::reduce_views("reduce", device, as_view(out), as_view(in), axis, init, vec_detail::Same(), op, vec_detail::Same());
}

/// Sums in f32, whatever the elements; error within (log2(n) + 40) roundings of the sum of magnitudes.
template <class Device, class Out, class In>
void sum(const Device& device, Out&& out, const In& in, int axis) {
  vec_detail::reduce_views("sum", device, as_view(out), as_view(in), axis, 0.0f, vec_detail::Same(), vec_detail::Plus(), vec_detail::Same());
}

template <class Device, class Out, class In>
void sum_of_squares(const Device& device, Out&& out, const In& in, int axis) {
  vec_detail::reduce_views("sum_of_squares", device, as_view(out), as_view(in), axis, 0.0f, [](Vec x) HWY_ATTR { return x * x; }, vec_detail::Plus(),
                           vec_detail::Same());
}

/// A NaN for an empty axis.
template <class Device, class Out, class In>
void mean(const Device& device, Out&& out, const In& in, int axis) {
  const auto view = as_view(in);
  const int rank = static_cast<int>(decltype(view)::rank), a = axis < 0 ? axis + rank : axis;
  const float n = a >= 0 && a < rank ? static_cast<float>(view.extent(static_cast<std::size_t>(a))) : 1.0f;
  vec_detail::reduce_views("mean", device, as_view(out), view, axis, 0.0f, vec_detail::Same(), vec_detail::Plus(), [n](Vec x) HWY_ATTR { return x / Vec(n); });
}

/// The largest element, NaNs ignored; -inf for an empty axis.
template <class Device, class Out, class In>
void max(const Device& device, Out&& out, const In& in, int axis) {
  vec_detail::reduce_views("max", device, as_view(out), as_view(in), axis, -std::numeric_limits<float>::infinity(), vec_detail::Same(), vec_detail::Larger(),
                           vec_detail::Same());
}

/// The smallest element, NaNs ignored; +inf for an empty axis.
template <class Device, class Out, class In>
void min(const Device& device, Out&& out, const In& in, int axis) {
  vec_detail::reduce_views("min", device, as_view(out), as_view(in), axis, std::numeric_limits<float>::infinity(), vec_detail::Same(), vec_detail::Smaller(),
                           vec_detail::Same());
}

/// The index along `axis` of the first of the largest elements, NaNs ignored (0 where there is nothing else). Out holds integers.
/// Throws Error for an empty axis.
template <class Device, class Out, class In>
void argmax(const Device& device, Out&& out_like, const In& in_like, int axis_number) {
  const auto out = as_view(out_like);
  const auto in = as_view(in_like);
  using T = typename decltype(out)::element_type;
  using U = typename decltype(in)::value_type;
  constexpr std::size_t rank = decltype(in)::rank;
  static_assert(decltype(out)::rank + 1 == rank, "a reduction's output has one axis less than its input");
  static_assert(std::is_integral_v<T> && !std::is_const_v<T> && vec_detail::is_float_element<U>, "argmax: integers from float, bf16 or f16");
  const std::size_t axis = vec_detail::check_reduction("argmax", axis_number, in.shape(), out.shape());
  vec_detail::check_writable("argmax", out.shape(), out.strides());
  if (out.size() == 0) return;
  const index_t count = in.extent(axis), step = in.stride(axis);
  if (count == 0) throw Error("argmax", "axis", "at least one element", "none");
  const vec_detail::Layout<rank - 1, 2> layout(out.shape(), {out.strides(), vec_detail::without(in.strides(), axis)});
  device.parallel_for(out.size(), std::max<index_t>(1, vec_detail::task_elements / count), [&](index_t begin, index_t end) {
    for (index_t i = begin; i < end; ++i) {
      const index_t run = i / layout.inner(), k = i % layout.inner();
      const U* p = in.data() + layout.offset(1, run) + k * layout.inner_stride(1);
      const vec_detail::Larger larger;
      const Vec none(-std::numeric_limits<float>::infinity());
      const float most = vec_detail::reduce_lanes(vec_detail::reduce_tree(vec_detail::Run<const U>{p, step}, count, none, vec_detail::Same(), larger), larger);
      index_t at = 0;
      while (at < count && !(static_cast<float>(p[at * step]) == most)) ++at;
      out.data()[layout.offset(0, run) + k * layout.inner_stride(0)] = static_cast<T>(at < count ? at : 0);
    }
  });
}

}  // namespace TINYLLAMA_VEC_NAMESPACE
}  // namespace tinyllama
HWY_AFTER_NAMESPACE();
