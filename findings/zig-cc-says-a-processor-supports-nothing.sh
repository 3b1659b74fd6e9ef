#!/usr/bin/env bash
# One would guess: __builtin_cpu_supports, which clang and GCC have for choosing code by what the processor can, says the
# same in a program that `zig cc` (clang, in the package ziglang) compiles for this machine.
# Zig 0.17.1 compiles and links it without a warning, and it answers no to everything on any x86-64, even to SSE2, which
# all of them have; after __builtin_cpu_init, too. So a wheel that is cross-compiled with Zig and chooses its code so
# takes the slowest one everywhere, and nothing says why. Asked by the instruction itself (cpuid.h) the same program knows.
# Needs an x86-64 processor with Linux.
set -euo pipefail
test "$(uname -sm)" = "Linux x86_64" || { echo "this is about x86-64"; exit 2; }
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv env
env/bin/pip install -qq --disable-pip-version-check ziglang==0.17.1

cat > supports.c <<'C'
#include <cpuid.h>
#include <stdio.h>
int main(void) {
    unsigned a = 0, b = 0, c = 0, d = 0;
    __cpuid(1, a, b, c, d);
    __builtin_cpu_init();
    printf("sse2: builtin %d, cpuid %d\n", __builtin_cpu_supports("sse2") != 0, (d >> 26) & 1);
    printf("sse4.2: builtin %d, cpuid %d\n", __builtin_cpu_supports("sse4.2") != 0, (c >> 20) & 1);
    return 0;
}
C
env/bin/python -m ziglang cc -O1 -Wall supports.c -o supports 2>warnings
echo "ziglang $(env/bin/python -m ziglang version), warnings: $(wc -l < warnings)"
./supports | tee seen
test ! -s warnings
grep -q "sse2: builtin 0, cpuid 1" seen
