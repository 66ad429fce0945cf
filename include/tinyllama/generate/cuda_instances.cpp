// A model of any shape on a card, compiled once for a program (the CMake target tinyllama::cuda adds this unit).

#define TINYLLAMA_CUDA_INSTANCES_UNIT
#include "tinyllama/cuda.hpp"
