"""Bits per byte of a model of `transformers` on documents, and what its tokenizer does not give back of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from bytelm.errors import CheckpointError, DataError
from bytelm.evaluate.bits import Precision
from bytelm.evaluate.verdict import EvalReport, judge
from bytelm.hf.encoding import TextTokens
from bytelm.hf.foreign import Foreign
from bytelm.hf.losses import Edit, cost, edits_of, kind_of, size
from bytelm.hf.proof import SAMPLE, Proof, prove, text_of
from bytelm.units import LN2, VOCAB, bits_per_byte

Documents = Sequence[tuple[str, bytes]]
SHOWN = 24  # characters of an example


@dataclass(frozen=True)
class Loss:
    """What of one kind was lost: in how many documents, at how many places, and how much of the files that is."""

    kind: str
    documents: int
    places: int
    characters: int
    bytes: int
    example: str
    """The first one, as Python literals: what is in the file, and what its tokens decode to."""
    file: str
    """Where that is."""

    @property
    def line(self) -> str:
        """As text."""
        return (
            f"  {self.kind}: {self.characters:,} characters, {self.bytes:,} bytes at {self.places:,} places in "
            f"{self.documents:,} documents, as in {self.file}: {self.example}"
        )


@dataclass(frozen=True)
class Survey:
    """What the tokens of documents are, without the model."""

    tokens: int
    unknown_tokens: int
    special_tokens: int
    """Tokens that were read from the text, and that the model knows as special ones."""
    changed: int
    """Documents that their tokens do not give back."""
    losses: tuple[Loss, ...]
    extra_bits: int
    """What the edits cost that make the files of what tokens decode to."""

    def bound(self, bits: float, bytes: int) -> float:
        """Bits per byte of tokens of so many bits and edits together: a code of the files, whatever was lost."""
        return bits_per_byte((bits + (self.extra_bits if self.changed else 0)) * LN2, bytes)

    def lines(self, documents: int, bound: float, unit: str = "bits per byte") -> list[str]:
        """What a reader must know of a figure, line by line: what its tokens do not give back. Empty if nothing."""
        if not self.changed:
            return []
        first = (
            f"NOT a code of the files: {self.changed:,} of {documents:,} documents do not come back from "
            f"their tokens; with all that is lost coded too, at most {bound:.3f} {unit}"
        )
        return [first, *(one.line for one in self.losses)]


@dataclass(frozen=True)
class ForeignReport:
    """`verdict` in windows of tokens, what was lost, and the upper bound that does code the files."""

    verdict: EvalReport
    survey: Survey
    tokenizer: str
    vocabulary: int
    start: tuple[str, ...]
    """What comes before a document."""
    every_window: bool
    """Whether that comes before every window."""
    proof: Proof | None

    @property
    def exact(self) -> bool:
        """Whether every document comes back byte for byte."""
        return not self.survey.changed

    @property
    def bound(self) -> float:
        """See `Survey.bound`."""
        return self.survey.bound(self.verdict.bits, self.verdict.bytes)

    def mapping(self) -> dict[str, Any]:
        """As plain JSON: what an `EvalReport` has, and the rest beside it."""
        own = {name: getattr(self, name) for name in ("tokenizer", "vocabulary", "start", "every_window", "exact")}
        found = {**self.verdict.mapping(), **own, "bits_per_byte_bound": self.bound, **asdict(self.survey)}
        return {**found, "proof": None if self.proof is None else asdict(self.proof)}


def judge_foreign(
    model: Foreign,
    documents: Documents,
    context: int,
    stride: int | None = None,
    *,
    proved: bool = False,
    precision: Precision = "float32",
    progress: Callable[[int], None] | None = None,
) -> ForeignReport:
    """Measure documents given as (name, bytes) in windows of `context` tokens; `proved`: code a sample, and decode it.

    Raises DataError if there are no bytes, and for what the tokenizer cannot read; CheckpointError for a model whose
    probabilities are not finite, and where the proof fails.
    """
    found = survey(model.tokens, documents)
    verdict = judge(model, documents, context, stride, progress, precision=precision, batch=model.batch(context))
    if not math.isfinite(verdict.bits):
        raise CheckpointError("the model gives probabilities that are not finite on these documents")
    proof = prove(model, sample(documents), context, verdict.stride) if proved else None
    start = tuple(model.tokens.tokenizer.convert_ids_to_tokens(list(model.start.ids)))
    name = type(model.tokens.tokenizer).__name__
    return ForeignReport(verdict, found, name, model.tokens.width, start, model.start.always, proof)


def sample(documents: Documents) -> list[bytes]:
    """The first SAMPLE bytes of documents, and the rest of a character."""
    found: list[bytes] = []
    room = SAMPLE
    for _, data in documents:
        end = next((end for end in range(room, min(room + 3, len(data))) if data[end] & 0xC0 != 0x80), room + 3)
        found.append(data[:end])
        room -= len(found[-1])
        if room <= 0:
            break
    return found


def survey(tokens: TextTokens, documents: Documents) -> Survey:
    """Encode and decode every document. Raises DataError, with the file's name, for one that cannot be encoded."""
    counts = {"tokens": 0, "unknown": 0, "special": 0, "changed": 0, "extra": 0}
    name = None if tokens.unknown is None else tokens.tokenizer.convert_ids_to_tokens(tokens.unknown)
    specials = tokens.specials - {tokens.unknown}
    losses: dict[str, list[tuple[str, int, Edit]]] = {}
    for number, (file, data) in enumerate(documents):
        try:
            ids = tokens.encode(data)
        except DataError as error:
            raise DataError(f"{file}: {error}") from error
        edits = edits_of(text_of(tokens.decode(ids.tolist())), text_of(data))
        theirs = (ids - VOCAB).tolist()
        counts["tokens"] += len(theirs)
        counts["unknown"] += sum(symbol == tokens.unknown for symbol in theirs)
        counts["special"] += sum(symbol in specials for symbol in theirs)
        counts["changed"] += bool(edits)
        counts["extra"] += cost(edits)
        for edit in edits:
            losses.setdefault(kind_of(edit, name), []).append((file, number, edit))
    kinds = sorted((loss(kind, found) for kind, found in losses.items()), key=lambda one: -one.bytes)
    return Survey(
        counts["tokens"], counts["unknown"], counts["special"], counts["changed"], tuple(kinds), counts["extra"]
    )


def loss(kind: str, found: Iterable[tuple[str, int, Edit]]) -> Loss:
    """The edits of one kind, given as (file, number of the document, edit)."""
    found = list(found)
    file, _, first = found[0]
    inserted, removed = (text if len(text) <= SHOWN else f"{text[:SHOWN]}…" for text in (first.inserted, first.removed))
    return Loss(
        kind,
        len({number for _, number, _ in found}),
        len(found),
        sum(len(edit.inserted) for _, _, edit in found),
        sum(size(edit.inserted) for _, _, edit in found),
        f"{inserted!a} → {removed!a}",
        file,
    )
