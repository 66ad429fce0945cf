// finetune: teaches a model conversations (all weights, or LoRA adapters), or preferences between answers (DPO), from JSONL. Under mpirun the ranks share the
// rows, or pairs, of each step.
#include <tinyllama/io/tokenizer_file.hpp>
#include <tinyllama/train/adapter_file.hpp>
#include <tinyllama/train/conversations.hpp>
#include <tinyllama/train/dpo.hpp>
#include <tinyllama/train/sample_packing.hpp>

#include <nlohmann/json.hpp>

#include <chrono>
#include <numeric>

#include "ranks.hpp"
#include "train_options.hpp"

namespace tl = tinyllama;

namespace {

struct Options {
  example::OptimizerOptions optimizer;
  example::Ranks ranks;
  std::string model, data, out, merged, chat_template, schedule = "cosine";
  std::vector<std::string> targets{"q", "k", "v", "o", "gate", "up", "down"};
  int rank = 16, epochs = 3, batch = 4;
  float alpha = 32, dropout = 0, beta = 0.1f;
  double warmup = 0.05;
  tl::index_t tokens = 512;
  bool full = false, dpo = false, truncate = false, last = false, as_json = false;

  void add_to(CLI::App& app) {
    app.add_option("--model", model, "a folder in Hugging Face layout, or a GGUF file")->required();
    app.add_option("--data", data, "JSONL: conversations or question and answer; with --dpo prompt, chosen, rejected")->required();
    app.add_option("--out", out, "folder for the adapters (PEFT's layout), or with --full for the model (or a .gguf file)")->required();
    app.add_option("--merged", merged, "folder or .gguf file (f16) for the model with its adapters merged");
    app.add_flag("--full", full, "learn all weights instead of adapters");
    app.add_flag("--dpo", dpo, "learn preferences (arXiv 2305.18290)");
    app.add_option("--beta", beta, "DPO: how far from the reference")->capture_default_str();
    app.add_option("--rank", rank, "of the adapters")->check(CLI::PositiveNumber)->capture_default_str();
    app.add_option("--alpha", alpha, "adapters are scaled by alpha / rank")->capture_default_str();
    app.add_option("--dropout", dropout, "of the adapters' inputs")->capture_default_str();
    app.add_option("--targets", targets, "matrices with adapters: q, k, v, o, gate, up, down")->delimiter(',')->check(CLI::IsMember({"q", "k", "v", "o", "gate", "up", "down"}));
    app.add_option("--epochs", epochs)->check(CLI::PositiveNumber)->capture_default_str();
    app.add_option("--batch", batch, "rows of a step, each packed with samples; DPO: pairs of a step")->check(CLI::PositiveNumber)->capture_default_str();
    app.add_option("--tokens", tokens, "of a row, and of a sample at most")->check(CLI::PositiveNumber)->capture_default_str();
    app.add_flag("--truncate", truncate, "shorten samples that are too long, rather than leave them out");
    app.add_flag("--last-answer", last, "learn a conversation's last answer only");
    app.add_option("--template", chat_template, "zephyr, chatml, human, llama2 or none; default: the model's own");
    app.add_option("--schedule", schedule, "cosine, linear or constant, behind a warm-up")->check(CLI::IsMember({"cosine", "linear", "constant"}))->capture_default_str();
    app.add_option("--warmup", warmup, "share of the steps")->check(CLI::Range(0.0, 1.0))->capture_default_str();
    app.add_flag("--json", as_json, "one JSON object at the end, nothing else");
    optimizer.add_to(app);
    ranks.add_to(app);
  }
  std::optional<tl::ChatTemplate> chosen_template() const {
    return chat_template.empty() ? std::nullopt : std::optional(tl::parse_chat_template(chat_template));
  }
  tl::TrainerOptions trainer(std::int64_t steps) const {
    tl::TrainerOptions o = optimizer.parsed();
    const auto warm = static_cast<std::int64_t>(warmup * static_cast<double>(steps));
    o.schedule = tl::StagedSchedule{{.decay = tl::parse_decay(schedule), .peak = o.peak_lr, .minimum = 0.1 * static_cast<double>(o.peak_lr), .warmup = warm,
                                     .steps = std::max(steps, warm + 1)}};
    o.tokens = tokens;
    if (full) return o;
    o.lora = tl::LoraOptions{.rank = rank, .alpha = alpha, .dropout = dropout, .slots = {}, .seed = o.seed};
    const std::map<std::string, tl::Slot> slots{{"q", tl::Slot::q}, {"k", tl::Slot::k}, {"v", tl::Slot::v}, {"o", tl::Slot::o},
                                                {"gate", tl::Slot::gate}, {"up", tl::Slot::up}, {"down", tl::Slot::down}};
    for (const std::string& t : targets) o.lora->slots.add(slots.at(t));
    return o;
  }
};

/// Prints a step now and then, and knows how fast they were.
class Progress {
 public:
  Progress(std::int64_t steps, bool quiet) : steps_(steps), quiet_(quiet) {}
  void operator()(std::int64_t step, std::int64_t tokens, const std::string& what) {
    tokens_ += tokens;
    const double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start_).count();
    rate = static_cast<double>(tokens_) / seconds;
    if (!quiet_ && (step == steps_ || step % std::max<std::int64_t>(1, steps_ / 20) == 0))
      std::printf("step %lld of %lld  %s  %.0f tokens/s\n", static_cast<long long>(step), static_cast<long long>(steps_), what.c_str(), rate), std::fflush(stdout);
  }
  double rate = 0;

