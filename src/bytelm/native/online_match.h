// Match models: where the last bytes stood before, and the byte that came then.

#pragma once

#include "online_contexts.h"

namespace bytelm::online {

constexpr int64_t LONGEST = 65535, VERIFIED = 400, MISSES = 8, ENOUGH = 16;

struct Match {  // the own state of a match model, and 256 probabilities that the expected bit comes after it
    int64_t pointer, length, misses;
};

inline int64_t bucket_of(const Match& match) {
    const int64_t n = std::clamp<int64_t>(match.length, 0, LONGEST);
    const int64_t by = n < 16 ? n : n < 32 ? 16 + (n - 16) / 2 : n < 64 ? 24 + (n - 32) / 4 : n < 512 ? 32 + (n - 64) / 32 : 46;
    return by * 4 + std::clamp<int64_t>(match.misses, 0, 3);
}

// Where the index of a match model keeps the position after its last bytes; none before there are enough.
inline uint32_t* indexed(const Memory& m, int64_t number) {
    const Header& h = m.head();
    const int64_t least = m.part(h.contexts + number).parameter;
    if (h.position < least) return nullptr;
    uint64_t hash = 0;
    for (int64_t back = 1; back <= least; back++) hash = (hash + m.byte(h.position - back) + 1) * K1;
    return m.at<uint32_t>(h.index) + number * (h.index_mask + 1) + (int64_t(hash >> 32) & h.index_mask);
}

// How many bytes before `to` are those before the position; no more than a ring holds.
inline int64_t same_before(const Memory& m, int64_t to) {
    const Header& h = m.head();
    const int64_t most = std::min({VERIFIED, to, h.ring_mask + 1 - (h.position - to)});
    int64_t length = 0;
    while (length < most && m.byte(to - 1 - length) == m.byte(h.position - 1 - length)) length++;
    return length;
}

// The state of a match model before the next byte: as it is, or with a longer match than it has.
inline Match better(const Memory& m, int64_t number, const uint32_t* entry) {
    const Header& h = m.head();
    Match match = *m.at<Match>(m.part(h.contexts + number).at);
    if (h.position - match.pointer > h.ring_mask) match = {};
    if (!entry || match.length >= ENOUGH) return match;
    const int64_t distance = uint32_t(uint32_t(h.position) - *entry), to = h.position - distance;
    if (distance < 1 || to < 1 || distance > h.ring_mask || to == match.pointer) return match;
    const int64_t length = same_before(m, to);
    if (length >= m.part(h.contexts + number).parameter && length > match.length) match = {to, length, 0};
    return match;
}

inline Match after(Match match, bool hit) {
    if (!match.pointer) return match;
    match.pointer++;
    if (hit) {
        match.length = std::min(match.length + 1, LONGEST);
        if (match.length > ENOUGH) match.misses = 0;
    } else {
        match.length = 0;
        if (++match.misses > MISSES) match = {};
    }
    return match;
}

}  // namespace bytelm::online
