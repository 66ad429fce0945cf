// Which elements of a head RoPE turns together: the one difference between checkpoint families that a kernel sees.
#pragma once

#include <cstdint>
#include <string_view>

namespace tinyllama {

/// `half`: element i with i + head_dim/2 ("NeoX": Hugging Face, lit). `interleaved`: element 2i with 2i + 1 (GGUF, llama2.c).
/// The rows of Q and K stand in the order that their layout needs.
enum class RopeLayout : std::uint8_t { half, interleaved };

constexpr std::string_view name(RopeLayout r) { return r == RopeLayout::half ? "half" : "interleaved"; }

}  // namespace tinyllama
