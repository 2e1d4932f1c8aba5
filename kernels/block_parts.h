// The parts of a block's forward that mixer_step and mixer_prefill share, for the level under which this file is included.
//
// The arithmetic of each is that of the single op, in the same order. No include guard: see simd.h.
#include "linear_tasks.h"
#include "norm_rows.h"
#include "hadamard_rows.h"
#include "state_tiles.h"

namespace MC_LEVEL {
namespace {

// The largest sizes among blocks: buffers are made once a call.
struct Sizes {
    int64_t size = 0, in = 0, conv = 0, x = 0, channels = 0, inputs = 0, groups = 1, states = 0, head_rows = 0;

    Sizes(const Block* const* blocks, int64_t count) {
        for (int64_t i = 0; i < count; ++i) {
            const Block& k = *blocks[i];
            size = std::max(size, k.size), in = std::max(in, k.in.outputs), conv = std::max(conv, k.conv_channels());
            x = std::max(x, k.x.outputs), channels = std::max(channels, k.channels), states = std::max(states, k.states);
            if (k.ssd) head_rows = std::max(head_rows, k.channels / k.heads);
            for (const Matrix* m : {&k.in, &k.x, &k.dt, &k.out})
                inputs = std::max(inputs, m->inputs), groups = std::max(groups, m->groups);
        }
    }
};

inline Tasks linear_of(const Matrix& m, int64_t rows, int64_t threads, const float* x, int64_t x_row, float* y, int64_t y_row) {
    const Linear l{rows, m.inputs, m.outputs, m.groups, threads, m.activation, m.act_bits, x_row, y_row, F32, F32, m.scale_dtype,
                   m.tiled, m.keep, m.of, x, m.weight, m.scale, m.zero, m.bias, m.act_scale, y};
    return Tasks(l, Weights(m.weights));
}

// scratch: two rows.
inline void rotate_row(const Rotation& r, int64_t size, const float* x, float* y, float* scratch, float* scratch2) {
    const Hadamard h{1, size, r.block, r.base, 0, 1, size, F32, x, r.mix, r.signs, y};
    transform_row(h, 0, float(1.0 / std::sqrt(double(r.block))), scratch, scratch2);
}

// -- convolution -----------------------------------------------------------------------------------------------------

MC_INLINE V gather_part(const float* from, int64_t step, int count) {
    if (step == 1) return load_part(from, count);
    float lanes[W] = {};
    for (int i = 0; i < count; ++i) lanes[i] = from[i * step];
    return load(lanes);
}

MC_INLINE void scatter_part(float* to, int64_t step, V x, int count) {
    if (step == 1) return store_part(to, x, count);
    float lanes[W];
    store(lanes, x);
    for (int i = 0; i < count; ++i) to[i * step] = lanes[i];
}

// weight [count channels, K] -> a vector a tap.
MC_INLINE void load_taps(const float* weight, int64_t K, int count, V* taps) {
#if MC_WIDTH == 16
    if (K == 4 && count == W) {
        const __m512i pick = _mm512_setr_epi32(0, 4, 8, 12, 16, 20, 24, 28, 0, 4, 8, 12, 16, 20, 24, 28);
        const __m512 a = _mm512_loadu_ps(weight), b = _mm512_loadu_ps(weight + 16);
        const __m512 c = _mm512_loadu_ps(weight + 32), d = _mm512_loadu_ps(weight + 48);
        for (int t = 0; t < 4; ++t) {
            const __m512i at = _mm512_add_epi32(pick, _mm512_set1_epi32(t));
            taps[t].v = _mm512_shuffle_f32x4(_mm512_permutex2var_ps(a, at, b), _mm512_permutex2var_ps(c, at, d), 0x44);
        }
        return;
    }
#endif
    for (int64_t t = 0; t < K; ++t) taps[t] = gather_part(weight + t, K, count);
}

// Channels [first, last) of row m of the batch over `tokens` tokens, x rows x_row apart, u rows u_row apart (u may be x); the
// state moved on. KS: the width, 0 for any.
template <int KS>
MC_INLINE void convolve(const Block& k, const State& s, int64_t m, int64_t first, int64_t last, int64_t tokens, const float* x,
                        int64_t x_row, float* u, int64_t u_row) {
    const int64_t K = KS ? KS : k.width, old = K - 1;
    const float* from = s.conv_from ? s.conv_from + m * s.conv_from_batch : nullptr;
    float* to = s.conv_to + m * s.conv_to_batch;
    for (int64_t c = first; c < last; c += W) {
        const int count = int(std::min<int64_t>(W, last - c));
        V window[KS ? KS : MAX_WIDTH], taps[KS ? KS : MAX_WIDTH];
        MC_UNROLL(4)
        for (int64_t t = 0; t < old; ++t)
            window[t] = from ? gather_part(from + t * s.conv_from_token + c * s.conv_from_channel, s.conv_from_channel, count)
                             : zero();
        load_taps(k.conv + c * K, K, count, taps);
        const V bias = k.conv_bias ? load_part(k.conv_bias + c, count) : zero();
        const V scale = k.conv_scale ? load_part(k.conv_scale + c, count) : zero();
        for (int64_t row = 0; row < tokens; ++row) {
            window[old] = load_part(x + row * x_row + c, count);
            V y = bias;
            MC_UNROLL(4)
            for (int64_t t = 0; t < K; ++t) y = fma(window[t], taps[t], y);
            if (k.activated) y = y * sigmoid(k.conv_scale ? y * scale : y);
            store_part(u + row * u_row + c, y, count);
            MC_UNROLL(4)
            for (int64_t t = 0; t < old; ++t) window[t] = window[t + 1];
        }
        for (int64_t t = 0; t < old; ++t)
            scatter_part(to + t * s.conv_to_token + c * s.conv_to_channel, s.conv_to_channel, window[t], count);
    }
}

inline void convolve(const Block& k, const State& s, int64_t m, int64_t first, int64_t last, int64_t tokens, const float* x,
                     int64_t x_row, float* u, int64_t u_row) {
    if (k.width == 4) convolve<4>(k, s, m, first, last, tokens, x, x_row, u, u_row);
    else convolve<0>(k, s, m, first, last, tokens, x, x_row, u, u_row);
}

// -- Mamba-1's projections ---------------------------------------------------------------------------------------------

// What is left of x after it was int8 with that scale; x itself where there is none.
MC_INLINE V through_int8(V x, const float* scale, int count) {
    if (!scale) return x;
    const V s = load_part(scale, count);
    return vmin(set1(127.0f), vmax(set1(-127.0f), round_even(x / s))) * s;  // a NaN stays one
}

inline bool changes_low(const Block& k) { return k.inner_norm || k.B_scale; }

// dt, B and C of a row behind their norms, B and C as the scan reads them; `to` may be `low`.
inline void finish_low(const Block& k, const float* low, float* to, float* scratch) {
    const int64_t span = k.groups * k.states;
    if (to != low) std::memcpy(to, low, sizeof(float) * size_t(k.rank + 2 * span));
    if (k.inner_norm) {
        const auto norm = [&](int64_t from, int64_t rows, int64_t size) {
            const Norm n{rows, size, size, 1, size, 0, F32, F32, F32, k.inner_eps, to + from, nullptr, nullptr, to + from};
            for (int64_t row = 0; row < rows; ++row) norm_row(n, row, scratch);
        };
        norm(0, 1, k.rank);
        norm(k.rank, 2 * k.groups, k.states);
    }
    if (!k.B_scale) return;
    for (int64_t i = 0; i < span; i += W) {
        const int count = int(std::min<int64_t>(W, span - i));
        float *B = to + k.rank + i, *C = B + span;
        store_part(B, through_int8(load_part(B, count), k.B_scale + i, count), count);
        store_part(C, through_int8(load_part(C, count), k.C_scale + i, count), count);
    }
}

// -- Mamba-2's steps ---------------------------------------------------------------------------------------------------

// dt (raw, `step` apart) and decay of a head over a tile of tokens.
inline void read_steps(const Block& k, int64_t head, const float* raw, int64_t step, int64_t tokens, Steps& at) {
    const float bias = k.dt_bias ? k.dt_bias[head] : 0.0f, low = float(k.dt_low), high = float(k.dt_high);
    for (int64_t t = 0; t < tokens; t += W) {
        float lanes[W] = {};
        for (int64_t i = 0; i < W && t + i < tokens; ++i) lanes[i] = raw[(t + i) * step] + bias;
        const V dt = softplus(load(lanes));
        store(at.dt + t, dt);
    }
    for (int64_t t = 0; t < tokens; ++t) {
        if (at.dt[t] < low || at.dt[t] > high) at.dt[t] = std::min(std::max(at.dt[t], low), high);
        at.restart[t] = false;
    }
    const V A2 = set1(k.decay[head] * LOG2E);
    for (int64_t t = 0; t < tokens; t += W) store(at.decay + t, exp2v(load(at.dt + t) * A2));
}

}  // namespace
}  // namespace MC_LEVEL
