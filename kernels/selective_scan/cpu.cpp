// selective_scan on a CPU: forward, and backward from a checkpoint of the state every TILE tokens.
//
// A vector holds W neighbouring channels; the N states of those channels are N vectors, which stay in registers for a whole
// tile of tokens (N = 16), so the sum over states is one multiply-add a state and never crosses lanes. dt and A meet as
// exp2(dt * (A log2 e)). A task is one batch row and a run of channels of one group, always cut the same way: results depend
// neither on the number of threads nor on how the tokens are divided between calls.
//
// Backward recomputes the states of a tile from its checkpoint, last tile first, and walks them back with
//     g_t = C_t gy_t + a_{t+1} g_{t+1}      (g = dLoss/dh, gy = dLoss/d(C.h + D u), a = exp(dt A))
//     dC = sum_e gy h   dB = sum_e g dt u   du = dt (g.B) + D gy   ddt = u (g.B) + A.(g a h_prev)   dA = sum_t g a h_prev dt
// The sums over channels (dB, dC) are kept a lane each over the channels of a task, and added up in task order.
#ifndef MC_LEVEL
#include "native.h"

namespace {

using namespace mc;

struct Scan {
    int64_t batch, length, channels, groups, states, softplus, threads;
    View u, dt, B, C, z, y, resets;  // resets: uint8 [batch, tokens], 1 where the state restarts from zero
    const float *A, *D, *dt_bias, *z_scale, *initial;
    float *final, *checkpoints;
};

struct ScanGradient {
    View dy, du, ddt, dB, dC, dz;
    const float* dfinal;
    float *dA, *dD, *dbias, *dinitial;
};

constexpr int64_t TILE = 16;  // tokens between two checkpoints

// Channels of a task: few enough to feed every core, enough for long contiguous reads.
constexpr int64_t FORWARD_RUN = 64, BACKWARD_RUN = 256;

}  // namespace

#define MC_SELF "selective_scan/cpu.cpp"
#include "levels.h"

extern "C" MC_EXPORT void mc_scan_forward(const Scan* p) { MC_DISPATCH(scan_forward, *p); }
extern "C" MC_EXPORT void mc_scan_backward(const Scan* p, const ScanGradient* g) { MC_DISPATCH(scan_backward, *p, *g); }

#else

