// What integer linears are made of, for the level under which this file is included; linear_tasks.h puts it together.
//
// Weights stay as they are stored, row-major [outputs, inputs], one copy in memory. Activations are quantized a row at a time
// into `Rows` (int8, padded with zeros, with the sums of their codes). dpbusd multiplies unsigned by signed bytes, so weights
// enter as unsigned (int8 ^ 0x80, or the nibble itself) and 128 (or the zero point) times the row's sum is taken off again:
// exact, whatever wraps in between. Two shapes of loop, with one result, since sums are exact and epilogues the same:
//
//     dot    a row or two: 16 outputs at a time, lanes run along the inputs, sums over lanes by a transposing tree. Nothing is
//            repacked: it reads each weight once, at the speed of memory.
//     tile   more rows: 32 outputs are repacked into quads of inputs (VNNI order) in cache, then 12 rows x 32 outputs of
//            accumulators stay in registers. The dot instruction is inline assembly: GCC spills accumulators of intrinsics.
//
// Other levels run one plain loop over the same rows. Where activations stay float, weights become floats, four rows at a time, in
// cache. No include guard: see simd.h.
//
// Legend: M rows, N outputs, K inputs, G groups of inputs that share a weight scale.
namespace MC_LEVEL {

// Activations as a linear takes them: quantized, or floats where only the weights are integers. Codes of a row: natural order,
// or for nibbles in runs of 128 inputs, 64 even ones then 64 odd ones.
struct Rows {
    int64_t count = 0, inputs = 0, stride = 0, groups = 1, group_size = 0;
    bool split = false;
    Scratch<int8_t> codes;          // [count, stride]
    Scratch<float> scales, floats;  // floats: [count, stride], zeros behind the inputs up to a whole vector
    Scratch<int32_t> sums;          // [count, groups]: of the codes of each group

    // Room for `count` rows of linears up to this size. quantized, plain: the kinds there will be.
    Rows(int64_t count, int64_t inputs, int64_t groups, bool quantized, bool plain)
        : codes(size_t(quantized ? count * padded(inputs, 128) : 1)), scales(size_t(count)),
          floats(size_t(plain ? count * padded(inputs, 128) : 1)), sums(size_t(count * groups)) {}

    static int64_t padded(int64_t inputs, int64_t to) { return ceil_div(inputs, to) * to; }
    void shape(int64_t rows, int64_t row_inputs, int64_t row_groups, bool nibbles_apart) {
        count = rows, inputs = row_inputs, groups = row_groups, group_size = row_inputs / row_groups, split = nibbles_apart;
        stride = padded(inputs, split ? 128 : 64);
    }
};

// n values of any dtype from `index`, as floats: in place where they are floats, else in `buffer`.
static inline const float* as_floats(const void* x, int64_t index, int dtype, int64_t n, float* buffer) {
    if (dtype == F32) return static_cast<const float*>(x) + index;
    for (int64_t i = 0; i < n; i += W) store_part(buffer + i, load_any(x, index + i, dtype, int(std::min<int64_t>(W, n - i))),
                                                  int(std::min<int64_t>(W, n - i)));
    return buffer;
}

// codes = clamp(round_half_even(x / scale), ±qmax); returns the scale, NaN where the row holds a NaN (or, per token, an Inf).
static inline float quantize_row(const float* x, int64_t n, const float* fixed_scale, float qmax, int8_t* codes) {
    uint32_t largest = 0;  // of the magnitudes' bits: orders floats, NaN last
    for (int64_t i = 0; i < n; ++i) {
        uint32_t bits;
        std::memcpy(&bits, x + i, 4);
        largest = std::max(largest, bits & 0x7fffffffu);
    }
    float scale, answer;
    if (fixed_scale) {
        scale = *fixed_scale;
        answer = largest > 0x7f800000u ? std::numeric_limits<float>::quiet_NaN() : scale;
    } else {
        float magnitude;
        std::memcpy(&magnitude, &largest, 4);
        scale = magnitude / qmax;
        if (scale < std::numeric_limits<float>::min()) scale = std::numeric_limits<float>::min();
        answer = largest >= 0x7f800000u ? std::numeric_limits<float>::quiet_NaN() : scale;
    }
    V by = set1(scale), top = set1(qmax), bottom = set1(-qmax);
    for (int64_t i = 0; i < n; i += W) {
        int part = int(std::min<int64_t>(W, n - i));
        V q = round_even(vmin(vmax(load_part(x + i, part) / by, bottom), top));  // a NaN becomes -qmax, its row NaN
#if MC_WIDTH == 16
        _mm_mask_storeu_epi8(codes + i, __mmask16((1u << part) - 1), _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(q.v)));
#else
        float buffer[W];
        store(buffer, q);
        for (int j = 0; j < part; ++j) codes[i + j] = int8_t(int(buffer[j]));
#endif
    }
    return answer;
}

