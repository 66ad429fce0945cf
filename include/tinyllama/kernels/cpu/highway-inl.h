// Highway, at a target that it compiles for. No include guard: highway.h itself is included once for each target.

// At -march=native on a machine with AVX-VNNI (Zen 5, Sapphire Rapids) Highway 1.0.3 picks AVX3_DL as its baseline and then leaves it out of its own targets.
#if defined(__AVXVNNI__) && !defined(HWY_DISABLED_TARGETS)
#define HWY_DISABLED_TARGETS HWY_AVX3_DL
#endif

#include <hwy/highway.h>
