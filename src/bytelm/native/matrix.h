// Vectors, the number formats of weights, and the matrix product.
//
// Every element of a product is one chain of sums over the inner axis, vector by vector, in an order that does not
// depend on the number of rows. So results are bitwise identical alone, in a batch, in a chunk of a prompt or in a
// draft, and with any number of threads.

#pragma once
#include <cstdint>
#include <cstring>
#include <utility>
#include <vector>

#if defined(__AVX512F__)
#include <immintrin.h>
#endif
#if defined(_OPENMP)
#include <omp.h>
#endif

namespace bytelm {

enum Kind { F64 = 0, F32 = 1, BF16 = 2, I8 = 3 };

// `in` columns, `out` rows. Tables are row-major. Matrices are packed in the order in which they are read, [out / 4]
// [in / L][4][L], padded with zeros: one long stream is twice as fast as four short ones. scale: per row, for I8 only.
struct Matrix {
    const void* data;
    const float* scale;
    int64_t out, in, kind, streamed;  // streamed: the model's weights exceed the processor's caches
};

constexpr int AHEAD = 4096;  // prefetch distance of a streamed matrix, in bytes

constexpr int ROWS = 4;  // that are interleaved

template <class A> struct Vector;
template <> struct Vector<float> { typedef float type __attribute__((vector_size(64))); };
template <> struct Vector<double> { typedef double type __attribute__((vector_size(64))); };
template <class A> using vec = typename Vector<A>::type;
template <class A> constexpr int LANES = 64 / int(sizeof(A));

typedef uint16_t halves __attribute__((vector_size(32)));
typedef int32_t integers __attribute__((vector_size(64)));
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
#if defined(__AVX512F__)  // compilers take such a conversion apart
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)at)));
#endif
    bytes16 x;
    memcpy(&x, at, sizeof x);
    return __builtin_convertvector(__builtin_convertvector(x, integers), vec<float>);
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
    const uint32_t up = bits + 0x7FFF + ((bits >> 16) & 1);
    at->bits = uint16_t((x == x ? up : bits | 0x400000) >> 16);  // adding would make a NaN a number
}

// The last, incomplete vector of a line, padded with zeros.
template <class A> __attribute__((noinline)) vec<A> load_part(const A* at, int64_t count) {
    vec<A> x = {};
    for (int64_t i = 0; i < count; i++) x[i] = at[i];
    return x;
}
template <class A> inline vec<A> load_some(const A* at, int64_t count) {
    return count == LANES<A> ? load(at) : load_part(at, count);
}

// One step of horizontal sums: a and b, each of `Width * 2` lanes per number, to `Width` lanes each.
template <int Width, size_t... I> inline vec<float> fold(vec<float> a, vec<float> b, std::index_sequence<I...>) {
    return __builtin_shufflevector(a, b, int(I / Width * 2 * Width + I % Width)...) +
           __builtin_shufflevector(a, b, int(I / Width * 2 * Width + I % Width + Width)...);
}
template <int Width, size_t... I> inline vec<double> fold(vec<double> a, vec<double> b, std::index_sequence<I...>) {
    return __builtin_shufflevector(a, b, int(I / Width * 2 * Width + I % Width)...) +
           __builtin_shufflevector(a, b, int(I / Width * 2 * Width + I % Width + Width)...);
}

// The sums of the lanes of N vectors, in lanes 0..N-1 (N a power of two, at most L), in an order independent of N.
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

// Prevents compilers from reloading a value from memory for every use.
template <class V> inline V in_register(V x) {
#if defined(__AVX512F__)
    asm("" : "+v"(x));
#endif
    return x;
}

enum Ahead { NOTHING, NEXT_GROUP, STREAM };  // what is prefetched

