// rms_norm and gated_rms_norm on a CPU: one row at a time, its sum of squares in a fixed order.
#ifndef MC_LEVEL
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wuninitialized"  // GCC 12 warns of its own intrinsics (bug 105593)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#include "native.h"

#define MC_SELF "rms_norm/cpu.cpp"
#include "levels.h"

extern "C" MC_EXPORT void mc_rms_norm(const void* p) { MC_DISPATCH(rms_norm, p); }

#else

#include "norm_rows.h"

namespace MC_LEVEL {

static inline void rms_norm(const void* description) {
    const Norm& p = *static_cast<const Norm*>(description);
    int threads = int(std::min<int64_t>(p.threads, ceil_div(p.rows * p.size, 1 << 14)));
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        Scratch<float> values{size_t(p.group)};
#pragma omp for schedule(static)
        for (int64_t row = 0; row < p.rows; ++row) norm_row(p, row, values.get());
    }
}

}  // namespace MC_LEVEL
#endif
