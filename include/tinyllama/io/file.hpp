// Files: a read-only memory mapping, and a buffered writer whose result appears under its name only when it is complete.
#pragma once

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <bit>
#include <cerrno>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <filesystem>
#include <functional>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "tinyllama/error.hpp"

namespace tinyllama {

static_assert(std::endian::native == std::endian::little, "the file formats are little-endian and are read in place");

/// Called now and then during long work. Bytes done, bytes in all.
using Progress = std::function<void(std::uint64_t done, std::uint64_t total)>;

namespace detail {

/// A file descriptor that closes itself.
class Descriptor {
 public:
  explicit Descriptor(int fd = -1) : fd_(fd) {}
  Descriptor(Descriptor&& other) noexcept : fd_(std::exchange(other.fd_, -1)) {}
  Descriptor& operator=(Descriptor&& other) noexcept {
    std::swap(fd_, other.fd_);
    return *this;
  }
  ~Descriptor() {
    if (fd_ >= 0) ::close(fd_);
  }
  int get() const { return fd_; }

 private:
  int fd_;
};

inline std::string errno_text(int e) { return std::error_code(e, std::generic_category()).message(); }

}  // namespace detail

/// A whole file, mapped read-only. The pages are read when touched. Cutting the file short while it is mapped is the
/// caller's to avoid, as with any mapping (the system answers with SIGBUS).
class MappedFile {
 public:
  /// Throws Error naming `path` where it is missing, unreadable, a folder or empty.
  explicit MappedFile(const std::filesystem::path& path) : path_(path) {
    // O_NONBLOCK: opening a pipe by mistake would otherwise wait for its writer
    const detail::Descriptor fd(::open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK));
    if (fd.get() < 0) throw Error(path.string(), "", "a readable file", detail::errno_text(errno));
    struct ::stat status {};
    if (::fstat(fd.get(), &status) != 0) throw Error(path.string(), "", "a readable file", detail::errno_text(errno));
    if (S_ISDIR(status.st_mode)) throw Error(path.string(), "", "a file", "a folder");
    if (!S_ISREG(status.st_mode)) throw Error(path.string(), "", "a regular file", "something else");
    if (status.st_size <= 0) throw Error(path.string(), "", "a file with content", "0 bytes");
    size_ = static_cast<std::size_t>(status.st_size);
    void* const at = ::mmap(nullptr, size_, PROT_READ, MAP_PRIVATE, fd.get(), 0);
    if (at == MAP_FAILED) throw Error(path.string(), "", "a file that can be mapped", detail::errno_text(errno));
    data_ = static_cast<const std::byte*>(at);
  }
  MappedFile(MappedFile&& other) noexcept
      : path_(std::move(other.path_)), data_(std::exchange(other.data_, nullptr)), size_(std::exchange(other.size_, 0)) {}
  MappedFile& operator=(MappedFile&& other) noexcept {
    std::swap(path_, other.path_);
    std::swap(data_, other.data_);
    std::swap(size_, other.size_);
    return *this;
  }
  ~MappedFile() {
    if (data_) ::munmap(const_cast<std::byte*>(data_), size_);
  }

  /// Stays valid, at the same address, when the MappedFile is moved.
  std::span<const std::byte> bytes() const { return {data_, size_}; }
  const std::filesystem::path& path() const { return path_; }

  bool holds(std::span<const std::byte> part) const {
    const std::less_equal<const std::byte*> le;
    return data_ && le(data_, part.data()) && le(part.data() + part.size(), data_ + size_);
  }

  /// Gives the whole pages inside `part` back to the system; they are read again when touched. What lies outside the file is left alone.
  void release(std::span<const std::byte> part) const {
    if (!holds(part)) return;
    const auto page = static_cast<std::size_t>(::sysconf(_SC_PAGESIZE));
    const auto offset = static_cast<std::size_t>(part.data() - data_);
    const std::size_t first = (offset + page - 1) / page * page, last = (offset + part.size()) / page * page;
    if (first < last) ::madvise(const_cast<std::byte*>(data_) + first, last - first, MADV_DONTNEED);
  }

