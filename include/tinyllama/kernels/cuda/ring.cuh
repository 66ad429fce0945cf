// What the decode kernel is built of: bulk copies into shared memory that announce themselves, and values that carry their own flag between blocks.
#pragma once

#include <cstddef>
#include <cstdint>

namespace tinyllama::cuda::decode {

__device__ __forceinline__ std::uint32_t shared_address(const void* p) { return static_cast<std::uint32_t>(__cvta_generic_to_shared(p)); }

// ---- mbarriers and bulk copies (sm_90); addresses are of shared memory

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
__device__ __forceinline__ void barrier_init(std::uint32_t barrier, unsigned arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}
/// Makes initialised barriers visible to the copy engine.
__device__ __forceinline__ void barrier_init_fence() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
__device__ __forceinline__ void barrier_arrive(std::uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}
__device__ __forceinline__ void barrier_expect(std::uint32_t barrier, unsigned bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}
__device__ __forceinline__ bool barrier_test(std::uint32_t barrier, unsigned parity) {
  std::uint32_t done;
  asm volatile("{ .reg .pred p; mbarrier.test_wait.parity.shared::cta.b64 p, [%1], %2; selp.u32 %0, 1, 0, p; }" : "=r"(done) : "r"(barrier), "r"(parity) : "memory");
  return done != 0;
}
__device__ __forceinline__ void barrier_wait(std::uint32_t barrier, unsigned parity) {
  std::uint32_t done;
  do {
    asm volatile("{ .reg .pred p; mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2; selp.u32 %0, 1, 0, p; }" : "=r"(done) : "r"(barrier), "r"(parity) : "memory");
  } while (!done);
}
/// L2 policy for what is read once a token: it shall not push out what is read often.
__device__ __forceinline__ std::uint64_t evict_first_policy() {
  std::uint64_t policy;
  asm volatile("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
  return policy;
}
/// `bytes` (a multiple of 16) from global memory to shared memory; the barrier learns of them as they arrive.
__device__ __forceinline__ void bulk_copy(std::uint32_t to, const void* from, unsigned bytes, std::uint32_t barrier, std::uint64_t policy) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, [%3], %4;" ::"r"(to), "l"(from), "r"(bytes),
               "r"(barrier), "l"(policy)
               : "memory");
}
__device__ __forceinline__ void bulk_copy(std::uint32_t to, const void* from, unsigned bytes, std::uint32_t barrier) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(to), "l"(from), "r"(bytes), "r"(barrier) : "memory");
}
#endif

// ---- values between blocks

/// A value and the number of the round it belongs to, written and read as one 8-byte word. The reader polls the values themselves: no fence, no
/// atomic and no second trip to L2, which a barrier would cost (NCCL's LL protocol does the same). A store is seen by polls after some 0.6 us, a
/// barrier of one atomic a block and the loads behind it take 1.5 us.
struct alignas(8) Flagged {
  float value;
  std::uint32_t round;
};

__device__ __forceinline__ void send(Flagged* to, float value, std::uint32_t round) {
  const std::uint64_t word = static_cast<std::uint64_t>(round) << 32 | __float_as_uint(value);
  asm volatile("st.relaxed.gpu.global.b64 [%0], %1;" ::"l"(to), "l"(word) : "memory");
}
__device__ __forceinline__ void poll2(const Flagged* from, std::uint64_t& a, std::uint64_t& b) {  // 16-byte aligned
  asm volatile("ld.relaxed.gpu.global.v2.b64 {%0, %1}, [%2];" : "=l"(a), "=l"(b) : "l"(from) : "memory");
}
__device__ __forceinline__ std::uint64_t poll1(const Flagged* from) {
  std::uint64_t a;
  asm volatile("ld.relaxed.gpu.global.b64 %0, [%1];" : "=l"(a) : "l"(from) : "memory");
  return a;
}
__device__ __forceinline__ bool is_round(std::uint64_t word, std::uint32_t round) { return static_cast<std::uint32_t>(word >> 32) == round; }
__device__ __forceinline__ float value_of(std::uint64_t word) { return __uint_as_float(static_cast<std::uint32_t>(word)); }

/// Between two polls that found nothing: gives the memory way to the weights.
__device__ __forceinline__ void pause(unsigned nanoseconds) {
  if (nanoseconds) __nanosleep(nanoseconds);
}

__device__ __forceinline__ float receive(const Flagged* from, std::uint32_t round, unsigned wait_ns) {
  std::uint64_t a;
  while (!is_round(a = poll1(from), round)) pause(wait_ns);
  return value_of(a);
}
__device__ __forceinline__ float2 receive2(const Flagged* from, std::uint32_t round, unsigned wait_ns) {
  std::uint64_t a, b;
  for (;;) {
    poll2(from, a, b);
    if (is_round(a, round) && is_round(b, round)) return {value_of(a), value_of(b)};
    pause(wait_ns);
  }
}
/// Two values from two places, both on their way at once.
__device__ __forceinline__ float2 receive_two(const Flagged* first, const Flagged* second, std::uint32_t round, unsigned wait_ns) {
  std::uint64_t a, b;
  for (;;) {
    a = poll1(first), b = poll1(second);
    if (is_round(a, round) && is_round(b, round)) return {value_of(a), value_of(b)};
    pause(wait_ns);
  }
}

/// Where value c of a vector stands that is read four values a thread: 128 values as 32 words of values 4 i, 4 i + 1 and then 32 words of 4 i + 2,
/// 4 i + 3, so that both reads of a warp are runs of 512 bytes. A buffer takes exchange_size(n) places.
__host__ __device__ constexpr int exchange_place(int c) { return (c & ~127) + (c & 2) * 32 + (c >> 2 & 31) * 2 + (c & 1); }
__host__ __device__ constexpr int exchange_size(int n) { return (n + 127) / 128 * 128; }

/// Waits until a sample of the n values is there, `thread` of 128 polling one of them each. All blocks polling all values would fill L2's bandwidth:
/// 132 blocks x 45 KB is 2 us of it for the longest vector. Whoever reads a value still looks at its flag.
__device__ __forceinline__ void await_sample(const Flagged* from, int n, int thread, std::uint32_t round, unsigned wait_ns) {
  const int c = (thread * n + n - 1) / 128;
  receive(from + exchange_place(c < n ? c : n - 1), round, wait_ns);
}
/// Values 4 (i + j stride) ... + 3 for j < N; those with j >= count are not read and 0.
template <int N>
__device__ __forceinline__ void receive4(float4 (&v)[N], const Flagged* from, int i, int stride, int count, std::uint32_t round, unsigned wait_ns) {
  const Flagged* const at = from + exchange_place(4 * i);
  for (;;) {
    std::uint64_t w[N][4];
    bool all = true;
#pragma unroll
    for (int j = 0; j < N; ++j)
      if (j < count) poll2(at + 4 * j * stride, w[j][0], w[j][1]), poll2(at + 4 * j * stride + 64, w[j][2], w[j][3]);
#pragma unroll
    for (int j = 0; j < N; ++j)
      if (j < count) {
#pragma unroll
        for (int e = 0; e < 4; ++e) all = all && is_round(w[j][e], round);
        v[j] = make_float4(value_of(w[j][0]), value_of(w[j][1]), value_of(w[j][2]), value_of(w[j][3]));
      } else {
        v[j] = make_float4(0, 0, 0, 0);
      }
    if (all) return;
    pause(wait_ns);
  }
}

}  // namespace tinyllama::cuda::decode
