// Work on rows in one pass: the gate of a feed-forward network, the norm, the loss, the product of a few rows.
//
// Letters: n rows, d columns. Rows lie one after the other.

#include <algorithm>
#include <cmath>

#include "numbers.h"

namespace {

constexpr int64_t ROWS_PER_TASK = 32;  // a task's sums do not depend on the number of threads

inline int64_t num_tasks(int64_t rows) { return (rows + ROWS_PER_TASK - 1) / ROWS_PER_TASK; }

inline float sigmoid(float x) {
    const float small = exp_of_nonpositive(x > 0.0f ? -x : x);
    return (x > 0.0f ? 1.0f : small) / (1.0f + small);
}

template <class T>
void swiglu(int64_t n, int64_t d, int64_t threads, const T* gate, const T* up, T* out) {
#pragma omp parallel for num_threads(threads)
    for (int64_t row = 0; row < n; ++row)
#pragma omp simd
        for (int64_t i = row * d; i < (row + 1) * d; ++i) {
            const float x = to_float(gate[i]);
            store(out[i], x * sigmoid(x) * to_float(up[i]));
        }
}

template <class T>
void swiglu_backward(int64_t n, int64_t d, int64_t threads, const T* gate, const T* up, const T* grad, T* grad_gate, T* grad_up) {
#pragma omp parallel for num_threads(threads)
    for (int64_t row = 0; row < n; ++row)
#pragma omp simd
        for (int64_t i = row * d; i < (row + 1) * d; ++i) {
            const float x = to_float(gate[i]), share = sigmoid(x), incoming = to_float(grad[i]);
            store(grad_up[i], incoming * x * share);
            store(grad_gate[i], incoming * to_float(up[i]) * share * (1.0f + x * (1.0f - share)));
        }
}

// y = x · scale ∘ weight with scale = 1 / sqrt(mean(x²) + eps), which is kept.
template <class T>
void rms_norm(int64_t n, int64_t d, int64_t threads, float eps, const T* x, const float* weight, T* y, float* scales) {
#pragma omp parallel for num_threads(threads)
    for (int64_t row = 0; row < n; ++row) {
        const T* from = x + row * d;
        T* to = y + row * d;
        float squares = 0.0f;
#pragma omp simd reduction(+ : squares)
        for (int64_t i = 0; i < d; ++i) squares += to_float(from[i]) * to_float(from[i]);
        const float scale = 1.0f / std::sqrt(squares / static_cast<float>(d) + eps);
        scales[row] = scale;
#pragma omp simd
        for (int64_t i = 0; i < d; ++i) store(to[i], to_float(from[i]) * scale * weight[i]);
    }
}

// The weight's gradient is left as a sum for each task, (tasks, d).
template <class T>
void rms_norm_backward(
    int64_t n, int64_t d, int64_t threads, const T* x, const float* weight, const float* scales, const T* grad, T* grad_x,
    float* grad_weights
) {
#pragma omp parallel for num_threads(threads)
    for (int64_t task = 0; task < num_tasks(n); ++task) {
        float* sums = grad_weights + task * d;
        std::fill(sums, sums + d, 0.0f);
        for (int64_t row = task * ROWS_PER_TASK; row < std::min(n, (task + 1) * ROWS_PER_TASK); ++row) {
            const T *from = x + row * d, *incoming = grad + row * d;
            T* to = grad_x + row * d;
            const float scale = scales[row];
            float along = 0.0f;  // the part along x that the norm takes out
#pragma omp simd reduction(+ : along)
            for (int64_t i = 0; i < d; ++i) {
                const float product = to_float(incoming[i]) * to_float(from[i]) * scale;
                sums[i] += product;
                along += product * weight[i];
            }
            along /= static_cast<float>(d);
#pragma omp simd
            for (int64_t i = 0; i < d; ++i)
                store(to[i], (to_float(incoming[i]) * weight[i] - to_float(from[i]) * scale * along) * scale);
        }
    }
}

// −log softmax at the label goes to `losses` (n); where `differentiate`, logits become softmax − one-hot in place. Both are 0 where
// the label is ignored.
template <class T>
void cross_entropy(int64_t n, int64_t d, int64_t threads, int64_t ignored, int64_t differentiate, T* logits, const int64_t* labels, float* losses) {
#pragma omp parallel for num_threads(threads)
    for (int64_t row = 0; row < n; ++row) {
        T* values = logits + row * d;
        const int64_t label = labels[row];
        if (label == ignored) {
#pragma omp simd
            for (int64_t i = 0; i < d; ++i) store(values[i], 0.0f);
            losses[row] = 0.0f;
            continue;
        }
        float largest = to_float(values[0]);
#pragma omp simd reduction(max : largest)
        for (int64_t i = 0; i < d; ++i) largest = std::max(largest, to_float(values[i]));
        float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
        for (int64_t i = 0; i < d; ++i) sum += exp_of_nonpositive(to_float(values[i]) - largest);
        const float at_label = to_float(values[label]), share = 1.0f / sum;
        losses[row] = std::log(sum) + largest - at_label;
        if (!differentiate) continue;
        const float at_label_less_one = exp_of_nonpositive(at_label - largest) * share - 1.0f;
#pragma omp simd
        for (int64_t i = 0; i < d; ++i) store(values[i], exp_of_nonpositive(to_float(values[i]) - largest) * share);
        store(values[label], at_label_less_one);
    }
}

// out = x · weightᵀ, (n, width), for so few rows that reading the weight (width, d) is all the work.
template <class T>
void multiply_few(int64_t n, int64_t d, int64_t threads, int64_t width, const T* x, const T* weight, T* out) {
#pragma omp parallel for num_threads(threads)
    for (int64_t column = 0; column < width; ++column) {
        const T* factors = weight + column * d;
        for (int64_t row = 0; row < n; ++row) {
            const T* from = x + row * d;
            float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
            for (int64_t i = 0; i < d; ++i) sum += to_float(from[i]) * to_float(factors[i]);
            store(out[row * width + column], sum);
        }
    }
}

}  // namespace

