// CUDA's resources as C++ objects: errors, the current card, streams, events, pinned memory, graphs and cuBLASLt. Host code: any compiler takes it.
#pragma once

#include <cublasLt.h>
#include <cuda_runtime_api.h>

#include <cstddef>
#include <string>
#include <string_view>
#include <utility>

#include "tinyllama/error.hpp"

namespace tinyllama::cuda {

/// Throws an Error that names the call and what it worked on, unless `e` is success. The error is taken off the runtime's record.
inline void check(cudaError_t e, std::string_view call, std::string_view on = {}) {
  if (e == cudaSuccess) return;
  cudaGetLastError();
  throw Error("CUDA", on.empty() ? std::string(call) : std::string(call) + " of " + std::string(on), "success", std::string(cudaGetErrorName(e)) + ", " + cudaGetErrorString(e));
}
inline void check(cublasStatus_t s, std::string_view call, std::string_view on = {}) {
  if (s == CUBLAS_STATUS_SUCCESS) return;
  throw Error("cuBLASLt", on.empty() ? std::string(call) : std::string(call) + " of " + std::string(on), "success", cublasLtGetStatusString(s));
}

/// Cards that can be used; 0 where there is no driver.
inline int card_count() {
  int n = 0;
  if (cudaGetDeviceCount(&n) == cudaSuccess) return n;
  cudaGetLastError();
  return 0;
}

/// Makes a card current, and the caller's again at the end: a guest in someone's program.
class Current {
 public:
  explicit Current(int card) {
    check(cudaGetDevice(&before_), "cudaGetDevice");
    if (before_ != card) check(cudaSetDevice(card), "cudaSetDevice", "card " + std::to_string(card));
    changed_ = before_ != card;
  }
  Current(const Current&) = delete;
  Current& operator=(const Current&) = delete;
  ~Current() {
    if (changed_) cudaSetDevice(before_);
  }

 private:
  int before_ = 0;
  bool changed_ = false;
};

/// A move-only handle that Destroy gives back.
template <class Handle, auto Destroy>
class Owned {
 public:
  Owned() = default;
  explicit Owned(Handle h) : handle_(h) {}
  Owned(Owned&& o) noexcept : handle_(std::exchange(o.handle_, Handle{})) {}
  Owned& operator=(Owned&& o) noexcept {
    std::swap(handle_, o.handle_);
    return *this;
  }
  ~Owned() {
    if (handle_) Destroy(handle_);
  }
  Handle get() const { return handle_; }
  explicit operator bool() const { return handle_ != Handle{}; }

 private:
  Handle handle_{};
};

/// A stream that does not wait for the legacy default stream.
class Stream : public Owned<cudaStream_t, cudaStreamDestroy> {
 public:
  explicit Stream(int card) : Owned(create(card)) {}
  void synchronize(std::string_view on = "a step") const { check(cudaStreamSynchronize(get()), "cudaStreamSynchronize", on); }

 private:
  static cudaStream_t create(int card) {
    const Current here(card);
    cudaStream_t s = nullptr;
    check(cudaStreamCreateWithFlags(&s, cudaStreamNonBlocking), "cudaStreamCreateWithFlags");
    return s;
  }
};

class Event : public Owned<cudaEvent_t, cudaEventDestroy> {
 public:
  explicit Event(bool timing = false) : Owned(create(timing)) {}
  /// No event yet: to be assigned to.
  static Event none() { return Event(cudaEvent_t{}); }
  void record(cudaStream_t s) const { check(cudaEventRecord(get(), s), "cudaEventRecord"); }
  /// The same where the stream may be recording: then each launch of the graph records the event.
  void record_each_time(cudaStream_t s) const {
    cudaStreamCaptureStatus status{};
    check(cudaStreamIsCapturing(s, &status), "cudaStreamIsCapturing");
    check(cudaEventRecordWithFlags(get(), s, status == cudaStreamCaptureStatusActive ? cudaEventRecordExternal : cudaEventRecordDefault), "cudaEventRecordWithFlags");
  }
  void synchronize() const { check(cudaEventSynchronize(get()), "cudaEventSynchronize"); }
  /// Seconds from `earlier` to this; both were recorded, with timing, and are done.
  double since(const Event& earlier) const {
    float ms = 0;
    check(cudaEventElapsedTime(&ms, earlier.get(), get()), "cudaEventElapsedTime");
    return 1e-3 * static_cast<double>(ms);
  }

