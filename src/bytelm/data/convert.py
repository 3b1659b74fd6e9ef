"""Files decoded by a modality: documents to train or evaluate on."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from bytelm.config import build
from bytelm.data.decode import MAX_WINDOW, in_pieces
from bytelm.data.files import shown
from bytelm.data.formats import suffixes
from bytelm.data.modalities.base import DamagedError, Modality, UnfitError
from bytelm.data.options import MAX_BAD
from bytelm.data.report import SourceReport, check_bad
from bytelm.data.sources import Document, documents
from bytelm.errors import ConfigError
from bytelm.find import find, names, unknown

LARGEST = 1 << 30  # bytes of a file, decompressed: a modality decodes whole files


def read(
    paths: Sequence[str | Path],
    modality: Modality | None = None,
    text_field: str = "text",
    report: SourceReport | None = None,
    exclude: Sequence[str | Path] = (),
    max_bad: float = MAX_BAD,
    max_window: int = MAX_WINDOW,
) -> Iterator[Document]:
    """The documents of `paths`, see `sources.documents`; with a modality those that it finds in each file.

    To a modality a .jsonl file is a file like any other. What is unfit for it is noted in `report` and skipped, and so
    is a file above 1 GiB, or one that has bytes and gives no document; what it converts is counted there. Raises
    DataError after the last file where more than the fraction `max_bad` of those that are of the modality are damaged,
    MissingExtraError where it lacks a package.
    """
    report = SourceReport() if report is None else report
    if modality is None:
        return documents(paths, text_field, report, exclude, max_bad, max_window)
    return _converted(documents(paths, None, report, exclude, max_bad, max_window), modality, report, max_bad)


def modality_table(text: str) -> dict[str, Any]:
    """The table [modality] of a text such as "image:64:grey". Raises ConfigError."""
    name, _, spec = text.partition(":")
    known = names("data.modalities")
    if name not in known:
        raise ConfigError(unknown("modality", name, known))
    try:
        return {"name": name, **find("data.modalities", name).Config.parse(spec)}
    except ConfigError as error:
        raise ConfigError(f"--as {text}: {error}") from None


def modality_called(text: str) -> Modality:
    """The modality of such a text. Raises ConfigError."""
    return modality_of(modality_table(text), f"--as {text}")


def modality_of(table: Mapping[str, Any], source: str) -> Modality:
    """The modality of a table [modality]. Raises ConfigError that opens with `source`."""
    options = {key: value for key, value in table.items() if key != "name"}
    return build(find("data.modalities", table["name"]).Config, options, source).build()


def _converted(
    files: Iterable[Document], modality: Modality, report: SourceReport, max_bad: float
) -> Iterator[Document]:
    notes: Counter[str] = Counter()
    read = 0
    damaged: list[str] = []  # the first one
    for file in files:
        try:
            empty, given = 0, False
            for content in modality.encode(file.name, _whole(file), notes):
                if content:
                    given = True
                    yield Document(file.name, in_pieces([content]))
                else:
                    empty += 1
            read += 1
            if given:
                report.empty += empty
            else:
                report.skip(file.name, f"no {modality.name} data in it")
        except GeneratorExit:  # left half read, perhaps as the interpreter ends and the names below are gone
            raise
        except UnfitError as error:
            if isinstance(error, DamagedError) or suffixes(file.name)[0] in modality.suffixes:
                report.bad += 1
                damaged = damaged or [f"{shown(file.name)}: {error}"]
            report.skip(file.name, str(error))
        report.converted = dict(notes)
    if read:  # else there was nothing at all, which is said with the reasons
        what = f"files are damaged or not what their names say, the first is {damaged[0] if damaged else 'none'}"
        check_bad(f"--as {modality.name}", report.bad, report.bad + read, what, max_bad)


def _whole(file: Document) -> bytes:
    held = bytearray()
    for piece in file.pieces:
        held += piece
        if len(held) > LARGEST:
            raise UnfitError(f"more than {LARGEST >> 20} MiB: split it")
    return bytes(held)
