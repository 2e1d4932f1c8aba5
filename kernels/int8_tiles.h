// Tiles of int8 weights for AVX-512 VNNI: see int_tiles.h. No include guard: see simd.h.
namespace MC_LEVEL {

#if MC_WIDTH == 16

constexpr int64_t AHEAD = 2048;  // bytes of weights on their way

// 16 outputs from `first` for R rows from m. Each weight row is read in order, once.
template <int R>
static inline void int8_dot(const Linear& p, Rows& rows, int64_t m, int64_t first) {
    const int8_t* codes = rows.codes.get() + m * rows.stride;
    const int64_t stride = rows.stride, whole = p.inputs / 64 * 64;
    const __m512i flip = _mm512_set1_epi8(char(0x80));
    alignas(64) __m512i parts[R][16];
    for (int i = 0; i < 16; ++i) {
        const uint8_t* weight = static_cast<const uint8_t*>(p.weight) + std::min(first + i, p.outputs - 1) * p.inputs;
        __m512i acc[R];
        MC_UNROLL(2)
        for (int r = 0; r < R; ++r) acc[r] = _mm512_setzero_si512();
        for (int64_t k = 0; k < whole; k += 64) {
            if (R > 1) _mm_prefetch(weight + k + AHEAD, _MM_HINT_T0);  // a single row is fetched in time without
            __m512i w = _mm512_xor_si512(_mm512_loadu_si512(weight + k), flip);
            MC_UNROLL(2)
            for (int r = 0; r < R; ++r) dot_add(acc[r], w, _mm512_loadu_si512(codes + r * stride + k));
        }
        if (whole < p.inputs) {
            __m512i w = _mm512_xor_si512(_mm512_maskz_loadu_epi8(bytes(p.inputs - whole), weight + whole), flip);
            MC_UNROLL(2)
            for (int r = 0; r < R; ++r) dot_add(acc[r], w, _mm512_loadu_si512(codes + r * stride + whole));
        }
        MC_UNROLL(2)
        for (int r = 0; r < R; ++r) parts[r][i] = acc[r];
    }
    __m512 scale = _mm512_maskz_loadu_ps(lanes(p.outputs - first), static_cast<const float*>(p.scale) + first);
    for (int r = 0; r < R; ++r) {
        __m512i excess = _mm512_set1_epi32(int32_t(128u * uint32_t(rows.sums[size_t(m + r)])));
        __m512i sum = _mm512_sub_epi32(full_sums(parts[r]), excess);
        finish_lanes(p, rows, m + r, first, _mm512_mul_ps(_mm512_cvtepi32_ps(sum), scale));
    }
}

// R rows from m by 32 outputs from `first`, whose quads are in `panel`. NEXT: fetches the weights of the next 32 meanwhile.
template <int R, bool NEXT>
static inline void int8_tile(const Linear& p, Rows& rows, int64_t m, int64_t first, const uint8_t* panel) {
    const uint8_t* next = static_cast<const uint8_t*>(p.weight) + (first + TILE_COLUMNS) * p.inputs;
    const int8_t* codes = rows.codes.get() + m * rows.stride;
    __m512i acc[R][2];
    MC_UNROLL(12)
    for (int r = 0; r < R; ++r)
        acc[r][0] = acc[r][1] = _mm512_set1_epi32(int32_t(-128u * uint32_t(rows.sums[size_t(m + r)])));
    int64_t stride = rows.stride;
    for (int64_t q = 0; q < p.inputs; q += 4) {
        if (NEXT) {
            _mm_prefetch(next + q * 32, _MM_HINT_T1);
            _mm_prefetch(next + q * 32 + 64, _MM_HINT_T1);
        }
        __m512i left = _mm512_load_si512(panel + q * 32), right = _mm512_load_si512(panel + q * 32 + 64);
        MC_UNROLL(12)
        for (int r = 0; r < R; ++r) {
            dot_add_quad(acc[r][0], left, codes + r * stride + q);
            dot_add_quad(acc[r][1], right, codes + r * stride + q);
        }
    }
    MC_UNROLL(2)
    for (int half = 0; half < 2; ++half) {
        int64_t at = first + 16 * half;
        if (at >= p.outputs) return;
        __m512 scale = _mm512_maskz_loadu_ps(lanes(p.outputs - at), static_cast<const float*>(p.scale) + at);
        MC_UNROLL(12)
        for (int r = 0; r < R; ++r) finish_lanes(p, rows, m + r, at, _mm512_mul_ps(_mm512_cvtepi32_ps(acc[r][half]), scale));
    }
}

static inline void int8_rest(const Linear& p, Rows& rows, int64_t m, int64_t count, int64_t first, const uint8_t* panel) {
    switch (count) {
        case 1: int8_tile<1, true>(p, rows, m, first, panel); break;
        case 2: int8_tile<2, true>(p, rows, m, first, panel); break;
        case 3: int8_tile<3, true>(p, rows, m, first, panel); break;
        case 4: int8_tile<4, true>(p, rows, m, first, panel); break;
        case 5: int8_tile<5, true>(p, rows, m, first, panel); break;
        case 6: int8_tile<6, true>(p, rows, m, first, panel); break;
        case 7: int8_tile<7, true>(p, rows, m, first, panel); break;
        case 8: int8_tile<8, true>(p, rows, m, first, panel); break;
        case 9: int8_tile<9, true>(p, rows, m, first, panel); break;
        case 10: int8_tile<10, true>(p, rows, m, first, panel); break;
        default: int8_tile<11, true>(p, rows, m, first, panel);
    }
}

#endif

}  // namespace MC_LEVEL
