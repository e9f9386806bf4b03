// A scan's inputs and what all that works on its blocks needs: where a task lies, the rotation, the decays.
//
// Letters as in ops/ssd/chunked.py: b batch, m chunks of a block, a = (m, b) their joint axis (chunks outermost, unlike there), q and k
// positions in a chunk, g groups, r heads of a group, p head_dim, n state size. l is the cumulative log decay of a chunk.

#pragma once

#include <algorithm>
#include <vector>

#include "numbers.h"

extern "C" {

// What all passes of a scan share, then where a block lies. Mirrored by `_Block` in ops/ssd/fused.py.
struct Block {
    int64_t batch, heads, groups, head_dim, state_size;
    int64_t first_token, num_chunks, chunk_length, threads;
    int64_t x_row, x_token, B_row, B_token, C_row, C_token, grad_y_row, grad_y_token;  // strides in elements
    int64_t length, rotary_rows;
    const void *x, *B, *C, *grad_y;  // (b, t, h, p), (b, t, g, n) twice, (b, t, h, p)
    const float *dt, *A, *D;  // (b, t, h), (h,), (h,) or null
    const float *cos, *sin;  // (b or 1, t, n/2) or null
    const int64_t* seq_idx;  // (b, t) or null
    // Workspaces of a block.
    void *rotated_B, *rotated_C;  // (a, g, q, n)
    void *dt_x, *weighted_x;  // (a, g, r, q, p), (a, g, q, r, p)
    void *dy, *weighted_dy;  // the same two layouts
    float *sums, *remainders;  // (a, g, r, q): l, and what rounding it left out
    float *from_start, *to_end;  // (a, g, r, q)
    float* across;  // (a, g, r)
    float* to_log_decay;  // (a, g, r, q)
    float* kept;  // (a, g, r)
    // For products in tiles: a thread's memory, one thread's after the other.
    char* arenas;
    int64_t arena_bytes;
};

}  // extern "C"

namespace {

struct Place {
    int64_t chunk, row, group, heads_of_group, first_head, first_token, task;
};

inline Place place_of(const Block& block, int64_t task) {
    Place place;
    const int64_t joint = task / block.groups;
    place.task = task;
    place.group = task % block.groups;
    place.chunk = joint / block.batch;
    place.row = joint % block.batch;
    place.heads_of_group = block.heads / block.groups;
    place.first_head = place.group * place.heads_of_group;
    place.first_token = block.first_token + place.chunk * block.chunk_length;
    return place;
}

inline int64_t num_tasks(const Block& block) { return block.num_chunks * block.batch * block.groups; }

// A token's B or C, or a gradient of one, turned by the angles of its position (+1) or back (−1), into the target's format.
template <class From, class To>
inline void rotate(const Block& block, const Place& at, int64_t token, float direction, const From* from, To* to) {
    const int64_t size = block.state_size, half = size / 2;
    if (!block.cos) {
#pragma omp simd
        for (int64_t i = 0; i < size; ++i) store(to[i], to_float(from[i]));
        return;
    }
    const int64_t angle = ((block.rotary_rows == 1 ? 0 : at.row) * block.length + token) * half;
    const float *cos = block.cos + angle, *sin = block.sin + angle;
#pragma omp simd
    for (int64_t i = 0; i < half; ++i) {
        const float first = to_float(from[i]), second = to_float(from[half + i]), turn = direction * sin[i];
        store(to[i], first * cos[i] - second * turn);
        store(to[half + i], second * cos[i] + first * turn);
    }
}

inline void load_decays(const Block& block, const Place& at) {
    const int64_t Q = block.chunk_length;
    const int64_t* documents = block.seq_idx ? block.seq_idx + at.row * block.length + at.first_token : nullptr;
    const int64_t before = documents ? documents[at.first_token > 0 ? -1 : 0] : 0;
    const int64_t last = documents ? documents[Q - 1] : 0;
    std::vector<double> exact(Q);
    for (int64_t r = 0; r < at.heads_of_group; ++r) {
        const int64_t head = at.first_head + r, offset = (at.task * at.heads_of_group + r) * Q;
        const float rate = block.A[head];
        double sum = 0.0;
        for (int64_t q = 0; q < Q; ++q) {
            const float log_decay = block.dt[(at.row * block.length + at.first_token + q) * block.heads + head] * rate;
            exact[q] = sum += log_decay;
            block.sums[offset + q] = static_cast<float>(sum);
            block.remainders[offset + q] = static_cast<float>(sum - block.sums[offset + q]);
        }
        float across = 0.0f;
        for (int64_t q = 0; q < Q; ++q) {
            const float from_start = exp_of_nonpositive(block.sums[offset + q]);
            const float to_end = exp_of_nonpositive(static_cast<float>(exact[Q - 1] - exact[q]));
            block.from_start[offset + q] = documents && documents[q] != before ? 0.0f : from_start;
            block.to_end[offset + q] = documents && documents[q] != last ? 0.0f : to_end;
            across = from_start;
        }
        block.across[at.task * at.heads_of_group + r] = documents && before != last ? 0.0f : across;
    }
}

// exp(l_q − l_k) for k ≤ q of one document, 0 for other k < end: a row of L, of which end ≥ q + 1 entries are written.
inline void decays_to(const float* sums, const float* remainders, const int64_t* documents, int64_t q, int64_t end, float* row) {
    const float sum = sums[q], remainder = remainders[q];
#pragma omp simd
    for (int64_t k = 0; k < end; ++k) {
        const float exponent = (sum - sums[k]) + (remainder - remainders[k]);
        row[k] = exp_of_nonpositive(exponent > 0.0f ? 0.0f : exponent);
    }
    for (int64_t k = q + 1; k < end; ++k) row[k] = 0.0f;
    if (documents)
        for (int64_t k = 0; k <= q; ++k) row[k] = documents[k] == documents[q] ? row[k] : 0.0f;
}

constexpr int64_t LANES = 16;  // rows are worked on in whole vectors

}  // namespace
