// selective_scan on a CPU: forward, and backward from a checkpoint of the state every TILE tokens.
//
// A vector holds W neighbouring channels; the N states of those channels are N vectors. States are taken a few at a time, so
// that they and their A stay in registers over a tile of tokens; the sum over states is one multiply-add a state and never
// crosses lanes. dt and A meet as exp2(dt * (A log2 e)). A task is one batch row and a run of channels of one group, always
// cut the same way: results depend neither on the number of threads nor on how the tokens are divided between calls.
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
    View every;  // fp32 [batch, tokens, channels, states]: the state after every token, where it is asked for
    const float *A, *D, *dt_bias, *z_scale, *initial;
    float *final, *checkpoints;
};

struct ScanGradient {
    View dy, du, ddt, dB, dC, dz;
    const float* dfinal;
    float *dA, *dD, *dbias, *dz_scale, *dinitial;
};

// Channels of a task: few enough to feed every core, enough for long contiguous reads.
constexpr int64_t FORWARD_RUN = 64, BACKWARD_RUN = 128;

}  // namespace

#define MC_SELF "selective_scan/cpu.cpp"
#include "levels.h"

extern "C" MC_EXPORT void mc_scan_forward(const Scan* p) { MC_DISPATCH(scan_forward, *p); }
extern "C" MC_EXPORT void mc_scan_backward(const Scan* p, const ScanGradient* g) { MC_DISPATCH(scan_backward, *p, *g); }

#else

#include "state_tiles.h"

namespace MC_LEVEL {
namespace {

constexpr float LN2 = 0.693147181f;

MC_INLINE bool restarts(const Scan& p, int64_t b, int64_t t) {
    return p.resets.data && static_cast<const uint8_t*>(p.resets.data)[b * p.resets.batch + t * p.resets.token];
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
    if (p.softplus) return softplus(raw, slope);
    if (slope) *slope = set1(1.0f);
    return raw;
}

// What a tile holds of one block of channels on the way forward.
struct Forward {
    V dt[TILE], dtu[TILE], u[TILE], y[TILE];
};

// What belongs to W channels from c alone: the bias of dt, D, and the scale in the gate.
MC_INLINE void read_channels(const Scan& p, int64_t c, int count, float* bias, float* D, float* z_scale) {
    store(bias, p.dt_bias ? load_part(p.dt_bias + c, count) : zero());
    store(D, p.D ? load_part(p.D + c, count) : zero());
    store(z_scale, p.z_scale ? load_part(p.z_scale + c, count) : set1(1.0f));
}

// What a tile holds of one block of channels while its states are walked.
struct Tile {
    V dt[TILE], dtu[TILE], u[TILE], y[TILE], slope[TILE], gate[TILE], gy[TILE], gB[TILE], gA[TILE];  // gate: its sigmoid
};

// G states of one block of channels over a tile, forward again from the checkpoint and then back. dB, dC: [token][G][W] sums
// over the blocks of the task; dh, dA: [n][W] of this block.
// GATED: C . h is needed too, for the gradient of the gate.
template <bool GATED>
struct Retreat {
    int64_t N, tokens;
    const float *A2, *B, *C, *checkpoint;
    const bool* restart;
    Tile* tile;
    float *dh, *dA, *dB, *dC;

