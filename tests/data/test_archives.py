"""Archives: the files in a .tar or a .zip are documents, as if they lay in a folder; nothing is written or lost."""

from __future__ import annotations

import bz2
import contextlib
import gzip
import io
import json
import lzma
import tarfile
import tempfile
import tracemalloc
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from bytelm.cli import run as cli
from bytelm.data import archives, convert
from bytelm.data.corpus import Corpus
from bytelm.data.modalities import image
from bytelm.data.pack import bytes_needed, pack
from bytelm.data.report import SourceReport, StrictReport
from bytelm.data.sources import documents
from bytelm.errors import DataError

FILES = {"b/one.txt": b"one", "a.bin": b"\0\xff" * 700_000, "b/deep/two.md": b"two", "z": b"z"}


def tar(files: dict[str, bytes], **options: Any) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", **options) as archive:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return file.getvalue()


def entry(kind: bytes, name: str = "x", link: str = "") -> bytes:
    """A member that is no file, or that has but a header."""
    member = tarfile.TarInfo(name)
    member.type, member.linkname = kind, link
    return member.tobuf()


def zipped(files: dict[str, bytes], method: int = zipfile.ZIP_DEFLATED) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", method) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return file.getvalue()


def zst(data: bytes) -> bytes:
    return pytest.importorskip("zstandard").compress(data)


PACKERS: dict[str, Callable[[bytes], bytes]] = {
    ".tar": bytes,
    ".tar.gz": gzip.compress,
    ".tgz": gzip.compress,
    ".tbz": bz2.compress,
    ".tbz2": bz2.compress,
    ".tar.bz2": bz2.compress,
    ".txz": lambda data: lzma.compress(data, preset=0),
    ".tar.zst": zst,
    ".TZST": zst,
}


def read(*paths: str | Path, **options: Any) -> list[tuple[str, bytes]]:
    return [(document.name, b"".join(document.pieces)) for document in documents(paths, **options)]


@contextlib.contextmanager
def memory_below(limit: int) -> Iterator[None]:
    tracemalloc.start()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] < limit
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("suffix", PACKERS)
@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_the_files_in_a_tar_are_documents_in_its_order(suffix: str, form: int, tmp_path: Path) -> None:
    path = tmp_path / f"x{suffix}"
    files = FILES | ({"é" * 120: b"long"} if form != tarfile.USTAR_FORMAT else {})
    path.write_bytes(PACKERS[suffix](tar(files, format=form)))
    report = StrictReport()
    assert read(path, report=report) == [(f"{path}/{name}", data) for name, data in files.items()]
    assert (report.files, report.left_out) == (1, 0)
    assert [d.suffix for d in documents([path])][:4] == [".txt", ".bin", ".md", ""]
    assert all(len(piece) <= 1 << 20 for document in documents([path]) for piece in document.pieces)


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_the_files_in_a_zip_are_documents_in_its_order(method: int, tmp_path: Path) -> None:
    path = tmp_path / "x.zip"
    path.write_bytes(b"#!/bin/sh\n" + zipped(FILES, method))  # a program may come before it
    assert read(path, report=StrictReport()) == [(f"{path}/{name}", data) for name, data in FILES.items()]


