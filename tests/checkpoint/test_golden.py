"""A checkpoint of each format, kept in tests/golden for ever: what was saved once is read and computes the same.

`python tests/checkpoint/test_golden.py --write` made them, that of several processes from the newest of one.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import shardings
import worlds
from bytelm.checkpoint import manifest, store
from bytelm.checkpoint.assemble import load
from bytelm.checkpoint.metrics import METRICS
from bytelm.data.sampler import Sampler
from bytelm.evaluate.bits import measure
from bytelm.training.journal import Journal
from bytelm.training.loop import Trainer
from bytelm.training.run import train
from bytelm.training.settings import configure
from bytelm.units import BOS

GOLDEN = Path(__file__).parents[1] / "golden"
FORMATS = sorted(path.name for path in GOLDEN.iterdir()) if GOLDEN.exists() else []
TEXT = "The byte of the patch: déjà vu, 0x7f\x00\n".encode()
SETS = [
    *("model.local_dim=8", "model.local_heads=2", "model.cross_heads=2", "model.global_dim=16", "model.global_heads=2"),
    *("model.global_layers=1", "model.decoder_layers=1", "model.attention_window=16", "model.ngram_rows=16"),
    *(
        "model.ngram_sizes=[3,4]",
        "model.ffn_multiple=8",
        "entropy_model.name=ngram",
        "entropy_model.order=2",
        "entropy_model.rows=256",
    ),
    *(
        "patching.threshold=2.0",
        "train.context_length=64",
        "train.batch=2",
        "train.precision=float32",
        "train.sample_bytes=0",
    ),
]


def found(path: Path) -> dict[str, Any]:
    """What is pinned of a run."""
    loaded = load(path)
    ids = torch.tensor([[BOS, *TEXT]])
    with torch.no_grad():
        logits, _ = loaded.model(ids)
    patcher = loaded.model.patcher
    assert patcher is not None
    (document,) = measure(loaded.model, [("text", TEXT)], context=loaded.state["context"])
    return {
        "state": {key: loaded.state[key] for key in ("step", "bytes", "skipped", "context")},
        "nats": document.nats,
        "logits": logits[0, ::8, ::40].tolist(),
        "opens": patcher.extend(ids, patcher.initial_state(1))[0][0].int().tolist(),
    }


@pytest.mark.fault("K4")
@pytest.mark.parametrize("name", FORMATS)
def test_an_old_checkpoint_is_read_and_computes_the_same(name: str) -> None:
    pinned = json.loads((GOLDEN / name / "pinned.json").read_text())
    now = found(GOLDEN / name)
    assert now["state"] == pinned["state"] and now["opens"] == pinned["opens"]
    assert now["nats"] == pytest.approx(pinned["nats"], rel=1e-5)
    torch.testing.assert_close(torch.tensor(now["logits"]), torch.tensor(pinned["logits"]), rtol=1e-5, atol=1e-5)


@pytest.mark.fault("K4")
@pytest.mark.parametrize("name", FORMATS)
def test_a_training_goes_on_from_an_old_checkpoint(name: str, tmp_path: Path) -> None:
    shutil.copytree(GOLDEN / name, tmp_path / "run")
    loaded = load(tmp_path / "run")
    journal = Journal(tmp_path / METRICS, quiet=True)
    trainer = Trainer(loaded.model, configure("demo").train, Sampler.__new__(Sampler), tmp_path / "run", journal)
    trainer.resume()
    assert trainer.progress.step == loaded.state["step"]
    moments = store.read_tensors(loaded.checkpoint, "optimizer")
    assert moments and all(bool(tensor.isfinite().all()) for tensor in moments.values())
    for parameter in loaded.model.parameters():
        assert not parameter.requires_grad or trainer.optimizer.moments(parameter)


def test_there_is_one_of_every_format() -> None:
    assert [f"format-{number}" for number in range(1, manifest.SHARDED + 1)] == FORMATS


def write(name: str) -> None:
    """Train three steps on this file and keep the checkpoint."""
    home = GOLDEN / name
    run = home / "made"
    train([Path(__file__)], configure("demo", sets=SETS, steps=3), run, quiet=True)
    shutil.copytree(run / "checkpoints", home / "checkpoints")
    shutil.rmtree(run)
    (home / "pinned.json").write_text(json.dumps(found(home), indent=1) + "\n")


def write_sharded(name: str, source: str) -> None:
    """Have two processes load a checkpoint and save it again, each its part; it computes what it did."""
    home = GOLDEN / name
    home.mkdir()
    worlds.run(2, shardings.resaved, store.newest(GOLDEN / source), home)
    shutil.copy(GOLDEN / source / "pinned.json", home)


if __name__ == "__main__" and sys.argv[1:] == ["--write"]:
    write(f"format-{store.FORMAT}")
    write_sharded(f"format-{manifest.SHARDED}", f"format-{store.FORMAT}")
