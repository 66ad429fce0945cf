// Opening checkpoints of each kind, and a word for each way in which tensors, config and index can disagree.
#include "tinyllama/io/checkpoint.hpp"

#include <doctest/doctest.h>

#include "tests/io/small_model.hpp"
#include "tinyllama/io/gguf_writer.hpp"
#include "tinyllama/quant/e4m3.hpp"

namespace {

using namespace tinyllama;
using namespace tinyllama::test;

const SafeTensor& named(const SmallModel& m, std::string_view name) {
  return *std::find_if(m.tensors.begin(), m.tensors.end(), [&](const SafeTensor& t) { return t.name == name; });
}

Parameter parameter(const any_llama& c, Slot slot, int layer = -1) {
  std::optional<Parameter> found;
  for_each_parameter(c, [&](const Parameter& p) {
    if (p.slot == slot && p.layer == layer) found = p;
  });
  return found.value();
}

/// A folder in which `change` may edit the tensors before they are written.
template <class F>
void write_changed(const std::filesystem::path& folder, const SmallModel& model, F&& change) {
  std::vector<SafeTensor> tensors = model.tensors;
  change(tensors);
  std::filesystem::create_directories(folder);
  write_safetensors(folder / "model.safetensors", tensors);
  write_file(folder / "config.json", config_json(model.config));
}

/// A GGUF file of the model's weights; `change` may edit the metadata, the plan and the content.
template <class F>
void write_gguf_changed(const std::filesystem::path& path, const SmallModel& model, F&& change) {
  GgufMetadata m;
  std::vector<GgufTensorPlan> plan;
  std::vector<std::vector<float>> content = model.weights;
  for_each_parameter(model.config, [&](const Parameter& p) { plan.push_back({p.gguf_name(), Format::f32, p.rows, p.columns, p.role == Role::gain}); });
  change(m, plan, content);
  if (m.count() == 0) set_config(m, model.config);
  write_gguf(path, m, plan, [&](std::size_t i, FileWriter& w) { w.write(std::as_bytes(std::span(content[i]))); });
}

}  // namespace

TEST_CASE("a folder: every tensor by its parameter") {
  for (bool tied : {false, true}) {
    const TempFolder tmp;
    const SmallModel model(small_config(tied));
    model.write(tmp.path());
    for (const auto& path : {tmp.path(), tmp / "model.safetensors"}) {
      const Checkpoint c = open_checkpoint(path);
      CHECK(c.config == model.config);
      CHECK(c.source == "safetensors");
      CHECK(c.rope == RopeLayout::half);
      CHECK(c.folder() == tmp.path());
      CHECK(c.gguf() == nullptr);
      CHECK(c.tensors().size() == model.tensors.size());
      std::size_t i = 0;
      for_each_parameter(model.config, [&](const Parameter& p) {
        const StoredTensor& t = c.tensor(p);
        CHECK(t.name == p.hf_name());
        CHECK(t.format == Format::f32);
        REQUIRE(t.bytes.size() == model.weights[i].size() * 4);
        CHECK(std::memcmp(t.bytes.data(), model.weights[i].data(), t.bytes.size()) == 0);
        CHECK(t.row(p.rows - 1).data() + t.row(p.rows - 1).size() == t.bytes.data() + t.bytes.size());
        c.release(t);
        CHECK(std::memcmp(t.bytes.data(), model.weights[i].data(), t.bytes.size()) == 0);
        ++i;
      });
    }
  }
}

TEST_CASE("a copy keeps the mappings alive") {
  const TempFolder tmp;
  const SmallModel model(small_config());
  model.write(tmp.path());
  auto first = std::make_unique<Checkpoint>(open_checkpoint(tmp.path()));
  const Checkpoint second = *first;
  first.reset();
  CHECK(std::memcmp(second.tensors()[0].bytes.data(), model.weights[0].data(), 64) == 0);
}

TEST_CASE("a config that the file does not fit is told the tensor") {
  const TempFolder tmp;
  const SmallModel model(small_config());
  model.write(tmp.path());
  const Checkpoint c = open_checkpoint(tmp.path());
  any_llama other = model.config;
  other.kv_heads = 4;
  check_error([&] { (void)c.tensor(parameter(other, Slot::k, 1)); }, {"model.safetensors", "model.layers.1.self_attn.k_proj.weight", "expected [64, 64]", "found [32, 64]"});
  other.layers = 3;
  check_error([&] { (void)c.tensor(parameter(other, Slot::attn_norm, 2)); }, {"model.layers.2.input_layernorm.weight", "a tensor of shape [64]", "found none"});
}

