// Weights from rows to the panels of matrix.h, rounded on the way.

#pragma once
#include <algorithm>
#include <atomic>

#include "matrix.h"

namespace bytelm {

struct Packing {
    const void* from;          // [parts * rows][in]
    const float* from_scale;   // per row, for I8; or null
    int64_t from_kind, rows, in, parts;
    void* to;                  // [panels][parts][in][PANEL]
    float* to_scale;           // per row of `to`, for I8
    int64_t to_kind;
};

constexpr int64_t STRETCH = 64;  // columns that are turned at a time: a stretch of a panel stays in the nearest cache

// x rounded to the nearest whole number, ties to even, for |x| < 2^22.
inline float whole(float x) { return (x + 12582912.0f) - 12582912.0f; }

// The largest of some numbers without their signs; what is not a number is passed over.
template <class A, class F> inline A largest(const F* from, int64_t count) {
    A most[LANES<A>] = {};
    for (int64_t k = 0; k < count; k++) {
        const A size = std::abs(A(widened(from[k]))), best = most[k % LANES<A>];
        most[k % LANES<A>] = size > best ? size : best;
    }
    return *std::max_element(most, most + LANES<A>);
}

// Some numbers of a row of scale `scale`, in the kind of the panel; returns how many are not finite.
template <class F, class T, class A> inline int64_t converted(const F* from, int64_t count, A scale, T* to) {
    A line[STRETCH];
    int64_t bad = 0;
    for (int64_t k = 0; k < count; k++) line[k] = A(widened(from[k]));
    for (int64_t k = 0; k < count; k++) bad += line[k] - line[k] != 0;
    if constexpr (std::is_same_v<F, T>) {
        memcpy(to, from, count * sizeof(T));
    } else if constexpr (std::is_same_v<T, int8_t>) {
        for (int64_t k = 0; k < count; k++) to[k] = int8_t(whole(float(line[k] / scale)));
    } else {
        if (std::is_same_v<F, int8_t>)
            for (int64_t k = 0; k < count; k++) line[k] *= scale;
        for (int64_t k = 0; k < count; k++) {
            if constexpr (std::is_same_v<T, bf16>)
                narrow(to + k, float(line[k]));
            else
                to[k] = T(line[k]);
        }
    }
    return bad;
}

// Panel `panel` of a part; returns how many of its numbers are not finite.
template <class F, class T> int64_t pack_panel(const Packing& p, int64_t part, int64_t panel) {
    using A = std::conditional_t<std::is_same_v<F, double>, double, float>;
    constexpr bool RENEWS = std::is_same_v<T, int8_t> && !std::is_same_v<F, int8_t>;
    const int64_t first = panel * PANEL, rows = p.rows - first < PANEL ? p.rows - first : PANEL;
    const int64_t place = panel * p.parts + part;
    const F* from = (const F*)p.from + (part * p.rows + first) * p.in;
    T* to = (T*)p.to + place * p.in * PANEL;
    A scale[PANEL] = {};
    for (int64_t r = 0; r < rows; r++) {
        scale[r] = p.from_scale ? A(p.from_scale[part * p.rows + first + r]) : A(1);
        if (RENEWS) scale[r] = std::max(largest<A>(from + r * p.in, p.in), A(1e-30f)) / A(127);
    }
    if (p.to_scale)
        for (int64_t r = 0; r < PANEL; r++) p.to_scale[place * PANEL + r] = float(scale[r]);
    int64_t bad = 0;
    for (int64_t begin = 0; begin < p.in; begin += STRETCH) {
        const int64_t count = std::min(p.in - begin, STRETCH);
        for (int64_t r = 0; r < PANEL; r++) {
            T line[STRETCH] = {};
            if (r < rows) bad += converted(from + r * p.in + begin, count, scale[r], line);
            for (int64_t k = 0; k < count; k++) to[(begin + k) * PANEL + r] = line[k];
        }
    }
    return bad;
}

template <class F, class T> int64_t pack_all(const Packing& p, int threads) {
    const int64_t panels = (p.rows + PANEL - 1) / PANEL;
    std::atomic<int64_t> bad{0};
    parallel(threads, [&](int thread, int team) {
        const Share mine(panels * p.parts, thread, team);
        for (int64_t item = mine.first; item < mine.last; item++)
            bad += pack_panel<F, T>(p, item % p.parts, item / p.parts);
    });
    return bad;
}

template <class F> int64_t pack_to(const Packing& p, int threads) {
    if (p.to_kind == I8) return pack_all<F, int8_t>(p, threads);
    if (p.to_kind == BF16) return pack_all<F, bf16>(p, threads);
    return pack_all<F, float>(p, threads);
}

// Returns how many numbers are not finite.
inline int64_t pack(const Packing& p, int threads) {
    if (p.from_kind == F64) return pack_all<double, double>(p, threads);
    if (p.from_kind == F32) return pack_to<float>(p, threads);
    if (p.from_kind == BF16) return pack_to<bf16>(p, threads);
    return pack_to<int8_t>(p, threads);
}

}  // namespace bytelm
