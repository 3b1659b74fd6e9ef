"""Any content under any name is documents or one error, never anything else; what fuzzing found stays found."""

from __future__ import annotations

import gzip
import io
import lzma
import signal
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from importlib.util import find_spec
from pathlib import Path
from types import FrameType

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bytelm.data.convert import read
from bytelm.data.modalities import audio, dna, image
from bytelm.data.modalities.base import Modality
from bytelm.data.pack import pack
from bytelm.errors import DataError

FUZZ = Path(__file__).parents[1] / "fuzz.py"
MODALITIES = [None, image.Config(8, 8).build(), audio.Config(8000).build(), dna.Config().build()]
SUFFIXES = [
    "",
    ".txt",
    ".gz",
    ".xz",
    ".zst",
    ".bz2",
    ".tar",
    ".tgz",
    ".zip",
    ".jsonl",
    ".jsonl.gz",
    ".parquet",
    ".png",
    ".wav",
    ".npy",
    ".s16le",
    ".fa",
]
JSON = st.builds(b'{"text": %b}'.__mod__, st.sampled_from([b'"a"', b"null", b'"\\ud800"', b"1e999", b"[]", b'"']))
TAR, ZIP = io.BytesIO(), io.BytesIO()
with tarfile.open(fileobj=TAR, mode="w") as archive:
    archive.addfile(tarfile.TarInfo("a.txt"))
    archive.addfile(tarfile.TarInfo("n" * 120))
with zipfile.ZipFile(ZIP, "w") as archive:
    archive.writestr("a.txt", b"text")
MARKS = [b"PAR1", b"RIFF", b"fLaC", b"OggS", b"\x89PNG\r\n\x1a\n", b"\x93NUMPY", b"BM", b"GIF89a"]
CONTENT = st.one_of(
    st.binary(max_size=300),
    st.builds(bytes.__add__, st.sampled_from(MARKS), st.binary(max_size=200)),
    st.lists(JSON, max_size=9).map(b"\n".join),
    st.builds(lambda cut: TAR.getvalue()[:cut], st.integers(1, 3000)),
    st.builds(lambda cut: ZIP.getvalue()[cut:], st.integers(0, 30)),
    st.builds(lambda data, cut: gzip.compress(data)[:cut], st.binary(max_size=90), st.integers(1, 200)),
    st.builds(lambda data, cut: lzma.compress(data)[:cut], st.binary(max_size=90), st.integers(1, 200)),
)
NAMES = st.lists(st.sampled_from(["a", "b", ".c", "d e", "é", "\n", "*"]), min_size=1, max_size=3).map("/".join)


def failed(number: int, frame: FrameType | None) -> None:
    raise AssertionError("it hangs")


@pytest.mark.fault("D4", "D9")
@pytest.mark.filterwarnings("ignore")
@settings(max_examples=80)
@given(
    st.lists(st.tuples(NAMES, st.sampled_from(SUFFIXES), CONTENT), min_size=1, max_size=4),
    st.sampled_from(MODALITIES),
    st.sampled_from([0.0, 1.0]),
)
def test_any_tree_of_any_content_is_documents_or_one_error(
    files: list[tuple[str, str, bytes]], modality: Modality | None, max_bad: float
) -> None:
    before = signal.signal(signal.SIGALRM, failed)
    signal.alarm(20)
    try:
        with tempfile.TemporaryDirectory() as folder:
            for name, suffix, content in files:
                path = Path(folder, "s", name + suffix)
                if not any(parent.is_file() for parent in path.parents) and not path.is_dir():
                    path.parent.mkdir(parents=True, exist_ok=True)
                    path.write_bytes(content)
            paths = [Path(folder, "s")]
            try:
                found = [b"".join(d.pieces) for d in read(paths, modality, max_bad=max_bad)]
            except DataError as error:
                assert "\n" not in str(error)
                found = []
            if found:
                corpus = pack(paths, Path(folder, "p"), modality=modality, max_bad=max_bad)
                assert corpus.read(0, corpus.total).tobytes() == b"".join(found)
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


# --- with coverage ----------------------------------------------------------------------------------------------------


def fuzz(target: str, seconds: int, keep: Path, seed: int = 0) -> None:
    words = [sys.executable, str(FUZZ), target, "--seconds", str(seconds), "--keep", str(keep), "--seed", str(seed)]
    run = subprocess.run(words, capture_output=True, text=True, timeout=seconds + 120)
    assert run.returncode == 0, run.stderr[-3000:]


needs_atheris = pytest.mark.skipif(find_spec("atheris") is None, reason="atheris is not made for this Python")


@needs_atheris
@pytest.mark.fault("D8", "D9")
@pytest.mark.parametrize("target", ["compressed", "archives", "parquet", "audio"])
def test_a_second_of_fuzzing(target: str, tmp_path: Path) -> None:
    """The same inputs each time, so that nothing fails by chance; other ones are for the slow test below."""
    fuzz(target, 1, tmp_path, seed=1)


@needs_atheris
@pytest.mark.slow
@pytest.mark.fault("D8", "D9", "K6", "C1")
@pytest.mark.parametrize(
    "target", ["compressed", "archives", "jsonl", "parquet", "pictures", "audio", "safetensors", "config"]
)
def test_fuzzing(target: str, tmp_path: Path) -> None:
    fuzz(target, 20, tmp_path)


# --- what it found ----------------------------------------------------------------------------------------------------


@pytest.mark.fault("D8")
@pytest.mark.parametrize("rate", [1, 3, 3_355_443_201, 0xFFFFFFFF])
def test_a_clip_of_any_rate_asks_for_no_more_than_it_may(rate: int) -> None:
    """A WAV file of 500 bytes asked for 25 GiB, to be brought from 3.4 GHz to 8 kHz."""
    file = bytearray(audio.Config(8000).build().decode(bytes(400)))
    file[24:28] = rate.to_bytes(4, "little")
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "x.wav").write_bytes(file)
        with pytest.raises(DataError, match=r"no bytes found|samples") as caught:
            pack([folder], Path(folder, "p"), modality=audio.Config(192000).build())
        assert "samples per second, not from 1000 to 192000" in str(caught.value)


@pytest.mark.fault("D9")
def test_a_part_of_a_wav_file_that_ends_after_it_is_damage() -> None:
    """The standard library raises RuntimeError without a word."""
    part = b"LIST" + (1 << 20).to_bytes(4, "little")
    file = b"RIFF" + (4 + len(part)).to_bytes(4, "little") + b"WAVE" + part
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "x.wav").write_bytes(file)
        with pytest.raises(DataError, match="a WAV file that ends in its header"):
            pack([folder], Path(folder, "p"), modality=audio.Config().build())
