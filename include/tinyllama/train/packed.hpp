// The paper's packed data sets ("LITPKDS"): files of token ids, written chunk by chunk and read in place.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <filesystem>
#include <limits>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <system_error>
#include <utility>
#include <vector>

#include "tinyllama/io/file.hpp"

namespace tinyllama {

// A file: 24 bytes of header (7 bytes LITPKDS, u64 version 1, u8 code of the id type, u64 ids; little-endian, no padding), then the ids.
// Documents follow one another without regard to blocks; a block is T + 1 ids, inputs and targets shifted by one.
//
// The end of the data. lit-gpt's builder fills its last chunk with a separator, and the paper's run was trained on that; its loader
// takes the size of one file, whichever comes first in shuffled order, for the size of all that the glob `PREFIX*` finds. So here:
//   PREFIX_0000000000.bin ...        full chunks, all of one size: what lit-gpt's loader finds, and may find
//   rest_PREFIX_0000000012.bin       what was left, whole blocks only, under a name that the glob does not match; we read it last
// Where not even one chunk is full, the only file has the usual name: one size is one size. Ids that fill no block are left out,
// and counted. Nothing is ever padding. Files of lit-gpt's that are: see trailing_run().

/// Types of an id in a file, by the format's codes. It has 6 and 7 as well: f32 and f64, which are no ids.
enum class TokenType : std::uint8_t { u8 = 1, i8 = 2, i16 = 3, i32 = 4, i64 = 5, u16 = 8 };

/// As lit-gpt chooses: u16 for vocabularies below 65500, else i32.
constexpr TokenType token_type_for(int vocab) { return vocab < 65500 ? TokenType::u16 : TokenType::i32; }

constexpr std::size_t token_bytes(TokenType t) {
  switch (t) {
    case TokenType::u8:
    case TokenType::i8: return 1;
    case TokenType::i16:
    case TokenType::u16: return 2;
    case TokenType::i32: return 4;
    case TokenType::i64: return 8;
  }
  return 0;
}

constexpr std::string_view name_of(TokenType t) {
  constexpr std::string_view names[] = {"", "u8", "i8", "i16", "i32", "i64", "", "", "u16"};
  return names[static_cast<int>(t)];
}

namespace detail {

inline constexpr std::string_view packed_magic = "LITPKDS";
inline constexpr std::size_t packed_header = 24;

/// f(pointer to the first id), with the pointer's type.
template <class F>
auto visit_tokens(TokenType t, const std::byte* at, F&& f) {
  switch (t) {
    case TokenType::u8: return f(reinterpret_cast<const std::uint8_t*>(at));
    case TokenType::i8: return f(reinterpret_cast<const std::int8_t*>(at));
    case TokenType::i16: return f(reinterpret_cast<const std::int16_t*>(at));
    case TokenType::i32: return f(reinterpret_cast<const std::int32_t*>(at));
    case TokenType::i64: return f(reinterpret_cast<const std::int64_t*>(at));
    default: return f(reinterpret_cast<const std::uint16_t*>(at));
  }
}

/// "PREFIX_0000000012.bin"
inline std::string packed_name(std::string_view prefix, std::uint64_t number) {
  const std::string digits = std::to_string(number);
  return std::string(prefix) + "_" + std::string(digits.size() < 10 ? 10 - digits.size() : 0, '0') + digits + ".bin";
}

}  // namespace detail

/// One file, mapped. Reading allocates nothing, and any number of threads may read.
class PackedFile {
 public:
  /// Throws Error naming the file where the header is not sound or the size is not the one that it says. Ids are not looked at.
  explicit PackedFile(const std::filesystem::path& path) : file_(path) {
    const auto bytes = file_.bytes();
    const std::string where = path.string();
    if (bytes.size() < detail::packed_header) throw Error(where, "header", "24 bytes", std::to_string(bytes.size()) + " (truncated)");
    if (std::memcmp(bytes.data(), detail::packed_magic.data(), detail::packed_magic.size()) != 0)
      throw Error(where, "header", "a packed data set, which begins with LITPKDS", "another kind of file");
    std::uint64_t version = 0, chunk = 0;
    std::memcpy(&version, &bytes[7], 8);
    std::memcpy(&chunk, &bytes[16], 8);
    const auto code = static_cast<int>(bytes[15]);
    if (version != 1) throw Error(where, "version", "1", std::to_string(version));
    if (code == 6 || code == 7) throw Error(where, "type", "integers", code == 6 ? "f32" : "f64");
    if (code < 1 || code > 8) throw Error(where, "type", "a code from 1 to 8", std::to_string(code));
    type_ = static_cast<TokenType>(code);
    const std::uint64_t data = bytes.size() - detail::packed_header, each = token_bytes(type_);
    if (data % each != 0 || data / each != chunk)
      throw Error(where, "size", std::to_string(chunk) + " ids of " + std::to_string(each) + " bytes after the header",
                  std::to_string(data) + " bytes" + (data / each < chunk ? " (truncated)" : ""));
    size_ = static_cast<std::int64_t>(chunk);
  }