#define TRANSXSSM_ROWS(SUFFIX, T)                                                                                          \
    extern "C" void swiglu_##SUFFIX(int64_t n, int64_t d, int64_t threads, const T* gate, const T* up, T* out) {           \
        swiglu(n, d, threads, gate, up, out);                                                                              \
    }                                                                                                                      \
    extern "C" void swiglu_backward_##SUFFIX(                                                                              \
        int64_t n, int64_t d, int64_t threads, const T* gate, const T* up, const T* grad, T* grad_gate, T* grad_up         \
    ) {                                                                                                                    \
        swiglu_backward(n, d, threads, gate, up, grad, grad_gate, grad_up);                                                \
    }                                                                                                                      \
    extern "C" void rms_norm_##SUFFIX(                                                                                     \
        int64_t n, int64_t d, int64_t threads, float eps, const T* x, const float* weight, T* y, float* scales             \
    ) {                                                                                                                    \
        rms_norm(n, d, threads, eps, x, weight, y, scales);                                                                \
    }                                                                                                                      \
    extern "C" void rms_norm_backward_##SUFFIX(                                                                            \
        int64_t n, int64_t d, int64_t threads, const T* x, const float* weight, const float* scales, const T* grad,        \
        T* grad_x, float* grad_weights                                                                                     \
    ) {                                                                                                                    \
        rms_norm_backward(n, d, threads, x, weight, scales, grad, grad_x, grad_weights);                                   \
    }                                                                                                                      \
    extern "C" void cross_entropy_##SUFFIX(                                                                                \
        int64_t n, int64_t d, int64_t threads, int64_t ignored, int64_t differentiate, T* logits, const int64_t* labels,   \
        float* losses                                                                                                      \
    ) {                                                                                                                    \
        cross_entropy(n, d, threads, ignored, differentiate, logits, labels, losses);                                      \
    }                                                                                                                      \
    extern "C" void multiply_few_##SUFFIX(                                                                                 \
        int64_t n, int64_t d, int64_t threads, int64_t width, const T* x, const T* weight, T* out                          \
    ) {                                                                                                                    \
        multiply_few(n, d, threads, width, x, weight, out);                                                                \
    }

TRANSXSSM_ROWS(float32, float)
TRANSXSSM_ROWS(bfloat16, bfloat16)

extern "C" int64_t tasks_of_rows(int64_t n) { return num_tasks(n); }
