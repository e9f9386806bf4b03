// Split-KV decoding attention (Flash-Decoding): one query a head over all keys, which are read once from memory in
// their own format.
//
// A task is a row of the batch, a key-value head and a split of the keys. The splits depend on the number of keys
// alone, so that the result does not depend on the number of threads.
//
// Letters: b batch, h heads, r heads that share a key-value head, t time, d head_dim.

#include <algorithm>
#include <limits>
#include <vector>

#include "library.h"
#include "numbers.h"

// Strides are in elements; the numbers of a head lie side by side. q, k, v and the output have the number format of the
// function's name.
struct SingleQuery {
    static constexpr const char* NAME = "SingleQuery";

    int64_t batch, heads, key_heads, length, head_dim, mask_rows, threads;
    int64_t q_row, q_head, k_row, k_head, k_token, v_row, v_head, v_token;
    const void *q, *k, *v;  // (b, h, d), (b, key heads, t, d) twice
    const char* mask;       // (mask rows, t) or null: 0 where a key is not seen
    float* partial;  // (b, h, splits, d + 2): per split the weighted sum of values, the greatest score and the sum of
                     // weights
    void* output;    // (b, h, d)
    float scaling;
};

namespace {

constexpr int64_t KEYS_PER_SPLIT = 512;
constexpr int64_t KEYS_AT_ONCE = 4;
constexpr int64_t FEW_NUMBERS = 1 << 16;  // of keys, which one thread reads before a second one would have begun
constexpr float LOWEST = std::numeric_limits<float>::lowest();

int64_t num_splits(int64_t length) { return (length + KEYS_PER_SPLIT - 1) / KEYS_PER_SPLIT; }

// Scores of the r queries (r, d) for `count` keys, `stride` apart, (r, KEYS_PER_SPLIT).
template <class T>
void score_keys(
    int64_t R, int64_t D, const float* queries, const T* keys, int64_t stride, int64_t count, float* scores
) {
    int64_t key = 0;
    for (; key + KEYS_AT_ONCE <= count; key += KEYS_AT_ONCE) {
        const T *k0 = keys + key * stride, *k1 = k0 + stride, *k2 = k1 + stride, *k3 = k2 + stride;
        for (int64_t r = 0; r < R; ++r) {
            const float* q = queries + r * D;
            float sum0 = 0.0f, sum1 = 0.0f, sum2 = 0.0f, sum3 = 0.0f;
#pragma omp simd reduction(+ : sum0, sum1, sum2, sum3)
            for (int64_t i = 0; i < D; ++i) {
                sum0 += q[i] * to_float(k0[i]);
                sum1 += q[i] * to_float(k1[i]);
                sum2 += q[i] * to_float(k2[i]);
                sum3 += q[i] * to_float(k3[i]);
            }
            float* to = scores + r * KEYS_PER_SPLIT + key;
            to[0] = sum0, to[1] = sum1, to[2] = sum2, to[3] = sum3;
        }
    }
    for (; key < count; ++key) {
        const T* k = keys + key * stride;
        for (int64_t r = 0; r < R; ++r) {
            const float* q = queries + r * D;
            float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
            for (int64_t i = 0; i < D; ++i) sum += q[i] * to_float(k[i]);
            scores[r * KEYS_PER_SPLIT + key] = sum;
        }
    }
}

// Adds the values of `count` keys, `stride` apart, with a query's weights to `sums` (d).
template <class T>
void add_values(int64_t D, const float* weights, const T* values, int64_t stride, int64_t count, float* sums) {
    int64_t key = 0;
    for (; key + KEYS_AT_ONCE <= count; key += KEYS_AT_ONCE) {
        const T *v0 = values + key * stride, *v1 = v0 + stride, *v2 = v1 + stride, *v3 = v2 + stride;
        const float w0 = weights[key], w1 = weights[key + 1], w2 = weights[key + 2], w3 = weights[key + 3];
#pragma omp simd
        for (int64_t i = 0; i < D; ++i)
            sums[i] += (w0 * to_float(v0[i]) + w1 * to_float(v1[i])) + (w2 * to_float(v2[i]) + w3 * to_float(v3[i]));
    }
    for (; key < count; ++key) {
        const T* v = values + key * stride;
        const float weight = weights[key];
#pragma omp simd
        for (int64_t i = 0; i < D; ++i) sums[i] += weight * to_float(v[i]);
    }
}

template <class T>
void attend_to_split(
    const SingleQuery& call, int64_t row, int64_t key_head, int64_t split, float* queries, float* scores
) {
    const int64_t D = call.head_dim, R = call.heads / call.key_heads, splits = num_splits(call.length);
    const int64_t first = split * KEYS_PER_SPLIT, count = std::min(call.length - first, KEYS_PER_SPLIT);
    const T* q = static_cast<const T*>(call.q) + row * call.q_row + key_head * R * call.q_head;
    for (int64_t r = 0; r < R; ++r)
        for (int64_t i = 0; i < D; ++i) queries[r * D + i] = to_float(q[r * call.q_head + i]) * call.scaling;
    const T* k = static_cast<const T*>(call.k) + row * call.k_row + key_head * call.k_head + first * call.k_token;
    const T* v = static_cast<const T*>(call.v) + row * call.v_row + key_head * call.v_head + first * call.v_token;
    score_keys(R, D, queries, k, call.k_token, count, scores);
    const char* mask = call.mask ? call.mask + (call.mask_rows == 1 ? 0 : row) * call.length + first : nullptr;
    for (int64_t r = 0; r < R; ++r) {
        float* weights = scores + r * KEYS_PER_SPLIT;
        float* partial = call.partial + ((row * call.heads + key_head * R + r) * splits + split) * (D + 2);
        if (mask)
            for (int64_t key = 0; key < count; ++key) weights[key] = mask[key] ? weights[key] : LOWEST;
        float greatest = LOWEST, total = 0.0f;
#pragma omp simd reduction(max : greatest)
        for (int64_t key = 0; key < count; ++key) greatest = std::max(greatest, weights[key]);
#pragma omp simd reduction(+ : total)
        for (int64_t key = 0; key < count; ++key) total += weights[key] = exp_of_nonpositive(weights[key] - greatest);
        std::fill_n(partial, D, 0.0f);
        add_values(D, weights, v, call.v_token, count, partial);
        partial[D] = greatest;
        partial[D + 1] = total;
    }
}

template <class T>
void combine_splits(const SingleQuery& call, int64_t head) {
    const int64_t D = call.head_dim, splits = num_splits(call.length), stride = D + 2;
    float* partial = call.partial + head * splits * stride;
    float greatest = LOWEST, total = 0.0f;
    for (int64_t split = 0; split < splits; ++split) greatest = std::max(greatest, partial[split * stride + D]);
    for (int64_t split = 0; split < splits; ++split) {
        const float* sums = partial + split * stride;
        const float factor = exp_of_nonpositive(sums[D] - greatest);
        total += factor * sums[D + 1];
        for (int64_t i = 0; i < D; ++i) partial[i] = (split ? partial[i] : 0.0f) + factor * sums[i];
    }
    T* output = static_cast<T*>(call.output) + head * D;
    for (int64_t i = 0; i < D; ++i) store(output[i], partial[i] / total);
}

// softmax(scaling · q kᵀ) v. A row that sees no key gets the mean of the values.
template <class T>
void attend_once(const SingleQuery& call) {
    TRANSXSSM_REQUIRE(
        call.key_heads > 0 && call.heads % call.key_heads == 0, "the heads must divide into key-value heads"
    );
    TRANSXSSM_REQUIRE(call.length > 0, "there must be a key");
    const int64_t R = call.heads / call.key_heads, splits = num_splits(call.length), rows = call.batch * call.key_heads;
#pragma omp parallel num_threads(call.threads) if (rows * call.length * call.head_dim > FEW_NUMBERS)
    {
        std::vector<float> queries(R * call.head_dim), scores(R * KEYS_PER_SPLIT);
#pragma omp for
        for (int64_t task = 0; task < rows * splits; ++task) {
            const int64_t row = task / splits / call.key_heads, key_head = task / splits % call.key_heads;
            attend_to_split<T>(call, row, key_head, task % splits, queries.data(), scores.data());
        }
#pragma omp for
        for (int64_t head = 0; head < call.batch * call.heads; ++head) combine_splits<T>(call, head);
    }
}

}  // namespace

