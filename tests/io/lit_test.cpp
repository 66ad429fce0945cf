// lit-gpt checkpoints: files of real PyTorch read, the fused QKV taken apart and put together, round trips, zip64, hostile and damaged files.
#include "tinyllama/io/lit.hpp"

#include <doctest/doctest.h>

#include <array>
#include <map>

#include "tests/io/small_model.hpp"
#include "tinyllama/train/flat_model.hpp"

namespace {

using namespace tinyllama;
using namespace tinyllama::test;
namespace fs = std::filesystem;

any_llama fixture_config() {
  any_llama c;
  c.layers = 2, c.hidden = 16, c.heads = 4, c.kv_heads = 2, c.ffn = 24, c.vocab = 20, c.context = 64;
  return c;
}

/// Element n of parameter `number`, as make_fixtures.py has it.
float fixture_weight(std::size_t number, std::size_t n) { return static_cast<float>(static_cast<int>((n * 7 + number * 13) % 251) - 125) / 256; }

/// All weights in the order of for_each_parameter.
std::vector<float> fixture_weights() {
  std::vector<float> all;
  std::size_t number = 0;
  for_each_parameter(fixture_config(), [&](const Parameter& p) {
    for (std::size_t n = 0; n < static_cast<std::size_t>(p.size()); ++n) all.push_back(fixture_weight(number, n));
    ++number;
  });
  return all;
}

template <class Source>
std::vector<float> flat(const Source& from) {
  std::vector<float> weights(static_cast<std::size_t>(parameter_count(from.config)));
  read_flat(from, weights);
  return weights;
}

std::map<std::string, std::string> contents(const TorchFile& file) {
  std::map<std::string, std::string> all;
  for (const TorchTensor& t : file.tensors())
    all[t.name + " " + t.storage + " " + detail::shape_text(t.shape)] = std::string(reinterpret_cast<const char*>(t.bytes.data()), t.bytes.size());
  return all;
}

std::span<const std::byte> bytes_of_file(const std::string& s) { return std::as_bytes(std::span(s.data(), s.size())); }

/// An archive as torch.save makes it, with any pickle; data/0 holds eight floats.
std::string archive(const TempFolder& tmp, const std::string& pickle, const std::string& byteorder = "little") {
  write_file_atomically(tmp / "archive", [&](FileWriter& file) {
    ZipWriter zip(file);
    zip.add("archive/data.pkl", pickle);
    zip.add("archive/byteorder", byteorder);
    zip.add("archive/data/0", std::string(32, '\0'));
    zip.finish();
  });
  return read_file(tmp / "archive");
}

/// The pickle of {"a": tensor}, with parts to be replaced.
std::string one_tensor(const std::string& offset = std::string("K\0", 2), const std::string& size = "K\x02K\x04\x86",
                       const std::string& stride = "K\x04K\x01\x86", const std::string& type = "ctorch\nFloatStorage\n",
                       const std::string& key = std::string("X\1\0\0\0000", 6)) {
  return "\x80\x02}(" + std::string("X\1\0\0\0a", 6) + "ctorch._utils\n_rebuild_tensor_v2\n((" + std::string("X\7\0\0\0storage", 12) + type + key +
         std::string("X\3\0\0\0cpu", 8) + "K\x08tQ" + offset + size + stride + "\x89" + "ccollections\nOrderedDict\n)RtRu.";
}

}  // namespace

TEST_CASE("lit: a file that PyTorch wrote, its fused rows taken apart") {
  const LitCheckpoint c = open_lit(fixture("lit/lit_model.pth"), fixture_config());
  CHECK(c.config == fixture_config());
  CHECK(c.file().key().empty());
  CHECK(flat(c) == fixture_weights());
  const std::vector<Parameter> all = detail::parameters_of(c.config);
  CHECK(all[3].slot == Slot::k);
  CHECK(c.tensor(all[3]).name == "transformer.h.0.attn.attn.weight");
  CHECK(c.tensor(all[3]).row(5).data() == c.tensor(all[3]).bytes.data() + (16 + 8 + 1) * 64);  // group 1 begins at row 16: 8 rows of Q, then K
}

