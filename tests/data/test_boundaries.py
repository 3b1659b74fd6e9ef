"""Recorded boundaries: what is written is read at any position, through any interruption."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from bytelm.data.boundaries import Boundaries, BoundaryWriter
from bytelm.errors import DataError

FINGERPRINT = "0123456789abcdef" * 4


def record(directory: Path, documents: list[NDArray[np.bool_]], fingerprint: str = FINGERPRINT) -> Boundaries:
    with BoundaryWriter(directory, fingerprint, sum(map(len, documents))) as writer:
        for document in documents:
            writer.write(document)
        return writer.finish()


@pytest.mark.fault("T4")
@settings(max_examples=40)
@given(
    st.data(), st.lists(st.lists(st.booleans(), min_size=1, max_size=30), min_size=1, max_size=8), st.integers(1, 40)
)
def test_bits_survive_any_interruption_and_are_read_at_any_position(
    data: st.DataObject, lists: list[list[bool]], flush: int
) -> None:
    documents = [np.array(bits) for bits in lists]
    starts = np.cumsum([0, *map(len, documents)]).tolist()
    bits, total = np.concatenate(documents), starts[-1]
    with tempfile.TemporaryDirectory() as name, pytest.MonkeyPatch.context() as patch:
        patch.setattr("bytelm.data.boundaries._FLUSH", flush)
        for killed in data.draw(st.lists(st.booleans(), max_size=3)):
            writer = BoundaryWriter(name, FINGERPRINT, total)
            first = starts.index(writer.position)  # always the beginning of a document
            for document in documents[first : first + data.draw(st.integers(0, 3))]:
                writer.write(document)
            if not killed:
                writer.__exit__(None, None, None)
                assert BoundaryWriter(name, FINGERPRINT, total).position == writer.position
        with BoundaryWriter(name, FINGERPRINT, total) as writer:
            for document in documents[starts.index(writer.position) :]:
                writer.write(document)
            boundaries = writer.finish()
        assert boundaries.total == total
        assert boundaries.patches == sum(1 + sum(document[:-1]) for document in lists)
        boundaries.verify()
        for _ in range(5):
            start = data.draw(st.integers(0, total))
            count = data.draw(st.integers(0, total - start))
            read = boundaries.read(start, count)
            assert read.dtype == bool
            np.testing.assert_array_equal(read, bits[start : start + count])
        assert sorted(path.suffix for path in Path(name).iterdir()) == [".bits", ".json"]


def test_a_partial_record_that_cannot_be_relied_on_is_begun_again(tmp_path: Path) -> None:
    bits = np.ones(64, bool)
    for spoil in ("shorter", "nonsense", "other total"):
        with BoundaryWriter(tmp_path, FINGERPRINT, 128) as writer:
            writer.write(bits)
        (partial,) = tmp_path.glob("*.partial")
        if spoil == "shorter":
            partial.write_bytes(partial.read_bytes()[:-1])
        elif spoil == "nonsense":
            (tmp_path / (partial.name + ".json")).write_text("{")
        total = 100 if spoil == "other total" else 128
        assert BoundaryWriter(tmp_path, FINGERPRINT, total).position == 0


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
