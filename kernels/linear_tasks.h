// A linear cut into tasks, for the level under which this file is included: int8_linear, int4_linear and mixer_step share it.
//
// A task is a run of neighbouring outputs for all rows (with very many rows, for a stripe of them). Its result depends neither
// on who takes it nor when, so that any number of threads gives the same bits. Rows are prepared (quantized, or widened where
// the activations stay float) before the first task runs. No include guard: see simd.h.
#include "int_tiles.h"

namespace MC_LEVEL {

constexpr int64_t TILE_ROWS = 12, TILE_COLUMNS = 32, TILE_STRIPE = 96;

}  // namespace MC_LEVEL

#include "int4_tiles.h"
#include "int8_tiles.h"

namespace MC_LEVEL {

enum Weights : int64_t { FLOATS = 0, BYTES = 1, NIBBLES = 2 };  // fp32 (rows of floats, no scale), int8, int4 in groups

// What a thread needs to run the tasks of linears up to this size.
struct Workspace {
    Scratch<uint8_t> panel;
    Scratch<int8_t> unpacked;
    Scratch<float> widened;
#if MC_WIDTH == 16
    Factors factors;
    Workspace(int64_t inputs, int64_t groups)
        : panel(size_t(Rows::padded(inputs, 8) * TILE_COLUMNS)), unpacked(size_t(inputs)), widened(size_t(4 * inputs)),
          factors(inputs, groups) {}
#else
    Workspace(int64_t inputs, int64_t) : panel(1), unpacked(size_t(inputs)), widened(size_t(4 * inputs)) {}
#endif
};

// How one linear is cut and run.
struct Tasks {
    enum Shape { FLOAT, PLAIN, DOT, TILES };

    Linear p;
    Weights weights;
    Shape shape;
    int64_t width;        // outputs of a task
    int64_t count;        // tasks
    int64_t chunk;        // tasks worth taking at a time
    int64_t stripes = 1;  // of rows, for each run of outputs
    int64_t worth;        // threads that pay

    Tasks(const Linear& linear, Weights kind) : p(linear), weights(kind), shape(PLAIN), width(16), chunk(4) {
        if (floats()) shape = FLOAT, width = 4, chunk = 8;
#if MC_WIDTH == 16
        else if (weights == BYTES) shape = p.rows <= 2 && p.inputs >= 128 ? DOT : TILES;
        else if (p.inputs / p.groups % 8 == 0) shape = p.rows == 1 && in_place() ? DOT : TILES;
        if (shape == TILES) width = TILE_COLUMNS, chunk = 1;
#endif
        int64_t runs = ceil_div(p.outputs, width);
        if (shape == TILES && runs < 8) stripes = std::min(ceil_div(8, runs), ceil_div(p.rows, TILE_STRIPE));
        count = runs * stripes;
        worth = shape == FLOAT ? ceil_div(count, 8) : shape == DOT ? ceil_div(count * p.inputs, 1 << 13) : count;
    }

    bool floats() const { return weights == FLOATS || p.activation == 2; }
    bool in_place() const {
        int64_t size = p.inputs / p.groups;
        return p.groups == 1 || size % 128 == 0 || size == 64 || size == 32;
    }

    void shape_rows(Rows& rows) const {
        rows.shape(p.rows, p.inputs, floats() ? 1 : p.groups, weights == NIBBLES && shape != PLAIN && !floats());
    }

    // Row m of p.x, ready for the tasks. Scratch of a row each: see quantize_into.
    void prepare(Rows& rows, int64_t m, float* row, int8_t* natural) const {
        if (floats()) widen_into(rows, m, p.x, m * p.x_row, int(p.x_dtype));
        else quantize_into(rows, m, p.x, m * p.x_row, int(p.x_dtype), p.activation == 1 ? p.act_scale : nullptr, p.qmax(), row,
                           natural);
    }

    void run(Rows& rows, int64_t task, Workspace& work) const {
        if (shape == FLOAT) return run_floats(rows, task * width, work);
        if (shape == PLAIN) {
            int64_t first = task * width;
            return plain_outputs(p, rows, weights == NIBBLES, first, std::min(p.outputs, first + width), work.unpacked.get());
        }
#if MC_WIDTH == 16
        if (shape == DOT) return run_dot(rows, task * width, work);
        run_tiles(rows, task, work);
#endif
    }

