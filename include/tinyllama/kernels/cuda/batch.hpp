// A step's ids and sequences as the CUDA kernels read them.
#pragma once

#include <cstddef>
#include <cstdint>

namespace tinyllama::cuda {

/// One sequence of a batch: rows [first_row, first_row + tokens) at positions from `position` on; its pages begin at pages[first_page].
struct BatchSequence {
  std::int32_t first_row, tokens, position, first_page;
};

/// Device memory that one copy filled, and what the host knows of the step. T rows, S sequences.
struct BatchView {
  const std::int32_t* ids = nullptr;          // [T]
  const std::int32_t* positions = nullptr;    // [T]: of each row
  const std::int32_t* page_first = nullptr;   // [T]: where the pages of a row's sequence begin
  const BatchSequence* sequences = nullptr;   // [S]
  std::byte* const* pages = nullptr;          // base of each page, those of a sequence one behind the other
  int rows = 0, count = 0;                    // T, S
  int most_tokens = 0;                        // new tokens of a sequence
};

}  // namespace tinyllama::cuda
