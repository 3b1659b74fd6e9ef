"""`benchmarks/gpu.py` without a GPU: every stage runs, and nothing that a GPU does to it loses what was measured."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
sys.path.append(str(BENCHMARKS))  # where programs find each other when they are run

import gpu  # noqa: E402
import gpu_bundle  # noqa: E402
import roofline  # noqa: E402
from stages import bench, kernels, steps, write  # noqa: E402
from train import needed  # noqa: E402

CPU = torch.device("cpu")


def lines(out: Path, stage: str) -> dict[str, dict[str, Any]]:
    return bench.Bench(CPU, out).found(stage)


@pytest.mark.parametrize(
    "stages",
    [
        pytest.param(["laws", "steps", "greedy"], id="some"),
        pytest.param(
            [stage for stage in gpu.STAGES if stage not in ("compare", "peers")], id="ours", marks=pytest.mark.slow
        ),
        pytest.param(gpu.STAGES, id="all", marks=pytest.mark.slow),
    ],
)
def test_every_stage_is_rehearsed_on_the_cpu(stages: list[str], tmp_path: Path) -> None:
    """In one process, which is quicker; that each has its own is tested below."""
    here = bench.Bench(CPU, tmp_path, pretend=True)
    for stage in stages:
        assert gpu.work(stage, here, [], None) == 0
        found = lines(tmp_path, stage)
        assert found and not [line for line in found.values() if "failed" in line]
    step = lines(tmp_path, "steps")["blt"]
    assert step["mb_per_s"] > 0 and step["launches"] > 0 and step["parameters"] > 0
    assert all(invariant["slopes64"] == 0 for invariant in lines(tmp_path, "laws").values())
    assert all(line["same"] and line["in_company"] for line in lines(tmp_path, "greedy").values())
    table = "\n".join(gpu.table(tmp_path, stages))
    assert all(f"\n{stage}" in table for stage in stages) and "FAILED" not in table


def test_what_was_measured_is_shown_and_not_measured_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--pretend", "--out", str(tmp_path), "ceilings", "--only", "copy", "--only", "wait"]
    for _ in range(2):
        assert gpu.main(words) == 0
        printed = capsys.readouterr().out
        assert (tmp_path / "table.txt").read_text().strip() in printed
        assert list(lines(tmp_path, "ceilings")) == ["copy", "wait"]
        assert len((tmp_path / "ceilings.jsonl").read_text().splitlines()) == 4, "begun and found, once each"


PROGRAM = """
import os, pathlib, subprocess, sys, time, types
sys.path.append({benchmarks!r})
import gpu

def measurements(bench):
    yield "fine", lambda: {{"x": 1}}
    yield "raises", lambda: {{}}["none"]
    yield "dies", lambda: os.kill(os.getpid(), 11)
    yield "hangs", hang
    yield "breaks", broken
    yield "after", lambda: {{"x": 2}}

def hang():
    child = subprocess.Popen(["sleep", "90"])
    pathlib.Path({child!r}).write_text(str(child.pid))
    time.sleep(90)

def broken():
    if os.environ.get("CUDA_LAUNCH_BLOCKING"):
        raise RuntimeError("here it was")
    gpu.broken = lambda bench: True
    raise RuntimeError("somewhere")

