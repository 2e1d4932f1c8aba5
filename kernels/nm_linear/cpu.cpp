// nm_linear on a CPU: see linear_tasks.h, and nm_tiles.h for the layout.
#ifndef MC_LEVEL
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wuninitialized"  // GCC 12 warns of its own intrinsics (bug 105593)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#include "native.h"

#define MC_SELF "nm_linear/cpu.cpp"
#include "levels.h"

extern "C" MC_EXPORT void mc_nm_linear(const void* p) { MC_DISPATCH(nm_linear, p); }

#else

#include "linear_tasks.h"

namespace MC_LEVEL {

static inline void nm_linear(const void* p) { linear(*static_cast<const Linear*>(p), SPARSE); }

}  // namespace MC_LEVEL
#endif
