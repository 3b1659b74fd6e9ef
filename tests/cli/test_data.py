"""`bytelm data` as a user has it, and trainings on what it packed."""

from __future__ import annotations

import errno
import gzip
import io
import json
import os
import shutil
import wave
import zipfile
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from bytelm.cli import run as cli
from bytelm.data.corpus import Corpus
from bytelm.data.packed import is_pack, link_corpus

Capture = pytest.CaptureFixture[str]
needs_torch = pytest.mark.skipif(find_spec("torch") is None, reason="`make pythons` does without torch")
NANO = """
[model]
name = "blt"
local_dim = 16
local_heads = 2
cross_heads = 2
global_dim = 32
global_heads = 2
global_layers = 1
decoder_layers = 1
attention_window = 16
ngram_rows = 64

[patching]
name = "fixed"
size = 4

[train]
batch = 2
sample_bytes = 0
precision = "float32"
"""
TRAIN = ["--preset", "blt-tiny", "--config", "nano.toml", "--quiet", "--steps", "2"]


@pytest.fixture
def notes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of text, in the working directory."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "nano.toml").write_text(NANO)
    folder = tmp_path / "notes"
    folder.mkdir()
    for n in range(30):
        (folder / f"{n:02d}.md").write_text("".join(f"{n} and {i * n}\n" for i in range(60)))
    return folder


def told(capfd: Capture, *words: str, code: int = 0) -> tuple[str, str]:
    assert cli(words) == code, capfd.readouterr().err
    return capfd.readouterr()


def error(capfd: Capture, *words: str, code: int = 3) -> str:
    line = told(capfd, *words, code=code)[1].strip()
    assert line.startswith("bytelm: ") and "\n" not in line, line
    return line


# --- scan -------------------------------------------------------------------------------------------------------------


@pytest.mark.fault("D5")
def test_a_scan_tells_kinds_what_is_skipped_and_what_to_type(notes: Path, capfd: Capture) -> None:
    (notes / "more.jsonl.gz").write_bytes(b"not opened" * 2)
    (notes / "empty").write_bytes(b"")
    for n in range(5):
        (notes / f"gone{n}").symlink_to("nothing")
    os.mkfifo(notes / "pipe")
    found = json.loads(told(capfd, "data", "scan", "notes", "--json", "--set", "data.valid=0.25")[0])
    size = sum(path.stat().st_size for path in notes.glob("*.md")) + 20
    assert (found["files"], found["bytes"], found["documents"]) == (32, size, None)
    assert found["kinds"][".md"] == {"files": 30, "bytes": size - 20, "empty": 0, "record": None}
    assert found["kinds"][".jsonl.gz"] == {"files": 1, "bytes": 20, "empty": 0, "record": "line"}
    assert found["kinds"][""] == {"files": 1, "bytes": 0, "empty": 1, "record": None}
    assert found["skipped"] == [
        {"reason": "no such file or directory", "count": 5, "first": [f"notes/gone{n}" for n in range(3)]},
        {"reason": "not a file but a pipe", "count": 1, "first": ["notes/pipe"]},
    ]
    assert found["split"]["valid"] == round(size / 4) and sum(found["split"].values()) == size
    assert found["next"] == "bytelm train notes"
    page = told(capfd, "data", "scan", "notes")[0]
    for line in (
        "one per line",
        "skipped: 5 (no such file or directory): notes/gone0, notes/gone1, notes/gone2 and 2 more",
    ):
        assert line in page
    assert "next:    bytelm train notes" in page


@pytest.mark.parametrize(
    ("name", "command"),
    [
        ("x.png", "bytelm train . --as image:64"),
        ("a b.flac", "bytelm train . --as audio:16k"),
        ("x.fa.gz", "bytelm train . --as dna"),
        ("x.txt", "bytelm train ."),
    ],
)
def test_a_scan_knows_modalities_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Capture, name: str, command: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / name).write_bytes(b"not opened")
    assert json.loads(told(capfd, "data", "scan", ".", "--json")[0])["next"] == command


