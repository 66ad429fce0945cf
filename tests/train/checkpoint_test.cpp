// Checkpoints of a run: round trips, what is kept, tokenizer files, every way to be wrong or damaged, a full disk, and SIGKILL at random moments.
#include "tinyllama/train/checkpoint.hpp"

#include <doctest/doctest.h>

#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/wait.h>

#include <algorithm>
#include <atomic>
#include <bit>
#include <chrono>
#include <csignal>
#include <map>
#include <random>
#include <thread>

#include "tests/io/small_model.hpp"

namespace {

using namespace tinyllama;
using namespace tinyllama::test;
namespace fs = std::filesystem;

std::vector<float> noise(std::size_t n, std::uint32_t seed) {
  std::mt19937 random(seed);
  std::vector<float> v(n);
  for (float& x : v) x = static_cast<float>(static_cast<std::int32_t>(random())) * 0x1p-33f;
  return v;
}

/// What a trainer keeps.
struct Run {
  any_llama config = small_config();
  std::vector<float> parameters = noise(static_cast<std::size_t>(parameter_count(config)), 1);
  std::vector<float> first = noise(parameters.size(), 2), second = noise(parameters.size(), 3);

  std::vector<NamedArray> arrays() const { return {{"first_moment", first}, {"second_moment", second}}; }
  std::vector<MutableNamedArray> mutable_arrays() { return {{"first_moment", first}, {"second_moment", second}}; }
  fs::path save(const fs::path& root, std::int64_t step, const SaveCheckpointOptions& options = {}) const {
    return save_checkpoint(root, step, config, parameters, arrays(), R"({"seed": 18446744073709551615, "position": [1, 2], "lr": 0.1})", options);
  }
  LoadedCheckpoint load(const fs::path& folder) { return load_checkpoint(folder, config, parameters, mutable_arrays()); }
  void clear() {
    for (auto* v : {&parameters, &first, &second}) std::fill(v->begin(), v->end(), 0.0f);
  }
};

std::vector<std::string> names_in(const fs::path& folder) {
  std::vector<std::string> names;
  for (const auto& e : fs::directory_iterator(folder)) names.push_back(e.path().filename().string());
  std::sort(names.begin(), names.end());
  return names;
}

/// Flips one bit of the last byte but `from_end`.
void damage(const fs::path& path, std::size_t from_end) {
  std::string s = read_file(path);
  s[s.size() - 1 - from_end] = static_cast<char>(s[s.size() - 1 - from_end] ^ 1);
  write_file(path, s);
}

void replace_in(const fs::path& path, std::string_view from, std::string_view to) {
  std::string s = read_file(path);
  const auto at = s.find(from);
  REQUIRE(at != s.npos);
  write_file(path, s.replace(at, from.size(), to));
}

}  // namespace

TEST_CASE("checkpoint: what was saved comes back bit by bit, and is a Hugging Face folder") {
  const TempFolder tmp;
  const Run saved;
  CHECK_FALSE(latest_checkpoint(tmp / "run"));
  const fs::path folder = saved.save(tmp / "run", 1234);
  CHECK(folder == tmp / "run" / "step-00001234");
  CHECK(names_in(tmp / "run") == std::vector<std::string>{"step-00001234"});
  CHECK(names_in(folder) == std::vector<std::string>{"config.json", "model.safetensors", "training_state.json", "training_state.safetensors"});
  CHECK(latest_checkpoint(tmp / "run") == folder);

  Run loaded;
  loaded.clear();
  const LoadedCheckpoint c = loaded.load(folder);
  CHECK(c.step == 1234);
  const auto state = detail::parse_json(c.state, "state");
  CHECK(state["seed"] == 18446744073709551615u);
  CHECK(state["lr"] == 0.1);
  CHECK(std::memcmp(loaded.parameters.data(), saved.parameters.data(), 4 * saved.parameters.size()) == 0);
  CHECK(std::memcmp(loaded.first.data(), saved.first.data(), 4 * saved.first.size()) == 0);
  CHECK(std::memcmp(loaded.second.data(), saved.second.data(), 4 * saved.second.size()) == 0);

  const Checkpoint model = open_checkpoint(folder);
  CHECK(model.config == saved.config);
  const Parameter q = model.tensors()[2].parameter;
  CHECK(q.slot == Slot::q);
  CHECK(std::memcmp(model.tensor(q).row(3).data(), saved.parameters.data() + 40 * 64 + 64 + 3 * 64, 256) == 0);
}

