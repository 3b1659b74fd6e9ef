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
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Literal

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from bytelm.device import fitting
from bytelm.errors import UsageError
from bytelm.evaluate import online
from bytelm.evaluate.reading import Window, open_reader, read_line, read_windows
from bytelm.evaluate.stream import Document, chunks, decisions, pieces
from bytelm.interfaces.decoder import Decoder
from bytelm.interfaces.model import ByteModel
from bytelm.interfaces.objective import nats_of
from bytelm.online.memory import Memory
from bytelm.threads import StepThreads, ThroughputTuner, all_or_one
from bytelm.transfer import to_device, to_host
from bytelm.units import BOS, PAD, UNWRITTEN

Precision = Literal["float32", "bfloat16"]


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
) -> Iterator[DocumentBits]:
    """The bits of each (name, document), in order, in windows of `context` ids as drawn above.

    `stride`: default context // 2. `batch` windows, of one document or several, go through the model together;
    no more of a document is held than they need. With a `period` above 1 the nats of each place in it are summed too:
    of each plane, where ids are bytes of alternating planes. `progress` is called with the number of bytes scored.
    `precision`: of matrix products; "bfloat16" is fastest on GPUs, and its error is in docs/evaluating.md.
    `memory`: learns the bytes, in the order of the documents, beside the model, which stays as it is.

    Raises UsageError unless 1 <= stride <= context and batch >= 1, and for a token model with a memory.
    """
    windows = replace(_Windows.checked(model, context, stride, batch, precision), memory=memory)
    if memory is not None:
        online.check(model)
    return _measure(model, documents, windows, period, progress)


def _measure(
    model: ByteModel,
    documents: Iterable[tuple[str, Document]],
    windows: _Windows,
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
    model: ByteModel, document: Document, *, context: int, stride: int | None = None, batch: int = 8
) -> NDArray[np.float64]:
    """-log p of each byte (or token) of one document, in nats `[bytes]`: the terms of the sum that `measure` gives."""
    windows = _Windows.checked(model, context, stride, batch)
    stream = windows.of(document)
    scored: list[NDArray[np.float64]] = [np.zeros(0)]
    while group := list(islice(stream, batch)):
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
    windows = _Windows.checked(model, context, stride, batch)
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
    windows = _Windows.checked(model, context, stride, batch)

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
    windows, encode = _Windows.checked(model, context, stride, batch), model.tokens.encode

    def parted() -> Iterator[tuple[Tensor, int]]:
        for prefix, continuation in pairs:
            ids = [encode(prefix), encode(continuation)]
            yield torch.from_numpy(np.concatenate([[BOS], *ids])), len(ids[0])

    return _after(windows, parted())


def _after(windows: _Windows, documents: Iterable[tuple[bytes | Tensor, int]]) -> Iterator[tuple[float, bool]]:
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
    windows = _Windows.checked(model, context, stride, batch)
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


