#!/usr/bin/env bash
# One would guess: a loop over GNU vectors of 64 bytes, compiled for AVX2, costs twice what one over 32 bytes costs, as
# each operation becomes two on registers that are there in plenty.
# GCC 12 instead keeps sums of 64 bytes on the stack and moves them through general-purpose registers, 8 bytes at a
# time, in every round of the loop; the same source in vectors of 32 bytes has no such move, and neither has clang's
# code for 64 bytes. Why it matters: kernels written once "in the widest vectors" are many times slower on AVX2 with
# GCC, and nothing warns of it. Needs g++ 12 on x86-64 (Debian 12: package g++).
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"

version=$(g++ -dumpfullversion)
echo "g++ $version"
case $version in 12.*) ;; *) echo "this is about g++ 12"; exit 2 ;; esac
python3 -m venv env
env/bin/pip install -qq --disable-pip-version-check ziglang==0.13.0

cat > sums.cpp <<'CPP'
#include <cstring>
typedef float vec __attribute__((vector_size(BYTES)));
constexpr long N = BYTES / 4;
static inline vec load(const float* at) { vec x; memcpy(&x, at, sizeof x); return x; }
extern "C" void products(const float* x, const float* w, float* y, long n) {
    vec a = {}, b = {};
    for (long i = 0; i < n; i += 2 * N) {
        a += load(x + i) * load(w + i);
        b += load(x + i + N) * load(w + i + N);
    }
    a += b;
    memcpy(y, &a, sizeof a);
}
CPP

# Instructions of the function that read or write the stack, the two that open and close a frame left out.
on_stack() { sed -n '/^products:/,/\.size/p' "$1" | grep -cE '(mov|add|fma)[a-z0-9]*\s.*\(%r[sb]p\)' || true; }
g++ -std=c++17 -O3 -Wno-psabi -mavx2 -mfma -DBYTES=64 -S -o gcc64.s sums.cpp
g++ -std=c++17 -O3 -Wno-psabi -mavx2 -mfma -DBYTES=32 -S -o gcc32.s sums.cpp
env/bin/python -m ziglang c++ -std=c++17 -O3 -Wno-psabi -target x86_64-linux-gnu -mcpu=x86_64_v3 -DBYTES=64 -S -o clang64.s sums.cpp
gcc64=$(on_stack gcc64.s) gcc32=$(on_stack gcc32.s) clang64=$(on_stack clang64.s)
echo "moves over the stack: g++, 64 bytes: $gcc64; g++, 32 bytes: $gcc32; clang of ziglang 0.13.0, 64 bytes: $clang64"
test "$gcc64" -ge 10 && test "$gcc32" -eq 0 && test "$clang64" -eq 0
