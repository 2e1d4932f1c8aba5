// ssd_scan on a CPU: the recurrence itself, forward, and backward from a checkpoint of the state every TILE tokens.
//
// The chunked matrix form that GPUs like saves nothing here: it trades one multiplication in three for the products inside a
// chunk. So the state is walked token by token, and prefill and decode give the same bits. A vector holds W neighbouring
// states n of one row p of a head; a few rows and vectors stay in registers over a tile of tokens:
//     h[p, n] <- a h[p, n] + (dt x_p) B_n          y_p = sum_n C_n h[p, n] + D x_p           a = exp(dt A)
// The sum over n is kept a lane each and taken once a token. A task is one batch row and a run of heads of one group.
//
// Backward recomputes a tile and walks it back with g_t = gy C_t + a_{t+1} g_{t+1}:
//     dC = sum_p gy_p h   dB = sum_p g dt x_p   dx_p = dt (g.B) + D gy_p   ddt = sum_p x_p (g.B) + A a (g.h_prev)
#ifndef MC_LEVEL
#include "native.h"

namespace {

using namespace mc;

struct Ssd {
    int64_t batch, length, heads, head_dim, groups, states, softplus, threads;
    View x, dt, B, C, y, resets;  // resets: uint8 [batch, length], 1 where the state restarts from zero
    const float *A, *D, *dt_bias, *initial;
    float *final, *checkpoints;  // checkpoints: [batch, heads, tiles, head_dim, states padded to whole vectors]
    double dt_low, dt_high;
};

struct SsdGradient {
    View dy, dx, ddt, dB, dC;
    const float* dfinal;
    float *dA, *dD, *dbias, *dinitial;
};

constexpr int64_t HEADS_RUN = 4;  // heads of a backward task

}  // namespace

#define MC_SELF "ssd_scan/cpu.cpp"
#include "levels.h"

extern "C" MC_EXPORT void mc_ssd_forward(const Ssd* p) { MC_DISPATCH(ssd_forward, *p); }
extern "C" MC_EXPORT void mc_ssd_backward(const Ssd* p, const SsdGradient* g) { MC_DISPATCH(ssd_backward, *p, *g); }

#else

#include "state_tiles.h"

