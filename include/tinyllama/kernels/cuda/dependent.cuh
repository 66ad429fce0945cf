// Launches that overlap: a kernel's blocks come onto the card while the one before ends, and wait where they need what it wrote (programmatic dependent
// launch, Hopper). Kernels launched so call wait_for_previous() before they read or write what another kernel may still write or read; since each one waits,
// waiting for the one before is waiting for all before it. What is read without waiting (weights) must be written by kernels launched in the ordinary way that
// do not let_next_begin(). Recorded into graphs as it is.
#pragma once

#include <array>
#include <atomic>

#include "tinyllama/kernels/cuda/hopper.cuh"
#include "tinyllama/device/cuda_runtime.cuh"

namespace tinyllama::cuda {

/// Blocks of the next kernel may come as soon as all of this one have said so (or ended) and there is room.
__device__ __forceinline__ void let_next_begin() {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}
/// Until the kernel before is done and what it wrote is seen.
__device__ __forceinline__ void wait_for_previous() {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

/// Whether kernels on the current card wait for themselves: asked once a card.
inline bool launches_overlap() {
  static std::array<std::atomic<signed char>, 64> known{};
  int card = 0;
  check(cudaGetDevice(&card), "cudaGetDevice");
  if (card >= static_cast<int>(known.size())) return false;
  auto& k = known[static_cast<std::size_t>(card)];
  if (k == 0) {
    int major = 0;
    check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, card), "cudaDeviceGetAttribute");
    k = major == 9 && hopper::compiled() ? 1 : -1;
    cudaGetLastError();
  }
  return k > 0;
}

/// Launches a kernel that calls wait_for_previous(), in clusters of so many blocks; on cards before Hopper in the ordinary way, and without clusters.
template <class... Parameters, class... Arguments>
void launch_dependent_clusters(void (*kernel)(Parameters...), int cluster, dim3 grid, unsigned threads, std::size_t shared, cudaStream_t stream, const char* name, const Arguments&... arguments) {
  cudaLaunchAttribute attributes[2]{};
  attributes[0].id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attributes[0].val.programmaticStreamSerializationAllowed = 1;
  attributes[1].id = cudaLaunchAttributeClusterDimension;
  attributes[1].val.clusterDim.x = static_cast<unsigned>(cluster), attributes[1].val.clusterDim.y = attributes[1].val.clusterDim.z = 1;
  cudaLaunchConfig_t c{};
  c.gridDim = grid, c.blockDim = dim3(threads), c.dynamicSmemBytes = shared, c.stream = stream, c.attrs = attributes, c.numAttrs = !launches_overlap() ? 0 : cluster > 1 ? 2 : 1;
  check(cudaLaunchKernelEx(&c, kernel, arguments...), "launch", name);
}
template <class... Parameters, class... Arguments>
void launch_dependent(void (*kernel)(Parameters...), dim3 grid, unsigned threads, std::size_t shared, cudaStream_t stream, const char* name, const Arguments&... arguments) {
  launch_dependent_clusters(kernel, 1, grid, threads, shared, stream, name, arguments...);
}

}  // namespace tinyllama::cuda