namespace MC_LEVEL {

constexpr float LOG2E = 1.44269504f, LN2 = 0.693147181f;

MC_INLINE bool restarts(const Scan& p, int64_t b, int64_t t) {
    return p.resets.data && static_cast<const uint8_t*>(p.resets.data)[b * p.resets.batch + t * p.resets.token];
}

// [count channels, N] in memory <-> [N][W] vectors; padding lanes are zero.
MC_INLINE void gather(const float* from, int64_t N, int count, float factor, float* to) {
    for (int64_t n = 0; n < N; ++n)
        for (int i = 0; i < W; ++i) to[n * W + i] = i < count ? from[i * N + n] * factor : 0.0f;
}

// A log2 e as [N][W] vectors. A = -inf (a state that forgets at once) becomes a number just as good.
MC_INLINE void gather_decay(const float* A, int64_t N, int count, float* to) {
    gather(A, N, count, LOG2E, to);
    for (int64_t n = 0; n < N; ++n) store(to + n * W, vmax(set1(-1e30f), load(to + n * W)));
}

MC_INLINE void scatter(const float* from, int64_t N, int count, float* to) {
    for (int i = 0; i < count; ++i)
        for (int64_t n = 0; n < N; ++n) to[i * N + n] = from[n * W + i];
}

// The B and C rows of a tile's tokens, as floats: rows[token][n].
inline void read_rows(const View& view, const Scan& p, int64_t b, int64_t group, int64_t start, int64_t tokens, float* rows) {
    for (int64_t t = 0; t < tokens; ++t)
        for (int64_t n = 0; n < p.states; n += W) {
            int count = int(std::min<int64_t>(W, p.states - n));
            store_part(rows + t * p.states + n, read(view, b, start + t, group * p.states + n, count), count);
        }
}

// dt of a tile: bias added, softplus taken; slope[token] = d dt / d raw where asked for.
MC_INLINE V step_size(const Scan& p, V raw, V bias, V* slope) {
    raw = raw + bias;
    if (slope) *slope = p.softplus ? sigmoid(raw) : set1(1.0f);
    return p.softplus ? softplus(raw) : raw;
}

// One token of W channels: h <- a h + (dt u) B, returns C . h. NS: the number of states where it is known when compiling.
template <int NS>
MC_INLINE V advance(V* h, const float* A2, const float* B, const float* C, int64_t states, V dt, V dtu) {
    const int64_t N = NS ? NS : states;
    V even = zero(), odd = zero();
    MC_UNROLL(16)
    for (int64_t n = 0; n < N; ++n) {
        V a = exp2_finite(dt * load(A2 + n * W));
        h[n] = fma(h[n], a, dtu * set1(B[n]));
        if (n & 1)
            odd = fma(h[n], set1(C[n]), odd);
        else
            even = fma(h[n], set1(C[n]), even);
    }
    return even + odd;
}

template <int NS>
void forward_task(const Scan& p, int64_t b, int64_t group, int64_t first, int64_t last, int64_t first_block) {
    const int64_t N = NS ? NS : p.states, size = N * W, blocks = ceil_div(last - first, W);
    const int64_t tiles = ceil_div(p.length, TILE), row_blocks = p.groups * ceil_div(p.channels / p.groups, W);
    Scratch<float> memory(size_t(2 * blocks * size + 2 * TILE * N));
    float *A2 = memory.get(), *state = A2 + blocks * size, *B = state + blocks * size, *C = B + TILE * N;
    for (int64_t k = 0; k < blocks; ++k) {
        int64_t c = first + k * W;
        int count = int(std::min<int64_t>(W, last - c));
        gather_decay(p.A + c * N, N, count, A2 + k * size);
        if (p.initial)
            gather(p.initial + (b * p.channels + c) * N, N, count, 1.0f, state + k * size);
        else
            std::memset(state + k * size, 0, sizeof(float) * size_t(size));
    }
    for (int64_t tile = 0; tile < tiles; ++tile) {
        const int64_t start = tile * TILE, tokens = std::min(TILE, p.length - start);
        read_rows(p.B, p, b, group, start, tokens, B);
        read_rows(p.C, p, b, group, start, tokens, C);
        for (int64_t k = 0; k < blocks; ++k) {
            const int64_t c = first + k * W;
            const int count = int(std::min<int64_t>(W, last - c));
            float* mine = state + k * size;
            if (p.checkpoints)
                std::memcpy(p.checkpoints + ((b * tiles + tile) * row_blocks + first_block + k) * size, mine,
                            sizeof(float) * size_t(size));
            V bias = p.dt_bias ? load_part(p.dt_bias + c, count) : zero();
            V D = p.D ? load_part(p.D + c, count) : zero();
            V z_scale = p.z_scale ? load_part(p.z_scale + c, count) : set1(1.0f);
            const bool wraps = k + 1 == blocks;  // what is read next: the next block, or the next tile's first
            const int64_t next = wraps ? first : c + W, next_start = wraps ? std::min(start + TILE, p.length - 1) : start;
            const int64_t next_tokens = std::min(TILE, p.length - next_start);
            for (const View* view : {&p.u, &p.dt, &p.z}) prefetch(*view, b, next_start, next_tokens, next);
            V dt[TILE], u[TILE];
            for (int64_t t = 0; t < tokens; ++t) {
                u[t] = read(p.u, b, start + t, c, count);
                dt[t] = step_size(p, read(p.dt, b, start + t, c, count), bias, nullptr);
            }
            V registers[NS ? NS : 1];
            V* h = NS ? registers : reinterpret_cast<V*>(mine);
            if (NS) {
                MC_UNROLL(16)
                for (int64_t n = 0; n < NS; ++n) h[n] = load(mine + n * W);
            }
            V y[TILE];
            for (int64_t t = 0; t < tokens; ++t) {
                if (restarts(p, b, start + t)) {
                    MC_UNROLL(16)
                    for (int64_t n = 0; n < N; ++n) h[n] = zero();
                }
                y[t] = advance<NS>(h, A2 + k * size, B + t * N, C + t * N, N, dt[t], dt[t] * u[t]);
            }
            if (NS) {
                MC_UNROLL(16)
                for (int64_t n = 0; n < NS; ++n) store(mine + n * W, h[n]);
            }
            for (int64_t t = 0; t < tokens; ++t) {
                V out = p.D ? fma(D, u[t], y[t]) : y[t];
                if (p.z.data) {
                    V z = read(p.z, b, start + t, c, count);
                    out = out * (z * sigmoid(z_scale * z));
                }
                write(p.y, b, start + t, c, count, out);
            }
        }
    }
    for (int64_t k = 0; k < blocks; ++k) {
        int64_t c = first + k * W;
        scatter(state + k * size, N, int(std::min<int64_t>(W, last - c)), p.final + (b * p.channels + c) * N);
    }
}

// One task of the backward pass. dB_part, dC_part: [batch, length, groups, N] of this run of channels; dA_part [batch, channels,
// N], dD_part and dbias_part [batch, channels].
template <int NS>
void backward_task(const Scan& p, const ScanGradient& g, int64_t b, int64_t group, int64_t first, int64_t last,
                   int64_t first_block, float* dB_part, float* dC_part, float* dA_part, float* dD_part, float* dbias_part) {
    const int64_t N = NS ? NS : p.states, size = N * W, blocks = ceil_div(last - first, W);
    const int64_t tiles = ceil_div(p.length, TILE), row_blocks = p.groups * ceil_div(p.channels / p.groups, W);
    Scratch<float> memory(size_t(3 * blocks * size + 2 * TILE * N + (4 * TILE + 1) * size + 2 * blocks * W));
    float *A2 = memory.get(), *dh_all = A2 + blocks * size, *dA_all = dh_all + blocks * size;
    float *h_all = dA_all + blocks * size, *a_all = h_all + (TILE + 1) * size;  // [token][n][W]
    float *dB = a_all + TILE * size, *dC = dB + TILE * size;                    // [token][n][W], over the blocks of a tile
    float *dD_all = dC + TILE * size, *dbias_all = dD_all + blocks * W;
    float *B = dbias_all + blocks * W, *C = B + TILE * N;
    for (int64_t k = 0; k < blocks; ++k) {
        int64_t c = first + k * W;
        int count = int(std::min<int64_t>(W, last - c));
        gather_decay(p.A + c * N, N, count, A2 + k * size);
        if (g.dfinal)
            gather(g.dfinal + (b * p.channels + c) * N, N, count, 1.0f, dh_all + k * size);
        else
            std::memset(dh_all + k * size, 0, sizeof(float) * size_t(size));
    }
    std::memset(dA_all, 0, sizeof(float) * size_t(blocks * size));
    std::memset(dD_all, 0, sizeof(float) * size_t(2 * blocks * W));
    for (int64_t tile = tiles - 1; tile >= 0; --tile) {
        const int64_t start = tile * TILE, tokens = std::min(TILE, p.length - start);
        read_rows(p.B, p, b, group, start, tokens, B);
        read_rows(p.C, p, b, group, start, tokens, C);
        std::memset(dB, 0, sizeof(float) * size_t(2 * TILE * size));
        for (int64_t k = 0; k < blocks; ++k) {
            const int64_t c = first + k * W;
            const int count = int(std::min<int64_t>(W, last - c));
            const float* A2_k = A2 + k * size;
            V bias = p.dt_bias ? load_part(p.dt_bias + c, count) : zero();
            V D = p.D ? load_part(p.D + c, count) : zero();
            V z_scale = p.z_scale ? load_part(p.z_scale + c, count) : set1(1.0f);
            const bool wraps = k + 1 == blocks;
            const int64_t next = wraps ? first : c + W, next_start = wraps ? std::max<int64_t>(start - TILE, 0) : start;
            const int64_t next_tokens = std::min(TILE, p.length - next_start);
            for (const View* view : {&p.u, &p.dt, &p.z, &g.dy}) prefetch(*view, b, next_start, next_tokens, next);
            V dt[TILE], u[TILE], slope[TILE], y[TILE];
            for (int64_t t = 0; t < tokens; ++t) {
                u[t] = read(p.u, b, start + t, c, count);
                dt[t] = step_size(p, read(p.dt, b, start + t, c, count), bias, &slope[t]);
            }
            // The states and decays of the tile again, from its checkpoint.
            std::memcpy(h_all, p.checkpoints + ((b * tiles + tile) * row_blocks + first_block + k) * size,
                        sizeof(float) * size_t(size));
            for (int64_t t = 0; t < tokens; ++t) {
                const bool restart = restarts(p, b, start + t);
                const float* before = h_all + t * size;
                float *after = h_all + (t + 1) * size, *decay = a_all + t * size;
                const V dtu = dt[t] * u[t];
                V even = zero(), odd = zero();
                MC_UNROLL(16)
                for (int64_t n = 0; n < N; ++n) {
                    V a = restart ? zero() : exp2_finite(dt[t] * load(A2_k + n * W));
                    V fresh = dtu * set1(B[t * N + n]);
                    V h = restart ? fresh : fma(load(before + n * W), a, fresh);
                    store(decay + n * W, a);
                    store(after + n * W, h);
                    if (n & 1)
                        odd = fma(h, set1(C[t * N + n]), odd);
                    else
                        even = fma(h, set1(C[t * N + n]), even);
                }
                y[t] = p.D ? fma(D, u[t], even + odd) : even + odd;
            }
            float* dh_k = dh_all + k * size;
            float* dA_k = dA_all + k * size;
            V dD = load(dD_all + k * W), dbias = load(dbias_all + k * W);
            V registers[NS ? NS : 1];
            V* dh = NS ? registers : reinterpret_cast<V*>(dh_k);
            if (NS) {
                MC_UNROLL(16)
                for (int64_t n = 0; n < NS; ++n) dh[n] = load(dh_k + n * W);
            }
            for (int64_t t = tokens - 1; t >= 0; --t) {
                V gy = read(g.dy, b, start + t, c, count);
                if (p.z.data) {
                    V z = read(p.z, b, start + t, c, count);
                    V s = sigmoid(z_scale * z);
                    if (g.dz.data) {  // d(z s)/dz = s (1 + z_scale z (1 - s))
                        V rise = s * fma(z_scale * z, set1(1.0f) - s, set1(1.0f));
                        write(g.dz, b, start + t, c, count, gy * y[t] * rise);
                    }
                    gy = gy * (z * s);
                }
                const float *before = h_all + t * size, *after = before + size, *decay = a_all + t * size;
                float *dB_t = dB + t * size, *dC_t = dC + t * size;
                const V dtu = dt[t] * u[t];
                V gB = zero(), gA = zero();
                MC_UNROLL(16)
                for (int64_t n = 0; n < N; ++n) {
                    V grad = fma(gy, set1(C[t * N + n]), dh[n]);
                    store(dC_t + n * W, fma(gy, load(after + n * W), load(dC_t + n * W)));
                    store(dB_t + n * W, fma(grad, dtu, load(dB_t + n * W)));
                    gB = fma(grad, set1(B[t * N + n]), gB);
                    V back = grad * load(decay + n * W);
                    V through = back * load(before + n * W);
                    gA = fma(through, load(A2_k + n * W), gA);
                    store(dA_k + n * W, fma(through, dt[t], load(dA_k + n * W)));
                    dh[n] = back;
                }
                dD = fma(gy, u[t], dD);
                if (g.du.data) write(g.du, b, start + t, c, count, fma(gB, dt[t], gy * D));
                V draw = fma(gB, u[t], gA * set1(LN2)) * slope[t];
                dbias = dbias + draw;
                if (g.ddt.data) write(g.ddt, b, start + t, c, count, draw);
            }
            if (NS) {
                MC_UNROLL(16)
                for (int64_t n = 0; n < NS; ++n) store(dh_k + n * W, dh[n]);
            }
            store(dD_all + k * W, dD);
            store(dbias_all + k * W, dbias);
        }
        for (int64_t t = 0; t < tokens; ++t) {
            int64_t row = ((b * p.length + start + t) * p.groups + group) * N;
            for (int64_t n = 0; n < N; ++n) {
                dB_part[row + n] = lane_sum(load(dB + t * size + n * W));
                dC_part[row + n] = lane_sum(load(dC + t * size + n * W));
            }
        }
    }
    for (int64_t k = 0; k < blocks; ++k) {
        int64_t c = first + k * W;
        int count = int(std::min<int64_t>(W, last - c));
        if (g.dinitial) scatter(dh_all + k * size, N, count, g.dinitial + (b * p.channels + c) * N);
        scatter(dA_all + k * size, N, count, dA_part + (b * p.channels + c) * N);
        store_part(dD_part + b * p.channels + c, load(dD_all + k * W), count);
        store_part(dbias_part + b * p.channels + c, load(dbias_all + k * W), count);
    }
}

// Calls run(batch row, group, run of channels, first, last, first block) for every task.
template <typename Run>
void for_each_task(const Scan& p, int64_t channels_a_task, Run run) {
    const int64_t per_group = p.channels / p.groups, runs = ceil_div(per_group, channels_a_task);
    const int64_t tasks = p.batch * p.groups * runs, group_blocks = ceil_div(per_group, W);
#pragma omp parallel for schedule(dynamic) num_threads(int(p.threads)) \
    if (p.threads > 1 && tasks > 1 && p.batch * p.length * p.channels * p.states > 65536)
    for (int64_t task = 0; task < tasks; ++task) {
        int64_t b = task / (p.groups * runs), group = task / runs % p.groups, part = task % runs;
        int64_t first = part * channels_a_task, last = std::min(first + channels_a_task, per_group);
        run(b, group, part, group * per_group + first, group * per_group + last, group * group_blocks + first / W);
    }
}

void scan_forward(const Scan& p) {
    for_each_task(p, FORWARD_RUN,
                  [&](int64_t b, int64_t group, int64_t, int64_t first, int64_t last, int64_t block) {
                      if (p.states == 16)
                          forward_task<16>(p, b, group, first, last, block);
                      else
                          forward_task<0>(p, b, group, first, last, block);
                  });
}

void scan_backward(const Scan& p, const ScanGradient& g) {
    const int64_t runs = ceil_div(p.channels / p.groups, BACKWARD_RUN);
    const int64_t rows = p.batch * p.length * p.groups * p.states, wide = p.batch * p.channels;
    Scratch<float> rows_part(size_t(2 * runs * rows)), wide_part(size_t(wide * (p.states + 2)));
    float *dB_part = rows_part.get(), *dC_part = dB_part + runs * rows;
    float *dA_part = wide_part.get(), *dD_part = dA_part + wide * p.states, *dbias_part = dD_part + wide;
    for_each_task(p, BACKWARD_RUN,
                  [&](int64_t b, int64_t group, int64_t part, int64_t first, int64_t last, int64_t block) {
                      auto task = p.states == 16 ? backward_task<16> : backward_task<0>;
                      task(p, g, b, group, first, last, block, dB_part + part * rows, dC_part + part * rows, dA_part,
                           dD_part, dbias_part);
                  });
    const int64_t width = p.groups * p.states;
    for (int64_t b = 0; b < p.batch; ++b)
        for (int64_t t = 0; t < p.length; ++t)
            for (int64_t j = 0; j < width; ++j) {
                float dB = 0.0f, dC = 0.0f;
                for (int64_t part = 0; part < runs; ++part) {
                    dB += dB_part[part * rows + (b * p.length + t) * width + j];
                    dC += dC_part[part * rows + (b * p.length + t) * width + j];
                }
                if (g.dB.data) store_one(g.dB.data, b * g.dB.batch + t * g.dB.token + j, int(g.dB.dtype), dB);
                if (g.dC.data) store_one(g.dC.data, b * g.dC.batch + t * g.dC.token + j, int(g.dC.dtype), dC);
            }
    auto add_rows = [&](const float* part, int64_t columns, float* total) {
        if (!total) return;
        std::memset(total, 0, sizeof(float) * size_t(columns));
        for (int64_t b = 0; b < p.batch; ++b)
            for (int64_t i = 0; i < columns; ++i) total[i] += part[b * columns + i];
    };
    add_rows(dA_part, p.channels * p.states, g.dA);
    add_rows(dD_part, p.channels, g.dD);
    add_rows(dbias_part, p.channels, g.dbias);
}

}  // namespace MC_LEVEL

#endif
