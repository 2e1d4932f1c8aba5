// selective_state_update with an int8 state: one token, the arithmetic of selective_scan between two roundings of the state.
//
// A task is one batch row and a run of channels of one group. See state8_tiles.h for the rounding.
#ifndef MC_LEVEL
#include "native.h"

namespace {

using namespace mc;

struct Update {
    int64_t batch, channels, groups, states, softplus, threads;
    View u, dt, B, C, z, y;  // of one token
    const float *A, *D, *dt_bias, *z_scale;
    const int8_t* codes;  // [batch, states, channels]
    const float* scale;   // [batch, channels]
    const int64_t* step;  // [batch], of the state behind the token
    int8_t* new_codes;
    float* new_scale;
};

constexpr int64_t RUN = 64;  // channels of a task

}  // namespace

#define MC_SELF "selective_state_update/cpu.cpp"
#include "levels.h"

extern "C" MC_EXPORT void mc_update_int8(const Update* p) { MC_DISPATCH(update, *p); }

#else

#include "state_tiles.h"
#include "state8_tiles.h"

namespace MC_LEVEL {
namespace {

void update_task(const Update& p, int64_t b, int64_t group, int64_t first, int64_t last) {
    const int64_t E = p.channels, N = p.states;
    Scratch<float> memory(size_t(2 * N * W + 2 * (N + W)));
    float *A2 = memory.get(), *state = A2 + N * W, *B = state + N * W, *C = B + N + W;
    const bool restart[1] = {false};
    for (int64_t n = 0; n < N; n += W) {
        const int count = int(std::min<int64_t>(W, N - n));
        store_part(B + n, read(p.B, b, 0, group * N + n, count), count);
        store_part(C + n, read(p.C, b, 0, group * N + n, count), count);
    }
    for (int64_t c = first; c < last; c += W) {
        const int count = int(std::min<int64_t>(W, last - c));
        const int64_t at = b * N * E + c;
        gather_decay(p.A + c * N, N, count, A2);
        dequantize_channels(p.codes + at, E, N, p.scale + b * E + c, count, state);
        const V u = read(p.u, b, 0, c, count), raw = read(p.dt, b, 0, c, count);
        V dt = p.dt_bias ? raw + load_part(p.dt_bias + c, count) : raw;
        if (p.softplus) dt = softplus(dt);
        const V dtu = dt * u;
        V y = zero();
        for_states<FORWARD_STATES>(N, Advance{N, 1, A2, B, C, &dt, &dtu, restart, state, state, &y});
        if (p.D) y = fma(load_part(p.D + c, count), u, y);
        if (p.z.data) {
            const V z = read(p.z, b, 0, c, count);
            y = y * (z * sigmoid(p.z_scale ? load_part(p.z_scale + c, count) * z : z));
        }
        write(p.y, b, 0, c, count, y);
        quantize_channels(state, E, N, place_of(p.step[b], c), count, p.new_codes + at, p.new_scale + b * E + c);
    }
}

void update(const Update& p) {
    const int64_t per_group = p.channels / p.groups, runs = ceil_div(per_group, RUN), tasks = p.batch * p.groups * runs;
#pragma omp parallel for schedule(dynamic) num_threads(int(p.threads)) \
    if (p.threads > 1 && tasks > 1 && p.batch * p.channels * p.states > 65536)
    for (int64_t task = 0; task < tasks; ++task) {
        const int64_t group = task / runs % p.groups, first = task % runs * RUN, start = group * per_group;
        update_task(p, task / (p.groups * runs), group, start + first, start + std::min(first + RUN, per_group));
    }
}

}  // namespace
}  // namespace MC_LEVEL

#endif