 private:
  std::filesystem::path path_;
  const std::byte* data_ = nullptr;
  std::size_t size_ = 0;
};

/// Writes through a buffer, so that rows of any length cost no system call each.
class FileWriter {
 public:
  FileWriter(detail::Descriptor fd, std::string name) : fd_(std::move(fd)), name_(std::move(name)) { buffer_.reserve(capacity); }

  void write(std::span<const std::byte> bytes) {
    position_ += bytes.size();
    while (!bytes.empty()) {
      const std::size_t n = std::min(bytes.size(), capacity - buffer_.size());
      buffer_.insert(buffer_.end(), bytes.begin(), bytes.begin() + static_cast<std::ptrdiff_t>(n));
      bytes = bytes.subspan(n);
      if (buffer_.size() == capacity) flush();
    }
  }
  void write(std::string_view text) { write(std::as_bytes(std::span(text.data(), text.size()))); }
  template <class T>
    requires std::is_arithmetic_v<T>
  void write_value(T value) { write(std::as_bytes(std::span(&value, 1))); }
  void write_zeros(std::uint64_t n) {
    constexpr std::byte zeros[64]{};
    for (; n > 0; n -= std::min<std::uint64_t>(n, sizeof zeros)) write({zeros, static_cast<std::size_t>(std::min<std::uint64_t>(n, sizeof zeros))});
  }
  /// Bytes written so far.
  std::uint64_t position() const { return position_; }

  /// Down to the disk, so that the rename that follows cannot outlive the content.
  void sync() {
    flush();
    if (::fsync(fd_.get()) != 0) throw Error(name_, "", "a file that can be written", detail::errno_text(errno));
  }

 private:
  static constexpr std::size_t capacity = std::size_t{1} << 20;
  void flush() {
    std::span<const std::byte> rest = buffer_;
    while (!rest.empty()) {
      const ::ssize_t n = ::write(fd_.get(), rest.data(), rest.size());
      if (n < 0 && errno == EINTR) continue;
      if (n <= 0) throw Error(name_, "", "a file that can be written", detail::errno_text(errno));
      rest = rest.subspan(static_cast<std::size_t>(n));
    }
    buffer_.clear();
  }
  detail::Descriptor fd_;
  std::string name_;
  std::vector<std::byte> buffer_;
  std::uint64_t position_ = 0;
};

/// Calls `write(FileWriter&)` on a temporary file beside `path`, then renames it to `path`: readers see the old content or
/// the whole new one. Where `write` throws, nothing is left behind. Throws Error naming `path`.
template <class Write>
void write_file_atomically(const std::filesystem::path& path, Write&& write) {
  const std::string name = path.string();
  std::string temporary;
  detail::Descriptor fd;
  for (int attempt = 0; fd.get() < 0; ++attempt) {
    temporary = name + ".part-" + std::to_string(::getpid()) + "-" + std::to_string(attempt);
    fd = detail::Descriptor(::open(temporary.c_str(), O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0666));
    if (fd.get() < 0 && (errno != EEXIST || attempt == 1000)) throw Error(name, "", "a place that can be written", detail::errno_text(errno));
  }
  try {
    FileWriter file(std::move(fd), name);
    write(file);
    file.sync();
    if (std::rename(temporary.c_str(), name.c_str()) != 0) throw Error(name, "", "a place that can be written", detail::errno_text(errno));
  } catch (...) {
    ::unlink(temporary.c_str());
    throw;
  }
  const std::filesystem::path parent = path.has_parent_path() ? path.parent_path() : std::filesystem::path(".");
  const detail::Descriptor folder(::open(parent.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC));
  if (folder.get() >= 0) ::fsync(folder.get());  // the name itself; some file systems refuse, and the content is safe already
}

}  // namespace tinyllama
