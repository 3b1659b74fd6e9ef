"""Invariants of every architecture: the contract of `model(ids, state, boundaries)`.

    invariant    statement
    causality    ids at t or later do not change logits before t
    gradient     d logits[t] / d embedding[> t] is exactly 0
    split        chunking invariance: incremental reading equals the full pass
    state        states are immutable, and can be continued from twice
    rows         batch invariance: a sequence in a batch, PADs anywhere, equals the sequence alone
    joined       ... also when sequences enter and leave in the middle
    documents    document isolation: packed documents do not affect each other
    boundaries   recorded boundaries equal the patcher's decisions
    sums         a score is a pair of sums, and counts every byte value
    precision    incremental reading rounds no worse than the full pass, in float32 and bfloat16
    initialise   a seed sets every trainable parameter, and nothing else
    saved        stored weights give bitwise identical logits
    elsewhere    equal on a device; shapes and branches are decided on the host
    compiled     compiled equals eager (minutes: not in `check_model`)

Differences are taken in float64, where rounding leaves 1e-14 and an error leaves much more than the bound.
"""

from __future__ import annotations

import copy
import math
import random
from collections.abc import Callable, Iterable
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from safetensors import torch as safetensors
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from bytelm.interfaces.model import ByteModel
from bytelm.interfaces.objective import score
from bytelm.nn import fused
from bytelm.nn.state import join_rows, map_state, take_rows
from bytelm.nn.transformer import Block
from bytelm.patching.layout import forced_openings
from bytelm.testing.elsewhere import elsewhere
from bytelm.testing.exact import exact
from bytelm.testing.examples import LONG, PIECES, SHORT, marks, moments, padded, pieces, row, rows, whole_document
from bytelm.testing.invariant import EXAMPLES, InvariantError, agree, agree_states, subject
from bytelm.units import BOS, BYTES

BOUND = 1e-9  # nats, in float64


def check_model(model: ByteModel, *, seed: int = 0, examples: int = EXAMPLES) -> dict[str, float]:
    """Check every invariant below but the slow one. Returns the worst difference by invariant; raises LawError."""
    return {name: invariant(model, seed, examples) for name, invariant in MODEL_INVARIANTS.items()}


def read(
    model: ByteModel,
    ids: Int[Tensor, " time"],
    given: Bool[Tensor, " time"] | None = None,
    cuts: Iterable[slice] | None = None,
) -> Float[Tensor, "time vocab"]:
    """The logits of one row: in one pass without a state, or through a state in the pieces that `cuts` says."""
    if cuts is None:
        return model(ids[None], None, None if given is None else given[None])[0][0]
    state, found = model.initial_state(1), list[Tensor]()
    for cut in cuts:
        logits, state = model(ids[None, cut], state, None if given is None else given[None, cut])
        found.append(logits[0])
    return torch.cat(found)


@torch.no_grad()
def causality(model: ByteModel, seed: int = 0, examples: int = EXAMPLES) -> float:
    """Changing the id at t, or everything from t on, leaves the logits before t as they were."""
    rng, worst = random.Random(seed), 0.0
    with exact(model) as precise:
        for ids in rows(rng, examples):
            times = moments(rng, len(ids))
            other = row(rng, len(ids))
            one = [torch.cat([ids[:t], other[:1], ids[t + 1 :]]) for t in times]
            rest = [torch.cat([ids[:t], other[t:]]) for t in times]
            logits, _ = precise(torch.stack([ids, *one, *rest]))
            for index, t in enumerate(times * 2):
                where = f"a row of {len(ids)} changed at {t}"
                worst = max(worst, agree("causality", model, logits[1 + index, :t], logits[0, :t], where, BOUND))
    return worst


def gradient(model: ByteModel, seed: int = 0, examples: int = EXAMPLES) -> float:
    """The gradient of logits[t] is exactly 0 at the embedding of every later id, and is not at all of the others."""
    rng, worst = random.Random(seed), 0.0
    embedded: list[Tensor] = []

    def keep(module: nn.Module, inputs: Any, output: Tensor) -> None:
        if output.requires_grad:
            embedded.append(output)

    with exact(model) as precise, torch.enable_grad():
        for module in precise.modules():
            if isinstance(module, nn.Embedding):
                module.register_forward_hook(keep)
        for ids in rows(rng, examples):
            embedded.clear()
            logits = read(precise, ids)
            for t in moments(rng, len(ids)):
                random_mix = logits[t] @ torch.rand_like(logits[t])
                found = torch.autograd.grad(random_mix, embedded, retain_graph=True)
                if not any(bool(g[:, : t + 1].any()) for g in found):
                    raise InvariantError(
                        "gradient", subject(model), f"position {t}, which no embedding reaches", 0.0, 0.0
                    )
                for later in (g[0, t + 1 :] for g in found):
                    where = f"what follows {t} in a row of {len(ids)}"
                    worst = max(worst, agree("gradient", model, later, torch.zeros_like(later), where))
    return worst


