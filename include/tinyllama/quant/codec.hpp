// Rows of weights to floats and back, for any storage format.
#pragma once

#include <cstddef>
#include <string>

#include "tinyllama/compiled.hpp"
#include "tinyllama/quant/blocks.hpp"

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
TINYLLAMA_COMPILED void decode_row(Format format, const std::byte* row, float* out, index_t columns);

/// Encodes [columns] floats into row_bytes(format, columns) bytes at `row`, at any alignment. A block with a NaN or an infinity
/// decodes to NaN throughout. Throws Error when `columns` is not a multiple of the format's block.
TINYLLAMA_COMPILED void encode_row(Format format, const float* in, std::byte* row, index_t columns);

}  // namespace tinyllama

#if TINYLLAMA_WITH_DEFINITIONS
#include "tinyllama/quant/codec_rows.hpp"
#endif
