// A register-blocked AVX-512 BF16 GEMM for small matrices, and the VNNI packing of its operands. Processors with AMX
// have none here: torch's products use AMX there.
//
// VDPBF16PS adds the products of two neighbouring bfloat16 numbers to a float32. So a product reads its left operand by
// rows and broadcasts pairs of neighbours, and its right operand in VNNI packing: [k / 2][n] pairs, each of the two
// numbers of one column in two rows.
//
// "X_packed" is the matrix X (rows, columns) as a right operand, (rows / 2, columns) pairs. "X_T_packed" is its
// transpose as a right operand, (columns / 2, rows) pairs.

#pragma once

#include <algorithm>
#include <type_traits>

#include "numbers.h"

#if defined(__AVX512BF16__) && defined(__AVX512BW__) && !defined(__AMX_BF16__)
#define TRANSXSSM_BF16_GEMM 1
#include <immintrin.h>
#else
#define TRANSXSSM_BF16_GEMM 0
#endif

#if TRANSXSSM_BF16_GEMM

namespace {

template <int N>
using Count = std::integral_constant<int, N>;

inline __mmask16 lanes_before(int64_t count) {
    return static_cast<__mmask16>((1u << std::clamp<int64_t>(count, 0, 16)) - 1);
}

inline __m512 load_lanes(const bfloat16* from) {
    const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
    return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
}

inline void store_lanes(bfloat16* to, __m512 low, __m512 high) {
    _mm512_storeu_si512(to, (__m512i)_mm512_cvtne2ps_pbh(high, low));
}

inline void store_lanes(bfloat16* to, __m512 lanes) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), (__m256i)_mm512_cvtneps_pbh(lanes));
}

// R rows of V vectors of float32 sums, which stay in registers.
template <int R, int V>
struct RegisterBlock {
    __m512 at[R][V];

    inline void clear() {
        for (int r = 0; r < R; ++r)
            for (int v = 0; v < V; ++v) at[r][v] = _mm512_setzero_ps();
    }
    inline void load(const float* from, int64_t stride) {
        for (int r = 0; r < R; ++r)
            for (int v = 0; v < V; ++v) at[r][v] = _mm512_loadu_ps(from + r * stride + 16 * v);
    }
    inline void save(float* to, int64_t stride) const {
        for (int r = 0; r < R; ++r)
            for (int v = 0; v < V; ++v) _mm512_storeu_ps(to + r * stride + 16 * v, at[r][v]);
    }
    inline void save(bfloat16* to, int64_t stride) const {
        for (int r = 0; r < R; ++r)
            for (int v = 0; v < V; v += 2) store_lanes(to + r * stride + 16 * v, at[r][v], at[r][v + 1]);
    }
    inline void scale(int r, float factor) {
        for (int v = 0; v < V; ++v) at[r][v] = _mm512_mul_ps(at[r][v], _mm512_set1_ps(factor));
    }
    // Adds left (R rows, `stride` apart) times right (VNNI-packed, `width` columns).
    inline void add_product(const bfloat16* left, int64_t stride, const uint32_t* right, int64_t width, int64_t pairs) {
        for (int64_t p = 0; p < pairs; ++p) {
            __m512bh columns[V];
            for (int v = 0; v < V; ++v) columns[v] = (__m512bh)_mm512_loadu_si512(right + p * width + 16 * v);
            for (int r = 0; r < R; ++r) {
                int32_t two;
                std::memcpy(&two, left + r * stride + 2 * p, sizeof two);
                const __m512bh pair = (__m512bh)_mm512_set1_epi32(two);
                for (int v = 0; v < V; ++v) at[r][v] = _mm512_dpbf16_ps(at[r][v], pair, columns[v]);
            }
        }
    }
};

// Calls work(Count<vectors>, first column) for each block of 64 columns, then of 32. The number of columns is a
// multiple of 32.
template <class Work>
inline void by_columns(int64_t first, int64_t end, Work&& work) {
    for (; first + 64 <= end; first += 64) work(Count<4>{}, first);
    for (; first < end; first += 32) work(Count<2>{}, first);
}

// Calls work(Count<rows>, first row) for each block of four rows, then for each remaining row.
template <class Work>
inline void by_rows(int64_t first, int64_t end, Work&& work) {
    for (; first + 4 <= end; first += 4) work(Count<4>{}, first);
    for (; first < end; ++first) work(Count<1>{}, first);
}

