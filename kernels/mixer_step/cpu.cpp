// mixer_step on a CPU: one token through all blocks of a model in one call, each block from the residual back to the residual.
//
// The arithmetic is that of the single ops, in the same order (rms_norm, the linears, causal_conv1d, the scans, hadamard): only
// the calls between them are gone. Threads share one parallel region for the whole token; inside a stage they take runs of
// neighbouring channels from a counter, and what follows channel by channel is done at once, on the run that was just made:
//
//     in_proj  + convolution and its activation        (in_proj's outputs that the convolution reads)
//     x_proj                                           Mamba-1 only
//     dt_proj  + scan and gate                         Mamba-2: the heads, on what in_proj and the convolution left
//     out_proj + residual
//
// so that a block costs four barriers (Mamba-2: three), which are our own: see Barrier. What a linear needs of a whole row (norm,
// rotation, quantization) takes less time than a barrier: with one row every thread does it for itself. A run's result depends
// neither on who takes it nor on where it starts: any number of threads gives the same bits.
//
// Legend: M rows of the batch, D d_model, E d_inner, K conv width, N d_state, G groups, R dt_rank, H heads, P head_dim.
#ifndef MC_LEVEL
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wuninitialized"  // GCC 12 warns of its own intrinsics (bug 105593)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#include "blocks.h"
#include "team.h"

namespace {

using namespace mc;

struct Step {
    int64_t batch, blocks, threads;
    const Block* const* block;
    const State* state;
    float* h;  // [M, D], replaced
};

constexpr int STAGES = 8;  // counters of a block
constexpr int64_t AHEAD_CHANNELS = 128;  // of the scan's state and decay, on their way from memory

}  // namespace

#define MC_SELF "mixer_step/cpu.cpp"
#include "levels.h"

extern "C" MC_EXPORT void mc_mixer_step(const void* p) { MC_DISPATCH(mixer_step, *static_cast<const Step*>(p)); }

#else

#include "block_parts.h"
#include "state8_tiles.h"

namespace MC_LEVEL {
namespace {

using Counter = std::atomic<int64_t>;

// What all threads write and read, [M, ...] each.
struct Shared {
    Scratch<float> in, u, low, dt, y, out;

    Shared(const Sizes& s, int64_t batch)
        : in(size_t(batch * s.in)), u(size_t(batch * s.conv)), low(size_t(batch * s.x)), dt(size_t(batch * s.channels)),
          y(size_t(batch * s.channels)), out(size_t(batch * s.size)) {}
};

// Whole rows made ready for a linear: by every thread for itself, or together.
struct Ready {
    Rows rows;
    Scratch<float> x, low;  // a row as it was before it was quantized; dt, B and C behind their norms

    Ready(const Sizes& s, int64_t batch)
        : rows(batch, s.inputs, s.groups, true, true), x(size_t(batch * std::max(s.size, s.channels))),
          low(size_t(batch * s.x)) {}
};

// What a thread needs for itself.
struct Worker {
    Workspace work;
    Scratch<float> row, row2, states;  // states: decay and state of W channels of Mamba-1, or B, C and a head of Mamba-2
    Scratch<int8_t> natural;

    explicit Worker(const Sizes& s)
        : work(s.inputs, s.groups), row(size_t(s.inputs + W)), row2(size_t(s.inputs + W)),
          states(size_t(std::max(3 * s.states * W, (s.head_rows + 2) * (s.states + W)))), natural(size_t(s.inputs + 128)) {}
};

// One thread on its way through the blocks.
struct Walker {
    const Step& p;
    const int threads;
    const bool alone;  // whole rows are made ready by every thread for itself
    Shared& all;
    Ready& ready;
    Counter* counters;
    Barrier& barrier;
    Worker mine;

    Walker(const Step& p, int threads, const Sizes& s, Shared& all, Ready& ready, Counter* counters, Barrier& barrier)
        : p(p), threads(threads), alone(p.batch == 1 || threads == 1), all(all), ready(ready), counters(counters),
          barrier(barrier), mine(s) {}

    void meet() { barrier.wait(threads); }

    Tasks linear(const Matrix& m, const float* x, int64_t x_row, float* y) const {
        Tasks tasks = linear_of(m, p.batch, threads, x, x_row, y, m.outputs);
        if (tasks.shape != Tasks::FLOAT) tasks.chunk = std::max<int64_t>(1, std::min(tasks.chunk, tasks.count / (4 * threads)));
        return tasks;
    }

