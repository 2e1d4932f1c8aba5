// nm_linear on a CPU: see linear_tasks.h, and nm_tiles.h and nm_float_tiles.h for the layout.
#ifndef MC_LEVEL
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wuninitialized"  // GCC 12 warns of its own intrinsics (bug 105593)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#include "native.h"

#define MC_SELF "nm_linear/cpu.cpp"
#include "levels.h"

extern "C" MC_EXPORT void mc_nm_linear(const void* p) { MC_DISPATCH(nm_linear, p); }
extern "C" MC_EXPORT void mc_nm_rows(const void* p) { MC_DISPATCH(nm_rows, p); }

#else

#include "linear_tasks.h"

namespace MC_LEVEL {

static inline void nm_linear(const void* problem) {
    const Linear& p = *static_cast<const Linear*>(problem);
    linear(p, p.scale ? SPARSE : SPARSE_FLOATS);
}

// x: the rows' numbers, int64; y: fp32.
static inline void nm_rows(const void* problem) {
    const Linear& p = *static_cast<const Linear*>(problem);
    const int64_t* ids = static_cast<const int64_t*>(p.x);
    [[maybe_unused]] const int threads = int(std::min<int64_t>(p.threads, ceil_div(p.rows, 32)));
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int64_t m = 0; m < p.rows; ++m) nm_row(p, ids[m], static_cast<float*>(p.y) + m * p.y_row);
}

}  // namespace MC_LEVEL
#endif
