// The reading of files, what the machine says of itself, the larger operations of a Cpu and the coding of rows, compiled once for a program that defines
// TINYLLAMA_DISPATCH (the CMake target tinyllama::tinyllama adds this unit).

#define TINYLLAMA_COMPILED_UNIT
#include "tinyllama/device/cores.hpp"
#include "tinyllama/device/cpu.hpp"
#include "tinyllama/io/checkpoint.hpp"
#include "tinyllama/io/checkpoint_tokenizer.hpp"
#include "tinyllama/quant/codec.hpp"
