"""A look before a comparison, bytes of one's own, folders that hold other things, and how often a worker looks."""

from __future__ import annotations

import json
import random
import shutil
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from bytelm.cli import run as cli
from bytelm.cli.comparing import close
from bytelm.compare import cells, held_out, prepare, worker
from bytelm.compare.candidates import candidate
from bytelm.compare.cells import Failure
from bytelm.compare.plan import LARGE_STEP, STEP, STEPS, Budget, step_of
from bytelm.compare.run import Outcome
from bytelm.data.corpus import Corpus, iterate_documents
from bytelm.errors import TrainingError
from comparisons import MODELS, sized, words


def test_a_dry_run_says_what_it_would_take_and_trains_nothing(
    data: str, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cells, "trained", None)
    monkeypatch.setattr(prepare, "bytes_per_second", lambda config, mean: 1000.0)

    def shown(models: str, *more: str) -> list[list[str]]:
        assert cli(words(data, tmp_path / "home", models, "--dry-run", *more)) == 0
        return [line.split() for line in capfd.readouterr().out.splitlines() if line.strip()][2:]

    def clock(seconds: float) -> str:
        return f"{round(seconds) // 60}:{round(seconds) % 60:02d}"

    rows = shown("byte-window:32,space")
    plan = json.loads((tmp_path / "home" / "plan.json").read_bytes())["models"]
    seconds = [plan[name]["bytes"] / 1000 for name in ("byte-window:32", "space")]
    assert [row[0] for row in rows] == ["byte-window:32", "space", "all"]
    assert [row[-1] for row in rows] == [*map(clock, seconds), clock(sum(seconds))]
    assert f"{plan['space']['costs']['executed'] / 1e6:.3g}" in rows[1]
    # Of those that are asked for now, every seed.
    rows = shown("space", "--seeds", "2")
    assert [row[0] for row in rows] == ["space", "all,"] and rows[1][-1] == clock(2 * seconds[1])
    assert not list(tmp_path.glob("home/*-0")) and not (tmp_path / "home" / "results.json").exists()


@pytest.mark.parametrize("where", ["elsewhere", "after a command that came to nothing", "among the paths"])
def test_files_of_ones_own_are_what_is_measured_and_nothing_is_learnt_from(
    data: str, tmp_path: Path, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prepare, "bytes_per_second", lambda config, mean: 1000.0)
    home, folder = tmp_path / "home", tmp_path / "folder"
    folder.mkdir()
    shutil.copy(data, folder)
    own = (folder if "among" in where else tmp_path) / "own.txt"
    own.write_bytes(b"measured " * 50)
    if "after" in where:
        assert cli(words(folder, home, MODELS[0], budget="1e9")) == 2
    command = words(folder, home, MODELS[0], "--held-out", str(own), "--dry-run")
    assert cli(command) == 0
    assert held_out.kept(home / "held-out.bin") == [(0, b"measured " * 50)]
    learnt = [data.tobytes() for _, data in iterate_documents(Corpus.open(home / "data"), "train")]
    assert not any(b"measured" in document for document in learnt)
    own.write_bytes(b"changed " * 50)  # nothing was trained yet: nothing binds
    assert cli(command) == 0
    assert held_out.kept(home / "held-out.bin") == [(0, b"changed " * 50)]


def test_data_packed_for_a_command_that_came_to_nothing_is_not_taken_for_another_kind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prepare, "bytes_per_second", lambda config, mean: 1000.0)
    home, genome, rng = tmp_path / "home", tmp_path / "genome.fa", random.Random(0)
    genome.write_text(">name\n" + "".join("".join(rng.choices("ACGT", k=70)) + "\n" for _ in range(1200)))
    assert cli(words(genome, home, MODELS[0], budget="1e9")) == 2
    assert cli(words(genome, home, MODELS[0], "--as", "dna", "--dry-run")) == 0
    kept = [data.tobytes() for _, data in iterate_documents(Corpus.open(home / "data"))]
    assert set(b"".join(kept)) == set(b"ACGT")


def test_a_folder_that_holds_other_runs_takes_a_comparison_too(
    data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prepare, "bytes_per_second", lambda config, mean: 1000.0)
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "config.toml").write_text("")
    assert cli(words(data, tmp_path, MODELS[0], "--dry-run")) == 0


def test_where_no_model_finished_the_reasons_are_of_every_budget() -> None:
    unsuited = Outcome({"budget": 1e10})
    failed = [
        Outcome({"budget": budget}, failures={("blt", 0): Failure(f"with {budget:.0e}")}) for budget in (1e11, 1e12)
    ]
    spec = prepare.ComparisonSpec(["books"], "blt", "flops", (1e10, 1e11, 1e12))
    with pytest.raises(TrainingError, match=r"^no model finished: with 1e\+11; with 1e\+12$"):
        close([unsuited, *failed], spec, Path(), (), online=False, quiet=True, json=False)


def test_a_worker_looks_often_enough_for_a_curve(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Also where the budget is time: so many looks in the minutes there are."""
    seen: list[Any] = []
    stopped = SimpleNamespace(signal=signal.SIGTERM, progress=None)
    monkeypatch.setattr(worker, "train", lambda paths, config, run, **_: seen.append(config.train) or stopped)
    held_out.keep(tmp_path / "held-out.bin", [(0, b"a")])
    model = sized("byte-window", Budget("time", 1200.0, rate=1e9))
    plan = {"models": {"byte-window": model.mapping()}, "paths": [], "held_out": [], "speeds": {"byte-window": 5.0}}
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    assert worker.work(tmp_path, tmp_path, "byte-window", 3, tmp_path, "cpu", True) == 128 + signal.SIGTERM
    assert (seen[0].eval_every_minutes, seen[0].minutes, seen[0].seed) == (20 / worker.LOOKS, 20.0, 3)
    assert seen[0].device == "cpu"


def test_steps_grow_where_there_are_many_of_them() -> None:
    """From 4096 bytes, which all that is published was trained with, to 64 KiB."""
    assert [step_of(n) for n in (0, 1.2e7, STEPS * 2 * STEP, 2e8, 1e12)] == [
        STEP,
        STEP,
        2 * STEP,
        LARGE_STEP,
        LARGE_STEP,
    ]
    assert all(n / step_of(n) >= STEPS for n in (1.7e7, 5e7, 1e9))


def test_wide_models_have_heads_of_64() -> None:
    shapes = {width: candidate("byte").tables(width, 0)["model"] for width in (128, 480, 512, 1008, 1024)}
    assert {width: width // shape["heads"] for width, shape in shapes.items()} == {
        128: 32,
        480: 32,
        512: 64,
        1008: 48,
        1024: 64,
    }
