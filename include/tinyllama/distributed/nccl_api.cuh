// NCCL found at run time: the functions of it that we call. Host code; without NCCL's header, or without the library on the machine, there is none.
#pragma once

#include "tinyllama/device/cuda_runtime.cuh"

#if __has_include(<nccl.h>) && __has_include(<dlfcn.h>)
#define TINYLLAMA_NCCL 1
#include <dlfcn.h>
#include <nccl.h>

#include <cstdlib>
#include <memory>
#include <string>

namespace tinyllama::cuda {

struct NcclApi {
  decltype(&::ncclGetUniqueId) get_unique_id;
  decltype(&::ncclCommInitRank) init_rank;
  decltype(&::ncclCommDestroy) destroy;
  decltype(&::ncclCommAbort) abort;
  decltype(&::ncclCommGetAsyncError) async_error;
  decltype(&::ncclGetErrorString) error_string;
  decltype(&::ncclGroupStart) group_start;
  decltype(&::ncclGroupEnd) group_end;
  decltype(&::ncclAllReduce) all_reduce;
  decltype(&::ncclReduceScatter) reduce_scatter;
  decltype(&::ncclAllGather) all_gather;
  decltype(&::ncclReduce) reduce;
  decltype(&::ncclBroadcast) broadcast;

  /// Throws Error where there is no library: libnccl.so.2 where the loader looks, or at $TINYLLAMA_NCCL_LIBRARY.
  static const NcclApi& get() {
    static const NcclApi api = open();
    return api;
  }

 private:
  static NcclApi open() {
    const char* const named = std::getenv("TINYLLAMA_NCCL_LIBRARY");
    const char* const file = named ? named : "libnccl.so.2";
    void* const library = dlopen(file, RTLD_NOW | RTLD_LOCAL);
    if (!library) {
      const char* const why = dlerror();
      throw Error("NCCL", file, "a library that the loader finds (or $TINYLLAMA_NCCL_LIBRARY)", why ? why : "none");
    }
    NcclApi a{};
    const auto find = [&]<class F>(F& f, const char* name) {
      f = reinterpret_cast<F>(dlsym(library, name));
      if (!f) throw Error("NCCL", file, name, "a library without it");
    };
    find(a.get_unique_id, "ncclGetUniqueId"), find(a.init_rank, "ncclCommInitRank"), find(a.destroy, "ncclCommDestroy"), find(a.abort, "ncclCommAbort");
    find(a.async_error, "ncclCommGetAsyncError"), find(a.error_string, "ncclGetErrorString");
    find(a.group_start, "ncclGroupStart"), find(a.group_end, "ncclGroupEnd");
    find(a.all_reduce, "ncclAllReduce"), find(a.reduce_scatter, "ncclReduceScatter"), find(a.all_gather, "ncclAllGather");
    find(a.reduce, "ncclReduce"), find(a.broadcast, "ncclBroadcast");
    return a;
  }
};

}  // namespace tinyllama::cuda
#endif
