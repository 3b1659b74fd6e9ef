// A stack of pre-norm Transformer blocks over new positions of any rows, in one call: RMSNorm, rotary attention, SwiGLU
// (bytelm.nn.transformer), optionally with a cross-attention to the parts of one patch before each block (nn.cross).

#pragma once
#include "attention.h"

namespace bytelm {

struct Layer {
    const void* attention_norm;
    Matrix qkv, out;
    const void* feed_forward_norm;
    Matrix gate_up, down;
    void *keys, *values;
    void* kept;  // the layer's output, [row][kept slots][dim], for pooling; or null
    const void* query_norm;
    Matrix query, cross_out;
    const void* key_norm;
    Matrix key_value;
    void* parts;  // keys, then values of the parts of a patch, [row][patches][parts][2 dim]
};

struct Stack {
    int64_t layers, dim, hidden, kind;  // kind: of the caches
    Heads shape;
    double eps;
    int64_t kept_slots, cross_heads, cross_parts, cross_slots;
    const Layer* layer;
};

template <class A, class C> struct Pass {
    const Stack& stack;
    const Tokens& tokens;
    A* const x;
    const int threads, thread;
    const Attention<A, C> attention;
    const int64_t n, dim, *runs, run_count;
    A *mixed, *wide, *turned;  // shared by threads

    void wait() const {
        if (threads > 1) {
#if defined(_OPENMP)
#pragma omp barrier
#endif
        }
    }
    Share share(int64_t count, int64_t group) const { return Share(count, group, thread, threads); }

    A* lines(const void* weight) const {
        A* out = scratch<A>(1, n * dim);
        normed<A>(x, n, dim, (const A*)weight, A(stack.eps), out);
        return out;
    }

    void linear(const Matrix& m, const A* from, int64_t stride, A* to) const {
        const Share mine = share(m.out, ROWS);
        product<A>(m, mine.first, mine.last, from, stride, n, Put<A>{to, m.out});
    }

    void residual(const Matrix& m, const A* from, int64_t stride, A times) const {
        const Share mine = share(m.out, ROWS);
        auto add = [&](int64_t row, int rows, int64_t c, const A* values) {
            A* at = x + c * dim + row;
            for (int r = 0; r < rows; r++) at[r] = times * at[r] + values[r];
        };
        product<A>(m, mine.first, mine.last, from, stride, n, add);
    }

    void heads(const Layer& layer) const {
        const int64_t size = stack.shape.head_dim, half = size / 2, heads = stack.shape.heads;
        const Share mine = share(run_count * heads, 1);
        A* query = scratch<A>(2, size + n * size);
        for (int64_t item = mine.first; item < mine.last; item++) {
            const int64_t run = item / heads, head = item % heads, first = runs[run], last = runs[run + 1];
            A* key = query + n * size;
            for (int64_t t = first; t < last; t++) {
                const A *from = wide + t * 3 * dim + head * size, *cosines = turned + t * size;
                attention.rotate(from, cosines, cosines + half, 1 / A(__builtin_sqrt(double(size))), query + t * size);
                attention.rotate(from + dim, cosines, cosines + half, A(1), key);
                attention.keep((C*)layer.keys, (C*)layer.values, tokens.row[t], head, tokens.position[t], key,
                               from + 2 * dim);
            }
            for (int64_t t = first; t < last; t++) {
                int64_t since = tokens.start[t];
                const int64_t position = tokens.position[t], window = stack.shape.window;
                if (window && position - window + 1 > since) since = position - window + 1;
                attention.mix(query + t * size, (C*)layer.keys, (C*)layer.values, tokens.row[t], head, since, position,
                              mixed + t * dim + head * size);
            }
        }
    }

    // Rows of gate and up projection are interleaved, ROWS of each, so that the gate is applied immediately.
    void feed_forward(const Layer& layer) const {
        const int64_t wider = stack.hidden;  // of one of the two, complete groups
        const A* from = lines(layer.feed_forward_norm);
        const Share mine = share(2 * wider, 2 * ROWS);
        auto set = [&](int64_t row, int, int64_t c, const A* values) {
            const int64_t group = row / (2 * ROWS), half = row / ROWS % 2;
            memcpy(wide + (2 * c + half) * wider + group * ROWS, values, ROWS * sizeof(A));
        };
        for (int64_t r = mine.first; r < mine.last; r += 64) {
            const int64_t end = r + 64 < mine.last ? r + 64 : mine.last;
            product<A>(layer.gate_up, r, end, from, dim, n, set);
            for (int64_t c = 0; c < n; c++) open_gate(wide + 2 * c * wider + r / 2, wider, (end - r) / 2);
        }
        wait();
        residual(layer.down, wide, 2 * wider, A(1));
    }

    // gate := gate * sigmoid(gate) * up, `count` of them.
    static void open_gate(A* gate, int64_t up, int64_t count) {
        constexpr int L = LANES<A>;
        for (int64_t i = 0; i < count; i += L) {
            const int64_t some = count - i < L ? count - i : L;
            const vec<A> x = load_some(gate + i, some), none = {};
            const vec<A> e = exponential(x < none ? x : -x), y = load_some(gate + i + up, some);
            const vec<A> open = (x < none ? e : none + A(1)) / (e + A(1)) * x * y;
            memcpy(gate + i, &open, some * sizeof(A));
        }
    }

    void cross(const Layer& layer) const {
        linear(layer.query, lines(layer.query_norm), dim, wide);
        wait();
        const int64_t parts = stack.cross_parts, heads = stack.cross_heads, size = dim / heads;
        const Share mine = share(n * heads, 1);
        A* weights = scratch<A>(0, parts);
        for (int64_t item = mine.first; item < mine.last; item++) {
            const int64_t t = item / heads, at = item % heads * size;
            const int64_t patch = tokens.row[t] * stack.cross_slots + tokens.patch[t] % stack.cross_slots;
            const A *keys = (const A*)layer.parts + patch * parts * 2 * dim + at, *query = wide + t * dim + at;
            mix_few(query, keys, keys + dim, 2 * dim, parts, size, weights, mixed + t * dim + at);
        }
        wait();
        residual(layer.cross_out, mixed, dim, A(2));  // the published models add the residual twice
        wait();
    }

    void keep(const Layer& layer) const {
        const Share mine = share(n, 1);
        for (int64_t t = mine.first; t < mine.last; t++) {
            const int64_t slot = tokens.row[t] * stack.kept_slots + tokens.position[t] % stack.kept_slots;
            memcpy((A*)layer.kept + slot * dim, x + t * dim, dim * sizeof(A));
        }
    }

    void run() const {
        const int64_t size = stack.shape.head_dim;
        const Share mine = share(n, 1);
        for (int64_t t = mine.first; t < mine.last; t++)
            attention.angles(tokens.position[t], turned + t * size, turned + t * size + size / 2);
        for (int64_t index = 0; index < stack.layers; index++) {
            const Layer& layer = stack.layer[index];
            if (layer.parts) cross(layer);
            linear(layer.qkv, lines(layer.attention_norm), dim, wide);
            wait();
            heads(layer);
            wait();
            residual(layer.out, mixed, dim, A(1));
            wait();
            feed_forward(layer);
            wait();
            if (layer.kept) keep(layer);
        }
    }
};

template <class A, class C> void run_stack(const Stack& stack, const Tokens& tokens, A* x, int threads) {
    const int64_t n = tokens.count, dim = stack.dim;
    thread_local std::vector<int64_t> runs;
    runs.clear();
    for (int64_t t = 0; t < n; t++)
        if (!t || tokens.row[t] != tokens.row[t - 1]) runs.push_back(t);
    const int64_t count = int64_t(runs.size());
    runs.push_back(n);
    const int64_t wider = 3 * dim > 2 * stack.hidden ? 3 * dim : 2 * stack.hidden;
    A *mixed = scratch<A>(3, n * dim), *wide = scratch<A>(4, n * wider), *turned = scratch<A>(5, n * stack.shape.head_dim);
    const int64_t* begins = runs.data();
    const int team = n * (4 * dim * dim + 3 * dim * stack.hidden) < ALONE ? 1 : threads;
#if defined(_OPENMP)
#pragma omp parallel num_threads(team) if (team > 1)
#endif
    {
        Pass<A, C> pass{stack, tokens, x, team > 1 ? thread_count() : 1, team > 1 ? thread_number() : 0,
                        Attention<A, C>(stack.shape), n, dim, begins, count, mixed, wide, turned};
        pass.run();
    }
}

}  // namespace bytelm
