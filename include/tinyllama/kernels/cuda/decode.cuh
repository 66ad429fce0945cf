// Decoding at batch 1 as one persistent kernel: a block on each SM computes all layers of a token, or of several, while the weights stream in.
//
// 16 consumer warps take the rows of each product, one warp a row. A producer warp fills a ring of shared memory for each of them with the tiles of
// its rows (cp.async.bulk), in the order in which they will be needed, across layers and tokens: a weight's address depends on no activation, so
// memory waits for no synchronisation. Between products the vectors go from block to block as flagged values (ring.cuh), which the readers
// poll: there is no grid-wide barrier. Each block keeps the residual stream, computes norms and quantises for itself.
//
//   x = embedding[token]
//   layer:  qkv = W_qkv norm(x) | attention (tasks; merged where positions are split) | x += W_o a | g = silu(W_gate norm(x)) W_up norm(x) | x += W_down g
//   logits = W_head norm(x), argmax
// Rows are dealt to blocks in runs, what is left over to other blocks in each product. All sums have a fixed order: the same bits every run.
#pragma once

#include "tinyllama/config/rope_layout.hpp"
#include "tinyllama/device/cuda_runtime.cuh"
#include "tinyllama/kernels/cuda/decode_attention.cuh"

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
  Format cache;                     // of the KV cache: f32, f16, bf16 or q8_0
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

/// How rows of a product are dealt: `base` to each block and one more to `extra` of them.
struct DecodeDeal { int base, extra; };
enum DecodeProduct : int { product_qkv, product_o, product_gate_up, product_down, product_head, products };

/// What the host works out once for a model on a card: sizes of shared memory, and the exchange buffers. `make_decode_plan` fills it.
struct DecodePlan {
  DecodeModel model;
  DecodeDeal deal[products];
  bool as_float[products], as_int8[products];   // the forms of x that a product's formats need
  int grid, slots, slot_bytes, vector_bytes, shared_bytes;
  int max_splits;                               // of the positions in attention, at most 32
  unsigned wait_ns = 0, producer_ns = 60;       // pauses between two polls, of consumers and of the producer
  bool keep_in_l2 = false;                      // weights that fit there may stay
  // exchange, device memory, zero at first
  decode::Flagged *qkv, *attended, *partial, *projected, *gated, *down, *best;
  std::uint32_t* round;
  std::size_t exchange_bytes;
};

