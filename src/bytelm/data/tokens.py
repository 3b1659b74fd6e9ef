"""A packed corpus as tokens: each document encoded once, and stored beside its shards.

tokens-NAME.bin    all ids, one after another, 16 bits each where the vocabulary allows it
tokens-NAME.npy    tokens of each document, in the order of the corpus; written last
"""

from __future__ import annotations

import io
import os
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from bytelm.data.bpe import Bpe
from bytelm.data.corpus import Corpus, DocumentTable, Split, iterate_documents
from bytelm.data.files import PositionReader, shown, write_whole
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

    def documents(self, split: Split | None = None) -> DocumentTable:
        """The documents of a split, or of all of them; positions and sizes in ids."""
        ...

    def read(self, start: int, count: int) -> Ids:
        """The ids from position `start`."""
        ...


class TokenCorpus:
    """The documents of a corpus, in tokens."""

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


def encoded(corpus: Corpus, tokens: Bpe, progress: Callable[[int], None] | None = None) -> TokenCorpus:
    """The corpus in tokens: encoded now, or found encoded. `progress` is called with the bytes encoded so far.

    Raises ResourceError where the files cannot be written, DataError where they are damaged.
    """
    table = table_of(corpus, tokens)
    path = table.with_suffix(".bin")
    kind = np.dtype(np.uint16 if tokens.vocabulary <= 1 << 16 else np.uint32)
    if not table.exists():
        try:
            _encode(corpus, tokens, kind, path, table, progress)
        except OSError as error:
            raise ResourceError(f"cannot write {shown(str(path))} ({error.strerror}): free some space") from error
    try:
        sizes: NDArray[np.int64] = np.load(table, allow_pickle=False)
        if sizes.dtype != np.int64 or sizes.shape != (len(corpus.documents()),):
            raise ValueError("it is of other documents")
    except (ValueError, EOFError) as error:
        raise DataError(f"{shown(str(table))} is damaged ({error}): delete it to encode the corpus again") from None
    return TokenCorpus(corpus, path, sizes, kind)


def _encode(
    corpus: Corpus,
    tokens: Bpe,
    kind: np.dtype[Any],
    path: Path,
    table: Path,
    progress: Callable[[int], None] | None,
) -> None:
    sizes: list[int] = []
    aside = path.with_name(path.name + ".tmp")
    with aside.open("wb") as file:
        for position, document in iterate_documents(corpus):
            ids = tokens.encode(document.tobytes()).astype(kind)
            file.write(ids.tobytes())
            sizes.append(len(ids))
            if progress:
                progress(position + len(document))
        file.flush()
        os.fsync(file.fileno())
    aside.replace(path)
    held = io.BytesIO()
    np.save(held, np.array(sizes, np.int64), allow_pickle=False)
    write_whole(table, held.getvalue())
