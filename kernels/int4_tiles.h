// Tiles of int4 weights for AVX-512 VNNI: nibbles enter the dot instruction as unsigned bytes; see int_tiles.h.
//
// A byte holds inputs 2j (low) and 2j + 1 (high), so activations are kept with even and odd inputs apart (Rows::split) and a
// vector of bytes gives two of nibbles by a mask and a shift. Sums of a group are exact; zero * (sum of the group's codes) is
// taken off in integers; then float(sum) * scale is added up in the order of the groups, rounded after every step. No include
// guard: see simd.h.
namespace MC_LEVEL {

#if MC_WIDTH == 16

// Scales (and zero points, where the weight has its own) of two tiles: [tile][group][16].
struct Factors {
    Scratch<float> scales;
    Scratch<int32_t> zeros;
    const int64_t room;  // of a tile

    explicit Factors(int64_t groups)
        : scales(size_t(2 * groups * TILE_OUTPUTS)), zeros(size_t(2 * groups * TILE_OUTPUTS)), room(groups * TILE_OUTPUTS) {}
    void load(const Linear& p, int64_t first, int tiles) {
        for (int t = 0; t < tiles; ++t) {
            pack_scales(p, first + t * TILE_OUTPUTS, scales.get() + t * room);
            if (p.zero) pack_zeros(p, first + t * TILE_OUTPUTS, zeros.get() + t * room);
        }
    }
    MC_INLINE __m512 scale(int64_t group, int tile) { return _mm512_load_ps(scales.get() + tile * room + group * 16); }
    // What the zero points of a tile add to the sum of a group whose codes sum up to `sum`.
    MC_INLINE __m512i excess(const Linear& p, int64_t group, int tile, int32_t sum) {
        if (!p.zero) return _mm512_set1_epi32(8 * sum);
        return _mm512_mullo_epi32(_mm512_load_si512(zeros.get() + tile * room + group * 16), _mm512_set1_epi32(sum));
    }
};

// R rows from m by T tiles of 16 outputs from `first`. Few sums: low and high nibbles are summed apart, so that no dot
// instruction waits for the last one. Many: totals of the groups so far wait in cache. FETCH: see int8_tile.
template <int R, int T, bool FETCH>
static inline void int4_tile(const Linear& p, Rows& rows, int64_t m, int64_t first, const uint8_t* const* tile,
                             int64_t ahead, Factors& factors) {
    constexpr int U = R * T <= 4 ? 2 : 1;
    const int8_t* codes = rows.codes.get() + m * rows.stride;
    const int64_t stride = rows.stride, quads = p.inputs / 8 / p.groups;
    const __m512i low = _mm512_set1_epi8(15);
    __m512 total[R][T];
    for (int64_t g = 0; g < p.groups; ++g) {
        __m512i acc[U][R][T];
        MC_UNROLL(2)
        for (int u = 0; u < U; ++u) {
            MC_UNROLL(12)
            for (int r = 0; r < R; ++r) {
                MC_UNROLL(2)
                for (int t = 0; t < T; ++t) acc[u][r][t] = _mm512_setzero_si512();
            }
        }
        for (int64_t q = g * quads; q < (g + 1) * quads; ++q) {
            const int8_t* at = codes + (q >> 4) * 128 + (q & 15) * 4;
            __m512i w[T], part[T];
            MC_UNROLL(2)
            for (int t = 0; t < T; ++t) {
                if (FETCH) _mm_prefetch(tile[t] + q * 64 + ahead, _MM_HINT_T1);
                w[t] = _mm512_loadu_si512(tile[t] + q * 64);
                part[t] = _mm512_and_si512(w[t], low);
            }
            MC_UNROLL(12)
            for (int r = 0; r < R; ++r) {
                const __m512i quad = quad_of(at + r * stride);
                MC_UNROLL(2)
                for (int t = 0; t < T; ++t) dot_add(acc[0][r][t], part[t], quad);
            }
            MC_UNROLL(2)
            for (int t = 0; t < T; ++t) part[t] = _mm512_and_si512(_mm512_srli_epi16(w[t], 4), low);
            MC_UNROLL(12)
            for (int r = 0; r < R; ++r) {
                const __m512i quad = quad_of(at + r * stride + 64);
                MC_UNROLL(2)
                for (int t = 0; t < T; ++t) dot_add(acc[U - 1][r][t], part[t], quad);
            }
        }
        MC_UNROLL(2)
        for (int t = 0; t < T; ++t) {
            const __m512 scale = factors.scale(g, t);
            MC_UNROLL(12)
            for (int r = 0; r < R; ++r) {
                __m512i sum = acc[0][r][t];
                if (U == 2) sum = _mm512_add_epi32(sum, acc[1][r][t]);
                sum = _mm512_sub_epi32(sum, factors.excess(p, g, t, rows.sums[size_t((m + r) * p.groups + g)]));
                const __m512 part = _mm512_mul_ps(_mm512_cvtepi32_ps(sum), scale);
                total[r][t] = g == 0 ? part : _mm512_add_ps(total[r][t], part);
            }
        }
    }
    for (int t = 0; t < T && first + TILE_OUTPUTS * t < p.outputs; ++t)
        for (int r = 0; r < R; ++r) finish_lanes(p, rows, m + r, first + TILE_OUTPUTS * t, total[r][t]);
}

#endif

}  // namespace MC_LEVEL
