"""DNA: every record is a document, in upper case, whatever ends its lines."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bytelm.data.modalities import dna
from bytelm.data.modalities.base import UnfitError
from media_files import encoded, one

DNA = dna.Config().build()


@settings(max_examples=40)
@given(st.text("ACGTURYSWKMBDHVN-.*", min_size=1, max_size=200))
def test_sequences_come_back(letters: str) -> None:
    document = letters.encode()
    file = DNA.decode(document)
    assert one(DNA, file) == (document, {}) == one(DNA, document + b"\n")


def test_every_record_is_a_document() -> None:
    assert DNA.decode(b"A" * 61) == b">document\n" + b"A" * 60 + b"\nA\n"
    fasta = b">one ACGT is a header\r\nACG\r\nTNN\r\n>two\nacgt\n>three\n\n>four\nA-C*\n"
    assert encoded(DNA, fasta) == ([b"ACGTNN", b"ACGT", b"", b"A-C*"], {"converted to upper case": 1})
    assert encoded(DNA, b"ACGT\n>two\nGG")[0] == [b"ACGT", b"GG"]
    assert encoded(DNA, b"\n\n>two\nGG")[0] == [b"GG"]
    for data, letter in ((b"ACGT\n>two\nACE", "'E'"), (b"Hello", "'E'"), (b"AC1", "'1'"), (b"AC\xffG", "'ÿ'")):
        with pytest.raises(UnfitError, match=f"^{letter} is not a DNA letter$"):
            next(DNA.encode("x", data, Counter()))  # before the first document


@pytest.mark.parametrize("end", [b"\n", b"\r\n", b"\r"])
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_fasta_of_any_line_end_with_a_mark_comments_and_gaps(end: bytes, mark: bytes) -> None:
    records = ([b"ACGT", b"A-C..G*", b"TT"], {})
    new = end.join(
        [mark + b">one; ACGT", b";comment", b"AC", b"; within", b"GT", b">two", b"A-C.", b".G*", b">three", b"TT"]
    )
    old = end.join(
        [mark + b";one", b";comment", b"AC", b"GT", b";two", b"A-C.", b".G*", b"", b";three", b";", b"TT", b""]
    )
    assert encoded(DNA, new) == records == encoded(DNA, old)
    assert encoded(DNA, mark + b"AC" + end + b"GT") == ([b"ACGT"], {})
    for wide in ("utf-16-le", "utf-16-be"):
        with pytest.raises(UnfitError, match="text in UTF-16: save it as UTF-8"):
            encoded(DNA, "\ufeff>one\nACGT".encode(wide))
