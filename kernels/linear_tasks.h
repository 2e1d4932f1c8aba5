// A linear cut into tasks, for the level under which this file is included: all linears and the fused blocks share it.
//
// A task is a run of neighbouring outputs for all rows (with very many rows, for a stripe of them). Its result depends neither
// on who takes it nor when, so that any number of threads gives the same bits. Rows are prepared (quantized, or widened where
// the activations stay float) before the first task runs. No include guard: see simd.h.
#include "int_tiles.h"
#include "int8_tiles.h"
#include "int4_tiles.h"
#include "nm_tiles.h"
#include "float_tiles.h"
#include "nm_float_tiles.h"

namespace MC_LEVEL {

constexpr int64_t TILE_ROWS = 12, TILE_STRIPE = 96;
constexpr int64_t FEW_ROWS = TILE_ROWS;  // up to so many, a tile at a time: what it takes is reading the weights

constexpr int64_t FEW_FLOAT_ROWS = 8;  // the same of floats

// Rows of fp32, bf16 or fp16; int8; int4 in groups; N:M sparse int8; N:M sparse fp32, bf16 or fp16.
enum Weights : int64_t { FLOATS = 0, BYTES = 1, NIBBLES = 2, SPARSE = 3, SPARSE_FLOATS = 4 };

// What a thread needs to run the tasks of linears up to this size.
struct Workspace {
    Scratch<int8_t> unpacked;
    Scratch<uint8_t> gathered;
    Scratch<float> widened;
    Scratch<uint8_t> panel;  // two tiles
#if MC_WIDTH == 8
    Scratch<int16_t> pairs;  // see pair_outputs
#endif
#if MC_WIDTH == 16
    Factors factors;
    Workspace(int64_t inputs, int64_t groups)
        : unpacked(size_t(inputs)), gathered(size_t(inputs + 4)), widened(size_t(PANEL_OUTPUTS * (inputs + W))),
          panel(size_t(2 * panel_bytes(inputs))), factors(groups) {}
#else
    Workspace(int64_t inputs, int64_t)
        : unpacked(size_t(inputs)), gathered(size_t(inputs + 4)), widened(size_t(PANEL_OUTPUTS * (inputs + W))),
          panel(size_t(panel_bytes(inputs)))
#if MC_WIDTH == 8
          , pairs(size_t(Rows::padded(inputs, 2 * W) * TILE_OUTPUTS + PAIR_ROWS * Rows::padded(inputs, 128)))
#endif
    {}
#endif
    static int64_t panel_bytes(int64_t row_bytes) { return Rows::padded(row_bytes, 4) * TILE_OUTPUTS; }
};

// How one linear is cut and run.
struct Tasks {
    enum Shape { FLOAT, FLOAT_PANELS, FLOAT_TILES, FLOAT_LANES, PLAIN, TILES };

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
        if (floats() && weights == SPARSE) width = TILE_OUTPUTS, chunk = 2;
        if (weights == SPARSE_FLOATS) shape = FLOAT_LANES, width = TILE_OUTPUTS, chunk = 2;
        if ((weights == FLOATS || weights == SPARSE_FLOATS) && p.rows > FEW_FLOAT_ROWS)
            shape = FLOAT_PANELS, width = PANEL_OUTPUTS, chunk = 1;
#if MC_WIDTH == 16
        const bool aligned = weights == BYTES || weights == SPARSE || (weights == NIBBLES && p.inputs / p.groups % 8 == 0);
        if (floats() && p.tiled) shape = FLOAT_TILES, width = TILE_OUTPUTS, chunk = 2;
        else if (!floats() && aligned) shape = TILES;
        if (shape == TILES && p.rows > FEW_ROWS) width = 2 * TILE_OUTPUTS, chunk = 1;
#endif
        int64_t runs = ceil_div(p.outputs, width);
        if ((shape == TILES || shape == FLOAT_PANELS) && runs < 8) stripes = std::min(ceil_div(8, runs), ceil_div(p.rows, TILE_STRIPE));
        count = runs * stripes;
        worth = shape == FLOAT ? ceil_div(count, 8) : p.rows <= FEW_ROWS ? ceil_div(count * p.inputs, 1 << 13) : count;
    }

