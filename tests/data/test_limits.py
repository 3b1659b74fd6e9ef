"""Data against limits: files beyond any memory or disk, files that swell or change, bytes held out and trained on."""

from __future__ import annotations

import gzip
import json
import os
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from PIL import Image

from bytelm.cli import run as cli
from bytelm.data.corpus import Corpus, iterate_documents
from bytelm.data.modalities import audio, image
from bytelm.data.pack import bytes_needed, check_space, pack
from bytelm.data.repeats import WINDOW, repeated
from bytelm.data.sources import documents
from bytelm.errors import DataError, ResourceError

MEASURED = r"""
import json, os, re, sys
from bytelm.cli import run
codes = [run(words) for words in json.loads(sys.argv[1])]
processes = ["self", *open(f"/proc/self/task/{os.getpid()}/children").read().split()]  # one of them reads Parquet
memory = [re.search(r"VmHWM:\s*(\d+)", open(f"/proc/{pid}/status").read()) for pid in processes]  # not the parent's
print(json.dumps([codes, sum(int(size[1]) >> 10 for size in memory)]))
"""


def measured(*commands: list[str]) -> tuple[list[int], int, list[str]]:
    """Commands run one after another in a process of their own: exit codes, memory at most in MB, its errors."""
    if not Path("/proc/self/status").exists():
        pytest.skip("no way to measure memory here")
    words = [sys.executable, "-c", MEASURED, json.dumps(commands)]
    run = subprocess.run(words, capture_output=True, text=True, timeout=120)
    codes, memory = json.loads(run.stdout.splitlines()[-1])
    return codes, memory, run.stderr.splitlines()


# --- beyond memory and disk -------------------------------------------------------------------------------------------


@pytest.fixture
def sparse(tmp_path: Path) -> Path:
    path = tmp_path / "sparse.bin"
    with path.open("wb") as file:
        file.write(b"head")
        try:
            file.truncate(200 << 30)
        except OSError:
            pytest.skip("no files of 200 GiB here")
    return path


@pytest.mark.fault("D3")
def test_a_file_larger_than_memory_is_looked_at_and_refused_before_anything_is_written(
    sparse: Path, tmp_path: Path
) -> None:
    scan, out = ["data", "scan", str(sparse), "--json"], tmp_path / "p"
    codes, memory, lines = measured(scan, ["data", "pack", str(sparse), "-o", str(out)])
    assert codes == [0, 5] and memory < 500
    assert len(lines) == 1 and "packing takes 215 GB or more in" in lines[0] and "are free" in lines[0]
    assert not out.exists()
    assert bytes_needed([sparse]) == 200 << 30


@pytest.mark.fault("D3")
def test_holes_are_zeros(sparse: Path) -> None:
    found = documents([sparse])
    document = next(found)
    assert next(document.pieces)[:6] == b"head\0\0" and set(next(document.pieces)) == {0}
    with sparse.open("rb") as file:
        file.seek(150 << 30)
        assert set(file.read(1 << 20)) == {0}


def test_the_space_is_that_of_what_is_packed_as_it_is(tmp_path: Path) -> None:
    source = tmp_path / "s"
    source.mkdir()
    (source / "a.txt").write_bytes(b"x" * 1000)
    (source / "b.gz").write_bytes(gzip.compress(b""))
    (source / "c.jsonl").write_bytes(b'{"text": "x"}\n' * 50)
    assert bytes_needed([source]) == 1000 + (source / "b.gz").stat().st_size
    check_space(tmp_path / "not/there/yet", 1000)
    with pytest.raises(ResourceError, match=r"packing takes .* or more .*choose another disk"):
        check_space(tmp_path / "not/there/yet", 10**18)


@pytest.mark.fault("D3")
def test_a_tree_of_many_files_is_scanned_in_bounded_memory(tmp_path: Path) -> None:
    for n in range(20):
        folder = tmp_path / "s" / f"{n:02d}"
        folder.mkdir(parents=True)
        for i in range(100):
            (folder / f"{i}").symlink_to("nothing")
        (folder / "x.txt").write_text("text")
    codes, memory, _ = measured(["data", "scan", str(tmp_path / "s")])
    assert codes == [0] and memory < 500
    report = pack([tmp_path / "s"], tmp_path / "p").source_report
    assert report.reasons == {"no such file or directory": 2000} and len(report.skipped) == 100


# --- what swells ------------------------------------------------------------------------------------------------------


