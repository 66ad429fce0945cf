// pretrain as scripts see it: it learns, logs, stops and goes on bit by bit, after SIGKILL at any moment too, and says in one line what is wrong.
#include "tinyllama/train/packed.hpp"

#include <doctest/doctest.h>

#include <algorithm>
#include <chrono>
#include <csignal>
#include <cstdlib>
#include <fstream>
#include <map>
#include <random>
#include <sstream>
#include <thread>

#include <nlohmann/json.hpp>

#include <fcntl.h>
#include <sys/wait.h>
#include <unistd.h>

#include "tests/examples/run.hpp"
#include "tinyllama/train/checkpoint.hpp"
#include "tinyllama/train/schedule.hpp"

namespace {

using namespace tinyllama;
using namespace tinyllama::test;
using nlohmann::json;
namespace fs = std::filesystem;
using Arguments = std::vector<std::string>;

constexpr int T = 16, vocab = 64;

void put(const fs::path& path, const std::string& bytes) { std::ofstream(path, std::ios::binary) << bytes; }

/// Sequences that count by a stride of their own: to be learned within some 100 steps.
void write_data(const fs::path& folder, const std::string& prefix, int blocks, std::uint32_t seed) {
  std::mt19937 random(seed);
  PackedWriter writer(folder, prefix, vocab, {.block = T + 1, .chunk_blocks = 64});
  for (int b = 0; b < blocks; ++b) {
    const int first = static_cast<int>(random() % vocab), stride = 1 + static_cast<int>(random() % 3);
    std::vector<std::int32_t> ids;
    for (int i = 0; i <= T; ++i) ids.push_back((first + i * stride) % vocab);
    writer.add(ids);
  }
  writer.finish();
}

/// Starts the program; standard output and error go into files.
pid_t start(const Arguments& arguments, const fs::path& out, const fs::path& err) {
  const std::string program = program_path("pretrain"), out_path = out.string(), err_path = err.string();
  std::vector<char*> argv{const_cast<char*>(program.c_str())};
  for (const std::string& a : arguments) argv.push_back(const_cast<char*>(a.c_str()));
  argv.push_back(nullptr);
  const pid_t child = ::fork();
  if (child == 0) {
    ::dup2(::open(out_path.c_str(), O_WRONLY | O_CREAT | O_TRUNC, 0666), STDOUT_FILENO);
    ::dup2(::open(err_path.c_str(), O_WRONLY | O_CREAT | O_TRUNC, 0666), STDERR_FILENO);
    ::execv(program.c_str(), argv.data());
    ::_exit(127);
  }
  return child;
}

int wait_for(pid_t child) {
  int status = 0;
  REQUIRE(::waitpid(child, &status, 0) == child);
  return WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
}

Result run(const Arguments& arguments) {
  const TempFolder tmp;
  const int status = wait_for(start(arguments, tmp / "out", tmp / "err"));
  return {status, read_file(tmp / "out"), read_file(tmp / "err")};
}

/// `more` behind `a`; a value of an option that is there already replaces it.
Arguments with(Arguments a, const Arguments& more) {
  for (std::size_t i = 0; i < more.size(); ++i) {
    const auto there = std::find(a.begin(), a.end(), more[i]);
    if (more[i].starts_with("--") && there != a.end()) *(there + 1) = more[++i];
    else a.push_back(more[i]);
  }
  return a;
}

/// Data and a model of some 20,000 weights; a step takes about a millisecond.
struct Tiny {
  TempFolder tmp;
  Tiny() {
    write_data(tmp / "data", "train", 200, 1);
    write_data(tmp / "data", "validation", 20, 2);
  }
  Arguments arguments(const std::string& out, const Arguments& more = {}) const {
    const std::string train = (tmp / "data" / "train").string(), validation = (tmp / "data" / "validation").string();
    const Arguments usual{"--shape", shape, "--data", train, "--validation", validation, "--batch", "4", "--micro-rows", "2",
                          "--lr", "5e-3", "--out", (tmp / out).string(), "--peak-gflops", "100", "--threads", "1"};
    return with(usual, more);
  }
  static constexpr const char* shape = "layers=2,hidden=32,heads=2,kv_heads=1,ffn=64,vocab=64,context=16";
};

/// The log's complete rows by step: all that does not depend on the clock.
std::map<std::int64_t, std::string> rows(const fs::path& csv) {
  std::istringstream in(read_file(csv));
  std::string line;
  std::getline(in, line);
  CHECK(line == "step,loss,validation_loss,learning_rate,gradient_norm,tokens,tokens_per_second,share_of_peak,seconds");
  std::map<std::int64_t, std::string> all;
  while (std::getline(in, line) && !in.eof()) {
    std::size_t end = 0;
    for (int field = 0; field < 6 && end != line.npos; ++field) end = line.find(',', end + 1);
    REQUIRE_MESSAGE(end != line.npos, line);
    const auto step = std::stoll(line);
    CHECK_MESSAGE(all.emplace(step, line.substr(0, end)).second, "step " << step << " is there twice");
  }
  return all;
}

double field(const std::string& row, int which) {
  std::istringstream in(row);
  std::string text;
  for (int i = 0; i <= which; ++i) std::getline(in, text, ',');
  return text.empty() ? -1 : std::stod(text);
}

/// One step after the other, each as in the undisturbed run.
void check_same(const std::map<std::int64_t, std::string>& found, const std::map<std::int64_t, std::string>& expected) {
  std::int64_t step = 0;
  for (const auto& [n, row] : found) {
    REQUIRE(n == ++step);
    REQUIRE(row == expected.at(n));
  }
}


}  // namespace

