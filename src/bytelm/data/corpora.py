"""Several packed corpora seen as one, for all that reads a run's data but for the order of training.

run/data/mixture.json      the sources and their weights; written last
run/data/NAME/             the packed corpus of a source
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bytelm.data.corpus import INDEX, Corpus, DocumentTable, Split
from bytelm.data.files import shown, write_whole
from bytelm.data.mixture import Share
from bytelm.data.report import SourceReport
from bytelm.errors import DataError, UsageError

MIXTURE = "mixture.json"
VERSION = 1


class Corpora(Corpus):
    """The documents of all sources, one source after another, as one corpus to read."""

    def __init__(self, directory: Path, shares: Sequence[Share], parts: Sequence[Corpus]) -> None:
        """`parts` are the corpora of the sources, in the order of `shares`; see `open_corpus`."""
        self.directory, self.shares, self.parts = directory, tuple(shares), tuple(parts)
        indices = [part.index for part in parts]
        repeated, looked = sum(index.repeated for index in indices), sum(index.looked for index in indices)
        self.index = replace(indices[0], repeated=repeated, looked=looked)  # for its warning
        self.source_report = SourceReport()
        for part in parts:
            self.source_report.add(part.source_report)
        self.source_fingerprint = None
        self.grain = parts[0].grain
        names = [f"{share} {part.fingerprint}" for share, part in zip(shares, parts, strict=True)]
        self.fingerprint = sha256("\n".join(names).encode()).hexdigest()
        self._suffix_names = tuple(dict.fromkeys(kind for part in parts for kind in part.kinds))
        self._firsts = np.cumsum([0, *(part.total for part in parts)]).tolist()

    @classmethod
    def write(cls, directory: Path, shares: Sequence[Share], parts: Sequence[Corpus]) -> Corpora:
        """Have the folders of `parts`, in `directory` by their names, be one corpus.

        Where they are already nothing is written: processes that share a training come here together.
        """
        fields = {"version": VERSION, "sources": [asdict(share) for share in shares]}
        path, data = directory / MIXTURE, (json.dumps(fields, indent=1) + "\n").encode()
        if not path.exists() or path.read_bytes() != data:
            write_whole(path, data)
        return cls(directory, shares, parts)

    @property
    def total(self) -> int:
        """See `Corpus`."""
        return self._firsts[-1]

    def read(self, start: int, count: int) -> NDArray[np.uint8]:
        """See `Corpus`."""
        if not 0 <= start <= start + count <= self.total:
            raise ValueError(f"bytes {start} to {start + count} were asked for of {self.total}")
        found = [np.zeros(0, np.uint8)]
        for first, part in zip(self._firsts, self.parts, strict=False):
            begin, end = max(start, first), min(start + count, first + part.total)
            if begin < end:
                found.append(part.read(begin - first, end - begin))
        return np.concatenate(found)

    def tables(self, split: Split | None = None, start: int = 0) -> Iterator[DocumentTable]:
        """See `Corpus`."""
        for first, part in zip(self._firsts, self.parts, strict=False):
            if first + part.total <= start:
                continue
            here = np.array([self._suffix_names.index(kind) for kind in part.kinds], np.int32)
            for table in part.tables(split, max(0, start - first)):
                yield DocumentTable(table.starts + first, table.sizes, here[table.suffixes], self._suffix_names)

    def count(self, split: Split | None = None) -> int:
        """See `Corpus`."""
        return sum(part.count(split) for part in self.parts)

    def bytes(self, split: Split) -> int:
        """See `Corpus`."""
        return sum(part.bytes(split) for part in self.parts)

    def verify(self) -> None:
        """See `Corpus`."""
        for part in self.parts:
            part.verify()


def open_corpus(directory: str | Path) -> Corpus:
    """The data of a run: a packed corpus, or those of a mixture. Raises DataError as `Corpus.open` does."""
    directory = Path(directory)
    path = directory / MIXTURE
    if not path.exists():
        return Corpus.open(directory)
    shares = _kept(path)
    return Corpora(directory, shares, [Corpus.open(directory / share.name) for share in shares])


def folders_in(folder: Path) -> tuple[Path, list[Path]]:
    """Where the data of a packed corpus or a run is, and the folders of its sources. Raises DataError."""
    where = folder if (folder / INDEX).exists() or (folder / MIXTURE).exists() else folder / "data"
    path = where / MIXTURE
    return where, [where / share.name for share in _kept(path)] if path.exists() else [where]


def _kept(path: Path) -> list[Share]:
    """The shares in a mixture.json. Raises DataError."""
    try:
        fields: dict[str, Any] = json.loads(path.read_bytes())
        if fields["version"] != VERSION:
            raise ValueError(f"it is of version {fields['version']}, and this bytelm reads {VERSION}")
        shares = [Share(str(own["name"]), float(own["weight"]), own["epochs"]) for own in fields["sources"]]
        if not shares:
            raise ValueError("it has no sources")
        return shares
    except (OSError, ValueError, TypeError, LookupError) as error:
        raise DataError(f"{shown(str(path))} is damaged ({error}): run the training again") from error


def parts_of(corpus: Corpus) -> tuple[Corpus, ...]:
    """The corpora that a corpus is made of: itself alone, or those of a mixture."""
    return corpus.parts if isinstance(corpus, Corpora) else (corpus,)


def paths_by_source(paths: Sequence[str | Path], shares: Sequence[Share]) -> dict[str, list[str]]:
    """Paths given as NAME=PATH, by name. Raises UsageError for another path, and for a source without one."""
    found: dict[str, list[str]] = {share.name: [] for share in shares}
    for path in map(str, paths):
        name, equals, rest = path.partition("=")
        if not equals or name not in found or not rest:
            raise UsageError(
                f"{shown(path)} is of no source of the mixture: give NAME=PATH, NAME one of {', '.join(found)}"
            )
        found[name].append(str(Path(rest).expanduser()) if rest.startswith("~") else rest)
    for name, own in found.items():
        if not own:
            raise UsageError(f"{name} is in the mixture without data: add {name}=PATH")
    return found