namespace decode {

inline constexpr int threads = consumers + 32, max_slots = 16;

#ifdef TINYLLAMA_DECODE_TRACE  // benchmarks/cuda_decode_bench.cu: when thread 0 of each block passed the stations of one layer
inline constexpr int trace_blocks = 132, trace_events = 15;
inline constexpr const char* trace_names[] = {"", "qkv-wait", "norm", "dot", "| attention", "merge", "| o-wait", "vector", "dot", "| gate_up-wait", "norm", "dot", "| down-wait", "vector", "dot"};
static __device__ long long trace[trace_blocks * trace_events];
__device__ __forceinline__ void stamp(bool here, int event) {
  if (here && threadIdx.x == 0) trace[blockIdx.x * trace_events + event] = clock64();
}
#define TINYLLAMA_DECODE_STAMP(event) stamp(traced, event)
#else
#define TINYLLAMA_DECODE_STAMP(event) static_cast<void>(0)
#endif

struct Entry {                       // a matrix in the block's table
  const std::byte* data;
  std::uint32_t row_bytes;
  std::uint32_t format;
};
enum Slot7 : int { slot_q, slot_k, slot_v, slot_o, slot_gate, slot_up, slot_down, slots_per_layer };

/// Offsets in shared memory behind the ring.
struct Shared {
  int full, empty, entries, gains, residual, cos_sin, reduce, vector, end;
  __host__ __device__ Shared(const DecodePlan& p) {
    const auto next = [](int& at, std::size_t bytes) { const int r = at; at = static_cast<int>((static_cast<std::size_t>(at) + bytes + 15) / 16 * 16); return r; };
    int at = consumer_warps * p.slots * p.slot_bytes;
    full = next(at, consumer_warps * static_cast<std::size_t>(p.slots) * 8), empty = next(at, consumer_warps * static_cast<std::size_t>(p.slots) * 8);
    entries = next(at, (static_cast<std::size_t>(p.model.layers) * slots_per_layer + 1) * sizeof(Entry));
    gains = next(at, (2 * static_cast<std::size_t>(p.model.layers) + 1) * 8);
    residual = next(at, static_cast<std::size_t>(p.model.hidden) * 4);
    cos_sin = next(at, static_cast<std::size_t>(p.model.head_dim) * 4);
    reduce = next(at, consumer_warps * 8 + 16);
    vector = next(at, static_cast<std::size_t>(p.vector_bytes));
    end = at;
  }
};

__host__ __device__ __forceinline__ int columns_of(const DecodeModel& m, int product) {
  return product == product_o ? m.heads * m.head_dim : product == product_down ? m.ffn : m.hidden;
}

/// Where a block's rows of the products are, one after the other: both producer and consumers walk it.
struct Deal {
  int turn = 0;    // rows dealt as extras so far, modulo the grid
  int rotate = 0;  // rows of this block so far, modulo its warps
  __device__ __forceinline__ void next(const DecodePlan& p, int product, int& begin, int& count, int& first) {
    const DecodeDeal d = p.deal[product];
    int place = static_cast<int>(blockIdx.x) - turn;
    if (place < 0) place += p.grid;
    begin = place * d.base + min(place, d.extra), count = d.base + (place < d.extra);
    first = rotate;  // row i of the run goes to warp (first + i) % consumer_warps
    turn += d.extra;
    if (turn >= p.grid) turn -= p.grid;
    rotate = (rotate + count) % consumer_warps;
  }
};

__device__ __forceinline__ unsigned full_tile_bytes(Format f) {
  unsigned r = 0;
  visit_format(f, [&]<Format F>() { r = static_cast<unsigned>(tile_bytes(F, tile_columns(F))); });
  return r;
}
__device__ __forceinline__ int tile_columns_of(std::uint32_t format) { return format == static_cast<std::uint32_t>(Format::f32) ? 1024 : 2048; }

/// The matrix and the row that unit u of a product stands for; a unit of gate_up is two rows, `part` 0 and 1.
__device__ __forceinline__ const Entry& entry_of(const DecodePlan& p, const Entry* table, int layer, int product, int part, int& row) {
  const Entry* const l = table + layer * slots_per_layer;
  switch (product) {
    case product_qkv: {
      const int q = p.model.heads * p.model.head_dim, kv = p.model.kv_heads * p.model.head_dim;
      if (row < q) return l[slot_q];
      row -= q;
      if (row < kv) return l[slot_k];
      row -= kv;
      return l[slot_v];
    }
    case product_o: return l[slot_o];
    case product_gate_up: return l[slot_gate + part];
    case product_down: return l[slot_down];
    default: return table[p.model.layers * slots_per_layer];
  }
}

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900

/// The producer's lane for one consumer warp: walks over all tiles of its rows and copies each as soon as a slot of the ring is free.
__device__ __forceinline__ void produce(const DecodePlan& p, const Entry* table, std::uint32_t ring, std::uint32_t full, std::uint32_t empty, const unsigned short* tile_size,
                                        int steps, int warp) {
  const std::uint64_t policy = evict_first_policy();
  Deal deal;
  int step = 0, layer = 0, product = 0, part = 0, begin, count, first, unit;
  const std::byte *from = nullptr, *other = nullptr;
  unsigned left = 0, whole = 0;  // bytes of the row not yet asked for; of a whole tile
  bool both = false, second = false;
  deal.next(p, product, begin, count, first);
  unit = (warp - first) & (consumer_warps - 1);
  int slot = 0;
  unsigned parity = 1;
  bool done = false;
  // To the next row. Gate and up of one format go tile by tile, as the consumer multiplies both at once.
  const auto next_row = [&] {
    while (unit >= count) {
      if (product == product_head) {
        if (++step == steps) { done = true; return; }
        layer = 0, product = product_qkv;
      } else if (product == product_down) {
        product = ++layer == p.model.layers ? product_head : product_qkv;
      } else {
        ++product;
      }
      deal.next(p, product, begin, count, first);
      unit = (warp - first) & (consumer_warps - 1);
    }
    int row = begin + unit;
    const Entry& e = entry_of(p, table, layer, product, part, row);
    from = e.data + static_cast<std::int64_t>(row) * e.row_bytes;
    left = e.row_bytes, whole = tile_size[e.format];
    both = false;
    if (product == product_gate_up && part == 0) {
      const Entry& up = table[layer * slots_per_layer + slot_up];
      both = up.format == e.format;
      other = up.data + static_cast<std::int64_t>(row) * up.row_bytes;
      part = !both;
    } else {
      part = 0;
    }
    if (part == 0) unit += consumer_warps;
  };
  next_row();
  constexpr unsigned lanes = (1u << consumer_warps) - 1;
  while (__any_sync(lanes, !done)) {
    const bool go = !done && barrier_test(empty + 8 * slot, parity);
    if (go) {
      const unsigned bytes = left < whole ? left : whole;
      barrier_expect(full + 8 * slot, bytes);
      if (p.keep_in_l2) bulk_copy(ring + slot * p.slot_bytes, from, bytes, full + 8 * slot);
      else bulk_copy(ring + slot * p.slot_bytes, from, bytes, full + 8 * slot, policy);
      if (++slot == p.slots) slot = 0, parity ^= 1;
      from += bytes;
      if (both) {
        const std::byte* const t = from;
        from = other, other = t, second = !second;
      }
      if (!second) left -= bytes;
      if (left == 0) next_row();
    }
    if (!__any_sync(lanes, go)) pause(p.producer_ns);
  }
}

/// A consumer warp's end of its ring.
struct Ring {
  const std::byte* base;
  std::uint32_t full, empty;
  int slot = 0, slots, slot_bytes;
  unsigned parity = 0;
  /// The next R tiles.
  template <int R>
  __device__ __forceinline__ void wait(const std::byte* (&tile)[R]) const {
#pragma unroll
    for (int r = 0; r < R; ++r) {
      const bool wraps = slot + r >= slots;
      const int s = wraps ? slot + r - slots : slot + r;
      barrier_wait(full + 8 * s, parity ^ wraps);
      tile[r] = base + s * slot_bytes;
    }
  }
  template <int R>
  __device__ __forceinline__ void release(int lane) {
    __syncwarp();
    if (lane < R) barrier_arrive(empty + 8 * (slot + lane >= slots ? slot + lane - slots : slot + lane));
    slot += R;
    if (slot >= slots) slot -= slots, parity ^= 1;
  }
};

/// R rows of W in format F times the vector in shared memory; all lanes get the sums.
template <Format F, int R>
__device__ __forceinline__ void multiply_rows(float (&y)[R], Ring& ring, const std::byte* vector, int k, int lane) {
#pragma unroll
  for (int r = 0; r < R; ++r) y[r] = 0;
#pragma unroll 1
  for (int c = 0; c < k; c += tile_columns(F)) {
    const int n = min(tile_columns(F), k - c);
    const std::byte* w[R];
    ring.wait(w);

    if constexpr (block_columns(F) == 1) dot_tiles_float<F, R>(y, w, (n + 7) / 8, FloatVector(vector, (k + 7) / 8), c / 8, lane);
    else dot_tiles_int8<F, R>(y, w, n / 32, QuantisedVector(vector, k / 32), c / 32, lane);
    ring.release<R>(lane);
  }
#pragma unroll
  for (int o = 16; o; o >>= 1)
#pragma unroll
    for (int r = 0; r < R; ++r) y[r] += __shfl_xor_sync(~0u, y[r], o);
}

__device__ __forceinline__ float4 load_gain(const float* gain, int i) {
  float4 v;
  asm volatile("ld.global.nc.v4.f32 {%0, %1, %2, %3}, [%4];" : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w) : "l"(gain + 4 * i));
  return v;
}

