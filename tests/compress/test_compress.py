"""Compressed files come back, byte for byte, in as many bits as the model says; whatever else is given is refused."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import bytelm
from bytelm.cli import run as cli
from bytelm.compress import stream, windows
from bytelm.compress.coder import TOTAL, Decoder, Encoder, frequencies
from bytelm.compress.header import HEADER, SEAL, VERSION, opened, sealed
from bytelm.compress.sides import ModelWriter
from bytelm.compress.stream import STREAMS, WORTH, compress, decompress
from bytelm.compress.windows import Held, Streams
from bytelm.errors import DataError, UsageError
from bytelm.evaluate.bits import measure
from bytelm.interfaces.decoder import Decoder as Reader
from bytelm.interfaces.decoder import NewTokens
from bytelm.interfaces.model import ByteModel
from bytelm.native import logits
from bytelm.testing import UniformModel, tiny_models
from bytelm.units import BOS, LN2, VOCAB
from small import BLT, TRAINED

MODELS = [(name, model.eval()) for name, model in tiny_models() if model.tokens is None]
LOUD = st.lists(st.floats(-60, 60, width=32), min_size=1, max_size=300)


def sharp(model: ByteModel) -> ByteModel:
    """A model that is sure of what it says, so that frequencies are far apart."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3.0)
    return model


# --- the coder ---


@pytest.mark.fault("M5")
@settings(max_examples=60)
@given(st.lists(LOUD, min_size=1, max_size=60), st.randoms(use_true_random=False))
def test_symbols_come_back_in_as_many_bits_as_they_carry(lines: list[list[float]], random: object) -> None:
    rng = np.random.default_rng(len(lines) + len(lines[0]))
    tables = [frequencies(np.array(line, np.float32)) for line in lines]
    symbols = [int(rng.integers(len(table))) for table in tables]
    encoder, bits = Encoder(), 0.0
    for table, symbol in zip(tables, symbols, strict=True):
        assert table.min() >= 1 and table.sum() <= TOTAL
        encoder.put(table[None], np.array([symbol]))
        bits -= math.log2(table[symbol] / table.sum())
    packed = encoder.end()
    assert 8 * len(packed) <= bits + 8 + 1e-3
    decoder = Decoder(packed)
    assert [decoder.get(table) for table in tables] == symbols


def test_a_carry_runs_over_bytes_that_were_given_already() -> None:
    """The last of many symbols, again and again, drives the lower end to the top of every byte."""
    table = frequencies(np.array([0.0, 12.0, 0.0], np.float32))
    for symbols in ([1] * 3000 + [2] * 9, [2] * 300, [1, 2] * 300):
        encoder = Encoder()
        encoder.put(table[None].repeat(len(symbols), 0), np.array(symbols))
        packed = encoder.end()
        decoder = Decoder(packed)
        assert [decoder.get(table) for _ in symbols] == symbols


def test_a_certain_symbol_costs_next_to_nothing_and_an_impossible_one_can_still_be_coded() -> None:
    table = frequencies(np.array([0.0] + [-1e30] * 255, np.float32))
    encoder = Encoder()
    encoder.put(table[None].repeat(20_001, 0), np.array([0] * 20_000 + [200]))
    packed = encoder.end()
    assert len(packed) <= 6
    decoder = Decoder(packed)
    assert [decoder.get(table) for _ in range(20_001)] == [0] * 20_000 + [200]


# --- files ---


@pytest.mark.fault("M5")
@pytest.mark.parametrize("name, model", MODELS, ids=[name for name, _ in MODELS])
def test_every_model_gives_back_what_it_compressed(name: str, model: ByteModel) -> None:
    rng = np.random.default_rng(0)
    data = b"the same words, the same" + rng.bytes(9) + bytes(range(252, 256)) + b"\0\0\r\n"
    packed = compress(model, data, 32)
    assert decompress(model, packed) == data


