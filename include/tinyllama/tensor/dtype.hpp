// Element types and storage formats: bf16, f16, e4m3, and the one list of formats in which a weight can be stored.
#pragma once

#include <array>
#include <bit>
#include <concepts>
#include <cstddef>
#include <cstdint>
#include <string_view>
#include <type_traits>
#include <utility>

#include "tinyllama/error.hpp"

namespace tinyllama {

using index_t = std::ptrdiff_t;

/// bfloat16: the upper half of an IEEE binary32. Conversion rounds to nearest even; a NaN stays a NaN.
struct bf16 {
  std::uint16_t bits = 0;
  constexpr bf16() = default;
  constexpr explicit bf16(float x) {
    const auto u = std::bit_cast<std::uint32_t>(x);
    const bool nan = (u & 0x7fffffffu) > 0x7f800000u;
    bits = static_cast<std::uint16_t>(nan ? (u >> 16) | 0x40u : (u + 0x7fffu + ((u >> 16) & 1u)) >> 16);
  }
  constexpr operator float() const { return std::bit_cast<float>(static_cast<std::uint32_t>(bits) << 16); }
  static constexpr bf16 from_bits(std::uint16_t b) { bf16 r; r.bits = b; return r; }
};

/// IEEE binary16. Conversion rounds to nearest even, overflows to infinity and keeps subnormals.
struct f16 {
  std::uint16_t bits = 0;
  constexpr f16() = default;
  constexpr explicit f16(float x) {
    const auto u = std::bit_cast<std::uint32_t>(x);
    const std::uint32_t sign = (u >> 16) & 0x8000u, a = u & 0x7fffffffu;
    std::uint32_t h;
    if (a > 0x7f800000u) {
      h = 0x7e00u | ((a >> 13) & 0x3ffu);
    } else if (a >= 0x477ff000u) {  // 65520 and above round to infinity
      h = 0x7c00u;
    } else if (a >= 0x38800000u) {  // normal: rebias the exponent by 112, round the 13 dropped bits
      h = (a - 0x38000000u + 0xfffu + ((a >> 13) & 1u)) >> 13;
    } else {  // subnormal: adding 0.5 lines the last kept bit up with the last bit of the sum, which rounds to even
      h = std::bit_cast<std::uint32_t>(std::bit_cast<float>(a) + 0.5f) - 0x3f000000u;
    }
    bits = static_cast<std::uint16_t>(sign | h);
  }
  constexpr operator float() const {
    const std::uint32_t sign = static_cast<std::uint32_t>(bits & 0x8000u) << 16, e = (bits >> 10) & 31u, m = bits & 0x3ffu;
    if (e == 31) return std::bit_cast<float>(sign | 0x7f800000u | (m << 13));
    if (e != 0) return std::bit_cast<float>(sign | ((e + 112u) << 23) | (m << 13));
    const float magnitude = static_cast<float>(m) * 0x1p-24f;
    return sign ? -magnitude : magnitude;
  }
  static constexpr f16 from_bits(std::uint16_t b) { f16 r; r.bits = b; return r; }
};

/// 8-bit float of 4 bits of exponent and 3 of mantissa, without infinities: up to 448 (OCP "8-bit floating point", arXiv 2209.05433). Conversion rounds to
/// nearest even and saturates; a NaN stays a NaN.
struct e4m3 {
  std::uint8_t bits = 0;
  constexpr e4m3() = default;
  constexpr explicit e4m3(float x) {
    const auto u = std::bit_cast<std::uint32_t>(x);
    const std::uint32_t sign = (u >> 24) & 0x80u, a = u & 0x7fffffffu;
    std::uint32_t c;
    if (a > 0x7f800000u) {
      bits = 0x7f;
      return;
    }
    if (a >= 0x43e00000u) {  // 448 and above
      c = 0x7eu;
    } else if (a >= 0x3c800000u) {  // normal: rebias the exponent by 120, round the 20 dropped bits
      c = (a - 0x3c000000u + 0x7ffffu + ((a >> 20) & 1u)) >> 20;
    } else {  // subnormal, in units of 2^-9, which is the last bit of 2^14
      c = std::bit_cast<std::uint32_t>(std::bit_cast<float>(a) + 0x1p14f) - 0x46800000u;
    }
    bits = static_cast<std::uint8_t>(sign | c);
  }
  constexpr operator float() const {
    const std::uint32_t sign = static_cast<std::uint32_t>(bits & 0x80u) << 24, e = (bits >> 3) & 15u, m = bits & 7u;
    if ((bits & 0x7fu) == 0x7fu) return std::bit_cast<float>(sign | 0x7fc00000u);
    if (e != 0) return std::bit_cast<float>(sign | ((e + 120u) << 23) | (m << 20));
    const float magnitude = static_cast<float>(m) * 0x1p-9f;
    return sign ? -magnitude : magnitude;
  }
  static constexpr e4m3 from_bits(std::uint8_t b) { e4m3 r; r.bits = b; return r; }
  static constexpr float most = 448.0f;
};

static_assert(sizeof(bf16) == 2 && sizeof(f16) == 2 && sizeof(e4m3) == 1);

/// How a weight is stored. Names are the field's (ggml's for the block formats).
enum class Format : std::uint8_t { f32, f16, bf16, q8_0, q4_0, q4_1, q5_0, q5_1, q4_K, q5_K, q6_K, f8_e4m3 };

/// What there is to know of a format: `block` weights along a row share one block of `bytes` bytes.
struct FormatInfo {
  Format format;
  std::string_view name;
  int block, bytes;
  std::uint32_t ggml;             // ggml's type number, as in a GGUF file, or none
  std::uint32_t gguf_file_type;   // llama.cpp's general.file_type of a file that is mostly this
  std::string_view safetensors;   // its dtype there, empty where safetensors has none

