"""Every law on every architecture and every patching scheme there is, and a bug for every law to catch."""

from __future__ import annotations

import dataclasses
import math
import subprocess
import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bytelm.interfaces import objective
from bytelm.interfaces.objective import score
from bytelm.models.blt.model import BLT
from bytelm.models.megabyte.embedding import PatchEmbedding
from bytelm.models.megabyte.grid import Grid
from bytelm.models.megabyte.model import Megabyte
from bytelm.models.megabyte_pytorch import shift as shifting
from bytelm.models.transformer import model as byte_transformer
from bytelm.models.transformer.model import ByteTransformer
from bytelm.nn import attention, transformer
from bytelm.nn.attention import CausalPattern
from bytelm.nn.ngrams import NgramEmbedding
from bytelm.nn.norm import RMSNorm
from bytelm.patching.base import Guard
from bytelm.patching.layout import Layout, Rows
from bytelm.patching.space import Space
from bytelm.testing import (
    MODEL_INVARIANTS,
    PATCHER_INVARIANTS,
    InvariantError,
    UniformModel,
    check_model,
    check_patcher,
    models,
    tiny,
    tiny_models,
    tiny_patchers,
)
from bytelm.transfer import to_host
from bytelm.units import BOS, BYTES, EOS, PAD, VOCAB, bits_per_byte

MODELS = dict(tiny_models())
PATCHERS = dict(tiny_patchers())
WINDOWED, SPACED = "transformer (windowed)", "blt (last layer crossed) on space (bounded)"
MEGABYTE = "megabyte (cross-patch attention, convolutions)"
SHIFTED = "megabyte_pytorch (three stages, positions of every kind)"

# A shape that was held to every law with one patcher need only be held to those about patches with the others.
PATCH_LAWS = ("causality", "split", "boundaries", "elsewhere")
FIRST = {name.split(" on ")[0]: name for name in reversed(MODELS)}
CASES = [
    (name, invariant) for name in MODELS for invariant in (MODEL_INVARIANTS if name in FIRST.values() else PATCH_LAWS)
]


