// Which format each tensor gets, for shapes where the answer was worked out by hand from llama.cpp's rules.
#include "tinyllama/io/mixture.hpp"

#include <doctest/doctest.h>

#include <set>

#include "tests/io/small_model.hpp"

namespace {

using namespace tinyllama;
using namespace tinyllama::test;

/// Layers whose tensor in `slot` is stored in `f`.
template <Config C>
std::set<int> layers_in(const Mixture& m, const C& c, Slot slot, Format f) {
  std::set<int> found;
  for_each_parameter(c, [&](const Parameter& p) {
    if (p.slot == slot && storage_format(m, c, p) == f) found.insert(p.layer);
  });
  return found;
}

}  // namespace

TEST_CASE("q4_K_M of TinyLlama") {
  const Mixture m = parse_mixture("Q4_K_M");
  const any_llama c = describe<tinyllama_1b>();
  CHECK(m.gguf_file_type == 15);
  const std::set<int> more{0, 1, 4, 7, 10, 13, 16, 19, 20, 21};
  CHECK(layers_in(m, c, Slot::v, Format::q6_K) == more);
  CHECK(layers_in(m, c, Slot::down, Format::q6_K) == more);
  for (Slot s : {Slot::q, Slot::k, Slot::o, Slot::gate, Slot::up}) CHECK(layers_in(m, c, s, Format::q4_K).size() == 22);
  CHECK(layers_in(m, c, Slot::v, Format::q4_K).size() == 12);
  CHECK(layers_in(m, c, Slot::attn_norm, Format::f32).size() == 22);
  CHECK(layers_in(m, c, Slot::embedding, Format::q4_K).size() == 1);
  CHECK(layers_in(m, c, Slot::head, Format::q6_K).size() == 1);
}

TEST_CASE("the other mixtures") {
  const any_llama c = describe<tinyllama_1b>();
  const Mixture s4 = parse_mixture("q4_k_s"), s5 = parse_mixture("q5_K_S"), m5 = parse_mixture("q5_K_M");
  CHECK(s4.gguf_file_type == 14);
  CHECK(layers_in(s4, c, Slot::v, Format::q5_K) == std::set<int>{0, 1, 2, 3});
  CHECK(layers_in(s4, c, Slot::down, Format::q5_K) == std::set<int>{0, 1});
  CHECK(layers_in(s5, c, Slot::v, Format::q5_K).size() == 22);
  CHECK(layers_in(s5, c, Slot::head, Format::q6_K).size() == 1);
  CHECK(m5.gguf_file_type == 17);
  CHECK(layers_in(m5, c, Slot::down, Format::q6_K).size() == 10);
  CHECK(layers_in(m5, c, Slot::down, Format::q5_K).size() == 12);
}

TEST_CASE("a format by its name stores every matrix in it") {
  const any_llama c = describe<tinyllama_1b>();
  for (const FormatInfo& f : formats) {
    const Mixture m = parse_mixture(f.name);
    CHECK(m.gguf_file_type == f.gguf_file_type);
    for (Slot s : {Slot::q, Slot::v, Slot::down}) CHECK(layers_in(m, c, s, f.format).size() == 22);
    CHECK(layers_in(m, c, Slot::head, f.format).size() == 1);
    CHECK(layers_in(m, c, Slot::final_norm, Format::f32).size() == 1);
  }
  check_error([] { parse_mixture("q3_K"); }, {"format", "one of f32, f16", "q5_K_M", "'q3_K'"});
}

TEST_CASE("rows that are no whole number of blocks fall back") {
  const any_llama smol = describe<smollm2_135m>(), stories = describe<stories_260k>();  // 576 = 18 * 32, 1536 = 6 * 256; 64, 172
  const Mixture m = parse_mixture("q4_K_M");
  CHECK(layers_in(m, smol, Slot::q, Format::q5_0).size() == 30);
  CHECK(layers_in(m, smol, Slot::embedding, Format::q8_0).size() == 1);
  CHECK(layers_in(m, smol, Slot::down, Format::q6_K).size() + layers_in(m, smol, Slot::down, Format::q4_K).size() == 30);
  CHECK(layers_in(parse_mixture("q5_K_M"), smol, Slot::q, Format::q5_1).size() == 30);
  CHECK(layers_in(parse_mixture("q6_K"), smol, Slot::q, Format::q8_0).size() == 30);
  CHECK(layers_in(m, stories, Slot::down, Format::f16).size() == 5);
  CHECK(layers_in(parse_mixture("q8_0"), stories, Slot::down, Format::f16).size() == 5);
}
