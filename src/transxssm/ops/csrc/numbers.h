// Number formats and exp, for loops that the compiler is to vectorise.

#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

namespace {

struct bfloat16 {
    uint16_t bits;
};

inline float to_float(float value) { return value; }

inline float to_float(bfloat16 value) {
    const uint32_t bits = static_cast<uint32_t>(value.bits) << 16;
    float result;
    std::memcpy(&result, &bits, sizeof result);
    return result;
}

inline void store(float& target, float value) { target = value; }

inline void store(bfloat16& target, float value) {  // to the nearest, ties to even; NaN stays NaN
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    target.bits = static_cast<uint16_t>(value == value ? rounded : 0x7fc0u);
}

// exp(x) for x ≤ 0 to two units in the last place; 0 below the normal numbers. No branches, so that loops over it are
// vectorised.
inline float exp_of_nonpositive(float x) {
    const float clamped = x < -87.0f ? -87.0f : x;
    const float shifted = clamped * 1.44269504088896341f + 12582912.0f;  // the nearest integer, in the last bits
    const float power = shifted - 12582912.0f;
    const float rest = (clamped - power * 0.693359375f) + power * 2.12194440e-4f;
    float sum = 1.9875691500e-4f;
    sum = sum * rest + 1.3981999507e-3f;
    sum = sum * rest + 8.3334519073e-3f;
    sum = sum * rest + 4.1665795894e-2f;
    sum = sum * rest + 1.6666665459e-1f;
    sum = sum * rest + 5.0000001201e-1f;
    sum = sum * rest * rest + rest + 1.0f;
    uint32_t exponent;
    std::memcpy(&exponent, &shifted, sizeof exponent);
    exponent = (exponent + 127u) << 23;
    float scale;
    std::memcpy(&scale, &exponent, sizeof scale);
    return x < -87.0f ? 0.0f : sum * scale;
}

// y = x · scale ∘ weight with scale = 1 / sqrt(mean(x²) + eps), over d numbers. Returns the scale.
template <class T, class W>
inline float normalize(int64_t d, float eps, const T* x, const W* weight, T* y) {
    float squares = 0.0f;
#pragma omp simd reduction(+ : squares)
    for (int64_t i = 0; i < d; ++i) squares += to_float(x[i]) * to_float(x[i]);
    const float scale = 1.0f / std::sqrt(squares / static_cast<float>(d) + eps);
#pragma omp simd
    for (int64_t i = 0; i < d; ++i) store(y[i], to_float(x[i]) * scale * to_float(weight[i]));
    return scale;
}

inline float sigmoid(float x) {
    const float small = exp_of_nonpositive(x > 0.0f ? -x : x);
    return (x > 0.0f ? 1.0f : small) / (1.0f + small);
}

}  // namespace
