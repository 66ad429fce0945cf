// Attention over the paged cache: which kernel takes which batch, and its launch.
#pragma once

#include "tinyllama/kernels/cuda/attention_any.cuh"
#include "tinyllama/kernels/cuda/expand.cuh"
#include "tinyllama/kernels/cuda/flash.cuh"
#include "tinyllama/kernels/cuda/paged.cuh"

namespace tinyllama::cuda {

/// The kernels of attention: f32 arithmetic for anything; mma.sync for few rows a sequence (and for prefill before Hopper); wgmma for prefill on Hopper.
enum class AttentionKernel : std::uint8_t { any, paged, flash };

namespace detail {
inline void check_launch(cudaError_t e, const char* kernel) {
  if (e != cudaSuccess) throw Error("attention", kernel, "a launch", cudaGetErrorString(e));
}
/// Dependent: the kernel waits for the one before itself.
template <bool Dependent = false, class Kernel, class Args>
void launch(Kernel* kernel, const Args& args, int blocks, int threads, std::size_t shared, cudaStream_t stream, const char* name) {
  check_launch(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared)), name);
  if constexpr (Dependent) return launch_dependent(kernel, dim3(static_cast<unsigned>(blocks)), static_cast<unsigned>(threads), shared, stream, name, args);
  kernel<<<static_cast<unsigned>(blocks), static_cast<unsigned>(threads), shared, stream>>>(args);
  check_launch(cudaGetLastError(), name);
}
}  // namespace detail

template <class Q, class O>
void attention_any(cudaStream_t stream, const AttentionArgs<Q, O>& a) {
  if (a.blocks == 0) return;
  visit_cache(a.format, [&]<Format F>() { detail::launch(attention_any_kernel<Q, O, F>, a, a.blocks, 128, any_shared_bytes(a.head_dim), stream, "any"); });
}

/// f.template operator()<Tiles>() for a tile of 8, 16 or 32 rows.
template <class Fn>
void visit_paged_tiles(int tile_rows, Fn&& fn) {
  if (tile_rows == 8) return fn.template operator()<1>();
  if (tile_rows == 16) return fn.template operator()<2>();
  if (tile_rows == 32) return fn.template operator()<4>();
  throw Error("attention", "rows of a tile", "8, 16 or 32", std::to_string(tile_rows));
}

/// Blocks of attention_paged that an SM holds at a time: plan_even for all of them.
constexpr index_t paged_blocks_per_sm(index_t head_dim, index_t tile_rows) { return head_dim * tile_rows <= 512 ? 4 : head_dim * tile_rows <= 2048 ? 2 : 1; }

/// For head_dim 64 and 128 and caches of bf16, f16, f8_e4m3 and q8_0.
template <class O>
void attention_paged(cudaStream_t stream, const AttentionArgs<bf16, O>& a) {
  if (a.blocks == 0) return;
  visit_paged_tiles(a.tile_rows, [&]<int Tiles>() {
    visit_cache(a.format, [&]<Format F>() {
      if constexpr (F != Format::f32) {
        const auto go = [&]<int HeadDim>() {
          using Shape = PagedShape<HeadDim, Tiles, F>;
          detail::launch<true>(paged_kernel<HeadDim, Tiles, F, O>, a, a.blocks, paged_threads, Shape::shared_bytes, stream, "paged");
        };
        if (a.head_dim == 64) return go.template operator()<64>();
        if (a.head_dim == 128) return go.template operator()<128>();
      }
      throw Error("attention", "paged", "head_dim 64 or 128 and a cache of bf16, f16, f8_e4m3 or q8_0", std::to_string(a.head_dim) + ", " + std::string(name(a.format)));
    });
  });
}

/// Rows of flash's tiles for a head dimension, where there are `rows` in all (new tokens x query heads): small tiles where large ones would leave most of the card idle.
/// TinyLlama on an H100: up to 512 tokens; at 768 both take the same time, at 1024 small ones a quarter more.
constexpr index_t flash_tile_rows(index_t head_dim, index_t rows, index_t multiprocessors) {
  return head_dim == 128 ? 128 : rows <= 128 * multiprocessors ? 64 : 192;
}

/// One choice of the kernel's shape, for measurements.
template <int HeadDim, int Warpgroups, int Pages, int Emulated, int Turns, class O>
void attention_flash_as(cudaStream_t stream, const AttentionArgs<bf16, O>& a) {
  using Shape = FlashShape<HeadDim, Warpgroups, Pages>;
  if (a.format == Format::bf16) detail::launch<true>(flash_kernel<HeadDim, Warpgroups, Pages, bf16, O, Emulated, Turns>, a, a.blocks, Shape::threads, Shape::shared_bytes, stream, "flash");
  else detail::launch<true>(flash_kernel<HeadDim, Warpgroups, Pages, f16, O, Emulated, Turns>, a, a.blocks, Shape::threads, Shape::shared_bytes, stream, "flash");
}

/// For head_dim 64 and 128 and caches of bf16 and f16, on compute capability 9.0; tiles of flash_tile_rows(), whole (plan_whole), one block an SM.
template <class O>
void attention_flash(cudaStream_t stream, const AttentionArgs<bf16, O>& a) {
  if (a.blocks == 0) return;
  if ((a.format != Format::bf16 && a.format != Format::f16) || !(a.head_dim == 64 ? a.tile_rows == 64 || a.tile_rows == 192 : a.head_dim == 128 && a.tile_rows == 128))
    throw Error("attention", "flash", "head_dim 64 or 128, a cache of bf16 or f16, tiles of flash_tile_rows", std::to_string(a.head_dim) + ", " + std::string(name(a.format)));
  if (a.head_dim == 64 && a.tile_rows == 64) attention_flash_as<64, 1, 1, 0, 0>(stream, a);
  else if (a.head_dim == 64) attention_flash_as<64, 3, 1, 0, 1>(stream, a);
  else attention_flash_as<128, 2, 2, 0, 2>(stream, a);
}

}  // namespace tinyllama::cuda
