// Values that carry their own flag between the blocks of the decode kernel: the reader polls the values themselves.
//
// No fence, no atomic and no second trip to L2, which a barrier would cost (NCCL's LL protocols do the same). Measured on an H100 between 132 blocks that do
// nothing else, from sending to having all of a vector of 2048 values in the shared memory of every block: 1400 cycles, the trips of a store and of a load to
// L2; of 5632 values: 2400. Pairs of blocks that forward to each other through distributed shared memory take 2800 to 3500, and several copies of the buffer change
// nothing. Polls are traffic in L2, and those of the blocks that wait slow the blocks that are waited for: see `await`.
#pragma once

#include <cstddef>
#include <cstdint>

namespace tinyllama::cuda::decode {

// ---- four values in a word of 16 bytes

/// Values 4 i ... 4 i + 3 of a vector, and in their lowest bits the round they belong to, modulo 16: it costs each value the last of its 24 bits, and no bytes.
/// Four bits are enough because every word of a vector is written in every round, and no round begins before all blocks have read the last one's.
/// 16 bytes are read and written as one (.b128 of PTX; a vector of four would not promise it).
struct alignas(16) Quad {
  std::uint32_t bits[4];
};

__device__ __forceinline__ Quad poll(const Quad* from) {
  Quad q;
  asm volatile("{ .reg .b128 q; .reg .b64 a, b; ld.relaxed.gpu.global.b128 q, [%4]; mov.b128 {a, b}, q; mov.b64 {%0, %1}, a; mov.b64 {%2, %3}, b; }"
               : "=r"(q.bits[0]), "=r"(q.bits[1]), "=r"(q.bits[2]), "=r"(q.bits[3])
               : "l"(from)
               : "memory");
  return q;
}
__device__ __forceinline__ bool is_round(const Quad& q, std::uint32_t round) {
  return (((q.bits[0] ^ round) | (q.bits[1] ^ round >> 1) | (q.bits[2] ^ round >> 2) | (q.bits[3] ^ round >> 3)) & 1) == 0;
}
__device__ __forceinline__ float4 values_of(const Quad& q) {
  return make_float4(__uint_as_float(q.bits[0] & ~1u), __uint_as_float(q.bits[1] & ~1u), __uint_as_float(q.bits[2] & ~1u), __uint_as_float(q.bits[3] & ~1u));
}

/// Lanes 4 i ... 4 i + 3 of a warp hold the values of one word and send it. All lanes call it; `to` and `valid` are the same for the four.
__device__ __forceinline__ void send(Quad* to, float value, std::uint32_t round, bool valid) {
  const std::uint32_t e = threadIdx.x & 3, bits = (__float_as_uint(value) & ~1u) | (round >> e & 1);
  const std::uint32_t a = __shfl_sync(~0u, bits, 0, 4), b = __shfl_sync(~0u, bits, 1, 4), c = __shfl_sync(~0u, bits, 2, 4), d = __shfl_sync(~0u, bits, 3, 4);
  if (valid && e == 0)
    asm volatile("{ .reg .b128 q; .reg .b64 a, b; mov.b64 a, {%1, %2}; mov.b64 b, {%3, %4}; mov.b128 q, {a, b}; st.relaxed.gpu.global.b128 [%0], q; }" ::"l"(to), "r"(a),
                 "r"(b), "r"(c), "r"(d)
                 : "memory");
}
/// Words from[0], from[stride], ... for j < count, all on their way at once; the others are 0.
template <int N>
__device__ __forceinline__ void receive(float4 (&v)[N], const Quad* from, int stride, int count, std::uint32_t round) {
  Quad q[N];
  for (;;) {
    bool all = true;
#pragma unroll
    for (int j = 0; j < N; ++j)
      if (j < count) q[j] = poll(from + j * stride);
#pragma unroll
    for (int j = 0; j < N; ++j)
      if (j < count) all = all && is_round(q[j], round);
    if (all) break;
  }
#pragma unroll
  for (int j = 0; j < N; ++j) v[j] = j < count ? values_of(q[j]) : make_float4(0, 0, 0, 0);
}

/// Waits until some of the `quads` words are there: 8 for each of the `warps` warps, spread over the vector. It costs 600 cycles where nothing else moves; but 22 KB polled
/// by each of 132 blocks take more of L2's bandwidth than the weights do.
__device__ __forceinline__ void await(const Quad* from, int quads, int warp, int warps, int lane, std::uint32_t round) {
  constexpr int sample = 8;
  const Quad* const at = from + (warp * sample + lane) * quads / (warps * sample);
  if (lane < sample)
    while (!is_round(poll(at), round)) {}
  __syncwarp();
}

// ---- single values, for what is not written in every round

struct alignas(8) Flagged {
  float value;
  std::uint32_t round;
};
__device__ __forceinline__ void send(Flagged* to, float value, std::uint32_t round) {
  const std::uint64_t word = static_cast<std::uint64_t>(round) << 32 | __float_as_uint(value);
  asm volatile("st.relaxed.gpu.global.b64 [%0], %1;" ::"l"(to), "l"(word) : "memory");
}
/// 2 N neighbouring values, 16-byte aligned.
template <int N>
__device__ __forceinline__ void receive(float2 (&v)[N], const Flagged* const (&from)[N], std::uint32_t round) {
  std::uint64_t w[N][2];
  for (;;) {
    bool all = true;
#pragma unroll
    for (int j = 0; j < N; ++j) asm volatile("ld.relaxed.gpu.global.v2.b64 {%0, %1}, [%2];" : "=l"(w[j][0]), "=l"(w[j][1]) : "l"(from[j]) : "memory");
#pragma unroll
    for (int j = 0; j < N; ++j) all = all && static_cast<std::uint32_t>(w[j][0] >> 32) == round && static_cast<std::uint32_t>(w[j][1] >> 32) == round;
    if (all) break;
  }
#pragma unroll
  for (int j = 0; j < N; ++j) v[j] = make_float2(__uint_as_float(static_cast<std::uint32_t>(w[j][0])), __uint_as_float(static_cast<std::uint32_t>(w[j][1])));
}

}  // namespace tinyllama::cuda::decode