@pytest.mark.parametrize("make", [tar, zipped])
def test_what_is_in_an_archive_is_read_as_in_a_folder(make: Callable[..., bytes], tmp_path: Path) -> None:
    lines = b'{"text": "first"}\n{"text": ""}\n{"text": "second"}\n'
    files = {
        "./a.jsonl": lines,
        "b.ndjson.gz": gzip.compress(lines),
        ".git/config": b"hidden",
        "d/.DS_Store": b"hidden",
        "__MACOSX/._a": b"hidden",
        "/abs/c.txt.bz2": bz2.compress(b"third"),
        "empty": b"",
        "inner.tar": tar({"x": b"x"}),
        "inner.tar.gz": gzip.compress(tar({"x": b"x"})),
        "table.parquet": b"PAR1",
        "../out.txt": b"out",
    }
    path = tmp_path / "x.arc"
    path = path.with_suffix(".tar" if make is tar else ".zip")
    path.write_bytes(make(files))
    report = SourceReport()
    found = read(path, report=report)
    assert [text for _, text in found] == [b"first", b"second", b"first", b"second", b"third"]
    assert {name for name, _ in found} == {f"{path}/{name}" for name in ("a.jsonl", "b.ndjson.gz", "abs/c.txt.bz2")}
    assert report.empty == 3
    assert dict(report.skipped) == {
        f"{path}/inner.tar": "a .tar file in an archive, which is not opened",
        f"{path}/inner.tar.gz": "a .tar file in an archive, which is not opened",
        f"{path}/table.parquet": "a .parquet file in an archive, which is not opened",
        f"{path}/../out.txt": "a name that points outside its archive",
    }
    with pytest.raises(DataError, match=r"inner\.tar would be skipped .*--strict"):
        read(path, report=StrictReport())
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.fault("D5")
def test_links_devices_and_what_cannot_be_read_are_noted(tmp_path: Path) -> None:
    kinds = {
        b"1": "hard",
        b"2": "soft",
        b"3": "char",
        b"6": "pipe",
        b"M": "volume",
        b"5": "folder",
        b"V": "label",
        b"D": "names",
    }
    members = b"".join(entry(kind, name, "/etc/passwd") for kind, name in kinds.items())
    (tmp_path / "x.tar").write_bytes(members + tar({"real": b"real"}))
    report = SourceReport()
    assert [text for _, text in read(tmp_path, report=report)] == [b"real"]
    other = "a device, pipe or part of a file in an archive"
    assert {Path(name).name: why for name, why in report.skipped} == {
        **dict.fromkeys(["hard", "soft"], "a link in an archive"),
        **dict.fromkeys(["char", "pipe", "volume"], other),
    }
    (tmp_path / "x.tar").unlink()
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        for name, mode in (("soft", 0o120777), ("pipe", 0o010644), ("real", 0o100644), ("plain", 0)):
            info = zipfile.ZipInfo(name)
            info.external_attr = mode << 16
            archive.writestr(info, name)
        archive.writestr("bz", b"bz", zipfile.ZIP_BZIP2)
        archive.writestr("lz", b"lz", zipfile.ZIP_LZMA)
    data = bytearray((tmp_path / "x.zip").read_bytes())
    at = data.index(b"PK\1\2", data.index(b"PK\1\2") + 1)  # the directory's word on "pipe"
    data[data.rindex(b"PK\1\2", 0, data.rindex(b"plain")) + 8] |= 1
    assert at
    (tmp_path / "x.zip").write_bytes(data)
    report = SourceReport()
    assert [text for _, text in read(tmp_path, report=report)] == [b"real"]
    assert {Path(name).name: why for name, why in report.skipped} == {
        "soft": "a link in an archive",
        "pipe": "a device or pipe in an archive",
        "plain": "encrypted",
        "bz": "compressed by a method not read in a .zip: number 12",
        "lz": "compressed by a method not read in a .zip: number 14",
    }


