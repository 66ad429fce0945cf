// libFuzzer: any bytes as a file of torch.save, or as its pickle, give an Error or tensors that can be read, and a lit checkpoint or an Error.
#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>

#include "tests/fuzz/attempt.hpp"
#include "tinyllama/io/lit.hpp"

using tinyllama::test::attempt, tinyllama::test::sink;

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  const auto bytes = std::as_bytes(std::span(data, size));
  attempt([&] {
    const auto file = std::make_shared<const tinyllama::TorchFile>("input", bytes);
    for (const auto& t : file->tensors()) {
      if (file->find(t.name) != &t) __builtin_trap();
      for (std::byte b : t.bytes) sink = sink + static_cast<unsigned>(b);
      attempt([&] { (void)file->format(t); });
    }
    const tinyllama::LitCheckpoint lit(file, std::nullopt);
    tinyllama::for_each_parameter(lit.config, [&](const tinyllama::Parameter& p) {
      const auto t = lit.tensor(p);
      for (const tinyllama::index_t r : {tinyllama::index_t{0}, p.rows - 1})
        for (std::byte b : t.row(r)) sink = sink + static_cast<unsigned>(b);
    });
  });
  // A pickle alone, too: a zip around it would take the fuzzer long to find.
  attempt([&] { (void)tinyllama::detail::Pickle("input", bytes, tinyllama::detail::torch_globals); });
  return 0;
}
