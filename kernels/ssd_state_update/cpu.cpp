// ssd_state_update with an int8 state: one token, the arithmetic of ssd_scan between two roundings of the state.
//
// A task is one head of one batch row. See state8_tiles.h for the rounding.
#ifndef MC_LEVEL
#include "native.h"

namespace {

using namespace mc;

struct Update {
    int64_t batch, heads, head_dim, groups, states, softplus, threads;
    View x, dt, B, C, y;  // of one token
    const float *A, *D, *dt_bias;
    const int8_t* codes;  // [batch, heads, head_dim, states]
    const float* scale;   // [batch, heads, head_dim]
    const int64_t* step;  // [batch], of the state behind the token
    int8_t* new_codes;
    float* new_scale;
    double dt_low, dt_high;
};

}  // namespace

#define MC_SELF "ssd_state_update/cpu.cpp"
#include "levels.h"

extern "C" MC_EXPORT void mc_ssd_update_int8(const Update* p) { MC_DISPATCH(update, *p); }

#else

#include "state_tiles.h"
#include "state8_tiles.h"

namespace MC_LEVEL {
namespace {

// `count` numbers from `from` on, padded with zeros.
inline void read_row(const View& view, int64_t b, int64_t from, int64_t count, int64_t padded, float* to) {
    for (int64_t n = 0; n < padded; n += W) store(to + n, read(view, b, 0, from + n, int(std::min<int64_t>(W, count - n))));
}

void update_head(const Update& p, int64_t b, int64_t head) {
    const int64_t N = p.states, P = p.head_dim, padded = ceil_div(N, W) * W, group = head / (p.heads / p.groups);
    const int64_t row = (b * p.heads + head) * P;
    Scratch<float> memory(size_t((P + 2) * padded + 2 * (P + W)));
    float *state = memory.get(), *B = state + P * padded, *C = B + padded, *x = C + padded, *y = x + P + W;
    read_row(p.B, b, group * N, N, padded, B);
    read_row(p.C, b, group * N, N, padded, C);
    read_row(p.x, b, head * P, P, ceil_div(P, W) * W, x);
    dequantize_rows(p.codes + row * N, P, N, padded, p.scale + row, state);
    Steps at;
    float lanes[W];
    const float raw = load_one(p.dt.data, b * p.dt.batch + head, int(p.dt.dtype)) + (p.dt_bias ? p.dt_bias[head] : 0.0f);
    store(lanes, p.softplus ? softplus(set1(raw)) : set1(raw));
    const float low = float(p.dt_low), high = float(p.dt_high);
    at.dt[0] = lanes[0] < low || lanes[0] > high ? std::min(std::max(lanes[0], low), high) : lanes[0];
    store(lanes, exp2v(set1(at.dt[0]) * set1(p.A[head] * LOG2E)));
    at.decay[0] = lanes[0];
    at.restart[0] = false;
    const float D = p.D ? p.D[head] : 0.0f;
    advance_head(P, 1, padded, P, at, B, C, x, D, state, state, y);
    for (int64_t c = 0; c < P; c += W) {
        const int count = int(std::min<int64_t>(W, P - c));
        write(p.y, b, 0, head * P + c, count, load_part(y + c, count));
    }
    quantize_rows(state, P, N, padded, place_of(p.step[b], head * P), p.new_codes + row * N, p.new_scale + row);
}

void update(const Update& p) {
    const int64_t tasks = p.batch * p.heads;
#pragma omp parallel for schedule(dynamic) num_threads(int(p.threads)) \
    if (p.threads > 1 && tasks > 1 && tasks * p.head_dim * p.states > 262144)
    for (int64_t task = 0; task < tasks; ++task) update_head(p, task / p.heads, task % p.heads);
}

}  // namespace
}  // namespace MC_LEVEL

#endif