@pytest.mark.fault("M5")
@settings(max_examples=25)
@given(st.binary(min_size=1, max_size=70), st.integers(2, 90))
def test_any_bytes_come_back(data: bytes, context: int) -> None:
    model = next(model for name, model in MODELS if name.startswith("blt") and "space" in name)
    assert decompress(model, compress(model, data, context)) == data


@pytest.mark.fault("M5")
@pytest.mark.parametrize("kind", ["transformer", "blt", "megabyte"])
def test_the_size_is_that_of_the_bits_and_a_byte(kind: str) -> None:
    model = next(model for name, model in tiny_models(1) if name.startswith(kind)).eval()
    data = b"Some bytes that are measured and compressed, and 0123456789."
    (measured,) = measure(model, [("", data)], context=len(data) + 1)
    body = len(compress(model, data, 2 * len(data))) - SEAL.size - HEADER.size
    assert 8 * body <= measured.nats / LN2 + 64
    # No more than specials would have taken of it is missing.
    assert 8 * body > 0.9 * measured.nats / LN2 - 64


def test_a_uniform_model_takes_a_byte_for_a_byte() -> None:
    data = bytes(range(256)) * 2
    assert len(compress(UniformModel(), data, 100)) - SEAL.size - HEADER.size in (len(data), len(data) + 1)


def test_a_long_file_is_read_in_streams_and_windows_and_shows_its_progress() -> None:
    model = next(model for name, model in MODELS if name.startswith("transformer"))
    data = np.random.default_rng(0).bytes(8 * 3 * WORTH + 5)
    told: list[int] = []
    packed = compress(model, data, 8, told.append)
    assert opened(model, packed)[0].streams == 3 and sum(told) == len(data) and max(told) == 3 * 4
    assert decompress(model, packed) == data
    assert STREAMS > 3


@pytest.mark.parametrize("by", ["kernels", "numpy"])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_frequencies_are_the_same_alone_and_among_others(
    by: str, dtype: type[np.floating], monkeypatch: pytest.MonkeyPatch
) -> None:
    if by == "numpy":
        monkeypatch.setattr(logits, "library", lambda name: None)
    lines = (np.random.default_rng(0).normal(size=(64, 256)) * 9).astype(dtype)
    for line, together in zip(lines, frequencies(lines), strict=True):
        chance = np.exp(line.astype(np.float64) - float(line.max()))
        chance *= (TOTAL - len(chance)) / chance.sum()
        off = np.abs(together - (chance.astype(np.int64) + 1))  # by one where the kernels' last digit is another
        assert off.max() <= (by == "kernels") and off.sum() < 3 and (frequencies(line) == together).all()


