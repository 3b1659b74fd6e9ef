// Cross-attention between bytes and patches for training in bfloat16 and float32, bytes × k products. In both directions
// each byte goes with one patch, and the bytes of a patch are adjacent.

#pragma once
#include <algorithm>
#include <cmath>
#include <vector>

#include "pairs.h"

namespace bytelm {

// `patch` [bytes]: the patch of each byte, >= `patches` for none. All is contiguous:
// of bytes [bytes, heads, dim], of patches [patches, parts, heads, dim], weights [bytes, parts, heads].
template <class X> struct Crossed {
    int64_t bytes, patches, parts, heads, dim;
    const int64_t* patch;
    const X *query, *keys, *values;
    float* weights;
    X* out;
    const X* d_out;
    X *d_query, *d_keys, *d_values;

    int64_t of_byte(int64_t byte, int64_t head) const { return (byte * heads + head) * dim; }
    int64_t of_patch(int64_t patch, int64_t part, int64_t head) const {
        return ((patch * parts + part) * heads + head) * dim;
    }
    float* weight(int64_t byte, int64_t part, int64_t head) const { return weights + (byte * parts + part) * heads + head; }
};

template <class X> inline float inner(const X* x, const X* y, int64_t dim) {
    vec<float> total = {};
    for (int64_t d = 0; d < dim; d += N) total = fma(load(x + d), load(y + d), total);
    return sum<float>(total);
}
template <class X> inline void add(float* to, const X* x, float factor, int64_t dim) {
    for (int64_t d = 0; d < dim; d += N) store(to + d, fma(load(x + d), factor, load(to + d)));
}
template <class X> inline void put(X* to, const float* x, int64_t dim) {
    for (int64_t d = 0; d < dim; d += N) store(to + d, load(x + d));
}

// Calls `each(patch, begin, end)` for each run of bytes of one patch.
template <class X, class Each> inline void runs(const Crossed<X>& a, int threads, Each each) {
    std::vector<int64_t> begins;
    for (int64_t i = 0; i < a.bytes; i++)
        if (!i || a.patch[i] != a.patch[i - 1]) begins.push_back(i);
    begins.push_back(a.bytes);
    const int64_t count = int64_t(begins.size()) - 1;
    auto run = [&](int64_t r) {
        const int64_t patch = a.patch[begins[r]];
        if (patch < a.patches) each(patch, begins[r], begins[r + 1]);
    };
    parallel_for(count, threads, run, 32);
}

// Bytes query the parts of their patch: keys and values are of patches.
template <class X> inline void bytes_forward(const Crossed<X>& a, int threads) {
    const float scale = 1 / std::sqrt(float(a.dim));
    auto each = [&](int64_t patch, int64_t begin, int64_t end) {
        std::vector<float> mixed(a.dim);
        for (int64_t i = begin; i < end; i++)
            for (int64_t h = 0; h < a.heads; h++) {
                float peak = -INFINITY, total = 0;
                for (int64_t j = 0; j < a.parts; j++) {
                    float* w = a.weight(i, j, h);
                    *w = inner(a.query + a.of_byte(i, h), a.keys + a.of_patch(patch, j, h), a.dim) * scale;
                    peak = std::max(peak, *w);
                }
                for (int64_t j = 0; j < a.parts; j++) total += *a.weight(i, j, h) = std::exp(*a.weight(i, j, h) - peak);
                std::fill(mixed.begin(), mixed.end(), 0.0f);
                for (int64_t j = 0; j < a.parts; j++)
                    add(mixed.data(), a.values + a.of_patch(patch, j, h), *a.weight(i, j, h) /= total, a.dim);
                put(a.out + a.of_byte(i, h), mixed.data(), a.dim);
            }
    };
    runs(a, threads, each);
}

template <class X> inline void bytes_backward(const Crossed<X>& a, int threads) {
    const float scale = 1 / std::sqrt(float(a.dim));
    auto each = [&](int64_t patch, int64_t begin, int64_t end) {
        const int64_t whole = a.parts * a.dim;
        std::vector<float> keys(whole), values(whole), query(a.dim), slopes(a.parts);
        for (int64_t h = 0; h < a.heads; h++) {
            std::fill(keys.begin(), keys.end(), 0.0f);
            std::fill(values.begin(), values.end(), 0.0f);
            for (int64_t i = begin; i < end; i++) {
                const X* slope = a.d_out + a.of_byte(i, h);
                float shared = 0;
                for (int64_t j = 0; j < a.parts; j++) {
                    slopes[j] = inner(slope, a.values + a.of_patch(patch, j, h), a.dim);
                    shared += slopes[j] * *a.weight(i, j, h);
                }
                std::fill(query.begin(), query.end(), 0.0f);
                for (int64_t j = 0; j < a.parts; j++) {
                    const float w = *a.weight(i, j, h), d = w * (slopes[j] - shared) * scale;
                    add(values.data() + j * a.dim, slope, w, a.dim);
                    add(keys.data() + j * a.dim, a.query + a.of_byte(i, h), d, a.dim);
                    add(query.data(), a.keys + a.of_patch(patch, j, h), d, a.dim);
                }
                put(a.d_query + a.of_byte(i, h), query.data(), a.dim);
            }
            for (int64_t j = 0; j < a.parts; j++) {
                put(a.d_keys + a.of_patch(patch, j, h), keys.data() + j * a.dim, a.dim);
                put(a.d_values + a.of_patch(patch, j, h), values.data() + j * a.dim, a.dim);
            }
        }
    };
    runs(a, threads, each);
}

// The parts of a patch query its bytes: keys and values are of bytes.
template <class X> inline void patches_forward(const Crossed<X>& a, int threads) {
    const float scale = 1 / std::sqrt(float(a.dim));
    auto each = [&](int64_t patch, int64_t begin, int64_t end) {
        std::vector<float> mixed(a.dim);
        for (int64_t j = 0; j < a.parts; j++)
            for (int64_t h = 0; h < a.heads; h++) {
                float peak = -INFINITY, total = 0;
                for (int64_t i = begin; i < end; i++) {
                    float* w = a.weight(i, j, h);
                    *w = inner(a.query + a.of_patch(patch, j, h), a.keys + a.of_byte(i, h), a.dim) * scale;
                    peak = std::max(peak, *w);
                }
                for (int64_t i = begin; i < end; i++) total += *a.weight(i, j, h) = std::exp(*a.weight(i, j, h) - peak);
                std::fill(mixed.begin(), mixed.end(), 0.0f);
                for (int64_t i = begin; i < end; i++)
                    add(mixed.data(), a.values + a.of_byte(i, h), *a.weight(i, j, h) /= total, a.dim);
                put(a.out + a.of_patch(patch, j, h), mixed.data(), a.dim);
            }
    };
    runs(a, threads, each);
}

template <class X> inline void patches_backward(const Crossed<X>& a, int threads) {
    const float scale = 1 / std::sqrt(float(a.dim));
    auto each = [&](int64_t patch, int64_t begin, int64_t end) {
        std::vector<float> slopes(a.parts * (end - begin)), query(a.dim), key(a.dim), value(a.dim);
        for (int64_t h = 0; h < a.heads; h++) {
            for (int64_t j = 0; j < a.parts; j++) {
                const X* slope = a.d_out + a.of_patch(patch, j, h);
                float* d = slopes.data() + j * (end - begin) - begin;
                float shared = 0;
                for (int64_t i = begin; i < end; i++) {
                    d[i] = inner(slope, a.values + a.of_byte(i, h), a.dim);
                    shared += d[i] * *a.weight(i, j, h);
                }
                std::fill(query.begin(), query.end(), 0.0f);
                for (int64_t i = begin; i < end; i++) {
                    d[i] = *a.weight(i, j, h) * (d[i] - shared) * scale;
                    add(query.data(), a.keys + a.of_byte(i, h), d[i], a.dim);
                }
                put(a.d_query + a.of_patch(patch, j, h), query.data(), a.dim);
            }
            for (int64_t i = begin; i < end; i++) {
                std::fill(key.begin(), key.end(), 0.0f);
                std::fill(value.begin(), value.end(), 0.0f);
                for (int64_t j = 0; j < a.parts; j++) {
                    add(key.data(), a.query + a.of_patch(patch, j, h), slopes[j * (end - begin) + i - begin], a.dim);
                    add(value.data(), a.d_out + a.of_patch(patch, j, h), *a.weight(i, j, h), a.dim);
                }
                put(a.d_keys + a.of_byte(i, h), key.data(), a.dim);
                put(a.d_values + a.of_byte(i, h), value.data(), a.dim);
            }
        }
    };
    runs(a, threads, each);
}

}  // namespace bytelm
