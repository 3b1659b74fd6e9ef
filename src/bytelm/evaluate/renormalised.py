"""What a token model spends on tokens that come next in no encoding, and gains when it is conditioned on the others."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice

import numpy as np
from numpy.typing import NDArray

from bytelm.data.bpe import Bpe
from bytelm.data.canonical import START, Canonical, part
from bytelm.errors import UsageError
from bytelm.evaluate.bits import DocumentBits
from bytelm.evaluate.stream import Document, pieces
from bytelm.evaluate.windows import Windows
from bytelm.interfaces.model import ByteModel
from bytelm.transfer import to_host
from bytelm.units import EOS


def renormalisation(
    model: ByteModel,
    documents: Iterable[tuple[str, Document]],
    *,
    context: int,
    stride: int | None = None,
    batch: int = 8,
) -> Iterator[DocumentBits]:
    """Of each (name, document): -log of the probability of what can follow, in nats, summed over its tokens.

    What can follow is decided from the whole document (`data.canonical`); windows and `context`, in tokens, are those
    of `measure`, whose nats less these are what the conditioned token model needs (`decoding.marginal`). Raises
    UsageError for a model of bytes, of which every sequence is an encoding.
    """
    if not isinstance(model.tokens, Bpe):
        raise UsageError("this model reads bytes, or tokens of another project: there is nothing to renormalise")
    windows, words = Windows.checked(model, context, stride, batch), Canonical(model.tokens)
    for name, document in documents:
        data = whole(document)
        ids = model.tokens.encode(data).tolist()
        stream, following, nats = windows.of(data), allowed(words, ids), 0.0
        while group := list(islice(stream, batch)):
            logits, _ = windows.read(group)
            for line in to_host(logits).double().numpy():
                nats += lost(line, *next(following))
        yield DocumentBits(name, len(data), nats)


def allowed(words: Canonical, ids: list[int]) -> Iterator[tuple[NDArray[np.int64], bool]]:
    """The ids that can stand where each of some does, and whether EOS can."""
    number = np.zeros(words.tokens.vocabulary, np.int64)
    number[words.ids] = np.arange(len(words.ids))
    place, last = START, EOS
    for id in ids:
        yield words.ids[part(words.allowed(place, last), 0, len(words.ids))], place.ends
        place, last = words.after(place, last, int(number[id])), id


def lost(logits: NDArray[np.float64], ids: NDArray[np.int64], ends: bool) -> float:
    """-log of the probability of some ids, and of EOS if that can be."""
    chances = np.exp(logits - logits.max())
    return float(np.log(chances.sum()) - np.log(chances[ids].sum() + ends * chances[EOS]))


def mean_bytes(model: ByteModel, documents: Iterable[tuple[str, Document]]) -> float:
    """Mean bytes of a token of documents; 1 where there are none."""
    assert model.tokens is not None
    sizes = [model.tokens.sizes[model.tokens.encode(whole(document))] for _, document in documents]
    joined = np.concatenate([np.zeros(0), *sizes])
    return float(joined.mean()) if len(joined) else 1.0


def whole(document: Document) -> bytes:
    """The bytes of a document."""
    return b"".join(piece.tobytes() for piece in pieces(document))
