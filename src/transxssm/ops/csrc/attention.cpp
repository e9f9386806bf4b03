// Causal attention in bfloat16, forward and backward, block by block: the scores are never in memory as a whole (FlashAttention-2).
//
// For processors that tiles.h is for. "Pairs" and "columns" are right matrices, whose rows or columns are what the name says.
//
// A task's result does not depend on the number of threads.
//
// Letters: b batch, h heads, g heads that share a key-value head, t time, q and k positions in a block, d head_dim.

#include <algorithm>
#include <cmath>
#include <limits>

#include "tiles.h"

extern "C" {

// Mirrored by `_Attention` in ops/causal_attention.py. Strides are in elements; a head's numbers lie side by side.
struct Attention {
    int64_t batch, heads, key_heads, length, head_dim, threads;
    int64_t q_row, q_head, q_token, k_row, k_head, k_token, v_row, v_head, v_token;
    int64_t output_row, output_head, output_token, grad_row, grad_head, grad_token;
    const void *q, *k, *v, *output, *grad;  // (b, h, t, d)
    const int32_t* first_keys;  // (b, t) or null: the first key that each query sees, 0 … its own, never falling
    float* log_sums;  // (b, h, t): log of the sum of a query's exponentials
    float scaling;
};

// The gradients, (b, t, h, d), and workspaces: by head, padded t × d each; the last two padded t.
struct AttentionGradients {
    void *grad_q, *grad_k, *grad_v;
    void *q_columns, *q_pairs, *grad_columns, *grad_pairs, *transposed_k;
    float *to_q, *dots, *log2_sums;
};

}  // extern "C"

#if TRANSXSSM_TILES

