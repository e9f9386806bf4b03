// The chunked scan in bfloat16 with its matrix products fused into the kernels, for processors with AVX-512 BF16: what
// lies between the products of a chunk stays in the second-level cache. The states are carried from chunk to chunk by
// scan.cpp.
//
// head_dim and the state size are multiples of 32. A task is a chunk and a group. Its result does not depend on the
// number of threads. Letters as in scan.h; "_packed" and "_T_packed" as in gemm_bf16.h.

#include "gemm_bf16.h"
#include "library.h"
#include "scan.h"

// AddressSanitizer (make sanitize) shall also see accesses between the matrices of an arena.
#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#define TRANSXSSM_POISON(memory, num_bytes) __asan_poison_memory_region(memory, num_bytes)
#define TRANSXSSM_UNPOISON(memory, num_bytes) __asan_unpoison_memory_region(memory, num_bytes)
constexpr int64_t GUARD = 64;  // bytes behind each matrix that no access is allowed to
#else
#define TRANSXSSM_POISON(memory, num_bytes) static_cast<void>(0)
#define TRANSXSSM_UNPOISON(memory, num_bytes) static_cast<void>(0)
constexpr int64_t GUARD = 0;
#endif

extern "C" int omp_get_thread_num(void);  // of any OpenMP library, whose header need not be installed

namespace {

int64_t has_bf16_gemm() { return TRANSXSSM_BF16_GEMM; }

}  // namespace

#if TRANSXSSM_BF16_GEMM

namespace {

constexpr int64_t COLUMNS = 32;     // head_dim and state size are multiples of this, and positions are padded to it
constexpr int64_t CACHE_LINE = 64;  // bytes
constexpr int64_t BLOCK_ROWS = 4;   // of a register block

inline int64_t padded(int64_t length) { return (length + COLUMNS - 1) / COLUMNS * COLUMNS; }

// A thread's memory, out of which a task takes its matrices, each on cache lines of its own. Without memory it counts
// what would be taken, so that the code that takes the matrices also says how many bytes they need.
class Arena {
public:
    Arena() = default;
    Arena(char* memory, int64_t num_bytes) : memory_(memory), num_bytes_(num_bytes) {
        TRANSXSSM_POISON(memory_, num_bytes_);
    }
    ~Arena() { TRANSXSSM_UNPOISON(memory_, num_bytes_); }
    Arena(const Arena&) = delete;
    Arena& operator=(const Arena&) = delete;

    template <class T>
    T* take(int64_t count) {
        const int64_t begin = taken_, num_bytes = count * static_cast<int64_t>(sizeof(T));
        taken_ += (num_bytes + CACHE_LINE - 1) / CACHE_LINE * CACHE_LINE + GUARD;
        if (!memory_) return nullptr;
        TRANSXSSM_REQUIRE(taken_ <= num_bytes_, "a chunk's matrices need more memory than arena_bytes says");
        TRANSXSSM_UNPOISON(memory_ + begin, num_bytes);
        return reinterpret_cast<T*>(memory_ + begin);
    }
    int64_t taken() const { return taken_; }

private:
    char* memory_ = nullptr;
    int64_t num_bytes_ = 0, taken_ = 0;
};

// The sizes of a chunk and group. RP = R P is the width of the group's heads side by side.
struct Sizes {
    int64_t Q, N, R, P, RP = R * P, padded_Q = padded(Q);
};

// A task's sizes, and where its rows of the inputs and gradients are.
struct Task : Sizes {
    const Block& block;
    const Place at;

    Task(const Block& given, int64_t task)
        : Sizes{given.chunk_length, given.state_size, given.heads / given.groups, given.head_dim},
          block(given),
          at(place_of(given, task)) {}

    // All heads of the group at a position (r p): they lie side by side.
    const bfloat16* x(int64_t q) const { return heads_at(block.x, block.x_row, block.x_token, q); }
    const bfloat16* grad_y(int64_t q) const { return heads_at(block.grad_y, block.grad_y_row, block.grad_y_token, q); }
    // The index into arrays of shape (b, t, h).
    int64_t token_and_head(int64_t q, int64_t r) const {
        return (at.row * block.length + at.first_token + q) * block.heads + at.first_head + r;
    }
    float dt(int64_t q, int64_t r) const { return block.dt[token_and_head(q, r)]; }
    float skip(int64_t r) const { return block.D ? block.D[at.first_head + r] : 0.0f; }
    // The index of a head's first position in arrays of shape (a, g, r, q).
    int64_t positions(int64_t r) const { return (at.task * R + r) * Q; }
    const int64_t* documents() const {
        return block.seq_idx ? block.seq_idx + at.row * block.length + at.first_token : nullptr;
    }

