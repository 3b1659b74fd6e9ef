"""Sequences of DNA or RNA: a byte a letter, upper case, without the headers and line ends of FASTA."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from bytelm.data.modalities.base import Modality, UnfitError
from bytelm.errors import ConfigError

_LETTERS = b"ACGTURYSWKMBDHVN-*"  # IUPAC's codes for nucleotides and sets of them, gap, stop
_SPACE = b" \t\r\n"
_LINE = 60  # letters on a line of FASTA


@dataclass(frozen=True)
class Config:
    """Nothing to choose."""

    @classmethod
    def parse(cls, spec: str) -> dict[str, Any]:
        """No words at all."""
        if spec:
            raise ConfigError(f"{spec!r} says nothing of DNA: write dna alone")
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
        """One document a record."""
        parts = re.split(rb"^>.*", data, flags=re.MULTILINE)
        records = [part.translate(None, _SPACE) for part in parts]
        if len(records) > 1 and not records[0]:
            del records[0]  # nothing comes before the first header
        for record in records:
            if strange := record.upper().translate(None, _LETTERS):
                raise UnfitError(f"{chr(strange[0])!r} is no letter of DNA")
        for record in records:
            upper = record.upper()
            if upper != record:
                notes["put in upper case"] += 1
            yield upper

    def decode(self, document: bytes) -> bytes:
        """FASTA of one record."""
        lines = [document[i : i + _LINE] for i in range(0, len(document), _LINE)]
        return b"\n".join([b">document", *lines, b""])
