// The number formats of weights, and the matrix product.
//
// Every element of a product is one chain of sums over the inner axis, from its first to its last index, whatever is
// multiplied beside it. So results are bitwise identical alone, in a batch, in a chunk of a prompt or in a draft, and
// with any number of threads.

#pragma once
#include <vector>

#include "threads.h"
#include "vector.h"

namespace bytelm {

enum Kind { F64 = 0, F32 = 1, BF16 = 2, I8 = 3 };

// `in` columns, `out` rows. Tables are row-major. Matrices are packed in the order in which they are read,
// [out / PANEL][in][PANEL], padded with zeros. scale: per row, for I8 only.
struct Matrix {
    const void* data;
    const float* scale;
    int64_t out, in, kind, streamed;  // streamed: the model's weights exceed the processor's caches
};

constexpr int PANEL = 32;           // rows of a matrix that are stored together
constexpr int GROUP = 2 * PANEL;    // rows that are multiplied together
constexpr int AHEAD = 4096;         // prefetch distance of a streamed matrix, in bytes

// Accumulators, in vectors, that fit into registers beside a line of the matrix and one number.
#if defined(BYTELM_AVX512)
constexpr int ROOM = 24;
#elif defined(__x86_64__) && !defined(BYTELM_AVX2)
constexpr int ROOM = 2;
#else
constexpr int ROOM = 6;
#endif
constexpr int MOST = ROOM < 6 ? ROOM : 6;  // rows of the other operand that are multiplied together
constexpr int across_of(int rows) { return ROOM / rows >= 4 ? 4 : ROOM / rows >= 2 ? 2 : 1; }  // divides a group

enum Prefetch { NOTHING, NEAR, FAR };  // into the nearest cache, or into the one beyond

// total[c][v] += the sum over k < count of x[c][k] times line k of a matrix, `step` apart, of which vectors 0 to PER - 1
// are adjacent and those from PER on are `panel` further. What lies `ahead` bytes further is prefetched.
template <int C, int V, int PER, Prefetch FETCH = NOTHING, class W, class A>
BYTELM_INLINE void tile(
    const W* w, int64_t step, int64_t panel, const A* x, int64_t stride, int64_t count, vec<A> (&total)[C][V],
    int64_t ahead = AHEAD
) {
    constexpr int L = LANES<A>;
    for (int64_t k = 0; k < count; k++, w += step) {
        auto at = [&](int v) { return w + v / PER * panel + v % PER * L; };
        if (FETCH != NOTHING)
#pragma GCC unroll 8
            for (int v = 0; v < V; v++) __builtin_prefetch((const char*)at(v) + ahead, 0, FETCH == NEAR ? 0 : 2);
        if constexpr (C == 1) {  // nothing is read twice
            const vec<A> value = in_register(all<A>(x[k]));
#pragma GCC unroll 8
            for (int v = 0; v < V; v++) total[0][v] = fma(load(at(v)), value, total[0][v]);
        } else {
            vec<A> line[V];
#pragma GCC unroll 8
            for (int v = 0; v < V; v++) line[v] = in_register(load(at(v)));
#pragma GCC unroll 8
            for (int c = 0; c < C; c++) {
                const vec<A> value = in_register(all<A>(x[c * stride + k]));
#pragma GCC unroll 8
                for (int v = 0; v < V; v++) total[c][v] = fma(line[v], value, total[c][v]);
            }
        }
    }
}

// Up to GROUP rows of the matrix from `first` on times C lines; `put(first, rows, line, values)` takes the results.
template <int C, class W, class A, class Put>
inline void group_times(const Matrix& m, int64_t first, int64_t rows, const A* x, int64_t stride, int64_t line, Put put) {
    constexpr int L = LANES<A>, PER = PANEL / L;
    A found[C][GROUP];
    const W* w = (const W*)m.data + first * m.in;
    const int64_t panel = m.in * PANEL;
    auto vectors = [&](auto count, auto fetch, int begin) {
        constexpr int V = decltype(count)::value;
        vec<A> total[C][V] = {};
        tile<C, V, PER, decltype(fetch)::value>(
            w + begin / PER * panel + begin % PER * L, PANEL, panel, x + line * stride, stride, m.in, total,
            C <= 2 ? AHEAD : GROUP / PANEL * panel * int64_t(sizeof(W)));
#pragma GCC unroll 8
        for (int c = 0; c < C; c++)
#pragma GCC unroll 8
            for (int v = 0; v < V; v++) store(found[c] + (begin + v) * L, total[c][v]);
    };
    constexpr int MANY = across_of(C), FEW = MANY < PER ? MANY : PER;
    constexpr auto nothing = std::integral_constant<Prefetch, NOTHING>();
    // Fewer lines wait for memory, more of them for the next group, while this one is multiplied.
    constexpr auto wanted = std::integral_constant<Prefetch, (C <= 2 ? NEAR : FAR)>();
    const bool fetches = C <= 2 ? m.streamed : line == 0;
    const int all = int((rows + PANEL - 1) / PANEL) * PER;
    int begin = 0;
    for (; begin + MANY <= all; begin += MANY) {
        if (fetches)
            vectors(std::integral_constant<int, MANY>(), wanted, begin);
        else
            vectors(std::integral_constant<int, MANY>(), nothing, begin);
    }
    for (; begin < all; begin += FEW) vectors(std::integral_constant<int, FEW>(), nothing, begin);
    for (int c = 0; c < C; c++) {
        if (m.scale)
            for (int r = 0; r < rows; r++) found[c][r] *= A(m.scale[first + r]);
        put(first, rows, line + c, found[c]);
    }
}

// Lines [begin, end), as many at a time as there are registers for.
template <class W, class A, class Put>
inline void group_rows(
    const Matrix& m, int64_t first, int64_t rows, const A* x, int64_t stride, int64_t begin, int64_t end, Put put
) {
    while (begin < end) {
        const int64_t left = end - begin;
#if defined(BYTELM_AVX512)
        if (left == 8) {
            group_times<8, W>(m, first, rows, x, stride, begin, put);
            begin += 8;
            continue;
        }
#endif
        if constexpr (MOST >= 6)
            if (left >= 6 && left != 8) {
                group_times<6, W>(m, first, rows, x, stride, begin, put);
                begin += 6;
                continue;
            }
        if constexpr (MOST >= 4)
            if (left >= 4) {
                group_times<4, W>(m, first, rows, x, stride, begin, put);
                begin += 4;
                continue;
            }
        if (left >= 2) {
            group_times<2, W>(m, first, rows, x, stride, begin, put);
            begin += 2;
        } else {
            group_times<1, W>(m, first, rows, x, stride, begin, put);
            begin++;
        }
    }
}

// The share of one of `team` threads in `count` items.
struct Share {
    int64_t first, last;
    Share(int64_t count, int thread, int team) : first(count * thread / team), last(count * (thread + 1) / team) {}
};

// One thread of a team that shares the work on some lines.
struct Member {
    const int thread, team;
    Barrier* const barrier;

