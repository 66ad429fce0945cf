// From logits to a token: bias and penalties, temperature, top-k, top-p, min-p, and a seeded draw that is the same everywhere.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <optional>
#include <span>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

#include "tinyllama/device/operands.hpp"
#include "tinyllama/error.hpp"

namespace tinyllama {

/// Applied in this order: bias, penalties, temperature, top-k, top-p, min-p.
struct SamplingOptions {
  float temperature = 0.8f;         ///< 0: greedy, the lowest id among equals
  int top_k = 0;                    ///< keep the k most probable; 0: all
  float top_p = 0.95f;              ///< keep the most probable whose sum reaches p; 1: all
  float min_p = 0.0f;               ///< drop what is less probable than min_p times the most probable
  float repetition_penalty = 1.0f;  ///< divides positive logits and multiplies negative ones of tokens in the window (arXiv 1909.05858)
  float presence_penalty = 0.0f;    ///< subtracted once for each token in the window
  float frequency_penalty = 0.0f;   ///< subtracted for each time it stands there
  int penalty_window = 64;          ///< last tokens that the penalties look at; 0: all
  std::vector<std::pair<std::int32_t, float>> logit_bias = {};
  std::uint64_t seed = 0;
};

/// A token and the natural logarithm of its probability under the model itself (before bias, penalties and temperature).
struct TokenProbability {
  std::int32_t id = -1;
  float log_probability = 0;
};

/// One sequence's random state and scratch. The same logits, options and seed give the same tokens on every platform.
class Sampler {
 public:
  /// Throws Error for an option out of its range.
  explicit Sampler(SamplingOptions options) : options_(std::move(options)), state_(options_.seed) {
    const auto require = [](bool ok, const char* option, const char* range, double found) {
      if (!ok) throw Error("sampling", option, range, std::to_string(found));
    };
    require(options_.temperature >= 0 && std::isfinite(options_.temperature), "temperature", "0 or more", options_.temperature);
    require(options_.top_k >= 0, "top_k", "0 or more", options_.top_k);
    require(options_.top_p > 0 && options_.top_p <= 1, "top_p", "above 0, at most 1", options_.top_p);
    require(options_.min_p >= 0 && options_.min_p <= 1, "min_p", "0..1", options_.min_p);
    require(options_.repetition_penalty > 0 && std::isfinite(options_.repetition_penalty), "repetition_penalty", "above 0", options_.repetition_penalty);
    require(std::isfinite(options_.presence_penalty), "presence_penalty", "a number", options_.presence_penalty);
    require(std::isfinite(options_.frequency_penalty), "frequency_penalty", "a number", options_.frequency_penalty);
    require(options_.penalty_window >= 0, "penalty_window", "0 or more", options_.penalty_window);
  }

  const SamplingOptions& options() const { return options_; }

  /// The next choice as a device makes it; nothing where it needs the history or changes logits.
  std::optional<Draw> draw() {
    if (changes_logits()) return {};
    return Draw{options_.temperature, options_.top_p, options_.min_p, options_.top_k, options_.temperature == 0 ? 0.0 : uniform()};
  }

  /// The next token. `logits`: [vocab]; `history`: the tokens so far, for the penalties.
  std::int32_t sample(std::span<const float> logits, std::span<const std::int32_t> history = {}) {
    std::span<const float> l = logits;
    if (changes_logits()) {
      logits_.assign(logits.begin(), logits.end());
      adjust(history);
      l = logits_;
    }
    const std::size_t best = argmax(l);
    return options_.temperature == 0 ? static_cast<std::int32_t>(best) : draw(l, l[best]);
  }

  /// Log-probabilities of `id` (first) and of the `top` most probable tokens, best first.
  static std::vector<TokenProbability> log_probabilities(std::span<const float> logits, std::int32_t id, int top) {
    const float max = logits[argmax(logits)];
    double sum = 0;
    for (const float x : logits) sum += std::exp(static_cast<double>(x) - max);
    const double log_sum = max + std::log(sum);
    const auto of = [&](std::size_t i) { return TokenProbability{static_cast<std::int32_t>(i), static_cast<float>(logits[i] - log_sum)}; };
    std::vector<TokenProbability> result{of(static_cast<std::size_t>(id))};
    std::vector<std::size_t> order(logits.size());
    for (std::size_t i = 0; i < order.size(); ++i) order[i] = i;
    const auto n = static_cast<std::ptrdiff_t>(std::min(order.size(), static_cast<std::size_t>(std::max(0, top))));
    std::partial_sort(order.begin(), order.begin() + n, order.end(), [&](std::size_t a, std::size_t b) { return logits[a] != logits[b] ? logits[a] > logits[b] : a < b; });
    for (std::ptrdiff_t i = 0; i < n; ++i) result.push_back(of(order[static_cast<std::size_t>(i)]));
    return result;
  }