TEST_CASE("lit: a training checkpoint among optimizer state, in bf16, the head a view of the embedding") {
  const LitCheckpoint c = open_lit(fixture("lit/training.ckpt"), fixture_config());
  CHECK(c.file().key() == "model");
  CHECK(c.tensor(detail::parameters_of(c.config)[7]).name == "transformer.h.0.mlp.fc_1.weight");
  CHECK(c.tensor(detail::parameters_of(c.config)[0]).format == Format::bf16);
  std::vector<float> expected = fixture_weights();
  std::copy_n(expected.begin(), 20 * 16, expected.end() - 20 * 16);
  CHECK(flat(c) == expected);
  any_llama tied = fixture_config();
  tied.tied = true;
  expected.resize(expected.size() - 20 * 16);
  CHECK(flat(open_lit(fixture("lit/training.ckpt"), tied)) == expected);
  check_error([&] { open_lit(fixture("lit/lit_model.pth"), tied); }, {"lit_model.pth", "lm_head.weight", "the embedding again", "other weights"});
}

TEST_CASE("lit: to Hugging Face, GGUF and back, bit by bit") {
  const TempFolder tmp;
  const LitCheckpoint lit = open_lit(fixture("lit/lit_model.pth"), fixture_config());
  save_safetensors(lit, tmp / "hf");
  const Checkpoint hf = open_checkpoint(tmp / "hf");
  CHECK(hf.config == fixture_config());
  CHECK(flat(hf) == fixture_weights());
  save_gguf(lit, tmp / "m.gguf", {.mixture = Format::f32});
  const Checkpoint gguf = open_checkpoint(tmp / "m.gguf");
  CHECK(flat(gguf) == fixture_weights());
  const std::vector<float> weights = fixture_weights();
  const auto check = [&](const fs::path& path) {
    CHECK(contents(TorchFile(path)) == contents(TorchFile(fixture("lit/lit_model.pth"))));
    CHECK(flat(open_lit(path, fixture_config())) == weights);
  };
  save_lit(hf, tmp / "a.pth"), check(tmp / "a.pth");
  save_lit(gguf, tmp / "b.pth"), check(tmp / "b.pth");
  save_lit(FlatModel(fixture_config(), weights), tmp / "c.ckpt", {.key = "model"}), check(tmp / "c.ckpt");
  CHECK(TorchFile(tmp / "c.ckpt").key() == "model");
  save_lit(lit, tmp / "d.pt"), check(tmp / "d.pt");
  CHECK(read_file(tmp / "a.pth") == read_file(tmp / "d.pt"));
  save_lit(lit, tmp / "e.pth", {.format = Format::bf16});
  CHECK(open_lit(tmp / "e.pth", fixture_config()).tensor(detail::parameters_of(lit.config)[2]).format == Format::bf16);
  CHECK(flat(open_lit(tmp / "e.pth", fixture_config())) == weights);
  save_lit(lit, tmp / "f.pth", {.format = Format::f16});
  CHECK(flat(open_lit(tmp / "f.pth", fixture_config())) == weights);
  check_error([&] { save_lit(lit, tmp / "g.pth", {.format = Format::q8_0}); }, {"g.pth", "f32, bf16 or f16", "q8_0"});
  write_file(tmp / "file", "x");
  check_error([&] { save_lit(lit, tmp / "file"); }, {"file", "a folder that can be made"});
}

TEST_CASE("lit: a folder has lit_config.json and the tokenizer, and a tied head is written out") {
  const TempFolder tmp;
  any_llama c = small_config(true);
  c.rope_base = 5e4f, c.rope_scale = 4, c.norm_eps = 1e-6f;
  const SmallModel model(c);
  model.write(tmp / "hf");
  write_file(tmp / "hf" / "tokenizer.json", "{}");
  std::vector<std::uint64_t> seen;
  std::uint64_t total = 0;
  save_lit(open_checkpoint(tmp / "hf"), tmp / "lit", {.progress = [&](std::uint64_t done, std::uint64_t all) { seen.push_back(done), total = all; }});
  CHECK(total == 4 * static_cast<std::uint64_t>(parameter_count(c) + 40 * 64));
  CHECK(seen.back() == total);
  CHECK(read_file(tmp / "lit" / "tokenizer.json") == "{}");
  CHECK(is_lit(tmp / "lit"));
  CHECK_FALSE(is_lit(tmp / "hf"));
  const LitCheckpoint lit = open_lit(tmp / "lit");
  any_llama untied = c;
  untied.tied = false;
  CHECK(lit.config == untied);
  CHECK(flat(open_lit(tmp / "lit", c)) == flat(open_checkpoint(tmp / "hf")));
  write_file(tmp / "lit" / "generation_config.json", R"({"bos_token_id": 5, "eos_token_id": [1, 2]})");
  save_safetensors(lit, tmp / "back");
  CHECK(read_file(tmp / "back" / "tokenizer.json") == "{}");
  CHECK(detail::read_json(tmp / "back" / "config.json")["bos_token_id"] == 5);
  const Checkpoint back = open_checkpoint(tmp / "back");
  CHECK(back.config == untied);
  for (std::size_t i = 0; i < model.tensors.size(); ++i)
    CHECK(std::memcmp(back.tensors()[i].bytes.data(), model.tensors[i].bytes.data(), model.tensors[i].bytes.size()) == 0);
}

