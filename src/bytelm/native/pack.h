// Weights from rows to the panels of matrix.h, rounded on the way.

#pragma once
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

inline void put(double* at, double x) { *at = x; }
inline void put(float* at, float x) { *at = x; }
inline void put(bf16* at, float x) { narrow(at, x); }
inline void put(int8_t* at, float x) { *at = int8_t(x); }

// Panel `panel` of a part; returns how many of its numbers are not finite.
template <class F, class T> int64_t pack_panel(const Packing& p, int64_t part, int64_t panel) {
    using A = std::conditional_t<std::is_same_v<F, double>, double, float>;
    constexpr bool RENEWS = std::is_same_v<T, int8_t> && !std::is_same_v<F, int8_t>;
    const int64_t first = panel * PANEL, rows = p.rows - first < PANEL ? p.rows - first : PANEL;
    const int64_t place = panel * p.parts + part;
    const F* from = (const F*)p.from + (part * p.rows + first) * p.in;
    T* to = (T*)p.to + place * p.in * PANEL;
    A scale[PANEL];
    int64_t bad = 0;
    for (int64_t r = 0; r < PANEL; r++) {
        A factor = p.from_scale && r < rows ? A(p.from_scale[part * p.rows + first + r]) : A(1);
        if (RENEWS) {
            A most = 0;
            for (int64_t k = 0; k < p.in && r < rows; k++) {
                const A size = std::abs(A(widened(from[r * p.in + k])));
                most = size > most || size != size ? size : most;  // not a number stays one
            }
            factor = (most < A(1e-30) ? A(1e-30) : most) / A(127);
        }
        scale[r] = factor;
        if (p.to_scale) p.to_scale[place * PANEL + r] = float(r < rows ? factor : A(0));
    }
    for (int64_t begin = 0; begin < p.in; begin += STRETCH) {
        const int64_t end = begin + STRETCH < p.in ? begin + STRETCH : p.in;
        for (int64_t r = 0; r < PANEL; r++) {
            A line[STRETCH] = {};
            for (int64_t k = begin; k < end && r < rows; k++) {
                const A value = A(widened(from[r * p.in + k]));
                bad += value - value != 0;
                if constexpr (RENEWS)
                    line[k - begin] = A(whole(float(value / scale[r])));
                else if constexpr (std::is_same_v<F, int8_t> && !std::is_same_v<T, int8_t>)
                    line[k - begin] = value * scale[r];
                else
                    line[k - begin] = value;
            }
            for (int64_t k = begin; k < end; k++) put(to + k * PANEL + r, line[k - begin]);
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
