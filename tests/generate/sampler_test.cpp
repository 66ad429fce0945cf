// Sampling: each filter alone on known distributions, penalties, and the same draws for the same seed.
#include "tinyllama/generate/sampler.hpp"

#include <doctest/doctest.h>

#include <set>

namespace tl = tinyllama;

namespace {

// Probabilities 0.5, 0.25, 0.125, 0.0625, 0.0625 of tokens 3, 1, 4, 0, 2.
const std::vector<float> logits = [] {
  std::vector<float> l(5);
  const float p[] = {0.0625f, 0.25f, 0.0625f, 0.5f, 0.125f};
  for (std::size_t i = 0; i < 5; ++i) l[i] = std::log(p[i]) + 7.0f;
  return l;
}();

std::vector<int> draw(tl::SamplingOptions o, int n = 20000, std::span<const std::int32_t> history = {}) {
  tl::Sampler s(std::move(o));
  std::vector<int> count(5);
  for (int i = 0; i < n; ++i) ++count[static_cast<std::size_t>(s.sample(logits, history))];
  return count;
}
std::set<int> support(const std::vector<int>& counts) {
  std::set<int> s;
  for (std::size_t i = 0; i < counts.size(); ++i)
    if (counts[i]) s.insert(static_cast<int>(i));
  return s;
}

}  // namespace

TEST_CASE("sampler: draws follow the distribution") {
  const auto c = draw({.temperature = 1.0f, .top_p = 1.0f, .seed = 1});
  const double expected[] = {0.0625, 0.25, 0.0625, 0.5, 0.125};
  // Standard deviation of a share is at most sqrt(0.25 / 20000) = 0.0035.
  for (std::size_t i = 0; i < 5; ++i) CHECK(std::abs(c[i] / 20000.0 - expected[i]) < 0.015);
  // Temperature 0.5 squares the probabilities: 0.25 : 0.0625 : ... so that token 3 has 16/22 of it.
  CHECK(draw({.temperature = 0.5f, .top_p = 1.0f, .seed = 1})[3] / 20000.0 == doctest::Approx(0.25 / 0.3359375).epsilon(0.02));
}

TEST_CASE("sampler: filters keep what they should") {
  CHECK(support(draw({.temperature = 0.0f})) == std::set<int>{3});
  CHECK(support(draw({.temperature = 1.0f, .top_k = 2, .top_p = 1.0f})) == std::set<int>{1, 3});
  CHECK(support(draw({.temperature = 1.0f, .top_p = 0.7f})) == std::set<int>{1, 3});
  CHECK(support(draw({.temperature = 1.0f, .top_p = 0.76f})) == std::set<int>{1, 3, 4});
  CHECK(support(draw({.temperature = 1.0f, .top_p = 0.01f})) == std::set<int>{3});
  CHECK(support(draw({.temperature = 1.0f, .top_p = 1.0f, .min_p = 0.2f})) == std::set<int>{1, 3, 4});
  CHECK(support(draw({.temperature = 1.0f, .top_p = 1.0f, .min_p = 0.0f})) == std::set<int>{0, 1, 2, 3, 4});
}

TEST_CASE("sampler: bias and penalties") {
  CHECK(support(draw({.temperature = 0.0f, .logit_bias = {{2, 100.0f}}})) == std::set<int>{2});
  CHECK(support(draw({.temperature = 0.0f, .logit_bias = {{3, -100.0f}}})) == std::set<int>{1});
  const std::vector<std::int32_t> history{3, 3, 1};
  CHECK(support(draw({.temperature = 0.0f, .presence_penalty = 0.5f}, 1, history)) == std::set<int>{3});    // both lose the same
  CHECK(support(draw({.temperature = 0.0f, .presence_penalty = 0.75f}, 1, history)) == std::set<int>{3});
  CHECK(support(draw({.temperature = 0.0f, .frequency_penalty = 0.75f}, 1, history)) == std::set<int>{4});  // 3 loses twice, and 4 nothing
  CHECK(support(draw({.temperature = 0.0f, .repetition_penalty = 2.0f}, 1, history)) == std::set<int>{4});  // 3 and 1 are halved
  CHECK(support(draw({.temperature = 0.0f, .repetition_penalty = 2.0f, .penalty_window = 1}, 1, history)) == std::set<int>{3});
  CHECK_THROWS_AS(draw({.logit_bias = {{5, 1.0f}}}), tl::Error);
}

TEST_CASE("sampler: the same seed gives the same draws, on every platform") {
  tl::Sampler a({.temperature = 1.0f, .top_p = 1.0f, .seed = 42}), b({.temperature = 1.0f, .top_p = 1.0f, .seed = 42}), c({.temperature = 1.0f, .top_p = 1.0f, .seed = 43});
  std::vector<int> x, y, z;
  for (int i = 0; i < 64; ++i) x.push_back(a.sample(logits)), y.push_back(b.sample(logits)), z.push_back(c.sample(logits));
  CHECK(x == y);
  CHECK(x != z);
  // splitmix64 from state 0 begins with 0xe220a8397b1dcdaf, so that the first uniform number is 0.8833.
  tl::Sampler first({.temperature = 1.0f, .top_p = 1.0f, .seed = 0});
  CHECK(first.sample(logits) == 0);  // 0.8833 lies behind 0.5 + 0.25 + 0.125 and before 0.9375, token 0 being first of the two equals
}

TEST_CASE("sampler: log-probabilities are the model's own") {
  const auto p = tl::Sampler::log_probabilities(logits, 2, 3);
  REQUIRE(p.size() == 4);
  CHECK(p[0].id == 2);
  CHECK(p[0].log_probability == doctest::Approx(std::log(0.0625)).epsilon(1e-5));
  CHECK(p[1].id == 3);
  CHECK(p[1].log_probability == doctest::Approx(std::log(0.5)).epsilon(1e-5));
  CHECK(p[2].id == 1);
  CHECK(p[3].id == 4);
  CHECK(tl::Sampler::log_probabilities(logits, 0, 100).size() == 6);
}

TEST_CASE("sampler: bad options and bad logits are Errors") {
  CHECK_THROWS_WITH(tl::Sampler({.temperature = -1.0f}), "sampling: temperature: expected 0 or more, found -1.000000");
  CHECK_THROWS_AS(tl::Sampler({.top_k = -1}), tl::Error);
  CHECK_THROWS_AS(tl::Sampler({.top_p = 0.0f}), tl::Error);
  CHECK_THROWS_AS(tl::Sampler({.top_p = 1.5f}), tl::Error);
  CHECK_THROWS_AS(tl::Sampler({.min_p = 2.0f}), tl::Error);
  CHECK_THROWS_AS(tl::Sampler({.repetition_penalty = 0.0f}), tl::Error);
  tl::Sampler s({});
  CHECK_THROWS_WITH(s.sample(std::vector<float>{1.0f, std::nanf("")}), "sampling: logits: expected numbers, found a NaN for token 1");
  CHECK_THROWS_AS(s.sample(std::vector<float>(3, -INFINITY)), tl::Error);
  CHECK_THROWS_AS(s.sample(std::vector<float>{}), tl::Error);
}
