// hadamard on a CPU, parallel over rows, with an int8 output where it is asked for; hadamard_rows.h has the transform.
#ifndef MC_LEVEL
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wuninitialized"  // GCC 12 warns of its own intrinsics (bug 105593)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#include "native.h"

#define MC_SELF "hadamard/cpu.cpp"
#include "levels.h"

extern "C" MC_EXPORT void mc_hadamard(const void* p) { MC_DISPATCH(hadamard, p); }
extern "C" MC_EXPORT void mc_hadamard_int8(const void* p) { MC_DISPATCH(hadamard_int8, p); }

#else

#include "hadamard_rows.h"
#include "quantized_rows.h"

namespace MC_LEVEL {

static inline int hadamard_threads(const Hadamard& p) {
    return int(std::min<int64_t>(p.threads, ceil_div(p.rows * p.size, 1 << 13)));
}

static inline float hadamard_scale(const Hadamard& p) { return float(1.0 / std::sqrt(double(p.block))); }

static inline void hadamard(const void* description) {
    const Hadamard& p = *static_cast<const Hadamard*>(description);
    const float scale = hadamard_scale(p);
    int threads = hadamard_threads(p);
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        Scratch<float> x(size_t(p.size)), y(size_t(p.size));
#pragma omp for schedule(static)
        for (int64_t row = 0; row < p.rows; ++row) transform_row(p, row, scale, x.get(), y.get());
    }
}

struct HadamardInt8 {
    Hadamard rotation;  // its y is not used
    Codes to;
};

static inline void hadamard_int8(const void* description) {
    const HadamardInt8& p = *static_cast<const HadamardInt8*>(description);
    const Hadamard& h = p.rotation;
    const float scale = hadamard_scale(h);
    int threads = hadamard_threads(h);
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        Scratch<float> x(size_t(h.size)), y(size_t(h.size)), result(size_t(h.size));
#pragma omp for schedule(static)
        for (int64_t row = 0; row < h.rows; ++row) {
            Hadamard one = h;  // this row alone
            one.x = static_cast<const char*>(h.x) + row * h.x_row * int64_t(dtype_bytes(int(h.dtype)));
            one.y = result.get();
            transform_row(one, 0, scale, x.get(), y.get());
            put_codes(p.to, row, h.size, one.y, int(h.dtype), x.get());
        }
    }
}

}  // namespace MC_LEVEL
#endif
