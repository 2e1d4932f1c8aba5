// A vector of MC_WIDTH floats and what the ops need of it, for the level under which this file is included.
//
// No include guard: levels.h includes it once a level. Functions compute each lane alone, so a lane's result does not depend
// on its neighbours, on padding, or on where a block of channels starts.
namespace MC_LEVEL {

using namespace mc;

constexpr int W = MC_WIDTH;

#if MC_WIDTH == 16
struct V {
    __m512 v;
};
MC_INLINE V set1(float x) { return {_mm512_set1_ps(x)}; }
MC_INLINE V load(const float* p) { return {_mm512_loadu_ps(p)}; }
MC_INLINE void store(float* p, V x) { _mm512_storeu_ps(p, x.v); }
MC_INLINE V operator+(V a, V b) { return {_mm512_add_ps(a.v, b.v)}; }
MC_INLINE V operator-(V a, V b) { return {_mm512_sub_ps(a.v, b.v)}; }
MC_INLINE V operator*(V a, V b) { return {_mm512_mul_ps(a.v, b.v)}; }
MC_INLINE V operator/(V a, V b) { return {_mm512_div_ps(a.v, b.v)}; }
MC_INLINE V fma(V a, V b, V c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }  // a b + c
MC_INLINE V vmax(V a, V b) { return {_mm512_max_ps(a.v, b.v)}; }             // b where either is NaN
MC_INLINE V vmin(V a, V b) { return {_mm512_min_ps(a.v, b.v)}; }             // b where either is NaN
MC_INLINE V vabs(V a) { return {_mm512_abs_ps(a.v)}; }
MC_INLINE V round_even(V a) { return {_mm512_roundscale_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }
MC_INLINE V load_bf16(const uint16_t* p) {
    __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
    return {_mm512_castsi512_ps(_mm512_slli_epi32(wide, 16))};
}
MC_INLINE V load_f16(const uint16_t* p) {
    return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))};
}
MC_INLINE V load_i8(const int8_t* p) {
    return {_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))))};
}
MC_INLINE V scale_by_power(V p, V n) { return {_mm512_scalef_ps(p.v, n.v)}; }  // p 2^n
MC_INLINE V where_negative(V x, V a, V b) {  // a where x has its sign bit set, else b
    return {_mm512_mask_mov_ps(b.v, _mm512_movepi32_mask(_mm512_castps_si512(x.v)), a.v)};
}
#elif MC_WIDTH == 8
struct V {
    __m256 v;
};
MC_INLINE V set1(float x) { return {_mm256_set1_ps(x)}; }
MC_INLINE V load(const float* p) { return {_mm256_loadu_ps(p)}; }
MC_INLINE void store(float* p, V x) { _mm256_storeu_ps(p, x.v); }
MC_INLINE V operator+(V a, V b) { return {_mm256_add_ps(a.v, b.v)}; }
MC_INLINE V operator-(V a, V b) { return {_mm256_sub_ps(a.v, b.v)}; }
MC_INLINE V operator*(V a, V b) { return {_mm256_mul_ps(a.v, b.v)}; }
MC_INLINE V operator/(V a, V b) { return {_mm256_div_ps(a.v, b.v)}; }
MC_INLINE V fma(V a, V b, V c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
MC_INLINE V vmax(V a, V b) { return {_mm256_max_ps(a.v, b.v)}; }
MC_INLINE V vmin(V a, V b) { return {_mm256_min_ps(a.v, b.v)}; }
MC_INLINE V vabs(V a) { return {_mm256_andnot_ps(_mm256_set1_ps(-0.0f), a.v)}; }
MC_INLINE V round_even(V a) { return {_mm256_round_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }
MC_INLINE V load_bf16(const uint16_t* p) {
    __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    return {_mm256_castsi256_ps(_mm256_slli_epi32(wide, 16))};
}
MC_INLINE V load_f16(const uint16_t* p) { return {_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))}; }
MC_INLINE V load_i8(const int8_t* p) {
    return {_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))))};
}
MC_INLINE V scale_by_power(V p, V n) {  // in two steps, so that the power itself never leaves the range of floats
    __m256i whole = _mm256_cvtps_epi32(n.v), half = _mm256_srai_epi32(whole, 1), rest = _mm256_sub_epi32(whole, half);
    __m256i bias = _mm256_set1_epi32(127);
    __m256 first = _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(half, bias), 23));
    __m256 second = _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(rest, bias), 23));
    return {_mm256_mul_ps(_mm256_mul_ps(p.v, first), second)};
}
MC_INLINE V where_negative(V x, V a, V b) { return {_mm256_blendv_ps(b.v, a.v, x.v)}; }
#else
typedef float Floats __attribute__((vector_size(16)));
typedef int32_t Ints __attribute__((vector_size(16)));
struct V {
    Floats v;
};
MC_INLINE V set1(float x) { return {Floats{x, x, x, x}}; }
MC_INLINE V load(const float* p) {
    V x;
    std::memcpy(&x.v, p, sizeof x.v);
    return x;
}
MC_INLINE void store(float* p, V x) { std::memcpy(p, &x.v, sizeof x.v); }
MC_INLINE V operator+(V a, V b) { return {a.v + b.v}; }
MC_INLINE V operator-(V a, V b) { return {a.v - b.v}; }
MC_INLINE V operator*(V a, V b) { return {a.v * b.v}; }
MC_INLINE V operator/(V a, V b) { return {a.v / b.v}; }
MC_INLINE V fma(V a, V b, V c) { return {a.v * b.v + c.v}; }  // rounded twice: the baseline has no fused one
MC_INLINE V vmax(V a, V b) { return {a.v > b.v ? a.v : b.v}; }
MC_INLINE V vmin(V a, V b) { return {a.v < b.v ? a.v : b.v}; }
MC_INLINE V vabs(V a) { return {Floats(Ints(a.v) & Ints{0x7fffffff, 0x7fffffff, 0x7fffffff, 0x7fffffff})}; }
MC_INLINE V round_even(V a) {  // for |a| < 2^22
    V magic = set1(12582912.0f);
    return (a + magic) - magic;
}
MC_INLINE V load_bf16(const uint16_t* p) {
    return {Floats{from_bf16(p[0]), from_bf16(p[1]), from_bf16(p[2]), from_bf16(p[3])}};
}
MC_INLINE V load_f16(const uint16_t* p) {
    return {Floats{from_f16(p[0]), from_f16(p[1]), from_f16(p[2]), from_f16(p[3])}};
}
MC_INLINE V load_i8(const int8_t* p) { return {Floats{float(p[0]), float(p[1]), float(p[2]), float(p[3])}}; }
MC_INLINE V scale_by_power(V p, V n) {
    Ints whole = __builtin_convertvector(n.v, Ints), half = whole >> 1, rest = whole - half;
    return {p.v * Floats((half + 127) << 23) * Floats((rest + 127) << 23)};
}
MC_INLINE V where_negative(V x, V a, V b) {
    Ints negative = Ints(x.v) >> 31;
    return {Floats((Ints(a.v) & negative) | (Ints(b.v) & ~negative))};
}
#endif

