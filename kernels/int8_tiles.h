// Tiles of int8 weights for AVX-512 VNNI: see int_tiles.h. No include guard: see simd.h.
namespace MC_LEVEL {

#if MC_WIDTH == 16

// Accumulators of one sum: with few sums at a time several take turns, so that no dot instruction waits for the last one.
constexpr int turns(int sums) { return sums >= 4 ? 1 : sums >= 2 ? 2 : 4; }

// R rows from m by T tiles of 16 outputs from `first`. FETCH: the tiles come from memory; ask for what lies `ahead` bytes further.
template <int R, int T, bool FETCH>
static inline void int8_tile(const Linear& p, Rows& rows, int64_t m, int64_t first, const uint8_t* const* tile,
                             int64_t ahead) {
    constexpr int U = turns(R * T);
    const int8_t* codes = rows.codes.get() + m * rows.stride;
    const int64_t stride = rows.stride, quads = ceil_div(p.inputs, 4);
    const __m512i flip = _mm512_set1_epi8(char(0x80));
    __m512i acc[U][R][T];
    MC_UNROLL(4)
    for (int u = 0; u < U; ++u) {
        MC_UNROLL(12)
        for (int r = 0; r < R; ++r) {
            MC_UNROLL(2)
            for (int t = 0; t < T; ++t)
                acc[u][r][t] = _mm512_set1_epi32(u ? 0 : int32_t(-128u * uint32_t(rows.sums[size_t(m + r)])));
        }
    }
    auto step = [&](int64_t q, int u) MC_LAMBDA {
        __m512i w[T];
        MC_UNROLL(2)
        for (int t = 0; t < T; ++t) {
            if (FETCH) _mm_prefetch(tile[t] + q * 64 + ahead, _MM_HINT_T1);
            w[t] = _mm512_xor_si512(_mm512_loadu_si512(tile[t] + q * 64), flip);
        }
        MC_UNROLL(12)
        for (int r = 0; r < R; ++r) {
            const __m512i quad = quad_of(codes + r * stride + q * 4);
            MC_UNROLL(2)
            for (int t = 0; t < T; ++t) dot_add(acc[u][r][t], w[t], quad);
        }
    };
    if (FETCH)  // the scales of the next tiles, a line each
        __builtin_prefetch(static_cast<const float*>(p.scale) + first + 4 * TILE_OUTPUTS, 0, 3);
    int64_t q = 0;
    for (; q + U <= quads; q += U) {
        MC_UNROLL(4)
        for (int u = 0; u < U; ++u) step(q + u, u);
    }
    for (; q < quads; ++q) step(q, 0);
    MC_UNROLL(2)
    for (int t = 0; t < T; ++t) {
        const int64_t at = first + TILE_OUTPUTS * t;
        if (at >= p.outputs) return;
        const __m512 scale = _mm512_maskz_loadu_ps(lanes(p.outputs - at), static_cast<const float*>(p.scale) + at);
        MC_UNROLL(12)
        for (int r = 0; r < R; ++r) {
            MC_UNROLL(4)
            for (int u = 1; u < U; ++u) acc[0][r][t] = _mm512_add_epi32(acc[0][r][t], acc[u][r][t]);
            finish_lanes(p, rows, m + r, at, _mm512_mul_ps(_mm512_cvtepi32_ps(acc[0][r][t]), scale));
        }
    }
}

#endif

}  // namespace MC_LEVEL