@torch.no_grad()
def split(model: ByteModel, seed: int = 0, examples: int = EXAMPLES) -> float:
    """Reading a row through a state, in any pieces, single ids and empty pieces among them, is reading it whole."""
    rng, worst = random.Random(seed), 0.0
    with exact(model) as precise:
        for index, ids in enumerate(rows(rng, examples)):
            given = marks(rng, len(ids)) if index % 2 else None
            wanted = read(precise, ids, given)
            ways = [[slice(0, len(ids))], list(pieces(rng, len(ids)))]
            if len(ids) <= SHORT:
                ways.append([slice(t, t + 1) for t in range(len(ids))])
            for way in ways:
                where = f"a row of {len(ids)} read as {[min(c.stop, len(ids)) - c.start for c in way]}"
                worst = max(worst, agree("split", model, read(precise, ids, given, way), wanted, where, BOUND))
    return worst


@torch.no_grad()
def state(model: ByteModel, seed: int = 0, examples: int = EXAMPLES) -> float:
    """A state that was continued from is as it was to the last bit, and continuing again gives the same logits."""
    rng, worst = random.Random(seed), 0.0
    for ids in rows(rng, examples):
        t = rng.randrange(len(ids))
        _, middle = model(ids[None, :t], model.initial_state(1))
        before = map_state(torch.clone, middle)
        first, _ = model(ids[None, t:], middle)
        model(row(rng, len(ids))[None], middle)
        again, _ = model(ids[None, t:], middle)
        worst = max(worst, agree("state", model, again[0], first[0], f"what follows {t} in a row of {len(ids)}"))
        agree_states("state", model, middle, before, f"the state after {t} ids")
    return worst


@torch.no_grad()
def rows_alone(model: ByteModel, seed: int = 0, examples: int = EXAMPLES) -> float:
    """A sequence of a ragged batch, padded anywhere, read whole or incrementally, equals the sequence alone."""
    rng, worst = random.Random(seed), 0.0
    with exact(model) as precise:
        lines = rows(rng, examples + 1)
        rng.shuffle(lines)
        batch, real = padded(rng, lines)
        for recorded in (None, [marks(rng, len(ids)) for ids in lines]):
            alone = torch.cat([read(precise, *one) for one in zip(lines, recorded or [None] * len(lines), strict=True)])
            given = None if recorded is None else torch.zeros_like(real).masked_scatter(real, torch.cat(recorded))
            whole, _ = precise(batch, None, given)
            through, found = precise.initial_state(len(lines)), list[Tensor]()
            for cut in pieces(rng, batch.shape[1]):
                logits, through = precise(batch[:, cut], through, None if given is None else given[:, cut])
                found.append(logits)
            for logits, way in ((whole, "read whole"), (torch.cat(found, 1), "read in pieces")):
                where = f"rows of {[len(ids) for ids in lines]} ids, one behind another, in a padded batch {way}"
                worst = max(worst, agree("rows", model, logits[real], alone, where, BOUND))
    return worst


@torch.no_grad()
def joined(model: ByteModel, seed: int = 0, examples: int = EXAMPLES) -> float:
    """Rows that read some pieces together with ever other rows, and PADs where others read, are the rows alone."""
    rng, worst = random.Random(seed), 0.0
    with exact(model) as precise:
        lines = rows(rng, examples)
        states, done = [precise.initial_state(1) for _ in lines], [0] * len(lines)
        found: list[list[Tensor]] = [[] for _ in lines]
        while any(read < len(ids) for read, ids in zip(done, lines, strict=True)):
            group = rng.sample(range(len(lines)), rng.randint(1, len(lines)))
            parts = [lines[r][done[r] : done[r] + rng.choice(PIECES)] for r in group]
            batch, real = padded(rng, parts)
            logits, together = precise(batch, join_rows([states[r] for r in group]))
            for index, r in enumerate(group):
                found[r].append(logits[index][real[index]])
                states[r] = take_rows(together, torch.tensor([index]))
                done[r] += len(parts[index])
        for ids, logits in zip(lines, found, strict=True):
            where = f"a row of {len(ids)} that joined others"
            worst = max(worst, agree("dynamic_batching", model, torch.cat(logits), read(precise, ids), where, BOUND))
    return worst