    // Writes B or C of the chunk (q, n), rotated by the angles of their positions.
    void load_rotated(const void* source, int64_t row, int64_t token, bfloat16* to) const {
        for (int64_t q = 0; q < Q; ++q) {
            const bfloat16* from =
                static_cast<const bfloat16*>(source) + at.row * row + (at.first_token + q) * token + at.group * N;
            if (!block.cos) {
                std::memcpy(static_cast<void*>(to + q * N), from, N * sizeof *to);
                continue;
            }
            const float *cos = angles(block.cos, q), *sin = angles(block.sin, q);
            for (int64_t i = 0; i < N / 2; i += LANES) {
                const __m512 first = load_lanes(from + i), second = load_lanes(from + N / 2 + i);
                const __m512 c = _mm512_loadu_ps(cos + i), s = _mm512_loadu_ps(sin + i);
                store_lanes(to + q * N + i, _mm512_fnmadd_ps(second, s, _mm512_mul_ps(first, c)));
                store_lanes(to + q * N + N / 2 + i, _mm512_fmadd_ps(first, s, _mm512_mul_ps(second, c)));
            }
        }
    }
    // Writes the gradient of B or C at a position (n), rotated back.
    void store_unrotated(const float* from, int64_t q, bfloat16* gradients) const {
        bfloat16* to = gradients + ((at.row * block.length + at.first_token + q) * block.groups + at.group) * N;
        const float *cos = block.cos ? angles(block.cos, q) : nullptr,
                    *sin = block.cos ? angles(block.sin, q) : nullptr;
        for (int64_t i = 0; i < N / 2; i += LANES) {
            const __m512 first = _mm512_loadu_ps(from + i), second = _mm512_loadu_ps(from + N / 2 + i);
            const __m512 c = cos ? _mm512_loadu_ps(cos + i) : _mm512_set1_ps(1.0f);
            const __m512 s = cos ? _mm512_loadu_ps(sin + i) : _mm512_setzero_ps();
            store_lanes(to + i, _mm512_fmadd_ps(second, s, _mm512_mul_ps(first, c)));
            store_lanes(to + N / 2 + i, _mm512_fnmadd_ps(first, s, _mm512_mul_ps(second, c)));
        }
    }

    // dt x, as it enters the sums inside the chunk (q, r p).
    void load_dt_x(bfloat16* to) const {
        scale_rows([&](int64_t q) { return x(q); }, [&](int64_t q, int64_t r) { return dt(q, r); }, to);
    }
    // dt x, as it is left at the end of the chunk (q, r p).
    void load_weighted_x(bfloat16* to) const {
        scale_rows(
            [&](int64_t q) { return x(q); },
            [&](int64_t q, int64_t r) { return dt(q, r) * block.to_end[positions(r) + q]; }, to
        );
    }
    // The gradient of y, decayed from its position back to the start of the chunk (q, r p).
    void load_weighted_dy(bfloat16* to) const {
        scale_rows(
            [&](int64_t q) { return grad_y(q); },
            [&](int64_t q, int64_t r) { return block.from_start[positions(r) + q]; }, to
        );
    }

private:
    const bfloat16* heads_at(const void* base, int64_t row, int64_t token, int64_t q) const {
        return static_cast<const bfloat16*>(base) + at.row * row + (at.first_token + q) * token + at.first_head * P;
    }
    const float* angles(const float* table, int64_t q) const {
        return table + ((block.rotary_rows == 1 ? 0 : at.row) * block.length + at.first_token + q) * (N / 2);
    }
    template <class Row, class Factor>
    void scale_rows(Row&& row, Factor&& factor, bfloat16* to) const {
        for (int64_t q = 0; q < Q; ++q)
            for (int64_t r = 0; r < R; ++r) {
                const __m512 by = _mm512_set1_ps(factor(q, r));
                for (int64_t i = r * P; i < (r + 1) * P; i += 2 * LANES)
                    store_lanes(
                        to + q * RP + i, _mm512_mul_ps(load_lanes(row(q) + i), by),
                        _mm512_mul_ps(load_lanes(row(q) + i + LANES), by)
                    );
            }
    }
};

// Calls work(Task, Memory) for each chunk and group, with the matrices of a Memory in the thread's arena.
template <class Memory, class Work>
void for_each_task(const Block& block, Work&& work) {
    TRANSXSSM_REQUIRE(
        block.head_dim % COLUMNS == 0 && block.state_size % COLUMNS == 0 && block.heads % block.groups == 0,
        "head_dim and the state size must be multiples of 32"
    );
#pragma omp parallel for num_threads(block.threads)
    for (int64_t index = 0; index < num_tasks(block); ++index) {
        const Task task(block, index);
        Arena arena(block.arenas + omp_get_thread_num() * block.arena_bytes, block.arena_bytes);
        const Memory memory(arena, task);
        work(task, memory);
    }
}

struct StateMemory {
    bfloat16* weighted;                              // (q, r p)
    uint32_t *weighted_packed, *map_packed, *map_T;  // map_T (n, padded q) by rows