// ROWS interleaved rows of the matrix times C vectors: `out` [C][ROWS].
template <int C, Ahead Wanted, class W, class A>
inline void tile(const W* w, const A* x, int64_t stride, int64_t in, A* out) {
    constexpr int L = LANES<A>, R = ROWS;
    vec<A> total[C * R], weights[R];
#pragma GCC unroll 32
    for (int n = 0; n < C * R; n++) total[n] = vec<A>{};
    int64_t i = 0;
    const int64_t next = (in + L - 1) / L * L * R;  // prefetch the next group
    for (; i + L <= in; i += L, w += R * L) {
        if (Wanted == NEXT_GROUP)
#pragma GCC unroll 32
            for (int b = 0; b < R * L * int(sizeof(W)); b += 64) __builtin_prefetch((const char*)(w + next) + b, 0, 2);
        if (Wanted == STREAM)
#pragma GCC unroll 32
            for (int b = 0; b < R * L * int(sizeof(W)); b += 64) __builtin_prefetch((const char*)w + b + AHEAD, 0, 0);
#pragma GCC unroll 32
        for (int r = 0; r < R; r++) weights[r] = in_register(load(w + r * L));
#pragma GCC unroll 32
        for (int c = 0; c < C; c++) {
            const vec<A> value = in_register(load(x + c * stride + i));
#pragma GCC unroll 32
            for (int r = 0; r < R; r++) total[c * R + r] += weights[r] * value;
        }
    }
    if (i < in) {
#pragma GCC unroll 32
        for (int r = 0; r < R; r++) weights[r] = load(w + r * L);
#pragma GCC unroll 32
        for (int c = 0; c < C; c++) {
            const vec<A> value = load_part(x + c * stride + i, in - i);
#pragma GCC unroll 32
            for (int r = 0; r < R; r++) total[c * R + r] += weights[r] * value;
        }
    }
#pragma GCC unroll 32
    for (int c = 0; c < C; c++) {
        const vec<A> sums = folded<R, L / 2, A>(total + c * R);
        memcpy(out + c * R, &sums, R * sizeof(A));
    }
}

// The dot product of two lines.
template <class A> inline A dot(const A* x, const A* y, int64_t count) {
    constexpr int L = LANES<A>;
    vec<A> total = {};
    int64_t i = 0;
    for (; i + L <= count; i += L) total += load(x + i) * load(y + i);
    if (i < count) total += load_part(x + i, count - i) * load_part(y + i, count - i);
    return sum<A>(total);
}

// Rows from `first` on times vectors from `begin` on, C at a time; `put(row, rows, n, values)` stores a group.
template <int C, class W, class A, class Put>
inline int64_t rows_times(
    const Matrix& m, int64_t first, const A* x, int64_t stride, int64_t begin, int64_t end, Put put
) {
    constexpr int L = LANES<A>;
    const W* w = (const W*)m.data + first * ((m.in + L - 1) / L * L);
    const int rows = m.out - first < ROWS ? int(m.out - first) : ROWS;
    for (; begin + C <= end; begin += C) {
        A found[C * ROWS];
        const A* from = x + begin * stride;
        if (C > 2 && !begin)  // not again for further vectors
            tile<C, NEXT_GROUP>(w, from, stride, m.in, found);
        else if (C <= 2 && m.streamed)
            tile<C, STREAM>(w, from, stride, m.in, found);
        else
            tile<C, NOTHING>(w, from, stride, m.in, found);
        if (m.scale)
            for (int c = 0; c < C; c++)
                for (int r = 0; r < ROWS; r++) found[c * ROWS + r] *= A(m.scale[first + r]);
        for (int c = 0; c < C; c++) put(first, rows, begin + c, found + c * ROWS);
    }
    return begin;
}

// Rows [first, last) of the matrix, from the start of a group, times n vectors.
template <class W, class A, class Put>
inline void some_rows(const Matrix& m, int64_t first, int64_t last, const A* x, int64_t stride, int64_t n, Put put) {
    for (int64_t row = first; row < last; row += ROWS) {
        int64_t done = 0;
#if defined(__AVX512F__)  // elsewhere so many accumulators do not fit into registers
        done = rows_times<4, W>(m, row, x, stride, done, n, put);
        done = rows_times<2, W>(m, row, x, stride, done, n, put);
#endif
        rows_times<1, W>(m, row, x, stride, done, n, put);
    }
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
        if (i < dim) squares += load_some(x + i, dim - i) * load_some(x + i, dim - i);
        const A factor = 1 / __builtin_sqrt(sum<A>(squares) / A(dim) + eps);
        for (i = 0; i < dim; i++) out[i] = x[i] * factor * weight[i];
    }
}

// Workspace of a thread, which only grows.
template <class A> inline A* scratch(int slot, size_t size) {
    thread_local std::vector<A> held[6];
    if (held[slot].size() < size) held[slot].resize(size);
    return held[slot].data();
}

// The share of one of `threads` in `count` items, in complete groups.
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

// Stores elements to `to` [n][out].
template <class A> struct Put {
    A* to;
    int64_t out;

    void operator()(int64_t row, int rows, int64_t c, const A* values) const {
        A* at = to + c * out + row;
        if (rows == ROWS)
            memcpy(at, values, ROWS * sizeof(A));
        else
            for (int r = 0; r < rows; r++) at[r] = values[r];
    }
};

// Synchronising threads costs more than a small product: below this many weights a single thread is used.
constexpr int64_t ALONE = 1 << 17;

}  // namespace bytelm