TEST_CASE("checkpoint: NaN, infinity and minus zero keep their bits") {
  const TempFolder tmp;
  Run run;
  const std::uint32_t bits[] = {0x7fc00001u, 0xff800000u, 0x80000000u, 0x00000001u};
  for (std::size_t i = 0; i < 4; ++i) run.parameters[i] = run.second[i] = std::bit_cast<float>(bits[i]);
  const fs::path folder = run.save(tmp.path(), 0);
  run.clear();
  CHECK(run.load(folder).step == 0);
  for (std::size_t i = 0; i < 4; ++i) {
    CHECK(std::bit_cast<std::uint32_t>(run.parameters[i]) == bits[i]);
    CHECK(std::bit_cast<std::uint32_t>(run.second[i]) == bits[i]);
  }
}

TEST_CASE("checkpoint: a bf16 model for others, and f32 weights to go on with") {
  const TempFolder tmp;
  Run run;
  const std::vector<float> before = run.parameters;
  const fs::path folder = run.save(tmp.path(), 5, {.format = Format::bf16});
  CHECK(open_checkpoint(folder).tensors()[0].format == Format::bf16);
  run.clear();
  run.load(folder);
  CHECK(run.parameters == before);
}

TEST_CASE("checkpoint: adapters alone") {
  const TempFolder tmp;
  const std::vector<float> a = noise(100, 1);
  const std::vector<NamedArray> arrays = {{"adapters", a}, {"empty", {}}};
  const fs::path folder =
      save_checkpoint(tmp.path(), 3, small_config(), {}, arrays, "{}", {.also = [](const fs::path& into) { write_file(into / "more", "x"); }});
  CHECK(names_in(folder) == std::vector<std::string>{"config.json", "more", "training_state.json", "training_state.safetensors"});
  std::vector<float> b(100);
  const std::vector<MutableNamedArray> to = {{"adapters", b}, {"empty", {}}};
  CHECK(load_checkpoint(folder, small_config(), {}, to).state == "{}");
  CHECK(a == b);
  Run run;
  check_error([&] { load_checkpoint(folder, small_config(), run.parameters, to); }, {"step-00000003", "model.safetensors"});
  check_error([&] { load_checkpoint(run.save(tmp.path(), 4), small_config(), {}, run.mutable_arrays()); },
              {"step-00000004", "parameters", "found 0 floats"});
}

TEST_CASE("checkpoint: the newest K stay, and one of the same step is replaced") {
  const TempFolder tmp;
  Run run;
  for (const std::int64_t step : {1, 2, 9, 10, 123456789}) run.save(tmp.path(), step, {.keep = 3});
  CHECK(names_in(tmp.path()) == std::vector<std::string>{"step-00000009", "step-00000010", "step-123456789"});
  CHECK(latest_checkpoint(tmp.path()) == tmp / "step-123456789");
  run.first[0] = 42;
  run.save(tmp.path(), 10, {.keep = 3});
  CHECK(names_in(tmp.path()).size() == 3);
  run.clear();
  run.load(tmp / "step-00000010");
  CHECK(run.first[0] == 42);
  run.save(tmp.path(), 3, {.keep = 1});  // a run that went back by hand: what it saved is not what goes
  CHECK(names_in(tmp.path()) == std::vector<std::string>{"step-00000003"});
  for (const std::int64_t step : {4, 5, 6}) run.save(tmp.path(), step, {.keep = 0});
  CHECK(list_checkpoints(tmp.path()).size() == 4);
}

TEST_CASE("checkpoint: what is no checkpoint is neither found nor removed; what killed runs left is removed") {
  const TempFolder tmp;
  const Run run;
  for (const char* name : {".step-00000001.part", ".step-00000002.old", "step-00000007", "step-3", "step-00000004x", ".other.part",
                           "step-00000005.part"}) {
    fs::create_directories(tmp / name);
    write_file(tmp / name / "x", "x");
  }
  CHECK_FALSE(latest_checkpoint(tmp.path()));
  run.save(tmp.path(), 6, {.keep = 1});
  CHECK(names_in(tmp.path()) ==
        std::vector<std::string>{".other.part", "step-00000004x", "step-00000005.part", "step-00000006", "step-00000007", "step-3"});
  CHECK(latest_checkpoint(tmp.path()) == tmp / "step-00000006");
}

TEST_CASE("checkpoint: one writer at a time") {
  const TempFolder tmp;
  const Run run;
  {
    const AtomicFolder other(tmp.path(), "step-", "00000001");
    check_error([&] { run.save(tmp.path(), 2); }, {tmp.path().string(), "one process that writes here", "another"});
    CHECK(fs::exists(other.path()));
  }
  CHECK(names_in(tmp.path()).empty());
  run.save(tmp.path(), 2);
}