    StateMemory(Arena& arena, const Sizes& s)
        : weighted(arena.take<bfloat16>(s.Q * s.RP)),
          weighted_packed(arena.take<uint32_t>(s.padded_Q / 2 * s.RP)),
          map_packed(arena.take<uint32_t>(s.padded_Q / 2 * s.N)),
          map_T(arena.take<uint32_t>(s.N * s.padded_Q / 2)) {}
};

// product (n, r p) = mapᵀ · weighted, over the positions of the chunk.
inline void multiply_over_positions(
    const Task& task, const StateMemory& memory, const bfloat16* map, bfloat16* product
) {
    const int64_t N = task.N, RP = task.RP, padded_Q = task.padded_Q;
    vnni_pack(memory.weighted, RP, task.Q, padded_Q, RP, memory.weighted_packed);
    vnni_pack(map, N, task.Q, padded_Q, N, memory.map_packed);
    transpose_pairs(as_numbers(memory.map_packed), 2 * N, padded_Q / 2, padded_Q / 2, N, memory.map_T);
    const bfloat16* left = as_numbers(memory.map_T);
    const uint32_t* right = memory.weighted_packed;
    by_columns(0, RP, [=](auto vectors, int64_t column) {
        by_rows(0, N, [=](auto rows, int64_t n) {
            RegisterBlock<decltype(rows)::value, decltype(vectors)::value> sums;
            sums.clear();
            sums.add_product(left + n * padded_Q, padded_Q, right + column, RP, padded_Q / 2);
            sums.save(product + n * RP + column, RP);
        });
    });
}

// What each chunk adds to the state, Σ_k to_end_k dt_k B_k x_kᵀ (a, g, n, r p). Leaves the decays and the rotated B in
// the block.
void chunk_states(const Block& block, bfloat16* updates) {
    for_each_task<StateMemory>(block, [&](const Task& task, const StateMemory& memory) {
        bfloat16* B = static_cast<bfloat16*>(block.rotated_B) + task.at.task * task.Q * task.N;
        task.load_rotated(block.B, block.B_row, block.B_token, B);
        load_decays(block, task.at);
        task.load_weighted_x(memory.weighted);
        multiply_over_positions(task, memory, B, updates + task.at.task * task.N * task.RP);
    });
}

// What each chunk adds to the gradient of the state that enters it, Σ_q from_start_q C_q dy_qᵀ (a, g, n, r p). Leaves
// the decays and the rotated C in the block.
void chunk_state_gradients(const Block& block, bfloat16* updates) {
    for_each_task<StateMemory>(block, [&](const Task& task, const StateMemory& memory) {
        bfloat16* C = static_cast<bfloat16*>(block.rotated_C) + task.at.task * task.Q * task.N;
        task.load_rotated(block.C, block.C_row, block.C_token, C);
        load_decays(block, task.at);
        task.load_weighted_dy(memory.weighted);
        multiply_over_positions(task, memory, C, updates + task.at.task * task.N * task.RP);
    });
}

struct OutputMemory {
    bfloat16 *C, *dt_x;                                 // (q, n), (q, r p)
    uint32_t *B_T_packed, *dt_x_packed, *state_packed;  // (n / 2, padded q), (padded q / 2, r p), (n / 2, r p)
    float *scores, *decays;                             // (4, padded q), (padded q)
    bfloat16* weights;                                  // (4, padded q)

