// The operations of a block between its matmuls, forward and backward, each in one pass over memory, in bfloat16 and
// float32.

#pragma once
#include <algorithm>
#include <cmath>

#include "functions.h"
#include "pairs.h"

namespace bytelm {

constexpr int64_t STRIP = 64;  // lines per partial sum, for any number of threads
constexpr int64_t SOME = 16;   // lines that a thread takes at a time

// y = x / rms(x) * weight; `factor` [lines] is saved for the backward pass. dim is a multiple of 16.
template <class X, class Y>
inline void norm_forward(
    const X* x, const float* weight, int64_t lines, int64_t dim, float eps, Y* y, float* factor, int threads
) {
    auto each = [&](int64_t t) {
        const X* from = x + t * dim;
        vec<float> squares = {};
        for (int64_t i = 0; i < dim; i += N) squares = fma(load(from + i), load(from + i), squares);
        factor[t] = 1 / std::sqrt(sum<float>(squares) / float(dim) + eps);
        for (int64_t i = 0; i < dim; i += N) store(y + t * dim + i, load(from + i) * factor[t] * load(weight + i));
    };
    parallel_for(lines, threads, each, SOME);
}

// d_weight [strips][dim]: to be summed over strips by the caller.
template <class X, class Y>
inline void norm_backward(
    const X* x, const float* weight, const float* factor, const Y* d_y, int64_t lines, int64_t dim, X* d_x,
    float* d_weight, int threads
) {
    const int64_t strips = (lines + STRIP - 1) / STRIP;
    auto each = [&](int64_t strip) {
        float* own = d_weight + strip * dim;
        std::fill(own, own + dim, 0.0f);
        for (int64_t t = strip * STRIP; t < std::min(lines, (strip + 1) * STRIP); t++) {
            const X* from = x + t * dim;
            const Y* slope = d_y + t * dim;
            vec<float> total = {};
            for (int64_t i = 0; i < dim; i += N) {
                const vec<float> product = load(from + i) * factor[t] * load(slope + i);
                total = fma(product, load(weight + i), total);
                store(own + i, load(own + i) + product);
            }
            const float mean = sum<float>(total) / float(dim);
            for (int64_t i = 0; i < dim; i += N)
                store(d_x + t * dim + i,
                      (load(slope + i) * load(weight + i) - load(from + i) * (factor[t] * mean)) * factor[t]);
        }
    };
    parallel_for(strips, threads, each);
}

inline vec<float> logistic(vec<float> x) {  // without overflow
    const vec<float> small = exponential(smaller(x, -x));
    return select(x > 0.0f, all<float>(1.0f), small) / (small + 1.0f);
}

// y = silu(gate) * up, of lines [gate | up] of 2 * dim.
template <class X> inline void swiglu_forward(const X* x, int64_t lines, int64_t dim, X* y, int threads) {
    auto each = [&](int64_t t) {
        const X *gate = x + t * 2 * dim, *up = gate + dim;
        for (int64_t i = 0; i < dim; i += N) {
            const vec<float> g = load(gate + i);
            store(y + t * dim + i, g * logistic(g) * load(up + i));
        }
    };
    parallel_for(lines, threads, each, SOME);
}

template <class X>
inline void swiglu_backward(const X* x, const X* d_y, int64_t lines, int64_t dim, X* d_x, int threads) {
    auto each = [&](int64_t t) {
        const X *gate = x + t * 2 * dim, *up = gate + dim, *slope = d_y + t * dim;
        X *d_gate = d_x + t * 2 * dim, *d_up = d_gate + dim;
        for (int64_t i = 0; i < dim; i += N) {
            const vec<float> g = load(gate + i), s = logistic(g), d = load(slope + i);
            store(d_up + i, d * g * s);
            store(d_gate + i, d * load(up + i) * s * (1.0f + g * (1.0f - s)));
        }
    };
    parallel_for(lines, threads, each, SOME);
}

template <size_t... I> BYTELM_INLINE Vector<float, REGISTER>::Raw doubled(const float* at, std::index_sequence<I...>) {
    typedef float Half __attribute__((vector_size(REGISTER / 2)));
    Half x;
    memcpy(&x, at, sizeof x);
    return __builtin_shufflevector(x, x, int(I / 2)...);
}
template <class Raw, size_t... I> BYTELM_INLINE Raw neighbours(Raw x, std::index_sequence<I...>) {
    return __builtin_shufflevector(x, x, int(I ^ 1)...);
}
// Each pair of neighbouring lanes, the other way around.
BYTELM_INLINE vec<float> exchanged(vec<float> x) {
    return each<float>([](auto y) { return neighbours(y, std::make_index_sequence<REGISTER / 4>()); }, x);
}

// Rotate pairs (x[2i], x[2i + 1]) by the angles of their place; sign -1 inverts. x [rows, places, heads, 2 * half].
struct Turn {
    int64_t rows, places, heads, half;
    int64_t row, place;  // strides of x in elements; heads are adjacent
    const float *cosines, *sines;  // [rows or 1, places, half]
    int64_t angle_row;
};

// Eight numbers, each in two neighbouring lanes.
template <int B = 64> BYTELM_INLINE Vector<float, B> twice(const float* at) {
    if constexpr (B == REGISTER)
        return {doubled(at, std::make_index_sequence<B / 4>())};
    else
        return {twice<B / 2>(at), twice<B / 2>(at + B / 16)};
}

template <class X> inline void turn(const Turn& a, const X* x, float sign, X* y, int threads) {
    // even lanes: x cos - y sin; odd lanes: y cos + x sin
    static constexpr float SIGNS[N] = {-1, 1, -1, 1, -1, 1, -1, 1, -1, 1, -1, 1, -1, 1, -1, 1};
    const vec<float> signs = load(SIGNS) * sign;
    const int64_t dim = 2 * a.half;
    auto each = [&](int64_t i) {
        const int64_t row = i / a.places, place = i % a.places;
        const X* from = x + row * a.row + place * a.place;
        X* to = y + (row * a.places + place) * a.heads * dim;
        const float* cosines = a.cosines + row * a.angle_row + place * a.half;
        const float* sines = a.sines + row * a.angle_row + place * a.half;
        for (int64_t d = 0; d < dim; d += N) {
            const vec<float> cosine = twice(cosines + d / 2), sine = twice(sines + d / 2) * signs;
            for (int64_t h = 0; h < a.heads; h++) {
                const vec<float> value = load(from + h * dim + d);
                store(to + h * dim + d, fma(value, cosine, exchanged(value) * sine));
            }
        }
    };
    parallel_for(a.rows * a.places, threads, each, SOME);
}

// The gradient of each of `count` rows: the sum of those of its readers, which are sorted by row; `ends`: the end of each
// row's readers.
inline void gather_rows(
    const float* slope, const int64_t* reader, const int64_t* ends, int64_t count, int64_t dim, float* to, int threads
) {
    auto each = [&](int64_t r) {
        for (int64_t i = 0; i < dim; i += N) {
            vec<float> total = {};
            for (int64_t k = r ? ends[r - 1] : 0; k < ends[r]; k++) total += load(slope + reader[k] * dim + i);
            store(to + r * dim + i, total);
        }
    };
    parallel_for(count, threads, each, 64);
}

// Adam on the rows of a table that have a gradient; the moments of the others are unchanged. dim is a multiple of 16.
struct Rows {
    int64_t count, dim;
    const int64_t* index;  // [count], each row once
    const float* slope;    // [count, dim]
    float *weight, *square;
    double rate, beta2, eps;  // rate: learning rate with bias correction
    int64_t rowwise;  // whether `square` is [rows], of the mean square of a row's slope, not [rows, dim]
};

inline void adam_rows(const Rows& a, int threads) {
    const float keep = float(a.beta2), rate = float(a.rate), eps = float(a.eps);
    auto by_number = [&](int64_t r) {
        for (int64_t at = a.index[r] * a.dim, i = 0; i < a.dim; i += N) {
            const vec<float> slope = load(a.slope + r * a.dim + i);
            const vec<float> square = fma(load(a.square + at + i), keep, slope * slope * (1 - keep));
            store(a.square + at + i, square);
            const vec<float> deviation = root(square) + eps;
            store(a.weight + at + i, load(a.weight + at + i) - slope / deviation * rate);
        }
    };
    auto by_row = [&](int64_t r) {
        const float* slope = a.slope + r * a.dim;
        vec<float> squares = {};
        for (int64_t i = 0; i < a.dim; i += N) squares = fma(load(slope + i), load(slope + i), squares);
        float& square = a.square[a.index[r]];
        square = std::fma(square, keep, sum<float>(squares) / float(a.dim) * (1 - keep));
        const float step = rate / (std::sqrt(square) + eps);
        for (int64_t at = a.index[r] * a.dim, i = 0; i < a.dim; i += N)
            store(a.weight + at + i, load(a.weight + at + i) - load(slope + i) * step);
    };
    if (a.rowwise)
        parallel_for(a.count, threads, by_row, SOME);
    else
        parallel_for(a.count, threads, by_number, SOME);
}

}  // namespace bytelm