 private:
  std::int64_t steps_, tokens_ = 0;
  bool quiet_;
  std::chrono::steady_clock::time_point start_ = std::chrono::steady_clock::now();
};

std::string number(float v) {
  char text[32];
  std::snprintf(text, sizeof text, "%.4f", static_cast<double>(v));
  return text;
}

/// Conversations, several packed into each row. Returns the mean loss of each epoch.
template <class D>
std::vector<float> learn_answers(tl::Trainer<tl::any_llama, D>& trainer, const Options& o, const std::vector<tl::Sample>& samples, std::int64_t steps, double& rate) {
  std::vector<float> epochs;
  std::vector<std::int32_t> inputs, targets;
  std::vector<tl::Sequence> batch;
  Progress progress(steps, o.as_json || !o.ranks.first());
  const auto T = static_cast<std::size_t>(o.tokens);
  for (int epoch = 0; epoch < o.epochs; ++epoch) {
    const tl::Packing p = tl::pack_samples(samples, {.tokens = o.tokens, .seed = o.optimizer.trainer.seed + static_cast<std::uint64_t>(epoch)});
    double sum = 0;
    std::int64_t counted = 0;
    for (std::size_t row = 0; row < p.rows.size(); row += static_cast<std::size_t>(o.batch)) {
      const std::size_t rows = std::min(static_cast<std::size_t>(o.batch), p.rows.size() - row);
      std::int64_t here = 0;
      for (std::size_t r = 0; r < rows; ++r)
        for (const tl::PackedSample& s : p.rows[row + r]) here += samples[s.sample].counted();
      const tl::Interval mine = o.ranks.share(rows);
      trainer.begin_step(mine.size());
      for (auto r = static_cast<std::size_t>(mine.begin); r < static_cast<std::size_t>(mine.end); ++r) {  // a row is a micro-batch
        inputs.assign(T, 0), targets.assign(T, tl::not_counted), batch.clear();
        tl::write_packed_row(p, row + r, samples, inputs, targets);
        tl::append_sequences(p, row + r, 0, batch);
        trainer.accumulate(inputs, targets, batch, 1.0f / static_cast<float>(here));
      }
      sum += static_cast<double>(trainer.end_step(here)) * static_cast<double>(here), counted += here;
      progress(trainer.steps(), static_cast<std::int64_t>(rows * T), "loss " + number(trainer.report().loss));
    }
    epochs.push_back(static_cast<float>(sum / static_cast<double>(counted)));
  }
  rate = progress.rate;
  return epochs;
}

/// Pairs of answers. Returns each epoch's mean loss; the accuracy of the last one goes to `accuracy`.
template <class D>
std::vector<float> learn_preferences(tl::Trainer<tl::any_llama, D>& trainer, const Options& o, std::vector<tl::PreferencePair> pairs, std::int64_t steps, float& accuracy,
                                     double& rate) {
  std::vector<tl::PairLogProbabilities> reference;
  for (const tl::PreferencePair& p : pairs) reference.push_back(tl::log_probabilities(trainer, p));
  std::vector<float> epochs;
  Progress progress(steps, o.as_json || !o.ranks.first());
  for (int epoch = 0; epoch < o.epochs; ++epoch) {
    for (std::size_t i = pairs.size(); i > 1; --i) {
      const std::size_t j = tl::random_bits(o.optimizer.trainer.seed + static_cast<std::uint64_t>(epoch), i) % i;
      std::swap(pairs[i - 1], pairs[j]), std::swap(reference[i - 1], reference[j]);
    }
    float loss = 0;
    accuracy = 0;
    for (std::size_t at = 0; at < pairs.size(); at += static_cast<std::size_t>(o.batch)) {
      const std::size_t n = std::min(static_cast<std::size_t>(o.batch), pairs.size() - at);
      const tl::DpoReport r = tl::dpo_step(trainer, std::span<const tl::PreferencePair>(pairs).subspan(at, n),
                                           std::span<const tl::PairLogProbabilities>(reference).subspan(at, n), o.beta);
      const float share = static_cast<float>(n) / static_cast<float>(pairs.size());
      loss += share * r.loss, accuracy += share * r.accuracy;
      std::int64_t tokens = 0;
      for (std::size_t i = at; i < at + n; ++i) tokens += pairs[i].chosen.tokens() + pairs[i].rejected.tokens();
      progress(trainer.steps(), tokens, "loss " + number(r.loss) + "  margin " + number(r.margin));
    }
    epochs.push_back(loss);
  }
  rate = progress.rate;
  return epochs;
}

