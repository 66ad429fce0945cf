// All that training needs, for a CPU program; with the CMake target tinyllama::training.
#pragma once

#include "tinyllama/tinyllama.hpp"
#include "tinyllama/train/checkpoint.hpp"
#include "tinyllama/train/loader.hpp"
#include "tinyllama/train/run.hpp"
#include "tinyllama/train/trainer.hpp"
