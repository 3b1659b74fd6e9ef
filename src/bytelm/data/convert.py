"""Files through a modality: what is to be learnt from or measured, as documents of its bytes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from bytelm.data.decode import in_pieces
from bytelm.data.modalities.base import Modality, UnfitError
from bytelm.data.sources import Document, SourceReport, documents

LARGEST = 1 << 30  # bytes of a file, decompressed: a modality looks at files as a whole


def read(
    paths: Sequence[str | Path],
    modality: Modality | None = None,
    text_field: str = "text",
    report: SourceReport | None = None,
    exclude: Sequence[str | Path] = (),
) -> Iterator[Document]:
    """The documents of `paths`, see `sources.documents`; with a modality those that it finds in each file.

    To a modality a .jsonl file is a file like any other. What is unfit for it is noted in `report` and skipped, and so
    is a file above 1 GiB; what it converts is counted there. Raises MissingExtraError where it lacks a package.
    """
    report = SourceReport() if report is None else report
    if modality is None:
        return documents(paths, text_field, report, exclude)
    return _converted(documents(paths, None, report, exclude), modality, report)


def _converted(files: Iterable[Document], modality: Modality, report: SourceReport) -> Iterator[Document]:
    notes: Counter[str] = Counter()
    for file in files:
        try:
            for content in modality.encode(file.name, _whole(file), notes):
                if content:
                    yield Document(file.name, in_pieces([content]))
                else:
                    report.empty += 1
        except UnfitError as error:
            report.skip(file.name, str(error))
        report.converted = dict(notes)


def _whole(file: Document) -> bytes:
    held = bytearray()
    for piece in file.pieces:
        held += piece
        if len(held) > LARGEST:
            raise UnfitError(f"more than {LARGEST >> 20} MiB: cut it into parts")
    return bytes(held)
