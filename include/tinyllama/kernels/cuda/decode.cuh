// Decoding at batch 1 as one persistent kernel: a block on each SM computes all layers of a token, or of several, while the weights stream in.
//
// 16 consumer warps take the rows of each product, four warps a group of four rows (decode_product.cuh). Four producer warps fill the rings they read from
// (decode_ring.cuh), across layers and tokens. Between products the vectors go from block to block as values that carry their own flag (exchange.cuh),
// which the readers poll: there is no grid-wide barrier. Each block keeps the residual stream, computes norms and quantises for itself.
//
//   x = embedding[token]
//   layer:  qkv = W_qkv norm(x) | attention (tasks; merged where positions are split) | x += W_o a | g = silu(W_gate norm(x)) W_up norm(x) | x += W_down g
//   logits = W_head norm(x), argmax
// norm(x) = gain x / rms(x): products are of gain x, and their sums are scaled, so that nobody waits for the sum of squares.
// Groups of rows are dealt to blocks in runs, what is left over to other blocks in each product. All sums have a fixed order: the same bits every run.
#pragma once

#include "tinyllama/device/cuda_runtime.cuh"
#include "tinyllama/kernels/cuda/decode_attention.cuh"
#include "tinyllama/kernels/cuda/decode_product.cuh"
#include "tinyllama/kernels/cuda/decode_ring.cuh"

namespace tinyllama::cuda {
namespace decode {

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900

__device__ __forceinline__ float4 load_gain(const float* gain, int i) {
  float4 v;
  asm volatile("ld.global.nc.v4.f32 {%0, %1, %2, %3}, [%4];" : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w) : "l"(gain + 4 * i));
  return v;
}
/// Registers a thread of this warp group from here on: a setting of sm_90a, without which some variables lie in local memory.
template <int count, bool more>
__device__ __forceinline__ void registers() {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  if constexpr (more) asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(count));
  else asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(count));
#endif
}
/// The larger, the lower id among equals.
__device__ __forceinline__ void keep_better(float& best, int& id, float other, int other_id) {
  if (other > best || (other == best && other_id < id)) best = other, id = other_id;
}
__device__ __forceinline__ void keep_best_of_warp(float& best, int& id) {
#pragma unroll
  for (int o = 16; o; o >>= 1) {
    const float b = __shfl_xor_sync(~0u, best, o);
    const int i = __shfl_xor_sync(~0u, id, o);
    keep_better(best, id, b, i);
  }
}