TEST_CASE("a folder whose tensors are wrong is refused") {
  const TempFolder tmp;
  const SmallModel model(small_config()), tied(small_config(true));
  const auto refused = [&](const SmallModel& m, auto&& change, std::initializer_list<std::string_view> words) {
    write_changed(tmp.path(), m, change);
    check_error([&] { open_checkpoint(tmp.path()); }, words);
  };
  const auto at = [](std::vector<SafeTensor>& t, std::string_view name) { return std::find_if(t.begin(), t.end(), [&](const auto& x) { return x.name == name; }); };
  const std::string down = "model.layers.1.mlp.down_proj.weight";
  refused(model, [&](auto& t) { t.erase(at(t, down)); }, {"model.safetensors", down, "a tensor of shape [64, 96]", "found none"});
  refused(model, [&](auto& t) { at(t, down)->shape = {96, 64}; }, {down, "expected [64, 96]", "found [96, 64]"});
  refused(model, [&](auto& t) { at(t, down)->shape = {64 * 96}; }, {down, "expected [64, 96]", "found [6144]"});
  refused(model, [&](auto& t) { at(t, "model.norm.weight")->shape = {1, 64}; }, {"model.norm.weight", "expected [64]", "found [1, 64]"});
  refused(model, [&](auto& t) { at(t, down)->dtype = "I32"; }, {down, "F32, F16, BF16 or F8_E4M3", "found I32"});
  refused(model, [&](auto& t) { t.push_back(*at(t, down)), t.back().name = "model.layers.2.mlp.down_proj.weight"; }, {"model.layers.2.mlp.down_proj.weight", "only the tensors of a Llama of 2 layers"});
  refused(model, [&](auto& t) { t.push_back(*at(t, "model.norm.weight")), t.back().name = "model.layers.0.self_attn.q_proj.bias"; }, {"q_proj.bias", "only the tensors"});
  refused(tied, [&](auto& t) { t.push_back(*at(t, "model.embed_tokens.weight")), t.back().name = "lm_head.weight", t.back().bytes = named(model, "lm_head.weight").bytes; },
          {"lm_head.weight", "the embedding again", "other weights"});

  write_changed(tmp.path(), tied, [&](auto& t) { t.push_back(*at(t, "model.embed_tokens.weight")), t.back().name = "lm_head.weight"; });
  CHECK(open_checkpoint(tmp.path()).tensors().size() == tied.tensors.size());
  write_changed(tmp.path(), model, [&](auto& t) { t.push_back(*at(t, "model.norm.weight")), t.back().name = "model.layers.0.self_attn.rotary_emb.inv_freq"; });
  CHECK(open_checkpoint(tmp.path()).tensors().size() == model.tensors.size());
}