TEST_CASE("lit: the config from the shapes of a preset") {
  const TempFolder tmp;
  any_llama c = describe<stories_260k>();
  c.vocab = 515, c.tied = false;  // pieces were added
  const SmallModel model(c);
  model.write(tmp / "hf");
  save_lit(open_checkpoint(tmp / "hf"), tmp / "m.pth");
  CHECK(open_lit(tmp / "m.pth").config == c);
}

TEST_CASE("lit: a config that is missing, wrong or not supported") {
  const TempFolder tmp;
  fs::copy_file(fixture("lit/lit_model.pth"), tmp / "lit_model.pth");
  check_error([&] { open_lit(tmp.path()); },
              {"lit_model.pth", "config", "lit_config.json beside the file", "2 layers, hidden 16, ffn 24, 32 rows of QKV"});
  const auto with = [&](auto change) {
    any_llama c = fixture_config();
    change(c);
    open_lit(tmp.path(), c);
  };
  check_error([&] { with([](any_llama& c) { c.layers = 3; }); }, {"transformer.h.2.norm_1.weight", "the tensor", "none"});
  check_error([&] { with([](any_llama& c) { c.layers = 1; }); }, {"transformer.h.1", "only the tensors of a Llama of 1 layers"});
  check_error([&] { with([](any_llama& c) { c.kv_heads = 1; }); }, {"attn.attn.weight", "[24, 16]", "[32, 16]"});
  check_error([&] { with([](any_llama& c) { c.vocab = 21; }); }, {"transformer.wte.weight", "[21, 16]", "[20, 16]"});
  check_error([&] { with([](any_llama& c) { c.ffn = 25; }); }, {"mlp.swiglu.w1.weight", "[25, 16]", "[24, 16]"});
  check_error([&] { with([](any_llama& c) { c.heads = 3; }); }, {"heads"});

  const std::string good = detail::lit_config_json(fixture_config());
  write_file(tmp / "lit_config.json", good);
  CHECK(open_lit(tmp.path()).config == fixture_config());
  CHECK(open_lit(tmp / "lit_model.pth").config == fixture_config());
  const std::vector<std::array<std::string, 3>> changes = {
      {"\"rotary_percentage\": 1.0", "\"rotary_percentage\": 0.25", "rotary_percentage"},
      {"\"bias\": false", "\"bias\": true", "biases are not supported"},
      {"\"parallel_residual\": false,", "", "parallel_residual"}, {"\"FusedRMSNorm\"", "\"LayerNorm\"", "_norm_class"},
      {"LLaMAMLP", "GptNeoxMLP", "_mlp_class"}, {"\"n_head\": 4,", "", "n_head"}, {"\"n_layer\": 2", "\"n_layer\": \"2\"", "n_layer"}};
  for (const auto& [from, to, word] : changes) {
    std::string bad = good;
    REQUIRE(bad.find(from) != bad.npos);
    write_file(tmp / "lit_config.json", bad.replace(bad.find(from), from.size(), to));
    check_error([&] { open_lit(tmp.path()); }, {"lit_config.json", word});
  }
  fs::create_directories(tmp / "empty");
  check_error([&] { open_lit(tmp / "empty"); }, {"lit_model.pth", "a readable file"});
  const std::string hf = "model.embed_tokens.weight";
  const std::vector<TorchTensorPlan> plan = {{hf, Format::f32, {2}}};
  write_torch_file(tmp / "hf.pth", plan, [](std::size_t, auto& sink) { sink.write(std::as_bytes(std::span("\0\0\0\0\0\0\0", 8))); });
  check_error([&] { open_lit(tmp / "hf.pth", fixture_config()); }, {"hf.pth", "transformer.wte.weight", "Hugging Face's names"});
}

