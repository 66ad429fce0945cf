// train_step, pretrain and finetune under mpirun: on 2 and 4 ranks the losses of one process, whatever is sharded; a rank that is killed ends the others with an
// Error; checkpoints go on with another number of ranks; and a rank takes the memory that is left to it.
#include <doctest/doctest.h>

#include <chrono>
#include <cmath>
#include <csignal>
#include <cstring>
#include <fstream>
#include <map>
#include <random>
#include <sstream>
#include <thread>

#include <nlohmann/json.hpp>

#include "tests/examples/mpirun.hpp"
#include "tests/io/small_model.hpp"
#include "tinyllama/io/safetensors.hpp"
#include "tinyllama/train/checkpoint.hpp"
#include "tinyllama/train/packed.hpp"
#include "tinyllama/train/training_plan.hpp"

namespace {

using namespace tinyllama;
using namespace tinyllama::test;
using nlohmann::json;
namespace fs = std::filesystem;

constexpr const char* shardings[] = {"ddp", "zero1", "fsdp"};

bool skipped(bool on_card = false) {
  std::string why = no_mpirun();
  if (why.empty() && on_card) why = no_card();
  if (!why.empty()) MESSAGE("skipped: " << why);
  return !why.empty();
}

/// [B, T] of int32 as NumPy writes them.
void write_npy(const fs::path& path, const std::vector<std::int32_t>& ids, std::size_t rows) {
  std::string header = "{'descr': '<i4', 'fortran_order': False, 'shape': (" + std::to_string(rows) + ", " + std::to_string(ids.size() / rows) + "), }";
  header.resize((header.size() + 11 + 63) / 64 * 64 - 11, ' ');
  header += '\n';
  std::ofstream out(path, std::ios::binary);
  out << std::string("\x93NUMPY\x01\x00", 8) << static_cast<char>(header.size() & 255) << static_cast<char>(header.size() >> 8) << header;
  out.write(reinterpret_cast<const char*>(ids.data()), static_cast<std::streamsize>(ids.size() * sizeof(std::int32_t)));
}

/// A model and a batch of 5 rows, some of whose targets do not count.
struct OneBatch : TempFolder {
  explicit OneBatch(const any_llama& config) {
    SmallModel(config).write(path() / "model");
    std::mt19937 random(3);
    std::vector<std::int32_t> inputs, targets;
    for (int i = 0; i < 5 * 16; ++i) {
      inputs.push_back(static_cast<std::int32_t>(random() % static_cast<unsigned>(config.vocab)));
      targets.push_back(i / 16 == 1 || i % 7 == 0 ? -100 : static_cast<std::int32_t>(random() % static_cast<unsigned>(config.vocab)));
    }
    write_npy(path() / "inputs.npy", inputs, 5), write_npy(path() / "targets.npy", targets, 5);
  }
  std::string arguments(const std::string& more, const std::string& model = "model") const {
    const std::string p = path().string();
    return "--model " + p + "/" + model + " --inputs " + p + "/inputs.npy --targets " + p + "/targets.npy --threads 1 --json " + more;
  }
};

std::map<std::string, std::vector<float>> tensors(const fs::path& path) {
  std::map<std::string, std::vector<float>> all;
  const Safetensors file(path);
  for (const SafeTensor& t : file.tensors()) {
    std::vector<float>& v = all[t.name];
    v.resize(t.bytes.size() / sizeof(float));
    std::memcpy(v.data(), t.bytes.data(), t.bytes.size());
  }
  return all;
}
double worst_difference(const fs::path& found, const fs::path& expected) {
  const auto a = tensors(found), b = tensors(expected);
  REQUIRE(a.size() == b.size());
  double worst = 0;
  for (const auto& [name, values] : b) {
    double squares = 0, size = 0;
    for (std::size_t i = 0; i < values.size(); ++i) squares += std::pow(static_cast<double>(a.at(name)[i]) - values[i], 2), size += std::pow(static_cast<double>(values[i]), 2);
    worst = std::max(worst, std::sqrt(squares / size));
  }
  return worst;
}

/// Packed data to train and to validate on.
struct Data : TempFolder {
  Data() { write("train", 90, 1), write("validation", 7, 2); }
  void write(const std::string& prefix, int blocks, std::uint32_t seed) const {
    std::mt19937 random(seed);
    PackedWriter writer(*this / "data", prefix, 64, {.block = 17, .chunk_blocks = 64});
    for (int b = 0; b < blocks; ++b) {
      std::vector<std::int32_t> ids;
      for (int i = 0; i <= 16; ++i) ids.push_back(static_cast<std::int32_t>((random() % 3 + static_cast<unsigned>(i) * (1 + static_cast<unsigned>(b) % 3)) % 64));
      writer.add(ids);
    }
    writer.finish();
  }
  /// A constant rate, so that a run may go on for longer than it was meant to.
  std::string pretrain(const std::string& out, const std::string& more) const {
    const std::string p = path().string();
    return "--shape layers=2,hidden=32,heads=2,kv_heads=1,ffn=64,vocab=64,context=16 --data " + p + "/data/train --validation " + p +
           "/data/validation --batch 6 --micro-rows 1 --schedule constant --warmup 0 --lr 3e-3 --precision f32 --peak-gflops 100 --threads 1 --out " + p + "/" + out + " " + more;
  }
  /// Loss and validation loss of each step.
  std::map<std::int64_t, std::vector<double>> log(const std::string& out) const {
    std::istringstream in(read_file(path() / out / "log.csv"));
    std::map<std::int64_t, std::vector<double>> all;
    std::string line, field;
    std::getline(in, line);
    while (std::getline(in, line)) {
      std::istringstream fields(line);
      std::getline(fields, field, ',');
      std::vector<double>& row = all[std::stoll(field)];
      for (int i = 0; i < 2 && std::getline(fields, field, ','); ++i) row.push_back(field.empty() ? -1 : std::stod(field));
    }
    return all;
  }
};

void check_same(const std::map<std::int64_t, std::vector<double>>& found, const std::map<std::int64_t, std::vector<double>>& expected) {
  REQUIRE(found.size() == expected.size());
  for (const auto& entry : expected)
    for (std::size_t i = 0; i < 2; ++i) {
      const double ours = found.at(entry.first)[i], theirs = entry.second[i];
      REQUIRE_MESSAGE(std::fabs(ours / theirs - 1) < 2e-5, "step " << entry.first << ": " << ours << ", expected " << theirs);
    }
}

/// 20 steps of several ranks are those of one process: losses, gradients, model. `how`: options of all runs, and of those under mpirun.
void many_learn_what_one_does(const std::vector<int>& rank_counts, const std::string& how, const std::string& how_many) {
  for (const bool tied : {false, true}) {
    const OneBatch batch(small_config(tied));
    const auto steps = [&](const std::string& name) {
      return batch.arguments(how + " --steps 20 --precision f32 --lr 1e-3 --gradients " + (batch / (name + ".safetensors")).string() + " --save " + (batch / name).string());
    };
    const Result one = run_shell("train_step", steps("one"));
    REQUIRE_MESSAGE(one.status == 0, one.err);
    const auto expected = json::parse(one.out);
    for (const int ranks : rank_counts)
      for (const char* parallel : shardings) {
        CAPTURE(ranks);
        CAPTURE(parallel);
        const Result r = run_ranks(ranks, "train_step", steps("many") + " --parallel " + parallel + (ranks == 4 ? " --micro-rows 1" : "") + how_many);
        REQUIRE_MESSAGE(r.status == 0, r.err);
        const auto found = json::parse(r.out);  // one object: rank 0's
        CHECK(found["ranks"] == ranks);
        REQUIRE(found["losses"].size() == 20);
        for (std::size_t i = 0; i < 20; ++i) {
          CHECK(std::fabs(found["losses"][i].get<double>() / expected["losses"][i].get<double>() - 1) < 2e-6);
          CHECK(std::fabs(found["gradient_norms"][i].get<double>() / expected["gradient_norms"][i].get<double>() - 1) < 1e-4);
        }
        CHECK(worst_difference(batch / "many.safetensors", batch / "one.safetensors") < 2e-6);
        CHECK(worst_difference(batch / "many" / "model.safetensors", batch / "one" / "model.safetensors") < 1e-4);
      }
  }
}

}  // namespace