  private:
    void run_floats(Rows& rows, int64_t first, Workspace& work) const {
        const float* at[4];
        for (int64_t c = 0; c < 4; ++c) {
            if (weights == FLOATS) at[c] = static_cast<const float*>(p.weight) + std::min(first + c, p.outputs - 1) * p.inputs;
            else at[c] = work.widened.get() + std::min(c, p.outputs - 1 - first) * p.inputs;
        }
        if (weights != FLOATS) widen_weights(p, weights == NIBBLES, first, work.widened.get(), p.inputs);
        float_outputs(p, rows, first, at, weights == BYTES, weights == FLOATS);
    }

#if MC_WIDTH == 16
    void run_dot(Rows& rows, int64_t first, Workspace& work) const {
        if (weights == BYTES) {
            if (p.rows == 1) return int8_dot<1>(p, rows, 0, first);
            return int8_dot<2>(p, rows, 0, first);
        }
        int64_t size = p.inputs / p.groups;
        if (p.groups == 1 || size % 128 == 0) int4_dot<0>(p, rows, first, work.factors);
        else if (size == 64) int4_dot<2>(p, rows, first, work.factors);
        else int4_dot<4>(p, rows, first, work.factors);
    }

    void run_tiles(Rows& rows, int64_t task, Workspace& work) const {
        int64_t stripe = Rows::padded(ceil_div(p.rows, stripes), TILE_ROWS);
        int64_t first = task / stripes * TILE_COLUMNS, m = task % stripes * stripe, end = std::min(p.rows, m + stripe);
        uint8_t* panel = work.panel.get();
        const int64_t row_bytes = p.row_bytes(weights == NIBBLES);
        for (int half = 0; half < 2; ++half)
            pack_quads(static_cast<const uint8_t*>(p.weight), first + 16 * half, p.outputs, row_bytes,
                       weights == NIBBLES ? 0 : 0x80, panel + 64 * half, 128);
        if (weights == BYTES) {
            if (m + TILE_ROWS <= end) int8_tile<TILE_ROWS, true>(p, rows, m, first, panel), m += TILE_ROWS;
            for (; m + TILE_ROWS <= end; m += TILE_ROWS) int8_tile<TILE_ROWS, false>(p, rows, m, first, panel);
            if (m < end) int8_rest(p, rows, m, end - m, first, panel);
            return;
        }
        Factors& factors = work.factors;
        factors.width = TILE_COLUMNS;
        factors.load(p, first);
        if (m + TILE_ROWS <= end) int4_tile<TILE_ROWS, true>(p, rows, m, first, panel, factors), m += TILE_ROWS;
        for (; m + TILE_ROWS <= end; m += TILE_ROWS) int4_tile<TILE_ROWS, false>(p, rows, m, first, panel, factors);
        if (m < end) int4_rest(p, rows, m, end - m, first, panel, factors);
    }
#endif
};

// The whole linear.
static inline void linear(const Linear& p, Weights weights) {
    const Tasks tasks(p, weights);
    Rows rows(p.rows, p.inputs, p.groups, !tasks.floats(), tasks.floats());
    tasks.shape_rows(rows);
    [[maybe_unused]] int threads = int(std::min<int64_t>(p.threads, ceil_div(p.rows, 8)));  // unused without OpenMP
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        Scratch<float> row{size_t(p.inputs + W)};
        Scratch<int8_t> natural{size_t(rows.stride)};
#pragma omp for schedule(static)
        for (int64_t m = 0; m < p.rows; ++m) tasks.prepare(rows, m, row.get(), natural.get());
    }
    threads = int(std::min<int64_t>(p.threads, tasks.worth));
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        Workspace work(p.inputs, p.groups);
#pragma omp for schedule(dynamic, tasks.chunk)
        for (int64_t task = 0; task < tasks.count; ++task) tasks.run(rows, task, work);
    }
}

}  // namespace MC_LEVEL
