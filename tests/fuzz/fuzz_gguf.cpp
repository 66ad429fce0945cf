// libFuzzer: any bytes as a GGUF file give an Error or metadata and tensors that can be read, and a config or an Error.
#include <cstddef>
#include <cstdint>
#include <span>

#include "tests/fuzz/attempt.hpp"
#include "tinyllama/io/gguf_config.hpp"

using tinyllama::test::attempt, tinyllama::test::sink;

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  attempt([&] {
    const tinyllama::Gguf file("input", std::as_bytes(std::span(data, size)));
    for (const auto& entry : file.metadata()) {
      const std::string& key = entry.first;
      attempt([&] { (void)file.get_uint(key); });
      attempt([&] { (void)file.get_float(key); });
      attempt([&] { (void)file.get_bool(key); });
      attempt([&] { (void)file.get_string(key); });
      attempt([&] { (void)file.get_strings(key); });
      attempt([&] { (void)file.get_floats(key); });
      attempt([&] { (void)file.get_ints(key); });
    }
    for (const auto& t : file.tensors()) {
      if (file.find(t.name) != &t) __builtin_trap();
      for (std::byte b : t.bytes) sink = sink + static_cast<unsigned>(b);
      attempt([&] { (void)file.format(t); });
    }
    attempt([&] { (void)tinyllama::detail::gguf_config(file); });
  });
  return 0;
}
