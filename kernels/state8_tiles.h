// The int8 state of int8_state.py: codes to floats and back, for the level under which this file is included, behind simd.h.
//
// Every operation is one of IEEE arithmetic in the reference's order, none fused: the same floats give the same codes on every
// level. Legend: E channels, N d_state, W floats in a vector.
namespace MC_LEVEL {
namespace {

constexpr uint32_t STEP_PLACE = 0xD1B54A33u, CHANNEL_PLACE = 0x8CB92BA7u, STATE_PLACE = 0xABC98389u;
constexpr float LARGEST_CODE = 127.0f, TINY_STATE = 1e-30f;

// W unsigned integers of 32 bits.
#if MC_WIDTH == 16
struct Bits {
    __m512i v;
};
MC_INLINE Bits bits1(uint32_t x) { return {_mm512_set1_epi32(int(x))}; }
MC_INLINE Bits load_bits(const uint32_t* p) { return {_mm512_loadu_si512(p)}; }
MC_INLINE Bits operator+(Bits a, Bits b) { return {_mm512_add_epi32(a.v, b.v)}; }
MC_INLINE Bits vmax(Bits a, Bits b) { return {_mm512_max_epi32(a.v, b.v)}; }  // for numbers below 2^31
MC_INLINE Bits magnitude(V x) { return {_mm512_castps_si512(vabs(x).v)}; }
MC_INLINE V as_floats(Bits x) { return {_mm512_castsi512_ps(x.v)}; }
MC_INLINE V fraction(Bits x) { return V{_mm512_cvtepi32_ps(_mm512_srli_epi32(x.v, 8))} * set1(0x1p-24f); }
MC_INLINE V floorv(V x) { return {_mm512_roundscale_ps(x.v, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC)}; }
MC_INLINE void store_i8(int8_t* p, V x) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(x.v)));
}
#elif MC_WIDTH == 8
struct Bits {
    __m256i v;
};
MC_INLINE Bits bits1(uint32_t x) { return {_mm256_set1_epi32(int(x))}; }
MC_INLINE Bits load_bits(const uint32_t* p) { return {_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))}; }
MC_INLINE Bits operator+(Bits a, Bits b) { return {_mm256_add_epi32(a.v, b.v)}; }
MC_INLINE Bits vmax(Bits a, Bits b) { return {_mm256_max_epi32(a.v, b.v)}; }
MC_INLINE Bits magnitude(V x) { return {_mm256_castps_si256(vabs(x).v)}; }
MC_INLINE V as_floats(Bits x) { return {_mm256_castsi256_ps(x.v)}; }
MC_INLINE V fraction(Bits x) { return V{_mm256_cvtepi32_ps(_mm256_srli_epi32(x.v, 8))} * set1(0x1p-24f); }
MC_INLINE V floorv(V x) { return {_mm256_floor_ps(x.v)}; }
MC_INLINE void store_i8(int8_t* p, V x) {
    const __m256i wide = _mm256_cvtps_epi32(x.v);
    const __m128i half = _mm_packs_epi32(_mm256_castsi256_si128(wide), _mm256_extracti128_si256(wide, 1));
    _mm_storel_epi64(reinterpret_cast<__m128i*>(p), _mm_packs_epi16(half, half));
}
#else
typedef uint32_t Unsigned __attribute__((vector_size(16)));
struct Bits {
    Unsigned v;
};
MC_INLINE Bits bits1(uint32_t x) { return {Unsigned{x, x, x, x}}; }
MC_INLINE Bits load_bits(const uint32_t* p) { return {Unsigned{p[0], p[1], p[2], p[3]}}; }
MC_INLINE Bits operator+(Bits a, Bits b) { return {a.v + b.v}; }
MC_INLINE Bits vmax(Bits a, Bits b) { return {a.v > b.v ? a.v : b.v}; }
MC_INLINE Bits magnitude(V x) { return {Unsigned(vabs(x).v)}; }
MC_INLINE V as_floats(Bits x) { return {Floats(x.v)}; }
MC_INLINE V fraction(Bits x) { return V{__builtin_convertvector(Ints(x.v >> 8), Floats)} * set1(0x1p-24f); }
MC_INLINE V floorv(V x) {  // for |x| < 2^22
    const V near = round_even(x);
    return {near.v > x.v ? near.v - 1.0f : near.v};
}
MC_INLINE void store_i8(int8_t* p, V x) {
    for (int i = 0; i < W; ++i) p[i] = int8_t(x.v[i]);
}
#endif

