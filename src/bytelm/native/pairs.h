// Products in bfloat16, two neighbours at a time: what AVX-512 multiplies and adds in one instruction.
//
//     C [m][n]  =  or  +=  sum over pairs k of  A[m][2k] B[2k][n] + A[m][2k+1] B[2k+1][n]          in float32
//
// A pair of A is one word, which is broadcast: any two strides will do, so that a matrix is read as it lies or across.
// A pair of B is one word too, its lines laid beside each other: [k / 2][n][2].

#pragma once
#include "matrix.h"

#if defined(__AVX512BF16__) && defined(__AVX512BW__)
#define BYTELM_PAIRS 1

namespace bytelm {

typedef uint32_t word;  // two neighbours, the first one in the lower half
constexpr int N = 16;   // words, or floats, in a vector

struct Operand {  // A, as words
    const word* data;
    int64_t row, pair;
};

template <int R, int V>
inline void pairs_tile(Operand a, const word* b, int64_t ldb, int64_t pairs, float* c, int64_t ldc, bool more) {
    __m512 total[R][V];
#pragma GCC unroll 8
    for (int r = 0; r < R; r++)
#pragma GCC unroll 4
        for (int v = 0; v < V; v++) total[r][v] = more ? _mm512_loadu_ps(c + r * ldc + v * N) : _mm512_setzero_ps();
    for (int64_t k = 0; k < pairs; k++, b += ldb) {
        __m512i line[V];
#pragma GCC unroll 4
        for (int v = 0; v < V; v++) line[v] = _mm512_loadu_si512(b + v * N);
#pragma GCC unroll 8
        for (int r = 0; r < R; r++) {
            const __m512bh pair = (__m512bh)_mm512_set1_epi32(int(a.data[r * a.row + k * a.pair]));
#pragma GCC unroll 4
            for (int v = 0; v < V; v++) total[r][v] = _mm512_dpbf16_ps(total[r][v], pair, (__m512bh)line[v]);
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; r++)
#pragma GCC unroll 4
        for (int v = 0; v < V; v++) _mm512_storeu_ps(c + r * ldc + v * N, total[r][v]);
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

// Sixteen numbers, rounded to nearest, ties to even.
inline __m256i rounded(vec<float> x) { return (__m256i)_mm512_cvtneps_pbh((__m512)x); }
inline void store(bf16* at, vec<float> x) { _mm256_storeu_si256((__m256i*)at, rounded(x)); }
inline __m512i beside(__m256i first, __m256i second) {  // pairs of two lines
    return _mm512_or_si512(_mm512_cvtepu16_epi32(first), _mm512_slli_epi32(_mm512_cvtepu16_epi32(second), 16));
}
inline __m512i beside(vec<float> first, vec<float> second) { return beside(rounded(first), rounded(second)); }

// Some lines of one head of one row: line i at data + i * step, in elements (both even).
struct Lines {
    const bf16* data;
    int64_t step;

    const bf16* line(int64_t i) const { return data + i * step; }
    Operand operand(int64_t first) const { return {(const word*)line(first), step / 2, 1}; }
};

// B whose inner axis is that of the head: [dim / 2][wide], word by word across; what is beyond `count` is zero.
inline void pack_across(Lines from, int64_t first, int64_t count, int64_t dim, int64_t wide, word* to) {
    for (int64_t k = 0; k < dim / 2; k++)
        for (int64_t i = count; i < wide; i++) to[k * wide + i] = 0;
    for (int64_t i = 0; i < count; i++) {
        const word* line = (const word*)from.line(first + i);
        for (int64_t k = 0; k < dim / 2; k++) to[k * wide + i] = line[k];
    }
}

// B whose inner axis is that of the lines: [wide / 2][dim], two lines beside each other; beyond `count` is zero.
inline void pack_along(Lines from, int64_t first, int64_t count, int64_t dim, int64_t wide, word* to) {
    const __m256i none = _mm256_setzero_si256();
    for (int64_t i = 0; i < wide; i += 2)
        for (int64_t d = 0; d < dim; d += N) {
            const __m256i even = i < count ? _mm256_loadu_si256((const __m256i*)(from.line(first + i) + d)) : none;
            const __m256i odd =
                i + 1 < count ? _mm256_loadu_si256((const __m256i*)(from.line(first + i + 1) + d)) : none;
            _mm512_storeu_si512(to + i / 2 * dim + d, beside(even, odd));
        }
}

}  // namespace bytelm

#endif
