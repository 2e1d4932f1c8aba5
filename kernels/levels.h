// One source, several instruction sets, chosen when it runs.
//
// An op's cpu.cpp is compiled once a level, each time in a namespace of its own (portable, avx2, avx512) with that level's
// vector type from simd.h:
//
//     #ifndef MC_LEVEL
//     #include "native.h"
//     ... types and constants of the op ...
//     #define MC_SELF "op/cpu.cpp"
//     #include "levels.h"              // includes MC_SELF once a level, with MC_LEVEL defined
//     extern "C" MC_EXPORT void mc_op(...) { MC_DISPATCH(op, ...); }
//     #else
//     namespace MC_LEVEL { namespace { ... the op, unseen by other files ... } }
//     #endif
//
// Floating point contraction is off and -ffast-math is not used: what a level computes depends neither on the number of
// threads nor on how many tokens come in one call.
#pragma once

#include "native.h"

#define MC_WIDTH 4
#define MC_LEVEL portable
#include "simd.h"
#include MC_SELF
#undef MC_LEVEL
#undef MC_WIDTH

#ifdef MC_X86
#define MC_WIDTH 8
#define MC_LEVEL avx2
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#endif
#include "simd.h"
#include MC_SELF
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#undef MC_LEVEL
#undef MC_WIDTH

#define MC_WIDTH 16
#define MC_LEVEL avx512
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,prefer-vector-width=512"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,prefer-vector-width=512")
#endif
#include "simd.h"
#include MC_SELF
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#undef MC_LEVEL
#undef MC_WIDTH

#define MC_DISPATCH(function, ...)                                        \
    do {                                                                  \
        switch (mc::level()) {                                            \
            case mc::AVX512: avx512::function(__VA_ARGS__); break;        \
            case mc::AVX2: avx2::function(__VA_ARGS__); break;            \
            default: portable::function(__VA_ARGS__);                     \
        }                                                                 \
    } while (0)
#else
#define MC_DISPATCH(function, ...) portable::function(__VA_ARGS__)
#endif
