"""Proof by coding: the arithmetic coder writes documents with a model's probabilities, and reads them back.

What is coded are the tokens in the windows of `evaluate.bits`, and the edits that make the documents of what they
decode to (`hf.losses`). The number of tokens is given to whoever reads: EOS is not counted for other models either.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from bytelm.compress.coder import Decoder, Encoder, frequencies
from bytelm.errors import CheckpointError, DataError
from bytelm.evaluate.bits import measure
from bytelm.hf.foreign import Foreign
from bytelm.hf.losses import Edit, cost, edits_of, gamma, repaired
from bytelm.transfer import to_host
from bytelm.units import BOS, BYTES, LN2, VOCAB

SAMPLE = 4096  # bytes that are coded
LONGEST = 32  # bits of a count, more than any text has characters
SPARE = 1e-4, 64  # of the bits, and beside them: what the coder may take more
_BIT, _BYTE = np.ones(2, np.int64), np.ones(BYTES, np.int64)


@dataclass(frozen=True)
class Proof:
    """Documents were coded, and came back byte for byte."""

    bytes: int
    tokens: int
    bits: float
    """Of the tokens and of the edits, as they are measured."""
    coded_bits: int


def prove(model: Foreign, documents: Sequence[bytes], context: int, stride: int) -> Proof:
    """Code documents, one after another, and decode them.

    Raises CheckpointError where they do not come back, or take more bits than measured. It takes two calls of the model
    for each token, from its own cache where it has one.
    """
    ids = [[BOS, *model.tokens.encode(data).tolist()] for data in documents]
    edits = [
        edits_of(text_of(model.tokens.decode(own[1:])), text_of(data)) for own, data in zip(ids, documents, strict=True)
    ]
    named = [("", data) for data in documents]
    nats = sum(found.nats for found in measure(model, named, context=context, stride=stride, batch=1))
    bits = nats / LN2 + sum(map(cost, edits))

    coded = written(Steps(model, context, stride), ids, edits)
    size = sum(map(len, documents))
    try:
        same = read(Steps(model, context, stride), coded, [len(own) for own in ids]) == list(documents)
    except DataError:  # what is read is another code than what was written
        same = False
    if not same:
        raise CheckpointError(f"{size} bytes did not come back: the model does not give the same answer twice")
    if 8 * len(coded) > bits * (1 + SPARE[0]) + SPARE[1]:
        raise CheckpointError(
            f"{size} bytes were coded in {8 * len(coded)} bits, and measured as {bits:.0f}: "
            "the model gives other probabilities token by token than all at once"
        )
    return Proof(size, sum(map(len, ids)) - len(ids), bits, 8 * len(coded))


def written(steps: Steps, documents: Sequence[Sequence[int]], edits: Sequence[Sequence[Edit]]) -> bytes:
    """Documents, given as ids with BOS, and their edits."""
    encoder = Encoder()
    for ids, own in zip(documents, edits, strict=True):
        steps.reset()
        for place in range(1, len(ids)):
            encoder.put(frequencies(steps.after(ids[:place]))[None], np.array([ids[place] - VOCAB]))
        write(encoder, own)
    return encoder.end()


def read(steps: Steps, coded: bytes, lengths: Sequence[int]) -> list[bytes]:
    """The documents of so many ids, BOS included."""
    decoder, found = Decoder(coded), list[bytes]()
    for length in lengths:
        steps.reset()
        ids = [BOS]
        while len(ids) < length:
            ids.append(VOCAB + decoder.get(frequencies(steps.after(ids))))
        text = repaired(text_of(steps.model.tokens.decode(ids[1:])), decoded(decoder))
        found.append(text.encode(errors="surrogateescape"))
    return found


class Steps:
    """What a model predicts after ids that grow one by one, in windows. The same calls give the same answers."""

    def __init__(self, model: Foreign, context: int, stride: int) -> None:
        self.model, self.context, self.stride = model, context, stride
        self.reset()

    def reset(self) -> None:
        """A document begins."""
        self.start = -1
        self.cache: Any = None

    @torch.inference_mode()
    def after(self, ids: Sequence[int]) -> NDArray[np.float64]:
        """The logits of their ids after `ids`, BOS included: `[theirs]`."""
        start = max(0, -(-(len(ids) - self.context) // self.stride)) * self.stride
        inputs = self.model.inputs(torch.tensor(ids[start:], dtype=torch.long))
        if not len(inputs):
            return np.zeros(self.model.tokens.width)
        if start != self.start:
            self.start, self.cache = start, None
        new = inputs if self.cache is None else inputs[-1:]
        cached = {} if self.cache is None else {"past_key_values": self.cache}
        found = self.model.called(new[None], use_cache=True, **cached)
        self.cache = getattr(found, "past_key_values", None)
        return to_host(found.logits[0, -1]).double().numpy()


def text_of(data: bytes) -> str:
    """Bytes as characters; one that is not UTF-8 is a lone surrogate."""
    return data.decode(errors="surrogateescape")


def write(encoder: Encoder, edits: Sequence[Edit]) -> None:
    """Code edits in `losses.cost(edits)` bits."""
    counted(encoder, len(edits))
    for edit in edits:
        raw = edit.inserted.encode(errors="surrogateescape")
        for count in (edit.gap, len(edit.removed), len(raw)):
            counted(encoder, count)
        encoder.put(np.tile(_BYTE, (len(raw), 1)), np.frombuffer(raw, np.uint8))


def counted(encoder: Encoder, count: int) -> None:
    """Code a count in `losses.gamma(count)` bits: as many zeros as bits follow the first one of count + 1."""
    digits = f"{count + 1:b}".zfill(gamma(count))
    encoder.put(np.tile(_BIT, (len(digits), 1)), np.array(list(digits), np.int64))


def decoded(decoder: Decoder) -> list[Edit]:
    """The edits."""
    found: list[Edit] = []
    for _ in range(count_of(decoder)):
        gap, removed, length = (count_of(decoder) for _ in range(3))
        raw = bytes(decoder.get(_BYTE) for _ in range(length))
        found.append(Edit(gap, " " * removed, text_of(raw)))
    return found


def count_of(decoder: Decoder) -> int:
    """The next count. Raises DataError where none that was written is so large."""
    zeros = 0
    while not decoder.get(_BIT):
        zeros += 1
        if zeros > LONGEST:
            raise DataError(f"a count of more than {LONGEST} bits: it was not written so")
    value = 1
    for _ in range(zeros):
        value = 2 * value + decoder.get(_BIT)
    return value - 1