    OutputMemory(Arena& arena, const Sizes& s)
        : C(arena.take<bfloat16>(s.Q * s.N)),
          dt_x(arena.take<bfloat16>(s.Q * s.RP)),
          B_T_packed(arena.take<uint32_t>(s.N / 2 * s.padded_Q)),
          dt_x_packed(arena.take<uint32_t>(s.padded_Q / 2 * s.RP)),
          state_packed(arena.take<uint32_t>(s.N / 2 * s.RP)),
          scores(arena.take<float>(BLOCK_ROWS * s.padded_Q)),
          decays(arena.take<float>(s.padded_Q)),
          weights(arena.take<bfloat16>(BLOCK_ROWS * s.padded_Q)) {}
};

// Weights L_qk (C_q · B_k) of ROWS queries from q on and all keys up to the last query.
template <int ROWS>
void weigh_scores(const Task& task, const OutputMemory& memory, int64_t q, int64_t r) {
    for (int i = 0; i < ROWS; ++i) {
        const int64_t end = (q + i) / LANES * LANES + LANES, row = i * task.padded_Q;
        decays_to(
            task.block.sums + task.positions(r), task.block.remainders + task.positions(r), task.documents(), q + i,
            std::min(end, task.Q), memory.decays
        );
        for (int64_t k = task.Q; k < end; ++k) memory.decays[k] = 0.0f;
        for (int64_t k = 0; k < end; k += LANES)
            store_lanes(
                memory.weights + row + k,
                _mm512_mul_ps(_mm512_loadu_ps(memory.scores + row + k), _mm512_loadu_ps(memory.decays + k))
            );
    }
}

// y_q = from_start_q · S C_q + Σ_k (C_q · B_k) L_qk dt_k x_k + D x_q, S the state that enters.
void chunk_outputs(const Block& block, const bfloat16* entering, bfloat16* y) {
    for_each_task<OutputMemory>(block, [&](const Task& task, const OutputMemory& memory) {
        const int64_t Q = task.Q, N = task.N, P = task.P, RP = task.RP, padded_Q = task.padded_Q;
        const bfloat16* B = static_cast<const bfloat16*>(block.rotated_B) + task.at.task * Q * N;
        task.load_rotated(block.C, block.C_row, block.C_token, memory.C);
        task.load_dt_x(memory.dt_x);
        transpose_pairs(B, N, Q, padded_Q, N / 2, memory.B_T_packed);
        vnni_pack(memory.dt_x, RP, Q, padded_Q, RP, memory.dt_x_packed);
        vnni_pack(entering + task.at.task * N * RP, RP, N, N, RP, memory.state_packed);
        by_rows(0, Q, [&](auto rows, int64_t q) {
            constexpr int ROWS = decltype(rows)::value;
            by_columns(0, padded(q + ROWS), [&](auto vectors, int64_t k) {
                RegisterBlock<ROWS, decltype(vectors)::value> sums;
                sums.clear();
                sums.add_product(memory.C + q * N, N, memory.B_T_packed + k, padded_Q, N / 2);
                sums.save(memory.scores + k, padded_Q);
            });
            for (int64_t r = 0; r < task.R; ++r) {
                weigh_scores<ROWS>(task, memory, q, r);
                by_columns(r * P, (r + 1) * P, [&](auto vectors, int64_t column) {
                    constexpr int V = decltype(vectors)::value;
                    RegisterBlock<ROWS, V> sums;
                    sums.clear();
                    sums.add_product(memory.C + q * N, N, memory.state_packed + column, RP, N / 2);
                    for (int i = 0; i < ROWS; ++i) sums.scale(i, block.from_start[task.positions(r) + q + i]);
                    sums.add_product(memory.weights, padded_Q, memory.dt_x_packed + column, RP, (q + ROWS + 1) / 2);
                    if (block.D)
                        for (int i = 0; i < ROWS; ++i)
                            for (int v = 0; v < V; ++v)
                                sums.at[i][v] = _mm512_fmadd_ps(
                                    _mm512_set1_ps(task.skip(r)), load_lanes(task.x(q + i) + column + LANES * v),
                                    sums.at[i][v]
                                );
                    sums.save(y + task.token_and_head(q, 0) * P + column, block.heads * P);
                });
            }
        });
    });
}

// exp(l_q − l_k) at 16 queries from `first` on, of arrays that are padded to whole vectors; 0 before k, behind the
// chunk, in other documents.
inline __m512 decays_from(
    const float* sums, const float* remainders, const int64_t* documents, int64_t k, int64_t first, int64_t length
) {
    alignas(64) float decays[LANES];
    const float sum = sums[k], remainder = remainders[k];
#pragma omp simd
    for (int64_t i = 0; i < LANES; ++i) {
        const float exponent = (sums[first + i] - sum) + (remainders[first + i] - remainder);
        decays[i] = exp_of_nonpositive(exponent > 0.0f ? 0.0f : exponent);
    }
    __mmask16 seeing = lanes_before(length - first) & ~lanes_before(k - first);
    if (documents)
        for (int64_t i = 0; i < LANES; ++i)
            if (first + i >= length || documents[first + i] != documents[k]) seeing &= ~(1u << i);
    return _mm512_maskz_load_ps(seeing, decays);
}

inline void add_to(float* sums, __m512 lanes) { _mm512_storeu_ps(sums, _mm512_add_ps(_mm512_loadu_ps(sums), lanes)); }

struct GradientMemory {
    bfloat16 *B, *dy, *dt_x, *weighted_x, *weighted_dy;               // (q, n), then (q, r p)
    uint32_t *B_packed, *C_packed, *C_T_packed;                       // (padded q / 2, n) twice, (n / 2, padded q)
    uint32_t *dy_packed, *dy_T_packed;                                // (padded q / 2, r p), (r p / 2, padded q)
    uint32_t *leaving_packed, *leaving_T_packed, *entering_T_packed;  // (n / 2, r p), (r p / 2, n) twice
    float *sums, *remainders, *grad_log_decay, *grad_dt_through_x;    // (r, padded q)
    double *grad_log_end, *grad_D;                                    // (r)
    // For BLOCK_ROWS keys or queries.
    float *scores, *grad_weights, *grad_scores_of_keys, *grad_map;  // (4, padded q) three times, (4, n)
    bfloat16* weights;                                              // (r, 4, padded q)
    // Gradients of the scores, summed over the heads of the group.
    bfloat16* grad_scores;                         // (padded k, padded q)
    uint32_t *grad_scores_packed, *grad_scores_T;  // (padded k / 2, padded q); (padded q, padded k) by rows