TEST_CASE("checkpoint: tokenizer files and special ids go along") {
  const TempFolder tmp;
  const Run run;
  fs::create_directories(tmp / "from");
  write_file(tmp / "from" / "tokenizer.json", "{}");
  write_file(tmp / "from" / "config.json", R"({"bos_token_id": 7, "eos_token_id": 8})");
  const fs::path a = run.save(tmp / "run", 1, {.tokenizer = tmp / "from"});
  CHECK(read_file(a / "tokenizer.json") == "{}");
  CHECK(detail::read_json(a / "config.json")["eos_token_id"] == 8);
  write_file(tmp / "my.model", "pieces");
  CHECK(read_file(run.save(tmp / "run", 2, {.tokenizer = tmp / "my.model"}) / "tokenizer.model") == "pieces");
  write_file(tmp / "my.gguf", "x");
  check_error([&] { run.save(tmp / "run", 3, {.tokenizer = tmp / "my.gguf"}); }, {"my.gguf", "tokenizer.model"});
  check_error([&] { run.save(tmp / "run", 3, {.tokenizer = tmp / "none"}); }, {"none", "tokenizer", "a file or folder"});
  CHECK(names_in(tmp / "run").size() == 2);
}

TEST_CASE("checkpoint: another config is an Error that says where they differ") {
  const TempFolder tmp;
  Run run;
  const fs::path folder = run.save(tmp.path(), 1);
  const auto before = run.parameters;
  const auto with = [&](auto change) {
    any_llama c = run.config;
    change(c);
    load_checkpoint(folder, c, run.parameters, run.mutable_arrays());
  };
  check_error([&] { with([](any_llama& c) { c.hidden = 128; }); },
              {"config.json", "hidden_size", "expected 128", "found 64: a checkpoint of another config"});
  check_error([&] { with([](any_llama& c) { c.layers = 3; }); }, {"num_hidden_layers", "expected 3", "found 2"});
  check_error([&] { with([](any_llama& c) { c.heads = 2; }); }, {"num_attention_heads"});
  check_error([&] { with([](any_llama& c) { c.kv_heads = 4; }); }, {"num_key_value_heads"});
  check_error([&] { with([](any_llama& c) { c.ffn = 32; }); }, {"intermediate_size"});
  check_error([&] { with([](any_llama& c) { c.vocab = 41; }); }, {"vocab_size"});
  check_error([&] { with([](any_llama& c) { c.context = 64; }); }, {"max_position_embeddings"});
  check_error([&] { with([](any_llama& c) { c.norm_eps = 1e-6f; }); }, {"rms_norm_eps", "expected 1e-06", "found 1e-05"});
  check_error([&] { with([](any_llama& c) { c.rope_base = 1e5f; }); }, {"rope_theta"});
  check_error([&] { with([](any_llama& c) { c.rope_scale = 4; }); }, {"rope_scaling"});
  check_error([&] { with([](any_llama& c) { c.tied = true; }); }, {"tie_word_embeddings"});
  CHECK(run.parameters == before);
}

TEST_CASE("checkpoint: missing, renamed, left-over and wrongly sized arrays") {
  const TempFolder tmp;
  Run run;
  const fs::path folder = run.save(tmp.path(), 1);
  const std::string file = "training_state.safetensors";
  const auto n = std::to_string(run.parameters.size());
  std::vector<float> small(10);
  const auto load = [&](std::vector<MutableNamedArray> arrays) { load_checkpoint(folder, run.config, run.parameters, arrays); };
  check_error([&] { load({{"first_moment", run.first}, {"momentum", run.second}}); },
              {file, "momentum", "an array of " + n + " floats", "found none"});
  check_error([&] { load({{"first_moment", run.first}}); }, {file, "second_moment", "only first_moment", "this one"});
  check_error([&] { load({}); }, {file, "no array"});
  check_error([&] { load({{"first_moment", run.first}, {"second_moment", small}}); }, {file, "second_moment", "F32 [10]", "F32 [" + n + "]"});
  check_error([&] { load_checkpoint(folder, run.config, small, run.mutable_arrays()); }, {"parameters", n + " floats", "found 10"});
  check_error([&] { save_checkpoint(tmp.path(), 2, run.config, small, {}, "{}"); }, {"weights", n + " floats", "found 10"});
  const std::vector<NamedArray> reserved = {{"parameters", small}}, twice = {{"a", small}, {"a", small}};
  check_error([&] { save_checkpoint(tmp.path(), 2, run.config, run.parameters, reserved, "{}"); }, {"a name of its own", "'parameters'"});
  check_error([&] { save_checkpoint(tmp.path(), 2, run.config, run.parameters, twice, "{}"); }, {"a", "it twice"});
  check_error([&] { save_checkpoint(tmp.path(), 2, run.config, run.parameters, {}, "[]"); }, {"an object", "array"});
  check_error([&] { save_checkpoint(tmp.path(), 2, run.config, run.parameters, {}, "{"); }, {"valid JSON"});
  check_error([&] { save_checkpoint(tmp.path(), -1, run.config, run.parameters, {}, "{}"); }, {"step", "found -1"});
  write_file(tmp / "file", "x");
  check_error([&] { run.save(tmp / "file", 2); }, {"file", "a folder that can be made"});
  CHECK(names_in(tmp.path()) == std::vector<std::string>{"file", "step-00000001"});
}