  std::int64_t size() const { return size_; }  // ids
  TokenType type() const { return type_; }
  const std::filesystem::path& path() const { return file_.path(); }

  /// out[i] = the id at first + i. An id beyond 32 bits is given as -1, which no vocabulary has. Throws Error where the file is shorter.
  void read(std::int64_t first, std::span<std::int32_t> out) const {
    check_range(first, static_cast<std::int64_t>(out.size()));
    detail::visit_tokens(type_, at(first), [&](const auto* ids) {
      for (std::size_t i = 0; i < out.size(); ++i) out[i] = narrow(ids[i]);
    });
  }

  /// The first position in [first, first + count) whose id is not in [0, vocab), or nothing.
  std::optional<std::int64_t> find_outside(std::int64_t first, std::int64_t count, int vocab) const {
    check_range(first, count);
    const std::int64_t found = detail::visit_tokens(type_, at(first), [&](const auto* ids) {
      std::int64_t i = 0;
      while (i < count && narrow(ids[i]) >= 0 && narrow(ids[i]) < vocab) ++i;
      return i;
    });
    return found == count ? std::nullopt : std::optional(first + found);
  }

  /// Throws Error naming the file and the position of the first id in [first, first + count) that is not in [0, vocab).
  void check_ids(std::int64_t first, std::int64_t count, int vocab) const {
    const auto bad = find_outside(first, count, vocab);
    if (!bad) return;
    const std::string id = detail::visit_tokens(type_, at(*bad), [](const auto* ids) { return std::to_string(*ids); });
    throw Error(path().string(), "token " + std::to_string(*bad), "an id from 0 to " + std::to_string(vocab - 1), id);
  }
  void check_ids(int vocab) const { check_ids(0, size_, vocab); }

  /// How many ids at the end equal the last one. The last file that lit-gpt's builder wrote ends in a long run of its separator: padding.
  /// Of a file that does not, this reads the last page.
  std::int64_t trailing_run() const {
    return detail::visit_tokens(type_, at(0), [&](const auto* ids) {
      std::int64_t n = 0;
      while (n < size_ && ids[size_ - 1 - n] == ids[size_ - 1]) ++n;
      return n;
    });
  }

  /// Tells the system that blocks are read in no order: it need not read 128 KB for each page that is touched.
  void expect_random_reads() const {
    const auto bytes = file_.bytes();
    ::madvise(const_cast<std::byte*>(bytes.data()), bytes.size(), MADV_RANDOM);
  }
  /// Asks the system to bring [first, first + count) into memory, without waiting.
  void prefetch(std::int64_t first, std::int64_t count) const {
    check_range(first, count);
    const auto page = static_cast<std::uintptr_t>(::sysconf(_SC_PAGESIZE));
    const auto from = reinterpret_cast<std::uintptr_t>(at(first)) / page * page, to = reinterpret_cast<std::uintptr_t>(at(first + count));
    ::madvise(reinterpret_cast<void*>(from), to - from, MADV_WILLNEED);
  }