    GradientMemory(Arena& arena, const Sizes& s) {
        for (bfloat16** rows : {&B}) *rows = arena.take<bfloat16>(s.Q * s.N);
        for (bfloat16** rows : {&dy, &dt_x, &weighted_x, &weighted_dy}) *rows = arena.take<bfloat16>(s.Q * s.RP);
        for (uint32_t** packed : {&B_packed, &C_packed, &C_T_packed})
            *packed = arena.take<uint32_t>(s.padded_Q / 2 * s.N);
        for (uint32_t** packed : {&dy_packed, &dy_T_packed}) *packed = arena.take<uint32_t>(s.padded_Q / 2 * s.RP);
        for (uint32_t** packed : {&leaving_packed, &leaving_T_packed, &entering_T_packed})
            *packed = arena.take<uint32_t>(s.N / 2 * s.RP);
        for (float** numbers : {&sums, &remainders, &grad_log_decay, &grad_dt_through_x})
            *numbers = arena.take<float>(s.R * s.padded_Q);
        for (double** numbers : {&grad_log_end, &grad_D}) *numbers = arena.take<double>(s.R);
        for (float** numbers : {&scores, &grad_weights, &grad_scores_of_keys})
            *numbers = arena.take<float>(BLOCK_ROWS * s.padded_Q);
        grad_map = arena.take<float>(BLOCK_ROWS * s.N);
        weights = arena.take<bfloat16>(s.R * BLOCK_ROWS * s.padded_Q);
        grad_scores = arena.take<bfloat16>(s.padded_Q * s.padded_Q);
        for (uint32_t** packed : {&grad_scores_packed, &grad_scores_T})
            *packed = arena.take<uint32_t>(s.padded_Q / 2 * s.padded_Q);
    }
};

// Where the gradients of the inputs go.
struct Gradients {
    bfloat16* x;
    float* dt;
    bfloat16 *B, *C;
    double *A, *D;  // one sum for each task and head
};

// The backward pass of one chunk and group, given the state that enters it and the gradient of the state that leaves
// it.
class ChunkGradient {
public:
    ChunkGradient(
        const Task& given, const GradientMemory& memory, const bfloat16* all_entering, const bfloat16* all_leaving,
        const Gradients& gradients
    )
        : task(given),
          block(given.block),
          m(memory),
          to(gradients),
          Q(task.Q),
          N(task.N),
          R(task.R),
          P(task.P),
          RP(task.RP),
          padded_Q(task.padded_Q),
          C(static_cast<const bfloat16*>(block.rotated_C) + task.at.task * Q * N),
          entering(all_entering + task.at.task * N * RP),
          leaving(all_leaving + task.at.task * N * RP),
          documents(task.documents()) {}

