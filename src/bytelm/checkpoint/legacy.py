"""What older runs call things: tables of their configurations and recipes, and tensors of their checkpoints."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

TABLES = {"scorer": "entropy_model", "scorer_train": "entropy_model_train"}
ATTENTION = {"window": "attention_window"}
TRAIN = {
    "window": "context_length",
    "accumulate": "gradient_accumulation_steps",
    "clip": "max_grad_norm",
    "recompute": "activation_checkpointing",
    "warmup": "warmup_steps",
    "final_rate": "min_lr_ratio",
    "embedding_rate": "embedding_lr_scale",
    "valid_minutes": "eval_every_minutes",
    "valid_bytes": "eval_bytes",
    "save_minutes": "checkpoint_every_minutes",
}
KEYS = {
    "model": ATTENTION,
    "entropy_model": ATTENTION,
    "patching": {
        "rise": "relative_threshold",
        "max_singles": "max_single_byte_run",
        "mean_size": "target_mean_length",
    },
    "train": TRAIN,
    "entropy_model_train": TRAIN,
}
TENSORS = ("patcher.scorer.", "patcher.entropy_model.")


def current(tables: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration or recipe of any version under the names of today; what is no table stays as it is."""
    found = {("init_from" if key == "start" else TABLES.get(key, key)): table for key, table in tables.items()}
    for name, keys in KEYS.items():
        table = found.get(name)
        if isinstance(table, Mapping):
            found[name] = {keys.get(key, key): value for key, value in table.items()}
    if isinstance(found.get("patching"), dict) and found["patching"].get("rule") == "rise":
        found["patching"]["rule"] = "relative"
    return found


def state(found: dict[str, Any]) -> dict[str, Any]:
    """What a checkpoint says of itself, its recipe under the names of today."""
    recipe = found.get("recipe")
    return {**found, "recipe": current(recipe)} if isinstance(recipe, dict) else found


def tensor_name(name: str) -> str:
    """The name of today of a tensor, or of a moment of one."""
    return TENSORS[1] + name.removeprefix(TENSORS[0]) if name.startswith(TENSORS[0]) else name


def entropy_model_home(run: Path) -> Path:
    """Where a run keeps its entropy model; one of an older version has it elsewhere."""
    older = run / "scorer"
    return older if older.exists() else run / "entropy_model"
