// Threads of one parallel region that go through stages together.
#pragma once

#include <atomic>
#include <thread>
#if defined(_OPENMP)
#include <omp.h>
#endif

#include "native.h"

namespace mc {

// Where a team waits for its last member. OpenMP's own barrier spins for milliseconds: on a busy machine it keeps the processor
// from the very thread it waits for, a hundred times a token.
class Barrier {
  public:
    void wait(int team) {
        if (team == 1) return;
        const int turn = turn_.load(std::memory_order_relaxed);
        if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == team) {
            arrived_.store(0, std::memory_order_relaxed);
            turn_.store(turn + 1, std::memory_order_release);
            return;
        }
        for (int spins = 0; turn_.load(std::memory_order_acquire) == turn; ++spins) {
            if (spins < SPINS) relax();
            else std::this_thread::yield();
        }
    }

  private:
    static constexpr int SPINS = 2000;  // some tens of microseconds: longer than members of a team are apart when all run
    static void relax() {
#if defined(MC_X86)
        _mm_pause();
#elif defined(__aarch64__)
        asm volatile("yield");
#endif
    }
    alignas(64) std::atomic<int> arrived_{0};
    alignas(64) std::atomic<int> turn_{0};
};

inline int team_size() {
#if defined(_OPENMP)
    return omp_get_num_threads();
#else
    return 1;
#endif
}

}  // namespace mc
