// libFuzzer: any bytes as a safetensors file give an Error or tensors that can be read.
#include <cstddef>
#include <cstdint>
#include <span>

#include "tinyllama/io/safetensors.hpp"

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  static volatile unsigned sink;
  try {
    const tinyllama::Safetensors file("input", std::as_bytes(std::span(data, size)));
    for (const auto& t : file.tensors()) {
      if (file.find(t.name) != &t) __builtin_trap();
      for (std::byte b : t.bytes) sink = sink + static_cast<unsigned>(b);
      if (tinyllama::format_of_safetensors(t.dtype)) (void)file.format(t);
    }
  } catch (const tinyllama::Error&) {
  }
  return 0;
}
