// Rows in pieces of up to 16 bytes, and what every launch needs.
#pragma once

#include <cstdint>

#include "tinyllama/device/cuda_runtime.cuh"
#include "tinyllama/kernels/cuda/element.cuh"

namespace tinyllama::cuda {

/// N elements that one instruction moves: 16 bytes at most.
template <class T, int N>
struct alignas(sizeof(T) * N) Vec {
  static_assert(sizeof(T) * N <= 16);
  T at[N];
};
/// Elements of T in 16 bytes.
template <class T>
inline constexpr int per_16 = 16 / static_cast<int>(sizeof(T));

/// Whether rows of `columns` elements of T, `stride` apart from `p` on, can be read N elements at a time.
template <int N, class T>
bool in_vectors(const T* p, index_t stride, index_t columns) {
  return columns % N == 0 && stride % N == 0 && reinterpret_cast<std::uintptr_t>(p) % (sizeof(T) * N) == 0;
}

constexpr index_t ceil_div(index_t a, index_t b) { return (a + b - 1) / b; }

/// The launch just made, as an Error where it failed.
inline void launched(const char* kernel) { check(cudaGetLastError(), "launch", kernel); }

}  // namespace tinyllama::cuda
