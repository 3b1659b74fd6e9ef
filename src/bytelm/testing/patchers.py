"""Invariants of every patching scheme: the contract of `patcher.extend(ids, state)`.

    invariant    statement
    causality    a decision depends on the ids up to it and on nothing later
    split        chunking invariance, and a state can be continued from twice
    rows         batch invariance: PADs anywhere, sequences entering and leaving
    openings     a boundary follows a document's first id and EOS, and never a PAD
    guard        no patch is longer than the scheme's bound, and no run of one-byte patches either

A decision is yes or no: these invariants are exact.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from bytelm.nn.state import join_rows, map_state, take_rows
from bytelm.patching.base import Guard, Patcher
from bytelm.patching.layout import since
from bytelm.testing.examples import PIECES, moments, padded, pieces, row, rows
from bytelm.testing.invariant import EXAMPLES, InvariantError, agree, agree_states, subject
from bytelm.units import BOS, EOS


def check_patcher(patcher: Patcher, *, seed: int = 0, examples: int = EXAMPLES) -> dict[str, float]:
    """Check every invariant below. Returns the worst difference by invariant; raises LawError."""
    return {name: invariant(patcher, seed, examples) for name, invariant in PATCHER_INVARIANTS.items()}


def decide(patcher: Patcher, ids: Int[Tensor, " time"], state: Any = None) -> Bool[Tensor, " time"]:
    """The decisions over one row."""
    return patcher.extend(ids[None], state)[0][0]


def causality(patcher: Patcher, seed: int = 0, examples: int = EXAMPLES) -> float:
    """Changing the ids from t on leaves the decisions before t as they were."""
    rng, worst = random.Random(seed), 0.0
    for ids in rows(rng, examples):
        times, other = moments(rng, len(ids)), row(rng, len(ids))
        opens, _ = patcher.extend(torch.stack([ids, *(torch.cat([ids[:t], other[t:]]) for t in times)]))
        for index, t in enumerate(times):
            where = f"a row of {len(ids)} changed from {t} on"
            worst = max(worst, agree("causality", patcher, opens[1 + index, :t], opens[0, :t], where))
    return worst


def split(patcher: Patcher, seed: int = 0, examples: int = EXAMPLES) -> float:
    """Deciding in any pieces is deciding whole; a state that was continued from is as it was before."""
    rng, worst = random.Random(seed), 0.0
    for ids in rows(rng, examples):
        state, found = patcher.initial_state(1), list[Tensor]()
        for cut in pieces(rng, len(ids)):
            before = map_state(torch.clone, state)
            opens, after = patcher.extend(ids[None, cut], state)
            agree_states("split", patcher, state, before, f"a state that {len(opens[0])} ids continued")
            found.append(opens[0])
            state = after
        where = f"a row of {len(ids)} in pieces of {[len(part) for part in found]}"
        worst = max(worst, agree("split", patcher, torch.cat(found), decide(patcher, ids), where))
    return worst


def rows_alone(patcher: Patcher, seed: int = 0, examples: int = EXAMPLES) -> float:
    """Rows that are decided with ever other rows, in any order, PADs anywhere, are decided as alone."""
    rng, worst = random.Random(seed), 0.0
    lines = rows(rng, examples)
    states, done = [patcher.initial_state(1) for _ in lines], [0] * len(lines)
    found: list[list[Tensor]] = [[] for _ in lines]
    while any(read < len(ids) for read, ids in zip(done, lines, strict=True)):
        group = rng.sample(range(len(lines)), rng.randint(1, len(lines)))
        parts = [lines[r][done[r] : done[r] + rng.choice(PIECES)] for r in group]
        batch, real = padded(rng, parts)
        opens, together = patcher.extend(batch, join_rows([states[r] for r in group]))
        for index, r in enumerate(group):
            found[r].append(opens[index][real[index]])
            states[r] = take_rows(together, torch.tensor([index]))
            done[r] += len(parts[index])
    for ids, opens in zip(lines, found, strict=True):
        where = f"a row of {len(ids)} that joined others"
        worst = max(worst, agree("rows", patcher, torch.cat(opens), decide(patcher, ids), where))
    return worst


def openings(patcher: Patcher, seed: int = 0, examples: int = EXAMPLES) -> float:
    """The id after a document's first one, and after an EOS, opens a patch; at a PAD there is nothing to open."""
    rng, worst = random.Random(seed), 0.0
    batch, real = padded(rng, rows(rng, examples))
    opens, _ = patcher.extend(batch)
    first = real & (real.cumsum(1) == 1)
    forced = first | (batch == BOS) | (batch == EOS)
    for index in range(len(batch)):
        for kind, places, wanted in (("must open", forced, True), ("does not exist", ~real, False)):
            found = opens[index][places[index]]
            where = f"the ids of row {index} after which a patch {kind}"
            worst = max(worst, agree("openings", patcher, found, torch.full_like(found, wanted), where))
    return worst


def guard(patcher: Patcher, seed: int = 0, examples: int = EXAMPLES) -> float:
    """No patch is longer than `max_length`; at most `max_singles` + 2 consecutive openings, forced ones aside.

    For schemes that have a `guard`. The two: where the bound on length and the proposals that are spared add theirs.
    """
    bounds = getattr(patcher, "guard", None)
    if not isinstance(bounds, Guard):
        return 0.0
    begun = torch.zeros(1, dtype=torch.long)
    for ids in rows(random.Random(seed), examples):
        opens = decide(patcher, ids)
        free = opens & (ids != BOS) & (ids != EOS)
        longest = int(since(opens[None], begun).max()) + 1
        singles = int(since(~free[None], begun).max())
        if bounds.max_length is not None and longest > bounds.max_length:
            raise InvariantError("guard", subject(patcher), "a patch's length", longest, bounds.max_length)
        if (
            bounds.max_single_byte_run is not None
            and bounds.max_length != 1
            and singles > bounds.max_single_byte_run + 2
        ):
            raise InvariantError(
                "guard", subject(patcher), "one-byte patches in a row", singles, bounds.max_single_byte_run + 2
            )
    return 0.0


PATCHER_INVARIANTS: dict[str, Callable[[Patcher, int, int], float]] = {
    "causality": causality,
    "split": split,
    "rows": rows_alone,
    "openings": openings,
    "guard": guard,
}
