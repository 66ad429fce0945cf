// Whether a unit compiles the reading of files itself: 15 s of JSON and parsers that a program needs only once.
#pragma once

// Header-only, everything is inline. With TINYLLAMA_DISPATCH, io/compiled.cpp is one of the program's units and holds the definitions.
#if defined(TINYLLAMA_DISPATCH)
#define TINYLLAMA_COMPILED
#else
#define TINYLLAMA_COMPILED inline
#endif
#if defined(TINYLLAMA_DISPATCH) && !defined(TINYLLAMA_COMPILED_UNIT)
#define TINYLLAMA_WITH_DEFINITIONS 0
#else
#define TINYLLAMA_WITH_DEFINITIONS 1
#endif