TEST_CASE("torch file: views, whole numbers, parameters, and files from before 1.6") {
  const TempFolder tmp;
  // One transposed tensor, which is not contiguous, stands among them.
  check_error([&] { TorchFile(fixture("lit/views.pt")); }, {"views.pt", "transposed", "a contiguous tensor", "stride 4"});
  std::string bytes = read_file(fixture("lit/views.pt"));
  const auto at = bytes.find("transposed");
  REQUIRE(at != bytes.npos);
  // its shape [4, 6] with strides [1, 4] becomes [6, 4] with [4, 1]
  const auto shape = bytes.find("K\x04K\x06\x86", at), stride = bytes.find("K\x01K\x04\x86", at);
  REQUIRE((shape != bytes.npos && stride != bytes.npos));
  bytes.replace(shape, 4, "K\x06K\x04"), bytes.replace(stride, 4, "K\x04K\x01");
  const TorchFile f("views", bytes_of_file(bytes));
  CHECK(f.key().empty());
  const auto value = [&](const char* name, std::size_t i) {
    float v;
    std::memcpy(&v, f.find(name)->bytes.data() + 4 * i, 4);
    return v;
  };
  REQUIRE(f.tensors().size() == 7);
  CHECK(f.find("part")->shape == std::vector<index_t>{2, 4});
  for (std::size_t i = 0; i < 8; ++i) CHECK(value("part", i) == fixture_weight(0, 8 + i));
  for (std::size_t i = 0; i < 24; ++i) CHECK(value("parameter", i) == fixture_weight(0, i));
  CHECK(f.find("half")->format == Format::f16);
  CHECK(f.find("scalar")->shape.empty());
  CHECK(value("scalar", 0) == 2.5f);
  CHECK(f.find("empty")->bytes.empty());
  CHECK(f.find("numbers")->bytes.size() == 40);
  check_error([&] { f.format(*f.find("numbers")); }, {"views", "numbers", "float32, bfloat16 or float16", "LongStorage"});
  CHECK(f.find("none") == nullptr);
  check_error([&] { TorchFile(fixture("lit/legacy.pth")); }, {"legacy.pth", "PyTorch 1.6"});
  check_error([&] { TorchFile(tmp / "none.pth"); }, {"none.pth", "a readable file"});
}

TEST_CASE("torch file: crc, zip64 and alignment") {
  detail::Crc32 crc;
  crc.add(bytes_of("123456789"));
  CHECK(crc.value() == 0xcbf43926u);  // the check value of CRC-32/ISO-HDLC
  detail::Crc32 parts;
  parts.add(bytes_of("12")), parts.add(bytes_of("")), parts.add(bytes_of("3456789"));
  CHECK(parts.value() == 0xcbf43926u);

  const TempFolder tmp;
  for (const std::uint64_t zip64_from : {std::uint64_t{0xffffffff}, std::uint64_t{100}, std::uint64_t{0}}) {
    write_file_atomically(tmp / "z", [&](FileWriter& file) {
      ZipWriter zip(file, zip64_from);
      zip.add("a/one", "1"), zip.add("a/empty", ""), zip.add("a/long", std::string(1000, 'x')), zip.add("a/last", "y");
      zip.finish();
    });
    const std::string file = read_file(tmp / "z");
    const ZipArchive zip("z", bytes_of_file(file));
    CHECK(zip.entries().size() == 4);
    const std::map<std::string, std::string> expected = {{"a/one", "1"}, {"a/empty", ""}, {"a/long", std::string(1000, 'x')}, {"a/last", "y"}};
    for (const auto& [name, text] : expected) {
      const ZipEntry* e = zip.find(name);
      REQUIRE(e);
      CHECK(std::string(reinterpret_cast<const char*>(e->bytes.data()), e->bytes.size()) == text);
      CHECK((e->bytes.data() - reinterpret_cast<const std::byte*>(file.data())) % 64 == 0);
    }
    CHECK(ZipArchive("z", bytes_of_file(file)).find("a/none") == nullptr);
    const std::string comment = file.substr(0, file.size() - 2) + std::string("\5\0hello", 7);
    CHECK(ZipArchive("z", bytes_of_file(comment)).entries().size() == 4);
  }
  const auto too_short = [](FileWriter& file) { ZipWriter(file).add("n", 3, [](auto& to) { to.write(bytes_of("12")); }); };
  check_error([&] { write_file_atomically(tmp / "z", too_short); }, {"n", "3 bytes written", "found 2"});
}

