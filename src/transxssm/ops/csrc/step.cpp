// What one token of each row changes in the states of its sequence, where they lie in a cache of slots.

#include <vector>

#include "library.h"
#include "numbers.h"

// The selective state update, S ← exp(dt A) S + dt x (R B)ᵀ and y = S (R C) + D x. The state is read and written once.
// A task is a row of the batch and a group. Its result does not depend on the number of threads.
//
// All arrays but the states are contiguous. x, B, C and y have the number format of the function's name.
struct Step {
    static constexpr const char* NAME = "Step";

    int64_t batch, heads, groups, head_dim, state_size, rotary_rows, threads;
    int64_t state_slot;      // distance of two slots of `state`, in numbers
    const int64_t* slots;    // (batch): which of the states is a row's, or null if row i has number i
    const void* x;           // (batch, heads, head_dim)
    const float* dt;         // (batch, heads)
    const float* A;          // (heads)
    const void *B, *C;       // (batch, groups, state_size)
    const float *cos, *sin;  // (rotary_rows, state_size / 2), or null
    const float* D;          // (heads), or null
    float* state;            // (slots, heads, head_dim, state_size), each contiguous, updated in place
    void* y;                 // (batch, heads, head_dim)
};

// The short convolution with its SiLU. A task is a row. All arrays but x and the states are contiguous; x, weight,
// bias, state and y have the number format of the function's name.
struct ConvolutionStep {
    static constexpr const char* NAME = "ConvolutionStep";

    int64_t batch, channels, taps, threads;
    int64_t x_row, state_slot;  // distance of two rows of `x` and of two slots of `state`, in numbers
    const int64_t* slots;       // (batch)
    const void *x, *weight;     // (batch, channels), (channels, taps)
    const void* bias;           // (channels), or null
    void* state;                // (slots, taps - 1, channels): the inputs before the token, updated in place
    void* y;                    // (batch, channels)
};

namespace {

template <class T>
void load_rotated(const Step& step, int64_t row, const T* from, float* to) {
    const int64_t size = step.state_size, half = size / 2;
    if (!step.cos) {
#pragma omp simd
        for (int64_t i = 0; i < size; ++i) to[i] = to_float(from[i]);
        return;
    }
    const int64_t angle = (step.rotary_rows == 1 ? 0 : row) * half;
    const float *cos = step.cos + angle, *sin = step.sin + angle;
#pragma omp simd
    for (int64_t i = 0; i < half; ++i) {
        const float first = to_float(from[i]), second = to_float(from[half + i]);
        to[i] = first * cos[i] - second * sin[i];
        to[half + i] = second * cos[i] + first * sin[i];
    }
}

template <class T>
void update(const Step& step) {
    TRANSXSSM_REQUIRE(step.heads % step.groups == 0, "the heads must divide into groups");
    const int64_t N = step.state_size, P = step.head_dim, R = step.heads / step.groups;
#pragma omp parallel num_threads(step.threads)
    {
        std::vector<float> maps(2 * N);
        float *B = maps.data(), *C = maps.data() + N;
#pragma omp for
        for (int64_t task = 0; task < step.batch * step.groups; ++task) {
            const int64_t row = task / step.groups, first_head = task % step.groups * R;
            float* states = step.state + (step.slots ? step.slots[row] : row) * step.state_slot;
            load_rotated(step, row, static_cast<const T*>(step.B) + task * N, B);
            load_rotated(step, row, static_cast<const T*>(step.C) + task * N, C);
            for (int64_t head = first_head; head < first_head + R; ++head) {
                const int64_t place = row * step.heads + head;
                const float dt = step.dt[place], decay = exp_of_nonpositive(dt * step.A[head]);
                const float skip = step.D ? step.D[head] : 0.0f;
                const T* x = static_cast<const T*>(step.x) + place * P;
                T* y = static_cast<T*>(step.y) + place * P;
                for (int64_t i = 0; i < P; ++i) {
                    float* state = states + (head * P + i) * N;
                    const float input = to_float(x[i]), added = dt * input;
                    float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
                    for (int64_t j = 0; j < N; ++j) {
                        state[j] = decay * state[j] + added * B[j];
                        sum += state[j] * C[j];
                    }
                    store(y[i], sum + skip * input);
                }
            }
        }
    }
}

template <class T>
void convolve(const ConvolutionStep& step) {
    const int64_t E = step.channels, K = step.taps;
    const T *weight = static_cast<const T*>(step.weight), *bias = static_cast<const T*>(step.bias);
#pragma omp parallel num_threads(step.threads)
    {
        std::vector<float> sums(E);
#pragma omp for
        for (int64_t row = 0; row < step.batch; ++row) {
            const T* x = static_cast<const T*>(step.x) + row * step.x_row;
            T* inputs = static_cast<T*>(step.state) + step.slots[row] * step.state_slot;
            T* y = static_cast<T*>(step.y) + row * E;
            for (int64_t i = 0; i < E; ++i) sums[i] = bias ? to_float(bias[i]) : 0.0f;
            for (int64_t j = 0; j < K; ++j) {
                const T* input = j < K - 1 ? inputs + j * E : x;
                for (int64_t i = 0; i < E; ++i) sums[i] += to_float(weight[i * K + j]) * to_float(input[i]);
            }
#pragma omp simd
            for (int64_t i = 0; i < E; ++i) store(y[i], sums[i] * sigmoid(sums[i]));
            if (K < 2) continue;
            std::memmove(static_cast<void*>(inputs), inputs + E, (K - 2) * E * sizeof(T));
            std::memcpy(static_cast<void*>(inputs + (K - 2) * E), x, E * sizeof(T));
        }
    }
}

}  // namespace

