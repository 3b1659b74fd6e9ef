// Entry points for Python. Arguments are addresses or 64-bit integers; `exact`: float64 throughout, else float32.

#include "logits.h"
#include "pack.h"
#include "patches.h"
#include "stack.h"

using namespace bytelm;

namespace {

template <class A> void linear(const Matrix& m, const void* norm, double eps, const A* x, A* out, int64_t n, int threads) {
    A* lines = norm ? scratch<A>(1, n * m.in) : nullptr;
    shared(threads, n * m.in * m.out, [&](const Member& me) {
        if (norm) {
            normed<A>(x, me.share(n), m.in, (const A*)norm, A(eps), lines);
            me.wait();
        }
        me.product(m, norm ? lines : x, m.in, n, Put<A>{out, m.out});
    });
}

template <class A> void parts(const Stack& s, const A* x, const int64_t* row, const int64_t* patch, int64_t n, int threads) {
    const int64_t width = s.cross_parts * 2 * s.dim;
    std::vector<A> found(n * width);
    for (int64_t index = 0; index < s.layers; index++) {
        const Layer& layer = s.layer[index];
        linear<A>(layer.key_value, layer.key_norm, s.eps, x, found.data(), n * s.cross_parts, threads);
        for (int64_t i = 0; i < n; i++) {
            const int64_t slot = row[i] * s.cross_slots + patch[i] % s.cross_slots;
            memcpy((A*)layer.parts + slot * width, found.data() + i * width, width * sizeof(A));
        }
    }
}

}  // namespace

extern "C" {

void bytelm_stack(const Stack* stack, const Tokens* tokens, void* x, int64_t exact, int64_t threads) {
    if (exact)
        run_stack<double, double>(*stack, *tokens, (double*)x, int(threads));
    else if (stack->kind == BF16)
        run_stack<float, bf16>(*stack, *tokens, (float*)x, int(threads));
    else
        run_stack<float, float>(*stack, *tokens, (float*)x, int(threads));
}

void bytelm_linear(
    const Matrix* m, const void* norm, double eps, const void* x, void* out, int64_t n, int64_t exact, int64_t threads
) {
    if (exact)
        linear<double>(*m, norm, eps, (const double*)x, (double*)out, n, int(threads));
    else
        linear<float>(*m, norm, eps, (const float*)x, (float*)out, n, int(threads));
}

int64_t bytelm_pack(const Packing* packing, int64_t threads) { return pack(*packing, int(threads)); }

// 64 sums, each of every 64th word of `bytes` bytes: a change of one word always changes one, and where a word is counts.
// `sums`: 256 bytes.
void bytelm_checksum(const void* data, int64_t bytes, void* sums) {
    constexpr int MANY = 4, SIZE = MANY * 64;
    const uint8_t* at = (const uint8_t*)data;
    vec<word> total[MANY] = {};
    auto add = [&](const uint8_t* from) {
        for (int k = 0; k < MANY; k++)
            total[k] = (total[k] ^ (total[k] >> 15)) * word(0x9E3779B1) + load((const word*)(from + 64 * k)) + word(1);
    };
    int64_t i = 0;
    for (; i + SIZE <= bytes; i += SIZE) add(at + i);
    uint8_t rest[SIZE] = {};
    memcpy(rest, at + i, bytes - i);
    add(rest);
    for (int k = 0; k < MANY; k++) store((word*)sums + 16 * k, total[k] + word(bytes));
}

// Whether vectors multiply and add in one operation, as compiled.
int64_t bytelm_fused() { return FUSED; }

void bytelm_turns(const double* angles, int64_t n, double* cosines, double* sines) {
    for (int64_t i = 0; i < n; i++) {
        const Angle turned(angles[i]);
        cosines[i] = turned.cosine, sines[i] = turned.sine;
    }
}

void bytelm_frequencies(const void* logits, int64_t n, int64_t count, int64_t total, int64_t* out, int64_t exact) {
    if (exact)
        frequencies((const double*)logits, n, count, total, out);
    else
        frequencies((const float*)logits, n, count, total, out);
}

void bytelm_log_probabilities(const void* logits, int64_t n, int64_t stride, int64_t count, float* out, int64_t exact) {
    if (exact)
        log_probabilities((const double*)logits, n, stride, count, out);
    else
        log_probabilities((const float*)logits, n, stride, count, out);
}

void bytelm_dots(const void* x, const void* y, int64_t n, int64_t dim, void* out, int64_t exact) {
    if (exact)
        dots((const double*)x, (const double*)y, n, dim, (double*)out);
    else
        dots((const float*)x, (const float*)y, n, dim, (float*)out);
}

void bytelm_norm(const void* weight, double eps, const void* x, void* out, int64_t n, int64_t dim, int64_t exact) {
    if (exact)
        normed<double>((const double*)x, Share(n, 0, 1), dim, (const double*)weight, eps, (double*)out);
    else
        normed<float>((const float*)x, Share(n, 0, 1), dim, (const float*)weight, float(eps), (float*)out);
}

void bytelm_parts(
    const Stack* s, const void* x, const int64_t* row, const int64_t* patch, int64_t n, int64_t exact, int64_t threads
) {
    if (exact)
        parts<double>(*s, (const double*)x, row, patch, n, int(threads));
    else
        parts<float>(*s, (const float*)x, row, patch, n, int(threads));
}

void bytelm_embed(const Matrix* table, const int64_t* ids, void* x, int64_t n, int64_t add, int64_t exact) {
    if (exact)
        embed<double>(*table, ids, (double*)x, n, add);
    else
        embed<float>(*table, ids, (float*)x, n, add);
}

void bytelm_hashes(const Ngrams* ngrams, const History* history, const Tokens* tokens, int64_t* index) {
    hash_ngrams(*ngrams, *history, *tokens, index);
}

void bytelm_bags(const Matrix* table, const int64_t* index, void* x, int64_t n, int64_t some, int64_t exact) {
    if (exact)
        add_rows<double>(*table, index, (double*)x, n, some);
    else
        add_rows<float>(*table, index, (float*)x, n, some);
}

void bytelm_ngrams(const Ngrams* ngrams, const History* history, const Tokens* tokens, void* x, int64_t exact) {
    if (exact)
        embed_ngrams<double>(*ngrams, *history, *tokens, (double*)x);
    else
        embed_ngrams<float>(*ngrams, *history, *tokens, (float*)x);
}

void bytelm_counted(const Counted* scorer, const History* history, const Tokens* tokens, void* entropy, int64_t exact) {
    if (exact)
        look_up<double>(*scorer, *history, *tokens, (double*)entropy);
    else
        look_up<float>(*scorer, *history, *tokens, (float*)entropy);
}

void bytelm_entropy(const void* logits, int64_t n, int64_t vocab, void* entropy, int64_t exact) {
    if (exact)
        entropies<double>((const double*)logits, n, vocab, (double*)entropy);
    else
        entropies<float>((const float*)logits, n, vocab, (float*)entropy);
}

void bytelm_decide(const Rule* rule, const History* history, const Tokens* tokens, const void* entropy, int64_t exact) {
    if (exact)
        decide<double>(*rule, *history, *tokens, (const double*)entropy);
    else
        decide<float>(*rule, *history, *tokens, (const float*)entropy);
}

void bytelm_pool(
    const Pool* pool, const int64_t* row, const int64_t* first, const int64_t* last, int64_t n, void* out,
    int64_t exact, int64_t threads
) {
    if (exact)
        pooled<double>(*pool, row, first, last, n, (double*)out, int(threads));
    else
        pooled<float>(*pool, row, first, last, n, (float*)out, int(threads));
}
}