 private:
  explicit Event(cudaEvent_t e) : Owned(e) {}
  static cudaEvent_t create(bool timing) {
    cudaEvent_t e = nullptr;
    check(cudaEventCreateWithFlags(&e, timing ? cudaEventDefault : cudaEventDisableTiming), "cudaEventCreateWithFlags");
    return e;
  }
};

/// Page-locked host memory, grown on demand: copies to and from it are asynchronous and run at the bus's speed.
class Pinned {
 public:
  std::byte* reserve(std::size_t bytes) {
    if (bytes > bytes_) {
      memory_ = {}, bytes_ = 0;
      void* p = nullptr;
      check(cudaMallocHost(&p, bytes), "cudaMallocHost", std::to_string(bytes) + " bytes");
      memory_ = Owned<void*, cudaFreeHost>(p);
      bytes_ = bytes;
    }
    return static_cast<std::byte*>(memory_.get());
  }

 private:
  Owned<void*, cudaFreeHost> memory_;
  std::size_t bytes_ = 0;
};

/// What a stream did between begin() and end(), as one launch.
class Graph {
 public:
  static void begin(cudaStream_t s) { check(cudaStreamBeginCapture(s, cudaStreamCaptureModeThreadLocal), "cudaStreamBeginCapture"); }
  void end(cudaStream_t s) {
    cudaGraph_t g = nullptr;
    check(cudaStreamEndCapture(s, &g), "cudaStreamEndCapture");
    const Owned<cudaGraph_t, cudaGraphDestroy> graph(g);
    cudaGraphExec_t e = nullptr;
    check(cudaGraphInstantiate(&e, g, 0), "cudaGraphInstantiate");
    exec_ = Owned<cudaGraphExec_t, cudaGraphExecDestroy>(e);
  }
  /// Ends a recording that failed.
  static void abandon(cudaStream_t s) noexcept {
    cudaGraph_t g = nullptr;
    cudaStreamEndCapture(s, &g);
    if (g) cudaGraphDestroy(g);
    cudaGetLastError();
  }
  explicit operator bool() const { return static_cast<bool>(exec_); }
  void launch(cudaStream_t s) const { check(cudaGraphLaunch(exec_.get(), s), "cudaGraphLaunch"); }

 private:
  Owned<cudaGraphExec_t, cudaGraphExecDestroy> exec_;
};

/// Memory of one card, given out in the order of a stream; what is given back stays with the pool, so that pages come and go without a system call.
class Pool : public Owned<cudaMemPool_t, cudaMemPoolDestroy> {
 public:
  explicit Pool(int card) : Owned(create(card)) {
    unsigned long long all = ~0ull;
    check(cudaMemPoolSetAttribute(get(), cudaMemPoolAttrReleaseThreshold, &all), "cudaMemPoolSetAttribute");
  }
  /// Bytes that are given out, and the most that ever were.
  std::size_t used() const { return attribute(cudaMemPoolAttrUsedMemCurrent); }
  std::size_t most_used() const { return attribute(cudaMemPoolAttrUsedMemHigh); }

 private:
  std::size_t attribute(cudaMemPoolAttr which) const {
    unsigned long long n = 0;
    check(cudaMemPoolGetAttribute(get(), which, &n), "cudaMemPoolGetAttribute");
    return static_cast<std::size_t>(n);
  }
  static cudaMemPool_t create(int card) {
    cudaMemPoolProps props = {};
    props.allocType = cudaMemAllocationTypePinned;
    props.location.type = cudaMemLocationTypeDevice, props.location.id = card;
    cudaMemPool_t p = nullptr;
    check(cudaMemPoolCreate(&p, &props), "cudaMemPoolCreate", "card " + std::to_string(card));
    return p;
  }
};

class BlasLt : public Owned<cublasLtHandle_t, cublasLtDestroy> {
 public:
  explicit BlasLt(int card) : Owned(create(card)) {}

 private:
  static cublasLtHandle_t create(int card) {
    const Current here(card);
    cublasLtHandle_t h = nullptr;
    check(cublasLtCreate(&h), "cublasLtCreate");
    return h;
  }
};

}  // namespace tinyllama::cuda
