#!/usr/bin/env bash
# Zeros between or behind compressed streams: what tapes, `dd conv=sync` and disk images leave.
# One would guess that Python's gzip and lzma read what `gzip -dc` and `xz -dc` read.
# It is the other way about in both: `xz` takes zeros (a multiple of four) for the padding that its format names, and
# reads on; lzma.open gives what comes before them and ends without a word, or, where nothing follows, raises EOFError
# for a file that `xz -t` calls sound. Python's gzip reads the streams behind zeros; the program `gzip` drops them.
# It matters because half of a corpus can be lost without an error, and in which half depends on the reader.
set -euo pipefail
command -v gzip xz >/dev/null || { echo "needs gzip and xz"; exit 1; }
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
gzip --version | head -n 1
xz --version | head -n 1
python3 - <<'PYTHON'
import gzip, lzma, subprocess, sys


def tool(*words):
    done = subprocess.run(words, capture_output=True)
    return done.stdout, done.returncode


def python(module, name):
    try:
        return module.open(name).read()
    except EOFError:
        return "EOFError"


seen = {}
for module, name in ((gzip, "gzip"), (lzma, "xz")):
    for what, behind in (("between", module.compress(b"two")), ("behind", b"")):
        with open(f"{what}.{name}", "wb") as file:
            file.write(module.compress(b"one") + bytes(512) + behind)
        with open(f"{what}.{name}", "rb") as file:  # by standard input, whatever the name
            done = subprocess.run([name, "-dc"], stdin=file, capture_output=True)
        seen[name, what] = (done.stdout, python(module, f"{what}.{name}"))
        print(f"zeros {what} {name} streams: the program {done.stdout}, Python {seen[name, what][1]}")
print("Python", sys.version.split()[0])
assert seen == {
    ("gzip", "between"): (b"one", b"onetwo"),
    ("gzip", "behind"): (b"one", b"one"),
    ("xz", "between"): (b"onetwo", b"one"),
    ("xz", "behind"): (b"one", "EOFError"),
}, "the behaviour changed"
PYTHON
