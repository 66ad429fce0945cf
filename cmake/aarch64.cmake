# Debian's g++ for aarch64, whose programs run under qemu-user; with -static they need no folder of the other machine's libraries.
set(CMAKE_SYSTEM_NAME Linux)
set(CMAKE_SYSTEM_PROCESSOR aarch64)
set(CMAKE_CXX_COMPILER aarch64-linux-gnu-g++)
set(CMAKE_EXE_LINKER_FLAGS_INIT -static)
set(CMAKE_CROSSCOMPILING_EMULATOR qemu-aarch64)
# It searches /usr/include after its own folders, and so finds the headers of Highway, doctest and nlohmann's JSON. Libraries there are the
# host's: static dispatch links none, and a program that does need Highway's fails to link with this name.
set(TINYLLAMA_HWY_LIBRARY no-libhwy-for-aarch64 CACHE STRING "Highway's library")