template <class D>
void save(tl::Trainer<tl::any_llama, D>& trainer, const Options& o, const tl::Checkpoint& file, const tl::Vocabulary& vocabulary) {
  // Collective; behind them rank 0 is alone.
  const tl::HostArray weights = o.full ? trainer.whole_host(trainer.weights()) : trainer.host(trainer.weights());
  const tl::HostArray adapters = o.full ? tl::HostArray() : trainer.whole_host(trainer.adapters());
  if (!o.ranks.first()) return;
  const std::filesystem::path tokenizer = file.gguf() ? std::filesystem::path() : file.folder();
  const tl::any_llama& c = trainer.config();
  const auto write = [&](const std::string& path, std::span<const float> values) {
    const tl::FlatModel model(c, values, tokenizer);
    if (path.ends_with(".gguf")) return tl::save_gguf(model, path, {.mixture = tl::Format::f16, .vocabulary = &vocabulary});
    tl::save_safetensors(model, path, {.format = tl::Format::f32});
  };
  if (o.full) return write(o.out, weights.values);
  tl::save_adapters(o.out, c, *trainer.options().lora, adapters.values, o.model);
  if (o.merged.empty()) return;
  tl::merge_adapters(tl::Cpu(), c, *trainer.options().lora, weights.values, adapters.values);
  write(o.merged, weights.values);
}

}  // namespace

int main(int argc, char** argv) {
  CLI::App app("Fine-tunes a model on conversations or preferences: all weights, or LoRA adapters.");
  Options o;
  o.optimizer.trainer.peak_lr = 1e-3f, o.optimizer.trainer.weight_decay = 0, o.optimizer.betas = {0.9f, 0.999f};
  o.add_to(app);
  return example::run_main(argc, argv, app, [&] {
    if (!o.ranks.start()) return;
    const tl::Checkpoint file = tl::open_checkpoint(o.model);
    const auto tokenizer = tl::checkpoint_tokenizer(file);
    if (!tokenizer) throw tl::Error(o.model, "tokenizer", "one in the file or beside it", "none");
    const tl::TooLong policy = o.truncate ? tl::TooLong::truncate : tl::TooLong::drop;
    std::vector<tl::Sample> samples;
    std::vector<tl::PreferencePair> pairs;
    std::int64_t dropped = 0;
    if (o.dpo) {
      auto read = tl::read_preferences(o.data, *tokenizer, {.chat_template = o.chosen_template(), .max_tokens = o.tokens, .too_long = policy});
      pairs = std::move(read.pairs), dropped = read.dropped;
    } else {
      auto read = tl::read_conversations(o.data, *tokenizer, {.chat_template = o.chosen_template(), .answers = o.last ? tl::Answers::last : tl::Answers::all,
                                                              .max_tokens = o.tokens, .too_long = policy});
      samples = std::move(read.samples), dropped = read.dropped;
    }
    if (samples.empty() && pairs.empty()) throw tl::Error(o.data, "samples", "at least one of at most " + std::to_string(o.tokens) + " tokens", "none");
    const std::size_t units = o.dpo ? pairs.size() : tl::pack_samples(samples, {.tokens = o.tokens}).rows.size();
    const auto steps = static_cast<std::int64_t>((units + static_cast<std::size_t>(o.batch) - 1) / static_cast<std::size_t>(o.batch)) * o.epochs;

    o.optimizer.with_device(o.ranks, [&]<class D>(D& dev) {
      const auto peers = o.ranks.peers(dev);
      tl::Trainer<tl::any_llama, D> trainer(dev, file, o.trainer(steps), file.config, peers.get());
      float accuracy = 0;
      double rate = 0;
      const std::vector<float> losses = o.dpo ? learn_preferences(trainer, o, std::move(pairs), steps, accuracy, rate) : learn_answers(trainer, o, samples, steps, rate);
      save(trainer, o, file, tokenizer->vocabulary());
      if (!o.ranks.first()) return;
      if (o.as_json) {
        nlohmann::json j{{"losses", losses}, {"steps", trainer.steps()}, {"dropped", dropped}, {"tokens_per_second", rate}, {"peak_bytes", example::status_bytes("VmHWM")}};
        if (o.dpo) j["accuracy"] = accuracy;
        std::cout << j << '\n';
      } else {
        std::cout << "mean loss of the first epoch " << losses.front() << ", of the last " << losses.back() << "; saved in " << o.out << '\n';
      }
    });
  });
}