void describe_single_query(std::string& to) {
    describe_structure<SingleQuery>(to);
    TRANSXSSM_FIELD(SingleQuery, batch);
    TRANSXSSM_FIELD(SingleQuery, heads);
    TRANSXSSM_FIELD(SingleQuery, key_heads);
    TRANSXSSM_FIELD(SingleQuery, length);
    TRANSXSSM_FIELD(SingleQuery, head_dim);
    TRANSXSSM_FIELD(SingleQuery, mask_rows);
    TRANSXSSM_FIELD(SingleQuery, threads);
    TRANSXSSM_FIELD(SingleQuery, q_row);
    TRANSXSSM_FIELD(SingleQuery, q_head);
    TRANSXSSM_FIELD(SingleQuery, k_row);
    TRANSXSSM_FIELD(SingleQuery, k_head);
    TRANSXSSM_FIELD(SingleQuery, k_token);
    TRANSXSSM_FIELD(SingleQuery, v_row);
    TRANSXSSM_FIELD(SingleQuery, v_head);
    TRANSXSSM_FIELD(SingleQuery, v_token);
    TRANSXSSM_FIELD(SingleQuery, q);
    TRANSXSSM_FIELD(SingleQuery, k);
    TRANSXSSM_FIELD(SingleQuery, v);
    TRANSXSSM_FIELD(SingleQuery, mask);
    TRANSXSSM_FIELD(SingleQuery, partial);
    TRANSXSSM_FIELD(SingleQuery, output);
    TRANSXSSM_FIELD(SingleQuery, scaling);
    describe_function(to, "num_splits", "any", num_splits);
    describe_function(to, "attend_once", "float32", attend_once<float>);
    describe_function(to, "attend_once", "bfloat16", attend_once<bfloat16>);
}
