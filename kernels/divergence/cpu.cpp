// divergence on a CPU: everything two rows of logits say of one another, from three readings that stay in cache.
//
// Sums are of fp32 lanes over a run of the vocabulary, of runs in fp64, in a fixed order: a row depends on nothing but itself.
#ifndef MC_LEVEL
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wuninitialized"  // GCC 12 warns of its own intrinsics (bug 105593)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#include "native.h"

namespace mc {

constexpr int64_t RUN = 1024;        // of the vocabulary, in fp32
constexpr float NOTHING = -1e30f;  // a logit behind the end: its probability is 0, the difference of two of them too

// logits, baseline: rows of `size`, `logits_row` and `baseline_row` apart; without a baseline losses alone are wanted.
// out: fp64 [rows, 4]: the loss, the baseline's, the divergence, 1 where both put the same first.
struct Divergence {
    int64_t rows, size, threads, logits_row, baseline_row;
    const float *logits, *baseline;
    const int64_t* targets;
    double* out;
};

}  // namespace mc

#define MC_SELF "divergence/cpu.cpp"
#include "levels.h"

extern "C" MC_EXPORT void mc_divergence(const void* p) { MC_DISPATCH(divergence, p); }

#else

namespace MC_LEVEL {
namespace {

inline V logits_at(const float* row, int64_t i, int64_t size) {
    if (i + W <= size) return load(row + i);
    float values[W];
    for (int64_t j = 0; j < W; ++j) values[j] = i + j < size ? row[i + j] : NOTHING;
    return load(values);
}

inline float largest(const float* row, int64_t size) {
    V top = logits_at(row, 0, size);
    for (int64_t i = W; i < size; i += W) top = vmax(top, logits_at(row, i, size));
    float lanes[W];
    store(lanes, top);
    return *std::max_element(lanes, lanes + W);
}

// A sum over the vocabulary of term(first of W places).
template <typename Term>
inline double over(int64_t size, Term term) {
    double sum = 0.0;
    for (int64_t run = 0; run < size; run += RUN) {
        V low = zero(), high = zero();  // two: additions wait for one another
        int64_t i = run;
        const int64_t end = std::min(run + RUN, size);
        for (; i + W < end; i += 2 * W) {
            low = low + term(i);
            high = high + term(i + W);
        }
        if (i < end) low = low + term(i);
        sum += double(lane_sum(low + high));
    }
    return sum;
}

// e^x - 1 - x, which is never negative: a polynomial where the difference would cancel.
inline V beyond_first(V x) {
    V p = fma(set1(1.0f / 40320), x, set1(1.0f / 5040));
    p = fma(p, x, set1(1.0f / 720));
    p = fma(p, x, set1(1.0f / 120));
    p = fma(p, x, set1(1.0f / 24));
    p = fma(p, x, set1(1.0f / 6));
    p = fma(p, x, set1(0.5f));
    return where_negative(vabs(x) - set1(0.5f), p * x * x, expv(x) - set1(1.0f) - x);
}

// log of the sum of a row's exponentials, less `top`, its largest. weights: where these go, or null.
inline double log_sum(const float* row, int64_t size, float top, float* weights, double* sum) {
    *sum = over(size, [&](int64_t i) MC_LAMBDA {
        const V e = expv(logits_at(row, i, size) - set1(top));
        if (weights) store(weights + i, e);
        return e;
    });
    return std::log(*sum);
}

inline void compare_row(const Divergence& p, int64_t row, float* weights, float* steps) {
    const float *ours = p.logits + row * p.logits_row, *theirs = p.baseline ? p.baseline + row * p.baseline_row : nullptr;
    const int64_t size = p.size, target = p.targets[row];
    double* out = p.out + 4 * row;
    double sum;
    const float top = largest(ours, size);
    out[0] = log_sum(ours, size, top, nullptr, &sum) + (double(top) - double(ours[target]));
    out[1] = out[2] = out[3] = 0.0;
    if (!theirs) return;
    const float other = largest(theirs, size);
    out[1] = log_sum(theirs, size, other, weights, &sum) + (double(other) - double(theirs[target]));
    const double mean = over(size, [&](int64_t i) MC_LAMBDA {
        const V step = logits_at(ours, i, size) - logits_at(theirs, i, size);
        store(steps + i, step);
        return load(weights + i) * step;
    }) / sum;
    const V middle = set1(float(mean));
    out[2] = std::log1p(over(size, [&](int64_t i) MC_LAMBDA {
        return load(weights + i) * beyond_first(load(steps + i) - middle);
    }) / sum);
    out[3] = std::find(ours, ours + size, top) - ours == std::find(theirs, theirs + size, other) - theirs;
}

void divergence(const void* description) {
    const Divergence& p = *static_cast<const Divergence*>(description);
    [[maybe_unused]] const int threads = int(std::min<int64_t>(p.threads, ceil_div(p.rows * p.size, 1 << 15)));
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        Scratch<float> weights(size_t(p.size + W)), steps(size_t(p.size + W));
#pragma omp for schedule(static)
        for (int64_t row = 0; row < p.rows; ++row) compare_row(p, row, weights.get(), steps.get());
    }
}

}  // namespace
}  // namespace MC_LEVEL
#endif