TEST_CASE("train_step under mpirun: 20 steps of 2 and 4 ranks are those of one process: losses, gradients, model") {
  if (!skipped()) many_learn_what_one_does({2, 4}, "", "");
}

TEST_CASE("train_step under mpirun: ranks on cards too, by way of the host's memory") {
  if (!skipped(true)) many_learn_what_one_does({2, 4}, "--device cuda", " --backend mpi");
}

TEST_CASE("train_step under mpirun: with --parallel none rank 0 works alone; what the wires cannot do is an Error; and one rank that cannot read its input ends all") {
  if (skipped()) return;
  const OneBatch batch(small_config());
  const Result one = run_shell("train_step", batch.arguments("--steps 3")), none = run_ranks(3, "train_step", batch.arguments("--steps 3 --parallel none"));
  REQUIRE_MESSAGE(none.status == 0, none.err);
  CHECK(json::parse(none.out)["losses"] == json::parse(one.out)["losses"]);
  const Result narrow = run_ranks(2, "train_step", batch.arguments("--steps 3 --wire bf16"));
  CHECK(narrow.status != 0);
  CHECK_MESSAGE(narrow.err.find("wire: expected f32") != narrow.err.npos, narrow.err);
  const Result wrong = run_ranks(2, "train_step", batch.arguments("--steps 3", "nowhere"));
  CHECK(wrong.status != 0);
  CHECK_MESSAGE(wrong.err.find("/nowhere: expected ") != wrong.err.npos, wrong.err);
}

