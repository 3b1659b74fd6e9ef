"""Small checkpoints whose content follows from their step."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bytelm.checkpoint import manifest, store

FILES = ["model.safetensors", "optimizer.safetensors", "state.json", "MANIFEST.json"]


def content(step: int) -> dict[str, dict[str, Tensor]]:
    """What step `step` of the test runs holds."""
    moments = {"m": torch.full((3, 5), step / 7), "v": torch.ones(())}
    return {"model": {"a": torch.full((50,), step)}, "optimizer": moments}


def save(run: Path, step: int, keep: int = 2) -> Path:
    return store.save(run, step, content(step), {"bytes": step * 10}, keep)


def holds(path: Path, step: int) -> bool:
    store.verify(path)
    groups = content(step)
    found = {group: store.read_tensors(path, group) for group in groups}
    same = all(torch.equal(found[g][n], groups[g][n]) for g in groups for n in groups[g])
    return same and store.read_state(path) == {"bytes": step * 10, "step": step}


def names(run: Path) -> list[str]:
    return sorted(p.name for p in (run / "checkpoints").iterdir())


def seal(path: Path) -> None:
    """Make the manifest fit the files, as one with ill intent would."""
    body = json.loads((path / "MANIFEST.json").read_text())
    del body["sha256"]
    for name in body["files"]:
        data = (path / name).read_bytes()
        body["files"][name] = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    write_manifest(path, body)


def write_manifest(path: Path, body: dict[str, Any]) -> None:
    (path / "MANIFEST.json").write_text(json.dumps({**body, "sha256": manifest.digest(body)}))
