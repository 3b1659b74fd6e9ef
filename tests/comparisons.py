"""The command of a small comparison, its data, and what it leaves."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bytelm.compare.candidates import candidate
from bytelm.compare.plan import Budget, planned
from bytelm.data.corpus import Corpus

MODELS = ("byte-window:32", "bpe:300", "space")
BUDGET = "1.3e11"  # about the least that suits them on this much data: some seconds each
WORDS = ["the", "patch", "byte", "model", "reads", "and", "writes", "déjà", "vu", "return", "x =", "tree", "light"]
MEANS = {"blt": 5.0, "space": 5.0, "hnet": 5.0, "megabyte": 8.0, "megabyte-across": 8.0, "bpe": 3.0}
Found = Mapping[str, Any]
Results = dict[str, tuple[int, bytes]]


def write_data(path: Path, size: int) -> str:
    """So many bytes of text and some more, a document a line; some of them longer than a window."""
    rng, lines = random.Random(0), list[str]()
    while sum(map(len, lines)) < size:
        lines.append(" ".join(rng.choice(WORDS) for _ in range(rng.choice((20, 30, 200)))))
    path.write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    return str(path)


def words(data: str | Path, home: Path, models: str, *more: str, budget: str = BUDGET) -> list[str]:
    seeds = () if "--seeds" in more else ("--seeds", "1")
    return ["compare", str(data), "--run", str(home), "--models", models, "--budget", budget, "--quiet", *seeds, *more]


def results_of(home: Path) -> Results:
    """The result of each run there is: when it was written, and what."""
    return {path.parent.name: (path.stat().st_mtime_ns, path.read_bytes()) for path in home.glob("*/result.json")}


def run_of(home: Path, model: str) -> Path:
    return home / f"{model.replace(':', '-')}-0"


@dataclass(frozen=True)
class Begun:
    """A comparison of two models that was interrupted, then ended, then given a third; what was there after each."""

    home: Path
    code: int
    said: str
    metrics: str
    plans: list[bytes]
    results: list[Results]


class Sized(Corpus):
    """A corpus of which only the size is asked."""

    def __init__(self, size: int) -> None:
        self.size = size

    def bytes(self, split: str) -> int:
        return self.size


def sized(name: str, budget: Budget, size: int = 10**9, table: Mapping[str, Any] | None = None) -> Any:
    return planned(candidate(name), budget, Sized(size), MEANS.get(name.split(":")[0], 1.0), table)
