// Kernels of byte models besides stacks: embeddings, hashed n-grams, entropies, patch boundaries, pooling.

#pragma once
#include "attention.h"

namespace bytelm {

// The ids of each row: [row][slots]. `unread`: the id before the first.
struct History {
    const int64_t* ids;
    int64_t slots, unread;

    int64_t at(int64_t row, int64_t position) const { return position < 0 ? unread : ids[row * slots + position]; }
};

template <class A, class W> void embed_as(const Matrix& table, const int64_t* ids, A* x, int64_t n, int64_t add) {
    for (int64_t t = 0; t < n; t++) {
        const W* line = (const W*)table.data + ids[t] * table.in;
        const A scale = table.scale ? A(table.scale[ids[t]]) : A(1);
        A* to = x + t * table.in;
        for (int64_t i = 0; i < table.in; i++) {
            const A value = sizeof(W) > 1 ? A(widened(line[i])) : A(widened(line[i])) * scale;
            to[i] = add ? to[i] + value : value;
        }
    }
}

template <class A> void embed(const Matrix& table, const int64_t* ids, A* x, int64_t n, int64_t add) {
    if constexpr (sizeof(A) == 8)
        embed_as<A, double>(table, ids, x, n, add);
    else if (table.kind == BF16)
        embed_as<A, bf16>(table, ids, x, n, add);
    else if (table.kind == I8)
        embed_as<A, int8_t>(table, ids, x, n, add);
    else
        embed_as<A, float>(table, ids, x, n, add);
}

// NgramEmbedding: table[hash of the last ids], for each function and size; powers[function][k] = prime^k.
struct Ngrams {
    Matrix table;
    const int64_t *sizes, *powers;
    int64_t size_count, functions, longest, rows, offset, vocab;
};

inline int64_t modulo(uint64_t key, int64_t rows) {
    const int64_t rest = int64_t(key) % rows;
    return rest < 0 ? rest + rows : rest;
}

// The rows of the n-grams that end at each new position: [tokens][functions * sizes].
inline void hash_ngrams(const Ngrams& g, const History& history, const Tokens& tokens, int64_t* index) {
    for (int64_t t = 0; t < tokens.count; t++) {
        int64_t table = 0;
        for (int64_t f = 0; f < g.functions; f++)
            for (int64_t s = 0; s < g.size_count; s++, table++) {
                const int64_t size = g.sizes[s], oldest = tokens.position[t] - size + 1;
                uint64_t hash = 0;
                for (int64_t k = 0; k < size; k++)
                    hash += uint64_t((history.at(tokens.row[t], oldest + k) + g.offset) % g.vocab) *
                            uint64_t(g.powers[f * g.longest + k]);
                *index++ = modulo(hash, g.rows) + table * g.rows;
            }
    }
}

// Adds `some` rows of a table to each line of x.
template <class A> void add_rows(const Matrix& table, const int64_t* index, A* x, int64_t n, int64_t some) {
    for (int64_t t = 0; t < n; t++)
        for (int64_t k = 0; k < some; k++) embed<A>(table, index++, x + t * table.in, 1, 1);
}

template <class A> void embed_ngrams(const Ngrams& g, const History& history, const Tokens& tokens, A* x) {
    const int64_t some = g.functions * g.size_count;
    std::vector<int64_t> index(tokens.count * some);
    hash_ngrams(g, history, tokens, index.data());
    add_rows(g.table, index.data(), x, tokens.count, some);
}

// NgramEntropyModel: the entropy after the longest counted context; `newline` resets, or is -1.
struct Counted {
    const float* tables;  // [order][rows]; below 0 for contexts that were not counted
    int64_t order, rows, multiplier, bytes, newline, unread;
};

template <class A> void look_up(const Counted& s, const History& history, const Tokens& tokens, A* entropy) {
    const A most = A(logarithm(double(s.bytes)));
    for (int64_t t = 0; t < tokens.count; t++) {
        uint64_t key = 0;
        bool ended = false;
        A found = most;
        for (int64_t k = 0; k < s.order; k++) {
            const int64_t id = ended ? s.unread : history.at(tokens.row[t], tokens.position[t] - k);
            ended = ended || id >= s.bytes || id == s.newline;
            key = key * uint64_t(s.multiplier) + uint64_t(id) + 1;
            const float counted = s.tables[k * s.rows + modulo(key ^ uint64_t(int64_t(key) >> 29), s.rows)];
            if (counted >= 0) found = A(counted);
        }
        entropy[t] = found;
    }
}

template <class A> void entropies(const A* logits, int64_t n, int64_t vocab, A* entropy) {
    constexpr int L = LANES<A>;
    constexpr A NONE = -INFINITY;
    for (int64_t t = 0; t < n; t++, logits += vocab) {
        vec<A> top = all<A>(NONE), total = {}, mean = {};
        for (int64_t i = 0; i < vocab; i += L) top = larger(load_some(logits + i, vocab - i, NONE), top);
        const A peak = highest<A>(top);
        for (int64_t i = 0; i < vocab; i += L) {
            const vec<A> x = load_some(logits + i, vocab - i, NONE);
            const vec<A> below = select(x == NONE, vec<A>{}, x - peak);
            const vec<A> weight = select(x == NONE, vec<A>{}, exponential(below));
            total += weight;
            mean += weight * below;
        }
        entropy[t] = A(logarithm(sum<A>(total))) - sum<A>(mean) / sum<A>(total);
    }
}

// bytelm.patching: a scheme's proposals under its guard, and the resulting boundaries, by position.
struct Rule {
    int64_t scheme;  // 0 none, 1 after space-like ids, 2 global threshold, 3 relative threshold, 4 both
    double threshold, rise;
    int64_t longest, singles, spared, eos;  // bounds: 0 is none
    const uint8_t* spacelike;
    int64_t *gap, *run, *closed, *first;  // [row][slots]: the guard's counts, complete patches, start of the present one
    void* entropy;
};

template <class A>
void decide(const Rule& rule, const History& history, const Tokens& tokens, const A* entropy) {
    for (int64_t t = 0; t < tokens.count; t++) {
        const int64_t position = tokens.position[t], at = tokens.row[t] * history.slots + position;
        const int64_t id = history.ids[at], before = history.at(tokens.row[t], position - 1);
        A last = 0;
        if (rule.entropy) {
            last = position ? ((A*)rule.entropy)[at - 1] : A(0);
            ((A*)rule.entropy)[at] = entropy[t];
        }
        const bool above = entropy && entropy[t] > A(rule.threshold), rises = entropy && entropy[t] - last > A(rule.rise);
        bool proposed = rule.scheme == 1 ? rule.spacelike[id] && position && !rule.spacelike[before]
                        : rule.scheme == 2 ? above
                        : rule.scheme == 3 ? rises
                        : rule.scheme == 4 ? above && rises
                                           : false;
        const bool forced = !position || id == rule.eos;
        const int64_t run = !proposed || forced ? 0 : rule.run[at - 1] + 1;
        if (rule.singles) proposed = proposed && (run <= rule.singles || run % rule.spared == 0);
        proposed = proposed || forced;
        const int64_t gap = proposed ? 0 : rule.gap[at - 1] + 1;
        const bool opens = proposed || (rule.longest && gap % rule.longest == 0);
        rule.run[at] = run;
        rule.gap[at] = gap;
        rule.closed[at] = (position ? rule.closed[at - 1] : 0) + opens;
        rule.first[at] = opens ? position + 1 : rule.first[at - 1];
    }
}

// Encoder.patches: queries max-pooled from a patch's bytes, then the cross-attentions.
struct PoolLayer {
    const void *bytes, *query_norm, *key_norm;  // bytes: [row][slots][dim], the encoder's layer
    Matrix query, key_value, out;
};
struct Pool {
    int64_t layers, dim, heads, queries, slots;
    double eps;
    Matrix split;
    const PoolLayer* layer;
};

// What the threads that pool some patches share. `begin`: where the bytes of each start among all of them.
template <class A> struct Pooling {
    const Pool& pool;
    const int64_t *row, *first, *begin, n;
    A *out, *lines, *values, *query, *mixed;

    // The encoder's outputs of a layer at the bytes of a patch, copied to `to`.
    void gather(const PoolLayer& layer, int64_t i, A* to) const {
        const int64_t dim = pool.dim;
        for (int64_t j = 0; j < begin[i + 1] - begin[i]; j++)
            memcpy(to + j * dim, (const A*)layer.bytes + (row[i] * pool.slots + (first[i] + j) % pool.slots) * dim,
                   dim * sizeof(A));
    }

    void highest(const Member& me) const {
        const int64_t dim = pool.dim;
        const Share mine = me.share(n);
        for (int64_t i = mine.first; i < mine.last; i++) {
            A *bytes = lines + begin[i] * dim, *to = mixed + i * dim;
            gather(pool.layer[0], i, bytes);
            memcpy(to, bytes, dim * sizeof(A));
            for (int64_t j = 1; j < begin[i + 1] - begin[i]; j++)
                for (int64_t d = 0; d < dim; d++) to[d] = bytes[j * dim + d] > to[d] ? bytes[j * dim + d] : to[d];
        }
    }

    void attend(const PoolLayer& layer, const Member& me) const {
        const int64_t dim = pool.dim, k = pool.queries, size = dim / pool.heads;
        const Share mine = me.share(n);
        for (int64_t i = mine.first; i < mine.last; i++) {
            A* bytes = lines + begin[i] * dim;
            gather(layer, i, bytes);
            normed<A>(bytes, Share(begin[i + 1] - begin[i], 0, 1), dim, (const A*)layer.key_norm, A(pool.eps), bytes);
        }
        normed<A>(out, me.share(n * k), dim, (const A*)layer.query_norm, A(pool.eps), mixed);
        me.wait();
        me.product(layer.key_value, lines, dim, begin[n], Put<A>{values, 2 * dim});
        me.product(layer.query, mixed, dim, n * k, Put<A>{query, dim});
        me.wait();
        for (int64_t i = mine.first; i < mine.last; i++) {
            const int64_t count = begin[i + 1] - begin[i];
            for (int64_t q = i * k; q < (i + 1) * k; q++)
                for (int64_t at = 0; at < dim; at += size) {
                    const A* keys = values + begin[i] * 2 * dim + at;
                    mix_few(query + q * dim + at, keys, keys + dim, 2 * dim, count, size, mixed + q * dim + at);
                }
        }
        me.wait();
        auto add = [&](int64_t first, int64_t rows, int64_t q, const A* values) {
            A* at = out + q * dim + first;
            for (int64_t r = 0; r < rows; r++) at[r] = 2 * at[r] + values[r];
        };
        me.product(layer.out, mixed, dim, n * k, add);
        me.wait();
    }
};

// `queries` vectors of `dim` for each of n patches, from its bytes first..last.
template <class A>
void pooled(
    const Pool& pool, const int64_t* row, const int64_t* first, const int64_t* last, int64_t n, A* out, int threads
) {
    const int64_t dim = pool.dim, k = pool.queries;
    std::vector<int64_t> begin(n + 1);
    for (int64_t i = 0; i < n; i++) begin[i + 1] = begin[i] + last[i] - first[i] + 1;
    A *lines = scratch<A>(1, begin[n] * dim), *values = scratch<A>(2, begin[n] * 2 * dim);
    A* query = scratch<A>(3, 2 * n * k * dim);
    const Pooling<A> pooling{pool, row, first, begin.data(), n, out, lines, values, query, query + n * k * dim};
    shared(threads, (begin[n] + n * k) * 2 * dim * dim * pool.layers, [&](const Member& me) {
        pooling.highest(me);
        me.wait();
        me.product(pool.split, pooling.mixed, dim, n, Put<A>{out, k * dim});
        me.wait();
        for (int64_t index = 0; index < pool.layers; index++) pooling.attend(pool.layer[index], me);
    });
}

}  // namespace bytelm
