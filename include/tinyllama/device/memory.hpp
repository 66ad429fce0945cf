// A block of a device's memory, owned.
#pragma once

#include <cstddef>
#include <utility>

#include "tinyllama/device/device.hpp"

namespace tinyllama {

/// Move-only owner of `bytes` of device memory; the device outlives it.
template <Device D>
class Memory {
 public:
  Memory() = default;
  Memory(D& dev, std::size_t bytes) : dev_(&dev), data_(dev.allocate(bytes)), bytes_(bytes) {}
  Memory(Memory&& o) noexcept : dev_(o.dev_), data_(std::exchange(o.data_, nullptr)), bytes_(std::exchange(o.bytes_, 0)) {}
  Memory& operator=(Memory&& o) noexcept {
    std::swap(dev_, o.dev_), std::swap(data_, o.data_), std::swap(bytes_, o.bytes_);
    return *this;
  }
  ~Memory() {
    if (data_) dev_->deallocate(data_);
  }
  std::byte* data() const { return data_; }
  std::size_t bytes() const { return bytes_; }
  D& device() const { return *dev_; }

 private:
  D* dev_ = nullptr;
  std::byte* data_ = nullptr;
  std::size_t bytes_ = 0;
};

}  // namespace tinyllama
