// causal_conv1d on a CPU, forward and backward, with the activation y * sigmoid(s y) fused.
//
// A vector holds W neighbouring channels. Forward adds the bias and then the taps, oldest first, for every output alone: the
// result of a token does not depend on how many tokens come in one call. Backward walks the tokens once, recomputes the
// convolution, and keeps the gradients of the last K inputs pending until no later output can reach them; gradients of the
// weights are summed over the tokens of a row, then over rows, in order.
//
// A convolution that looks `ahead` tokens ("same" padding) is the causal one read that many tokens later, with zeros behind the
// end. Where inputs or weights are int8 the taps are codes: their sum is exact in fp32 and is scaled before the bias.
#ifndef MC_LEVEL
#include "native.h"

namespace {

using namespace mc;

struct Conv {
    int64_t batch, length, channels, width, activation, threads, ahead;
    View x, initial, y, resets;  // initial: [batch, width - 1, channels]; resets: uint8 [batch, length]
    const float *weight, *bias, *act_scale, *scale;  // weight: [channels, width]; scale: of a sum of codes [channels], or null
};

struct ConvGradient {
    View dy, dx, dinitial;
    float *dweight, *dbias, *dact_scale;
};

constexpr int64_t MAX_WIDTH = 16;
constexpr int64_t CHUNK = 64, RUN = 256;  // tokens and channels of a task

}  // namespace

#define MC_SELF "causal_conv1d/cpu.cpp"
#include "levels.h"

extern "C" MC_EXPORT void mc_conv_forward(const Conv* p) { MC_DISPATCH(conv_forward, *p); }
extern "C" MC_EXPORT void mc_conv_backward(const Conv* p, const ConvGradient* g) { MC_DISPATCH(conv_backward, *p, *g); }

#else

