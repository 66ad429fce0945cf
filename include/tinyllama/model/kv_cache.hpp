// The KV cache as a value: pages of 64 positions, shared by copies until one of them writes.
#pragma once

#include <algorithm>
#include <cstring>
#include <filesystem>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "tinyllama/device/memory.hpp"
#include "tinyllama/io/file.hpp"

namespace tinyllama {

/// Keys and values of one sequence. A copy shares all pages and costs a few hundred bytes; a page is copied when one of its owners
/// writes to it, which can only be the last one. Not to be used by two threads at a time; copies may be.
template <Device D>
class KvCache {
 public:
  KvCache(D& dev, const CacheShape& shape, index_t context) : dev_(&dev), shape_(shape), context_(context) {}

  index_t length() const { return length_; }
  /// The most positions that fit: the model's context.
  index_t context() const { return context_; }
  const CacheShape& shape() const { return shape_; }
  /// Bytes of the pages that this cache holds, shared ones included.
  std::size_t bytes() const { return pages_.size() * static_cast<std::size_t>(shape_.page_bytes()); }

  /// Forgets positions from `length` on. Their pages stay, for what follows.
  void truncate(index_t length) {
    if (length < 0 || length > length_) throw Error("KvCache::truncate", "length", "0.." + std::to_string(length_), std::to_string(length));
    length_ = length;
  }

  /// Pages for positions [0, tokens), so that no step before allocates. Error where the model's context is shorter.
  void reserve(index_t tokens) {
    if (tokens > context_) throw Error("KvCache", "positions", "at most the context of " + std::to_string(context_), std::to_string(tokens));
    while (static_cast<index_t>(pages_.size()) * page_tokens < tokens) add_page();
  }

  /// Makes room for `tokens` positions behind the last one, in pages that belong to this cache alone, and returns all pages.
  std::byte* const* open(index_t tokens) {
    reserve(length_ + tokens);
    for (index_t p = length_ / page_tokens; p * page_tokens < length_ + tokens; ++p) {
      auto& page = pages_[static_cast<std::size_t>(p)];
      if (page.use_count() == 1) continue;
      auto own = std::make_shared<Memory<D>>(*dev_, static_cast<std::size_t>(shape_.page_bytes()));
      dev_->copy_bytes(own->data(), page->data(), own->bytes());
      page = own;
      base_[static_cast<std::size_t>(p)] = own->data();
    }
    return base_.data();
  }
  /// The tokens that open() made room for are written.
  void advance(index_t tokens) { length_ += tokens; }

  std::byte* const* pages() const { return base_.data(); }

  /// Writes the cache to a file, atomically, and `extra` bytes of the caller's behind it.
  void save(const std::filesystem::path& path, std::span<const std::byte> extra = {}) const {
    write_file_atomically(path, [&](FileWriter& out) {
      const Header h = header(extra.size());
      out.write(std::as_bytes(std::span(&h, 1)));
      typename D::Staging staging;
      for (index_t p = 0; p * page_tokens < length_; ++p)
        out.write(dev_->host(View<const std::byte, dyn>(base_[static_cast<std::size_t>(p)], {shape_.page_bytes()}), staging).span());
      out.write(extra);
    });
  }
  /// Replaces the contents by what save() wrote and returns the extra bytes. Error where the file is of another shape or truncated; the cache
  /// is then unchanged.
  std::vector<std::byte> restore(const std::filesystem::path& path) {
    const MappedFile file(path);
    Header h;
    const auto bytes = file.bytes();
    if (bytes.size() < sizeof h) throw Error(path.string(), "header", std::to_string(sizeof h) + " bytes", std::to_string(bytes.size()));
    std::memcpy(&h, bytes.data(), sizeof h);
    const Header mine = header();
    if (std::memcmp(h.magic, mine.magic, sizeof h.magic) != 0) throw Error(path.string(), "magic", "a saved KV cache", "another kind of file");
    if (std::memcmp(h.shape, mine.shape, sizeof h.shape) != 0) throw Error(path.string(), "shape", describe(mine), describe(h));
    if (h.length < 0 || h.length > context_) throw Error(path.string(), "length", "0.." + std::to_string(context_), std::to_string(h.length));
    const auto size = static_cast<std::size_t>(shape_.page_bytes()), count = static_cast<std::size_t>((h.length + page_tokens - 1) / page_tokens);
    const std::size_t expected = sizeof h + count * size + static_cast<std::size_t>(h.extra);
    if (h.extra < 0 || bytes.size() != expected) throw Error(path.string(), "size", std::to_string(expected) + " bytes", std::to_string(bytes.size()));
    KvCache fresh(*dev_, shape_, context_);
    fresh.reserve(h.length);
    for (std::size_t p = 0; p < count; ++p) dev_->upload(fresh.base_[p], bytes.data() + sizeof h + p * size, size);
    fresh.length_ = h.length;
    *this = std::move(fresh);
    return {bytes.end() - static_cast<std::ptrdiff_t>(h.extra), bytes.end()};
  }

 private:
  struct Header {
    char magic[8];
    std::int64_t shape[6];
    std::int64_t length, extra;
  };
  Header header(std::size_t extra = 0) const {
    return {{'t', 'l', 'k', 'v', '0', '0', '0', '1'},
            {static_cast<std::int64_t>(shape_.format), shape_.layers, shape_.kv_heads, shape_.head_dim, page_tokens, D::cache_order}, length_,
            static_cast<std::int64_t>(extra)};
  }
  static std::string describe(const Header& h) {
    const bool known = h.shape[0] >= 0 && h.shape[0] < static_cast<std::int64_t>(formats.size());
    return (known ? std::string(name(static_cast<Format>(h.shape[0]))) : "format " + std::to_string(h.shape[0])) + ", " + std::to_string(h.shape[1]) + " layers, " +
           std::to_string(h.shape[2]) + " KV heads of " + std::to_string(h.shape[3]) + ", pages of " + std::to_string(h.shape[4]) + (h.shape[5] == 0 ? "" : h.shape[5] == 1 ? ", in CUDA's order" : ", in an unknown order");
  }
  void add_page() {
    pages_.push_back(std::make_shared<Memory<D>>(*dev_, static_cast<std::size_t>(shape_.page_bytes())));
    base_.push_back(pages_.back()->data());
  }

  D* dev_;
  CacheShape shape_;
  index_t context_, length_ = 0;
  std::vector<std::shared_ptr<Memory<D>>> pages_;
  std::vector<std::byte*> base_;  // data of each page, as the kernels take them
};

}  // namespace tinyllama
