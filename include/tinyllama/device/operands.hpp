// What operations work on besides views: weight matrices in their storage format, and the pages of a KV cache.
#pragma once

#include <array>
#include <span>

#include "tinyllama/kernels/kernels.hpp"
#include "tinyllama/tensor/view.hpp"

namespace tinyllama {

/// In what arithmetic a matrix product runs. `automatic`: bf16 weights by bf16 dot products where the machine has them and there are several
/// rows, block formats by int8 dot products, all else in f32. `f32` dequantises and never rounds the activations.
enum class Compute : std::uint8_t { automatic, f32, bf16, int8 };

/// W [rows, columns] in some format, in rows as in a file or packed into panels (kernels/pack.hpp). Owns nothing.
struct Matrix {
  Format format = Format::f32;
  bool packed = false;
  index_t rows = 0, columns = 0;
  const std::byte* data = nullptr;
  const float* scale = nullptr;  // f8_e4m3: what each row is multiplied by; null: 1, or in the packed rows

  constexpr std::size_t bytes() const {
    return packed ? packed_bytes(format, rows, columns) : static_cast<std::size_t>(rows) * row_bytes(format, columns);
  }
};

/// Up to three matrices of equal columns, one below the other: QKV, or gate and up. Files may store them in different formats.
struct Linear {
  std::array<Matrix, 3> part{};
  int parts = 0;
  Compute compute = Compute::automatic;

  constexpr Linear() = default;
  constexpr Linear(const Matrix& m, Compute c = Compute::automatic) : part{m}, parts(1), compute(c) {}
  constexpr index_t columns() const { return part[0].columns; }
  constexpr index_t rows() const {
    index_t n = 0;
    for (int i = 0; i < parts; ++i) n += part[static_cast<std::size_t>(i)].rows;
    return n;
  }
};

/// Shape of the KV cache of one model; a page holds page_tokens positions of all layers and KV heads.
struct CacheShape {
  Format format = Format::f16;
  index_t layers = 0, kv_heads = 0, head_dim = 0;
  Compute compute = Compute::f32;  // of attention in prefill: f32, or bf16 where it is faster

  constexpr index_t head_bytes() const { return page_k_bytes(format, head_dim) + page_v_bytes(format, head_dim); }
  constexpr index_t page_bytes() const { return layers * kv_heads * head_bytes(); }
  constexpr index_t k_offset(index_t layer, index_t head) const { return (layer * kv_heads + head) * head_bytes(); }
  constexpr index_t v_offset(index_t layer, index_t head) const { return k_offset(layer, head) + page_k_bytes(format, head_dim); }
  bool operator==(const CacheShape&) const = default;
};

/// One sequence of a batch: its rows in the batch's activations, where they stand, and its pages.
struct Sequence {
  index_t first_row = 0, tokens = 0;   // rows [first_row, first_row + tokens)
  index_t position = 0;                // of the first of them
  std::byte* const* pages = nullptr;   // pages for positions [0, position + tokens)
};

/// How one token is chosen from logits that a device has: what of SamplingOptions needs no history, and the random number of the draw.
struct Draw {
  float temperature = 0;    // 0: the most probable, the lowest id among equals
  float top_p = 1, min_p = 0;
  std::int32_t top_k = 0;   // 0: all
  double uniform = 0;       // in [0, 1)
};

/// Ids [count] in the device's memory: those of a step that the host need not know.
struct DeviceIds {
  const std::int32_t* data;
  index_t count;
  constexpr explicit DeviceIds(const std::int32_t* ids, index_t n) : data(ids), count(n) {}
  constexpr index_t size() const { return count; }
};

}  // namespace tinyllama