def test_a_scan_of_streams_and_of_nothing(notes: Path, capfd: Capture) -> None:
    found = json.loads(told(capfd, "data", "scan", "hf:some/set", "-", "--json")[0])
    assert (found["streams"], found["bytes"], found["documents"]) == (["hf:some/set", "-"], 0, None)
    assert "hf:some/set: size unknown until it is read" in told(capfd, "data", "scan", "hf:some/set")[0]
    (notes.parent / "void").mkdir()
    (notes.parent / "void/empty").write_bytes(b"")
    assert "no bytes found in void, checked 1 files" in error(capfd, "data", "scan", "void")
    assert "no such file or folder: nowhere" in error(capfd, "data", "scan", "nowhere")
    assert "no paths" in error(capfd, "data", "scan", code=2)
    assert "only data.… can be set here" in error(capfd, "data", "scan", "notes", "--set", "train.steps=1", code=2)
    assert "data.valid = 2.0" in error(capfd, "data", "scan", "notes", "--set", "data.valid=2.0", code=2)
    assert "did you mean valid?" in error(capfd, "data", "scan", "notes", "--set", "data.vlid=0.1", code=2)


# --- empty ------------------------------------------------------------------------------------------------------------


def wav(samples: bytes) -> bytes:
    file = io.BytesIO()
    with wave.open(file, "wb") as sound:
        sound.setparams((1, 2, 8000, 0, "NONE", ""))
        sound.writeframes(samples)
    return file.getvalue()


