"""Parquet files: the string or the bytes in one column of each row, row group by row group."""

from __future__ import annotations

import os
from collections.abc import Iterator
from io import BufferedIOBase
from typing import Any

from bytelm.data.decode import RATIO, SLACK, in_pieces, swells
from bytelm.data.files import LONGEST, PIECE, shown
from bytelm.data.report import SourceReport, check_bad
from bytelm.errors import DataError, MissingExtraError

_BATCH = 16 * PIECE  # bytes of rows of the usual size that are decoded at once


def texts(
    file: BufferedIOBase, name: str, text_field: str, report: SourceReport, max_bad: float
) -> Iterator[Iterator[bytes]]:
    """The column `text_field` of each row, in pieces. Rows without a value, or of more than 64 MiB, are bad.

    Values that repeat are held once where the file has them so, and else few rows are decoded at once, so that a small
    file cannot fill the memory; but a page is decoded as a whole. Raises DataError for damage, another kind of column,
    a file that swells as `decode` says, and too many bad rows; MissingExtraError without pyarrow.
    """
    pyarrow = _pyarrow(name)
    failures = (pyarrow.ArrowException, OSError, ValueError, KeyError, OverflowError, RuntimeError)
    total = bad = made = 0
    limit = RATIO * os.fstat(file.fileno()).st_size + SLACK
    try:
        head = pyarrow.parquet.read_metadata(file)
        dictionary = _check_column(pyarrow, head.schema.to_arrow_schema(), name, text_field)
        sources = [
            pyarrow.parquet.ParquetFile(
                file, metadata=head, pre_buffer=False, buffer_size=PIECE, read_dictionary=[text_field] * as_dictionary
            )
            for as_dictionary in ((True, False) if dictionary else (False,))
        ]
        for value in _values(sources, failures, name, text_field, limit):
            total += 1
            if value is None or value.size > LONGEST:
                bad += 1
                continue
            made += value.size
            if made > limit:
                raise swells(name, f"{made} bytes", "its size ")
            yield in_pieces([value.to_pybytes()])
    except failures as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DataError(f"{name} cannot be read as a Parquet file ({reason}): get a complete copy") from error
    report.bad += bad
    check_bad(name, bad, total, f"rows have no value in data.text_field = {text_field!r}, or one too long", max_bad)


def _values(
    sources: list[Any], failures: tuple[type[Exception], ...], name: str, text_field: str, limit: int
) -> Iterator[Any]:
    """Each row's value as a buffer of pyarrow's, or None.

    `sources` are readers of the file, the first of which may give values that repeat once. pyarrow has no such reader
    for some encodings (DELTA_BYTE_ARRAY), and may find out in the middle; what the file says of its encodings is not
    looked at, since damage there makes pyarrow end the process.
    """
    for group in range(sources[0].metadata.num_row_groups):
        rows = sources[0].metadata.row_group(group)
        size = max(rows.total_byte_size, 1)  # of all columns, for the same reason
        if size > limit:
            raise swells(name, f"{size} bytes", "its size ")
        given = 0
        for source in sources:
            last = source is sources[-1]
            # No value is larger than its row group, though thousands may share all of their bytes
            batch = SLACK // size if last else _BATCH * rows.num_rows // size
            try:
                for value in _rows(source, group, min(max(batch, 1), 1024), given, text_field):
                    given += 1
                    yield value
                break
            except failures:
                if last:
                    raise


def _rows(source: Any, group: int, batch: int, skipped: int, text_field: str) -> Iterator[Any]:
    """The values of the rows of a group but the first `skipped`, decoded `batch` at a time."""
    for part in source.iter_batches(batch, row_groups=[group], columns=[text_field], use_threads=False):
        column = part.column(0)
        if skipped >= len(column):
            skipped -= len(column)
            continue
        column, skipped = getattr(column, "storage", column)[skipped:], 0
        if not hasattr(column, "dictionary"):
            yield from (value.as_buffer() if value.is_valid else None for value in column)
            continue
        values = column.dictionary
        for index in column.indices.to_pylist():
            if index is not None and not 0 <= index < len(values):  # pyarrow does not check
                raise ValueError("a value that is not in its dictionary")
            yield None if index is None else values[index].as_buffer()


def _check_column(pyarrow: Any, schema: Any, name: str, text_field: str) -> bool:
    """Whether its values can be read as a dictionary. Raises DataError where they are no strings or bytes."""
    types = pyarrow.types
    index = schema.get_field_index(text_field)
    if index < 0:
        known = ", ".join(map(shown, schema.names[:20]))
        raise DataError(f"{name} has no column {text_field!r}: use --set data.text_field=NAME; it has {known}")
    kind = schema.field(index).type
    kind = kind.value_type if types.is_dictionary(kind) else kind
    text = [types.is_string, types.is_large_string, types.is_string_view]
    data = [types.is_binary, types.is_large_binary, types.is_binary_view]
    if any(fits(kind) for fits in text + data):
        return True
    if types.is_fixed_size_binary(kind) or isinstance(kind, getattr(pyarrow, "JsonType", ())):
        # of which pyarrow makes none; JSON became a type of its own in version 19
        return False
    raise DataError(
        f"{name}: the column {text_field!r} holds {kind}, not strings or bytes: use --set data.text_field=NAME"
    )


def _pyarrow(name: str) -> Any:
    try:
        import pyarrow
        import pyarrow.parquet  # pyright: ignore[reportUnusedImport]  # which pyarrow does not do itself
    except ImportError as error:
        raise MissingExtraError("pyarrow", "data", f"reading {name}") from error
    return pyarrow
