// What this machine can do, measured in the same run as what is compared with it: read bandwidth and the rates of the multiply units.
#pragma once

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <string>
#include <vector>

#include "tinyllama/kernels/cpu/highway-inl.h"

#include "tinyllama/device/cpu.hpp"
#include "tinyllama/device/memory.hpp"

namespace tinyllama::bench {

inline double now() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

/// Of all threads together; 0 where this build has no such instruction. `best` and `median` of several tries: they differ on a machine that is shared.
struct Limit {
  double best = 0, median = 0;
};
struct Limits {
  Limit read;       // bytes a second from memory
  Limit f32_fma;    // floating-point operations a second, f32 multiply-add
  Limit bf16_dot;   // the same by bf16 dot products
  Limit int8_dot;   // integer operations a second by u8 x s8 dot products
};

namespace detail {
namespace hn = hwy::HWY_NAMESPACE;

inline constexpr int tries = 9;

/// Runs f(thread) on all threads `tries` times; each time the work of one thread counts `work`.
template <class F>
Limit rate(ThreadPool& pool, double work, F&& f) {
  std::vector<double> rates;
  // Unmeasured at first: threads wake, spread over the cores, and clocks settle.
  for (const double start = now(); now() - start < 0.1;) pool.run(pool.size(), f);
  for (int i = 0; i < tries; ++i) {
    const double start = now();
    pool.run(pool.size(), f);
    rates.push_back(work * pool.size() / (now() - start));
  }
  std::sort(rates.begin(), rates.end());
  return {rates.back(), rates[rates.size() / 2]};
}

/// Keeps a result without storing it where the compiler could see.
template <class T>
inline void keep(const T& value) { asm volatile("" : : "m"(value) : "memory"); }

// Register-only loops: as many independent chains as cover latency times units (4 cycles x 2), and no load.
inline constexpr int chains = 12;
inline constexpr std::int64_t rounds = 4'000'000;

inline void fma_chains() {
  const hn::ScalableTag<float> d;
  const volatile float factor = 0.999f, term = 0.001f;  // values that the compiler does not know
  const auto a = hn::Set(d, factor), b = hn::Set(d, term);
  // Each chain starts elsewhere: equal ones would be computed once.
  const auto at = [&](float i) { return hn::Set(d, term * i); };
  auto c0 = at(0), c1 = at(1), c2 = at(2), c3 = at(3), c4 = at(4), c5 = at(5), c6 = at(6), c7 = at(7), c8 = at(8), c9 = at(9), c10 = at(10), c11 = at(11);
  for (std::int64_t i = 0; i < rounds; ++i) {
    c0 = hn::MulAdd(a, c0, b), c1 = hn::MulAdd(a, c1, b), c2 = hn::MulAdd(a, c2, b), c3 = hn::MulAdd(a, c3, b);
    c4 = hn::MulAdd(a, c4, b), c5 = hn::MulAdd(a, c5, b), c6 = hn::MulAdd(a, c6, b), c7 = hn::MulAdd(a, c7, b);
    c8 = hn::MulAdd(a, c8, b), c9 = hn::MulAdd(a, c9, b), c10 = hn::MulAdd(a, c10, b), c11 = hn::MulAdd(a, c11, b);
  }
  alignas(64) float out[64];
  hn::StoreU(hn::Add(hn::Add(hn::Add(c0, c1), hn::Add(c2, c3)), hn::Add(hn::Add(hn::Add(c4, c5), hn::Add(c6, c7)), hn::Add(hn::Add(c8, c9), hn::Add(c10, c11)))), d, out);
  keep(out);
}

#if defined(__AVX512BF16__)
inline void bf16_chains() {
  __m512i a = _mm512_set1_epi32(0x3f003f00), b = _mm512_set1_epi32(0x3c003c00);
  asm volatile("" : "+v"(a), "+v"(b));
  __m512 c[chains];
  for (int j = 0; j < chains; ++j) c[j] = _mm512_set1_ps(static_cast<float>(j));
  for (std::int64_t i = 0; i < rounds; ++i) {
#pragma GCC unroll 12
    for (int j = 0; j < chains; ++j) c[j] = _mm512_dpbf16_ps(c[j], (__m512bh)a, (__m512bh)b);
  }
  __m512 sum = c[0];
  for (int j = 1; j < chains; ++j) sum = _mm512_add_ps(sum, c[j]);
  keep(sum);
}
#endif

#if defined(__AVX512VNNI__)
inline void int8_chains() {
  __m512i a = _mm512_set1_epi32(0x01020304), b = _mm512_set1_epi32(0x01010101);
  asm volatile("" : "+v"(a), "+v"(b));
  __m512i c[chains];
  for (int j = 0; j < chains; ++j) c[j] = _mm512_set1_epi32(j);
  for (std::int64_t i = 0; i < rounds; ++i) {
#pragma GCC unroll 12
    for (int j = 0; j < chains; ++j) c[j] = _mm512_dpbusd_epi32(c[j], a, b);
  }
  __m512i sum = c[0];
  for (int j = 1; j < chains; ++j) sum = _mm512_add_epi32(sum, c[j]);
  keep(sum);
}
#endif

/// The sum of n floats, n a multiple of 8 vectors: as fast as they come.
inline void read(const float* x, std::size_t n) {
  const hn::ScalableTag<float> d;
  const std::size_t lanes = hn::Lanes(d);
  auto s0 = hn::Zero(d), s1 = s0, s2 = s0, s3 = s0, s4 = s0, s5 = s0, s6 = s0, s7 = s0;
  for (std::size_t i = 0; i + 8 * lanes <= n; i += 8 * lanes) {
    s0 = hn::Add(s0, hn::Load(d, x + i)), s1 = hn::Add(s1, hn::Load(d, x + i + lanes));
    s2 = hn::Add(s2, hn::Load(d, x + i + 2 * lanes)), s3 = hn::Add(s3, hn::Load(d, x + i + 3 * lanes));
    s4 = hn::Add(s4, hn::Load(d, x + i + 4 * lanes)), s5 = hn::Add(s5, hn::Load(d, x + i + 5 * lanes));
    s6 = hn::Add(s6, hn::Load(d, x + i + 6 * lanes)), s7 = hn::Add(s7, hn::Load(d, x + i + 7 * lanes));
  }
  alignas(64) float out[64];
  hn::StoreU(hn::Add(hn::Add(hn::Add(s0, s1), hn::Add(s2, s3)), hn::Add(hn::Add(s4, s5), hn::Add(s6, s7))), d, out);
  keep(out);
}

}  // namespace detail

/// Measures all of them with the device's number of threads; takes about two seconds.
inline Limits measure_limits(Cpu& dev) {
  using namespace detail;
  Limits limits;
  ThreadPool pool(dev.threads());
  const auto lanes = static_cast<double>(hn::Lanes(hn::ScalableTag<float>()));
  constexpr auto steps = static_cast<double>(rounds) * chains;
  limits.f32_fma = rate(pool, steps * lanes * 2, [](index_t) { fma_chains(); });
#if defined(__AVX512BF16__)
  limits.bf16_dot = rate(pool, steps * 16 * 4, [](index_t) { bf16_chains(); });
#endif
#if defined(__AVX512VNNI__)
  limits.int8_dot = rate(pool, steps * 16 * 8, [](index_t) { int8_chains(); });
#endif
  // Far beyond any cache; units of 256 KiB, taken by whichever thread is free, as the matrix kernels take theirs.
  constexpr std::size_t bytes = std::size_t{512} << 20, unit = std::size_t{256} << 10;
  Memory<Cpu> buffer(dev, bytes);
  std::memset(buffer.data(), 0, bytes);
  const auto* x = reinterpret_cast<const float*>(buffer.data());
  std::vector<double> rates;
  for (int i = 0; i < tries; ++i) {
    const double start = now();
    pool.run(static_cast<index_t>(bytes / unit), [&](index_t u) { read(x + static_cast<std::size_t>(u) * unit / sizeof(float), unit / sizeof(float)); });
    rates.push_back(static_cast<double>(bytes) / (now() - start));
  }
  std::sort(rates.begin(), rates.end());
  limits.read = {rates.back(), rates[rates.size() / 2]};
  return limits;
}

/// add(name, value) for each limit, as the context of a benchmark's report.
template <class Add>
void describe(const Limits& limits, Add&& add) {
  const auto one = [&](const char* name, const Limit& l) {
    char text[64];
    std::snprintf(text, sizeof text, "%.1f best, %.1f median", l.best * 1e-9, l.median * 1e-9);
    add(name, std::string(text));
  };
  one("limit: read GB/s", limits.read);
  one("limit: f32 multiply-add GFLOP/s", limits.f32_fma);
  one("limit: bf16 dot GFLOP/s", limits.bf16_dot);
  one("limit: int8 dot GOP/s", limits.int8_dot);
}

}  // namespace tinyllama::bench
