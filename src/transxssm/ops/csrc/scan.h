// What all kernels of the chunked scan share: the description of a block of chunks, where the data of a task lies, the
// rotation, the decays.
//
// Letters: b batch, m chunks of a block, a = (m, b) their joint axis with the chunks outermost, q and k positions of
// queries and keys in a chunk, g groups, r heads of a group, p head_dim, n state size. l is the cumulative log decay
// within a chunk.

#pragma once

#include <algorithm>
#include <vector>

#include "library.h"
#include "numbers.h"

// A block of chunks of a scan, which is computed before the next block is read. Pointers to void have the number
// formats of the function's name: x, B, C and grad_y that of the inputs, the workspaces that of the operands of matrix
// products.
struct Block {
    static constexpr const char* NAME = "Block";

    int64_t batch, heads, groups, head_dim, state_size;
    int64_t first_token, num_chunks, chunk_length, threads;
    int64_t x_row, x_token, B_row, B_token, C_row, C_token, grad_y_row, grad_y_token;  // strides, in elements
    int64_t length, rotary_rows;
    const void *x, *B, *C, *grad_y;  // (b, t, h, p), (b, t, g, n) twice, (b, t, h, p)
    const float *dt, *A, *D;         // (b, t, h), (h,), (h,) or null
    const float *cos, *sin;          // (b or 1, t, n/2) or null
    const int64_t* seq_idx;          // (b, t) or null
    const int64_t* sequences;        // (m): the state of each chunk, where b = 1 row holds several sequences, or null
    // Workspaces.
    void *rotated_B, *rotated_C;  // (a, g, q, n)
    void *dt_x, *weighted_x;      // (a, g, r, q, p), (a, g, q, r, p)
    void *dy, *weighted_dy;       // the same two layouts
    float *sums, *remainders;     // (a, g, r, q): l in float32, and what the rounding of l left out
    float *from_start, *to_end;   // (a, g, r, q): decay from the start of the chunk to q, and from q to its end
    float* across;                // (a, g, r): decay across the whole chunk
    float* grad_log_decay;        // (a, g, r, q): gradient of l
    float* grad_log_across;       // (a, g, r): gradient of the logarithm of `across`
    // Memory of scan_bf16.cpp: `arena_bytes` for each thread, contiguous.
    char* arenas;
    int64_t arena_bytes;
};

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

// The number of the state (…, g) that chunk c carries for the row and group `which` of (b, g).
inline int64_t state_of(const Block& block, int64_t c, int64_t which) {
    return block.sequences ? block.sequences[c] * block.groups + which : which;
}

inline int64_t num_tasks(const Block& block) { return block.num_chunks * block.batch * block.groups; }

// Rotates B, C or a gradient of one of them at a token by the angles of its position (direction +1) or back (−1).
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
        const float first = to_float(from[i]), second = to_float(from[half + i]), signed_sin = direction * sin[i];
        store(to[i], first * cos[i] - second * signed_sin);
        store(to[half + i], second * cos[i] + first * signed_sin);
    }
}

// Fills the decays of a chunk and group. Sums are float64 and are split into two float32 numbers, since their
// differences are what counts.
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

// A row of the decay matrix L, of which `end` ≥ q + 1 entries are written: exp(l_q − l_k) where k ≤ q is in the
// document of q, else 0.
inline void decays_to(
    const float* sums, const float* remainders, const int64_t* documents, int64_t q, int64_t end, float* row
) {
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

constexpr int64_t LANES = 16;  // float32 numbers in the widest vector; rows are computed in multiples of it

}  // namespace
