// Vectors of 64 bytes, in as many registers as the processor needs: one of 64 bytes with AVX-512, two of 32 with AVX2,
// four of 16 with SSE2 or NEON. Compilers take vectors that are wider than a register apart through memory.
//
// The lanes are the same whatever the processor is, and nothing is contracted (-ffp-contract=off; `fma` is explicit). So
// processors that multiply and add in one operation give the same bits.

#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#include <utility>

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__ARM_NEON)
#include <arm_neon.h>
#endif

#define BYTELM_INLINE inline __attribute__((always_inline))

namespace bytelm {

#if defined(__AVX512F__) && defined(__FMA__)
#define BYTELM_AVX512 1
constexpr int REGISTER = 64;
#elif defined(__AVX2__) && defined(__FMA__)
#define BYTELM_AVX2 1
constexpr int REGISTER = 32;
#else
constexpr int REGISTER = 16;
#endif
constexpr int REGISTERS = 64 / REGISTER;  // of a vector
#if defined(BYTELM_AVX512) || defined(BYTELM_AVX2) || defined(__ARM_NEON)
constexpr bool FUSED = true;  // `fma` of vectors is rounded once: such processors give the same bits
#else
constexpr bool FUSED = false;
#endif

template <class T, int BYTES> struct Vector {
    Vector<T, BYTES / 2> low, high;
};
template <class T> struct Vector<T, REGISTER> {
    typedef T Raw __attribute__((vector_size(REGISTER)));
    Raw raw;
};

template <class T> using vec = Vector<T, 64>;
template <class T> constexpr int LANES = 64 / int(sizeof(T));

struct bf16 { uint16_t bits; };
typedef uint32_t word;

template <int SIZE> struct Integer { typedef int32_t type; };
template <> struct Integer<8> { typedef int64_t type; };
template <class T> using integer = typename Integer<sizeof(T)>::type;
template <class T> struct Given { typedef T type; };  // is not deduced: a scalar of another type is converted
template <class T> using given = typename Given<T>::type;

// A function of registers for each register of vectors; R: the type of the lanes that it returns.
template <class R, class F, class T, int B, class... More>
BYTELM_INLINE Vector<R, B> each(F function, Vector<T, B> x, Vector<More, B>... more) {
    if constexpr (B == REGISTER)
        return {(typename Vector<R, B>::Raw)function(x.raw, more.raw...)};
    else
        return {each<R>(function, x.low, more.low...), each<R>(function, x.high, more.high...)};
}

template <class T, int B = 64> BYTELM_INLINE Vector<T, B> all(given<T> x) {
    if constexpr (B == REGISTER)
        return {x - typename Vector<T, B>::Raw{}};
    else
        return {all<T, B / 2>(x), all<T, B / 2>(x)};
}

#define BYTELM_OPERATOR(R, OP)                                                                                  \
    template <class T, int B> BYTELM_INLINE auto operator OP(Vector<T, B> a, Vector<T, B> b) {                   \
        return each<R>([](auto x, auto y) { return x OP y; }, a, b);                                             \
    }                                                                                                            \
    template <class T, int B> BYTELM_INLINE auto operator OP(Vector<T, B> a, given<T> b) { return a OP all<T, B>(b); } \
    template <class T, int B> BYTELM_INLINE auto operator OP(given<T> a, Vector<T, B> b) { return all<T, B>(a) OP b; }
BYTELM_OPERATOR(T, +)
BYTELM_OPERATOR(T, -)
BYTELM_OPERATOR(T, *)
BYTELM_OPERATOR(T, /)
BYTELM_OPERATOR(T, &)
BYTELM_OPERATOR(T, |)
BYTELM_OPERATOR(T, ^)
BYTELM_OPERATOR(integer<T>, <)
BYTELM_OPERATOR(integer<T>, >)
BYTELM_OPERATOR(integer<T>, <=)
BYTELM_OPERATOR(integer<T>, >=)
BYTELM_OPERATOR(integer<T>, ==)
#undef BYTELM_OPERATOR
template <class T, int B> BYTELM_INLINE Vector<T, B> operator<<(Vector<T, B> a, int bits) {
    return each<T>([bits](auto x) { return x << bits; }, a);
}
template <class T, int B> BYTELM_INLINE Vector<T, B> operator>>(Vector<T, B> a, int bits) {
    return each<T>([bits](auto x) { return x >> bits; }, a);
}
template <class T, int B, class X> BYTELM_INLINE Vector<T, B>& operator+=(Vector<T, B>& a, X b) { return a = a + b; }
template <class T, int B> BYTELM_INLINE Vector<T, B> operator-(Vector<T, B> a) {
    return each<T>([](auto x) { return -x; }, a);
}

// The same bits as lanes of another type; numbers converted to one of the same size, towards zero.
template <class R, class T, int B> BYTELM_INLINE Vector<R, B> as(Vector<T, B> a) {
    return each<R>([](auto x) { return x; }, a);
}
template <class R, class T, int B> BYTELM_INLINE Vector<R, B> converted(Vector<T, B> a) {
    return each<R>([](auto x) { return __builtin_convertvector(x, typename Vector<R, REGISTER>::Raw); }, a);
}

template <class T, int B> BYTELM_INLINE Vector<T, B> select(Vector<integer<T>, B> where, Vector<T, B> a, Vector<T, B> b) {
    return each<T>([](auto w, auto x, auto y) { return w ? x : y; }, where, a, b);
}
template <class T, int B> BYTELM_INLINE Vector<T, B> larger(Vector<T, B> a, Vector<T, B> b) { return select(a > b, a, b); }
template <class T, int B> BYTELM_INLINE Vector<T, B> smaller(Vector<T, B> a, Vector<T, B> b) { return select(a < b, a, b); }

// a * b + c, rounded once where the processor can.
template <class T, int B> BYTELM_INLINE Vector<T, B> fma(Vector<T, B> a, Vector<T, B> b, Vector<T, B> c) {
    return each<T>(
        [](auto x, auto y, auto z) {
            if constexpr (sizeof(T) == 4) {
#if defined(BYTELM_AVX512)
                return _mm512_fmadd_ps((__m512)x, (__m512)y, (__m512)z);
#elif defined(BYTELM_AVX2)
                return _mm256_fmadd_ps((__m256)x, (__m256)y, (__m256)z);
#elif defined(__ARM_NEON)
                return vfmaq_f32((float32x4_t)z, (float32x4_t)x, (float32x4_t)y);
#else
                return x * y + z;
#endif
            } else {
#if defined(BYTELM_AVX512)
                return _mm512_fmadd_pd((__m512d)x, (__m512d)y, (__m512d)z);
#elif defined(BYTELM_AVX2)
                return _mm256_fmadd_pd((__m256d)x, (__m256d)y, (__m256d)z);
#elif defined(__ARM_NEON)
                return vfmaq_f64((float64x2_t)z, (float64x2_t)x, (float64x2_t)y);
#else
                return x * y + z;
#endif
            }
        },
        a, b, c);
}
template <class T, int B> BYTELM_INLINE Vector<T, B> fma(Vector<T, B> a, Vector<T, B> b, given<T> c) {
    return fma(a, b, all<T, B>(c));
}
template <class T, int B> BYTELM_INLINE Vector<T, B> fma(Vector<T, B> a, given<T> b, Vector<T, B> c) {
    return fma(a, all<T, B>(b), c);
}

template <int B> BYTELM_INLINE Vector<float, B> root(Vector<float, B> a) {
    return each<float>(
        [](auto x) {
#if defined(BYTELM_AVX512)
            return _mm512_sqrt_ps((__m512)x);
#elif defined(BYTELM_AVX2)
            return _mm256_sqrt_ps((__m256)x);
#elif defined(__x86_64__)
            return _mm_sqrt_ps((__m128)x);
#elif defined(__ARM_NEON)
            return vsqrtq_f32((float32x4_t)x);
#else
            for (int i = 0; i < REGISTER / 4; i++) x[i] = std::sqrt(x[i]);
            return x;
#endif
        },
        a);
}

// Prevents compilers from reloading a value from memory for every use.
template <class T, int B> BYTELM_INLINE Vector<T, B> in_register(Vector<T, B> a) {
    return each<T>(
        [](auto x) {
#if defined(BYTELM_AVX512)
            asm("" : "+v"(x));
#elif defined(__x86_64__)
            asm("" : "+x"(x));
#elif defined(__ARM_NEON)
            asm("" : "+w"(x));
#endif
            return x;
        },
        a);
}

// --- memory -----------------------------------------------------------------------------------------------------------

template <class T, int B = 64> BYTELM_INLINE Vector<T, B> load(const T* at) {
    if constexpr (B == REGISTER) {
        Vector<T, B> x;
        memcpy(&x.raw, at, B);
        return x;
    } else {
        return {load<T, B / 2>(at), load<T, B / 2>(at + B / 2 / sizeof(T))};
    }
}
template <class T, int B> BYTELM_INLINE void store(T* at, Vector<T, B> x) {
    if constexpr (B == REGISTER) {
        memcpy(at, &x.raw, B);
    } else {
        store(at, x.low);
        store(at + B / 2 / sizeof(T), x.high);
    }
}

typedef uint16_t Halves __attribute__((vector_size(REGISTER / 2)));

template <int B> BYTELM_INLINE Vector<word, B> load_halves(const uint16_t* at) {  // each in a word
    if constexpr (B == REGISTER) {
        Halves x;
        memcpy(&x, at, sizeof x);
        return {__builtin_convertvector(x, typename Vector<word, B>::Raw)};
    } else {
        return {load_halves<B / 2>(at), load_halves<B / 2>(at + B / 8)};
    }
}
template <int B> BYTELM_INLINE void store_halves(uint16_t* at, Vector<word, B> x) {  // the lower halves of words
    if constexpr (B == REGISTER) {
        const Halves y = __builtin_convertvector(x.raw, Halves);
        memcpy(at, &y, sizeof y);
    } else {
        store_halves(at, x.low);
        store_halves(at + B / 8, x.high);
    }
}
BYTELM_INLINE vec<float> load(const bf16* at) { return as<float>(load_halves<64>(&at->bits) << 16); }

template <int B> BYTELM_INLINE Vector<float, B> load_bytes(const int8_t* at) {
    if constexpr (B == REGISTER) {
#if defined(BYTELM_AVX512)
        return {(typename Vector<float, B>::Raw)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)at)))};
