// Predictors that look a context up: the twins of online/predictors/*.py, by the code that each has there.

#pragma once

#include "online_state.h"

namespace bytelm::online {

enum Code : int64_t { ORDER = 1, WORD = 2, WORDS = 3, COLUMN = 4, SPARSE = 5, INDIRECT = 6, STRIDE = 7, PLANE = 8, MATCH = 9, WAVE = 10, FIELD = 11 };

inline bool in_word(uint8_t b) {
    return (b >= 'a' && b <= 'z') || (b >= 'A' && b <= 'Z') || (b >= '0' && b <= '9') || b == '_' || b >= 128;
}

inline uint64_t last(const Header& h, int64_t count) {
    return count >= 8 ? h.recent : h.recent & ((uint64_t(1) << (8 * count)) - 1);
}

// Of `plane`: the number that follows from those at distances, for the byte `back` before the next one.
inline int expected(const Memory& m, int64_t back, int64_t distances) {
    const int64_t distance = distances & 0xFFFFF, others = distances >> 20, there = m.head().position - back - distance;
    const int found = there >= 0 ? m.byte(there) : 0;
    return others ? found + expected(m, back, others) - expected(m, back + distance, others) : found;
}

constexpr int TAPS = 16;
struct Channel {  // of `wave`
    int32_t expected, wrong, newest, unused, left[TAPS], weights[TAPS];
};

// The channel of the next byte.
inline Channel& channel_of(const Memory& m, const Part& part) {
    return m.at<Channel>(part.at)[m.head().position / 2 % (part.parameter & 7)];
}

// A whole sample teaches its channel, and the next one is expected.
inline void learn_sample(const Memory& m, Channel& c, int step, int sample) {
    m.touch(&c, sizeof(Channel));
    const int64_t error = sample - c.expected, off = std::abs(error);
    int64_t energy = 1024, filtered = 32768;
    for (int i = 0; i < TAPS; i++) energy += int64_t(c.left[i]) * c.left[i];
    const int64_t share = (off * step << 24) / energy * (error > 0 ? 1 : -1);
    for (int i = 0; i < TAPS; i++)
        c.weights[i] = int32_t(std::clamp<int64_t>(c.weights[i] + (share * c.left[i] >> 16), -(1 << 24), 1 << 24));
    for (int i = TAPS - 1; i; i--) c.left[i] = c.left[i - 1];
    c.left[0] = sample - (15 * c.newest >> 4);
    for (int i = 0; i < TAPS; i++) filtered += int64_t(c.weights[i]) * c.left[i];
    c.expected = int32_t(std::clamp<int64_t>((15 * sample >> 4) + (filtered >> 16), -32768, 32767));
    c.wrong += int32_t(16 * off - c.wrong) >> 3;
    c.newest = sample;
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
    case PLANE: {
        int64_t distances = 0;  // those of 0 are left out
        for (int shift = 43; shift > 0; shift -= 20)
            if (const int64_t distance = part.parameter >> shift & 0xFFFFF) distances = distances << 20 | distance;
        return uint64_t(std::clamp(expected(m, 0, distances), 0, 255)) << 3 | h.position % (part.parameter & 7);
    }
    case FIELD: {
        const int64_t size = part.parameter & 0x1FFFFF, looked_at = part.parameter >> 21;
        const auto back = [&](int64_t distance) { return h.position >= distance ? m.byte(h.position - distance) : 0; };
        uint64_t found = h.position % size;
        if (looked_at & 1) found = found << 8 | back(size);
        if (looked_at & 2) found = found << 8 | back(2 * size);
        if (looked_at & 4) found = found << 8 | back(1);
        if (looked_at & 8) found = found << 8 | ((2 * back(size) - back(2 * size)) & 255);
        return found;
    }
    case WAVE: {
        const Channel& c = channel_of(m, part);
        const bool coarse = part.parameter >> 11;
        int scale = 0;
        while (scale < 15 && c.wrong >> scale) scale++;
        if (h.position % 2 == 0) return uint64_t(coarse ? c.expected >> 2 & 0x3FFF : c.expected & 255) << 5 | scale << 1;
        const int apart = c.expected - int(h.recent & 255), high = (apart + 128) >> 8 & 255;
        return uint64_t(coarse ? high : high << 5 | (apart & 255) >> 3) << 5 | scale << 1 | 1;
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
    case WAVE:
        if (m.head().position % 2) {
            const int sample = int16_t(uint16_t((m.head().recent & 255) | byte << 8));
            learn_sample(m, channel_of(m, part), part.parameter >> 3 & 255, sample);
        }
        break;
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
