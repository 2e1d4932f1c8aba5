// hadamard on a CPU, parallel over rows; hadamard_rows.h has the transform.
#ifndef MC_LEVEL
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wuninitialized"  // GCC 12 warns of its own intrinsics (bug 105593)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#include "native.h"

#define MC_SELF "hadamard/cpu.cpp"
#include "levels.h"

extern "C" MC_EXPORT void mc_hadamard(const void* p) { MC_DISPATCH(hadamard, p); }

#else

#include "hadamard_rows.h"

namespace MC_LEVEL {

static inline void hadamard(const void* description) {
    const Hadamard& p = *static_cast<const Hadamard*>(description);
    const float scale = float(1.0 / std::sqrt(double(p.block)));
    int threads = int(std::min<int64_t>(p.threads, ceil_div(p.rows * p.size, 1 << 13)));
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        Scratch<float> x(size_t(p.size)), y(size_t(p.size));
#pragma omp for schedule(static)
        for (int64_t row = 0; row < p.rows; ++row) transform_row(p, row, scale, x.get(), y.get());
    }
}

}  // namespace MC_LEVEL
#endif
