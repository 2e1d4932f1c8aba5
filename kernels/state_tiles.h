// The recurrences of Mamba-1 and Mamba-2, a few states at a time, for the level under which this file is included:
// selective_scan, ssd_scan and mixer_step share it. No include guard: see simd.h.
namespace MC_LEVEL {
namespace {

constexpr int64_t TILE = 16;  // tokens between two checkpoints
constexpr float LOG2E = 1.44269504f;

// -- Mamba-1: a vector holds W neighbouring channels, the N states of those channels are N vectors ---------------------

// [count channels, N] in memory -> [N][W] vectors; padding lanes are zero.
MC_INLINE void gather(const float* from, int64_t N, int count, float* to) {
    int64_t n = 0;
    if (count == W)
        for (; n + W <= N; n += W) transpose(from + n, N, to + n * W, W);
    for (; n < N; ++n)
        for (int i = 0; i < W; ++i) to[n * W + i] = i < count ? from[i * N + n] : 0.0f;
}

// A log2 e as [N][W] vectors. A = -inf (a state that forgets at once) becomes a number just as good.
MC_INLINE void gather_decay(const float* A, int64_t N, int count, float* to) {
    gather(A, N, count, to);
    for (int64_t n = 0; n < N; ++n) store(to + n * W, vmax(set1(-1e30f), load(to + n * W) * set1(LOG2E)));
}

// The way back; padding lanes are dropped.
MC_INLINE void scatter(const float* from, int64_t N, int count, float* to) {
    int64_t n0 = 0;
    if (count == W)
        for (; n0 + W <= N; n0 += W) transpose(from + n0 * W, W, to + n0, N);
    for (int i = 0; i < count; ++i)
        for (int64_t n = n0; n < N; ++n) to[i * N + n] = from[n * W + i];
}

// Calls step.run<G>(first state) for all N states, G of them at a time.
template <int G, typename Step>
MC_INLINE void for_states(int64_t N, Step&& step, int64_t n = 0) {
    for (; n + G <= N; n += G) step.template run<G>(n);
    if constexpr (G > 1) for_states<G / 2>(N, step, n);
}

// G states of W channels over the tokens of a tile: h <- a h + (dt u) B, y += C . h.
struct Advance {
    int64_t N, tokens;
    const float *A2, *B, *C;  // A2: W channels a state, A2_step apart; B, C: N a token, BC_step apart
    const V *dt, *dtu;
    const bool* restart;
    const float* from;  // the state: W channels a state, from_step apart; `to` may be the same memory
    float* to;
    V* y;
    int64_t A2_step = W, from_step = W, to_step = W, BC_step = N;

    template <int G>
    MC_INLINE void run(int64_t first) const {
        V h[G], A[G];
        MC_UNROLL(8)
        for (int i = 0; i < G; ++i) {
            h[i] = load(from + (first + i) * from_step);
            A[i] = load(A2 + (first + i) * A2_step);
        }
        for (int64_t t = 0; t < tokens; ++t) {
            if (restart[t]) {
                MC_UNROLL(8)
                for (int i = 0; i < G; ++i) h[i] = zero();
            }
            const float *B_t = B + t * BC_step + first, *C_t = C + t * BC_step + first;
            const V step = dt[t], input = dtu[t];
            V even = y[t], odd = zero();
            MC_UNROLL(8)
            for (int i = 0; i < G; ++i) {
                h[i] = fma(h[i], exp2_finite(step * A[i]), input * set1(B_t[i]));
                if (i & 1)
                    odd = fma(h[i], set1(C_t[i]), odd);
                else
                    even = fma(h[i], set1(C_t[i]), even);
            }
            y[t] = even + odd;
        }
        MC_UNROLL(8)
        for (int i = 0; i < G; ++i) store(to + (first + i) * to_step, h[i]);
    }
};

// How many states are walked at a time: as many as their registers allow.
constexpr int FORWARD_STATES = MC_WIDTH == 16 ? 8 : 4;

// -- Mamba-2: a vector holds W neighbouring states of one row of a head ------------------------------------------------

constexpr int HEAD_ROWS = 2;                     // rows in registers
constexpr int64_t AHEAD_ROWS = 16;               // on their way from memory
constexpr int VECTORS = MC_WIDTH == 16 ? 8 : 4;  // vectors of states in registers, a row

// What a tile holds of one head: a number a token.
struct Steps {
    float dt[TILE], decay[TILE], slope[TILE];  // slope: d dt / d raw
    bool restart[TILE];
};

// Copies [rows, N] floats to rows of `padded` floats, zeros behind them.
inline void pad(const float* from, int64_t rows, int64_t N, int64_t padded, float* to) {
    for (int64_t r = 0; r < rows; ++r) {
        std::memcpy(to + r * padded, from + r * N, sizeof(float) * size_t(N));
        std::memset(to + r * padded + N, 0, sizeof(float) * size_t(padded - N));
    }
}

inline void unpad(const float* from, int64_t rows, int64_t N, int64_t padded, float* to) {
    for (int64_t r = 0; r < rows; ++r) std::memcpy(to + r * N, from + r * padded, sizeof(float) * size_t(N));
}

// Calls step.run<M>(first vector) for all `vectors`, M of them at a time.
template <int M, typename Step>
MC_INLINE void for_vectors(int64_t vectors, Step&& step, int64_t v = 0) {
    for (; v + M <= vectors; v += M) step.template run<M>(v);
    if constexpr (M > 1) for_vectors<M / 2>(vectors, step, v);
}

// R rows over the tokens of a tile. x: [token][row stride], y: [token][W] vectors of lanes.
template <int R>
struct HeadRows {
    int64_t tokens, padded, x_stride;
    const Steps* at;
    const float *B, *C, *x, *from;  // from, to: the state, [R][padded]; they may be the same memory
    float* to;
    V* y;

