// Products for training in bfloat16 and float32. What is multiplied at once is a word: a pair of neighbours in bfloat16,
// by one AVX-512 instruction (vdpbf16ps), or one number in float32. Without that instruction pairs are slower than torch,
// but they can be tested everywhere.
//
//     C [m][n]  =  or  +=  sum over words k of  A[m][k] B[k][n]          in float32
//
// The product of two pairs is that of their second numbers plus that of their first.
// A word of A is broadcast; any two strides, so that a matrix can be read transposed.
// B has the lines of a word interleaved: [k / PER][n][PER].

#pragma once
#include <cmath>

#include "matrix.h"

#if defined(BYTELM_AVX512) && defined(__AVX512BF16__) && defined(__AVX512BW__)
#define BYTELM_NATIVE_PAIRS 1
#endif

namespace bytelm {

template <class X> constexpr int PER = int(sizeof(word) / sizeof(X));  // numbers of a word
constexpr int N = LANES<float>;                                         // words, or floats, in a vector

template <class X> BYTELM_INLINE word word_at(const X* at) {
    word x;
    memcpy(&x, at, sizeof x);
    return x;
}

// total += the products of a broadcast word with the words of a line.
template <class X> BYTELM_INLINE vec<float> add_products(vec<float> total, vec<word> value, vec<word> line) {
    if constexpr (PER<X> == 1) {
        return fma(as<float>(line), as<float>(value), total);
    } else {
#if defined(BYTELM_NATIVE_PAIRS)
        return {(vec<float>::Raw)_mm512_dpbf16_ps((__m512)total.raw, (__m512bh)value.raw, (__m512bh)line.raw)};
#else
        const word second = 0xFFFF0000;
        total = fma(as<float>(line & second), as<float>(value & second), total);
        return fma(as<float>(line << 16), as<float>(value << 16), total);
#endif
    }
}

// Numbers rounded to bfloat16, to nearest, ties to even: each in the lower half of a word.
BYTELM_INLINE vec<word> rounded(vec<float> x) {
#if defined(BYTELM_NATIVE_PAIRS)
    return {(vec<word>::Raw)_mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh((__m512)x.raw))};
#else
    const vec<word> bits = as<word>(x), up = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16;
    return select(x == x, up, bits >> 16 | 0x40);  // adding would make a NaN a number
#endif
}

BYTELM_INLINE void store(bf16* at, vec<float> x) {
#if defined(BYTELM_NATIVE_PAIRS)
    const __m256bh y = _mm512_cvtneps_pbh((__m512)x.raw);
    memcpy(at, &y, sizeof y);
#else
    store_halves(&at->bits, rounded(x));
#endif
}

// The words of PER lines of numbers, interleaved.
template <class X> BYTELM_INLINE vec<word> interleaved(const vec<float> (&lines)[PER<X>]) {
    if constexpr (PER<X> == 1)
        return as<word>(lines[0]);
    else
        return rounded(lines[0]) | rounded(lines[1]) << 16;
}

template <class X> struct Operand {  // A; strides in numbers
    const X* data;
    int64_t row, step;  // step: from word to word
};

template <class X> struct Product {
    int64_t words;
    Operand<X> a;
    const word* b;
    int64_t ldb;
    float* c;
    int64_t ldc;
    bool more;  // add to C

    template <int R, int V> BYTELM_INLINE void tile(int64_t row, int64_t column) const {
        vec<float> total[R][V];
        float* to = c + row * ldc + column;
#pragma GCC unroll 8
        for (int r = 0; r < R; r++)
#pragma GCC unroll 4
            for (int v = 0; v < V; v++) total[r][v] = more ? load(to + r * ldc + v * N) : vec<float>{};
        const X* values = a.data + row * a.row;
        const word* from = b + column;
        for (int64_t k = 0; k < words; k++, values += a.step, from += ldb) {
            vec<word> line[V];
#pragma GCC unroll 4
            for (int v = 0; v < V; v++) line[v] = in_register(load(from + v * N));
#pragma GCC unroll 8
            for (int r = 0; r < R; r++) {
                const vec<word> value = in_register(all<word>(word_at(values + r * a.row)));
#pragma GCC unroll 4
                for (int v = 0; v < V; v++) total[r][v] = add_products<X>(total[r][v], value, line[v]);
            }
        }
#pragma GCC unroll 8
        for (int r = 0; r < R; r++)
#pragma GCC unroll 4
            for (int v = 0; v < V; v++) store(to + r * ldc + v * N, total[r][v]);
    }
    // As many rows at a time as there are registers for, then fewer.
    template <int R, int V> void rows(int64_t row, int64_t m, int64_t column) const {
        for (; row + R <= m; row += R) tile<R, V>(row, column);
        if constexpr (R > 1) rows<R == 6 ? 4 : R / 2, V>(row, m, column);
    }
    template <int V> void columns(int64_t m, int64_t n, int64_t column) const {
        for (; column + V * N <= n; column += V * N) rows<(ROOM / V < 8 ? ROOM / V : 8), V>(0, m, column);
        if constexpr (V > 1) columns<V / 2>(m, n, column);
    }
};

// n is a multiple of 16.
template <class X>
inline void product(
    int64_t m, int64_t n, int64_t words, Operand<X> a, const word* b, int64_t ldb, float* c, int64_t ldc, bool more
) {
    Product<X>{words, a, b, ldb, c, ldc, more}.template columns<(ROOM < 24 ? 1 : 4)>(m, n, 0);
}

// Some lines of one head of one row: line i at data + i * step, in numbers (for pairs, both are even).
template <class X> struct Lines {
    const X* data;
    int64_t step;

    const X* line(int64_t i) const { return data + i * step; }
    Operand<X> operand(int64_t first) const { return {line(first), step, PER<X>}; }
};

// B with head_dim as inner axis: [dim / PER][wide], transposed by words; zero beyond `count`.
template <class X>
inline void pack_across(Lines<X> from, int64_t first, int64_t count, int64_t dim, int64_t wide, word* to) {
    const int64_t words = dim / PER<X>;
    for (int64_t k = 0; k < words; k++)
        for (int64_t i = count; i < wide; i++) to[k * wide + i] = 0;
    for (int64_t i = 0; i < count; i++) {
        const X* line = from.line(first + i);
        for (int64_t k = 0; k < words; k++) to[k * wide + i] = word_at(line + k * PER<X>);
    }
}

// B with lines as inner axis: [wide / PER][dim]; zero beyond `count`.
template <class X>
inline void pack_along(Lines<X> from, int64_t first, int64_t count, int64_t dim, int64_t wide, word* to) {
    for (int64_t i = 0; i < wide; i += PER<X>)
        for (int64_t d = 0; d < dim; d += N) {
            vec<word> words = {};
            for (int j = 0; j < PER<X>; j++) {
                if (i + j >= count) continue;
                const X* at = from.line(first + i + j) + d;
                if constexpr (PER<X> == 1)
                    words = as<word>(load(at));
                else
                    words = words | load_halves<64>(&at->bits) << 16 * j;
            }
            store(to + i / PER<X> * dim + d, words);
        }
}

}  // namespace bytelm
