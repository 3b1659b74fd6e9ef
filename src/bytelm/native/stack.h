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
    int64_t layers, dim, hidden, kind;  // hidden: whole panels; kind: of the caches
    Heads shape;
    double eps;
    int64_t kept_slots, cross_heads, cross_parts, cross_slots;
    const Layer* layer;
};

template <class A, class C> struct Pass {
    const Stack& stack;
    const Tokens& tokens;
    A* const x;
    const Member& me;
    const Attention<A, C> attention;
    const int64_t n, dim, *runs, run_count;  // n: lines of x that are computed
    A *mixed, *wide, *turned, *lined;  // shared by threads

    // Lines after a norm: by all threads together, or by each for itself where waiting costs more.
    const A* lines(const void* weight) const {
        const bool together = me.team > 1 && n >= 2 * me.team;
        A* out = together ? lined : scratch<A>(1, n * dim);
        normed<A>(x, together ? me.share(n) : Share(n, 0, 1), dim, (const A*)weight, A(stack.eps), out);
        if (together) me.wait();
        return out;
    }

    void linear(const Matrix& m, const A* from, A* to) const { me.product(m, from, m.in, n, Put<A>{to, m.out}); }

    void residual(const Matrix& m, const A* from, int64_t stride, A times) const {
        auto add = [&](int64_t first, int64_t rows, int64_t t, const A* values) {
            A* at = x + t * dim + first;
            for (int64_t r = 0; r < rows; r++) at[r] = times * at[r] + values[r];
        };
        me.product(m, from, stride, n, add);
    }

    // Rotate the query and the key of one head of a position, and keep key and value.
    void place(const Layer& layer, int64_t t, int64_t head) const {
        const int64_t size = stack.shape.head_dim;
        A *query = wide + t * 3 * dim + head * size, *key = query + dim;
        const A* angles = turned + t * size;
        attention.rotate(query, angles, 1 / A(std::sqrt(double(size))), query);
        attention.rotate(key, angles, A(1), key);
        attention.keep((C*)layer.keys, (C*)layer.values, tokens.row[t], head, tokens.position[t], key, query + 2 * dim);
    }

    int64_t since(int64_t t) const {
        const int64_t first = tokens.position[t] - stack.shape.window + 1;
        return stack.shape.window && first > tokens.start[t] ? first : tokens.start[t];
    }

    // Attention of one head for some positions of a row that follow each other.
    void mix(const Layer& layer, int64_t t, int64_t count, int64_t head) const {
        int64_t since[Attention<A, C>::QUERIES];
        for (int64_t q = 0; q < count; q++) since[q] = this->since(t + q);
        const int64_t at = head * stack.shape.head_dim;
        attention.mix(
            wide + t * 3 * dim + at, 3 * dim, (C*)layer.keys, (C*)layer.values, tokens.row[t], head, since,
            tokens.position[t], count, mixed + t * dim + at, dim);
    }

    // How many positions from t on, below `end`, follow each other: some of a row may be left out.
    int64_t adjacent(int64_t t, int64_t end) const {
        int64_t next = t + 1;
        while (next < end && tokens.position[next] == tokens.position[next - 1] + 1) next++;
        return next - t;
    }

    void heads(const Layer& layer, const uint8_t* wanted) const {
        const int64_t heads = stack.shape.heads;
        if (run_count == n) {  // nobody sees another's key
            const Share mine = me.share(n * heads);
            for (int64_t item = mine.first; item < mine.last; item++) {
                place(layer, item / heads, item % heads);
                if (!wanted || wanted[item / heads]) mix(layer, item / heads, 1, item % heads);
            }
            return;
        }
        const Share mine = me.share(n);
        for (int64_t t = mine.first; t < mine.last; t++)
            for (int64_t head = 0; head < heads; head++) place(layer, t, head);
        me.wait();
        int64_t item = 0;  // those with more to see come later: threads take them in turn
        for (int64_t run = 0; run < run_count; run++)
            for (int64_t t = runs[run], end = runs[run + 1], some; t < end; t += some) {
                some = wanted ? 1 : adjacent(t, std::min<int64_t>(end, t + Attention<A, C>::QUERIES));
                for (int64_t head = 0; head < heads && (!wanted || wanted[t]); head++)
                    if (item++ % me.team == me.thread) mix(layer, t, some, head);
            }
    }

    // Panels of the gate and of the up projection are stored in turn, so that the gate is applied immediately.
    void feed_forward(const Layer& layer) const {
        const A* from = lines(layer.feed_forward_norm);
        auto gated = [&](int64_t first, int64_t, int64_t t, const A* values) {
            open_gate(values, values + PANEL, wide + t * stack.hidden + first / 2);
        };
        me.product(layer.gate_up, from, dim, n, gated, true);
        me.wait();
        residual(layer.down, wide, stack.hidden, A(1));
    }

    // gate * sigmoid(gate) * up, of a panel.
    static void open_gate(const A* gate, const A* up, A* out) {
        for (int64_t i = 0; i < PANEL; i += LANES<A>) {
            const vec<A> x = load(gate + i), none = {};
            const vec<A> e = exponential(select(x < none, x, -x));
            store(out + i, select(x < none, e, none + A(1)) / (e + A(1)) * x * load(up + i));
        }
    }

    void cross(const Layer& layer) const {
        linear(layer.query, lines(layer.query_norm), wide);
        me.wait();
        const int64_t parts = stack.cross_parts, heads = stack.cross_heads, size = dim / heads;
        const Share mine = me.share(n * heads);
        for (int64_t item = mine.first; item < mine.last; item++) {
            const int64_t t = item / heads, at = item % heads * size;
            const int64_t patch = tokens.row[t] * stack.cross_slots + tokens.patch[t] % stack.cross_slots;
            const A *keys = (const A*)layer.parts + patch * parts * 2 * dim + at, *query = wide + t * dim + at;
            mix_few(query, keys, keys + dim, 2 * dim, parts, size, mixed + t * dim + at);
        }
        me.wait();
        residual(layer.cross_out, mixed, dim, A(2));  // the published models add the residual twice
        me.wait();
    }

    void keep(const Layer& layer) const {
        const Share mine = me.share(n);
        for (int64_t t = mine.first; t < mine.last; t++) {
            const int64_t slot = tokens.row[t] * stack.kept_slots + tokens.position[t] % stack.kept_slots;
            memcpy((A*)layer.kept + slot * dim, x + t * dim, dim * sizeof(A));
        }
    }

    void run() const {
        const Share mine = me.share(n);
        const int64_t size = stack.shape.head_dim;
        attention.angles(tokens.position + mine.first, mine.last - mine.first, turned + mine.first * size);
        for (int64_t index = 0; index < stack.layers; index++) {
            const Layer& layer = stack.layer[index];
            if (layer.parts) cross(layer);
            linear(layer.qkv, lines(layer.attention_norm), wide);
            me.wait();
            const bool last = tokens.wanted && index == stack.layers - 1;
            heads(layer, last ? tokens.wanted : nullptr);
            me.wait();
            if (last)
                few().finish(layer);
            else
                finish(layer);
        }
    }

    // What follows attention.
    void finish(const Layer& layer) const {
        residual(layer.out, mixed, dim, A(1));
        me.wait();
        feed_forward(layer);
        me.wait();
        if (layer.kept) keep(layer);
    }

    // The same for lines whose outputs are wanted, which move to the front.
    Pass few() const {
        int64_t count = 0;
        for (int64_t t = 0; t < n; t++)
            if (tokens.wanted[t]) {
                if (!me.thread && count < t) {
                    memcpy(x + count * dim, x + t * dim, dim * sizeof(A));
                    memcpy(mixed + count * dim, mixed + t * dim, dim * sizeof(A));
                }
                count++;
            }
        me.wait();
        return Pass{stack, tokens, x, me, attention, count, dim, runs, run_count, mixed, wide, turned, lined};
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
    const int64_t wider = std::max(3 * dim, stack.hidden);
    A *mixed = scratch<A>(2, 2 * n * dim), *wide = scratch<A>(3, n * wider), *turned = scratch<A>(4, n * stack.shape.head_dim);
    const int64_t* begins = runs.data();
    shared(threads, n * (4 * dim * dim + 3 * dim * stack.hidden), [&](const Member& me) {
        Pass<A, C>{stack, tokens, x, me, Attention<A, C>(stack.shape), n, dim, begins, count, mixed, wide, turned,
                   mixed + n * dim}
            .run();
    });
}

}  // namespace bytelm
