"""Results of comparisons at several budgets, of models whose scaling law is known, as `results.summary` gives them."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any

BUDGETS = (1e11, 3e11, 1e12, 3e12, 1e13)
COMPRESSORS = {"gzip": 3.1, "bzip2": 2.4, "xz": 2.7}
Truth = Callable[[float], float]


def law(offset: float, scale: float, exponent: float, at: float = 1e12) -> Truth:
    return lambda flops: offset + scale * (flops / at) ** -exponent


def model(name: str, budget: float, bits: Sequence[float], ratio: float = 30.0, patch: float | None = None) -> Any:
    """A model as in results.json: a Transformer of F = 2 N, C = 3 F D, D = ratio N."""
    parameters = math.sqrt(budget / 6 / ratio)
    shown = {
        "model": name,
        "bits_per_byte": sum(bits) / len(bits),
        "seeds": dict(enumerate(bits)),
        "tables": round(parameters),
    }
    costs = {"training_flops": budget * 1.001, "trained_bytes": ratio * parameters, "patch_size": patch}
    return {**shown, "parameters": 2 * round(parameters), **costs, "executed": 2 * parameters}


def results(budget: float, models: Sequence[Any], failed: Mapping[str, str] | None = None) -> dict[str, Any]:
    corpus = {"paths": ["books"], "held_out": [], "modality": None, "train_bytes": 4 * 10**7, "measured_bytes": 1 << 19}
    about = {"compressors": COMPRESSORS, "machine": {"device": "a processor", "cores": 2, "threads": [1]}}
    return {
        "match": "flops",
        "budget": budget,
        **corpus,
        **about,
        "models": list(models),
        "failed": dict(failed or {}),
        "diverged": {},
    }


def noisy(truth: Truth, budget: float, seeds: int, spread: float, rng: random.Random) -> list[float]:
    return [truth(budget) * math.exp(rng.gauss(0, spread)) for _ in range(seeds)]


def compared(
    truths: Mapping[str, Truth],
    budgets: Sequence[float] = BUDGETS,
    seeds: int = 3,
    spread: float = 0.003,
    patches: Mapping[str, float] | None = None,
) -> dict[float, dict[str, Any]]:
    """Results of models by their laws, with the noise of seeds."""
    rng = random.Random(0)
    return {
        budget: results(
            budget,
            [
                model(name, budget, noisy(truth, budget, seeds, spread, rng), patch=(patches or {}).get(name))
                for name, truth in truths.items()
            ],
        )
        for budget in budgets
    }