TEST_CASE("checkpoint: every damaged or truncated file is an Error, and nothing is written into the arrays") {
  const TempFolder tmp;
  Run run;
  const fs::path good = run.save(tmp / "run", 1);
  const auto attempt = [&](auto&& change, std::initializer_list<std::string_view> words) {
    fs::remove_all(tmp / "bad");
    fs::copy(good, tmp / "bad", fs::copy_options::recursive);
    change(tmp / "bad");
    Run loaded;
    loaded.clear();
    check_error([&] { loaded.load(tmp / "bad"); }, words);
    for (const auto* v : {&loaded.parameters, &loaded.first, &loaded.second})
      CHECK(std::all_of(v->begin(), v->end(), [](float x) { return x == 0; }));
  };
  for (const char* file : {"config.json", "model.safetensors", "training_state.json", "training_state.safetensors"}) {
    attempt([&](const fs::path& f) { fs::remove(f / file); }, {"bad", "found"});
    for (const double part : {0.0, 0.3, 0.99}) {
      const auto size = static_cast<double>(fs::file_size(good / file));
      attempt([&](const fs::path& f) { fs::resize_file(f / file, static_cast<std::uintmax_t>(size * part)); }, {file});
    }
  }
  attempt([](const fs::path& f) { damage(f / "training_state.safetensors", 0); },
          {"training_state.safetensors", "second_moment", "checksum", "was damaged"});
  attempt([](const fs::path& f) { damage(f / "training_state.safetensors", fs::file_size(f / "model.safetensors")); },
          {"training_state.safetensors", "first_moment", "was damaged"});
  attempt([](const fs::path& f) { damage(f / "model.safetensors", 0); }, {"model.safetensors", "lm_head.weight", "checksum", "was damaged"});
  const auto json = [](const char* from, const char* to) { return [=](const fs::path& f) { replace_in(f / "training_state.json", from, to); }; };
  attempt(json("tinyllama training state 1", "tinyllama training state 9"), {"training_state.json", "format", "state 1"});
  attempt(json("\"step\": 1", "\"step\": -1"), {"training_state.json", "step", "found -1"});
  attempt(json("\"first_moment\": \"", "\"first_moment\": \"0"), {"training_state.safetensors", "first_moment", "checksum"});
  attempt(json("\"first_moment\"", "\"third_moment\""), {"training_state.json", "first_moment", "a checksum", "none"});
  attempt(json("\"checksums\"", "\"checksum\""), {"training_state.json", "checksums", "an object"});
  attempt(json("\"state\"", "\"stat\""), {"training_state.json", "state", "an object", "nothing"});
  const fs::path half = run.save(tmp / "half", 1, {.format = Format::bf16});
  attempt([&](const fs::path& f) { write_file(f / "model.safetensors", read_file(half / "model.safetensors")); },
          {"model.safetensors", "model.embed_tokens.weight", "f32", "bf16"});
}

