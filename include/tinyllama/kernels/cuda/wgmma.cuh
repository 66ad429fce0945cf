// Products of a warpgroup (wgmma; PTX ISA, sm_90a): operands in shared memory, or the first in registers; sums in f32 registers.
//
// A thread's d[4 j + i] is row (lane / 4 + 8 (i / 2)) of its warp's 16, column 8 j + 2 (lane % 4) + i % 2; d is N / 2 long.
#pragma once

#include "tinyllama/kernels/cuda/hopper.cuh"

namespace tinyllama::cuda::hopper {

__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int Pending>
__device__ __forceinline__ void wgmma_wait() { asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(Pending) : "memory"); }
/// Keeps the compiler from moving uses of registers across the waits for the products that write or read them.
template <class R, int N>
__device__ __forceinline__ void pin(R (&r)[N]) {
#pragma unroll
  for (int i = 0; i < N; ++i) {
    if constexpr (std::is_same_v<R, float>) asm volatile("" : "+f"(r[i])::"memory");
    else asm volatile("" : "+r"(r[i])::"memory");
  }
}

/// Descriptor of an operand in the 128-byte swizzle: 8 rows of 128 bytes are an atom. `group`: bytes between atoms along the rows; `block`: between
/// 128-byte columns, where an operand whose rows are the summed dimension ("transposed") has several.
__device__ __forceinline__ std::uint64_t operand(std::uint32_t address, int group, int block) {
  return static_cast<std::uint64_t>((address & 0x3ffff) >> 4) | static_cast<std::uint64_t>(block >> 4) << 16 | static_cast<std::uint64_t>(group >> 4) << 32 | std::uint64_t{1} << 62;
}
/// Of [rows][64 of bf16], its rows 128 bytes apart, from column 16 `step` on.
__device__ __forceinline__ std::uint64_t operand_rows(std::uint32_t address, int step) { return operand(address + step * 32, 1024, 16); }

// Lists of registers, as asm names them and as it is given them: of the length at the end.
#define TINYLLAMA_NAMES_16 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15"
#define TINYLLAMA_NAMES_20 TINYLLAMA_NAMES_16 ", %16, %17, %18, %19"
#define TINYLLAMA_NAMES_24 TINYLLAMA_NAMES_20 ", %20, %21, %22, %23"
#define TINYLLAMA_NAMES_32 TINYLLAMA_NAMES_24 ", %24, %25, %26, %27, %28, %29, %30, %31"
#define TINYLLAMA_NAMES_36 TINYLLAMA_NAMES_32 ", %32, %33, %34, %35"
#define TINYLLAMA_NAMES_40 TINYLLAMA_NAMES_36 ", %36, %37, %38, %39"
#define TINYLLAMA_NAMES_44 TINYLLAMA_NAMES_40 ", %40, %41, %42, %43"
#define TINYLLAMA_NAMES_48 TINYLLAMA_NAMES_44 ", %44, %45, %46, %47"
#define TINYLLAMA_NAMES_64 TINYLLAMA_NAMES_48 ", %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define TINYLLAMA_NAMES_88 TINYLLAMA_NAMES_64 ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, %80, %81, %82, %83, %84, %85, %86, %87"
#define TINYLLAMA_NAMES_96 TINYLLAMA_NAMES_88 ", %88, %89, %90, %91, %92, %93, %94, %95"
#define TINYLLAMA_NAMES_128 TINYLLAMA_NAMES_96 ", %96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, %112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"
#define TINYLLAMA_SUMS(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define TINYLLAMA_SUMS_16 TINYLLAMA_SUMS(0), TINYLLAMA_SUMS(4), TINYLLAMA_SUMS(8), TINYLLAMA_SUMS(12)
#define TINYLLAMA_SUMS_20 TINYLLAMA_SUMS_16, TINYLLAMA_SUMS(16)
#define TINYLLAMA_SUMS_24 TINYLLAMA_SUMS_20, TINYLLAMA_SUMS(20)
#define TINYLLAMA_SUMS_32 TINYLLAMA_SUMS_24, TINYLLAMA_SUMS(24), TINYLLAMA_SUMS(28)
#define TINYLLAMA_SUMS_36 TINYLLAMA_SUMS_32, TINYLLAMA_SUMS(32)
#define TINYLLAMA_SUMS_40 TINYLLAMA_SUMS_36, TINYLLAMA_SUMS(36)
#define TINYLLAMA_SUMS_44 TINYLLAMA_SUMS_40, TINYLLAMA_SUMS(40)
#define TINYLLAMA_SUMS_48 TINYLLAMA_SUMS_44, TINYLLAMA_SUMS(44)
#define TINYLLAMA_SUMS_64 TINYLLAMA_SUMS_48, TINYLLAMA_SUMS(48), TINYLLAMA_SUMS(52), TINYLLAMA_SUMS(56), TINYLLAMA_SUMS(60)
#define TINYLLAMA_SUMS_88 TINYLLAMA_SUMS_64, TINYLLAMA_SUMS(64), TINYLLAMA_SUMS(68), TINYLLAMA_SUMS(72), TINYLLAMA_SUMS(76), TINYLLAMA_SUMS(80), TINYLLAMA_SUMS(84)
#define TINYLLAMA_SUMS_96 TINYLLAMA_SUMS_88, TINYLLAMA_SUMS(88), TINYLLAMA_SUMS(92)
#define TINYLLAMA_SUMS_128 TINYLLAMA_SUMS_96, TINYLLAMA_SUMS(96), TINYLLAMA_SUMS(100), TINYLLAMA_SUMS(104), TINYLLAMA_SUMS(108), TINYLLAMA_SUMS(112), TINYLLAMA_SUMS(116), TINYLLAMA_SUMS(120), TINYLLAMA_SUMS(124)

