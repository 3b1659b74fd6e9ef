// Vectors, the number formats of weights, and the one matrix product that everything here is made of.
//
// Every element of a product is one chain of sums over the inner axis, vector by vector, whatever the number of rows
// that are multiplied together. So a position gives the same bits alone, in a batch, in a chunk of a prompt or among
// bytes that were guessed, and with any number of threads.

#pragma once
#include <cstdint>
#include <cstring>
#include <utility>
#include <vector>

#if defined(_OPENMP)
#include <omp.h>
#endif

namespace bytelm {

enum Kind { F64 = 0, F32 = 1, BF16 = 2, I8 = 3 };

// `in` columns, `out` rows, row by row; scale: one number a row, for I8 alone.
struct Matrix {
    const void* data;
    const float* scale;
    int64_t out, in, kind;
};

template <class A> struct Vector;
template <> struct Vector<float> { typedef float type __attribute__((vector_size(64))); };
template <> struct Vector<double> { typedef double type __attribute__((vector_size(64))); };
template <class A> using vec = typename Vector<A>::type;
template <class A> constexpr int LANES = 64 / int(sizeof(A));

typedef uint16_t halves __attribute__((vector_size(32)));
typedef uint32_t words __attribute__((vector_size(64)));
typedef int8_t bytes16 __attribute__((vector_size(16)));

struct bf16 { uint16_t bits; };

template <class A> inline vec<A> load(const A* at) {
    vec<A> x;
    memcpy(&x, at, sizeof x);
    return x;
}
inline vec<float> load(const bf16* at) {
    halves x;
    memcpy(&x, at, sizeof x);
    return (vec<float>)(__builtin_convertvector(x, words) << 16);
}
inline vec<float> load(const int8_t* at) {
    bytes16 x;
    memcpy(&x, at, sizeof x);
    return __builtin_convertvector(x, vec<float>);
}
template <class A> inline void store(A* at, vec<A> x) { memcpy(at, &x, sizeof x); }

inline float widened(float x) { return x; }
inline double widened(double x) { return x; }
inline float widened(int8_t x) { return x; }
inline float widened(bf16 x) {
    uint32_t bits = uint32_t(x.bits) << 16;
    float y;
    memcpy(&y, &bits, 4);
    return y;
}
inline void narrow(float* at, float x) { *at = x; }
inline void narrow(double* at, double x) { *at = x; }
inline void narrow(bf16* at, float x) {  // to nearest, ties to even, as torch rounds
    uint32_t bits;
    memcpy(&bits, &x, 4);
    at->bits = uint16_t((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16);
}

// The last, incomplete vector of a line, filled up with zeros.
template <class A, class W> __attribute__((noinline)) vec<A> load_part(const W* at, int64_t count) {
    vec<A> x = {};
    for (int64_t i = 0; i < count; i++) x[i] = widened(at[i]);
    return x;
}
template <class A, class W> inline vec<A> load_some(const W* at, int64_t count) {
    return count == LANES<A> ? load(at) : load_part<A>(at, count);
}

// One step of folding lanes in half: from a and b, each in `Width * 2` lanes a number, the sums in `Width` lanes each.
template <int Width, size_t... I> inline vec<float> fold(vec<float> a, vec<float> b, std::index_sequence<I...>) {
    return __builtin_shufflevector(a, b, int(I / Width * 2 * Width + I % Width)...) +
           __builtin_shufflevector(a, b, int(I / Width * 2 * Width + I % Width + Width)...);
}
template <int Width, size_t... I> inline vec<double> fold(vec<double> a, vec<double> b, std::index_sequence<I...>) {
    return __builtin_shufflevector(a, b, int(I / Width * 2 * Width + I % Width)...) +
           __builtin_shufflevector(a, b, int(I / Width * 2 * Width + I % Width + Width)...);
}

// The sums of the lanes of N vectors, in the lanes 0..N-1 of one (N a power of two, at the most the lanes there are).
// Each is folded in half, and in half again, whatever N is.
template <int N, int Width, class A> inline vec<A> folded(const vec<A>* x) {
    constexpr auto lanes = std::make_index_sequence<LANES<A>>();
    if constexpr (Width == 0) {
        return x[0];
    } else if constexpr (N == 1) {
        const vec<A> half = fold<Width>(x[0], x[0], lanes);
        return folded<1, Width / 2, A>(&half);
    } else {
        vec<A> half[N / 2];
        for (int i = 0; i < N / 2; i++) half[i] = fold<Width>(x[2 * i], x[2 * i + 1], lanes);
        return folded<N / 2, Width / 2, A>(half);
    }
}
template <class A> inline A sum(vec<A> x) { return folded<1, LANES<A> / 2, A>(&x)[0]; }
template <class A> inline A highest(vec<A> x) {
    A top = x[0];
    for (int i = 1; i < LANES<A>; i++) top = x[i] > top ? x[i] : top;
    return top;
}

// Compilers read memory again for every use of what was loaded, unless they are told that it may have changed.
template <class V> inline V in_register(V x) {
#if defined(__AVX512F__)
    asm("" : "+v"(x));
#endif
    return x;
}

// R rows of the matrix times C vectors; rows may lie `apart` from one another.
template <int R, int C, class W, class A>
inline void tile(const W* w, int64_t apart, const A* x, int64_t stride, int64_t in, A* out) {
    constexpr int L = LANES<A>, N = R * C, G = N < L ? N : L;
    vec<A> total[N], weights[R];
#pragma GCC unroll 32
    for (int n = 0; n < N; n++) total[n] = vec<A>{};
    int64_t i = 0;
    for (; i + L <= in; i += L) {
#pragma GCC unroll 32
        for (int r = 0; r < R; r++) weights[r] = in_register(load(w + r * apart + i));
#pragma GCC unroll 32
        for (int c = 0; c < C; c++) {
            const vec<A> value = in_register(load(x + c * stride + i));
#pragma GCC unroll 32
            for (int r = 0; r < R; r++) total[c * R + r] += weights[r] * value;
        }
    }
    if (i < in) {
#pragma GCC unroll 32
        for (int r = 0; r < R; r++) weights[r] = load_some<A>(w + r * apart + i, in - i);
#pragma GCC unroll 32
        for (int c = 0; c < C; c++) {
            const vec<A> value = load_some<A>(x + c * stride + i, in - i);
#pragma GCC unroll 32
            for (int r = 0; r < R; r++) total[c * R + r] += weights[r] * value;
        }
    }
#pragma GCC unroll 32
    for (int n = 0; n < N; n += G) {
        const vec<A> sums = folded<G, L / 2, A>(total + n);
        memcpy(out + n, &sums, G * sizeof(A));
    }
}

// R rows from `first` on against vectors from `begin` on, C at a time; `put(row, n, value)` takes each element.
template <int R, int C, class W, class A, class Put>
inline int64_t rows_times(
    const Matrix& m, int64_t first, const A* x, int64_t stride, int64_t begin, int64_t end, Put put
) {
    const W* w = (const W*)m.data + first * m.in;
    for (; begin + C <= end; begin += C) {
        A found[R * C];
        tile<R, C>(w, m.in, x + begin * stride, stride, m.in, found);
        for (int c = 0; c < C; c++)
            for (int r = 0; r < R; r++) {
                const A value = found[c * R + r];
                put(first + r, begin + c, m.scale ? value * A(m.scale[first + r]) : value);
            }
    }
    return begin;
}

// Rows [first, last) of the matrix against n vectors.
template <class W, class A, class Put>
inline void some_rows(const Matrix& m, int64_t first, int64_t last, const A* x, int64_t stride, int64_t n, Put put) {
    int64_t row = first;
    for (; row + 4 <= last; row += 4) {
        int64_t done = rows_times<4, 4, W>(m, row, x, stride, 0, n, put);
        done = rows_times<4, 2, W>(m, row, x, stride, done, n, put);
        rows_times<4, 1, W>(m, row, x, stride, done, n, put);
    }
    for (; row < last; row++) rows_times<1, 1, W>(m, row, x, stride, 0, n, put);
}

template <class A, class Put>
inline void product(const Matrix& m, int64_t first, int64_t last, const A* x, int64_t stride, int64_t n, Put put) {
    if constexpr (sizeof(A) == 8) {
        some_rows<double>(m, first, last, x, stride, n, put);
    } else if (m.kind == F32) {
        some_rows<float>(m, first, last, x, stride, n, put);
    } else if (m.kind == BF16) {
        some_rows<bf16>(m, first, last, x, stride, n, put);
    } else {
        some_rows<int8_t>(m, first, last, x, stride, n, put);
    }
}

// x / rms(x) * weight, n lines of `dim`.
template <class A> inline void normed(const A* x, int64_t n, int64_t dim, const A* weight, A eps, A* out) {
    constexpr int L = LANES<A>;
    for (int64_t t = 0; t < n; t++, x += dim, out += dim) {
        vec<A> squares = {};
        int64_t i = 0;
        for (; i + L <= dim; i += L) squares += load(x + i) * load(x + i);
        if (i < dim) squares += load_some<A>(x + i, dim - i) * load_some<A>(x + i, dim - i);
        const A factor = 1 / __builtin_sqrt(sum<A>(squares) / A(dim) + eps);
        for (i = 0; i < dim; i++) out[i] = x[i] * factor * weight[i];
    }
}

// Memory that a thread needs meanwhile; it grows and stays.
template <class A> inline A* scratch(int slot, size_t size) {
    thread_local std::vector<A> held[6];
    if (held[slot].size() < size) held[slot].resize(size);
    return held[slot].data();
}

// The part of `count` items that falls to one of `threads`, in whole groups.
struct Share {
    int64_t first, last;
    Share(int64_t count, int64_t group, int thread, int threads) {
        const int64_t groups = (count + group - 1) / group;
        first = groups * thread / threads * group;
        last = groups * (thread + 1) / threads * group;
        if (last > count) last = count;
    }
};

inline int thread_number() {
#if defined(_OPENMP)
    return omp_get_thread_num();
#else
    return 0;
#endif
}
inline int thread_count() {
#if defined(_OPENMP)
    return omp_get_num_threads();
#else
    return 1;
#endif
}

// Two threads that wait for each other cost more than a small product: below this many weights one does it alone.
constexpr int64_t ALONE = 1 << 17;

}  // namespace bytelm