// Where the Weyl sequence stands for the first state of a channel.
MC_INLINE uint32_t place_of(int64_t step, int64_t channel) {
    return uint32_t(step) * STEP_PLACE + uint32_t(channel) * CHANNEL_PLACE;
}

// place, place + step, place + 2 step ... in the lanes.
MC_INLINE Bits places(uint32_t place, uint32_t step) {
    uint32_t lanes[W];
    for (int i = 0; i < W; ++i) lanes[i] = place + uint32_t(i) * step;
    return load_bits(lanes);
}

// The scale of states whose largest magnitude has these bits; NaN where that is no finite number: bits of NaN and infinity
// are larger than those of any other.
MC_INLINE V scale_of(Bits largest) {
    const V m = as_floats(largest);
    return vmax(set1(TINY_STATE), m) / set1(LARGEST_CODE) + (m - m);
}

// The codes of h, as floats. NaN gives -127.
MC_INLINE V codes_of(V h, V inverse, Bits place) {
    const V code = floorv(h * inverse + fraction(place));
    return vmin(vmax(code, set1(-LARGEST_CODE)), set1(LARGEST_CODE));
}

MC_INLINE void store_codes(int8_t* p, V codes, int count) {
    if (count >= W) return store_i8(p, codes);
    int8_t buffer[W];
    store_i8(buffer, codes);
    std::memcpy(p, buffer, size_t(count));
}

// -- Mamba-1: `count` channels of codes [N][E] from the first of them on, as [N][W] floats; padding lanes are zero ----------

MC_INLINE void dequantize_channels(const int8_t* codes, int64_t E, int64_t N, const float* scale, int count, float* to) {
    const V s = load_part(scale, count);
    for (int64_t n = 0; n < N; ++n) store(to + n * W, load_any(codes + n * E, 0, I8, count) * s);
}

MC_INLINE void quantize_channels(const float* from, int64_t E, int64_t N, uint32_t place, int count, int8_t* codes,
                                 float* scale) {
    Bits largest = bits1(0);
    for (int64_t n = 0; n < N; ++n) largest = vmax(largest, magnitude(load(from + n * W)));
    const V s = scale_of(largest), inverse = set1(1.0f) / s;
    Bits at = places(place, CHANNEL_PLACE);
    for (int64_t n = 0; n < N; ++n, at = at + bits1(STATE_PLACE))
        store_codes(codes + n * E, codes_of(load(from + n * W), inverse, at), count);
    store_part(scale, s, count);
}

// -- Mamba-2: `rows` of codes [N] each, as rows of `padded` floats; what lies behind the N is zero ---------------------------

MC_INLINE void dequantize_rows(const int8_t* codes, int64_t rows, int64_t N, int64_t padded, const float* scale, float* to) {
    for (int64_t r = 0; r < rows; ++r)
        for (int64_t n = 0; n < padded; n += W) {
            const int count = int(std::min<int64_t>(W, N - n));
            store(to + r * padded + n, load_any(codes + r * N + n, 0, I8, count) * set1(scale[r]));
        }
}

MC_INLINE void quantize_rows(const float* from, int64_t rows, int64_t N, int64_t padded, uint32_t place, int8_t* codes,
                             float* scale) {
    for (int64_t r = 0; r < rows; ++r, place += CHANNEL_PLACE) {
        const float* h = from + r * padded;
        Bits largest = bits1(0);
        for (int64_t n = 0; n < padded; n += W) largest = vmax(largest, magnitude(load(h + n)));
        float lanes[W];
        store(lanes, as_floats(largest));
        uint32_t top = 0, lane;
        for (int i = 0; i < W; ++i) std::memcpy(&lane, lanes + i, sizeof lane), top = std::max(top, lane);
        const V s = scale_of(bits1(top)), inverse = set1(1.0f) / s;
        store_part(scale + r, s, 1);
        Bits at = places(place, STATE_PLACE);
        for (int64_t n = 0; n < padded; n += W, at = at + bits1(STATE_PLACE * uint32_t(W)))
            store_codes(codes + r * N + n, codes_of(load(h + n), inverse, at), int(std::min<int64_t>(W, N - n)));
    }
}

}  // namespace
}  // namespace MC_LEVEL
