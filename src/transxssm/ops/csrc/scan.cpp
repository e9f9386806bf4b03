// The fused elementwise kernels of the chunked scan, which run between matrix products that torch computes
// (ops/ssd/cpp.py).
//
// A task is a chunk and a group, or a state. Its result does not depend on the number of threads. Letters as in scan.h;
// In is the number format of the inputs and Op that of the operands of matrix products.

#include "scan.h"

namespace {

template <class In, class Op>
void load_rotated(const Block& block, const Place& at, const void* source, int64_t row, int64_t token, void* target) {
    for (int64_t q = 0; q < block.chunk_length; ++q) {
        const int64_t t = at.first_token + q;
        const In* from = static_cast<const In*>(source) + at.row * row + t * token + at.group * block.state_size;
        rotate(
            block, at, t, 1.0f, from, static_cast<Op*>(target) + (at.task * block.chunk_length + q) * block.state_size
        );
    }
}

template <class In, class Op>
void store_unrotated(const Block& block, const Place& at, const Op* source, In* target) {
    for (int64_t q = 0; q < block.chunk_length; ++q) {
        const int64_t t = at.first_token + q, place = (at.row * block.length + t) * block.groups + at.group;
        const Op* from = source + (at.task * block.chunk_length + q) * block.state_size;
        rotate(block, at, t, -1.0f, from, target + place * block.state_size);
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
                Op *dt_x = static_cast<Op*>(block.dt_x) + by_head,
                   *weighted = static_cast<Op*>(block.weighted_x) + as_rows;
#pragma omp simd
                for (int64_t i = 0; i < P; ++i) {
                    store(dt_x[i], to_float(x[i]) * dt);
                    store(weighted[i], to_float(x[i]) * to_end);
                }
                if (!block.grad_y) continue;
                const In* grad = static_cast<const In*>(block.grad_y) + at.row * block.grad_y_row +
                                 t * block.grad_y_token + head * P;
                Op *dy = static_cast<Op*>(block.dy) + by_head,
                   *weighted_dy = static_cast<Op*>(block.weighted_dy) + as_rows;
#pragma omp simd
                for (int64_t i = 0; i < P; ++i) {
                    store(dy[i], to_float(grad[i]));
                    store(weighted_dy[i], to_float(grad[i]) * from_start);
                }
            }
    }
}

template <class Op>
void weigh_scores(const Block& block, const Op* scores, Op* weights) {
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
                const Op* score = scores + (task * Q + q) * Q;
                Op* weight = weights + (head * Q + q) * Q;
                decays_to(block.sums + head * Q, block.remainders + head * Q, documents, q, end, decay.data());
#pragma omp simd
                for (int64_t k = 0; k < end; ++k) store(weight[k], to_float(score[k]) * decay[k]);
                std::memset(static_cast<void*>(weight + end), 0, (Q - end) * sizeof(Op));
            }
        }
    }
}

