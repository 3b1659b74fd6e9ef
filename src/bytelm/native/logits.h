// What a coder needs of logits (bytelm.compress.coder, bytelm.online.memory), in float64. Lines are independent.

#pragma once
#include <algorithm>

#include "functions.h"
#include "matrix.h"

namespace bytelm {

// The differences to the largest of a line, filled up to whole vectors by -infinity; returns how many these are.
template <class A> inline int64_t below_the_largest(const A* logits, int64_t count, double* line) {
    constexpr int L = LANES<A>;
    vec<A> top = all<A>(-INFINITY);
    for (int64_t i = 0; i < count; i += L) top = larger(load_some(logits + i, count - i, A(-INFINITY)), top);
    const double peak = highest<A>(top);
    const int64_t padded = (count + LANES<double> - 1) / LANES<double> * LANES<double>;
    for (int64_t i = 0; i < count; i++) line[i] = double(logits[i]) - peak;
    std::fill(line + count, line + padded, -INFINITY);
    return padded;
}

// Integer frequencies of symbols with such logits: every one at least 1, `total` together at most. A line with a NaN, of
// whose frequencies nothing is known, has ones.
template <class A> void frequencies(const A* logits, int64_t n, int64_t count, int64_t total, int64_t* out) {
    constexpr int L = LANES<double>;
    constexpr double FROM = 4503599627370496.0;  // 2^52: where float64 has whole numbers alone
    double* line = scratch<double>(5, count + L);
    for (; n > 0; n--, logits += count, out += count) {
        const int64_t padded = below_the_largest(logits, count, line);
        vec<double> sums = {};
        for (int64_t i = 0; i < padded; i += L) {
            const vec<double> chance = exponential(load(line + i));
            store(line + i, chance);
            sums += chance;
        }
        const double factor = double(total - count) / sum<double>(sums);
        for (int64_t i = 0; i < count; i += L) {
            vec<double> x = load(line + i) * factor;
            x = select(x > 0.0, x, vec<double>{});
            const vec<double> near = x + FROM;
            const vec<int64_t> whole = as<int64_t>(near) - as<int64_t>(all<double>(FROM)) + (near - FROM > x);
            store_some(out + i, whole + int64_t(1), count - i);
        }
    }
}

// Natural log-probabilities `[n][count]` of the first `count` symbols, among these alone, of lines that are `stride` apart.
template <class A> void log_probabilities(const A* logits, int64_t n, int64_t stride, int64_t count, float* out) {
    constexpr int L = LANES<double>;
    double* line = scratch<double>(5, count + L);
    for (; n > 0; n--, logits += stride, out += count) {
        const int64_t padded = below_the_largest(logits, count, line);
        vec<double> sums = {};
        for (int64_t i = 0; i < padded; i += L) sums += exponential(load(line + i));
        const double together = logarithm(sum<double>(sums));
        for (int64_t i = 0; i < count; i++) out[i] = float(line[i] - together);
    }
}

}  // namespace bytelm
