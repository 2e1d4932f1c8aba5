// mixer_prefill on a CPU: sequences through all blocks of a model in one call, each block from the residual back to it.
//
// The arithmetic is that of the single ops, in the same order, and of mixer_step: a token's result does not depend on how many
// come in one call. What is gained is that nothing is stored that the next part could take from cache. The tokens of a batch lie
// in a row; a block takes a chunk of them at a time through its stages:
//
//     rows      norm, quantize
//     channels  in_proj + convolution and its activation, in place
//     rows      (rotate,) quantize                                        Mamba-1
//     channels  x_proj                                                    Mamba-1
//     rows      (norm,) quantize dt                                       Mamba-1
//     channels  dt_proj + scan and gate, in place                         Mamba-2: heads, from dt to the scan's output
//     rows      (gated norm,) (rotate,) quantize
//     channels  out_proj + residual
//
// and threads share out rows or runs of channels from a counter, a barrier between. A chunk's activations stay in the second-level
// cache, its buffers are the same for all chunks and blocks. Rows take an odd number of cache lines, so that the channels of a run
// do not all fall into one set of the cache.
//
// Legend: B batch, L tokens, D d_model, E d_inner, K conv width, N d_state, G groups, R dt_rank, H heads, P head_dim.
#ifndef MC_LEVEL
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wuninitialized"  // GCC 12 warns of its own intrinsics (bug 105593)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#include "blocks.h"
#include "team.h"

namespace {

using namespace mc;

struct Prefill {
    int64_t batch, length, blocks, threads;
    const Block* const* block;
    const State* state;  // fp32; conv_from and from null: zeros
    float* h;            // [B, L, D], replaced
};

constexpr int STAGES = 8;         // counters of a chunk
constexpr int64_t CHUNK = 192;    // rows, about
constexpr int64_t ROWS_RUN = 4;   // rows taken at a time
constexpr int64_t RUN = 32;       // channels of a run, at most

}  // namespace

#define MC_SELF "mixer_prefill/cpu.cpp"
#include "levels.h"

extern "C" MC_EXPORT void mc_mixer_prefill(const void* p) { MC_DISPATCH(mixer_prefill, *static_cast<const Prefill*>(p)); }

#else

#include "block_parts.h"

namespace MC_LEVEL {
namespace {

using Counter = std::atomic<int64_t>;

// An odd number of cache lines.
inline int64_t row_length(int64_t floats) { return (ceil_div(floats, 16) | 1) * 16; }

// What all threads write and read, [rows][...].
struct Shared {
    int64_t in_row, low_row;
    Scratch<float> in, low;  // in: in_proj's outputs; then x becomes u, and u becomes y
    Rows ready;

    Shared(const Sizes& s, int64_t rows, bool quantized, bool plain)
        : in_row(row_length(s.in)), low_row(row_length(s.x)), in(size_t(rows * in_row)), low(size_t(rows * low_row)),
          ready(rows, s.inputs, s.groups, quantized, plain) {}
};

// What a thread needs for itself.
struct Worker {
    Workspace work;
    Scratch<float> row, row2, values, values2;
    Scratch<float> run;     // [rows][RUN]
    Scratch<float> states;  // Mamba-1: decay and state of W channels; Mamba-2: B and C of a tile, a head
    Scratch<int8_t> natural;

    Worker(const Sizes& s, int64_t rows)
        : work(s.inputs, s.groups), row(size_t(s.inputs + W)), row2(size_t(s.inputs + W)), values(size_t(s.inputs + W)),
          values2(size_t(s.inputs + W)), run(size_t(rows * RUN)),
          states(size_t(std::max(2 * s.states * W, (s.head_rows + 2 * TILE) * (s.states + W)))), natural(size_t(s.inputs + 128)) {}
};

// Tokens [start, start + tokens) of a sequence, which lie from `row` in the chunk.
struct Segment {
    int64_t sequence, start, tokens, row;
};

// One thread on its way through the blocks.
struct Walker {
    const Prefill& p;
    const int threads;
    Shared& all;
    Counter* next;  // of the chunk
    Barrier& barrier;
    Worker mine;
    int64_t first = 0, rows = 0;  // the chunk

    Walker(const Prefill& p, int threads, const Sizes& s, int64_t chunk, Shared& all, Counter* counters, Barrier& barrier)
        : p(p), threads(threads), all(all), next(counters), barrier(barrier), mine(s, chunk) {}

