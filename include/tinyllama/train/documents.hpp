// Documents to train on: plain text and JSONL, .zst of both, read as a stream in bounded memory.
#pragma once

#include <cerrno>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <filesystem>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "tinyllama/io/file.hpp"
#include "tinyllama/io/json.hpp"

// libzstd is optional. Where its header is found it is used, and a program that reads documents links it (-lzstd; our CMake does).
// Define TINYLLAMA_ZSTD as 0 to do without: .zst files are then an Error.
#if !defined(TINYLLAMA_ZSTD)
#if __has_include(<zstd.h>)
#define TINYLLAMA_ZSTD 1
#else
#define TINYLLAMA_ZSTD 0
#endif
#endif
#if TINYLLAMA_ZSTD
#include <zstd.h>
#endif

namespace tinyllama {

struct DocumentOptions {
  /// By name: .jsonl, .ndjson and .json are JSONL, all else is text; .zst is taken off first.
  enum class Kind { by_name, text, jsonl };
  /// Of text, a document is: the whole file, a stretch without a blank line, or what ends at a line that is `separator`.
  enum class Split { file, blank_lines, separator };
  Kind kind = Kind::by_name;
  Split split = Split::file;
  std::string separator = "";
  std::string field = "text";                     // of a JSONL object; the others are not looked at
  std::size_t max_bytes = std::size_t{64} << 20;  // of a document, and of a line of JSON: longer ones are an Error
};

/// A document's text and where it began.
struct Document {
  std::string text;
  std::uint64_t line = 0;  // from 1
};

namespace detail {

/// A file's bytes in pieces, decompressed where they are zstd's (told by the magic number).
class ByteStream {
 public:
  explicit ByteStream(const std::filesystem::path& path) : name_(path.string()), fd_(::open(path.c_str(), O_RDONLY | O_CLOEXEC)), in_(piece) {
    if (fd_.get() < 0) throw Error(name_, "", "a readable file", errno_text(errno));
    struct ::stat status {};
    if (::fstat(fd_.get(), &status) == 0 && S_ISDIR(status.st_mode)) throw Error(name_, "", "a file", "a folder");
    while (in_end_ < 4 && fill()) {}
    std::uint32_t magic = 0;
    if (in_end_ >= 4) std::memcpy(&magic, in_.data(), 4);
    const bool compressed = magic == 0xfd2fb528 || (magic & 0xfffffff0) == 0x184d2a50;  // a frame, or one to be skipped
    if (!compressed && path.extension() == ".zst") throw Error(name_, "", "zstd's format, as the name says", "other content");
    if (compressed) start_zstd();
  }

  /// The next bytes, valid until the next call; empty at the end. Throws Error where compressed data is damaged or cut short.
  std::string_view next() {
#if TINYLLAMA_ZSTD
    if (zstd_) return next_decompressed();
#endif
    if (in_end_ == 0) fill();
    return {in_.data(), std::exchange(in_end_, 0)};
  }
  const std::string& name() const { return name_; }

 private:
  static constexpr std::size_t piece = std::size_t{1} << 18;

  /// Appends to in_; false at the end of the file.
  bool fill() {
    ::ssize_t n = 0;
    while ((n = ::read(fd_.get(), in_.data() + in_end_, in_.size() - in_end_)) < 0 && errno == EINTR) {}
    if (n < 0) throw Error(name_, "", "a file that can be read", errno_text(errno));
    in_end_ += static_cast<std::size_t>(n);
    return n > 0;
  }

#if TINYLLAMA_ZSTD
  void start_zstd() {
    zstd_.reset(ZSTD_createDStream());
    if (!zstd_) throw Error(name_, "", "memory to decompress", "none");
    out_.resize(piece);
  }
  std::string_view next_decompressed() {
    for (;;) {
      if (in_at_ == in_end_ && !more_) {
        in_at_ = in_end_ = 0;
        if (!fill()) {
          if (inside_frame_) throw Error(name_, "zstd", "the rest of a frame", "the end of the file (truncated)");
          return {};
        }
      }
      ZSTD_inBuffer in{in_.data(), in_end_, in_at_};
      ZSTD_outBuffer out{out_.data(), out_.size(), 0};
      const std::size_t result = ZSTD_decompressStream(zstd_.get(), &out, &in);
      if (ZSTD_isError(result)) throw Error(name_, "zstd", "sound data", ZSTD_getErrorName(result));
      inside_frame_ = result != 0;
      more_ = inside_frame_ && out.pos == out.size;  // then the library may have output that needs no input (1.5 also holds a byte of input back)
      in_at_ = in.pos;
      if (out.pos > 0) return {out_.data(), out.pos};
    }
  }
  struct Free {
    void operator()(ZSTD_DStream* s) const { ZSTD_freeDStream(s); }
  };
  std::unique_ptr<ZSTD_DStream, Free> zstd_;
  std::vector<char> out_;
  bool inside_frame_ = false, more_ = false;
#else
  void start_zstd() const {
    throw Error(name_, "", "text, since this program was built without libzstd (Debian: libzstd-dev), or the output of zstd -d", "zstd's format");
  }
#endif