namespace {

constexpr int64_t WIDTH = 64;  // positions of a block: four vectors
constexpr int64_t KEYS = 128;  // keys that the backward pass works on at once
constexpr int64_t WIDEST = 128;  // head_dim
constexpr float LOG2_E = 1.44269504088896341f, LN_2 = 0.693147180559945309f, INFINITE = std::numeric_limits<float>::infinity();

inline int64_t padded(int64_t length) { return (length + KEYS - 1) / KEYS * KEYS; }

// 2^x to 3e-6 (the quartic of least relative error around 0), 0 at −∞; NaN stays NaN.
inline __m512 exp2_of(__m512 x) {
    x = _mm512_max_ps(_mm512_set1_ps(-150.0f), x);  // of NaN and a number it gives the second
    const __m512 power = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    const __m512 rest = _mm512_sub_ps(x, power);
    __m512 sum = _mm512_set1_ps(9.57008179e-3f);
    sum = _mm512_fmadd_ps(sum, rest, _mm512_set1_ps(5.59178587e-2f));
    sum = _mm512_fmadd_ps(sum, rest, _mm512_set1_ps(2.40247453e-1f));
    sum = _mm512_fmadd_ps(sum, rest, _mm512_set1_ps(6.93121815e-1f));
    sum = _mm512_fmadd_ps(sum, rest, _mm512_set1_ps(9.99999261e-1f));
    return _mm512_scalef_ps(sum, power);
}

// Blocks of WIDTH positions, each [d / 2][WIDTH]: columns are positions, those behind the length zeros.
void columns_of(const bfloat16* from, int64_t token, int64_t length, int64_t head_dim, uint32_t* to) {
    for (int64_t first = 0; first < padded(length); first += WIDTH)
        for (int64_t p = first; p < first + WIDTH; p += 16)
            for (int64_t d = 0; d < head_dim; d += 32)
                transpose_block(from + p * token + d, token, length - p, to + (first * head_dim + d * WIDTH) / 2 + p - first, WIDTH);
}

// [t / 2][d]: rows are positions.
void pairs_of(const bfloat16* from, int64_t token, int64_t length, int64_t head_dim, uint32_t* to) {
    pair_rows(from, token, length, padded(length), head_dim, to);
}

// Blocks of KEYS positions, each [d][KEYS]: a left matrix whose columns are positions.
void transposed(const bfloat16* from, int64_t token, int64_t length, int64_t head_dim, uint32_t* to) {
    uint32_t pairs[KEYS / 2 * WIDEST];
    for (int64_t first = 0; first < padded(length); first += KEYS) {
        pair_rows(from + first * token, token, length - first, KEYS, head_dim, pairs);
        transpose(as_rows(pairs), 2 * head_dim, KEYS / 2, KEYS / 2, head_dim, to + first * head_dim / 2);
    }
}

inline const bfloat16* head_of(const void* base, int64_t row_stride, int64_t row, int64_t head_stride, int64_t head) {
    return static_cast<const bfloat16*>(base) + row * row_stride + head * head_stride;
}

// R queries from `query` on against all keys that they see.
template <int R>
void attend(
    const Attention& a, const bfloat16* q, const uint32_t* k_columns, const uint32_t* v_pairs, const int32_t* first_keys, int64_t query,
    bfloat16* output, float* log_sums
) {
    const int64_t D = a.head_dim;
    const float scale = a.scaling * LOG2_E;
    alignas(64) float sums_of_values[R * WIDEST];
    alignas(64) float scores[R][KEYS];
    alignas(64) bfloat16 weights[R][KEYS];
    float greatest[R], total[R];
    std::fill_n(sums_of_values, R * D, 0.0f);
    for (int r = 0; r < R; ++r) greatest[r] = -INFINITE, total[r] = 0.0f;
    for (int64_t from = first_keys ? first_keys[query] / KEYS * KEYS : 0; from < query + R; from += KEYS) {
        const int64_t width = std::min(KEYS, (query + R - from + WIDTH - 1) / WIDTH * WIDTH);
        for (int64_t n = 0; n < width; n += WIDTH) {
            Tile<R, 4> tile;
            tile.clear();
            tile.add(q, a.q_token, k_columns + (from + n) * D / 2, WIDTH, D / 2);
            tile.save(&scores[0][n], KEYS);
        }
        float keep[R], peaks[R];
        for (int r = 0; r < R; ++r) {
            // Of the keys of this block the query sees those from `begin` to before `end`.
            const int64_t begin = first_keys ? first_keys[query + r] - from : 0, end = query + r - from + 1;
            __m512 most = _mm512_set1_ps(-INFINITE);
            for (int64_t n = 0; n < width; n += 16) {
                __m512 score = _mm512_load_ps(&scores[r][n]);
                if (n < begin || n + 16 > end) {
                    score = _mm512_mask_mov_ps(_mm512_set1_ps(-INFINITE), lanes_before(end - n) & ~lanes_before(begin - n), score);
                    _mm512_store_ps(&scores[r][n], score);
                }
                most = _mm512_max_ps(most, score);
            }
            const float peak = std::max(greatest[r], _mm512_reduce_max_ps(most) * scale);
            peaks[r] = peak == -INFINITE ? 0.0f : peak;  // it has seen no key yet
            keep[r] = std::exp2(greatest[r] - peaks[r]);
            greatest[r] = peak;
        }
        for (int r = 0; r < R; ++r) {
            const __m512 peak = _mm512_set1_ps(peaks[r]), factor = _mm512_set1_ps(scale);
            __m512 sum = _mm512_setzero_ps();
            for (int64_t n = 0; n < width; n += 32) {
                const __m512 left = _mm512_load_ps(&scores[r][n]), right = _mm512_load_ps(&scores[r][n + 16]);
                const __m512 low = exp2_of(_mm512_fmsub_ps(left, factor, peak)), high = exp2_of(_mm512_fmsub_ps(right, factor, peak));
                sum = _mm512_add_ps(sum, _mm512_add_ps(low, high));
                store_lanes(&weights[r][n], low, high);
            }
            total[r] = total[r] * keep[r] + _mm512_reduce_add_ps(sum);
        }
        by_columns(0, D, [&](auto vectors, int64_t d) {
            Tile<R, decltype(vectors)::value> tile;
            tile.load(sums_of_values + d, D);
            for (int r = 0; r < R; ++r) tile.scale(r, keep[r]);
            tile.add(&weights[0][0], KEYS, v_pairs + from / 2 * D + d, D, width / 2);
            tile.save(sums_of_values + d, D);
        });
    }
    for (int r = 0; r < R; ++r) {
        log_sums[r] = greatest[r] * LN_2 + std::log(total[r]);
        for (int64_t d = 0; d < D; ++d) store(output[r * a.output_token + d], sums_of_values[r * D + d] / total[r]);
    }
}

// The weights P, and the gradients of the scores P ∘ (dP − dots), of R keys from `key` on (the rows) and 64 queries from `query` on.
template <int R>
inline void differentiate_scores(
    const Attention& a, const bfloat16* k, const bfloat16* v, const uint32_t* q_columns, const uint32_t* grad_columns,
    const float* log2_sums, const float* dots, const int32_t* first_keys, int64_t key, int64_t query, bfloat16* weights,
    bfloat16* to_scores
) {
    const int64_t D = a.head_dim;
    const __m512 scale = _mm512_set1_ps(a.scaling * LOG2_E);
    alignas(64) float probabilities[R][WIDTH];
    const bool is_whole = query >= key + R - 1 && query + WIDTH <= a.length && (!first_keys || first_keys[query + WIDTH - 1] <= key);
    {
        Tile<R, 4> tile;
        tile.clear();
        tile.add(k, a.k_token, q_columns, WIDTH, D / 2);
        for (int n = 0; n < 4; ++n) {
            const __m512 log_sum = _mm512_loadu_ps(log2_sums + 16 * n);
            const __mmask16 there = lanes_before(a.length - query - 16 * n);
            for (int r = 0; r < R; ++r) {
                __m512 weight = exp2_of(_mm512_fmsub_ps(tile.at[r][n], scale, log_sum));
                if (!is_whole) {
                    __mmask16 seeing = there & ~lanes_before(key + r - query - 16 * n);
                    if (first_keys) {
                        const __m512i first = _mm512_maskz_loadu_epi32(there, first_keys + query + 16 * n);
                        seeing &= _mm512_cmple_epi32_mask(first, _mm512_set1_epi32(static_cast<int32_t>(key) + r));
                    }
                    weight = _mm512_maskz_mov_ps(seeing, weight);
                }
                _mm512_store_ps(&probabilities[r][16 * n], weight);
            }
        }
        for (int r = 0; r < R; ++r)
            for (int n = 0; n < 4; n += 2)
                store_lanes(
                    weights + r * WIDTH + 16 * n, _mm512_load_ps(&probabilities[r][16 * n]), _mm512_load_ps(&probabilities[r][16 * n + 16])
                );
    }
    Tile<R, 4> tile;
    tile.clear();
    tile.add(v, a.v_token, grad_columns, WIDTH, D / 2);
    for (int n = 0; n < 4; n += 2) {
        const __m512 first = _mm512_loadu_ps(dots + 16 * n), second = _mm512_loadu_ps(dots + 16 * n + 16);
        for (int r = 0; r < R; ++r) {
            const __m512 low = _mm512_mul_ps(_mm512_load_ps(&probabilities[r][16 * n]), _mm512_sub_ps(tile.at[r][n], first));
            const __m512 high = _mm512_mul_ps(_mm512_load_ps(&probabilities[r][16 * n + 16]), _mm512_sub_ps(tile.at[r][n + 1], second));
            store_lanes(to_scores + r * WIDTH + 16 * n, low, high);
        }
    }
}

}  // namespace

