// The golden models: small random Llamas in Hugging Face layout with float64 references.
#pragma once

#include <cstring>
#include <string>
#include <vector>

#include "tests/support.hpp"
#include "tinyllama/io/safetensors.hpp"
#include "tinyllama/tinyllama.hpp"

namespace tinyllama::test {

/// The goldens' shapes.
struct golden_gqa : llama_defaults {
  static constexpr int layers = 2, hidden = 64, heads = 4, kv_heads = 2, ffn = 176, vocab = 512, context = 128;
};
struct golden_tied : llama_defaults {
  static constexpr int layers = 3, hidden = 96, heads = 6, kv_heads = 2, ffn = 256, vocab = 320, context = 128;
  static constexpr float rope_base = 100000.0f;
  static constexpr bool tied = true;
};
template <class C>
inline const char* golden_name = std::is_same_v<C, golden_gqa> ? "gqa" : "tied";

template <class C>
std::filesystem::path golden_folder() { return fixture(std::string("goldens/") + golden_name<C>); }

/// reference.safetensors, with 64-bit ids narrowed.
struct Reference {
  Safetensors file;
  explicit Reference(const std::filesystem::path& folder) : file(folder / "reference.safetensors") {}
  template <class T>
  std::vector<T> values(const char* name) const {
    const auto* t = file.find(name);
    if (!t) throw Error("reference.safetensors", name, "a tensor", "none");
    std::vector<T> v(t->bytes.size() / sizeof(T));
    std::memcpy(v.data(), t->bytes.data(), t->bytes.size());
    return v;
  }
  std::vector<std::int32_t> ids(const char* name) const {
    const auto wide = values<std::int64_t>(name);
    return {wide.begin(), wide.end()};
  }
};

/// ||a - b|| / ||b||, in double.
template <class A, class B>
double relative_error(const A& a, const B& b) {
  double difference = 0, norm = 0;
  for (std::size_t i = 0; i < b.size(); ++i) {
    const double d = static_cast<double>(a[i]) - static_cast<double>(b[i]);
    difference += d * d, norm += static_cast<double>(b[i]) * b[i];
  }
  return std::sqrt(difference / norm);
}

inline LoadOptions exact() { return {.compute = Compute::f32, .cache = Format::f32}; }

/// Greedy continuation through the cache.
template <class S>
std::vector<std::int32_t> greedy(S& session, std::span<const std::int32_t> prompt, int n) {
  std::vector<std::int32_t> out;
  auto l = session.prefill(prompt);
  for (int i = 0; i < n; ++i) {
    out.push_back(static_cast<std::int32_t>(std::max_element(l.begin(), l.end()) - l.begin()));
    if (i + 1 < n) l = session.decode(out.back());
  }
  return out;
}

}  // namespace tinyllama::test