TEST_CASE("checkpoint: the checksum sees any changed word, and swapped ones") {
  std::vector<std::uint64_t> words(37);
  for (std::size_t i = 0; i < words.size(); ++i) words[i] = i * i;
  const auto bytes = [&](std::size_t n) { return std::as_bytes(std::span(words)).first(n); };
  const std::string whole = detail::checksum(bytes(296));
  CHECK(whole.size() == 16);
  std::map<std::string, int> seen;
  for (std::size_t n = 0; n <= 296; ++n) ++seen[detail::checksum(bytes(n))];  // the length counts too
  for (std::size_t i = 0; i < 37 * 64; ++i) {
    words[i / 64] ^= std::uint64_t{1} << i % 64;
    ++seen[detail::checksum(bytes(296))];
    words[i / 64] ^= std::uint64_t{1} << i % 64;
  }
  std::swap(words[2], words[6]);  // of one lane
  ++seen[detail::checksum(bytes(296))];
  std::swap(words[2], words[6]);
  std::swap(words[2], words[3]);
  ++seen[detail::checksum(bytes(296))];
  CHECK(seen.size() == 297 + 37 * 64 + 2);
}

TEST_CASE("flat model: from any format to floats, Q and K in the half layout") {
  const TempFolder tmp;
  const Run run;
  save_gguf(FlatModel(run.config, run.parameters), tmp / "m.gguf", {.mixture = Format::f32});
  std::vector<float> back(run.parameters.size());
  read_flat(open_checkpoint(tmp / "m.gguf"), back);
  CHECK(back == run.parameters);
  back.pop_back();
  check_error([&] { read_flat(open_checkpoint(tmp / "m.gguf"), back); }, {"m.gguf", "weights", std::to_string(run.parameters.size())});
}

namespace {

/// No file of this process may grow beyond so many bytes: what a full disk answers, on any machine.
class WriteLimit {
 public:
  explicit WriteLimit(::rlim_t bytes) : handler_(std::signal(SIGXFSZ, SIG_IGN)) {
    ::getrlimit(RLIMIT_FSIZE, &before_);
    ::rlimit now = before_;
    now.rlim_cur = bytes;
    ::setrlimit(RLIMIT_FSIZE, &now);
  }
  ~WriteLimit() {
    ::setrlimit(RLIMIT_FSIZE, &before_);
    std::signal(SIGXFSZ, handler_);
  }
  WriteLimit(const WriteLimit&) = delete;

 private:
  ::rlimit before_{};
  void (*handler_)(int);
};

}  // namespace

