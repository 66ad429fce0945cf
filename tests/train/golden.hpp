// The goldens as batches to train on, and how far what was trained is from them.
#pragma once

#include <cmath>

#include "tests/model/golden.hpp"

namespace tinyllama::test {

inline constexpr index_t golden_tokens = 48;

/// A golden model, its batch, and what Hugging Face made of them.
template <class C>
struct Golden {
  Reference reference{golden_folder<C>()};
  Checkpoint file = open_checkpoint(golden_folder<C>());
  std::vector<std::int32_t> inputs = reference.ids("input_ids"), targets = reference.ids("targets");
};

/// The worst relative error of a tensor of `flat` against the reference's tensors PREFIX + name.
template <class C>
double worst(const Reference& reference, const std::string& prefix, std::span<const float> flat) {
  double most = 0;
  for_each_parameter(C{}, [&](const Parameter& p) {
    const auto expected = reference.values<float>((prefix + p.hf_name()).c_str());
    const double error = relative_error(flat.first(expected.size()), expected);
    most = error > most || std::isnan(error) ? error : most;
    flat = flat.subspan(expected.size());
  });
  return most;
}

}  // namespace tinyllama::test
