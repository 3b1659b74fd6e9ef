"""Edits give every text back, cost what their code takes, and are called what they are."""

from __future__ import annotations

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from bytelm.compress.coder import Decoder, Encoder
from bytelm.hf import proof
from bytelm.hf.losses import Edit, cost, edits_of, gamma, kind_of, repaired

FEW = st.text("ab \n", max_size=300)


@given(st.text() | FEW, st.text() | FEW)
@example("ab" * 200, "ba" * 200)
@example("", "x" * 9000)
@example("the same", "the same")
def test_edits_give_the_text_back(decoded: str, text: str) -> None:
    edits = edits_of(decoded, text)
    assert repaired(decoded, edits) == text
    assert (edits == []) == (decoded == text)
    assert all(edit.removed != edit.inserted for edit in edits)


@given(st.text(max_size=20), st.text(max_size=20))
@example("", "\udcff")
def test_they_are_coded_in_as_many_bits_as_they_cost(decoded: str, text: str) -> None:
    edits = edits_of(decoded, text)
    encoder = Encoder()
    proof.write(encoder, edits)
    coded = encoder.end()
    read = proof.decoded(Decoder(coded))
    assert repaired(decoded, read) == text and cost(read) == cost(edits)
    assert 8 * len(coded) - 16 <= cost(edits) <= 8 * len(coded)


def test_what_a_capital_letter_costs() -> None:
    (edit,) = edits_of("the cat sat on the mat", "the cat sat On the mat")
    assert edit == Edit(12, "o", "O") and [gamma(count) for count in (0, 1, 2, 3, 12)] == [1, 3, 3, 5, 7]
    assert edit.bits == 7 + 3 + 3 + 8 and cost([edit]) == 3 + edit.bits and cost([]) == 1


def test_few_characters_are_edited_where_few_differ() -> None:
    text = "The Quick (Brown) Fox, Jumps!\r\nOver 1024 DOGS\r\n" * 20
    edits = edits_of(text.lower().replace("\r", ""), text)
    assert sum(len(edit.inserted) for edit in edits) <= 20 * (1 + 1 + 1 + 1 + 1 + 3 + 11)
    far = "a" * 5000 + text
    # What comes before is inserted; blocks of more than that are compared, so that it is a bound and not the fewest.
    assert 8000 <= sum(len(edit.inserted) for edit in edits_of(text, "b" * 3000 + far)) <= 9600


@pytest.mark.parametrize(
    ("decoded", "text", "kind"),
    [
        ("it is the", "it is The", "case"),
        ("a\nb", "a\r\nb", "line ends"),
        ("a b", "a  b", "white space"),
        ("a b", "a\tb", "white space"),
        ("a fin", "a ﬁn", "Unicode normalization"),
        ("caf\u00e9!", "cafe\u0301!", "Unicode normalization"),
        ("cafe!", "café!", "accents"),
        ("ecole", "École", "accents and case"),
        (" a", "a", "leading space"),
        ("a  b", "a b", "white space"),
        ("a b", "a b ", "white space"),
        ("a b", "\ufeffa b", "byte order mark"),
        ("a ? b", "a 中 b", "other characters"),
        ("a <unk> b", "a 中 b", "unknown tokens"),
        ("a b", "a\x00 b", "dropped characters"),
    ],
)
def test_a_loss_is_called_what_it_is(decoded: str, text: str, kind: str) -> None:
    assert [kind_of(edit, "<unk>") for edit in edits_of(decoded, text)] == [kind]