    static constexpr int64_t BLOCK = 96;  // lines of a share: a multiple of any number that is multiplied together

    void wait() const { barrier->wait(team); }
    Share share(int64_t count) const { return Share(count, thread, team); }

    // n lines of x, `stride` apart, times the matrix: `put(first, rows, line, values)` for every line and some rows of the
    // matrix. `whole`: those of both panels of a group together.
    template <class A, class Put>
    void product(const Matrix& m, const A* x, int64_t stride, int64_t n, Put put, bool whole = false) const {
        if constexpr (sizeof(A) == 8) {
            blocks<double>(m, x, stride, n, put, whole);
        } else if (m.kind == F32) {
            blocks<float>(m, x, stride, n, put, whole);
        } else if (m.kind == BF16) {
            blocks<bf16>(m, x, stride, n, put, whole);
        } else {
            blocks<int8_t>(m, x, stride, n, put, whole);
        }
    }

    template <class W, class A, class Put>
    void blocks(const Matrix& m, const A* x, int64_t stride, int64_t n, Put put, bool whole) const {
        const int64_t lines = team > 1 ? (n + BLOCK - 1) / BLOCK : 1, size = whole || lines > 1 ? GROUP : PANEL;
        const int64_t items = (m.out + size - 1) / size;
        const Share mine = share(items * lines);
        for (int64_t item = mine.first, next; item < mine.last; item = next) {
            const int64_t block = item / items, end = items * (block + 1);
            next = end < mine.last ? end : mine.last;
            const int64_t begin = block * BLOCK, stop = lines == 1 || begin + BLOCK > n ? n : begin + BLOCK;
            const int64_t last = (next - block * items) * size < m.out ? (next - block * items) * size : m.out;
            for (int64_t row = (item - block * items) * size; row < last; row += GROUP)
                group_rows<W>(m, row, last - row < GROUP ? last - row : GROUP, x, stride, begin, stop, put);
        }
    }
};

// each(member) on every thread of a team of up to `threads`, for so many products of a weight and a number.
template <class Each> inline void shared(int threads, int64_t products, Each each) {
    constexpr int64_t ALONE = 1 << 17;  // below this, synchronizing threads costs more than the work
    Barrier barrier;
    parallel(products < ALONE ? 1 : threads, [&](int thread, int team) { each(Member{thread, team, &barrier}); });
}

// Stores elements to `to` [n][out].
template <class A> struct Put {
    A* to;
    int64_t out;

    void operator()(int64_t first, int64_t rows, int64_t line, const A* values) const {
        memcpy(to + line * out + first, values, rows * sizeof(A));
    }
};

// The dot product of two lines.
template <class A> inline A dot(const A* x, const A* y, int64_t count) {
    constexpr int L = LANES<A>;
    vec<A> total = {};
    int64_t i = 0;
    for (; i + L <= count; i += L) total = fma(load(x + i), load(y + i), total);
    if (i < count) total = fma(load_some(x + i, count - i), load_some(y + i, count - i), total);
    return sum<A>(total);
}

// The dot product of each of n lines of x with that of y.
template <class A> inline void dots(const A* x, const A* y, int64_t n, int64_t dim, A* out) {
    for (int64_t t = 0; t < n; t++) out[t] = dot(x + t * dim, y + t * dim, dim);
}

// x / rms(x) * weight, lines [first, last) of `dim`.
template <class A> inline void normed(const A* x, Share lines, int64_t dim, const A* weight, A eps, A* out) {
    for (int64_t t = lines.first; t < lines.last; t++) {
        const A *from = x + t * dim, factor = 1 / A(std::sqrt(dot(from, from, dim) / A(dim) + eps));
        A* to = out + t * dim;
        for (int64_t i = 0; i < dim; i++) to[i] = from[i] * factor * weight[i];
    }
}

// Workspace of a thread, which only grows.
template <class A> inline A* scratch(int slot, size_t size) {
    thread_local std::vector<A> held[8];
    if (held[slot].size() < size) held[slot].resize(size);
    return held[slot].data();
}

}  // namespace bytelm