namespace MC_LEVEL {
namespace {

constexpr int BACK_VECTORS = MC_WIDTH == 16 ? 4 : 2;  // the same on the way back

inline void read_steps(const Ssd& p, int64_t b, int64_t head, int64_t start, int64_t tokens, Steps& at) {
    const float bias = p.dt_bias ? p.dt_bias[head] : 0.0f;
    for (int64_t t = 0; t < TILE; t += W) {
        float raw[W] = {};
        for (int64_t i = 0; i < W && t + i < tokens; ++i)
            raw[i] = load_one(p.dt.data, b * p.dt.batch + (start + t + i) * p.dt.token + head, int(p.dt.dtype)) + bias;
        V x = load(raw);
        store(at.slope + t, p.softplus ? sigmoid(x) : set1(1.0f));
        store(at.dt + t, p.softplus ? softplus(x) : x);
    }
    for (int64_t t = 0; t < tokens; ++t) {
        const float low = float(p.dt_low), high = float(p.dt_high);
        if (at.dt[t] < low || at.dt[t] > high) {
            at.dt[t] = std::min(std::max(at.dt[t], low), high);
            at.slope[t] = 0.0f;
        }
        at.restart[t] =
            p.resets.data && static_cast<const uint8_t*>(p.resets.data)[b * p.resets.batch + (start + t) * p.resets.token];
    }
    const V A2 = set1(p.A[head] * 1.44269504f);
    for (int64_t t = 0; t < TILE; t += W) store(at.decay + t, exp2v(load(at.dt + t) * A2));
    for (int64_t t = 0; t < tokens; ++t)
        if (at.restart[t]) at.decay[t] = 0.0f;
}

// Rows of a tile as floats, padded with zeros: rows[token][padded].
inline void read_rows(const View& view, int64_t b, int64_t start, int64_t tokens, int64_t from, int64_t count, int64_t padded,
                      float* rows) {
    for (int64_t t = 0; t < tokens; ++t)
        for (int64_t n = 0; n < padded; n += W) {
            const int part = int(std::min<int64_t>(W, count - n));
            store(rows + t * padded + n, part > 0 ? read(view, b, start + t, from + n, part) : zero());
        }
}

void ssd_forward_task(const Ssd& p, int64_t b, int64_t head) {
    const int64_t N = p.states, P = p.head_dim, padded = ceil_div(N, W) * W, group = head / (p.heads / p.groups);
    const int64_t tiles = ceil_div(p.length, TILE), row = (b * p.heads + head) * P;
    const float D = p.D ? p.D[head] : 0.0f;
    Scratch<float> memory(size_t(P * padded + 2 * TILE * padded + 2 * TILE * (P + W)));
    float *state = memory.get(), *B = state + P * padded, *C = B + TILE * padded;
    float *x = C + TILE * padded, *y = x + TILE * (P + W);
    if (p.initial)
        pad(p.initial + row * N, P, N, padded, state);
    else
        std::memset(state, 0, sizeof(float) * size_t(P * padded));
    for (int64_t tile = 0; tile < tiles; ++tile) {
        const int64_t start = tile * TILE, tokens = std::min(TILE, p.length - start);
        if (p.checkpoints)
            std::memcpy(p.checkpoints + ((b * p.heads + head) * tiles + tile) * P * padded, state,
                        sizeof(float) * size_t(P * padded));
        Steps at;
        read_steps(p, b, head, start, tokens, at);
        read_rows(p.B, b, start, tokens, group * N, N, padded, B);
        read_rows(p.C, b, start, tokens, group * N, N, padded, C);
        for (int64_t t = 0; t < tokens; ++t)
            for (int64_t c = 0; c < P; c += W) {
                const int count = int(std::min<int64_t>(W, P - c));
                store_part(x + t * P + c, read(p.x, b, start + t, head * P + c, count), count);
            }
        advance_head(P, tokens, padded, P, at, B, C, x, D, state, state, y);
        for (int64_t t = 0; t < tokens; ++t)
            for (int64_t c = 0; c < P; c += W) {
                const int count = int(std::min<int64_t>(W, P - c));
                write(p.y, b, start + t, head * P + c, count, load_part(y + t * P + c, count));
            }
    }
    unpad(state, P, N, padded, p.final + row * N);
}

void ssd_forward(const Ssd& p) {
    const int64_t tasks = p.batch * p.heads;
#pragma omp parallel for schedule(dynamic) num_threads(int(p.threads)) \
    if (p.threads > 1 && tasks > 1 && tasks * p.length * p.head_dim * p.states > 262144)
    for (int64_t task = 0; task < tasks; ++task) ssd_forward_task(p, task / p.heads, task % p.heads);
}

// R rows of a head over a tile: forward again from the checkpoint, then back. dB, dC: [token][padded] sums over rows; dh: the
// gradient of the state behind the tile, replaced by that of the state before it; gB: [token][R], gA: [token] lanes.
template <int R>
struct RowsBack {
    int64_t tokens, padded, x_stride;
    const Steps* at;
    const float *B, *C, *x, *gy, *checkpoint;
    float *dh, *dB, *dC;
    V *gB, *gA;

