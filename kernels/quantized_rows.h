// An int8 output of a row that was computed in floats, for the level under which this file is included: rms_norm and hadamard
// share it. The rounding is quantize_row of int_tiles.h. No include guard: see simd.h.
#include "int_tiles.h"

namespace MC_LEVEL {

// Where the codes and scales of rows go. act_scale: the static scale, or null for one a row.
struct Codes {
    int64_t bits;
    int8_t* codes;  // [rows, size]
    float* scales;  // [rows]
    const float* act_scale;
};

// Row `row` of `size` values of that dtype at y; `buffer` holds a row of floats. Without codes where the scale is NaN.
static inline void put_codes(const Codes& to, int64_t row, int64_t size, const void* y, int dtype, float* buffer) {
    int8_t* codes = to.codes + row * size;
    const float* values = as_floats(y, 0, dtype, size, buffer);
    const float scale = quantize_row(values, size, to.act_scale, to.bits == 4 ? 7.0f : 127.0f, codes);
    if (std::isnan(scale)) std::memset(codes, 0, size_t(size));
    to.scales[row] = scale;
}

}  // namespace MC_LEVEL
