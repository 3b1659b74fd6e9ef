// Arithmetic coding of bits, carryless: an interval of 32 bits, of which equal leading bytes are done with.
// Witten, Neal and Cleary 1987; the division by 2^22 is exact in 64 bits.

#pragma once

#include "online_state.h"

namespace bytelm::online {

struct Coder {
    int64_t low, high, code, at;  // `at`: bytes put out, or taken in

    int64_t middle(int32_t p) const { return low + ((high - low) * p >> BITS); }
    bool narrow(bool one, int64_t middle) {
        one ? high = middle : low = middle + 1;
        return one;
    }
    bool settled() const { return !((low ^ high) >> 24); }
    void shift() {
        low = low << 8 & 0xFFFFFFFF;
        high = (high << 8 & 0xFFFFFFFF) | 255;
    }
    void put(bool one, int32_t p, uint8_t*& out) {
        narrow(one, middle(p));
        for (; settled(); shift(), at++) *out++ = uint8_t(high >> 24);
    }
    // What was coded; -1 where the bytes end before it.
    int get(int32_t p, const uint8_t* data, int64_t size) {
        const int64_t between = middle(p);
        const bool one = narrow(code <= between, between);
        for (; settled(); shift(), at++) {
            if (at >= size) return -1;
            code = (code << 8 & 0xFFFFFFFF) | data[at];
        }
        return one;
    }
};

}  // namespace bytelm::online
