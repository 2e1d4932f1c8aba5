// Tiles of int8 weights of which `keep` of every `of` inputs are stored, for the level under which this file is included; see
// int_tiles.h for dense ones.
//
// A tile of 16 outputs is a run of blocks. A block is as many quads of inputs as it takes for whole groups: 1 where `of` is 4, 2
// where it is 8. It holds, for each of its quads, a mask of 64 bits (bit 4 o + b is byte b of output o of the dense quad), then
// the stored bytes of all its quads in that order, 16 * keep a group: blocks of a weight are of one size, and a tile is one
// stream. vpexpandb (AVX-512 VBMI2) puts the bytes of a quad where its mask wants them. Up to twelve rows are multiplied
// from there; more rows, other patterns and processors without it expand a tile in cache and go the way of dense ones. Products are exact and
// the epilogue is the same, so the result is the dense one's, bit for bit.
//
// The last tile is filled up with outputs that store zeros; 64 bytes behind it may be read. No include guard: see simd.h.
namespace MC_LEVEL {

constexpr int MAX_BLOCK = 64;  // quads: the largest `of` is odd and below 64

// How the tiles of a weight lie. size: bytes of a value.
struct NmLayout {
    int64_t size, quads, block, block_bytes, tile_bytes;  // quads: of a row, the last block's filled up or not; block: in quads

    explicit NmLayout(const Linear& p, int64_t size = 1) : size(size), quads(ceil_div(p.inputs, 4)) {
        block = p.of % 4 == 0 ? p.of / 4 : p.of % 2 == 0 ? p.of / 2 : p.of;
        block_bytes = block * 8 + TILE_OUTPUTS * (4 * block / p.of) * p.keep * size;
        tile_bytes = ceil_div(quads, block) * block_bytes;
    }
    const uint8_t* tile(const Linear& p, int64_t first) const {
        return static_cast<const uint8_t*>(p.weight) + first / TILE_OUTPUTS * tile_bytes;
    }
};

MC_INLINE uint64_t mask_at(const uint8_t* at) {
    uint64_t mask;
    std::memcpy(&mask, at, 8);
    return mask;
}

// put(quad, place in it, byte) for every stored byte of a tile.
template <typename Put>
static inline void each_stored(const NmLayout& at, const uint8_t* tile, Put put) {
    for (int64_t q = 0; q < at.quads; q += at.block, tile += at.block_bytes) {
        const uint8_t* value = tile + 8 * at.block;
        for (int64_t i = 0; i < std::min(at.block, at.quads - q); ++i)
            for (uint64_t mask = mask_at(tile + 8 * i); mask; mask &= mask - 1) put(q + i, __builtin_ctzll(mask), *value++);
    }
}

#if MC_WIDTH == 8
// For every mask of 8 places the shuffle that puts stored bytes, one after the other, where it has bits, and zeros elsewhere.
struct Spread {
    uint8_t of_mask[256][8];
    constexpr Spread() : of_mask() {
        for (int mask = 0; mask < 256; ++mask)
            for (int place = 0, next = 0; place < 8; ++place) of_mask[mask][place] = mask >> place & 1 ? uint8_t(next++) : 0x80;
    }
};
constexpr Spread SPREAD;

// expand_rows of rows that are whole quads: two outputs' four bytes at a time.
static inline void expand_quads(const Linear& p, const NmLayout& at, const uint8_t* tile, uint8_t* to) {
    for (int64_t q = 0; q < at.quads; q += at.block, tile += at.block_bytes) {
        const uint8_t* value = tile + 8 * at.block;
        for (int64_t i = 0; i < std::min(at.block, at.quads - q); ++i) {
            uint64_t mask = mask_at(tile + 8 * i);
            for (uint8_t* row = to + 4 * (q + i); row < to + TILE_OUTPUTS * p.inputs; row += 2 * p.inputs, mask >>= 8) {
                const __m128i stored = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(value));
                const __m128i spread = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(SPREAD.of_mask[mask & 255]));
                const uint64_t pair = uint64_t(_mm_cvtsi128_si64(_mm_shuffle_epi8(stored, spread)));
                const uint32_t low = uint32_t(pair), high = uint32_t(pair >> 32);
                std::memcpy(row, &low, 4);
                std::memcpy(row + p.inputs, &high, 4);
                value += __builtin_popcountll(mask & 255);
            }
        }
    }
}
#endif

