// int8_linear on a CPU: see linear_tasks.h, and int_tiles.h for the layout and the two shapes of loop. And rows of a packed
// table (an embedding): x are int64 row numbers, y their floats [rows, inputs].
#ifndef MC_LEVEL
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wuninitialized"  // GCC 12 warns of its own intrinsics (bug 105593)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#include "native.h"

#define MC_SELF "int8_linear/cpu.cpp"
#include "levels.h"

extern "C" MC_EXPORT void mc_int8_linear(const void* p) { MC_DISPATCH(int8_linear, p); }
extern "C" MC_EXPORT void mc_int8_rows(const void* p) { MC_DISPATCH(packed_rows, p, false); }
extern "C" MC_EXPORT void mc_int4_rows(const void* p) { MC_DISPATCH(packed_rows, p, true); }

#else

#include "linear_tasks.h"

namespace MC_LEVEL {

static inline void int8_linear(const void* p) { linear(*static_cast<const Linear*>(p), BYTES); }

static inline void packed_rows(const void* problem, bool nibbles) {
    const Linear& p = *static_cast<const Linear*>(problem);
    const int64_t* ids = static_cast<const int64_t*>(p.x);
    [[maybe_unused]] const int threads = int(std::min<int64_t>(p.threads, ceil_div(p.rows, 32)));
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        Scratch<uint8_t> gathered(size_t(p.inputs + 4));
#pragma omp for schedule(static)
        for (int64_t m = 0; m < p.rows; ++m) {
            float* y = static_cast<float*>(p.y) + m * p.y_row;
            widen_row(p, nibbles, ids[m], y, gathered.get());
            for (int64_t i = 0; !nibbles && i < p.inputs; ++i) y[i] *= scale_at(p, ids[m], 0);
        }
    }
}

}  // namespace MC_LEVEL
#endif
