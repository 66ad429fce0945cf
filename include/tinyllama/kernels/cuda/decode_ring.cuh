// The decode kernel's rings of weights in shared memory, one for each team: the producer that fills it, and the consumers' end.
//
// A slot holds the same columns of four neighbouring rows (of gate, then of up). The producer walks over all slots of all products, layers and tokens, and copies each as soon as
// there is room: addresses of weights depend on no activation, so memory waits for no synchronisation.
#pragma once

#include "tinyllama/kernels/cuda/decode_plan.cuh"
#include "tinyllama/kernels/cuda/packed_values.cuh"
#include "tinyllama/kernels/cuda/ring.cuh"

namespace tinyllama::cuda::decode {

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900

__device__ __forceinline__ unsigned whole_piece_bytes(Format f) {
  unsigned r = 0;
  visit_format(f, [&]<Format F>() { r = static_cast<unsigned>(tile_bytes(F, ring_columns(F))); });
  return r;
}

inline constexpr int most_behind = 4000;  // cycles

/// A team's producer, a whole warp.
__device__ __forceinline__ void produce(const DecodePlan& p, const Entry* table, const Dealt* deals, const unsigned short* piece_bytes, std::uint32_t ring, std::uint32_t full,
                                        std::uint32_t empty, int steps, int team, int lane) {
  const std::uint64_t policy = evict_first_policy();
  int slot = 0;
  unsigned parity = 1, next = static_cast<unsigned>(clock());
  // Bytes [at, at + whole) of `rows` rows of e, or what is left of them, into the next slot; with the last the row's end, 16 bytes, which are never alone.
  const auto fill = [&](const Entry& e, int row, int rows, unsigned at, unsigned whole) {
    const unsigned rest = e.row_bytes - at, bytes = rest <= whole + 16 ? rest : whole, barrier = full + 8 * slot;
    const bool one = bytes == e.row_bytes;  // rows are neighbours in memory too
    const std::byte* const from = e.data + static_cast<std::int64_t>(row + lane) * e.row_bytes + at;
    const std::uint32_t to = ring + slot * p.slot_bytes + lane * bytes;
    const unsigned size = one ? rows * bytes : bytes;
    barrier_wait(empty + 8 * slot, parity);
    const int before = slot - p.window;
    barrier_wait(full + 8 * (before < 0 ? before + p.slots : before), before < 0 ? parity : parity ^ 1);
    if (p.pace) {  // not sooner than the memory's speed allows, within what was missed lately
      const unsigned now = static_cast<unsigned>(clock());
      if (static_cast<int>(now - next) > most_behind) next = now - most_behind;
      while (static_cast<int>(static_cast<unsigned>(clock()) - next) < 0) {}
      next += rows * bytes * p.pace >> 10;
    }
    if (lane == 0) barrier_expect(barrier, rows * bytes);
    __syncwarp();
    if (lane < (one ? 1 : rows)) {
      if (p.keep_in_l2) bulk_copy(to, from, size, barrier);
      else bulk_copy(to, from, size, barrier, policy);
    }
    if (++slot == p.slots) slot = 0, parity ^= 1;
  };
#pragma unroll 1
  for (int step = 0; step < steps; ++step) {
#pragma unroll 1
    for (int n = 0; n <= 4 * p.model.layers; ++n) {
      const Dealt d = deals[n];
      const int product = product_of(p.model, n);
#pragma unroll 1
      for (int unit = (team - d.first) & (teams - 1); unit < d.count; unit += teams) {
        const int first = group_rows * (d.begin + unit), rows = min(group_rows, p.deal[product].rows - first);
#pragma unroll 1
        for (int part = 0; part <= (product == product_gate_up); ++part) {
          int row = first;
          const Entry& e = entry_of(p, table, n / 4, product, part, row);
          const unsigned whole = piece_bytes[e.format];
#pragma unroll 1
          for (unsigned at = 0; at + 16 < e.row_bytes; at += whole) fill(e, row, rows, at, whole);
        }
      }
    }
  }
}

/// A team's end of its ring; each of its warps walks it alone.
struct Ring {
  const std::byte* base;
  std::uint32_t full, empty;
  int slots, slot_bytes, slot = 0;
  unsigned parity = 0;
  __device__ __forceinline__ const std::byte* wait() const {
    barrier_wait(full + 8 * slot, parity);
    return base + slot * slot_bytes;
  }
  __device__ __forceinline__ void release(int lane) {
    __syncwarp();
    if (lane == 0) barrier_arrive(empty + 8 * slot);
    if (++slot == slots) slot = 0, parity ^= 1;
  }
};

#endif

}  // namespace tinyllama::cuda::decode