TEST_CASE("pretrain under mpirun: begun on 2 ranks, gone on with on 3 and on 1, it is the run of one process") {
  if (skipped()) return;
  const Data data;
  const auto steps = [](int n) { return "--validate-every 5 --save-every 7 --steps " + std::to_string(n); };
  REQUIRE(run_shell("pretrain", data.pretrain("one", steps(30))).status == 0);
  const auto expected = data.log("one");
  REQUIRE(expected.size() == 30);
  for (const char* first : shardings) {
    CAPTURE(first);
    const std::string out = std::string("from_") + first;
    Result r = run_ranks(2, "pretrain", data.pretrain(out, steps(10) + " --json --parallel " + first));
    REQUIRE_MESSAGE(r.status == 0, r.err);
    CHECK(json::parse(r.out)["steps"] == 10);
    const fs::path newest = *latest_checkpoint(data / out);
    CHECK(fs::exists(newest / "training_state-00002-of-00002.safetensors"));
    CHECK(open_checkpoint(newest).config.hidden == 32);  // what reads a model reads it
    for (const char* then : {"fsdp", "ddp"}) {
      const std::string copy = out + then;
      fs::copy(data / out, data / copy, fs::copy_options::recursive);
      r = run_ranks(3, "pretrain", data.pretrain(copy, steps(20) + " --resume --parallel " + then));
      REQUIRE_MESSAGE(r.status == 0, r.err);
      r = run_shell("pretrain", data.pretrain(copy, steps(30) + " --resume"));
      REQUIRE_MESSAGE(r.status == 0, r.err);
      check_same(data.log(copy), expected);
    }
  }
}

TEST_CASE("pretrain under mpirun: one rank is killed: the others end with an Error, and another number of ranks goes on from the checkpoint") {
  if (skipped()) return;
  const Data data;
  const std::string steps = "--validate-every 500 --save-every 20 --keep 0 ";
  for (const char* parallel : shardings) {
    CAPTURE(parallel);
    const std::string out = std::string("killed_") + parallel, log = (data / out / "log.csv").string(), err = (data / "err").string();
    // A rank tells its process by way of a shell that becomes it.
    const std::string ranks = mpirun(3) + "sh -c 'echo $$ > " + data.path().string() + "/pid-$OMPI_COMM_WORLD_RANK; exec \"$0\" \"$@\"' " +
                              quoted(program_path("pretrain")) + " " + data.pretrain(out, steps + "--steps 1000000 --parallel " + parallel);
    Result r;
    std::thread job([&] { r = run_line(ranks); });
    for (int i = 0; i < 6000 && !has(log, "\n45,"); ++i) std::this_thread::sleep_for(std::chrono::milliseconds(5));
    const auto start = std::chrono::steady_clock::now();
    const int pid = std::atoi(read_file(data / "pid-1").c_str());
    if (pid > 1) ::kill(pid, SIGKILL);
    job.join();
    CHECK(std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count() < 30);
    REQUIRE(pid > 1);
    CHECK(r.status != 0);
    for (const int rank : {0, 2}) CHECK_MESSAGE(r.err.find("error: MPI rank " + std::to_string(rank) + " of 3: ") != r.err.npos, r.err);
    CHECK_MESSAGE(r.err.find("expected rank 1 to take part, found its process " + std::to_string(pid) + " has ended") != r.err.npos, r.err);

    const auto last = list_checkpoints(data / out).back().first;
    CHECK(last >= 40);
    const std::string more = steps + "--steps " + std::to_string(last + 10);
    r = run_ranks(2, "pretrain", data.pretrain(out, more + " --resume --parallel " + parallel));
    REQUIRE_MESSAGE(r.status == 0, r.err);
    REQUIRE(run_shell("pretrain", data.pretrain("whole_" + out, more)).status == 0);
    check_same(data.log(out), data.log("whole_" + out));
  }
}

