// The scan's passes with its matrix products inside, for processors that tiles.h is for: what lies between the products of a chunk
// stays in the processor's second cache. The states are carried from chunk to chunk in scan.cpp.
//
// Heads and states are multiples of 32 wide. Every function has a task for each chunk and group, and a task's result does not depend
// on the number of threads. Letters as in scan.h; "pairs" and "columns" are right matrices, whose rows or columns are what the name says.

#include "scan.h"
#include "tiles.h"

extern "C" {

int omp_get_thread_num(void);  // of any OpenMP; its header need not be here

int64_t tiles_are_here() { return TRANSXSSM_TILES; }

}  // extern "C"

#if TRANSXSSM_TILES

namespace {

inline int64_t padded(int64_t length) { return (length + 31) / 32 * 32; }

// Memory of a thread, out of which a task takes its matrices, on borders of lines of the cache: as much as `arena_bytes` of
// ops/ssd/fused.py says.
class Arena {
public:
    explicit Arena(char* memory) : next_(memory) {}

    template <class T>
    T* take(int64_t count) {
        T* taken = reinterpret_cast<T*>(next_);
        next_ += (count * static_cast<int64_t>(sizeof(T)) + 63) / 64 * 64;
        return taken;
    }

private:
    char* next_;
};

// A chunk's sizes, and its rows of the inputs.
struct Task {
    const Block& block;
    const Place at;
    const int64_t Q, N, P, R, RP, padded_Q;

    Task(const Block& given, int64_t task)
        : block(given), at(place_of(given, task)), Q(given.chunk_length), N(given.state_size), P(given.head_dim),
          R(at.heads_of_group), RP(R * P), padded_Q(padded(Q)) {}

    // All heads of the group at a token: they lie side by side.
    const bfloat16* x(int64_t q) const {
        return static_cast<const bfloat16*>(block.x) + at.row * block.x_row + (at.first_token + q) * block.x_token + at.first_head * P;
    }
    const bfloat16* grad_y(int64_t q) const {
        return static_cast<const bfloat16*>(block.grad_y) + at.row * block.grad_y_row + (at.first_token + q) * block.grad_y_token + at.first_head * P;
    }
    int64_t token_and_head(int64_t q, int64_t r) const {
        return (at.row * block.length + at.first_token + q) * block.heads + at.first_head + r;
    }
    float dt(int64_t q, int64_t r) const { return block.dt[token_and_head(q, r)]; }
    float skip(int64_t r) const { return block.D ? block.D[at.first_head + r] : 0.0f; }
    // Where a number that each head of the group has at each position begins.
    int64_t number(int64_t r) const { return (at.task * R + r) * Q; }
    const int64_t* documents() const { return block.seq_idx ? block.seq_idx + at.row * block.length + at.first_token : nullptr; }

