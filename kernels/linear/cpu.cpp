// linear on a CPU: float weights, a few rows; see float_tiles.h.
#ifndef MC_LEVEL
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wuninitialized"  // GCC 12 warns of its own intrinsics (bug 105593)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#include "native.h"

#define MC_SELF "linear/cpu.cpp"
#include "levels.h"

extern "C" MC_EXPORT void mc_linear(const void* p) { MC_DISPATCH(float_linear, p); }

#else

#include "linear_tasks.h"

namespace MC_LEVEL {

static inline void float_linear(const void* p) { linear(*static_cast<const Linear*>(p), FLOATS); }

}  // namespace MC_LEVEL
#endif