// The 16 outputs from `first` as rows of p.inputs bytes, in `to`.
static inline void expand_rows(const Linear& p, int64_t first, uint8_t* to) {
    const NmLayout at(p);
#if MC_WIDTH == 8
    if (p.inputs % 4 == 0) return expand_quads(p, at, at.tile(p, first), to);
#endif
    std::memset(to, 0, size_t(TILE_OUTPUTS * p.inputs));
    each_stored(at, at.tile(p, first), [&](int64_t q, int place, uint8_t byte) MC_LAMBDA {
        if (4 * q + place % 4 < p.inputs) to[place / 4 * p.inputs + 4 * q + place % 4] = byte;
    });
}

// p with those outputs as a dense weight: what lies in front of `expanded` is not there, and no one looks.
static inline Linear dense_rows(Linear p, int64_t first, const uint8_t* expanded) {
    p.weight = reinterpret_cast<const void*>(reinterpret_cast<uintptr_t>(expanded) - uintptr_t(first * p.inputs));
    p.tiled = 0;
    return p;
}

#if MC_WIDTH == 16

// The mask's bytes from the front of `packed`, zeros between them.
MC_INLINE __m512i expand_bytes(__m512i packed, uint64_t mask) {
    __m512i wide;
    asm("vpexpandb %1, %0%{%2%}%{z%}" : "=v"(wide) : "v"(packed), "Yk"(mask));
    return wide;
}

// The first N bytes of a vector.
template <int N>
MC_INLINE __m512i load_bytes(const uint8_t* at) {
    if constexpr (N == 16) return _mm512_castsi128_si512(_mm_loadu_si128(reinterpret_cast<const __m128i*>(at)));
    else if constexpr (N == 32) return _mm512_castsi256_si512(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(at)));
    else return _mm512_loadu_si512(at);
}

// The tile from `first` as a dense one, in `to`.
static inline void expand_tile(const Linear& p, int64_t first, uint8_t* to) {
    const NmLayout at(p);
    const uint8_t* tile = at.tile(p, first);
    if (!expands_bytes()) {
        std::memset(to, 0, size_t(at.quads * 64));
        each_stored(at, tile, [&](int64_t q, int place, uint8_t byte) MC_LAMBDA { to[q * 64 + place] = byte; });
        return;
    }
    for (int64_t q = 0; q < at.quads; q += at.block, tile += at.block_bytes) {
        const uint8_t* value = tile + 8 * at.block;
        for (int64_t i = 0; i < at.block_bytes; i += 64) _mm_prefetch(tile + i + AHEAD, _MM_HINT_T1);
        for (int64_t i = 0; i < std::min(at.block, at.quads - q); ++i) {
            const uint64_t mask = mask_at(tile + 8 * i);
            _mm512_store_si512(to + (q + i) * 64, expand_bytes(_mm512_loadu_si512(value), mask));
            value += __builtin_popcountll(mask);
        }
    }
}