    template <int M>
    MC_INLINE void run(int64_t first) const {
        V h[R][M];
        MC_UNROLL(2)
        for (int r = 0; r < R; ++r) {
            MC_UNROLL(8)
            for (int i = 0; i < M; ++i) h[r][i] = load(from + r * padded + (first + i) * W);
        }
        for (int64_t t = 0; t < tokens; ++t) {
            const float *B_t = B + t * padded + first * W, *C_t = C + t * padded + first * W;
            if (at->restart[t]) {
                MC_UNROLL(2)
                for (int r = 0; r < R; ++r) {
                    MC_UNROLL(8)
                    for (int i = 0; i < M; ++i) h[r][i] = zero();
                }
            }
            const V decay = set1(at->decay[t]);
            V input[R], sum[R];
            MC_UNROLL(2)
            for (int r = 0; r < R; ++r) {
                input[r] = set1(at->dt[t] * x[t * x_stride + r]);
                sum[r] = y[t * W + r];
            }
            MC_UNROLL(8)
            for (int i = 0; i < M; ++i) {
                const V B_i = load(B_t + i * W), C_i = load(C_t + i * W);
                MC_UNROLL(2)
                for (int r = 0; r < R; ++r) {
                    h[r][i] = fma(input[r], B_i, h[r][i] * decay);
                    sum[r] = fma(h[r][i], C_i, sum[r]);
                }
            }
            MC_UNROLL(2)
            for (int r = 0; r < R; ++r) y[t * W + r] = sum[r];
        }
        MC_UNROLL(2)
        for (int r = 0; r < R; ++r) {
            MC_UNROLL(8)
            for (int i = 0; i < M; ++i) store(to + r * padded + (first + i) * W, h[r][i]);
        }
    }
};

// All `rows` rows of a head over the tokens of a tile, W at a time. x and y: [token][stride]; they may be the same memory.
MC_INLINE void advance_head(int64_t rows, int64_t tokens, int64_t padded, int64_t stride, const Steps& at, const float* B,
                            const float* C, const float* x, float D, const float* from, float* to, float* y) {
    V lanes[TILE * W];
    for (int64_t first = 0; first < rows; first += W) {
        const int count = int(std::min<int64_t>(W, rows - first));
        for (int64_t i = 0; i < tokens * W; ++i) lanes[i] = zero();
        int r = 0;
        for (; r + HEAD_ROWS <= count; r += HEAD_ROWS) {
            const float* rows_from = from + (first + r) * padded;
            for (int64_t i = 0; tokens == 1 && i < HEAD_ROWS * padded; i += 16)  // then the state comes from memory
                __builtin_prefetch(rows_from + AHEAD_ROWS * padded + i, 0, 3);
            for_vectors<VECTORS>(padded / W, HeadRows<HEAD_ROWS>{tokens, padded, stride, &at, B, C, x + first + r, rows_from,
                                                                 to + (first + r) * padded, lanes + r});
        }
        for (; r < count; ++r)
            for_vectors<VECTORS>(padded / W, HeadRows<1>{tokens, padded, stride, &at, B, C, x + first + r,
                                                         from + (first + r) * padded, to + (first + r) * padded, lanes + r});
        for (int64_t t = 0; t < tokens; ++t)
            store_part(y + t * stride + first, lane_sums(lanes + t * W) + set1(D) * load_part(x + t * stride + first, count),
                       count);
    }
}

}  // namespace
}  // namespace MC_LEVEL