    // work(row) for every row of the chunk, shared out.
    template <typename Work>
    void each_row(int stage, Work work) {
        for (int64_t m; (m = next[stage].fetch_add(ROWS_RUN)) < rows;)
            for (const int64_t end = std::min(m + ROWS_RUN, rows); m < end; ++m) work(m);
        barrier.wait(threads);
    }

    // A linear whose runs of outputs go on for all rows: see each_run.
    Tasks whole(const Matrix& m, float* y, int64_t y_row) const {
        Tasks tasks = linear_of(m, rows, threads, nullptr, 0, y, y_row);
        tasks.count /= tasks.stripes, tasks.stripes = 1;
        return tasks;
    }

    // Runs of a linear's outputs, each followed by done(first output, last).
    template <typename Done>
    void each_run(int stage, const Tasks& tasks, Done done) {
        for (int64_t task; (task = next[stage].fetch_add(1)) < tasks.count;) {
            tasks.run(all.ready, task, mine.work);
            done(task * tasks.width, std::min((task + 1) * tasks.width, tasks.p.outputs));
        }
        barrier.wait(threads);
    }

    // The same with the outputs of a run in `mine.run`, [rows][RUN].
    template <typename Done>
    void each_local_run(int stage, Tasks tasks, Done done) {
        float* run = mine.run.get();
        for (int64_t task; (task = next[stage].fetch_add(1)) < tasks.count;) {
            const int64_t from = task * tasks.width;
            tasks.p.y = run - from, tasks.p.y_row = RUN;
            tasks.run(all.ready, task, mine.work);
            done(from, std::min(from + tasks.width, tasks.p.outputs), run);
        }
        barrier.wait(threads);
    }

    template <typename Work>
    void each_segment(Work work) {
        for (int64_t at = first; at < first + rows;) {
            const int64_t start = at % p.length, tokens = std::min(p.length - start, first + rows - at);
            work(Segment{at / p.length, start, tokens, at - first});
            at += tokens;
        }
    }

    // Where a segment finds its state: given, or left by the chunk before.
    static State state_of(State s, const Segment& segment) {
        if (segment.start == 0) return s;
        s.conv_from = s.conv_to, s.from = s.to, s.from_states_first = s.to_states_first;
        s.conv_from_batch = s.conv_to_batch, s.conv_from_token = s.conv_to_token, s.conv_from_channel = s.conv_to_channel;
        return s;
    }

    void quantize(const Tasks& tasks, int64_t m, const float* values) {
        tasks.prepare_from(all.ready, m, values, mine.row.get(), mine.natural.get());
    }

    float* in_row(int64_t m) { return all.in.get() + m * all.in_row; }

    // -- stages ------------------------------------------------------------------------------------------------------

    void project_in(const Block& k, const State& s) {
        const Tasks tasks = whole(k.in, all.in.get(), all.in_row);
        tasks.shape_rows(all.ready);
        each_row(0, [&](int64_t m) {
            const float* h = p.h + (first + m) * k.size;
            const Norm norm{1, k.size, k.size, 1, k.size, 0, F32, F32, F32, k.norm_eps, h, nullptr, k.norm, mine.values.get()};
            if (k.norm) norm_row(norm, 0, mine.row.get());
            quantize(tasks, m, k.norm ? mine.values.get() : h);
        });
        const int64_t offset = k.conv_offset(), channels = k.conv_channels();
        each_run(1, tasks, [&](int64_t from, int64_t to) {
            from = std::max<int64_t>(from - offset, 0), to = std::min(to - offset, channels);
            if (from >= to) return;
            each_segment([&](const Segment& segment) {
                float* x = in_row(segment.row) + offset;
                convolve(k, state_of(s, segment), segment.sequence, from, to, segment.tokens, x, all.in_row, x, all.in_row);
            });
        });
    }

    void select(const Block& k) {
        const Tasks tasks = linear_of(k.x, rows, threads, nullptr, 0, all.low.get(), all.low_row);
        tasks.shape_rows(all.ready);
        each_row(2, [&](int64_t m) {
            const float* u = in_row(m);
            if (k.x_rotation.block)
                rotate_row(k.x_rotation, k.channels, u, mine.values.get(), mine.row.get(), mine.row2.get());
            quantize(tasks, m, k.x_rotation.block ? mine.values.get() : u);
        });
        each_run(3, tasks, [](int64_t, int64_t) {});
    }

