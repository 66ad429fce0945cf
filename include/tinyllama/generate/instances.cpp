// The templates that generate/instances.hpp names, compiled once for a program (the CMake target tinyllama::tinyllama adds this unit).

#define TINYLLAMA_INSTANCES_UNIT
#include "tinyllama/generate/instances.hpp"
