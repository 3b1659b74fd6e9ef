"""The automaton allows exactly what Python's own encoder writes, and text in pieces is the text."""

from __future__ import annotations

import functools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bytelm.generate.utf8 import Utf8State, decode
from bytelm.units import BYTES, EOS, VOCAB

# The code points of each encoded length; surrogates are no characters.
LENGTHS = {
    1: [range(0x80)],
    2: [range(0x80, 0x800)],
    3: [range(0x800, 0xD800), range(0xE000, 0x10000)],
    4: [range(0x10000, 0x110000)],
}


@functools.cache
def continuations() -> dict[bytes, list[int]]:
    """For every beginning of a character and every next byte, how many bytes then finish the character; 99: none do."""
    following: dict[bytes, list[int]] = {}
    for length, ranges in LENGTHS.items():
        text = "".join(chr(point) for points in ranges for point in points).encode()
        characters = np.frombuffer(text, np.uint8).reshape(-1, length)
        for read in range(length):
            opens = np.any(np.diff(characters[:, :read], axis=0, prepend=0), axis=1)
            opens[0] = True
            for group in np.split(characters, np.flatnonzero(opens)[1:]):
                finish = following.setdefault(group[0, :read].tobytes(), [99] * BYTES)
                for byte in set(group[:, read].tolist()):
                    finish[byte] = length - read
    return following


def test_every_character_is_reachable_and_nothing_else() -> None:
    beginnings = list(continuations())
    assert len(beginnings) > 17_000
    state = Utf8State.after(beginnings)
    finish = torch.tensor(list(continuations().values()))
    for left in range(6):
        allowed = state.allowed(left)
        assert torch.equal(allowed[:, :BYTES], finish <= left)
        assert [*map(int, allowed[:, EOS].nonzero())] == [beginnings.index(b"")]
        assert allowed[:, BYTES:].sum() == 1
    assert torch.equal(state.missing()[1:], finish.amin(1)[1:])


@given(st.binary(max_size=12) | st.lists(st.sampled_from(list("aé€😀"))).map(lambda s: "".join(s).encode()[:-1]))
def test_a_text_leaves_open_the_character_that_it_begins(text: bytes) -> None:
    begun = next((text[-size:] for size in (3, 2, 1) if text[-size:] in continuations()), b"")
    state = Utf8State.after([text, begun])
    assert state.places[0] == state.places[1]
    assert (state.places[0] == 0) == (begun == b"")
    grown = Utf8State.after([b""])
    for byte in text:
        grown = grown.extend(torch.tensor([byte]))
    assert grown.places[0] == state.places[0]


@pytest.mark.parametrize(
    ("text", "missing"),
    [
        (b"", 0),
        (b"a", 0),
        (b"\xc3", 1),
        (b"\xe2\x82", 1),
        (b"\xf0\x9f", 2),
        (b"\xff\xf4", 3),
        (b"\xe0\x80", 0),
        (b"\xed\xa0", 0),
        (b"\x80\x80\x80\x80", 0),
        (b"\xe2\xc3", 1),
    ],
)
def test_the_end_of_a_prompt(text: bytes, missing: int) -> None:
    assert Utf8State.after([text]).missing().item() == missing


def test_no_rows() -> None:
    assert Utf8State.after([]).allowed(1).shape == (0, VOCAB)


@given(data=st.binary(max_size=30) | st.text(max_size=10).map(str.encode), cuts=st.lists(st.integers(0, 30)))
def test_text_in_pieces_is_the_text(data: bytes, cuts: list[int]) -> None:
    ends = [*sorted(cuts), len(data)]
    parts = [data[start:end] for start, end in zip([0, *ends], ends, strict=False)]
    shown = list(decode(parts))
    assert "".join(shown) == data.decode(errors="replace")
    assert "" not in shown


def test_a_character_is_shown_once_it_is_whole() -> None:
    assert list(decode([b"a\xf0", b"\x9f", b"\x98", b"\x80b", b"\xff", b"\xe2\x82"])) == [
        "a",
        "😀b",
        "\ufffd",
        "\ufffd",
    ]