    void compute() {
        load_operands();
        load_decays_and_clear_sums();
        by_rows(0, Q, [&](auto rows, int64_t k) {
            constexpr int ROWS = decltype(rows)::value;
            differentiate_weights<ROWS>(k);
            for (int64_t r = 0; r < R; ++r) differentiate_x<ROWS>(k, r);
            differentiate_B<ROWS>(k);
        });
        transpose_score_gradients();
        by_rows(0, Q, [&](auto rows, int64_t q) { differentiate_C<decltype(rows)::value>(q); });
        for (int64_t r = 0; r < R; ++r) differentiate_decays(r);
    }

private:
    const Task& task;
    const Block& block;
    const GradientMemory& m;
    const Gradients& to;
    const int64_t Q, N, R, P, RP, padded_Q;
    const bfloat16 *C, *entering, *leaving;
    const int64_t* documents;

    // The first query, rounded down to whole register blocks, that sees the keys from k on.
    static int64_t first_query(int64_t k) { return k / COLUMNS * COLUMNS; }

    void load_operands() {
        task.load_rotated(block.B, block.B_row, block.B_token, m.B);
        for (int64_t q = 0; q < Q; ++q)
            std::memcpy(static_cast<void*>(m.dy + q * RP), task.grad_y(q), RP * sizeof *m.dy);
        task.load_dt_x(m.dt_x);
        task.load_weighted_x(m.weighted_x);
        task.load_weighted_dy(m.weighted_dy);
        vnni_pack(m.B, N, Q, padded_Q, N, m.B_packed);
        vnni_pack(C, N, Q, padded_Q, N, m.C_packed);
        vnni_pack(m.dy, RP, Q, padded_Q, RP, m.dy_packed);
        vnni_pack(leaving, RP, N, N, RP, m.leaving_packed);
        transpose_pairs(C, N, Q, padded_Q, N / 2, m.C_T_packed);
        transpose_pairs(m.dy, RP, Q, padded_Q, RP / 2, m.dy_T_packed);
        transpose_pairs(leaving, RP, N, N, RP / 2, m.leaving_T_packed);
        transpose_pairs(entering, RP, N, N, RP / 2, m.entering_T_packed);
    }

    void load_decays_and_clear_sums() {
        for (float* numbers : {m.sums, m.remainders, m.grad_log_decay}) std::fill_n(numbers, R * padded_Q, 0.0f);
        for (int64_t r = 0; r < R; ++r) {
            std::copy_n(block.sums + task.positions(r), Q, m.sums + r * padded_Q);
            std::copy_n(block.remainders + task.positions(r), Q, m.remainders + r * padded_Q);
        }
        std::fill_n(m.grad_log_end, R, 0.0);
        std::fill_n(m.grad_D, R, 0.0);
        std::memset(static_cast<void*>(m.grad_scores), 0, padded_Q * padded_Q * sizeof *m.grad_scores);
    }

    // For ROWS keys from k on and all queries that see them: the weights L_qk (C_q · B_k) of each head, the gradients
    // of the scores, summed over the heads, and those of the log decays.
    template <int ROWS>
    void differentiate_weights(int64_t k) {
        const int64_t begin = first_query(k);
        by_columns(begin, padded_Q, [&](auto vectors, int64_t q) {
            RegisterBlock<ROWS, decltype(vectors)::value> sums;
            sums.clear();
            sums.add_product(m.B + k * N, N, m.C_T_packed + q, padded_Q, N / 2);
            sums.save(m.scores + q, padded_Q);
        });
        std::fill_n(m.grad_scores_of_keys, BLOCK_ROWS * padded_Q, 0.0f);
        for (int64_t r = 0; r < R; ++r) {
            by_columns(begin, padded_Q, [&](auto vectors, int64_t q) {
                RegisterBlock<ROWS, decltype(vectors)::value> sums;
                sums.clear();
                sums.add_product(
                    m.dt_x + k * RP + r * P, RP, m.dy_T_packed + r * P / 2 * padded_Q + q, padded_Q, P / 2
                );
                sums.save(m.grad_weights + q, padded_Q);
            });
            for (int i = 0; i < ROWS; ++i) differentiate_weights_of_key(k, i, r, begin);
        }
        for (int i = 0; i < ROWS; ++i)
            for (int64_t q = begin; q < padded_Q; q += LANES)
                store_lanes(
                    m.grad_scores + (k + i) * padded_Q + q, _mm512_loadu_ps(m.grad_scores_of_keys + i * padded_Q + q)
                );
    }

