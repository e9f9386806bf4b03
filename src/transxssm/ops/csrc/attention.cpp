// Causal attention in bfloat16, forward and backward, block by block: the scores are never in memory as a whole
// (FlashAttention-2).
//
// For processors with AVX-512 BF16; "_packed" and "_T_packed" as in gemm_bf16.h. A task's result does not depend on the
// number of threads.
//
// Letters: b batch, h heads, t time, d head_dim.

#include <algorithm>
#include <cmath>
#include <limits>

#include "gemm_bf16.h"
#include "library.h"

// Strides are in elements; the numbers of a head lie side by side.
struct Attention {
    static constexpr const char* NAME = "Attention";

    int64_t batch, heads, key_heads, length, head_dim, threads;
    int64_t q_row, q_head, q_token, k_row, k_head, k_token, v_row, v_head, v_token;
    int64_t output_row, output_head, output_token, grad_row, grad_head, grad_token;
    const void *q, *k, *v, *output, *grad;  // (b, h, t, d)
    const int32_t*
        first_keys;   // (b, t) or null: the first key that each query sees, from 0 to its own position; never falling
    float* log_sums;  // (b, h, t): logarithm of the sum of the exponentials of a query
    float scaling;
};

// The gradients, (b, t, h, d), and workspaces of `attend_backward` with t padded to a multiple of KEYS.
struct AttentionGradients {
    static constexpr const char* NAME = "AttentionGradients";

    void *grad_q, *grad_k, *grad_v;
    void *q_T_packed, *q_packed, *grad_T_packed, *grad_packed;  // (b, h, padded t, d)
    void* k_T;                                                  // (b, key heads, padded t, d)
    float* sums_q;            // (b, h, padded t, d): the gradient of q / scaling, in blocks (d, WIDTH)
    float *dots, *log2_sums;  // (b, h, padded t)
};

#if TRANSXSSM_BF16_GEMM