TEST_CASE("a folder of 8-bit floats: scales of every shape, and those that are refused") {
  const SmallModel model(small_config());
  const std::string name = "model.layers.1.mlp.up_proj.weight";
  const index_t rows = 96, columns = 64;
  std::vector<std::byte> codes(static_cast<std::size_t>(rows * columns));
  for (std::size_t i = 0; i < codes.size(); ++i) codes[i] = std::byte(i * 7 % 127);
  std::vector<float> scales;
  for (index_t r = 0; r < rows; ++r) scales.push_back(static_cast<float>(r + 1) / 64);
  const std::vector<bf16> narrow(scales.begin(), scales.end());
  const std::vector<f16> half(scales.begin(), scales.end());
  const auto write = [&](const std::filesystem::path& folder, std::optional<SafeTensor> scale) {
    write_changed(folder, model, [&](auto& t) {
      for (SafeTensor& s : t)
        if (s.name == name) s.dtype = "F8_E4M3", s.bytes = codes;
      if (scale) t.push_back(*scale);
    });
  };
  const auto f32 = std::as_bytes(std::span(scales));
  const Parameter up = parameter(model.config, Slot::up, 1);
  const TempFolder tmp;
  const auto check = [&](std::optional<SafeTensor> scale, bool each) {
    write(tmp.path(), scale);
    const Checkpoint c = open_checkpoint(tmp.path());
    const StoredTensor& t = c.tensor(up);
    CHECK(t.format == Format::f8_e4m3);
    std::vector<float> row(static_cast<std::size_t>(columns));
    for (index_t r = 0; r < rows; ++r) {
      decode_stored_row(t, r, row.data(), columns);
      const float factor = !scale ? 1.0f : each ? scales[static_cast<std::size_t>(r)] : scales[0];
      CHECK(row[5] == static_cast<float>(e4m3::from_bits(std::to_integer<std::uint8_t>(codes[static_cast<std::size_t>(r * columns + 5)]))) * factor);
    }
  };
  const std::string of_rows = name + "_scale";
  check(SafeTensor{of_rows, "F32", {rows, 1}, f32}, true);
  check(SafeTensor{of_rows, "F32", {rows}, f32}, true);
  check(SafeTensor{of_rows, "BF16", {rows, 1}, std::as_bytes(std::span(narrow))}, true);
  check(SafeTensor{of_rows, "F16", {rows}, std::as_bytes(std::span(half))}, true);
  check(SafeTensor{of_rows, "F32", {}, f32.first(4)}, false);
  check(SafeTensor{of_rows, "BF16", {1}, std::as_bytes(std::span(narrow)).first(2)}, false);
  check(std::nullopt, false);
  const auto refused = [&](const SafeTensor& scale, std::initializer_list<std::string_view> words) {
    write(tmp.path(), scale);
    check_error([&] { open_checkpoint(tmp.path()); }, words);
  };
  refused({of_rows, "F32", {1, rows}, f32}, {of_rows, "[96] or [96, 1]", "found [1, 96]"});
  refused({of_rows, "F32", {rows / 2}, f32.first(4 * rows / 2)}, {of_rows, "[96] or [96, 1]", "found [48]"});
  refused({of_rows, "I32", {rows}, f32}, {of_rows, "dtype F32, F16 or BF16", "found I32"});
  refused({of_rows, "F8_E4M3", {rows}, f32.first(rows)}, {of_rows, "dtype F32, F16 or BF16", "found F8_E4M3"});
  refused({of_rows + "_inv", "F32", {rows}, f32}, {of_rows + "_inv", "only the tensors"});
  refused({"model.layers.0.mlp.up_proj.weight_scale", "F32", {rows}, f32}, {"layers.0", "only the tensors"});  // of a matrix in f32
  write_changed(tmp.path(), model, [&](auto& t) {
    for (SafeTensor& s : t)
      if (s.name == "model.norm.weight") s.dtype = "F8_E4M3", s.bytes = s.bytes.first(64);
  });
  check_error([&] { open_checkpoint(tmp.path()); }, {"model.norm.weight", "f32, f16 or bf16", "found f8_e4m3"});
}

TEST_CASE("an index of shards is checked against the shards") {
  const TempFolder tmp;
  const SmallModel model(small_config());
  const auto middle = model.tensors.begin() + 7;
  const std::vector<SafeTensor> first(model.tensors.begin(), middle), second(middle, model.tensors.end());
  write_safetensors(tmp / "a.safetensors", first);
  write_safetensors(tmp / "b.safetensors", second);
  write_file(tmp / "config.json", config_json(model.config));
  const auto write_index = [&](auto&& change) {
    detail::json map = detail::json::object();
    for (const auto& t : first) map[t.name] = "a.safetensors";
    for (const auto& t : second) map[t.name] = "b.safetensors";
    change(map);
    write_file(tmp / "model.safetensors.index.json", detail::json{{"metadata", detail::json::object()}, {"weight_map", map}}.dump());
  };
  const auto refused = [&](auto&& change, std::initializer_list<std::string_view> words) {
    write_index(change);
    check_error([&] { open_checkpoint(tmp.path()); }, words);
  };
  write_index([](auto&) {});
  for (const auto& path : {tmp.path(), tmp / "model.safetensors.index.json"}) {
    const Checkpoint c = open_checkpoint(path);
    for (std::size_t i = 0; i < model.tensors.size(); ++i) CHECK(std::memcmp(c.tensors()[i].bytes.data(), model.weights[i].data(), model.weights[i].size() * 4) == 0);
    CHECK(c.tensors().front().file == (tmp / "a.safetensors").string());
    CHECK(c.tensors().back().file == (tmp / "b.safetensors").string());
  }
  const std::string norm = "model.norm.weight";
  refused([&](auto& m) { m[norm] = "c.safetensors"; }, {"c.safetensors", "a readable file"});
  refused([&](auto& m) { m[norm] = "a.safetensors"; }, {"a.safetensors", norm, "as model.safetensors.index.json says", "none"});
  refused([&](auto& m) { m.erase(norm); }, {"b.safetensors", std::to_string(second.size() - 1) + " tensors", "found " + std::to_string(second.size())});
  for (const char* escape : {"../a.safetensors", "/etc/passwd", "..", ".", "", "x\\a.safetensors"})
    refused([&](auto& m) { m[norm] = escape; }, {"model.safetensors.index.json", norm, "a file name without a folder", escape[0] == 'x' ? "x" : escape});
  refused([&](auto& m) { m[norm] = std::string("a.safetensors\0x", 15); }, {norm, "a file name without a folder"});
  refused([&](auto& m) { m[norm] = 5; }, {norm, "a file name without a folder", "found 5"});
  refused([&](auto& m) { m = 5; }, {"weight_map", "an object", "found 5"});
  write_file(tmp / "model.safetensors.index.json", "{}");
  check_error([&] { open_checkpoint(tmp.path()); }, {"weight_map", "nothing"});

  write_safetensors(tmp / "b.safetensors", model.tensors);  // holds a's tensors too
  refused([&](auto&) {}, {"b.safetensors", "tensors, as model.safetensors.index.json says"});
  refused([&](auto& m) { m.clear(); for (const auto& t : first) m[t.name] = "a.safetensors"; for (const auto& t : model.tensors) m[t.name] = "b.safetensors"; m[norm] = "a.safetensors"; }, {norm});
}

