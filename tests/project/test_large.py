"""`benchmarks/large_files.py` and `benchmarks/large.py` on a model of no size."""

from __future__ import annotations

import json
import mmap
import os
import sys
import time
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from bytelm import load
from bytelm.checkpoint.assemble import resolve_checkpoint, weights_of
from bytelm.exchange.convert import convert

sys.path.append(str(Path(__file__).resolve().parents[2] / "benchmarks"))
import large
import large_files


def test_both_layouts_hold_the_same_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(large_files, "SHARD", 200_000)
    monkeypatch.setattr(large_files, "PERIOD", 997)  # read round and round, also within a tensor
    large_files.numbers.cache_clear()
    held, recipes = [], []
    for layout in large_files.LAYOUTS:
        assert large_files.main(["--size", "tiny", "--layout", layout, str(tmp_path / layout)]) == 0
        run = tmp_path / f"{layout}-run"
        convert(tmp_path / layout, layout, run, {})
        checkpoint, state = resolve_checkpoint(run)
        held.append(weights_of(checkpoint))
        recipes.append((state["recipe"]["patching"], state["recipe"]["model"]))
    large_files.numbers.cache_clear()
    assert len([*(tmp_path / "hf").glob("*.safetensors")]) > 2
    assert recipes[0] == recipes[1] and held[0].keys() == held[1].keys()
    for name, weight in held[0].items():
        assert weight.dtype == torch.bfloat16 and torch.equal(weight, held[1][name]), name
        if weight.ndim == 2:
            usual = large_files.LARGER.get(name, 1.0) * weight.shape[1] ** -0.5
            assert weight.float().std().item() == pytest.approx(usual, rel=0.15), name
            assert all(not torch.equal(a, b) for a, b in pairwise(weight)), name
        else:
            assert (weight == 1).all(), name
    text = large_files.LICENCE.read_bytes()[:8000]
    assert len(text) / len(load(tmp_path / "hf-run").patches(text)) == pytest.approx(large_files.PATCH, rel=0.02)


@pytest.mark.parametrize(
    ("weights", "tables"),
    [
        pytest.param("bf16", "mapped", marks=pytest.mark.slow),
        pytest.param("bf16,int8,float32", "mapped,memory", marks=pytest.mark.slow),
    ],
)
def test_a_run_of_these_shapes_is_measured(
    weights: str, tables: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["--files", str(tmp_path), "--models", "tiny", "--prompt", "40", "--bytes", "8"]
    given += ["--weights", weights, "--tables", tables]
    cold = ["--cold"] if hasattr(os, "posix_fadvise") else []
    assert large.main([*given, *cold, "--convert", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    packed = [kind for kind in weights.split(",") if kind != "float32"]
    options: list[tuple[str, str | None]] = [(kind, table) for kind in packed for table in tables.split(",")]
    options += [("float32", None)] * ("float32" in weights)
    rows = [(row["weights"], row["tables"] if row["weights"] != "float32" else None) for row in found["rows"]]
    assert set(rows) == set(options) and len(rows) == len(options) * (1 + len(cold))
    for row in found["rows"]:
        assert row["bytes_per_s"] > 0 and row["first_byte_s"] > 0 and row["floor_share"] > 0 and row["load_s"] > 0
        if large.held():
            assert 0 < row["rss_gib"] <= row["peak_gib"] and row["file_gib"] > 0
    (made,) = found["conversions"]
    assert made["model"] == "tiny" and made["convert_s"] > 0 and made["copy_s"] > 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["tiny-hf", "tiny-run"]
    with pytest.raises(SystemExit):
        large.main(["--files", str(tmp_path), "--models", "small"])


def test_memory_of_its_own_is_seen() -> None:
    if not large.held():
        pytest.skip("memory is measured on Linux")
    with large.peak() as most:
        before = large.held()["rss_gib"]
        with mmap.mmap(-1, 1 << 28, flags=mmap.MAP_PRIVATE) as block:  # new pages, which no earlier test has left
            block.write(bytes([1]) * len(block))
            for _ in range(1000):  # until it was looked at, however busy the machine is
                if most[0] < before + 0.2:
                    time.sleep(0.01)
    assert most[0] > before + 0.2


def test_the_floor_of_nothing_is_shown_as_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    row = {"model": "tiny", "weights": "bf16", "tables": "mapped", "cache": "warm", "load_s": 1.0, "rss_gib": None}
    large.show([row], [{**row, "system": "transformers", "ratio": 2.0}], [{"model": "tiny", "convert_s": 1.5}])
    shown = capsys.readouterr().out.splitlines()
    assert shown[1].split()[:6] == ["tiny", "bf16", "mapped", "warm", "1.0", "–"]
    assert "ratio 2" in shown[2] and "convert_s 1.5" in shown[3]