// Row m of x into rows.codes, .scales and .sums. `row` and `natural` are scratch of a row each (natural: only if split).
static inline void quantize_into(Rows& rows, int64_t m, const void* x, int64_t index, int dtype, const float* fixed_scale,
                                 float qmax, float* row, int8_t* natural) {
    int64_t n = rows.inputs;
    int8_t* out = rows.codes.get() + m * rows.stride;
    int8_t* codes = rows.split ? natural : out;
    rows.scales[size_t(m)] = quantize_row(as_floats(x, index, dtype, n, row), n, fixed_scale, qmax, codes);
    for (int64_t g = 0; g < rows.groups; ++g) {
        int32_t sum = 0;
        for (int64_t i = g * rows.group_size; i < (g + 1) * rows.group_size; ++i) sum += codes[i];
        rows.sums[size_t(m * rows.groups + g)] = sum;
    }
    if (!rows.split) {
        std::memset(out + n, 0, size_t(rows.stride - n));
        return;
    }
    std::memset(natural + n, 0, size_t(rows.stride - n));
    for (int64_t run = 0; run < rows.stride; run += 128)
        for (int j = 0; j < 64; ++j) {
            out[run + j] = natural[run + 2 * j];
            out[run + 64 + j] = natural[run + 2 * j + 1];
        }
}

// Row m of x into rows.floats.
static inline void widen_into(Rows& rows, int64_t m, const void* x, int64_t index, int dtype) {
    float* row = rows.floats.get() + m * rows.stride;
    for (int64_t i = 0; i < rows.inputs; i += W)  // the last vector brings its own zeros
        store(row + i, load_any(x, index + i, dtype, int(std::min<int64_t>(W, rows.inputs - i))));
}

// One integer linear as its caller describes it. weight rows are `row_bytes` apart, without padding.
struct Linear {
    int64_t rows, inputs, outputs, groups, threads, activation, act_bits, x_row, x_dtype, y_dtype, scale_dtype;
    const void *x, *weight, *scale;
    const uint8_t* zero;
    const float *bias, *act_scale;
    void* y;

    float qmax() const { return act_bits == 4 ? 7.0f : 127.0f; }
    int64_t row_bytes(bool nibbles) const { return nibbles ? inputs / 2 : inputs; }
};

MC_INLINE float scale_at(const Linear& p, int64_t output, int64_t group) {
    return load_one(p.scale, output * p.groups + group, int(p.scale_dtype));
}

MC_INLINE int zero_at(const Linear& p, int64_t output, int64_t group) {
    return p.zero ? p.zero[output * p.groups + group] : 8;
}

MC_INLINE void finish_one(const Linear& p, Rows& rows, int64_t m, int64_t output, float sum) {
    float y = sum * rows.scales[size_t(m)];
    if (p.bias) y = y + p.bias[output];
    store_one(p.y, m * p.outputs + output, int(p.y_dtype), y);
}

// -- any level: plain loops ------------------------------------------------------------------------------------------

MC_INLINE int32_t dot_bytes(const int8_t* a, const int8_t* b, int64_t n) {
    int32_t sum = 0;
    int64_t i = 0;
#if MC_WIDTH == 8
    __m256i total = _mm256_setzero_si256();
    for (; i + 16 <= n; i += 16) {  // widened to 16 bits: the byte instruction saturates
        __m256i x = _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(a + i)));
        __m256i y = _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(b + i)));
        total = _mm256_add_epi32(total, _mm256_madd_epi16(x, y));
    }
    __m128i half = _mm_add_epi32(_mm256_castsi256_si128(total), _mm256_extracti128_si256(total, 1));
    half = _mm_add_epi32(half, _mm_shuffle_epi32(half, 0x4e));
    half = _mm_add_epi32(half, _mm_shuffle_epi32(half, 0xb1));
    sum = _mm_cvtsi128_si32(half);
#endif
    for (; i < n; ++i) sum += int32_t(a[i]) * int32_t(b[i]);
    return sum;
}

