// Entry points of the memory that learns byte by byte. See online/definition.py.

#include "online_coder.h"
#include "online_mix.h"

using namespace bytelm::online;

namespace {

Memory memory(void* arena, const void* tables, void* journal) {
    return {(uint8_t*)arena, *(const Tables*)tables, (Journal*)journal};
}

const float* row_of(const float* logp, int64_t row) { return logp ? logp + 256 * row : nullptr; }

// One byte: `choose(bit, p)` says what each bit is; negative stops.
template <class Choose> int step(const Memory& m, const float* logp, int known, Choose choose) {
    Frame f;
    Bit bits[8];
    const Slot* slots[MOST_CONTEXTS];
    begin(m, logp, known, f);
    int so_far = 1;
    for (int bit = 0; bit < 8; bit++) {
        if (bit == 4)
            for (int c = 0; c < m.head().contexts; c++) slots[c] = found(m, place_of(m, f.contexts[c], c, so_far));
        predict(m, f, bit, so_far, bit < 4 ? f.first : slots, bits[bit]);
        const int one = choose(bit, bits[bit].p);
        if (one < 0) return -1;
        so_far = 2 * so_far + one;
    }
    learn(m, f, bits, uint8_t(so_far));
    return so_far & 255;
}

}  // namespace

extern "C" {

// Reads n bytes; `found` [n, 8] gets the probability that each bit had, in 2^-22.
void bytelm_online_read(void* arena, const void* tables, void* journal, const uint8_t* data, int64_t n, const float* logp,
                        int32_t* found) {
    const Memory m = memory(arena, tables, journal);
    for (int64_t i = 0; i < n; i++)
        step(m, row_of(logp, i), data[i], [&](int bit, int32_t p) {
            const int one = data[i] >> (7 - bit) & 1;
            if (found) found[8 * i + bit] = one ? p : WHOLE - p;
            return one;
        });
}

// The probability of a 1 at each node of the tree of a byte's bits [256], in 2^-22; the first is unused.
void bytelm_online_nodes(void* arena, const void* tables, const float* logp, int32_t* found_p) {
    const Memory m = memory(arena, tables, nullptr);
    Frame f;
    Bit b;
    begin(m, logp, -1, f);
    for (int bit = 0; bit < 4; bit++)
        for (int so_far = 1 << bit; so_far < 2 << bit; so_far++) {
            predict(m, f, bit, so_far, f.first, b);
            found_p[so_far] = b.p;
        }
    for (int half = 16; half < 32; half++)
        for (int c = 0; c < m.head().contexts; c++) fetch(m, place_of(m, f.contexts[c], c, half));
    for (int half = 16; half < 32; half++) {
        const Slot* slots[MOST_CONTEXTS];
        for (int c = 0; c < m.head().contexts; c++) slots[c] = found(m, place_of(m, f.contexts[c], c, half));
        for (int bit = 4; bit < 8; bit++)
            for (int low = 0; low < 1 << (bit - 4); low++) {
                const int so_far = half << (bit - 4) | low;
                predict(m, f, bit, so_far, slots, b);
                found_p[so_far] = b.p;
            }
    }
}

// Codes n bytes; returns how many bytes it put at `out`, which has room for 24 n + 8.
int64_t bytelm_online_encode(void* arena, const void* tables, void* journal, const uint8_t* data, int64_t n,
                             const float* logp, void* coder, uint8_t* out) {
    const Memory m = memory(arena, tables, journal);
    uint8_t* const began = out;
    for (int64_t i = 0; i < n; i++)
        step(m, row_of(logp, i), data[i], [&](int bit, int32_t p) {
            const int one = data[i] >> (7 - bit) & 1;
            ((Coder*)coder)->put(one, p, out);
            return one;
        });
    return out - began;
}

// The next byte of what was coded; -1 where the bytes end before it, and then nothing was learnt.
int64_t bytelm_online_decode(void* arena, const void* tables, void* journal, const uint8_t* data, int64_t size,
                             const float* logp, void* coder) {
    const Memory m = memory(arena, tables, journal);
    Coder c = *(Coder*)coder;
    const int byte = step(m, logp, -1, [&](int, int32_t p) { return c.get(p, data, size); });
    if (byte >= 0) *(Coder*)coder = c;
    return byte;
}

void* bytelm_online_journal() { return new Journal; }
void bytelm_online_forget(void* journal) { delete (Journal*)journal; }
void bytelm_online_mark(void* journal) { ((Journal*)journal)->marks.push_back(((Journal*)journal)->words.size()); }

// Drops the newest mark; with an arena, everything written since then is as it was.
void bytelm_online_unmark(void* journal, void* arena) {
    Journal& j = *(Journal*)journal;
    if (arena)
        for (; j.words.size() > j.marks.back(); j.words.pop_back())
            std::memcpy((uint8_t*)arena + j.words.back().at, &j.words.back().old, 8);
    j.marks.pop_back();
    if (j.marks.empty()) j.words.clear();
}

}  // extern "C"
