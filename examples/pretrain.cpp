// pretrain: trains a model of any shape on packed data, from the beginning or from a checkpoint, and goes on where it was stopped or killed. Under mpirun the
// ranks share the rows of each step, and rank 0 shows and logs.
#include <tinyllama/io/tokenizer_file.hpp>
#include <tinyllama/train/run.hpp>

#include <nlohmann/json.hpp>

#include <csignal>

#include "ranks.hpp"
#include "run_display.hpp"
#include "train_options.hpp"

namespace tl = tinyllama;
namespace fs = std::filesystem;

namespace {

volatile std::sig_atomic_t stop_asked = 0;

struct Options {
  example::OptimizerOptions optimizer;
  example::Ranks ranks;
  std::string preset, from, validation, stages, schedule = "cosine";
  std::vector<std::string> shape, data;
  fs::path tokenizer;
  example::RunFiles::Paths files;
  tl::TrainingRunOptions run{.save_every = 1000, .validate_every = 500};
  std::int64_t tokens = 0, batch = 8, steps = 0, warmup = -1, decay_steps = 0, validation_batches = 0, log_every = 10;
  double epochs = 0, min_lr = -1, peak_gflops = 0;
  bool resume = false, fresh = false, as_json = false;
};

/// "layers=4", "tied" ... as a config. Throws Error.
tl::any_llama parse_shape(const std::vector<std::string>& parts) {
  tl::any_llama c{};
  for (const std::string& part : parts) {
    const auto at = part.find('=');
    const std::string key = part.substr(0, at), value = at == part.npos ? "" : part.substr(at + 1);
    if (key == "tied" && value.empty()) {
      c.tied = true;
      continue;
    }
    int* const to = key == "layers" ? &c.layers : key == "hidden" ? &c.hidden : key == "heads" ? &c.heads : key == "kv_heads" ? &c.kv_heads
                    : key == "ffn" ? &c.ffn : key == "vocab" ? &c.vocab : key == "context" ? &c.context : nullptr;
    if (!to) throw tl::Error("--shape", key, "layers, hidden, heads, kv_heads, ffn, vocab, context or tied", "this");
    const auto [end, error] = std::from_chars(value.data(), value.data() + value.size(), *to);
    if (error != std::errc() || end != value.data() + value.size() || *to < 1)
      throw tl::Error("--shape", key, "a whole number from 1", "'" + value + "'");
  }
  if (c.kv_heads == 0) c.kv_heads = c.heads;
  tl::check(c, "--shape");
  return c;
}

tl::any_llama find_preset(const std::string& wanted) {
  std::optional<tl::any_llama> found;
  std::string known;
  tl::presets::any([&]<class C>() {
    known.append(known.empty() ? "" : ", ").append(C::name);
    if (C::name == wanted) found = tl::describe<C>();
    return found.has_value();
  });
  if (!found) throw tl::Error("--preset", "", "one of " + known, wanted);
  return *found;
}

/// FOLDER/PREFIX[:WEIGHT]
tl::DataSource open_source(const std::string& text) {
  tl::DataSource source;
  std::string path = text;
  if (const auto colon = text.rfind(':'); colon != text.npos) {
    const char *const first = text.data() + colon + 1, *const last = text.data() + text.size();
    double weight = 0;
    const auto [end, error] = std::from_chars(first, last, weight);
    if (error == std::errc() && end == last) source.weight = weight, path.resize(colon);
  }
  const fs::path p(path);
  source.files = tl::packed_files(p.has_parent_path() ? p.parent_path() : fs::path("."), p.filename().string());
  return source;
}

/// What the loader needs of the stages: "as before" written out.
std::vector<tl::DataStage> data_stages(const tl::StagedSchedule& run, std::int64_t rows) {
  std::vector<tl::DataStage> out;
  std::vector<double> weights;
  for (const tl::StageSchedule& s : run.stages) {
    if (s.rows > 0) rows = s.rows;
    if (!s.weights.empty()) weights = s.weights;
    out.push_back({.steps = s.steps, .rows = rows, .weights = weights, .ramp_steps = s.ramp_steps});
  }
  if (out.empty()) out.push_back({.rows = rows});
  return out;
}

tl::StagedSchedule read_stages(const std::string& path) {
  std::ifstream in(path);
  if (!in) throw tl::Error(path, "", "a file that can be read", "none");
  const auto j = nlohmann::json::parse(in, nullptr, false);
  if (j.is_discarded()) throw tl::Error(path, "", "JSON of a staged schedule", "another kind of file");
  return j.get<tl::StagedSchedule>();
}

tl::Schedule make_schedule(const Options& o, std::int64_t steps) {
  const double peak = static_cast<double>(o.optimizer.trainer.peak_lr);
  return {.decay = tl::parse_decay(o.schedule), .peak = peak, .minimum = o.min_lr < 0 ? peak / 10 : o.min_lr,
          .warmup = o.warmup < 0 ? std::min<std::int64_t>(2000, steps / 20) : o.warmup, .steps = steps,
          .decay_steps = o.decay_steps > 0 ? o.decay_steps : std::max<std::int64_t>(1, steps / 10)};
}

/// Whether a rank was asked to stop: then all do, behind the same step.
template <class D>
bool stopping(tl::Peers<D>* peers) {
  double asked = stop_asked;
  if (peers) peers->most({&asked, 1});
  return asked > 0;
}

/// The loop of train/run.hpp, with a log on rank 0 (`files`).
template <class D>
nlohmann::json train(tl::TrainingRun<tl::any_llama, D>& run, tl::Peers<D>* peers, const tl::DataLoader& data, double flops_per_token, double peak,
                     std::optional<example::RunFiles>& files, const Options& o) {
  example::RunDisplay display(o.as_json || !files, o.log_every);
  example::RunRow row{.steps = run.total_steps()};
  std::int64_t tokens = 0, skipped = 0;
  while (!run.done() && !stopping(peers)) {
    const auto start = std::chrono::steady_clock::now();
    row.report = run.step();
    const double seconds = example::seconds_since(start);
    row.step = run.steps(), row.tokens = run.tokens(), row.tokens_left = data.rows_before(row.steps) * data.tokens() - row.tokens;
    row.rate = static_cast<double>(run.step_tokens()) / seconds, row.share = row.rate * flops_per_token / peak, row.seconds += seconds;
    tokens += run.step_tokens(), skipped += row.report.skipped;
    row.validation_loss = run.validation_due() ? run.validate() : std::numeric_limits<double>::quiet_NaN();
    if (files) files->add(row);
    display.show(row);
    if (files && (run.validation_due() || run.save_due())) files->draw();
    if (run.save_due()) run.save();
  }
  if (!run.done()) {
    if (files) files->draw();
    if (!run.saved()) run.save();
    display.say("stopped after step " + std::to_string(run.steps()) + "; the same command goes on");
  }
  if (!files) return {};
  const auto &losses = files->training().values, &validated = files->validation().values;  // of the run, not only of this process
  nlohmann::json summary{{"steps", run.steps()}, {"stopped", !run.done()}, {"tokens", run.tokens()},
                         {"loss", losses.empty() ? nlohmann::json() : nlohmann::json(losses.back())},
                         {"validation_loss", validated.empty() ? nlohmann::json() : nlohmann::json(validated.back())},
                         {"skipped_steps", skipped}, {"seconds", row.seconds}};
  const double rate = row.seconds > 0 ? static_cast<double>(tokens) / row.seconds : 0;
  summary["tokens_per_second"] = rate, summary["share_of_peak"] = rate * flops_per_token / peak;
  return summary;
}

void pretrain(Options& o) {
  if (!o.ranks.start()) return;
  std::optional<tl::Checkpoint> file;
  if (!o.from.empty()) file.emplace(tl::open_checkpoint(o.from));
  const tl::any_llama config = file ? file->config : o.preset.empty() ? parse_shape(o.shape) : find_preset(o.preset);
  const std::int64_t T = o.tokens > 0 ? o.tokens : std::min(2048, config.context);
  if (T > config.context) throw tl::Error("--tokens", "", "at most the context, " + std::to_string(config.context), std::to_string(T));

  tl::TrainingRunOptions how = o.run;
  if (const auto there = tl::latest_checkpoint(how.folder); there && o.fresh)
    throw tl::Error(how.folder.string(), "", "a folder without checkpoints, for --fresh", there->filename().string());
  how.save.tokenizer = o.tokenizer;
  if (o.tokenizer.empty() && file) how.save.tokenizer = file->folder();
  if (!o.tokenizer.empty())
    if (const int pieces = tl::load_tokenizer(o.tokenizer).size(); pieces > config.vocab)
      throw tl::Error(o.tokenizer.string(), "pieces", "at most the model's vocabulary, " + std::to_string(config.vocab), std::to_string(pieces));

  tl::StagedSchedule schedule;
  if (!o.stages.empty()) schedule = read_stages(o.stages);
  std::vector<tl::DataSource> sources;
  for (const std::string& text : o.data) sources.push_back(open_source(text));
  tl::TrainerOptions learning = o.optimizer.parsed();
  const tl::DataLoaderOptions reading{.tokens = T, .seed = learning.seed, .vocab = config.vocab};
  tl::DataLoaderOptions sharing = reading;
  sharing.rank = o.ranks.rank(), sharing.ranks = o.ranks.size();
  const tl::DataLoader data(sources, data_stages(schedule, o.batch), sharing);
  std::optional<tl::DataLoader> validation;
  if (!o.validation.empty()) validation.emplace(open_source(o.validation), 1, reading);
  how.validation_blocks = o.validation_batches * o.batch;
  how.steps = schedule.steps();
  if (o.stages.empty()) {
    std::int64_t blocks = 0;
    for (std::size_t s = 0; s < data.sources(); ++s) blocks += data.blocks(s);
    const double wanted = o.epochs * static_cast<double>(blocks) / static_cast<double>(o.batch);
    how.steps = o.steps > 0 ? o.steps : std::max<std::int64_t>(1, std::llround(wanted));
    schedule.schedule = make_schedule(o, how.steps);
  }

  learning.schedule = schedule, learning.tokens = T;
  o.optimizer.with_device(o.ranks, [&]<class D>(D& dev) {
    const auto shared = o.ranks.peers(dev);
    tl::Peers<D>* const peers = shared.get();
    using Trainer = tl::Trainer<tl::any_llama, D>;
    Trainer trainer = file ? Trainer(dev, *file, learning, config, peers) : Trainer(dev, learning, config, peers);
    tl::TrainingRun<tl::any_llama, D> run(trainer, data, validation ? &*validation : nullptr, how);
    const bool resumed = run.resume();
    if (o.resume && !resumed) throw tl::Error(how.folder.string(), "", "a checkpoint to resume from", "none");
    const bool shows = o.ranks.first();
    if (shows) fs::create_directories(how.folder);

    const auto or_in_folder = [&](const fs::path& p, const char* name) { return p.empty() ? how.folder / name : p; };
    const std::string name = std::to_string(tl::parameter_count(config) / 1000) + "k parameters, " + std::to_string(config.layers) + " layers of " +
                             std::to_string(config.hidden);
    std::optional<example::RunFiles> files;
    if (shows)
      files.emplace(example::RunFiles::Paths{or_in_folder(o.files.csv, "log.csv"), or_in_folder(o.files.svg, "loss.svg"), o.files.tensorboard}, "Pretraining: " + name,
                    resumed ? std::optional(run.steps()) : std::nullopt);
    const double peak = o.peak_gflops > 0 ? o.peak_gflops * 1e9 : o.ranks.size() * example::measured_peak(dev, trainer.options().precision);
    tl::any_llama seen = config;  // attention reaches T far, whatever the model's context
    seen.context = static_cast<int>(T);
    if (!o.as_json && shows)
      std::cout << name << "; " << run.total_steps() << " steps" << (resumed ? " from checkpoint " + std::to_string(run.steps()) : "") << "; "
                << (o.ranks.size() > 1 ? std::to_string(o.ranks.size()) + " ranks (" + o.ranks.parallel() + ") of " : "") << example::threads_of(dev) << " threads, " << example::instruction_set(dev) << ", " << o.optimizer.precision << " peak "
                << std::llround(peak * 1e-9) << " GFLOP/s" << std::endl;

    nlohmann::json summary = train(run, peers, data, static_cast<double>(tl::training_flops_per_token(seen)), peak, files, o);
    if (!shows) return;
    const auto newest = tl::latest_checkpoint(how.folder);
    const std::int64_t micro = learning.micro_rows > 0 ? learning.micro_rows : (o.batch + o.ranks.size() - 1) / o.ranks.size();
    const tl::TrainingPlan plan = tl::training_plan<D>(config, {.batch = micro, .tokens = T, .checkpointing = learning.checkpointing,
                                                             .precision = trainer.options().precision, .moments = learning.moments, .threads = example::threads_of(dev), .sharding = o.ranks.sharding(),
                                                             .ranks = o.ranks.size(), .wire = o.ranks.wire()});
    summary.update({{"checkpoint", newest ? newest->string() : ""}, {"resumed", resumed}, {"parameters", tl::parameter_count(config)},
                    {"peak_flops", peak}, {"threads", example::threads_of(dev)}, {"ranks", o.ranks.size()}, {"instruction_set", example::instruction_set(dev)}, {"peak_bytes", example::peak_bytes(dev)},
                    {"planned_bytes", plan.total()}});
    if (o.as_json) {
      std::cout << summary << '\n';
      return;
    }
    std::cout << summary["tokens"] << " tokens";
    if (const double rate = summary["tokens_per_second"]; rate > 0) std::cout << " at " << std::llround(rate) << " a second";
    if (!summary["validation_loss"].is_null()) std::cout << "; validation loss " << summary["validation_loss"];
    const auto gib = [](std::size_t bytes) { return std::to_string(static_cast<double>(bytes) / (1 << 30)).substr(0, 5) + " GiB"; };
    std::cout << "; memory " << gib(summary["peak_bytes"]) << ", planned " << gib(plan.total()) << "; " << (newest ? newest->string() : "no checkpoint") << '\n';
  });
}

}  // namespace