namespace {

constexpr int64_t WIDTH = 64;  // positions in a packed block: four vectors
constexpr int64_t KEYS = 128;  // keys that are worked on at once
constexpr int64_t MAX_HEAD_DIM = 128;
constexpr float LOG2_E = 1.44269504088896341f, LN_2 = 0.693147180559945309f,
                INFINITE = std::numeric_limits<float>::infinity();

inline int64_t padded(int64_t length) { return (length + KEYS - 1) / KEYS * KEYS; }

// 2^x to a relative error of 3e-6 (the minimax quartic around 0); 0 at −∞, and NaN stays NaN.
inline __m512 exp2_of(__m512 x) {
    x = _mm512_max_ps(_mm512_set1_ps(-150.0f), x);  // which returns its second operand if the other is NaN
    const __m512 power = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    const __m512 rest = _mm512_sub_ps(x, power);
    __m512 sum = _mm512_set1_ps(9.57008179e-3f);
    sum = _mm512_fmadd_ps(sum, rest, _mm512_set1_ps(5.59178587e-2f));
    sum = _mm512_fmadd_ps(sum, rest, _mm512_set1_ps(2.40247453e-1f));
    sum = _mm512_fmadd_ps(sum, rest, _mm512_set1_ps(6.93121815e-1f));
    sum = _mm512_fmadd_ps(sum, rest, _mm512_set1_ps(9.99999261e-1f));
    return _mm512_scalef_ps(sum, power);
}

// Packs the transpose in blocks of WIDTH positions, each (d / 2, WIDTH). Positions behind the length are zeros.
void pack_transpose(const bfloat16* from, int64_t token, int64_t length, int64_t head_dim, uint32_t* to) {
    for (int64_t first = 0; first < padded(length); first += WIDTH)
        for (int64_t p = first; p < first + WIDTH; p += 16)
            for (int64_t d = 0; d < head_dim; d += 32)
                transpose_pairs_16x16(
                    from + p * token + d, token, length - p, to + (first * head_dim + d * WIDTH) / 2 + p - first, WIDTH
                );
}

// Packs the positions as rows, (padded t / 2, d).
void pack(const bfloat16* from, int64_t token, int64_t length, int64_t head_dim, uint32_t* to) {
    vnni_pack(from, token, length, padded(length), head_dim, to);
}

// Transposes blocks of KEYS positions, each to (d, KEYS) by rows: a left operand.
void transpose_blocks(const bfloat16* from, int64_t token, int64_t length, int64_t head_dim, uint32_t* to) {
    uint32_t pairs[KEYS / 2 * MAX_HEAD_DIM];
    for (int64_t first = 0; first < padded(length); first += KEYS) {
        vnni_pack(from + first * token, token, length - first, KEYS, head_dim, pairs);
        transpose_pairs(as_numbers(pairs), 2 * head_dim, KEYS / 2, KEYS / 2, head_dim, to + first * head_dim / 2);
    }
}

inline const bfloat16* head_of(const void* base, int64_t row_stride, int64_t row, int64_t head_stride, int64_t head) {
    return static_cast<const bfloat16*>(base) + row * row_stride + head * head_stride;
}

// The outputs of R queries from `query` on, over all keys that they see, with an online softmax.
template <int R>
void attend_rows(
    const Attention& a, const bfloat16* q, const uint32_t* k_T_packed, const uint32_t* v_packed,
    const int32_t* first_keys, int64_t query, bfloat16* output, float* log_sums
) {
    const int64_t D = a.head_dim;
    const float scale = a.scaling * LOG2_E;
    alignas(64) float weighted_values[R * MAX_HEAD_DIM];
    alignas(64) float scores[R][KEYS];
    alignas(64) bfloat16 weights[R][KEYS];
    float greatest[R], total[R];
    std::fill_n(weighted_values, R * D, 0.0f);
    for (int r = 0; r < R; ++r) greatest[r] = -INFINITE, total[r] = 0.0f;
    for (int64_t from = first_keys ? first_keys[query] / KEYS * KEYS : 0; from < query + R; from += KEYS) {
        const int64_t width = std::min(KEYS, (query + R - from + WIDTH - 1) / WIDTH * WIDTH);
        for (int64_t n = 0; n < width; n += WIDTH) {
            RegisterBlock<R, 4> sums;
            sums.clear();
            sums.add_product(q, a.q_token, k_T_packed + (from + n) * D / 2, WIDTH, D / 2);
            sums.save(&scores[0][n], KEYS);
        }
        float keep[R], peaks[R];
        for (int r = 0; r < R; ++r) {
            // The query sees the keys of this block in [begin, end).
            const int64_t begin = first_keys ? first_keys[query + r] - from : 0, end = query + r - from + 1;
            __m512 most = _mm512_set1_ps(-INFINITE);
            for (int64_t n = 0; n < width; n += 16) {
                __m512 score = _mm512_load_ps(&scores[r][n]);
                if (n < begin || n + 16 > end) {
                    score = _mm512_mask_mov_ps(
                        _mm512_set1_ps(-INFINITE), lanes_before(end - n) & ~lanes_before(begin - n), score
                    );
                    _mm512_store_ps(&scores[r][n], score);
                }
                most = _mm512_max_ps(most, score);
            }
            const float peak = std::max(greatest[r], _mm512_reduce_max_ps(most) * scale);
            peaks[r] = peak == -INFINITE ? 0.0f : peak;  // as long as it has seen no key
            keep[r] = std::exp2(greatest[r] - peaks[r]);
            greatest[r] = peak;
        }
        for (int r = 0; r < R; ++r) {
            const __m512 peak = _mm512_set1_ps(peaks[r]), factor = _mm512_set1_ps(scale);
            __m512 sum = _mm512_setzero_ps();
            for (int64_t n = 0; n < width; n += 32) {
                const __m512 left = _mm512_load_ps(&scores[r][n]), right = _mm512_load_ps(&scores[r][n + 16]);
                const __m512 low = exp2_of(_mm512_fmsub_ps(left, factor, peak)),
                             high = exp2_of(_mm512_fmsub_ps(right, factor, peak));
                sum = _mm512_add_ps(sum, _mm512_add_ps(low, high));
                store_lanes(&weights[r][n], low, high);
            }
            total[r] = total[r] * keep[r] + _mm512_reduce_add_ps(sum);
        }
        by_columns(0, D, [&](auto vectors, int64_t d) {
            RegisterBlock<R, decltype(vectors)::value> sums;
            sums.load(weighted_values + d, D);
            for (int r = 0; r < R; ++r) sums.scale(r, keep[r]);
            sums.add_product(&weights[0][0], KEYS, v_packed + from / 2 * D + d, D, width / 2);
            sums.save(weighted_values + d, D);
        });
    }
    for (int r = 0; r < R; ++r) {
        log_sums[r] = greatest[r] * LN_2 + std::log(total[r]);
        for (int64_t d = 0; d < D; ++d) store(output[r * a.output_token + d], weighted_values[r * D + d] / total[r]);
    }
}

// The weights P and the gradients of the scores P ∘ (dP − dots) of R keys from `key` on, which are the rows, and 64
// queries from `query` on.
template <int R>
inline void differentiate_scores(
    const Attention& a, const bfloat16* k, const bfloat16* v, const uint32_t* q_T_packed, const uint32_t* grad_T_packed,
    const float* log2_sums, const float* dots, const int32_t* first_keys, int64_t key, int64_t query, bfloat16* weights,
    bfloat16* grad_scores
) {
    const int64_t D = a.head_dim;
    const __m512 scale = _mm512_set1_ps(a.scaling * LOG2_E);
    alignas(64) float probabilities[R][WIDTH];
    const bool is_whole =
        query >= key + R - 1 && query + WIDTH <= a.length && (!first_keys || first_keys[query + WIDTH - 1] <= key);
    {
        RegisterBlock<R, 4> sums;
        sums.clear();
        sums.add_product(k, a.k_token, q_T_packed, WIDTH, D / 2);
        for (int n = 0; n < 4; ++n) {
            const __m512 log_sum = _mm512_loadu_ps(log2_sums + 16 * n);
            const __mmask16 there = lanes_before(a.length - query - 16 * n);
            for (int r = 0; r < R; ++r) {
                __m512 weight = exp2_of(_mm512_fmsub_ps(sums.at[r][n], scale, log_sum));
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
                    weights + r * WIDTH + 16 * n, _mm512_load_ps(&probabilities[r][16 * n]),
                    _mm512_load_ps(&probabilities[r][16 * n + 16])
                );
    }
    RegisterBlock<R, 4> sums;
    sums.clear();
    sums.add_product(v, a.v_token, grad_T_packed, WIDTH, D / 2);
    for (int n = 0; n < 4; n += 2) {
        const __m512 first = _mm512_loadu_ps(dots + 16 * n), second = _mm512_loadu_ps(dots + 16 * n + 16);
        for (int r = 0; r < R; ++r) {
            const __m512 low =
                _mm512_mul_ps(_mm512_load_ps(&probabilities[r][16 * n]), _mm512_sub_ps(sums.at[r][n], first));
            const __m512 high =
                _mm512_mul_ps(_mm512_load_ps(&probabilities[r][16 * n + 16]), _mm512_sub_ps(sums.at[r][n + 1], second));
            store_lanes(grad_scores + r * WIDTH + 16 * n, low, high);
        }
    }
}

void check(const Attention& a) {
    TRANSXSSM_REQUIRE(
        0 < a.head_dim && a.head_dim <= MAX_HEAD_DIM && a.head_dim % 32 == 0, "head_dim must be 32, 64, 96 or 128"
    );
    TRANSXSSM_REQUIRE(a.key_heads > 0 && a.heads % a.key_heads == 0, "the heads must divide into key-value heads");
}

// The workspaces have shape (b, key heads, padded t, d).
void attend(const Attention& a, bfloat16* all_k_T_packed, bfloat16* all_v_packed) {
    check(a);
    const int64_t D = a.head_dim, head_size = padded(a.length) * D / 2;
    uint32_t *k_T_packed = reinterpret_cast<uint32_t*>(all_k_T_packed),
             *v_packed = reinterpret_cast<uint32_t*>(all_v_packed);
#pragma omp parallel for num_threads(a.threads)
    for (int64_t task = 0; task < a.batch * a.key_heads; ++task) {
        const int64_t row = task / a.key_heads, head = task % a.key_heads;
        pack_transpose(
            head_of(a.k, a.k_row, row, a.k_head, head), a.k_token, a.length, D, k_T_packed + task * head_size
        );
        pack(head_of(a.v, a.v_row, row, a.v_head, head), a.v_token, a.length, D, v_packed + task * head_size);
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
            attend_rows<decltype(rows)::value>(
                a, q + t * a.q_token, k_T_packed + keys, v_packed + keys, first_keys, t, output + t * a.output_token,
                a.log_sums + (row * a.heads + head) * a.length + t
            );
        });
    }
}

