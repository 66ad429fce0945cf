// A unit with static dispatch, compiled twice: at the baseline and with -mavx2. Each must run its own kernels.
#include "shared.hpp"

float UNIT(const char*& instruction_set);
float UNIT(const char*& instruction_set) {
  tinyllama::Cpu dev({.threads = 1});
  instruction_set = dev.instruction_set().data();
  return rms(dev);
}