@pytest.mark.fault("M1", "M3")
@pytest.mark.parametrize(("name", "invariant"), CASES, ids=map(" · ".join, CASES))
def test_model(name: str, invariant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of 16 queries, so that short rows cross them too."""
    monkeypatch.setattr(attention, "BLOCK", 16)
    MODEL_INVARIANTS[invariant](MODELS[name], list(MODELS).index(name), 2)


@pytest.mark.fault("M1", "M2")
@pytest.mark.parametrize("name", PATCHERS)
def test_patcher(name: str) -> None:
    assert check_patcher(PATCHERS[name], seed=list(PATCHERS).index(name)) == dict.fromkeys(PATCHER_INVARIANTS, 0.0)


def test_blocks_of_their_real_size() -> None:
    """And what `check_model` returns: a figure by law, all of them at the level of rounding."""
    worst = check_model(MODELS[WINDOWED], seed=7, examples=1)
    assert list(worst) == list(MODEL_INVARIANTS)
    assert all(
        0 <= worst[invariant] < 1e-12 for invariant in ("causality", "split", "rows", "dynamic_batching", "documents")
    )
    assert models.split(MODELS[SPACED], 7, 1) < 1e-12


@pytest.mark.slow
@pytest.mark.parametrize("name", [WINDOWED, SPACED, MEGABYTE])
def test_compiled(name: str) -> None:
    """In a process of its own: torch cannot compile functions whose shapes are checked."""
    invariant = f"from bytelm.testing import models, tiny; models.compiled(dict(tiny.tiny_models())[{name!r}], 0, 2)"
    subprocess.run([sys.executable, "-c", invariant], check=True)


@pytest.mark.fault("M1", "M2", "M3")
def test_every_file_is_held_to_the_laws(monkeypatch: pytest.MonkeyPatch) -> None:
    """A new file is found by its name alone; without `tiny` its Config is taken as it is, each patcher with it."""
    found = {name.split(" ")[0] for name in MODELS}, {name.split(" ")[0] for name in PATCHERS}
    assert found == (set(tiny.names("models")), set(tiny.names("patching")))

    class Config:
        patched = True

        def build(self, patcher: Any) -> UniformModel:
            return UniformModel()

    find, names = tiny.find, tiny.names
    monkeypatch.setattr(tiny, "names", lambda floor: ["new"] if floor == "models" else names(floor))
    monkeypatch.setattr(tiny, "find", lambda f, n: SimpleNamespace(Config=Config) if n == "new" else find(f, n))
    assert [name for name, _ in tiny_models()] == [f"new on {patcher}" for patcher in PATCHERS]


@pytest.mark.fault("M4")
def test_a_uniform_model_needs_log2_of_the_ids_for_every_byte() -> None:
    ids = torch.tensor([[BOS, *range(BYTES)], [BOS, *bytes(200), *[PAD] * 56]])
    model = UniformModel().requires_grad_(False)
    nats, count = score(model, ids)
    assert int(count) == 456
    assert math.isclose(bits_per_byte(float(nats), int(count)), math.log2(VOCAB), rel_tol=1e-6)
    nats, count = score(model, torch.tensor([[BOS, 0, EOS]]))
    assert (int(count), round(float(nats) / math.log(VOCAB), 5)) == (1, 2.0)  # EOS is learnt, and is no byte


# --- a bug for every law ----------------------------------------------------------------------------------------------


def window_ignored_with_a_cache(patch: pytest.MonkeyPatch) -> None:
    of: Any = CausalPattern.of

    def wrong(
        lengths: Tensor, starts: Tensor, where: Any, cached: int, window: int | None, *rest: Any
    ) -> CausalPattern:
        return of(lengths, starts, where, cached, None if cached else window, *rest)

    patch.setattr(CausalPattern, "of", wrong)


def cache_advanced_by_columns(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(attention, "tail", lambda x, ends, size: x[:, x.shape[1] - size :])


def next_byte_peeked_at(patch: pytest.MonkeyPatch) -> None:
    propose: Any = Space.propose

    def wrong(self: Space, rows: Rows, forced: Tensor, memory: Any) -> Any:
        opens, memory = propose(self, rows, forced, memory)
        return torch.cat([opens[:, 1:], opens[:, :1]], 1) | forced, memory

    patch.setattr(Space, "propose", wrong)


def nul_taken_for_padding(patch: pytest.MonkeyPatch) -> None:
    of: Any = Rows.of
    patch.setattr(Rows, "of", lambda ids: of(torch.where(ids == 0, PAD, ids)))


def nul_not_counted(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(objective, "BOS", 0)  # which is not counted, and rightly so


def mean_of_means(patch: pytest.MonkeyPatch) -> None:
    def wrong(*arguments: Any) -> tuple[Tensor, Tensor]:
        nats, count = score(*arguments)
        return nats / len(arguments[1]), count

    patch.setattr(models, "score", wrong)


def block_forgotten_in_the_count(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(transformer, "pairs", lambda new, window: new * min(new, window or new))


def ngrams_forget(patch: pytest.MonkeyPatch) -> None:
    hashes: Any = NgramEmbedding.hashes
    wrong = lambda self, ids, starts, recent: hashes(self, ids, starts, torch.full_like(recent, PAD))  # noqa: E731
    patch.setattr(NgramEmbedding, "hashes", wrong)


def ngrams_cross_documents(patch: pytest.MonkeyPatch) -> None:
    hashes: Any = NgramEmbedding.hashes
    wrong = lambda self, ids, starts, recent: hashes(self, ids, starts & False, recent)  # noqa: E731
    patch.setattr(NgramEmbedding, "hashes", wrong)


def open_patch_read(patch: pytest.MonkeyPatch) -> None:
    """A byte reads the latent of its own patch before that patch is whole."""
    of: Any = Layout.of

    def wrong(*arguments: Any) -> Layout:
        layout: Layout = of(*arguments)
        early = (layout.closed + 1).clamp(max=layout.patches)
        return dataclasses.replace(layout, closed=early)

    patch.setattr(Layout, "of", wrong)


def state_written_to(patch: pytest.MonkeyPatch) -> None:
    forward: Any = ByteTransformer.forward

    def wrong(self: ByteTransformer, ids: Tensor, state: Any = None, boundaries: Any = None) -> Any:
        result = forward(self, ids, state, boundaries)
        if state is not None:
            state.where.position.add_(ids.shape[1])
        return result

    patch.setattr(ByteTransformer, "forward", wrong)


def boundaries_dropped(patch: pytest.MonkeyPatch) -> None:
    forward: Any = BLT.forward

    def wrong(self: BLT, ids: Tensor, state: Any = None, boundaries: Tensor | None = None) -> Any:
        return forward(self, ids, state, None if boundaries is None else boundaries & False)

    patch.setattr(BLT, "forward", wrong)


def parameter_left_alone(patch: pytest.MonkeyPatch) -> None:
    init_weights: Any = ByteTransformer.init_weights

    def wrong(self: ByteTransformer, seed: int) -> None:
        before = self.head.weight.detach().clone()
        init_weights(self, seed)
        nn.Module.get_parameter(self, "head.weight").data.copy_(before)

    patch.setattr(ByteTransformer, "init_weights", wrong)


def weight_not_stored(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(BLT, "state_dict", lambda self: {k: v.half() for k, v in nn.Module.state_dict(self).items()})


def pieces_in_half(patch: pytest.MonkeyPatch) -> None:
    """A cache that is kept in bfloat16 whatever the model computes in."""
    tail: Any = attention.tail
    patch.setattr(attention, "tail", lambda *arguments: tail(*arguments).bfloat16().float())


def open_patch_forgotten(patch: pytest.MonkeyPatch) -> None:
    """What was read of a patch before this call is not seen any more."""
    of: Any = Grid.of
    patch.setattr(Grid, "of", lambda *a: dataclasses.replace(of(*a), filled=torch.zeros_like(a[2])))


def patch_of_another_document_seen(patch: pytest.MonkeyPatch) -> None:
    of: Any = Grid.of
    patch.setattr(Grid, "of", lambda place, linked, *rest: of(place, linked | True, *rest))


def pad_left_out(patch: pytest.MonkeyPatch) -> None:
    """The first patch of a document holds what stood before it in the row."""
    forward: Any = PatchEmbedding.forward

    def wrong(self: PatchEmbedding, ids: Tensor, offset: Tensor, *rest: Any) -> Any:
        return forward(self, ids, offset + self.size, *rest)

    patch.setattr(PatchEmbedding, "forward", wrong)


def global_output_read_too_early(patch: pytest.MonkeyPatch) -> None:
    """Each patch is predicted from the output that has read it."""
    inside: Any = Megabyte.inside

    def wrong(self: Megabyte, level: int, cells: Tensor, grid: Grid, above: Tensor, *rest: Any) -> Any:
        return inside(self, level, cells, grid, torch.cat([above[:, 1:], above[:, -1:]], 1), *rest)

    patch.setattr(Megabyte, "inside", wrong)


def shift_forgets(patch: pytest.MonkeyPatch) -> None:
    """The first new position gets nothing from the one before it, which was read in another call."""
    shift: Any = shifting.shift
    patch.setattr(shifting, "shift", lambda x, view, before: shift(x, view, torch.zeros_like(before)))


def shift_crosses_documents(patch: pytest.MonkeyPatch) -> None:
    shift: Any = shifting.shift
    wrong = lambda x, view, before: shift(x, dataclasses.replace(view, starts=view.starts & False), before)  # noqa: E731
    patch.setattr(shifting, "shift", wrong)


def ids_left_on_the_host(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(byte_transformer, "to_device", lambda x, where: x)


def normed(patch: pytest.MonkeyPatch, also: Callable[[Tensor], Any]) -> None:
    forward: Any = RMSNorm.forward

    def wrong(self: RMSNorm, x: Tensor) -> Tensor:
        found = forward(self, x)
        other = also(found.detach())
        return other if isinstance(other, Tensor) else found

    patch.setattr(RMSNorm, "forward", wrong)


def a_branch_on_the_device(patch: pytest.MonkeyPatch) -> None:
    normed(patch, lambda x: bool(x.amax() > 1e9))


def a_size_asked_of_the_device(patch: pytest.MonkeyPatch) -> None:
    normed(patch, lambda x: int((x != 0).sum()))


def a_mask_as_index_on_the_device(patch: pytest.MonkeyPatch) -> None:
    normed(patch, lambda x: len(x[x > 1e9]))


def fetched_in_every_layer(patch: pytest.MonkeyPatch) -> None:
    normed(patch, lambda x: len(to_host(x)))


def other_numbers_on_the_device(patch: pytest.MonkeyPatch) -> None:
    normed(patch, lambda x: x * 1.001 if x.device.type != "cpu" else None)


PLANTS: list[tuple[Callable[[pytest.MonkeyPatch], None], str, str]] = [
    (window_ignored_with_a_cache, WINDOWED, "split"),
    (window_ignored_with_a_cache, SPACED, "split"),
    (cache_advanced_by_columns, WINDOWED, "rows"),
    (cache_advanced_by_columns, WINDOWED, "dynamic_batching"),
    (next_byte_peeked_at, SPACED, "causality"),
    (next_byte_peeked_at, SPACED, "split"),
    (nul_taken_for_padding, WINDOWED, "causality"),
    (nul_taken_for_padding, SPACED, "causality"),
    (open_patch_forgotten, MEGABYTE, "split"),
    (patch_of_another_document_seen, MEGABYTE, "documents"),
    (pad_left_out, MEGABYTE, "documents"),
    (global_output_read_too_early, MEGABYTE, "causality"),
    (shift_forgets, SHIFTED, "split"),
    (shift_crosses_documents, SHIFTED, "documents"),
    (nul_not_counted, WINDOWED, "sums"),
    (mean_of_means, WINDOWED, "sums"),
    (block_forgotten_in_the_count, WINDOWED, "cost"),
    (block_forgotten_in_the_count, SPACED, "cost"),
    (ngrams_forget, SPACED, "split"),
    (ngrams_cross_documents, SPACED, "documents"),
    (open_patch_read, SPACED, "causality"),
    (open_patch_read, SPACED, "gradient"),
    (state_written_to, WINDOWED, "state"),
    (boundaries_dropped, SPACED, "boundaries"),
    (parameter_left_alone, WINDOWED, "init_weights"),
    (weight_not_stored, SPACED, "saved"),
    (pieces_in_half, WINDOWED, "precision"),
    (ids_left_on_the_host, WINDOWED, "elsewhere"),
    (a_branch_on_the_device, SPACED, "elsewhere"),
    (a_size_asked_of_the_device, MEGABYTE, "elsewhere"),
    (a_mask_as_index_on_the_device, SPACED, "elsewhere"),
    (fetched_in_every_layer, WINDOWED, "elsewhere"),
    (other_numbers_on_the_device, SPACED, "elsewhere"),
]


@pytest.mark.fault("M1", "M3")
@pytest.mark.parametrize(("plant", "name", "invariant"), PLANTS, ids=lambda x: getattr(x, "__name__", x))
def test_a_bug_is_caught(
    plant: Callable[[pytest.MonkeyPatch], None], name: str, invariant: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    plant(monkeypatch)
    with pytest.raises(InvariantError) as caught:
        MODEL_INVARIANTS[invariant](MODELS[name], 0, 4)
    assert caught.value.invariant == invariant
    assert type(MODELS[name]).__name__ in str(caught.value)


def unbounded(patch: pytest.MonkeyPatch) -> None:
    apply: Any = Guard.apply

    def wrong(self: Guard, *arguments: Any) -> Any:
        return apply(Guard(None, None), *arguments)

    patch.setattr(Guard, "apply", wrong)


def padding_opens(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Rows, "restore", lambda self, values: Rows.align(self, values | ~self.real))


@pytest.mark.fault("M1", "M2")
@pytest.mark.parametrize(
    ("plant", "invariant"),
    [
        (next_byte_peeked_at, "causality"),
        (next_byte_peeked_at, "split"),
        (unbounded, "guard"),
        (padding_opens, "openings"),
    ],
    ids=lambda x: getattr(x, "__name__", x),
)
def test_a_bug_in_a_patcher_is_caught(
    plant: Callable[[pytest.MonkeyPatch], None], invariant: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    plant(monkeypatch)
    with pytest.raises(InvariantError, match=f"Space violates the invariant '{invariant}'"):
        PATCHER_INVARIANTS[invariant](PATCHERS["space (bounded)"], 0, 4)


def test_an_error_says_what_where_and_how_much() -> None:
    error = InvariantError("split", "BLT(Space)", "position 3 of a row of 9", 0.25, 1e-9)
    wanted = "BLT(Space) violates the invariant 'split' at position 3 of a row of 9: off by 0.25, bound 1e-09"
    assert str(error) == wanted
    assert isinstance(error, AssertionError)