template <int HD>
__global__ void __launch_bounds__(threads, 1) decode_kernel(const __grid_constant__ DecodePlan p, const __grid_constant__ DecodeStep step) {
  extern __shared__ __align__(128) std::byte memory[];
  __shared__ unsigned short tile_size[16];
  const Shared at(p);
  const DecodeModel& m = p.model;
  const int thread = static_cast<int>(threadIdx.x), warp = thread / 32, lane = thread % 32;
  Entry* const table = reinterpret_cast<Entry*>(memory + at.entries);
  const float** const gains = reinterpret_cast<const float**>(memory + at.gains);
  const std::uint32_t full = shared_address(memory + at.full), empty = shared_address(memory + at.empty);
  const int q_columns = m.heads * m.head_dim, kv_columns = m.kv_heads * m.head_dim;

  for (int i = thread; i < m.layers * slots_per_layer + 1; i += threads) {
    const int layer = i / slots_per_layer, s = i % slots_per_layer;
    DecodeMatrix w = m.head;
    if (layer < m.layers) {
      const DecodeLayer& l = m.layer[layer];
      w = s == slot_q ? l.q : s == slot_k ? l.k : s == slot_v ? l.v : s == slot_o ? l.o : s == slot_gate ? l.gate : s == slot_up ? l.up : l.down;
    }
    const int k = layer == m.layers ? m.hidden : s == slot_o ? q_columns : s == slot_down ? m.ffn : m.hidden;
    table[i] = {w.data, static_cast<std::uint32_t>(packed_row_bytes(w.format, k)), static_cast<std::uint32_t>(w.format)};
  }
  for (int i = thread; i < 2 * m.layers + 1; i += threads)
    gains[i] = i == 2 * m.layers ? m.final_norm : i % 2 ? m.layer[i / 2].ffn_norm : m.layer[i / 2].attn_norm;
  if (thread <= static_cast<int>(Format::q6_K)) tile_size[thread] = static_cast<unsigned short>(full_tile_bytes(static_cast<Format>(thread)));
  for (int i = thread; i < consumer_warps * p.slots; i += threads) barrier_init(full + 8 * i, 1), barrier_init(empty + 8 * i, 1);
  barrier_init_fence();
  __syncthreads();

  if (warp == consumer_warps) {
    if (lane < consumer_warps)
      produce(p, table, shared_address(memory) + lane * p.slots * p.slot_bytes, full + 8 * lane * p.slots, empty + 8 * lane * p.slots, tile_size, step.steps, lane);
    return;
  }

  Ring ring{memory + warp * p.slots * p.slot_bytes, full + 8 * warp * p.slots, empty + 8 * warp * p.slots, 0, p.slots, p.slot_bytes};
  float* const x = reinterpret_cast<float*>(memory + at.residual);        // [hidden]
  float* const cos_sin = reinterpret_cast<float*>(memory + at.cos_sin);   // [2][head_dim / 2]
  float* const reduce = reinterpret_cast<float*>(memory + at.reduce);
  std::byte* const vector = memory + at.vector;
  Deal deal;
  [[maybe_unused]] bool traced = false;
  [[maybe_unused]] int event = 0;

  // The vector of a product as its formats want it: four columns a thread at a time. All threads of a warp call it together.
  const auto put = [&](int product, int k, int i, float4 v) {
    const bool valid = 4 * i < k;
    std::byte* to = vector;
    if (p.as_float[product]) {
      if (valid) reinterpret_cast<float4*>(to)[(i & 1) * ((k + 7) / 8) + (i >> 1)] = v;
      to += float_vector_bytes(k);
    }
    if (p.as_int8[product]) quantise4(to, k / 32, i, v, valid);
  };
  // The code of all products is one, in loops that run over them: what a layer executes has to stay in the instruction cache.
  const auto prepare = [&](int product, int k, const Flagged* from, std::uint32_t from_round, const float* gain) {
    constexpr int batch = 3;
    const int quads = k / 4;
    float squares = 0;
    float4 g{};
    if (gain && thread < quads) g = load_gain(gain, thread);
    if (from && warp < 4) await_sample(from, k, thread, from_round, p.wait_ns);
    consumer_sync();  // there is something to read, and all warps are done with what is in the vector
    TINYLLAMA_DECODE_STAMP(event), ++event;
#pragma unroll 1
    for (int i = thread; i - thread < quads; i += batch * consumers) {
      float4 v[batch] = {};
      const int rest = quads - i;
      if (from) receive4(v, from, i, consumers, rest <= 0 ? 0 : (rest + consumers - 1) / consumers, from_round, p.wait_ns);
      if (gain) {  // x += what was sent
#pragma unroll
        for (int j = 0; j < batch; ++j)
          if (j * consumers < rest) {
            float4& to = reinterpret_cast<float4*>(x)[i + j * consumers];
            const float4 w = to;
            v[j] = make_float4(w.x + v[j].x, w.y + v[j].y, w.z + v[j].z, w.w + v[j].w);
            to = v[j];
            squares += (v[j].x * v[j].x + v[j].y * v[j].y) + (v[j].z * v[j].z + v[j].w * v[j].w);
          }
      } else {
#pragma unroll
        for (int j = 0; j < batch; ++j)
          if (i - thread + j * consumers < quads) put(product, k, i + j * consumers, v[j]);
      }
    }
    if (gain) {  // gain x / rms(x)
      squares = warp_sum(squares);
      if (lane == 0) reduce[warp] = squares;
      consumer_sync();
      float total = 0;
#pragma unroll
      for (int i = 0; i < consumer_warps; i += 4) {
        const float4 s = *reinterpret_cast<const float4*>(reduce + i);
        total += (s.x + s.y) + (s.z + s.w);
      }
      const float scale = rsqrtf(total / static_cast<float>(k) + p.model.eps);
#pragma unroll 1
      for (int i = thread; i - thread < quads; i += consumers) {
        float4 v{};
        if (i < quads) {
          if (i != thread) g = load_gain(gain, i);
          v = reinterpret_cast<const float4*>(x)[i];
          v = make_float4(v.x * scale * g.x, v.y * scale * g.y, v.z * scale * g.z, v.w * scale * g.w);
        }
        put(product, k, i, v);
      }
    }
    consumer_sync();
    TINYLLAMA_DECODE_STAMP(event), ++event;
  };
  // This warp's rows of a product: sent to the other blocks, or, of the head, written as logits. A row of gate_up is silu(gate) up.
  float best = -INFINITY;
  int id = 0x7fffffff;
  const auto multiply = [&](int product, int layer, int k, Flagged* to, std::uint32_t round) {
    int begin, count, first;
    deal.next(p, product, begin, count, first);
    const std::byte* const as_int8 = vector + (p.as_float[product] ? float_vector_bytes(k) : 0);
    const auto emit = [&](int row, float y) {
      if (lane) return;
      if (to) {
        send(to + (product == product_qkv ? row : exchange_place(row)), y, round);
      } else {
        step.logits[row] = y;
        if (y > best) best = y, id = row;
      }
    };
    const auto swiglu = [](float gate, float up) { return __fdividef(gate, 1.0f + __expf(-gate)) * up; };
    const auto format_of = [&](int i, int part) {
      int row = begin + i;
      return static_cast<Format>(entry_of(p, table, layer, product, part, row).format);
    };
    int i = (warp - first) & (consumer_warps - 1), part = 0;
    if (i >= count) {
    } else if (product == product_gate_up && format_of(i, 0) == format_of(i, 1)) {
      visit_format(format_of(i, 0), [&]<Format F>() {
#pragma unroll 1
        for (; i < count; i += consumer_warps) {
          float y[2];
          multiply_rows<F, 2>(y, ring, block_columns(F) == 1 ? vector : as_int8, k, lane);
          emit(begin + i, swiglu(y[0], y[1]));
        }
      });
    } else {
      float gate = 0;
#pragma unroll 1
      while (i < count) {
        const Format format = format_of(i, part);
        visit_format(format, [&]<Format F>() {
#pragma unroll 1
          do {
            float y[1];
            multiply_rows<F, 1>(y, ring, block_columns(F) == 1 ? vector : as_int8, k, lane);
            if (product == product_gate_up && part == 0) {
              gate = y[0], part = 1;
            } else {
              emit(begin + i, part ? swiglu(gate, y[0]) : y[0]);
              part = 0, i += consumer_warps;
            }
          } while (i < count && (product > product_gate_up || format_of(i, part) == F));
        });
      }
    }
    TINYLLAMA_DECODE_STAMP(event), ++event;
  };

  std::uint32_t round = *p.round;  // every value sent in the layers of one launch carries its own number
  int token = *step.token, position = *step.position;
  for (int s = 0; s < step.steps; ++s, ++position) {
    __threadfence();  // keys and values that other blocks wrote in the last step
    const DecodeMatrix& table_row = m.embedding;
    const std::byte* const row = table_row.data + static_cast<std::int64_t>(token) * packed_row_bytes(table_row.format, m.hidden);
    for (int i = thread; i < m.hidden / 8; i += consumers) {
      float v[8];
      load8(table_row.format, row, m.hidden, i, v);
#pragma unroll
      for (int j = 0; j < 8; ++j) x[8 * i + j] = v[j];
    }
    if (thread < HD / 2) {
      // The angle is reduced to half turns in double: an f32 angle is off by 1e-4 at position 2000.
      const double turns = static_cast<double>(position) * m.frequencies[thread] * 0.31830988618379067154;
      sincospif(static_cast<float>(turns - 2.0 * rint(0.5 * turns)), &cos_sin[HD / 2 + thread], &cos_sin[thread]);
    }
    // Tasks of attention: (KV head, up to 8 of its query heads, a run of pages).
    const int group = m.heads / m.kv_heads, chunks = (group + group_heads - 1) / group_heads, pages = position / 64 + 1;
    int splits = pages <= 2 ? 1 : min(pages, p.max_splits);
    const int pages_each = (pages + splits - 1) / splits;
    splits = (pages + pages_each - 1) / pages_each;
    consumer_sync();

    best = -INFINITY, id = 0x7fffffff;
#pragma unroll 1
    for (int n = 0; n <= 4 * m.layers; ++n) {  // qkv, o, gate_up, down of each layer; the head
      const int layer = n / 4, product = layer == m.layers ? product_head : n % 4, k = columns_of(m, product);
      const std::uint32_t from_round = round;
      if (product == product_qkv) ++round;
#ifdef TINYLLAMA_DECODE_TRACE
      traced = layer == m.layers / 2;
      if (product == product_qkv) {
        TINYLLAMA_DECODE_STAMP(0);
        event = 1;
      }
#endif
      const Flagged* const from = product == product_o ? p.attended : product == product_gate_up ? p.projected : product == product_down ? p.gated : n ? p.down : nullptr;
      Flagged* const to = product == product_qkv ? p.qkv : product == product_o ? p.projected : product == product_gate_up ? p.gated : product == product_down ? p.down : nullptr;
      const float* const gain = product == product_o || product == product_down ? nullptr : gains[2 * layer + (product == product_gate_up)];
      prepare(product, k, from, product == product_qkv ? from_round : round, gain);
      multiply(product, layer, k, to, round);
      if (product != product_qkv) continue;

      for (int task = static_cast<int>(blockIdx.x); task < m.kv_heads * chunks * splits; task += p.grid) {
        const int split = task % splits, kv = task / splits % m.kv_heads, chunk = task / splits / m.kv_heads;
        const int head = kv * group + chunk * group_heads;
        const std::int64_t values = m.cache == Format::q8_0 ? (HD + 4) * 64 : HD * 64 * (m.cache == Format::f32 ? 4 : 2);
        AttentionTask t;
        t.q = p.qkv + head * HD, t.k = p.qkv + q_columns + kv * HD, t.v = p.qkv + q_columns + kv_columns + kv * HD;
        t.heads = min(group_heads, group - chunk * group_heads);
        t.pages = step.pages, t.k_offset = (static_cast<std::int64_t>(layer) * m.kv_heads + kv) * 2 * values, t.v_offset = t.k_offset + values;
        t.begin = split * pages_each * 64, t.end = min(position + 1, (split + 1) * pages_each * 64), t.position = position;
        t.newest = split == splits - 1, t.writes = t.newest && chunk == 0;
        t.format = m.cache, t.halves = m.rope == RopeLayout::half, t.round = round, t.wait_ns = p.wait_ns;
        t.partial = splits > 1, t.first_out = head * HD, t.out_stride = splits * (HD + 2);
        t.out = splits > 1 ? p.partial + (head * splits + split) * (HD + 2) : p.attended;
        attention<HD>(t, *reinterpret_cast<AttentionScratch<HD>*>(vector), cos_sin);
        if (t.writes) __threadfence();
      }
      TINYLLAMA_DECODE_STAMP(event), ++event;
      if (splits > 1)
        for (int i = static_cast<int>(blockIdx.x) * consumer_warps + warp; i < q_columns; i += p.grid * consumer_warps) {
          const float y = merge_splits<HD>(p.partial + i / HD * splits * (HD + 2), splits, i % HD, round, p.wait_ns);
          if (lane == 0) send(p.attended + exchange_place(i), y, round);
        }
      TINYLLAMA_DECODE_STAMP(event), ++event;
    }
    // The largest of a warp's rows, of a block's, of all: the lowest id among equals.
    const auto better = [](float a, int i, float b, int j) { return a > b || (a == b && i < j); };
    if (lane == 0) reduce[2 * warp] = best, reduce[2 * warp + 1] = __int_as_float(id);
    consumer_sync();
    if (thread == 0) {
      for (int w = 0; w < consumer_warps; ++w)
        if (const int j = __float_as_int(reduce[2 * w + 1]); better(reduce[2 * w], j, best, id)) best = reduce[2 * w], id = j;
      send(p.best + 2 * blockIdx.x, best, round), send(p.best + 2 * blockIdx.x + 1, __int_as_float(id), round);
    }
    const bool last = s + 1 == step.steps;
    if (last && blockIdx.x != 0) return;
    if (warp == 0) {
      best = -INFINITY, id = 0x7fffffff;
      for (int i = lane; i < p.grid; i += 32) {
        const float2 other = receive2(p.best + 2 * i, round, p.wait_ns);
        if (const int j = __float_as_int(other.y); better(other.x, j, best, id)) best = other.x, id = j;
      }
#pragma unroll
      for (int o = 16; o; o >>= 1) {
        const float b = __shfl_xor_sync(~0u, best, o);
        const int j = __shfl_xor_sync(~0u, id, o);
        if (better(b, j, best, id)) best = b, id = j;
      }
      if (id == 0x7fffffff) id = 0;  // nothing but NaN
      if (lane == 0) {
        reduce[2 * consumer_warps] = __int_as_float(id);
        if (blockIdx.x == 0) {
          if (step.tokens) step.tokens[s] = id;
          if (last) *step.token = id, *step.position = position + 1, *p.round = round;
        }
      }
    }
    consumer_sync();
    token = __float_as_int(reduce[2 * consumer_warps]);
  }
}