#elif defined(BYTELM_AVX2)
        return {(typename Vector<float, B>::Raw)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)at)))};
#else
        typename Vector<int32_t, B>::Raw x;
        for (int i = 0; i < B / 4; i++) x[i] = at[i];
        return {__builtin_convertvector(x, typename Vector<float, B>::Raw)};
#endif
    } else {
        return {load_bytes<B / 2>(at), load_bytes<B / 2>(at + B / 8)};
    }
}
BYTELM_INLINE vec<float> load(const int8_t* at) { return load_bytes<64>(at); }

// The last, incomplete vector of a line, padded with zeros or what is given.
template <class A> BYTELM_INLINE vec<A> load_some(const A* at, int64_t count, A padding = A(0)) {
    if (count >= LANES<A>) return load(at);
    A some[LANES<A>];
    for (int64_t i = 0; i < LANES<A>; i++) some[i] = i < count ? at[i] : padding;
    return load<A>(some);
}
template <class A> BYTELM_INLINE void store_some(A* at, vec<A> x, int64_t count) {
    if (count >= LANES<A>) return store(at, x);
    A some[LANES<A>];
    store(some, x);
    for (int64_t i = 0; i < count; i++) at[i] = some[i];
}

inline float widened(float x) { return x; }
inline double widened(double x) { return x; }
inline float widened(int8_t x) { return x; }
inline float widened(bf16 x) {
    const uint32_t bits = uint32_t(x.bits) << 16;
    float y;
    memcpy(&y, &bits, 4);
    return y;
}
inline void narrow(float* at, float x) { *at = x; }
inline void narrow(double* at, double x) { *at = x; }
inline void narrow(bf16* at, float x) {  // to nearest, ties to even, as torch rounds
    uint32_t bits;
    memcpy(&bits, &x, 4);
    const uint32_t up = bits + 0x7FFF + ((bits >> 16) & 1);
    at->bits = uint16_t((x == x ? up : bits | 0x400000) >> 16);  // adding would make a NaN a number
}