@pytest.mark.fault("D9")
def test_a_damaged_archive_is_an_error_wherever_it_is(tmp_path: Path) -> None:
    """tarfile takes a header that is damaged, or cut off, for the end, and says nothing."""
    whole = tar({"a": b"a" * 600, "b": b"q" * 600, "c": b"c"})
    header = bytearray(whole)
    header[1536 + 148] ^= 1  # the checksum of b's header
    for bad in (bytes(header), whole[:1536] + whole[1537:], whole[:1000], whole[:1700], whole[:3000], b"text" * 300):
        (tmp_path / "x.tar").write_bytes(bad)
        with pytest.raises(DataError, match=r"x\.tar(/a)? is damaged \(.*\): get a complete copy") as caught:
            read(tmp_path)
        assert "\n" not in str(caught.value)
    packed = gzip.compress(whole)
    (tmp_path / "x.tar").unlink()
    for bad in (packed[:-9], packed[:-8] + bytes(8), packed[: len(packed) // 2]):
        (tmp_path / "x.tgz").write_bytes(bad)
        with pytest.raises(DataError, match=r"x\.tgz"):
            read(tmp_path)
    (tmp_path / "x.tgz").unlink()
    sound = zipped({"a": b"a" * 600, "b": b"b" * 600}, zipfile.ZIP_STORED)
    for bad in (sound.replace(b"bbb", b"cbb", 1), sound[:-30], b"PK", sound[:700], sound.replace(b"PK\3\4", b"PK\5\4")):
        (tmp_path / "x.zip").write_bytes(bad)
        with pytest.raises(DataError, match=r"x\.zip(/.)? is damaged \(") as caught:
            read(tmp_path)
        assert "\n" not in str(caught.value)
    (tmp_path / "x.zip").rename(tmp_path / "x.zip.gz")
    with pytest.raises(DataError, match=r"a compressed \.zip file"):
        read(tmp_path)


def test_what_follows_the_end_of_a_tar_is_noted_and_padding_is_not(tmp_path: Path) -> None:
    (tmp_path / "x.tar").write_bytes(tar({"a": b"a"}) + bytes(70_000))
    assert len(read(tmp_path, report=StrictReport())) == 1
    (tmp_path / "x.tar").write_bytes(tar({"a": b"a"}) * 2)
    report = SourceReport()
    assert len(read(tmp_path, report=report)) == 1
    assert report.skipped == [(str(tmp_path / "x.tar"), "bytes after the end of an archive")]
    for nothing in (b"", tar({}), tar({}) + bytes(9000)):
        (tmp_path / "x.tar").write_bytes(nothing)
        report = StrictReport()
        assert read(tmp_path, report=report) == [] and report.empty == 1


@pytest.mark.fault("D8")
def test_an_archive_that_swells_is_refused_in_bounded_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(archives, "SLACK", 1 << 20)
    zeros = bytes(40 << 20)
    sparse = tarfile.TarInfo("s")
    sparse.type, sparse.size = tarfile.GNUTYPE_SPARSE, 512
    head = bytearray(sparse.tobuf(tarfile.GNU_FORMAT))
    head[386:410] = b"%011o\0%011o\0" % (0, 512)
    head[483:495] = b"%011o\0" % (1 << 32)
    head[148:156] = b"%06o\0 " % (sum(head[:148]) + 256 + sum(head[156:512]))
    bombs = {
        "many.zip": zipped({f"{n}.bz2": bz2.compress(zeros) for n in range(3)}),
        "bz2.tbz": bz2.compress(zeros * 2),
        "in.tar": tar({f"{n}.bz2": bz2.compress(zeros) for n in range(2)}),
        "sparse.tar": bytes(head) + bytes(512 * 3),
    }
    huge = tarfile.TarInfo("././@LongLink")
    huge.type, huge.size = tarfile.GNUTYPE_LONGNAME, 30 << 20
    bombs["name.tar"] = huge.tobuf() + bytes(30 << 20)
    bombs["map.tar"] = b"".join(entry(tarfile.XGLTYPE) for _ in range(5000))
    monkeypatch.setattr("bytelm.data.decode.SLACK", 1 << 20)
    for name, bomb in bombs.items():
        path = tmp_path / name
        path.write_bytes(bomb)
        with (
            memory_below(24 << 20),
            pytest.raises(DataError, match=r"expands to|header of more than|is damaged") as caught,
        ):
            for document in documents([path]):
                for _ in document.pieces:
                    pass
        assert name in str(caught.value) and ("damaged" not in str(caught.value) or name == "map.tar")
    monkeypatch.setattr(archives, "LONGEST", 1000)
    (tmp_path / "names.zip").write_bytes(zipped({f"{n}": b"" for n in range(50)}))
    with pytest.raises(DataError, match=r"names\.zip has a directory of \d+ bytes \(limit: 1000\)"):
        read(tmp_path / "names.zip")


@pytest.mark.fault("D8")
def test_a_large_archive_is_never_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bytelm.data.formats.PIECE", 4096)
    (tmp_path / "x.tar").write_bytes(tar({f"{n}" * 20: b"" if n % 10 else b"x" for n in range(1000)}))
    found = documents([tmp_path / "x.tar"])
    next(found)
    with memory_below(300 << 10):  # tarfile would hold a kilobyte of each
        assert sum(1 for _ in found) == 99


def test_pictures_in_an_archive_are_pictures(tmp_path: Path) -> None:
    pixels = np.arange(48, dtype=np.uint8).reshape(4, 4, 3)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    files = {"a.png": file.getvalue(), "note.txt": b"text", "b.png": file.getvalue(), "t.parquet": b"PAR1"}
    (tmp_path / "x.tgz").write_bytes(gzip.compress(tar(files)))
    (tmp_path / "y.zip").write_bytes(zipped(files))
    report = SourceReport()
    modality = image.Config(4, 4, block=1).build()
    found = list(convert.read([tmp_path], modality, report=report))
    assert [document.name.rpartition("/")[2] for document in found] == ["a.png", "b.png"] * 2
    assert report.reasons == {"not an image": 4}


def test_an_archive_is_scanned_packed_and_verified(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "s").mkdir()
    files = {f"{n}.txt": b"line %d\n" % n * 90 for n in range(30)}
    (tmp_path / "s/x.tbz").write_bytes(bz2.compress(tar(files)))
    (tmp_path / "s/y.zip").write_bytes(zipped({f"y{name}": b"y" + data for name, data in files.items()}))
    (tmp_path / "s/z.7z").write_bytes(b"7z\xbc\xaf\x27\x1c")
    (tmp_path / "s/p.png").write_bytes(b"\x89PNG")
    assert cli(["data", "scan", str(tmp_path / "s"), "--json"]) == 0
    found = json.loads(capfd.readouterr().out)
    assert found["kinds"][".tar.bz2"]["record"] == found["kinds"][".zip"]["record"] == "member"
    assert found["documents"] is None and found["raw"] == {".png": 1, ".7z": 1}
    assert cli(["data", "scan", str(tmp_path / "s")]) == 0
    page = capfd.readouterr().out
    assert "note:    compressed or encoded, read as raw bytes: 1 .png, 1 .7z; unpack them, or leave them out" in page
    (tmp_path / "s/z.7z").unlink()
    (tmp_path / "s/p.png").unlink()
    assert bytes_needed([tmp_path / "s"]) == 0
    assert cli(["data", "scan", str(tmp_path / "s")]) == 0 and "note:" not in capfd.readouterr().out
    assert cli(["data", "pack", str(tmp_path / "s"), "-o", str(tmp_path / "p"), "--strict"]) == 0
    assert cli(["data", "verify", str(tmp_path / "p")]) == 0
    corpus = Corpus.open(tmp_path / "p")
    assert corpus.total == sum(map(len, files.values())) * 2 + 30 and corpus.index.suffixes == [".txt"]
    folder = tmp_path / "f"
    for name, data in files.items():
        for prefix in ("", "y"):
            (folder / "x").mkdir(parents=True, exist_ok=True)
            (folder / "x" / (prefix + name)).write_bytes(prefix.encode() + data)
    same = pack([folder], tmp_path / "q")
    for split in ("train", "valid", "test"):  # which hang on the content alone
        assert same.bytes(split) == corpus.bytes(split)


@pytest.mark.fault("D8", "D9")
@settings(max_examples=150)
@given(st.data())
def test_any_damage_to_an_archive_is_documents_or_one_error(data: st.DataObject) -> None:
    kind = data.draw(st.sampled_from([".tar", ".zip"]))
    long = {"n" * 150: b"", "d/e.gz": gzip.compress(b"some text")}
    form = data.draw(st.sampled_from([tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]))
    whole = bytearray(zipped(FILES | long) if kind == ".zip" else tar({"a": b"a" * 900, **long}, format=form))
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(whole) - 1))
        whole[at : at + 8] = data.draw(st.binary(max_size=12))
        if kind == ".tar" and data.draw(st.booleans()):  # headers whose checksums are right all the same
            start = at // 512 * 512
            block = whole[start : start + 512]
            if len(block) == 512:
                block[148:156] = b"%06o\0 " % (sum(block[:148]) + 256 + sum(block[156:]))
                whole[start : start + 512] = block
    if data.draw(st.booleans()):
        del whole[data.draw(st.integers(0, len(whole))) :]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, f"x{kind}")
        path.write_bytes(whole)
        try:
            read(path)
        except DataError as error:
            assert f"x{kind}" in str(error) and "\n" not in str(error)


@pytest.mark.fault("D8")
def test_the_largest_directory_of_a_zip_takes_bounded_memory() -> None:
    """What zipfile holds of each file, times those of short names that fit into the directory that is allowed."""
    data = io.BytesIO(zipped({f"{n:04d}": b"" for n in range(500)}))
    tracemalloc.start()
    try:
        archive = zipfile.ZipFile(data)
        held = tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()
    assert held / len(archive.infolist()) * archives.LONGEST / 50 < 1 << 30