TEST_CASE("pretrain: the loss falls; log, plot, events, checkpoint and summary are there, and it can be trained on") {
  const Tiny tiny;
  const fs::path out = tiny.tmp / "out";
  const Result r = run(tiny.arguments("out", {"--steps", "300", "--validate-every", "100", "--json", "--tensorboard", (out / "events").string()}));
  REQUIRE_MESSAGE(r.status == 0, r.err);
  CHECK(r.err.empty());
  const json j = json::parse(r.out);
  CHECK(j["steps"] == 300);
  CHECK(j["tokens"] == 300 * 4 * T);
  CHECK(j["stopped"] == false);
  for (const char* key : {"tokens_per_second", "share_of_peak", "seconds", "parameters", "peak_bytes", "planned_bytes"})
    CHECK_MESSAGE(j.at(key).get<double>() > 0, key);

  const auto log = rows(out / "log.csv");
  REQUIRE(log.size() == 300);
  CHECK(std::abs(field(log.at(1), 1) - std::log(vocab)) < 0.5);  // new weights know nothing
  const double last = field(log.at(300), 2);
  CHECK(last < 1.2);  // the first id and the stride have to be guessed: (log 64 + log 3) / 16 = 0.33 is the least
  CHECK(j["validation_loss"].get<double>() == doctest::Approx(last));
  for (const auto& entry : log) CHECK_MESSAGE((field(entry.second, 2) >= 0) == (entry.first % 100 == 0), entry.second);
  CHECK(field(log.at(150), 5) == 150 * 4 * T);

  const std::string svg = read_file(out / "loss.svg");
  CHECK(svg.starts_with("<svg"));
  CHECK(svg.find("validation  ") != svg.npos);
  int events = 0;
  for (const auto& e : fs::directory_iterator(out / "events"))
    events += e.path().filename().string().starts_with("events.out.tfevents") && e.file_size() > 300 * 100;
  CHECK(events == 1);

  const auto newest = latest_checkpoint(out);
  REQUIRE(newest);
  CHECK(newest->string() == j["checkpoint"]);
  CHECK(fs::exists(*newest / "model.safetensors"));
  Arguments on = tiny.arguments("on", {"--steps", "5", "--json"});
  on[0] = "--from", on[1] = newest->string();
  const Result next = run(on);
  REQUIRE_MESSAGE(next.status == 0, next.err);
  CHECK(field(rows(tiny.tmp / "on" / "log.csv").at(1), 1) < 1.5);
}

TEST_CASE("pretrain: stopped by SIGTERM it saves and ends with 0; resumed, with other threads, it has the bits of an undisturbed run") {
  const Tiny tiny;
  const Arguments length{"--steps", "2000", "--validate-every", "100", "--save-every", "1000"};
  REQUIRE(run(tiny.arguments("whole", length)).status == 0);
  const auto whole = rows(tiny.tmp / "whole" / "log.csv");
  REQUIRE(whole.size() == 2000);

  const fs::path out = tiny.tmp / "stopped";
  const pid_t child = start(tiny.arguments("stopped", length), tiny.tmp / "o", tiny.tmp / "e");
  for (int i = 0; i < 3000 && !has(out / "log.csv", "\n20,"); ++i)
    std::this_thread::sleep_for(std::chrono::milliseconds(5));
  ::kill(child, SIGTERM);
  CHECK(wait_for(child) == 0);
  CHECK(read_file(tiny.tmp / "o").find("stopped after step") != std::string::npos);
  const auto newest = latest_checkpoint(out);
  REQUIRE(newest);
  const auto half = rows(out / "log.csv");
  CHECK(half.size() < 2000);
  CHECK(newest->filename().string().ends_with(std::to_string(half.size())));

  const Result rest = run(tiny.arguments("stopped", with(length, {"--threads", "2", "--json"})));
  REQUIRE_MESSAGE(rest.status == 0, rest.err);
  CHECK(json::parse(rest.out)["resumed"] == true);
  const auto found = rows(out / "log.csv");
  check_same(found, whole);
  CHECK(found.size() == 2000);
  const std::string name = "step-00002000/model.safetensors";
  CHECK(read_file(out / name) == read_file(tiny.tmp / "whole" / name));
  const std::string svg = read_file(out / "loss.svg");
  CHECK(svg.find("step 100</title>") != svg.npos);  // what went before the stop is drawn too
}

