// What integer linears are made of, for the level under which this file is included; linear_tasks.h puts it together.
//
// Weights come as rows [outputs, inputs], or rearranged in place for AVX-512 (``Linear::tiled`` outputs of them): a tile is 16
// outputs, as [quads of bytes][16 outputs][4 bytes], its scales and zero points as [groups][16]. One vector then holds four
// bytes of each of 16 outputs, which is what the dot instruction takes, and a tile is one stream. Outputs behind the last whole
// tile stay rows; rows are brought into the same order in cache, a tile at a time (pack_quads).
//
// Activations are quantized a row at a time into `Rows` (int8, padded with zeros, with the sums of their codes). dpbusd
// multiplies unsigned by signed bytes, so weights enter as unsigned (int8 ^ 0x80, or the nibble itself) and 128 (or the zero
// point) times the row's sum is taken off again: exact, whatever wraps in between. A row or a few meet one tile at a time, more
// rows two tiles at a time, up to 12 rows x 32 outputs of accumulators in registers; the dot instruction is inline assembly,
// since GCC spills accumulators of intrinsics. Whatever the shape, sums are exact and epilogues the same: so are the results.
//
// Without AVX-512 rows meet a weight row at a time, in one plain loop; many rows 16 weight rows, with AVX2 (pair_outputs). Where
// activations stay float, so do the products: see float_tiles.h. No
// include guard: see simd.h.
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

constexpr int64_t TILE_OUTPUTS = 16;
constexpr int64_t AHEAD = 4096;  // bytes of weights on their way from memory to the second-level cache

// One integer linear as its caller describes it. weight rows are `row_bytes` apart, without padding. tiled: how many outputs,
// from the first, lie in tiles. x_row, y_row: elements between rows. keep, of: the pattern of a sparse weight, see nm_tiles.h.
struct Linear {
    int64_t rows, inputs, outputs, groups, threads, activation, act_bits, x_row, y_row, x_dtype, y_dtype, scale_dtype, tiled, keep,
        of;
    const void *x, *weight, *scale;
    const uint8_t* zero;
    const float *bias, *act_scale;
    void* y;

    float qmax() const { return act_bits == 4 ? 7.0f : 127.0f; }
    int64_t row_bytes(bool nibbles) const { return nibbles ? inputs / 2 : inputs; }
};

// Where the scale and the zero point of a group of an output are.
MC_INLINE int64_t factor_index(const Linear& p, int64_t output, int64_t group) {
    if (output >= p.tiled) return output * p.groups + group;
    return (output / TILE_OUTPUTS * p.groups + group) * TILE_OUTPUTS + output % TILE_OUTPUTS;
}

MC_INLINE float scale_at(const Linear& p, int64_t output, int64_t group) {
    return load_one(p.scale, factor_index(p, output, group), int(p.scale_dtype));
}

MC_INLINE int zero_at(const Linear& p, int64_t output, int64_t group) {
    return p.zero ? p.zero[factor_index(p, output, group)] : 8;
}

// The bytes of an output's row: where they are, or gathered from its tile into `buffer`.
static inline const uint8_t* row_of(const Linear& p, bool nibbles, int64_t output, uint8_t* buffer) {
    const int64_t bytes = p.row_bytes(nibbles);
    const uint8_t* weight = static_cast<const uint8_t*>(p.weight);
    if (output >= p.tiled) return weight + output * bytes;
    const uint8_t* from = weight + output / TILE_OUTPUTS * TILE_OUTPUTS * bytes + output % TILE_OUTPUTS * 4;
    for (int64_t k = 0; k < bytes; k += 4) std::memcpy(buffer + k, from + k * TILE_OUTPUTS, 4);
    return buffer;
}

