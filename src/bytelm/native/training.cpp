// Entry points for training. See attend.h, crossed.h and pointwise.h. `wide`: numbers are float32, not bfloat16.

#define BYTELM_TORCH_THREADS 1
#include "attend.h"
#include "crossed.h"
#include "pointwise.h"

using namespace bytelm;

namespace {

template <class X> void attend(const Attend<X>& a, bool back, int threads) {
    if (back)
        attend_all_back(a, threads);
    else
        attend_all(a, threads);
}

template <class X> void crossed(const Crossed<X>& a, bool patches_query, bool back, int threads) {
    if (patches_query)
        (back ? patches_backward<X> : patches_forward<X>)(a, threads);
    else
        (back ? bytes_backward<X> : bytes_forward<X>)(a, threads);
}

template <class X> void swiglu(const X* x, const X* d_y, int64_t lines, int64_t dim, X* to, int threads) {
    if (d_y)
        swiglu_backward(x, d_y, lines, dim, to, threads);
    else
        swiglu_forward(x, lines, dim, to, threads);
}

}  // namespace

extern "C" {

int64_t bytelm_native_pairs() {  // whether the processor multiplies bfloat16
#if defined(BYTELM_NATIVE_PAIRS)
    return 1;
#else
    return 0;
#endif
}

int64_t bytelm_avoids_mkl() {  // whether there is AVX-512 that MKL, which is Intel's, does not use
#if defined(BYTELM_AVX512)
    return !__builtin_cpu_is("intel");
#else
    return 0;
#endif
}

void bytelm_attend(const void* a, int64_t wide, int64_t back, int64_t threads) {
    if (wide)
        attend(*(const Attend<float>*)a, back, int(threads));
    else
        attend(*(const Attend<bf16>*)a, back, int(threads));
}

void bytelm_crossed(const void* a, int64_t wide, int64_t patches_query, int64_t back, int64_t threads) {
    if (wide)
        crossed(*(const Crossed<float>*)a, patches_query, back, int(threads));
    else
        crossed(*(const Crossed<bf16>*)a, patches_query, back, int(threads));
}

// Of `y` there is bfloat16 of either, but float32 of float32 alone.
void bytelm_norm(
    const void* x, int64_t wide, const float* weight, int64_t lines, int64_t dim, double eps, void* y, int64_t wide_y,
    float* factor, int64_t threads
) {
    if (wide_y)
        norm_forward((const float*)x, weight, lines, dim, float(eps), (float*)y, factor, int(threads));
    else if (wide)
        norm_forward((const float*)x, weight, lines, dim, float(eps), (bf16*)y, factor, int(threads));
    else
        norm_forward((const bf16*)x, weight, lines, dim, float(eps), (bf16*)y, factor, int(threads));
}

void bytelm_norm_back(
    const void* x, int64_t wide, const float* weight, const float* factor, const void* d_y, int64_t wide_y, int64_t lines,
    int64_t dim, void* d_x, float* d_weight, int64_t threads
) {
    if (wide_y)
        norm_backward((const float*)x, weight, factor, (const float*)d_y, lines, dim, (float*)d_x, d_weight, int(threads));
    else if (wide)
        norm_backward((const float*)x, weight, factor, (const bf16*)d_y, lines, dim, (float*)d_x, d_weight, int(threads));
    else
        norm_backward((const bf16*)x, weight, factor, (const bf16*)d_y, lines, dim, (bf16*)d_x, d_weight, int(threads));
}

void bytelm_swiglu(
    const void* x, int64_t wide, const void* d_y, int64_t lines, int64_t dim, void* to, int64_t threads
) {
    if (wide)
        swiglu((const float*)x, (const float*)d_y, lines, dim, (float*)to, int(threads));
    else
        swiglu((const bf16*)x, (const bf16*)d_y, lines, dim, (bf16*)to, int(threads));
}

void bytelm_turn(const Turn* a, const void* x, int64_t wide, double sign, void* y, int64_t threads) {
    if (wide)
        turn(*a, (const float*)x, float(sign), (float*)y, int(threads));
    else
        turn(*a, (const bf16*)x, float(sign), (bf16*)y, int(threads));
}

void bytelm_gather_rows(
    const float* slope, const int64_t* reader, const int64_t* ends, int64_t count, int64_t dim, float* to, int64_t threads
) {
    gather_rows(slope, reader, ends, count, dim, to, int(threads));
}

void bytelm_adam_rows(const Rows* rows, int64_t threads) { adam_rows(*rows, int(threads)); }
}
