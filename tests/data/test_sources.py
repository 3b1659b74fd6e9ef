"""Sources: any file becomes documents, byte for byte; whatever is no readable file is named and never waited for."""

from __future__ import annotations

import bz2
import contextlib
import gzip
import io
import json
import lzma
import os
import signal
import socket
import sys
import tempfile
import tracemalloc
import zlib
from collections.abc import Iterator
from pathlib import Path
from types import FrameType, SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bytelm.cli import run as cli
from bytelm.data.files import PIECE, shown
from bytelm.data.sources import SourceReport, documents, fingerprint
from bytelm.errors import DataError, MissingExtraError


def zst(data: bytes) -> bytes:
    return pytest.importorskip("zstandard").compress(data)


COMPRESSORS = {
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lambda data: lzma.compress(data, preset=0),
    ".zst": zst,
    ".zstd": zst,
}


def read(*paths: str | Path, **options: object) -> list[tuple[str, bytes]]:
    return [(document.name, b"".join(document.pieces)) for document in documents(paths, **options)]  # type: ignore[arg-type]


@contextlib.contextmanager
def memory_below(limit: int) -> Iterator[None]:
    tracemalloc.start()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] < limit
    finally:
        tracemalloc.stop()


@pytest.fixture
def no_waiting() -> Iterator[None]:
    """Turns waiting for ever into a failure."""

    def failed(number: int, frame: FrameType | None) -> None:
        raise AssertionError("it waits")

    before = signal.signal(signal.SIGALRM, failed)
    signal.alarm(10)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def test_a_folder_is_read_to_its_depths_in_order_without_hidden_names(tmp_path: Path) -> None:
    for name in ("b.txt", "a/z.py", "a/b/c.md", ".env", ".git/config", "a/.hidden/x"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    assert read(tmp_path) == [(str(tmp_path / n), n.encode()) for n in ("b.txt", "a/z.py", "a/b/c.md")]
    assert read(tmp_path / ".env") == [(str(tmp_path / ".env"), b".env")]


def test_patterns_match_no_hidden_names_and_a_file_met_twice_is_read_once(tmp_path: Path) -> None:
    for name in ("a.txt", "d/b.txt", "d/c.bin", ".h/d.txt", "odd[1].txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    texts = [text for _, text in read(tmp_path / "**/*.txt", tmp_path / "a.txt", tmp_path / "d")]
    assert texts == [b"a.txt", b"d/b.txt", b"odd[1].txt", b"d/c.bin"]
    assert [text for _, text in read(tmp_path / "odd[1].txt")] == [b"odd[1].txt"]
    with pytest.raises(DataError, match=r"nothing matches .*\*\.md"):
        read(tmp_path / "*.md")
    with pytest.raises(DataError, match="no such file or folder: nowhere"):
        read("nowhere")


@pytest.mark.fault("D5")
def test_what_is_no_file_is_named_with_a_reason_and_never_waited_for(tmp_path: Path, no_waiting: None) -> None:
    inside, outside = tmp_path / "in", tmp_path / "out"
    (inside / "sub").mkdir(parents=True)
    outside.write_text("secret")
    (inside / "sub/real.txt").write_text("real")
    os.mkfifo(inside / "pipe")
    (inside / "gone").symlink_to("nothing")
    (inside / "self").symlink_to("self")
    (inside / "loop").symlink_to(".")
    (inside / "sub/loop").symlink_to("..")
    (inside / "zero").symlink_to("/dev/zero")
    (inside / "leak").symlink_to(outside)
    (inside / "same").symlink_to("sub/real.txt")
    with contextlib.closing(socket.socket(socket.AF_UNIX)) as listener:
        cwd = Path.cwd()
        os.chdir(inside)  # the names of sockets must be short
        listener.bind("socket")
        os.chdir(cwd)
        report = SourceReport()
        assert [text for _, text in read(inside, report=report)] == [b"real"]
        why = {Path(name).name: reason for name, reason in report.skipped}
        assert why.pop("pipe") == "not a file but a pipe"
        assert why.pop("socket") == "not a file but a socket"
        assert why.pop("loop") == "a link to a folder"
        assert why.pop("gone") == "no such file or directory"
        assert why.pop("zero") == why.pop("leak") == "a link that leads outside the folder"
        assert set(why) == {"self"}
        assert len(report.skipped) == 8  # both loops
        assert [text for _, text in read(inside / "**/*.txt")] == [b"real"]
        for named in (inside / "pipe", "/dev/zero", inside / "socket", inside / "gone", inside / "self"):
            report = SourceReport()
            assert read(named, report=report) == []
            assert [name for name, _ in report.skipped] == [str(named)]


@pytest.mark.fault("D6")
def test_a_file_that_may_not_be_read_is_named_and_the_others_are_read() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o755)
        (folder / "open.txt").write_text("open")
        (folder / "shut.txt").write_text("shut")
        (folder / "shut.txt").chmod(0)
        (folder / "dark").mkdir(mode=0)
        root = os.geteuid() == 0
        report = SourceReport()
        try:
            if root:
                os.seteuid(65534)  # nothing is shut to root
            assert [text for _, text in read(folder, report=report)] == [b"open"]
        finally:
            if root:
                os.seteuid(0)
        assert {(Path(n).name, r) for n, r in report.skipped} == {
            ("shut.txt", "permission denied"),
            ("dark", "permission denied"),
        }


@pytest.mark.fault("D10")
def test_names_of_any_bytes_are_read_and_shown_on_one_line(tmp_path: Path) -> None:
    for raw in (b"new\nline.txt", b"not-utf8-\xff.txt", "smile-🙂.txt".encode()):
        Path(os.fsdecode(os.fsencode(tmp_path) + b"/" + raw)).write_bytes(raw)
    found = read(tmp_path)
    assert sorted(text for _, text in found) == sorted(os.fsencode(Path(name).name) for name, _ in found)
    assert len(found) == 3
    assert shown("smile-🙂") == "smile-🙂"
    for name, _ in found:
        assert "\n" not in shown(name)
        shown(name).encode()


@pytest.mark.fault("D1")
def test_files_without_bytes_are_counted(tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_bytes(b"")
    (tmp_path / "empty.gz").write_bytes(gzip.compress(b""))
    (tmp_path / "full.txt").write_bytes(b"\0")
    report = SourceReport()
    assert [text for _, text in read(tmp_path, report=report)] == [b"\0"]
    assert (report.files, report.empty) == (3, 2)


def test_standard_input_is_one_document(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(b"\xff\n\0")))
    assert read("-") == [("-", b"\xff\n\0")]
    assert fingerprint(["-"]) is None


@pytest.mark.fault("D3")
def test_a_large_file_is_never_held_whole(tmp_path: Path) -> None:
    path = tmp_path / "sparse"
    with path.open("wb") as file:
        file.write(b"head")
        file.truncate(3 << 30)
    with memory_below(16 * PIECE):
        found = documents([path])
        document = next(found)
        pieces = [next(document.pieces) for _ in range(4)]
        found.close()
    assert pieces[0][:5] == b"head\0" and {len(piece) for piece in pieces} == {PIECE}


@pytest.mark.parametrize("suffix", COMPRESSORS)
@settings(max_examples=15)
@given(parts=st.lists(st.binary(max_size=200), min_size=1, max_size=3), data=st.data())
def test_compressed_files_are_decoded_and_any_truncation_is_found(
    suffix: str, parts: list[bytes], data: st.DataObject
) -> None:
    packed = [COMPRESSORS[suffix](part) for part in parts]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "x.txt" + suffix)
        path.write_bytes(b"".join(packed))
        assert all(document.suffix == ".txt" for document in documents([path]))
        assert b"".join(text for _, text in read(path)) == b"".join(parts)
        whole = len(b"".join(packed[:-1]))
        path.write_bytes(b"".join(packed)[: whole + data.draw(st.integers(1, len(packed[-1]) - 1))])
        with pytest.raises(DataError, match=r"x\.txt"):
            read(path)


