"""Recorded boundaries: what is written is read at any position, through any interruption."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from bytelm.data.boundaries import Boundaries, BoundaryWriter, load_piece, save_piece
from bytelm.errors import DataError

FINGERPRINT = "0123456789abcdef" * 4


def record(directory: Path, documents: list[NDArray[np.bool_]], fingerprint: str = FINGERPRINT) -> Boundaries:
    with BoundaryWriter(directory, fingerprint, sum(map(len, documents))) as writer:
        for document in documents:
            writer.write(document)
        return writer.finish()


@settings(max_examples=40)
@given(
    st.data(), st.lists(st.lists(st.booleans(), min_size=1, max_size=30), min_size=1, max_size=8), st.integers(1, 40)
)
def test_bits_of_documents_or_pieces_are_read_at_any_position(
    data: st.DataObject, lists: list[list[bool]], together: int
) -> None:
    documents = [np.array(bits) for bits in lists]
    bits = np.concatenate(documents)
    with tempfile.TemporaryDirectory() as name, tempfile.TemporaryDirectory() as other:
        boundaries = record(Path(name), documents)
        with BoundaryWriter(other, FINGERPRINT, len(bits)) as writer:
            for number, first in enumerate(range(0, len(documents), together)):
                piece = Path(other, f"piece-{number}")
                save_piece(piece, documents[first : first + together], lambda bytes: None)
                writer.add(*load_piece(piece))
                piece.unlink()
            writer.finish()
        names = sorted(path.name for path in Path(name).iterdir())
        assert [name.rpartition(".")[2] for name in names] == ["bits", "json"]
        assert names == sorted(path.name for path in Path(other).iterdir())
        assert all(Path(name, file).read_bytes() == Path(other, file).read_bytes() for file in names)
        assert boundaries.total == len(bits)
        assert boundaries.patches == sum(1 + sum(document[:-1]) for document in lists)
        boundaries.verify()
        for _ in range(5):
            start = data.draw(st.integers(0, len(bits)))
            count = data.draw(st.integers(0, len(bits) - start))
            read = boundaries.read(start, count)
            assert read.dtype == bool
            np.testing.assert_array_equal(read, bits[start : start + count])


def test_a_record_that_is_left_early_leaves_nothing(tmp_path: Path) -> None:
    with BoundaryWriter(tmp_path, FINGERPRINT, 128) as writer:
        writer.write(np.ones(64, bool))
    assert not [*tmp_path.iterdir()]


@pytest.mark.fault("K8")
def test_missing_or_other_or_damaged_boundaries_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no boundaries were recorded"):
        Boundaries.open(tmp_path, FINGERPRINT)
    boundaries = record(tmp_path, [np.ones(20, bool), np.zeros(13, bool)])
    with pytest.raises(DataError, match="holds the boundaries of"):
        Boundaries.open(tmp_path, FINGERPRINT[:-1] + "0")
    path = tmp_path / f"boundaries-{FINGERPRINT[:16]}.bits"
    data = path.read_bytes()
    path.write_bytes(data[:2] + b"\0" + data[3:])
    with pytest.raises(DataError, match=path.name):
        boundaries.verify()
    path.write_bytes(data[:-1])
    with pytest.raises(DataError, match=path.name):
        Boundaries.open(tmp_path, FINGERPRINT)
    with pytest.raises(DataError, match=path.name):
        boundaries.read(0, 33)
    path.with_suffix(".json").write_text("{}")
    with pytest.raises(DataError, match="damaged"):
        Boundaries.open(tmp_path, FINGERPRINT)


def test_neither_too_few_nor_too_many_decisions_are_taken(tmp_path: Path) -> None:
    with BoundaryWriter(tmp_path, FINGERPRINT, 10) as writer:
        writer.write(np.ones(4, bool))
        with pytest.raises(ValueError, match="4 bytes only, of 10"):
            writer.finish()
        with pytest.raises(ValueError, match="11 bytes for 10"):
            writer.write(np.ones(7, bool))