MC_INLINE V operator-(V a) { return set1(0.0f) - a; }
MC_INLINE V zero() { return set1(0.0f); }

// W rows of W floats, `from_stride` apart, written transposed, `to_stride` apart.
MC_INLINE void transpose(const float* from, int64_t from_stride, float* to, int64_t to_stride) {
#if MC_WIDTH == 16
    __m512 r[16], t[16];
    for (int i = 0; i < 16; ++i) r[i] = _mm512_loadu_ps(from + i * from_stride);
    for (int i = 0; i < 16; i += 2) {
        t[i] = _mm512_unpacklo_ps(r[i], r[i + 1]);
        t[i + 1] = _mm512_unpackhi_ps(r[i], r[i + 1]);
    }
    auto pairs = [](__m512 a, __m512 b, bool high) {
        __m512d x = _mm512_castps_pd(a), y = _mm512_castps_pd(b);
        return _mm512_castpd_ps(high ? _mm512_unpackhi_pd(x, y) : _mm512_unpacklo_pd(x, y));
    };
    for (int i = 0; i < 16; i += 4)  // r[i + j]: in lane l, column 4 l + j of rows i .. i + 3
        for (int j = 0; j < 4; ++j) r[i + j] = pairs(t[i + j / 2], t[i + j / 2 + 2], j & 1);
    for (int j = 0; j < 4; ++j) {
        __m512 low = _mm512_shuffle_f32x4(r[j], r[4 + j], 0x88), low2 = _mm512_shuffle_f32x4(r[8 + j], r[12 + j], 0x88);
        __m512 high = _mm512_shuffle_f32x4(r[j], r[4 + j], 0xdd), high2 = _mm512_shuffle_f32x4(r[8 + j], r[12 + j], 0xdd);
        _mm512_storeu_ps(to + j * to_stride, _mm512_shuffle_f32x4(low, low2, 0x88));
        _mm512_storeu_ps(to + (4 + j) * to_stride, _mm512_shuffle_f32x4(high, high2, 0x88));
        _mm512_storeu_ps(to + (8 + j) * to_stride, _mm512_shuffle_f32x4(low, low2, 0xdd));
        _mm512_storeu_ps(to + (12 + j) * to_stride, _mm512_shuffle_f32x4(high, high2, 0xdd));
    }
#elif MC_WIDTH == 8
    __m256 r[8], t[8];
    for (int i = 0; i < 8; ++i) r[i] = _mm256_loadu_ps(from + i * from_stride);
    for (int i = 0; i < 8; i += 2) {
        t[i] = _mm256_unpacklo_ps(r[i], r[i + 1]);
        t[i + 1] = _mm256_unpackhi_ps(r[i], r[i + 1]);
    }
    for (int i = 0; i < 8; i += 4)
        for (int j = 0; j < 4; ++j)
            r[i + j] = j & 1 ? _mm256_shuffle_ps(t[i + j / 2], t[i + j / 2 + 2], 0xee)
                             : _mm256_shuffle_ps(t[i + j / 2], t[i + j / 2 + 2], 0x44);
    for (int j = 0; j < 4; ++j) {
        _mm256_storeu_ps(to + j * to_stride, _mm256_permute2f128_ps(r[j], r[4 + j], 0x20));
        _mm256_storeu_ps(to + (4 + j) * to_stride, _mm256_permute2f128_ps(r[j], r[4 + j], 0x31));
    }
#else
    for (int i = 0; i < W; ++i)
        for (int j = 0; j < W; ++j) to[j * to_stride + i] = from[i * from_stride + j];
#endif
}

