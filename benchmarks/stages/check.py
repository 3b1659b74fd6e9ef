"""All invariants of models, patchers and decoders on the device: the worst difference of each, or its violation."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import nn

from bytelm.testing import DECODER_INVARIANTS, MODEL_INVARIANTS, PATCHER_INVARIANTS, tiny_models, tiny_patchers
from stages.bench import Bench, Found, Measurement, in_turn

SECONDS, EACH = 240, 60
COLUMNS = ("laws", "forward", "split", "rows", "company", "precision")
torch.backends.cudnn.allow_tf32 = False  # as in laws.py
ELSEWHERE = "elsewhere"  # holds a model of the CPU to a device that is not there


def check(bench: Bench, invariants: Mapping[str, Callable[[Any, int, int], float]], part: Any) -> Found:
    part = part.to(bench.device) if isinstance(part, nn.Module) else part
    found: Found = {}
    wrong: list[str] = []
    for name, invariant in invariants.items():
        if name == ELSEWHERE:
            continue
        try:
            found[name] = invariant(part, 0, bench.size(2, 1))
            bench.wait()
        except Exception as error:
            found[name] = None
            wrong.append(f"{name}: {type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}")
    found = {"laws": len(found) - len(wrong), **found}
    return {"failed": "; ".join(wrong), **found} if wrong else found


def measurements(bench: Bench) -> Iterator[Measurement]:
    for name, patcher in in_turn(tiny_patchers())[: bench.size(None, 2)]:
        yield f"patcher: {name}", partial(check, bench, PATCHER_INVARIANTS, patcher)
    kinds = in_turn(tiny_models())[: bench.size(None, 2)]
    for name, model in kinds:
        yield f"decoder: {name}", partial(check, bench, DECODER_INVARIANTS, model.eval())
    for name, model in kinds:
        yield f"model: {name}", partial(check, bench, MODEL_INVARIANTS, model.eval())
