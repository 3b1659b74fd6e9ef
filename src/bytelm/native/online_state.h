// The memory's one arena of bytes, its header, the journal of what was written, and the tables.
// What everything means is in online/definition.py; this computes the same, and a test compares every byte.

#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

namespace bytelm::online {

constexpr int NAT = 256, WIDE = 12 * NAT, BITS = 22, FINE = 1024;
constexpr int32_t WHOLE = 1 << BITS;
constexpr int MOST_CONTEXTS = 24, MOST_MATCHES = 4, MOST_INPUTS = 64, SETS = 8, CELLS = 32;
constexpr uint64_t K1 = 0x9E3779B97F4A7C15, K2 = 0xD6E8FEB86659FD93;

struct Tables {  // see online/tables.py
    int32_t squash[2 * WIDE];
    int16_t stretch[4096];
    int32_t mantissas[2048];
    uint32_t coarse[128], fine[256];
    int32_t rates[1024];
    uint8_t next[256][2];
};

struct Part {  // a predictor: which one, its parameter, and where its own state lies
    int64_t code, parameter, at, bytes;
};

struct Header {  // see online/layout.py: first what settings say, then what changes
    int64_t magic, version, size, contexts, matches, inputs, slot_mask, ring_mask, index_mask, row_bits;
    int64_t slots, ring, index, weights, finals, histories, hits, network_maps, last_maps;
    Part parts[MOST_CONTEXTS + MOST_MATCHES];
    char settings[1024];
    int64_t position;
    uint64_t recent;  // the last eight bytes, the newest lowest
    int64_t steps[2];  // bytes that the mixer has learnt, without and beside a network
    int64_t met;  // whether there are weights beside a network
};

struct Slot {  // one cache line: a context and half a byte
    uint16_t check;
    uint8_t priority, unused;
    struct Node {
        uint16_t p;
        uint8_t count, history;
    } nodes[15];  // of 1, then 1 and the first bit, ...
};
static_assert(sizeof(Slot) == 64);

// What stood where something was written since the oldest mark, in words of eight bytes.
struct Journal {
    struct Word {
        int64_t at;
        uint64_t old;
    };
    std::vector<Word> words;
    std::vector<size_t> marks;
};

struct Memory {
    uint8_t* arena;
    const Tables& tables;
    Journal* journal;

    Header& head() const { return *(Header*)arena; }
    template <class T> T* at(int64_t offset) const { return (T*)(arena + offset); }
    Slot* slots() const { return at<Slot>(head().slots); }
    uint8_t byte(int64_t position) const { return arena[head().ring + (position & head().ring_mask)]; }
    uint8_t& ringed(int64_t position) const { return arena[head().ring + (position & head().ring_mask)]; }
    const Part& part(int64_t number) const { return head().parts[number]; }

    // Everything that is written is announced here first.
    void touch(const void* place, int64_t bytes) const {
        if (!journal || journal->marks.empty()) return;
        const int64_t begin = ((const uint8_t*)place - arena) & ~int64_t(7);
        const int64_t end = (const uint8_t*)place - arena + bytes;
        for (int64_t word = begin; word < end; word += 8) {
            uint64_t old;
            std::memcpy(&old, arena + word, 8);
            journal->words.push_back({word, old});
        }
    }
    template <class T, class V> void put(T& place, V value) const {
        touch(&place, sizeof(T));
        place = T(value);
    }
    int squash(int64_t x) const { return tables.squash[std::clamp<int64_t>(x, -WIDE, WIDE - 1) + WIDE]; }
    int stretch(uint32_t p) const { return tables.stretch[std::min<uint32_t>(p >> (BITS - 12), 4095)]; }
};

inline uint64_t mixed(uint64_t h) {
    h = (h ^ (h >> 29)) * K2;
    return h ^ (h >> 32);
}

// A probability of 22 bits above the number of its observations, ten bits: one observation more.
inline uint32_t observed(const Memory& m, uint32_t cell, bool one, uint32_t limit) {
    const int64_t p = cell >> 10, n = cell & 1023;
    const int64_t moved = p + (((one ? WHOLE - 1 : 0) - p) * m.tables.rates[n] >> 16);
    return uint32_t(moved << 10 | (n < limit ? n + 1 : n));
}

}  // namespace bytelm::online
