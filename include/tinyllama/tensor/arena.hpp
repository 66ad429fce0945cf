// Arena: many short-lived tensors out of one buffer, so that a step allocates nothing; and the same code, without memory, as the plan.
#pragma once

#include <algorithm>
#include <cstddef>
#include <limits>
#include <string>

#include "tinyllama/tensor/tensor.hpp"

namespace tinyllama {

/// A bump allocator over one buffer of a device. Every piece starts on a 64-byte boundary; pieces are given back together, by reset().
///   Arena<Cpu> plan;                 // sizing: hands out views of no memory and counts
///   step_buffers(plan, rows);        // code that takes its tensors from an arena
///   Arena arena(dev, plan.peak());   // exactly enough
template <class Device>
class Arena {
 public:
  static constexpr std::size_t alignment = 64;

  /// Sizing mode: take() returns views at the null pointer, of which only the shape may be used.
  constexpr Arena() = default;

  /// `capacity` bytes, allocated now. The device must outlive the arena.
  Arena(const Device& device, std::size_t capacity) : device_(&device), capacity_(rounded(capacity)), buffer_(device.allocate(capacity_)) {}
  Arena(const Arena&) = delete;
  Arena& operator=(const Arena&) = delete;
  constexpr ~Arena() {
    if (buffer_) device_->deallocate(buffer_);
  }

  /// An uninitialised, contiguous view; one number for each dynamic extent. Throws Error when the buffer is full.
  template <class T, index_t... E, class... I>
  constexpr View<T, E...> take(I... dynamic) {
    const auto shape = detail::fill_extents<E...>(dynamic...);
    const std::size_t bytes = rounded(detail::checked_bytes<T>(shape));
    if (bytes > capacity_ - used_)
      throw Error("Arena", detail::shape_text(shape), std::to_string(bytes) + " bytes free",
                  std::to_string(capacity_ - used_) + " of " + std::to_string(capacity_));
    T* data = nullptr;
    if (buffer_) data = reinterpret_cast<T*>(buffer_ + used_);
    used_ += bytes;
    peak_ = std::max(peak_, used_);
    return {data, shape};
  }

  /// Where the next piece starts; reset(mark()) gives back everything taken in between.
  constexpr std::size_t mark() const { return used_; }
  constexpr void reset(std::size_t mark = 0) { used_ = std::min(used_, mark); }

  constexpr bool sizing() const { return buffer_ == nullptr; }
  constexpr std::size_t used() const { return used_; }
  /// The most bytes ever in use at once: the capacity that would have been enough.
  constexpr std::size_t peak() const { return peak_; }
  constexpr std::size_t capacity() const { return capacity_; }

 private:
  static constexpr std::size_t rounded(std::size_t bytes) { return (bytes + alignment - 1) / alignment * alignment; }
  const Device* device_ = nullptr;
  std::size_t capacity_ = std::numeric_limits<std::size_t>::max() / 2 / alignment * alignment;
  std::byte* buffer_ = nullptr;
  std::size_t used_ = 0, peak_ = 0;
};

/// Gives back on leaving the block what was taken within it.
template <class Device>
class ArenaScope {
 public:
  constexpr explicit ArenaScope(Arena<Device>& arena) : arena_(arena), mark_(arena.mark()) {}
  constexpr ~ArenaScope() { arena_.reset(mark_); }
  ArenaScope(const ArenaScope&) = delete;
  ArenaScope& operator=(const ArenaScope&) = delete;

 private:
  Arena<Device>& arena_;
  std::size_t mark_;
};

}  // namespace tinyllama
