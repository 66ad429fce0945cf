// generate: goes on from a prompt, streaming, or as one JSON object for programs.
#include <tinyllama/tinyllama.hpp>

#include <nlohmann/json.hpp>

#include <chrono>

#include "common.hpp"
#include "options.hpp"

namespace tl = tinyllama;
using Clock = std::chrono::steady_clock;

namespace {

double seconds(Clock::time_point from, Clock::time_point to) { return std::chrono::duration<double>(to - from).count(); }

void run(const example::ModelOptions& m, const std::string& prompt, tl::GenerateOptions options, bool json) {
  const std::size_t before = example::status_bytes("VmRSS");
  const tl::Checkpoint file = tl::open_checkpoint(m.path);
  example::with_model(file, m, m.load(json), [&](const auto& model) {
    const auto& dev = model.device();
    using Device = std::remove_cvref_t<decltype(dev)>;
    auto session = model.start();
    if (!json) options.progress = example::progress("reading the prompt");
    auto generation = tl::generate(session, prompt, options);
    const auto started = Clock::now();
    generation.start();
    const auto read = Clock::now();
    std::string text;
    std::vector<std::int32_t> ids;
    nlohmann::json log_probabilities = nlohmann::json::array();
    const tl::Finish finish = generation.run([&](const tl::Token& t) {
      text += t.text;
      if (t.id >= 0) ids.push_back(t.id);
      if (!json) std::cout << t.text << std::flush;
      if (options.log_probabilities < 0 || t.id < 0) return;
      nlohmann::json top = nlohmann::json::array();
      for (const tl::TokenProbability& p : t.top) top.push_back({{"id", p.id}, {"log_probability", p.log_probability}});
      log_probabilities.push_back({{"id", t.id}, {"log_probability", t.log_probability}, {"top", top}});
    });
    const double prefill = seconds(started, read), decode = seconds(read, Clock::now());
    const auto prompt_tokens = generation.prompt().size();
    const double prefill_rate = static_cast<double>(prompt_tokens) / prefill, decode_rate = ids.size() > 1 ? static_cast<double>(ids.size() - 1) / decode : 0.0;
    if (!json) {
      std::cout << std::endl;
      if (isatty(STDERR_FILENO)) std::fprintf(stderr, "[prompt %zu tokens, %.1f/s; answer %zu tokens, %.1f/s]\n", prompt_tokens, prefill_rate, ids.size(), decode_rate);
      return;
    }
    // What the library plans, and what this process held before it: the program, its libraries, their heap.
    const auto plan = tl::memory_plan<Device>(file, {.tokens = session.cache().context() < session.length() + options.max_tokens
                                                            ? session.cache().context()
                                                            : static_cast<tl::index_t>(prompt_tokens) + options.max_tokens,
                                             .chunk = std::min<tl::index_t>(tl::prefill_chunk<Device>(options.chunk), std::max<tl::index_t>(1, static_cast<tl::index_t>(prompt_tokens))),
                                             .cache = m.cache_format()});
    nlohmann::json out = {{"text", text},
                          {"tokens", ids.size()},
                          {"ids", ids},
                          {"prompt_tokens", prompt_tokens},
                          {"prefill_tokens_per_second", prefill_rate},
                          {"decode_tokens_per_second", decode_rate},
                          {"peak_bytes", example::status_bytes("VmHWM")},
                          {"planned_bytes", plan.total() + before},
                          {"finish", tl::name(finish)},
                          {"device", m.device}};
    if constexpr (Device::host_memory) out["instruction_set"] = dev.instruction_set(), out["threads"] = dev.threads();
    else out["card"] = dev.name();
    if (options.log_probabilities >= 0) out["log_probabilities"] = log_probabilities;
    std::cout << out.dump() << std::endl;
  });
}

}  // namespace

int main(int argc, char** argv) {
  CLI::App app("Goes on from a prompt. MODEL is a GGUF file or a folder in Hugging Face layout.");
  example::ModelOptions model;
  tl::GenerateOptions options;
  std::string prompt;
  bool json = false, no_bos = false;
  model.add_to(app);
  example::add_generate_options(app, options);
  app.add_option("--prompt", prompt, "the text to go on from");
  app.add_option("--log-probabilities", options.log_probabilities, "with --json: of each token and of its N best alternatives");
  app.add_flag("--special", options.special, "recognise special tokens written in the prompt");
  app.add_flag("--ignore-eos", options.ignore_eos, "go on behind an end of text");
  app.add_flag("--no-bos", no_bos, "no beginning-of-text token, whatever the model's policy");
  app.add_flag("--json", json, "one JSON object on standard output");
  return example::run_main(argc, argv, app, [&] {
    if (no_bos) options.bos = false;
    run(model, prompt, options, json);
  });
}
