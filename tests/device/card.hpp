// Tests that need a card say so and pass where there is none.
#pragma once

#include <doctest/doctest.h>

#include "tinyllama/device/cuda_runtime.cuh"

namespace tinyllama::test {

inline bool no_card() {
  if (cuda::card_count() > 0) return false;
  MESSAGE("skipped: no card");
  return true;
}

}  // namespace tinyllama::test
