// Tiles of float weights of which `keep` of every `of` inputs are stored, for the level under which this file is included.
//
// The stream is that of nm_tiles.h with values of fp32, bf16 or fp16 (Linear::scale_dtype) and another order inside a quad: bit
// 16 b + o of its mask is input b of output o, so that sixteen bits are what one input is to the outputs of a tile. With few rows
// (AVX-512) vexpandps puts an input's values into their lanes, and they are multiplied from there. More rows, and other levels,
// expand into a panel of float_tiles.h. Both sum the inputs of an output in order: a row's result does not depend on the others.
//
// No include guard: see simd.h.
namespace MC_LEVEL {

// Row `output` of a stream as floats. int8 values (those with a scale) lie in the order of nm_tiles.h.
static inline void nm_row(const Linear& p, int64_t output, float* to) {
    const int dtype = p.scale ? int(I8) : int(p.scale_dtype);
    const NmLayout at(p, int64_t(dtype_bytes(dtype)));
    const uint8_t* tile = at.tile(p, output);
    const int64_t o = output % TILE_OUTPUTS;
    const float scale = p.scale ? load_one(p.scale, output, int(p.scale_dtype)) : 1.0f;
    std::memset(to, 0, size_t(p.inputs) * sizeof(float));
    for (int64_t q = 0; q < at.quads; q += at.block, tile += at.block_bytes) {
        const uint8_t* value = tile + 8 * at.block;
        for (int64_t i = 0; i < std::min(at.block, at.quads - q); ++i) {
            const uint64_t mask = mask_at(tile + 8 * i);
            for (int64_t b = 0; b < std::min<int64_t>(4, p.inputs - 4 * (q + i)); ++b) {
                const uint64_t bit = uint64_t(1) << (p.scale ? 4 * o + b : TILE_OUTPUTS * b + o);
                if (mask & bit) to[4 * (q + i) + b] = load_one(value, __builtin_popcountll(mask & (bit - 1)), dtype) * scale;
            }
            value += __builtin_popcountll(mask) * at.size;
        }
    }
}

#if MC_WIDTH == 16

// put(input, its weights) for the inputs of the tile from `first`, in order.
template <int DTYPE, typename Put>
MC_INLINE void each_input(const Linear& p, int64_t first, Put put) {
    const NmLayout at(p, DTYPE == F32 ? 4 : 2);
    const uint8_t* tile = at.tile(p, first);
    for (int64_t q = 0; q < at.quads; q += at.block, tile += at.block_bytes) {
        const uint8_t* value = tile + 8 * at.block;
        for (int64_t i = 0; i < at.block_bytes; i += 64) _mm_prefetch(tile + i + AHEAD, _MM_HINT_T1);
        for (int64_t i = 0; i < std::min(at.block, at.quads - q); ++i) {
            const uint64_t mask = mask_at(tile + 8 * i);
            MC_UNROLL(4)
            for (int b = 0; b < 4; ++b) {
                const __mmask16 kept = __mmask16(mask >> TILE_OUTPUTS * b);
                put(4 * (q + i) + b, V{_mm512_maskz_expand_ps(kept, load_any(value, 0, DTYPE, W).v)});
                value += __builtin_popcount(kept) * (DTYPE == F32 ? 4 : 2);
            }
        }
    }
}

// R rows from m by the tile from `first`. Rows hold zeros behind their inputs, up to a whole vector.
template <int R, int DTYPE>
static __attribute__((noinline)) void nm_float_tile(const Linear& p, Rows& rows, int64_t m, int64_t first) {
    const float* x = rows.floats.get() + m * rows.stride;
    const int64_t stride = rows.stride;
    V acc[R];
    MC_UNROLL(8)
    for (int r = 0; r < R; ++r) acc[r] = zero();
    each_input<DTYPE>(p, first, [&](int64_t k, V w) MC_LAMBDA {
        MC_UNROLL(8)
        for (int r = 0; r < R; ++r) acc[r] = fma(set1(x[r * stride + k]), w, acc[r]);
    });
    const __mmask16 mask = lanes(p.outputs - first);
    const V bias = p.bias ? V{_mm512_maskz_loadu_ps(mask, p.bias + first)} : zero();
    MC_UNROLL(8)
    for (int r = 0; r < R; ++r)
        put(p.y, (m + r) * p.y_row + first, p.y_dtype, (p.bias ? acc[r] + bias : acc[r]).v, mask);
}

// `count` rows, at most R.
template <int DTYPE, int R>
static inline void nm_float_rows(const Linear& p, Rows& rows, int64_t m, int64_t count, int64_t first) {
    if (count == R) return nm_float_tile<R, DTYPE>(p, rows, m, first);
    if constexpr (R > 1) nm_float_rows<DTYPE, R - 1>(p, rows, m, count, first);
}

template <int R>
static inline void nm_float_rows(const Linear& p, Rows& rows, int64_t m, int64_t count, int64_t first) {
    if (p.scale_dtype == F16) nm_float_rows<F16, R>(p, rows, m, count, first);
    else if (p.scale_dtype == BF16) nm_float_rows<BF16, R>(p, rows, m, count, first);
    else nm_float_rows<F32, R>(p, rows, m, count, first);
}

#endif

// Outputs [first, first + PANEL_OUTPUTS) as pack_panel brings those of a dense weight.
template <int DTYPE>
static inline void expand_panel(const Linear& p, int64_t first, float* panel) {
#if MC_WIDTH == 16
    for (int64_t part = 0; part < PANEL_OUTPUTS && first + part < p.outputs; part += TILE_OUTPUTS)
        each_input<DTYPE>(p, first + part, [&](int64_t k, V w) MC_LAMBDA { store(panel + k * PANEL_OUTPUTS + part, w); });
#else
    const NmLayout at(p, DTYPE == F32 ? 4 : 2);
    const int64_t from = first % TILE_OUTPUTS;  // a panel may be half of a tile
    std::memset(panel, 0, size_t(4 * at.quads * PANEL_OUTPUTS) * sizeof(float));
    each_stored(at, at.tile(p, first), [&](int64_t q, int place, const uint8_t* value) MC_LAMBDA {
        const int64_t output = place % TILE_OUTPUTS - from;
        if (output >= 0 && output < PANEL_OUTPUTS)
            panel[(4 * q + place / TILE_OUTPUTS) * PANEL_OUTPUTS + output] = load_one(value, 0, DTYPE);
    });
#endif
}

static inline void expand_panel(const Linear& p, int64_t first, float* panel) {
    if (p.scale_dtype == F16) expand_panel<F16>(p, first, panel);
    else if (p.scale_dtype == BF16) expand_panel<BF16>(p, first, panel);
    else expand_panel<F32>(p, first, panel);
}

}  // namespace MC_LEVEL