fake = types.ModuleType("stages.fake")
fake.measurements, fake.SECONDS, fake.EACH, fake.COLUMNS = measurements, 200, 2, ("x",)
sys.modules["stages.fake"] = fake
gpu.STAGES += ("fake",)
gpu.__file__ = __file__
sys.exit(gpu.main())
"""


@pytest.fixture
def program(tmp_path: Path) -> list[str]:
    """gpu.py with a stage in which everything goes wrong."""
    path = tmp_path / "program.py"
    path.write_text(PROGRAM.format(benchmarks=str(BENCHMARKS), child=str(tmp_path / "child")))
    return [sys.executable, str(path), "fake", "--pretend", "--out", str(tmp_path)]


@pytest.mark.slow
def test_a_measurement_that_fails_takes_no_other_with_it(tmp_path: Path, program: list[str]) -> None:
    done = subprocess.run(program, capture_output=True, text=True, check=False, timeout=200)
    found = lines(tmp_path, "fake")
    assert done.returncode == 1 and "FAILED KeyError: 'none'" in done.stdout
    assert found["fine"]["x"] == 1 and found["after"]["x"] == 2
    assert found["raises"]["failed"] == "KeyError: 'none'" and "<lambda>" in found["raises"]["frames"][-1]
    assert found["dies"]["failed"] == "the process ended with code -11"
    assert found["hangs"]["failed"] == "the process ended with code 1"
    assert any("Timeout" in line for line in found["hangs"]["frames"])
    assert found["breaks"]["failed"] == "RuntimeError: somewhere"
    assert found["breaks, blocking"]["failed"] == "RuntimeError: here it was"
    assert list(found).count("after") == 1 and set(found) <= {
        *("fine", "raises", "dies", "dies, blocking", "hangs", "breaks", "breaks, blocking", "after")
    }


@pytest.mark.slow
def test_what_was_measured_before_time_was_over_is_kept(tmp_path: Path, program: list[str]) -> None:
    hang = [*program, "--only", "fine", "--only", "hangs", "--seconds", "20"]
    path = tmp_path / "program.py"
    path.write_text(
        path.read_text().replace(
            "fake.EACH, fake.COLUMNS = measurements, 200, 2", "fake.EACH, fake.COLUMNS = measurements, 200, 100"
        )
    )
    subprocess.run(hang, capture_output=True, check=False, timeout=80)
    found = lines(tmp_path, "fake")
    assert found["fine"]["x"] == 1
    assert found["hangs"]["failed"] == "killed: fake had no time left"
    left = Path("/proc", (tmp_path / "child").read_text(), "stat")
    assert not left.exists() or left.read_text().split()[2] == "Z", "what a stage started ends with it"


def test_nothing_runs_without_a_gpu_or_a_rehearsal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert gpu.main(["steps", "--out", str(tmp_path)]) == 1
    assert "no GPU: --pretend" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        gpu.main(["poems", "--out", str(tmp_path)])
    assert "unknown stages: poems" in capsys.readouterr().err


def test_waits_are_told_by_the_line_of_ours_that_waits() -> None:
    here = bench.Bench(CPU, Path())

    class Waiting(nn.Module):
        def forward(self) -> None:
            warnings.warn("called a synchronizing CUDA operation", stacklevel=1)
            warnings.warn("of another kind", stacklevel=1)

    found = bench.waited(here, lambda: [Waiting()() for _ in range(3)])
    assert found["waits"] == 3
    assert [place.rpartition(":")[0].endswith("test_gpu_program.py") for place in found["where"]] == [True]


def test_results_that_are_not_numbers_are_infinitely_far() -> None:
    one = torch.ones(3)
    assert bench.apart(one, one) == 0
    assert bench.apart(2 * one, one) == 1
    assert bench.apart(one * float("nan"), one) == float("inf")


def test_a_kernel_that_is_wrong_fails(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    here = bench.Bench(CPU, tmp_path, pretend=True)
    shape = {"rows": 7, "dim": 32}

    def wrong(bench: bench.Bench, rows: int, dim: int) -> kernels.Pass:
        made = kernels.norm(bench, rows, dim)
        run = made.run

        class Wrong(type(run)):  # in 16 bits alone
            def forward(self, x: torch.Tensor) -> torch.Tensor:
                found = super().forward(x)
                return found if x.dtype == torch.float64 else 1.1 * found

        run.__class__ = Wrong
        return made

    assert "failed" not in kernels.measured(here, kernels.norm, shape, shape)
    assert "off by" in kernels.measured(here, wrong, shape, shape)["failed"]


def test_a_row_reads_to_where_it_shall_write(tmp_path: Path) -> None:
    here = bench.Bench(CPU, tmp_path, pretend=True)
    found = write.ours(here, write.tables(here, write.BLT_1B["model"], write.FIXED), 3, 1024)
    assert found["rows"] == 3 and found["context"] == 70 and found["bytes_per_s"] == pytest.approx(3e3 / found["ms"])


# --- roofline ---------------------------------------------------------------------------------------------------------


def test_a_linear_layer_is_three_products() -> None:
    with torch.device("meta"):
        layer, x = nn.Linear(32, 16, bias=False), torch.randn(4, 16, 32, requires_grad=True)
    with roofline.counting(copy=1.0, product=1e30) as floor:
        y = layer(x)
        (mm,) = (seconds for name, seconds in floor.by.items() if name == "mm")
        assert mm == 2 * (64 * 32 + 32 * 16 + 64 * 16)
        assert floor.launches == 3, "both are cast to 16 bits; views cost nothing"
        y.sum().backward()
    assert floor.operations == 3 * 2 * 64 * 32 * 16


def test_what_is_looked_up_is_read_and_what_is_expanded_lies_there_once() -> None:
    with torch.device("meta"):
        table, index, narrow = torch.randn(1000, 8), torch.zeros(5, dtype=torch.long), torch.randn(4, 1)
    with roofline.counting(copy=1.0) as floor:
        table.index_select(0, index)
        assert floor.bytes == 2 * 5 * 8 * 4 + 5 * 8
        narrow.expand(4, 100).exp()
    assert floor.bytes - 2 * 5 * 8 * 4 - 5 * 8 == 4 * 4 + 4 * 100 * 4
    assert floor.launches == 2


@pytest.mark.parametrize(("masked", "share"), [(False, 0.5), (True, 1.0)])
def test_attention_is_two_products_there_and_five_back(masked: bool, share: float) -> None:
    with torch.device("meta"):
        query, keys, values = (torch.randn(2, 4, 100, 8, requires_grad=True) for _ in range(3))
        mask = torch.ones(2, 1, 100, 100, dtype=torch.bool) if masked else None
    with roofline.counting(copy=1.0, product=1e30) as floor:
        F.scaled_dot_product_attention(query, keys, values, attn_mask=mask, is_causal=not masked).sum().backward()
    assert floor.operations == 3.5 * share * 4 * 2 * 4 * 100 * 100 * 8
    assert floor.by["attention"] == 4 * 2 * (2 * 4 * 100 * 8) + masked * 2 * 100 * 100


@pytest.mark.parametrize("name", ["blt", "megabyte", "transformer", "linear", "perceiver"])
def test_operations_of_a_step_are_those_that_the_model_needs(name: str) -> None:
    shape = steps.Shape(steps.SMALL[name], 2, 256)
    floor = roofline.floor_of(shape, copy=1.0, product=1.0)
    wanted = 2 * needed(shape.recipe().build_on_meta(), 256)
    assert floor.operations == pytest.approx(wanted, rel=0.35), "attention is counted as it is executed"
    assert floor.operations > 0.99 * wanted
    assert floor.seconds >= max(floor.bytes, floor.operations)


@pytest.mark.parametrize("name", ["blt", "transformer"])
def test_kernels_move_less_and_multiply_what_is_seen(name: str) -> None:
    shape = steps.Shape(steps.SMALL[name], 4, 320)  # 256 patches of 5: a packed line without filling
    plain, floor = (roofline.floor_of(shape, kernels=kernels) for kernels in (False, True))
    assert floor.bytes < 0.8 * plain.bytes and floor.launches < 0.8 * plain.launches
    assert floor.operations < 1.01 * plain.operations
    wanted = 4 * needed(shape.recipe().build_on_meta(), 320)
    assert wanted * 0.99 < floor.operations < wanted * 3.5 / 3


def test_the_roofline_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    shapes = {"small": steps.Shape(steps.SMALL["transformer"], 2, 64)}
    assert roofline.main(["--only", "small"], shapes) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == ["one", "small", "..."]


# --- what is taken along ----------------------------------------------------------------------------------------------


def test_a_bundle_has_packages_that_run_and_corpora_that_fit(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    data, into = tmp_path / "data", tmp_path / "bundle"
    for name, size in (("books/train.txt.xz", 700), ("books/test.txt.xz", 600), ("code/test.txt.xz", 200)):
        (data / name).parent.mkdir(parents=True, exist_ok=True)
        (data / name).write_bytes(bytes(size))
    monkeypatch.setattr(gpu_bundle, "PACKAGES", ("beartype", "not-installed-anywhere"))
    monkeypatch.setattr(gpu_bundle, "DATA_LIMIT", 1000)
    assert gpu_bundle.main(["--data", str(data), "--into", str(into)]) == 0
    told = capsys.readouterr().out
    assert "not-installed-anywhere: left out" in told and "books/test.txt.xz: left out, 0.0 MB do not fit" in told
    kept = {str(path.relative_to(into)) for path in into.rglob("*") if path.is_file()}
    assert {"data/books/train.txt.xz", "data/code/test.txt.xz", "libs/beartype/__init__.py"} <= kept
    assert "data/books/test.txt.xz" not in kept and not any("__pycache__" in name for name in kept)
    alone = {**os.environ, "PYTHONPATH": str(into / "libs")}
    program = "import beartype; print(beartype.__file__)"
    where = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, env=alone)
    assert where.stdout.startswith(str(into))
    monkeypatch.setattr(gpu_bundle, "PACKAGES", ("torch",))
    assert gpu_bundle.main(["--data", str(data), "--into", str(into)]) == 1
    assert "torch is compiled" in capsys.readouterr().err


def test_lines_of_a_writer_that_was_killed_are_passed_over(tmp_path: Path) -> None:
    bench.write(tmp_path, "steps", {"name": "a", "begun": 1.0})
    bench.write(tmp_path, "steps", {"name": "a", "ms": 2.0})
    with (tmp_path / "steps.jsonl").open("a") as file:
        file.write(json.dumps({"name": "b", "ms": 3.0})[:-4])
    assert lines(tmp_path, "steps") == {"a": {"name": "a", "ms": 2.0}}