template <int HD, int uniform>
__global__ void __launch_bounds__(threads, 1) decode_kernel(const __grid_constant__ DecodePlan p, const __grid_constant__ DecodeStep step) {
  extern __shared__ __align__(128) std::byte memory[];
  __shared__ unsigned short piece_bytes[16];
  const DecodePlan::Offsets& at = p.at;
  const DecodeModel& m = p.model;
  const int thread = static_cast<int>(threadIdx.x), warp = thread / 32, lane = thread % 32, team = warp / team_warps;
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
  if (thread <= static_cast<int>(Format::f8_e4m3)) piece_bytes[thread] = static_cast<unsigned short>(whole_piece_bytes(static_cast<Format>(thread)));
  for (int i = thread; i < teams * p.slots; i += threads) barrier_init(full + 8 * i, 1), barrier_init(empty + 8 * i, team_warps);
  Dealt* const deals = reinterpret_cast<Dealt*>(memory + at.deals);
  for (int n = thread; n <= 4 * m.layers; n += threads) deals[n] = deal(p, n);
  barrier_init_fence();
  __syncthreads();

  if (warp >= consumer_warps) {
    // 96 registers a thread at the launch; what the consumers need beyond would lie in local memory, and 17 KB of it fit into what is left of L1.
    registers<32, false>();
    const int filled = warp - consumer_warps;
    produce(p, table, deals, piece_bytes, shared_address(memory) + filled * p.slots * p.slot_bytes, full + 8 * filled * p.slots, empty + 8 * filled * p.slots, step.steps, filled, lane);
    return;
  }
  registers<112, true>();

  Ring ring{memory + team * p.slots * p.slot_bytes, full + 8 * team * p.slots, empty + 8 * team * p.slots, p.slots, p.slot_bytes};
  float* const x = reinterpret_cast<float*>(memory + at.residual);        // [hidden]
  float* const cos_sin = reinterpret_cast<float*>(memory + at.cos_sin);   // [2][head_dim / 2]
  // Sums of squares, then each team's best, then the token: places of their own. A team without rows of the head gets to its best before another one has read the squares.
  float* const reduce = reinterpret_cast<float*>(memory + at.reduce);
  float* const bests = reduce + consumer_warps;
  std::byte* const vector = memory + at.vector;
  AttentionTask& task = *reinterpret_cast<AttentionTask*>(memory + at.task);
  int sums_turn = 0;

  const auto as_float = [&](int product) { return uniform < 0 ? p.as_float[product] : block_columns(static_cast<Format>(uniform)) == 1; };
  const auto as_int8 = [&](int product) { return uniform < 0 ? p.as_int8[product] : block_columns(static_cast<Format>(uniform)) != 1; };
  // The vector of a product as its formats want it: four columns a thread at a time. All threads of a warp call it together.
  const auto put = [&](int product, int k, int i, float4 v) {
    const bool valid = 4 * i < k;
    std::byte* to = vector;
    if (as_float(product)) {
      if (valid) reinterpret_cast<float4*>(to)[(i & 1) * ((k + 7) / 8) + (i >> 1)] = v;
      to += float_vector_bytes(k);
    }
    if (as_int8(product)) quantise4<uniform != static_cast<int>(Format::q4_0) && uniform != static_cast<int>(Format::q8_0)>(to, k / 32, i, v, valid);
  };
  // The code of all products is one, in loops that run over them: what a layer executes has to stay in the instruction cache.
  const auto prepare = [&](int product, int k, const Quad* from, std::uint32_t from_round, const float* gain) {
    constexpr int batch = 3;
    const int thread = thread_again(), warp = thread / 32, lane = thread % 32, quads = k / 4;
    float squares = 0;
    float4 g{};
    if (gain && thread < quads) g = load_gain(gain, thread);
    consumer_sync();  // all warps are done with what is in the vector
    // Long vectors, and all where memory is not the limit: at 512 positions q4_0 takes 549 us a token with it and 569 without, bf16 1019 and 983.
    if (from && quads >= p.look) await(from, quads, warp, consumer_warps, lane, from_round);
#pragma unroll 1
    for (int i = thread; i - thread < quads; i += batch * consumers) {
      float4 v[batch] = {};
      const int rest = quads - i;
      if (from) receive(v, from + i, consumers, rest <= 0 ? 0 : (rest + consumers - 1) / consumers, from_round);
#pragma unroll
      for (int j = 0; j < batch; ++j) {
        const int quad = i + j * consumers;
        if (quad - thread >= quads) break;
        if (gain && quad < quads) {  // x += what was sent
          float4& to = reinterpret_cast<float4*>(x)[quad];
          const float4 w = to;
          v[j] = make_float4(w.x + v[j].x, w.y + v[j].y, w.z + v[j].z, w.w + v[j].w);
          to = v[j];
          squares += (v[j].x * v[j].x + v[j].y * v[j].y) + (v[j].z * v[j].z + v[j].w * v[j].w);
          if (quad != thread) g = load_gain(gain, quad);
          v[j] = make_float4(v[j].x * g.x, v[j].y * g.y, v[j].z * g.z, v[j].w * g.w);
        }
        put(product, k, quad, v[j]);
      }
    }
    if (gain) {
      squares = warp_sum(squares);
      if (lane == 0) reduce[warp] = squares;
    }
    consumer_sync();
  };
  // This team's rows of a product: sent to the other blocks, or, of the head, written as logits. A row of gate_up is silu(gate) up.
  float best = -INFINITY;
  int id = 0x7fffffff;
  const auto multiply = [&](int product, int layer, int k, bool normed, int begin, int count, int first, Quad* to, std::uint32_t round) {
    const int thread = thread_again(), lane = thread % 32, team = thread / 32 / team_warps, member = thread / 32 % team_warps;
    TeamSums* const sums = reinterpret_cast<TeamSums*>(memory + at.sums) + 2 * units_at_once * team;  // two sets: a warp may be a flush ahead
    int unit = (team - first) & (teams - 1);
    const std::byte* const codes = vector + (as_float(product) ? float_vector_bytes(k) : 0);
    const bool two = product == product_gate_up;
    float scale = 1.0f;
    if (normed && member == 0) {
      float total = 0;
#pragma unroll
      for (int i = 0; i < consumer_warps; i += 4) {
        const float4 s = *reinterpret_cast<const float4*>(reduce + i);
        total += (s.x + s.y) + (s.z + s.w);
      }
      scale = rsqrtf(__fdividef(total, static_cast<float>(k)) + m.eps);
    }
    int pending = 0;
#pragma unroll 1
    for (; unit < count; unit += teams) {
      TeamSums& sum = sums[sums_turn * units_at_once + pending];
      if constexpr (uniform >= 0) {
        constexpr Format F = static_cast<Format>(uniform);
        if (two) multiply_group<F, 2>(sum, 0, ring, vector, k, member, lane);
        else if (F == Format::f8_e4m3 && product == product_head && m.head.format == Format::bf16) multiply_group<Format::bf16, 1>(sum, 0, ring, vector, k, member, lane);
        else multiply_group<F, 1>(sum, 0, ring, vector, k, member, lane);
      } else {
        int row = group_rows * (begin + unit);
        const auto format = static_cast<Format>(entry_of(p, table, layer, product, 0, row).format), up = static_cast<Format>(table[layer * slots_per_layer + slot_up].format);
#pragma unroll 1
        for (int part = 0; part <= two; ++part)
          visit_format(part ? up : format, [&]<Format F>() { multiply_group<F, 1>(sum, part, ring, block_columns(F) == 1 ? vector : codes, k, member, lane); });
      }
      if (++pending < units_at_once && unit + teams < count) continue;
      team_sync(team);
      if (member == 0) {  // lanes 4 u ... 4 u + 3 take the rows of unit u of those that are pending
        const int u = lane / group_rows, r = lane % group_rows, row = group_rows * (begin + unit - teams * (pending - 1 - u)) + r;
        const bool valid = u < pending && row < p.deal[product].rows;
        float y[2] = {0, 0};
#pragma unroll
        for (int part = 0; part < 2; ++part) {
          if (!valid || part > two) continue;
          const auto& of = sums[sums_turn * units_at_once + u][part];
          y[part] = scale * ((of[0][r] + of[1][r]) + (of[2][r] + of[3][r]));
        }
        if (two) y[0] = __fdividef(y[0], 1.0f + __expf(-y[0])) * y[1];
        if (to) {
          send(to + row / 4, y[0], round, valid);
        } else if (valid) {
          step.logits[row] = y[0];
          if (y[0] > best) best = y[0], id = row;
        }
      }
      pending = 0, sums_turn ^= 1;
    }
  };

  // Tasks of attention: (KV head, up to 8 of its query heads, a run of pages).
  const int group = m.heads / m.kv_heads, chunks = (group + group_heads - 1) / group_heads;
  const std::int64_t half_bytes = m.cache == Format::q8_0 ? (HD + 4) * 64 : HD * 64 * (m.cache == Format::f32 ? 4 : m.cache == Format::f8_e4m3 ? 1 : 2);
  const std::int64_t layer_bytes = m.kv_heads * 2 * half_bytes;
  std::uint32_t round = *p.round;  // everything sent in the layers of one launch carries its own number
  int token = *step.token, position = *step.position;
  for (int s = 0; s < step.steps; ++s, ++position) {
    __threadfence();  // keys and values that other blocks wrote in the last step
    // Tasks take 16, 32, 64 or a multiple of 64 positions: as few as there are blocks for. Up to 64 positions are one task, which spares the merge.
    int positions_each = position < 64 ? 64 : 16;
    if (position >= 16 * p.max_splits) positions_each = position < 32 * p.max_splits ? 32 : (position / p.max_splits + 64) / 64 * 64;
    const int splits = position / positions_each + 1;
    const int tasks = m.kv_heads * chunks * splits;
    const auto set_task = [&](int index) {
      const int split = index % splits, kv = index / splits % m.kv_heads, chunk = index / splits / m.kv_heads, head = kv * group + chunk * group_heads;
      AttentionTask t;
      t.q = p.qkv + head * HD / 4, t.k = p.qkv + (q_columns + kv * HD) / 4, t.v = t.k + kv_columns / 4;
      t.heads = min(group_heads, group - chunk * group_heads);
      t.offset = kv * 2 * half_bytes;
      t.begin = split * positions_each, t.end = min(position + 1, t.begin + positions_each);
      t.first_page = step.pages[t.begin / 64];
      t.newest = split == splits - 1, t.writes = t.newest && chunk == 0;
      t.out = p.attended + head * HD / 4, t.partial = splits > 1 ? p.partial + (head * splits + split) * (HD + 2) : nullptr, t.partial_stride = splits * (HD + 2);
      if (thread == 0) task = t;
      return t;
    };
    if (static_cast<int>(blockIdx.x) < tasks) {
      const AttentionTask t = set_task(static_cast<int>(blockIdx.x));
      prefetch_cached<HD>(m.cache, t.first_page + t.offset, half_bytes, t.begin, t.end);
    }
    const std::byte* const row = m.embedding.data + static_cast<std::int64_t>(token) * packed_row_bytes(m.embedding.format, m.hidden);
    visit_format(m.embedding.format, [&]<Format F>() {
#pragma unroll 1
      for (int i = thread; i < m.hidden / 8; i += consumers) {
        float v[8];
        load8<F>(row, m.hidden, i, v);
        float4* const to = reinterpret_cast<float4*>(x + 8 * i);
        to[0] = make_float4(v[0], v[1], v[2], v[3]), to[1] = make_float4(v[4], v[5], v[6], v[7]);
      }
    });
    if (thread < HD / 2) {
      // The angle is reduced to half turns in double: an f32 angle is off by 1e-4 at position 2000.
      const double turns = static_cast<double>(position) * m.frequencies[thread] * 0.31830988618379067154;
      sincospif(static_cast<float>(turns - 2.0 * rint(0.5 * turns)), &cos_sin[HD / 2 + thread], &cos_sin[thread]);
    }

    best = -INFINITY, id = 0x7fffffff;
#pragma unroll 1
    for (int n = 0; n <= 4 * m.layers; ++n) {  // qkv, o, gate_up, down of each layer; the head
      const int layer = n / 4, product = product_of(m, n), k = columns_of(m, product);
      const std::uint32_t from_round = round;
      if (product == product_qkv) ++round;
      const Quad* const from = product == product_o ? p.attended : product == product_gate_up ? p.projected : product == product_down ? p.gated : n ? p.down : nullptr;
      Quad* const to = product == product_qkv ? p.qkv : product == product_o ? p.projected : product == product_gate_up ? p.gated : product == product_down ? p.down : nullptr;
      const float* const gain = product == product_o || product == product_down ? nullptr : gains[2 * layer + (product == product_gate_up)];
      const Dealt d = deals[n];
      // Keys and values that this layer's task will read; in the first layer they were asked for when the task was set.
      if (product == product_qkv && n > 0 && static_cast<int>(blockIdx.x) < tasks)
        prefetch_cached<HD>(m.cache, task.first_page + task.offset + layer * layer_bytes, half_bytes, task.begin, task.end);
      prepare(product, k, from, product == product_qkv || product == product_head ? from_round : round, gain);
      multiply(product, layer, k, gain != nullptr, d.begin, d.count, d.first, to, round);
      if (product != product_qkv) continue;

      for (int index = static_cast<int>(blockIdx.x); index < tasks; index += p.grid) {
        if (tasks > p.grid) {
          consumer_sync();
          set_task(index);
          consumer_sync();
        }
        attention<HD>(task, {step.pages, m.cache, m.rope == RopeLayout::half, position, layer * layer_bytes, half_bytes, round},
                      *reinterpret_cast<AttentionScratch<HD>*>(vector), cos_sin);
      }
      if (splits > 1)
        for (int i = thread_again() / 32 * p.grid + static_cast<int>(blockIdx.x); i < m.heads * (HD / 4); i += p.grid * consumer_warps) {
          const float y = merge_splits<HD>(p.partial + i / (HD / 4) * splits * (HD + 2), splits, i % (HD / 4), round);
          send(p.attended + i, y, round, thread_again() % 32 < 4);
        }
    }
    // The largest of a team's rows, of a block's, of all.
    keep_best_of_warp(best, id);
    const int thread = thread_again(), warp = thread / 32, lane = thread % 32, team = warp / team_warps, member = warp % team_warps;
    if (lane == 0 && member == 0) bests[2 * team] = best, bests[2 * team + 1] = __int_as_float(id);
    __threadfence();  // keys and values go ahead of what the next step waits for
    consumer_sync();
    if (thread == 0) {
      for (int t = 1; t < teams; ++t) keep_better(best, id, bests[2 * t], __float_as_int(bests[2 * t + 1]));
      send(p.best + 2 * blockIdx.x, best, round), send(p.best + 2 * blockIdx.x + 1, __int_as_float(id), round);
    }
    const bool last = s + 1 == step.steps;
    if (last && blockIdx.x != 0) return;
    if (warp == 0) {
      best = -INFINITY, id = 0x7fffffff;
      for (int i = lane; i < p.grid; i += 32) {
        float2 other[1];
        const Flagged* const place[1] = {p.best + 2 * i};
        receive(other, place, round);
        keep_better(best, id, other[0].x, __float_as_int(other[0].y));
      }
      keep_best_of_warp(best, id);
      if (id == 0x7fffffff) id = 0;  // nothing but NaN
      if (lane == 0) {
        bests[2 * teams] = __int_as_float(id);
        if (blockIdx.x == 0) {
          if (step.tokens) step.tokens[s] = id;
          if (last) *step.token = id, *step.position = position + 1, *p.round = round;
        }
      }
    }
    consumer_sync();
    token = __float_as_int(bests[2 * teams]);
  }
}

