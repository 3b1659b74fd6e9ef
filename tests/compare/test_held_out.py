"""What all models of a comparison are measured on."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from statistics import fmean

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bytelm.compare import held_out
from bytelm.errors import DataError
from bytelm.evaluate.bits import DocumentBits


@given(st.lists(st.integers(0, 60), min_size=1, max_size=20), st.integers(1, 200), st.integers(1, 40))
@settings(max_examples=50)
def test_stretches_are_parts_of_documents_in_order(sizes: list[int], limit: int, longest: int) -> None:
    documents = [bytes(range(size)) for size in sizes]
    for grain in (1, 3):
        if not sum(sizes):
            with pytest.raises(DataError, match="no held-out bytes"):
                held_out.stretches(documents, limit, longest, grain)
            return
        chosen = held_out.stretches(documents, limit, longest, grain)
        for number, data in chosen:
            assert data[0] % grain == 0 and 0 < len(data) <= max(longest, grain)
            assert documents[number][data[0] :].startswith(data)
            assert len(data) % grain == 0 or data[-1] == sizes[number] - 1
        assert all(a[0] < b[0] or (a[0] == b[0] and a[1][-1] < b[1][0]) for a, b in pairwise(chosen))
        assert chosen and (sum(sizes) > limit or sum(len(data) for _, data in chosen) == sum(sizes))


@pytest.mark.parametrize("size", [6400, 16384, 20000, 40000])
def test_stretches_come_to_about_the_limit_evenly_over_all(size: int) -> None:
    chosen = held_out.stretches([bytes([number]) * size for number in range(64)], limit=64 * size // 2)
    numbers = [number for number, _ in chosen]
    assert sum(len(data) for _, data in chosen) == pytest.approx(64 * size // 2, rel=0.2)
    assert fmean(numbers) == pytest.approx(31.5, abs=2) and max(b - a for a, b in pairwise(numbers)) <= 3


def test_stretches_are_kept(tmp_path: Path) -> None:
    chosen = [(0, b"\n\n[]"), (0, bytes(range(256))), (7, b"\xff")]
    held_out.keep(tmp_path / "kept", chosen)
    assert held_out.kept(tmp_path / "kept") == chosen


def test_documents_are_what_is_resampled_where_there_are_enough() -> None:
    few = [DocumentBits(str(i % 7), 10, float(i)) for i in range(21)]
    assert held_out.units(few) == few
    many = [DocumentBits(str(i % 8), 10 + i, float(i)) for i in range(16)]
    assert held_out.units(many) == [DocumentBits(str(i), 28 + 2 * i, 8.0 + 2 * i) for i in range(8)]


@pytest.mark.parametrize("text", ["déjà vu, ", "日本語の文。", "a🙂", "plain "])
def test_no_character_is_cut_in_two(text: str) -> None:
    """Where a tokenizer of text could not read the parts; bytes that are no text stay whole too."""
    document = (text * 60).encode()
    parts = [data for _, data in held_out.stretches([document], longest=50)]
    assert b"".join(parts) == document and all(data.decode() and len(data) <= 50 + 3 for data in parts)
    assert max(map(len, parts)) - min(map(len, parts[:-1])) <= 6  # equal parts, up to a character at either end
    for other in (b"\x80" * 200, bytes(range(256)), document[1:]):
        assert b"".join(data for _, data in held_out.stretches([other], longest=7)) == other
