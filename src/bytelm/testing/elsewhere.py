"""The invariant of placement: a model on a device computes the same, without synchronization."""

from __future__ import annotations

import copy
import random

import torch
from torch import Tensor

from bytelm.interfaces.model import ByteModel
from bytelm.interfaces.objective import score
from bytelm.nn.state import join_rows, take_rows
from bytelm.testing.examples import marks, padded, rows
from bytelm.testing.invariant import EXAMPLES, InvariantError, agree, subject
from bytelm.testing.pretend import PlacementError, moved, near, pretend
from bytelm.transfer import to_host
from bytelm.units import PAD

CLOSE = 1e-4  # in float32, where the same numbers are added in another order


def elsewhere(model: ByteModel, seed: int = 0, examples: int = EXAMPLES) -> float:
    """On a (pretended) device logits, loss and gradients are the same, and nothing waits for it; in float32.

    Reading whole with recorded boundaries fetches nothing; a model that learns its boundaries fetches those of each
    stage. In pieces, with rows that leave and join, a patcher may fetch what its entropy model says.
    """
    try:
        return _elsewhere(model, seed, examples)
    except PlacementError as error:
        raise InvariantError("elsewhere", subject(model), str(error), 1.0, 0.0) from error


def _elsewhere(model: ByteModel, seed: int, examples: int) -> float:
    rng, worst = random.Random(seed), 0.0
    lines = rows(rng, examples)
    batch, _ = padded(rng, lines)
    given = marks(rng, batch.shape[1]).expand(len(batch), -1)
    model = copy.deepcopy(model).train()
    model.zero_grad()
    with pretend() as seen:
        far = moved(model)
        loss, count = score(far, batch, boundaries=given)
        loss.backward()
        waits = dict(seen.fetches)
    learned = len(far.chunking.counts) if far.chunking else 0
    if sum(waits.values()) > learned:
        raise InvariantError("elsewhere", subject(model), f"{waits}, where boundaries are recorded: waits", 1.0, 0.0)
    wanted, counted = score(model, batch, boundaries=given)
    wanted.backward()
    agree("elsewhere", model, torch.as_tensor([count]), torch.as_tensor([counted]), "the number of bytes")
    worst = agree("elsewhere", model, near(loss.detach())[None] / wanted.detach(), torch.ones(1), "the loss", CLOSE)
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            found, scale = near(far.get_parameter(name).grad), parameter.grad.norm() + 1e-6
            gap = (found - parameter.grad).flatten()[None] / scale
            worst = max(worst, agree("elsewhere", model, gap, torch.zeros_like(gap), f"the slope of {name}", CLOSE))

    def through(one: ByteModel) -> Tensor:
        """The logits of all rows, in two pieces that are joined."""
        state, found = one.initial_state(len(batch)), list[Tensor]()
        for cut in (slice(0, 40), slice(40, 41), slice(41, None)):
            states = [take_rows(state, torch.tensor([row])) for row in range(len(batch))]
            logits, state = one(batch[:, cut], join_rows(states))
            found.append(to_host(logits.detach()))
        return torch.cat(found, 1)

    with torch.no_grad():
        with pretend():
            found = through(far)
        real = batch != PAD
        return max(worst, agree("elsewhere", model, found[real], through(model)[real], "pieces", CLOSE))