#else

template <int HD>
__global__ void decode_kernel(const DecodePlan, const DecodeStep) {}  // older cards decode by ordinary kernels

#endif

inline const void* kernel_of(int head_dim) {
  return head_dim == 64 ? reinterpret_cast<const void*>(&decode_kernel<64>) : reinterpret_cast<const void*>(&decode_kernel<128>);
}

}  // namespace decode

/// Whether the kernel takes such a model on the current card: Hopper or newer, head_dim 64 or 128, sizes that its loads divide, and room for the ring.
/// `layers` are the same as model.layer, on the host. Fills everything of the plan but the exchange; place_decode_exchange does that.
inline bool make_decode_plan(DecodePlan& plan, const DecodeModel& model, const DecodeLayer* layers) {
  int device = 0, sms = 0, shared = 0, major = 0, l2 = 0;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&sms, cudaDevAttrMultiProcessorCount, device);
  cudaDeviceGetAttribute(&shared, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  cudaDeviceGetAttribute(&l2, cudaDevAttrL2CacheSize, device);
  plan = {};
  plan.model = model;
  const int q = model.heads * model.head_dim, kv = model.kv_heads * model.head_dim;
  if (major < 9 || (model.head_dim != 64 && model.head_dim != 128)) return false;
  if (model.hidden % 32 || model.ffn % 32 || model.heads % model.kv_heads) return false;
  plan.grid = std::min({sms, model.hidden, model.ffn, model.vocab, q});
  const int rows[products] = {q + 2 * kv, model.hidden, model.ffn, model.hidden, model.vocab};
  int slot = 0;
  std::size_t weights = 0;
  const auto take = [&](int product, const DecodeMatrix& w, int n) {
    const int k = decode::columns_of(model, product);
    (is_quantised(w.format) ? plan.as_int8 : plan.as_float)[product] = true;
    slot = std::max(slot, static_cast<int>(tile_bytes(w.format, std::min(k, tile_columns(w.format)))));
    weights += packed_matrix_bytes(w.format, n, k);
  };
  for (int l = 0; l < model.layers; ++l) {
    const DecodeLayer& w = layers[l];
    take(product_qkv, w.q, q), take(product_qkv, w.k, kv), take(product_qkv, w.v, kv), take(product_o, w.o, model.hidden);
    take(product_gate_up, w.gate, model.ffn), take(product_gate_up, w.up, model.ffn), take(product_down, w.down, model.hidden);
  }
  take(product_head, model.head, model.vocab);
  plan.keep_in_l2 = weights < static_cast<std::size_t>(l2) / 2;
  plan.vector_bytes = static_cast<int>(model.head_dim == 64 ? sizeof(decode::AttentionScratch<64>) : sizeof(decode::AttentionScratch<128>));
  for (int i = 0; i < products; ++i) {
    plan.deal[i] = {rows[i] / plan.grid, rows[i] % plan.grid};
    const int k = decode::columns_of(model, i);
    plan.vector_bytes = std::max(plan.vector_bytes, static_cast<int>((plan.as_float[i] ? float_vector_bytes(k) : 0) + (plan.as_int8[i] ? quantised_vector_bytes(k) : 0)));
  }
  plan.slot_bytes = slot;
  const void* const kernel = decode::kernel_of(model.head_dim);
  cudaFuncAttributes attributes;
  check(cudaFuncGetAttributes(&attributes, kernel), "cudaFuncGetAttributes", "decode");
  shared -= static_cast<int>(attributes.sharedSizeBytes);
  for (plan.slots = decode::max_slots; plan.slots > 0; --plan.slots)
    if (decode::Shared(plan).end <= shared) break;
  if (plan.slots < 2) return false;
  plan.shared_bytes = decode::Shared(plan).end;
  const int chunks = (q / kv + decode::group_heads - 1) / decode::group_heads;
  plan.max_splits = std::max(1, std::min(32, plan.grid / (model.kv_heads * chunks)));
  const std::size_t partial = static_cast<std::size_t>(model.heads) * static_cast<std::size_t>(plan.max_splits) * static_cast<std::size_t>(model.head_dim + 2);
  plan.exchange_bytes = (2 + static_cast<std::size_t>(decode::exchange_size(q + 2 * kv) + decode::exchange_size(q) + 2 * decode::exchange_size(model.hidden) +
                                                      decode::exchange_size(model.ffn) + 2 * plan.grid) + partial) * sizeof(decode::Flagged);
  // Room for any plan, as the attribute belongs to the kernel and not to the plan.
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared), "cudaFuncSetAttribute", "decode");
  return true;
}