    const float* angles(const float* table, int64_t q) const {
        return table + ((block.rotary_rows == 1 ? 0 : at.row) * block.length + at.first_token + q) * (N / 2);
    }
    // B or C of the chunk, turned by the angles of their positions.
    void load_maps(const void* source, int64_t row, int64_t token, bfloat16* to) const {
        for (int64_t q = 0; q < Q; ++q) {
            const bfloat16* from = static_cast<const bfloat16*>(source) + at.row * row + (at.first_token + q) * token + at.group * N;
            if (!block.cos) {
                std::memcpy(static_cast<void*>(to + q * N), from, N * sizeof *to);
                continue;
            }
            const float *cos = angles(block.cos, q), *sin = angles(block.sin, q);
            for (int64_t i = 0; i < N / 2; i += 16) {
                const __m512 first = load_lanes(from + i), second = load_lanes(from + N / 2 + i);
                const __m512 c = _mm512_loadu_ps(cos + i), s = _mm512_loadu_ps(sin + i);
                store_lanes(to + q * N + i, _mm512_fnmadd_ps(second, s, _mm512_mul_ps(first, c)));
                store_lanes(to + q * N + N / 2 + i, _mm512_fmadd_ps(first, s, _mm512_mul_ps(second, c)));
            }
        }
    }
    // A gradient of one of them at a position, turned back.
    void store_map(const float* from, int64_t q, void* gradients) const {
        bfloat16* to = static_cast<bfloat16*>(gradients) + ((at.row * block.length + at.first_token + q) * block.groups + at.group) * N;
        const float *cos = block.cos ? angles(block.cos, q) : nullptr, *sin = block.cos ? angles(block.sin, q) : nullptr;
        for (int64_t i = 0; i < N / 2; i += 16) {
            const __m512 first = _mm512_loadu_ps(from + i), second = _mm512_loadu_ps(from + N / 2 + i);
            const __m512 c = cos ? _mm512_loadu_ps(cos + i) : _mm512_set1_ps(1.0f), s = cos ? _mm512_loadu_ps(sin + i) : _mm512_setzero_ps();
            store_lanes(to + i, _mm512_fmadd_ps(second, s, _mm512_mul_ps(first, c)));
            store_lanes(to + N / 2 + i, _mm512_fnmadd_ps(first, s, _mm512_mul_ps(second, c)));
        }
    }
    // Rows times a factor for each head and position: (q, r p).
    template <class Row, class Factor>
    void weigh_rows(Row&& row, Factor&& factor, bfloat16* to) const {
        for (int64_t q = 0; q < Q; ++q)
            for (int64_t r = 0; r < R; ++r) {
                const __m512 by = _mm512_set1_ps(factor(q, r));
                for (int64_t i = r * P; i < (r + 1) * P; i += 32)
                    store_lanes(to + q * RP + i, _mm512_mul_ps(load_lanes(row(q) + i), by), _mm512_mul_ps(load_lanes(row(q) + i + 16), by));
            }
    }
};

template <class Work>
void for_each_task(const Block& block, Work&& work) {
#pragma omp parallel for num_threads(block.threads)
    for (int64_t task = 0; task < num_tasks(block); ++task) {
        Arena arena(block.arenas + omp_get_thread_num() * block.arena_bytes);
        work(Task(block, task), arena);
    }
}

// What a chunk adds to the state, Σ_k to_end_k dt_k B_k x_k^T, or from its end to the state's gradient, Σ_q from_start_q C_q dy_q^T:
// (a, g, n, r p). Leaves the decays, and the rotated B or C, for what follows.
template <bool BACKWARDS>
void update_states(const Block& block, void* updates) {
    for_each_task(block, [&](const Task& task, Arena& arena) {
        const int64_t Q = task.Q, N = task.N, RP = task.RP, padded_Q = task.padded_Q;
        bfloat16* maps = static_cast<bfloat16*>(BACKWARDS ? block.rotated_C : block.rotated_B) + task.at.task * Q * N;
        if (BACKWARDS)
            task.load_maps(block.C, block.C_row, block.C_token, maps);
        else
            task.load_maps(block.B, block.B_row, block.B_token, maps);
        load_decays(block, task.at);
        bfloat16* weighted = arena.take<bfloat16>(Q * RP);
        if (BACKWARDS)
            task.weigh_rows(
                [&](int64_t q) { return task.grad_y(q); }, [&](int64_t q, int64_t r) { return block.from_start[task.number(r) + q]; }, weighted
            );
        else
            task.weigh_rows(
                [&](int64_t q) { return task.x(q); },
                [&](int64_t q, int64_t r) { return task.dt(q, r) * block.to_end[task.number(r) + q]; }, weighted
            );
        uint32_t *pairs = arena.take<uint32_t>(padded_Q / 2 * RP), *map_pairs = arena.take<uint32_t>(padded_Q / 2 * N),
                 *turned = arena.take<uint32_t>(N * padded_Q / 2);
        pair_rows(weighted, RP, Q, padded_Q, RP, pairs);
        pair_rows(maps, N, Q, padded_Q, N, map_pairs);
        transpose(as_rows(map_pairs), 2 * N, padded_Q / 2, padded_Q / 2, N, turned);
        bfloat16* to = static_cast<bfloat16*>(updates) + task.at.task * N * RP;
        by_columns(0, RP, [&](auto vectors, int64_t column) {
            by_rows(0, N, [&](auto rows, int64_t n) {
                Tile<decltype(rows)::value, decltype(vectors)::value> tile;
                tile.clear();
                tile.add(as_rows(turned) + n * padded_Q, padded_Q, pairs + column, RP, padded_Q / 2);
                tile.save(to + n * RP + column, RP);
            });
        });
    });
}

// y_q = from_start_q · S C_q + Σ_k (C_q · B_k) L_qk dt_k x_k + D x_q, S the state that enters.
void finish_outputs(const Block& block, const void* entering, void* y) {
    for_each_task(block, [&](const Task& task, Arena& arena) {
        const int64_t Q = task.Q, N = task.N, P = task.P, R = task.R, RP = task.RP, padded_Q = task.padded_Q;
        const bfloat16* B = static_cast<const bfloat16*>(block.rotated_B) + task.at.task * Q * N;
        bfloat16 *C = arena.take<bfloat16>(Q * N), *dt_x = arena.take<bfloat16>(Q * RP);
        uint32_t *B_columns = arena.take<uint32_t>(N / 2 * padded_Q), *dt_x_pairs = arena.take<uint32_t>(padded_Q / 2 * RP),
                 *state_pairs = arena.take<uint32_t>(N / 2 * RP);
        float *scores = arena.take<float>(4 * padded_Q), *decays = arena.take<float>(padded_Q);
        bfloat16* weights = arena.take<bfloat16>(4 * padded_Q);
        task.load_maps(block.C, block.C_row, block.C_token, C);
        task.weigh_rows([&](int64_t q) { return task.x(q); }, [&](int64_t q, int64_t r) { return task.dt(q, r); }, dt_x);
        transpose(B, N, Q, padded_Q, N / 2, B_columns);
        pair_rows(dt_x, RP, Q, padded_Q, RP, dt_x_pairs);
        pair_rows(static_cast<const bfloat16*>(entering) + task.at.task * N * RP, RP, N, N, RP, state_pairs);
        by_rows(0, Q, [&](auto rows, int64_t q) {
            constexpr int ROWS = decltype(rows)::value;
            by_columns(0, padded(q + ROWS), [&](auto vectors, int64_t k) {
                Tile<ROWS, decltype(vectors)::value> tile;
                tile.clear();
                tile.add(C + q * N, N, B_columns + k, padded_Q, N / 2);
                tile.save(scores + k, padded_Q);
            });
            for (int64_t r = 0; r < R; ++r) {
                for (int i = 0; i < ROWS; ++i) {
                    const int64_t end = (q + i) / LANES * LANES + LANES;
                    decays_to(block.sums + task.number(r), block.remainders + task.number(r), task.documents(), q + i, std::min(end, Q), decays);
                    for (int64_t k = Q; k < end; ++k) decays[k] = 0.0f;
                    for (int64_t k = 0; k < end; k += LANES)
                        store_lanes(
                            weights + i * padded_Q + k, _mm512_mul_ps(_mm512_loadu_ps(scores + i * padded_Q + k), _mm512_loadu_ps(decays + k))
                        );
                }
                by_columns(r * P, (r + 1) * P, [&](auto vectors, int64_t column) {
                    constexpr int V = decltype(vectors)::value;
                    Tile<ROWS, V> tile;
                    tile.clear();
                    tile.add(C + q * N, N, state_pairs + column, RP, N / 2);
                    for (int i = 0; i < ROWS; ++i) tile.scale(i, block.from_start[task.number(r) + q + i]);
                    tile.add(weights, padded_Q, dt_x_pairs + column, RP, (q + ROWS + 1) / 2);
                    if (block.D)
                        for (int i = 0; i < ROWS; ++i)
                            for (int v = 0; v < V; ++v)
                                tile.at[i][v] = _mm512_fmadd_ps(
                                    _mm512_set1_ps(task.skip(r)), load_lanes(task.x(q + i) + column + 16 * v), tile.at[i][v]
                                );
                    tile.save(static_cast<bfloat16*>(y) + task.token_and_head(q, 0) * P + column, block.heads * P);
                });
            }
        });
    });
}

// exp(l_q − l_k) at 16 positions q from `first` on, of the chunk's padded numbers; 0 before k, behind the chunk, in other documents.
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

struct Gradients {
    bfloat16* x;
    float* dt;
    void *B, *C;
    double *A, *D;  // a sum for each task and head
};

void differentiate(const Block& block, const void* all_entering, const void* all_leaving, const Gradients& to) {
    for_each_task(block, [&](const Task& task, Arena& arena) {
        const int64_t Q = task.Q, N = task.N, P = task.P, R = task.R, RP = task.RP, padded_Q = task.padded_Q;
        const bfloat16 *entering = static_cast<const bfloat16*>(all_entering) + task.at.task * N * RP,
                       *leaving = static_cast<const bfloat16*>(all_leaving) + task.at.task * N * RP,
                       *C = static_cast<const bfloat16*>(block.rotated_C) + task.at.task * Q * N;
        const int64_t* documents = task.documents();

        // The operands, as rows, then as right matrices.
        bfloat16 *B = arena.take<bfloat16>(Q * N), *dy = arena.take<bfloat16>(Q * RP), *dt_x = arena.take<bfloat16>(Q * RP),
                 *weighted_x = arena.take<bfloat16>(Q * RP), *weighted_dy = arena.take<bfloat16>(Q * RP);
        task.load_maps(block.B, block.B_row, block.B_token, B);
        for (int64_t q = 0; q < Q; ++q) std::memcpy(static_cast<void*>(dy + q * RP), task.grad_y(q), RP * sizeof *dy);
        task.weigh_rows([&](int64_t q) { return task.x(q); }, [&](int64_t q, int64_t r) { return task.dt(q, r); }, dt_x);
        task.weigh_rows(
            [&](int64_t q) { return task.x(q); },
            [&](int64_t q, int64_t r) { return task.dt(q, r) * block.to_end[task.number(r) + q]; }, weighted_x
        );
        task.weigh_rows(
            [&](int64_t q) { return task.grad_y(q); }, [&](int64_t q, int64_t r) { return block.from_start[task.number(r) + q]; },
            weighted_dy
        );
        const auto rows_to_pairs = [&](const bfloat16* rows, int64_t num_rows, int64_t padded_rows, int64_t width) {
            uint32_t* pairs = arena.take<uint32_t>(padded_rows / 2 * width);
            pair_rows(rows, width, num_rows, padded_rows, width, pairs);
            return pairs;
        };
        const auto rows_to_columns = [&](const bfloat16* rows, int64_t num_rows, int64_t padded_rows, int64_t width) {
            uint32_t* columns = arena.take<uint32_t>(width / 2 * padded_rows);
            transpose(rows, width, num_rows, padded_rows, width / 2, columns);
            return columns;
        };
        const uint32_t *B_pairs = rows_to_pairs(B, Q, padded_Q, N), *C_pairs = rows_to_pairs(C, Q, padded_Q, N),
                       *C_columns = rows_to_columns(C, Q, padded_Q, N), *dy_pairs = rows_to_pairs(dy, Q, padded_Q, RP),
                       *dy_columns = rows_to_columns(dy, Q, padded_Q, RP), *leaving_pairs = rows_to_pairs(leaving, N, N, RP),
                       *leaving_columns = rows_to_columns(leaving, N, N, RP), *entering_columns = rows_to_columns(entering, N, N, RP);

        // What each position has of its own, padded to whole vectors.
        float *sums = arena.take<float>(R * padded_Q), *remainders = arena.take<float>(R * padded_Q),
              *to_log_decay = arena.take<float>(R * padded_Q), *to_dt = arena.take<float>(R * padded_Q);
        std::fill_n(sums, R * padded_Q, 0.0f);
        std::fill_n(remainders, R * padded_Q, 0.0f);
        std::fill_n(to_log_decay, R * padded_Q, 0.0f);
        for (int64_t r = 0; r < R; ++r) {
            std::copy_n(block.sums + task.number(r), Q, sums + r * padded_Q);
            std::copy_n(block.remainders + task.number(r), Q, remainders + r * padded_Q);
        }
        double *through_end = arena.take<double>(R), *to_skip = arena.take<double>(R);
        std::fill_n(through_end, R, 0.0);
        std::fill_n(to_skip, R, 0.0);

        // Key by key, with the queries side by side: weights L_qk (C_q · B_k), and the gradients of the scores summed over the heads.
        float *scores = arena.take<float>(4 * padded_Q), *to_weights = arena.take<float>(4 * padded_Q), *sum = arena.take<float>(4 * padded_Q),
              *map = arena.take<float>(4 * N);
        bfloat16 *weights = arena.take<bfloat16>(R * 4 * padded_Q), *to_scores = arena.take<bfloat16>(padded_Q * padded_Q);
        std::memset(static_cast<void*>(to_scores), 0, padded_Q * padded_Q * sizeof *to_scores);
        by_rows(0, Q, [&](auto rows, int64_t k) {
            constexpr int ROWS = decltype(rows)::value;
            const int64_t begin = k / 32 * 32;  // no query before sees the keys
            by_columns(begin, padded_Q, [&](auto vectors, int64_t q) {
                Tile<ROWS, decltype(vectors)::value> tile;
                tile.clear();
                tile.add(B + k * N, N, C_columns + q, padded_Q, N / 2);
                tile.save(scores + q, padded_Q);
            });
            std::fill_n(sum, 4 * padded_Q, 0.0f);
            for (int64_t r = 0; r < R; ++r) {
                by_columns(begin, padded_Q, [&](auto vectors, int64_t q) {
                    Tile<ROWS, decltype(vectors)::value> tile;
                    tile.clear();
                    tile.add(dt_x + k * RP + r * P, RP, dy_columns + r * P / 2 * padded_Q + q, padded_Q, P / 2);
                    tile.save(to_weights + q, padded_Q);
                });
                for (int i = 0; i < ROWS; ++i) {
                    __m512 of_key = _mm512_setzero_ps();
                    for (int64_t q = begin; q < padded_Q; q += LANES) {
                        const int64_t place = i * padded_Q + q;
                        const __m512 decay = decays_from(sums + r * padded_Q, remainders + r * padded_Q, documents, k + i, q, Q);
                        const __m512 score = _mm512_loadu_ps(scores + place);
                        const __m512 gradient = _mm512_mul_ps(_mm512_loadu_ps(to_weights + place), decay);
                        const __m512 between = _mm512_mul_ps(gradient, score);
                        store_lanes(weights + r * 4 * padded_Q + place, _mm512_mul_ps(score, decay));
                        _mm512_storeu_ps(sum + place, _mm512_add_ps(_mm512_loadu_ps(sum + place), gradient));
                        float* of_query = to_log_decay + r * padded_Q + q;
                        _mm512_storeu_ps(of_query, _mm512_add_ps(_mm512_loadu_ps(of_query), between));
                        of_key = _mm512_add_ps(of_key, between);
                    }
                    to_log_decay[r * padded_Q + k + i] -= _mm512_reduce_add_ps(of_key);
                }
            }
            for (int i = 0; i < ROWS; ++i)
                for (int64_t q = begin; q < padded_Q; q += LANES)
                    store_lanes(to_scores + (k + i) * padded_Q + q, _mm512_loadu_ps(sum + i * padded_Q + q));

            // dt x: through the state that the chunk leaves, and inside the chunk.
            for (int64_t r = 0; r < R; ++r) {
                float at_end[ROWS] = {}, at_x[ROWS] = {}, at_skip[ROWS] = {};
                by_columns(r * P, (r + 1) * P, [&](auto vectors, int64_t column) {
                    constexpr int V = decltype(vectors)::value;
                    Tile<ROWS, V> tile;
                    tile.clear();
                    tile.add(B + k * N, N, leaving_pairs + column, RP, N / 2);
                    for (int i = 0; i < ROWS; ++i) {
                        tile.scale(i, block.to_end[task.number(r) + k + i]);
                        __m512 dot = _mm512_setzero_ps();
                        for (int v = 0; v < V; ++v)
                            dot = _mm512_fmadd_ps(tile.at[i][v], load_lanes(dt_x + (k + i) * RP + column + 16 * v), dot);
                        at_end[i] += _mm512_reduce_add_ps(dot);
                    }
                    tile.add(weights + r * 4 * padded_Q + begin, padded_Q, dy_pairs + begin / 2 * RP + column, RP, (padded_Q - begin) / 2);
                    for (int i = 0; i < ROWS; ++i) {
                        const __m512 dt = _mm512_set1_ps(task.dt(k + i, r)), skip = _mm512_set1_ps(task.skip(r));
                        __m512 dot = _mm512_setzero_ps(), skipped = _mm512_setzero_ps();
                        for (int v = 0; v < V; ++v) {
                            const __m512 x = load_lanes(task.x(k + i) + column + 16 * v), incoming = load_lanes(dy + (k + i) * RP + column + 16 * v);
                            dot = _mm512_fmadd_ps(x, tile.at[i][v], dot);
                            skipped = _mm512_fmadd_ps(x, incoming, skipped);
                            tile.at[i][v] = _mm512_fmadd_ps(skip, incoming, _mm512_mul_ps(tile.at[i][v], dt));
                        }
                        at_x[i] += _mm512_reduce_add_ps(dot);
                        at_skip[i] += _mm512_reduce_add_ps(skipped);
                    }
                    tile.save(to.x + task.token_and_head(k, 0) * P + column, block.heads * P);
                });
                for (int i = 0; i < ROWS; ++i) {
                    to_dt[r * padded_Q + k + i] = at_x[i];
                    to_log_decay[r * padded_Q + k + i] -= at_end[i];
                    through_end[r] += at_end[i];
                    to_skip[r] += at_skip[i];
                }
            }
            by_columns(0, N, [&](auto vectors, int64_t n) {
                Tile<ROWS, decltype(vectors)::value> tile;
                tile.clear();
                tile.add(weighted_x + k * RP, RP, leaving_columns + n, N, RP / 2);
                tile.add(to_scores + k * padded_Q + begin, padded_Q, C_pairs + begin / 2 * N + n, N, (padded_Q - begin) / 2);
                tile.save(map + n, N);
            });
            for (int i = 0; i < ROWS; ++i) task.store_map(map + i * N, k + i, to.B);
        });

        // Query by query: C, and the decays from the state that enters.
        const uint32_t* score_pairs = rows_to_pairs(to_scores, padded_Q, padded_Q, padded_Q);
        uint32_t* turned = arena.take<uint32_t>(padded_Q * padded_Q / 2);  // the scores' gradients, a row a query
        transpose(as_rows(score_pairs), 2 * padded_Q, padded_Q / 2, padded_Q / 2, padded_Q, turned);
        by_rows(0, Q, [&](auto rows, int64_t q) {
            constexpr int ROWS = decltype(rows)::value;
            by_columns(0, N, [&](auto vectors, int64_t n) {
                constexpr int V = decltype(vectors)::value;
                Tile<ROWS, V> all;
                all.clear();
                all.add(as_rows(turned) + q * padded_Q, padded_Q, B_pairs + n, N, (q + ROWS + 1) / 2);
                all.save(map + n, N);
                for (int64_t r = 0; r < R; ++r) {
                    Tile<ROWS, V> tile;
                    tile.clear();
                    tile.add(weighted_dy + q * RP + r * P, RP, entering_columns + r * P / 2 * N + n, N, P / 2);
                    for (int i = 0; i < ROWS; ++i) {
                        __m512 dot = _mm512_setzero_ps();
                        for (int v = 0; v < V; ++v) {
                            dot = _mm512_fmadd_ps(tile.at[i][v], load_lanes(C + (q + i) * N + n + 16 * v), dot);
                            tile.at[i][v] = _mm512_add_ps(tile.at[i][v], _mm512_loadu_ps(map + i * N + n + 16 * v));
                        }
                        to_log_decay[r * padded_Q + q + i] += _mm512_reduce_add_ps(dot);
                    }
                    tile.save(map + n, N);
                }
            });
            for (int i = 0; i < ROWS; ++i) task.store_map(map + i * N, q + i, to.C);
        });

        // The cumulative log decay at q sums dt_k A over k ≤ q.
        for (int64_t r = 0; r < R; ++r) {
            const int64_t local = task.at.task * R + r;
            double to_rate = through_end[r] + block.kept[local], rate = 0.0;
            for (int64_t q = Q - 1; q >= 0; --q) {
                to_rate += to_log_decay[r * padded_Q + q];
                rate += to_rate * task.dt(q, r);
                to.dt[task.token_and_head(q, r)] = static_cast<float>(to_dt[r * padded_Q + q] + block.A[task.at.first_head + r] * to_rate);
            }
            to.A[local] += rate;
            to.D[local] += to_skip[r];
        }
    });
}

}  // namespace

extern "C" void update_states_in_tiles_bfloat16(const Block* block, void* updates) { update_states<false>(*block, updates); }

extern "C" void update_state_gradients_in_tiles_bfloat16(const Block* block, void* updates) { update_states<true>(*block, updates); }

extern "C" void finish_outputs_in_tiles_bfloat16(const Block* block, const void* entering, void* y) { finish_outputs(*block, entering, y); }

extern "C" void differentiate_in_tiles_bfloat16(
    const Block* block, const void* entering, const void* leaving, void* grad_x, float* grad_dt, void* grad_B, void* grad_C, double* grad_A,
    double* grad_D
) {
    differentiate(*block, entering, leaving, Gradients{static_cast<bfloat16*>(grad_x), grad_dt, grad_B, grad_C, grad_A, grad_D});
}

#endif
