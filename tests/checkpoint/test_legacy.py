"""Runs of older versions: their configurations, recipes, tensors and metrics are read under the names of today.

tests/golden-run is a whole run that version 0.1.0 wrote before the names changed, stopped after three steps.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from bytelm.checkpoint import legacy, store
from bytelm.checkpoint.metrics import METRICS, read_history
from bytelm.cli import run as cli
from bytelm.config import load_toml
from bytelm.report.recorded import last_session, of_kind, phases

GOLDEN = Path(__file__).parents[1] / "golden-run"
WRITTEN = 1577836800  # when its sources were: a run knows them by name, size and time
KEPT = """
model.local_dim=8 model.local_heads=2 model.cross_heads=2 model.global_dim=16 model.global_heads=2 model.global_layers=1
model.decoder_layers=1 model.attention_window=16 model.ngram_rows=16 model.ngram_sizes=[3,4] model.ngram_output=false
model.ffn_multiple=8 train.embedding_lr_scale=3.0
entropy_model.name=transformer entropy_model.layers=1 entropy_model.dim=8 entropy_model.heads=2
entropy_model.attention_window=8 entropy_model.ffn_multiple=8 entropy_model_train.steps=2
entropy_model_train.minutes=none entropy_model_train.context_length=64 entropy_model_train.batch=2
entropy_model_train.min_lr_ratio=0.05 train.context_length=64 train.batch=2 train.precision=float32
train.sample_bytes=0
patching.rule=relative patching.target_mean_length=3.0
patching.max_single_byte_run=9 train.eval_every_minutes=0.5
"""


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The old run, and the files that it was trained on, as they were."""
    (tmp_path / "notes").mkdir()
    for i in range(1, 9):
        text = "".join(f"note {i}: it was seen today, and written down twice. {j}\n" for j in range(20))
        (tmp_path / "notes" / f"n{i}.txt").write_text(text)
        os.utime(tmp_path / "notes" / f"n{i}.txt", (WRITTEN, WRITTEN))
    shutil.copytree(GOLDEN, tmp_path / "run")
    monkeypatch.chdir(tmp_path)
    return Path("run")


def test_a_table_of_any_version_has_the_names_of_today() -> None:
    old = load_toml(GOLDEN / "config.toml")
    new = legacy.current(old)
    assert {"scorer", "scorer_train", "start"} <= set(old) and not {"scorer", "scorer_train", "start"} & set(new)
    assert new["model"]["attention_window"] == old["model"]["window"] == 16
    assert new["entropy_model_train"]["context_length"] == new["train"]["context_length"] == 64
    assert new["patching"]["rule"] == "relative" and new["patching"]["max_single_byte_run"] == 9
    assert legacy.current(new) == new and list(old["model"]) != list(new["model"])


def test_tensors_are_found_under_the_names_of_today() -> None:
    assert legacy.tensor_name("patcher.scorer.model.head.weight") == "patcher.entropy_model.model.head.weight"
    assert legacy.tensor_name("decoder.scorer.weight") == "decoder.scorer.weight"
    names = store.read_tensors(store.newest(GOLDEN), "model")
    assert any(name.startswith("patcher.entropy_model.") for name in names)


def test_metrics_are_read_under_the_names_of_today() -> None:
    lines = read_history(GOLDEN / METRICS)
    assert of_kind(lines, "session_start") and of_kind(lines, "validation") and last_session(lines) is not None
    spent = phases(lines)
    assert {"packing", "fitting entropy model", "calibrating thresholds", "computing patch boundaries"} <= set(spent)
    assert all("baseline" in line for line in of_kind(lines, "memory"))


def test_an_old_run_is_resumed_without_preparing_it_again(run: Path, capfd: pytest.CaptureFixture[str]) -> None:
    before = next((run / "data").glob("*.bits")).read_bytes()
    sets = [word for setting in KEPT.split() for word in ("--set", setting)]
    assert cli(["train", "notes", "--preset", "blt-tiny", "--run", str(run), "--steps", "6", *sets]) == 0
    said = capfd.readouterr().err
    files = [*(run / "data").glob("*.bits")]
    assert "resuming from step 3" in said and "fitting entropy model" not in said and "calibrating" not in said
    # A fingerprint of boundaries holds the names of settings: they are computed once more, and are the same but where
    # an entropy lies at its threshold, which the products of another processor round to the other side.
    bits = [np.unpackbits(np.frombuffer(data, np.uint8)) for data in (before, *map(Path.read_bytes, files))]
    assert len(files) == 2 and all(np.count_nonzero(own != bits[0]) <= len(own) // 500 for own in bits)
    assert store.read_state(store.newest(run))["step"] == 6 and not (run / "entropy_model").exists()
    assert load_toml(run / "config.toml")["train"]["context_length"] == 64


def test_an_old_run_is_evaluated_reported_and_fine_tuned(run: Path) -> None:
    assert cli(["eval", str(run)]) == 0
    assert cli(["report", str(run), "--quiet"]) == 0 and (run / "report.html").exists()
    words = ["train", "notes", "--init-from", str(run), "--run", "tuned", "--steps", "2", "--quiet"]
    assert cli([*words, "--set", "train.sample_bytes=0"]) == 0
    tensors = [store.read_tensors(store.newest(path), "model") for path in (run, Path("tuned"))]
    assert tensors[0].keys() == tensors[1].keys()
    assert all(np.array_equal(tensors[0][n], tensors[1][n]) for n in tensors[0] if n.startswith("patcher."))
