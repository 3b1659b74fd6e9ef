// Which of the instruction sets that kernels are compiled for this processor has, and the system saves: 1 x86-64-v2,
// 2 x86-64-v3, 3 x86-64-v4, 4 that with products in bfloat16; 1 for any ARM of 64 bits, 0 for anything else.
// Asked of the processor itself, as not every compiler has __builtin_cpu_supports.

#include <cstdint>
#include <initializer_list>

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace {

#if defined(__x86_64__)
struct Leaf {
    uint32_t a = 0, b = 0, c = 0, d = 0;
    Leaf(uint32_t leaf, uint32_t part = 0) { __get_cpuid_count(leaf, part, &a, &b, &c, &d); }
};

constexpr uint32_t bits(std::initializer_list<int> places) {
    uint32_t all = 0;
    for (const int place : places) all |= 1u << place;
    return all;
}
constexpr bool has(uint32_t found, uint32_t wanted) { return (found & wanted) == wanted; }

int64_t level() {
    const Leaf basic(1), extended(7), more(7, 1), amd(0x80000001);
    constexpr uint32_t V2 = bits({0, 9, 13, 19, 20, 23});  // SSE3, SSSE3, CMPXCHG16B, SSE4.1, SSE4.2, POPCNT
    if (!has(basic.c, V2)) return 0;
    if (!has(basic.c, bits({27}))) return 1;  // the system saves no vectors of AVX
    uint32_t saved, upper;
    asm("xgetbv" : "=a"(saved), "=d"(upper) : "c"(0));
    constexpr uint32_t V3 = bits({12, 22, 28, 29});  // FMA, MOVBE, AVX, F16C
    constexpr uint32_t V3_EXTENDED = bits({3, 5, 8});  // BMI1, AVX2, BMI2
    if (!has(saved, bits({1, 2})) || !has(basic.c, V3) || !has(extended.b, V3_EXTENDED) || !has(amd.c, bits({5}))) return 1;
    constexpr uint32_t V4 = bits({16, 17, 28, 30, 31});  // AVX-512 F, DQ, CD, BW, VL
    if (!has(saved, bits({5, 6, 7})) || !has(extended.b, V4)) return 2;
    return has(more.a, bits({5})) ? 4 : 3;  // AVX-512 BF16
}
#elif defined(__aarch64__)
int64_t level() { return 1; }
#else
int64_t level() { return 0; }
#endif

}  // namespace

extern "C" int64_t bytelm_level() { return level(); }
