// Products in bfloat16 by pairs of neighbours, one AVX-512 instruction (vdpbf16ps). Elsewhere a fallback in compiler
// vectors, slower than torch, so that it can be tested everywhere.
//
//     C [m][n]  =  or  +=  sum over pairs k of  A[m][2k] B[2k][n] + A[m][2k+1] B[2k+1][n]          in float32
//
// A pair of A is one word, which is broadcast; any two strides, so that a matrix can be read transposed.
// A pair of B is one word too, with its lines interleaved: [k / 2][n][2].

#pragma once
#include <cmath>

#include "matrix.h"

#if defined(__AVX512BF16__) && defined(__AVX512BW__)
#define BYTELM_NATIVE_PAIRS 1
#endif

namespace bytelm {

typedef uint32_t word;  // two neighbours, the first one in the lower half
constexpr int N = 16;   // words, or floats, in a vector

inline words load(const word* at) {
    words x;
    memcpy(&x, at, sizeof x);
    return x;
}
inline void store(word* at, words x) { memcpy(at, &x, sizeof x); }

// total += the products of a broadcast pair with the pairs of a line.
inline vec<float> add_products(vec<float> total, word pair, words line) {
#if defined(BYTELM_NATIVE_PAIRS)
    return (vec<float>)_mm512_dpbf16_ps((__m512)total, (__m512bh)_mm512_set1_epi32(int(pair)), (__m512bh)line);
#else
    const word lower = pair << 16, upper = pair & 0xFFFF0000;
    float low, high;
    memcpy(&low, &lower, 4);
    memcpy(&high, &upper, 4);
    return total + (vec<float>)(line & 0xFFFF0000) * high + (vec<float>)(line << 16) * low;
#endif
}

// Sixteen numbers, rounded to nearest, ties to even.
inline halves rounded(vec<float> x) {
#if defined(BYTELM_NATIVE_PAIRS)
    return (halves)_mm512_cvtneps_pbh((__m512)x);
#else
    const words bits = (words)x, up = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16;
    return __builtin_convertvector(x == x ? up : bits >> 16 | 0x40, halves);  // adding would make a NaN a number
#endif
}

// 2^x for whole x, times p; 0 far below.
inline vec<float> scaled(vec<float> p, vec<float> whole) {
#if defined(BYTELM_NATIVE_PAIRS)
    return (vec<float>)_mm512_scalef_ps((__m512)p, (__m512)whole);
#else
    whole = whole < -127 ? vec<float>{} - 127.0f : whole > 127 ? vec<float>{} + 127.0f : whole;
    return p * (vec<float>)((__builtin_convertvector(whole, integers) + 127) << 23);
#endif
}

inline vec<float> nearest_whole(vec<float> x) {
#if defined(BYTELM_NATIVE_PAIRS)
    return (vec<float>)_mm512_roundscale_ps((__m512)x, _MM_FROUND_TO_NEAREST_INT);
#else
    for (int i = 0; i < N; i++) x[i] = std::nearbyint(x[i]);
    return x;
#endif
}

inline vec<float> root(vec<float> x) {
#if defined(__AVX512F__)
    return (vec<float>)_mm512_sqrt_ps((__m512)x);
#else
    for (int i = 0; i < N; i++) x[i] = std::sqrt(x[i]);
    return x;
#endif
}

struct Operand {  // A, as words
    const word* data;
    int64_t row, pair;
};

template <int R, int V>
inline void pairs_tile(Operand a, const word* b, int64_t ldb, int64_t pairs, float* c, int64_t ldc, bool more) {
    vec<float> total[R][V];
#pragma GCC unroll 8
    for (int r = 0; r < R; r++)
#pragma GCC unroll 4
        for (int v = 0; v < V; v++) total[r][v] = more ? load(c + r * ldc + v * N) : vec<float>{};
    for (int64_t k = 0; k < pairs; k++, b += ldb) {
        words line[V];
#pragma GCC unroll 4
        for (int v = 0; v < V; v++) line[v] = load(b + v * N);
#pragma GCC unroll 8
        for (int r = 0; r < R; r++) {
            const word pair = a.data[r * a.row + k * a.pair];
#pragma GCC unroll 4
            for (int v = 0; v < V; v++) total[r][v] = add_products(total[r][v], pair, line[v]);
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; r++)
#pragma GCC unroll 4
        for (int v = 0; v < V; v++) store(c + r * ldc + v * N, total[r][v]);
}

template <int R, int V>
inline int64_t pairs_rows(int64_t row, int64_t m, Operand a, const word* b, int64_t ldb, int64_t pairs, float* c, int64_t ldc, bool more) {
    for (; row + R <= m; row += R)
        pairs_tile<R, V>({a.data + row * a.row, a.row, a.pair}, b, ldb, pairs, c + row * ldc, ldc, more);
    return row;
}

template <int V>
inline void pairs_columns(int64_t m, Operand a, const word* b, int64_t ldb, int64_t pairs, float* c, int64_t ldc, bool more) {
    int64_t row = V == 4 ? 0 : pairs_rows<8, V>(0, m, a, b, ldb, pairs, c, ldc, more);
    row = pairs_rows<4, V>(row, m, a, b, ldb, pairs, c, ldc, more);
    row = pairs_rows<2, V>(row, m, a, b, ldb, pairs, c, ldc, more);
    pairs_rows<1, V>(row, m, a, b, ldb, pairs, c, ldc, more);
}

// n is a multiple of 16.
inline void pairs_product(int64_t m, int64_t n, int64_t pairs, Operand a, const word* b, int64_t ldb, float* c, int64_t ldc, bool more) {
    int64_t j = 0;
    for (; j + 4 * N <= n; j += 4 * N) pairs_columns<4>(m, a, b + j, ldb, pairs, c + j, ldc, more);
    for (; j + 2 * N <= n; j += 2 * N) pairs_columns<2>(m, a, b + j, ldb, pairs, c + j, ldc, more);
    for (; j < n; j += N) pairs_columns<1>(m, a, b + j, ldb, pairs, c + j, ldc, more);
}

inline void store(bf16* at, vec<float> x) {
    const halves y = rounded(x);
    memcpy(at, &y, sizeof y);
}
inline words beside(halves first, halves second) {  // pairs of two lines
    return __builtin_convertvector(first, words) | __builtin_convertvector(second, words) << 16;
}
inline words beside(vec<float> first, vec<float> second) { return beside(rounded(first), rounded(second)); }

// Some lines of one head of one row: line i at data + i * step, in elements (both even).
struct Lines {
    const bf16* data;
    int64_t step;

    const bf16* line(int64_t i) const { return data + i * step; }
    Operand operand(int64_t first) const { return {(const word*)line(first), step / 2, 1}; }
};

// B with head_dim as inner axis: [dim / 2][wide], transposed by words; zero beyond `count`.
inline void pack_across(Lines from, int64_t first, int64_t count, int64_t dim, int64_t wide, word* to) {
    for (int64_t k = 0; k < dim / 2; k++)
        for (int64_t i = count; i < wide; i++) to[k * wide + i] = 0;
    for (int64_t i = 0; i < count; i++) {
        const word* line = (const word*)from.line(first + i);
        for (int64_t k = 0; k < dim / 2; k++) to[k * wide + i] = line[k];
    }
}

// B with lines as inner axis: [wide / 2][dim], two lines interleaved; zero beyond `count`.
inline void pack_along(Lines from, int64_t first, int64_t count, int64_t dim, int64_t wide, word* to) {
    for (int64_t i = 0; i < wide; i += 2)
        for (int64_t d = 0; d < dim; d += N) {
            halves even = {}, odd = {};
            if (i < count) memcpy(&even, from.line(first + i) + d, sizeof even);
            if (i + 1 < count) memcpy(&odd, from.line(first + i + 1) + d, sizeof odd);
            store(to + i / 2 * dim + d, beside(even, odd));
        }
}

}  // namespace bytelm