void attend_backward(const Attention& a, const AttentionGradients& to) {
    check(a);
    const int64_t D = a.head_dim, length = padded(a.length), head_size = length * D, group = a.heads / a.key_heads;
#pragma omp parallel for num_threads(a.threads)
    for (int64_t task = 0; task < a.batch * a.heads; ++task) {
        const int64_t row = task / a.heads, head = task % a.heads;
        const bfloat16* q = head_of(a.q, a.q_row, row, a.q_head, head);
        const bfloat16* grad = head_of(a.grad, a.grad_row, row, a.grad_head, head);
        const bfloat16* output = head_of(a.output, a.output_row, row, a.output_head, head);
        pack_transpose(q, a.q_token, a.length, D, static_cast<uint32_t*>(to.q_T_packed) + task * head_size / 2);
        pack(q, a.q_token, a.length, D, static_cast<uint32_t*>(to.q_packed) + task * head_size / 2);
        pack_transpose(
            grad, a.grad_token, a.length, D, static_cast<uint32_t*>(to.grad_T_packed) + task * head_size / 2
        );
        pack(grad, a.grad_token, a.length, D, static_cast<uint32_t*>(to.grad_packed) + task * head_size / 2);
        if (head % group == 0)
            transpose_blocks(
                head_of(a.k, a.k_row, row, a.k_head, head / group), a.k_token, a.length, D,
                static_cast<uint32_t*>(to.k_T) + task / group * head_size / 2
            );
        std::fill_n(to.sums_q + task * head_size, head_size, 0.0f);
        for (int64_t t = 0; t < length; ++t) {
            float dot = 0.0f;
            if (t < a.length)
#pragma omp simd reduction(+ : dot)
                for (int64_t d = 0; d < D; ++d)
                    dot += to_float(grad[t * a.grad_token + d]) * to_float(output[t * a.output_token + d]);
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
        alignas(64) float sums_k[KEYS * MAX_HEAD_DIM], sums_v[KEYS * MAX_HEAD_DIM];
        alignas(64) bfloat16 weights[KEYS * WIDTH], grad_scores[KEYS * WIDTH];
        alignas(64) uint32_t grad_scores_packed[KEYS / 2 * WIDTH];
        for (int64_t key = 0; key < a.length; key += KEYS) {
            const int64_t keys = std::min(KEYS, a.length - key);
            // Queries from `end` on see none of these keys.
            const int64_t end = first_keys
                                    ? std::upper_bound(first_keys, first_keys + a.length, key + keys - 1) - first_keys
                                    : a.length;
            std::fill_n(sums_k, KEYS * D, 0.0f);
            std::fill_n(sums_v, KEYS * D, 0.0f);
            if (keys % 2)
                std::memset(
                    grad_scores + keys * WIDTH, 0, WIDTH * sizeof *grad_scores
                );  // the second number of the last key's pair
            for (int64_t head = key_head * group; head < (key_head + 1) * group; ++head)
                for (int64_t query = key; query < end; query += WIDTH) {
                    const int64_t place = row * a.heads + head, at = place * head_size + query * D;
                    const uint32_t *q_T_packed = static_cast<const uint32_t*>(to.q_T_packed) + at / 2,
                                   *grad_T_packed = static_cast<const uint32_t*>(to.grad_T_packed) + at / 2;
                    const float *log2_sums = to.log2_sums + place * length + query,
                                *dots = to.dots + place * length + query;
                    const int64_t seen =
                        std::min(keys, query + WIDTH - key);  // keys that at least one of these queries may see
                    by_rows(0, seen, [&](auto rows, int64_t r) {
                        differentiate_scores<decltype(rows)::value>(
                            a, k + (key + r) * a.k_token, v + (key + r) * a.v_token, q_T_packed, grad_T_packed,
                            log2_sums, dots, first_keys, key + r, query, weights + r * WIDTH, grad_scores + r * WIDTH
                        );
                    });
                    const int64_t even = (seen + 1) / 2 * 2;
                    vnni_pack(grad_scores, WIDTH, even, even, WIDTH, grad_scores_packed);
                    add_product(
                        weights, WIDTH, static_cast<const uint32_t*>(to.grad_packed) + at / 2, D, sums_v, seen,
                        WIDTH / 2
                    );
                    add_product(
                        grad_scores, WIDTH, static_cast<const uint32_t*>(to.q_packed) + at / 2, D, sums_k, seen,
                        WIDTH / 2
                    );
                    add_product(
                        static_cast<const bfloat16*>(to.k_T) + task * head_size + key * D, KEYS, grad_scores_packed,
                        WIDTH, to.sums_q + at, D, even / 2
                    );
                }
            for (int64_t r = 0; r < keys; ++r) {
                const int64_t out = ((row * a.length + key + r) * a.key_heads + key_head) * D;
                for (int64_t d = 0; d < D; ++d) {
                    store(static_cast<bfloat16*>(to.grad_k)[out + d], sums_k[r * D + d] * a.scaling);
                    store(static_cast<bfloat16*>(to.grad_v)[out + d], sums_v[r * D + d]);
                }
            }
        }
        for (int64_t head = key_head * group; head < (key_head + 1) * group; ++head)
            for (int64_t t = 0; t < a.length; ++t) {
                const float* from = to.sums_q + (row * a.heads + head) * head_size + t / WIDTH * WIDTH * D + t % WIDTH;
                bfloat16* out = static_cast<bfloat16*>(to.grad_q) + ((row * a.length + t) * a.heads + head) * D;
                for (int64_t d = 0; d < D; ++d) store(out[d], from[d * WIDTH] * a.scaling);
            }
    }
}

}  // namespace

