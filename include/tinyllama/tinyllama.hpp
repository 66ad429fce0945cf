// All of it, for a CPU program: load a checkpoint, generate.
#pragma once

#include "tinyllama/config/parameters.hpp"
#include "tinyllama/config/presets.hpp"
#include "tinyllama/device/cpu.hpp"
#include "tinyllama/device/operations.hpp"
#include "tinyllama/generate/generate.hpp"
#include "tinyllama/generate/instances.hpp"
#include "tinyllama/model/load.hpp"
#include "tinyllama/text/chat_template.hpp"
