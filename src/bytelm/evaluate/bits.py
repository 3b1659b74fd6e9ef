"""Exact bits of documents: every byte is scored once, however long its document is.

Long documents are read in windows, `context` ids at a time, each `stride` ids further than the one before:

    ids          BOS a b c d e f g h i            context 4, stride 2
    window 0     BOS a b c                        scores a b c d
    window 1          . . c d                     scores e f       with context - stride ids before those it starts at
    window 2              . . e f                 scores g h
    window 3                  . . g h             scores i         (a document ends; EOS is not scored)

Of a token model the ids are tokens, and the bytes are those that they stand for: the bits of a document are those
of its tokens, as the encoding makes them, and its bytes are those of the file.

So a byte is predicted from at least context - stride + 1 ids and at most `context`. Each window starts afresh, but the
patches of a document are cut once, over the whole of it, by streaming it through the model's patcher.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import islice

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bytelm.errors import UsageError
from bytelm.evaluate import online
from bytelm.evaluate.dynamic import Dynamic
from bytelm.evaluate.reading import Window, read_line
from bytelm.evaluate.stream import Document, chunks, pieces
from bytelm.evaluate.windows import Precision, Windows
from bytelm.interfaces.model import ByteModel
from bytelm.interfaces.objective import nats_of
from bytelm.online.memory import Memory
from bytelm.transfer import to_device, to_host
from bytelm.units import BOS


@dataclass(frozen=True)
class DocumentBits:
    """What a document costs: nats summed in float64 over all of its bytes, EOS not counted.

    `by_place[p]` is the share of the bytes i with i % period == p; empty for a period of 1. `online`: the nats of the
    model and a memory that learns the bytes, where there is one.
    """

    name: str
    bytes: int
    nats: float
    by_place: tuple[float, ...] = ()
    online: float | None = None


def measure(
    model: ByteModel,
    documents: Iterable[tuple[str, Document]],
    *,
    context: int,
    stride: int | None = None,
    batch: int = 8,
    period: int = 1,
    progress: Callable[[int], None] | None = None,
    precision: Precision = "float32",
    memory: Memory | None = None,
    dynamic: Dynamic | None = None,
) -> Iterator[DocumentBits]:
    """The bits of each (name, document), in order, in windows of `context` ids as drawn above.

    `stride`: default context // 2. `batch` windows, of one document or several, go through the model together;
    no more of a document is held than they need. With a `period` above 1 the nats of each place in it are summed too:
    of each plane, where ids are bytes of alternating planes. `progress` is called with the number of bytes scored.
    `precision`: of matrix products; "bfloat16" is fastest on GPUs, and its error is in docs/evaluating.md.
    `memory`: learns the bytes, in the order of the documents, beside the model, which stays as it is.
    `dynamic`: the copy of the model that is measured in its place, and learns from each window after it was scored;
    windows are then read one by one.

    Raises UsageError unless 1 <= stride <= context and batch >= 1, for a token model with a memory, and for a `dynamic`
    of another model.
    """
    windows = replace(Windows.checked(model, context, stride, batch, precision, dynamic), memory=memory)
    if memory is not None:
        online.check(model)
    return _measure(model, documents, windows, period, progress)


def _measure(
    model: ByteModel,
    documents: Iterable[tuple[str, Document]],
    windows: Windows,
    period: int,
    progress: Callable[[int], None] | None,
) -> Iterator[DocumentBits]:
    tallies: deque[_Tally] = deque()

    def all_windows() -> Iterator[tuple[_Tally, Window]]:
        for name, document in documents:
            tally = _Tally(name, np.zeros(period))
            if model.tokens is not None:  # its bytes are those of the file, whatever its tokens stand for
                document = b"".join(piece.tobytes() for piece in pieces(document))
                tally.whole = len(document)
            tallies.append(tally)
            yield from ((tally, window) for window in windows.of(document))
            tally.ended = True

    stream = all_windows()
    while group := list(islice(stream, windows.batch)):
        scored = windows.score([window for _, window in group])
        for (tally, _), (nats, sizes, own) in zip(group, scored, strict=True):
            tally.add(nats, sizes, own)
        if progress:
            progress(sum(int(sizes.sum()) for _, sizes, _ in scored))
        # All windows drawn so far are scored: a document that ended has nothing more to come.
        while tallies and tallies[0].ended:
            yield tallies.popleft().bits()
    yield from (tally.bits() for tally in tallies)


def nats_of_document(
    model: ByteModel,
    document: Document,
    *,
    context: int,
    stride: int | None = None,
    batch: int = 8,
    dynamic: Dynamic | None = None,
) -> NDArray[np.float64]:
    """-log p of each byte (or token) of one document, in nats `[bytes]`: the terms of the sum that `measure` gives."""
    windows = Windows.checked(model, context, stride, batch, dynamic=dynamic)
    stream = windows.of(document)
    scored: list[NDArray[np.float64]] = [np.zeros(0)]
    while group := list(islice(stream, windows.batch)):
        scored += [nats for nats, *_ in windows.score(group)]
    return np.concatenate(scored)


def continuations(
    model: ByteModel,
    pairs: Iterable[tuple[bytes, bytes]],
    *,
    context: int,
    stride: int | None = None,
    batch: int = 8,
) -> Iterator[tuple[float, bool]]:
    """Of each (prefix, continuation): the nats of the continuation's bytes, and whether each is the most probable id.

    The two are read as one document in the windows of `measure`. Raises UsageError for a token model, which may
    join the end of the one and the beginning of the other: `decoding.bytewise` makes it a model of bytes.
    """
    if model.tokens is not None:
        raise UsageError(
            "this model reads tokens, so that parts of a text have no log-likelihood: evaluate whole texts, "
            "or decoding.bytewise(model)"
        )
    windows = Windows.checked(model, context, stride, batch)
    return _after(windows, ((prefix + continuation, len(prefix)) for prefix, continuation in pairs))


def naive_continuations(
    model: ByteModel,
    pairs: Iterable[tuple[bytes, bytes]],
    *,
    context: int,
    stride: int | None = None,
    batch: int = 8,
) -> Iterator[tuple[float, bool]]:
    """What is commonly published as `continuations` of a token model, which is not P(continuation | prefix).

    As lm-evaluation-harness 0.4 has it (`TemplateLM._encode_pair`): whitespace at the end of the prefix counts with the
    continuation, and of the tokens of both together those count that are beyond the number of tokens of the prefix
    alone. So a token across the two counts as a whole or not at all, and where there are fewer tokens together than in
    the prefix nothing counts. `context` in tokens. Raises UsageError for a model of bytes.
    """
    tokens = model.tokens
    if tokens is None:
        raise UsageError("this model reads bytes, whose continuations have a log-likelihood: use continuations")
    windows = Windows.checked(model, context, stride, batch)

    def counted() -> Iterator[tuple[bytes, int]]:
        for prefix, continuation in pairs:
            text = prefix.decode(errors="surrogateescape").rstrip().encode(errors="surrogateescape")
            yield prefix + continuation, len(tokens.encode(text))

    return _after(windows, counted())


def prompted_continuations(
    model: ByteModel,
    pairs: Iterable[tuple[bytes, bytes]],
    *,
    context: int,
    stride: int | None = None,
    batch: int = 8,
) -> Iterator[tuple[float, bool]]:
    """Of each (prefix, continuation): the nats of the continuation's tokens after a prompt that ends with the prefix.

    Both are encoded alone, as a prompt is for generation, so that no token crosses from the one to the other. `context`
    in tokens. Raises UsageError for a model of bytes, to which it makes no difference where a prompt ends.
    """
    if model.tokens is None:
        raise UsageError("this model reads bytes, whose continuations have a log-likelihood: use continuations")
    windows, encode = Windows.checked(model, context, stride, batch), model.tokens.encode

    def parted() -> Iterator[tuple[Tensor, int]]:
        for prefix, continuation in pairs:
            ids = [encode(prefix), encode(continuation)]
            yield torch.from_numpy(np.concatenate([[BOS], *ids])), len(ids[0])

    return _after(windows, parted())


def _after(windows: Windows, documents: Iterable[tuple[bytes | Tensor, int]]) -> Iterator[tuple[float, bool]]:
    """Of each (document, ids): the nats of what follows so many ids, and whether each is the most probable one.

    What comes before is read and not scored, which spares the output layer; a window with nothing else is left out.
    """

    def all_windows() -> Iterator[Window | None]:
        for document, ids in documents:
            scored = 0  # ids that earlier windows score
            for window in windows.of(document):
                end = scored + len(window.ids) - 1 - window.seen
                if end > ids:
                    yield replace(window, seen=window.seen + max(0, ids - scored))
                scored = end
            yield None  # the document ends

    stream, nats, likeliest = all_windows(), 0.0, True
    while group := list(islice(stream, windows.batch)):
        scored = iter(windows.judge([window for window in group if window is not None]))
        for window in group:
            if window is None:
                yield nats, likeliest
                nats, likeliest = 0.0, True
                continue
            found, best = next(scored)
            nats += float(found.double().sum())
            likeliest &= bool(best.all())


def timed(
    model: ByteModel, documents: Iterable[bytes], *, context: int, stride: int | None = None, batch: int = 8
) -> Iterator[tuple[float, float]]:
    """Of each document, read alone in the windows of `measure`: its nats, and the seconds that took, patching included.

    The first one is read once before, and not timed: the first calls of kernels take longer.
    """
    windows = Windows.checked(model, context, stride, batch)
    for index, document in enumerate(documents):
        if not index:
            list(_measure(model, [("", document)], windows, 1, None))
        began = time.perf_counter()
        (found,) = _measure(model, [("", document)], windows, 1, None)
        yield found.nats, time.perf_counter() - began


@torch.inference_mode()
def logprobs(model: ByteModel, prefix: bytes, continuation: bytes) -> NDArray[np.float64]:
    """log p of each byte of `continuation` after `prefix`, in nats (never above 0): `[bytes]`.

    Every byte is predicted from everything before it, in one stream through the model's state: no window cuts it short.
    Raises UsageError for a token model, in which single bytes have none: `decoding.bytewise` makes it a model of bytes.
    """
    if model.tokens is not None:
        raise UsageError(
            "this model reads tokens, so that single bytes have no log-probability: use bits, "
            "or decoding.bytewise(model)"
        )
    line = torch.cat([torch.zeros(0, dtype=torch.long), *chunks(prefix + continuation)])
    nats, at = [torch.zeros(0)], 0
    for logits in read_line(model, line[:-1]):
        wanted = slice(max(0, len(prefix) - at), None)  # after the last id of the prefix, the continuation begins
        targets = line[at + 1 : at + 1 + len(logits)][wanted]
        nats.append(to_host(nats_of(logits[None, wanted], to_device(targets, logits)[None])[0]))
        at += len(logits)
    return -torch.cat(nats).double().numpy()


@dataclass
class _Tally:
    """The sums of a document whose windows are being scored."""

    name: str
    places: NDArray[np.float64]
    bytes: int = 0
    nats: float = 0.0
    ended: bool = False
    online: float | None = None
    whole: int | None = None
    """The bytes of the document, where they are not those of its ids."""

    def add(self, nats: NDArray[np.float64], sizes: NDArray[np.int64], online: float | None) -> None:
        """Count the nats and bytes of the next ids, and their nats with a memory."""
        if online is not None:
            self.online = (self.online or 0.0) + online
        period = len(self.places)
        places = (self.bytes + np.arange(len(nats))) % period
        self.places += np.bincount(places, weights=nats, minlength=period)
        self.bytes += int(sizes.sum())
        self.nats += float(nats.sum())

    def bits(self) -> DocumentBits:
        """The sums, once they are whole."""
        by_place = tuple(map(float, self.places)) if len(self.places) > 1 else ()
        return DocumentBits(
            self.name, self.bytes if self.whole is None else self.whole, self.nats, by_place, self.online
        )
