"""What a model answers to the queries of a suite: each asked once, kept on disk, continued after an interruption."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from bytelm.data.files import write_whole
from bytelm.errors import UsageError
from bytelm.evaluate.bits import timed
from bytelm.evaluate.patches import patch_view
from bytelm.evaluate.robustness.base import Item, Query
from bytelm.generate.prompts import generate
from bytelm.generate.sampling import Sampling
from bytelm.interfaces.model import ByteModel
from bytelm.robust.columns import Column, Likelihood
from bytelm.training.stop import StopRequest

ROWS = 32  # prompts that are continued together
LINE_END = b"\n"
Progress = Callable[[int], None]


@dataclass(frozen=True)
class Document:
    """A document that was read as a whole: its nats, its patches (None: the model has none), and the seconds."""

    nats: float
    patches: int | None
    seconds: float


@dataclass(frozen=True)
class Asked:
    """The queries of a suite, each once, in an order that follows from them."""

    likelihoods: list[Query]
    prompted: list[Query]
    """Those whose prefix is a prompt that ends there: the first ones of cuts."""
    documents: list[Query]
    prompts: list[Query]

    @classmethod
    def of(cls, items: Iterable[Item]) -> Asked:
        """The queries of items."""
        apart: dict[str, set[Query]] = {"": set(), "cut": set(), "document": set(), "generation": set()}
        for item in items:
            kind = item.kind if item.kind in apart else ""
            apart[kind].update(item.queries[:1])
            apart[""].update(item.queries[1:])
        return cls(*(sorted(queries, key=order) for queries in apart.values()))

    @property
    def bytes(self) -> int:
        """Bytes that are read or written."""
        return sum(map(size, [*self.likelihoods, *self.prompted, *self.documents, *self.prompts]))


def order(query: Query) -> tuple[int, bytes, bytes]:
    """Those of one length follow each other: they are read together."""
    return size(query), query.prefix, query.continuation


def size(query: Query) -> int:
    """Bytes of a query."""
    return len(query.prefix) + len(query.continuation)


@dataclass
class Answers:
    """The answers to the first so many of `Asked`, in their order."""

    nats: list[float] = field(default_factory=list[float])
    prompted: list[float] = field(default_factory=list[float])
    documents: list[Document] = field(default_factory=list[Document])
    written: list[bool | None] = field(default_factory=list[bool | None])
    """Whether a continuation was generated; None: the model has no positions for so many tokens."""
    seconds: float = 0.0
    """That answering took."""

    def complete(self, asked: Asked) -> bool:
        """Whether nothing is left to ask."""
        given = (self.nats, self.prompted, self.documents, self.written)
        wanted = (asked.likelihoods, asked.prompted, asked.documents, asked.prompts)
        return [len(some) for some in given] == [len(some) for some in wanted]

    def fits(self, asked: Asked) -> bool:
        """Whether they can be the first answers to these queries."""
        given = (self.nats, self.prompted, self.documents, self.written)
        wanted = (asked.likelihoods, asked.prompted, asked.documents, asked.prompts)
        return all(len(some) <= len(every) for some, every in zip(given, wanted, strict=True))


def kept(path: Path) -> Answers:
    """The answers that were kept; none where the file is not there, or not whole."""
    try:
        found: dict[str, Any] = json.loads(path.read_bytes())
        documents = [
            Document(float(each["nats"]), None if each["patches"] is None else int(each["patches"]), each["seconds"])
            for each in found["documents"]
        ]
        nats, prompted = ([float(each) for each in found[key]] for key in ("nats", "prompted"))
        written = [None if each is None else bool(each) for each in found["written"]]
        return Answers(nats, prompted, documents, written, float(found["seconds"]))
    except (OSError, ValueError, LookupError, TypeError):
        return Answers()


def ask(column: Column, asked: Asked, path: Path, progress: Progress | None) -> Answers:
    """The answers of a model, those kept in `path` among them; what there is by then is kept, however this ends.

    Raises Interrupted where a StopRequest has received a signal, and whatever scoring raises.
    """
    answers = kept(path)
    if not answers.fits(asked):  # a damaged file
        answers = Answers()
    if answers.complete(asked):
        return answers
    before, began = answers.seconds, time.perf_counter()

    def note(query: Query) -> None:
        if progress:
            progress(size(query))
        StopRequest.check()

    try:
        for likelihood, queries, found in (
            (column.likelihood, asked.likelihoods, answers.nats),
            (column.prompted, asked.prompted, answers.prompted),
        ):
            for query, nats in scored(column, likelihood, queries[len(found) :]):
                found.append(nats)
                note(query)
        for query, document in read(column, asked.documents[len(answers.documents) :]):
            answers.documents.append(document)
            note(query)
        for query, right in completed(column, asked.prompts[len(answers.written) :]):
            answers.written.append(right)
            note(query)
    finally:
        answers.seconds = before + time.perf_counter() - began
        write_whole(path, json.dumps(asdict(answers)).encode())
    return answers


def scored(column: Column, likelihood: Likelihood, queries: Sequence[Query]) -> Iterator[tuple[Query, float]]:
    """The nats of each query's continuation."""
    if queries:
        pairs = ((query.prefix, query.continuation) for query in queries)
        yield from zip(queries, likelihood(column.model, pairs, column.context), strict=True)


def read(column: Column, queries: Sequence[Query]) -> Iterator[tuple[Query, Document]]:
    """Each document, read alone."""
    if queries:
        found = timed(column.model, (q.continuation for q in queries), context=column.context)
        for query, (nats, seconds) in zip(queries, found, strict=True):
            yield query, Document(nats, patches(column.segmented or column.model, query.continuation), seconds)


def patches(model: ByteModel, data: bytes) -> int | None:
    """How many patches, or tokens, a document has; None for a model without either."""
    if model.tokens is not None:  # their bytes need not add up to the document's
        return len(model.tokens.encode(data))
    try:
        return int(np.count_nonzero(patch_view(model, data).opens))
    except UsageError:
        return None


def completed(column: Column, queries: Sequence[Query]) -> Iterator[tuple[Query, bool | None]]:
    """Whether the model, greedily, writes the continuation and then ends the line, or the document, as in `Answers`."""
    for begin in range(0, len(queries), ROWS):
        group = queries[begin : begin + ROWS]
        wanted = [query.continuation.removesuffix(LINE_END) for query in group]
        if column.writes is not None:
            for query, text in zip(group, wanted, strict=True):
                yield query, column.writes(query.prefix, text, LINE_END)
            continue
        most, greedy = max(map(len, wanted)) + 1, Sampling(temperature=0.0)  # 1: to see that it ends there
        prompts = [query.prefix for query in group]
        found = generate(column.model, prompts, max_bytes=most, sampling=greedy, stop=[LINE_END])
        for query, text, one in zip(group, wanted, found, strict=True):
            yield query, one.data == text


def unwritten_rows(items: Iterable[Item], asked: Asked, answers: Answers) -> list[str]:
    """The rows with a prompt that the model has no positions for."""
    written = dict(zip(asked.prompts, answers.written, strict=True))
    return list(dict.fromkeys(item.row for item in items if written.get(item.queries[0], False) is None))