def png(width: int, height: int) -> bytes:
    """A PNG of zeros that says it is so large, and is: compressed a thousand times."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = zlib.compressobj()
    rows = b"".join(body.compress(bytes(3 * width + 1)) for _ in range(64)) + body.flush()
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def wav(rate: int, claimed: int) -> bytes:
    """A WAV file of 400 bytes of sound that says it is longer, or of another rate."""
    form = struct.pack("<HHIIHH", 1, 1, rate, 2 * rate & 0xFFFFFFFF, 2, 16)
    data = b"WAVEfmt " + struct.pack("<I", 16) + form + b"data" + struct.pack("<I", claimed) + bytes(range(200)) * 2
    return b"RIFF" + struct.pack("<I", len(data)) + data


@pytest.mark.fault("D8")
def test_bombs_are_refused_in_bounded_memory(tmp_path: Path) -> None:
    text = pa.array([b"x" * (1 << 20)], pa.binary())
    same = pa.DictionaryArray.from_arrays(pa.array(np.zeros(10_000, np.int32)), text)  # 10 GB in half a kilobyte
    pq.write_table(pa.table({"text": same}), tmp_path / "values.parquet", compression="ZSTD")
    many = pa.table({"text": pa.array([b"x" * (1 << 20)] * 128, pa.binary())})
    pq.write_table(many, tmp_path / "pages.parquet", compression="ZSTD", use_dictionary=False)
    (tmp_path / "x.zst").write_bytes(zstandard.ZstdCompressor().compress(bytes(200 << 20)))
    (tmp_path / "x.png").write_bytes(png(60_000, 60_000))
    (tmp_path / "rate.wav").write_bytes(wav(3_355_443_201, 400))
    (tmp_path / "slow.wav").write_bytes(wav(1, 400))
    (tmp_path / "long.wav").write_bytes(wav(16000, 0x3FFFFF00))  # a larger size would say "to the end"
    names = {"values.parquet": "", "pages.parquet": "", "x.zst": ""} | {"x.png": "image:8"}
    names |= {"rate.wav": "audio:16k", "slow.wav": "audio:192k", "long.wav": "audio:16k"}
    out = ["-o", str(tmp_path / "p")]
    commands = [
        ["data", "pack", str(tmp_path / name), *out, *(["--as", spec] if spec else [])] for name, spec in names.items()
    ]
    codes, memory, lines = measured(*commands)
    assert codes == [3] * len(names) and memory < 500, lines
    for name, said in zip(names, ["expands to more than"] * 3 + ["more pixels than"] + ["samples"] * 3, strict=True):
        (line,) = (line for line in lines if name in line)
        assert said in line


# --- what is damaged --------------------------------------------------------------------------------------------------


@pytest.mark.fault("D9")
@pytest.mark.parametrize("kind", ["png", "wav"])
def test_damaged_files_are_left_out_up_to_a_limit(tmp_path: Path, kind: str, capfd: pytest.CaptureFixture[str]) -> None:
    for n in range(9):
        path = tmp_path / "s" / f"{n}.{kind}"
        path.parent.mkdir(exist_ok=True)
        if kind == "png":
            Image.fromarray(random(n, 192).reshape(8, 8, 3)).save(path)
        else:
            path.write_bytes(wav(8000 + n, 400))
    (tmp_path / "s/readme.txt").write_text("no picture and no clip, and no harm")
    bad = tmp_path / "s" / f"bad.{kind}"
    bad.write_bytes((tmp_path / "s" / f"0.{kind}").read_bytes()[:50])
    spec = {"png": "image:8", "wav": "audio:8k"}[kind]
    words = ["data", "pack", str(tmp_path / "s"), "-o", str(tmp_path / "p"), "--as", spec]
    assert cli(words) == 3
    line = capfd.readouterr().err.strip()
    assert "\n" not in line and f"1 of 10 files are damaged or not what their names say, the first is {bad}: " in line
    assert "limit: data.max_bad = 0.001" in line and not (tmp_path / "p").exists()
    assert cli([*words, "--set", "data.max_bad=0.1"]) == 0
    assert "2 skipped" in capfd.readouterr().out
    bad.write_text("no picture, by any name")
    assert cli(words) == 3
    (tmp_path / "s" / f"bad.{kind}").rename(tmp_path / "s/bad.txt")
    assert cli(words) == 0
    (tmp_path / "s/nameless").write_bytes((tmp_path / "s" / f"0.{kind}").read_bytes()[:50])
    assert cli(words) == 3  # it begins as one, whatever it is called


# --- what changes -----------------------------------------------------------------------------------------------------


def shorter(path: Path) -> None:
    os.truncate(path, 1 << 20)


def longer(path: Path) -> None:
    with path.open("ab") as file:
        file.write(b"more")


def other(path: Path) -> None:
    with path.open("r+b") as file:
        file.write(b"other")
    os.utime(path, ns=(1, 1))


@pytest.mark.fault("D7")
@pytest.mark.parametrize("change", [shorter, longer, other])
def test_a_file_that_changes_while_it_is_packed_is_named(tmp_path: Path, change: Callable[[Path], None]) -> None:
    path = tmp_path / "log.txt"
    path.write_bytes(b"line\n" * (1 << 20))
    changed = False

    def progress(bytes: int) -> None:
        nonlocal changed
        if not changed:
            changed = True
            change(path)

    with pytest.raises(DataError, match=r"log\.txt changed while it was read, from 5242880 bytes to ") as caught:
        pack([path], tmp_path / "p", progress=progress)
    assert "\n" not in str(caught.value) and not (tmp_path / "p").exists()


# --- held out and trained on ------------------------------------------------------------------------------------------


def random(seed: int, size: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(11, 256, size, np.uint8)


def stretch(*documents: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    sizes = np.array([len(document) for document in documents], np.int64)
    return np.concatenate(documents), np.cumsum(sizes) - sizes


@pytest.mark.fault("D11")
@pytest.mark.parametrize("before", [0, 1, 77, 4096])
def test_what_stands_in_both_is_counted_wherever_it_stands(before: int) -> None:
    lines = np.frombuffer(b"".join(b"%06d is a line\n" % n for n in range(200)), np.uint8)
    held = np.concatenate([random(1, 1000), np.frombuffer(b"\n", np.uint8), lines, random(2, 1000)])
    alone = random(3, 5000)
    copy = np.append(random(6, before), held[1001:-1000])
    found, looked = repeated([held, alone], [stretch(random(4, before), random(5, 3000)), stretch(copy)])
    assert looked == len(held) + 5000
    assert len(lines) - 20 - WINDOW < found <= len(lines)
    assert repeated([held, alone], [stretch(random(7, 9000))])[0] == 0
    assert repeated([], [stretch(held)]) == (0, 0) and repeated([held], []) == (0, len(held))


@pytest.mark.fault("D11")
def test_blank_parts_and_what_spans_documents_do_not_count() -> None:
    zeros = np.zeros(9000, np.uint8)
    assert repeated([zeros], [stretch(zeros)]) == (0, 9000)
    held = random(1, 4 * WINDOW)
    assert repeated([held], [stretch(held)])[0] == 4 * WINDOW
    half = WINDOW + WINDOW // 2
    assert repeated([held], [stretch(held[:half], held[half:])])[0] == WINDOW  # the second half stands elsewhere
    flipped = held.copy()
    flipped[::WINDOW] ^= 1
    assert repeated([held], [stretch(flipped)])[0] == 0
    late = held.copy()
    late[WINDOW - 1 :: WINDOW] ^= 1
    assert repeated([held], [stretch(late)])[0] == 0


@pytest.mark.fault("D11")
def test_a_pack_warns_of_what_is_held_out_and_trained_on(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    source = tmp_path / "s"
    source.mkdir()
    shared = b"".join(b"line %d of a licence that stands in every file\n" % n for n in range(100))
    for n in range(40):
        (source / f"{n}.txt").write_bytes(random(n, 3000).tobytes() + b"\n" + shared)
    assert cli(["data", "pack", str(source), "-o", str(tmp_path / "p")]) == 0
    corpus = Corpus.open(tmp_path / "p")
    held_out = [d for split in ("valid", "test") for _, d in iterate_documents(corpus, split)]
    assert corpus.index.looked == sum(map(len, held_out))
    assert len(shared) - WINDOW < corpus.index.repeated / len(held_out) <= len(shared)
    seen, looked = (-(-size // 1000) for size in (corpus.index.repeated, corpus.index.looked))
    line = f"note:    {seen} of {looked} held-out kilobytes also occur verbatim in the training data (contamination)"
    assert line in capfd.readouterr().out
    for n in range(40):
        (source / f"{n}.txt").write_bytes(random(n, 9000).tobytes())
    assert cli(["data", "pack", str(source), "-o", str(tmp_path / "p")]) == 0
    assert Corpus.open(tmp_path / "p").index.warning() is None and "note" not in capfd.readouterr().out


def test_modalities_speak_of_their_files() -> None:
    for modality in (image.Config().build(), audio.Config().build()):
        assert modality.suffix in modality.suffixes