@pytest.mark.parametrize("suffix", COMPRESSORS)
def test_damaged_compressed_files_are_named(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"x{suffix}"
    good = COMPRESSORS[suffix](os.urandom(1 << 16))
    bads = [b"not compressed at all", b"\xff" + good[1:]]
    if COMPRESSORS[suffix] is not zst:  # which by default is written without a checksum
        bads.append(good[:-3] + bytes(byte ^ 255 for byte in good[-3:]))
    for bad in bads:
        path.write_bytes(bad)
        with pytest.raises(DataError, match=f"x{suffix}"):
            read(path)


@pytest.mark.fault("D8")
@pytest.mark.parametrize("suffix", COMPRESSORS)
def test_a_bomb_is_refused_before_it_fills_the_memory(
    suffix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bytelm.data.decode.SLACK", 1 << 20)  # with 64 MiB, .gz takes more than 2 GiB to be a bomb
    path = tmp_path / f"bomb{suffix}"
    path.write_bytes(COMPRESSORS[suffix](bytes(50 << 20)))
    with memory_below(40 << 20), pytest.raises(DataError, match=f"bomb{suffix} expands to more than"):
        for document in documents([path]):
            for _ in document.pieces:
                pass


def test_zst_without_its_package_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "x.zst").write_bytes(b"x")
    monkeypatch.setitem(sys.modules, "zstandard", None)
    with pytest.raises(MissingExtraError, match=r"bytelm\[data\]"):
        read(tmp_path)


@settings(max_examples=30)
@given(
    st.lists(st.text(st.sampled_from('a\n"\0é🙂\udc80'), max_size=9), max_size=8),
    st.sampled_from(["", ".gz"]),
)
def test_json_lines_keep_every_text_with_half_surrogates(texts: list[str], suffix: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "x.jsonl" + suffix)
        lines = "".join(json.dumps({"id": 1, "body": text}) + "\r\n\n" for text in texts).encode()
        path.write_bytes(gzip.compress(lines) if suffix else lines)
        report = SourceReport()
        found = [text for _, text in read(path, text_field="body", report=report)]
        assert found == [text.encode("utf-8", "surrogatepass") for text in texts if text]
        assert report.empty == texts.count("") + (not texts)


@pytest.mark.fault("D9")
@pytest.mark.parametrize("bad", ['{"text": ', '{"other": "x"}', '{"text": 7}', "[]", '"text"', "[" * 100_000])
def test_bad_json_lines_fail_above_one_in_a_thousand(bad: str, tmp_path: Path) -> None:
    good = '{"text": "x"}\n'
    path = tmp_path / "x.jsonl"
    path.write_text(good * 3 + bad + "\n" + good * 996)
    report = SourceReport()
    assert len(read(path, report=report)) == 999
    assert report.bad == 1
    path.write_text(good * 3 + bad + "\n" + good * 995)
    with pytest.raises(DataError, match=r"x\.jsonl.*1 of 999 lines.*line 4 "):
        read(path)


def test_json_lines_are_put_together_over_pieces_and_too_long_ones_are_bad(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "x.jsonl"
    long = "é" * PIECE
    path.write_text(json.dumps({"text": long}) + "\n" + '{"text": "end"}')
    assert [text for _, text in read(path)] == [long.encode(), b"end"]
    assert max(len(piece) for document in documents([path]) for piece in document.pieces) <= PIECE
    monkeypatch.setattr("bytelm.data.formats.LONGEST", 2 * PIECE)
    with pytest.raises(DataError, match="1 of 2 lines"):
        read(path)


@pytest.mark.fault("D7")
def test_the_fingerprint_follows_the_data_and_nothing_excluded(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("one")
    out = tmp_path / "out"
    out.mkdir()
    first = fingerprint([tmp_path], exclude=[out])
    (out / "x").write_text("own output")
    assert first is not None
    assert fingerprint([tmp_path], exclude=[out]) == fingerprint([tmp_path / "*"], exclude=[out]) == first
    assert [text for _, text in read(tmp_path, out, tmp_path / "**/*", exclude=[out])] == [b"one"]
    assert fingerprint([tmp_path]) != first
    os.utime(tmp_path / "a", ns=(1, 1))
    assert fingerprint([tmp_path], exclude=[out]) != first


@pytest.mark.parametrize("suffix", COMPRESSORS)
@pytest.mark.parametrize("zeros", [4, 972, 1024, 5000])
def test_zeros_behind_what_is_compressed_are_padding(suffix: str, zeros: int, tmp_path: Path) -> None:
    """Tapes and `dd conv=sync` fill blocks up, and streams are put one behind another."""
    one, two = COMPRESSORS[suffix](b"one"), COMPRESSORS[suffix](b"two")
    (tmp_path / f"x{suffix}").write_bytes(one + bytes(zeros) + two + bytes(zeros))
    assert [text for _, text in read(tmp_path)] == [b"onetwo"]
    (tmp_path / f"x{suffix}").write_bytes(one + bytes(zeros) + b"text")
    with pytest.raises(DataError, match=f"x{suffix}"):
        read(tmp_path)


def test_what_only_the_standard_library_names_is_read(tmp_path: Path) -> None:
    (tmp_path / "x.txt.lzma").write_bytes(lzma.compress(b"alone", lzma.FORMAT_ALONE))
    lines = b'{"text": "a"}\n{"text": "b"}\n'
    (tmp_path / "y.ndjson").write_bytes(lines)
    (tmp_path / "z.NDJSON.bz2").write_bytes(bz2.compress(lines))
    assert [text for _, text in read(tmp_path)] == [b"alone", b"a", b"b", b"a", b"b"]
    assert [document.suffix for document in documents([tmp_path])] == [".txt", *[".ndjson"] * 4]


def with_dictionary(size: int) -> bytes:
    """An .xz file of one byte that asks for a dictionary of so many bytes, which is a power of 2."""
    good = bytearray(lzma.compress(b"x"))
    start, length = 12, 4 * (good[12] + 1)  # the block header: size, flags, filter, its size, dictionary, padding, CRC
    good[start + 4] = 2 * size.bit_length() - 26
    good[start + length - 4 : start + length] = zlib.crc32(good[start : start + length - 4]).to_bytes(4, "little")
    return bytes(good)


def with_window(log: int) -> bytes:
    """A .zst stream of one byte whose header names a window of 2 ** log bytes."""
    return b"\x28\xb5\x2f\xfd" + bytes([0, (log - 10) << 3]) + b"\x09\0\0x"  # flags, window, the last raw block


@pytest.mark.fault("D8")
@pytest.mark.parametrize(
    ("suffix", "small", "large", "tool"),
    [
        (".xz", with_dictionary(256 << 20), with_dictionary(512 << 20), "xz -dc"),
        (".zst", with_window(28), with_window(31), "zstd -dc --long=31"),
    ],
)
def test_a_compressed_file_may_not_ask_for_any_amount_of_memory(
    suffix: str, small: bytes, large: bytes, tool: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / f"x{suffix}"
    path.write_bytes(small)
    assert read(path) == [(str(path), b"x")]
    with pytest.raises(DataError, match=r"data\.max_window = 255 MiB"):
        read(path, max_window=255)
    path.write_bytes(large)
    with pytest.raises(DataError) as caught:
        read(path)
    assert str(caught.value) == (
        f"{path} has a window or dictionary larger than data.max_window = 256 MiB: allow more memory, as in "
        f"--set data.max_window=2048, or decompress it on the way, as in `{tool} {path} | bytelm train -`"
    )
    for name in (f"x.jsonl{suffix}", f"X.TAR{suffix}"):  # which a pipe would have learnt from as they stand
        path.with_name(name).write_bytes(large)
        with pytest.raises(DataError, match=rf"beforehand, as in `{tool.replace('-dc', '-d')} .*{name}`$"):
            read(path.with_name(name))
    assert read(path, max_window=2048) == [(str(path), b"x")]
    words = ["data", "pack", str(path), "-o", str(tmp_path / "p")]
    assert cli(words) == 3
    assert cli([*words, "--set", "data.max_window=2048"]) == 0
    capfd.readouterr()
    assert cli([*words, "--set", "data.max_window=4096"]) == 2
    assert "data.max_window = 4096: must be between 1 and 2048" in capfd.readouterr().err