    void scan(const Block& k, const State& s) {
        const Tasks tasks = whole(k.dt, nullptr, 0);
        tasks.shape_rows(all.ready);
        each_row(4, [&](int64_t m) {
            float* low = all.low.get() + m * all.low_row;
            if (changes_low(k)) finish_low(k, low, low, mine.row.get());
            quantize(tasks, m, low);
        });
        const int64_t per_group = k.channels / k.groups;
        each_local_run(5, tasks, [&](int64_t from, int64_t to, const float* dt) {
            for (int64_t c = from; c < to;) {
                const int64_t group = c / per_group;
                const int count = int(std::min({int64_t(W), to - c, (group + 1) * per_group - c}));
                each_segment([&](const Segment& segment) {
                    scan_channels(k, state_of(s, segment), segment, group, c, count, dt + segment.row * RUN + c - from);
                });
                c += count;
            }
        });
    }

    // `count` channels from c of a segment: the scan, D, and the gate. dt: raw, [tokens][RUN].
    void scan_channels(const Block& k, const State& s, const Segment& segment, int64_t group, int64_t c, int count,
                       const float* dt) {
        const int64_t E = k.channels, N = k.states;
        float *decay = mine.states.get(), *state = decay + N * W;
        const float* from = s.from ? s.from + segment.sequence * E * N + (s.from_states_first ? c : c * N) : nullptr;
        float* to = s.to + segment.sequence * E * N + (s.to_states_first ? c : c * N);
        for (int64_t n = 0; n < N; ++n) {
            store(decay + n * W, load_part(k.decay + n * E + c, count));
            if (!from || s.from_states_first) store(state + n * W, from ? load_part(from + n * E, count) : zero());
        }
        if (from && !s.from_states_first) gather(from, N, count, state);
        const V bias = load_part(k.dt_bias + c, count), D = k.D ? load_part(k.D + c, count) : zero();
        const V gate_scale = k.gate_scale ? load_part(k.gate_scale + c, count) : set1(1.0f);
        const auto from_channel = [&](const float* scale) { return scale ? scale + c : nullptr; };
        const float *u_scale = from_channel(k.u_scale), *dt_scale = from_channel(k.dt_scale), *z_scale = from_channel(k.z_scale);
        const bool restart[TILE] = {};
        for (int64_t start = 0; start < segment.tokens; start += TILE) {
            const int64_t tokens = std::min(TILE, segment.tokens - start);
            float* in = in_row(segment.row + start) + c;
            const float* B = all.low.get() + (segment.row + start) * all.low_row + k.rank + group * N;
            V u[TILE], step[TILE], input[TILE], y[TILE];
            for (int64_t t = 0; t < tokens; ++t) {
                const V raw = load_part(dt + (start + t) * RUN, count);
                u[t] = through_int8(load_part(in + t * all.in_row, count), u_scale, count);
                step[t] = softplus(through_int8(raw, dt_scale, count) + bias);
                input[t] = step[t] * u[t];
                y[t] = zero();
            }
            for_states<FORWARD_STATES>(N, Advance{N, tokens, decay, B, B + k.groups * N, step, input, restart, state, state, y,
                                                  W, W, W, all.low_row});
            for (int64_t t = 0; t < tokens; ++t) {
                float* at = in + t * all.in_row;
                const V out = k.D ? fma(D, u[t], y[t]) : y[t], z = through_int8(load_part(at + E, count), z_scale, count);
                store_part(at, out * (z * sigmoid(gate_scale * z)), count);
            }
        }
        if (!s.to_states_first) return scatter(state, N, count, to);
        for (int64_t n = 0; n < N; ++n) store_part(to + n * E, load(state + n * W), count);
    }

    void scan_heads(const Block& k, const State& s) {
        for (int64_t head; (head = next[2].fetch_add(1)) < k.heads;)
            each_segment([&](const Segment& segment) { scan_head(k, state_of(s, segment), segment, head); });
        barrier.wait(threads);
    }

