// f8_e4m3 with one scale a row: w = scale q, the largest of a row at the largest number of the format (as vLLM and compressed-tensors store it).
#pragma once

#include <cmath>
#include <span>

#include "tinyllama/quant/codec.hpp"

namespace tinyllama {

/// Encodes a row and returns its scale. A row with a NaN or an infinity decodes to NaN throughout.
inline float encode_e4m3_row(std::span<const float> in, std::byte* row) {
  float largest = 0;
  for (const float x : in)
    if (const float a = std::fabs(x); !(a <= largest) && largest == largest) largest = a;  // a NaN stays
  const float scale = largest / e4m3::most;
  if (scale == 0) largest = 0;  // too small for a scale
  for (std::size_t k = 0; k < in.size(); ++k) row[k] = std::byte{e4m3(largest == 0 ? 0.0f : in[k] / scale).bits};
  return largest == 0 ? 1.0f : scale;
}

/// Row r of what a file holds, [columns] floats: any tensor with `format` and row(r); with the row's scale where it has `scale`.
template <class Tensor>
void decode_stored_row(const Tensor& t, index_t r, float* out, index_t columns) {
  decode_row(t.format, t.row(r).data(), out, columns);
  if constexpr (requires { t.scale[std::size_t{}]; })
    if (!t.scale.empty())
      for (index_t k = 0; k < columns; ++k) out[k] *= t.scale[static_cast<std::size_t>(r)];
}

}  // namespace tinyllama