TEST_CASE("train_step under mpirun: what a rank keeps resident falls as the plan says") {
  if (skipped()) return;
  any_llama config = small_config();
  config.layers = 24, config.hidden = 256, config.heads = 4, config.kv_heads = 4, config.ffn = 1024, config.vocab = 4096;
  const OneBatch batch(config);
  std::map<std::string, double> resident, planned;
  for (const char* parallel : shardings) {
    const Result r = run_ranks(4, "train_step", batch.arguments(std::string("--steps 2 --precision f32 --parallel ") + parallel));
    REQUIRE_MESSAGE(r.status == 0, r.err);
    const Sharding s = parallel == std::string("fsdp") ? Sharding::fsdp : parallel == std::string("zero1") ? Sharding::zero1 : Sharding::ddp;
    const TrainingPlan plan = training_plan(config, {.batch = 1, .tokens = 16, .precision = Precision::f32, .sharding = s, .ranks = 4});
    const auto found = json::parse(r.out);
    CHECK(found["trainer_bytes"].get<std::size_t>() == plan.total() - plan.scratch);
    resident[parallel] = found["peak_bytes"], planned[parallel] = static_cast<double>(plan.total());
  }
  // 430 MB with ddp. Open MPI's temporaries, some parts of 4 MB, come and go as ranks run ahead of each other: with 6 layers, where the plan saves 42 MB, they hid
  // up to 17 of it.
  for (const char* parallel : {"zero1", "fsdp"}) {
    const double saved = resident["ddp"] - resident[parallel], expected = planned["ddp"] - planned[parallel];
    CHECK_MESSAGE(saved > 0.8 * expected, parallel << ": " << saved << " bytes less, planned " << expected);
  }
}

TEST_CASE("finetune under mpirun: adapters and all weights as one process learns them") {
  if (skipped()) return;
  const auto model = smollm2_gguf();
  if (!model) {
    MESSAGE("skipped: no SmolLM2");
    return;
  }
  const TempFolder tmp;
  std::ofstream(tmp / "data.jsonl") << "{\"question\": \"What is 2 + 2?\", \"answer\": \"Four, as ever.\"}\n"
                                       "{\"question\": \"Which colour has the sky?\", \"answer\": \"Blue.\"}\n"
                                       "{\"question\": \"Who are you?\", \"answer\": \"A small model of language, at your service.\"}\n";
  const std::string usual = "--model " + quoted(model->string()) + " --data " + (tmp / "data.jsonl").string() + " --epochs 2 --batch 3 --tokens 64 --rank 2 --precision f32 --json --out ";
  const Result one = run_shell("finetune", usual + (tmp / "one").string());
  REQUIRE_MESSAGE(one.status == 0, one.err);
  const Result many = run_ranks(2, "finetune", usual + (tmp / "many").string() + " --parallel zero1");
  REQUIRE_MESSAGE(many.status == 0, many.err);
  const auto expected = json::parse(one.out)["losses"], found = json::parse(many.out)["losses"];
  REQUIRE(found.size() == 2);
  for (std::size_t i = 0; i < 2; ++i) CHECK(std::fabs(found[i].get<double>() / expected[i].get<double>() - 1) < 1e-5);
  CHECK(worst_difference(tmp / "many" / "adapter_model.safetensors", tmp / "one" / "adapter_model.safetensors") < 1e-3);
}
