// Predictors that look a context up: the twins of online/predictors/*.py, by the code that each has there.

#pragma once

#include "online_state.h"

namespace bytelm::online {

enum Code : int64_t { ORDER = 1, WORD = 2, WORDS = 3, COLUMN = 4, SPARSE = 5, INDIRECT = 6, STRIDE = 7, MATCH = 9 };

inline bool in_word(uint8_t b) {
    return (b >= 'a' && b <= 'z') || (b >= 'A' && b <= 'Z') || (b >= '0' && b <= '9') || b == '_' || b >= 128;
}

inline uint64_t last(const Header& h, int64_t count) {
    return count >= 8 ? h.recent : h.recent & ((uint64_t(1) << (8 * count)) - 1);
}

// What a context is before the next byte; contexts of different predictors are kept apart by the caller.
inline uint64_t context_of(const Memory& m, const Part& part) {
    const Header& h = m.head();
    const uint64_t* own = m.at<uint64_t>(part.at);
    switch (part.code) {
    case ORDER: {
        uint64_t found = last(h, part.parameter);
        for (int64_t back = 9; back <= part.parameter; back++)
            found = found * K1 + (back <= h.position ? m.byte(h.position - back) : 0);
        return found;
    }
    case WORD: return own[0] + (h.recent & 255);
    case WORDS: return own[0] * K2 + own[1];
    case COLUMN: return own[0] << 8 | (h.recent & 255);
    case SPARSE: return (h.recent >> 8) & 0xFFFFFF;
    case INDIRECT: return uint64_t(((const uint16_t*)own)[h.recent & 0xFFFF]) << 8 | (h.recent & 255);
    case STRIDE: {
        const int64_t above = h.position - part.parameter;
        return uint64_t(above >= 0 ? m.byte(above) : 0) << 8 | (h.recent & 255);
    }
    default: return 0;
    }
}

// What a predictor keeps of its own after a byte; the header is not yet updated.
inline void note_byte(const Memory& m, const Part& part, uint8_t byte) {
    uint64_t* own = m.at<uint64_t>(part.at);
    switch (part.code) {
    case WORD:
    case WORDS:
        if (in_word(byte)) {
            m.put(own[0], (own[0] + byte + 1) * K1);
        } else if (own[0]) {
            m.put(own[1], own[0]);
            m.put(own[0], 0);
        }
        break;
    case COLUMN:  // own[1]: whether the first byte that is no blank was seen
        if (byte == '\n') {
            m.put(own[0], 0);
            m.put(own[1], 0);
        } else if (!own[1]) {
            const bool blank = byte == ' ' || byte == '\t';
            m.put(own[0], blank ? own[0] + 1 : own[0] << 8 | byte);
            m.put(own[1], !blank);
        }
        break;
    case INDIRECT: {
        uint16_t& of = ((uint16_t*)own)[m.head().recent & 0xFFFF];
        m.put(of, uint16_t(of << 8 | byte));
        break;
    }
    default: break;
    }
}

// Where a context and the first half of a byte (1 before it) would be kept.
struct Place {
    int64_t slot;
    uint16_t check;
};

inline Place place_of(const Memory& m, uint64_t context, int number, int half) {
    const uint64_t h = mixed(mixed(context + uint64_t(number + 1) * K1) + uint64_t(half) * K2);
    return {int64_t((h >> 16) & uint64_t(m.head().slot_mask)), uint16_t((h & 0xFFFF) | 1)};
}

inline void fetch(const Memory& m, const Place& place) {
#if defined(__GNUC__)
    __builtin_prefetch(m.slots() + place.slot, 1);
    __builtin_prefetch(m.slots() + (place.slot ^ 1), 1);
#endif
}

// The slot of a place, or none.
inline const Slot* found(const Memory& m, const Place& place) {
    const Slot* slots = m.slots();
    if (slots[place.slot].check == place.check) return slots + place.slot;
    if (slots[place.slot ^ 1].check == place.check) return slots + (place.slot ^ 1);
    return nullptr;
}

// The slot of a place; where there is none, the less used of the two neighbours is emptied for it, and the other ages.
inline Slot& claimed(const Memory& m, const Place& place) {
    if (const Slot* slot = found(m, place)) return *(Slot*)slot;
    Slot* first = m.slots() + place.slot;
    Slot* other = m.slots() + (place.slot ^ 1);
    if (first->check && (!other->check || other->priority < first->priority)) std::swap(first, other);
    if (other->priority) m.put(other->priority, other->priority - 1);
    m.touch(first, sizeof(Slot));
    std::memset(first, 0, sizeof(Slot));
    first->check = place.check;
    return *first;
}

// What four bits teach a slot, and the map of histories of its predictor.
inline void learn_half(const Memory& m, Slot& slot, uint32_t* map, int half) {
    m.touch(&slot, sizeof(Slot));
    slot.priority += slot.priority < 255;
    for (int bit = 0, node = 1; bit < 4; bit++) {
        const bool one = half >> (3 - bit) & 1;
        Slot::Node& of = slot.nodes[node - 1];
        uint32_t& cell = map[of.history];
        m.put(cell, observed(m, cell, one, 255));
        of.history = m.tables.next[of.history][one];
        const int32_t p = of.count ? of.p : 32768;
        of.p = uint16_t(p + (((one ? 65535 : 0) - p) * int64_t(m.tables.rates[of.count]) >> 16));
        of.count += of.count < 250;
        node = 2 * node + one;
    }
}

}  // namespace bytelm::online
