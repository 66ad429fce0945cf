// The tensor layer alone: views, tensors and arenas on a device, elementwise maps, reductions, softmax, gather and scatter, transpose,
// conversions and storage formats. tensor/xtensor.hpp, which costs seconds to compile, is included by those who want it.
#pragma once

#include "tinyllama/device/cpu.hpp"
#include "tinyllama/tensor/arena.hpp"
#include "tinyllama/tensor/map.hpp"
#include "tinyllama/tensor/quantise.hpp"
#include "tinyllama/tensor/reduce.hpp"
#include "tinyllama/tensor/rows.hpp"
#include "tinyllama/tensor/softmax.hpp"
#include "tinyllama/tensor/tensor.hpp"
#include "tinyllama/tensor/transpose.hpp"
