"""Sequences of DNA or RNA: one byte per letter, upper case, without the headers, comments and line ends of FASTA."""

from __future__ import annotations

import codecs
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from bytelm.data.modalities.base import Modality, UnfitError
from bytelm.errors import ConfigError

_LETTERS = b"ACGTURYSWKMBDHVN-.*"  # IUPAC's codes for nucleotides and sets of them, gaps, stop
_SPACE = b" \t\n"
_LINE = 60  # letters on a line of FASTA


@dataclass(frozen=True)
class Config:
    """Nothing to choose."""

    @classmethod
    def parse(cls, spec: str) -> dict[str, Any]:
        """No words at all."""
        if spec:
            raise ConfigError(f"{spec!r} is not an option of dna, which has none: write dna alone")
        return {}

    def build(self) -> Dna:
        """The modality of this configuration."""
        return Dna(self)


class Dna(Modality):
    """Every document is one record of a FASTA file, or the whole of a file that is nothing but letters."""

    suffix = ".fasta"
    suffixes = frozenset({".fasta", ".fa", ".fna", ".ffn", ".frn"})
    text = True

    def __init__(self, config: Config) -> None:
        self.config = config

    def encode(self, name: str, data: bytes, notes: Counter[str]) -> Iterator[bytes]:
        """One document a record. Lines end in CR, LF or both; those that begin with ";" are comments.

        Where no line begins with ">", a line of ";" begins a record, and further ones are comments, as in the first
        programs that read the format.
        """
        if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
            raise UnfitError("text in UTF-16: save it as UTF-8")
        lines = data.removeprefix(codecs.BOM_UTF8).replace(b"\r\n", b"\n").replace(b"\r", b"\n")
        if re.search(rb"^>", lines, re.MULTILINE):
            lines = re.sub(rb"^;.*", b"", lines, flags=re.MULTILINE)
        parts = re.split(rb"^>.*|(?:^;.*\n?)+", lines, flags=re.MULTILINE)
        records = [part.translate(None, _SPACE) for part in parts]
        if len(records) > 1 and not records[0]:
            del records[0]  # nothing comes before the first header
        for record in records:
            if strange := record.upper().translate(None, _LETTERS):
                raise UnfitError(f"{chr(strange[0])!r} is not a DNA letter")
        for record in records:
            upper = record.upper()
            if upper != record:
                notes["converted to upper case"] += 1
            yield upper

    def decode(self, document: bytes) -> bytes:
        """FASTA of one record."""
        lines = [document[i : i + _LINE] for i in range(0, len(document), _LINE)]
        return b"\n".join([b">document", *lines, b""])