// Adds left (rows, 2 pairs) times right (VNNI-packed) to product (rows, width); width is a multiple of 32.
inline void add_product(
    const bfloat16* left, int64_t left_stride, const uint32_t* right, int64_t width, float* product, int64_t rows,
    int64_t pairs
) {
    by_columns(0, width, [&](auto vectors, int64_t n) {
        by_rows(0, rows, [&](auto count, int64_t r) {
            RegisterBlock<decltype(count)::value, decltype(vectors)::value> sums;
            sums.load(product + r * width + n, width);
            sums.add_product(left + r * left_stride, left_stride, right + n, width, pairs);
            sums.save(product + r * width + n, width);
        });
    });
}

// Interleaves two rows of 16 numbers to 16 pairs.
inline __m512i interleave(const bfloat16* first, const bfloat16* second) {
    const __m512i low = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(first)));
    const __m512i high = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(second)));
    return _mm512_or_si512(low, _mm512_slli_epi32(high, 16));
}

// VNNI packing of rows of `width` numbers, a multiple of 16: (padded / 2, width) pairs. Rows from `num_rows` on are
// zeros.
inline void vnni_pack(
    const bfloat16* rows, int64_t stride, int64_t num_rows, int64_t padded, int64_t width, uint32_t* packed
) {
    for (int64_t r = 0; r < padded; r += 2)
        for (int64_t n = 0; n < width; n += 16) {
            __m512i both = _mm512_setzero_si512();
            if (r + 1 < num_rows)
                both = interleave(rows + r * stride + n, rows + (r + 1) * stride + n);
            else if (r < num_rows)
                both =
                    _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(rows + r * stride + n)));
            _mm512_storeu_si512(packed + r / 2 * width + n, both);
        }
}

// Transposes 16 rows of 16 pairs; rows from `num_rows` on are zeros. `stride` is in numbers, `to_stride` in pairs.
inline void transpose_pairs_16x16(
    const bfloat16* from, int64_t stride, int64_t num_rows, uint32_t* to, int64_t to_stride
) {
    __m512i a[16], b[16];
    for (int i = 0; i < 16; ++i) a[i] = i < num_rows ? _mm512_loadu_si512(from + i * stride) : _mm512_setzero_si512();
    for (int i = 0; i < 16; i += 2) {
        b[i] = _mm512_unpacklo_epi32(a[i], a[i + 1]);
        b[i + 1] = _mm512_unpackhi_epi32(a[i], a[i + 1]);
    }
    for (int i = 0; i < 16; i += 4) {  // a quarter of a[i + j] is a quarter of column 4 · quarter + j
        a[i] = _mm512_unpacklo_epi64(b[i], b[i + 2]);
        a[i + 1] = _mm512_unpackhi_epi64(b[i], b[i + 2]);
        a[i + 2] = _mm512_unpacklo_epi64(b[i + 1], b[i + 3]);
        a[i + 3] = _mm512_unpackhi_epi64(b[i + 1], b[i + 3]);
    }
    for (int j = 0; j < 4; ++j) {
        const __m512i even_low = _mm512_shuffle_i32x4(a[j], a[4 + j], 0x88),
                      even_high = _mm512_shuffle_i32x4(a[8 + j], a[12 + j], 0x88);
        const __m512i odd_low = _mm512_shuffle_i32x4(a[j], a[4 + j], 0xdd),
                      odd_high = _mm512_shuffle_i32x4(a[8 + j], a[12 + j], 0xdd);
        _mm512_storeu_si512(to + j * to_stride, _mm512_shuffle_i32x4(even_low, even_high, 0x88));
        _mm512_storeu_si512(to + (4 + j) * to_stride, _mm512_shuffle_i32x4(odd_low, odd_high, 0x88));
        _mm512_storeu_si512(to + (8 + j) * to_stride, _mm512_shuffle_i32x4(even_low, even_high, 0xdd));
        _mm512_storeu_si512(to + (12 + j) * to_stride, _mm512_shuffle_i32x4(odd_low, odd_high, 0xdd));
    }
}

// Transposes (rows, columns) pairs of neighbours to (columns, padded) pairs, both multiples of 16; rows from `num_rows`
// on are zeros. Applied to a matrix by rows it gives the VNNI packing of its transpose, and applied to a VNNI-packed
// matrix the transpose by rows.
inline void transpose_pairs(
    const bfloat16* from, int64_t stride, int64_t num_rows, int64_t padded, int64_t columns, uint32_t* to
) {
    for (int64_t row = 0; row < padded; row += 16)
        for (int64_t c = 0; c < columns; c += 16)
            transpose_pairs_16x16(from + row * stride + 2 * c, stride, num_rows - row, to + c * padded + row, padded);
}

// Pairs as the numbers that they consist of.
inline const bfloat16* as_numbers(const uint32_t* packed) { return reinterpret_cast<const bfloat16*>(packed); }

}  // namespace

#endif