/// d [64, N] (+)= a [64, 16] b [N, 16]^T of bf16, both in shared memory; `add` 0: d is overwritten.
#define TINYLLAMA_WGMMA_SHARED(N, LENGTH, A, B, ADD) \
  __device__ __forceinline__ void wgmma_shared(float (&d)[LENGTH], std::uint64_t a, std::uint64_t b, int add) { \
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, " ADD ", 0;\nwgmma.mma_async.sync.aligned.m64n" #N "k16.f32.bf16.bf16 {" TINYLLAMA_NAMES_##LENGTH "}, " A ", " B ", p, 1, 1, 0, 0;\n}" \
                 : TINYLLAMA_SUMS_##LENGTH \
                 : "l"(a), "l"(b), "r"(add)); \
  }
TINYLLAMA_WGMMA_SHARED(32, 16, "%16", "%17", "%18")
TINYLLAMA_WGMMA_SHARED(40, 20, "%20", "%21", "%22")
TINYLLAMA_WGMMA_SHARED(48, 24, "%24", "%25", "%26")
TINYLLAMA_WGMMA_SHARED(64, 32, "%32", "%33", "%34")
TINYLLAMA_WGMMA_SHARED(72, 36, "%36", "%37", "%38")
TINYLLAMA_WGMMA_SHARED(80, 40, "%40", "%41", "%42")
TINYLLAMA_WGMMA_SHARED(88, 44, "%44", "%45", "%46")
TINYLLAMA_WGMMA_SHARED(96, 48, "%48", "%49", "%50")
TINYLLAMA_WGMMA_SHARED(128, 64, "%64", "%65", "%66")
TINYLLAMA_WGMMA_SHARED(176, 88, "%88", "%89", "%90")
TINYLLAMA_WGMMA_SHARED(192, 96, "%96", "%97", "%98")
TINYLLAMA_WGMMA_SHARED(256, 128, "%128", "%129", "%130")
#undef TINYLLAMA_WGMMA_SHARED

/// d [64, N] (+)= a [64, 16] b [16, N]: a in registers as mma.sync's, 16 rows a warp; b in shared memory, [N][16] or, transposed, [16][N].
#define TINYLLAMA_WGMMA_AS(TYPE, N, LENGTH, A, B, ADD, TURNED) \
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, " ADD ", 0;\nwgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPE "." TYPE " {" TINYLLAMA_NAMES_##LENGTH "}, {" A "}, " B ", p, 1, 1, " TURNED ";\n}" \
               : TINYLLAMA_SUMS_##LENGTH \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "n"(Add ? 1 : 0), "n"(Transposed ? 1 : 0))
#define TINYLLAMA_WGMMA(N, LENGTH, A, B, ADD, TURNED) \
  template <class T, bool Transposed, bool Add> \
  __device__ __forceinline__ void wgmma(float (&d)[LENGTH], const std::uint32_t (&a)[4], std::uint64_t b) { \
    if constexpr (std::is_same_v<T, bf16>) TINYLLAMA_WGMMA_AS("bf16", N, LENGTH, A, B, ADD, TURNED); \
    else TINYLLAMA_WGMMA_AS("f16", N, LENGTH, A, B, ADD, TURNED); \
  }
TINYLLAMA_WGMMA(64, 32, "%32, %33, %34, %35", "%36", "%37", "%38")
TINYLLAMA_WGMMA(128, 64, "%64, %65, %66, %67", "%68", "%69", "%70")
#undef TINYLLAMA_WGMMA
#undef TINYLLAMA_WGMMA_AS
#undef TINYLLAMA_NAMES_16
#undef TINYLLAMA_SUMS_16
#undef TINYLLAMA_NAMES_20
#undef TINYLLAMA_SUMS_20
#undef TINYLLAMA_NAMES_24
#undef TINYLLAMA_SUMS_24
#undef TINYLLAMA_NAMES_32
#undef TINYLLAMA_SUMS_32
#undef TINYLLAMA_NAMES_36
#undef TINYLLAMA_SUMS_36
#undef TINYLLAMA_NAMES_40
#undef TINYLLAMA_SUMS_40
#undef TINYLLAMA_NAMES_44
#undef TINYLLAMA_SUMS_44
#undef TINYLLAMA_NAMES_48
#undef TINYLLAMA_SUMS_48
#undef TINYLLAMA_NAMES_64
#undef TINYLLAMA_SUMS_64
#undef TINYLLAMA_NAMES_88
#undef TINYLLAMA_SUMS_88
#undef TINYLLAMA_NAMES_96
#undef TINYLLAMA_SUMS_96
#undef TINYLLAMA_NAMES_128
#undef TINYLLAMA_SUMS_128
#undef TINYLLAMA_SUMS

}  // namespace tinyllama::cuda::hopper