TEST_CASE("pretrain: SIGKILL at 50 random moments, and every loss is that of an undisturbed run") {
  const Tiny tiny;
  const Arguments length{"--steps", "240", "--validate-every", "60", "--save-every", "3", "--keep", "2"};
  const auto begin = std::chrono::steady_clock::now();
  REQUIRE(run(tiny.arguments("whole", length)).status == 0);
  const auto duration = std::chrono::duration_cast<std::chrono::microseconds>(std::chrono::steady_clock::now() - begin).count();
  const auto whole = rows(tiny.tmp / "whole" / "log.csv");
  REQUIRE(whole.size() == 240);

  const fs::path out = tiny.tmp / "killed";
  std::mt19937 random(std::random_device{}());
  int kills = 0, behind_a_checkpoint = 0, in_a_save = 0, finished = 0;
  while (kills < 50) {
    const pid_t child = start(tiny.arguments("killed", length), tiny.tmp / "o", tiny.tmp / "e");
    std::this_thread::sleep_for(std::chrono::microseconds(random() % (duration / 4 + 1)));
    ::kill(child, SIGKILL);
    const int status = wait_for(child);
    const std::string err = read_file(tiny.tmp / "e");
    if (has(out / "log.csv", "\n")) check_same(rows(out / "log.csv"), whole);
    if (status != 128 + SIGKILL) {  // it was done before: from the beginning
      REQUIRE_MESSAGE(status == 0, err);
      CHECK(rows(out / "log.csv").size() == 240);
      fs::remove_all(out);
      ++finished;
      continue;
    }
    ++kills;
    behind_a_checkpoint += latest_checkpoint(out).has_value();
    if (fs::exists(out))
      for (const auto& e : fs::directory_iterator(out)) in_a_save += e.path().filename().string().ends_with(".part");
  }
  MESSAGE(kills << " kills, " << behind_a_checkpoint << " of runs that had a checkpoint, " << in_a_save << " in the middle of a save; finished "
                << finished << " times");
  CHECK(behind_a_checkpoint >= 10);
  const Result rest = run(tiny.arguments("killed", length));
  REQUIRE_MESSAGE(rest.status == 0, rest.err);
  const auto found = rows(out / "log.csv");
  check_same(found, whole);
  CHECK(found.size() == 240);
  const std::string name = "step-00000240/model.safetensors";
  CHECK(read_file(out / name) == read_file(tiny.tmp / "whole" / name));
  CHECK(list_checkpoints(out).size() == 2);
}

TEST_CASE("pretrain: stages with mixes and batches of their own") {
  const Tiny tiny;
  write_data(tiny.tmp / "more", "text", 50, 3);
  const json stages{{"schedule", {{"decay", "cosine"}, {"peak", 1e-3}, {"minimum", 1e-4}, {"warmup", 2}, {"steps", 20}}},
                    {"stages",
                     {{{"name", "basic"}, {"steps", 8}, {"rows", 2}},
                      {{"name", "cool-down"}, {"steps", 4}, {"rows", 6}, {"weights", {1, 3}}, {"ramp_steps", 2}, {"multiplier", 0.5}}}}};
  put(tiny.tmp / "stages.json", stages.dump());
  const std::string train = (tiny.tmp / "data" / "train").string() + ":0.5", more = (tiny.tmp / "more" / "text").string() + ":0.5";
  const Arguments arguments{"--shape", Tiny::shape, "--data", train, "--data", more, "--stages", (tiny.tmp / "stages.json").string(),
                            "--out", (tiny.tmp / "out").string(), "--peak-gflops", "100"};
  const Result r = run(arguments);
  REQUIRE_MESSAGE(r.status == 0, r.err);
  const auto log = rows(tiny.tmp / "out" / "log.csv");
  REQUIRE(log.size() == 12);
  const auto schedule = stages.get<StagedSchedule>();
  for (const auto& [step, row] : log) {
    CHECK(field(row, 3) == doctest::Approx(schedule.at(step)));
    CHECK(field(row, 5) == T * (step <= 8 ? 2 * step : 16 + 6 * (step - 8)));
  }
  CHECK(run(with(arguments, {"--lr", "1e-3"})).status == 2);
}

