// Kernels over the rows of a matrix, each of which reads its inputs once: SwiGLU, RMSNorm and cross-entropy.
//
// Letters: n rows, d columns. The matrices are contiguous.

#include <algorithm>
#include <cmath>

#include "library.h"
#include "numbers.h"

namespace {

constexpr int64_t ROWS_PER_TASK =
    32;  // of a task that sums over rows, so that sums do not depend on the number of threads

inline int64_t num_tasks(int64_t rows) { return (rows + ROWS_PER_TASK - 1) / ROWS_PER_TASK; }

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
void swiglu_backward(
    int64_t n, int64_t d, int64_t threads, const T* gate, const T* up, const T* grad, T* grad_gate, T* grad_up
) {
#pragma omp parallel for num_threads(threads)
    for (int64_t row = 0; row < n; ++row)
#pragma omp simd
        for (int64_t i = row * d; i < (row + 1) * d; ++i) {
            const float x = to_float(gate[i]), share = sigmoid(x), incoming = to_float(grad[i]);
            store(grad_up[i], incoming * x * share);
            store(grad_gate[i], incoming * to_float(up[i]) * share * (1.0f + x * (1.0f - share)));
        }
}

// Each row's 1 / sqrt(mean(x²) + eps) goes to `scales` (n) for the backward pass.
template <class T>
void rms_norm(int64_t n, int64_t d, int64_t threads, float eps, const T* x, const float* weight, T* y, float* scales) {
#pragma omp parallel for num_threads(threads)
    for (int64_t row = 0; row < n; ++row) scales[row] = normalize(d, eps, x + row * d, weight, y + row * d);
}

// The gradient of the weight is left as one partial sum for each task of rows, (tasks, d).
template <class T>
void rms_norm_backward(
    int64_t n, int64_t d, int64_t threads, const T* x, const float* weight, const float* scales, const T* grad,
    T* grad_x, float* grad_weights
) {
#pragma omp parallel for num_threads(threads)
    for (int64_t task = 0; task < num_tasks(n); ++task) {
        float* sums = grad_weights + task * d;
        std::fill(sums, sums + d, 0.0f);
        for (int64_t row = task * ROWS_PER_TASK; row < std::min(n, (task + 1) * ROWS_PER_TASK); ++row) {
            const T *from = x + row * d, *incoming = grad + row * d;
            T* to = grad_x + row * d;
            const float scale = scales[row];
            float along = 0.0f;  // the part of the gradient along x, which the norm removes
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

// Writes −log softmax at the label to `losses` (n). If `differentiate` is not 0, the logits are replaced by their
// gradient, softmax − one-hot. Both are 0 where the label is `ignored`.
template <class T>
void cross_entropy(
    int64_t n, int64_t d, int64_t threads, int64_t ignored, int64_t differentiate, T* logits, const int64_t* labels,
    float* losses
) {
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

template <class T>
void describe_rows_in(std::string& to, const std::string& format) {
    describe_function(to, "swiglu", format, swiglu<T>);
    describe_function(to, "swiglu_backward", format, swiglu_backward<T>);
    describe_function(to, "rms_norm", format, rms_norm<T>);
    describe_function(to, "rms_norm_backward", format, rms_norm_backward<T>);
    describe_function(to, "cross_entropy", format, cross_entropy<T>);
}

}  // namespace

void describe_rows(std::string& to) {
    describe_rows_in<float>(to, "float32");
    describe_rows_in<bfloat16>(to, "bfloat16");
    describe_function(to, "num_row_tasks", "any", num_tasks);
}