    inline void differentiate_weights_of_key(int64_t k, int i, int64_t r, int64_t begin) {
        __m512 grad_of_key = _mm512_setzero_ps();
        for (int64_t q = begin; q < padded_Q; q += LANES) {
            const int64_t place = i * padded_Q + q;
            const __m512 decay =
                decays_from(m.sums + r * padded_Q, m.remainders + r * padded_Q, documents, k + i, q, Q);
            const __m512 score = _mm512_loadu_ps(m.scores + place);
            const __m512 grad_score = _mm512_mul_ps(_mm512_loadu_ps(m.grad_weights + place), decay);
            const __m512 grad_log_decay = _mm512_mul_ps(grad_score, score);
            store_lanes(m.weights + r * BLOCK_ROWS * padded_Q + place, _mm512_mul_ps(score, decay));
            add_to(m.grad_scores_of_keys + place, grad_score);
            add_to(m.grad_log_decay + r * padded_Q + q, grad_log_decay);
            grad_of_key = _mm512_add_ps(grad_of_key, grad_log_decay);
        }
        m.grad_log_decay[r * padded_Q + k + i] -= _mm512_reduce_add_ps(grad_of_key);
    }

    // The gradients of x, dt (through dt x) and D of a head at ROWS keys from k on: through the state that leaves, then
    // inside the chunk.
    template <int ROWS>
    void differentiate_x(int64_t k, int64_t r) {
        const int64_t begin = first_query(k);
        const __m512 skip = _mm512_set1_ps(task.skip(r));
        float grad_end[ROWS] = {}, grad_dt[ROWS] = {}, grad_D[ROWS] = {};
        by_columns(r * P, (r + 1) * P, [&](auto vectors, int64_t column) {
            constexpr int V = decltype(vectors)::value;
            RegisterBlock<ROWS, V> sums;
            sums.clear();
            sums.add_product(m.B + k * N, N, m.leaving_packed + column, RP, N / 2);
            for (int i = 0; i < ROWS; ++i) {
                sums.scale(i, block.to_end[task.positions(r) + k + i]);
                __m512 dot = _mm512_setzero_ps();
                for (int v = 0; v < V; ++v)
                    dot = _mm512_fmadd_ps(sums.at[i][v], load_lanes(m.dt_x + (k + i) * RP + column + LANES * v), dot);
                grad_end[i] += _mm512_reduce_add_ps(dot);
            }
            sums.add_product(
                m.weights + r * BLOCK_ROWS * padded_Q + begin, padded_Q, m.dy_packed + begin / 2 * RP + column, RP,
                (padded_Q - begin) / 2
            );
            for (int i = 0; i < ROWS; ++i) {
                const __m512 dt = _mm512_set1_ps(task.dt(k + i, r));
                __m512 x_dot = _mm512_setzero_ps(), skip_dot = _mm512_setzero_ps();
                for (int v = 0; v < V; ++v) {
                    const __m512 x = load_lanes(task.x(k + i) + column + LANES * v);
                    const __m512 dy = load_lanes(m.dy + (k + i) * RP + column + LANES * v);
                    x_dot = _mm512_fmadd_ps(x, sums.at[i][v], x_dot);
                    skip_dot = _mm512_fmadd_ps(x, dy, skip_dot);
                    sums.at[i][v] = _mm512_fmadd_ps(skip, dy, _mm512_mul_ps(sums.at[i][v], dt));
                }
                grad_dt[i] += _mm512_reduce_add_ps(x_dot);
                grad_D[i] += _mm512_reduce_add_ps(skip_dot);
            }
            sums.save(to.x + task.token_and_head(k, 0) * P + column, block.heads * P);
        });
        for (int i = 0; i < ROWS; ++i) {
            m.grad_dt_through_x[r * padded_Q + k + i] = grad_dt[i];
            m.grad_log_decay[r * padded_Q + k + i] -= grad_end[i];
            m.grad_log_end[r] += grad_end[i];
            m.grad_D[r] += grad_D[i];
        }
    }

    // The gradient of B at ROWS keys from k on: through the state that leaves, and through the scores.
    template <int ROWS>
    void differentiate_B(int64_t k) {
        const int64_t begin = first_query(k);
        by_columns(0, N, [&](auto vectors, int64_t n) {
            RegisterBlock<ROWS, decltype(vectors)::value> sums;
            sums.clear();
            sums.add_product(m.weighted_x + k * RP, RP, m.leaving_T_packed + n, N, RP / 2);
            sums.add_product(
                m.grad_scores + k * padded_Q + begin, padded_Q, m.C_packed + begin / 2 * N + n, N,
                (padded_Q - begin) / 2
            );
            sums.save(m.grad_map + n, N);
        });
        for (int i = 0; i < ROWS; ++i) task.store_unrotated(m.grad_map + i * N, k + i, to.B);
    }

