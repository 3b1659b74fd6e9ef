#!/usr/bin/env bash
# One would guess that SoundFile.read() reads any file that SoundFile opens, and that read(n) gives the n frames it read.
# What happens: python-soundfile seeks to where it already is after every read of a file that libsndfile calls seekable.
# A FLAC file without a sample count (what `ffmpeg -f flac -` and `flac -c` write into a pipe) is one of those: frames is
# 2^63-1, read() asks for an array of that size, and read(n) drops the last piece, as the seek to the end of it fails.
# Telephone formats (GSM 6.10, G.721, G.723, NMS ADPCM) are not seekable: read() without a count is a ValueError.
# Why it matters: one clip of either kind ends the reading of a whole data set. Read in pieces, with seekable() False.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q numpy==2.4.6 soundfile==0.14.0
"$work/venv/bin/python" - <<'PY'
import io
import sys

import numpy as np
import soundfile

print("soundfile", soundfile.__version__, "libsndfile", soundfile.__libsndfile_version__)
samples = np.arange(10_000, dtype=np.int16)


def written(kind, subtype):
    file = io.BytesIO()
    soundfile.write(file, samples, 8000, subtype, format=kind)
    return file.getvalue()


flac = bytearray(written("FLAC", "PCM_16"))
flac[21:26] = bytes([flac[21] & 0xF0, 0, 0, 0, 0])  # the sample count in STREAMINFO: 0 is "unknown"


def pieces(in_order):
    got = 0
    with soundfile.SoundFile(io.BytesIO(flac)) as file:
        count = file.frames
        if in_order:
            file.seekable = lambda: False
        try:
            while len(piece := file.read(3000, dtype="int16")):
                got += len(piece)
        except soundfile.LibsndfileError as error:
            return count, got, error.code
    return count, got, 0


def whole(data):
    try:
        return len(soundfile.SoundFile(io.BytesIO(data)).read())
    except (ValueError, MemoryError) as error:
        return type(error).__name__ + ": " + str(error)


found = pieces(False), pieces(True)
print("FLAC without a count (frames, frames read in pieces, error):", found[0], "; without seeking:", found[1])
gsm = whole(written("WAV", "GSM610"))
print("GSM 6.10, read():", gsm)
as_told = found[0][0] == 2**63 - 1 and found[0][1] < 10_000 and found[0][2] and found[1][1:] == (10_000, 0)
sys.exit(not (as_told and str(gsm).startswith("ValueError")))
PY