// The workspaces hold a key-value head after the other, padded t × d each.
extern "C" void attend_bfloat16(const Attention* given, void* all_k_columns, void* all_v_pairs) {
    const Attention& a = *given;
    const int64_t D = a.head_dim, head_size = padded(a.length) * D / 2;
    uint32_t *k_columns = static_cast<uint32_t*>(all_k_columns), *v_pairs = static_cast<uint32_t*>(all_v_pairs);
#pragma omp parallel for num_threads(a.threads)
    for (int64_t task = 0; task < a.batch * a.key_heads; ++task) {
        const int64_t row = task / a.key_heads, head = task % a.key_heads;
        columns_of(head_of(a.k, a.k_row, row, a.k_head, head), a.k_token, a.length, D, k_columns + task * head_size);
        pairs_of(head_of(a.v, a.v_row, row, a.v_head, head), a.v_token, a.length, D, v_pairs + task * head_size);
    }
    const int64_t blocks = (a.length + WIDTH - 1) / WIDTH, group = a.heads / a.key_heads;
#pragma omp parallel for schedule(dynamic) num_threads(a.threads)
    for (int64_t task = 0; task < a.batch * a.heads * blocks; ++task) {
        const int64_t block = blocks - 1 - task % blocks, head = task / blocks % a.heads, row = task / blocks / a.heads;
        const int64_t keys = (row * a.key_heads + head / group) * head_size;
        const bfloat16* q = head_of(a.q, a.q_row, row, a.q_head, head);
        bfloat16* output = const_cast<bfloat16*>(head_of(a.output, a.output_row, row, a.output_head, head));
        const int32_t* first_keys = a.first_keys ? a.first_keys + row * a.length : nullptr;
        by_rows(block * WIDTH, std::min(a.length, (block + 1) * WIDTH), [&](auto rows, int64_t t) {
            attend<decltype(rows)::value>(
                a, q + t * a.q_token, k_columns + keys, v_pairs + keys, first_keys, t, output + t * a.output_token,
                a.log_sums + (row * a.heads + head) * a.length + t
            );
        });
    }
}

