// Training over several ranks: steps on random ids, of which the ranks share the rows; losses, milliseconds and tokens a second, bytes of a rank.
//
//   mpirun -np 2 ranks_bench --device cuda --preset tinyllama_1b --rows 32 --tokens 2048 --parallel fsdp
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <string>
#include <vector>

#include "../examples/train_options.hpp"

namespace tl = tinyllama;

namespace {

struct Options {
  example::OptimizerOptions training;
  example::Ranks ranks;
  std::string preset = "tinyllama_1b";
  tl::index_t rows = 16, tokens = 2048;
  int steps = 6, layers = 0, vocab = 0;
};

tl::any_llama config_of(const Options& o) {
  tl::any_llama c;
  bool found = false;
  tl::presets::any([&]<class C>() {
    if (C::name == o.preset) c = tl::describe<C>(), found = true;
    return found;
  });
  if (!found) throw tl::Error("--preset", "", "the name of a preset", o.preset);
  if (o.layers > 0) c.layers = o.layers;
  if (o.vocab > 0) c.vocab = o.vocab;
  return c;
}

/// " (of its card ...)": the most that the device gave out at a time, and what its card holds now, CUDA's own memory and NCCL's included.
template <class D>
std::string of_the_card([[maybe_unused]] const D& dev) {
  if constexpr (D::host_memory) {
    return "";
  } else {
    char text[96];
    std::snprintf(text, sizeof text, " (of its card at most %.2f, with CUDA and NCCL %.2f)", static_cast<double>(dev.most_bytes_in_use()) / (1 << 30), static_cast<double>(dev.card_bytes_in_use()) / (1 << 30));
    return text;
  }
}

void run(Options& o) {
  if (!o.ranks.start()) return;
  const tl::any_llama c = config_of(o);
  o.training.with_device(o.ranks, [&]<class D>(D& dev) {
    tl::TrainerOptions how = o.training.parsed();
    how.tokens = o.tokens;
    const auto peers = o.ranks.peers(dev);
    tl::Trainer<tl::any_llama, D> trainer(dev, how, c, peers.get());
    const tl::Interval mine = o.ranks.share(static_cast<std::size_t>(o.rows));
    std::vector<std::int32_t> ids, next;
    for (tl::index_t i = mine.begin * o.tokens; i < mine.end * o.tokens; ++i)
      for (auto* to : {&ids, &next}) to->push_back(static_cast<std::int32_t>(tl::random_bits(1, static_cast<std::uint64_t>(i + (to == &next))) % static_cast<std::uint64_t>(c.vocab)));
    std::vector<double> seconds;
    for (int i = 0; i < o.steps; ++i) {
      const auto start = std::chrono::steady_clock::now();
      const float loss = trainer.step(ids, next);
      if constexpr (!D::host_memory) dev.synchronize();
      const double s = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
      if (i > 1) seconds.push_back(s);  // the first two take memory and measure
      if (o.ranks.first()) std::printf("step %d  loss %.7f  norm %.7f  %.1f ms\n", i + 1, static_cast<double>(loss), static_cast<double>(trainer.report().gradient_norm), 1e3 * s);
    }
    if (!o.ranks.first() || seconds.empty()) return;
    const tl::index_t rows = (o.rows + o.ranks.size() - 1) / o.ranks.size();
    const tl::TrainingPlan plan = tl::training_plan<D>(c, {.batch = how.micro_rows > 0 ? std::min(rows, how.micro_rows) : rows, .tokens = o.tokens, .checkpointing = how.checkpointing,
                                                           .precision = trainer.options().precision, .moments = how.moments, .sharding = o.ranks.sharding(), .ranks = o.ranks.size(), .wire = o.ranks.wire()});
    std::sort(seconds.begin(), seconds.end());
    const double s = seconds[seconds.size() / 2], gib = static_cast<double>(trainer.bytes()) / (1 << 30);
    std::printf("%s %d ranks %s, %d rows of %d: %.1f ms a step (best %.1f), %.0f tokens/s, %.2f GiB of a rank%s, planned %.2f with scratch\n", o.preset.c_str(), o.ranks.size(),
                o.ranks.size() > 1 ? o.ranks.parallel().c_str() : "alone", static_cast<int>(o.rows), static_cast<int>(o.tokens), 1e3 * s, 1e3 * seconds.front(),
                static_cast<double>(o.rows * o.tokens) / s, gib, of_the_card(dev).c_str(),
                static_cast<double>(plan.total()) / (1 << 30));
  });
}

}  // namespace

int main(int argc, char** argv) {
  CLI::App app("Trains on random ids, alone or under mpirun, and says how fast.");
  Options o;
  o.training.trainer.peak_lr = 1e-4f;
  o.training.add_to(app);
  o.ranks.add_to(app);
  app.add_option("--preset", o.preset)->capture_default_str();
  app.add_option("--rows", o.rows, "of all ranks")->check(CLI::PositiveNumber)->capture_default_str();
  app.add_option("--tokens", o.tokens, "of a row")->check(CLI::PositiveNumber)->capture_default_str();
  app.add_option("--steps", o.steps)->check(CLI::PositiveNumber)->capture_default_str();
  app.add_option("--layers", o.layers, "0: the preset's");
  app.add_option("--vocab", o.vocab, "0: the preset's");
  app.add_option("--micro-rows", o.training.trainer.micro_rows, "rows of a micro-batch; 0: all of a rank")->check(CLI::NonNegativeNumber);
  return example::run_main(argc, argv, app, [&] { run(o); });
}
