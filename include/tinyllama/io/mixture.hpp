// Which format each tensor of a file is stored in: one format for all matrices, or llama.cpp's mixtures by name.
#pragma once

#include <array>
#include <cstdint>
#include <string>
#include <string_view>

#include "tinyllama/config/parameters.hpp"

namespace tinyllama {

/// A rule from tensor to format. A Format converts to the rule that stores every matrix in it.
struct Mixture {
  enum class More : std::uint8_t { none, medium, small };  // which V and down matrices get more bits
  std::string_view name;
  Format base, output;            // `output`: the head, or the embedding that serves as one
  Format more = base;
  More where = More::none;
  std::uint32_t gguf_file_type = info(base).gguf_file_type;

  constexpr Mixture(Format f) : name(info(f).name), base(f), output(f) {}
  constexpr Mixture(std::string_view n, Format b, Format o, Format m, More w, std::uint32_t type)
      : name(n), base(b), output(o), more(m), where(w), gguf_file_type(type) {}
};

/// The named mixtures; the numbers are llama.cpp's file types.
inline constexpr std::array mixtures{
    Mixture{"q4_K_S", Format::q4_K, Format::q6_K, Format::q5_K, Mixture::More::small, 14},
    Mixture{"q4_K_M", Format::q4_K, Format::q6_K, Format::q6_K, Mixture::More::medium, 15},
    Mixture{"q5_K_S", Format::q5_K, Format::q6_K, Format::q5_K, Mixture::More::none, 16},
    Mixture{"q5_K_M", Format::q5_K, Format::q6_K, Format::q6_K, Mixture::More::medium, 17},
};

/// The mixture or format of that name, in any case; an Error that lists the names otherwise.
inline Mixture parse_mixture(std::string_view text) {
  const auto same = [&](std::string_view name) {
    const auto lower = [](char c) { return c >= 'A' && c <= 'Z' ? static_cast<char>(c - 'A' + 'a') : c; };
    bool equal = name.size() == text.size();
    for (std::size_t i = 0; equal && i < text.size(); ++i) equal = lower(name[i]) == lower(text[i]);
    return equal;
  };
  std::string known;
  for (const FormatInfo& f : formats) {
    if (same(f.name)) return f.format;
    known.append(f.name).append(", ");
  }
  for (const Mixture& m : mixtures) {
    if (same(m.name)) return m;
    known.append(m.name).append(m.name == mixtures.back().name ? "" : ", ");
  }
  throw Error("format", "", "one of " + known, "'" + std::string(text) + "'");
}

namespace detail {

/// llama.cpp spends more bits on the first and last eighth of the layers and on each third one between.
constexpr bool layer_gets_more(Mixture::More where, Slot slot, int layer, int layers) {
  if (slot != Slot::v && slot != Slot::down) return false;
  if (where == Mixture::More::medium) return layer < layers / 8 || layer >= 7 * layers / 8 || (layer - layers / 8) % 3 == 2;
  if (where == Mixture::More::small) return slot == Slot::v ? layer < 4 : layer < layers / 8;
  return false;
}

/// What is used where a row is not a whole number of blocks; llama.cpp's choice too.
constexpr Format fitting_format(Format f, index_t columns) {
  if (columns % info(f).block == 0) return f;
  if (columns % 32 != 0) return Format::f16;
  return f == Format::q4_K ? Format::q5_0 : f == Format::q5_K ? Format::q5_1 : Format::q8_0;
}

}  // namespace detail

/// The format in which a GGUF file of that mixture holds the parameter. Gains are f32 in any.
template <Config C>
constexpr Format storage_format(const Mixture& m, const C& c, const Parameter& p) {
  if (p.role == Role::gain) return Format::f32;
  const bool output = p.role == Role::head || (c.tied && p.role == Role::embedding);
  const Format f = output ? m.output : detail::layer_gets_more(m.where, p.slot, p.layer, c.layers) ? m.more : m.base;
  return detail::fitting_format(f, p.columns);
}

}  // namespace tinyllama
