// The passes over a block of chunks that stand between the scan's matrix products, each read and written once.
//
// Every function has a task for each chunk and group (or state), and a task's result does not depend on the number of threads.
//
// Letters as in scan.h.

#include "scan.h"

namespace {

template <class In, class Op>
void load_rotated(const Block& block, const Place& at, const void* source, int64_t row, int64_t token, void* target) {
    for (int64_t q = 0; q < block.chunk_length; ++q) {
        const int64_t t = at.first_token + q;
        const In* from = static_cast<const In*>(source) + at.row * row + t * token + at.group * block.state_size;
        rotate(block, at, t, 1.0f, from, static_cast<Op*>(target) + (at.task * block.chunk_length + q) * block.state_size);
    }
}

template <class In, class Op>
void store_unrotated(const Block& block, const Place& at, const void* source, void* target) {
    for (int64_t q = 0; q < block.chunk_length; ++q) {
        const int64_t t = at.first_token + q, place = (at.row * block.length + t) * block.groups + at.group;
        const Op* from = static_cast<const Op*>(source) + (at.task * block.chunk_length + q) * block.state_size;
        rotate(block, at, t, -1.0f, from, static_cast<In*>(target) + place * block.state_size);
    }
}

template <class In, class Op>
void load_block(const Block& block) {
    const int64_t Q = block.chunk_length, P = block.head_dim;
#pragma omp parallel for num_threads(block.threads)
    for (int64_t task = 0; task < num_tasks(block); ++task) {
        const Place at = place_of(block, task);
        const int64_t R = at.heads_of_group;
        load_rotated<In, Op>(block, at, block.B, block.B_row, block.B_token, block.rotated_B);
        load_rotated<In, Op>(block, at, block.C, block.C_row, block.C_token, block.rotated_C);
        load_decays(block, at);
        for (int64_t r = 0; r < R; ++r)
            for (int64_t q = 0; q < Q; ++q) {
                const int64_t t = at.first_token + q, head = at.first_head + r;
                const int64_t by_head = ((task * R + r) * Q + q) * P, as_rows = ((task * Q + q) * R + r) * P;
                const int64_t decay = (task * R + r) * Q + q;
                const float dt = block.dt[(at.row * block.length + t) * block.heads + head];
                const float to_end = dt * block.to_end[decay], from_start = block.from_start[decay];
                const In* x = static_cast<const In*>(block.x) + at.row * block.x_row + t * block.x_token + head * P;
                Op *dt_x = static_cast<Op*>(block.dt_x) + by_head, *weighted = static_cast<Op*>(block.weighted_x) + as_rows;
#pragma omp simd
                for (int64_t i = 0; i < P; ++i) {
                    store(dt_x[i], to_float(x[i]) * dt);
                    store(weighted[i], to_float(x[i]) * to_end);
                }
                if (!block.grad_y) continue;
                const In* grad = static_cast<const In*>(block.grad_y) + at.row * block.grad_y_row + t * block.grad_y_token + head * P;
                Op *dy = static_cast<Op*>(block.dy) + by_head, *weighted_dy = static_cast<Op*>(block.weighted_dy) + as_rows;
#pragma omp simd
                for (int64_t i = 0; i < P; ++i) {
                    store(dy[i], to_float(grad[i]));
                    store(weighted_dy[i], to_float(grad[i]) * from_start);
                }
            }
    }
}

template <class Op>
void weigh_scores(const Block& block, const void* scores, void* weights) {
    const int64_t Q = block.chunk_length;
#pragma omp parallel for num_threads(block.threads)
    for (int64_t task = 0; task < num_tasks(block); ++task) {
        const Place at = place_of(block, task);
        const int64_t* documents = block.seq_idx ? block.seq_idx + at.row * block.length + at.first_token : nullptr;
        std::vector<float> decay(Q);
        for (int64_t r = 0; r < at.heads_of_group; ++r) {
            const int64_t head = task * at.heads_of_group + r;
            for (int64_t q = 0; q < Q; ++q) {
                const int64_t end = std::min(Q, (q + LANES) / LANES * LANES);
                const Op* score = static_cast<const Op*>(scores) + (task * Q + q) * Q;
                Op* weight = static_cast<Op*>(weights) + (head * Q + q) * Q;
                decays_to(block.sums + head * Q, block.remainders + head * Q, documents, q, end, decay.data());
#pragma omp simd
                for (int64_t k = 0; k < end; ++k) store(weight[k], to_float(score[k]) * decay[k]);
                std::memset(static_cast<void*>(weight + end), 0, (Q - end) * sizeof(Op));
            }
        }
    }
}

// S_{c+1} = across_c · S_c + update_c; the state that each chunk begins with goes to `entering` (a, g, n, r p).
template <class Op>
void carry_states(const Block& block, float* state, const void* updates, void* entering) {
    const int64_t N = block.state_size, P = block.head_dim, R = block.heads / block.groups, width = R * P;
    const int64_t states = block.batch * block.groups;
#pragma omp parallel for collapse(2) num_threads(block.threads)
    for (int64_t which = 0; which < states; ++which)
        for (int64_t n = 0; n < N; ++n) {
            float* row = state + (which * N + n) * width;
            for (int64_t c = 0; c < block.num_chunks; ++c) {
                const int64_t task = c * states + which, offset = (task * N + n) * width;
                const Op* update = static_cast<const Op*>(updates) + offset;
                Op* before = static_cast<Op*>(entering) + offset;
                for (int64_t r = 0; r < R; ++r) {
                    const float across = block.across[task * R + r];
#pragma omp simd
                    for (int64_t i = r * P; i < (r + 1) * P; ++i) {
                        store(before[i], row[i]);
                        row[i] = row[i] * across + to_float(update[i]);
                    }
                }
            }
        }
}

// G_c = across_c · G_{c+1} + update_c from the end; the gradient of the state that each chunk leaves goes to `leaving`, and what its
// decay across the chunk gets from it to `kept`.
template <class Op>
void carry_gradients(const Block& block, float* gradient, const void* updates, const void* entering, void* leaving) {
    const int64_t N = block.state_size, P = block.head_dim, R = block.heads / block.groups, width = R * P;
    const int64_t states = block.batch * block.groups;
#pragma omp parallel for collapse(2) num_threads(block.threads)
    for (int64_t which = 0; which < states; ++which)
        for (int64_t r = 0; r < R; ++r)
            for (int64_t c = block.num_chunks - 1; c >= 0; --c) {
                const int64_t task = c * states + which;
                const float across = block.across[task * R + r];
                float kept = 0.0f;
                for (int64_t n = 0; n < N; ++n) {
                    float* row = gradient + (which * N + n) * width + r * P;
                    const int64_t offset = (task * N + n) * width + r * P;
                    const Op *update = static_cast<const Op*>(updates) + offset, *state = static_cast<const Op*>(entering) + offset;
                    Op* after = static_cast<Op*>(leaving) + offset;
                    float dot = 0.0f;
#pragma omp simd reduction(+ : dot)
                    for (int64_t i = 0; i < P; ++i) {
                        dot += row[i] * to_float(state[i]);
                        store(after[i], row[i]);
                        row[i] = row[i] * across + to_float(update[i]);
                    }
                    kept += dot;
                }
                block.kept[task * R + r] = kept * across;
            }
}

template <class In, class Op>
void finish_outputs(const Block& block, const void* from_states, const void* inside, void* y) {
    const int64_t Q = block.chunk_length, P = block.head_dim;
#pragma omp parallel for num_threads(block.threads)
    for (int64_t task = 0; task < num_tasks(block); ++task) {
        const Place at = place_of(block, task);
        const int64_t R = at.heads_of_group;
        for (int64_t q = 0; q < Q; ++q)
            for (int64_t r = 0; r < R; ++r) {
                const int64_t t = at.first_token + q, head = at.first_head + r;
                const float from_start = block.from_start[(task * R + r) * Q + q], skip = block.D ? block.D[head] : 0.0f;
                const Op* before = static_cast<const Op*>(from_states) + ((task * Q + q) * R + r) * P;
                const Op* here = static_cast<const Op*>(inside) + ((task * R + r) * Q + q) * P;
                const In* x = static_cast<const In*>(block.x) + at.row * block.x_row + t * block.x_token + head * P;
                In* out = static_cast<In*>(y) + ((at.row * block.length + t) * block.heads + head) * P;
                if (block.D)
#pragma omp simd
                    for (int64_t i = 0; i < P; ++i)
                        store(out[i], to_float(here[i]) + from_start * to_float(before[i]) + skip * to_float(x[i]));
                else
#pragma omp simd
                    for (int64_t i = 0; i < P; ++i) store(out[i], to_float(here[i]) + from_start * to_float(before[i]));
            }
    }
}

// y_q = Σ_k s_qk L_qk dt_k x_k: the weights s L, the gradients of the scores summed over a group's heads, and of the log decays.
template <class Op>
void differentiate_weights(const Block& block, const void* scores, const void* to_weights, void* weights, void* to_scores) {
    const int64_t Q = block.chunk_length;
#pragma omp parallel for num_threads(block.threads)
    for (int64_t task = 0; task < num_tasks(block); ++task) {
        const Place at = place_of(block, task);
        const int64_t R = at.heads_of_group;
        const int64_t* documents = block.seq_idx ? block.seq_idx + at.row * block.length + at.first_token : nullptr;
        std::vector<float> decay(Q), sum(Q);
        std::memset(block.to_log_decay + task * R * Q, 0, R * Q * sizeof(float));
        for (int64_t q = 0; q < Q; ++q) {
            const int64_t end = std::min(Q, (q + LANES) / LANES * LANES);
            const Op* score = static_cast<const Op*>(scores) + (task * Q + q) * Q;
            Op* to_score = static_cast<Op*>(to_scores) + (task * Q + q) * Q;
            for (int64_t k = 0; k < end; ++k) sum[k] = 0.0f;
            for (int64_t r = 0; r < R; ++r) {
                const int64_t head = task * R + r;
                const Op* to_weight = static_cast<const Op*>(to_weights) + (head * Q + q) * Q;
                Op* weight = static_cast<Op*>(weights) + (head * Q + q) * Q;
                float* to_log_decay = block.to_log_decay + head * Q;
                decays_to(block.sums + head * Q, block.remainders + head * Q, documents, q, end, decay.data());
                float whole_row = 0.0f;
#pragma omp simd reduction(+ : whole_row)
                for (int64_t k = 0; k < end; ++k) {
                    const float gradient = to_float(to_weight[k]) * decay[k];
                    const float between = gradient * to_float(score[k]);
                    store(weight[k], to_float(score[k]) * decay[k]);
                    sum[k] += gradient;
                    to_log_decay[k] -= between;
                    whole_row += between;
                }
                to_log_decay[q] += whole_row;
                std::memset(static_cast<void*>(weight + end), 0, (Q - end) * sizeof(Op));
            }
#pragma omp simd
            for (int64_t k = 0; k < end; ++k) store(to_score[k], sum[k]);
            std::memset(static_cast<void*>(to_score + end), 0, (Q - end) * sizeof(Op));
        }
    }
}

struct Products {
    const void *through_state, *inside;  // (a, g, k, r p) of B and the states' gradients; (a, g, r, k, p) of the weights and dy
    const void* from_state;  // (a, g, q, r p) of C and the states
    const void *dB, *dC;  // (a, g, q, n)
};

template <class In, class Op>
void finish_gradients(
    const Block& block, const Products& products, void* grad_x, float* grad_dt, void* grad_B, void* grad_C, double* grad_A,
    double* grad_D
) {
    const int64_t Q = block.chunk_length, P = block.head_dim;
#pragma omp parallel for num_threads(block.threads)
    for (int64_t task = 0; task < num_tasks(block); ++task) {
        const Place at = place_of(block, task);
        const int64_t R = at.heads_of_group;
        std::vector<float> to_dt(Q);
        for (int64_t r = 0; r < R; ++r) {
            const int64_t head = at.first_head + r, local = task * R + r;
            const float skip = block.D ? block.D[head] : 0.0f;
            float* to_log_decay = block.to_log_decay + local * Q;
            double through_end = 0.0, to_skip = 0.0;
            for (int64_t q = 0; q < Q; ++q) {
                const int64_t t = at.first_token + q, by_head = (local * Q + q) * P, as_rows = ((task * Q + q) * R + r) * P;
                const float to_end = block.to_end[local * Q + q];
                const float dt = block.dt[(at.row * block.length + t) * block.heads + head];
                const In* x = static_cast<const In*>(block.x) + at.row * block.x_row + t * block.x_token + head * P;
                const Op *through = static_cast<const Op*>(products.through_state) + as_rows,
                         *inside = static_cast<const Op*>(products.inside) + by_head,
                         *dt_x = static_cast<const Op*>(block.dt_x) + by_head, *dy = static_cast<const Op*>(block.dy) + by_head,
                         *weighted_dy = static_cast<const Op*>(block.weighted_dy) + as_rows,
                         *from_state = static_cast<const Op*>(products.from_state) + as_rows;
                In* dx = static_cast<In*>(grad_x) + ((at.row * block.length + t) * block.heads + head) * P;
                float end_dot = 0.0f, start_dot = 0.0f, x_dot = 0.0f, skip_dot = 0.0f;
#pragma omp simd reduction(+ : end_dot, start_dot, x_dot, skip_dot)
                for (int64_t i = 0; i < P; ++i) {
                    const float through_state = to_end * to_float(through[i]);
                    const float to_dt_x = to_float(inside[i]) + through_state;
                    end_dot += to_float(dt_x[i]) * through_state;
                    start_dot += to_float(weighted_dy[i]) * to_float(from_state[i]);
                    x_dot += to_float(x[i]) * to_dt_x;
                    skip_dot += to_float(x[i]) * to_float(dy[i]);
                    store(dx[i], to_dt_x * dt + skip * to_float(dy[i]));
                }
                to_dt[q] = x_dot;
                to_log_decay[q] += start_dot - end_dot;
                through_end += end_dot;
                to_skip += skip_dot;
            }
            // The cumulative log decay at q sums dt_k A over k ≤ q.
            double to_rate = through_end + block.kept[local], rate = 0.0;
            for (int64_t q = Q - 1; q >= 0; --q) {
                const int64_t place = (at.row * block.length + at.first_token + q) * block.heads + head;
                to_rate += to_log_decay[q];
                rate += to_rate * block.dt[place];
                grad_dt[place] = static_cast<float>(to_dt[q] + block.A[head] * to_rate);
            }
            grad_A[local] += rate;
            grad_D[local] += to_skip;
        }
        store_unrotated<In, Op>(block, at, products.dB, grad_B);
        store_unrotated<In, Op>(block, at, products.dC, grad_C);
    }
}

}  // namespace

