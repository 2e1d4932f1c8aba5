// Linears whose activations stay float, for the level under which this file is included: weights are rows of fp32, bf16 or
// fp16 (then Linear::scale_dtype is theirs), or integers that become floats on their way. No include guard: see simd.h.
//
//     rows    a lane sums every W-th input in order, then lanes are added in a tree; packed rows become floats, four at a time,
//             in cache.
//     tiles   (AVX-512, see int_tiles.h) a lane is an output; byte j of a quad is summed by accumulator j (nibbles 2j and 2j + 1
//             by accumulators 2j and 2j + 1, modulo 4), a group's sum is multiplied by its scale and added to the total.
//
//     panels  (floats, many rows) a lane is an output and sums its inputs in order; weights are brought into panels of 2 W outputs
//             in cache, an input after the other.
//
// In rows and in tiles a result does not depend on how many rows there are; panels differ from rows by rounding.
namespace MC_LEVEL {

// RA rows of x times row `index` of n floats, which comes from memory and is read in order, once; the sums of float_tile.
template <int RA, int DTYPE>
static inline void float_row(const float* const* x, const void* weight, int64_t index, int64_t n, float* out) {
    V total[RA];
    for (int r = 0; r < RA; ++r) total[r] = zero();
    int64_t k = 0;
    for (; k + W <= n; k += W) {
        __builtin_prefetch(static_cast<const char*>(weight) + (index * n + k) * (DTYPE == F32 ? 4 : 2) + AHEAD, 0, 2);
        const V w = load_any(weight, index * n + k, DTYPE, W);
        for (int r = 0; r < RA; ++r) total[r] = fma(load(x[r] + k), w, total[r]);
    }
    if (k < n) {
        const V w = load_any(weight, index * n + k, DTYPE, int(n - k));
        for (int r = 0; r < RA; ++r) total[r] = fma(load(x[r] + k), w, total[r]);
    }
    for (int r = 0; r < RA; ++r) out[r] = lane_sum(total[r]);
}

template <int RA>
static inline void float_row(const Linear& p, const float* const* x, int64_t output, float* out) {
    if (p.scale_dtype == BF16) float_row<RA, BF16>(x, p.weight, output, p.inputs, out);
    else if (p.scale_dtype == F16) float_row<RA, F16>(x, p.weight, output, p.inputs, out);
    else float_row<RA, F32>(x, p.weight, output, p.inputs, out);
}

// RA rows of x times 4 rows of n floats, [RA][4]; a lane sums every W-th input in order, then lanes are added in a
// tree. x has zeros behind its end.
template <int RA>
MC_INLINE void float_tile(const float* const* x, const float* const* w, int64_t n, float (*out)[4]) {
    V total[RA][4];
    for (int r = 0; r < RA; ++r)
        for (int c = 0; c < 4; ++c) total[r][c] = zero();
    int64_t k = 0;
    for (; k + W <= n; k += W)
        for (int c = 0; c < 4; ++c) {
            V weight = load(w[c] + k);
            for (int r = 0; r < RA; ++r) total[r][c] = fma(load(x[r] + k), weight, total[r][c]);
        }
    if (k < n)
        for (int c = 0; c < 4; ++c) {
            V weight = load_part(w[c] + k, int(n - k));
            for (int r = 0; r < RA; ++r) total[r][c] = fma(load(x[r] + k), weight, total[r][c]);
        }
    for (int r = 0; r < RA; ++r)
        for (int c = 0; c < 4; ++c) out[r][c] = lane_sum(total[r][c]);
}

// The weight row of an output as floats. Group scales are applied, an int8 row's own is not. gathered: scratch of a row of bytes.
static inline void widen_row(const Linear& p, bool nibbles, int64_t output, float* to, uint8_t* gathered) {
    const uint8_t* from = row_of(p, nibbles, output, gathered);
    if (!nibbles) {
        for (int64_t i = 0; i < p.inputs; ++i) to[i] = float(int8_t(from[i]));
        return;
    }
    const int64_t group_size = p.inputs / p.groups;
    for (int64_t g = 0; g < p.groups; ++g) {
        const float scale = scale_at(p, output, g);
        const int offset = zero_at(p, output, g);
        for (int64_t i = g * group_size / 2; i < (g + 1) * group_size / 2; ++i) {
            to[2 * i] = float((from[i] & 15) - offset) * scale;
            to[2 * i + 1] = float((from[i] >> 4) - offset) * scale;
        }
    }
}

// 4 weight rows from `first` in `to`, [4][step].
static inline void widen_weights(const Linear& p, bool nibbles, int64_t first, float* to, int64_t step, uint8_t* gathered) {
    for (int64_t output = first; output < std::min(first + 4, p.outputs); ++output, to += step)
        widen_row(p, nibbles, output, to, gathered);
}

// Outputs [first, first + 4) for all rows. widened: 4 rows of floats made of integers, whose scale is still to come where it is
// `scaled`; null where the weights are floats, which come from memory, where four streams at a time are slower than one.
static inline void float_outputs(const Linear& p, Rows& rows, int64_t first, const float* const* widened, bool scaled) {
    const int columns = int(std::min<int64_t>(4, p.outputs - first));
    for (int64_t m = 0; m < p.rows;) {
        float out[4][4];
        const float* x[4];
        const int count = p.rows - m >= 4 ? 4 : 1;
        for (int r = 0; r < count; ++r) x[r] = rows.floats.get() + (m + r) * rows.stride;
        if (!widened) {
            for (int c = 0; c < columns; ++c) {
                float sums[4];
                if (count == 4) float_row<4>(p, x, first + c, sums);
                else float_row<1>(p, x, first + c, sums);
                for (int r = 0; r < count; ++r) out[r][c] = sums[r];
            }
        } else if (count == 4) {
            float_tile<4>(x, widened, p.inputs, out);
        } else {
            float_tile<1>(x, widened, p.inputs, out);
        }
        for (int r = 0; r < count; ++r)
            for (int c = 0; c < columns; ++c) {
                float y = scaled ? out[r][c] * scale_at(p, first + c, 0) : out[r][c];
                if (p.bias) y = y + p.bias[first + c];
                store_one(p.y, (m + r) * p.y_row + first + c, int(p.y_dtype), y);
            }
        m += count;
    }
}

constexpr int PANEL_ROWS = MC_WIDTH == 16 ? 12 : MC_WIDTH == 8 ? 6 : 4;  // rows in registers, two accumulators each
constexpr int64_t PANEL_OUTPUTS = 2 * W;

// Outputs [first, first + PANEL_OUTPUTS) of a weight of floats as a panel [inputs, up to whole vectors][PANEL_OUTPUTS].
static inline void pack_panel(const Linear& p, int64_t first, float* panel) {
    for (int64_t half = 0; half < 2; ++half)
        for (int64_t k = 0; k < p.inputs; k += W) {
            alignas(64) float block[W * W];
            for (int64_t i = 0; i < W; ++i) {
                const int64_t output = std::min(first + half * W + i, p.outputs - 1);  // behind the end: again the last
                store(block + i * W, load_any(p.weight, output * p.inputs + k, int(p.scale_dtype),
                                              int(std::min<int64_t>(W, p.inputs - k))));
            }
            transpose(block, W, panel + k * PANEL_OUTPUTS + half * W, PANEL_OUTPUTS);
        }
}

// R rows from m by the panel of the outputs from `first`.
template <int R>
static inline void panel_tile(const Linear& p, Rows& rows, int64_t m, int64_t first, const float* panel) {
    const float* x = rows.floats.get() + m * rows.stride;
    const int64_t stride = rows.stride;
    V acc[R][2];
    MC_UNROLL(12)
    for (int r = 0; r < R; ++r) acc[r][0] = acc[r][1] = zero();
    for (int64_t k = 0; k < p.inputs; ++k) {
        const V low = load(panel + k * PANEL_OUTPUTS), high = load(panel + k * PANEL_OUTPUTS + W);
        MC_UNROLL(12)
        for (int r = 0; r < R; ++r) {
            const V value = set1(x[r * stride + k]);
            acc[r][0] = fma(value, low, acc[r][0]);
            acc[r][1] = fma(value, high, acc[r][1]);
        }
    }
    for (int half = 0; half < 2; ++half) {
        const int64_t at = first + half * W;
        const int count = int(std::min<int64_t>(W, p.outputs - at));
        if (count <= 0) return;
        const V bias = p.bias ? load_part(p.bias + at, count) : zero();
        MC_UNROLL(12)
        for (int r = 0; r < R; ++r) {
            const V y = p.bias ? acc[r][half] + bias : acc[r][half];
            store_any(p.y, (m + r) * p.y_row + at, int(p.y_dtype), y, count);
        }
    }
}

// `count` rows, fewer than R + 1.
template <int R>
static inline void panel_rest(const Linear& p, Rows& rows, int64_t m, int64_t count, int64_t first, const float* panel) {
    if constexpr (R > 0) {
        if (count == R) panel_tile<R>(p, rows, m, first, panel);
        else panel_rest<R - 1>(p, rows, m, count, first, panel);
    }
}

static inline void panel_outputs(const Linear& p, Rows& rows, int64_t m, int64_t end, int64_t first, const float* panel) {
    for (; m + PANEL_ROWS <= end; m += PANEL_ROWS) panel_tile<PANEL_ROWS>(p, rows, m, first, panel);
    panel_rest<PANEL_ROWS - 1>(p, rows, m, end - m, first, panel);
}

#if MC_WIDTH == 16

constexpr int FLOAT_ROWS = 4;  // rows in registers, four accumulators each
alignas(64) constexpr float NIBBLE_VALUES[16] = {-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7};

// R rows from m by the tile of 16 outputs from `first`. A nibble's value comes from a table, with 8 as the zero point; what the
// weight's own one differs from that is added.
template <int R, bool NIBBLE>
static inline void float_tile16(const Linear& p, Rows& rows, int64_t m, int64_t first, const uint8_t* tile) {
    const float* x[R];
    for (int r = 0; r < R; ++r) x[r] = rows.floats.get() + (m + r) * rows.stride;
    const int64_t quads = p.row_bytes(NIBBLE) / 4 / p.groups;
    const V table = load(NIBBLE_VALUES);
    V total[R];
    for (int64_t g = 0; g < p.groups; ++g) {
        V acc[R][4], offset = zero();
        if (NIBBLE && p.zero) {
            const __m128i points = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p.zero + factor_index(p, first, g)));
            offset.v = _mm512_cvtepi32_ps(_mm512_sub_epi32(_mm512_set1_epi32(8), _mm512_cvtepu8_epi32(points)));
        }
        MC_UNROLL(4)
        for (int r = 0; r < R; ++r) {
            MC_UNROLL(4)
            for (int j = 0; j < 4; ++j) acc[r][j] = zero();
        }
        for (int64_t q = g * quads; q < (g + 1) * quads; ++q) {
            _mm_prefetch(tile + q * 64 + AHEAD, _MM_HINT_T1);
            const __m512i bytes = _mm512_loadu_si512(tile + q * 64);
            MC_UNROLL(8)
            for (int j = 0; j < (NIBBLE ? 8 : 4); ++j) {
                V w;
                if (NIBBLE) w = V{_mm512_permutexvar_ps(_mm512_srli_epi32(bytes, 4 * j), table.v)} + offset;
                else w.v = _mm512_cvtepi32_ps(_mm512_srai_epi32(_mm512_slli_epi32(bytes, 24 - 8 * j), 24));
                MC_UNROLL(4)
                for (int r = 0; r < R; ++r) acc[r][j & 3] = fma(set1(x[r][q * (NIBBLE ? 8 : 4) + j]), w, acc[r][j & 3]);
            }
        }
        const V scale = load_any(p.scale, factor_index(p, first, g), int(p.scale_dtype), W);
        MC_UNROLL(4)
        for (int r = 0; r < R; ++r) {
            const V part = ((acc[r][0] + acc[r][1]) + (acc[r][2] + acc[r][3])) * scale;
            total[r] = g == 0 ? part : total[r] + part;
        }
    }
    for (int r = 0; r < R; ++r) {
        if (p.bias) total[r] = total[r] + load(p.bias + first);
        put(p.y, (m + r) * p.y_row + first, p.y_dtype, total[r].v, 0xffff);
    }
}

#endif

}  // namespace MC_LEVEL
