// The next token on the card: the most probable, or one drawn after temperature, top-k, top-p and min-p, as generate/sampler.hpp does it on the host.
#pragma once

#include "tinyllama/device/operands.hpp"
#include "tinyllama/kernels/cuda/vectors.cuh"

namespace tinyllama::cuda {

struct SampleTask {
  std::int32_t* ids;      // [rows]; -1 for a row to be drawn from that has a NaN or nothing above -infinity
  const float* x;         // [rows, n]
  index_t ld;
  int rows, n;
  const Draw* how;        // [rows], in the device's memory; null: the first of the largest of each
};

namespace detail {

inline constexpr int sample_threads = 1024;

/// The larger value, the lower index among equals.
__device__ inline void take_larger(float& value, int& index, float other, int other_index) {
  if (other > value || (other == value && other_index < index)) value = other, index = other_index;
}
__device__ inline void warp_argmax(float& value, int& index) {
#pragma unroll
  for (int lane = 16; lane > 0; lane /= 2) take_larger(value, index, __shfl_xor_sync(0xffffffffu, value, lane), __shfl_xor_sync(0xffffffffu, index, lane));
}

/// A float as an integer of the same order.
__device__ inline std::uint32_t ordered(float x) {
  const std::uint32_t bits = __float_as_uint(x == 0 ? 0.0f : x);
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

/// A place in the order of candidates, larger logits first, the lower id first among equals: a candidate is before the end where its key is larger, or
/// the same and its id not above `id`.
struct Place {
  std::uint32_t key;
  int id;
  __device__ bool covers(std::uint32_t k, int i) const { return k > key || (k == key && i <= id); }
};

/// Shared memory of select().
struct SelectScratch {
  unsigned long long mass[256];
  unsigned long long above;
  std::uint32_t key;
  int id;
  int count[sample_threads / 32];
};

/// The first candidate at which the sum of masses in that order reaches `target` (or the last one). mass(key, id): 0 for what is none. A radix selection:
/// each pass sums the masses by the next 8 bits of the key and goes on in the digit where the sum is reached. Masses are integers, so that the order in
/// which threads add them does not matter. All threads of the block get the result.
template <class Mass>
__device__ Place select(SelectScratch& s, const float* x, int n, unsigned long long target, Mass&& mass) {
  const int me = static_cast<int>(threadIdx.x);
  std::uint32_t prefix = 0;
  if (me == 0) s.above = 0;
  for (int shift = 24; shift >= 0; shift -= 8) {
    if (me < 256) s.mass[me] = 0;
    __syncthreads();
    for (int i = me; i < n; i += sample_threads) {
      const std::uint32_t key = ordered(x[i]);
      if (shift < 24 && (key ^ prefix) >> (shift + 8)) continue;
      if (const unsigned long long m = mass(key, i)) atomicAdd(&s.mass[key >> shift & 255], m);
    }
    __syncthreads();
    if (me == 0) {
      unsigned long long above = s.above;
      int digit = 255, last = -1;
      for (; digit >= 0; --digit) {
        if (s.mass[digit] == 0) continue;
        last = digit;
        if (above + s.mass[digit] >= target) break;
        above += s.mass[digit];
      }
      if (digit < 0 && last >= 0) above -= s.mass[last];  // the target is never reached: the last one
      s.above = above, s.key = prefix | static_cast<std::uint32_t>(last < 0 ? 0 : last) << shift;
    }
    __syncthreads();
    prefix = s.key;
  }
  // Among equals, which all have the same mass, by id: tiles of ids one after the other.
  const unsigned long long above = s.above;
  if (me == 0) s.id = n - 1;
  __syncthreads();
  unsigned long long before = above;
  for (int first = 0; first < n && before < target; first += sample_threads) {
    const int i = first + me;
    const unsigned long long m = i < n && ordered(x[i]) == prefix ? mass(prefix, i) : 0;
    const unsigned votes = __ballot_sync(0xffffffffu, m > 0);
    if (me % 32 == 0) s.count[me / 32] = __popc(votes);
    __syncthreads();
    unsigned long long rank = static_cast<unsigned long long>(__popc(votes & ((2u << me % 32) - 1)));  // of this one among the tile's, from 1
    int total = 0;
    for (int w = 0; w < sample_threads / 32; ++w) {
      if (w < me / 32) rank += static_cast<unsigned long long>(s.count[w]);
      total += s.count[w];
    }
    if (m > 0 && before + (rank - 1) * m < target && before + rank * m >= target) s.id = i;
    __shared__ unsigned long long each;
    if (m > 0) each = m;  // the same of all
    __syncthreads();
    if (total) before += static_cast<unsigned long long>(total) * each;
    __syncthreads();
  }
  return {prefix, s.id};
}

/// A block a row.
static __global__ __launch_bounds__(sample_threads) void sample_kernel(SampleTask t) {
  __shared__ float value_of[32];
  __shared__ int index_of[32];
  __shared__ SelectScratch scratch;
  __shared__ unsigned long long total;
  const float* x = t.x + blockIdx.x * t.ld;
  const int me = static_cast<int>(threadIdx.x), lane = me % 32;
  float value = -INFINITY;
  int index = t.n;
  bool bad = false;
  for (int i = me; i < t.n; i += sample_threads) take_larger(value, index, x[i], i), bad = bad || x[i] != x[i];
  warp_argmax(value, index);
  if (lane == 0) value_of[me / 32] = value, index_of[me / 32] = index;
  bad = __syncthreads_or(bad);
  value = value_of[lane], index = index_of[lane];
  warp_argmax(value, index);
  if (bad || value == -INFINITY) index = t.how ? -1 : index < t.n ? index : 0;
  Draw how{};
  if (t.how) how = t.how[blockIdx.x];
  if (how.temperature == 0 || index < 0) {
    if (me == 0) t.ids[blockIdx.x] = index;
    return;
  }
  // Weights relative to the largest, in units of 2^-45: the sum of 2^18 of them fits.
  const float largest = value, floor = largest + how.temperature * fmaxf(logf(fmaxf(how.min_p, 1e-30f)), -20.7f);
  const auto weight = [&](std::uint32_t key) {
    const float v = __uint_as_float(key & 0x80000000u ? key & 0x7fffffffu : ~key);
    return v >= floor ? static_cast<unsigned long long>(exp((static_cast<double>(v) - largest) / how.temperature) * 0x1p45) : 0ull;
  };
  Place kept{0, t.n};  // everything
  if (how.top_k > 0 && how.top_k < t.n)
    kept = select(scratch, x, t.n, static_cast<unsigned long long>(how.top_k), [&](std::uint32_t key, int) { return weight(key) > 0 ? 1ull : 0ull; });
  const auto sum = [&] {
    if (me == 0) total = 0;
    __syncthreads();
    unsigned long long mine = 0;
    for (int i = me; i < t.n; i += sample_threads)
      if (const std::uint32_t key = ordered(x[i]); kept.covers(key, i)) mine += weight(key);
    if (mine) atomicAdd(&total, mine);
    __syncthreads();
    const unsigned long long all = total;
    __syncthreads();
    return all;
  };
  const auto mass = [&](std::uint32_t key, int i) { return kept.covers(key, i) ? weight(key) : 0ull; };
  unsigned long long all = sum();
  if (how.top_p < 1) {
    kept = select(scratch, x, t.n, static_cast<unsigned long long>(fmax(1.0, ceil(static_cast<double>(how.top_p) * static_cast<double>(all)))), mass);
    all = sum();
  }
  const Place drawn = select(scratch, x, t.n, min(static_cast<unsigned long long>(how.uniform * static_cast<double>(all)) + 1, all), mass);
  if (me == 0) t.ids[blockIdx.x] = drawn.id;
}

}  // namespace detail

inline void sample(cudaStream_t stream, const SampleTask& t) {
  if (t.rows == 0 || t.n == 0) return;
  detail::sample_kernel<<<static_cast<unsigned>(t.rows), detail::sample_threads, 0, stream>>>(t);
  launched("sample");
}

}  // namespace tinyllama::cuda