TEST_CASE("checkpoint: a full disk is an Error, the last good one still loads and no temporary is left") {
  const TempFolder tmp;
  Run run;
  run.save(tmp.path(), 1, {.keep = 1});
  const auto first = run.first;
  run.first[0] = 42;
  // The model or the arrays do not fit, at their begin or at their end; the step is the same one or a new one.
  const auto model_size = fs::file_size(tmp / "step-00000001" / "model.safetensors");
  const ::rlim_t sizes[] = {100, 5'000, model_size - 1, model_size + 10};
  for (const ::rlim_t bytes : sizes) {
    for (const std::int64_t step : {1, 2}) {
      std::string message;
      {
        const WriteLimit limit(bytes);
        try {
          run.save(tmp.path(), step, {.keep = 1});
        } catch (const Error& e) {
          message = e.what();
        }
      }
      CAPTURE(bytes);
      CAPTURE(message);
      const std::string file = bytes < model_size ? "model.safetensors" : "training_state.safetensors";
      CHECK(message.find(file + ": expected a file that can be written, found File too large") != message.npos);
      CHECK(names_in(tmp.path()) == std::vector<std::string>{"step-00000001"});
      Run loaded;
      CHECK(loaded.load(*latest_checkpoint(tmp.path())).step == 1);
      CHECK(loaded.first == first);
    }
  }
  run.save(tmp.path(), 2, {.keep = 1});
  CHECK(names_in(tmp.path()) == std::vector<std::string>{"step-00000002"});
}

namespace {

/// A run in small: its state goes on by a fixed rule, each step has a loss, and all of it hangs on every bit of the state.
struct SmallRun : Run {
  std::int64_t step = 0;
  std::uint64_t position = 0x1234567;

  SmallRun() {
    config.hidden = 128, config.ffn = 256, config.vocab = 256;  // some 1.4 MB with the moments
    const auto n = static_cast<std::size_t>(parameter_count(config));
    parameters = noise(n, 1), first = noise(n, 2), second = noise(n, 3);
  }
  float advance() {
    double sum = 0;
    for (std::size_t i = 0; i < parameters.size(); ++i) {
      position = position * 6364136223846793005u + 1442695040888963407u;
      const float g = static_cast<float>(static_cast<std::int32_t>(position >> 32)) * 0x1p-31f + parameters[i];
      first[i] = 0.9f * first[i] + 0.1f * g;
      second[i] = 0.95f * second[i] + 0.05f * g * g;
      parameters[i] -= 0.01f * first[i] / (second[i] + 0.1f);
      sum += parameters[i];
    }
    ++step;
    return static_cast<float>(sum);
  }
  void save(const fs::path& root) const {
    save_checkpoint(root, step, config, parameters, arrays(), "{\"position\": " + std::to_string(position) + "}", {.keep = 2});
  }
  void resume(const fs::path& folder) {
    const LoadedCheckpoint c = load(folder);
    step = c.step;
    position = detail::parse_json(c.state, "state")["position"].get<std::uint64_t>();
  }
};

/// What a run says to the process that watches it; it outlives the run.
struct Watch {
  static constexpr std::size_t most = 4096;
  std::atomic<int> saving = 0, saved = 0, failed = 0;
  std::atomic<std::int64_t> steps = 0;
  std::uint32_t losses[most] = {};     // the bits of the loss of each step
};

/// Steps and saves until it is killed, or has come to `last`.
[[noreturn]] void train(const fs::path& root, Watch& watch, std::int64_t last) {
  try {
    SmallRun run;
    if (const auto folder = latest_checkpoint(root)) run.resume(*folder);
    while (run.step < last) {
      const auto bits = std::bit_cast<std::uint32_t>(run.advance());
      std::uint32_t& noted = watch.losses[run.step];
      if (noted != 0 && noted != bits) watch.failed = 1;  // a step that was done again after a kill
      noted = bits;
      watch.steps = run.step;
      if (run.step % 2) continue;
      watch.saving = 1;
      run.save(root);
      watch.saving = 0;
      ++watch.saved;
    }
  } catch (const std::exception& e) {
    watch.failed = 1;
    std::fprintf(stderr, "%s\n", e.what());
  }
  ::_exit(0);
}

::pid_t start(const fs::path& root, Watch& watch, std::int64_t last) {
  watch.saving = 0;
  const ::pid_t child = ::fork();
  if (child == 0) train(root, watch, last);
  REQUIRE(child > 0);
  return child;
}

}  // namespace

TEST_CASE("checkpoint: a run killed at any moment goes on to the same losses, bit by bit") {
  const TempFolder tmp;
  const fs::path root = tmp / "run";
  void* const shared = ::mmap(nullptr, sizeof(Watch), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
  REQUIRE(shared != MAP_FAILED);
  Watch& watch = *new (shared) Watch;

  std::mt19937 random(std::random_device{}());
  int kills = 0, during_save = 0, hidden = 0;
  for (; kills < 300 && (kills < 60 || during_save < 20); ++kills) {
    const int before = watch.saved;
    const ::pid_t child = start(root, watch, static_cast<std::int64_t>(Watch::most) - 10);
    // Every other run is let through one save, so that the steps go on; the moment then is any within some 30 ms.
    while (kills % 2 && watch.saved == before && ::kill(child, 0) == 0 && watch.failed == 0) std::this_thread::yield();
    std::this_thread::sleep_for(std::chrono::microseconds(random() % 30'000));
    ::kill(child, SIGKILL);
    int status = 0;
    REQUIRE(::waitpid(child, &status, 0) == child);
    REQUIRE(WIFSIGNALED(status));
    during_save += watch.saving;
    REQUIRE(watch.failed == 0);
    const auto latest = latest_checkpoint(root);
    REQUIRE((latest.has_value() || watch.saved == 0));
    if (latest) {
      SmallRun run;
      run.resume(*latest);  // throws where anything is not whole
      CHECK(run.step + 2 >= watch.steps);
    }
    if (fs::exists(root))
      for (const auto& name : names_in(root)) hidden += name.starts_with(".");
  }
  const std::int64_t last = watch.steps + 4;
  const ::pid_t child = start(root, watch, last);
  int status = 0;
  REQUIRE(::waitpid(child, &status, 0) == child);
  CHECK(WIFEXITED(status));
  CHECK(watch.failed == 0);
  CHECK(watch.steps == last);
  CHECK(names_in(root).size() == 2);  // no temporary has outlived the next save

  SmallRun undisturbed;
  bool same = true;
  for (std::int64_t step = 1; step <= last; ++step) same &= std::bit_cast<std::uint32_t>(undisturbed.advance()) == watch.losses[step];
  CHECK(same);
  MESSAGE(kills << " kills, " << during_save << " of them during a save, " << hidden << " left a temporary; " << last << " steps");
  CHECK(kills >= 60);
  CHECK(during_save >= 20);
  CHECK(hidden > 0);
  ::munmap(shared, sizeof(Watch));
}
