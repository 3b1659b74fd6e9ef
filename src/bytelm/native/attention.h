// Attention of new positions over ring buffers: position p of a row is in slot p mod `slots`.
//
//     keys      [row][head][slots / L][head_dim][L]     L adjacent positions per vector: no sums across lanes
//     values    [row][head][slots][head_dim, padded to L]
//
// L: lanes. Both are matrices as in matrix.h: some queries of a head that follow each other are multiplied together, and
// every sum is one chain, over the numbers of a head or over the positions that a query sees, as for a query alone.

#pragma once
#include <algorithm>
#include <cmath>

#include "functions.h"
#include "matrix.h"

namespace bytelm {

// e^x of the differences to the largest of numbers first..last, in place, and their sum; 0 of what else is in their
// vectors, the first of which begins at a multiple of their size.
template <class A> inline A exponentials(A* weights, int64_t first, int64_t last) {
    constexpr int L = LANES<A>;
    const int64_t begin = first / L * L, end = last / L * L;
    for (int64_t p = begin; p < first; p++) weights[p] = -INFINITY;
    for (int64_t p = last + 1; p < end + L; p++) weights[p] = -INFINITY;
    vec<A> top = load(weights + begin);
    for (int64_t p = begin + L; p <= end; p += L) top = larger(top, load(weights + p));
    const A peak = highest<A>(top);
    vec<A> total = {};
    for (int64_t p = begin; p <= end; p += L) {
        const vec<A> x = load(weights + p);
        const vec<A> weight = select(x == A(-INFINITY), vec<A>{}, exponential(x - peak));
        store(weights + p, weight);
        total += weight;
    }
    return sum<A>(total);
}

// Attention of one query of one head over a few keys and values, `stride` apart.
template <class A>
inline void mix_few(const A* query, const A* keys, const A* values, int64_t stride, int64_t count, int64_t size, A* out) {
    constexpr int L = LANES<A>;
    const A scale = 1 / A(std::sqrt(double(size)));
    A* weights = scratch<A>(0, count + L);
    for (int64_t k = 0; k < count; k++) weights[k] = dot(query, keys + k * stride, size) * scale;
    const A total = exponentials(weights, 0, count - 1);
    for (int64_t k = 0; k < count; k++) weights[k] /= total;
    for (int64_t i = 0; i < size; i += L) {
        vec<A> found = {};
        for (int64_t k = 0; k < count; k++)
            found = fma(load_some(values + k * stride + i, size - i), all<A>(weights[k]), found);
        store_some(out + i, found, size - i);
    }
}

// New positions, grouped by row, in order.
struct Tokens {
    int64_t count;
    const int64_t *row, *position, *start, *patch;  // start: the first visible position; patch: the one read
    const uint8_t* wanted;                          // whose outputs are wanted, of a stack; or null for all
};

struct Heads {
    static constexpr int64_t STEP = 64;
    int64_t heads, head_dim, slots, window;  // window 0: all
    const double* frequencies;               // head_dim / 2
    const double* angles;                    // [STEP][cosines, sines of head_dim / 2]: of positions below STEP
};

template <class A, class C> struct Attention {
    static constexpr int L = LANES<A>;
    static constexpr int QUERIES = 48, PIECE = 128;  // positions that are multiplied at a time: keys and values of 64 KiB
    const Heads& shape;
    const int64_t padded, blocks;

    explicit Attention(const Heads& heads)
        : shape(heads), padded((heads.head_dim + L - 1) / L * L), blocks(heads.slots / L) {}

    // Cosines, then sines, of the angles of some positions, [head_dim] each: e^(i (p + q)) = e^(i p) e^(i q), where p is
    // a multiple of STEP, so that a position's do not depend on those computed with it.
    void angles(const int64_t* position, int64_t count, A* out) const {
        const int64_t half = shape.head_dim / 2;
        double* far = scratch<double>(6, 2 * half);
        int64_t before = -1;
        for (int64_t t = 0; t < count; t++, out += 2 * half) {
            const int64_t multiple = position[t] / Heads::STEP;
            if (multiple != before)
                for (int64_t i = 0; i < half; i++) {
                    const Angle turned(double(multiple * Heads::STEP) * shape.frequencies[i]);
                    far[i] = turned.cosine, far[half + i] = turned.sine;
                }
            before = multiple;
            const double* near = shape.angles + position[t] % Heads::STEP * 2 * half;
            for (int64_t i = 0; i < half; i++) {
                out[i] = A(far[i] * near[i] - far[half + i] * near[half + i]);
                out[half + i] = A(far[half + i] * near[i] + far[i] * near[half + i]);
            }
        }
    }

    // Rotate pairs (x[2i], x[2i + 1]) by the position's angles.
    void rotate(const A* x, const A* angles, A factor, A* out) const {
        const int64_t half = shape.head_dim / 2;
        for (int64_t i = 0; i < half; i++) {
            const A first = x[2 * i], second = x[2 * i + 1];
            out[2 * i] = (first * angles[i] - second * angles[half + i]) * factor;
            out[2 * i + 1] = (first * angles[half + i] + second * angles[i]) * factor;
        }
    }

    C* key_block(C* keys, int64_t row, int64_t head, int64_t block) const {
        return keys + ((row * shape.heads + head) * blocks + block % blocks) * shape.head_dim * L;
    }
    C* value(C* values, int64_t row, int64_t head, int64_t position) const {
        return values + ((row * shape.heads + head) * shape.slots + position % shape.slots) * padded;
    }

    void keep(C* keys, C* values, int64_t row, int64_t head, int64_t position, const A* key, const A* val) const {
        C* block = key_block(keys, row, head, position / L) + position % L;
        C* line = value(values, row, head, position);
        for (int64_t i = 0; i < shape.head_dim; i++) {
            narrow(block + i * L, key[i]);
            narrow(line + i, val[i]);
        }
    }

    // Attention of n <= QUERIES queries of one head, at positions last, last + 1, ..., over positions since[q] to their own.
    // Queries and results are `stride` and `out_stride` apart. Keys and values are read in pieces that stay in a cache
    // while all queries are multiplied with them.
    void mix(
        const A* query, int64_t stride, C* keys, C* values, int64_t row, int64_t head, const int64_t* since, int64_t last,
        int64_t n, A* out, int64_t out_stride
    ) const {
        const int64_t from = *std::min_element(since, since + n) / L, count = (last + n - 1) / L - from + 1;
        for (int64_t i = 0; i < AHEAD; i += 64)  // what is streamed next
            __builtin_prefetch((const char*)value(values, row, head, from * L) + i, 0, 0);
        A* weights = scratch<A>(0, n * count * L);
        for (int64_t block = 0, next; block < count; block = next) {
            next = std::min({count, block + PIECE / L, block + blocks - (from + block) % blocks});  // before the ring ends
            const C* at = key_block(keys, row, head, from + block);
            together(n, [&](auto some, int64_t q) {
                scores<decltype(some)::value>(query + q * stride, stride, at, next - block, weights + (q * count + block) * L, count);
            });
        }
        A factor[QUERIES];
        for (int64_t q = 0; q < n; q++) factor[q] = 1 / exponentials(weights + (q * count - from) * L, since[q], last + q);
        average(weights - from * L, count * L, values, row, head, since, last, n, factor, out, out_stride);
    }

    // Calls each(number, first) for some queries at a time.
    template <class Each> static void together(int64_t n, Each each) {
        int64_t q = 0;
        for (; q + MOST <= n; q += MOST) each(std::integral_constant<int, MOST>(), q);
        if (MOST > 2)
            for (; q + 2 <= n; q += 2) each(std::integral_constant<int, 2>(), q);
        for (; q < n; q++) each(std::integral_constant<int, 1>(), q);
    }

    // Of Q queries with adjacent blocks of keys; `out` [Q][count][L].
    template <int Q>
    void scores(const A* query, int64_t stride, const C* at, int64_t number, A* out, int64_t count) const {
        const int64_t size = shape.head_dim;
        auto some = [&](auto vectors, int64_t block) {
            constexpr int V = decltype(vectors)::value;
            vec<A> total[Q][V] = {};
            tile<Q, V, 1, Q == 1 ? NEAR : NOTHING>(
                at + block * size * L, L, size * L, query, stride, size, total, V * size * L * int64_t(sizeof(C)));
#pragma GCC unroll 8
            for (int q = 0; q < Q; q++)
#pragma GCC unroll 8
                for (int v = 0; v < V; v++) store(out + (q * count + block + v) * L, total[q][v]);
        };
        constexpr int MANY = across_of(Q);
        int64_t block = 0;
        for (; block + MANY <= number; block += MANY) some(std::integral_constant<int, MANY>(), block);
        for (; block < number; block++) some(std::integral_constant<int, 1>(), block);
    }

    // Sums of weighted values. Of queries that are multiplied together, those of positions that not all of them see are
    // added for each alone: before the common ones, or after them.
    void average(
        const A* weights, int64_t wide, C* values, int64_t row, int64_t head, const int64_t* since, int64_t last, int64_t n,
        const A* factor, A* out, int64_t out_stride
    ) const {
        A* sums = scratch<A>(7, n * padded);
        std::fill(sums, sums + n * padded, A(0));
        auto alone = [&](int64_t q, int64_t first, int64_t end) {
            add<1>(weights + q * wide, wide, values, row, head, first, end, sums + q * padded);
        };
        auto common = [&](int some, int64_t q) {  // the first position that all of some queries see, or one too many
            return std::min(*std::max_element(since + q, since + q + some), last + q + 1);
        };
        together(n, [&](auto some, int64_t q) {
            for (int64_t i = q; i < q + some && some > 1; i++) alone(i, since[i], std::min(common(some, q), last + i + 1));
        });
        for (int64_t first = common(1, std::min_element(since, since + n) - since), next; first < last + n; first = next) {
            next = std::min(last + n, (first + PIECE) / PIECE * PIECE);
            together(n, [&](auto some, int64_t q) {
                add<decltype(some)::value>(
                    weights + q * wide, wide, values, row, head, std::max(first, common(some, q)),
                    std::min(next, last + q + 1), sums + q * padded);
            });
        }
        together(n, [&](auto some, int64_t q) {
            for (int64_t i = q + 1; i < q + some; i++) alone(i, std::max(last + q + 1, since[i]), last + i + 1);
        });
        for (int64_t q = 0; q < n; q++)
            for (int64_t i = 0; i < shape.head_dim; i++) out[q * out_stride + i] = sums[q * padded + i] * factor[q];
    }

    // Add weighted values of positions [first, end) for Q queries to `sums` [Q][padded].
    template <int Q>
    void add(
        const A* weights, int64_t wide, C* values, int64_t row, int64_t head, int64_t first, int64_t end, A* sums
    ) const {
        for (int64_t next; first < end; first = next) {
            next = std::min(end, first + shape.slots - first % shape.slots);  // before the ring ends
            const C* line = value(values, row, head, first);
            auto some = [&](auto number, int64_t i) {
                constexpr int V = decltype(number)::value;
                vec<A> total[Q][V];
#pragma GCC unroll 8
                for (int q = 0; q < Q; q++)
#pragma GCC unroll 8
                    for (int v = 0; v < V; v++) total[q][v] = load(sums + q * padded + i + v * L);
                tile<Q, V, V, Q == 1 ? NEAR : NOTHING>(line + i, padded, 0, weights + first, wide, next - first, total);
#pragma GCC unroll 8
                for (int q = 0; q < Q; q++)
#pragma GCC unroll 8
                    for (int v = 0; v < V; v++) store(sums + q * padded + i + v * L, total[q][v]);
            };
            constexpr int MANY = across_of(Q);
            int64_t i = 0;
            for (; i + MANY * L <= padded; i += MANY * L) some(std::integral_constant<int, MANY>(), i);
            for (; i < padded; i += L) some(std::integral_constant<int, 1>(), i);
        }
    }
};

}  // namespace bytelm