TEST_CASE("paths that lead nowhere") {
  const TempFolder tmp;
  check_error([&] { open_checkpoint(tmp.path()); }, {tmp.path().string(), "model.safetensors or model.safetensors.index.json", "found neither"});
  write_file(tmp / "pytorch_model.bin", "PK");
  check_error([&] { open_checkpoint(tmp.path()); }, {"pytorch_model.bin: save it as safetensors"});
  check_error([&] { open_checkpoint(tmp / "pytorch_model.bin"); }, {"a GGUF file, a safetensors file or folder", "something else"});
  check_error([&] { open_checkpoint(tmp / "nothing"); }, {"nothing", "a readable file"});
  write_file(tmp / "x.gguf", "what");
  check_error([&] { open_checkpoint(tmp / "x.gguf"); }, {"not a GGUF file"});
  SmallModel(small_config()).write(tmp.path());
  std::filesystem::remove(tmp / "config.json");
  check_error([&] { open_checkpoint(tmp.path()); }, {"config.json", "a readable file"});
}

TEST_CASE("a GGUF file: config from metadata, every tensor by its parameter") {
  for (bool tied : {false, true}) {
    const TempFolder tmp;
    any_llama config = small_config(tied);
    config.rope_scale = tied ? 4.0f : 1.0f;
    const SmallModel model(config);
    write_gguf_changed(tmp / "m.gguf", model, [](auto&, auto&, auto&) {});
    const Checkpoint c = open_checkpoint(tmp / "m.gguf");
    CHECK(c.config == config);
    CHECK(c.source == "gguf");
    CHECK(c.rope == RopeLayout::interleaved);
    REQUIRE(c.gguf());
    CHECK(c.gguf()->get_string("general.architecture") == "llama");
    std::size_t i = 0;
    for_each_parameter(config, [&](const Parameter& p) {
      CHECK(c.tensor(p).name == p.gguf_name());
      CHECK(std::memcmp(c.tensor(p).bytes.data(), model.weights[i].data(), model.weights[i].size() * 4) == 0);
      ++i;
    });
    any_llama other = config;
    other.ffn = 128;
    check_error([&] { (void)c.tensor(parameter(other, Slot::down, 0)); }, {"m.gguf", "blk.0.ffn_down.weight", "expected [64, 128]", "found [64, 96]"});
    other.layers = 3;
    check_error([&] { (void)c.tensor(parameter(other, Slot::down, 2)); }, {"blk.2.ffn_down.weight", "none"});
  }
}

