// A folder that appears under its name only when all of it is on the disk, and that disappears at once.
#pragma once

#include <fcntl.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstdio>
#include <filesystem>
#include <string>
#include <string_view>
#include <system_error>
#include <utility>
#include <vector>

#include "tinyllama/io/file.hpp"

namespace tinyllama {

namespace detail {

/// Content (of a file) or names (of a folder) down to the disk. A file system that cannot sync folders is not an Error: FAT, some network ones.
inline void sync_path(const std::filesystem::path& path, bool folder) {
  const Descriptor fd(::open(path.c_str(), O_RDONLY | O_CLOEXEC | (folder ? O_DIRECTORY : 0)));
  if ((fd.get() < 0 || ::fsync(fd.get()) != 0) && !folder) throw Error(path.string(), "", "a file that can be written", errno_text(errno));
}

}  // namespace detail

/// Builds ROOT/NAME in ROOT/.NAME.part. Until commit() nobody sees it, and afterwards whole: a process that is killed at any moment leaves
/// at most a hidden temporary, which the next AtomicFolder with that root removes. While one lives, its root is locked (flock):
/// a second one is an Error.
class AtomicFolder {
 public:
  /// Makes the root where it is missing. `prefix` begins the names of all folders that are built in this root, so that no one else's
  /// hidden files are taken for stale temporaries. Throws Error.
  AtomicFolder(std::filesystem::path root, std::string prefix, std::string_view rest)
      : root_(std::move(root)), prefix_(std::move(prefix)), name_(prefix_ + std::string(rest)), part_(part_path(root_, name_)) {
    std::error_code error;
    std::filesystem::create_directories(root_, error);
    if (!std::filesystem::is_directory(root_)) throw Error(root_.string(), "", "a folder that can be made", error ? error.message() : "a file");
    lock_ = detail::Descriptor(::open(root_.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC));
    // Where a file system has no locks, the caller alone sees to it that one process writes.
    if (lock_.get() >= 0 && ::flock(lock_.get(), LOCK_EX | LOCK_NB) != 0 && errno == EWOULDBLOCK)
      throw Error(root_.string(), "", "one process that writes here", "another one at it");
    remove_stale();
    if (::mkdir(part_.c_str(), 0777) != 0) throw Error(part_.string(), "", "a folder that can be made", detail::errno_text(errno));
  }
  AtomicFolder(const AtomicFolder&) = delete;
  AtomicFolder& operator=(const AtomicFolder&) = delete;
  ~AtomicFolder() {
    std::error_code ignored;
    if (!committed_) std::filesystem::remove_all(part_, ignored);
  }

  /// Where to write, until commit(); also for other processes, which know it by root and name.
  static std::filesystem::path part_path(const std::filesystem::path& root, const std::string& name) { return root / ("." + name + ".part"); }
  const std::filesystem::path& path() const { return part_; }
  std::filesystem::path final_path() const { return root_ / name_; }

  /// Syncs all files, then gives the folder its name. One that has the name already is replaced; it stays readable until then. Throws Error.
  void commit() {
    std::vector<std::filesystem::path> folders{part_};
    std::error_code error;
    const std::filesystem::recursive_directory_iterator end;
    for (std::filesystem::recursive_directory_iterator it(part_, error); it != end; it.increment(error)) {
      if (it->is_directory()) folders.push_back(it->path());
      else detail::sync_path(it->path(), false);
    }
    if (error) throw Error(part_.string(), "", "a folder that can be read", error.message());
    for (const auto& folder : folders) detail::sync_path(folder, true);
    const bool replaced = rename_over();
    committed_ = true;
    detail::sync_path(root_, true);
    if (replaced) std::filesystem::remove_all(part_, error);
  }

  /// Removes ROOT/NAME, which is first hidden, so that no one finds half of it. What cannot be removed is tried again by the next AtomicFolder.
  void remove(const std::string& name) const {
    const std::filesystem::path old = hidden(name, ".old");
    std::error_code ignored;
    if (std::rename((root_ / name).c_str(), old.c_str()) == 0) std::filesystem::remove_all(old, ignored);
  }

 private:
  std::filesystem::path hidden(const std::string& name, std::string_view suffix) const { return root_ / ("." + name + std::string(suffix)); }

  /// Those of killed runs: whoever holds the lock knows that no living one has any.
  void remove_stale() const {
    std::error_code error;
    std::vector<std::filesystem::path> stale;
    for (auto it = std::filesystem::directory_iterator(root_, error); it != std::filesystem::directory_iterator(); it.increment(error)) {
      const std::string name = it->path().filename().string();
      if (name.starts_with("." + prefix_) && (name.ends_with(".part") || name.ends_with(".old"))) stale.push_back(it->path());
    }
    for (const auto& path : stale) std::filesystem::remove_all(path, error);
  }

  /// Returns whether the temporary name now holds what had the name before.
  bool rename_over() const {
    const std::filesystem::path to = final_path();
    if (std::rename(part_.c_str(), to.c_str()) == 0) return false;
    if (errno == ENOTEMPTY || errno == EEXIST) {
#if defined(RENAME_EXCHANGE)
      if (::renameat2(AT_FDCWD, part_.c_str(), AT_FDCWD, to.c_str(), RENAME_EXCHANGE) == 0) return true;
#endif
      remove(name_);  // no exchange in one step here: for a moment there is neither
      if (std::rename(part_.c_str(), to.c_str()) == 0) return false;
    }
    throw Error(to.string(), "", "a place that can be written", detail::errno_text(errno));
  }

  std::filesystem::path root_;
  std::string prefix_, name_;
  std::filesystem::path part_;
  detail::Descriptor lock_;
  bool committed_ = false;
};

}  // namespace tinyllama