// Outputs [first, last) for all rows; nibbles are unpacked a weight row at a time into `unpacked`. Rows in natural order.
static inline void plain_outputs(const Linear& p, Rows& rows, bool nibbles, int64_t first, int64_t last, int8_t* unpacked) {
    int64_t group_size = p.inputs / p.groups;
    for (int64_t output = first; output < last; ++output) {
        const int8_t* weight = static_cast<const int8_t*>(p.weight) + output * p.row_bytes(nibbles);
        if (nibbles) {
            for (int64_t i = 0; i < p.inputs; ++i) {
                int byte = uint8_t(weight[i / 2]);
                unpacked[i] = int8_t((i & 1 ? byte >> 4 : byte & 15) - zero_at(p, output, i / group_size));
            }
            weight = unpacked;
        }
        for (int64_t m = 0; m < p.rows; ++m) {
            const int8_t* codes = rows.codes.get() + m * rows.stride;
            float total = 0.0f;
            for (int64_t g = 0; g < p.groups; ++g) {
                int64_t from = g * group_size;
                float part = float(dot_bytes(codes + from, weight + from, group_size)) * scale_at(p, output, g);
                total = g == 0 ? part : total + part;
            }
            finish_one(p, rows, m, output, total);
        }
    }
}

// -- float activations -----------------------------------------------------------------------------------------------

MC_INLINE float sum_of(V x) {
#if MC_WIDTH == 16
    __m256 a = _mm256_add_ps(_mm512_maskz_extractf32x8_ps(0xff, x.v, 0), _mm512_maskz_extractf32x8_ps(0xff, x.v, 1));
    __m128 b = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    b = _mm_add_ps(b, _mm_movehl_ps(b, b));
    return _mm_cvtss_f32(_mm_add_ss(b, _mm_movehdup_ps(b)));
#else
    return lane_sum(x);
#endif
}

// RA rows of x times one row of n floats, which comes from memory and is read in order, once; the sums of float_tile.
template <int RA>
MC_INLINE void float_row(const float* const* x, const float* w, int64_t n, float* out) {
    V total[RA];
    for (int r = 0; r < RA; ++r) total[r] = zero();
    int64_t k = 0;
    for (; k + W <= n; k += W) {
        V weight = load(w + k);
        for (int r = 0; r < RA; ++r) total[r] = fma(load(x[r] + k), weight, total[r]);
    }
    if (k < n) {
        V weight = load_part(w + k, int(n - k));
        for (int r = 0; r < RA; ++r) total[r] = fma(load(x[r] + k), weight, total[r]);
    }
    for (int r = 0; r < RA; ++r) out[r] = sum_of(total[r]);
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
        for (int c = 0; c < 4; ++c) out[r][c] = sum_of(total[r][c]);
}

// 4 weight rows from `first` as floats in `to`, [4][step]. Group scales are applied to the weight, a row's own after the sum.
static inline void widen_weights(const Linear& p, bool nibbles, int64_t first, float* to, int64_t step) {
    const int64_t group_size = p.inputs / p.groups;
    for (int64_t output = first; output < std::min(first + 4, p.outputs); ++output, to += step) {
        if (!nibbles) {
            const int8_t* from = static_cast<const int8_t*>(p.weight) + output * p.inputs;
            for (int64_t i = 0; i < p.inputs; ++i) to[i] = float(from[i]);
            continue;
        }
        const uint8_t* from = static_cast<const uint8_t*>(p.weight) + output * (p.inputs / 2);
        for (int64_t g = 0; g < p.groups; ++g) {
            float scale = scale_at(p, output, g);
            int offset = zero_at(p, output, g);
            for (int64_t i = g * group_size / 2; i < (g + 1) * group_size / 2; ++i) {
                to[2 * i] = float((from[i] & 15) - offset) * scale;
                to[2 * i + 1] = float((from[i] >> 4) - offset) * scale;
            }
        }
    }
}