TEST_CASE("torch file: a pickle may mention nothing but tensors and plain data") {
  const TempFolder tmp;
  const auto open = [&](const std::string& pickle) {
    const std::string file = archive(tmp, pickle);
    const TorchFile f("file", bytes_of_file(file));
    CHECK(f.tensors().size() == 1);
  };
  open(one_tensor());
  const std::string p = "\x80\x02";
  check_error([&] { open(p + "cposix\nsystem\n(" + std::string("X\2\0\0\0id", 7) + "tR."); },
              {"file", "pickle", "only what a dict of tensors needs", "'posix.system'"});
  check_error([&] { open(p + "c__builtin__\neval\n."); }, {"'__builtin__.eval'"});
  check_error([&] { open(p + "ctorch\nFloatStorage.\n."); }, {"'torch.FloatStorage.'"});
  for (const char* const opcode : {"i", "o", "\x81", "\x92", "\x93", "P", "0", "2", "1", "S", "V", "I", "L", "F", "g", "p", "d", "l", "T", "U",
                                   "\x8c", "\x94", "\x95", "\x82"})
    check_error([&] { open(p + "}" + opcode + std::string(16, '\0')); }, {"pickle", "an opcode that torch.save writes"});
  check_error([&] { open("\x80\x04}."); }, {"protocol 2", "4"});
  // stack, marks and memo
  for (const char* const bad : {".", "}}.", "(}.", "t", "u", "}Nu", "}NNNu", "}(NNNu.", "]s", "NNs", "}(s", "R", "}}R", "NQb.",
                                "q\1", "h\1", "}h\7.", "\x87", "N\x86", "(\x85", "Q", "a", "Na", "}Na", "e", "}N(e", "b", "Nb", "NNb", "c", "ctorch",
                                "ctorch\nFloat", "X", "X\xff\xff\xff\xff", "K", "J\1\2", "\x8a", "\x8a\x09\1\2\3\4\5\6\7\x08\x09", "G1234567"}) {
    CAPTURE(bad);
    check_error([&] { open(p + bad); }, {"file", "pickle", "expected"});
  }
  check_error([&] { open(p + "N(\x85t."); }, {"1 values on the stack", "found 0"});  // nothing is taken from under a mark
  for (const char* const bad : {"}.", "].", "N.", "K\1."}) check_error([&] { open(p + bad); }, {"file", bad[0] == '}' ? "tensors" : "a dict"});
}

