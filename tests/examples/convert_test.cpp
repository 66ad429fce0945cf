// convert as scripts see it: every way round between the formats gives the same weights, and what cannot be is told in one line.
#include <doctest/doctest.h>

#include <algorithm>
#include <cstdlib>
#include <fstream>
#include <string>
#include <utility>
#include <vector>

#include <nlohmann/json.hpp>

#include "tests/examples/run.hpp"

namespace {

using namespace tinyllama::test;
using nlohmann::json;
namespace fs = std::filesystem;

Result convert(const std::string& arguments) { return run_shell("convert", arguments); }

}  // namespace

TEST_CASE("convert: Hugging Face, lit and GGUF in a ring, bit by bit") {
  const TempFolder tmp;
  const auto go = [&](const std::string& from, const fs::path& to, const std::string& more = "") {
    const Result r = convert("--from '" + from + "' --to " + to.string() + " --json " + more);
    REQUIRE_MESSAGE(r.status == 0, r.err);
    return json::parse(r.out);
  };
  const std::string gqa = fixture("goldens/gqa").string();
  const json first = go(gqa, tmp / "hf");
  CHECK(first["from_format"] == "safetensors");
  CHECK(first["to_format"] == "hf");
  CHECK(first["dtype"] == "f32");
  const std::string model = read_file(tmp / "hf" / "model.safetensors"), config = read_file(tmp / "hf" / "config.json");
  REQUIRE(first["parameters"].get<std::size_t>() * 4 < model.size());

  CHECK(go((tmp / "hf").string(), tmp / "lit", "--to-format lit")["to_format"] == "lit");
  CHECK(go((tmp / "lit").string(), tmp / "m.gguf")["from_format"] == "lit");
  CHECK(go((tmp / "m.gguf").string(), tmp / "m.pth", "--key model")["to_format"] == "lit");
  CHECK(go((tmp / "m.pth").string(), tmp / "back", "--config " + (tmp / "hf" / "config.json").string())["to_format"] == "hf");
  CHECK(read_file(tmp / "back" / "model.safetensors") == model);
  go((tmp / "lit").string(), tmp / "back2");
  CHECK(read_file(tmp / "back2" / "model.safetensors") == model);
  CHECK(read_file(tmp / "back2" / "config.json") == config);

  go((tmp / "lit").string(), tmp / "half", "--dtype bf16");
  CHECK(json::parse(read_file(tmp / "half" / "config.json"))["torch_dtype"] == "bfloat16");
  const auto full = fs::file_size(tmp / "back" / "model.safetensors"), half = fs::file_size(tmp / "half" / "model.safetensors");
  CHECK(half < full * 6 / 10);

  for (const char* const step : {"step-00000007", "step-00000012"}) {  // a training run: its newest checkpoint
    fs::create_directories(tmp / "run" / step);
    for (const char* const file : {"training_state.json", "training_state.safetensors"}) std::ofstream(tmp / "run" / step / file) << "{}";
  }
  fs::copy(tmp / "hf", tmp / "run" / "step-00000012");
  CHECK(go((tmp / "run").string(), tmp / "newest")["from"].get<std::string>().ends_with("step-00000012"));
  CHECK(read_file(tmp / "newest" / "model.safetensors") == model);
}

TEST_CASE("convert: bad usage is status 2, an Error is status 1 and one line") {
  const TempFolder tmp;
  const std::string to = " --to " + (tmp / "x").string(), gqa = fixture("goldens/gqa").string(), lit = fixture("lit/lit_model.pth").string();
  CHECK(convert("").status == 2);
  CHECK(convert("--from '" + gqa + "'" + to + " --dtype q9_9").status == 2);
  CHECK(convert("--from '" + gqa + "'" + to + " --to-format onnx").status == 2);
  CHECK(convert("--help").status == 0);
  const std::vector<std::pair<std::string, std::string>> cases = {
      {"--from /no/such.pth" + to, "/no/such.pth"}, {"--from /no/such" + to, "/no/such"},
      {"--from '" + lit + "'" + to, "lit_config.json"},
      {"--from '" + lit + "'" + to + " --config tinyllama_9b", "'tinyllama_9b'"},
      {"--from '" + lit + "'" + to + " --config stories_260k", "[512, 64]"},
      {"--from '" + gqa + "'" + to + " --config stories_260k", "--config"}, {"--from '" + gqa + "'" + to + ".pth --dtype q8_0", "q8_0"}};
  for (const auto& [arguments, word] : cases) {
    CAPTURE(arguments);
    const Result r = convert(arguments);
    CHECK(r.status == 1);
    CHECK_MESSAGE((r.err.starts_with("error: ") && std::count(r.err.begin(), r.err.end(), '\n') == 1), r.err);
    CHECK_MESSAGE(r.err.find(word) != r.err.npos, r.err);
    CHECK(r.out.empty());
  }
}