void describe_step(std::string& to) {
    describe_structure<Step>(to);
    TRANSXSSM_FIELD(Step, batch);
    TRANSXSSM_FIELD(Step, heads);
    TRANSXSSM_FIELD(Step, groups);
    TRANSXSSM_FIELD(Step, head_dim);
    TRANSXSSM_FIELD(Step, state_size);
    TRANSXSSM_FIELD(Step, rotary_rows);
    TRANSXSSM_FIELD(Step, threads);
    TRANSXSSM_FIELD(Step, state_slot);
    TRANSXSSM_FIELD(Step, slots);
    TRANSXSSM_FIELD(Step, x);
    TRANSXSSM_FIELD(Step, dt);
    TRANSXSSM_FIELD(Step, A);
    TRANSXSSM_FIELD(Step, B);
    TRANSXSSM_FIELD(Step, C);
    TRANSXSSM_FIELD(Step, cos);
    TRANSXSSM_FIELD(Step, sin);
    TRANSXSSM_FIELD(Step, D);
    TRANSXSSM_FIELD(Step, state);
    TRANSXSSM_FIELD(Step, y);
    describe_function(to, "step", "float32", update<float>);
    describe_function(to, "step", "bfloat16", update<bfloat16>);
    describe_structure<ConvolutionStep>(to);
    TRANSXSSM_FIELD(ConvolutionStep, batch);
    TRANSXSSM_FIELD(ConvolutionStep, channels);
    TRANSXSSM_FIELD(ConvolutionStep, taps);
    TRANSXSSM_FIELD(ConvolutionStep, threads);
    TRANSXSSM_FIELD(ConvolutionStep, x_row);
    TRANSXSSM_FIELD(ConvolutionStep, state_slot);
    TRANSXSSM_FIELD(ConvolutionStep, slots);
    TRANSXSSM_FIELD(ConvolutionStep, x);
    TRANSXSSM_FIELD(ConvolutionStep, weight);
    TRANSXSSM_FIELD(ConvolutionStep, bias);
    TRANSXSSM_FIELD(ConvolutionStep, state);
    TRANSXSSM_FIELD(ConvolutionStep, y);
    describe_function(to, "convolution_step", "float32", convolve<float>);
    describe_function(to, "convolution_step", "bfloat16", convolve<bfloat16>);
}
