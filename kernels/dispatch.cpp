// Which instruction set runs: found once, lowered by tests.
#include <atomic>

#define MC_EXPORT __attribute__((visibility("default")))

namespace {

int best_level() {
#if defined(__x86_64__)
    __builtin_cpu_init();
    bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    if (avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vnni"))
        return 2;
    return avx2 ? 1 : 0;
#else
    return 0;
#endif
}

std::atomic<int> forced{-1};
std::atomic<bool> forbidden{false};

bool has_vbmi2() {
#if defined(__x86_64__)
    __builtin_cpu_init();
    return __builtin_cpu_supports("avx512vbmi2");
#else
    return false;
#endif
}

}  // namespace

namespace mc {

int level() {
    static const int best = best_level();
    int wanted = forced.load(std::memory_order_relaxed);
    return wanted < 0 || wanted > best ? best : wanted;
}

bool expands_bytes() {
    static const bool able = has_vbmi2();
    return able && !forbidden.load(std::memory_order_relaxed);
}

}  // namespace mc

extern "C" MC_EXPORT int mc_level() { return mc::level(); }

// Run a lower level than the best one; -1 returns to it. Returns the level then in force.
extern "C" MC_EXPORT int mc_force_level(int wanted) {
    forced.store(wanted, std::memory_order_relaxed);
    return mc::level();
}

// Do without vpexpandb (1), or take it where the processor has it (0). Returns whether it is taken then.
extern "C" MC_EXPORT int mc_forbid_expansion(int wanted) {
    forbidden.store(wanted != 0, std::memory_order_relaxed);
    return mc::expands_bytes();
}