namespace MC_LEVEL {
namespace {

// The input at position t, which lies in the initial state where it is negative (zeros where there is none); zero behind the end.
MC_INLINE V input(const Conv& p, int64_t b, int64_t t, int64_t c, int count) {
    if (t >= p.length) return zero();
    if (t >= 0) return read(p.x, b, t, c, count);
    return p.initial.data ? read(p.initial, b, t + p.width - 1, c, count) : zero();
}

// How many inputs before token t belong to its sequence, at most K - 1.
MC_INLINE int64_t reach(const Conv& p, int64_t b, int64_t t) {
    if (!p.resets.data) return p.width - 1;
    const uint8_t* resets = static_cast<const uint8_t*>(p.resets.data) + b * p.resets.batch;
    for (int64_t back = 0; back < p.width - 1; ++back)
        if (t - back >= 0 && resets[(t - back) * p.resets.token]) return back;
    return p.width - 1;
}

// Taps of the block of channels from c: [k][W], zero in padding lanes.
MC_INLINE void gather_taps(const Conv& p, int64_t c, int count, float* taps) {
    for (int64_t k = 0; k < p.width; ++k)
        for (int i = 0; i < W; ++i) taps[k * W + i] = i < count ? p.weight[(c + i) * p.width + k] : 0.0f;
}

void conv_forward_task(const Conv& p, int64_t b, int64_t start, int64_t stop, int64_t first, int64_t last) {
    const int64_t K = p.width, blocks = ceil_div(last - first, W);
    Scratch<float> taps(size_t(blocks * K * W));
    for (int64_t k = 0; k < blocks; ++k)
        gather_taps(p, first + k * W, int(std::min<int64_t>(W, last - first - k * W)), taps.get() + k * K * W);
    for (int64_t t = start; t < stop; ++t) {
        const int64_t oldest = K - 1 - reach(p, b, t);
        for (int64_t block = 0; block < blocks; ++block) {
            const int64_t c = first + block * W;
            const int count = int(std::min<int64_t>(W, last - c));
            const V bias = p.bias ? load_part(p.bias + c, count) : zero();
            V y = p.scale ? zero() : bias;
            for (int64_t k = oldest; k < K; ++k)
                y = fma(input(p, b, t + p.ahead - K + 1 + k, c, count), load(taps.get() + (block * K + k) * W), y);
            if (p.scale) y = y * load_part(p.scale + c, count) + bias;
            if (p.activation) y = y * sigmoid(p.act_scale ? y * load_part(p.act_scale + c, count) : y);
            write(p.y, b, t, c, count, y);
        }
    }
}

void conv_forward(const Conv& p) {
    const int64_t chunks = ceil_div(p.length, CHUNK), runs = ceil_div(p.channels, RUN), tasks = p.batch * chunks * runs;
#pragma omp parallel for schedule(dynamic) num_threads(int(p.threads)) \
    if (p.threads > 1 && tasks > 1 && p.batch * p.length * p.channels > 65536)
    for (int64_t task = 0; task < tasks; ++task) {
        int64_t b = task / (chunks * runs), chunk = task / runs % chunks, run = task % runs;
        conv_forward_task(p, b, chunk * CHUNK, std::min((chunk + 1) * CHUNK, p.length), run * RUN,
                          std::min((run + 1) * RUN, p.channels));
    }
}

// The block of channels from c of row b. dweight: [channels, K], dbias and dact_scale: [channels] of this row.
template <int KS>
void conv_backward_task(const Conv& p, const ConvGradient& g, int64_t b, int64_t c, int count, float* dweight, float* dbias,
                        float* dact_scale) {
    const int64_t K = KS ? KS : p.width;
    float taps[MAX_WIDTH * W];
    gather_taps(p, c, count, taps);
    const V bias = p.bias ? load_part(p.bias + c, count) : zero();
    const V scale = p.act_scale ? load_part(p.act_scale + c, count) : set1(1.0f);
    // Position t - K + 1 of the input is complete: no later output reads it.
    auto emit = [&](int64_t position, V dx) {
        if (position >= 0) {
            if (g.dx.data && position < p.length) write(g.dx, b, position, c, count, dx);
        } else if (g.dinitial.data) {
            write(g.dinitial, b, position + K - 1, c, count, dx);
        }
    };
    V window[KS ? KS : MAX_WIDTH], pending[KS ? KS : MAX_WIDTH], dw[KS ? KS : MAX_WIDTH], db = zero(), ds = zero();
    for (int64_t k = 0; k < K; ++k) {
        pending[k] = dw[k] = zero();
        window[k] = k ? input(p, b, k - K, c, count) : zero();
    }
    for (int64_t t = 0; t < p.length + p.ahead; ++t) {  // the newest input of output t - ahead
        const int64_t oldest = K - 1 - reach(p, b, t);
        MC_UNROLL(4)
        for (int64_t k = 0; k + 1 < K; ++k) {
            window[k] = window[k + 1];
            pending[k] = pending[k + 1];
        }
        window[K - 1] = input(p, b, t, c, count);
        pending[K - 1] = zero();
        V gy = t < p.ahead ? zero() : read(g.dy, b, t - p.ahead, c, count);
        if (p.activation) {
            V y = bias;
            MC_UNROLL(4)
            for (int64_t k = 0; k < K; ++k)
                if (k >= oldest) y = fma(window[k], load(taps + k * W), y);
            V s = sigmoid(scale * y);  // d(y s)/dy = s (1 + scale y (1 - s)), d(y s)/dscale = y y s (1 - s)
            ds = fma(gy * y, y * (s * (set1(1.0f) - s)), ds);
            gy = gy * (s * fma(scale * y, set1(1.0f) - s, set1(1.0f)));
        }
        db = db + gy;
        MC_UNROLL(4)
        for (int64_t k = 0; k < K; ++k)
            if (k >= oldest) {
                pending[k] = fma(gy, load(taps + k * W), pending[k]);
                dw[k] = fma(gy, window[k], dw[k]);
            }
        emit(t - K + 1, pending[0]);
    }
    for (int64_t k = 1; k < K; ++k) emit(p.length + p.ahead - K + k, pending[k]);
    store_part(dbias + c, db, count);
    store_part(dact_scale + c, ds, count);
    for (int64_t k = 0; k < K; ++k) {
        float lanes[W];
        store(lanes, dw[k]);
        for (int i = 0; i < count; ++i) dweight[(c + i) * K + k] = lanes[i];
    }
}

void conv_backward(const Conv& p, const ConvGradient& g) {
    const int64_t blocks = ceil_div(p.channels, W), tasks = p.batch * blocks, K = p.width;
    Scratch<float> part(size_t(p.batch * p.channels * (K + 2)));
    float *dweight = part.get(), *dbias = dweight + p.batch * p.channels * K, *dact_scale = dbias + p.batch * p.channels;
#pragma omp parallel for schedule(dynamic, 4) num_threads(int(p.threads)) \
    if (p.threads > 1 && tasks > 1 && p.batch * p.length * p.channels > 65536)
    for (int64_t task = 0; task < tasks; ++task) {
        const int64_t b = task / blocks, c = task % blocks * W;
        auto run = K == 4 ? conv_backward_task<4> : conv_backward_task<0>;
        run(p, g, b, c, int(std::min<int64_t>(W, p.channels - c)), dweight + b * p.channels * K, dbias + b * p.channels,
            dact_scale + b * p.channels);
    }
    auto add_rows = [&](const float* rows, int64_t columns, float* total) {
        if (!total) return;
        std::memset(total, 0, sizeof(float) * size_t(columns));
        for (int64_t b = 0; b < p.batch; ++b)
            for (int64_t i = 0; i < columns; ++i) total[i] += rows[b * columns + i];
    };
    add_rows(dweight, p.channels * K, g.dweight);
    add_rows(dbias, p.channels, g.dbias);
    add_rows(dact_scale, p.channels, g.dact_scale);
}

}  // namespace
}  // namespace MC_LEVEL

#endif
