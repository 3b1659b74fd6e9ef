"""Bits per byte of a token model as they are often computed: the ways of `naive_bits.py`.

What is scored:

first left out     `model(ids, labels=ids).loss` of a document has no loss for its first token; all bytes are counted
without BOS        `add_special_tokens=False`: the first token is left out, and nothing precedes the others
BOS twice          what the tokenizer puts before a text is put there once more
EOS for BOS        EOS precedes the text, where a tokenizer has a BOS that is another token
specials scored    the EOS that the tokenizer puts after a text is scored; it has no bytes
padding scored     the mean loss of batches of 8 windows, padded on the right, padding included, times tokens
no overlap         windows of the context, each after the last token of the one before; all tokens are scored
window firsts out  the same with `labels=ids` in each window: its first token is read, and never scored
mean times tokens  the mean over these windows of their mean losses, times tokens: a short window counts as a full one
overlaps twice     windows of the context at half of it, all they predict in one mean, times tokens
cut to context     what is beyond the context is truncated, and its bytes are counted
mean of documents  the mean over documents of their bits per byte: a short document counts as a long one
space in front     a space is put before each document; the bytes are those without it
stripped lines     each line is a text, stripped, in windows from its start; the bytes of the file are counted

What it is divided by, the bits being ours:

decoded text       bytes of `decode(tokenizer(text)["input_ids"])`: what is lost does not count, and specials do
tokens decoded     bytes of `decode([id])`, summed over tokens: spaces are dropped, and parts of characters are U+FFFD
token strings      bytes of the vocabulary's strings, summed over tokens: a space is "▁" or "Ġ", a byte "<0x0A>"
spaces twice       tokens that begin with "▁" or "Ġ" are counted with their space, and the space is added again
other text's ratio bits per token times tokens per byte of the training text
characters         characters for bytes

Where a tokenizer has nothing that a way could get wrong, bits or bytes are NaN, and the error is None.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence

from bytelm.evaluate.bits import measure
from bytelm.hf.encoding import Start
from bytelm.hf.foreign import Foreign
from bytelm.units import LN2, VOCAB

Documents = list[tuple[str, bytes]]
ROWS = 8  # windows of a padded batch
CELLS = 1 << 24  # logits that are computed at once


@dataclass(frozen=True)
class Case:
    """A model, and documents in UTF-8 as its tokenizer encodes them; `context` in tokens."""

    model: Foreign
    data: Documents
    context: int
    ratio: float
    """Tokens per byte of another text."""

    @property
    def tokenizer(self) -> Any:
        return self.model.tokens.tokenizer

    @property
    def start(self) -> list[int]:
        """Their ids of what precedes a document."""
        return list(self.model.start.ids)

    @cached_property
    def ids(self) -> list[list[int]]:
        """Their ids of each document, without specials."""
        return [(self.model.tokens.encode(raw) - VOCAB).tolist() for _, raw in self.data]

    @cached_property
    def ours(self) -> list[float]:
        """Bits of each document in our windows."""
        return self.measured(self.data)

    @property
    def bytes(self) -> int:
        return sum(len(raw) for _, raw in self.data)

    @property
    def tokens(self) -> int:
        return sum(map(len, self.ids))

    def measured(self, data: Documents) -> list[float]:
        found = measure(self.model, data, context=self.context, batch=self.model.batch(self.context))
        return [document.nats / LN2 for document in found]

    def after(self, start: Start) -> float:
        """Bits of all documents in our windows with something else before them."""
        own, self.model.start = self.model.start, start
        try:
            return sum(self.measured(self.data))
        finally:
            self.model.start = own

    @torch.inference_mode()
    def rows(self, ids: torch.Tensor) -> torch.Tensor:
        """Nats of all ids but the first, as `labels=ids` has them; `[rows, ids - 1]`."""
        logits = self.model.model(input_ids=ids).logits[:, :-1].double()
        return torch.nn.functional.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none")

    def nats(self, rows: Sequence[Sequence[int]]) -> list[torch.Tensor]:
        """The same of each of several rows, `[ids - 1]`; they are read together with others about as long."""
        order = sorted(range(len(rows)), key=lambda at: len(rows[at]))
        found: list[torch.Tensor] = [torch.zeros(0)] * len(rows)
        at_once = max(1, CELLS // (self.model.tokens.width * (self.context + 2)))
        for at in range(0, len(order), at_once):
            group = order[at : at + at_once]
            padded = pad_sequence([torch.tensor(list(rows[one])) for one in group], batch_first=True)
            for one, nats in zip(group, self.rows(padded), strict=True):
                found[one] = nats[: len(rows[one]) - 1]  # what follows changes nothing
        return found

    def after_start(self, rows: Sequence[Sequence[int]]) -> list[torch.Tensor]:
        """The nats of all ids of each row, after what precedes a document."""
        return [nats[len(self.start) - 1 :] for nats in self.nats([[*self.start, *row] for row in rows])]

    @cached_property
    def disjoint(self) -> list[torch.Tensor]:
        """The nats of windows that do not overlap, without the first token of each."""
        return self.nats([window for ids in self.ids for window in cut(ids, self.context) if len(window) > 1])


def total(nats: Sequence[torch.Tensor]) -> float:
    """Bits."""
    return sum(float(row.sum()) for row in nats) / LN2


def cut(ids: Sequence[int], size: int, step: int | None = None) -> Iterator[Sequence[int]]:
    """Windows of `size` ids, the next one `step` ids on, until one has the last id."""
    for at in range(0, len(ids), step or size):
        yield ids[at : at + size]
        if at + size >= len(ids):
            return


# --- what is scored: bits --------------------------------------------------------------------------------------------


def first_left_out(case: Case) -> float:
    return sum(case.ours) - total(case.after_start([ids[:1] for ids in case.ids if ids]))


def without_bos(case: Case) -> float:
    uniform = math.log2(case.model.tokens.width)  # what a first token costs after nothing
    return case.after(Start((), False)) - uniform * sum(map(bool, case.ids))


def bos_twice(case: Case) -> float:
    return case.after(Start((*case.start, *case.start), case.model.start.always))


def eos_for_bos(case: Case) -> float:
    eos = case.tokenizer.eos_token_id
    if eos is None or case.start == [eos]:
        return math.nan
    return case.after(Start((eos,), case.model.start.always))


def specials_scored(case: Case) -> float:
    rows: list[list[int]] = []
    for (_, raw), ids in zip(case.data, case.ids, strict=True):
        last = case.tokenizer(raw.decode(), verbose=False)["input_ids"][-1:]
        if last != ids[-1:]:
            rows.append([*case.start, *ids, *last][-case.context :])
    return sum(case.ours) + total([nats[-1:] for nats in case.nats(rows)]) if rows else math.nan


def padding_scored(case: Case) -> float:
    known = (case.tokenizer.pad_token_id, case.tokenizer.eos_token_id, case.tokenizer.sep_token_id)
    pad = next(symbol for symbol in known if symbol is not None)
    rows = [torch.tensor([*case.start, *window]) for ids in case.ids for window in cut(ids, case.context)]
    batches = [
        pad_sequence(rows[at : at + ROWS], batch_first=True, padding_value=pad) for at in range(0, len(rows), ROWS)
    ]
    return statistics.fmean(float(case.rows(batch).mean()) for batch in batches) * case.tokens / LN2


def no_overlap(case: Case) -> float:
    found = 0.0
    for ids in case.ids:
        windows = list(cut(ids, case.context))
        found += total(case.after_start(windows[:1]))
        found += total(case.nats([[*last[-1:], *window] for last, window in pairwise(windows)]))
    return found


def window_firsts_out(case: Case) -> float:
    return total(case.disjoint)


def mean_times_tokens(case: Case) -> float:
    return statistics.fmean(float(nats.mean()) for nats in case.disjoint) * case.tokens / LN2


def overlaps_twice(case: Case) -> float:
    step = max(1, case.context // 2)
    windows = [window for ids in case.ids for window in cut([*case.start, *ids], case.context, step)]
    return float(torch.cat(case.nats(windows)).mean()) * case.tokens / LN2


def cut_to_context(case: Case) -> float:
    return total(case.after_start([ids[: case.context] for ids in case.ids]))


def mean_of_documents(case: Case) -> float:
    each = [bits / len(raw) for bits, (_, raw) in zip(case.ours, case.data, strict=True)]
    return statistics.fmean(each) * case.bytes


def space_in_front(case: Case) -> float:
    return sum(case.measured([(name, b" " + raw) for name, raw in case.data]))


def stripped_lines(case: Case) -> float:
    lines = [line.strip() for _, raw in case.data for line in raw.decode().splitlines()]
    return total(case.after_start([row for line in lines for row in cut(case.model.tokens.ids(line), case.context)]))


# --- what it is divided by: bytes ------------------------------------------------------------------------------------


def decoded_text(case: Case) -> float:
    texts = (case.tokenizer(raw.decode(), verbose=False)["input_ids"] for _, raw in case.data)
    return sum(len(case.tokenizer.decode(ids).encode()) for ids in texts)


def over_tokens(case: Case, size: Callable[[int], int]) -> float:
    """The sum of a size over all tokens."""
    sizes = {symbol: size(symbol) for symbol in {symbol for ids in case.ids for symbol in ids}}
    return sum(sizes[symbol] for ids in case.ids for symbol in ids)


def tokens_decoded(case: Case) -> float:
    return over_tokens(case, lambda symbol: len(case.tokenizer.decode([symbol]).encode()))


def token_strings(case: Case) -> float:
    return over_tokens(case, lambda symbol: len(case.tokenizer.convert_ids_to_tokens(symbol).encode()))


def spaces_twice(case: Case) -> float:
    if not any(token.startswith(("▁", "Ġ")) for token in case.tokenizer.get_vocab()):
        return math.nan
    begins = over_tokens(case, lambda symbol: case.tokenizer.convert_ids_to_tokens(symbol).startswith(("▁", "Ġ")))
    return case.bytes + begins


def other_texts_ratio(case: Case) -> float:
    return case.tokens / case.ratio


def characters(case: Case) -> float:
    return sum(len(raw.decode()) for _, raw in case.data)


BITS: dict[str, Callable[[Case], float]] = {
    "first left out": first_left_out,
    "without BOS": without_bos,
    "BOS twice": bos_twice,
    "EOS for BOS": eos_for_bos,
    "specials scored": specials_scored,
    "padding scored": padding_scored,
    "no overlap": no_overlap,
    "window firsts out": window_firsts_out,
    "mean times tokens": mean_times_tokens,
    "overlaps twice": overlaps_twice,
    "cut to context": cut_to_context,
    "mean of documents": mean_of_documents,
    "space in front": space_in_front,
    "stripped lines": stripped_lines,
}
BYTES: dict[str, Callable[[Case], float]] = {
    "decoded text": decoded_text,
    "tokens decoded": tokens_decoded,
    "token strings": token_strings,
    "spaces twice": spaces_twice,
    "other text's ratio": other_texts_ratio,
    "characters": characters,
}


def errors(case: Case) -> dict[str, float | None]:
    """The error of each way in percent of ours: below 0 the model looks better."""
    ours, count = sum(case.ours), case.bytes
    found = {name: bits(case) / ours for name, bits in BITS.items()}
    found |= {name: count / size(case) for name, size in BYTES.items()}
    return {name: None if math.isnan(ratio) else 100 * (ratio - 1) for name, ratio in found.items()}
