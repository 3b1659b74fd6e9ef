"""A packed corpus as tokens: each document encoded once, and stored beside its shards.

tokens-NAME.bin    all ids, one after another, 16 bits each where the vocabulary allows it
tokens-NAME.npy    tokens of each document, in the order of the corpus; written last
"""

from __future__ import annotations

import io
import os
import secrets
from array import array
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any, BinaryIO, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from bytelm.data.bpe import Bpe
from bytelm.data.corpus import Corpus, DocumentTable, Split, iterate_documents
from bytelm.data.files import PIECE, PositionReader, shown, write_whole
from bytelm.data.sharing import make_in_pieces
from bytelm.errors import DataError, ResourceError

Ids = NDArray[np.unsignedinteger[Any]]


@runtime_checkable
class Source(Protocol):
    """Documents of ids that are read by position: a `Corpus`, whose ids are bytes, or a `TokenCorpus`."""

    @property
    def directory(self) -> Path:
        """Their folder."""
        ...

    @property
    def total(self) -> int:
        """The ids of all splits together."""
        ...

    @property
    def elsewhere(self) -> bool:
        """Whether reading asks a store, which answers late."""
        ...

    def documents(self, split: Split | None = None) -> DocumentTable:
        """The documents of a split, or of all of them; positions and sizes in ids."""
        ...

    def read(self, start: int, count: int) -> Ids:
        """The ids from position `start`."""
        ...


class TokenCorpus:
    """The documents of a corpus, in tokens."""

    elsewhere = False

    def __init__(self, corpus: Corpus, path: Path, sizes: NDArray[np.int64], kind: np.dtype[Any]):
        """Use `encoded`, which makes the files."""
        self.corpus, self.sizes, self.kind = corpus, sizes, kind
        self.directory = corpus.directory
        self.total = int(sizes.sum())
        self._reader = PositionReader(path, self.total * kind.itemsize)

    def documents(self, split: Split | None = None) -> DocumentTable:
        """See `Source`."""
        bytes, whole = self.corpus.documents(split), self.corpus.documents()
        which = np.searchsorted(whole.starts, bytes.starts)
        starts = np.cumsum(self.sizes) - self.sizes
        return DocumentTable(starts[which], self.sizes[which], bytes.suffixes, bytes.suffix_names)

    def read(self, start: int, count: int) -> Ids:
        """See `Source`."""
        if not 0 <= start <= start + count <= self.total:
            raise ValueError(f"tokens {start} to {start + count} were asked for of {self.total}")
        found = np.empty(count, self.kind)
        self._reader.read_into(start * self.kind.itemsize, found.view(np.uint8))
        return found


def table_of(corpus: Corpus, tokens: Bpe) -> Path:
    """The file that is written last: named by the bytes and the merges."""
    name = sha256(corpus.fingerprint.encode() + tokens.merges.tobytes()).hexdigest()[:16]
    return corpus.directory / f"tokens-{name}.npy"


def opened(corpus: Corpus, tokens: Bpe) -> TokenCorpus:
    """The corpus in tokens, as it was encoded. Raises DataError where that is damaged."""
    table = table_of(corpus, tokens)
    try:
        sizes: NDArray[np.int64] = np.load(table, allow_pickle=False)
        if sizes.dtype != np.int64 or sizes.shape != (corpus.count(),):
            raise ValueError("it is of other documents")
    except (ValueError, EOFError) as error:
        raise DataError(f"{shown(str(table))} is damaged ({error}): delete it to encode the corpus again") from None
    return TokenCorpus(corpus, table.with_suffix(".bin"), sizes, kind_of(tokens))


def encoded(corpus: Corpus, tokens: Bpe, progress: Callable[[int], None] | None = None) -> TokenCorpus:
    """The corpus in tokens: encoded now, or found encoded. `progress` is called with the bytes encoded so far.

    Several processes that call it share the work (`sharing`). Raises ResourceError where the files cannot be written,
    DataError where they are damaged.
    """
    table = table_of(corpus, tokens)
    count = progress or (lambda bytes: None)

    def make(start: int, stop: int, aside: Path, done: Callable[[int], None]) -> None:
        with aside.open("wb") as file:
            encode_piece(corpus, tokens, start, stop, file, done)
            file.flush()
            os.fsync(file.fileno())

    def join(pieces: list[Path]) -> None:
        _join(pieces, kind_of(tokens), table)

    try:
        make_in_pieces(corpus, table, "tokens", make, join, count)
    except OSError as error:
        raise ResourceError(f"cannot write {shown(str(table))} ({error.strerror}): free some space") from error
    return opened(corpus, tokens)


def kind_of(tokens: Bpe) -> np.dtype[Any]:
    """How ids are stored."""
    return np.dtype(np.uint16 if tokens.vocabulary <= 1 << 16 else np.uint32)


def encode_piece(
    corpus: Corpus, tokens: Bpe, start: int, stop: int, file: BinaryIO, done: Callable[[int], None]
) -> None:
    """Write the tokens of the documents that begin from `start` on and before `stop`, and behind them their numbers.

    `done` is called with the bytes encoded so far.
    """
    kind, sizes, size = kind_of(tokens), array("q"), 0
    for _, document in iterate_documents(corpus, start=start, stop=stop):
        ids = tokens.encode(document.tobytes()).astype(kind)
        file.write(ids.tobytes())
        sizes.append(len(ids))
        size += len(document)
        done(size)
    file.write(np.array([*sizes, len(sizes)], np.int64).tobytes())


def _join(pieces: list[Path], kind: np.dtype[Any], table: Path) -> None:
    """Put the pieces together: first the ids, then, last of all, how many each document has."""
    path, sizes = table.with_suffix(".bin"), [np.zeros(0, np.int64)]
    aside = path.with_name(f"{path.name}.{secrets.token_hex(8)}.tmp")  # two may be at it
    try:
        with aside.open("wb") as file:
            for piece in pieces:
                with piece.open("rb") as source:
                    source.seek(-8, os.SEEK_END)
                    count = int.from_bytes(source.read(8), "little")
                    source.seek(-8 * (count + 1), os.SEEK_END)
                    sizes.append(np.frombuffer(source.read(8 * count), np.int64))
                    source.seek(0)
                    left = int(sizes[-1].sum()) * kind.itemsize
                    while left:
                        left -= file.write(source.read(min(left, PIECE)))
            file.flush()
            os.fsync(file.fileno())
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)
    held = io.BytesIO()
    np.save(held, np.concatenate(sizes), allow_pickle=False)
    write_whole(table, held.getvalue())