 private:
  template <class T>
  static std::int32_t narrow(T id) {
    if constexpr (sizeof(T) > sizeof(std::int32_t)) return id == static_cast<std::int32_t>(id) ? static_cast<std::int32_t>(id) : -1;
    else return static_cast<std::int32_t>(id);
  }
  const std::byte* at(std::int64_t position) const {  // aligned: the mapping is, and the header is three words
    return file_.bytes().data() + detail::packed_header + static_cast<std::size_t>(position) * token_bytes(type_);
  }
  void check_range(std::int64_t first, std::int64_t count) const {
    if (first < 0 || count < 0 || first > size_ || count > size_ - first)
      throw Error(path().string(), "tokens", "a range inside the " + std::to_string(size_), std::to_string(count) + " from " + std::to_string(first));
  }

  MappedFile file_;
  TokenType type_ = TokenType::u16;
  std::int64_t size_ = 0;
};

/// The files of a data set in reading order: all that `PREFIX*.bin` matches, by name, as lit-gpt's loader finds them, then `rest_PREFIX*.bin`.
/// Throws Error where there are none.
inline std::vector<std::filesystem::path> packed_files(const std::filesystem::path& folder, std::string_view prefix) {
  std::error_code error;
  std::vector<std::filesystem::path> files;
  const std::string rest = "rest_" + std::string(prefix);
  for (std::filesystem::directory_iterator it(folder, error), end; !error && it != end; it.increment(error)) {
    const std::string name = it->path().filename().string();
    std::error_code ignored;
    if (name.ends_with(".bin") && (name.starts_with(prefix) || name.starts_with(rest)) && it->is_regular_file(ignored)) files.push_back(it->path());
  }
  if (error) throw Error(folder.string(), "", "a readable folder", error.message());
  if (files.empty()) throw Error(folder.string(), "", "packed files named " + std::string(prefix) + "*.bin", "none");
  std::sort(files.begin(), files.end(), [&](const auto& a, const auto& b) {
    const std::string x = a.filename().string(), y = b.filename().string();
    const bool last_x = !x.starts_with(prefix), last_y = !y.starts_with(prefix);
    return last_x != last_y ? last_y : x < y;
  });
  return files;
}

struct PackedWriterOptions {
  std::int64_t block = 2049;         // ids of a block: T + 1
  std::int64_t chunk_blocks = 1024;  // blocks of a full file. Millions of ids are too few for many billions: a system maps some 65,000 files
  bool overwrite = false;            // files of an earlier set are removed before the first is written; else an Error: they would be read along
};

/// What has been written.
struct PackedSummary {
  std::int64_t tokens = 0;    // ids added
  std::int64_t leftover = 0;  // of these, the last ones, which fill no block and are in no file
  std::vector<std::filesystem::path> files;
};

/// Writes a data set. Each file appears under its name when it is complete. Memory: one chunk.
class PackedWriter {
 public:
  /// Makes the folder where it is missing. `vocab`: the ids' bound, which also chooses their type. Throws Error.
  PackedWriter(std::filesystem::path folder, std::string prefix, int vocab, PackedWriterOptions options = {})
      : folder_(std::move(folder)), prefix_(std::move(prefix)), vocab_(vocab), options_(options) {
    const std::string where = folder_.string();
    if (prefix_.empty() || prefix_.find('/') != prefix_.npos) throw Error(where, "prefix", "the beginning of a file name", "'" + prefix_ + "'");
    if (vocab < 1) throw Error(where, "vocab", "at least 1", std::to_string(vocab));
    if (options_.block < 2) throw Error(where, "block", "at least 2 tokens: one input, one target", std::to_string(options_.block));
    constexpr std::int64_t most = std::int64_t{1} << 32;
    if (options_.chunk_blocks < 1 || options_.chunk_blocks > most / options_.block)
      throw Error(where, "chunk_blocks", "1 to " + std::to_string(most / options_.block) + " blocks", std::to_string(options_.chunk_blocks));
    std::error_code error;
    std::filesystem::create_directories(folder_, error);
    if (error) throw Error(where, "", "a folder that can be made", error.message());
    if (const auto found = earlier_files(); !options_.overwrite && !found.empty())
      throw Error(where, prefix_, "no data set of this prefix yet, or the option overwrite", std::to_string(found.size()) + " files");
  }

