// Tiles of float weights of which `keep` of every `of` inputs are stored, for the level under which this file is included.
//
// The stream is that of nm_tiles.h with values of fp32, bf16 or fp16 (Linear::scale_dtype) and another order inside a quad: bit
// 16 b + o of its mask is input b of output o, so that sixteen bits are what one input is to the outputs of a tile. An input's
// values are put into their lanes in registers; few rows are multiplied from there, more from a panel of float_tiles.h. Both sum
// the inputs of an output in order: a row's result does not depend on the others.
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

constexpr int PARTS = TILE_OUTPUTS / W;            // vectors of an input's weights
constexpr int LANE_ROWS = MC_WIDTH == 16 ? 8 : 4;  // rows in registers, PARTS accumulators each

#if MC_WIDTH == 8
// Of every mask of eight lanes, which value goes where; the sign says none.
struct LanePlaces {
    int8_t of[256][8] = {};
    constexpr LanePlaces() {
        for (int mask = 0; mask < 256; ++mask)
            for (int lane = 0, next = 0; lane < 8; ++lane) of[mask][lane] = mask >> lane & 1 ? int8_t(next++) : int8_t(-1);
    }
};
alignas(64) constexpr LanePlaces LANE_PLACES;
#endif

// The first values in the lanes of the mask, zeros in the others.
MC_INLINE V in_lanes(V values, uint32_t mask) {
#if MC_WIDTH == 16
    return {_mm512_maskz_expand_ps(__mmask16(mask), values.v)};
#elif MC_WIDTH == 8
    const __m256i places = _mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(LANE_PLACES.of[mask])));
    return {_mm256_blendv_ps(_mm256_permutevar8x32_ps(values.v, places), _mm256_setzero_ps(), _mm256_castsi256_ps(places))};
#else
    float from[W], to[W];
    store(from, values);
    for (int lane = 0, next = 0; lane < W; ++lane) to[lane] = mask >> lane & 1 ? from[next++] : 0.0f;
    return load(to);
#endif
}

// put(input, its weights as PARTS vectors) for the inputs of the tile that `first` is in, in order.
template <int DTYPE, typename Put>
MC_INLINE void each_input(const Linear& p, int64_t first, Put put) {
    constexpr int64_t SIZE = DTYPE == F32 ? 4 : 2;
    const NmLayout at(p, SIZE);
    const uint8_t* tile = at.tile(p, first);
    for (int64_t q = 0; q < at.quads; q += at.block, tile += at.block_bytes) {
        const uint8_t* value = tile + 8 * at.block;
        for (int64_t i = 0; i < at.block_bytes; i += 64) __builtin_prefetch(tile + i + AHEAD, 0, 2);
        for (int64_t i = 0; i < std::min(at.block, at.quads - q); ++i) {
            uint64_t mask = mask_at(tile + 8 * i);
            MC_UNROLL(4)
            for (int b = 0; b < 4; ++b) {
                V w[PARTS];
                MC_UNROLL(4)
                for (int part = 0; part < PARTS; ++part, mask >>= W) {
                    const uint32_t kept = uint32_t(mask) & ((1u << W) - 1);
                    w[part] = in_lanes(load_any(value, 0, DTYPE, W), kept);
                    value += __builtin_popcount(kept) * SIZE;
                }
                put(4 * (q + i) + b, w);
            }
        }
    }
}

// R rows from m by the tile from `first`. Rows hold zeros behind their inputs, up to a whole quad.
template <int R, int DTYPE>
static __attribute__((noinline)) void lane_tile(const Linear& p, Rows& rows, int64_t m, int64_t first) {
    const float* x = rows.floats.get() + m * rows.stride;
    const int64_t stride = rows.stride;
    V acc[R][PARTS];
    MC_UNROLL(8)
    for (int r = 0; r < R; ++r) {
        MC_UNROLL(4)
        for (int part = 0; part < PARTS; ++part) acc[r][part] = zero();
    }
    each_input<DTYPE>(p, first, [&](int64_t k, const V* w) MC_LAMBDA {
        MC_UNROLL(8)
        for (int r = 0; r < R; ++r) {
            const V value = set1(x[r * stride + k]);
            MC_UNROLL(4)
            for (int part = 0; part < PARTS; ++part) acc[r][part] = fma(value, w[part], acc[r][part]);
        }
    });
    MC_UNROLL(4)
    for (int part = 0; part < PARTS; ++part) {
        const int64_t at = first + part * W;
        const int count = int(std::min<int64_t>(W, p.outputs - at));
        if (count <= 0) return;
        const V bias = p.bias ? load_part(p.bias + at, count) : zero();
        MC_UNROLL(8)
        for (int r = 0; r < R; ++r) {
            const V y = p.bias ? acc[r][part] + bias : acc[r][part];
            store_any(p.y, (m + r) * p.y_row + at, int(p.y_dtype), y, count);
        }
    }
}

// `count` rows, at most R.
template <int DTYPE, int R>
static inline void lane_rest(const Linear& p, Rows& rows, int64_t m, int64_t count, int64_t first) {
    if constexpr (R > 0) {
        if (count == R) lane_tile<R, DTYPE>(p, rows, m, first);
        else lane_rest<DTYPE, R - 1>(p, rows, m, count, first);
    }
}

// All rows, few as they are, by the tile from `first`.
template <int DTYPE>
static inline void lane_outputs(const Linear& p, Rows& rows, int64_t first) {
    int64_t m = 0;
    for (; m + LANE_ROWS <= p.rows; m += LANE_ROWS) lane_tile<LANE_ROWS, DTYPE>(p, rows, m, first);
    lane_rest<DTYPE, LANE_ROWS - 1>(p, rows, m, p.rows - m, first);
}

static inline void lane_outputs(const Linear& p, Rows& rows, int64_t first) {
    if (p.scale_dtype == F16) lane_outputs<F16>(p, rows, first);
    else if (p.scale_dtype == BF16) lane_outputs<BF16>(p, rows, first);
    else lane_outputs<F32>(p, rows, first);
}

// Outputs [first, first + PANEL_OUTPUTS) as pack_panel brings those of a dense weight: two tiles, one, or half of one.
template <int DTYPE>
static inline void expand_panel(const Linear& p, int64_t first, float* panel) {
    constexpr int64_t STEP = std::min<int64_t>(PANEL_OUTPUTS, TILE_OUTPUTS);
    for (int64_t from = 0; from < PANEL_OUTPUTS && first + from < p.outputs; from += STEP) {
        const int64_t skipped = first % TILE_OUTPUTS / W;
        each_input<DTYPE>(p, first + from, [&](int64_t k, const V* w) MC_LAMBDA {
            for (int64_t part = 0; part < STEP / W; ++part) store(panel + k * PANEL_OUTPUTS + from + part * W, w[skipped + part]);
        });
    }
}

static inline void expand_panel(const Linear& p, int64_t first, float* panel) {
    if (p.scale_dtype == F16) expand_panel<F16>(p, first, panel);
    else if (p.scale_dtype == BF16) expand_panel<BF16>(p, first, panel);
    else expand_panel<F32>(p, first, panel);
}

}  // namespace MC_LEVEL