@dataclass(frozen=True)
class _Windows:
    """How documents are cut into windows, and windows scored."""

    model: ByteModel
    context: int
    stride: int
    batch: int
    precision: Precision = "float32"
    threads: StepThreads = field(default_factory=StepThreads)
    reader: Decoder | None = None
    """What reads the windows instead of the forward pass, where it can."""
    tuner: ThroughputTuner[int] | None = None
    """Chooses how many threads of the reader do."""
    memory: Memory | None = None

    @classmethod
    def checked(
        cls, model: ByteModel, context: int, stride: int | None, batch: int, precision: Precision = "float32"
    ) -> _Windows:
        """Windows as the user wants them, if they can be had."""
        if context < 1 or batch < 1:
            raise UsageError(f"context = {context} and batch = {batch}: each must be at least 1")
        if stride is None:
            stride = max(1, context // 2)
        if not 1 <= stride <= context:
            raise UsageError(f"stride = {stride}: must be from 1 to the context, {context}, or bytes are left out")
        reader = open_reader(model, rows=batch, capacity=context) if precision == "float32" else None
        pool = None if reader is None else reader.thread_pool
        tuner = all_or_one(pool.most) if pool and pool.most > 1 else None
        return cls(model, context, stride, batch, precision, StepThreads(model.device.type == "cpu"), reader, tuner)

    def of(self, document: Document | Int[Tensor, " ids"]) -> Iterator[Window]:
        """The windows of a document, or of ids that were made of one; none if it is empty."""
        ids, opens = torch.zeros(0, dtype=torch.long), None
        seen = 0
        whole = isinstance(document, Tensor)
        stream = [(document, None)] if whole else decisions(self.model.patcher, document, self.model.tokens)
        for new_ids, new_opens in stream:
            ids = torch.cat([ids, new_ids])
            opens = new_opens if opens is None or new_opens is None else torch.cat([opens, new_opens])
            while len(ids) > self.context:
                end = self.context + 1
                yield Window(ids[:end], None if opens is None else opens[:end], seen)
                ids, opens = ids[self.stride :], None if opens is None else opens[self.stride :]
                seen = self.context - self.stride
        if len(ids) - 1 > seen:
            yield Window(ids, opens, seen)

    @torch.inference_mode()
    def read(self, group: list[Window]) -> tuple[Float[Tensor, "scored vocab"], list[Int[Tensor, " _"]]]:
        """What is predicted of the ids that windows score, one window's after another's; and the ids of each.

        Without a reader all are read in one pass. Logits are where the model is, ids on the host. Raises ResourceError
        where there is no room for so many.
        """
        targets = [window.ids[window.seen + 1 :] for window in group]
        if self.reader is not None:
            return torch.from_numpy(read_windows(self.reader, group, self.tuner)), targets
        ids = pad_sequence([window.ids for window in group], batch_first=True, padding_value=PAD)
        cut = [window.opens for window in group if window.opens is not None]
        boundaries = pad_sequence(cut, batch_first=True)[:, :-1] if cut else None
        low, device = self.precision == "bfloat16", self.model.device
        what, way_out = f"{len(group)} windows of {self.context} ids", f"take a context of {max(1, self.context // 2)}"
        fits = fitting(device, what, lambda: f"{way_out}, or --device cpu")
        with torch.autocast(device.type, torch.bfloat16, enabled=low), fits, self.threads.step(len(group)):
            logits, _ = self.model(ids[:, :-1], None, boundaries)
        width = logits.shape[1]
        places = [row * width + torch.arange(w.seen, len(w.ids) - 1) for row, w in enumerate(group)]
        return logits.flatten(0, 1).index_select(0, to_device(torch.cat(places), logits)), targets

    @torch.inference_mode()
    def score(self, group: list[Window]) -> list[tuple[NDArray[np.float64], NDArray[np.int64], float | None]]:
        """The nats of what each window scores, the bytes of each of these ids, and the nats with the memory."""
        logits, targets = self.read(group)
        nats = nats_of(logits[None], to_device(torch.cat(targets), logits)[None])[0]
        each = to_host(nats).double().split([len(ids) for ids in targets])
        own = [None] * len(group) if self.memory is None else online.nats_online(self.memory, logits, targets)
        sizes = [self.model.byte_lengths(ids).numpy() for ids in targets]
        return [(nats.numpy(), size, cost) for nats, size, cost in zip(each, sizes, own, strict=True)]

    @torch.inference_mode()
    def judge(self, group: list[Window]) -> list[tuple[Float[Tensor, " scored"], Bool[Tensor, " scored"]]]:
        """The nats of what each window scores, and whether each of these ids is the most probable that is written."""
        if not group:
            return []
        logits, targets = self.read(group)
        sizes, wanted = [len(ids) for ids in targets], to_device(torch.cat(targets), logits)
        nats = to_host(nats_of(logits[None], wanted[None])[0]).split(sizes)
        written = logits.index_fill(-1, to_device(torch.tensor(UNWRITTEN), logits), float("-inf"))
        return list(zip(nats, to_host(written.argmax(-1) == wanted).split(sizes), strict=True))