    // One head of a segment of Mamba-2: the scan, and D.
    void scan_head(const Block& k, const State& s, const Segment& segment, int64_t head) {
        const int64_t N = k.states, P = k.channels / k.heads, padded = ceil_div(N, W) * W, S = k.groups * N, E = k.channels;
        const int64_t group = head / (k.heads / k.groups), at = (segment.sequence * k.heads + head) * P * N;
        float *B = mine.states.get(), *C = B + TILE * padded, *state = C + TILE * padded;
        if (s.from) pad(s.from + at, P, N, padded, state);
        else std::memset(state, 0, sizeof(float) * size_t(P * padded));
        const float D = k.D ? k.D[head] : 0.0f;
        for (int64_t start = 0; start < segment.tokens; start += TILE) {
            const int64_t tokens = std::min(TILE, segment.tokens - start);
            float *in = in_row(segment.row + start), *x = in + E + head * P;
            Steps steps;
            read_steps(k, head, in + 2 * E + 2 * S + head, all.in_row, tokens, steps);
            for (int64_t t = 0; t < tokens; ++t) {
                pad(in + t * all.in_row + 2 * E + group * N, 1, N, padded, B + t * padded);
                pad(in + t * all.in_row + 2 * E + S + group * N, 1, N, padded, C + t * padded);
            }
            advance_head(P, tokens, padded, all.in_row, steps, B, C, x, D, state, state, x);
        }
        unpad(state, P, N, padded, s.to + at);
    }

    void project_out(const Block& k) {
        const int64_t E = k.channels;
        const Tasks tasks = whole(k.out, nullptr, 0);
        tasks.shape_rows(all.ready);
        each_row(6, [&](int64_t m) {
            const float *in = in_row(m), *y = k.ssd ? in + E : in;
            float* normed = mine.values2.get();
            const Norm norm{1, E, E / k.groups, 1, E, E, F32, F32, F32, k.inner_eps, y, in, k.gated_norm, normed};
            if (k.ssd) norm_row(norm, 0, mine.row.get()), y = normed;
            if (k.out_rotation.block) {
                rotate_row(k.out_rotation, E, y, mine.values.get(), mine.row.get(), mine.row2.get());
                y = mine.values.get();
            }
            quantize(tasks, m, y);
        });
        each_local_run(7, tasks, [&](int64_t from, int64_t to, const float* run) {
            for (int64_t m = 0; m < rows; ++m) {
                float* h = p.h + (first + m) * k.size;
                for (int64_t c = from; c < to; c += W) {
                    const int count = int(std::min<int64_t>(W, to - c));
                    const V y = load_part(run + m * RUN + c - from, count);
                    store_part(h + c, k.norm ? load_part(h + c, count) + y : y, count);
                }
            }
        });
    }

    void walk(int64_t chunk) {
        for (int64_t i = 0; i < p.blocks; ++i)
            for (first = 0; first < p.batch * p.length; first += chunk, next += STAGES) {
                const Block& k = *p.block[i];
                rows = std::min(chunk, p.batch * p.length - first);
                project_in(k, p.state[i]);
                if (k.ssd) {
                    scan_heads(k, p.state[i]);
                } else {
                    select(k);
                    scan(k, p.state[i]);
                }
                project_out(k);
            }
    }
};

void mixer_prefill(const Prefill& p) {
    const int64_t rows = p.batch * p.length;
    if (rows == 0 || p.blocks == 0) return;
    const Sizes sizes(p.block, p.blocks);
    const int64_t wanted = ceil_div(rows, ceil_div(rows, CHUNK)), chunk = ceil_div(wanted, TILE_ROWS) * TILE_ROWS;
    std::vector<Counter> counters(size_t(p.blocks * ceil_div(rows, chunk) * STAGES));
    Barrier barrier;
    bool quantized = false, plain = false;
    for (int64_t i = 0; i < p.blocks; ++i)
        for (const Matrix* m : {&p.block[i]->in, &p.block[i]->x, &p.block[i]->dt, &p.block[i]->out})
            (m->weights == FLOATS || m->activation == 2 ? plain : quantized) = true;
    Shared all(sizes, std::min(chunk, rows), quantized, plain);
    [[maybe_unused]] const int threads = int(p.threads);
#pragma omp parallel num_threads(threads) if (threads > 1)
    Walker(p, team_size(), sizes, std::min(chunk, rows), all, counters.data(), barrier).walk(chunk);
}

}  // namespace
}  // namespace MC_LEVEL
#endif