MC_INLINE void finish_one(const Linear& p, Rows& rows, int64_t m, int64_t output, float sum) {
    float y = sum * rows.scales[size_t(m)];
    if (p.bias) y = y + p.bias[output];
    store_one(p.y, m * p.y_row + output, int(p.y_dtype), y);
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

// The weight row of an output as signed bytes: where it is, or gathered, or nibbles unpacked less their zero point. Scratch of a row.
static inline const int8_t* signed_row(const Linear& p, bool nibbles, int64_t output, int8_t* unpacked, uint8_t* gathered) {
    const uint8_t* bytes = row_of(p, nibbles, output, gathered);
    if (!nibbles) return reinterpret_cast<const int8_t*>(bytes);
    const int64_t group_size = p.inputs / p.groups;
    for (int64_t i = 0; i < p.inputs; ++i)
        unpacked[i] = int8_t((i & 1 ? bytes[i / 2] >> 4 : bytes[i / 2] & 15) - zero_at(p, output, i / group_size));
    return unpacked;
}

// Outputs [first, last) for rows from m on, a weight row at a time. Rows in natural order. unpacked, gathered: see signed_row.
static inline void plain_outputs(const Linear& p, Rows& rows, bool nibbles, int64_t m, int64_t first, int64_t last,
                                 int8_t* unpacked, uint8_t* gathered) {
    const int64_t group_size = p.inputs / p.groups, start = m;
    for (int64_t output = first; output < last; ++output) {
        const int8_t* weight = signed_row(p, nibbles, output, unpacked, gathered);
        for (m = start; m < p.rows; ++m) {
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

#if MC_WIDTH == 8
// -- AVX2 ------------------------------------------------------------------------------------------------------------

constexpr int PAIR_ROWS = 4;  // rows in registers, two accumulators of eight outputs each

// `count` weight rows from `first` as [pairs of inputs][16 outputs][2], the last one repeated. staged: scratch of W rows of bytes.
static inline void pack_pairs(const Linear& p, bool nibbles, int64_t first, int64_t count, int8_t* unpacked, uint8_t* gathered,
                              int16_t* pairs, int8_t* staged) {
    const int64_t step = Rows::padded(p.inputs, 128);
    for (int64_t half = 0; half < TILE_OUTPUTS; half += W) {
        for (int64_t i = 0; i < W; ++i) {
            const int64_t output = first + std::min(half + i, count - 1);
            std::memcpy(staged + i * step, signed_row(p, nibbles, output, unpacked, gathered), size_t(p.inputs));
            std::memset(staged + i * step + p.inputs, 0, size_t(step - p.inputs));
        }
        for (int64_t k = 0; k < p.inputs; k += 2 * W) {
            alignas(32) float block[W * W];  // bits of pairs, which are only moved
            for (int64_t i = 0; i < W; ++i)
                store(block + i * W, {_mm256_castsi256_ps(_mm256_cvtepi8_epi16(
                                         _mm_load_si128(reinterpret_cast<const __m128i*>(staged + i * step + k))))});
            transpose(block, W, reinterpret_cast<float*>(pairs) + k / 2 * TILE_OUTPUTS + half, TILE_OUTPUTS);
        }
    }
}

// All rows by the 16 outputs from `first`, as many of them as there are, inputs two at a time: a lane is an output, and holds two
// weights of 16 bits, since the byte instruction saturates. What plain_outputs gives, but for less: no sum over lanes.
//
// pairs: scratch for the weights, [pairs of inputs][16 outputs][2], and PAIR_ROWS rows of codes. Groups must be of whole pairs
// where there are several.
static inline void pair_outputs(const Linear& p, Rows& rows, bool nibbles, int64_t first, int8_t* unpacked, uint8_t* gathered,
                                int16_t* pairs) {
    const int64_t count = std::min(TILE_OUTPUTS, p.outputs - first), stride = rows.stride;
    const int64_t group = p.groups == 1 ? ceil_div(p.inputs, 2) : p.inputs / p.groups / 2;
    int16_t* codes = pairs + Rows::padded(p.inputs, 2 * W) * TILE_OUTPUTS;
    pack_pairs(p, nibbles, first, count, unpacked, gathered, pairs, reinterpret_cast<int8_t*>(codes));
    Scratch<float> scales(size_t(p.groups * TILE_OUTPUTS));
    for (int64_t g = 0; g < p.groups; ++g)
        for (int64_t n = 0; n < TILE_OUTPUTS; ++n)
            scales[size_t(g * TILE_OUTPUTS + n)] = scale_at(p, first + std::min(n, count - 1), g);
    for (int64_t m = 0; m + PAIR_ROWS <= p.rows; m += PAIR_ROWS) {
        const int8_t* from = rows.codes.get() + m * stride;
        for (int64_t i = 0; i < PAIR_ROWS * stride; i += 16)
            _mm256_store_si256(reinterpret_cast<__m256i*>(codes + i),
                               _mm256_cvtepi8_epi16(_mm_load_si128(reinterpret_cast<const __m128i*>(from + i))));
        V total[PAIR_ROWS][2];
        for (int64_t g = 0; g < p.groups; ++g) {
            __m256i acc[PAIR_ROWS][2];
            MC_UNROLL(4)
            for (int r = 0; r < PAIR_ROWS; ++r) acc[r][0] = acc[r][1] = _mm256_setzero_si256();
            for (int64_t k = g * group; k < (g + 1) * group; ++k) {
                const __m256i* weight = reinterpret_cast<const __m256i*>(pairs + k * 2 * TILE_OUTPUTS);
                const __m256i low = _mm256_load_si256(weight), high = _mm256_load_si256(weight + 1);
                MC_UNROLL(4)
                for (int r = 0; r < PAIR_ROWS; ++r) {
                    int32_t two;
                    std::memcpy(&two, codes + r * stride + 2 * k, 4);
                    const __m256i pair = _mm256_set1_epi32(two);
                    acc[r][0] = _mm256_add_epi32(acc[r][0], _mm256_madd_epi16(low, pair));
                    acc[r][1] = _mm256_add_epi32(acc[r][1], _mm256_madd_epi16(high, pair));
                }
            }
            MC_UNROLL(4)
            for (int r = 0; r < PAIR_ROWS; ++r)
                for (int half = 0; half < 2; ++half) {
                    const V part = V{_mm256_cvtepi32_ps(acc[r][half])} * load(&scales[size_t(g * TILE_OUTPUTS + half * W)]);
                    total[r][half] = g == 0 ? part : total[r][half] + part;
                }
        }
        for (int half = 0; half < 2; ++half) {
            const int64_t at = first + half * W;
            const int lanes = int(std::min<int64_t>(W, p.outputs - at));
            if (lanes <= 0) break;
            for (int r = 0; r < PAIR_ROWS; ++r) {
                V y = total[r][half] * set1(rows.scales[size_t(m + r)]);
                if (p.bias) y = y + load_part(p.bias + at, lanes);
                store_any(p.y, (m + r) * p.y_row + at, int(p.y_dtype), y, lanes);
            }
        }
    }
    plain_outputs(p, rows, nibbles, p.rows / PAIR_ROWS * PAIR_ROWS, first, first + count, unpacked, gathered);
}
#endif

#if MC_WIDTH == 16
// -- AVX-512 VNNI ----------------------------------------------------------------------------------------------------

// acc + unsigned bytes . signed bytes, a lane each. The signed ones are a quad in all lanes: as a memory operand of every dot
// instruction it would be read once a tile, and loads, not products, would set the pace.
MC_INLINE void dot_add(__m512i& acc, __m512i weights, __m512i codes) {
    asm("vpdpbusd %2, %1, %0" : "+v"(acc) : "v"(weights), "v"(codes));
}
MC_INLINE __m512i quad_of(const int8_t* codes) {
    __m512i quad;
    asm("vpbroadcastd %1, %0" : "=v"(quad) : "m"(*reinterpret_cast<const int32_t*>(codes)));
    return quad;
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

// 16 weight rows from `first` as a tile: [quad of bytes][16 outputs][4]; rows past the end repeat the last.
static inline void pack_quads(const uint8_t* weight, int64_t first, int64_t outputs, int64_t row_bytes, uint8_t* to) {
    __m512i r[16];
    for (int64_t i = first * row_bytes, end = std::min(first + 16, outputs) * row_bytes; i < end; i += 64)
        asm volatile("" ::"r"(*static_cast<const volatile uint8_t*>(weight + i)));  // in order, so that it is prefetched
    for (int64_t k = 0; k < row_bytes; k += 64) {
        __mmask64 part = bytes(row_bytes - k);
        for (int i = 0; i < 16; ++i)
            r[i] = _mm512_maskz_loadu_epi8(part, weight + std::min(first + i, outputs - 1) * row_bytes + k);
        transpose16(r);
        int64_t quads = std::min<int64_t>(16, ceil_div(row_bytes - k, 4));
        for (int64_t q = 0; q < quads; ++q) _mm512_store_si512(to + (k / 4 + q) * 64, r[q]);
    }
}

// The scales of 16 outputs, a tile or rows, as [group][16] floats.
static inline void pack_scales(const Linear& p, int64_t first, float* to) {
    if (first + TILE_OUTPUTS <= p.tiled) {
        for (int64_t i = first * p.groups; i < (first + TILE_OUTPUTS) * p.groups; i += 16, to += 16)
            store(to, load_any(p.scale, i, int(p.scale_dtype), W));
        return;
    }
    __m512i r[16];
    for (int64_t g = 0; g < p.groups; g += 16) {
        __mmask16 part = lanes(p.groups - g);
        for (int i = 0; i < 16; ++i) {
            int64_t at = std::min(first + i, p.outputs - 1) * p.groups + g;
            if (p.scale_dtype == F16) {
                __m256i halves = _mm256_maskz_loadu_epi16(part, static_cast<const uint16_t*>(p.scale) + at);
                r[i] = _mm512_castps_si512(_mm512_cvtph_ps(halves));
            } else {
                r[i] = _mm512_maskz_loadu_epi32(part, static_cast<const float*>(p.scale) + at);
            }
        }
        transpose16(r);
        for (int64_t j = 0; j < std::min<int64_t>(16, p.groups - g); ++j) _mm512_storeu_si512(to + (g + j) * 16, r[j]);
    }
}

static inline void pack_zeros(const Linear& p, int64_t first, int32_t* to) {
    for (int64_t g = 0; g < p.groups; ++g)
        for (int i = 0; i < 16; ++i) to[g * 16 + i] = zero_at(p, std::min(first + i, p.outputs - 1), g);
}

MC_INLINE void finish_lanes(const Linear& p, Rows& rows, int64_t m, int64_t first, __m512 sum) {
    __mmask16 mask = lanes(p.outputs - first);
    __m512 y = _mm512_mul_ps(sum, _mm512_set1_ps(rows.scales[size_t(m)]));
    if (p.bias) y = _mm512_add_ps(y, _mm512_maskz_loadu_ps(mask, p.bias + first));
    put(p.y, m * p.y_row + first, p.y_dtype, y, mask);
}
#endif

}  // namespace MC_LEVEL
