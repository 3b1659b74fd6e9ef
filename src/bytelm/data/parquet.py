"""Parquet files: the string or the bytes in one column of each row, row group by row group."""

from __future__ import annotations

import os
from collections.abc import Iterator
from io import BufferedIOBase
from typing import Any

from bytelm.data.decode import RATIO, SLACK, in_pieces
from bytelm.data.files import LONGEST, PIECE, shown
from bytelm.data.report import SourceReport, check_bad
from bytelm.errors import DataError, MissingExtraError

_BATCH = 16 * PIECE  # bytes of rows of the usual size that are decoded at once


def texts(
    file: BufferedIOBase, name: str, text_field: str, report: SourceReport, max_bad: float
) -> Iterator[Iterator[bytes]]:
    """The column `text_field` of each row, in pieces. Rows without a value, or of more than 64 MiB, are bad.

    Values that repeat are held once, as the file has them, so that a small file cannot fill the memory; but a page is
    decoded as a whole. Raises DataError for damage, another kind of column, a file that swells as `decode` says, and
    too many bad rows; MissingExtraError without pyarrow.
    """
    pyarrow = _pyarrow(name)
    failures = (pyarrow.ArrowException, OSError, ValueError, KeyError, OverflowError, RuntimeError)
    total = bad = made = 0
    limit = RATIO * os.fstat(file.fileno()).st_size + SLACK
    try:
        head = pyarrow.parquet.read_metadata(file)
        _check_column(pyarrow.types, head.schema.to_arrow_schema(), name, text_field)
        how = {"read_dictionary": [text_field], "pre_buffer": False, "buffer_size": PIECE}
        source = pyarrow.parquet.ParquetFile(file, metadata=head, **how)
        for value in _values(source, name, text_field, limit):
            total += 1
            if value is None or value.size > LONGEST:
                bad += 1
                continue
            made += value.size
            if made > limit:
                raise _swells(name, made)
            yield in_pieces([value.to_pybytes()])
    except failures as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DataError(f"{name} cannot be read as a Parquet file ({reason}): get a whole copy") from error
    report.bad += bad
    check_bad(name, bad, total, f"rows have no value in data.text_field = {text_field!r}, or one too long", max_bad)


def _values(source: Any, name: str, text_field: str, limit: int) -> Iterator[Any]:
    """Each row's value as a buffer of pyarrow's, or None."""
    for group in range(source.metadata.num_row_groups):
        rows = source.metadata.row_group(group)
        size = rows.total_byte_size  # of all columns: damage in what is told of one makes pyarrow end the process
        if size > limit:
            raise _swells(name, size)
        batch = min(max(_BATCH * rows.num_rows // max(size, 1), 1), 1024)
        for part in source.iter_batches(batch, row_groups=[group], columns=[text_field], use_threads=False):
            column = part.column(0)
            values = column.dictionary
            for index in column.indices.to_pylist():
                if index is not None and not 0 <= index < len(values):  # pyarrow does not look
                    raise ValueError("a value that is not in its dictionary")
                yield None if index is None else values[index].as_buffer()


def _check_column(types: Any, schema: Any, name: str, text_field: str) -> None:
    index = schema.get_field_index(text_field)
    if index < 0:
        known = ", ".join(map(shown, schema.names[:20]))
        raise DataError(f"{name} has no column {text_field!r}: say --set data.text_field=NAME; it has {known}")
    kind = schema.field(index).type
    kind = kind.value_type if types.is_dictionary(kind) else kind
    if not any(fits(kind) for fits in (types.is_string, types.is_large_string, types.is_binary, types.is_large_binary)):
        raise DataError(
            f"{name}: the column {text_field!r} holds {kind}, not strings or bytes: say --set data.text_field=NAME"
        )


def _swells(name: str, made: int) -> DataError:
    return DataError(
        f"{name} swells to more than {made} bytes (limit: {RATIO} times its size plus {SLACK}): "
        "write its text out yourself if it can be trusted"
    )


def _pyarrow(name: str) -> Any:
    try:
        import pyarrow
        import pyarrow.parquet  # pyright: ignore[reportUnusedImport]  # which pyarrow does not do itself
    except ImportError as error:
        raise MissingExtraError("pyarrow", "data", f"reading {name}") from error
    return pyarrow