    // prepare(row) for every row, by everyone or shared out.
    template <typename Prepare>
    void each_row(Counter& next, Prepare prepare) {
        if (alone) {
            for (int64_t m = 0; m < p.batch; ++m) prepare(m);
            return;
        }
        for (int64_t m; (m = next.fetch_add(1)) < p.batch;) prepare(m);
        meet();
    }

    // Runs of a linear's outputs, each followed by what comes next on its channels: done(first, last).
    template <typename Done>
    void each_run(Counter& next, const Tasks& tasks, Done done) {
        for (int64_t first; (first = next.fetch_add(tasks.chunk)) < tasks.count;) {
            const int64_t last = std::min(first + tasks.chunk, tasks.count);
            for (int64_t task = first; task < last; ++task) tasks.run(ready.rows, task, mine.work);
            done(first * tasks.width, std::min(last * tasks.width, tasks.p.outputs));
        }
    }

    void quantize(const Tasks& tasks, int64_t m) { tasks.prepare(ready.rows, m, mine.row.get(), mine.natural.get()); }

    void rotate(const Rotation& r, int64_t size, const float* x, float* y) {
        rotate_row(r, size, x, y, mine.row.get(), mine.row2.get());
    }

    // -- stages ------------------------------------------------------------------------------------------------------

    // Asks the cache for channels [first, last) of `rows` rows, `step` elements apart, ahead of their use.
    template <typename T>
    static MC_INLINE void fetch(const T* at, int64_t step, int64_t rows, int64_t first, int64_t last, int64_t end) {
        for (int64_t c = first; c < std::min(last, end); c += 64 / int64_t(sizeof(T)))
            for (int64_t n = 0; n < rows; ++n) __builtin_prefetch(at + n * step + c);
    }

    // The states of `count` channels from c on, moved on by one token; the parts are [N][W].
    void advance_floats(const State& s, Advance advance, int64_t m, int64_t c, int64_t E, int count, float* from_part,
                        float* to_part) {
        const int64_t N = advance.N;
        const bool whole = count == W;
        const float* from = s.from + m * E * N + (s.from_states_first ? c : c * N);
        float* to = s.to + m * E * N + (s.to_states_first ? c : c * N);
        if (!s.from_states_first) {
            gather(from, N, count, from_part);
        } else if (whole) {
            advance.from = from, advance.from_step = E;
        } else {
            for (int64_t n = 0; n < N; ++n) store(from_part + n * W, load_part(from + n * E, count));
        }
        if (s.to_states_first && whole) advance.to = to, advance.to_step = E;
        for_states<FORWARD_STATES>(N, advance);
        if (!s.to_states_first) {
            scatter(to_part, N, count, to);
        } else if (!whole) {
            for (int64_t n = 0; n < N; ++n) store_part(to + n * E, load(to_part + n * W), count);
        }
    }

    void advance_codes(const State& s, const Advance& advance, int64_t m, int64_t c, int64_t E, int count, float* from_part,
                       float* to_part) {
        const int64_t N = advance.N, at = m * N * E + c;
        dequantize_channels(s.codes_from + at, E, N, s.from + m * E + c, count, from_part);
        for_states<FORWARD_STATES>(N, advance);
        quantize_channels(to_part, E, N, place_of(s.steps_from[m] + 1, c), count, s.codes_to + at, s.to + m * E + c);
    }

    // Channels [first, last) of one group of row m: the step of the scan, D, and the gate.
    void scan(const Block& k, const State& s, int64_t m, int64_t group, int64_t first, int64_t last, const float* low) {
        const int64_t E = k.channels, N = k.states;
        const float *u_row = all.u.get() + m * E, *dt_row = all.dt.get() + m * E, *z_row = all.in.get() + m * k.in.outputs + E;
        const float *B = low + k.rank + group * N, *C = B + k.groups * N;
        float *decay_part = mine.states.get(), *from_part = decay_part + N * W, *to_part = from_part + N * W;
        const bool restart[1] = {false};
        if (m == 0) fetch(k.decay, E, N, first + AHEAD_CHANNELS, last + AHEAD_CHANNELS, E);
        if (s.codes_from) fetch(s.codes_from + m * E * N, E, N, first + AHEAD_CHANNELS, last + AHEAD_CHANNELS, E);
        else if (s.from_states_first) fetch(s.from + m * E * N, E, N, first + AHEAD_CHANNELS, last + AHEAD_CHANNELS, E);
        for (int64_t c = first; c < last; c += W) {
            const int count = int(std::min<int64_t>(W, last - c));
            const bool whole = count == W;
            const auto from_channel = [&](const float* scale) MC_LAMBDA { return scale ? scale + c : nullptr; };
            const V u = through_int8(load_part(u_row + c, count), from_channel(k.u_scale), count);
            const V raw = through_int8(load_part(dt_row + c, count), from_channel(k.dt_scale), count);
            const V dt = softplus(raw + load_part(k.dt_bias + c, count)), dtu = dt * u;
            V y = zero();
            Advance advance{N, 1, k.decay + c, B, C, &dt, &dtu, restart, from_part, to_part, &y, E, W, W};
            if (!whole) {
                for (int64_t n = 0; n < N; ++n) store(decay_part + n * W, load_part(k.decay + n * E + c, count));
                advance.A2 = decay_part, advance.A2_step = W;
            }
            if (s.codes_from) advance_codes(s, advance, m, c, E, count, from_part, to_part);
            else advance_floats(s, advance, m, c, E, count, from_part, to_part);
            V out = k.D ? fma(load_part(k.D + c, count), u, y) : y;
            const V z = through_int8(load_part(z_row + c, count), from_channel(k.z_scale), count);
            const V scale = k.gate_scale ? load_part(k.gate_scale + c, count) : set1(1.0f);
            store_part(all.y.get() + m * E + c, out * (z * sigmoid(scale * z)), count);
        }
    }

