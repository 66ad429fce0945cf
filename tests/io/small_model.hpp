// What the tests of io/ share: small models written to disk, whole files as strings, and the check of an Error's words.
#pragma once

#include <doctest/doctest.h>

#include <cmath>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <random>
#include <string>
#include <string_view>
#include <vector>

#include "tests/support.hpp"
#include "tinyllama/io/config_json.hpp"
#include "tinyllama/io/safetensors.hpp"
#include "tinyllama/config/parameters.hpp"

namespace tinyllama::test {

/// Two layers with grouped queries; every width fits a 32-block format, `wide` also the 256-block ones.
inline any_llama small_config(bool tied = false, bool wide = false) {
  any_llama c;
  c.layers = 2, c.hidden = wide ? 256 : 64, c.heads = 4, c.kv_heads = 2, c.ffn = wide ? 512 : 96, c.vocab = 40, c.context = 32, c.tied = tied;
  return c;
}

/// A model's weights by Hugging Face name, all different.
struct SmallModel {
  any_llama config;
  std::vector<std::vector<float>> weights;
  std::vector<SafeTensor> tensors;

  explicit SmallModel(const any_llama& c, std::uint32_t seed = 1) : config(c) {
    std::mt19937 random(seed);
    for_each_parameter(c, [&](const Parameter& p) {
      std::vector<float>& w = weights.emplace_back(static_cast<std::size_t>(p.size()));
      for (float& x : w) x = static_cast<float>(static_cast<std::int32_t>(random())) * 0x1p-35f;  // within 1/16
      tensors.push_back({p.hf_name(), "F32", p.role == Role::gain ? std::vector{p.columns} : std::vector{p.rows, p.columns}, std::as_bytes(std::span(w))});
    });
  }
  void write(const std::filesystem::path& folder) const {
    std::filesystem::create_directories(folder);
    write_safetensors(folder / "model.safetensors", tensors);
    std::ofstream(folder / "config.json") << config_json(config);
  }
};

inline std::span<const std::byte> bytes_of(std::string_view s) { return std::as_bytes(std::span(s.data(), s.size())); }

/// Little-endian pieces of a file.
template <class T>
std::string raw(T v) {
  std::string s(sizeof v, '\0');
  std::memcpy(s.data(), &v, sizeof v);
  return s;
}

/// Runs `f`, which must throw Error, and looks for each of `words` in its message.
template <class F>
void check_error(F&& f, std::initializer_list<std::string_view> words) {
  std::string message;
  try {
    f();
  } catch (const Error& e) {
    message = e.what();
  }
  INFO("message: " << message);
  CHECK(!message.empty());
  for (std::string_view w : words) {
    INFO("looking for: " << std::string(w));
    CHECK(message.find(w) != std::string::npos);
  }
}

}  // namespace tinyllama::test
