// Rows of weights to floats and back, for any storage format.
#pragma once

#include <cstddef>
#include <cstring>
#include <string>

#include "tinyllama/quant/k_quants.hpp"
#include "tinyllama/quant/legacy.hpp"
#include "tinyllama/quant/q8.hpp"

namespace tinyllama {

namespace detail {
inline void check_row(const char* operation, Format format, index_t columns) {
  const index_t block = info(format).block;
  if (columns < 0 || columns % block != 0)
    throw Error(operation, name(format), "a multiple of " + std::to_string(block) + " columns", std::to_string(columns));
}
}  // namespace detail

/// Decodes one row: `row` holds row_bytes(format, columns) bytes at any alignment, `out` takes [columns] floats.
/// Throws Error when `columns` is not a multiple of the format's block.
inline void decode_row(Format format, const std::byte* row, float* out, index_t columns) {
  detail::check_row("decode_row", format, columns);
  visit(format, [&]<Format F>() {
    constexpr index_t block = info(F).block;
    for (index_t k = 0; k < columns; k += block, row += sizeof(Block<F>)) {
      Block<F> b;
      std::memcpy(&b, row, sizeof b);
      Codec<F>::decode(b, out + k);
    }
  });
}

/// Encodes [columns] floats into row_bytes(format, columns) bytes at `row`, at any alignment. A block with a NaN or an infinity
/// decodes to NaN throughout. Throws Error when `columns` is not a multiple of the format's block.
inline void encode_row(Format format, const float* in, std::byte* row, index_t columns) {
  detail::check_row("encode_row", format, columns);
  visit(format, [&]<Format F>() {
    constexpr index_t block = info(F).block;
    for (index_t k = 0; k < columns; k += block, row += sizeof(Block<F>)) {
      Block<F> b;
      Codec<F>::encode(in + k, b);
      std::memcpy(row, &b, sizeof b);
    }
  });
}

}  // namespace tinyllama
