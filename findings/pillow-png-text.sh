#!/usr/bin/env bash
# One would guess that text beside a picture has no say in whether its pixels are read.
# Pillow refuses a sound PNG with more than 1 MB of compressed text (zTXt, or iTXt compressed: workflows of image
# generators, protocols of microscopes) with ValueError, on opening it; as plain tEXt the limit is 64 MB in all.
# With one wrong checksum of a text chunk before the pixels it says "cannot identify image file", as of a file that is
# no picture at all; with the same chunk behind the pixels it reads the picture and says nothing.
# It matters because a loader that skips what is "not an image" loses such pictures unseen.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check pillow==12.3.0
"$folder/venv/bin/python" - <<'PYTHON'
import io, struct, zlib

import PIL
from PIL import Image


def chunk(kind, content, wrong=0):
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content) ^ wrong)


def opened(data):
    try:
        image = Image.open(io.BytesIO(data))
        image.load()
        return f"read, {image.size}"
    except Exception as error:
        return f"{type(error).__name__}: {str(error).partition(' <')[0]}"


plain = io.BytesIO()
Image.new("RGB", (4, 4)).save(plain, "PNG")
head, body, end = plain.getvalue()[:33], plain.getvalue()[33:-12], plain.getvalue()[-12:]
text = b"x" * (3 << 20)
packed, loose = chunk(b"zTXt", b"prompt\0\0" + zlib.compress(text)), chunk(b"tEXt", b"prompt\0" + text)
wrong = chunk(b"tEXt", b"prompt\0x", wrong=1)
seen = {
    "3 MB of text, plain": opened(head + loose + body + end),
    "3 MB of text, compressed": opened(head + packed + body + end),
    "a wrong checksum before the pixels": opened(head + wrong + body + end),
    "a wrong checksum behind the pixels": opened(head + body + wrong + end),
}
print("Pillow", PIL.__version__)
for what, came in seen.items():
    print(f"{what}: {came}")
assert list(seen.values()) == [
    "read, (4, 4)",
    "ValueError: Decompressed data too large for PngImagePlugin.MAX_TEXT_CHUNK",
    "UnidentifiedImageError: cannot identify image file",
    "read, (4, 4)",
], "the behaviour changed"
PYTHON
