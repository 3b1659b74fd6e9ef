"""`benchmarks/compression.py`: every method restores what it compressed, and rows are what they say."""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from bytelm.cli import run as cli
from bytelm.compress.header import HEADER, SEAL
from programs import program

compression = program("compression")
compressors = sys.modules["compressors"]
GOLDEN = Path(__file__).parents[1] / "golden-run"


@pytest.fixture
def run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Path:
    """A run of a tiny model, with its data and a memory of a megabyte."""
    run = tmp_path / "run"
    shutil.copytree(GOLDEN, run)
    assert cli(["prime", str(run), "--memory", "1", "--quiet"]) == 0
    capsys.readouterr()
    return run


def here(direction: str, name: str, folder: Path, run: Path) -> dict[str, float]:
    """A process is used for gzip alone: others would load torch once more."""
    return (compression.ask if name == "gzip -9" else compressors.work)(direction, name, folder, run)


def nobody(*_: object) -> dict[str, float]:
    raise AssertionError("it was measured before")


def rows(out: Path) -> dict[str, dict[str, Any]]:
    """The rows of one set of files, of which each method has one at most."""
    listed = json.loads(out.read_bytes())["rows"]
    found = {row["method"]: row for row in listed}
    assert len(found) == len(listed)
    return found


def test_all_methods_end_to_end_and_again(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    gone = replace(compressors.PEERS["zpaq -m5"], module="no_such_package")
    for name in ("zpaq -m5", "zpaq -m5, primed"):
        monkeypatch.setitem(compressors.METHODS, name, gone)
    split, out = compression.training_split(run), tmp_path / "found.json"
    (tmp_path / "held" / "b").mkdir(parents=True)
    (tmp_path / "held" / "a.txt").write_bytes(split[:1500])
    (tmp_path / "held" / "b" / "c.txt").write_bytes(split[1500:3000])
    given = [str(tmp_path / "held"), "--run", str(run), "--bytes", "2900", "--out", str(out)]
    assert compression.main(given, here) == 0
    printed, told = capsys.readouterr()
    found = rows(out)
    assert "run: zpaq -m5 is left out: pip install no_such_package" in told
    there = {name for name, method in compressors.METHODS.items() if not method.missing()}
    assert found.keys() == there and {"gzip -9", "bytelm, model and memory, primed"} <= there
    assert all(row["bits_per_byte"] == 8 * row["bytes"] / 2900 and row["from"] == 2900 for row in found.values())
    assert all(found[name]["peak_bytes"] > 1 << 20 for name in found)
    classes = {name: row["class"] for name, row in found.items()}
    assert classes["gzip -9"] == classes["bytelm, memory alone"] == "nothing"
    assert classes["bytelm, model alone"] == classes["bytelm, model and memory"] == "trained"
    assert classes["xz -9e, primed"] == classes["bytelm, model and memory, primed"] == "read"
    for name, row in found.items():  # what is compressed stands in what was read
        if name.endswith(compressors.PRIMED):
            head = SEAL.size + HEADER.size if row["ours"] else 0
            assert 2 * (row["bytes"] - head) < found[name.removesuffix(compressors.PRIMED)]["bytes"] - head, name
            assert row["needs_bytes"] >= len(split)
    for name, row in found.items():
        loss = row["loss_bits"]  # below 0 where a model expects special ids, which are not coded
        assert (loss is not None) == row["ours"]
        if loss is not None:
            assert -0.03 * 2900 < loss < 64 + 1e-4 * 8 * row["bytes"]
            assert f"run: {name}: coded, less the sum of log-probabilities: {loss:+.0f} bits" in printed
    weights = found["bytelm, model alone"]["needs_bytes"]
    assert found["bytelm, model and memory, primed"]["needs_bytes"] == weights + len(split) > len(split)
    for row in found.values():
        assert f"| run | {row['class']} | {row['method']} | {row['bytes']:,} | {row['bits_per_byte']:.3f} |" in printed

    assert compression.main(given, nobody) == 0 and capsys.readouterr().out == printed
    out.write_text(json.dumps({"rows": [row for row in found.values() if row["method"] != "gzip -9"]}))  # interrupted
    assert compression.main(given, here) == 0 and rows(out).keys() == there
    few = {name: compressors.METHODS[name] for name in ("gzip -9", "xz -9e, primed")}
    monkeypatch.setattr(compression, "METHODS", few)
    out.write_text(json.dumps({"rows": [found[name] for name in few]}))
    given[-3] = "2000"
    assert compression.main(given, compressors.work) == 0 and {row["from"] for row in rows(out).values()} == {2000}
    assert compression.main([*given, "--name", "other"], compressors.work) == 0
    assert "| has read | method | run | other |" in capsys.readouterr().out


def test_other_bytes_and_errors_are_no_rows(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compressors, "METHODS", {name: compressors.METHODS[name] for name in ("gzip -9", "xz -9e")})
    monkeypatch.setattr(compression, "METHODS", compressors.METHODS)
    (tmp_path / "text").write_bytes(b"some bytes " * 30)
    given = [str(tmp_path / "text"), "--run", str(run), "--out", str(tmp_path / "found.json")]

    def damaged(direction: str, name: str, folder: Path, run: Path) -> dict[str, float]:
        found = compressors.work(direction, name, folder, run)
        if direction == "decompress" and name == "gzip -9":
            (folder / "gzip-9.restored").write_bytes(b"some bytes " * 29)
        return found

    assert compression.main(given, damaged) == 1
    assert "gzip -9: other bytes came back than were compressed" in capsys.readouterr().err
    found = rows(tmp_path / "found.json")
    assert {name: row["restored"] for name, row in found.items()} == {"gzip -9": False, "xz -9e": True}
    assert compression.main(given, compressors.work) == 0 and rows(tmp_path / "found.json")["gzip -9"]["restored"]

    def interrupted(direction: str, *rest: Any) -> dict[str, float]:
        if direction == "decompress":
            raise KeyboardInterrupt
        return compressors.work(direction, *rest)

    def resumed(direction: str, *rest: Any) -> dict[str, float]:
        return nobody() if direction == "compress" else compressors.work(direction, *rest)

    (tmp_path / "text").write_bytes(b"other bytes " * 30)
    assert compression.main(given, interrupted) == 130
    assert not any(row["restored"] for row in rows(tmp_path / "found.json").values())
    capsys.readouterr()
    assert compression.main(given[-2:], nobody) == 0 and capsys.readouterr().out.count("| not yet |") == 2
    assert compression.main(given, resumed) == 0
    assert all(row["restored"] for row in rows(tmp_path / "found.json").values())
    assert not [*tmp_path.glob("found.work/*")]
    with pytest.raises(compression.BytelmError, match="gzip -9: compress failed: FileNotFoundError"):
        compression.ask("compress", "gzip -9", tmp_path / "nowhere", run)
    assert compression.main([str(tmp_path / "none"), "--run", str(run)]) == 1
    with pytest.raises(SystemExit):
        compression.main([str(tmp_path / "text")])


def test_a_run_without_a_checkpoint_is_for_others_and_a_memory_of_other_bytes_is_refused(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "text").write_bytes(b"some bytes " * 30)
    (tmp_path / "before").write_bytes(b"less than it has read")
    (tmp_path / "data").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"memory\.bin has read \d+ bytes of 21: run `bytelm prime` again"):
        compressors.work("compress", "bytelm, memory alone, primed", tmp_path, run)
    for path in ("checkpoints", "memory.bin"):
        shutil.rmtree(run / path, ignore_errors=True)
    (run / "memory.bin").unlink()
    given = [str(tmp_path / "text"), "--run", str(run), "--out", str(tmp_path / "found.json")]
    assert compression.main(given, compressors.work) == 0
    told = capsys.readouterr().err
    assert f"bytelm, model alone is left out: {run} has no checkpoint" in told
    assert f"bytelm, memory alone, primed is left out: bytelm prime {run}" in told
    assert {row["class"] for row in rows(tmp_path / "found.json").values()} == {"nothing", "read"}


