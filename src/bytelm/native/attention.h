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

#include "matrix.h"

namespace bytelm {

// Attention of one query of one head over a few keys and values, `stride` apart.
template <class A>
inline void mix_few(
    const A* query, const A* keys, const A* values, int64_t stride, int64_t count, int64_t size, A* weights, A* out
) {
    constexpr int L = LANES<A>;
    const A scale = 1 / A(std::sqrt(double(size)));
    A peak = -INFINITY, total = 0;
    for (int64_t k = 0; k < count; k++) {
        weights[k] = dot(query, keys + k * stride, size) * scale;
        peak = weights[k] > peak ? weights[k] : peak;
    }
    for (int64_t k = 0; k < count; k++) total += weights[k] = std::exp(weights[k] - peak);
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
};

struct Heads {
    static constexpr int64_t STEP = 64;
    int64_t heads, head_dim, slots, window;  // window 0: all
    const double* frequencies;               // head_dim / 2
    const double* angles;                    // [STEP][cosines, sines of head_dim / 2]: of positions below STEP
};

template <class A, class C> struct Attention {
    static constexpr int L = LANES<A>;
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
                    const double angle = double(multiple * Heads::STEP) * shape.frequencies[i];
                    far[i] = std::cos(angle), far[half + i] = std::sin(angle);
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

    // Attention of Q queries of one head, at positions last, last + 1, ..., over positions since[q] to their own. Queries
    // and results are `stride` and `out_stride` apart.
    template <int Q>
    void mix(
        const A* query, int64_t stride, C* keys, C* values, int64_t row, int64_t head, const int64_t* since, int64_t last,
        A* out, int64_t out_stride
    ) const {
        const int64_t from = *std::min_element(since, since + Q) / L, count = (last + Q - 1) / L - from + 1;
        A* weights = scratch<A>(0, Q * count * L);
        scores<Q>(query, stride, keys, row, head, from, count, weights);
        A factor[Q];
        for (int64_t q = 0; q < Q; q++) {
            A* own = weights + (q * count - from) * L;  // by position
            factor[q] = 1 / exponentials(own, since[q], last + q);
        }
        average<Q>(weights - from * L, count * L, values, row, head, since, last, factor, out, out_stride);
    }

    template <int Q>
    void scores(
        const A* query, int64_t stride, C* keys, int64_t row, int64_t head, int64_t from, int64_t count, A* out
    ) const {
        const int64_t size = shape.head_dim;
        auto some = [&](auto vectors, int64_t block) {
            constexpr int V = decltype(vectors)::value;
            vec<A> total[Q][V] = {};
            tile<Q, V, 1>(key_block(keys, row, head, from + block), L, size * L, query, stride, size, total);
#pragma GCC unroll 8
            for (int q = 0; q < Q; q++)
#pragma GCC unroll 8
                for (int v = 0; v < V; v++) store(out + (q * count + block + v) * L, total[q][v]);
        };
        constexpr int MANY = across_of(Q);
        for (int64_t block = 0; block < count;) {
            const int64_t left = std::min(count - block, blocks - (from + block) % blocks);  // before the ring ends
            if (left >= MANY) {
                some(std::integral_constant<int, MANY>(), block);
                block += MANY;
            } else {
                some(std::integral_constant<int, 1>(), block++);
            }
        }
    }

    // Of the scores of positions first..last, in place, and their sum.
    static A exponentials(A* weights, int64_t first, int64_t last) {
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

    // Sums of values, weighted: first those of positions that not all queries see, then of the others, then of the rest.
    template <int Q>
    void average(
        const A* weights, int64_t wide, C* values, int64_t row, int64_t head, const int64_t* since, int64_t last,
        const A* factor, A* out, int64_t out_stride
    ) const {
        const int64_t begin = std::min(*std::max_element(since, since + Q), last + 1);  // common to all: begin..last
        const int64_t vectors = padded / L;
        auto some = [&](auto number, int64_t i) {
            constexpr int V = decltype(number)::value;
            vec<A> total[Q][V] = {};
            auto alone = [&](int q, int64_t first, int64_t end) {
                positions<1, V>(weights + q * wide, wide, values, row, head, first, end, i, *(vec<A>(*)[1][V])total[q]);
            };
            for (int q = 0; q < Q && Q > 1; q++) alone(q, since[q], std::min(begin, last + q + 1));
            positions<Q, V>(weights, wide, values, row, head, begin, last + 1, i, total);
            for (int q = 1; q < Q; q++) alone(q, std::max(last + 1, since[q]), last + q + 1);
            for (int q = 0; q < Q; q++)
                for (int v = 0; v < V; v++) {
                    const int64_t at = (i + v) * L;
                    store_some(out + q * out_stride + at, total[q][v] * factor[q], shape.head_dim - at);
                }
        };
        constexpr int MANY = across_of(Q);
        for (int64_t i = 0; i < vectors;) {
            if (vectors - i >= MANY) {
                some(std::integral_constant<int, MANY>(), i);
                i += MANY;
            } else {
                some(std::integral_constant<int, 1>(), i++);
            }
        }
    }

    template <int Q, int V>
    void positions(
        const A* weights, int64_t wide, C* values, int64_t row, int64_t head, int64_t first, int64_t end, int64_t vector,
        vec<A> (&total)[Q][V]
    ) const {
        while (first < end) {
            const int64_t next = std::min(end, first + shape.slots - first % shape.slots);  // before the ring ends
            const C* line = value(values, row, head, first) + vector * L;
            tile<Q, V, V>(line, padded, 0, weights + first, wide, next - first, total);
            first = next;
        }
    }
};

}  // namespace bytelm
