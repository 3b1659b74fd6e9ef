"""A token model as a model of bytes, for whatever takes one: evaluation, generation, compression."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from bytelm.data.bpe import Bpe
from bytelm.data.canonical import Canonical
from bytelm.errors import UsageError
from bytelm.interfaces.decoder import Ints, Reals
from bytelm.interfaces.model import ByteModel
from bytelm.nn.state import align_right
from bytelm.patching.layout import Rows
from bytelm.units import BOS, VOCAB

TOGETHER = 16  # documents that a forward pass reads at once
TOKEN = 2  # bytes: fewer than tokens have on average, so that windows of bytes have no more tokens than those of tokens


@dataclass(frozen=True)
class BytesRead:
    """The ids of each row's document so far, the last on the right, and how many there are."""

    ids: Int[Tensor, "batch most"]
    lengths: Int[Tensor, " batch"]


class Bytewise(ByteModel):
    """A token model as a model of bytes; see `bytewise`. Its forward pass reads each row's document from the start."""

    def __init__(self, model: ByteModel) -> None:
        super().__init__()
        self.model = model
        self.quantization, self.content = model.quantization, model.content
        self._words: Canonical | None = None

    @property
    def words(self) -> Canonical:
        """The canonical tokens of the model."""
        tokens = self.model.tokens
        assert isinstance(tokens, Bpe)  # `bytewise`
        if self._words is None or not np.array_equal(self._words.tokens.merges, tokens.merges):
            self._words = Canonical(tokens)
        return self._words

    def init_weights(self, seed: int) -> None:
        """See `ByteModel`."""
        self.model.init_weights(seed)

    @property
    def device(self) -> torch.device:
        """See `ByteModel`."""
        return self.model.device

    def flops(self, ids: int, patches: int) -> int:
        """See `ByteModel`: a token for each byte, as a history ends at each."""
        return self.model.flops(ids, patches)

    def initial_state(self, batch: int) -> BytesRead:
        """See `ByteModel`."""
        return BytesRead(torch.zeros(batch, 0, dtype=torch.long), torch.zeros(batch, dtype=torch.long))

    def forward(
        self,
        ids: Int[Tensor, "batch new"],
        state: BytesRead | None = None,
        boundaries: Bool[Tensor, "batch new"] | None = None,
    ) -> tuple[Float[Tensor, "batch new vocab"], BytesRead | None]:
        """See `ByteModel`; `boundaries` are ignored. Without gradients."""
        rows, begun = Rows.of(ids), state or self.initial_state(len(ids))
        documents: list[Ints] = []
        news: list[int] = []  # new ids of each
        last: list[int] = []  # the document that is open at the end of each row
        for line, count, old, read in zip(rows.ids, rows.lengths, begun.ids, begun.lengths, strict=True):
            whole = torch.cat([old[len(old) - int(read) :], line[: int(count)]]).numpy()
            cuts = [at for at in range(int(read), len(whole)) if at and whole[at] == BOS]
            for begin, end in pairwise([0, *cuts, len(whole)]):
                documents.append(whole[begin:end])
                news.append(end - max(begin, int(read)))
            last.append(len(documents) - 1)
        found = torch.from_numpy(np.concatenate([np.zeros((0, VOCAB)), *self.read(documents, news)]))
        logits = torch.zeros(*rows.ids.shape, VOCAB, dtype=torch.get_default_dtype())
        logits[rows.real] = found.to(logits.dtype)
        logits = rows.restore(logits).to(self.device)
        if state is None:
            return logits, None
        open_ones = [torch.from_numpy(documents[index]) for index in last]
        lengths = torch.tensor([len(ids) for ids in open_ones], dtype=torch.long)
        return logits, BytesRead(torch.cat(align_right([ids[None] for ids in open_ones])), lengths)

    def read(self, documents: Sequence[Ints], news: Sequence[int]) -> Iterator[Reals]:
        """The logits after the last ids of each document, so many."""
        from bytelm.decoding import open_decoder

        for begin in range(0, len(documents), TOGETHER):
            some, new = documents[begin : begin + TOGETHER], news[begin : begin + TOGETHER]
            longest = max(map(len, some))
            decoder = open_decoder(self, rows=len(some), capacity=max(1, longest))
            parts: list[list[Reals]] = [[] for _ in some]
            for at in range(0, longest, decoder.chunk):
                ids = [document[at : at + decoder.chunk] for document in some]
                rows = np.arange(len(some)).repeat([len(part) for part in ids])
                wanted = [
                    at + np.arange(len(part)) >= len(document) - count
                    for part, document, count in zip(ids, some, new, strict=True)
                ]
                logits = decoder.read(rows, np.concatenate(ids), np.concatenate(wanted))
                for row, line in zip(rows[np.concatenate(wanted)].tolist(), logits, strict=True):
                    parts[row].append(line[None])
            yield from (np.concatenate(lines) for lines in parts if lines)


def bytewise(model: ByteModel) -> ByteModel:
    """The model of bytes that a token model is: logits are log P(byte or EOS | bytes), in nats, exactly.

    `marginal` says what is summed; other specials than EOS have no probability.

        measure(bytewise(model), documents, context=4096)      # context in bytes
        generate(bytewise(model), [b"a prompt that ends in a spa"])

    It costs about a step of the token model per byte. Raises UsageError for a model that reads bytes already.
    """
    if model.tokens is None:
        raise UsageError(f"{type(model).__name__} reads bytes, not tokens: use it as it is")
    if not isinstance(model.tokens, Bpe):
        raise UsageError(f"{type(model).__name__} has a tokenizer of another project: bytes are exact for runs alone")
    return Bytewise(model)


def over_bytes(model: ByteModel) -> ByteModel:
    """The model itself where it reads bytes, `bytewise` of it where it reads tokens. Raises as that does."""
    return model if model.tokens is None else bytewise(model)


def over_bytes_context(model: ByteModel, context: int) -> int:
    """The window in bytes of `over_bytes(model)` that has no more tokens than `context`, the window of the model."""
    return context if model.tokens is None else TOKEN * context
