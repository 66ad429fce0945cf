// A model's packed weights in a file, to be mapped at the next start: what loading would compute, and whose it is.
//
// 4096 bytes of header, then the weights as Weights lays them out in memory. It is a cache and never trusted: it belongs to one checkpoint (a
// digest of its tensors and of samples of their bytes), one layout and one version, and one panel of each matrix is packed again and compared.
#pragma once

#include <cstring>
#include <filesystem>
#include <optional>
#include <span>

#include "tinyllama/config/parameters.hpp"
#include "tinyllama/io/file.hpp"
#include "tinyllama/kernels/pack.hpp"
#include "tinyllama/model/memory_plan.hpp"

namespace tinyllama {

struct PackedHeader {
  char magic[8] = {'t', 'l', 'p', 'a', 'c', 'k', 'e', 'd'};
  std::uint32_t version = 1;            // of the file and of the panels' layouts: counted up with every change to kernels/pack.hpp
  std::uint32_t rows_of_panel = panel_rows;
  std::uint64_t layout = 0, source = 0; // digests
  std::uint64_t bytes = 0;              // of the weights
  bool operator==(const PackedHeader&) const = default;
};
inline constexpr std::size_t packed_file_offset = 4096;

/// FNV-1a, 64 bits.
class Digest {
 public:
  void add(std::span<const std::byte> bytes) {
    for (const std::byte b : bytes) value_ = (value_ ^ std::to_integer<std::uint64_t>(b)) * 0x100000001b3u;
  }
  void add(std::uint64_t v) { add(std::as_bytes(std::span(&v, 1))); }
  std::uint64_t value() const { return value_; }

 private:
  std::uint64_t value_ = 0xcbf29ce484222325u;
};

/// The header that belongs to `file` (a Checkpoint, or what looks like one).
template <class C, class Source>
PackedHeader packed_header(const C& config, const Source& file) {
  Digest layout, source;
  PackedHeader h;
  for_each_parameter(config, [&](const Parameter& p) {
    const auto t = file.tensor(p);
    const std::size_t stored = stored_bytes(p, t.format, config.tied);
    for (const auto v : {static_cast<std::uint64_t>(t.format), static_cast<std::uint64_t>(t.rows), static_cast<std::uint64_t>(t.columns), std::uint64_t{stored}}) layout.add(v);
    h.bytes += stored;
    constexpr std::size_t samples = 16, sample = 64;
    for (std::size_t i = 0; i < samples; ++i) {
      const std::size_t at = t.bytes.size() <= sample ? 0 : (t.bytes.size() - sample) / (samples - 1) * i;
      source.add(t.bytes.subspan(at, std::min(sample, t.bytes.size())));
    }
    source.add(std::as_bytes(std::span(t.scale)));
    file.release(t.bytes);  // the system brings in the pages around a sample
  });
  h.layout = layout.value(), h.source = source.value();
  return h;
}

/// The mapped file where it is there, whole, and `expected`'s; nothing otherwise.
inline std::optional<MappedFile> open_packed(const std::filesystem::path& path, const PackedHeader& expected) {
  std::error_code none;
  if (!std::filesystem::is_regular_file(path, none) || std::filesystem::file_size(path, none) != packed_file_offset + expected.bytes) return {};
  MappedFile file(path);
  PackedHeader h;
  std::memcpy(&h, file.bytes().data(), sizeof h);
  if (!(h == expected)) return {};
  return file;
}

inline void write_packed(const std::filesystem::path& path, const PackedHeader& header, std::span<const std::byte> weights) {
  write_file_atomically(path, [&](FileWriter& out) {
    out.write(std::as_bytes(std::span(&header, 1)));
    out.write_zeros(packed_file_offset - sizeof header);
    out.write(weights);
  });
}

}  // namespace tinyllama
