// The Hadamard transform of one row, for the level under which this file is included: hadamard and mixer_step share it.
//
// The base matrix mixes runs of 2^k channels, then butterflies; the stages inside a vector are a shuffle and a multiply-add by
// ±1. The same additions in the same order as hadamard/reference.py, so the same bits. No include guard: see simd.h.
namespace MC_LEVEL {

struct Hadamard {
    int64_t rows, size, block, base, transpose, threads, x_row, dtype;  // the block is base * 2^k
    const void* x;
    const float* mix;  // [base, base] of ±1: run c of the output takes mix[c][a] times run a
    const int8_t* signs;
    void* y;
};

// One stage inside each vector: lanes i and i + half (i without that bit) become their sum and their difference.
MC_INLINE V stage(V x, int half) {
#if MC_WIDTH == 16
    alignas(64) static const float signs[4][16] = {{1, -1, 1, -1, 1, -1, 1, -1, 1, -1, 1, -1, 1, -1, 1, -1},
                                                   {1, 1, -1, -1, 1, 1, -1, -1, 1, 1, -1, -1, 1, 1, -1, -1},
                                                   {1, 1, 1, 1, -1, -1, -1, -1, 1, 1, 1, 1, -1, -1, -1, -1},
                                                   {1, 1, 1, 1, 1, 1, 1, 1, -1, -1, -1, -1, -1, -1, -1, -1}};
    switch (half) {
        case 1: return fma(x, load(signs[0]), V{_mm512_permute_ps(x.v, 0xb1)});
        case 2: return fma(x, load(signs[1]), V{_mm512_permute_ps(x.v, 0x4e)});
        case 4: return fma(x, load(signs[2]), V{_mm512_shuffle_f32x4(x.v, x.v, 0xb1)});
        default: return fma(x, load(signs[3]), V{_mm512_shuffle_f32x4(x.v, x.v, 0x4e)});
    }
#else
    float from[W], to[W];
    store(from, x);
    for (int i = 0; i < W; ++i) to[i] = i & half ? from[i - half] - from[i] : from[i] + from[i + half];
    return load(to);
#endif
}

// y = x H for one block (unnormalised); `x` is overwritten, the result is in `y`.
static inline void transform_block(const Hadamard& p, float* x, float* y) {
    const int64_t base = p.base, power = p.block / base;
    if (base == 1) {
        std::memcpy(y, x, size_t(power) * 4);
    } else if (power >= W) {
        for (int64_t i = 0; i < power; i += W)
            for (int64_t c = 0; c < base; c += 4) {  // four sums at a time hide each other's latency; every base is a multiple
                const float* row = p.mix + c * base;
                V sum[4];
                for (int j = 0; j < 4; ++j) sum[j] = load(x + i) * set1(row[j * base]);
                for (int64_t a = 1; a < base; ++a) {
                    V v = load(x + a * power + i);
                    for (int j = 0; j < 4; ++j) sum[j] = fma(v, set1(row[j * base + a]), sum[j]);  // times ±1: exact
                }
                for (int j = 0; j < 4; ++j) store(y + (c + j) * power + i, sum[j]);
            }
    } else {
        for (int64_t c = 0; c < base; ++c)
            for (int64_t i = 0; i < power; ++i) {
                float sum = x[i] * p.mix[c * base];
                for (int64_t a = 1; a < base; ++a) sum = sum + x[a * power + i] * p.mix[c * base + a];
                y[c * power + i] = sum;
            }
    }
    int64_t half = 1;
    if (power >= W) {
        for (int64_t i = 0; i < p.block; i += W) {
            V v = load(y + i);
            MC_UNROLL(4)
            for (int h = 1; h < W; h *= 2) v = stage(v, h);
            store(y + i, v);
        }
        half = W;
    }
    for (; half < power; half *= 2)
        for (int64_t from = 0; from < p.block; from += 2 * half) {
            float *low = y + from, *high = low + half;
            if (half < W) {
                for (int64_t i = 0; i < half; ++i) {
                    float a = low[i], b = high[i];
                    low[i] = a + b;
                    high[i] = a - b;
                }
                continue;
            }
            for (int64_t i = 0; i < half; i += W) {
                V a = load(low + i), b = load(high + i);
                store(low + i, a + b);
                store(high + i, a - b);
            }
        }
}

// One row: signs, blocks, 1/sqrt(block), and for the transpose signs at the end.
static inline void transform_row(const Hadamard& p, int64_t row, float scale, float* x, float* y) {
    const int dtype = int(p.dtype);
    for (int64_t i = 0; i < p.size; i += W) {
        int part = int(std::min<int64_t>(W, p.size - i));
        V v = load_any(p.x, row * p.x_row + i, dtype, part);
        if (p.signs && !p.transpose) v = v * load_any(p.signs, i, I8, part);
        store_part(x + i, v, part);
    }
    for (int64_t from = 0; from < p.size; from += p.block) transform_block(p, x + from, y + from);
    for (int64_t i = 0; i < p.size; i += W) {
        int part = int(std::min<int64_t>(W, p.size - i));
        V v = load_part(y + i, part) * set1(scale);
        if (p.signs && p.transpose) v = v * load_any(p.signs, i, I8, part);
        store_any(p.y, row * p.size + i, dtype, v, part);
    }
}

}  // namespace MC_LEVEL