def row(method: str, which: str, size: int) -> dict[str, Any]:
    ours = method.startswith("bytelm")
    return {"files": "f", "method": method, "class": which, "bytes": size, "bits_per_byte": size / 100, "ours": ours}


def test_ours_stands_beside_the_best_that_may_be_compared() -> None:
    found = [
        row("gzip -9", "nothing", 300),
        row("zpaq -m5", "nothing", 200),
        row("zpaq -m5, primed", "read", 150),
        row("bytelm, memory alone", "nothing", 190),
        row("bytelm, model alone", "trained", 190),
        row("bytelm, model and memory", "trained", 151),
        row("bytelm, memory alone, primed", "read", 140),
    ]
    assert list(compression.beside(found)) == [
        "f: bytelm, memory alone, 1.900: below zpaq -m5, 2.000 (-5.0%)",
        "f: bytelm, model alone, 1.900: ABOVE zpaq -m5, primed, 1.500 (+26.7%)",
        "f: bytelm, model and memory, 1.510: not apart from zpaq -m5, primed, 1.500 (+0.7%)",
        "f: bytelm, memory alone, primed, 1.400: below zpaq -m5, primed, 1.500 (-6.7%)",
    ]
    assert list(compression.beside(found[3:])) == []


class Zpaq(ModuleType):
    """As zpaq's package: it keeps what it is asked for."""

    def __init__(self) -> None:
        super().__init__("zpaq")
        self.asked: list[tuple[int, str]] = []

    def compress(self, data: bytes, *, threads: int, method: str) -> bytes:
        self.asked.append((len(data), method))
        return data[: len(data) // (2 if method.endswith("1") == data.startswith(b"text") else 1)]


@pytest.mark.parametrize(("before", "hint"), [(b"text" * 40_000, "1"), (b"\0" * 160_000, "0")])
def test_a_difference_of_two_sizes_is_of_one_method(monkeypatch: pytest.MonkeyPatch, before: bytes, hint: str) -> None:
    """Of zpaq, whose tables are as large as its blocks, and which is told whether it reads text."""
    monkeypatch.setitem(sys.modules, "zpaq", found := Zpaq())
    _, size = compressors.METHODS["zpaq -m5, primed"].compress(b"12345678", before, Path())
    whole = [(length, method) for length, method in found.asked if length > 1 << 16]
    assert [length - len(before) for length, _ in whole] == [8, 0]
    assert {method for _, method in whole} == {f"56,128,{hint}"} and size == 4