extern "C" void attend_backward_bfloat16(const Attention* given, const AttentionGradients* gradients) {
    const Attention& a = *given;
    const AttentionGradients& to = *gradients;
    const int64_t D = a.head_dim, length = padded(a.length), head_size = length * D, group = a.heads / a.key_heads;
#pragma omp parallel for num_threads(a.threads)
    for (int64_t task = 0; task < a.batch * a.heads; ++task) {
        const int64_t row = task / a.heads, head = task % a.heads;
        const bfloat16* q = head_of(a.q, a.q_row, row, a.q_head, head);
        const bfloat16* grad = head_of(a.grad, a.grad_row, row, a.grad_head, head);
        const bfloat16* output = head_of(a.output, a.output_row, row, a.output_head, head);
        columns_of(q, a.q_token, a.length, D, static_cast<uint32_t*>(to.q_columns) + task * head_size / 2);
        pairs_of(q, a.q_token, a.length, D, static_cast<uint32_t*>(to.q_pairs) + task * head_size / 2);
        columns_of(grad, a.grad_token, a.length, D, static_cast<uint32_t*>(to.grad_columns) + task * head_size / 2);
        pairs_of(grad, a.grad_token, a.length, D, static_cast<uint32_t*>(to.grad_pairs) + task * head_size / 2);
        if (head % group == 0)
            transposed(
                head_of(a.k, a.k_row, row, a.k_head, head / group), a.k_token, a.length, D,
                static_cast<uint32_t*>(to.transposed_k) + task / group * head_size / 2
            );
        std::fill_n(to.to_q + task * head_size, head_size, 0.0f);
        for (int64_t t = 0; t < length; ++t) {
            float dot = 0.0f;
            if (t < a.length)
#pragma omp simd reduction(+ : dot)
                for (int64_t d = 0; d < D; ++d) dot += to_float(grad[t * a.grad_token + d]) * to_float(output[t * a.output_token + d]);
            to.dots[task * length + t] = dot;
            to.log2_sums[task * length + t] = t < a.length ? a.log_sums[task * a.length + t] * LOG2_E : 0.0f;
        }
    }
#pragma omp parallel for schedule(dynamic) num_threads(a.threads)
    for (int64_t task = 0; task < a.batch * a.key_heads; ++task) {
        const int64_t row = task / a.key_heads, key_head = task % a.key_heads;
        const bfloat16* k = head_of(a.k, a.k_row, row, a.k_head, key_head);
        const bfloat16* v = head_of(a.v, a.v_row, row, a.v_head, key_head);
        const int32_t* first_keys = a.first_keys ? a.first_keys + row * a.length : nullptr;
        alignas(64) float to_k[KEYS * WIDEST], to_v[KEYS * WIDEST];
        alignas(64) bfloat16 weights[KEYS * WIDTH], to_scores[KEYS * WIDTH];
        alignas(64) uint32_t to_scores_pairs[KEYS / 2 * WIDTH];
        for (int64_t key = 0; key < a.length; key += KEYS) {
            const int64_t keys = std::min(KEYS, a.length - key);
            // The queries that see any of these keys.
            const int64_t end = first_keys ? std::upper_bound(first_keys, first_keys + a.length, key + keys - 1) - first_keys : a.length;
            std::fill_n(to_k, KEYS * D, 0.0f);
            std::fill_n(to_v, KEYS * D, 0.0f);
            if (keys % 2) std::memset(to_scores + keys * WIDTH, 0, WIDTH * sizeof *to_scores);  // the last key's other of the pair
            for (int64_t head = key_head * group; head < (key_head + 1) * group; ++head)
                for (int64_t query = key; query < end; query += WIDTH) {
                    const int64_t place = row * a.heads + head, at = place * head_size + query * D;
                    const uint32_t *q_columns = static_cast<const uint32_t*>(to.q_columns) + at / 2,
                                   *grad_columns = static_cast<const uint32_t*>(to.grad_columns) + at / 2;
                    const float *log2_sums = to.log2_sums + place * length + query, *dots = to.dots + place * length + query;
                    const int64_t seen = std::min(keys, query + WIDTH - key);  // keys that are not after all of these queries
                    by_rows(0, seen, [&](auto rows, int64_t r) {
                        differentiate_scores<decltype(rows)::value>(
                            a, k + (key + r) * a.k_token, v + (key + r) * a.v_token, q_columns, grad_columns, log2_sums, dots,
                            first_keys, key + r, query, weights + r * WIDTH, to_scores + r * WIDTH
                        );
                    });
                    const int64_t even = (seen + 1) / 2 * 2;
                    pair_rows(to_scores, WIDTH, even, even, WIDTH, to_scores_pairs);
                    add_product(weights, WIDTH, static_cast<const uint32_t*>(to.grad_pairs) + at / 2, D, to_v, seen, WIDTH / 2);
                    add_product(to_scores, WIDTH, static_cast<const uint32_t*>(to.q_pairs) + at / 2, D, to_k, seen, WIDTH / 2);
                    add_product(
                        static_cast<const bfloat16*>(to.transposed_k) + task * head_size + key * D, KEYS, to_scores_pairs, WIDTH, to.to_q + at, D, even / 2
                    );
                }
            for (int64_t r = 0; r < keys; ++r) {
                const int64_t out = ((row * a.length + key + r) * a.key_heads + key_head) * D;
                for (int64_t d = 0; d < D; ++d) {
                    store(static_cast<bfloat16*>(to.grad_k)[out + d], to_k[r * D + d] * a.scaling);
                    store(static_cast<bfloat16*>(to.grad_v)[out + d], to_v[r * D + d]);
                }
            }
        }
        for (int64_t head = key_head * group; head < (key_head + 1) * group; ++head)
            for (int64_t t = 0; t < a.length; ++t) {
                const float* from = to.to_q + (row * a.heads + head) * head_size + t / WIDTH * WIDTH * D + t % WIDTH;
                bfloat16* out = static_cast<bfloat16*>(to.grad_q) + ((row * a.length + t) * a.heads + head) * D;
                for (int64_t d = 0; d < D; ++d) store(out[d], from[d * WIDTH] * a.scaling);
            }
    }
}

#endif