#endif

void describe_attention(std::string& to) {
    describe_structure<Attention>(to);
    TRANSXSSM_FIELD(Attention, batch);
    TRANSXSSM_FIELD(Attention, heads);
    TRANSXSSM_FIELD(Attention, key_heads);
    TRANSXSSM_FIELD(Attention, length);
    TRANSXSSM_FIELD(Attention, head_dim);
    TRANSXSSM_FIELD(Attention, threads);
    TRANSXSSM_FIELD(Attention, q_row);
    TRANSXSSM_FIELD(Attention, q_head);
    TRANSXSSM_FIELD(Attention, q_token);
    TRANSXSSM_FIELD(Attention, k_row);
    TRANSXSSM_FIELD(Attention, k_head);
    TRANSXSSM_FIELD(Attention, k_token);
    TRANSXSSM_FIELD(Attention, v_row);
    TRANSXSSM_FIELD(Attention, v_head);
    TRANSXSSM_FIELD(Attention, v_token);
    TRANSXSSM_FIELD(Attention, output_row);
    TRANSXSSM_FIELD(Attention, output_head);
    TRANSXSSM_FIELD(Attention, output_token);
    TRANSXSSM_FIELD(Attention, grad_row);
    TRANSXSSM_FIELD(Attention, grad_head);
    TRANSXSSM_FIELD(Attention, grad_token);
    TRANSXSSM_FIELD(Attention, q);
    TRANSXSSM_FIELD(Attention, k);
    TRANSXSSM_FIELD(Attention, v);
    TRANSXSSM_FIELD(Attention, output);
    TRANSXSSM_FIELD(Attention, grad);
    TRANSXSSM_FIELD(Attention, first_keys);
    TRANSXSSM_FIELD(Attention, log_sums);
    TRANSXSSM_FIELD(Attention, scaling);
    describe_structure<AttentionGradients>(to);
    TRANSXSSM_FIELD(AttentionGradients, grad_q);
    TRANSXSSM_FIELD(AttentionGradients, grad_k);
    TRANSXSSM_FIELD(AttentionGradients, grad_v);
    TRANSXSSM_FIELD(AttentionGradients, q_T_packed);
    TRANSXSSM_FIELD(AttentionGradients, q_packed);
    TRANSXSSM_FIELD(AttentionGradients, grad_T_packed);
    TRANSXSSM_FIELD(AttentionGradients, grad_packed);
    TRANSXSSM_FIELD(AttentionGradients, k_T);
    TRANSXSSM_FIELD(AttentionGradients, sums_q);
    TRANSXSSM_FIELD(AttentionGradients, dots);
    TRANSXSSM_FIELD(AttentionGradients, log2_sums);
#if TRANSXSSM_BF16_GEMM
    describe_function(to, "attend", "bfloat16", attend);
    describe_function(to, "attend_backward", "bfloat16", attend_backward);
#endif
}