    // One head of row m of Mamba-2: the step of the scan, and D.
    void head_step(const Block& k, const State& s, int64_t m, int64_t head) {
        const int64_t N = k.states, P = k.channels / k.heads, padded = ceil_div(N, W) * W, S = k.groups * N;
        const int64_t group = head / (k.heads / k.groups), row = (m * k.heads + head) * P;
        const float* u_row = all.u.get() + m * k.conv_channels();
        Steps at;
        read_steps(k, head, all.in.get() + m * k.in.outputs + 2 * k.channels + 2 * S + head, 0, 1, at);
        const float *x = u_row + head * P, *B = u_row + k.channels + group * N, *C = B + S;
        float *B_part = mine.states.get(), *C_part = B_part + padded, *state = C_part + padded;
        float *y = all.y.get() + m * k.channels + head * P, D = k.D ? k.D[head] : 0.0f;
        if (padded != N) {
            pad(B, 1, N, padded, B_part);
            pad(C, 1, N, padded, C_part);
            B = B_part, C = C_part;
        }
        const float* from = state;
        float* to = state;
        if (s.codes_from) dequantize_rows(s.codes_from + row * N, P, N, padded, s.from + row, state);
        else if (padded != N) pad(s.from + row * N, P, N, padded, state);
        else from = s.from + row * N, to = s.to + row * N;
        advance_head(P, 1, padded, P, at, B, C, x, D, from, to, y);
        if (s.codes_from)
            quantize_rows(state, P, N, padded, place_of(s.steps_from[m] + 1, head * P), s.codes_to + row * N, s.to + row);
        else if (padded != N)
            unpad(state, P, N, padded, s.to + row * N);
    }

    // dt, B and C of row m as what follows reads them.
    const float* finished_low(const Block& k, int64_t m) {
        const float* low = all.low.get() + m * k.x.outputs;
        if (!changes_low(k)) return low;
        float* to = ready.low.get() + m * k.x.outputs;
        finish_low(k, low, to, mine.row.get());
        return to;
    }

    // -- a block -----------------------------------------------------------------------------------------------------

    void project_in(const Block& k, const State& s, Counter* next) {
        const float* x = k.norm ? ready.x.get() : p.h;
        const Tasks tasks = linear(k.in, x, k.size, all.in.get());
        tasks.shape_rows(ready.rows);
        const Norm norm{p.batch, k.size, k.size, 1, k.size, 0, F32, F32, F32, k.norm_eps, p.h, nullptr, k.norm, ready.x.get()};
        each_row(next[0], [&](int64_t m) {
            if (k.norm) norm_row(norm, m, mine.row.get());
            quantize(tasks, m);
        });
        const int64_t offset = k.conv_offset(), end = offset + k.conv_channels();
        each_run(next[1], tasks, [&](int64_t first, int64_t last) {
            first = std::max(first, offset) - offset, last = std::min(last, end) - offset;
            for (int64_t m = 0; m < p.batch && first < last; ++m)
                convolve(k, s, m, first, last, 1, all.in.get() + m * k.in.outputs + offset, 0,
                         all.u.get() + m * k.conv_channels(), 0);
        });
        meet();
    }