// Outputs [first, first + 4) for all rows. weights: 4 rows of floats; scaled: their scale is still to come; in_order: they come
// from memory, where four streams at a time are slower than one.
static inline void float_outputs(const Linear& p, Rows& rows, int64_t first, const float* const* weights, bool scaled,
                                 bool in_order) {
    const int columns = int(std::min<int64_t>(4, p.outputs - first));
    for (int64_t m = 0; m < p.rows;) {
        float out[4][4];
        const float* x[4];
        const int count = p.rows - m >= 4 ? 4 : 1;
        for (int r = 0; r < count; ++r) x[r] = rows.floats.get() + (m + r) * rows.stride;
        if (in_order) {
            for (int c = 0; c < columns; ++c) {
                float sums[4];
                if (count == 4) float_row<4>(x, weights[c], p.inputs, sums);
                else float_row<1>(x, weights[c], p.inputs, sums);
                for (int r = 0; r < count; ++r) out[r][c] = sums[r];
            }
        } else if (count == 4) {
            float_tile<4>(x, weights, p.inputs, out);
        } else {
            float_tile<1>(x, weights, p.inputs, out);
        }
        for (int r = 0; r < count; ++r)
            for (int c = 0; c < columns; ++c) {
                float y = scaled ? out[r][c] * scale_at(p, first + c, 0) : out[r][c];
                if (p.bias) y = y + p.bias[first + c];
                store_one(p.y, (m + r) * p.outputs + first + c, int(p.y_dtype), y);
            }
        m += count;
    }
}

#if MC_WIDTH == 16
// -- AVX-512 VNNI ----------------------------------------------------------------------------------------------------

// acc + unsigned bytes . signed bytes, a lane each; the signed ones from memory, whole or one quad broadcast to all lanes.
MC_INLINE void dot_add(__m512i& acc, __m512i weights, __m512i codes) {
    asm("vpdpbusd %2, %1, %0" : "+v"(acc) : "v"(weights), "v"(codes));
}
MC_INLINE void dot_add_quad(__m512i& acc, __m512i weights, const int8_t* quad) {
    asm("vpdpbusd %2%{1to16%}, %1, %0" : "+v"(acc) : "v"(weights), "m"(*reinterpret_cast<const int32_t*>(quad)));
}

MC_INLINE __mmask16 lanes(int64_t count) { return count >= 16 ? 0xffff : __mmask16((1u << count) - 1); }
MC_INLINE __mmask64 bytes(int64_t count) { return count >= 64 ? ~0ull : (1ull << count) - 1; }

MC_INLINE void put(void* y, int64_t index, int64_t dtype, __m512 value, __mmask16 mask) {
    if (dtype == F32) {
        _mm512_mask_storeu_ps(static_cast<float*>(y) + index, mask, value);
    } else if (dtype == F16) {
        _mm256_mask_storeu_epi16(static_cast<uint16_t*>(y) + index, mask, _mm512_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT));
    } else {
        __m512i bits = _mm512_castps_si512(value), odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
        __m512i rounded = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
        rounded = _mm512_mask_or_epi32(rounded, _mm512_cmp_ps_mask(value, value, _CMP_UNORD_Q), bits, _mm512_set1_epi32(0x400000));
        _mm256_mask_storeu_epi16(static_cast<uint16_t*>(y) + index, mask, _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded, 16)));
    }
}

// 16 accumulators -> 4 vectors: in vector i, 128-bit lane q holds the sums of lanes 4q..4q+3 of accumulators 4i..4i+3.
MC_INLINE void quarter_sums(const __m512i* acc, __m512i* quarters) {
    MC_UNROLL(4)
    for (int i = 0; i < 4; ++i) {
        const __m512i* a = acc + 4 * i;
        __m512i ab = _mm512_add_epi32(_mm512_unpacklo_epi32(a[0], a[1]), _mm512_unpackhi_epi32(a[0], a[1]));
        __m512i cd = _mm512_add_epi32(_mm512_unpacklo_epi32(a[2], a[3]), _mm512_unpackhi_epi32(a[2], a[3]));
        quarters[i] = _mm512_add_epi32(_mm512_unpacklo_epi64(ab, cd), _mm512_unpackhi_epi64(ab, cd));
    }
}

// The sums of each half of 16 accumulators' lanes: accumulator r in lane r.
MC_INLINE void half_sums(const __m512i* acc, __m512i& first, __m512i& second) {
    __m512i z[4];
    quarter_sums(acc, z);
    __m512i a = _mm512_add_epi32(_mm512_shuffle_i32x4(z[0], z[1], 0x88), _mm512_shuffle_i32x4(z[0], z[1], 0xdd));
    __m512i b = _mm512_add_epi32(_mm512_shuffle_i32x4(z[2], z[3], 0x88), _mm512_shuffle_i32x4(z[2], z[3], 0xdd));
    first = _mm512_shuffle_i32x4(a, b, 0x88);
    second = _mm512_shuffle_i32x4(a, b, 0xdd);
}

MC_INLINE __m512i full_sums(const __m512i* acc) {
    __m512i first, second;
    half_sums(acc, first, second);
    return _mm512_add_epi32(first, second);
}