    bool floats() const { return weights == FLOATS || weights == SPARSE_FLOATS || p.activation == 2; }
    void shape_rows(Rows& rows) const {
        rows.shape(p.rows, p.inputs, floats() ? 1 : p.groups, weights == NIBBLES && shape != PLAIN && !floats());
    }

    // Row m of p.x, ready for the tasks. Scratch of a row each: see quantize_into.
    void prepare(Rows& rows, int64_t m, float* row, int8_t* natural) const {
        prepare_from(rows, m, p.x, m * p.x_row, int(p.x_dtype), row, natural);
    }

    // The same of a row that lies elsewhere.
    void prepare_from(Rows& rows, int64_t m, const float* x, float* row, int8_t* natural) const {
        prepare_from(rows, m, x, 0, F32, row, natural);
    }

    void run(Rows& rows, int64_t task, Workspace& work) const {
        if (shape == FLOAT && weights == SPARSE) return run_expanded_floats(rows, task * width, work);
        if (shape == FLOAT) return run_floats(rows, task * width, work);
        if (shape == FLOAT_PANELS) {
            const Stripe at(*this, task, PANEL_ROWS);
            float* panel = work.widened.get();
            if (weights == FLOATS) pack_panel(p, at.first, panel);
            else expand_panel(p, at.first, panel);
            return panel_outputs(p, rows, at.start, at.end, at.first, panel);
        }
        if (shape == FLOAT_LANES) return lane_outputs(p, rows, task * width);
        if (shape == PLAIN) {
            const int64_t first = task * width;
            if (weights == SPARSE) expand_rows(p, first, work.panel.get());
            const Linear dense = weights == SPARSE ? dense_rows(p, first, work.panel.get()) : p;
#if MC_WIDTH == 8
            if (p.rows > FEW_ROWS && (p.groups == 1 || p.inputs / p.groups % 2 == 0))
                return pair_outputs(dense, rows, weights == NIBBLES, first, work.unpacked.get(), work.gathered.get(),
                                    work.pairs.get());
#endif
            return plain_outputs(dense, rows, weights == NIBBLES, 0, first, std::min(p.outputs, first + width),
                                 work.unpacked.get(), work.gathered.get());
        }
#if MC_WIDTH == 16
        if (shape == FLOAT_TILES) return run_float_tile(rows, task * width, work);
        run_tiles(rows, task, work);
#endif
    }

  private:
    // The outputs from `first` and the rows [start, end) of a task; `step` rows are multiplied together.
    struct Stripe {
        int64_t first, start, end;
        Stripe(const Tasks& t, int64_t task, int64_t step) : first(task / t.stripes * t.width) {
            const int64_t rows = Rows::padded(ceil_div(t.p.rows, t.stripes), step);
            start = std::min(t.p.rows, task % t.stripes * rows), end = std::min(t.p.rows, start + rows);
        }
    };

    void prepare_from(Rows& rows, int64_t m, const void* x, int64_t index, int dtype, float* row, int8_t* natural) const {
        if (floats()) widen_into(rows, m, x, index, dtype);
        else quantize_into(rows, m, x, index, dtype, p.activation == 1 ? p.act_scale : nullptr, p.qmax(), row, natural);
    }

    // The 16 outputs from `first` of a sparse weight, from rows.
    void run_expanded_floats(Rows& rows, int64_t first, Workspace& work) const {
        expand_rows(p, first, work.panel.get());
        const Tasks dense(dense_rows(p, first, work.panel.get()), BYTES);
        for (int64_t at = first; at < std::min(p.outputs, first + TILE_OUTPUTS); at += 4) dense.run_floats(rows, at, work);
    }

