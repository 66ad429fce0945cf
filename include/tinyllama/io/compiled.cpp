// The reading of files, and of what the machine says of itself, compiled once for a program that defines TINYLLAMA_DISPATCH (the CMake target tinyllama::tinyllama adds this unit).

#define TINYLLAMA_COMPILED_UNIT
#include "tinyllama/device/cores.hpp"
#include "tinyllama/io/checkpoint.hpp"
#include "tinyllama/io/checkpoint_tokenizer.hpp"
