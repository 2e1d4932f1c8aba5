// rms_norm and gated_rms_norm on a CPU: one row at a time, its sum of squares in a fixed order.
#ifndef MC_LEVEL
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wuninitialized"  // GCC 12 warns of its own intrinsics (bug 105593)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#include "native.h"

namespace {

using namespace mc;

struct Norm {
    int64_t rows, size, group, threads, x_row, z_row, dtype, weight_dtype, y_dtype;
    double eps;
    const void *x, *z, *weight;  // z: gate, or null; weight: or null
    void* y;
};

}  // namespace

#define MC_SELF "rms_norm/cpu.cpp"
#include "levels.h"

extern "C" MC_EXPORT void mc_rms_norm(const void* p) { MC_DISPATCH(rms_norm, *static_cast<const Norm*>(p)); }

#else

namespace MC_LEVEL {

static inline void norm_row(const Norm& p, int64_t row, float* values) {
    const int dtype = int(p.dtype);
    for (int64_t from = 0; from < p.size; from += p.group) {
        V squares = zero();
        for (int64_t i = 0; i < p.group; i += W) {
            int part = int(std::min<int64_t>(W, p.group - i));
            V x = load_any(p.x, row * p.x_row + from + i, dtype, part);
            if (p.z) {
                V z = load_any(p.z, row * p.z_row + from + i, dtype, part);
                x = x * (z * sigmoid(z));
            }
            store_part(values + i, x, part);
            squares = fma(x, x, squares);
        }
        float scale = 1.0f / std::sqrt(lane_sum(squares) / float(p.group) + float(p.eps));
        for (int64_t i = 0; i < p.group; i += W) {
            int part = int(std::min<int64_t>(W, p.group - i));
            V y = load_part(values + i, part) * set1(scale);
            if (p.weight) {
                if (dtype != F32) {  // rounded to x's dtype before the weight, as the stock modules do
                    uint16_t rounded[2 * W];  // half of it used
                    store_any(rounded, 0, dtype, y, W);
                    y = load_any(rounded, 0, dtype, W);
                }
                y = y * load_any(p.weight, from + i, int(p.weight_dtype), part);
            }
            store_any(p.y, row * p.size + from + i, int(p.y_dtype), y, part);
        }
    }
}

static inline void rms_norm(const Norm& p) {
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
