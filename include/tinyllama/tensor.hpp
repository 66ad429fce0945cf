// The tensor layer alone: views, tensors and arenas on a device, elementwise maps, reductions, softmax, matmul, gather and scatter,
// transpose, conversions and storage formats. tensor/xtensor.hpp, which costs seconds to compile, is included by those who want it.
#pragma once

#include "tinyllama/device/cpu.hpp"
#include "tinyllama/device/operations.hpp"
#include "tinyllama/tensor/arena.hpp"
#include "tinyllama/tensor/map.hpp"
#include "tinyllama/tensor/quantise.hpp"
#include "tinyllama/tensor/reduce.hpp"
#include "tinyllama/tensor/rows.hpp"
#include "tinyllama/tensor/softmax.hpp"
#include "tinyllama/tensor/tensor.hpp"
#include "tinyllama/tensor/transpose.hpp"

namespace tinyllama {

namespace detail {
template <class X>
inline constexpr bool is_view = false;
template <class T, index_t... E>
inline constexpr bool is_view<View<T, E...>> = true;
}  // namespace detail

/// matmul of device/operations.hpp for whatever turns into a view: y [T, N] = x [T, K] w^T, with w [N, K] a Matrix or Linear in any
/// storage format, or a tensor of f32, f16 or bf16.
template <class D, class Y, class X, class W>
  requires(!(detail::is_view<std::remove_cvref_t<Y>> && detail::is_view<X> && (detail::is_view<W> || std::is_convertible_v<const W&, Linear>)) &&
           (std::is_convertible_v<const W&, Linear> || requires(const W& w) { as_view(w); }))
void matmul(D& dev, Y&& y, const X& x, const W& w) {
  if constexpr (std::is_convertible_v<const W&, Linear>)
    matmul(dev, as_view(y), as_view(x), Linear(w));
  else
    matmul(dev, as_view(y), as_view(x), as_view(w));
}

/// The bytes of w [rows, columns] in rows of `format`, as an operand of matmul. Throws Error where their number is another.
inline Matrix as_matrix(Format format, std::span<const std::byte> bytes, index_t rows, index_t columns) {
  detail::check_row("as_matrix", format, columns);
  const std::size_t expected = static_cast<std::size_t>(rows) * row_bytes(format, columns);
  if (rows < 0 || bytes.size() != expected) throw Error("as_matrix", name(format), std::to_string(expected) + " bytes", std::to_string(bytes.size()));
  return Matrix{format, false, rows, columns, bytes.data()};
}

}  // namespace tinyllama
