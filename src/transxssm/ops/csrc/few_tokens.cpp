// The matrix products of decoded tokens: for so few rows that reading the weights takes all the time, and so many calls
// a token that what surrounds a product is done in the same call.
//
// Letters: n rows, d columns. The matrices are contiguous.

#include <vector>

#include "library.h"
#include "numbers.h"

#if defined(__AVX512BF16__) && defined(__AVX512BW__)
#include <immintrin.h>
#endif

// Products of the same rows with several weights, beside each other in the output. Weights that are not there have no
// columns.
struct Projections {
    static constexpr const char* NAME = "Projections";

    int64_t rows, width, threads, width_0, width_1, width_2, width_3, width_4;
    const void* x;                                                     // (n, width)
    const void* norm;                                                  // (width) of RMSNorm, or null for none
    const void *weight_0, *weight_1, *weight_2, *weight_3, *weight_4;  // (width_i, width)
    void* output;                                                      // (n, the sum of the widths)
    float eps;
};

// What follows on a layer's mixer.
struct LayerEnd {
    static constexpr const char* NAME = "LayerEnd";

    int64_t rows, mixed_width, width, inner_width, threads;
    const void *mixed, *residual;                        // (n, mixed_width), (n, width)
    const void *mixer_output, *norm, *gate, *up, *down;  // weights: (width, mixed_width), (width), (inner_width, width)
                                                         // twice, (width, inner_width)
    void *hidden, *inner, *output;                       // (n, width), (n, inner_width), (n, width)
    float eps;
};

namespace {

constexpr int64_t SMALL = 1 << 16;  // numbers of a weight, which one thread reads before a second one would have begun

// x · y over d numbers. Many partial sums at once hide the latency of additions; y is read from its start to its end,
// as memory is read fastest.
template <class T>
inline float dot(int64_t d, const T* x, const T* y) {
    constexpr int64_t SUMS = 64;
    float sums[SUMS] = {};
    int64_t i = 0;
    for (; i + SUMS <= d; i += SUMS)
#pragma omp simd
        for (int64_t j = 0; j < SUMS; ++j) sums[j] += to_float(x[i + j]) * to_float(y[i + j]);
    float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
    for (int64_t j = 0; j < SUMS; ++j) sum += sums[j];
    for (; i < d; ++i) sum += to_float(x[i]) * to_float(y[i]);
    return sum;
}

#if defined(__AVX512BF16__) && defined(__AVX512BW__)
inline float dot(int64_t d, const bfloat16* x, const bfloat16* y) {
    const auto load = [](const bfloat16* from) { return (__m512bh)_mm512_loadu_si512(from); };
    __m512 first = _mm512_setzero_ps(), second = _mm512_setzero_ps();
    int64_t i = 0;
    for (; i + 64 <= d; i += 64) {
        first = _mm512_dpbf16_ps(first, load(x + i), load(y + i));
        second = _mm512_dpbf16_ps(second, load(x + i + 32), load(y + i + 32));
    }
    for (; i < d; i += 32) {
        const __mmask32 rest = d - i < 32 ? (1u << (d - i)) - 1u : ~0u;
        first = _mm512_dpbf16_ps(
            first, (__m512bh)_mm512_maskz_loadu_epi16(rest, x + i), (__m512bh)_mm512_maskz_loadu_epi16(rest, y + i)
        );
    }
    return _mm512_reduce_add_ps(_mm512_add_ps(first, second));
}
#endif

template <class T>
void project(const Projections& call) {
    const T* x = static_cast<const T*>(call.x);
    const T* weights[] = {
        static_cast<const T*>(call.weight_0), static_cast<const T*>(call.weight_1),
        static_cast<const T*>(call.weight_2), static_cast<const T*>(call.weight_3), static_cast<const T*>(call.weight_4)
    };
    const int64_t widths[] = {call.width_0, call.width_1, call.width_2, call.width_3, call.width_4};
    int64_t total = 0;
    for (const int64_t width : widths) total += width;
    T* output = static_cast<T*>(call.output);
    std::vector<T> normed;
    if (call.norm) {
        normed.resize(call.rows * call.width);
        for (int64_t row = 0; row < call.rows; ++row)
            normalize(
                call.width, call.eps, x + row * call.width, static_cast<const T*>(call.norm),
                normed.data() + row * call.width
            );
        x = normed.data();
    }
#pragma omp parallel for num_threads(call.threads) if (total * call.width > SMALL)
    for (int64_t column = 0; column < total; ++column) {
        int64_t which = 0, place = column;
        for (; place >= widths[which]; ++which) place -= widths[which];
        const T* factors = weights[which] + place * call.width;
        for (int64_t row = 0; row < call.rows; ++row)
            store(output[row * total + column], dot(call.width, x + row * call.width, factors));
    }
}

// hidden = residual + mixed · mixer_outputᵀ and output = hidden + (silu(h · gateᵀ) ∘ h · upᵀ) · downᵀ, where h is
// hidden after RMSNorm.
template <class T>
void end_layer(const LayerEnd& call) {
    const int64_t n = call.rows, mixed_width = call.mixed_width, width = call.width, inner_width = call.inner_width;
    const T *mixed = static_cast<const T*>(call.mixed), *residual = static_cast<const T*>(call.residual);
    const T *mixer_output = static_cast<const T*>(call.mixer_output), *norm = static_cast<const T*>(call.norm);
    const T *gate = static_cast<const T*>(call.gate), *up = static_cast<const T*>(call.up);
    const T* down = static_cast<const T*>(call.down);
    T *hidden = static_cast<T*>(call.hidden), *inner = static_cast<T*>(call.inner);
    T* output = static_cast<T*>(call.output);
#pragma omp parallel num_threads(call.threads) if (width * (mixed_width + 3 * inner_width) > SMALL)
    {
#pragma omp for
        for (int64_t column = 0; column < width; ++column)
            for (int64_t row = 0; row < n; ++row)
                store(
                    hidden[row * width + column],
                    to_float(residual[row * width + column]) +
                        dot(mixed_width, mixed + row * mixed_width, mixer_output + column * mixed_width)
                );
        std::vector<T> normed(n * width);  // by every thread, which takes less time than waiting for one
        for (int64_t row = 0; row < n; ++row)
            normalize(width, call.eps, hidden + row * width, norm, normed.data() + row * width);
#pragma omp for
        for (int64_t column = 0; column < inner_width; ++column)
            for (int64_t row = 0; row < n; ++row) {
                const T* x = normed.data() + row * width;
                const float gated = dot(width, x, gate + column * width);
                store(inner[row * inner_width + column], gated * sigmoid(gated) * dot(width, x, up + column * width));
            }
#pragma omp for
        for (int64_t column = 0; column < width; ++column)
            for (int64_t row = 0; row < n; ++row)
                store(
                    output[row * width + column],
                    to_float(hidden[row * width + column]) +
                        dot(inner_width, inner + row * inner_width, down + column * inner_width)
                );
    }
}

}  // namespace