int main(int argc, char** argv) {
  CLI::App app("Trains a model on packed data. The same command goes on from the newest checkpoint in OUT; an interrupt saves one first.");
  Options o;
  o.optimizer.add_to(app);
  o.ranks.add_to(app);
  auto* model = app.add_option_group("Model", "one of");
  model->require_option(1);
  model->add_option("--preset", o.preset, "a shape that has a name, from new weights");
  model->add_option("--shape", o.shape, "layers=..,hidden=..,heads=..,kv_heads=..,ffn=..,vocab=..,context=..[,tied], from new weights")
      ->delimiter(',');
  model->add_option("--from", o.from, "weights to go on from: a folder in Hugging Face layout, or a GGUF file");
  app.add_option("--data", o.data, "FOLDER/PREFIX[:WEIGHT] of packed data; several are mixed by weight")->required();
  app.add_option("--validation", o.validation, "FOLDER/PREFIX of packed data that is not trained on");
  app.add_option("--tokens", o.tokens, "T of a row; 0: the context, at most 2048")->check(CLI::NonNegativeNumber);
  app.add_option("--batch", o.batch, "rows of a step, over all ranks")->check(CLI::PositiveNumber)->capture_default_str();
  app.add_option("--micro-rows", o.optimizer.trainer.micro_rows, "rows at a time, whose gradients are added up; 0: all of a step")
      ->check(CLI::NonNegativeNumber);
  auto* length = app.add_option_group("Length", "one of");
  length->require_option(1);
  length->add_option("--steps", o.steps, "optimizer steps of the whole run")->check(CLI::PositiveNumber);
  length->add_option("--epochs", o.epochs, "passes over all data")->check(CLI::PositiveNumber);
  auto* stages = length->add_option("--stages", o.stages, "JSON of a StagedSchedule: stages of steps, rows, weights, ramp_steps, learning rates");
  for (CLI::Option* option : {
           app.get_option("--lr"),
           app.add_option("--schedule", o.schedule, "after the warm-up")
               ->check(CLI::IsMember({"cosine", "linear", "constant", "wsd_linear", "wsd_sqrt"}))->capture_default_str(),
           app.add_option("--warmup", o.warmup, "steps from 0 to --lr; default: a twentieth, at most 2000")->check(CLI::NonNegativeNumber),
           app.add_option("--min-lr", o.min_lr, "at the end; default: a tenth of --lr")->check(CLI::NonNegativeNumber),
           app.add_option("--decay-steps", o.decay_steps, "of wsd_*, at the end; default: a tenth")->check(CLI::PositiveNumber)})
    stages->excludes(option);
  app.add_option("--out", o.run.folder, "folder of the checkpoints and logs")->required();
  app.add_option("--keep", o.run.save.keep, "checkpoints that stay; 0: all")->check(CLI::NonNegativeNumber)->capture_default_str();
  app.add_option("--save-every", o.run.save_every, "steps; 0: at the end only")->check(CLI::NonNegativeNumber)->capture_default_str();
  app.add_option("--validate-every", o.run.validate_every, "steps; 0: at the end only")->check(CLI::NonNegativeNumber)->capture_default_str();
  app.add_option("--validation-batches", o.validation_batches, "of --batch rows; 0: the whole set")->check(CLI::NonNegativeNumber);
  auto* resume = app.add_flag("--resume", o.resume, "it is an error if OUT has no checkpoint");
  app.add_flag("--fresh", o.fresh, "it is an error if OUT has one")->excludes(resume);
  app.add_option("--tokenizer", o.tokenizer, "a folder or file to copy into the checkpoints; default: that of --from");
  app.add_option("--peak-gflops", o.peak_gflops, "of the machine, for the share of it; default: measured by a matrix product")
      ->check(CLI::PositiveNumber);
  app.add_option("--log-every", o.log_every, "steps between lines where no terminal shows a live one")
      ->check(CLI::PositiveNumber)->capture_default_str();
  app.add_option("--csv", o.files.csv, "log of every step; default: OUT/log.csv");
  app.add_option("--svg", o.files.svg, "plot of the losses; default: OUT/loss.svg");
  app.add_option("--tensorboard", o.files.tensorboard, "folder for event files");
  app.add_flag("--json", o.as_json, "one JSON object at the end, and nothing else");
  return example::run_main(argc, argv, app, [&] {
    struct sigaction action {};
    action.sa_handler = [](int) { stop_asked = 1; };
    action.sa_flags = SA_RESETHAND;  // a second one ends the program at once
    for (const int signal : {SIGINT, SIGTERM}) sigaction(signal, &action, nullptr);
    pretrain(o);
  });
}