// Carries the states, one for each row or sequence, over the chunks, S_{c+1} = across_c · S_c + update_c, and writes
// the state that enters each chunk to `entering` (a, g, n, r p).
template <class Op>
void carry_states(const Block& block, float* state, const Op* updates, Op* entering) {
    const int64_t N = block.state_size, P = block.head_dim, R = block.heads / block.groups, width = R * P;
    const int64_t states = block.batch * block.groups;
#pragma omp parallel for collapse(2) num_threads(block.threads)
    for (int64_t which = 0; which < states; ++which)
        for (int64_t n = 0; n < N; ++n) {
            for (int64_t c = 0; c < block.num_chunks; ++c) {
                float* row = state + (state_of(block, c, which) * N + n) * width;
                const int64_t task = c * states + which, offset = (task * N + n) * width;
                const Op* update = updates + offset;
                Op* before = entering + offset;
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

// Carries the gradients of the states from the end, G_c = across_c · G_{c+1} + update_c. Writes the gradient of the
// state that leaves each chunk to `leaving`, and that of log across_c to `grad_log_across`.
template <class Op>
void carry_gradients(const Block& block, float* gradient, const Op* updates, const Op* entering, Op* leaving) {
    const int64_t N = block.state_size, P = block.head_dim, R = block.heads / block.groups, width = R * P;
    const int64_t states = block.batch * block.groups;
#pragma omp parallel for collapse(2) num_threads(block.threads)
    for (int64_t which = 0; which < states; ++which)
        for (int64_t r = 0; r < R; ++r)
            for (int64_t c = block.num_chunks - 1; c >= 0; --c) {
                const int64_t task = c * states + which;
                const float across = block.across[task * R + r];
                float dot_across = 0.0f;
                for (int64_t n = 0; n < N; ++n) {
                    float* row = gradient + (state_of(block, c, which) * N + n) * width + r * P;
                    const int64_t offset = (task * N + n) * width + r * P;
                    const Op *update = updates + offset, *state = entering + offset;
                    Op* after = leaving + offset;
                    float dot = 0.0f;
#pragma omp simd reduction(+ : dot)
                    for (int64_t i = 0; i < P; ++i) {
                        dot += row[i] * to_float(state[i]);
                        store(after[i], row[i]);
                        row[i] = row[i] * across + to_float(update[i]);
                    }
                    dot_across += dot;
                }
                block.grad_log_across[task * R + r] = dot_across * across;
            }
}

template <class In, class Op>
void finish_outputs(const Block& block, const Op* from_states, const Op* inside, In* y) {
    const int64_t Q = block.chunk_length, P = block.head_dim;
#pragma omp parallel for num_threads(block.threads)
    for (int64_t task = 0; task < num_tasks(block); ++task) {
        const Place at = place_of(block, task);
        const int64_t R = at.heads_of_group;
        for (int64_t q = 0; q < Q; ++q)
            for (int64_t r = 0; r < R; ++r) {
                const int64_t t = at.first_token + q, head = at.first_head + r;
                const float from_start = block.from_start[(task * R + r) * Q + q],
                            skip = block.D ? block.D[head] : 0.0f;
                const Op* before = from_states + ((task * Q + q) * R + r) * P;
                const Op* here = inside + ((task * R + r) * Q + q) * P;
                const In* x = static_cast<const In*>(block.x) + at.row * block.x_row + t * block.x_token + head * P;
                In* out = y + ((at.row * block.length + t) * block.heads + head) * P;
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

// In y_q = Σ_k s_qk L_qk dt_k x_k: the weights s L, the gradients of the scores s (summed over the heads of a group)
// and of the log decays.
template <class Op>
void differentiate_weights(const Block& block, const Op* scores, const Op* grad_weights, Op* weights, Op* grad_scores) {
    const int64_t Q = block.chunk_length;
#pragma omp parallel for num_threads(block.threads)
    for (int64_t task = 0; task < num_tasks(block); ++task) {
        const Place at = place_of(block, task);
        const int64_t R = at.heads_of_group;
        const int64_t* documents = block.seq_idx ? block.seq_idx + at.row * block.length + at.first_token : nullptr;
        std::vector<float> decay(Q), sum(Q);
        std::memset(block.grad_log_decay + task * R * Q, 0, R * Q * sizeof(float));
        for (int64_t q = 0; q < Q; ++q) {
            const int64_t end = std::min(Q, (q + LANES) / LANES * LANES);
            const Op* score = scores + (task * Q + q) * Q;
            Op* grad_score = grad_scores + (task * Q + q) * Q;
            for (int64_t k = 0; k < end; ++k) sum[k] = 0.0f;
            for (int64_t r = 0; r < R; ++r) {
                const int64_t head = task * R + r;
                const Op* grad_weight = grad_weights + (head * Q + q) * Q;
                Op* weight = weights + (head * Q + q) * Q;
                float* grad_log_decay = block.grad_log_decay + head * Q;
                decays_to(block.sums + head * Q, block.remainders + head * Q, documents, q, end, decay.data());
                float whole_row = 0.0f;
#pragma omp simd reduction(+ : whole_row)
                for (int64_t k = 0; k < end; ++k) {
                    const float gradient = to_float(grad_weight[k]) * decay[k];
                    const float between = gradient * to_float(score[k]);
                    store(weight[k], to_float(score[k]) * decay[k]);
                    sum[k] += gradient;
                    grad_log_decay[k] -= between;
                    whole_row += between;
                }
                grad_log_decay[q] += whole_row;
                std::memset(static_cast<void*>(weight + end), 0, (Q - end) * sizeof(Op));
            }
#pragma omp simd
            for (int64_t k = 0; k < end; ++k) store(grad_score[k], sum[k]);
            std::memset(static_cast<void*>(grad_score + end), 0, (Q - end) * sizeof(Op));
        }
    }
}

// The gradients, from the products through_state = B · leaving (a, g, k, r p), inside = weightsᵀ · dy (a, g, r, k, p),
// from_state = C · entering (a, g, q, r p), dB and dC (a, g, q, n), which are still rotated. grad_A and grad_D get one
// sum for each task and head.
template <class In, class Op>
void finish_gradients(
    const Block& block, const Op* through_state, const Op* all_inside, const Op* all_from_state, const Op* dB,
    const Op* dC, In* grad_x, float* grad_dt, In* grad_B, In* grad_C, double* grad_A, double* grad_D
) {
    const int64_t Q = block.chunk_length, P = block.head_dim;
#pragma omp parallel for num_threads(block.threads)
    for (int64_t task = 0; task < num_tasks(block); ++task) {
        const Place at = place_of(block, task);
        const int64_t R = at.heads_of_group;
        std::vector<float> grad_dt_through_x(Q);
        for (int64_t r = 0; r < R; ++r) {
            const int64_t head = at.first_head + r, local = task * R + r;
            const float skip = block.D ? block.D[head] : 0.0f;
            float* grad_log_decay = block.grad_log_decay + local * Q;
            double through_end = 0.0, grad_skip = 0.0;
            for (int64_t q = 0; q < Q; ++q) {
                const int64_t t = at.first_token + q, by_head = (local * Q + q) * P,
                              as_rows = ((task * Q + q) * R + r) * P;
                const float to_end = block.to_end[local * Q + q];
                const float dt = block.dt[(at.row * block.length + t) * block.heads + head];
                const In* x = static_cast<const In*>(block.x) + at.row * block.x_row + t * block.x_token + head * P;
                const Op *through = through_state + as_rows, *inside = all_inside + by_head,
                         *dt_x = static_cast<const Op*>(block.dt_x) + by_head,
                         *dy = static_cast<const Op*>(block.dy) + by_head,
                         *weighted_dy = static_cast<const Op*>(block.weighted_dy) + as_rows,
                         *from_state = all_from_state + as_rows;
                In* dx = static_cast<In*>(grad_x) + ((at.row * block.length + t) * block.heads + head) * P;
                float end_dot = 0.0f, start_dot = 0.0f, x_dot = 0.0f, skip_dot = 0.0f;
#pragma omp simd reduction(+ : end_dot, start_dot, x_dot, skip_dot)
                for (int64_t i = 0; i < P; ++i) {
                    const float through_end_state = to_end * to_float(through[i]);
                    const float grad_dt_x = to_float(inside[i]) + through_end_state;
                    end_dot += to_float(dt_x[i]) * through_end_state;
                    start_dot += to_float(weighted_dy[i]) * to_float(from_state[i]);
                    x_dot += to_float(x[i]) * grad_dt_x;
                    skip_dot += to_float(x[i]) * to_float(dy[i]);
                    store(dx[i], grad_dt_x * dt + skip * to_float(dy[i]));
                }
                grad_dt_through_x[q] = x_dot;
                grad_log_decay[q] += start_dot - end_dot;
                through_end += end_dot;
                grad_skip += skip_dot;
            }
            // The cumulative log decay at q sums dt_k A over k ≤ q.
            double grad_rate = through_end + block.grad_log_across[local], rate = 0.0;
            for (int64_t q = Q - 1; q >= 0; --q) {
                const int64_t place = (at.row * block.length + at.first_token + q) * block.heads + head;
                grad_rate += grad_log_decay[q];
                rate += grad_rate * block.dt[place];
                grad_dt[place] = static_cast<float>(grad_dt_through_x[q] + block.A[head] * grad_rate);
            }
            grad_A[local] += rate;
            grad_D[local] += grad_skip;
        }
        store_unrotated<In, Op>(block, at, dB, grad_B);
        store_unrotated<In, Op>(block, at, dC, grad_C);
    }
}

template <class In, class Op>
void describe_scan_in(std::string& to, const std::string& formats) {
    describe_function(to, "load_block", formats, load_block<In, Op>);
    describe_function(to, "weigh_scores", formats, weigh_scores<Op>);
    describe_function(to, "carry_states", formats, carry_states<Op>);
    describe_function(to, "carry_gradients", formats, carry_gradients<Op>);
    describe_function(to, "finish_outputs", formats, finish_outputs<In, Op>);
    describe_function(to, "differentiate_weights", formats, differentiate_weights<Op>);
    describe_function(to, "finish_gradients", formats, finish_gradients<In, Op>);
}

}  // namespace

void describe_scan(std::string& to) {
    describe_structure<Block>(to);
    TRANSXSSM_FIELD(Block, batch);
    TRANSXSSM_FIELD(Block, heads);
    TRANSXSSM_FIELD(Block, groups);
    TRANSXSSM_FIELD(Block, head_dim);
    TRANSXSSM_FIELD(Block, state_size);
    TRANSXSSM_FIELD(Block, first_token);
    TRANSXSSM_FIELD(Block, num_chunks);
    TRANSXSSM_FIELD(Block, chunk_length);
    TRANSXSSM_FIELD(Block, threads);
    TRANSXSSM_FIELD(Block, x_row);
    TRANSXSSM_FIELD(Block, x_token);
    TRANSXSSM_FIELD(Block, B_row);
    TRANSXSSM_FIELD(Block, B_token);
    TRANSXSSM_FIELD(Block, C_row);
    TRANSXSSM_FIELD(Block, C_token);
    TRANSXSSM_FIELD(Block, grad_y_row);
    TRANSXSSM_FIELD(Block, grad_y_token);
    TRANSXSSM_FIELD(Block, length);
    TRANSXSSM_FIELD(Block, rotary_rows);
    TRANSXSSM_FIELD(Block, x);
    TRANSXSSM_FIELD(Block, B);
    TRANSXSSM_FIELD(Block, C);
    TRANSXSSM_FIELD(Block, grad_y);
    TRANSXSSM_FIELD(Block, dt);
    TRANSXSSM_FIELD(Block, A);
    TRANSXSSM_FIELD(Block, D);
    TRANSXSSM_FIELD(Block, cos);
    TRANSXSSM_FIELD(Block, sin);
    TRANSXSSM_FIELD(Block, seq_idx);
    TRANSXSSM_FIELD(Block, sequences);
    TRANSXSSM_FIELD(Block, rotated_B);
    TRANSXSSM_FIELD(Block, rotated_C);
    TRANSXSSM_FIELD(Block, dt_x);
    TRANSXSSM_FIELD(Block, weighted_x);
    TRANSXSSM_FIELD(Block, dy);
    TRANSXSSM_FIELD(Block, weighted_dy);
    TRANSXSSM_FIELD(Block, sums);
    TRANSXSSM_FIELD(Block, remainders);
    TRANSXSSM_FIELD(Block, from_start);
    TRANSXSSM_FIELD(Block, to_end);
    TRANSXSSM_FIELD(Block, across);
    TRANSXSSM_FIELD(Block, grad_log_decay);
    TRANSXSSM_FIELD(Block, grad_log_across);
    TRANSXSSM_FIELD(Block, arenas);
    TRANSXSSM_FIELD(Block, arena_bytes);
    describe_scan_in<float, float>(to, "float32");
    describe_scan_in<bfloat16, bfloat16>(to, "bfloat16");
    describe_scan_in<bfloat16, float>(to, "bfloat16_by_float32");
}
