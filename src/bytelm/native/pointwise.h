// The operations of a block between its matmuls, forward and backward, each in one pass over memory.

#pragma once
#include <algorithm>
#include <cmath>

#include "attention.h"
#include "pairs.h"

namespace bytelm {

constexpr int64_t STRIP = 64;  // lines per partial sum, for any number of threads

// y = x / rms(x) * weight; `factor` [lines] is saved for the backward pass. dim is a multiple of 16.
template <class X>
inline void norm_forward(const X* x, const float* weight, int64_t lines, int64_t dim, float eps, bf16* y, float* factor, int threads) {
#pragma omp parallel for num_threads(threads) if (threads > 1)
    for (int64_t t = 0; t < lines; t++) {
        const X* from = x + t * dim;
        vec<float> squares = {};
        for (int64_t i = 0; i < dim; i += N) squares += load(from + i) * load(from + i);
        factor[t] = 1 / std::sqrt(sum<float>(squares) / float(dim) + eps);
        for (int64_t i = 0; i < dim; i += N) store(y + t * dim + i, load(from + i) * factor[t] * load(weight + i));
    }
}

// d_weight [strips][dim]: to be summed over strips by the caller.
template <class X>
inline void norm_backward(
    const X* x, const float* weight, const float* factor, const bf16* d_y, int64_t lines, int64_t dim, X* d_x,
    float* d_weight, int threads
) {
    const int64_t strips = (lines + STRIP - 1) / STRIP;
#pragma omp parallel for num_threads(threads) if (threads > 1)
    for (int64_t strip = 0; strip < strips; strip++) {
        float* own = d_weight + strip * dim;
        std::fill(own, own + dim, 0.0f);
        for (int64_t t = strip * STRIP; t < std::min(lines, (strip + 1) * STRIP); t++) {
            const X* from = x + t * dim;
            const bf16* slope = d_y + t * dim;
            vec<float> total = {};
            for (int64_t i = 0; i < dim; i += N) {
                const vec<float> product = load(from + i) * factor[t] * load(slope + i);
                total += product * load(weight + i);
                store(own + i, load(own + i) + product);
            }
            const float mean = sum<float>(total) / float(dim);
            for (int64_t i = 0; i < dim; i += N)
                store(d_x + t * dim + i,
                      (load(slope + i) * load(weight + i) - load(from + i) * (factor[t] * mean)) * factor[t]);
        }
    }
}

inline vec<float> logistic(vec<float> x) {  // without overflow
    const vec<float> small = exponential(x < -x ? x : -x);
    return (x > 0 ? vec<float>{} + 1.0f : small) / (small + 1.0f);
}

// y = silu(gate) * up, of lines [gate | up] of 2 * dim.
inline void swiglu_forward(const bf16* x, int64_t lines, int64_t dim, bf16* y, int threads) {
#pragma omp parallel for num_threads(threads) if (threads > 1)
    for (int64_t t = 0; t < lines; t++) {
        const bf16 *gate = x + t * 2 * dim, *up = gate + dim;
        for (int64_t i = 0; i < dim; i += N) {
            const vec<float> g = load(gate + i);
            store(y + t * dim + i, g * logistic(g) * load(up + i));
        }
    }
}

inline void swiglu_backward(const bf16* x, const bf16* d_y, int64_t lines, int64_t dim, bf16* d_x, int threads) {
#pragma omp parallel for num_threads(threads) if (threads > 1)
    for (int64_t t = 0; t < lines; t++) {
        const bf16 *gate = x + t * 2 * dim, *up = gate + dim, *slope = d_y + t * dim;
        bf16 *d_gate = d_x + t * 2 * dim, *d_up = d_gate + dim;
        for (int64_t i = 0; i < dim; i += N) {
            const vec<float> g = load(gate + i), s = logistic(g), d = load(slope + i);
            store(d_up + i, d * g * s);
            store(d_gate + i, d * load(up + i) * s * (1.0f + g * (1.0f - s)));
        }
    }
}

// Rotate pairs (x[2i], x[2i + 1]) by the angles of their place; sign -1 inverts. x [rows, places, heads, 2 * half].
struct Turn {
    int64_t rows, places, heads, half;
    int64_t row, place;  // strides of x in elements; heads are adjacent
    const float *cosines, *sines;  // [rows or 1, places, half]
    int64_t angle_row;
};

// Eight numbers, each in two neighbouring lanes.
inline vec<float> twice(const float* at) {
    typedef float eight __attribute__((vector_size(32)));
    eight x;
    memcpy(&x, at, sizeof x);
    return __builtin_shufflevector(x, x, 0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7);
}

inline void turn(const Turn& a, const bf16* x, float sign, bf16* y, int threads) {
    // even lanes: x cos - y sin; odd lanes: y cos + x sin
    const vec<float> signs = vec<float>{-1, 1, -1, 1, -1, 1, -1, 1, -1, 1, -1, 1, -1, 1, -1, 1} * sign;
    const int64_t dim = 2 * a.half;
#pragma omp parallel for collapse(2) num_threads(threads) if (threads > 1)
    for (int64_t row = 0; row < a.rows; row++)
        for (int64_t place = 0; place < a.places; place++) {
            const bf16* from = x + row * a.row + place * a.place;
            bf16* to = y + (row * a.places + place) * a.heads * dim;
            const float* cosines = a.cosines + row * a.angle_row + place * a.half;
            const float* sines = a.sines + row * a.angle_row + place * a.half;
            for (int64_t d = 0; d < dim; d += N) {
                const vec<float> cosine = twice(cosines + d / 2), sine = twice(sines + d / 2) * signs;
                for (int64_t h = 0; h < a.heads; h++) {
                    const vec<float> value = load(from + h * dim + d);
                    const vec<float> exchanged =
                        __builtin_shufflevector(value, value, 1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14);
                    store(to + h * dim + d, value * cosine + exchanged * sine);
                }
            }
        }
}

// The gradient of each of `count` rows: the sum of those of its readers, which are sorted by row; `ends`: the end of each
// row's readers.
inline void gather_rows(
    const float* slope, const int64_t* reader, const int64_t* ends, int64_t count, int64_t dim, float* to, int threads
) {
#pragma omp parallel for schedule(dynamic, 64) num_threads(threads) if (threads > 1)
    for (int64_t r = 0; r < count; r++)
        for (int64_t i = 0; i < dim; i += N) {
            vec<float> total = {};
            for (int64_t k = r ? ends[r - 1] : 0; k < ends[r]; k++) total += load(slope + reader[k] * dim + i);
            store(to + r * dim + i, total);
        }
}

// Adam on the rows of a table that have a gradient; the moments of the others are unchanged. dim is a multiple of 16.
struct Rows {
    int64_t count, dim;
    const int64_t* index;  // [count], each row once
    const float* slope;    // [count, dim]
    float *weight, *mean, *square;
    double rate, beta1, beta2, eps;  // rate: learning rate with bias correction
};

inline void adam_rows(const Rows& a, int threads) {
    const float keep1 = float(a.beta1), keep2 = float(a.beta2), rate = float(a.rate), eps = float(a.eps);
#pragma omp parallel for num_threads(threads) if (threads > 1)
    for (int64_t r = 0; r < a.count; r++)
        for (int64_t at = a.index[r] * a.dim, i = 0; i < a.dim; i += N) {
            const vec<float> slope = load(a.slope + r * a.dim + i);
            const vec<float> mean = load(a.mean + at + i) * keep1 + slope * (1 - keep1);
            const vec<float> square = load(a.square + at + i) * keep2 + slope * slope * (1 - keep2);
            store(a.mean + at + i, mean);
            store(a.square + at + i, square);
            const vec<float> deviation = root(square) + eps;
            store(a.weight + at + i, load(a.weight + at + i) - mean / deviation * rate);
        }
}

}  // namespace bytelm
