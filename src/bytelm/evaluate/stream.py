"""Documents of any length as chunks of ids, and boundaries and entropies over whole documents."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterable, Iterator

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from numpy.typing import NDArray
from torch import Tensor, nn

from bytelm.data.bpe import Tokens
from bytelm.patching.base import Patcher, PatchState
from bytelm.patching.entropy import EntropyModel
from bytelm.transfer import to_host
from bytelm.units import BOS

Document = bytes | NDArray[np.uint8] | Iterable[bytes | NDArray[np.uint8]]
"""The bytes of a document: whole, or an iterable of pieces where it is too long to be held."""

CHUNK = 8192  # ids that are read at once, wherever the pieces of a document end, so that decisions do not depend on it


def pieces(document: Document) -> Iterator[NDArray[np.uint8]]:
    """The pieces of a document as arrays; a whole one is one piece."""
    whole = isinstance(document, bytes | np.ndarray)
    for piece in (document,) if whole else document:
        yield np.frombuffer(piece, np.uint8) if isinstance(piece, bytes) else piece


def chunks(document: Document, tokens: Tokens | None = None) -> Iterator[Int[Tensor, " new"]]:
    """BOS and the bytes as ids, int64 on the CPU: CHUNK of them at a time, and the rest.

    With `tokens` the ids are theirs, and a document is held as a whole while it is encoded.
    """
    held: list[NDArray[np.int64]] = [np.array([BOS])]
    room = CHUNK - 1
    whole = tokens is not None and [tokens.encode(b"".join(piece.tobytes() for piece in pieces(document)))]
    for piece in whole or pieces(document):
        while len(piece) >= room:
            held.append(piece[:room].astype(np.int64))
            yield torch.from_numpy(np.concatenate(held))
            piece, held, room = piece[room:], [], CHUNK
        held.append(piece.astype(np.int64))
        room -= len(piece)
    if room < CHUNK:
        yield torch.from_numpy(np.concatenate(held))


def device_of(part: object) -> torch.device:
    """Where a patcher or an entropy model lives; one that holds no tensors works on the CPU as well as anywhere."""
    tensors = itertools.chain(part.parameters(), part.buffers()) if isinstance(part, nn.Module) else ()
    return next((tensor.device for tensor in tensors), torch.device("cpu"))


def decisions(
    patcher: Patcher | None, document: Document, tokens: Tokens | None = None
) -> Iterator[tuple[Int[Tensor, " new"], Bool[Tensor, " new"] | None]]:
    """The chunks of a document, and for each id whether the next one opens a patch; None without a patcher."""
    state = None
    for ids in chunks(document, tokens):
        if patcher is None:
            yield ids, None
        else:
            opens, state = extended(patcher, ids[None], state)
            yield ids, opens[0]


def extended(
    patcher: Patcher, ids: Int[Tensor, "batch new"], state: PatchState | None
) -> tuple[Bool[Tensor, "batch new"], PatchState]:
    """`patcher.extend`; recursively halved if it exceeds a device's memory."""
    with contextlib.suppress(torch.OutOfMemoryError):
        return patcher.extend(ids, state)
    if ids.shape[1] == 1:
        return patcher.extend(ids, state)
    first, second = ids.tensor_split(2, 1)
    before, state = extended(patcher, first, state)
    after, state = extended(patcher, second, state)
    return torch.cat([before, after], 1), state


def entropies(entropy_model: EntropyModel, document: Document) -> Iterator[Float[Tensor, " new"]]:
    """The entropy of the prediction of the next id after each id of a document's chunks: nats, float32."""
    state = entropy_model.initial_state(1)
    for ids in chunks(document):
        entropy, state = entropy_model.entropies(ids[None], state)
        yield to_host(entropy[0])