// The first `count` floats at p, zeros behind them.
MC_INLINE V load_part(const float* p, int count) {
    if (count >= W) return load(p);
    float buffer[W] = {};
    std::memcpy(buffer, p, sizeof(float) * size_t(count));
    return load(buffer);
}

MC_INLINE void store_part(float* p, V x, int count) {
    if (count >= W) {
        store(p, x);
        return;
    }
    float buffer[W];
    store(buffer, x);
    std::memcpy(p, buffer, sizeof(float) * size_t(count));
}

// `count` elements of any dtype from element `index`, as floats.
MC_INLINE V load_any(const void* data, int64_t index, int dtype, int count) {
    if (count < W) {
        float buffer[W] = {};
        for (int i = 0; i < count; ++i) buffer[i] = load_one(data, index + i, dtype);
        return load(buffer);
    }
    switch (dtype) {
        case BF16: return load_bf16(static_cast<const uint16_t*>(data) + index);
        case F16: return load_f16(static_cast<const uint16_t*>(data) + index);
        case I8: return load_i8(static_cast<const int8_t*>(data) + index);
        default: return load(static_cast<const float*>(data) + index);
    }
}

MC_INLINE void store_any(void* data, int64_t index, int dtype, V x, int count) {
    if (dtype == F32) {
        store_part(static_cast<float*>(data) + index, x, count);
        return;
    }
    float buffer[W];
    store(buffer, x);
    for (int i = 0; i < std::min(count, W); ++i) store_one(data, index + i, dtype, buffer[i]);
}

// Channels c .. c+count of token t of batch row b, times their scale.
MC_INLINE V read(const View& view, int64_t b, int64_t t, int64_t c, int count) {
    V x = load_any(view.data, b * view.batch + t * view.token + c, int(view.dtype), count);
    if (view.scale) x = x * (view.scale_step ? load_part(view.scale + c, count) : set1(*view.scale));
    return x;
}

MC_INLINE void write(const View& view, int64_t b, int64_t t, int64_t c, int count, V x) {
    store_any(view.data, b * view.batch + t * view.token + c, int(view.dtype), x, count);
}

// Ask the second-level cache for `count` channels from c of `tokens` tokens from t on, ahead of their use.
MC_INLINE void prefetch(const View& view, int64_t b, int64_t t, int64_t tokens, int64_t c, int64_t count) {
    if (!view.data) return;
    const int64_t bytes = int64_t(dtype_bytes(int(view.dtype)));
    const char* at = static_cast<const char*>(view.data) + (b * view.batch + t * view.token + c) * bytes;
    for (int64_t i = 0; i < tokens; ++i)
        for (int64_t line = 0; line < count * bytes; line += 64) __builtin_prefetch(at + i * view.token * bytes + line, 0, 2);
}

