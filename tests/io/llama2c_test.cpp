// llama2.c's .bin: the order of its tensors, its sign for a head of its own, and its size.
#include "tinyllama/io/llama2c.hpp"

#include <doctest/doctest.h>

#include "tests/io/small_model.hpp"
#include "tinyllama/io/checkpoint.hpp"

namespace {

using namespace tinyllama;
using namespace tinyllama::test;

/// The file's bytes, written the way llama2.c describes: one kind of tensor after the other.
std::string bin(const SmallModel& m) {
  const any_llama& c = m.config;
  std::string s;
  for (int v : {c.hidden, c.ffn, c.layers, c.heads, c.kv_heads, c.tied ? c.vocab : -c.vocab, c.context}) s += raw<std::int32_t>(v);
  const auto add = [&](std::string_view suffix) {
    for (const SafeTensor& t : m.tensors)
      if (t.name.ends_with(suffix)) s.append(reinterpret_cast<const char*>(t.bytes.data()), t.bytes.size());
  };
  for (const char* suffix : {"embed_tokens.weight", "input_layernorm.weight", "q_proj.weight", "k_proj.weight", "v_proj.weight", "o_proj.weight",
                             "post_attention_layernorm.weight", "gate_proj.weight", "down_proj.weight", "up_proj.weight", "model.norm.weight"})
    add(suffix);
  s.append(static_cast<std::size_t>(c.context) * 16 * 4, 'f');  // 16 = head dimension: half cosines, half sines
  add("lm_head.weight");
  return s;
}

}  // namespace

TEST_CASE("each tensor lies where llama2.c puts it") {
  for (bool tied : {false, true}) {
    const TempFolder tmp;
    const SmallModel model(small_config(tied));
    write_file(tmp / "m.bin", bin(model));
    const Checkpoint c = open_checkpoint(tmp / "m.bin");
    CHECK(c.config == model.config);
    CHECK(c.source == "llama2c");
    CHECK(c.rope == RopeLayout::interleaved);
    REQUIRE(c.tensors().size() == model.tensors.size());
    for (std::size_t i = 0; i < model.tensors.size(); ++i) {
      CHECK(c.tensors()[i].name == model.tensors[i].name);
      CHECK(std::memcmp(c.tensors()[i].bytes.data(), model.weights[i].data(), model.weights[i].size() * 4) == 0);
    }
  }
}

TEST_CASE("a wrong .bin is refused") {
  const std::string good = bin(SmallModel(small_config()));
  const auto refused = [](const std::string& bytes, std::initializer_list<std::string_view> words) { check_error([&] { read_llama2c("m.bin", bytes_of(bytes)); }, words); };
  const auto with = [&](int field, std::int32_t v) {
    std::string s = good;
    std::memcpy(s.data() + 4 * field, &v, 4);
    return s;
  };
  refused(good.substr(0, 27), {"m.bin: header", "28 bytes", "found 27"});
  refused(good.substr(0, 1000), {"model.embed_tokens.weight", "10240 bytes at offset 28", "found 972 (truncated"});
  refused(good.substr(0, good.size() - 1), {"lm_head.weight", "truncated"});
  refused(good + "x", {"size", "found " + std::to_string(good.size() + 1)});
  refused(with(5, 40), {"size"});  // says that the head is the embedding
  refused(with(0, 0x616b3432), {"header", "legacy layout", "version 0"});
  refused(with(0, -64), {"hidden", "between 1 and"});
  refused(with(2, 1 << 30), {"layers", "between 1 and 1024"});
  refused(with(4, 3), {"kv_heads", "a divisor of heads = 4"});
  refused(with(5, std::numeric_limits<std::int32_t>::min()), {"vocab"});
  refused(with(6, 1 << 26), {"RoPE tables", "4294967296 bytes", "truncated"});
}

TEST_CASE("stories260K opens from both of its formats with the same weights") {
  const auto a = test_data("models/stories260K/stories260K.bin"), b = test_data("models/stories260K/stories260K.gguf");
  if (!a || !b) {
    MESSAGE("skipped: no stories260K");
    return;
  }
  const Checkpoint bin_file = open_checkpoint(*a), gguf_file = open_checkpoint(*b);
  CHECK(preset_name(bin_file.config) == "stories_260k");
  CHECK(bin_file.config == gguf_file.config);
  for_each_parameter(bin_file.config, [&](const Parameter& p) {
    INFO(p.hf_name());
    const auto x = bin_file.tensor(p).bytes, y = gguf_file.tensor(p).bytes;
    REQUIRE(x.size() == y.size());
    CHECK(std::memcmp(x.data(), y.data(), x.size()) == 0);
  });
}