#else

template <int HD, int uniform>
__global__ void decode_kernel(const DecodePlan, const DecodeStep) {}  // older cards decode by ordinary kernels

#endif

/// Models of one format have their own kernel: without the choice among formats, and with less code to fetch, there are fewer registers to spill.
inline const void* kernel_of(const DecodePlan& p) {
  if (p.model.head_dim == 128) return reinterpret_cast<const void*>(&decode_kernel<128, -1>);
  switch (p.uniform) {
    case static_cast<int>(Format::bf16): return reinterpret_cast<const void*>(&decode_kernel<64, static_cast<int>(Format::bf16)>);
    case static_cast<int>(Format::f8_e4m3): return reinterpret_cast<const void*>(&decode_kernel<64, static_cast<int>(Format::f8_e4m3)>);
    case static_cast<int>(Format::q8_0): return reinterpret_cast<const void*>(&decode_kernel<64, static_cast<int>(Format::q8_0)>);
    case static_cast<int>(Format::q4_0): return reinterpret_cast<const void*>(&decode_kernel<64, static_cast<int>(Format::q4_0)>);
    default: return reinterpret_cast<const void*>(&decode_kernel<64, -1>);
  }
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
  constexpr int r = decode::group_rows;
  plan.grid = std::min({sms, model.hidden / r, model.ffn / r, (model.vocab + r - 1) / r, q / r});
  const int rows[products] = {q + 2 * kv, model.hidden, model.ffn, model.hidden, model.vocab};
  int slot = 0;
  std::size_t weights = 0;
  plan.uniform = static_cast<int>(layers[0].q.format);
  const auto take = [&](int product, const DecodeMatrix& w, int n) {
    const bool known_head = product == product_head && w.format == Format::bf16 && plan.uniform == static_cast<int>(Format::f8_e4m3);
    if (static_cast<int>(w.format) != plan.uniform && !known_head) plan.uniform = -1;
    const int k = decode::columns_of(model, product);
    (is_quantised(w.format) ? plan.as_int8 : plan.as_float)[product] = true;
    slot = std::max(slot, r * (static_cast<int>(tile_bytes(w.format, std::min(k, decode::ring_columns(w.format)))) + row_end_bytes(w.format)));
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
    const int groups = (rows[i] + r - 1) / r;
    plan.deal[i] = {rows[i], groups / plan.grid, groups % plan.grid};
    const int k = decode::columns_of(model, i);
    plan.vector_bytes = std::max(plan.vector_bytes, static_cast<int>((plan.as_float[i] ? float_vector_bytes(k) : 0) + (plan.as_int8[i] ? quantised_vector_bytes(k) : 0)));
  }
  plan.slot_bytes = slot;
  const void* const kernel = decode::kernel_of(plan);
  cudaFuncAttributes attributes;
  check(cudaFuncGetAttributes(&attributes, kernel), "cudaFuncGetAttributes", "decode");
  shared -= static_cast<int>(attributes.sharedSizeBytes);
  for (plan.slots = decode::max_slots; plan.slots > 0; --plan.slots)
    if ((plan.at = decode::shared_offsets(plan, sizeof(decode::AttentionTask))).end <= shared) break;
  if (plan.slots < 2) return false;
  // What is under way stands in line before the vectors that blocks exchange: a slot of each team (32 KiB a block) keeps the memory busy and the line short.
  plan.window = std::min(plan.slots, std::max(1, 16384 / (decode::teams * slot)));
  plan.pace = plan.uniform == static_cast<int>(Format::q8_0) ? 240 : 0;  // 533 to 521 us a token; other formats lose or gain nothing
  plan.look = plan.as_int8[0] ? 0 : 1200;
  const int chunks = (q / kv + decode::group_heads - 1) / decode::group_heads;
  plan.max_splits = std::max(1, std::min(32, plan.grid / (model.kv_heads * chunks)));
  const std::size_t partial = static_cast<std::size_t>(model.heads) * static_cast<std::size_t>(plan.max_splits) * static_cast<std::size_t>(model.head_dim + 2);
  plan.exchange_bytes = 16 + static_cast<std::size_t>(q + 2 * kv + q + 2 * model.hidden + model.ffn) / r * sizeof(decode::Quad) + (partial + 2 * static_cast<std::size_t>(plan.grid)) * sizeof(decode::Flagged);
  // Room for any plan, as the attribute belongs to the kernel and not to the plan.
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared), "cudaFuncSetAttribute", "decode");
  return true;
}