 private:
  struct Candidate {
    float logit;
    std::int32_t id;
  };

  bool changes_logits() const {
    return !options_.logit_bias.empty() || options_.repetition_penalty != 1.0f || options_.presence_penalty != 0.0f || options_.frequency_penalty != 0.0f;
  }

  void adjust(std::span<const std::int32_t> history) {
    for (const auto& [id, bias] : options_.logit_bias) {
      if (id < 0 || static_cast<std::size_t>(id) >= logits_.size())
        throw Error("sampling", "logit_bias", "ids 0.." + std::to_string(logits_.size() - 1), std::to_string(id));
      logits_[static_cast<std::size_t>(id)] += bias;
    }
    const auto window = static_cast<std::size_t>(options_.penalty_window);
    if (window > 0 && history.size() > window) history = history.last(window);
    counts_.clear();
    for (const std::int32_t id : history)
      if (id >= 0 && static_cast<std::size_t>(id) < logits_.size()) ++counts_[id];
    for (const auto& [id, count] : counts_) {
      float& l = logits_[static_cast<std::size_t>(id)];
      l = l > 0 ? l / options_.repetition_penalty : l * options_.repetition_penalty;
      l -= options_.presence_penalty + options_.frequency_penalty * static_cast<float>(count);
    }
  }

  static std::size_t argmax(std::span<const float> l) {
    std::size_t best = l.size();
    float max = -std::numeric_limits<float>::infinity();
    for (std::size_t i = 0; i < l.size(); ++i) {
      if (std::isnan(l[i])) throw Error("sampling", "logits", "numbers", "a NaN for token " + std::to_string(i));
      if (l[i] > max) max = l[i], best = i;
    }
    if (best == l.size()) throw Error("sampling", "logits", "one above -infinity", std::to_string(l.size()) + " logits without");
    return best;
  }

  std::int32_t draw(std::span<const float> l, float max) {
    // What min-p would drop, and what has less than 1e-9 of the best one's probability, never enters the sort.
    const float floor = max + options_.temperature * std::max(std::log(std::max(options_.min_p, 1e-30f)), -20.7f);
    candidates_.clear();
    for (std::size_t i = 0; i < l.size(); ++i)
      if (l[i] >= floor) candidates_.push_back({l[i], static_cast<std::int32_t>(i)});
    const auto better = [](const Candidate& a, const Candidate& b) { return a.logit != b.logit ? a.logit > b.logit : a.id < b.id; };
    const auto k = static_cast<std::size_t>(options_.top_k);
    if (k > 0 && k < candidates_.size()) {
      std::nth_element(candidates_.begin(), candidates_.begin() + static_cast<std::ptrdiff_t>(k), candidates_.end(), better);
      candidates_.resize(k);
    }
    std::sort(candidates_.begin(), candidates_.end(), better);
    weights_.clear();
    double sum = 0;
    for (const Candidate& c : candidates_) sum += weights_.emplace_back(std::exp((static_cast<double>(c.logit) - max) / options_.temperature));
    double kept = 0;
    std::size_t n = 0;
    while (n < weights_.size() && (n == 0 || kept < options_.top_p * sum)) kept += weights_[n++];
    double at = uniform() * kept;
    for (std::size_t i = 0; i + 1 < n; ++i) {
      if (at < weights_[i]) return candidates_[i].id;
      at -= weights_[i];
    }
    return candidates_[n - 1].id;
  }

  /// In [0, 1): splitmix64 (Steele, Lea, Flood 2014), 53 bits.
  double uniform() {
    std::uint64_t z = state_ += 0x9e3779b97f4a7c15u;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return static_cast<double>((z ^ (z >> 31)) >> 11) * 0x1p-53;
  }

  SamplingOptions options_;
  std::uint64_t state_;
  std::vector<float> logits_;
  std::vector<Candidate> candidates_;
  std::vector<double> weights_;
  std::unordered_map<std::int32_t, int> counts_;
};

}  // namespace tinyllama