// A 16 x 16 matrix of 32-bit elements, transposed in place.
MC_INLINE void transpose16(__m512i* r) {
    __m512i t[16];
    for (int i = 0; i < 16; i += 2) {
        t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
        t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
    }
    for (int i = 0; i < 16; i += 4) {  // r[i + j]: column j of each 4 x 4 block of rows i..i+3
        r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
        r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
        r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
        r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
    }
    for (int j = 0; j < 4; ++j) {
        __m512i a = _mm512_shuffle_i32x4(r[j], r[4 + j], 0x88), b = _mm512_shuffle_i32x4(r[j], r[4 + j], 0xdd);
        __m512i c = _mm512_shuffle_i32x4(r[8 + j], r[12 + j], 0x88), d = _mm512_shuffle_i32x4(r[8 + j], r[12 + j], 0xdd);
        t[j] = _mm512_shuffle_i32x4(a, c, 0x88);
        t[8 + j] = _mm512_shuffle_i32x4(a, c, 0xdd);
        t[4 + j] = _mm512_shuffle_i32x4(b, d, 0x88);
        t[12 + j] = _mm512_shuffle_i32x4(b, d, 0xdd);
    }
    for (int i = 0; i < 16; ++i) r[i] = t[i];
}

// 16 weight rows from `first`, [quad of bytes][16 outputs][4], `step` bytes a quad apart; rows past the end repeat the last.
static inline void pack_quads(const uint8_t* weight, int64_t first, int64_t outputs, int64_t row_bytes, uint8_t flip,
                              uint8_t* to, int64_t step) {
    __m512i mask = _mm512_set1_epi8(char(flip)), r[16];
    for (int64_t i = first * row_bytes, end = std::min(first + 16, outputs) * row_bytes; i < end; i += 64)
        asm volatile("" ::"r"(*static_cast<const volatile uint8_t*>(weight + i)));  // in order, so that it is prefetched
    for (int64_t k = 0; k < row_bytes; k += 64) {
        __mmask64 part = bytes(row_bytes - k);
        for (int i = 0; i < 16; ++i) {
            int64_t row = std::min(first + i, outputs - 1);
            r[i] = _mm512_xor_si512(_mm512_maskz_loadu_epi8(part, weight + row * row_bytes + k), mask);
        }
        transpose16(r);
        int64_t quads = std::min<int64_t>(16, ceil_div(row_bytes - k, 4));
        for (int64_t q = 0; q < quads; ++q) _mm512_storeu_si512(to + (k / 4 + q) * step, r[q]);
    }
}

// The scales of 16 outputs, [group][`step` floats apart, 16 of them].
static inline void pack_scales(const Linear& p, int64_t first, float* to, int64_t step) {
    __m512i r[16];
    for (int64_t g = 0; g < p.groups; g += 16) {
        __mmask16 part = lanes(p.groups - g);
        for (int i = 0; i < 16; ++i) {
            int64_t at = std::min(first + i, p.outputs - 1) * p.groups + g;
            if (p.scale_dtype == F16) {
                __m256i half = _mm256_maskz_loadu_epi16(part, static_cast<const uint16_t*>(p.scale) + at);
                r[i] = _mm512_castps_si512(_mm512_cvtph_ps(half));
            } else {
                r[i] = _mm512_maskz_loadu_epi32(part, static_cast<const float*>(p.scale) + at);
            }
        }
        transpose16(r);
        for (int64_t j = 0; j < std::min<int64_t>(16, p.groups - g); ++j) _mm512_storeu_si512(to + (g + j) * step, r[j]);
    }
}

static inline void pack_zeros(const Linear& p, int64_t first, int32_t* to, int64_t step) {
    for (int64_t g = 0; g < p.groups; ++g)
        for (int i = 0; i < 16; ++i) to[g * step + i] = zero_at(p, std::min(first + i, p.outputs - 1), g);
}

MC_INLINE void finish_lanes(const Linear& p, Rows& rows, int64_t m, int64_t first, __m512 sum) {
    __mmask16 mask = lanes(p.outputs - first);
    __m512 y = _mm512_mul_ps(sum, _mm512_set1_ps(rows.scales[size_t(m)]));
    if (p.bias) y = _mm512_add_ps(y, _mm512_maskz_loadu_ps(mask, p.bias + first));
    put(p.y, m * p.outputs + first, p.y_dtype, y, mask);
}
#endif

}  // namespace MC_LEVEL
