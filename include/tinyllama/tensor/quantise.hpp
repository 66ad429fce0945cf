// Matrices of floats into a storage format and back, row by row, on the threads of a device.
#pragma once

#include <algorithm>
#include <cstddef>
#include <span>
#include <vector>

#include "tinyllama/quant/codec.hpp"
#include "tinyllama/tensor/tensor.hpp"

namespace tinyllama {

namespace detail {
template <class M>
std::size_t check_quantised(const char* operation, Format format, const M& matrix, std::size_t bytes) {
  static_assert(M::rank == 2 && std::is_same_v<typename M::value_type, float>, "quantise and dequantise work on matrices of float");
  if (matrix.extent(1) > 1 && matrix.stride(1) != 1) throw Error(operation, "matrix", "contiguous rows", "column stride " + std::to_string(matrix.stride(1)));
  check_row(operation, format, matrix.extent(1));
  const std::size_t needed = static_cast<std::size_t>(matrix.extent(0)) * row_bytes(format, matrix.extent(1));
  if (bytes != needed) throw Error(operation, name(format), std::to_string(needed) + " bytes for " + shape_text(matrix.shape()), std::to_string(bytes));
  return row_bytes(format, matrix.extent(1));
}
// Encoding takes some 3 ns an element for the plain search-free formats: a few tens of microseconds a task.
inline index_t quantise_grain(index_t columns) { return std::max<index_t>(1, 16384 / std::max<index_t>(1, columns)); }
}  // namespace detail

/// The rows of in [R, C] in `format`: `out` holds R row_bytes(format, C) bytes. Throws Error for other sizes, or where C is not a
/// multiple of the format's block.
template <class Device, class In>
void quantise(const Device& device, Format format, std::span<std::byte> out, const In& in_like) {
  const auto in = as_view(in_like);
  const std::size_t stride = detail::check_quantised("quantise", format, in, out.size());
  device.parallel_for(in.extent(0), detail::quantise_grain(in.extent(1)), [&](index_t begin, index_t end) {
    for (index_t r = begin; r < end; ++r)
      encode_row(format, in.data() + r * in.stride(0), out.data() + static_cast<std::size_t>(r) * stride, in.extent(1));
  });
}

/// out [R, C] = the rows stored at `in` in `format`.
template <class Device, class Out>
void dequantise(const Device& device, Out&& out_like, Format format, std::span<const std::byte> in) {
  const auto out = as_view(out_like);
  static_assert(!std::is_const_v<typename decltype(out)::element_type>, "dequantise: the output is a view of const elements");
  const std::size_t stride = detail::check_quantised("dequantise", format, out, in.size());
  device.parallel_for(out.extent(0), detail::quantise_grain(out.extent(1)), [&](index_t begin, index_t end) {
    for (index_t r = begin; r < end; ++r)
      decode_row(format, in.data() + static_cast<std::size_t>(r) * stride, out.data() + r * out.stride(0), out.extent(1));
  });
}

/// The same, into bytes of its own.
template <class Device, class In>
std::vector<std::byte> quantise(const Device& device, Format format, const In& in_like) {
  const auto in = as_view(in_like);
  detail::check_row("quantise", format, in.extent(1));
  std::vector<std::byte> out(static_cast<std::size_t>(in.extent(0)) * row_bytes(format, in.extent(1)));
  quantise(device, format, std::span<std::byte>(out), in);
  return out;
}

}  // namespace tinyllama
