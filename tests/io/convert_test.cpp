// Converting: bit-identical round trips, the permutation of Q and K, shards, every format and mixture, metadata, progress.
#include "tinyllama/io/convert.hpp"

#include <doctest/doctest.h>

#include "tests/io/small_model.hpp"

namespace {

using namespace tinyllama;
using namespace tinyllama::test;
namespace fs = std::filesystem;

bool same_bytes(std::span<const std::byte> a, std::span<const std::byte> b) { return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size()) == 0; }

}  // namespace

TEST_CASE("rows of a head between the two RoPE layouts") {
  const auto rows = [](index_t n, index_t dim, RopeLayout from, RopeLayout to) {
    std::vector<index_t> all;
    for (index_t r = 0; r < n; ++r) all.push_back(detail::permuted_row(r, dim, from, to));
    return all;
  };
  CHECK(rows(12, 6, RopeLayout::half, RopeLayout::interleaved) == std::vector<index_t>{0, 3, 1, 4, 2, 5, 6, 9, 7, 10, 8, 11});
  CHECK(rows(12, 6, RopeLayout::interleaved, RopeLayout::half) == std::vector<index_t>{0, 2, 4, 1, 3, 5, 6, 8, 10, 7, 9, 11});
  CHECK(rows(4, 4, RopeLayout::half, RopeLayout::half) == std::vector<index_t>{0, 1, 2, 3});
}

TEST_CASE("safetensors to GGUF and back is bit-identical") {
  for (bool tied : {false, true}) {
    const TempFolder tmp;
    const SmallModel model(small_config(tied));
    model.write(tmp / "hf");
    save_gguf(open_checkpoint(tmp / "hf"), tmp / "m.gguf", {.mixture = Format::f32});
    const Checkpoint gguf = open_checkpoint(tmp / "m.gguf");
    CHECK(gguf.config == model.config);
    std::size_t i = 0;
    for_each_parameter(model.config, [&](const Parameter& p) {
      const bool moved = p.slot == Slot::q || p.slot == Slot::k;
      CHECK(same_bytes(gguf.tensor(p).bytes, model.tensors[i].bytes) == !moved);
      if (moved) CHECK(same_bytes(gguf.tensor(p).row(17), model.tensors[i].bytes.subspan(24 * 256, 256)));  // head 1: row 1 is row 8 of 16
      ++i;
    });
    save_safetensors(gguf, tmp / "back");
    save_safetensors(open_checkpoint(tmp / "hf"), tmp / "copy");
    CHECK(read_file(tmp / "back" / "model.safetensors") == read_file(tmp / "copy" / "model.safetensors"));
    CHECK(read_file(tmp / "back" / "config.json") == read_file(tmp / "copy" / "config.json"));
    const Checkpoint back = open_checkpoint(tmp / "back");
    for (std::size_t k = 0; k < model.tensors.size(); ++k) CHECK(same_bytes(back.tensors()[k].bytes, model.tensors[k].bytes));
  }
}

