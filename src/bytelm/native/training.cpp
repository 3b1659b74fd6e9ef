// Entry points for training. See attend.h, crossed.h and pointwise.h.

#include "attend.h"
#include "crossed.h"
#include "pointwise.h"

using namespace bytelm;

extern "C" {

int64_t bytelm_native_pairs() {  // whether the processor multiplies bfloat16
#if defined(BYTELM_NATIVE_PAIRS)
    return 1;
#else
    return 0;
#endif
}

void bytelm_attend(const Attend* a, int64_t back, int64_t threads) {
    if (back)
        attend_all_back(*a, int(threads));
    else
        attend_all(*a, int(threads));
}

void bytelm_crossed(const Crossed* a, int64_t patches_query, int64_t back, int64_t threads) {
    const auto pass = patches_query ? (back ? patches_backward : patches_forward) : (back ? bytes_backward : bytes_forward);
    pass(*a, int(threads));
}

void bytelm_norm(
    const void* x, int64_t wide, const float* weight, int64_t lines, int64_t dim, double eps, bf16* y, float* factor,
    int64_t threads
) {
    if (wide)
        norm_forward((const float*)x, weight, lines, dim, float(eps), y, factor, int(threads));
    else
        norm_forward((const bf16*)x, weight, lines, dim, float(eps), y, factor, int(threads));
}

void bytelm_norm_back(
    const void* x, int64_t wide, const float* weight, const float* factor, const bf16* d_y, int64_t lines, int64_t dim,
    void* d_x, float* d_weight, int64_t threads
) {
    if (wide)
        norm_backward((const float*)x, weight, factor, d_y, lines, dim, (float*)d_x, d_weight, int(threads));
    else
        norm_backward((const bf16*)x, weight, factor, d_y, lines, dim, (bf16*)d_x, d_weight, int(threads));
}

void bytelm_swiglu(const bf16* x, const bf16* d_y, int64_t lines, int64_t dim, bf16* to, int64_t threads) {
    if (d_y)
        swiglu_backward(x, d_y, lines, dim, to, int(threads));
    else
        swiglu_forward(x, lines, dim, to, int(threads));
}

void bytelm_turn(const Turn* a, const bf16* x, double sign, bf16* y, int64_t threads) {
    turn(*a, x, float(sign), y, int(threads));
}

void bytelm_gather_rows(
    const float* slope, const int64_t* reader, const int64_t* ends, int64_t count, int64_t dim, float* to, int64_t threads
) {
    gather_rows(slope, reader, ends, count, dim, to, int(threads));
}

void bytelm_adam_rows(const Rows* rows, int64_t threads) { adam_rows(*rows, int(threads)); }
}
