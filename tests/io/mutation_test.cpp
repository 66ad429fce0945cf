// Damaged files: every bit of the headers flipped, every length cut to. Opening gives an Error or a file that can be read.
#include <doctest/doctest.h>

#include <functional>

#include "tests/io/small_model.hpp"
#include "tinyllama/io/convert.hpp"

namespace {

using namespace tinyllama;
using namespace tinyllama::test;

any_llama tiny() {
  any_llama c;
  c.layers = 1, c.hidden = 8, c.heads = 2, c.kv_heads = 1, c.ffn = 8, c.vocab = 4, c.context = 4;
  return c;
}

std::string safetensors_bytes(const TempFolder& tmp) {
  SmallModel(tiny()).write(tmp / "hf");
  return read_file(tmp / "hf" / "model.safetensors");
}
std::string gguf_bytes(const TempFolder& tmp) {
  SmallModel(tiny()).write(tmp / "hf");
  Vocabulary v;
  v.pieces = {{"<unk>", 0, PieceType::unknown}, {"<s>", 0, PieceType::control}, {"a", -1.5f, PieceType::normal}};
  v.bos = 1, v.eos = 2;
  save_gguf(open_checkpoint(tmp / "hf"), tmp / "m.gguf", {.mixture = Format::f32, .vocabulary = &v});
  return read_file(tmp / "m.gguf");
}

struct Outcome { int errors = 0, successes = 0; };

/// Calls `open` on every damaged version. The bytes lie in memory of exactly their size, so that the address sanitizer sees
/// a read beyond them.
Outcome damage(const std::string& good, std::size_t header, const std::function<void(std::span<const std::byte>)>& open) {
  Outcome outcome;
  const auto attempt = [&](const std::string& bad) {
    const std::vector<char> exact(bad.begin(), bad.end());
    try {
      open(std::as_bytes(std::span(exact)));
      ++outcome.successes;
    } catch (const Error&) {
      ++outcome.errors;
    }
  };
  for (std::size_t i = 0; i < header; ++i) {
    for (int bit = 0; bit < 8; ++bit) {
      std::string bad = good;
      bad[i] = static_cast<char>(bad[i] ^ (1 << bit));
      attempt(bad);
    }
    for (char c : {'\0', '\x7f', '\xff'}) {
      std::string bad = good;
      bad[i] = c;
      attempt(bad);
    }
  }
  for (std::size_t i = 0; i < header; i += 3) {  // eight bytes at once: counts, lengths and offsets
    for (std::uint64_t v : {~0ull, 1ull << 63, 1ull << 32, 0ull}) {
      std::string bad = good;
      bad.replace(i, std::min<std::size_t>(8, bad.size() - i), raw(v).substr(0, std::min<std::size_t>(8, bad.size() - i)));
      attempt(bad);
    }
  }
  for (std::size_t n = 0; n <= good.size(); ++n) attempt(good.substr(0, n));
  return outcome;
}

unsigned touch(std::span<const std::byte> bytes) {
  unsigned sum = 0;
  for (std::byte b : bytes) sum += static_cast<unsigned>(b);
  return sum;
}

volatile unsigned sink;  // keeps the reads

}  // namespace

TEST_CASE("damaged safetensors: an Error or a sound file") {
  const TempFolder tmp;
  const std::string good = safetensors_bytes(tmp);
  std::uint64_t header = 0;
  std::memcpy(&header, good.data(), 8);
  const Outcome o = damage(good, 8 + static_cast<std::size_t>(header), [](std::span<const std::byte> bytes) {
    const Safetensors f("file", bytes);
    for (const SafeTensor& t : f.tensors()) sink = sink + touch(t.bytes) + static_cast<unsigned>(format_of_safetensors(t.dtype).has_value());
  });
  CHECK(o.errors > 1000);
  CHECK(o.successes > 100);  // names, and spaces
}

TEST_CASE("damaged GGUF: an Error or a sound file") {
  const TempFolder tmp;
  const std::string good = gguf_bytes(tmp);
  const std::size_t header = good.size() - 8 * 256;
  const Outcome o = damage(good, header, [](std::span<const std::byte> bytes) {
    const Gguf f("file", bytes);
    for (const GgufTensor& t : f.tensors()) sink = sink + touch(t.bytes);
    for (const auto& [key, value] : f.metadata()) {
      sink = sink + touch(value.raw);
      const std::function<void()> getters[] = {[&, k = key] { (void)f.get_uint(k); }, [&, k = key] { (void)f.get_float(k); }, [&, k = key] { (void)f.get_bool(k); },
                                               [&, k = key] { (void)f.get_string(k); }, [&, k = key] { (void)f.get_strings(k); },
                                               [&, k = key] { (void)f.get_floats(k); }, [&, k = key] { (void)f.get_ints(k); }};
      int answers = 0;
      for (const auto& g : getters) {
        try {
          g();
          ++answers;
        } catch (const Error&) {
        }
      }
      CHECK(answers <= 1);  // a value has one type
    }
  });
  CHECK(o.errors > 1000);
  CHECK(o.successes > 100);
}

TEST_CASE("damaged checkpoints: an Error or weights that can be read") {
  const TempFolder tmp;
  const std::string hf = safetensors_bytes(tmp), gguf = gguf_bytes(tmp), config = read_file(tmp / "hf" / "config.json");
  std::mt19937 random(7);
  Outcome o;
  const auto attempt = [&](const std::filesystem::path& path, const std::filesystem::path& part, std::string bad) {
    switch (random() % 4) {
      case 0: bad.resize(random() % bad.size() + 1); break;
      case 1: bad[random() % std::min<std::size_t>(bad.size(), 2048)] = static_cast<char>(random()); break;
      default: bad[random() % std::min<std::size_t>(bad.size(), 2048)] ^= static_cast<char>(1 << random() % 8);
    }
    write_file(part, bad);
    try {
      const Checkpoint c = open_checkpoint(path);
      for (const StoredTensor& t : c.tensors()) {
        CHECK(t.bytes.size() == static_cast<std::size_t>(t.rows) * row_bytes(t.format, t.columns));
        sink = sink + touch(t.bytes);
      }
      ++o.successes;
    } catch (const Error&) {
      ++o.errors;
    }
  };
  for (int i = 0; i < 1500; ++i) {
    attempt(tmp / "m.gguf", tmp / "m.gguf", gguf);
    write_file(tmp / "hf" / "config.json", config);
    attempt(tmp / "hf", tmp / "hf" / "model.safetensors", hf);
    write_file(tmp / "hf" / "model.safetensors", hf);
    attempt(tmp / "hf", tmp / "hf" / "config.json", config);
  }
  CHECK(o.errors > 1000);
  CHECK(o.successes > 100);
}
