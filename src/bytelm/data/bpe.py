"""Byte-pair encoding (Gage 1994; Sennrich et al. 2016), for the token baseline: trained, lossless on any bytes.

    data    b"The cat"  ──encode──▶  ids [84, 271, 903]  ──decode──▶  b"The cat"
    ids     0..255 a byte each · 256..259 specials · 260 + i what merge i joins

So bytes and specials are what they are everywhere else, and a token model is one whose table has more rows. Text
is cut into words before it is merged, a space going with what follows it; bytes above 127 count as letters, so that the
rule knows nothing of any language. The `tokenizers` library trains and applies merges; a byte is a letter to it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from functools import cached_property
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from bytelm.errors import ConfigError, DataError, MissingExtraError
from bytelm.units import BYTES, VOCAB

NONE = -1  # in place of a merge that the data did not suffice for
LEARNT = 1 << 24  # most bytes that merges are trained on
LONGEST = 32  # bytes of a word: without a limit, a megabyte of zeros is a word, and takes minutes to train on
_SPACE, _LETTER, _DIGIT = r"\t-\r ", r"A-Za-z\x{80}-\x{ff}", r"0-9"
_RUN = f"{{1,{LONGEST}}}"
WORDS = "|".join(
    (
        f" ?[{_LETTER}]{_RUN}",
        f" ?[{_DIGIT}]{_RUN}",
        f" ?[^{_SPACE}{_LETTER}{_DIGIT}]{_RUN}",
        f"[{_SPACE}]{_RUN}(?![^{_SPACE}])",  # the last space of several goes with the word behind it
        f"[{_SPACE}]{_RUN}",
    )
)


@runtime_checkable
class Tokens(Protocol):
    """What the tokens of any model are to its evaluation: ours, or another project's."""

    vocabulary: int
    """The number of ids, bytes and specials included."""

    def encode(self, data: bytes) -> NDArray[np.int64]:
        """The ids of a document, `[tokens]`."""
        ...

    def decode(self, ids: Iterable[int]) -> bytes:
        """The bytes that ids stand for."""
        ...

    @property
    def sizes(self) -> NDArray[np.int64]:
        """Number of bytes of each id, `[vocabulary]`; of some tokenizers only in the middle of a text."""
        ...


class Bpe:
    """Merges, in the order in which they are applied, and what follows from them."""

    def __init__(self, merges: NDArray[np.int64]) -> None:
        """`merges` `[n, 2]`: the ids that each one joins, or NONE twice. Raises DataError for ids not yet made."""
        self.merges = merges
        self.vocabulary = VOCAB + len(merges)
        self.data: list[bytes] = [bytes((i,)) for i in range(BYTES)] + [b""] * (VOCAB - BYTES)
        """The bytes of each id; none for a special, or for an undefined merge."""
        for left, right in merges.tolist():
            made = range(len(self.data))
            if left != NONE and not (left in made and right in made and self.data[left] and self.data[right]):
                raise DataError(f"merge {len(self.data) - VOCAB} joins {left} and {right}, not both made before it")
            self.data.append(b"" if left == NONE else self.data[left] + self.data[right])
        self.sizes = np.array([len(data) for data in self.data])
        """Number of bytes of each id `[vocabulary]`."""

    @classmethod
    def learn(cls, documents: Iterable[bytes], vocabulary: int) -> Bpe:
        """The merges of the commonest pairs, until there are `vocabulary` ids or no pair comes twice.

        Raises ConfigError for a vocabulary without merges, MissingExtraError without the library.
        """
        if vocabulary <= VOCAB:
            raise ConfigError(f"a vocabulary of {vocabulary} has no tokens: {VOCAB} are bytes and specials, give more")
        library = _library()
        tokenizer = library.Tokenizer(library.models.BPE())
        tokenizer.pre_tokenizer = _words(library)
        letters = [chr(i) for i in range(BYTES)]
        trainer = library.trainers.BpeTrainer(
            vocab_size=vocabulary - (VOCAB - BYTES), min_frequency=2, initial_alphabet=letters, show_progress=False
        )
        tokenizer.train_from_iterator((document.decode("latin-1") for document in documents), trainer)
        pairs: list[list[str]] = json.loads(tokenizer.to_str())["model"]["merges"]
        ids = {letter: i for i, letter in enumerate(letters)}
        merges = np.full((vocabulary - VOCAB, 2), NONE, np.int64)
        made = 0
        for left, right in pairs:
            if left + right not in ids:  # the same bytes may be joined in two ways; the first one has the id
                merges[made] = ids[left], ids[right]
                ids[left + right] = VOCAB + made
                made += 1
        return cls(merges)

    @classmethod
    def empty(cls, vocabulary: int) -> Bpe:
        """An untrained vocabulary, without merges: it encodes bytes as bytes."""
        return cls(np.full((vocabulary - VOCAB, 2), NONE, np.int64))

    def encode(self, data: bytes) -> NDArray[np.int64]:
        """The ids of `data`, `[tokens]`. Raises MissingExtraError without the library."""
        return np.array(self._tokenizer.encode(data.decode("latin-1")).ids, np.int64)

    def decode(self, ids: Iterable[int]) -> bytes:
        """The bytes of ids; specials have none."""
        return b"".join(self.data[i] for i in ids)

    @cached_property
    def _tokenizer(self) -> Any:
        library = _library()
        text = [data.decode("latin-1") for data in self.data]
        vocabulary = {token: i for i, token in enumerate(text) if token}
        merges = [(text[left], text[right]) for left, right in self.merges.tolist() if left != NONE]
        tokenizer = library.Tokenizer(library.models.BPE(vocabulary, merges))
        tokenizer.pre_tokenizer = _words(library)
        return tokenizer


def _library() -> Any:
    try:
        import tokenizers
    except ImportError:
        raise MissingExtraError("tokenizers", "bpe", "byte-pair encoding") from None
    return tokenizers


def _words(library: Any) -> Any:
    return library.pre_tokenizers.Split(library.Regex(WORDS), "isolated")
