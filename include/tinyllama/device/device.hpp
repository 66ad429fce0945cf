// The concept Device: the complete list of operations that the model asks of the hardware.
#pragma once

#include <concepts>
#include <span>

#include "tinyllama/device/operands.hpp"

namespace tinyllama {

/// T is the number of rows (tokens) of a step. Everything lies in the device's memory; shapes were checked by operations.hpp.
template <class D>
concept Device = requires(D& dev, View<float, dyn, dyn> out, View<const float, dyn, dyn> in, const float* gain, const Matrix& matrix, const Linear& linear,
                          const CacheShape& cache, std::span<const Sequence> batch, std::span<const std::int32_t> ids, std::byte* memory) {
  { dev.allocate(std::size_t{}) } -> std::same_as<std::byte*>;
  dev.deallocate(memory);
  { dev.pack(memory, matrix) } -> std::same_as<Matrix>;                   // weights into the order that matmul reads
  dev.embedding(out, matrix, ids);                                        // [T, hidden]
  dev.rmsnorm(out, in, gain, 1e-5f);                                      // [T, n]
  dev.add_rmsnorm(out, out, in, gain, 1e-5f);                             // x += residual first
  dev.add(out, in);                                                       // [T, n]
  dev.rope(out, in, in, index_t{}, RopeLayout::half);                     // [T, heads * head_dim] in place
  dev.store_kv(in, in, cache, index_t{}, batch);                          // [T, kv_heads * head_dim] into pages
  dev.attention(out, in, cache, index_t{}, batch);                        // [T, heads * head_dim]
  dev.copy(out.data(), gain, index_t{});                                  // [n]
  dev.reserve_scratch(std::size_t{});
  dev.swiglu(out, in, in);                                                // [T, ffn]
  dev.softmax(out, in, 1.0f);                                             // [T, n]
  dev.matmul(out, in, linear);                                            // [T, N] = [T, K] [N, K]^T
};

}  // namespace tinyllama
