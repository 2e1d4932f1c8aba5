// What every native op shares: dtypes, half-precision conversions, tensors as the caller describes them, scratch memory.
//
// Legend: W floats in a vector (4, 8 or 16, see levels.h).
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <new>
#include <type_traits>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#define MC_X86 1
#endif

#define MC_EXPORT __attribute__((visibility("default")))
#define MC_INLINE inline __attribute__((always_inline))
#define MC_LAMBDA __attribute__((always_inline))

#if defined(__clang__)
#define MC_PRAGMA(x) _Pragma(#x)
#define MC_UNROLL(n) MC_PRAGMA(unroll n)
#else
#define MC_PRAGMA(x) _Pragma(#x)
#define MC_UNROLL(n) MC_PRAGMA(GCC unroll n)
#endif

namespace mc {

enum Level : int { PORTABLE = 0, AVX2 = 1, AVX512 = 2 };
enum Dtype : int { F32 = 0, BF16 = 1, F16 = 2, I8 = 3 };

int level();  // the level in force: the best of this processor, or a lower one that a test forced

bool expands_bytes();  // whether this processor has vpexpandb (AVX-512 VBMI2), and no test forbade it

// Scratch memory aligned to a cache line, of trivially constructible elements; not initialised.
template <typename T>
class Scratch {
  public:
    explicit Scratch(size_t count)
        : data_(static_cast<T*>(::operator new(count * sizeof(T) + 64, std::align_val_t(64)))) {}
    ~Scratch() { ::operator delete(data_, std::align_val_t(64)); }
    Scratch(const Scratch&) = delete;
    Scratch& operator=(const Scratch&) = delete;
    T* get() { return data_; }
    T& operator[](size_t i) { return data_[i]; }

  private:
    T* data_;
};

MC_INLINE float from_bf16(uint16_t bits) {
    uint32_t wide = uint32_t(bits) << 16;
    float value;
    std::memcpy(&value, &wide, 4);
    return value;
}

MC_INLINE uint16_t to_bf16(float value) {  // round to nearest even; NaN stays NaN
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return uint16_t((bits >> 16) | 0x40);
    return uint16_t((bits + 0x7fffu + ((bits >> 16) & 1)) >> 16);
}

MC_INLINE float from_f16(uint16_t half) {
    uint32_t sign = uint32_t(half & 0x8000u) << 16, exponent = (half >> 10) & 31, mantissa = half & 0x3ffu;
    uint32_t bits;
    if (exponent == 0) {
        float value = float(mantissa) * 5.9604644775390625e-08f;  // 2^-24
        return sign ? -value : value;
    }
    bits = exponent == 31 ? (sign | 0x7f800000u | (mantissa << 13)) : (sign | ((exponent + 112) << 23) | (mantissa << 13));
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}

MC_INLINE uint16_t to_f16(float value) {  // round to nearest even
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    uint16_t sign = uint16_t((bits >> 16) & 0x8000u);
    bits &= 0x7fffffffu;
    if (bits > 0x7f800000u) return uint16_t(sign | 0x7e00u | ((bits >> 13) & 0x3ffu));
    if (bits >= 0x477ff000u) return uint16_t(sign | 0x7c00u);  // rounds to infinity
    if (bits < 0x38800000u) {                                  // subnormal half: a multiple of 2^-24
        float magnitude;
        std::memcpy(&magnitude, &bits, 4);
        return uint16_t(sign | uint16_t(std::nearbyint(magnitude * 16777216.0f)));
    }
    return uint16_t(sign | ((bits - 0x38000000u + 0xfffu + ((bits >> 13) & 1)) >> 13));
}

MC_INLINE float load_one(const void* data, int64_t index, int dtype) {
    switch (dtype) {
        case BF16: return from_bf16(static_cast<const uint16_t*>(data)[index]);
        case F16: return from_f16(static_cast<const uint16_t*>(data)[index]);
        case I8: return float(static_cast<const int8_t*>(data)[index]);
        default: return static_cast<const float*>(data)[index];
    }
}

MC_INLINE void store_one(void* data, int64_t index, int dtype, float value) {
    switch (dtype) {
        case BF16: static_cast<uint16_t*>(data)[index] = to_bf16(value); break;
        case F16: static_cast<uint16_t*>(data)[index] = to_f16(value); break;
        default: static_cast<float*>(data)[index] = value;
    }
}

MC_INLINE size_t dtype_bytes(int dtype) { return dtype == F32 ? 4 : dtype == I8 ? 1 : 2; }

// A tensor [batch, tokens, ...] whose last axes are contiguous. Strides count elements; `token` is negative for a scan that
// runs from the last token to the first (then `data` points at the last). scale: what int8 is multiplied by, or null.
struct View {
    void* data;
    int64_t batch, token, dtype;
    const float* scale;
    int64_t scale_step;  // 0: one scale for all, 1: one an element of the last axes
};

MC_INLINE int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace mc
