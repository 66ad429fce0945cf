// Hopper's own instructions (PTX ISA, sm_90a): mbarriers, bulk copies to shared memory, clusters, registers moved between warpgroups.
#pragma once

#include <cuda.h>

#include "tinyllama/kernels/cuda/element.cuh"

namespace tinyllama::cuda::hopper {

/// Nothing; but its bound of threads says what the program holds for the card it runs on.
template <class>
__global__ void
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
__launch_bounds__(96)
#else
__launch_bounds__(32)
#endif
probe() {}
/// Whether code for sm_90a is what runs on the current card: false on others, and in a program compiled without -gencode=arch=compute_90a,code=sm_90a.
inline bool compiled() {
  cudaFuncAttributes a{};
  return cudaFuncGetAttributes(&a, probe<void>) == cudaSuccess && a.maxThreadsPerBlock == 96;
}

// Barriers of shared memory that count arrivals and bytes of copies; a phase ends when both are complete.
__device__ __forceinline__ void init_barrier(std::uint32_t barrier, int arrivals) { asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory"); }
__device__ __forceinline__ void fence_barrier_init() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
__device__ __forceinline__ void arrive(std::uint32_t barrier) { asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory"); }
__device__ __forceinline__ void arrive_expect(std::uint32_t barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}
__device__ __forceinline__ void wait(std::uint32_t barrier, int parity) {
  asm volatile(
      "{\n.reg .pred p;\nagain:\nmbarrier.try_wait.parity.shared::cta.b64 p, [%0], %1;\n@p bra done;\nbra again;\ndone:\n}" ::"r"(barrier), "r"(parity) : "memory");
}

/// The same for who has time: it leaves the issue slots to others.
__device__ __forceinline__ void wait_asleep(std::uint32_t barrier, int parity) {
  int done = 0;
  while (true) {
    asm volatile("{\n.reg .pred p;\nmbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\nselp.b32 %0, 1, 0, p;\n}" : "=r"(done) : "r"(barrier), "r"(parity) : "memory");
    if (done) return;
    __nanosleep(200);
  }
}

/// bytes (a multiple of 16) from global to shared memory by the copy engine, counted by `barrier`.
__device__ __forceinline__ void copy_bulk(std::uint32_t to, const void* from, int bytes, std::uint32_t barrier) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(to), "l"(from), "r"(bytes), "r"(barrier) : "memory");
}
/// The box of a tensor map at {column, row} to shared memory, counted by `barrier`; or to the same place, and barrier, of both blocks of a cluster of two.
__device__ __forceinline__ void copy_box(std::uint32_t to, const CUtensorMap& map, int column, int row, std::uint32_t barrier) {
  asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];" ::"r"(to), "l"(&map), "r"(column), "r"(row), "r"(barrier)
               : "memory");
}
__device__ __forceinline__ void copy_box_to_both(std::uint32_t to, const CUtensorMap& map, int column, int row, std::uint32_t barrier) {
  asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster [%0], [%1, {%2, %3}], [%4], %5;" ::"r"(to), "l"(&map), "r"(column),
               "r"(row), "r"(barrier), "h"(static_cast<unsigned short>(3))
               : "memory");
}
__device__ __forceinline__ int cluster_rank() {
  int r;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(r));
  return r;
}
__device__ __forceinline__ void sync_cluster() { asm volatile("barrier.cluster.arrive.aligned;\nbarrier.cluster.wait.aligned;" ::: "memory"); }
/// Arrives at the barrier of that address in another block of the cluster. With .release.cluster spelt out it would be a fence of the whole card first.
__device__ __forceinline__ void arrive_at(std::uint32_t barrier, int rank) {
  asm volatile("{\n.reg .b32 a;\nmapa.shared::cluster.u32 a, %0, %1;\nmbarrier.arrive.shared::cluster.b64 _, [a];\n}" ::"r"(barrier), "r"(rank) : "memory");
}
/// The same place in the shared memory of another block of the cluster.
__device__ __forceinline__ std::uint32_t in_block(std::uint32_t address, int rank) {
  std::uint32_t r;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(r) : "r"(address), "r"(rank));
  return r;
}
/// 16 bytes into another block's shared memory, counted by a barrier there (both of in_block): who waits for that barrier sees them, and no fence is needed.
__device__ __forceinline__ void send16(std::uint32_t to, float a, float b, float c, float d, std::uint32_t barrier) {
  asm volatile("st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.f32 [%0], {%1, %2, %3, %4}, [%5];" ::"r"(to), "f"(a), "f"(b), "f"(c), "f"(d), "r"(barrier) : "memory");
}
/// Ordinary writes to shared memory before it are seen by the copy engine and the tensor cores after it.
__device__ __forceinline__ void fence_async_proxy() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

template <int Registers>
__device__ __forceinline__ void take_registers() { asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(Registers)); }
template <int Registers>
__device__ __forceinline__ void give_registers() { asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(Registers)); }

/// Barriers among `threads` threads of a block, of which some wait and some only arrive.
__device__ __forceinline__ void named_wait(int id, int threads) { asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory"); }
__device__ __forceinline__ void named_arrive(int id, int threads) { asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory"); }

}  // namespace tinyllama::cuda::hopper