// One name for each pair of an input's and an operand's format.
#define TRANSXSSM_PASSES(SUFFIX, In, Op)                                                                                   \
    extern "C" void load_block_##SUFFIX(const Block* block) { load_block<In, Op>(*block); }                                \
    extern "C" void weigh_scores_##SUFFIX(const Block* block, const void* scores, void* weights) {                         \
        weigh_scores<Op>(*block, scores, weights);                                                                         \
    }                                                                                                                      \
    extern "C" void carry_states_##SUFFIX(const Block* block, float* state, const void* updates, void* entering) {         \
        carry_states<Op>(*block, state, updates, entering);                                                                \
    }                                                                                                                      \
    extern "C" void carry_gradients_##SUFFIX(                                                                              \
        const Block* block, float* gradient, const void* updates, const void* entering, void* leaving                      \
    ) {                                                                                                                    \
        carry_gradients<Op>(*block, gradient, updates, entering, leaving);                                                 \
    }                                                                                                                      \
    extern "C" void finish_outputs_##SUFFIX(const Block* block, const void* from_states, const void* inside, void* y) {    \
        finish_outputs<In, Op>(*block, from_states, inside, y);                                                            \
    }                                                                                                                      \
    extern "C" void differentiate_weights_##SUFFIX(                                                                        \
        const Block* block, const void* scores, const void* to_weights, void* weights, void* to_scores                     \
    ) {                                                                                                                    \
        differentiate_weights<Op>(*block, scores, to_weights, weights, to_scores);                                         \
    }                                                                                                                      \
    extern "C" void finish_gradients_##SUFFIX(                                                                             \
        const Block* block, const void* through_state, const void* inside, const void* from_state, const void* dB,         \
        const void* dC, void* grad_x, float* grad_dt, void* grad_B, void* grad_C, double* grad_A, double* grad_D           \
    ) {                                                                                                                    \
        finish_gradients<In, Op>(                                                                                          \
            *block, Products{through_state, inside, from_state, dB, dC}, grad_x, grad_dt, grad_B, grad_C, grad_A, grad_D   \
        );                                                                                                                 \
    }

TRANSXSSM_PASSES(float32, float, float)
TRANSXSSM_PASSES(bfloat16, bfloat16, bfloat16)
TRANSXSSM_PASSES(bfloat16_by_float32, bfloat16, float)
