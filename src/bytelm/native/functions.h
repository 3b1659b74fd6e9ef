// Exponential, logarithm, cosine and sine, of additions, multiplications and divisions in a fixed order: those of the C
// library, and of numpy, are chosen by the processor, and differ from system to system in their last digits.
//
// Arguments are reduced to a short interval by a multiple of a constant that is subtracted in parts, of which all but the
// last have so few bits that their products are exact (Cody and Waite 1980, Software Manual for the Elementary
// Functions). There a polynomial follows (Muller 2016, Elementary Functions, chapters 3 and 11).
//
// Largest errors (tests/native/test_functions.py): of the exponentials and the logarithm below one unit in the last place;
// of cosines and sines 1.5e-16. Where a product is rounded before a sum, as on processors before AVX2, exponentials have
// other last digits; the logarithm, cosines and sines fuse nothing, and are the same everywhere.

#pragma once
#include "vector.h"

namespace bytelm {

constexpr double ROUNDS = 6755399441055744.0;  // 1.5 * 2^52: added and subtracted, it leaves the nearest whole number

// e^x for x <= 0: 2^n times a polynomial on [-ln 2 / 2, ln 2 / 2]; below -87 that of -87.
BYTELM_INLINE vec<float> exponential(vec<float> x) {
    x = select(x < -87.0f, all<float>(-87.0f), x);  // keeps a NaN
    const vec<int32_t> whole = converted<int32_t>(fma(x, 1.442695041f, all<float>(-0.5f)));  // rounds: x is negative
    const vec<float> n = converted<float>(whole);
    const vec<float> r = fma(n, 2.12194440e-4f, fma(n, -0.693359375f, x));
    vec<float> p = fma(r, 1.0f / 5040, all<float>(1.0f / 720));
    p = fma(p, r, 1.0f / 120);
    p = fma(p, r, 1.0f / 24);
    p = fma(p, r, 1.0f / 6);
    p = fma(p, r, 0.5f);
    p = fma(p * r, r, r) + 1.0f;
    return p * as<float>((whole + 127) << 23);
}

constexpr double LN2_HIGH = 0.6931471803691238, LN2_LOW = 1.9082149292705877e-10;  // the first has 32 bits

// The same in float64; below -708 that of -708. The series ends where the next term is below 2^-57.
BYTELM_INLINE vec<double> exponential(vec<double> x) {
    x = select(x < -708.0, all<double>(-708.0), x);
    const vec<double> shifted = fma(x, 1.4426950408889634, all<double>(ROUNDS));  // its last bits: n, a whole number
    const vec<double> n = shifted - ROUNDS, r = fma(n, -LN2_LOW, fma(n, -LN2_HIGH, x));
    vec<double> p = fma(r, 1.0 / 6227020800, all<double>(1.0 / 479001600));  // 1 / 13!, 1 / 12!
    p = fma(p, r, 1.0 / 39916800);
    p = fma(p, r, 1.0 / 3628800);
    p = fma(p, r, 1.0 / 362880);
    p = fma(p, r, 1.0 / 40320);
    p = fma(p, r, 1.0 / 5040);
    p = fma(p, r, 1.0 / 720);
    p = fma(p, r, 1.0 / 120);
    p = fma(p, r, 1.0 / 24);
    p = fma(p, r, 1.0 / 6);
    p = fma(p, r, 0.5);
    p = fma(p * r, r, r) + 1.0;
    return p * as<double>((as<int64_t>(shifted) + 1023) << 52);
}

// Of a polynomial in z, from its highest coefficient on (Horner).
template <int COUNT> inline double polynomial(const double (&coefficient)[COUNT], double z) {
    double sum = coefficient[0];
    for (int k = 1; k < COUNT; k++) sum = sum * z + coefficient[k];
    return sum;
}

// ln x for x >= 0 that is no subnormal number: of x = 2^n (1 + f) with f between sqrt(1/2) - 1 and sqrt(2) - 1 it is
// n ln 2 + 2 artanh(s), s = f / (2 + f), where 2 artanh(s) = f - s (f - R) for R = 2 s^2 / 3 + 2 s^4 / 5 + ...
inline double logarithm(double x) {
    if (!(x > 0 && x < INFINITY)) return x == 0 ? -INFINITY : x;
    constexpr double SERIES[] = {2.0 / 21, 2.0 / 19, 2.0 / 17, 2.0 / 15, 2.0 / 13, 2.0 / 11, 2.0 / 9, 2.0 / 7, 2.0 / 5, 2.0 / 3};
    int64_t bits;
    memcpy(&bits, &x, 8);
    const int64_t above = bits - 0x3FE6A09E667F3BCD;  // the bits of sqrt(1/2)
    const double n = double(above >> 52);
    bits -= above >> 52 << 52;
    memcpy(&x, &bits, 8);
    const double f = x - 1, s = f / (2 + f), z = s * s;
    return n * LN2_HIGH + (f - (s * (f - z * polynomial(SERIES, z)) - n * LN2_LOW));
}

// The cosine and the sine of an angle below 2^26: those of what is left of it, by their series, where the next term is
// below 2^-57, after the nearest multiple of a right angle, of whose four parts the first three have 25 bits.
struct Angle {
    double cosine, sine;

    explicit Angle(double angle) {
        constexpr double SINE[] = {1.0 / 355687428096000, -1.0 / 1307674368000, 1.0 / 6227020800, -1.0 / 39916800,
                                   1.0 / 362880,          -1.0 / 5040,          1.0 / 120,        -1.0 / 6};
        constexpr double COSINE[] = {-1.0 / 6402373705728000, 1.0 / 20922789888000, -1.0 / 87178291200, 1.0 / 479001600,
                                     -1.0 / 3628800,          1.0 / 40320,          -1.0 / 720,         1.0 / 24};
        const double n = (angle * 0.6366197723675814 + ROUNDS) - ROUNDS;  // 2 / pi
        const double r = ((angle - n * 1.5707963109016418) - n * 1.5893254712295857e-08) - n * 6.123233932053594e-17 -
                         n * 6.36831716351095e-25;
        const double z = r * r, s = r + r * (z * polynomial(SINE, z)), c = 1 - (0.5 * z - z * (z * polynomial(COSINE, z)));
        const int64_t turns = int64_t(n) & 3;
        cosine = turns == 0 ? c : turns == 1 ? -s : turns == 2 ? -c : s;
        sine = turns == 0 ? s : turns == 1 ? c : turns == 2 ? -s : -c;
    }
};

}  // namespace bytelm
