// The rows of quant/codec.hpp, block by block through each format's Codec. Compiled once a program under TINYLLAMA_DISPATCH.
#pragma once

#include <cstring>

#include "tinyllama/quant/codec.hpp"
#include "tinyllama/quant/k_quants.hpp"
#include "tinyllama/quant/legacy.hpp"
#include "tinyllama/quant/q8.hpp"

namespace tinyllama {

TINYLLAMA_COMPILED void decode_row(Format format, const std::byte* row, float* out, index_t columns) {
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

TINYLLAMA_COMPILED void encode_row(Format format, const float* in, std::byte* row, index_t columns) {
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