  std::string name_;
  Descriptor fd_;
  std::vector<char> in_;
  std::size_t in_end_ = 0;
#if TINYLLAMA_ZSTD
  std::size_t in_at_ = 0;
#endif
};

}  // namespace detail

/// Gives the documents of one file, one after another.
class DocumentReader {
 public:
  /// Throws Error where the file cannot be read, or is compressed and libzstd is not there.
  explicit DocumentReader(const std::filesystem::path& path, DocumentOptions options = {}) : bytes_(path), options_(std::move(options)) {
    using Kind = DocumentOptions::Kind;
    auto name = path.filename();
    if (name.extension() == ".zst") name = name.stem();
    const auto ending = name.extension();
    if (options_.kind == Kind::by_name)
      options_.kind = ending == ".jsonl" || ending == ".ndjson" || ending == ".json" ? Kind::jsonl : Kind::text;
  }

  /// The next document, or nothing at the end. Text is given as its bytes are, without the newline at its end; documents without text are
  /// left out. Throws Error naming file and line: a line or document over the limit, invalid JSON, no string of the name.
  std::optional<Document> next() {
    if (options_.kind == DocumentOptions::Kind::jsonl) return next_json();
    Document d;
    std::string line;
    while (next_line(line)) {
      const bool end = options_.split == DocumentOptions::Split::blank_lines ? line.find_first_not_of(" \t\r\f\v") == line.npos
                       : options_.split == DocumentOptions::Split::separator && without_return(line) == options_.separator;
      if (end && !blank(d.text)) break;
      if (end) {
        d = {};
        continue;
      }
      if (d.line == 0) d.line = line_;
      else d.text += '\n';
      d.text += line;
      if (d.text.size() > options_.max_bytes) throw too_long(d.line, "a document");
    }
    if (blank(d.text)) return std::nullopt;
    return d;
  }

 private:
  std::optional<Document> next_json() {
    std::string line;
    while (next_line(line)) {
      if (blank(line)) continue;
      const std::string where = place(line_);
      const detail::json value = detail::parse_json(line, where);
      if (!value.is_object()) throw Error(where, "JSON", "an object", detail::json_text(value));
      const detail::JsonObject object(value, where);
      if (!object.find(options_.field)) throw object.wrong(options_.field, "a string");
      Document d{object.string(options_.field, ""), line_};
      if (!blank(d.text)) return d;
    }
    return std::nullopt;
  }

  /// Without its newline; false at the end.
  bool next_line(std::string& line) {
    line.clear();
    bool any = false;
    for (;;) {
      if (rest_.empty()) rest_ = bytes_.next();
      if (rest_.empty()) break;
      any = true;
      if (line_ == 0 && rest_.starts_with("\xef\xbb\xbf")) rest_.remove_prefix(3);  // a byte order mark
      const std::size_t end = rest_.find('\n');
      line += rest_.substr(0, end);
      if (line.size() > options_.max_bytes) throw too_long(line_ + 1, "a line");
      rest_.remove_prefix(end == rest_.npos ? rest_.size() : end + 1);
      if (end != std::string_view::npos) break;
    }
    line_ += any;
    return any;
  }

  static bool blank(std::string_view s) { return s.find_first_not_of(" \t\r\n\f\v") == s.npos; }
  static std::string_view without_return(std::string_view s) { return s.ends_with('\r') ? s.substr(0, s.size() - 1) : s; }
  std::string place(std::uint64_t line) const { return bytes_.name() + ":" + std::to_string(line); }
  Error too_long(std::uint64_t line, std::string_view what) const {
    return {place(line), "", std::string(what) + " of at most " + std::to_string(options_.max_bytes) + " bytes", "more"};
  }

  detail::ByteStream bytes_;
  DocumentOptions options_;
  std::string_view rest_;   // of the piece, not yet read
  std::uint64_t line_ = 0;  // read so far
};

}  // namespace tinyllama