// R rows from m by the tile from `first`, of blocks of P quads with K values a group: see int8_tile.
// Inlined into what calls it, GCC 12 keeps the accumulators in memory.
template <int R, int P, int K>
static __attribute__((noinline)) void nm_tile(const Linear& p, Rows& rows, int64_t m, int64_t first) {
    constexpr int U = turns(R), B = std::max(1, U / P);  // accumulators that take turns, blocks a round
    constexpr int64_t BLOCK = 8 * P + 16 * K;
    const NmLayout at(p);
    const int8_t* codes = rows.codes.get() + m * rows.stride;
    const int64_t stride = rows.stride, blocks = at.quads / P;
    const uint8_t* tile = at.tile(p, first);
    const __m512i flip = _mm512_set1_epi8(char(0x80));
    __m512i acc[U][R];
    MC_UNROLL(4)
    for (int u = 0; u < U; ++u) {
        MC_UNROLL(12)
        for (int r = 0; r < R; ++r)
            acc[u][r] = _mm512_set1_epi32(u ? 0 : int32_t(-128u * uint32_t(rows.sums[size_t(m + r)])));
    }
    auto multiply = [&](const uint8_t* from, const int8_t* by, int turn) MC_LAMBDA {
        const uint8_t* value = from + 8 * P;
        MC_UNROLL(2)
        for (int i = 0; i < P; ++i) {
            const uint64_t mask = mask_at(from + 8 * i);
            const __m512i w = _mm512_xor_si512(expand_bytes(load_bytes<16 * std::min(K, 4)>(value), mask), flip);
            if (i + 1 < P) value += __builtin_popcountll(mask);
            MC_UNROLL(12)
            for (int r = 0; r < R; ++r) dot_add(acc[(turn + i) % U][r], w, quad_of(by + r * stride + 4 * i));
        }
    };
    __builtin_prefetch(static_cast<const float*>(p.scale) + first + 4 * TILE_OUTPUTS, 0, 3);
    int64_t b = 0;
    for (; b + B <= blocks; b += B, tile += B * BLOCK, codes += B * P * 4) {
        MC_UNROLL(4)
        for (int64_t i = 0; i < B * BLOCK; i += 64) _mm_prefetch(tile + i + AHEAD, _MM_HINT_T1);
        MC_UNROLL(4)
        for (int j = 0; j < B; ++j) multiply(tile + j * BLOCK, codes + j * P * 4, j * P);
    }
    for (; b < blocks; ++b, tile += BLOCK, codes += P * 4) multiply(tile, codes, 0);
    const __m512 scale = _mm512_maskz_loadu_ps(lanes(p.outputs - first), static_cast<const float*>(p.scale) + first);
    MC_UNROLL(12)
    for (int r = 0; r < R; ++r) {
        MC_UNROLL(4)
        for (int u = 1; u < U; ++u) acc[0][r] = _mm512_add_epi32(acc[0][r], acc[u][r]);
        finish_lanes(p, rows, m + r, first, _mm512_mul_ps(_mm512_cvtepi32_ps(acc[0][r]), scale));
    }
}

// `count` rows, at most R.
template <int P, int K, int R = 12>
static inline bool nm_rows(const Linear& p, Rows& rows, int64_t m, int64_t count, int64_t first) {
    if (count == R) nm_tile<R, P, K>(p, rows, m, first);
    else if constexpr (R > 1) return nm_rows<P, K, R - 1>(p, rows, m, count, first);
    else return false;
    return true;
}

// `count` rows by a tile without expanding it in cache, where the pattern and the number of rows have a loop for that.
static inline bool nm_few_rows(const Linear& p, Rows& rows, int64_t m, int64_t count, int64_t first) {
    if (!expands_bytes()) return false;
    if (p.of == 4 && p.keep == 1) return nm_rows<1, 1>(p, rows, m, count, first);
    if (p.of == 4 && p.keep == 2) return nm_rows<1, 2>(p, rows, m, count, first);
    if (p.of == 8 && p.keep == 1) return nm_rows<2, 1>(p, rows, m, count, first);
    if (p.of == 8 && p.keep == 2) return nm_rows<2, 2>(p, rows, m, count, first);
    if (p.of == 8 && p.keep == 4) return nm_rows<2, 4>(p, rows, m, count, first);
    return false;
}

#endif

}  // namespace MC_LEVEL
