// train_step: N optimizer steps on a batch of ids, or on several in turn, for comparing with other software: losses, gradients, and the model behind them. Under mpirun the ranks share
// the batch's rows, and rank 0 writes.
#include <xtensor/xnpy.hpp>

#include <nlohmann/json.hpp>

#include <chrono>
#include <optional>

#include "ranks.hpp"
#include "train_options.hpp"

namespace tl = tinyllama;

namespace {

/// Ids [B, T] from a .npy file of int32 or int64.
xt::xarray<std::int64_t> read_ids(const std::string& path) {
  std::string why;
  const auto read = [&]<class T>() -> std::optional<xt::xarray<std::int64_t>> {
    try {
      return xt::xarray<std::int64_t>(xt::load_npy<T>(path));
    } catch (const std::exception& e) {
      why = e.what();
      return std::nullopt;
    }
  };
  auto ids = read.operator()<std::int64_t>();
  if (!ids) ids = read.operator()<std::int32_t>();
  if (!ids) throw tl::Error(path, "ids", "a .npy file of int32 or int64", why);
  if (ids->dimension() != 2) throw tl::Error(path, "shape", "[B, T]", std::to_string(ids->dimension()) + " axes");
  return *ids;
}

std::vector<std::int32_t> narrowed(const xt::xarray<std::int64_t>& ids, const std::string& path) {
  std::vector<std::int32_t> out;
  for (const std::int64_t id : ids) {
    if (id < INT32_MIN || id > INT32_MAX) throw tl::Error(path, "id", "32 bits", std::to_string(id));
    out.push_back(static_cast<std::int32_t>(id));
  }
  return out;
}

}  // namespace

int main(int argc, char** argv) {
  CLI::App app("Runs N AdamW steps on one batch, or on batches in turn: losses, the first step's gradients, and the model after the last.");
  example::OptimizerOptions options;
  example::Ranks ranks;
  std::string model, inputs_path, targets_path, gradients, save;
  std::vector<double> schedule;
  int steps = 1, batch = 0;
  bool as_json = false;
  options.add_to(app);
  ranks.add_to(app);
  app.add_option("--model", model, "a folder in Hugging Face layout, or a GGUF file")->required();
  app.add_option("--inputs", inputs_path, "[B, T] ids, .npy of int32 or int64")->required();
  app.add_option("--targets", targets_path, "[B, T] next ids; -100 does not count")->required();
  app.add_option("--steps", steps, "optimizer steps")->check(CLI::PositiveNumber)->capture_default_str();
  app.add_option("--batch", batch, "rows that a step takes, the next step the rows behind them; 0: all, each step the same")->check(CLI::NonNegativeNumber);
  app.add_option("--schedule", schedule, "WARMUP,STEPS,MINIMUM: a line to --lr, then a cosine; default: --lr throughout")->delimiter(',')->expected(3);
  app.add_option("--micro-rows", options.trainer.micro_rows, "rows of a micro-batch; 0: all")->check(CLI::NonNegativeNumber);
  app.add_option("--gradients", gradients, "safetensors file for the first step's gradients, not clipped");
  app.add_option("--save", save, "folder for the model after the last step");
  app.add_flag("--json", as_json, "one JSON object");
  return example::run_main(argc, argv, app, [&] {
    if (!ranks.start()) return;
    const auto ids = read_ids(inputs_path), next = read_ids(targets_path);
    if (ids.shape() != next.shape()) throw tl::Error(targets_path, "shape", "that of " + inputs_path, "another");
    const auto inputs = narrowed(ids, inputs_path), targets = narrowed(next, targets_path);
    const std::size_t each = batch ? static_cast<std::size_t>(batch) : ids.shape(0);
    if (ids.shape(0) % each != 0) throw tl::Error(inputs_path, "rows", "a multiple of --batch " + std::to_string(batch), std::to_string(ids.shape(0)));
    const tl::Interval rows = ranks.share(each);
    const auto mine = [&](const std::vector<std::int32_t>& all, int step) {
      const std::size_t first = static_cast<std::size_t>(step) * each % ids.shape(0) + static_cast<std::size_t>(rows.begin);
      return std::span(all).subspan(first * ids.shape(1), static_cast<std::size_t>(rows.size()) * ids.shape(1));
    };
    const tl::Checkpoint file = tl::open_checkpoint(model);
    options.with_device(ranks, [&]<class D>(D& dev) {
      tl::TrainerOptions how = options.parsed();
      how.tokens = static_cast<tl::index_t>(ids.shape(1));
      if (!schedule.empty())
        how.schedule = tl::StagedSchedule{{.peak = how.peak_lr, .minimum = schedule[2], .warmup = static_cast<std::int64_t>(schedule[0]), .steps = static_cast<std::int64_t>(schedule[1])}};
      const auto peers = ranks.peers(dev);
      tl::Trainer<tl::any_llama, D> trainer(dev, file, how, file.config, peers.get());

      std::vector<float> losses, norms;
      double seconds = 0;  // of the steps behind the first, which takes its memory
      for (int i = 0; i < steps; ++i) {
        const auto start = std::chrono::steady_clock::now();
        losses.push_back(trainer.step(mine(inputs, i), mine(targets, i)));
        if (i > 0 || steps == 1) seconds += std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
        norms.push_back(trainer.report().gradient_norm);
        if (i == 0 && !gradients.empty())
          if (const std::vector<float> all = trainer.whole_gradients(); ranks.first()) example::write_parameters(gradients, file.config, all);
        if (!as_json && ranks.first()) std::cout << "step " << i + 1 << "  loss " << losses.back() << "  gradient norm " << norms.back() << std::endl;
      }
      if (!save.empty())
        if (const std::vector<float> all = trainer.whole(trainer.weights()); ranks.first())
          tl::save_safetensors(tl::FlatModel(file.config, all, file.folder()), save, {.format = tl::Format::f32});
      if (!ranks.first()) return;
      const double rate = static_cast<double>(each * ids.shape(1)) * std::max(1, steps - 1) / seconds;
      if (as_json)
        std::cout << nlohmann::json{{"losses", losses}, {"gradient_norms", norms}, {"tokens_per_second", rate}, {"peak_bytes", example::peak_bytes(dev)},
                                    {"instruction_set", example::instruction_set(dev)}, {"precision", options.precision}, {"moments", options.moments}, {"threads", example::threads_of(dev)},
                                    {"ranks", ranks.size()}, {"parallel", ranks.parallel()}, {"trainer_bytes", trainer.bytes()}} << '\n';
      else std::cout << rate << " tokens/s\n";
    });
  });
}
