// What the decode kernel is given: the model's weights as plain pointers, the step, and the plan that the host works out once for a model on a card.
#pragma once

#include "tinyllama/config/rope_layout.hpp"
#include "tinyllama/kernels/cuda/exchange.cuh"
#include "tinyllama/kernels/cuda/pack.cuh"

namespace tinyllama::cuda {

/// A matrix in device memory, packed (pack.cuh).
struct DecodeMatrix {
  const std::byte* data;
  Format format;
};
/// The weights of a layer; q, k and v may differ in format, and gate and up.
struct DecodeLayer {
  const float *attn_norm, *ffn_norm;  // [hidden]
  DecodeMatrix q, k, v, o, gate, up, down;
};

/// The model: everything that does not change from token to token. Pointers are the device's.
struct DecodeModel {
  int layers, hidden, heads, kv_heads, head_dim, ffn, vocab;
  float eps;
  RopeLayout rope;
  Format cache;                     // of the KV cache: f32, f16, bf16, f8_e4m3 or q8_0
  DecodeMatrix embedding, head;     // [vocab, hidden]
  const DecodeLayer* layer;         // [layers], in device memory
  const float* final_norm;          // [hidden]
  const double* frequencies;        // [head_dim / 2]: angle = position * frequency
};

/// One launch: `steps` tokens, each the argmax of the one before.
struct DecodeStep {
  std::byte* const* pages;          // in device memory: pages for positions [0, *position + steps)
  std::int32_t *token, *position;   // in device memory: the token to read and where it stands; behind the launch the next ones
  float* logits;                    // [vocab], of the last step
  std::int32_t* tokens;             // [steps] the argmax of each step, lowest id among equals; may be null
  int steps = 1;
};

enum DecodeProduct : int { product_qkv, product_o, product_gate_up, product_down, product_head, products };

/// How a product's groups of four rows are dealt: `base` to each block and one more to `extra` of them.
struct DecodeDeal { int rows, base, extra; };

/// Sizes of shared memory, and the exchange between blocks. `make_decode_plan` fills it.
struct DecodePlan {
  DecodeModel model;
  DecodeDeal deal[products];
  bool as_float[products], as_int8[products];   // the forms of x that a product's formats need
  int grid, slots, slot_bytes, vector_bytes;
  struct Offsets { int full, empty, entries, gains, residual, cos_sin, reduce, sums, task, deals, vector, end; } at;  // in shared memory, behind the ring
  int max_splits;                               // of the positions in attention, at most 32
  int uniform;                                  // the format of all products' weights, or -1; f8_e4m3 also where the head is of bf16
  int window;                                   // slots of a team that are under way at a time
  unsigned pace;                                // cycles that a team's producer spends on 1 KiB at least; 0: as fast as slots come free
  int look;                                     // vectors of so many words are read when some of them are there
  bool keep_in_l2 = false;                      // weights that fit there may stay
  // exchange, device memory, zero at first
  decode::Quad *qkv, *attended, *projected, *gated, *down;
  decode::Flagged *partial, *best;
  std::uint32_t* round;
  std::size_t exchange_bytes;
};

namespace decode {

/// Four warps work on one group of four rows, a quarter of the columns each, and share a ring of weights, which a warp of its own fills.
inline constexpr int teams = 4, team_warps = 4, group_rows = 4, max_slots = 16;
inline constexpr int consumer_warps = teams * team_warps, consumers = 32 * consumer_warps, threads = consumers + 32 * teams;
inline constexpr int units_at_once = 4;  // groups whose sums a team adds up at once

/// threadIdx.x, read anew: what is worked out from it is then not kept over the layers. Registers are scarce, and what does not fit lies in local memory, for which shared
/// memory leaves L1 no room.
__device__ __forceinline__ int thread_again() {
  int t;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(t));
  return t;
}
/// All consumer threads of a block.
__device__ __forceinline__ void consumer_sync() { asm volatile("bar.sync 1, %0;" ::"n"(consumers) : "memory"); }
__device__ __forceinline__ void team_sync(int team) { asm volatile("bar.sync %0, %1;" ::"r"(2 + team), "n"(32 * team_warps) : "memory"); }

struct Entry {                       // a matrix in the block's table
  const std::byte* data;
  std::uint32_t row_bytes;
  std::uint32_t format;
};
enum EntrySlot : int { slot_q, slot_k, slot_v, slot_o, slot_gate, slot_up, slot_down, slots_per_layer };
static_assert(slot_q == 0 && slot_o == 3 && slot_gate == 4 && slot_down == 6, "entry_of counts on it");

__host__ __device__ __forceinline__ int columns_of(const DecodeModel& m, int product) {
  return product == product_o ? m.heads * m.head_dim : product == product_down ? m.ffn : m.hidden;
}

/// A block's groups in a product: [begin, begin + count); group begin + i goes to team (first + i) % teams.
struct Dealt { int begin; short count, first; };

/// Offsets of what shared memory holds for a plan whose sizes are known; worked out on the host, so that they are constants of the launch.
inline DecodePlan::Offsets shared_offsets(const DecodePlan& p, std::size_t task_bytes) {
  std::size_t end = static_cast<std::size_t>(teams) * static_cast<std::size_t>(p.slots * p.slot_bytes);
  const auto next = [&](std::size_t bytes) { const std::size_t r = end; end = (end + bytes + 15) / 16 * 16; return static_cast<int>(r); };
  const auto layers = static_cast<std::size_t>(p.model.layers), barriers = static_cast<std::size_t>(teams * p.slots) * 8;
  DecodePlan::Offsets at;
  at.full = next(barriers), at.empty = next(barriers);
  at.entries = next((layers * slots_per_layer + 1) * sizeof(Entry)), at.gains = next((2 * layers + 1) * 8);
  at.residual = next(static_cast<std::size_t>(p.model.hidden) * 4), at.cos_sin = next(static_cast<std::size_t>(p.model.head_dim) * 4);
  at.reduce = next(consumer_warps * 8 + 16), at.sums = next(teams * 2 * units_at_once * 2 * team_warps * group_rows * 4);
  at.task = next(task_bytes), at.deals = next((4 * layers + 1) * sizeof(Dealt)), at.vector = next(static_cast<std::size_t>(p.vector_bytes)), at.end = static_cast<int>(end);
  return at;
}

/// Columns of a row that one slot of the ring takes: a tile of a block format, or less of values, so that slots stay below 9 KB.
__host__ __device__ constexpr int ring_columns(Format f) { return f == Format::f32 ? 512 : block_columns(f) == 1 && f != Format::f8_e4m3 ? 1024 : tile_columns(f); }

/// Product n of a step: qkv, o, gate_up and down of each layer, then the head.
__host__ __device__ __forceinline__ int product_of(const DecodeModel& m, int n) { return n == 4 * m.layers ? static_cast<int>(product_head) : n % 4; }

/// What is left over goes to the blocks behind those that had it in the product before, and in a block to the teams behind.
__device__ __forceinline__ Dealt deal(const DecodePlan& p, int n) {
  int turn = 0, first = 0, a_layer = 0, first_a_layer = 0;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if (i < (n & 3)) turn += p.deal[i].extra, first += p.deal[i].base + 1;
    a_layer += p.deal[i].extra, first_a_layer += p.deal[i].base + 1;
  }
  turn = (turn + n / 4 * a_layer) % p.grid, first += n / 4 * first_a_layer;
  const DecodeDeal d = p.deal[product_of(p.model, n)];
  int place = static_cast<int>(blockIdx.x) - turn;
  if (place < 0) place += p.grid;
  return {place * d.base + min(place, d.extra), static_cast<short>(d.base + (place < d.extra)), static_cast<short>(first % teams)};
}

/// The matrix that a row of a product is of, and `row` in it; a row of gate_up is two, `part` 0 and 1.
__device__ __forceinline__ const Entry& entry_of(const DecodePlan& p, const Entry* table, int layer, int product, int part, int& row) {
  int slot = (0x06430 >> 4 * product & 15) + part;  // no branches: where the product's entries begin, one digit each; the head's stands behind the last layer
  if (product == product_qkv) {
    const int q = p.model.heads * p.model.head_dim, kv = p.model.kv_heads * p.model.head_dim, which = (row >= q) + (row >= q + kv);
    slot += which;
    row -= which ? q + (which - 1) * kv : 0;
  }
  return table[layer * slots_per_layer + slot];
}

}  // namespace decode
}  // namespace tinyllama::cuda