TEST_CASE("pretrain: bad input is status 1 and one line that says what") {
  const Tiny tiny;
  const auto fails = [&](const Arguments& arguments, const Arguments& words) {
    const Result r = run(arguments);
    CAPTURE(r.err);
    CHECK(r.status == 1);
    CHECK(one_error_line(r.err));
    for (const std::string& word : words) CHECK_MESSAGE(r.err.find(word) != r.err.npos, word);
  };
  const Arguments steps{"--steps", "4", "--lr", "5e-3"};
  const auto data = [&](const std::string& folder) {
    Arguments a = tiny.arguments("bad", steps);
    a[3] = (tiny.tmp / folder / "train").string();
    return a;
  };
  const auto shaped = [&](const std::string& out, const std::string& shape) {
    Arguments a = tiny.arguments(out, steps);
    a[1] = shape;
    return a;
  };

  fs::create_directories(tiny.tmp / "empty");
  fails(data("empty"), {"empty", "train*.bin", "none"});
  fails(data("nowhere"), {"nowhere"});
  write_data(tiny.tmp / "short", "train", 0, 1);
  fails(data("short"), {"short"});
  write_data(tiny.tmp / "damaged", "train", 70, 1);
  const fs::path shard = tiny.tmp / "damaged" / "train_0000000000.bin";
  const std::string whole = read_file(shard);
  put(shard, whole.substr(0, whole.size() - 100));
  fails(data("damaged"), {shard.string(), "truncated"});
  put(shard, "NOTPKDS" + whole.substr(7));
  fails(data("damaged"), {shard.string(), "LITPKDS"});
  std::string outside = whole;
  outside[outside.size() - 1] = '\x7f';  // the last id's high byte
  put(shard, outside);
  fails(with(data("damaged"), {"--batch", "70"}), {shard.string(), "token " + std::to_string(64 * (T + 1) - 1), "from 0 to 63"});

  const std::string smaller_vocab = "layers=1,hidden=32,heads=2,kv_heads=1,ffn=64,vocab=32,context=16";
  fails(shaped("bad", smaller_vocab), {"train_", "from 0 to 31"});
  CHECK(!latest_checkpoint(tiny.tmp / "bad"));

  REQUIRE(run(tiny.arguments("good", steps)).status == 0);
  const std::string log = read_file(tiny.tmp / "good" / "log.csv");
  fails(shaped("good", "layers=2,hidden=64,heads=2,kv_heads=1,ffn=64,vocab=64,context=16"), {"config.json", "hidden_size", "64", "32"});
  fails(tiny.arguments("good", with(steps, {"--seed", "5"})), {"training_state.json", "seed", "expected 5", "found 1"});
  fails(tiny.arguments("good", {"--steps", "9"}), {"training_state.json", "schedule", "at step 1"});
  fails(tiny.arguments("good", with(steps, {"--precision", "f32"})), {"precision", "f32", "bf16"});
  fails(tiny.arguments("good", with(steps, {"--moments", "int8"})), {"moments", "expected int8", "found f32"});
  CHECK(run(tiny.arguments("good", with(steps, {"--moments", "f16"}))).status == 2);
  fails(tiny.arguments("good", with(steps, {"--fresh"})), {"good", "step-00000004"});
  CHECK(read_file(tiny.tmp / "good" / "log.csv") == log);  // nobody touched it
  fails(tiny.arguments("none", with(steps, {"--resume"})), {"none", "checkpoint"});
  fails(tiny.arguments("bad", with(steps, {"--tokens", "17"})), {"--tokens", "16", "17"});
  fails(tiny.arguments("bad", with(steps, {"--tokens", "8"})), {"blocks of 9"});
  fails(tiny.arguments("bad", with(steps, {"--tokenizer", (tiny.tmp / "no.model").string()})), {"no.model"});
  fails(shaped("bad", "layers=2,width=3"), {"--shape", "width"});
  fails(shaped("bad", "layers=2,hidden=none"), {"--shape", "hidden", "none"});
  put(tiny.tmp / "stages.json", "{");
  Arguments staged = tiny.arguments("bad", {"--stages", (tiny.tmp / "stages.json").string()});
  const auto lr = std::find(staged.begin(), staged.end(), "--lr");
  staged.erase(lr, lr + 2);
  fails(staged, {"stages.json"});
  CHECK(run(tiny.arguments("bad")).status == 2);  // no length
  CHECK(run(with(tiny.arguments("bad", steps), {"--preset", "tinyllama_1b"})).status == 2);
}
