// Attention for training, forward and backward, in bfloat16 and float32: every query sees one run of slots, slots
// outside are not multiplied, and scores stay in the processor's cache (Dao 2023, arXiv 2307.08691, algorithms 1 and 2).
//
// Scores are [slots][queries], so that maximum, sum and mask are vectors of queries.

#pragma once
#include <algorithm>
#include <cmath>

#include "pairs.h"

namespace bytelm {

struct Strides {
    int64_t row, place, head;
};

// query, keys, values [rows, queries or slots, heads, head_dim], any strides; the others are contiguous.
template <class X> struct Attend {
    int64_t rows, heads, head_dim, queries, slots;
    const X *query, *keys, *values;
    Strides of_query, of_keys, of_values;
    const int32_t* first;  // [rows or 1, queries]: query t sees slots first[t] to slots - queries + t
    int64_t first_row;
    X* out;      // [rows, queries, heads, head_dim]
    float* lse;  // [rows, heads, queries]: log2 of the sum of exponentials, to recompute weights
    const X* d_out;
    X *d_query, *d_keys, *d_values;
};

constexpr int TILE = 64;  // queries, and slots, per product
constexpr float LOW = -1e30f, LOG2_E = 1.44269504f;

// 2^x for x <= 0, as exact as float32 is: a polynomial on [-1/2, 1/2]; far below, it stays at 2^-125.
BYTELM_INLINE vec<float> power_of_two(vec<float> x) {
    constexpr float WHOLE = 3 << 22;  // added to a number, it leaves the nearest whole one in the last bits
    x = select(x < -125.0f, all<float>(-125.0f), x);  // keeps a NaN
    const vec<float> moved = x + WHOLE, r = x - (moved - WHOLE);
    vec<float> p = fma(r, 1.5353362e-4f, all<float>(1.3398875e-3f));
    p = fma(p, r, 9.6184374e-3f);
    p = fma(p, r, 5.5503325e-2f);
    p = fma(p, r, 2.4022648e-1f);
    p = fma(p, r, 6.9314720e-1f);
    p = fma(p, r, 1.0f);
    return p * as<float>((as<int32_t>(moved) << 23) + (127 << 23));
}

template <class X> inline Lines<X> lines(const X* data, const Strides& by, int64_t row, int64_t head) {
    return {data + row * by.row + head * by.head, by.place};
}

// One tile of queries of one head, and the slots that they see.
template <class X> struct Queries {
    const Attend<X>& a;
    const int64_t row, head, begin, count, wide, last;  // last: the last slot of the first query
    int64_t low, high, sure;                            // slots seen by any; from `sure` to `last` by all
    alignas(64) int32_t first[TILE];

    Queries(const Attend<X>& a, int64_t row, int64_t head, int64_t begin, int64_t end)
        : a(a), row(row), head(head), begin(begin), count(std::min<int64_t>(TILE, end - begin)),
          wide((count + N - 1) / N * N), last(a.slots - a.queries + begin), low(a.slots), high(last + count), sure(0) {
        const int32_t* from = a.first + row * a.first_row + begin;
        for (int64_t i = 0; i < TILE; i++) {
            first[i] = i < count ? from[i] : INT32_MAX;
            if (i < count) low = std::min<int64_t>(low, from[i]), sure = std::max<int64_t>(sure, from[i]);
        }
    }
    bool all(int64_t slot, int64_t count) const { return this->count == wide && slot >= sure && slot + count - 1 <= last; }
    vec<int32_t> seen(int64_t slot, int64_t vector) const {  // mask of 16 queries
        static constexpr int32_t LANE[N] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
        const int64_t before = slot - last - vector * N;  // queries that are too early
        return (load(first + vector * N) <= int32_t(slot)) & (load(LANE) >= int32_t(before));
    }
    float* lse() const { return a.lse + (row * a.heads + head) * a.queries + begin; }
    int64_t at() const { return ((row * a.queries + begin) * a.heads + head) * a.head_dim; }
    Lines<X> contiguous(const X* data) const { return {data + at(), a.heads * a.head_dim}; }
};

template <class X, class F> inline void tiles(const Queries<X>& q, F each) {
    for (int64_t slot = q.low / TILE * TILE; slot < q.high; slot += TILE)
        each(slot, std::min<int64_t>(TILE, q.high - slot));
}

template <class X> struct Room {  // workspace of one thread
    alignas(64) float scores[TILE * TILE], slopes[TILE * TILE];
    alignas(64) word across[TILE / PER<X> * TILE];
    alignas(64) X natural[TILE * TILE];
    std::vector<word> query, d_out, query_along, d_out_along, keys, values;
    std::vector<float> out, d_keys, d_values;

    static Room& mine(int64_t dim) {
        static thread_local Room room;
        for (auto* words : {&room.query, &room.d_out, &room.query_along, &room.d_out_along, &room.keys, &room.values})
            words->resize(TILE / PER<X> * dim);
        room.out.resize(TILE * dim);
        return room;
    }
};

template <class X> inline void attend_forward(const Queries<X>& q) {
    const Attend<X>& a = q.a;
    const int64_t dim = a.head_dim, vectors = q.wide / N;
    const Lines<X> keys = lines(a.keys, a.of_keys, q.row, q.head), values = lines(a.values, a.of_values, q.row, q.head);
    Room<X>& room = Room<X>::mine(dim);
    const float scale = LOG2_E / std::sqrt(float(dim));  // to base 2
    vec<float> peak[TILE / N], total[TILE / N];
    for (int v = 0; v < TILE / N; v++) peak[v] = all<float>(LOW), total[v] = vec<float>{};
    std::fill_n(room.out.begin(), q.count * dim, 0.0f);
    pack_across(lines(a.query, a.of_query, q.row, q.head), q.begin, q.count, dim, q.wide, room.query.data());
    tiles(q, [&](int64_t slot, int64_t m) {
        const bool all = q.all(slot, m);
        float* scores = room.scores;
        product(m, q.wide, dim / PER<X>, keys.operand(slot), room.query.data(), q.wide, scores, TILE, false);
        alignas(64) float fade[TILE];
        bool faded = false;
        for (int64_t v = 0; v < vectors; v++) {
            float* column = scores + v * N;
            vec<float> top = peak[v];
            for (int64_t i = 0; i < m; i++) {
                vec<float> x = load(column + i * TILE) * scale;
                if (!all) x = select(q.seen(slot + i, v), x, bytelm::all<float>(LOW));
                store(column + i * TILE, x);
                top = larger(top, x);
            }
            const vec<float> factor = power_of_two(peak[v] - top);
            faded = faded || memcmp(&top, &peak[v], sizeof top) != 0;
            store(fade + v * N, factor);
            peak[v] = top;
            vec<float> sum = total[v] * factor;
            for (int64_t i = 0; i < m; i += PER<X>) {
                vec<float> weights[PER<X>] = {};
                for (int64_t j = 0; j < PER<X> && i + j < m; j++) {
                    weights[j] = power_of_two(load(column + (i + j) * TILE) - top);
                    if (!all) weights[j] = select(q.seen(slot + i + j, v), weights[j], vec<float>{});
                    sum += weights[j];
                }
                store(room.across + i / PER<X> * TILE + v * N, interleaved<X>(weights));
            }
            total[v] = sum;
        }
        if (faded)
            for (int64_t t = 0; t < q.count; t++)
                for (int64_t d = 0; d < dim; d += N)
                    store(room.out.data() + t * dim + d, load(room.out.data() + t * dim + d) * fade[t]);
        const int64_t words = (m + PER<X> - 1) / PER<X>;
        const Operand<X> weights = {(const X*)room.across, PER<X>, PER<X> * TILE};
        pack_along(values, slot, m, dim, PER<X> * words, room.values.data());
        product(q.count, dim, words, weights, room.values.data(), dim, room.out.data(), dim, true);
    });
    X* out = a.out + q.at();
    alignas(64) float peaks[TILE], totals[TILE];
    for (int v = 0; v < TILE / N; v++) store(peaks + v * N, peak[v]), store(totals + v * N, total[v]);
    for (int64_t t = 0; t < q.count; t++) {
        const float sum = totals[t];
        q.lse()[t] = peaks[t] + std::log2(sum);
        for (int64_t d = 0; d < dim; d += N)
            store(out + t * a.heads * dim + d, load(room.out.data() + t * dim + d) * (1 / sum));
    }
}

// Recompute weights; add gradients of keys and values to [slots from `origin` on][dim]; gradients of queries.
template <class X>
inline void attend_backward(const Queries<X>& q, int64_t origin, float* d_keys, float* d_values) {
    const Attend<X>& a = q.a;
    const int64_t dim = a.head_dim, vectors = q.wide / N;
    const Lines<X> keys = lines(a.keys, a.of_keys, q.row, q.head), values = lines(a.values, a.of_values, q.row, q.head);
    const Lines<X> query = lines(a.query, a.of_query, q.row, q.head);
    const Lines<X> out = q.contiguous(a.out), d_out = q.contiguous(a.d_out);
    Room<X>& room = Room<X>::mine(dim);
    const float scale = 1 / std::sqrt(float(dim));
    alignas(64) float lse[TILE] = {}, shared[TILE] = {};  // shared: the sum over slots of weight times its gradient
    for (int64_t t = 0; t < q.count; t++) {
        vec<float> sum = {};
        for (int64_t d = 0; d < dim; d += N) sum = fma(load(out.line(t) + d), load(d_out.line(t) + d), sum);
        shared[t] = bytelm::sum<float>(sum);
        lse[t] = q.lse()[t];
    }
    std::fill_n(room.out.begin(), q.count * dim, 0.0f);
    pack_across(query, q.begin, q.count, dim, q.wide, room.query.data());
    pack_along(query, q.begin, q.count, dim, q.wide, room.query_along.data());
    pack_across(d_out, 0, q.count, dim, q.wide, room.d_out.data());
    pack_along(d_out, 0, q.count, dim, q.wide, room.d_out_along.data());
    tiles(q, [&](int64_t slot, int64_t m) {
        const bool all = q.all(slot, m);
        const int64_t words = (m + PER<X> - 1) / PER<X>;
        product(m, q.wide, dim / PER<X>, keys.operand(slot), room.query.data(), q.wide, room.scores, TILE, false);
        product(m, q.wide, dim / PER<X>, values.operand(slot), room.d_out.data(), q.wide, room.slopes, TILE, false);
        for (int64_t v = 0; v < vectors; v++) {
            const vec<float> high = load(lse + v * N), common = load(shared + v * N);
            for (int64_t i = 0; i < m; i += PER<X>) {
                vec<float> slope[PER<X>] = {};
                for (int64_t j = 0; j < PER<X> && i + j < m; j++) {
                    const int64_t at = (i + j) * TILE + v * N;
                    const vec<float> x = fma(load(room.scores + at), scale * LOG2_E, -high);
                    vec<float> weight = power_of_two(x);
                    if (!all) weight = select(q.seen(slot + i + j, v), weight, vec<float>{});
                    slope[j] = weight * (load(room.slopes + at) - common) * scale;
                    store(room.natural + at, weight);
                }
                store(room.across + i / PER<X> * TILE + v * N, interleaved<X>(slope));
                for (int64_t j = 0; j < PER<X> && i + j < m; j++)  // overwrites gradients already read
                    store((X*)(room.slopes + (i + j) * TILE) + v * N, slope[j]);
            }
        }
        const Operand<X> weights = {room.natural, TILE, PER<X>};
        const Operand<X> slopes = {(const X*)room.slopes, PER<X> * TILE, PER<X>};
        const Operand<X> across = {(const X*)room.across, PER<X>, PER<X> * TILE};
        const int64_t inner = q.wide / PER<X>;
        float* to = d_values + (slot - origin) * dim;
        product(m, dim, inner, weights, room.d_out_along.data(), dim, to, dim, true);
        to = d_keys + (slot - origin) * dim;
        product(m, dim, inner, slopes, room.query_along.data(), dim, to, dim, true);
        pack_along(keys, slot, m, dim, PER<X> * words, room.keys.data());
        product(q.count, dim, words, across, room.keys.data(), dim, room.out.data(), dim, true);
    });
    for (int64_t t = 0; t < q.count; t++)
        for (int64_t d = 0; d < dim; d += N)
            store(a.d_query + q.at() + t * a.heads * dim + d, load(room.out.data() + t * dim + d));
}

// Queries of one head that one thread takes in the backward pass, and the slots that they see. The partition depends
// only on the shape, so that the order of sums is the same with any number of threads.
struct Stretch {
    int64_t begin, end, low, high;
};

template <class X> inline std::vector<Stretch> stretches(const Attend<X>& a, int64_t row) {
    const int64_t size = std::max<int64_t>(512, (a.queries / 8 + TILE - 1) / TILE * TILE);
    std::vector<Stretch> found;
    for (int64_t begin = 0; begin < a.queries; begin += size) {
        const int64_t end = std::min(begin + size, a.queries);
        const int32_t* first = a.first + row * a.first_row;
        const int64_t low = *std::min_element(first + begin, first + end) / TILE * TILE;
        found.push_back({begin, end, low, a.slots - a.queries + end});
    }
    return found;
}

template <class X> inline void attend_all(const Attend<X>& a, int threads) {
    const int64_t blocks = (a.queries + TILE - 1) / TILE;
    auto each = [&](int64_t i) {
        const int64_t line = i / blocks, block = i % blocks;
        attend_forward(Queries<X>(a, line / a.heads, line % a.heads, block * TILE, a.queries));
    };
    parallel_for(a.rows * a.heads * blocks, threads, each);
}

template <class X> inline void narrow_lines(const float* from, int64_t count, int64_t dim, X* to, int64_t step) {
    for (int64_t i = 0; i < count; i++)
        for (int64_t d = 0; d < dim; d += N) store(to + i * step + d, load(from + i * dim + d));
}

// One head with few queries, in one thread.
template <class X> inline void attend_back_whole(const Attend<X>& a, int64_t row, int64_t head) {
    const int64_t dim = a.head_dim, step = a.heads * dim, at = (row * a.slots * a.heads + head) * dim;
    Room<X>& room = Room<X>::mine(dim);
    room.d_keys.assign(a.slots * dim, 0.0f);
    room.d_values.assign(a.slots * dim, 0.0f);
    for (int64_t t = 0; t < a.queries; t += TILE)
        attend_backward(Queries<X>(a, row, head, t, a.queries), 0, room.d_keys.data(), room.d_values.data());
    narrow_lines(room.d_keys.data(), a.slots, dim, a.d_keys + at, step);
    narrow_lines(room.d_values.data(), a.slots, dim, a.d_values + at, step);
}

// One head in several parts, whose gradients of keys and values are summed at the end.
struct Sums {
    std::vector<float> keys, values;
};

template <class X>
inline void attend_back_summed(
    const Attend<X>& a, int64_t row, int64_t head, const std::vector<Stretch>& parts, const Sums* sums, int64_t first
) {
    const int64_t dim = a.head_dim, end = std::min<int64_t>(first + TILE, a.slots);
    for (int64_t slot = first; slot < end; slot++)
        for (int64_t d = 0; d < dim; d += N) {
            vec<float> keys = {}, values = {};
            for (size_t p = 0; p < parts.size(); p++)
                if (slot >= parts[p].low && slot < parts[p].high) {
                    keys += load(sums[p].keys.data() + (slot - parts[p].low) * dim + d);
                    values += load(sums[p].values.data() + (slot - parts[p].low) * dim + d);
                }
            const int64_t at = ((row * a.slots + slot) * a.heads + head) * dim + d;
            store(a.d_keys + at, keys);
            store(a.d_values + at, values);
        }
}

template <class X> inline void attend_all_back(const Attend<X>& a, int threads) {
    const std::vector<Stretch> common = stretches(a, 0);  // their number is the same in all rows
    const int64_t count = int64_t(common.size()), dim = a.head_dim;
    if (count == 1) {
        auto each = [&](int64_t i) { attend_back_whole(a, i / a.heads, i % a.heads); };
        parallel_for(a.rows * a.heads, threads, each);
        return;
    }
    for (int64_t row = 0; row < a.rows; row++) {
        const std::vector<Stretch> parts = stretches(a, row);
        std::vector<Sums> sums(a.heads * count);
        const int64_t tiles = (a.slots + TILE - 1) / TILE;
        auto summands = [&](int64_t i) {
            const int64_t head = i / count, p = count - 1 - i % count;  // longest first
            const Stretch& part = parts[p];
            Sums& sum = sums[head * count + p];
            sum.keys.assign((part.high - part.low) * dim, 0.0f);
            sum.values.assign((part.high - part.low) * dim, 0.0f);
            for (int64_t t = part.begin; t < part.end; t += TILE)
                attend_backward(Queries<X>(a, row, head, t, part.end), part.low, sum.keys.data(), sum.values.data());
        };
        parallel_for(a.heads * count, threads, summands);
        auto add = [&](int64_t i) {
            const int64_t head = i / tiles;
            attend_back_summed(a, row, head, parts, &sums[head * count], i % tiles * TILE);
        };
        parallel_for(a.heads * tiles, threads, add);
    }
}

}  // namespace bytelm