TEST_CASE("shards of a size, with an index") {
  const TempFolder tmp;
  const SmallModel model(small_config());
  model.write(tmp / "hf");
  const Checkpoint from = open_checkpoint(tmp / "hf");
  save_safetensors(from, tmp / "out");
  CHECK(fs::exists(tmp / "out" / "model.safetensors"));
  save_safetensors(from, tmp / "out", {.format = Format::f32, .max_shard_bytes = 60'000});
  CHECK_FALSE(fs::exists(tmp / "out" / "model.safetensors"));
  int shards = 0;
  for (const auto& e : fs::directory_iterator(tmp / "out"))
    if (e.path().extension() == ".safetensors") {
      ++shards;
      CHECK(e.file_size() < 64'000);
    }
  CHECK(shards > 3);
  CHECK(fs::exists(tmp / "out" / ("model-00001-of-0000" + std::to_string(shards) + ".safetensors")));
  const Checkpoint back = open_checkpoint(tmp / "out");
  for (std::size_t i = 0; i < model.tensors.size(); ++i) CHECK(same_bytes(back.tensors()[i].bytes, model.tensors[i].bytes));
  const auto index = detail::read_json(tmp / "out" / "model.safetensors.index.json");
  CHECK(index["metadata"]["total_size"] == parameter_count(model.config) * 4);
  save_safetensors(from, tmp / "out");
  CHECK_FALSE(fs::exists(tmp / "out" / "model.safetensors.index.json"));
}

TEST_CASE("every format and mixture: the rows are the codec's, in the order of the layout") {
  const TempFolder tmp;
  const SmallModel model(small_config(false, true));
  model.write(tmp / "hf");
  const Checkpoint from = open_checkpoint(tmp / "hf");
  std::vector<Mixture> all(mixtures.begin(), mixtures.end());
  for (const FormatInfo& f : formats)
    if (f.in_gguf()) all.push_back(f.format);
  for (const Mixture& m : all) {
    INFO(std::string(m.name));
    save_gguf(from, tmp / "m.gguf", {.mixture = m});
    const Checkpoint to = open_checkpoint(tmp / "m.gguf");
    CHECK(to.gguf()->get_uint("general.file_type") == m.gguf_file_type);
    for_each_parameter(model.config, [&](const Parameter& p) {
      const StoredTensor &a = from.tensor(p), &b = to.tensor(p);
      REQUIRE(b.format == storage_format(m, model.config, p));
      std::vector<float> x(static_cast<std::size_t>(p.columns)), y(x.size());
      float worst = 0, largest = 0;
      for (index_t r = 0; r < p.rows; ++r) {
        const bool moved = p.slot == Slot::q || p.slot == Slot::k;  // head dimension 64
        decode_row(a.format, a.row(moved ? r / 64 * 64 + r % 2 * 32 + r % 64 / 2 : r).data(), x.data(), p.columns);
        decode_row(b.format, b.row(r).data(), y.data(), p.columns);
        for (std::size_t i = 0; i < x.size(); ++i) worst = std::max(worst, std::abs(x[i] - y[i])), largest = std::max(largest, std::abs(x[i]));
      }
      // half a step of the coarsest code over weights that are uniform in +-largest, doubled for the scales' own rounding
      const float bits = b.format == Format::f32 ? 30 : b.format == Format::f16 ? 11 : b.format == Format::bf16 ? 8 : b.format == Format::q8_0 ? 7 : b.format == Format::q6_K ? 5
                         : b.format == Format::q5_K || b.format == Format::q5_0 || b.format == Format::q5_1 ? 4 : 3;
      CHECK(worst <= 2 * largest * std::exp2(-bits) * 0.6f);
    });

    const Checkpoint& again = to;  // the same mixture again copies every row bit by bit
    save_gguf(again, tmp / "again.gguf", {.mixture = m});
    CHECK(read_file(tmp / "again.gguf") == read_file(tmp / "m.gguf"));
  }
}

TEST_CASE("folders of 8-bit floats: the layers' matrices, each row with its scale") {
  const TempFolder tmp;
  SmallModel model(small_config());
  std::fill_n(model.weights[2].begin() + 64, 64, 0.0f);  // a row of zeros, of Q
  model.write(tmp / "hf");
  const Checkpoint from = open_checkpoint(tmp / "hf");
  for (const std::uint64_t shard : {std::uint64_t{1} << 30, std::uint64_t{20'000}}) {
    save_safetensors(from, tmp / "out", {.format = Format::f8_e4m3, .max_shard_bytes = shard});
    const Checkpoint to = open_checkpoint(tmp / "out");
    CHECK(to.config == from.config);
    int scaled = 0;
    for_each_parameter(model.config, [&](const Parameter& p) {
      const StoredTensor &a = from.tensor(p), &b = to.tensor(p);
      CHECK(b.format == (p.role == Role::linear ? Format::f8_e4m3 : Format::bf16));
      CHECK(b.scale.empty() == (p.role != Role::linear));
      if (p.role != Role::linear) return;
      ++scaled;
      std::vector<float> x(static_cast<std::size_t>(p.columns)), y(x.size());
      for (index_t r = 0; r < p.rows; ++r) {
        decode_stored_row(a, r, x.data(), p.columns), decode_stored_row(b, r, y.data(), p.columns);
        float largest = 0;
        for (const float v : x) largest = std::max(largest, std::abs(v));
        const float scale = b.scale[static_cast<std::size_t>(r)];
        CHECK(scale == (largest == 0 ? 1.0f : largest / 448.0f));
        bool close = true;
        for (std::size_t i = 0; i < x.size(); ++i) close = close && std::abs(x[i] - y[i]) <= std::max(std::abs(x[i]) * 0x1.01p-4f, scale * 0x1.01p-10f);
        CHECK(close);
      }
    });
    CHECK(scaled == 14);
    // Bit by bit again, and through the other layout, which moves rows and their scales.
    save_safetensors(to, tmp / "again", {.format = Format::f8_e4m3, .max_shard_bytes = shard});
    const Checkpoint again = open_checkpoint(tmp / "again");
    save_gguf(to, tmp / "f32.gguf", {.mixture = Format::f32});
    const Checkpoint gguf = open_checkpoint(tmp / "f32.gguf");
    save_safetensors(gguf, tmp / "f32");
    const Checkpoint back = open_checkpoint(tmp / "f32");
    for_each_parameter(model.config, [&](const Parameter& p) {
      CHECK(same_bytes(again.tensor(p).bytes, to.tensor(p).bytes));
      CHECK(again.tensor(p).scale == to.tensor(p).scale);
      std::vector<float> x(static_cast<std::size_t>(p.columns)), y(x.size());
      for (index_t r = 0; r < p.rows; ++r) {
        decode_stored_row(to.tensor(p), r, x.data(), p.columns), decode_stored_row(back.tensor(p), r, y.data(), p.columns);
        CHECK(x == y);
      }
    });
  }
  const auto config = detail::read_json(tmp / "out" / "config.json");
  CHECK(config["torch_dtype"] == "bfloat16");
  CHECK(config["quantization_config"]["quant_method"] == "compressed-tensors");
  check_error([&] { save_gguf(from, tmp / "m.gguf", {.mixture = Format::f8_e4m3}); }, {"m.gguf", "a format that GGUF has", "f8_e4m3"});
}

TEST_CASE("16-bit folders") {
  const TempFolder tmp;
  const SmallModel model(small_config());
  model.write(tmp / "hf");
  for (Format f : {Format::f16, Format::bf16}) {
    save_safetensors(open_checkpoint(tmp / "hf"), tmp / "out", {.format = f});
    const Checkpoint c = open_checkpoint(tmp / "out");
    float expected = 0;
    std::memcpy(&expected, model.tensors[2].bytes.data() + 400, 4);
    std::uint16_t found = 0;
    std::memcpy(&found, c.tensors()[2].bytes.data() + 200, 2);
    CHECK(c.tensors()[2].format == f);
    CHECK(found == (f == Format::f16 ? f16(expected).bits : bf16(expected).bits));
    CHECK(detail::read_json(tmp / "out" / "config.json")["torch_dtype"] == (f == Format::f16 ? "float16" : "bfloat16"));
  }
  check_error([&] { save_safetensors(open_checkpoint(tmp / "hf"), tmp / "out", {.format = Format::q8_0}); }, {"out", "f32, f16, bf16 or f8_e4m3 for safetensors", "found q8_0"});
  write_file(tmp / "file", "x");
  check_error([&] { save_safetensors(open_checkpoint(tmp / "hf"), tmp / "file"); }, {"file", "a folder that can be made"});
}

TEST_CASE("tokenizer files and special ids go along") {
  const TempFolder tmp;
  SmallModel(small_config()).write(tmp / "hf");
  write_file(tmp / "hf" / "tokenizer.json", "{}");
  write_file(tmp / "hf" / "secret.txt", "x");
  std::string config = read_file(tmp / "hf" / "config.json");
  config.replace(config.find("\"bos_token_id\": 1"), 17, "\"bos_token_id\": 5");
  write_file(tmp / "hf" / "config.json", config);
  save_safetensors(open_checkpoint(tmp / "hf"), tmp / "out");
  CHECK(read_file(tmp / "out" / "tokenizer.json") == "{}");
  CHECK_FALSE(fs::exists(tmp / "out" / "secret.txt"));
  CHECK(detail::read_json(tmp / "out" / "config.json")["bos_token_id"] == 5);
  save_safetensors(open_checkpoint(tmp / "hf"), tmp / "hf");  // onto itself
  CHECK(read_file(tmp / "hf" / "tokenizer.json") == "{}");
  CHECK(open_checkpoint(tmp / "hf").config == small_config());
}

TEST_CASE("a vocabulary becomes llama.cpp's keys, and a GGUF source's keys are copied") {
  const TempFolder tmp;
  SmallModel(small_config()).write(tmp / "hf");
  Vocabulary v;
  v.pieces = {{"<unk>", 0, PieceType::unknown}, {"<s>", 0, PieceType::control}, {"a", -1.5f, PieceType::normal}};
  v.bos = 1, v.eos = 2, v.unk = 0, v.add_eos = true, v.chat_template = "{{ x }}";
  save_gguf(open_checkpoint(tmp / "hf"), tmp / "a.gguf", {.mixture = Format::f16, .name = "small", .vocabulary = &v});
  save_gguf(open_checkpoint(tmp / "a.gguf"), tmp / "b.gguf", {.mixture = Format::q8_0});
  for (const char* file : {"a.gguf", "b.gguf"}) {
    const Gguf g(tmp / file);
    CHECK(g.get_string("general.name") == "small");
    CHECK(g.get_string("tokenizer.ggml.model") == "llama");
    CHECK(g.get_strings("tokenizer.ggml.tokens") == std::vector<std::string>{"<unk>", "<s>", "a"});
    CHECK(g.get_floats("tokenizer.ggml.scores") == std::vector<float>{0, 0, -1.5f});
    CHECK(g.get_ints("tokenizer.ggml.token_type") == std::vector<std::int32_t>{2, 3, 1});
    CHECK(g.get_uint("tokenizer.ggml.eos_token_id") == 2u);
    CHECK_FALSE(g.has("tokenizer.ggml.padding_token_id"));
    CHECK(g.get_bool("tokenizer.ggml.add_eos_token") == true);
    CHECK(g.get_string("tokenizer.chat_template") == "{{ x }}");
  }
  v.kind = Vocabulary::Kind::byte_level_bpe;
  v.pre_tokenizer = PreTokenizer::smollm;
  v.merges = {{"a", "b"}, {"ab", "c"}};
  save_gguf(open_checkpoint(tmp / "hf"), tmp / "c.gguf", {.vocabulary = &v});
  const Gguf c(tmp / "c.gguf");
  CHECK(c.get_string("tokenizer.ggml.model") == "gpt2");
  CHECK(c.get_string("tokenizer.ggml.pre") == "smollm");
  CHECK(c.get_strings("tokenizer.ggml.merges") == std::vector<std::string>{"a b", "ab c"});
  CHECK_FALSE(c.has("tokenizer.ggml.scores"));
  CHECK(c.get_string("general.name") == "hf");
  v.pieces.resize(41);
  check_error([&] { save_gguf(open_checkpoint(tmp / "hf"), tmp / "d.gguf", {.vocabulary = &v}); }, {"d.gguf", "vocabulary", "at most 40 pieces", "found 41"});
  CHECK_FALSE(fs::exists(tmp / "d.gguf"));
}

TEST_CASE("progress goes up to the total") {
  const TempFolder tmp;
  any_llama c = small_config();
  c.vocab = 40'000;
  SmallModel(c).write(tmp / "hf");
  std::vector<std::uint64_t> seen;
  std::uint64_t total = 0;
  const Progress progress = [&](std::uint64_t done, std::uint64_t all) { seen.push_back(done), total = all; };
  save_gguf(open_checkpoint(tmp / "hf"), tmp / "m.gguf", {.mixture = Format::f32, .progress = progress});
  CHECK(seen.size() > 3);
  CHECK(std::is_sorted(seen.begin(), seen.end()));
  CHECK(seen.back() == total);
  CHECK(total == static_cast<std::uint64_t>(parameter_count(c)) * 4);
}

TEST_CASE("stories260K from llama2.c to GGUF is the published GGUF") {
  const auto bin = test_data("models/stories260K/stories260K.bin"), gguf = test_data("models/stories260K/stories260K.gguf");
  if (!bin || !gguf) {
    MESSAGE("skipped: no stories260K");
    return;
  }
  const TempFolder tmp;
  save_safetensors(open_checkpoint(*bin), tmp / "hf");
  save_gguf(open_checkpoint(tmp / "hf"), tmp / "m.gguf", {.mixture = Format::f32});
  const Checkpoint ours = open_checkpoint(tmp / "m.gguf"), theirs = open_checkpoint(*gguf);
  CHECK(ours.config == theirs.config);
  for (std::size_t i = 0; i < theirs.tensors().size(); ++i) CHECK(same_bytes(ours.tensors()[i].bytes, theirs.tensors()[i].bytes));
}