  static constexpr std::uint32_t none = 0xffffffffu;
  constexpr bool in_gguf() const { return ggml != none; }
};

/// The list of formats: adding one means a row here, a codec in quant/ and a tile in kernels/cpu/pack.hpp.
inline constexpr std::array formats{
    FormatInfo{Format::f32, "f32", 1, 4, 0, 0, "F32"},
    FormatInfo{Format::f16, "f16", 1, 2, 1, 1, "F16"},
    FormatInfo{Format::bf16, "bf16", 1, 2, 30, 32, "BF16"},
    FormatInfo{Format::q8_0, "q8_0", 32, 34, 8, 7, ""},
    FormatInfo{Format::q4_0, "q4_0", 32, 18, 2, 2, ""},
    FormatInfo{Format::q4_1, "q4_1", 32, 20, 3, 3, ""},
    FormatInfo{Format::q5_0, "q5_0", 32, 22, 6, 8, ""},
    FormatInfo{Format::q5_1, "q5_1", 32, 24, 7, 9, ""},
    FormatInfo{Format::q4_K, "q4_K", 256, 144, 12, 15, ""},
    FormatInfo{Format::q5_K, "q5_K", 256, 176, 13, 17, ""},
    FormatInfo{Format::q6_K, "q6_K", 256, 210, 14, 18, ""},
    FormatInfo{Format::f8_e4m3, "f8_e4m3", 1, 1, FormatInfo::none, FormatInfo::none, "F8_E4M3"},  // of weights: a factor in f32 for each row beside them
};

constexpr const FormatInfo& info(Format f) { return formats[static_cast<std::size_t>(f)]; }
constexpr std::string_view name(Format f) { return info(f).name; }
constexpr bool is_quantised(Format f) { return info(f).block > 1; }
/// A float of 16 or 32 bits: a weight in it needs no scale.
constexpr bool is_plain(Format f) { return f == Format::f32 || f == Format::f16 || f == Format::bf16; }

/// Bytes of one row of `columns` weights; `columns` is a multiple of the format's block.
constexpr std::size_t row_bytes(Format f, index_t columns) {
  return static_cast<std::size_t>(columns / info(f).block) * static_cast<std::size_t>(info(f).bytes);
}

/// The format of that name ("q4_K", also "Q4_K"), or an Error that lists the names.
constexpr Format parse_format(std::string_view text) {
  const auto lower = [](char c) { return c >= 'A' && c <= 'Z' ? static_cast<char>(c - 'A' + 'a') : c; };
  for (const FormatInfo& f : formats) {
    bool same = f.name.size() == text.size();
    for (std::size_t i = 0; same && i < text.size(); ++i) same = lower(f.name[i]) == lower(text[i]);
    if (same) return f.format;
  }
  std::string known;
  for (const FormatInfo& f : formats) known.append(known.empty() ? "" : ", ").append(f.name);
  throw Error("format", "", "one of " + known, "'" + std::string(text) + "'");
}

/// Calls `f.template operator()<F>()` with the run-time tag made static: the one place where that happens.
template <class Fn>
constexpr decltype(auto) visit(Format format, Fn&& fn) {
  switch (format) {
    case Format::f32: return fn.template operator()<Format::f32>();
    case Format::f16: return fn.template operator()<Format::f16>();
    case Format::bf16: return fn.template operator()<Format::bf16>();
    case Format::q8_0: return fn.template operator()<Format::q8_0>();
    case Format::q4_0: return fn.template operator()<Format::q4_0>();
    case Format::q4_1: return fn.template operator()<Format::q4_1>();
    case Format::q5_0: return fn.template operator()<Format::q5_0>();
    case Format::q5_1: return fn.template operator()<Format::q5_1>();
    case Format::q4_K: return fn.template operator()<Format::q4_K>();
    case Format::q5_K: return fn.template operator()<Format::q5_K>();
    case Format::q6_K: return fn.template operator()<Format::q6_K>();
    case Format::f8_e4m3: return fn.template operator()<Format::f8_e4m3>();
  }
  throw Error("format", "", "one of the list in tensor/dtype.hpp", std::to_string(static_cast<int>(format)));
}

/// The arithmetic element types that views, tensors and maps hold.
template <class T>
concept Element = std::same_as<std::remove_cv_t<T>, float> || std::same_as<std::remove_cv_t<T>, bf16> || std::same_as<std::remove_cv_t<T>, f16> ||
                  std::same_as<std::remove_cv_t<T>, double> || std::integral<std::remove_cv_t<T>>;

template <class T>
inline constexpr Format format_of = [] {
  using U = std::remove_cv_t<T>;
  static_assert(std::same_as<U, float> || std::same_as<U, bf16> || std::same_as<U, f16>, "only f32, f16 and bf16 are both an element type and a format");
  return std::same_as<U, float> ? Format::f32 : std::same_as<U, bf16> ? Format::bf16 : Format::f16;
}();

static_assert([] {
  for (std::size_t i = 0; i < formats.size(); ++i)
    if (static_cast<std::size_t>(formats[i].format) != i) return false;
  return true;
}(), "the rows of `formats` stand in the order of the enumeration");

}  // namespace tinyllama
