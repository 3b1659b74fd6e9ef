// The probability of a bit: inputs, mixers in two layers, adaptive maps; and what a byte teaches them.

#pragma once

#include "online_match.h"

namespace bytelm::online {

// The rows of weights of each set, see `select`; and the first row of each.
constexpr int CONFIDENCES = 12, MATCHED = 5, HITS = 8, PAIRS = 2048;
constexpr int ROWS[SETS] = {1, 256, 256, CONFIDENCES * 8, HITS * MATCHED, MATCHED * CONFIDENCES, 256, PAIRS};
constexpr int first_of(int set) { return set ? first_of(set - 1) + ROWS[set - 1] : 0; }
constexpr int FIRST[SETS] = {first_of(0), first_of(1), first_of(2), first_of(3),
                             first_of(4), first_of(5), first_of(6), first_of(7)};
constexpr int ALL_ROWS = first_of(SETS);
constexpr int NETWORK_INPUTS = 4, BIAS = 77, STEP = 128, EDGE = STEP * (CELLS - 1) / 2;
constexpr int32_t BESIDE = 367002;  // 0.35, the first weight of a network
constexpr int64_t MAP_RATE = 1311;  // 0.02

// What is the same for all bits of a byte.
struct Frame {
    uint64_t contexts[MOST_CONTEXTS];
    const Slot* first[MOST_CONTEXTS];
    Match matches[MOST_MATCHES];
    uint32_t* entries[MOST_MATCHES];
    int expected[MOST_MATCHES];  // with the bit that ends a byte, 256; 0: nothing
    int64_t buckets[MOST_MATCHES];
    int64_t tree[512];
    bool network;
};

// What one bit was predicted from.
struct Bit {
    alignas(64) int32_t x[MOST_INPUTS];
    int32_t dots[SETS], rows[SETS];
    int32_t total, mixed, p;  // the second layer's output, its probability, and that after the maps
    int32_t network_rows[3], network_z, last_rows[3];
    int32_t hits[MOST_MATCHES];  // bucket, and the bit expected; -1: nothing
};

struct Cell {  // between two cells of a map
    int low, share;
};
inline Cell cell_of(int z) {
    const int place = std::clamp(z, -EDGE, EDGE - 1) + EDGE;
    return {place / STEP, place % STEP};
}
inline int64_t read_map(const uint32_t* row, const Cell& c) {
    return (int64_t(row[c.low]) * (STEP - c.share) + int64_t(row[c.low + 1]) * c.share) / STEP;
}
inline void teach_map(const Memory& m, uint32_t* row, const Cell& c, bool one) {
    m.touch(row + c.low, 2 * sizeof(uint32_t));
    const int64_t target = one ? WHOLE - 1 : 0;
    row[c.low] += int32_t((target - int64_t(row[c.low])) * (STEP - c.share) * MAP_RATE >> 23);
    row[c.low + 1] += int32_t((target - int64_t(row[c.low + 1])) * c.share * MAP_RATE >> 23);
}

// Rows of three maps: 0 by bits so far (and `more`), 1 by the last byte too, 2 by the last two.
inline void map_rows(const Memory& m, int so_far, int more, int32_t* rows) {
    const Header& h = m.head();
    const uint64_t one = (h.recent & 255) << 8 | so_far, two = (h.recent & 0xFFFF) << 8 | so_far;
    rows[0] = more * 256 + so_far;
    rows[1] = MATCHED * 256 + int32_t((one * 40503 & 0xFFFF) >> (16 - h.row_bits));
    rows[2] = MATCHED * 256 + (1 << h.row_bits) + int32_t((two * K1) >> (64 - h.row_bits));
}

inline int logarithm(const Memory& m, int64_t n) {
    int bits = 0;
    for (int step = 32; step; step /= 2)
        if (n >> (bits + step)) bits += step;
    const int top = int(bits > 11 ? n >> (bits - 11) : n << (11 - bits)) & 2047;
    return int(int64_t(bits) * 46516320 >> 16) + m.tables.mantissas[top];
}

// Frequencies of the bytes by the network, and their sums over the tree of bits.
inline void grow_tree(const Memory& m, const float* logp, int64_t* tree) {
    for (int byte = 0; byte < 256; byte++) {
        const float x = logp[byte] * -float(FINE);
        const float low = x < float(24 * FINE - 1) ? x : float(24 * FINE - 1);  // so is what is not a number
        const int q = int((low > 0 ? low : 0) + 0.5f);
        tree[256 + byte] = 1 + int64_t(uint64_t(m.tables.coarse[q >> 8]) * m.tables.fine[q & 255] >> 32);
    }
    for (int node = 255; node; node--) tree[node] = tree[2 * node] + tree[2 * node + 1];
}

inline void begin(const Memory& m, const float* logp, int known, Frame& f) {
    const Header& h = m.head();
    Place places[MOST_CONTEXTS];
    for (int c = 0; c < h.contexts; c++) {
        f.contexts[c] = context_of(m, m.part(c));
        fetch(m, places[c] = place_of(m, f.contexts[c], c, 1));
        if (known >= 0) fetch(m, place_of(m, f.contexts[c], c, 16 | known >> 4));
    }
    for (int i = 0; i < h.matches; i++) f.entries[i] = indexed(m, i);
    f.network = logp;
    if (logp) grow_tree(m, logp, f.tree);
    for (int i = 0; i < h.matches; i++) {
        f.matches[i] = better(m, i, f.entries[i]);
        f.expected[i] = f.matches[i].pointer ? 256 | m.byte(f.matches[i].pointer) : 0;
        f.buckets[i] = bucket_of(f.matches[i]);
    }
    for (int c = 0; c < h.contexts; c++) f.first[c] = found(m, places[c]);
}

// The rows of weights for a bit: nothing; bits so far; last byte; the network's confidence and the bit's number;
// contexts seen before and the match; the match and the network's confidence; the byte that the longest match expects;
// a hash of the last two.
inline void select(const Memory& m, int so_far, int bit, int hits, int matched, int confidence, int byte, int32_t* rows) {
    const uint64_t recent = m.head().recent;
    const int found[SETS] = {0, so_far, int(recent & 255), confidence * 8 + bit, hits * MATCHED + matched,
                             matched * CONFIDENCES + confidence, byte, int((recent & 0xFFFF) * 0x9E3779B1 >> 16 & (PAIRS - 1))};
    for (int s = 0; s < SETS; s++) rows[s] = FIRST[s] + found[s];
}

// Weights of a row beside a network before any were learnt there: seven tenths of those without it.
inline void spread(const Memory& m, int row, int32_t* to) {
    const Header& h = m.head();
    int from = row;
    if (row >= FIRST[5] && row < FIRST[6]) from -= (row - FIRST[5]) % CONFIDENCES;
    else if (row >= FIRST[3] && row < FIRST[4]) from = FIRST[3] + (row - FIRST[3]) % 8;
    const int32_t* learnt = m.at<int32_t>(h.weights) + int64_t(from) * h.inputs;
    const int network = int(2 * (h.contexts + h.matches));
    for (int i = 0; i < h.inputs; i++) to[i] = i < network ? int32_t(int64_t(learnt[i]) * 7 / 10) : learnt[i];
    to[network] = BESIDE;
}

inline int32_t* weights_of(const Memory& m, bool network, int row) {
    return m.at<int32_t>(m.head().weights) + (int64_t(network) * ALL_ROWS + row) * m.head().inputs;
}
inline int32_t* finals_of(const Memory& m, bool network, int so_far) {
    return m.at<int32_t>(m.head().finals) + (int64_t(network) * 256 + so_far) * 8;
}

// The sum over int32 products is exact below 512 nats, and modulo 2^32 above, in any order.
inline int32_t dot(const int32_t* w, const int32_t* x, int64_t inputs) {
    uint32_t sum = 0;
    for (int64_t i = 0; i < inputs; i++) sum += uint32_t(w[i] >> 6) * uint32_t(x[i]);
    return std::clamp((int32_t(sum) + (1 << 13)) >> 14, -WIDE, WIDE - 1);
}

inline void predict(const Memory& m, const Frame& f, int bit, int so_far, const Slot* const* slots, Bit& b) {
    const Header& h = m.head();
    const int node = bit < 4 ? so_far : (1 << (bit - 4)) | (so_far & ((1 << (bit - 4)) - 1));
    int32_t* x = b.x;
    int hits = 0, matched = 0, byte = 0;
    int64_t longest = -1;
    for (int c = 0; c < h.contexts; c++, x += 2) {
        x[0] = x[1] = 0;
        if (!slots[c]) continue;
        const Slot::Node& of = slots[c]->nodes[node - 1];
        if (!of.count) continue;
        x[0] = m.tables.stretch[m.at<uint32_t>(h.histories)[c * 256 + of.history] >> 20];
        x[1] = m.tables.stretch[of.p >> 4];
        hits += m.part(c).code == ORDER && m.part(c).parameter > 0;
    }
    for (int i = 0; i < h.matches; i++, x += 2) {
        x[0] = x[1] = 0;
        b.hits[i] = -1;
        if (f.expected[i] >> (8 - bit) != so_far) continue;
        const bool one = f.expected[i] >> (7 - bit) & 1;
        const int32_t p = int32_t(m.at<uint32_t>(h.hits)[i * 256 + f.buckets[i]] >> 10);
        const int z = m.stretch(p), centred = (p - WHOLE / 2) >> (BITS - 10);
        x[0] = one ? z : -z;
        x[1] = one ? centred : -centred;
        b.hits[i] = int32_t(f.buckets[i] * 2 + one);
        const int64_t n = f.matches[i].length;
        if (n > longest) longest = n, byte = f.expected[i] & 255;
        matched = std::max(matched, 1 + (n > 0) + (n > 15) + (n > 31));
    }
    int confidence = 0;
    std::fill(x, b.x + h.inputs, 0);
    if (f.network) {
        const int z = (logarithm(m, f.tree[2 * so_far + 1]) - logarithm(m, f.tree[2 * so_far]) + 2) >> 2;
        x[0] = b.network_z = std::clamp(z, -WIDE, WIDE - 1);
        map_rows(m, so_far, 0, b.network_rows);
        for (int i = 0; i < 3; i++) {
            const uint32_t* row = m.at<uint32_t>(h.network_maps) + int64_t(b.network_rows[i]) * CELLS;
            x[1 + i] = m.stretch(uint32_t(read_map(row, cell_of(b.network_z))));
        }
        confidence = std::min(std::abs(b.network_z) * 3 / (2 * NAT), CONFIDENCES - 1);
    }
    x[NETWORK_INPUTS] = BIAS;
    select(m, so_far, bit, std::min(hits, HITS - 1), matched, confidence, byte, b.rows);
    const int32_t* final_weights = finals_of(m, f.network && h.met, so_far);
    int64_t sum = 0;
    for (int s = 0; s < SETS; s++) {
        alignas(64) int32_t fresh[MOST_INPUTS];
        const int32_t* w = weights_of(m, f.network, b.rows[s]);
        if (f.network && !h.met) spread(m, b.rows[s], fresh), w = fresh;
        b.dots[s] = dot(w, b.x, h.inputs);
        sum += int64_t(b.dots[s]) * final_weights[s];
    }
    b.total = int32_t(std::clamp<int64_t>((sum + (1 << 19)) >> 20, -WIDE, WIDE - 1));
    b.mixed = m.squash(b.total);
    map_rows(m, so_far, matched, b.last_rows);
    int64_t all = 3 * int64_t(b.mixed);
    for (int i = 0; i < 3; i++)
        all += read_map(m.at<uint32_t>(h.last_maps) + int64_t(b.last_rows[i]) * CELLS, cell_of(b.total));
    b.p = int32_t(std::clamp<int64_t>(all / 6, 1, WHOLE - 1));
}

// A network appears: weights beside it begin as those without it.
inline void meet(const Memory& m) {
    Header& h = m.head();
    m.touch(weights_of(m, true, 0), int64_t(ALL_ROWS) * h.inputs * 4);
    for (int row = 0; row < ALL_ROWS; row++) spread(m, row, weights_of(m, true, row));
    m.touch(finals_of(m, true, 0), 256 * 8 * 4);
    std::memcpy(finals_of(m, true, 0), finals_of(m, false, 0), 256 * 8 * 4);
    m.put(h.met, 1);
}

inline int32_t scaled(int32_t error, int64_t rate) { return int32_t((int64_t(error) * rate + 32768) >> 16); }

inline void teach_bit(const Memory& m, const Frame& f, const Bit& b, int so_far, bool one, int64_t rate) {
    const Header& h = m.head();
    const int32_t target = one ? WHOLE : 0;
    for (int s = 0; s < SETS; s++) {
        const uint32_t error = uint32_t(scaled(target - m.squash(b.dots[s]), rate));
        int32_t* w = weights_of(m, f.network, b.rows[s]);
        m.touch(w, h.inputs * 4);
        for (int64_t i = 0; i < h.inputs; i++)
            w[i] = int32_t(uint32_t(w[i]) + uint32_t(int32_t(uint32_t(b.x[i]) * error + 512) >> 10));
    }
    int32_t* w = finals_of(m, f.network, so_far);
    m.touch(w, SETS * 4);
    const int64_t error = scaled(target - b.mixed, 65);
    for (int s = 0; s < SETS; s++) w[s] = int32_t(uint32_t(w[s]) + uint32_t((error * b.dots[s] + 512) >> 10));
    for (int i = 0; i < 3; i++)
        teach_map(m, m.at<uint32_t>(h.last_maps) + int64_t(b.last_rows[i]) * CELLS, cell_of(b.total), one);
    if (f.network)
        for (int i = 0; i < 3; i++)
            teach_map(m, m.at<uint32_t>(h.network_maps) + int64_t(b.network_rows[i]) * CELLS, cell_of(b.network_z), one);
    for (int i = 0; i < h.matches; i++) {
        if (b.hits[i] < 0) continue;
        uint32_t& cell = m.at<uint32_t>(h.hits)[i * 256 + b.hits[i] / 2];
        m.put(cell, observed(m, cell, (b.hits[i] & 1) == one, 250));
    }
}

// Everything that a byte teaches, after its eight bits were predicted.
inline void learn(const Memory& m, const Frame& f, const Bit* bits, uint8_t byte) {
    Header& h = m.head();
    if (f.network && !h.met) meet(m);
    const int64_t steps = h.steps[f.network], rate = std::max<int64_t>(197, 655 * 20000 / (20000 + steps));
    if (steps < (1 << 30)) m.put(h.steps[f.network], steps + 1);
    for (int bit = 0, so_far = 1; bit < 8; bit++) {
        const bool one = byte >> (7 - bit) & 1;
        teach_bit(m, f, bits[bit], so_far, one, rate);
        so_far = 2 * so_far + one;
    }
    for (int c = 0; c < h.contexts; c++) {
        uint32_t* map = m.at<uint32_t>(h.histories) + c * 256;
        learn_half(m, claimed(m, place_of(m, f.contexts[c], c, 1)), map, byte >> 4);
        learn_half(m, claimed(m, place_of(m, f.contexts[c], c, 16 | byte >> 4)), map, byte & 15);
    }
    for (int i = 0; i < h.matches; i++) {
        m.put(*m.at<Match>(m.part(h.contexts + i).at), after(f.matches[i], (f.expected[i] & 255) == byte));
        if (f.entries[i]) m.put(*f.entries[i], uint32_t(h.position));
    }
    for (int c = 0; c < h.contexts; c++) note_byte(m, m.part(c), byte);
    m.put(m.ringed(h.position), byte);
    m.put(h.recent, h.recent << 8 | byte);
    m.put(h.position, h.position + 1);
}

}  // namespace bytelm::online