@torch.no_grad()
def documents(model: ByteModel, seed: int = 0, examples: int = EXAMPLES) -> float:
    """A packed document, with EOS between or without, read whole or incrementally, equals the document alone."""
    rng, worst = random.Random(seed), 0.0
    with exact(model) as precise:
        lengths = [LONG // 2, *(rng.randint(0, SHORT) for _ in range(examples))]
        lines = [whole_document(rng, length) for length in lengths]
        rng.shuffle(lines)
        packed = torch.cat(lines)
        alone = torch.cat([read(precise, ids) for ids in lines])
        for cuts in (None, pieces(rng, len(packed))):
            where = f"documents of {[len(ids) for ids in lines]} ids, one behind another"
            worst = max(worst, agree("documents", model, read(precise, packed, None, cuts), alone, where, BOUND))
    return worst


@torch.no_grad()
def boundaries(model: ByteModel, seed: int = 0, examples: int = EXAMPLES) -> float:
    """Recorded boundaries do not change the logits; a model without a patcher ignores them."""
    rng, worst = random.Random(seed), 0.0
    with exact(model) as precise:
        patcher = precise.patcher
        for ids in rows(rng, examples):
            wanted = read(precise, ids)
            given = marks(rng, len(ids)) if patcher is None else patcher.extend(ids[None])[0][0]
            for cuts in (None, pieces(rng, len(ids))):
                where = f"a row of {len(ids)} with its boundaries given"
                worst = max(worst, agree("boundaries", model, read(precise, ids, given, cuts), wanted, where, BOUND))
    return worst


@torch.no_grad()
def sums(model: ByteModel, seed: int = 0, examples: int = EXAMPLES) -> float:
    """A batch, padded anywhere, scores the sum of its rows' scores; all bytes but a row's first id count."""
    rng = random.Random(seed)
    with exact(model) as precise:
        lines = rows(rng, examples)
        nats, count = score(precise, padded(rng, lines)[0])
        alone = [score(precise, ids[None]) for ids in lines]
        wanted = sum(int((ids[1:] < BYTES).sum()) for ids in lines)
        counts = torch.stack([count, torch.stack([own for _, own in alone]).sum()])
        agree("sums", model, counts, torch.full_like(counts, wanted), "the counts of bytes")
        return agree("sums", model, nats[None], torch.stack([own for own, _ in alone]).sum(0, True), "the nats", 1e-6)


@torch.no_grad()
def precision(model: ByteModel, seed: int = 0, examples: int = EXAMPLES) -> float:
    """In float32 and under bfloat16 autocast, incremental reading is at most twice as far from float64 as a full pass.

    The distance is the root mean square over all logits. Returns the worst ratio of the two distances.
    """
    rng, worst = random.Random(seed), 0.0
    lines = rows(rng, examples)
    batch, real = padded(rng, lines)
    given = torch.stack([marks(rng, batch.shape[1]) for _ in lines])
    cuts = list(pieces(rng, batch.shape[1]))
    with exact(model) as precise:
        wanted = precise(batch, None, given)[0][real]

    def distance(logits: Tensor) -> float:
        return float((logits[real].double() - wanted).square().mean().sqrt())

    for half in (False, True):
        with torch.autocast(model.device.type, torch.bfloat16, enabled=half):
            whole, _ = model(batch, None, given)
            through, found = model.initial_state(len(lines)), list[Tensor]()
            for cut in cuts:
                logits, through = model(batch[:, cut], through, given[:, cut])
                found.append(logits)
        ratio = distance(torch.cat(found, 1)) / max(distance(whole), 1e-12)
        if not ratio <= 2:
            raise InvariantError("precision", subject(model), "bfloat16" if half else "float32", ratio, 2)
        worst = max(worst, ratio)
    return worst


def init_weights(model: ByteModel, seed: int = 0, examples: int = EXAMPLES) -> float:
    """`model.initialise(seed)` sets every trainable parameter, the same for the same seed, and touches nothing else.

    Other seeds set others, but for constants and identity matrices.
    """
    del examples
    copies = [copy.deepcopy(model) for _ in range(3)]
    with torch.no_grad():
        for parameter in (p for one in copies for p in one.parameters() if p.requires_grad):
            parameter.fill_(math.nan)
    for one, own_seed in zip(copies, (seed, seed, seed + 1), strict=True):
        one.init_weights(own_seed)
    for name, old in model.named_parameters():
        first, again, other = (one.get_parameter(name).detach().flatten() for one in copies)
        agree("init_weights", model, again, first, name)
        if not old.requires_grad:
            agree("init_weights", model, first, old.flatten(), f"{name}, which is frozen")
        elif bool(first.ne(first[0]).any()) and torch.equal(first, other) and not is_identity(first.view_as(old)):
            raise InvariantError("init_weights", subject(model), f"{name}, the same under two seeds", 0.0, 0.0)
    return 0.0


def is_identity(weight: Tensor) -> bool:
    """Whether it is an identity matrix."""
    return weight.ndim == 2 and torch.equal(weight, torch.eye(*weight.shape))


@torch.no_grad()
def saved(model: ByteModel, seed: int = 0, examples: int = EXAMPLES) -> float:
    """The state dict, stored as safetensors and loaded into another instance, gives the same logits to the last bit."""
    stored = safetensors.save({name: tensor.clone() for name, tensor in model.state_dict().items()})
    other = copy.deepcopy(model)
    for tensor in (*other.parameters(), *other.state_dict().values()):
        tensor.fill_(math.nan if tensor.is_floating_point() else 0)
    other.load_state_dict(safetensors.load(stored))
    rng, worst = random.Random(seed), 0.0
    for ids in rows(rng, examples):
        worst = max(worst, agree("saved", model, read(other, ids), read(model, ids), f"a row of {len(ids)}"))
    return worst


def compiled(model: ByteModel, seed: int = 0, examples: int = EXAMPLES) -> float:
    """With its blocks compiled, a model that reads whole rows is at most twice as far from float64 as it is without.

    The distance is the root mean square over all logits. Returns the worst ratio of the two distances.
    """
    worst, fast = 0.0, copy.deepcopy(model)
    for module in fast.modules():
        if isinstance(module, Block):
            module.compile(dynamic=True)
    for ids in rows(random.Random(seed), examples):
        with exact(model) as precise:
            wanted = read(precise, ids)
        eager, found = (float((read(m, ids) - wanted).detach().square().mean().sqrt()) for m in (model, fast))
        ratio = found / max(eager, 1e-12)
        if not ratio <= 2:
            raise InvariantError("compiled", subject(model), f"a row of {len(ids)}", ratio, 2)
        worst = max(worst, ratio)
    return worst


@torch.no_grad()
def cost(model: ByteModel, seed: int = 0, examples: int = EXAMPLES) -> float:
    """`flops` is what is executed: the operations of all matrix products of a pass, as torch counts them.

    Where no patcher decides, a model may have patches that follow from the places of ids in their documents. Then rows
    of one document are tried, as `flops` does not know where others start. Patches that a model cuts are those it cut.
    """
    rng, worst = random.Random(seed), 0.0
    lines = rows(rng, examples)
    if model.patcher is None:
        lines = [whole_document(rng, len(ids)) for ids in lines]
    for ids in lines:
        given = marks(rng, len(ids))
        start = torch.arange(len(ids)) == 0
        opens = given | forced_openings(ids[None], start[None] | (ids == BOS))[0]
        # Fused attention is not counted on every device; written out as products it is.
        with fused.plain(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            model(ids[None], None, given[None])
        patches = [int(opens.sum())] if model.chunking is None else [int(count) for count in model.chunking.counts]
        flops: Any = model.flops
        found = torch.tensor([flops(len(ids), *patches)])
        wanted = torch.tensor([counter.get_total_flops()])
        worst = max(worst, agree("cost", model, found, wanted, f"the operations for {len(ids)} ids"))
    return worst


MODEL_INVARIANTS: dict[str, Callable[[ByteModel, int, int], float]] = {
    "causality": causality,
    "gradient": gradient,
    "split": split,
    "state": state,
    "rows": rows_alone,
    "dynamic_batching": joined,
    "documents": documents,
    "boundaries": boundaries,
    "sums": sums,
    "precision": precision,
    "cost": cost,
    "init_weights": init_weights,
    "saved": saved,
    "elsewhere": elsewhere,
}
