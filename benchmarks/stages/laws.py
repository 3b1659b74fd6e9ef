"""Loss and gradient of every small model on the device, compared with the CPU.

In float64 they must agree to rounding, with boundaries by the model's own patcher. In float32, and under bfloat16
autocast, the distance from float64 is given, and the CPU's: `share16` is their ratio.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from bytelm.interfaces.model import ByteModel
from bytelm.interfaces.objective import score
from bytelm.testing import tiny_models
from bytelm.testing.exact import exact
from bytelm.units import BOS, PAD
from stages.bench import Bench, Found, Measurement, apart, in_turn

SECONDS, EACH = 70, 40
COLUMNS = ("loss64", "slopes64", "slopes32", "slopes16", "cpu16", "share16")
EXACT, CLOSE = 1e-9, 1e-4
torch.backends.cudnn.allow_tf32 = False  # or convolutions in float32 keep 10 of its 23 bits


def ids_of(model: ByteModel) -> Tensor:
    """Three rows: a document, two of them, and one with PADs behind it."""
    ids = torch.randint(32, 127, (3, 161), generator=torch.Generator().manual_seed(0))
    ids[:, 0] = ids[1, 70] = BOS
    ids[2, 130:] = PAD
    return ids


def gradients(model: ByteModel, ids: Tensor, opens: Tensor | None, half: bool = False) -> tuple[float, Tensor]:
    """Nats, and the gradient of all parameters in one line."""
    model.zero_grad()
    with torch.autocast(model.device.type, torch.bfloat16, enabled=half):
        nats, _ = score(model, ids, boundaries=opens)
    nats.backward()
    parts = [p.grad.to_dense().flatten().cpu().double() for p in model.parameters() if p.grad is not None]
    return float(nats.detach()), torch.cat(parts)


def invariant(bench: Bench, model: ByteModel) -> Found:
    ids, model = ids_of(model), model.train()
    patcher = model.patcher
    opens = None if patcher is None else patcher.extend(ids)[0]
    with exact(model) as precise:
        wanted, truth = gradients(precise, ids, None)
        loss, found = gradients(copy.deepcopy(precise).to(bench.device), ids, None)
    there = copy.deepcopy(model).to(bench.device)
    one, half = (gradients(there, ids, opens, half)[1] for half in (False, True))
    cpu = apart(gradients(model, ids, opens, half=True)[1], truth)
    distances = {"loss64": abs(loss / wanted - 1), "slopes64": apart(found, truth), "slopes32": apart(one, truth)}
    distances |= {"slopes16": apart(half, truth), "cpu16": cpu, "share16": apart(half, truth) / cpu}
    if not (max(distances["loss64"], distances["slopes64"]) < EXACT and distances["slopes32"] < CLOSE):
        return {"failed": f"too far apart: {distances}", **distances}
    return distances


def measurements(bench: Bench) -> Iterator[Measurement]:
    for name, model in in_turn(tiny_models())[: bench.size(None, 4)]:
        yield name, partial(invariant, bench, model)
