"""Fuzzing with coverage: `python tests/fuzz.py TARGET --seconds N` gives a decoder one damaged input after another.

Whatever comes in is documents, or one of bytelm's errors on one line; anything else ends the run, with the input that
did it in a file. Needs atheris. What was found is kept as an ordinary case in data/test_fuzz.py.
"""

from __future__ import annotations

import argparse
import bz2
import gzip
import io
import json
import lzma
import sys
import tarfile
import tempfile
import wave
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import atheris

sys.path.insert(0, str(Path(__file__).parents[1] / "src"))

with atheris.instrument_imports(include=["bytelm"]):
    from bytelm.config import build, load_toml
    from bytelm.data import sources
    from bytelm.data.modalities import audio, image
    from bytelm.data.modalities.base import Modality
    from bytelm.errors import BytelmError

Target = Callable[[bytes], None]
TEXT = b'{"text": "some text, and \\u00e9"}\n'


def one_line(job: Callable[[], Any], *allowed: type[Exception]) -> None:
    """Run it; an error that a user is to see is on one line."""
    try:
        job()
    except BytelmError as error:
        assert "\n" not in str(error) and str(error), repr(error)
    except allowed:
        pass


def of_files(folder: Path, suffixes: tuple[str, ...]) -> Target:
    """Files with one of the suffixes, which the first byte of the input picks."""

    def run(data: bytes) -> None:
        path = folder / f"x{suffixes[data[0] % len(suffixes) if data else 0]}"
        path.write_bytes(data[1:])
        one_line(lambda: [sum(map(len, document.pieces)) for document in sources.documents([path], max_bad=1.0)])

    return run


def of_modality(modality: Modality, name: str) -> Target:
    return lambda data: one_line(lambda: list(modality.encode(name, data, Counter())))


def of_tensors(_: Path) -> Target:
    with atheris.instrument_imports(include=["bytelm"]):
        from bytelm.checkpoint.tensors import read

    def run(data: bytes) -> None:
        one_line(lambda: read(io.BufferedReader(io.BytesIO(data)), len(data), False), ValueError)  # pyright: ignore

    return run


def of_config(folder: Path) -> Target:
    with atheris.instrument_imports(include=["bytelm"]):
        from bytelm.training.config import RunConfig

    def run(data: bytes) -> None:
        path = folder / "x.toml"
        path.write_bytes(data)
        one_line(lambda: build(RunConfig, load_toml(path), str(path)))

    return run


def seeds(target: str) -> Iterator[bytes]:
    """Sound inputs to begin from."""
    if target == "compressed":
        import zstandard

        for number, compress in enumerate((gzip.compress, lzma.compress, zstandard.compress, bz2.compress)):
            yield bytes([number]) + compress(b"some text " * 50)
            yield bytes([number]) + compress(b"a") + compress(b"b")
    elif target == "archives":
        for form in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
            file = io.BytesIO()
            with tarfile.open(fileobj=file, mode="w", format=form) as archive:
                for name in ("a.txt", "n" * 120 + ".jsonl"):
                    member = tarfile.TarInfo(name)
                    member.size = len(TEXT)
                    archive.addfile(member, io.BytesIO(TEXT))
            yield b"\0" + file.getvalue()[:4000]
        file = io.BytesIO()
        with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as packed:
            packed.writestr("a.txt", TEXT)
            packed.writestr("b.gz", gzip.compress(TEXT))
        yield b"\1" + file.getvalue()
    elif target == "jsonl":
        yield b"\0" + TEXT * 3
        yield b"\1" + gzip.compress(TEXT)
    elif target == "parquet":
        import pyarrow as pa
        import pyarrow.parquet as pq

        for kind in (pa.string(), pa.binary()):
            for dictionary in (True, False):
                file = io.BytesIO()
                table = pa.table({"text": pa.array(["a", None, "some text"] * 9, kind)})
                pq.write_table(table, file, use_dictionary=dictionary, row_group_size=9)
                yield b"\0" + file.getvalue()
    elif target == "pictures":
        from PIL import Image

        for form in ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM"):
            file = io.BytesIO()
            Image.linear_gradient("L").resize((16, 16)).convert("RGB").save(file, form)
            yield file.getvalue()
    elif target == "audio":
        import numpy as np
        import soundfile

        file = io.BytesIO()
        with wave.open(file, "wb") as sound:
            sound.setparams((1, 2, 8000, 0, "NONE", ""))
            sound.writeframes(b"\0\1" * 200)
        yield file.getvalue()
        for form, subtype in (("FLAC", "PCM_16"), ("OGG", "VORBIS"), ("AIFF", "PCM_16"), ("WAV", "FLOAT")):
            file = io.BytesIO()
            soundfile.write(file, np.sin(np.arange(400) / 9), 8000, subtype, format=form)
            yield file.getvalue()
    elif target == "safetensors":
        head = json.dumps({"x": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}).encode()
        yield len(head).to_bytes(8, "little") + head + b"\0" * 8
    else:
        yield from (
            path.read_bytes() for path in (Path(__file__).parents[1] / "src/bytelm/presets").glob("*tiny*.toml")
        )


TARGETS: dict[str, Callable[[Path], Target]] = {
    "compressed": lambda folder: of_files(folder, (".gz", ".xz", ".zst", ".bz2")),
    "archives": lambda folder: of_files(folder, (".tar", ".zip")),
    "jsonl": lambda folder: of_files(folder, (".jsonl", ".jsonl.gz")),
    "parquet": lambda folder: of_files(folder, (".parquet",)),
    "pictures": lambda _: of_modality(image.Config(8, 8).build(), "x.png"),
    "audio": lambda _: of_modality(audio.Config(8000).build(), "x.wav"),
    "safetensors": of_tensors,
    "config": of_config,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("target", choices=TARGETS)
    parser.add_argument("--seconds", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0, help="of the same inputs again; 0 draws others each time")
    parser.add_argument("--keep", type=Path, default=Path(), help="where an input that fails is kept")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder, corpus = Path(name), Path(name, "corpus")
        corpus.mkdir()
        for number, seed in enumerate(seeds(asked.target)):
            (corpus / str(number)).write_bytes(seed)
        options = [
            f"-max_total_time={asked.seconds}",
            f"-seed={asked.seed}",
            "-rss_limit_mb=2048",
            "-timeout=10",
            "-max_len=4096",
        ]
        options += [f"-artifact_prefix={asked.keep / asked.target}-", "-verbosity=0"]
        atheris.Setup([sys.argv[0], *options, str(corpus)], TARGETS[asked.target](folder))
        atheris.Fuzz()


if __name__ == "__main__":
    main()