    template <int G>
    MC_INLINE void run(int64_t first) const {
        V h_all[TILE][G], a_all[TILE][G], h[G], A[G];
        MC_UNROLL(8)
        for (int i = 0; i < G; ++i) {
            h[i] = load(checkpoint + (first + i) * W);
            A[i] = load(A2 + (first + i) * W);
        }
        for (int64_t t = 0; t < tokens; ++t) {
            const float *B_t = B + t * N + first, *C_t = C + t * N + first;
            const V step = tile->dt[t], input = tile->dtu[t];
            V y = tile->y[t];
            if (restart[t]) {
                for (int i = 0; i < G; ++i) {
                    a_all[t][i] = zero();
                    h_all[t][i] = h[i] = input * set1(B_t[i]);
                    y = fma(h[i], set1(C_t[i]), y);
                }
                tile->y[t] = y;
                continue;
            }
            MC_UNROLL(8)
            for (int i = 0; i < G; ++i) {
                a_all[t][i] = exp2_finite(step * A[i]);
                h_all[t][i] = h[i] = fma(h[i], a_all[t][i], input * set1(B_t[i]));
                if constexpr (GATED) y = fma(h[i], set1(C_t[i]), y);
            }
            tile->y[t] = y;
        }
        V g[G], sum_A[G];
        MC_UNROLL(8)
        for (int i = 0; i < G; ++i) {
            g[i] = load(dh + (first + i) * W);
            sum_A[i] = load(dA + (first + i) * W);
        }
        for (int64_t t = tokens - 1; t >= 0; --t) {
            const float *B_t = B + t * N + first, *C_t = C + t * N + first;
            float *dB_t = dB + t * G * W, *dC_t = dC + t * G * W;
            const V step = tile->dt[t], input = tile->dtu[t], gy = tile->gy[t];
            V gB = tile->gB[t], gA = tile->gA[t];
            MC_UNROLL(8)
            for (int i = 0; i < G; ++i) {
                V grad = fma(gy, set1(C_t[i]), g[i]);
                store(dC_t + i * W, fma(gy, h[i], load(dC_t + i * W)));
                store(dB_t + i * W, fma(grad, input, load(dB_t + i * W)));
                h[i] = t ? h_all[t - 1][i] : load(checkpoint + (first + i) * W);
                gB = fma(grad, set1(B_t[i]), gB);
                g[i] = grad * a_all[t][i];
                V through = g[i] * h[i];
                gA = fma(through, A[i], gA);
                sum_A[i] = fma(through, step, sum_A[i]);
            }
            tile->gB[t] = gB;
            tile->gA[t] = gA;
        }
        MC_UNROLL(8)
        for (int i = 0; i < G; ++i) {
            store(dh + (first + i) * W, g[i]);
            store(dA + (first + i) * W, sum_A[i]);
        }
    }
};

// How many states are walked at a time: as many as their registers allow.
constexpr int BACKWARD_STATES = MC_WIDTH == 16 ? 4 : 2;

void forward_task(const Scan& p, int64_t b, int64_t group, int64_t first, int64_t last, int64_t first_block) {
    const int64_t N = p.states, size = N * W, blocks = ceil_div(last - first, W);
    const int64_t tiles = ceil_div(p.length, TILE), row_blocks = p.groups * ceil_div(p.channels / p.groups, W);
    Scratch<float> memory(size_t(2 * blocks * size + 3 * blocks * W + 2 * TILE * N));
    Scratch<Forward> all{size_t(blocks)};
    float *A2 = memory.get(), *state = A2 + blocks * size, *bias = state + blocks * size, *D = bias + blocks * W;
    float *z_scale = D + blocks * W, *B = z_scale + blocks * W, *C = B + TILE * N;
    for (int64_t k = 0; k < blocks; ++k) {
        int64_t c = first + k * W;
        int count = int(std::min<int64_t>(W, last - c));
        read_channels(p, c, count, bias + k * W, D + k * W, z_scale + k * W);
        gather_decay(p.A + c * N, N, count, A2 + k * size);
        if (p.initial)
            gather(p.initial + (b * p.channels + c) * N, N, count, state + k * size);
        else
            std::memset(state + k * size, 0, sizeof(float) * size_t(size));
    }
    for (int64_t tile = 0; tile < tiles; ++tile) {
        const int64_t start = tile * TILE, tokens = std::min(TILE, p.length - start);
        read_rows(p.B, p, b, group, start, tokens, B);
        read_rows(p.C, p, b, group, start, tokens, C);
        bool restart[TILE];
        for (int64_t t = 0; t < tokens; ++t) restart[t] = restarts(p, b, start + t);
        const int64_t next = std::min(start + TILE, p.length), next_tokens = std::min(TILE, p.length - next);
        for (const View* view : {&p.u, &p.dt, &p.z}) prefetch(*view, b, next, next_tokens, first, last - first);
        // Token by token over all channels of the task: long contiguous reads, whatever the row stride.
        for (int64_t t = 0; t < tokens; ++t)
            for (int64_t k = 0; k < blocks; ++k) {
                const int64_t c = first + k * W;
                const int count = int(std::min<int64_t>(W, last - c));
                Forward& at = all[size_t(k)];
                at.u[t] = read(p.u, b, start + t, c, count);
                at.dt[t] = step_size(p, read(p.dt, b, start + t, c, count), load(bias + k * W), nullptr);
                at.dtu[t] = at.dt[t] * at.u[t];
                at.y[t] = zero();
            }
        for (int64_t k = 0; k < blocks; ++k) {
            float* mine = state + k * size;
            if (p.checkpoints)
                std::memcpy(p.checkpoints + ((b * tiles + tile) * row_blocks + first_block + k) * size, mine,
                            sizeof(float) * size_t(size));
            Forward& at = all[size_t(k)];
            const int64_t step = p.every.data ? 1 : tokens;
            for (int64_t t = 0; t < tokens; t += step) {
                for_states<FORWARD_STATES>(N, Advance{N, step, A2 + k * size, B + t * N, C + t * N, at.dt + t, at.dtu + t,
                                                      restart + t, mine, mine, at.y + t});
                if (p.every.data)
                    scatter(mine, N, int(std::min<int64_t>(W, last - first - k * W)), static_cast<float*>(p.every.data) +
                            b * p.every.batch + (start + t) * p.every.token + (first + k * W) * N);
            }
        }
        for (int64_t t = 0; t < tokens; ++t)
            for (int64_t k = 0; k < blocks; ++k) {
                const int64_t c = first + k * W;
                const int count = int(std::min<int64_t>(W, last - c));
                const Forward& at = all[size_t(k)];
                V out = p.D ? fma(load(D + k * W), at.u[t], at.y[t]) : at.y[t];
                if (p.z.data) {
                    V z = read(p.z, b, start + t, c, count);
                    out = out * (z * sigmoid(load(z_scale + k * W) * z));
                }
                write(p.y, b, start + t, c, count, out);
            }
    }
    for (int64_t k = 0; k < blocks; ++k) {
        int64_t c = first + k * W;
        scatter(state + k * size, N, int(std::min<int64_t>(W, last - c)), p.final + (b * p.channels + c) * N);
    }
}

// The states of all blocks of a tile walked back, G at a time, and their sums over channels added to the task's rows.
template <bool GATED>
struct RetreatBlocks {
    const Scan& p;
    Retreat<GATED> walk;  // its pointers set to the first block
    int64_t blocks, b, group, start;
    Tile* tiles;
    float *dB_part, *dC_part;

