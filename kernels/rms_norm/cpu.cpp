// rms_norm and gated_rms_norm on a CPU: one row at a time, its sum of squares in a fixed order; with a residual added first and
// an int8 output where they are asked for.
#ifndef MC_LEVEL
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wuninitialized"  // GCC 12 warns of its own intrinsics (bug 105593)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#include "native.h"

#define MC_SELF "rms_norm/cpu.cpp"
#include "levels.h"

extern "C" MC_EXPORT void mc_rms_norm(const void* p) { MC_DISPATCH(rms_norm, p); }
extern "C" MC_EXPORT void mc_rms_norm_fused(const void* p) { MC_DISPATCH(rms_norm_fused, p); }

#else

#include "norm_rows.h"
#include "quantized_rows.h"

namespace MC_LEVEL {

static inline int norm_threads(const Norm& p) {
    return int(std::min<int64_t>(p.threads, ceil_div(p.rows * p.size, 1 << 14)));
}

static inline void rms_norm(const void* description) {
    const Norm& p = *static_cast<const Norm*>(description);
    int threads = norm_threads(p);
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        Scratch<float> values{size_t(p.group)};
#pragma omp for schedule(static)
        for (int64_t row = 0; row < p.rows; ++row) norm_row(p, row, values.get());
    }
}

// The same with what may stand around it. residual: added to x first, the sum kept in `total` (both in x's dtype), or null.
// Without codes the output is norm.y.
struct FusedNorm {
    Norm norm;
    int64_t residual_row;
    const void* residual;
    void* total;
    Codes to;
};

// total[row] = x[row] + residual[row], rounded to their dtype.
static inline void add_residual(const FusedNorm& p, int64_t row) {
    const Norm& n = p.norm;
    const int dtype = int(n.dtype);
    for (int64_t i = 0; i < n.size; i += W) {
        int part = int(std::min<int64_t>(W, n.size - i));
        V sum = load_any(n.x, row * n.x_row + i, dtype, part) + load_any(p.residual, row * p.residual_row + i, dtype, part);
        store_any(p.total, row * n.size + i, dtype, sum, part);
    }
}

static inline void rms_norm_fused(const void* description) {
    const FusedNorm& p = *static_cast<const FusedNorm*>(description);
    const Norm& n = p.norm;
    int threads = norm_threads(n);
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        Scratch<float> values{size_t(n.group)}, result{size_t(n.size)}, buffer{size_t(n.size)};
#pragma omp for schedule(static)
        for (int64_t row = 0; row < n.rows; ++row) {
            Norm one = n;  // this row alone
            const int64_t bytes = int64_t(dtype_bytes(int(n.dtype)));
            if (p.residual) {
                add_residual(p, row);
                one.x = static_cast<const char*>(p.total) + row * n.size * bytes;
            } else {
                one.x = static_cast<const char*>(n.x) + row * n.x_row * bytes;
            }
            if (n.z) one.z = static_cast<const char*>(n.z) + row * n.z_row * bytes;
            one.y = p.to.codes ? static_cast<void*>(result.get())
                               : static_cast<char*>(n.y) + row * n.size * int64_t(dtype_bytes(int(n.y_dtype)));
            norm_row(one, 0, values.get());
            if (p.to.codes) put_codes(p.to, row, n.size, one.y, int(n.y_dtype), buffer.get());
        }
    }
}

}  // namespace MC_LEVEL
#endif