@pytest.mark.fault("D1")
@pytest.mark.parametrize("spec", ["dna", "audio:8k"])
def test_what_is_empty_once_read_is_counted_and_told(
    spec: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """A file that has bytes and gives none is skipped, which --strict refuses; an empty record is left out."""
    full, empty, name = (wav(b"\1\2" * 99), wav(b""), "b.wav") if spec != "dna" else (b">x\nACGT", b">x\r>y\r", "b.fa")
    source = tmp_path / "s"
    source.mkdir()
    for path, data in (("a" + name, full), (name, empty), ("void.txt", b"")):
        (source / path).write_bytes(data)
    words = ["data", "pack", str(source), "-o", str(tmp_path / "p"), "--as", spec]
    assert cli(words) == 0
    out = capfd.readouterr().out
    assert f"1 skipped ({source / name}: no {spec[:5].rstrip(':')} data in it), 1 empty skipped" in out
    assert cli([*words, "--strict"]) == 3
    assert f"{source / name} would be skipped (no " in capfd.readouterr().err
    (source / name).unlink()
    assert cli([*words, "--strict"]) == 0
    if spec == "dna":
        (source / name).write_bytes(b">empty\n>full\nAC\n")
        assert cli([*words, "--strict"]) == 0
        assert "2 empty skipped" in capfd.readouterr().out


@pytest.mark.fault("D1")
def test_text_that_is_empty_once_read_is_counted_and_told(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    files = {
        "a.txt": b"text",
        "b.jsonl": b'{"text": ""}\n',
        "c.jsonl": b"\n\n",
        "d.gz": gzip.compress(b""),
        "e.txt": b"",
    }
    source = tmp_path / "s"
    source.mkdir()
    for name, data in files.items():
        (source / name).write_bytes(data)
    with zipfile.ZipFile(source / "f.zip", "w") as archive:
        archive.writestr("folder/", b"")
    assert cli(["data", "pack", str(source), "-o", str(tmp_path / "p"), "--strict"]) == 0
    assert "6 files, 5 empty skipped: " in capfd.readouterr().out


# --- strict -----------------------------------------------------------------------------------------------------------


@needs_torch
@pytest.mark.fault("D6")
def test_with_strict_a_skipped_file_is_an_error(notes: Path, capfd: Capture) -> None:
    (notes / "gone").symlink_to("nothing")
    for words in (["data", "scan", "notes"], ["data", "pack", "notes", "-o", "p"], ["train", "notes", *TRAIN]):
        line = error(capfd, *words, "--strict")
        assert "notes/gone" in line and "no such file" in line and "--strict" in line
    assert not (notes.parent / "p").exists()
    (notes / "gone").unlink()
    told(capfd, "data", "pack", "notes", "-o", "notes/p", "--strict")
    told(capfd, "data", "pack", "notes", "-o", "notes/p", "--strict")  # the output itself is not missed


@pytest.mark.fault("D6")
def test_files_that_none_may_read_are_an_error_and_one_that_may_not_is_named(
    notes: Path, capfd: Capture, as_nobody: Callable[[], None]
) -> None:
    for path in notes.iterdir():
        path.chmod(0)
    for folder in (notes, *notes.parents[:3]):
        folder.chmod(0o755)
    as_nobody()
    for words in (["data", "scan", "notes"], ["data", "scan", "notes", "--strict"]):
        assert "permission denied" in error(capfd, *words)
    from bytelm.data.report import SourceReport
    from bytelm.data.sources import documents

    report = SourceReport()
    assert list(documents(["notes"], report=report)) == [] and report.reasons == {"permission denied": 30}


@pytest.fixture
def as_nobody() -> Any:
    """A function after which this process is nobody, until the test ends."""
    if os.geteuid() != 0:
        yield lambda: None
        return
    yield lambda: os.seteuid(65534)
    os.seteuid(0)


# --- pack and verify --------------------------------------------------------------------------------------------------


def test_a_pack_is_told_checked_and_replaced(notes: Path, capfd: Capture) -> None:
    found = json.loads(told(capfd, "data", "pack", "notes", "-o", "p", "--json", "--set", "data.valid=0.3")[0])
    size = sum(path.stat().st_size for path in notes.iterdir())
    assert (
        found["bytes"] == size == sum(found["splits"].values()) and 0.3 * size <= found["splits"]["valid"] < 0.4 * size
    )
    assert told(capfd, "data", "verify", "p")[0] == f"OK: {size:,} bytes in {found['documents']:,} documents\n"
    (notes / "00.md").unlink()
    page = told(capfd, "data", "pack", "notes", "-o", "p")[0]
    assert page.startswith("29 files: ") and "next:    bytelm train p" in page
    (notes.parent / "other").mkdir()
    (notes.parent / "other/thing").write_text("mine")
    assert "other is not empty and not a packed corpus" in error(capfd, "data", "pack", "notes", "-o", "other", code=2)
    for verb in (["scan", "p"], ["pack", "p", "-o", "q"]):
        assert "p is already packed" in error(capfd, "data", *verb, code=2)


@needs_torch
@pytest.mark.fault("D7")
def test_every_fault_of_a_pack_is_a_line(notes: Path, capfd: Capture) -> None:
    told(capfd, "train", "notes", "--run", "r", *TRAIN)
    assert told(capfd, "data", "verify", "r")[0].startswith("OK: ")
    data = notes.parent / "r/data"
    (bits,) = data.glob("boundaries-*.bits")
    for path in (data / "shard-00000.bin", data / "documents.npy", bits):
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    out, err = told(capfd, "data", "verify", "r", code=3)
    lines = err.splitlines()
    assert out == "" and len(lines) == 3 and all(line.startswith("bytelm: data: ") for line in lines)
    for name, line in zip(("documents.npy", "shard-00000.bin", bits.name), lines, strict=True):
        assert f"{name} is not what was written" in line
    (data / "shard-00000.bin").unlink()
    assert "shard-00000.bin cannot be read (No such file" in told(capfd, "data", "verify", "r", code=3)[1]
    index = data / "index.json"
    index.write_text(index.read_text().replace('"valid": 0.05', '"valid": 0.15'))
    assert "index.json is damaged (its checksum" in error(capfd, "data", "verify", "r")
    assert "no data was packed there" in error(capfd, "data", "verify", "notes")


# --- trainings on a pack ----------------------------------------------------------------------------------------------


@needs_torch
@pytest.mark.fault("D7")
def test_a_training_takes_a_pack_over_and_outlives_it(notes: Path, capfd: Capture) -> None:
    told(capfd, "data", "pack", "notes", "-o", "p", "--set", "data.valid=0.3", "--set", "data.seed=7")
    told(capfd, "train", "p", "--run", "r", *TRAIN)
    packed, own = Corpus.open("p"), Corpus.open("r/data")
    assert own.fingerprint == packed.fingerprint and own.bytes("valid") == packed.bytes("valid")
    assert Path("p/shard-00000.bin").samefile("r/data/shard-00000.bin")
    assert "valid = 0.3" in Path("r/config.toml").read_text()
    longer = [*TRAIN[:-1], "3"]
    told(capfd, "train", "p", "--run", "r", *longer)
    (notes / "00.md").write_text("another day\n" * 50)
    told(capfd, "data", "pack", "notes", "-o", "p", "--set", "data.valid=0.3", "--set", "data.seed=7")
    assert "the data of r has changed since it was packed" in error(capfd, "train", "p", "--run", "r", *longer)
    assert told(capfd, "data", "verify", "r")[0].startswith("OK: ")  # its own bytes are what they were
    shutil.rmtree("p")
    told(capfd, "train", "p", "--run", "r", *longer)
    assert "no such file or folder: p" in error(capfd, "train", "p", "--run", "other", *TRAIN)


def test_a_pack_on_another_disk_is_copied(notes: Path, capfd: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(source: Path, target: Path) -> None:
        raise OSError(errno.EXDEV, "another disk")

    monkeypatch.setattr(os, "link", refused)
    told(capfd, "data", "pack", "notes", "-o", "p")
    own = link_corpus(Path("p"), Path("r"))
    assert own.fingerprint == Corpus.open("p").fingerprint
    assert not Path("p/shard-00000.bin").samefile("r/shard-00000.bin")
    shutil.rmtree("p")
    own.verify()


@needs_torch
def test_what_a_pack_is_cannot_be_said_otherwise(notes: Path, capfd: Capture) -> None:
    told(capfd, "data", "pack", "notes", "-o", "p")
    line = error(capfd, "train", "p", "--run", "r", *TRAIN, "--set", "data.valid=0.2", code=2)
    assert "p was packed with data.valid = 0.05, not 0.2: leave that out, or pack again" in line
    assert "modality.name = none, not image" in error(capfd, "train", "p", "--as", "image:8", "--run", "r", code=2)
    assert "p is a packed corpus and cannot be combined with other paths" in error(
        capfd, "train", "notes", "p", "--run", "r", *TRAIN
    )
    assert not Path("r/config.toml").exists()


@needs_torch
def test_a_pack_of_pictures_is_trained_on_as_pictures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Capture
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("photos").mkdir()
    for n in range(20):
        Image.fromarray(np.full((8, 8, 3), n * 9, np.uint8)).save(f"photos/{n}.png")
    told(capfd, "data", "pack", "photos", "-o", "p", "--as", "image:8")
    assert is_pack("p")
    Path("nano.toml").write_text(NANO)
    told(capfd, "train", "p", "--run", "r", *TRAIN)
    config = Path("r/config.toml").read_text()
    assert 'name = "image"' in config and "width = 8" in config
    assert "modality.width = 8, not 16" in error(capfd, "train", "p", "--as", "image:16", "--run", "q", code=2)
    assert "unknown modality 'imag'" in error(capfd, "data", "pack", "photos", "-o", "q", "--as", "imag", code=2)


@needs_torch
@pytest.mark.fault("D7")
def test_files_that_changed_since_a_run_began_are_told(notes: Path, capfd: Capture) -> None:
    told(capfd, "train", "notes", "--run", "r", *TRAIN)
    (notes / "00.md").write_text("shorter")
    line = error(capfd, "train", "notes", "--run", "r", *TRAIN)
    assert "the data of r has changed since it was packed" in line


@pytest.mark.fault("D10")
def test_names_of_any_bytes_are_scanned_packed_and_told_on_a_line(tmp_path: Path, capfd: Capture) -> None:
    folder = tmp_path / "s"
    folder.mkdir()
    for n, raw in enumerate((b"new\nline.txt", b"not-utf8-\xff.txt", "smile-🙂.txt".encode())):
        Path(os.fsdecode(os.fsencode(folder) + b"/" + raw)).write_text(f"{n} text\n" * 99)
        Path(os.fsdecode(os.fsencode(folder) + b"/gone" + raw)).symlink_to("nothing")
    page = told(capfd, "data", "scan", str(folder))[0]
    assert len([line for line in page.splitlines() if line.startswith("skipped: 3 ")]) == 1
    assert told(capfd, "data", "pack", str(folder), "-o", str(tmp_path / "p"))[0].startswith("3 files, 3 skipped")
    for raw in (b"new\nfolder", b"not-utf8-\xff"):
        named = Path(os.fsdecode(os.fsencode(tmp_path) + b"/" + raw))
        folder.rename(named)
        folder = named
        (named / "00").write_bytes(b"")
        assert json.loads(told(capfd, "data", "scan", str(named), "--json")[0])["files"] == 4
        assert "would be skipped" in error(capfd, "data", "scan", str(named), "--strict")