/// Gives the plan its exchange: plan.exchange_bytes of device memory, 16-byte aligned, zeroed by the caller, for this plan alone.
inline void place_decode_exchange(DecodePlan& plan, std::byte* memory) {
  const DecodeModel& m = plan.model;
  const int q = m.heads * m.head_dim, kv = m.kv_heads * m.head_dim;
  plan.round = reinterpret_cast<std::uint32_t*>(memory);
  auto* at = reinterpret_cast<decode::Quad*>(memory + 16);
  plan.qkv = at, at += (q + 2 * kv) / 4;
  plan.attended = at, at += q / 4;
  plan.projected = at, at += m.hidden / 4;
  plan.gated = at, at += m.ffn / 4;
  plan.down = at, at += m.hidden / 4;
  plan.best = reinterpret_cast<decode::Flagged*>(at);
  plan.partial = plan.best + 2 * plan.grid;
}

/// One launch, one token or several. Launches of one plan are ordered by their stream.
inline cudaError_t launch_decode(cudaStream_t stream, const DecodePlan& plan, const DecodeStep& step) {
  void* arguments[] = {const_cast<DecodePlan*>(&plan), const_cast<DecodeStep*>(&step)};
  return cudaLaunchCooperativeKernel(decode::kernel_of(plan), dim3(static_cast<unsigned>(plan.grid)), dim3(decode::threads), arguments, static_cast<std::size_t>(plan.at.end), stream);
}

}  // namespace tinyllama::cuda
