// The names that the README's fragments take for granted: a device, a path, some vectors.
#pragma once

#include <cstdint>
#include <filesystem>
#include <iostream>
#include <string>
#include <string_view>
#include <vector>

#include <tinyllama/config/parameters.hpp>
#include <tinyllama/tensor/view.hpp>

namespace tl = tinyllama;