// The sum of the lanes, always in the same order.
MC_INLINE float lane_sum(V x) {
#if MC_WIDTH == 16
    __m256 eight = _mm256_add_ps(_mm512_castps512_ps256(x.v), _mm512_extractf32x8_ps(x.v, 1));
    __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
#elif MC_WIDTH == 8
    __m128 four = _mm_add_ps(_mm256_castps256_ps128(x.v), _mm256_extractf128_ps(x.v, 1));
#else
    return (x.v[0] + x.v[2]) + (x.v[1] + x.v[3]);
#endif
#if MC_WIDTH > 4
    __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_shuffle_ps(two, two, 1)));
#endif
}

// The lane sums of W vectors, a lane each: the bits of lane_sum, in a third of its time.
MC_INLINE V lane_sums(const V* x) {
#if MC_WIDTH == 16
    const auto halves = [](__m512 a, __m512 b) {  // eight sums of two lanes, of a and of b
        return _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x44), _mm512_shuffle_f32x4(a, b, 0xee));
    };
    __m512 t[4];  // in 128-bit lane k, four sums of four lanes of vector 4 k + j
    MC_UNROLL(4)
    for (int j = 0; j < 4; ++j) {
        const __m512 low = halves(x[j].v, x[4 + j].v), high = halves(x[8 + j].v, x[12 + j].v);
        t[j] = _mm512_add_ps(_mm512_shuffle_f32x4(low, high, 0x88), _mm512_shuffle_f32x4(low, high, 0xdd));
    }
    const auto quarters = [](__m512 a, __m512 b) {
        const __m512d x = _mm512_castps_pd(a), y = _mm512_castps_pd(b);
        return _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(x, y)), _mm512_castpd_ps(_mm512_unpackhi_pd(x, y)));
    };
    const __m512 low = quarters(t[0], t[1]), high = quarters(t[2], t[3]);
    return {_mm512_add_ps(_mm512_shuffle_ps(low, high, 0x88), _mm512_shuffle_ps(low, high, 0xdd))};
#else
    float sums[W];
    for (int i = 0; i < W; ++i) sums[i] = lane_sum(x[i]);
    return load(sums);
#endif
}

// 2^x for finite x: the nearest whole power times a polynomial of degree 5 on [-1/2, 1/2], exactly 1 at 0, relative error
// below 1.5e-7; NaN passes through.
MC_INLINE V exp2_finite(V x) {
#if MC_WIDTH < 16
    x = vmin(set1(252.0f), vmax(set1(-252.0f), x));  // scale_by_power takes no more
#endif
    V n = round_even(x), f = x - n;
    V p = fma(set1(0.00132647271f), f, set1(0.00967151264f));
    p = fma(p, f, set1(0.0555073374f));
    p = fma(p, f, set1(0.240222421f));
    p = fma(p, f, set1(0.693146978f));
    p = fma(p, f, set1(1.0f));
    return scale_by_power(p, n);
}

// The same for any x.
MC_INLINE V exp2v(V x) { return exp2_finite(vmin(set1(252.0f), vmax(set1(-252.0f), x))); }

MC_INLINE V expv(V x) { return exp2v(x * set1(1.44269504f)); }

MC_INLINE V sigmoid(V x) { return set1(1.0f) / (set1(1.0f) + expv(-x)); }

// log(1 + e^x) = max(x, 0) + log1p(e^-|x|), the logarithm as 2 atanh(t / (2 + t)): accurate in relative terms in both tails.
// slope: its derivative sigmoid(x), from the same exponential, where asked for.
MC_INLINE V softplus(V x, V* slope = nullptr) {
    V t = expv(-vabs(x));
    if (slope) *slope = where_negative(x, t, set1(1.0f)) / (set1(1.0f) + t);
    V s = t / (set1(2.0f) + t), q = s * s;
    V p = fma(set1(0.121447787f), q, set1(0.107153705f));
    p = fma(p, q, set1(0.143082984f));
    p = fma(p, q, set1(0.199994442f));
    p = fma(p, q, set1(0.333333378f));
    p = fma(p, q, set1(1.0f));
    return vmax(zero(), x) + (s + s) * p;
}

}  // namespace MC_LEVEL
