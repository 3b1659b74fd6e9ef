// Attention of new positions over ring buffers: position p of a row is in slot p mod `slots`.
//
//     keys      [row][head][slots / L][head_dim][L]     L adjacent positions per vector: no sums across lanes
//     values    [row][head][slots][head_dim, padded to L]
//
// L: lanes. A position's lane never changes, so that the order of every sum is fixed.

#pragma once
#include <cmath>

#include "matrix.h"

namespace bytelm {

inline vec<double> exponential(vec<double> x) {
    for (int i = 0; i < LANES<double>; i++) x[i] = std::exp(x[i]);
    return x;
}

// e^x for x <= 0: 2^n times a polynomial on [-ln 2 / 2, ln 2 / 2]; the last digit of float32 may be off by one.
inline vec<float> exponential(vec<float> x) {
    typedef int32_t ints __attribute__((vector_size(64)));
    const vec<float> low = {};
    x = x < low - 87.0f ? low - 87.0f : x;
    const ints whole = __builtin_convertvector(x * 1.442695041f - 0.5f, ints);  // truncation rounds up: x is negative
    const vec<float> n = __builtin_convertvector(whole, vec<float>);
    const vec<float> r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
    vec<float> p = r * (1.0f / 5040) + 1.0f / 720;
    p = p * r + 1.0f / 120;
    p = p * r + 1.0f / 24;
    p = p * r + 1.0f / 6;
    p = p * r + 0.5f;
    p = p * r * r + r + 1.0f;
    return p * (vec<float>)((whole + 127) << 23);
}

// Attention of one query of one head over a few keys and values, `stride` apart.
template <class A>
inline void mix_few(
    const A* query, const A* keys, const A* values, int64_t stride, int64_t count, int64_t size, A* weights, A* out
) {
    constexpr int L = LANES<A>;
    const A scale = 1 / A(__builtin_sqrt(double(size)));
    A peak = -INFINITY, total = 0;
    for (int64_t k = 0; k < count; k++) {
        weights[k] = dot(query, keys + k * stride, size) * scale;
        peak = weights[k] > peak ? weights[k] : peak;
    }
    for (int64_t k = 0; k < count; k++) total += weights[k] = std::exp(weights[k] - peak);
    for (int64_t i = 0; i < size; i += L) {
        const int64_t some = size - i < L ? size - i : L;
        vec<A> found = {};
        for (int64_t k = 0; k < count; k++)
            found += load_some(values + k * stride + i, some) * (weights[k] / total);
        memcpy(out + i, &found, some * sizeof(A));
    }
}

// New positions, grouped by row, in order.
struct Tokens {
    int64_t count;
    const int64_t *row, *position, *start, *patch;  // start: the first visible position; patch: the one read
};

struct Heads {
    int64_t heads, head_dim, slots, window;  // window 0: all
    const double* frequencies;               // head_dim / 2
};

template <class A, class C> struct Attention {
    static constexpr int L = LANES<A>;
    const Heads& shape;
    const int64_t padded, blocks;

    explicit Attention(const Heads& heads)
        : shape(heads), padded((heads.head_dim + L - 1) / L * L), blocks(heads.slots / L) {}

    // Rotate pairs (x[2i], x[2i + 1]) by the position's angles.
    void rotate(const A* x, const A* cosines, const A* sines, A factor, A* out) const {
        for (int64_t i = 0; i < shape.head_dim / 2; i++) {
            out[2 * i] = (x[2 * i] * cosines[i] - x[2 * i + 1] * sines[i]) * factor;
            out[2 * i + 1] = (x[2 * i] * sines[i] + x[2 * i + 1] * cosines[i]) * factor;
        }
    }

    void angles(int64_t position, A* cosines, A* sines) const {
        for (int64_t i = 0; i < shape.head_dim / 2; i++) {
            cosines[i] = A(std::cos(double(position) * shape.frequencies[i]));
            sines[i] = A(std::sin(double(position) * shape.frequencies[i]));
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

    // Attention of one query of one head over positions first..last of a row.
    void mix(const A* query, C* keys, C* values, int64_t row, int64_t head, int64_t first, int64_t last, A* out) const {
        const int64_t from = first / L, count = last / L - from + 1;
        A* weights = scratch<A>(0, count * L);
        scores(query, keys, row, head, from, count, weights);
        for (int64_t p = from * L; p < first; p++) weights[p - from * L] = -INFINITY;
        for (int64_t p = last + 1; p < (from + count) * L; p++) weights[p - from * L] = -INFINITY;
        vec<A> top = load(weights);
        for (int64_t b = 1; b < count; b++) {
            const vec<A> x = load(weights + b * L);
            top = top > x ? top : x;
        }
        const A peak = highest<A>(top);
        vec<A> total = {};
        for (int64_t b = 0; b < count; b++) {
            const vec<A> x = load(weights + b * L);
            const vec<A> kept = exponential(x - peak);
            const vec<A> weight = x == -INFINITY ? vec<A>{} : kept;
            store(weights + b * L, weight);
            total += weight;
        }
        average(weights - from * L, values, row, head, first, last, 1 / sum<A>(total), out);
    }

    void scores(const A* query, C* keys, int64_t row, int64_t head, int64_t from, int64_t count, A* out) const {
        const int64_t dim = shape.head_dim;
        for (int64_t b = 0; b < count; b++) {  // sequential: one long stream is fastest
            const C* at = key_block(keys, row, head, from + b);
            vec<A> found = {};
            for (int64_t i = 0; i < dim; i++) found += load(at + i * L) * query[i];
            store(out + b * L, found);
        }
    }

    void average(
        const A* weights, C* values, int64_t row, int64_t head, int64_t first, int64_t last, A factor, A* out
    ) const {
        constexpr int WIDE = 4;  // vectors of a head that are accumulated together
        for (int64_t i = 0; i < padded; i += WIDE * L) {
            vec<A> total[WIDE] = {};
            const int wide = int(padded - i < WIDE * L ? (padded - i) / L : WIDE);
            const C* line = value(values, row, head, first) + i;
            int64_t slot = first % shape.slots;
            for (int64_t p = first; p <= last; p++, line += padded) {
                for (int j = 0; j < WIDE; j++)
                    if (j < wide) total[j] += load(line + j * L) * weights[p];
                if (++slot == shape.slots) {
                    slot = 0;
                    line -= shape.slots * padded;
                }
            }
            for (int j = 0; j < wide; j++)
                for (int k = 0; k < L && i + j * L + k < shape.head_dim; k++)
                    out[i + j * L + k] = total[j][k] * factor;
        }
    }
};

}  // namespace bytelm
