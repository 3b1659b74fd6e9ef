"""Inspection of folders without opening files: kinds of files, how many, how large, and what would be skipped."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from bytelm.data.files import shown
from bytelm.data.formats import RECORDS, suffixes
from bytelm.data.modalities.base import Modality
from bytelm.data.report import SourceReport
from bytelm.data.sources import find_files
from bytelm.find import find, names

_EXAMPLES = 3  # names given for each reason
# Files that are compressed in ways that are not read. To a model their bytes are next to noise.
_COMPRESSED = frozenset(
    {".7z", ".rar", ".lz", ".lz4", ".lzo", ".z", ".br", ".sz", ".cab", ".iso", ".dmg", ".deb", ".rpm", ".jar", ".apk"}
    | {".whl", ".docx", ".xlsx", ".pptx", ".odt", ".ods", ".odp", ".epub", ".npz", ".pdf", ".jxl", ".heic", ".heif"}
)


@dataclass
class Kind:
    """The files of one suffix. `bytes` are those on disk, of compressed files the compressed ones."""

    files: int = 0
    bytes: int = 0
    empty: int = 0
    record: str | None = None  # what a document of such a file is, where it holds many: "line", "row", "member"

    def told_documents(self) -> str:
        """How many documents they are, as far as that is known without reading."""
        return f"one per {self.record}" if self.record else f"{self.files - self.empty:,}"


@dataclass
class Scan:
    """What was found. `streams` are standard input and datasets, whose size is known when they are read."""

    kinds: dict[str, Kind] = field(default_factory=dict[str, Kind])  # ".py", ".jsonl.gz", "" → its files
    skipped: dict[str, tuple[int, list[str]]] = field(default_factory=dict[str, tuple[int, list[str]]])
    streams: list[str] = field(default_factory=list[str])

    @property
    def files(self) -> int:
        """All of them."""
        return sum(kind.files for kind in self.kinds.values())

    @property
    def bytes(self) -> int:
        """Those of all files, on disk."""
        return sum(kind.bytes for kind in self.kinds.values())

    @property
    def documents(self) -> int | None:
        """How many there are before any is cut; None where files of many would have to be read to know."""
        if self.streams or any(kind.record for kind in self.kinds.values()):
            return None
        return sum(kind.files - kind.empty for kind in self.kinds.values())

    def modality(self) -> str | None:
        """The modality that most bytes belong to by the names of their files; None where that is none."""
        sizes = dict.fromkeys(names("data.modalities"), 0)
        for suffix, kind in self.kinds.items():
            for name in sizes:
                if suffixes(f"x{suffix}")[0] in _built(name).suffixes:
                    sizes[name] += kind.bytes
        name = max(sizes, key=lambda name: sizes[name])
        return name if sizes[name] * 2 > self.bytes else None

    def raw(self) -> dict[str, int]:
        """Kinds that stay as they are, compressed or coded, → how many files; none where a modality is proposed."""
        if self.modality() is not None:
            return {}
        coded = [_built(name).suffixes for name in names("data.modalities") if not _built(name).text]
        raw = _COMPRESSED.union(*coded)
        return {suffix: kind.files for suffix, kind in self.kinds.items() if suffixes(f"x{suffix}")[0] in raw}


def _built(modality: str) -> Modality:
    return find("data.modalities", modality).Config().build()


class _ByReason(SourceReport):
    """A report that keeps a few names for each reason."""

    def __init__(self, skipped: dict[str, tuple[int, list[str]]]) -> None:
        super().__init__()
        self._by = skipped

    def skip(self, name: str, reason: str) -> None:
        """Count a skipped file."""
        super().skip(name, reason)
        count, named = self._by.get(reason, (0, []))
        self._by[reason] = (count + 1, named if count >= _EXAMPLES else [*named, shown(name)])


def scan(paths: Sequence[str | Path]) -> Scan:
    """Look at the files of `paths` (see `sources.documents`) without opening any; what may not be read is skipped.

    Raises DataError for a path that is not there.
    """
    found = Scan()
    report = _ByReason(found.skipped)
    allowed = os.access in os.supports_effective_ids
    for file in find_files(paths, (), report):
        if file.stat is None:
            found.streams.append(file.path)
        elif isinstance(file.stat, os.stat_result) and not os.access(file.path, os.R_OK, effective_ids=allowed):
            report.skip(file.path, "permission denied")
        else:
            suffix, compression = suffixes(file.name)
            kind = found.kinds.setdefault(suffix + compression, Kind(record=RECORDS.get(suffix)))
            kind.files += 1
            kind.bytes += file.stat.st_size
            kind.empty += file.stat.st_size == 0
    return found
