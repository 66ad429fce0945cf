// perplexity: how well a model predicts a text, counted as llama.cpp's llama-perplexity counts it, so that the figures can be compared.
#include <tinyllama/tinyllama.hpp>

#include <nlohmann/json.hpp>

#include <algorithm>
#include <cmath>
#include <fstream>
#include <iterator>
#include <optional>

#include "common.hpp"
#include "options.hpp"

namespace tl = tinyllama;

namespace {

struct Options {
  example::ModelOptions model;
  std::string text;
  tl::index_t context = 512, chunks = 0;
  bool json = false;
};

std::string content(const std::string& path) {
  std::ifstream in(path, std::ios::binary);
  std::string text(std::istreambuf_iterator<char>(in), {});
  if (!in || text.empty()) throw tl::Error(path, "", "a text", in ? "an empty file" : "a file that cannot be read");
  return text;
}

double negative_log_probability(const float* logits, tl::index_t vocab, std::int32_t id) {
  const double top = *std::max_element(logits, logits + vocab);
  double sum = 0;
  for (tl::index_t i = 0; i < vocab; ++i) sum += std::exp(logits[i] - top);
  return std::log(sum) + top - logits[id];
}

/// Reads a chunk from its first token on; the losses of the tokens that positions context/2 .. context-2 predict. Only their logits are computed.
template <class Session>
void score(const tl::Cpu& cpu, Session& session, std::span<const std::int32_t> chunk, std::vector<double>& losses) {
  constexpr std::size_t step = 256;  // rows of logits at once
  const std::size_t first = chunk.size() / 2, last = chunk.size() - 1;
  session.truncate(0);
  session.prefill(chunk.first(first), {.logits = tl::Logits::none});
  for (std::size_t at = first; at < last; at += step) {
    const auto part = chunk.subspan(at, std::min(step, last - at));
    const auto logits = session.logits_of(part);
    const std::size_t known = losses.size();
    losses.resize(known + part.size());
    cpu.parallel_for(static_cast<tl::index_t>(part.size()), 1, [&](tl::index_t begin, tl::index_t end) {
      for (tl::index_t i = begin; i < end; ++i)
        losses[known + static_cast<std::size_t>(i)] = negative_log_probability(&logits(i, 0), logits.extent(1), chunk[at + static_cast<std::size_t>(i) + 1]);
    });
  }
}

void run(const Options& o) {
  const std::string text = content(o.text);
  example::with_model(tl::open_checkpoint(o.model.path), o.model, o.model.load(o.json), [&](const auto& model) {
    std::optional<tl::Cpu> own;  // threads for what is not the model's business
    const tl::Cpu& cpu = [&]() -> const tl::Cpu& {
      if constexpr (requires(const tl::Cpu*& c) { c = &model.device(); }) return model.device();
      else return own.emplace(tl::Cpu::Options{.threads = o.model.threads});
    }();
    const tl::Tokenizer& tokenizer = model.tokenizer();
    const bool bos = tokenizer.vocabulary().add_bos && tokenizer.bos() >= 0;
    std::vector<std::int32_t> ids = tokenizer.encode(text, {.bos = bos});
    const auto context = static_cast<std::size_t>(o.context);
    std::size_t chunks = ids.size() / context;
    if (o.chunks > 0) chunks = std::min(chunks, static_cast<std::size_t>(o.chunks));
    if (chunks == 0) throw tl::Error(o.text, "", "at least " + std::to_string(context) + " tokens", std::to_string(ids.size()));
    const auto progress = o.json ? std::function<void(std::size_t, std::size_t)>() : example::progress("reading the text");
    auto session = model.start();
    std::vector<double> losses;
    for (std::size_t i = 0; i < chunks; ++i) {
      const auto chunk = std::span(ids).subspan(i * context, context);
      if (bos) chunk[0] = tokenizer.bos();  // in the place of the chunk's own first token
      score(cpu, session, chunk, losses);
      if (progress) progress(i + 1, chunks);
    }
    const auto n = static_cast<double>(losses.size());
    double mean = 0, variance = 0;
    for (const double l : losses) mean += l / n;
    for (const double l : losses) variance += (l - mean) * (l - mean) / n;
    const double perplexity = std::exp(mean), error = n > 1 ? perplexity * std::sqrt(variance / (n - 1)) : 0.0;
    if (o.json)
      std::cout << nlohmann::json{{"perplexity", perplexity}, {"standard_error", error}, {"loss", mean},       {"chunks", chunks},
                                  {"context", context},       {"tokens_scored", losses.size()}, {"tokens", ids.size()}, {"bos", bos}}.dump()
                << std::endl;
    else
      std::printf("perplexity %.4f +/- %.4f, loss %.5f, %zu tokens scored in %zu chunks of %zu\n", perplexity, error, mean, losses.size(), chunks, context);
  });
}

}  // namespace

int main(int argc, char** argv) {
  CLI::App app("Perplexity of a text, as llama-perplexity counts it: the text in chunks, each begun with BOS if the model's policy says so,\n"
               "and of each the second half scored.");
  Options o;
  o.model.add_to(app);
  app.add_option("--text", o.text, "a file of UTF-8 text")->required();
  app.add_option("--context", o.context, "tokens of a chunk")->check(CLI::Range(4, 1 << 24))->capture_default_str();
  app.add_option("--chunks", o.chunks, "chunks at most; 0: all")->check(CLI::NonNegativeNumber)->capture_default_str();
  app.add_flag("--json", o.json, "one JSON object on standard output");
  return example::run_main(argc, argv, app, [&] { run(o); });
}