// --- across lanes -----------------------------------------------------------------------------------------------------

template <int BY, class Raw, size_t... I> BYTELM_INLINE Raw rotated(Raw x, std::index_sequence<I...>) {
    return __builtin_shufflevector(x, x, int((I + BY) % sizeof...(I))...);
}
// Of a register: lanes i and i + BY, then those of the half, and so on.
template <int BY, class T, class F> BYTELM_INLINE T reduced(Vector<T, REGISTER> x, F function) {
    if constexpr (BY == 0) {
        return x.raw[0];
    } else {
        const Vector<T, REGISTER> y = {rotated<BY>(x.raw, std::make_index_sequence<REGISTER / sizeof(T)>())};
        return reduced<BY / 2, T>(function(x, y), function);
    }
}
template <class T, int B, class F> BYTELM_INLINE T across(Vector<T, B> x, F function) {
    if constexpr (B == REGISTER)
        return reduced<B / int(sizeof(T)) / 2, T>(x, function);
    else
        return across(function(x.low, x.high), function);
}
template <class T> BYTELM_INLINE T sum(vec<T> x) {
    return across(x, [](auto a, auto b) { return a + b; });
}
template <class T> BYTELM_INLINE T highest(vec<T> x) {
    return across(x, [](auto a, auto b) { return larger(a, b); });
}

}  // namespace bytelm