  /// Appends ids; a document's separator, BOS and EOS are among them, or not. Throws Error for an id outside the vocabulary.
  void add(std::span<const std::int32_t> ids) {
    if (finished_) throw Error(folder_.string(), prefix_, "ids before finish()", "ids after it");
    for (const std::int32_t id : ids)
      if (id < 0 || id >= vocab_)
        throw Error(folder_.string(), prefix_ + ": token " + std::to_string(summary_.tokens), "an id from 0 to " + std::to_string(vocab_ - 1),
                    std::to_string(id));
      else
        put(id);
  }

  /// Writes the blocks that fill no chunk. Without it they are lost: a writer that is destroyed by an exception leaves full chunks only.
  const PackedSummary& finish() {
    if (std::exchange(finished_, true)) return summary_;
    summary_.leftover = pending() % options_.block;
    chunk_.resize(static_cast<std::size_t>(pending() - summary_.leftover) * each());
    if (summary_.files.empty() && chunk_.empty()) remove_earlier();  // as write() would have
    if (!chunk_.empty()) write((summary_.files.empty() ? "" : "rest_") + detail::packed_name(prefix_, summary_.files.size()));
    return summary_;
  }

  const PackedSummary& summary() const { return summary_; }

 private:
  std::size_t each() const { return token_bytes(token_type_for(vocab_)); }
  std::int64_t pending() const { return static_cast<std::int64_t>(chunk_.size() / each()); }

  void put(std::int32_t id) {
    const auto bytes = std::as_bytes(std::span(&id, 1)).first(each());  // little-endian: the low bytes come first
    chunk_.insert(chunk_.end(), bytes.begin(), bytes.end());
    ++summary_.tokens;
    if (pending() == options_.block * options_.chunk_blocks) write(detail::packed_name(prefix_, summary_.files.size()));
  }

  void write(const std::string& name) {
    if (summary_.files.empty()) remove_earlier();  // not sooner: an error before the first file costs nothing
    write_file_atomically(folder_ / name, [&](FileWriter& file) {
      file.write(detail::packed_magic);
      file.write_value(std::uint64_t{1});
      file.write_value(static_cast<std::uint8_t>(token_type_for(vocab_)));
      file.write_value(static_cast<std::uint64_t>(pending()));
      file.write(chunk_);
    });
    summary_.files.push_back(folder_ / name);
    chunk_.clear();
  }

  /// Only names that this writer itself gives: "train" leaves "train_math_0000000000.bin" alone.
  std::vector<std::filesystem::path> earlier_files() const {
    std::error_code error;
    std::vector<std::filesystem::path> found;
    for (std::filesystem::directory_iterator it(folder_, error), end; !error && it != end; it.increment(error)) {
      const std::string name = it->path().filename().string();
      std::string_view rest = name;
      if (rest.starts_with("rest_" + prefix_ + "_")) rest.remove_prefix(5);
      if (!rest.starts_with(prefix_ + "_") || !rest.ends_with(".bin")) continue;
      rest = rest.substr(prefix_.size() + 1, rest.size() - prefix_.size() - 5);
      if (rest.size() >= 10 && rest.find_first_not_of("0123456789") == rest.npos) found.push_back(it->path());
    }
    if (error) throw Error(folder_.string(), "", "a readable folder", error.message());
    return found;
  }
  void remove_earlier() const {
    std::error_code error;
    for (const auto& path : earlier_files())
      if (!std::filesystem::remove(path, error) || error) throw Error(path.string(), "", "a file that can be removed", error.message());
  }

  std::filesystem::path folder_;
  std::string prefix_;
  int vocab_;
  PackedWriterOptions options_;
  std::vector<std::byte> chunk_;
  PackedSummary summary_;
  bool finished_ = false;
};

}  // namespace tinyllama