    void select_and_scan(const Block& k, const State& s, Counter* next) {
        const int64_t E = k.channels;
        const bool rotates = k.x_rotation.block != 0;
        const Tasks x_tasks = linear(k.x, rotates ? ready.x.get() : all.u.get(), E, all.low.get());
        x_tasks.shape_rows(ready.rows);
        each_row(next[2], [&](int64_t m) {
            if (rotates) rotate(k.x_rotation, E, all.u.get() + m * E, ready.x.get() + m * E);
            quantize(x_tasks, m);
        });
        each_run(next[3], x_tasks, [](int64_t, int64_t) {});
        meet();
        const float* low = changes_low(k) ? ready.low.get() : all.low.get();
        const Tasks tasks = linear(k.dt, low, k.x.outputs, all.dt.get());
        tasks.shape_rows(ready.rows);
        each_row(next[4], [&](int64_t m) {
            finished_low(k, m);
            quantize(tasks, m);
        });
        const int64_t per_group = E / k.groups;
        each_run(next[5], tasks, [&](int64_t first, int64_t last) {
            for (int64_t m = 0; m < p.batch; ++m)
                for (int64_t c = first; c < last;) {
                    const int64_t group = c / per_group, stop = std::min(last, (group + 1) * per_group);
                    scan(k, s, m, group, c, stop, low + m * k.x.outputs);
                    c = stop;
                }
        });
        meet();
    }

    void step_heads(const Block& k, const State& s, Counter* next) {
        for (int64_t task; (task = next[2].fetch_add(1)) < p.batch * k.heads;) head_step(k, s, task / k.heads, task % k.heads);
        meet();
    }

    void project_out(const Block& k, Counter* next) {
        const int64_t E = k.channels, D = k.size;
        const bool rotates = k.out_rotation.block != 0;
        const float* x = rotates || k.ssd ? ready.x.get() : all.y.get();
        const Tasks tasks = linear(k.out, x, E, all.out.get());
        tasks.shape_rows(ready.rows);
        const Norm norm{p.batch, E, E / k.groups, 1, E, k.in.outputs, F32, F32, F32, k.inner_eps, all.y.get(), all.in.get(),
                        k.gated_norm, ready.x.get()};
        each_row(next[6], [&](int64_t m) {
            float* to = ready.x.get() + m * E;
            if (k.ssd) norm_row(norm, m, mine.row.get());
            if (rotates) rotate(k.out_rotation, E, k.ssd ? to : all.y.get() + m * E, to);
            quantize(tasks, m);
        });
        each_run(next[7], tasks, [&](int64_t first, int64_t last) {
            for (int64_t m = 0; m < p.batch; ++m) {
                const float* y = all.out.get() + m * D;
                float* h = p.h + m * D;
                for (int64_t c = first; c < last; ++c) h[c] = k.norm ? h[c] + y[c] : y[c];
            }
        });
        meet();
    }

    void walk() {
        for (int64_t i = 0; i < p.blocks; ++i) {
            const Block& k = *p.block[i];
            Counter* next = counters + i * STAGES;
            project_in(k, p.state[i], next);
            if (k.ssd) step_heads(k, p.state[i], next);
            else select_and_scan(k, p.state[i], next);
            project_out(k, next);
        }
    }
};

// Threads that pay for blocks of this size: a block's barriers take as long as reading some hundred kilobytes of weights.
int worthwhile(const Step& p, const Sizes& s) {
    const int64_t work = s.size * s.in + s.channels * s.size;
    return int(std::max<int64_t>(1, std::min(p.threads, work >> 18)));
}

void mixer_step(const Step& p) {
    if (p.batch == 0 || p.blocks == 0) return;
    const Sizes sizes(p.block, p.blocks);
    const int wanted = worthwhile(p, sizes);
    std::vector<Counter> counters(size_t(p.blocks * STAGES));
    Barrier barrier;
    Shared all(sizes, p.batch);
    Ready together(sizes, p.batch > 1 && wanted > 1 ? p.batch : 1);
#pragma omp parallel num_threads(wanted) if (wanted > 1)
    {
        const int threads = team_size();  // OpenMP may give fewer
        if (p.batch == 1 || threads == 1) {
            Ready own(sizes, p.batch);
            Walker(p, threads, sizes, all, own, counters.data(), barrier).walk();
        } else {
            Walker(p, threads, sizes, all, together, counters.data(), barrier).walk();
        }
    }
    for (int64_t i = 0; i < p.blocks; ++i)
        for (int64_t m = 0; p.state[i].codes_from && m < p.batch; ++m) p.state[i].steps_to[m] = p.state[i].steps_from[m] + 1;
}

}  // namespace
}  // namespace MC_LEVEL
#endif