/// Gives the plan its exchange: plan.exchange_bytes of device memory, 16-byte aligned, zeroed by the caller, for this plan alone.
inline void place_decode_exchange(DecodePlan& plan, std::byte* memory) {
  const DecodeModel& m = plan.model;
  const int q = m.heads * m.head_dim, kv = m.kv_heads * m.head_dim;
  auto* at = reinterpret_cast<decode::Flagged*>(memory);
  plan.round = reinterpret_cast<std::uint32_t*>(at), at += 2;
  plan.qkv = at, at += decode::exchange_size(q + 2 * kv);
  plan.attended = at, at += decode::exchange_size(q);
  plan.projected = at, at += decode::exchange_size(m.hidden);
  plan.gated = at, at += decode::exchange_size(m.ffn);
  plan.down = at, at += decode::exchange_size(m.hidden);
  plan.best = at, at += 2 * plan.grid;
  plan.partial = at;
}

/// One launch, one token or several. Launches of one plan are ordered by their stream.
inline cudaError_t launch_decode(cudaStream_t stream, const DecodePlan& plan, const DecodeStep& step) {
  void* arguments[] = {const_cast<DecodePlan*>(&plan), const_cast<DecodeStep*>(&step)};
  return cudaLaunchCooperativeKernel(decode::kernel_of(plan.model.head_dim), dim3(static_cast<unsigned>(plan.grid)), dim3(decode::threads), arguments, static_cast<std::size_t>(plan.shared_bytes), stream);
}

}  // namespace tinyllama::cuda