    void transpose_score_gradients() {
        vnni_pack(m.grad_scores, padded_Q, padded_Q, padded_Q, padded_Q, m.grad_scores_packed);
        transpose_pairs(
            as_numbers(m.grad_scores_packed), 2 * padded_Q, padded_Q / 2, padded_Q / 2, padded_Q, m.grad_scores_T
        );
    }

    // The gradient of C at ROWS queries from q on, through the scores and through the state that enters, and that of
    // the decays from it.
    template <int ROWS>
    void differentiate_C(int64_t q) {
        by_columns(0, N, [&](auto vectors, int64_t n) {
            constexpr int V = decltype(vectors)::value;
            RegisterBlock<ROWS, V> all;
            all.clear();
            all.add_product(
                as_numbers(m.grad_scores_T) + q * padded_Q, padded_Q, m.B_packed + n, N, (q + ROWS + 1) / 2
            );
            all.save(m.grad_map + n, N);
            for (int64_t r = 0; r < R; ++r) {
                RegisterBlock<ROWS, V> sums;
                sums.clear();
                sums.add_product(m.weighted_dy + q * RP + r * P, RP, m.entering_T_packed + r * P / 2 * N + n, N, P / 2);
                for (int i = 0; i < ROWS; ++i) {
                    __m512 dot = _mm512_setzero_ps();
                    for (int v = 0; v < V; ++v) {
                        dot = _mm512_fmadd_ps(sums.at[i][v], load_lanes(C + (q + i) * N + n + LANES * v), dot);
                        sums.at[i][v] =
                            _mm512_add_ps(sums.at[i][v], _mm512_loadu_ps(m.grad_map + i * N + n + LANES * v));
                    }
                    m.grad_log_decay[r * padded_Q + q + i] += _mm512_reduce_add_ps(dot);
                }
                sums.save(m.grad_map + n, N);
            }
        });
        for (int i = 0; i < ROWS; ++i) task.store_unrotated(m.grad_map + i * N, q + i, to.C);
    }

    // The gradients of dt, A and D of a head. The cumulative log decay at q sums dt_k A over k ≤ q.
    void differentiate_decays(int64_t r) {
        const int64_t head = task.at.task * R + r;
        double grad_sum = m.grad_log_end[r] + block.grad_log_across[head], grad_A = 0.0;
        for (int64_t q = Q - 1; q >= 0; --q) {
            grad_sum += m.grad_log_decay[r * padded_Q + q];
            grad_A += grad_sum * task.dt(q, r);
            to.dt[task.token_and_head(q, r)] =
                static_cast<float>(m.grad_dt_through_x[r * padded_Q + q] + block.A[task.at.first_head + r] * grad_sum);
        }
        to.A[head] += grad_A;
        to.D[head] += m.grad_D[r];
    }
};

// All gradients, given the states that enter the chunks and the gradients of those that leave them, (a, g, n, r p).
void chunk_gradients(
    const Block& block, const bfloat16* entering, const bfloat16* leaving, bfloat16* grad_x, float* grad_dt,
    bfloat16* grad_B, bfloat16* grad_C, double* grad_A, double* grad_D
) {
    const Gradients to{grad_x, grad_dt, grad_B, grad_C, grad_A, grad_D};
    for_each_task<GradientMemory>(block, [&](const Task& task, const GradientMemory& memory) {
        ChunkGradient(task, memory, entering, leaving, to).compute();
    });
}

// The bytes of a thread's arena: enough for each of the kernels.
int64_t arena_bytes(int64_t chunk_length, int64_t state_size, int64_t heads_per_group, int64_t head_dim) {
    const Sizes sizes{chunk_length, state_size, heads_per_group, head_dim};
    Arena states, outputs, gradients;
    StateMemory(states, sizes);
    OutputMemory(outputs, sizes);
    GradientMemory(gradients, sizes);
    return std::max({states.taken(), outputs.taken(), gradients.taken()});
}

}  // namespace

#endif

void describe_scan_bf16(std::string& to) {
    describe_function(to, "has_bf16_gemm", "any", has_bf16_gemm);
#if TRANSXSSM_BF16_GEMM
    describe_function(to, "arena_bytes", "any", arena_bytes);
    describe_function(to, "chunk_states", "bfloat16", chunk_states);
    describe_function(to, "chunk_state_gradients", "bfloat16", chunk_state_gradients);
    describe_function(to, "chunk_outputs", "bfloat16", chunk_outputs);
    describe_function(to, "chunk_gradients", "bfloat16", chunk_gradients);
#endif
}
