// RMS norm of one row, for the level under which this file is included: rms_norm and mixer_step share it.
//
// No include guard: see simd.h.
namespace MC_LEVEL {

struct Norm {
    int64_t rows, size, group, threads, x_row, z_row, dtype, weight_dtype, y_dtype;
    double eps;
    const void *x, *z, *weight;  // z: gate, or null; weight: or null
    void* y;
};

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

}  // namespace MC_LEVEL
