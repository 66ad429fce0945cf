// llama2.c's legacy checkpoints (.bin): seven integers, then f32 weights in a fixed order.
#pragma once

#include <array>
#include <cstdint>
#include <cstring>
#include <limits>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "tinyllama/config/parameters.hpp"
#include "tinyllama/io/file.hpp"

namespace tinyllama {

/// The config and, in the file's order, each tensor's bytes.
struct Llama2c {
  any_llama config;
  std::vector<std::pair<Parameter, std::span<const std::byte>>> tensors;
};

/// Reads bytes that the caller keeps alive; `where` is for messages. Throws Error where the header is implausible or the
/// size is not the one that follows from it. The vectors are rotated in the interleaved layout.
inline Llama2c read_llama2c(const std::string& where, std::span<const std::byte> bytes) {
  std::array<std::int32_t, 7> h{};
  if (bytes.size() < sizeof h) throw Error(where, "header", "28 bytes", std::to_string(bytes.size()) + " (truncated)");
  std::memcpy(h.data(), bytes.data(), sizeof h);
  if (h[0] == 0x616b3432) throw Error(where, "header", "llama2.c's legacy layout", "its versioned layout: export again with version 0");
  if (h[5] == std::numeric_limits<std::int32_t>::min()) throw Error(where, "vocab", "a size", std::to_string(h[5]));

  Llama2c out;
  any_llama& c = out.config;
  c.hidden = h[0], c.ffn = h[1], c.layers = h[2], c.heads = h[3], c.kv_heads = h[4], c.context = h[6];
  c.vocab = h[5] < 0 ? -h[5] : h[5];  // the sign says whether the head has weights of its own
  c.tied = h[5] > 0;
  check(c, where);

  std::uint64_t at = sizeof h;
  const auto take = [&](const Parameter& p) {
    const auto n = static_cast<std::uint64_t>(p.size()) * sizeof(float);
    if (n > bytes.size() - at)
      throw Error(where, p.hf_name(), std::to_string(n) + " bytes at offset " + std::to_string(at), std::to_string(bytes.size() - at) + " (truncated or damaged)");
    out.tensors.emplace_back(p, bytes.subspan(static_cast<std::size_t>(at), static_cast<std::size_t>(n)));
    at += n;
  };
  const auto take_all = [&](Slot slot) { for_each_parameter(c, [&](const Parameter& p) { if (p.slot == slot) take(p); }); };
  for (Slot slot : {Slot::embedding, Slot::attn_norm, Slot::q, Slot::k, Slot::v, Slot::o, Slot::ffn_norm, Slot::gate, Slot::down, Slot::up, Slot::final_norm})
    take_all(slot);  // one kind after the other, each over all layers
  const std::uint64_t tables = static_cast<std::uint64_t>(c.context) * static_cast<std::uint64_t>(head_dim(c)) * sizeof(float);
  if (tables > bytes.size() - at) throw Error(where, "RoPE tables", std::to_string(tables) + " bytes", std::to_string(bytes.size() - at) + " (truncated or damaged)");
  at += tables;  // cosines and sines, which follow from the config
  take_all(Slot::head);
  if (at != bytes.size()) throw Error(where, "size", std::to_string(at) + " bytes", std::to_string(bytes.size()));
  return out;
}

}  // namespace tinyllama
