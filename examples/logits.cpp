// logits: the logits of every position as a .npy file, [T, vocab] f32, for comparing with other software.
#include <tinyllama/tinyllama.hpp>

#include <xtensor/xadapt.hpp>
#include <xtensor/xnpy.hpp>

#include "common.hpp"
#include "options.hpp"

namespace tl = tinyllama;

int main(int argc, char** argv) {
  CLI::App app("Writes the logits of every position to a .npy file, [T, vocab] f32.");
  example::ModelOptions model;
  model.compute = "f32", model.cache = "f32";
  std::vector<std::int32_t> ids;
  std::string out;
  tl::index_t chunk = 512;
  bool step = false;
  model.add_to(app);
  app.add_option("--ids", ids, "token ids, separated by commas")->delimiter(',')->required();
  app.add_option("--out", out, "the .npy file")->required();
  app.add_option("--chunk", chunk, "tokens of a prefill step")->check(CLI::PositiveNumber)->capture_default_str();
  app.add_flag("--step", step, "token by token through the cache");
  return example::run_main(argc, argv, app, [&] {
    tl::LoadOptions load = model.load();
    load.tokenizer = false;
    example::with_model(tl::open_checkpoint(model.path), model, load, [&](const auto& m) {
      auto session = m.start();
      const std::size_t T = ids.size(), V = static_cast<std::size_t>(m.config().vocab), n = step ? 1 : static_cast<std::size_t>(chunk);
      std::vector<float> all;
      for (std::size_t at = 0; at < T; at += n) {
        const auto part = std::span<const std::int32_t>(ids).subspan(at, std::min(n, T - at));
        if (step) {
          const auto l = session.decode(part[0]);
          all.insert(all.end(), l.begin(), l.end());
        } else {
          const auto l = session.logits_of(part).span();
          all.insert(all.end(), l.begin(), l.end());
        }
      }
      try {
        xt::dump_npy(out, xt::adapt(all, std::vector<std::size_t>{T, V}));
      } catch (const std::runtime_error&) {
        throw tl::Error(out, "", "a place that can be written", "none");
      }
    });
  });
}
