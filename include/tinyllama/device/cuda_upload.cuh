// Small arrays to the card without waiting: written into pinned memory, one asynchronous copy, in the stream's order.
#pragma once

#include <algorithm>
#include <array>
#include <bit>

#include "tinyllama/device/cuda_runtime.cuh"

namespace tinyllama::cuda {

/// Memory of a pool that grows on demand; what it held is lost then.
class PoolMemory {
 public:
  PoolMemory(int card, cudaMemPool_t pool, cudaStream_t stream) : card_(card), pool_(pool), stream_(stream) {}
  PoolMemory(const PoolMemory&) = delete;
  PoolMemory& operator=(const PoolMemory&) = delete;
  ~PoolMemory() { release(); }
  std::byte* reserve(std::size_t bytes) {
    if (bytes > bytes_) {
      const Current here(card_);
      release();
      check(cudaMallocFromPoolAsync(&data_, bytes, pool_, stream_), "cudaMallocFromPoolAsync", std::to_string(bytes) + " bytes");
      bytes_ = bytes;
    }
    return data();
  }
  std::byte* data() const { return static_cast<std::byte*>(data_); }
  std::size_t size() const { return bytes_; }

 private:
  void release() {
    if (data_) cudaFreeAsync(data_, stream_);
    data_ = nullptr, bytes_ = 0;
  }
  int card_;
  cudaMemPool_t pool_;
  cudaStream_t stream_;
  void* data_ = nullptr;
  std::size_t bytes_ = 0;
};

/// One array at a time on the card, replaced by each send(). The host may run a few sends ahead of the stream before it waits.
class Upload {
 public:
  Upload(int card, cudaMemPool_t pool, cudaStream_t stream) : card_(card), stream_(stream), memory_(card, pool, stream) {}

  /// Memory for the next array, to be written by the host.
  std::byte* begin(std::size_t bytes) {
    Slot& s = slots_[next_];
    if (s.used) s.copied.synchronize();
    bytes_ = bytes;
    return s.pinned.reserve(std::bit_ceil(std::max<std::size_t>(bytes, std::size_t{1} << 14)));
  }
  /// Sends it; where it will be.
  std::byte* send() {
    const Current here(card_);
    Slot& s = slots_[next_];
    std::byte* to = memory_.reserve(std::bit_ceil(std::max<std::size_t>(bytes_, std::size_t{1} << 14)));  // stays in place while it grows little by little
    if (bytes_) check(cudaMemcpyAsync(to, s.pinned.reserve(bytes_), bytes_, cudaMemcpyHostToDevice, stream_), "cudaMemcpyAsync", "a step's ids and pages");
    if (!s.used) s.copied = Event(), s.used = true;
    s.copied.record(stream_);
    next_ = (next_ + 1) % slots_.size();
    return to;
  }

 private:
  struct Slot {
    Pinned pinned;
    Event copied{Event::none()};
    bool used = false;
  };
  int card_;
  cudaStream_t stream_;
  PoolMemory memory_;
  std::array<Slot, 4> slots_;
  std::size_t next_ = 0, bytes_ = 0;
};

}  // namespace tinyllama::cuda
