// Tiles of int4 weights for AVX-512 VNNI: nibbles enter the dot instruction as unsigned bytes; see int_tiles.h.
//
// A byte holds inputs 2j (low) and 2j + 1 (high), so activations are kept with even and odd inputs apart (Rows::split) and a
// vector of bytes gives two of nibbles by a mask and a shift. Sums of a group are exact; zero * (sum of the group's codes) is
// taken off in integers; then float(sum) * scale is added up in the order of the groups, rounded after every step. No include
// guard: see simd.h.
namespace MC_LEVEL {

#if MC_WIDTH == 16

// Scales (and zero points, where the weight has its own) of `width` outputs, group by group.
struct Factors {
    Scratch<float> scales;
    Scratch<int32_t> zeros, parts;  // parts: scratch of int4_dot
    int64_t width = TILE_COLUMNS;

    Factors(int64_t inputs, int64_t groups)
        : scales(size_t(groups * TILE_COLUMNS)), zeros(size_t(groups * TILE_COLUMNS)),
          parts(size_t(16 * 16 * std::max(groups, ceil_div(inputs, 128)))) {}
    void load(const Linear& p, int64_t first) {
        for (int64_t i = 0; i < width; i += 16) {
            pack_scales(p, first + i, scales.get() + i, width);
            if (p.zero) pack_zeros(p, first + i, zeros.get() + i, width);
        }
    }
    MC_INLINE __m512 scale(int64_t group, int64_t at) { return _mm512_loadu_ps(scales.get() + group * width + at); }
    // What the zero points of 16 outputs add to the sum of a group whose codes sum up to `sum`.
    MC_INLINE __m512i excess(const Linear& p, int64_t group, int64_t at, int32_t sum) {
        if (!p.zero) return _mm512_set1_epi32(8 * sum);
        return _mm512_mullo_epi32(_mm512_loadu_si512(zeros.get() + group * width + at), _mm512_set1_epi32(sum));
    }
};

MC_INLINE void int4_run(__m512i& acc, __m512i w, const int8_t* codes) {
    const __m512i low = _mm512_set1_epi8(15);
    dot_add(acc, _mm512_and_si512(w, low), _mm512_loadu_si512(codes));
    dot_add(acc, _mm512_and_si512(_mm512_srli_epi16(w, 4), low), _mm512_loadu_si512(codes + 64));
}

// One weight row times one row of activations: a vector of 16 partial sums for every run of `run` bytes (64, any multiple, or
// all of the row), `step` vectors apart. Weights are read in order: reading 16 rows in turns halves the speed.
static inline void int4_runs(const uint8_t* weight, int64_t row_bytes, int64_t run, const int8_t* codes, __m512i* to,
                             int64_t step) {
    int64_t k = 0;
    if (run == 64) {
        for (; k + 64 <= row_bytes; k += 64, to += step) {
            __m512i acc = _mm512_setzero_si512();
            int4_run(acc, _mm512_loadu_si512(weight + k), codes + 2 * k);
            _mm512_store_si512(to, acc);
        }
    } else if (run % 64 == 0) {
        for (; k + run <= row_bytes; to += step) {
            __m512i acc = _mm512_setzero_si512();
            for (int64_t end = k + run; k < end; k += 64) int4_run(acc, _mm512_loadu_si512(weight + k), codes + 2 * k);
            _mm512_store_si512(to, acc);
        }
    }
    if (k == row_bytes) return;
    __m512i acc = _mm512_setzero_si512();  // the last run, where it is not a whole number of vectors
    for (; k < row_bytes; k += 64) int4_run(acc, _mm512_maskz_loadu_epi8(bytes(row_bytes - k), weight + k), codes + 2 * k);
    _mm512_store_si512(to, acc);
}

// 16 outputs for a single row. SHARE: groups in 128 inputs (4 or 2), or 0 where a group is a whole number of 128s or all.
template <int SHARE>
static inline void int4_dot(const Linear& p, Rows& rows, int64_t first, Factors& factors) {
    const int64_t row_bytes = p.inputs / 2, run = SHARE ? 64 : row_bytes / p.groups, runs = ceil_div(row_bytes, run);
    __m512i* parts = reinterpret_cast<__m512i*>(factors.parts.get());
    factors.width = 16;
    factors.load(p, first);
    for (int i = 0; i < 16; ++i)
        int4_runs(static_cast<const uint8_t*>(p.weight) + std::min(first + i, p.outputs - 1) * row_bytes, row_bytes, run,
                  rows.codes.get(), parts + i, 16);
    const int32_t* sums = rows.sums.get();
    __m512 total = _mm512_setzero_ps();
    auto add = [&](int64_t group, __m512i sum) {
        if (group >= p.groups) return;
        __m512i exact = _mm512_sub_epi32(sum, factors.excess(p, group, 0, sums[group]));
        __m512 part = _mm512_mul_ps(_mm512_cvtepi32_ps(exact), factors.scale(group, 0));
        total = group == 0 ? part : _mm512_add_ps(total, part);
    };
    for (int64_t r = 0; r < runs; ++r) {
        const __m512i* acc = parts + r * 16;
        if (SHARE == 0) {
            add(r, full_sums(acc));
        } else if (SHARE == 2) {
            __m512i left, right;
            half_sums(acc, left, right);
            add(2 * r, left);
            add(2 * r + 1, right);
        } else {
            __m512i z[4];
            quarter_sums(acc, z);
            __m512i a = _mm512_shuffle_i32x4(z[0], z[1], 0x88), b = _mm512_shuffle_i32x4(z[0], z[1], 0xdd);
            __m512i c = _mm512_shuffle_i32x4(z[2], z[3], 0x88), d = _mm512_shuffle_i32x4(z[2], z[3], 0xdd);
            add(4 * r, _mm512_shuffle_i32x4(a, c, 0x88));
            add(4 * r + 1, _mm512_shuffle_i32x4(b, d, 0x88));
            add(4 * r + 2, _mm512_shuffle_i32x4(a, c, 0xdd));
            add(4 * r + 3, _mm512_shuffle_i32x4(b, d, 0xdd));
        }
    }
    finish_lanes(p, rows, 0, first, total);
}

// R rows from m by 32 outputs from `first`; totals of the groups so far wait in cache. NEXT: fetches the next 32 meanwhile.
template <int R, bool NEXT>
static inline void int4_tile(const Linear& p, Rows& rows, int64_t m, int64_t first, const uint8_t* panel, Factors& factors) {
    const int8_t* codes = rows.codes.get() + m * rows.stride;
    const int64_t stride = rows.stride, quads = p.inputs / 8 / p.groups;
    const __m512i low = _mm512_set1_epi8(15);
    const uint8_t* next = static_cast<const uint8_t*>(p.weight) + (first + TILE_COLUMNS) * (p.inputs / 2);
    alignas(64) float total[R][32];
    for (int64_t g = 0; g < p.groups; ++g) {
        __m512i acc[R][2];
        MC_UNROLL(12)
        for (int r = 0; r < R; ++r) acc[r][0] = acc[r][1] = _mm512_setzero_si512();
        for (int64_t q = g * quads; q < (g + 1) * quads; ++q) {
            if (NEXT) {
                _mm_prefetch(next + q * 128, _MM_HINT_T1);
                _mm_prefetch(next + q * 128 + 64, _MM_HINT_T1);
            }
            const int8_t* at = codes + (q >> 4) * 128 + (q & 15) * 4;
            __m512i left = _mm512_load_si512(panel + q * 128), right = _mm512_load_si512(panel + q * 128 + 64);
            __m512i left_low = _mm512_and_si512(left, low), right_low = _mm512_and_si512(right, low);
            MC_UNROLL(12)
            for (int r = 0; r < R; ++r) {
                dot_add_quad(acc[r][0], left_low, at + r * stride);
                dot_add_quad(acc[r][1], right_low, at + r * stride);
            }
            __m512i left_high = _mm512_and_si512(_mm512_srli_epi16(left, 4), low);
            __m512i right_high = _mm512_and_si512(_mm512_srli_epi16(right, 4), low);
            MC_UNROLL(12)
            for (int r = 0; r < R; ++r) {
                dot_add_quad(acc[r][0], left_high, at + r * stride + 64);
                dot_add_quad(acc[r][1], right_high, at + r * stride + 64);
            }
        }
        MC_UNROLL(2)
        for (int half = 0; half < 2; ++half) {
            __m512 scale = factors.scale(g, 16 * half);
            MC_UNROLL(12)
            for (int r = 0; r < R; ++r) {
                __m512i excess = factors.excess(p, g, 16 * half, rows.sums[size_t((m + r) * p.groups + g)]);
                __m512 part = _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_sub_epi32(acc[r][half], excess)), scale);
                float* to = total[r] + 16 * half;
                _mm512_store_ps(to, g == 0 ? part : _mm512_add_ps(_mm512_load_ps(to), part));
            }
        }
    }
    for (int half = 0; half < 2 && first + 16 * half < p.outputs; ++half)
        for (int r = 0; r < R; ++r) finish_lanes(p, rows, m + r, first + 16 * half, _mm512_load_ps(total[r] + 16 * half));
}

static inline void int4_rest(const Linear& p, Rows& rows, int64_t m, int64_t count, int64_t first, const uint8_t* panel,
                             Factors& factors) {
    switch (count) {
        case 1: int4_tile<1, true>(p, rows, m, first, panel, factors); break;
        case 2: int4_tile<2, true>(p, rows, m, first, panel, factors); break;
        case 3: int4_tile<3, true>(p, rows, m, first, panel, factors); break;
        case 4: int4_tile<4, true>(p, rows, m, first, panel, factors); break;
        case 5: int4_tile<5, true>(p, rows, m, first, panel, factors); break;
        case 6: int4_tile<6, true>(p, rows, m, first, panel, factors); break;
        case 7: int4_tile<7, true>(p, rows, m, first, panel, factors); break;
        case 8: int4_tile<8, true>(p, rows, m, first, panel, factors); break;
        case 9: int4_tile<9, true>(p, rows, m, first, panel, factors); break;
        case 10: int4_tile<10, true>(p, rows, m, first, panel, factors); break;
        default: int4_tile<11, true>(p, rows, m, first, panel, factors);
    }
}

#endif

}  // namespace MC_LEVEL