    template <int G>
    MC_INLINE void run(int64_t first) const {
        const int64_t size = walk.N * W;
        alignas(64) float dB[TILE * G * W], dC[TILE * G * W];
        std::memset(dB, 0, sizeof dB);
        std::memset(dC, 0, sizeof dC);
        for (int64_t k = 0; k < blocks; ++k) {
            Retreat<GATED> block = walk;
            block.A2 += k * size;
            block.checkpoint += k * size;
            block.dh += k * size;
            block.dA += k * size;
            block.tile = tiles + k;
            block.dB = dB;
            block.dC = dC;
            block.template run<G>(first);
        }
        alignas(64) float sums[2][TILE * G];
        for (int64_t i = 0; i < walk.tokens * G; i += W) {
            store(sums[0] + i, lane_sums(reinterpret_cast<const V*>(dB) + i));
            store(sums[1] + i, lane_sums(reinterpret_cast<const V*>(dC) + i));
        }
        for (int64_t t = 0; t < walk.tokens; ++t) {
            const int64_t row = ((b * p.length + start + t) * p.groups + group) * walk.N + first;
            std::memcpy(dB_part + row, sums[0] + t * G, sizeof(float) * G);
            std::memcpy(dC_part + row, sums[1] + t * G, sizeof(float) * G);
        }
    }
};

// One task of the backward pass. dB_part, dC_part: [batch, length, groups, N] of this run of channels; dA_part [batch, channels,
// N], dD_part, dbias_part and dz_scale_part [batch, channels].
void backward_task(const Scan& p, const ScanGradient& g, int64_t b, int64_t group, int64_t first, int64_t last,
                   int64_t first_block, float* dB_part, float* dC_part, float* dA_part, float* dD_part, float* dbias_part,
                   float* dz_scale_part) {
    const int64_t N = p.states, size = N * W, blocks = ceil_div(last - first, W);
    const int64_t tiles = ceil_div(p.length, TILE), row_blocks = p.groups * ceil_div(p.channels / p.groups, W);
    Scratch<float> memory(size_t(3 * blocks * size + 6 * blocks * W + 2 * TILE * N));
    Scratch<Tile> tile_memory{size_t(blocks)};
    float *A2 = memory.get(), *dh_all = A2 + blocks * size, *dA_all = dh_all + blocks * size;
    float *dD_all = dA_all + blocks * size, *dbias_all = dD_all + blocks * W, *dz_scale_all = dbias_all + blocks * W;
    float *bias = dz_scale_all + blocks * W, *D = bias + blocks * W, *z_scale = D + blocks * W, *B = z_scale + blocks * W, *C = B + TILE * N;
    for (int64_t k = 0; k < blocks; ++k) {
        int64_t c = first + k * W;
        int count = int(std::min<int64_t>(W, last - c));
        read_channels(p, c, count, bias + k * W, D + k * W, z_scale + k * W);
        gather_decay(p.A + c * N, N, count, A2 + k * size);
        if (g.dfinal)
            gather(g.dfinal + (b * p.channels + c) * N, N, count, dh_all + k * size);
        else
            std::memset(dh_all + k * size, 0, sizeof(float) * size_t(size));
    }
    std::memset(dA_all, 0, sizeof(float) * size_t(blocks * (size + 3 * W)));
    for (int64_t tile = tiles - 1; tile >= 0; --tile) {
        const int64_t start = tile * TILE, tokens = std::min(TILE, p.length - start);
        read_rows(p.B, p, b, group, start, tokens, B);
        read_rows(p.C, p, b, group, start, tokens, C);
        bool restart[TILE];
        for (int64_t t = 0; t < tokens; ++t) restart[t] = restarts(p, b, start + t);
        const int64_t next = std::max<int64_t>(start - TILE, 0), next_tokens = std::min(TILE, start);
        for (const View* view : {&p.u, &p.dt, &p.z, &g.dy}) prefetch(*view, b, next, next_tokens, first, last - first);
        for (int64_t t = 0; t < tokens; ++t)
            for (int64_t k = 0; k < blocks; ++k) {
                const int64_t c = first + k * W;
                const int count = int(std::min<int64_t>(W, last - c));
                Tile& at = tile_memory[size_t(k)];
                at.u[t] = read(p.u, b, start + t, c, count);
                at.dt[t] = step_size(p, read(p.dt, b, start + t, c, count), load(bias + k * W), &at.slope[t]);
                at.dtu[t] = at.dt[t] * at.u[t];
                at.gy[t] = read(g.dy, b, start + t, c, count);
                if (p.z.data) {
                    V z = read(p.z, b, start + t, c, count);
                    at.gate[t] = sigmoid(load(z_scale + k * W) * z);
                    at.gy[t] = at.gy[t] * (z * at.gate[t]);
                }
                store(dD_all + k * W, fma(at.gy[t], at.u[t], load(dD_all + k * W)));
                at.y[t] = at.gB[t] = at.gA[t] = zero();
            }
        const float* checkpoint = p.checkpoints + ((b * tiles + tile) * row_blocks + first_block) * size;
        auto walk_back = [&](auto gated) {
            constexpr bool GATED = decltype(gated)::value;
            Retreat<GATED> walk{N, tokens, A2, B, C, checkpoint, restart, nullptr, dh_all, dA_all, nullptr, nullptr};
            for_states<BACKWARD_STATES>(
                N, RetreatBlocks<GATED>{p, walk, blocks, b, group, start, tile_memory.get(), dB_part, dC_part});
        };
        if (g.dz.data)
            walk_back(std::true_type{});
        else
            walk_back(std::false_type{});
        for (int64_t t = tokens - 1; t >= 0; --t)
            for (int64_t k = 0; k < blocks; ++k) {
                const int64_t c = first + k * W;
                const int count = int(std::min<int64_t>(W, last - c));
                const Tile& at = tile_memory[size_t(k)];
                if (g.dz.data) {  // d(z s)/dz = s (1 + z_scale z (1 - s))
                    V z = read(p.z, b, start + t, c, count), scaled = load(z_scale + k * W) * z, s = at.gate[t];
                    V rise = s * fma(scaled, set1(1.0f) - s, set1(1.0f));
                    V gy = read(g.dy, b, start + t, c, count) * fma(load(D + k * W), at.u[t], at.y[t]);
                    write(g.dz, b, start + t, c, count, gy * rise);
                    V bend = z * z * (s * (set1(1.0f) - s));  // d(z s)/dz_scale
                    store(dz_scale_all + k * W, fma(gy, bend, load(dz_scale_all + k * W)));
                }
                if (g.du.data) write(g.du, b, start + t, c, count, fma(at.gB[t], at.dt[t], at.gy[t] * load(D + k * W)));
                V draw = fma(at.gB[t], at.u[t], at.gA[t] * set1(LN2)) * at.slope[t];
                store(dbias_all + k * W, load(dbias_all + k * W) + draw);
                if (g.ddt.data) write(g.ddt, b, start + t, c, count, draw);
            }
    }
    for (int64_t k = 0; k < blocks; ++k) {
        int64_t c = first + k * W;
        int count = int(std::min<int64_t>(W, last - c));
        if (g.dinitial) scatter(dh_all + k * size, N, count, g.dinitial + (b * p.channels + c) * N);
        scatter(dA_all + k * size, N, count, dA_part + (b * p.channels + c) * N);
        store_part(dD_part + b * p.channels + c, load(dD_all + k * W), count);
        store_part(dbias_part + b * p.channels + c, load(dbias_all + k * W), count);
        store_part(dz_scale_part + b * p.channels + c, load(dz_scale_all + k * W), count);
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
    for_each_task(p, FORWARD_RUN, [&](int64_t b, int64_t group, int64_t, int64_t first, int64_t last, int64_t block) {
        forward_task(p, b, group, first, last, block);
    });
}

void scan_backward(const Scan& p, const ScanGradient& g) {
    const int64_t runs = ceil_div(p.channels / p.groups, BACKWARD_RUN);
    const int64_t rows = p.batch * p.length * p.groups * p.states, wide = p.batch * p.channels;
    Scratch<float> rows_part(size_t(2 * runs * rows)), wide_part(size_t(wide * (p.states + 3)));
    float *dB_part = rows_part.get(), *dC_part = dB_part + runs * rows;
    float *dA_part = wide_part.get(), *dD_part = dA_part + wide * p.states, *dbias_part = dD_part + wide;
    float* dz_scale_part = dbias_part + wide;
    for_each_task(p, BACKWARD_RUN,
                  [&](int64_t b, int64_t group, int64_t part, int64_t first, int64_t last, int64_t block) {
                      backward_task(p, g, b, group, first, last, block, dB_part + part * rows, dC_part + part * rows, dA_part,
                                    dD_part, dbias_part, dz_scale_part);
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
    add_rows(dz_scale_part, p.channels, g.dz_scale);
}

}  // namespace
}  // namespace MC_LEVEL

#endif
