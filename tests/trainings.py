"""Trainings that take a second, as functions and as commands, and what they leave."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bytelm.checkpoint import store
from bytelm.checkpoint.metrics import METRICS, read_metrics
from bytelm.training import loop
from bytelm.training.config import RunConfig
from bytelm.training.settings import configure
from small import BLT, TRAINED

PLAIN = ["model.layers=1", "model.dim=16", "model.heads=2", *TRAINED]
SPACES = [*(s for s in BLT if not s.startswith("entropy_model")), "patching.name=space", *TRAINED]


def tiny(*sets: str, steps: int = 6) -> RunConfig:
    """A byte Transformer, which trains a hundred steps a second."""
    return configure("byte-tiny", sets=[*PLAIN, *sets], steps=steps)


def held(run: Path) -> dict[str, Tensor]:
    """Weights and moments of the newest checkpoint."""
    path = store.newest(run)
    return {f"{g}/{k}": v for g in ("model", "optimizer") for k, v in store.read_tensors(path, g).items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def now(trainer: loop.Trainer) -> dict[str, Tensor]:
    """Weights and moments as they are."""
    found = {f"model/{name}": tensor.clone() for name, tensor in trainer.model.state_dict().items()}
    for name, parameter in trainer.model.named_parameters():
        for key, value in trainer.optimizer.moments(parameter).items():
            found[f"{name}/{key}"] = torch.as_tensor(value).clone()
    return found


def of_kind(run: Path, kind: str) -> list[dict[str, Any]]:
    return [line for line in read_metrics(run / METRICS) if line["kind"] == kind]


TRAIN = [sys.executable, "-m", "bytelm", "train"]


def preset_of(sets: list[str]) -> str:
    return "byte-tiny" if sets is PLAIN else "demo"


def command(corpus: Path, run: Path, steps: int, sets: list[str]) -> list[str]:
    words = [*TRAIN, str(corpus), "--preset", preset_of(sets), "--run", str(run), "--steps", str(steps)]
    return [*words, *(word for s in sets for word in ("--set", s))]