TEST_CASE("a GGUF file whose metadata is not a Llama's is refused") {
  const TempFolder tmp;
  const SmallModel model(small_config());
  const auto refused = [&](auto&& metadata, std::initializer_list<std::string_view> words) {
    write_gguf_changed(tmp / "m.gguf", model, [&](GgufMetadata& m, auto&, auto&) { metadata(m); });
    check_error([&] { open_checkpoint(tmp / "m.gguf"); }, words);
  };
  const auto more = [&](auto&& add) { return [&, add](GgufMetadata& m) { set_config(m, model.config), add(m); }; };
  refused([](auto& m) { m.set_string("general.architecture", "gpt2"); }, {"m.gguf: general.architecture", "expected llama", "found gpt2"});
  refused([](auto& m) { m.set_uint("x", 1); }, {"general.architecture", "nothing"});
  refused([](auto& m) { m.set_string("general.architecture", "llama"); }, {"llama.block_count", "an integer", "nothing"});
  refused(more([](auto& m) { m.set_uint("llama.attention.key_length", 32); }), {"llama.attention.key_length", "hidden / heads = 16", "found 32"});
  refused(more([](auto& m) { m.set_uint("llama.expert_count", 8); }), {"llama.expert_count", "found 8"});
  refused(more([](auto& m) { m.set_uint("split.count", 2); }), {"split.count", "found 2"});
  refused(more([](auto& m) { m.set_string("llama.rope.scaling.type", "yarn"); }), {"llama.rope.scaling.type", "none or linear", "yarn"});
  any_llama bad = model.config;
  const auto with_config = [&](auto&& change) {
    return [&, change](GgufMetadata& m) {
      bad = model.config;
      change(bad);
      set_config(m, bad);
    };
  };
  refused(with_config([](auto& c) { c.layers = 0; }), {"layers", "between 1 and 1024", "found 0"});
  refused(with_config([](auto& c) { c.heads = 3; }), {"heads", "a divisor of hidden = 64"});
  refused(with_config([](auto& c) { c.layers = 3; }), {"blk.2.attn_norm.weight", "a tensor of shape [64]", "none"});
  refused(with_config([](auto& c) { c.layers = 1; }), {"blk.1.", "only the tensors of a Llama of 1 layers"});
  refused(with_config([](auto& c) { c.ffn = 128; }), {"blk.0.ffn_gate.weight", "expected [128, 64]", "found [96, 64]"});
  refused(with_config([](auto& c) { c.hidden = 128; }), {"token_embd.weight", "expected [40, 128]", "found [40, 64]"});
  refused(with_config([](auto& c) { c.norm_eps = 0; }), {"norm_eps"});
}

TEST_CASE("a GGUF file whose tensors are wrong is refused") {
  const TempFolder tmp;
  const SmallModel model(small_config());
  const auto refused = [&](auto&& change, std::initializer_list<std::string_view> words) {
    write_gguf_changed(tmp / "m.gguf", model, change);
    check_error([&] { open_checkpoint(tmp / "m.gguf"); }, words);
  };
  refused([](auto&, auto& plan, auto&) { plan[0].name = "other"; }, {"token_embd.weight", "[vocab, 64]", "none"});
  refused([](auto&, auto& plan, auto&) { plan[3].name = "blk.0.attn_k.bias"; }, {"blk.0.attn_k.weight", "none"});
  refused([](auto&, auto& plan, auto&) { std::swap(plan[2].name, plan[3].name); }, {"blk.0.attn_q.weight", "expected [64, 64]", "found [32, 64]"});
  refused([](auto&, auto& plan, auto&) { plan[1].vector = false; }, {"blk.0.attn_norm.weight", "expected [64]", "found [1, 64]"});
  refused([](auto&, auto& plan, auto& content) { plan.push_back({"rope_freqs.weight", Format::f32, 1, 8, true}), content.emplace_back(8); },
          {"rope_freqs.weight", "plain or linear RoPE", "not supported"});
  refused([](auto&, auto& plan, auto& content) { plan.push_back({"blk.0.attn_q.bias", Format::f32, 1, 64, true}), content.emplace_back(64); }, {"blk.0.attn_q.bias", "only the tensors"});
  refused([](auto&, auto& plan, auto& content) { plan[1].format = Format::q8_0, content[1].resize(17); }, {"blk.0.attn_norm.weight", "f32, f16 or bf16", "found q8_0"});
}

TEST_CASE("the golden models open") {
  for (const auto& [folder, tensors] : {std::pair{"goldens/gqa", 21}, {"goldens/tied", 29}}) {
    std::filesystem::path path = fixture(folder);
    if (!std::filesystem::exists(path)) path = test_data(folder).value_or("");
    if (path.empty()) {
      MESSAGE("skipped: no " << folder);
      return;
    }
    const Checkpoint c = open_checkpoint(path);
    CHECK(c.tensors().size() == static_cast<std::size_t>(tensors));
    CHECK(c.config.tied == (tensors == 29));
    CHECK(c.config.rope_base == (tensors == 29 ? 100000.0f : 10000.0f));
    CHECK(c.config.kv_heads == 2);
  }
}

TEST_CASE("SmolLM2 opens and is its preset") {
  const auto path = smollm2_gguf();
  if (!path) {
    MESSAGE("skipped: no SmolLM2");
    return;
  }
  const Checkpoint c = open_checkpoint(*path);
  CHECK(preset_name(c.config) == "smollm2_135m");
  CHECK(c.tensor(parameter(c.config, Slot::embedding)).format == Format::q8_0);
  CHECK(c.tensor(parameter(c.config, Slot::q, 29)).format == Format::q4_1);
}
