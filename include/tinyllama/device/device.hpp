// The concept Device: the complete list of operations that the model asks of the hardware.
#pragma once

#include <concepts>
#include <span>

#include "tinyllama/device/operands.hpp"

namespace tinyllama {

/// T is the number of rows (tokens) of a step. Everything lies in the device's memory, which the host may not be able to touch; shapes were
/// checked by operations.hpp. D::activation is the element type of what products read and write inside a block (normed, qkv, attended,
/// gate_up, gated); the residual stream, logits, cos and sin are float. D::Batch is what dev.batch() makes of a step's ids and sequences.
template <class D>
concept Device = requires(D& dev, View<float, dyn, dyn> out, View<const float, dyn, dyn> in, View<typename D::activation, dyn, dyn> act_out,
                          View<const typename D::activation, dyn, dyn> act_in, const float* gain, const Matrix& matrix, const Linear& linear, const CacheShape& cache,
                          std::span<const Sequence> sequences, std::span<const std::int32_t> ids, std::span<const double> frequencies, std::byte* memory,
                          const typename D::Batch& batch, typename D::Staging& staging) {
  { D::host_memory } -> std::convertible_to<bool>;                        // the host may read and write the device's memory
  { D::packed_embedding } -> std::convertible_to<bool>;                   // a table that is only looked up is packed too
  { D::cache_order } -> std::convertible_to<int>;                         // which order a KV page has inside: saved caches say so
  { D::packed_bytes(Format::f32, index_t{}, index_t{}) } -> std::same_as<std::size_t>;
  { dev.allocate(std::size_t{}) } -> std::same_as<std::byte*>;
  dev.deallocate(memory);
  dev.upload(memory, ids.data(), std::size_t{});                          // from the host's memory, which may go when it returns
  dev.download(memory, gain, std::size_t{});                              // to the host's memory, there when it returns
  dev.copy_bytes(memory, gain, std::size_t{});                            // from the device to the device
  dev.zero(memory, std::size_t{});
  { dev.host(in, staging) } -> std::same_as<View<const float, dyn, dyn>>; // readable by the host: the view itself, or a copy in `staging`
  { dev.pack(memory, matrix) } -> std::same_as<Matrix>;                   // rows in the host's memory, into the order that matmul reads
  { dev.batch(ids, sequences) } -> std::same_as<typename D::Batch>;       // once a step, valid until the next one
  dev.embedding(out, matrix, batch);                                      // [T, hidden]
  dev.rope_angles(out, out, frequencies, batch);                          // cos and sin [T, head_dim / 2] of each row's position
  dev.rmsnorm(act_out, in, gain, 1e-5f);                                  // [T, n]
  dev.add_rmsnorm(act_out, out, in, gain, 1e-5f);                         // x += residual first
  dev.add(out, in);                                                       // [T, n]
  dev.rope(act_out, in, in, index_t{}, RopeLayout::half);                 // [T, heads * head_dim] in place
  dev.store_kv(act_in, act_in, cache, index_t{}, batch);                  // [T, kv_heads * head_dim] into pages
  dev.attention(act_out, act_in, cache, index_t{}, batch);                // [T, heads * head_dim]
  dev.last_rows(act_out, act_in, batch);                                  // [sequences, n]: the last row of each
  dev.reserve_scratch(std::size_t{});
  dev.swiglu(act_out, act_in, act_in);                                    // [T, ffn]
  dev.softmax(out, in, 1.0f);                                             // [T, n]
  dev.matmul(act_out, act_in, linear);                                    // [T, N] = [T, K] [N, K]^T
  dev.matmul(out, act_in, linear);
};

}  // namespace tinyllama
