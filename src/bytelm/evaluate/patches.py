"""The patches of documents: boundaries and entropies of one, patch lengths over many.

The patch of BOS, which holds no byte, counts nowhere here: a mean patch size is bytes over patches that have bytes.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from bytelm.errors import UsageError
from bytelm.evaluate.stream import Document, chunks, decisions, entropies
from bytelm.interfaces.model import ByteModel
from bytelm.patching import fixed
from bytelm.patching.base import Patcher
from bytelm.patching.entropy import Entropy


@dataclass(frozen=True)
class PatchView:
    """The cuts of a document: `opens[i]` says that byte i opens a patch, `entropies[i]` is what was known before it.

    `entropies` are those of the patcher's entropy model, in nats; None for a scheme without an entropy model.
    """

    opens: NDArray[np.bool_]
    entropies: NDArray[np.float32] | None


def patch_view(model: ByteModel, data: bytes) -> PatchView:
    """How the model cuts a document, into patches or tokens. Raises UsageError for a model without either."""
    if model.tokens is not None:
        sizes = model.tokens.sizes[model.tokens.encode(data)]
        opens = np.zeros(len(data), np.bool_)
        opens[np.cumsum(sizes) - sizes] = True
        return PatchView(opens, None)
    patcher, size = segmenter(model), model.patch_size
    if patcher is None and size is not None:  # a model that counts its patches, from the start of each document
        patcher = fixed.Config(size).build()
    if patcher is None:
        raise UsageError(f"a {type(model).__name__} has no patches: use BLT, MEGABYTE, H-Net or a token model")
    opens = np.concatenate([np.zeros(0, np.bool_), *opens_of(patcher, data)])
    if not isinstance(patcher, Entropy):
        return PatchView(opens, None)
    after_each_id = torch.cat(list(entropies(patcher.entropy_model, data)))
    return PatchView(opens, after_each_id[: len(opens)].numpy())


def segmenter(model: ByteModel) -> Patcher | ByteModel | None:
    """What decides the boundaries of a model's patches: its patcher, or itself; None for fixed patches or none."""
    return model if model.target_patch is not None else model.patcher


def opens_of(patcher: Patcher | ByteModel, document: Document) -> Iterator[NDArray[np.bool_]]:
    """Whether each byte of a document opens a patch, in pieces; see `segmenter`."""
    if isinstance(patcher, ByteModel):
        yield from learned(patcher, document)
        return
    # A decision is made after one id about the next: the last, about a byte that is not there, is held back for ever.
    held = np.zeros(0, np.bool_)
    for _, opens in decisions(patcher, document):
        assert opens is not None
        line = np.concatenate([held, opens.numpy()])
        yield line[:-1]
        held = line[-1:]


@torch.no_grad()
def learned(model: ByteModel, document: Document) -> Iterator[NDArray[np.bool_]]:
    """Whether each byte of a document opens a patch of a model that learns its boundaries, in pieces.

    The first does, though the model may read it in the patch that BOS opened.
    """
    state, begun = model.initial_state(1), False
    for ids in chunks(document):
        _, state = model(ids[None], state)
        assert model.chunking is not None
        opens = model.chunking.opens[0].numpy()
        if not begun:
            opens = opens[1:].copy()
            opens[:1] = True
        begun = True
        yield opens


def patch_lengths(opens: Iterable[NDArray[np.bool_]]) -> Counter[int]:
    """How many patches of each length, in bytes, one document has, from whether each of its bytes opens one."""
    lengths: Counter[int] = Counter()
    open_bytes = 0  # of the patch that the piece before left open
    for piece in opens:
        starts = np.flatnonzero(piece)
        if not len(starts):
            open_bytes += len(piece)
            continue
        whole = np.concatenate([[open_bytes + starts[0]], np.diff(starts)])
        lengths.update(dict(zip(*(values.tolist() for values in np.unique_counts(whole[whole > 0])), strict=True)))
        open_bytes = len(piece) - int(starts[-1])
    if open_bytes:
        lengths[open_bytes] += 1
    return lengths


def mean_length(lengths: Counter[int]) -> float:
    """Bytes over patches, of lengths that were counted. Raises ValueError if there are none."""
    if not lengths.total():
        raise ValueError("a mean patch size needs at least one patch, got none")
    return sum(length * count for length, count in lengths.items()) / lengths.total()


def lengths_by_kind(patcher: Patcher | ByteModel, documents: Iterable[tuple[str, Document]]) -> dict[str, Counter[int]]:
    """Patch lengths over documents given as (kind, bytes), for each kind: the file suffix, say.

    Counters add up: `sum(result.values(), Counter())` are the lengths over all kinds.
    """
    lengths: dict[str, Counter[int]] = defaultdict(Counter)
    for kind, document in documents:
        lengths[kind].update(patch_lengths(opens_of(patcher, document)))
    return dict(lengths)


def realised(patcher: Patcher, documents: Iterable[tuple[str, Document]]) -> dict[str, float]:
    """The mean patch size over documents given as (kind, bytes), for each kind that has bytes."""
    by_kind = lengths_by_kind(patcher, documents)
    return {kind: mean_length(lengths) for kind, lengths in sorted(by_kind.items()) if lengths}