    template <int M>
    MC_INLINE void run(int64_t first) const {
        V kept[TILE + 1][R][M];  // the state before token t
        for (int r = 0; r < R; ++r)
            for (int i = 0; i < M; ++i) kept[0][r][i] = load(checkpoint + r * padded + (first + i) * W);
        for (int64_t t = 0; t < tokens; ++t) {
            const float* B_t = B + t * padded + first * W;
            const V decay = set1(at->decay[t]);
            MC_UNROLL(2)
            for (int r = 0; r < R; ++r) {
                const V input = set1(at->dt[t] * x[t * x_stride + r]);
                MC_UNROLL(8)
                for (int i = 0; i < M; ++i) {
                    V before = at->restart[t] ? zero() : kept[t][r][i];
                    kept[t + 1][r][i] = fma(input, load(B_t + i * W), before * decay);
                }
            }
        }
        V g[R][M];
        for (int r = 0; r < R; ++r)
            for (int i = 0; i < M; ++i) g[r][i] = load(dh + r * padded + (first + i) * W);
        for (int64_t t = tokens - 1; t >= 0; --t) {
            const int64_t offset = t * padded + first * W;
            const V decay = set1(at->decay[t]);
            V out[R], input[R], sum_B[R], sum_A = gA[t];
            MC_UNROLL(2)
            for (int r = 0; r < R; ++r) {
                out[r] = set1(gy[t * x_stride + r]);
                input[r] = set1(at->dt[t] * x[t * x_stride + r]);
                sum_B[r] = gB[t * R + r];
            }
            MC_UNROLL(8)
            for (int i = 0; i < M; ++i) {
                const V B_i = load(B + offset + i * W), C_i = load(C + offset + i * W);
                V dB_i = load(dB + offset + i * W), dC_i = load(dC + offset + i * W);
                MC_UNROLL(2)
                for (int r = 0; r < R; ++r) {
                    V grad = fma(out[r], C_i, g[r][i]);
                    dC_i = fma(out[r], kept[t + 1][r][i], dC_i);
                    dB_i = fma(grad, input[r], dB_i);
                    sum_B[r] = fma(grad, B_i, sum_B[r]);
                    sum_A = fma(grad, kept[t][r][i], sum_A);
                    g[r][i] = grad * decay;
                }
                store(dB + offset + i * W, dB_i);
                store(dC + offset + i * W, dC_i);
            }
            MC_UNROLL(2)
            for (int r = 0; r < R; ++r) gB[t * R + r] = sum_B[r];
            gA[t] = sum_A;
        }
        for (int r = 0; r < R; ++r)
            for (int i = 0; i < M; ++i) store(dh + r * padded + (first + i) * W, g[r][i]);
    }
};

// dx of R rows, and what they add to ddt: gu[token] = sum over rows of x (g.B).
template <int R>
MC_INLINE void retreat_rows(int64_t tokens, int64_t padded, int64_t head_dim, const Steps& at, const float* B, const float* C,
                            const float* x, const float* gy, float D, const float* checkpoint, float* dh, float* dB, float* dC,
                            float* dx, float* gu, V* gA) {
    V gB[TILE * R];
    for (int64_t i = 0; i < tokens * R; ++i) gB[i] = zero();
    for_vectors<BACK_VECTORS>(
        padded / W, RowsBack<R>{tokens, padded, head_dim, &at, B, C, x, gy, checkpoint, dh, dB, dC, gB, gA});
    for (int64_t t = 0; t < tokens; ++t)
        for (int r = 0; r < R; ++r) {
            const float through = lane_sum(gB[t * R + r]);
            dx[t * head_dim + r] = through * at.dt[t] + D * gy[t * head_dim + r];
            gu[t] += through * x[t * head_dim + r];
        }
}

// A run of heads of one group. dB_part, dC_part: [batch, length, groups, N] of this run; dA_part, dD_part, dbias_part: [batch,
// heads].
void ssd_backward_task(const Ssd& p, const SsdGradient& g, int64_t b, int64_t group, int64_t first, int64_t last, float* dB_part,
                       float* dC_part, float* dA_part, float* dD_part, float* dbias_part) {
    const int64_t N = p.states, P = p.head_dim, padded = ceil_div(N, W) * W, heads = last - first;
    const int64_t tiles = ceil_div(p.length, TILE);
    Scratch<float> memory(size_t(heads * P * padded + 4 * TILE * padded + 3 * TILE * P));
    float *dh_all = memory.get(), *B = dh_all + heads * P * padded, *C = B + TILE * padded;
    float *dB = C + TILE * padded, *dC = dB + TILE * padded, *x = dC + TILE * padded, *gy = x + TILE * P, *dx = gy + TILE * P;
    for (int64_t head = first; head < last; ++head) {
        float* dh = dh_all + (head - first) * P * padded;
        if (g.dfinal)
            pad(g.dfinal + (b * p.heads + head) * P * N, P, N, padded, dh);
        else
            std::memset(dh, 0, sizeof(float) * size_t(P * padded));
        dA_part[b * p.heads + head] = dD_part[b * p.heads + head] = dbias_part[b * p.heads + head] = 0.0f;
    }
    for (int64_t tile = tiles - 1; tile >= 0; --tile) {
        const int64_t start = tile * TILE, tokens = std::min(TILE, p.length - start);
        read_rows(p.B, b, start, tokens, group * N, N, padded, B);
        read_rows(p.C, b, start, tokens, group * N, N, padded, C);
        std::memset(dB, 0, sizeof(float) * size_t(2 * TILE * padded));
        for (int64_t head = first; head < last; ++head) {
            const float D = p.D ? p.D[head] : 0.0f;
            const int64_t at_head = b * p.heads + head;
            Steps at;
            read_steps(p, b, head, start, tokens, at);
            for (int64_t t = 0; t < tokens; ++t)
                for (int64_t c = 0; c < P; c += W) {
                    const int count = int(std::min<int64_t>(W, P - c));
                    store_part(x + t * P + c, read(p.x, b, start + t, head * P + c, count), count);
                    store_part(gy + t * P + c, read(g.dy, b, start + t, head * P + c, count), count);
                }
            V gA[TILE];
            float gu[TILE] = {};
            for (int64_t t = 0; t < TILE; ++t) gA[t] = zero();
            float* dh = dh_all + (head - first) * P * padded;
            const float* checkpoint = p.checkpoints + (at_head * tiles + tile) * P * padded;
            int64_t r = 0;
            for (; r + HEAD_ROWS <= P; r += HEAD_ROWS)
                retreat_rows<HEAD_ROWS>(tokens, padded, P, at, B, C, x + r, gy + r, D, checkpoint + r * padded, dh + r * padded, dB,
                                   dC, dx + r, gu, gA);
            for (; r < P; ++r)
                retreat_rows<1>(tokens, padded, P, at, B, C, x + r, gy + r, D, checkpoint + r * padded, dh + r * padded, dB, dC,
                                dx + r, gu, gA);
            for (int64_t t = tokens - 1; t >= 0; --t) {
                const float dlog = lane_sum(gA[t]) * at.decay[t];  // the gradient of dt A
                const float draw = (gu[t] + dlog * p.A[head]) * at.slope[t];
                dA_part[at_head] += dlog * at.dt[t];
                dbias_part[at_head] += draw;
                store_one(g.ddt.data, b * g.ddt.batch + (start + t) * g.ddt.token + head, int(g.ddt.dtype), draw);
                V dD = zero();
                for (int64_t c = 0; c < P; c += W) {
                    const int count = int(std::min<int64_t>(W, P - c));
                    dD = fma(load_part(x + t * P + c, count), load_part(gy + t * P + c, count), dD);
                    write(g.dx, b, start + t, head * P + c, count, load_part(dx + t * P + c, count));
                }
                dD_part[at_head] += lane_sum(dD);
            }
        }
        for (int64_t t = 0; t < tokens; ++t) {
            const int64_t row = ((b * p.length + start + t) * p.groups + group) * N;
            std::memcpy(dB_part + row, dB + t * padded, sizeof(float) * size_t(N));
            std::memcpy(dC_part + row, dC + t * padded, sizeof(float) * size_t(N));
        }
    }
    if (g.dinitial)
        for (int64_t head = first; head < last; ++head)
            unpad(dh_all + (head - first) * P * padded, P, N, padded, g.dinitial + (b * p.heads + head) * P * N);
}

void ssd_backward(const Ssd& p, const SsdGradient& g) {
    const int64_t per_group = p.heads / p.groups, runs = ceil_div(per_group, HEADS_RUN), tasks = p.batch * p.groups * runs;
    const int64_t width = p.groups * p.states, rows = p.batch * p.length * width, wide = p.batch * p.heads;
    Scratch<float> rows_part(size_t(2 * runs * rows)), wide_part(size_t(3 * wide));
    float *dB_part = rows_part.get(), *dC_part = dB_part + runs * rows;
    float *dA_part = wide_part.get(), *dD_part = dA_part + wide, *dbias_part = dD_part + wide;
#pragma omp parallel for schedule(dynamic) num_threads(int(p.threads)) \
    if (p.threads > 1 && tasks > 1 && wide * p.length * p.head_dim * p.states > 262144)
    for (int64_t task = 0; task < tasks; ++task) {
        const int64_t b = task / (p.groups * runs), group = task / runs % p.groups, run = task % runs;
        const int64_t first = group * per_group + run * HEADS_RUN;
        const int64_t last = std::min(first + HEADS_RUN, (group + 1) * per_group);
        ssd_backward_task(p, g, b, group, first, last, dB_part + run * rows, dC_part + run * rows, dA_part, dD_part, dbias_part);
    }
    for (int64_t b = 0; b < p.batch; ++b)
        for (int64_t t = 0; t < p.length; ++t)
            for (int64_t j = 0; j < width; ++j) {
                float dB = 0.0f, dC = 0.0f;
                for (int64_t run = 0; run < runs; ++run) {
                    dB += dB_part[run * rows + (b * p.length + t) * width + j];
                    dC += dC_part[run * rows + (b * p.length + t) * width + j];
                }
                store_one(g.dB.data, b * g.dB.batch + t * g.dB.token + j, int(g.dB.dtype), dB);
                store_one(g.dC.data, b * g.dC.batch + t * g.dC.token + j, int(g.dC.dtype), dC);
            }
    for (int64_t head = 0; head < p.heads; ++head) {
        float dA = 0.0f, dD = 0.0f, dbias = 0.0f;
        for (int64_t b = 0; b < p.batch; ++b) {
            dA += dA_part[b * p.heads + head];
            dD += dD_part[b * p.heads + head];
            dbias += dbias_part[b * p.heads + head];
        }
        g.dA[head] = dA;
        if (g.dD) g.dD[head] = dD;
        if (g.dbias) g.dbias[head] = dbias;
    }
}

}  // namespace
}  // namespace MC_LEVEL

#endif