    void run_floats(Rows& rows, int64_t first, Workspace& work) const {
        if (weights == FLOATS) return float_outputs(p, rows, first, nullptr, false);
        const float* at[4];
        for (int64_t c = 0; c < 4; ++c) at[c] = work.widened.get() + std::min(c, p.outputs - 1 - first) * p.inputs;
        widen_weights(p, weights == NIBBLES, first, work.widened.get(), p.inputs, work.gathered.get());
        float_outputs(p, rows, first, at, weights == BYTES);
    }

#if MC_WIDTH == 16
    // Where the tile of 16 outputs from `first` lies: in the weights, or brought into order in `panel`.
    const uint8_t* tile_at(int64_t first, uint8_t* panel) const {
        const uint8_t* weight = static_cast<const uint8_t*>(p.weight);
        const int64_t bytes = p.row_bytes(weights == NIBBLES);
        if (weights == SPARSE) {
            if (first < p.outputs) expand_tile(p, first, panel);
            return panel;
        }
        if (first + TILE_OUTPUTS <= p.tiled) return weight + first * bytes;
        if (first < p.outputs) pack_quads(weight, first, p.outputs, bytes, panel);
        return panel;
    }

    void run_float_tile(Rows& rows, int64_t first, Workspace& work) const {
        if (first + TILE_OUTPUTS > p.tiled) {
            if (weights == SPARSE) return run_expanded_floats(rows, first, work);
            for (int64_t at = first; at < p.outputs; at += 4) run_floats(rows, at, work);
            return;
        }
        const uint8_t* tile = tile_at(first, work.panel.get());
        int64_t m = 0;
        if (weights == NIBBLES) {
            for (; m + FLOAT_ROWS <= p.rows; m += FLOAT_ROWS) float_tile16<FLOAT_ROWS, true>(p, rows, m, first, tile);
            for (; m < p.rows; ++m) float_tile16<1, true>(p, rows, m, first, tile);
        } else {
            for (; m + FLOAT_ROWS <= p.rows; m += FLOAT_ROWS) float_tile16<FLOAT_ROWS, false>(p, rows, m, first, tile);
            for (; m < p.rows; ++m) float_tile16<1, false>(p, rows, m, first, tile);
        }
    }

    template <int R, int T, bool FETCH>
    void run_rows(Rows& rows, int64_t m, int64_t first, const uint8_t* const* tile, Workspace& work) const {
        // One tile: some kilobytes ahead in the same stream. Two: the same place of the next two, since two streams at once
        // would be read from memory at half the speed.
        const int64_t ahead = T == 1 ? AHEAD : 2 * TILE_OUTPUTS * p.row_bytes(weights == NIBBLES);
        if (weights != NIBBLES) int8_tile<R, T, FETCH>(p, rows, m, first, tile, ahead);
        else int4_tile<R, T, FETCH>(p, rows, m, first, tile, ahead, work.factors);
    }

    // `count` rows, at most R - 1.
    template <int R, int T>
    void run_rest(Rows& rows, int64_t m, int64_t count, int64_t first, const uint8_t* const* tile, Workspace& work) const {
        if constexpr (R > 1) {
            if (count == R - 1) run_rows<R - 1, T, true>(rows, m, first, tile, work);
            else run_rest<R - 1, T>(rows, m, count, first, tile, work);
        }
    }

    void run_tiles(Rows& rows, int64_t task, Workspace& work) const {
        const Stripe at(*this, task, TILE_ROWS);
        const int64_t first = at.first, end = at.end;
        int64_t m = at.start;
        const int tiles = int(width / TILE_OUTPUTS);
        const uint8_t* tile[2];
        if (weights == SPARSE && tiles == 1 && nm_few_rows(p, rows, m, end - m, first)) return;
        for (int t = 0; t < tiles; ++t)
            tile[t] = tile_at(first + t * TILE_OUTPUTS, work.panel.get() + t * Workspace::panel_bytes(p.row_bytes(weights == NIBBLES)));
        if (weights == NIBBLES) work.factors.load(p, first, tiles);
        if (tiles == 1) return run_rest<FEW_ROWS + 1, 1>(rows, m, end - m, first, tile, work);
        if (m + TILE_ROWS <= end) run_rows<TILE_ROWS, 2, true>(rows, m, first, tile, work), m += TILE_ROWS;
        for (; m + TILE_ROWS <= end; m += TILE_ROWS) run_rows<TILE_ROWS, 2, false>(rows, m, first, tile, work);
        run_rest<TILE_ROWS, 2>(rows, m, end - m, first, tile, work);
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