def test_a_line_with_what_is_no_number_still_has_frequencies() -> None:
    for bad in (np.nan, np.inf):
        lines = np.zeros((2, 300), np.float32)
        lines[0, 7] = bad
        if logits.frequencies(lines, TOTAL) is None:
            pytest.skip("no kernels")
        assert (frequencies(lines)[0] == 1).all() and (frequencies(lines)[1] == (TOTAL - 300) // 300 + 1).all()


class Echo(Reader):
    """Its logits are what it has read, then -1."""

    chunk, row_bytes = 3, 0

    def logits_after(self, new: NewTokens) -> np.ndarray:
        lines = np.full((len(new.row), VOCAB), -1)
        for line, row, position in zip(lines, new.row, new.position, strict=True):
            line[: position + 1] = self.ids[row, : position + 1]
        return lines

    def traffic(self, length: int) -> float:
        return 0.0


class Asked(ModelWriter):
    """A side that knows the file, and notes what it is asked for."""

    def __init__(self, data: np.ndarray, each: int, half: int) -> None:
        super().__init__()
        self.data, self.each, self.half = data, each, half
        self.places: list[int] = []

    def code(self, logits: np.ndarray, streams: np.ndarray, symbols: np.ndarray) -> np.ndarray:
        found: list[int] = []
        for line, part in zip(logits.tolist(), streams.tolist(), strict=True):
            place = part * self.each + sum(where // self.each == part for where in self.places)
            step = place % self.each
            first = max(0, step // self.half * self.half - self.half)
            assert line[: line.index(-1)] == [BOS, *self.data[self.each * part :][first:step]]
            self.places.append(place)
            found.append(int(self.data[place]))
        return np.array(found, np.uint8)


@pytest.mark.parametrize("known", [True, False])
def test_bytes_are_seen_from_half_a_context_before(known: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each byte is asked for once, the streams' in turn, after BOS and all from half a context before its window."""
    data = np.arange(1, 24, dtype=np.uint8)
    target, side = Held(data.copy() if known else np.zeros(23, np.uint8)), Asked(data, 12, 4)
    monkeypatch.setattr(windows, "open_decoder", lambda model, rows, capacity: Echo(rows, capacity))
    for window in windows.walk(UniformModel(), target, Streams(23, 2), 8, side, known=known):
        for part in (0, 1):
            found = window.block[part, window.begin - window.first : (12, 11)[part] - window.first]
            target.write(12 * part + window.begin, found)
    assert side.places == [part + step for step in range(12) for part in (0, 12) if part + step < 23]
    assert (target.data == data).all()


@pytest.mark.fault("M5")
@pytest.mark.parametrize("name, model", MODELS, ids=[name for name, _ in MODELS])
def test_a_file_is_the_same_bits_as_byte_by_byte(name: str, model: ByteModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Known bytes are read in chunks of several sizes, by streams of two lengths, and the file shows none of it."""
    monkeypatch.setattr(stream, "WORTH", 1)
    monkeypatch.setattr(stream, "CHECK", 50)
    data, read, opened = np.random.default_rng(1).bytes(2 * 140 + 1), windows.read, windows.open_decoder

    def in_small_chunks(*given: ByteModel, **room: int) -> Reader:
        decoder = opened(*given, **room)
        decoder.chunk = min(decoder.chunk, 16)
        return decoder

    whole = compress(model, data, 70)
    with monkeypatch.context() as patch:
        patch.setattr(windows, "open_decoder", in_small_chunks)
        packed = compress(model, data, 70)
    assert packed == whole or not opened(model, rows=1, capacity=9).repeats
    monkeypatch.setattr(windows, "read", lambda *given, known: read(*given, known=False))
    assert compress(model, data, 70) == whole


# --- what is refused ---


@pytest.fixture(scope="module")
def packed() -> tuple[ByteModel, bytes, bytes]:
    model = sharp(next(model for name, model in tiny_models(2) if name.startswith("transformer")).eval())
    data = b"bytes to be harmed, one each"
    return model, data, compress(model, data, 32)


@pytest.mark.fault("M5")
def test_damage_is_found(packed: tuple[ByteModel, bytes, bytes]) -> None:
    """At once; and by what is decoded alone, too, where another machine predicts something else."""
    model, data, whole = packed
    for place in range(len(whole)):
        harmed = bytearray(whole)
        harmed[place] ^= 64
        with pytest.raises(DataError) as at_once:
            opened(model, bytes(harmed))
        assert "\n" not in str(at_once.value)
        try:
            if place >= SEAL.size:  # the last byte may stand for more than one ending, and a context be longer still
                assert decompress(model, sealed(bytes(harmed[SEAL.size :]))) == data
                assert place == len(whole) - 1 or 13 <= place - SEAL.size < 17
        except DataError as error:
            assert "\n" not in str(error)
    for size in range(0, len(whole), 5):
        with pytest.raises(DataError, match="truncated|not a file" if size < SEAL.size else f"truncated, {size} of"):
            opened(model, whole[:size])
    with pytest.raises(DataError, match="it is damaged: get a complete copy"):
        opened(model, whole + b"!")


def test_another_model_another_format_and_another_machine_are_named(packed: tuple[ByteModel, bytes, bytes]) -> None:
    model, _, whole = packed
    other = next(model for name, model in tiny_models(3) if name.startswith("transformer")).eval()
    with pytest.raises(DataError, match="another model wrote it: name the run"):
        decompress(other, whole)
    for version, which in (VERSION + 1, "a newer"), (VERSION - 1, "an older"):
        said = rf"{which} bytelm wrote it \(format {version}, this one reads {VERSION}\): decompress"
        with pytest.raises(DataError, match=said):
            decompress(model, whole[:4] + bytes([version]) + whole[5:])
    with pytest.raises(DataError, match="not a file that"):
        decompress(model, b"PK\3\4" + whole[4:])
    with pytest.raises(DataError, match="does not restore the input"):
        decompress(model, sealed(whole[SEAL.size : -3] + bytes(3)))
    elsewhere = bytearray(whole[SEAL.size :])
    elsewhere[9] ^= 1
    with pytest.raises(DataError, match="this machine rounds the model's predictions otherwise"):
        decompress(model, sealed(bytes(elsewhere)))
    with pytest.raises(UsageError, match="context 1: must be from 2"):
        compress(model, b"a", 1)


def test_tokens_are_no_bytes() -> None:
    tokens = [model for _, model in tiny_models() if model.tokens is not None]
    for model in tokens:
        with pytest.raises(UsageError, match="reads tokens"):
            compress(model, b"some", 8)


def test_the_verbs(run: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "part.txt"
    file.write_bytes((run.parent / "notes.txt").read_bytes()[:700])
    capfd.readouterr()
    assert cli(["compress", str(run), str(file), "--json"]) == 0
    found = json.loads(capfd.readouterr().out)
    assert found["from"] == 700 and found["bytes"] == (tmp_path / "part.txt.blm").stat().st_size and found["gzip"] < 700
    assert cli(["decompress", str(run), str(tmp_path / "part.txt.blm"), "-o", str(tmp_path / "again.txt")]) == 0
    assert (tmp_path / "again.txt").read_bytes() == file.read_bytes()
    lm = bytelm.load(run)
    assert lm.decompress(lm.compress(b"some bytes")) == b"some bytes"
    capfd.readouterr()
    for words, code, message in (
        (["compress", str(run), str(file)], 2, "part.txt.blm already exists: name another file with --out"),
        (["decompress", str(run), str(file)], 2, "does not end in .blm: name the file to write with --out"),
        (["decompress", str(run), str(file), "-o", str(tmp_path / "x")], 3, "part.txt: it is not a file that `bytelm"),
        (["compress", str(run), str(tmp_path / "none")], 3, "none: No such file or directory"),
    ):
        assert cli(words) == code
        err = capfd.readouterr().err
        assert message in err and err.count("\n") == 1
    assert not (tmp_path / "x").exists()


def test_the_verbs_beside_a_memory(run: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """One begun empty, and one that has read the training split, in which the file is; each names itself in it."""
    file, sizes, bits = tmp_path / "part.txt", dict[str, int](), dict[str, float]()
    file.write_bytes((run.parent / "notes.txt").read_bytes()[:700])
    (run / "memory.bin").unlink(missing_ok=True)
    assert cli(["eval", str(run), str(file), "--online", "primed"]) == 2
    assert f"memory.bin is missing: build it once with `bytelm prime {run}`" in capfd.readouterr().err
    assert cli(["prime", str(run), "--memory", "2", "--quiet", "--json"]) == 0
    made = json.loads(capfd.readouterr().out)
    assert (
        made["read_bytes"] > 10_000 and made["kind"] == "text" and (run / "memory.bin").stat().st_size >= made["bytes"]
    )
    for online in ("cold", "primed"):
        packed, again = tmp_path / f"{online}.blm", tmp_path / online
        assert cli(["compress", str(run), str(file), "--online", online, "--out", str(packed), "--quiet"]) == 0
        assert "bits/byte with an online memory for text; gzip" in capfd.readouterr().out
        assert cli(["decompress", str(run), str(packed), "--quiet"]) == 0 and again.read_bytes() == file.read_bytes()
        capfd.readouterr()
        assert cli(["eval", str(run), str(file), "--online", online, "--json"]) == 0
        found = json.loads(capfd.readouterr().out)
        assert found["online"]["read_before"] == (made["read_bytes"] if online == "primed" else 0)
        bits[online], sizes[online] = found["online"]["bits_per_byte"], packed.stat().st_size
        assert found["bits_per_byte"] > bits[online]
    assert bits["primed"] < bits["cold"] and sizes["primed"] < sizes["cold"]
    assert cli(["eval", str(run), str(file), "--online", "primed"]) == 0
    assert f"with online memory for text, {made['read_bytes']:,} bytes read before" in capfd.readouterr().out
    assert cli(["prime", str(run), "--memory", "3", "--quiet"]) == 0
    assert cli(["decompress", str(run), str(tmp_path / "primed.blm"), "--out", str(tmp_path / "x")]) == 3
    err = capfd.readouterr().err
    assert f"an online memory of {2 << 20:,} bytes, and this one has {3 << 20:,}: make that one again" in err
    assert "with `bytelm prime --memory 2.0` of the run" in err and err.count("\n") == 1
    (run / "memory.bin").write_bytes(b"no memory")
    assert cli(["decompress", str(run), str(tmp_path / "primed.blm"), "--out", str(tmp_path / "x")]) != 0
    assert "memory.bin: it is no memory of bytelm" in (err := capfd.readouterr().err) and "with `bytelm prime`" in err
    assert not (tmp_path / "x").exists()


def test_one_process_imports_neither_shards_nor_a_compiler(run: Path) -> None:
    """Which takes torch three seconds, more than all the rest."""
    sets = [*(one for one in BLT if not one.startswith("entropy")), *TRAINED, "patching.name=space"]
    code = f"""
import sys
from bytelm.cli import run
assert run(["eval", *sys.argv[1:], "--json"]) == 0
assert run(["generate", sys.argv[1], "a", "--max-bytes", "2"]) == 0
sets = [word for one in {sets!r} for word in ("--set", one)]
assert run(["train", sys.argv[2], "--run", sys.argv[1] + "-2", "--quiet", "--steps", "2", *sets]) == 0
print([name for name in ("torch._dynamo", "torch.distributed.tensor", "sympy") if name in sys.modules], file=sys.stderr)
"""
    words = [sys.executable, "-c", code, str(run), str(run.parent / "notes.txt")]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    assert done.stderr.splitlines()[-1] == "[]"


def test_standard_input_to_standard_output_and_back(
    run: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    words, data = [sys.executable, "-m", "bytelm"], (run.parent / "notes.txt").read_bytes()[:300]
    there = subprocess.run([*words, "compress", str(run), "-"], input=data, capture_output=True, check=True)
    assert "bits/byte" in there.stderr.decode() and opened(bytelm.load(run).model, there.stdout)[0].size == len(data)
    back = subprocess.run([*words, "decompress", str(run), "-", "--quiet"], input=there.stdout, capture_output=True)
    assert (back.returncode, back.stdout, back.stderr) == (0, data, b"")
    file = tmp_path / "part.txt.blm"
    file.write_bytes(there.stdout)
    capfd.readouterr()
    assert cli(["decompress", str(run), str(file), "--out", "-"]) == 0
    out, told = capfd.readouterr()
    assert out.encode() == data and "300 bytes" in told
    assert cli(["decompress", str(run), str(file), "--out", "-", "--json"]) == 2
    assert "--json and the data cannot both go to standard output: name a file with --out" in capfd.readouterr().err


def test_nothing_on_standard_input(run: Path) -> None:
    words = [sys.executable, "-m", "bytelm", "compress", str(run), "-"]
    done = subprocess.run(words, input=b"", capture_output=True, text=False)
    assert (done.returncode, done.stdout) == (3, b"")
    assert done.stderr == b"bytelm: data: standard input is empty: there is nothing to do\n"