void describe_few_tokens(std::string& to) {
    describe_structure<Projections>(to);
    TRANSXSSM_FIELD(Projections, rows);
    TRANSXSSM_FIELD(Projections, width);
    TRANSXSSM_FIELD(Projections, threads);
    TRANSXSSM_FIELD(Projections, width_0);
    TRANSXSSM_FIELD(Projections, width_1);
    TRANSXSSM_FIELD(Projections, width_2);
    TRANSXSSM_FIELD(Projections, width_3);
    TRANSXSSM_FIELD(Projections, width_4);
    TRANSXSSM_FIELD(Projections, x);
    TRANSXSSM_FIELD(Projections, norm);
    TRANSXSSM_FIELD(Projections, weight_0);
    TRANSXSSM_FIELD(Projections, weight_1);
    TRANSXSSM_FIELD(Projections, weight_2);
    TRANSXSSM_FIELD(Projections, weight_3);
    TRANSXSSM_FIELD(Projections, weight_4);
    TRANSXSSM_FIELD(Projections, output);
    TRANSXSSM_FIELD(Projections, eps);
    describe_structure<LayerEnd>(to);
    TRANSXSSM_FIELD(LayerEnd, rows);
    TRANSXSSM_FIELD(LayerEnd, mixed_width);
    TRANSXSSM_FIELD(LayerEnd, width);
    TRANSXSSM_FIELD(LayerEnd, inner_width);
    TRANSXSSM_FIELD(LayerEnd, threads);
    TRANSXSSM_FIELD(LayerEnd, mixed);
    TRANSXSSM_FIELD(LayerEnd, residual);
    TRANSXSSM_FIELD(LayerEnd, mixer_output);
    TRANSXSSM_FIELD(LayerEnd, norm);
    TRANSXSSM_FIELD(LayerEnd, gate);
    TRANSXSSM_FIELD(LayerEnd, up);
    TRANSXSSM_FIELD(LayerEnd, down);
    TRANSXSSM_FIELD(LayerEnd, hidden);
    TRANSXSSM_FIELD(LayerEnd, inner);
    TRANSXSSM_FIELD(LayerEnd, output);
    TRANSXSSM_FIELD(LayerEnd, eps);
    describe_function(to, "project", "float32", project<float>);
    describe_function(to, "project", "bfloat16", project<bfloat16>);
    describe_function(to, "end_layer", "float32", end_layer<float>);
    describe_function(to, "end_layer", "bfloat16", end_layer<bfloat16>);
}