TEST_CASE("torch file: tensors that reach out of their storage, or are no tensors") {
  const TempFolder tmp;
  const auto open = [&](const std::string& pickle) {
    const std::string file = archive(tmp, pickle);
    const TorchFile f("file", bytes_of_file(file));
    REQUIRE(f.tensors().size() == 1);
    return f.tensors()[0].bytes.size();
  };
  const std::string zero("K\0", 2), two_four = "K\x02K\x04\x86", strides = "K\x04K\x01\x86";
  const std::string minus = "J\xff\xff\xff\xff", huge = "\x8a\x08" + std::string("\xff\xff\xff\xff\xff\xff\xff\x7f", 8);
  CHECK(open(one_tensor()) == 32);
  CHECK(open(one_tensor("K\4", "K\4\x85", "K\1\x85")) == 16);
  CHECK(open(one_tensor(zero, "K\1K\4\x86", "K\x63K\1\x86")) == 16);  // the stride of an extent of 1 means nothing
  check_error([&] { open(one_tensor("K\1")); }, {"file", "a", "[2, 4] from element 1", "8 elements"});
  check_error([&] { open(one_tensor(minus)); }, {"from element -1"});
  check_error([&] { open(one_tensor(huge)); }, {"from element 9223372036854775807"});
  check_error([&] { open(one_tensor(zero, "K\2K\5\x86", "K\5K\1\x86")); }, {"[2, 5] from element 0", "8 elements"});
  check_error([&] { open(one_tensor(zero, two_four, "K\1K\2\x86")); }, {"a contiguous tensor", "stride 2"});
  check_error([&] { open(one_tensor(zero, two_four, "K\4\x85")); }, {"the parts of a tensor"});
  check_error([&] { open(one_tensor(zero, minus + "\x85", "K\1\x85")); }, {"extents from 0 to 2^48", "-1"});
  check_error([&] { open(one_tensor(zero, huge + "\x85", "K\1\x85")); }, {"extents from 0 to 2^48"});
  const std::string many = "\x8a\x06" + std::string("\0\0\0\0\0\1", 6);  // 2^40
  check_error([&] { open(one_tensor(zero, many + many + "\x86", many + "K\1\x86")); }, {"fewer than 2^64 weights"});
  check_error([&] { open(one_tensor(zero, two_four, strides, "ctorch\nDoubleStorage\n")); }, {"4 elements"});
  check_error([&] { open(one_tensor(zero, two_four, strides, "ccollections\nOrderedDict\n")); }, {"a storage"});
  const std::string key_7("X\1\0\0\0007", 6);
  check_error([&] { open(one_tensor(zero, two_four, strides, "ctorch\nFloatStorage\n", key_7)); }, {"its content, data/7", "none"});
  check_error([&] { open(one_tensor(zero, two_four, strides, "N")); }, {"the parts of a tensor"});
  check_error([&] { open(one_tensor("N")); }, {"the parts of a tensor"});
  check_error([&] { TorchFile("file", bytes_of_file(archive(tmp, one_tensor(), "big"))); }, {"byteorder", "little"});
}

namespace {

volatile unsigned sink;  // keeps the reads

void use(std::span<const std::byte> bytes) {
  const TorchFile file("file", bytes);
  for (const TorchTensor& t : file.tensors())
    for (const std::byte b : t.bytes) sink = sink + static_cast<unsigned>(b);
  (void)LitCheckpoint(std::make_shared<const TorchFile>("file", bytes), std::nullopt);
}

}  // namespace

TEST_CASE("damaged torch files: an Error, or tensors that can be read") {
  const TempFolder tmp;
  const std::vector<std::string> files = {read_file(fixture("lit/views.pt")), archive(tmp, one_tensor())};
  int errors = 0, successes = 0;
  for (const std::string& good : files) {
    const auto attempt = [&](const std::string& bad) {
      const std::vector<char> exact(bad.begin(), bad.end());  // memory of exactly their size, for the address sanitizer
      try {
        const TorchFile file("file", std::as_bytes(std::span(exact)));
        for (const TorchTensor& t : file.tensors())
          for (const std::byte b : t.bytes) sink = sink + static_cast<unsigned>(b);
        ++successes;
      } catch (const Error&) {
        ++errors;
      }
    };
    for (std::size_t i = 0; i < good.size(); ++i) {
      for (int bit = 0; bit < 8; ++bit) {
        std::string bad = good;
        bad[i] = static_cast<char>(bad[i] ^ (1 << bit));
        attempt(bad);
      }
      for (const std::uint64_t v : {~0ull, 1ull << 63, 1ull << 32, 0ull}) {
        std::string bad = good;
        const std::size_t n = std::min<std::size_t>(8, bad.size() - i);
        attempt(bad.replace(i, n, raw(v).substr(0, n)));
      }
      attempt(good.substr(0, i));
    }
  }
  const std::string lit = read_file(fixture("lit/training.ckpt"));
  std::mt19937 random(5);
  for (int i = 0; i < 3000; ++i) {
    std::string bad = lit;
    for (std::uint32_t n = 1 + random() % 3; n > 0; --n) bad[random() % (n == 1 ? bad.size() : 8192)] = static_cast<char>(random());
    const std::vector<char> exact(bad.begin(), bad.end());
    try {
      use(std::as_bytes(std::span(exact)));
    } catch (const Error&) {
    }
  }
  CHECK(errors > 1000);
  CHECK(successes > 1000);
}
