"""Published test sets, given as files: CUTE, CMUdict, BLiMP. Each is recognised by what is in it, and not by its name.

    CUTE        tab-separated, the first line is input1, input2, ..., label; the task is the file's name: spell.tsv
    CMUdict     lines of WORD and its phonemes, with a number between them (1: the first pronunciation) or without
    BLiMP       JSON lines with a good and a bad sentence, and the phenomenon

Whatever is none of these is text.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any, cast

from bytelm.data.sources import STDIN, documents
from bytelm.evaluate.robustness.base import Sources

HEAD = 4096  # bytes by which a file is recognised
_CUTE = re.compile(r"input1(\tinput\d)*\tlabel\r?\n")
_PHONEMES = r"[A-Z]{1,2}[0-2]?(?: [A-Z]{1,2}[0-2]?)*"
_SPOKEN = re.compile(rf"([^\s;]\S*?)(?:\(\d+\))?(?: \d+ | {{1,2}})({_PHONEMES})\s*")
_STRESSED = re.compile(r" [A-Z]{2}[0-2]\b")
_KEYS = (("sentence_good", "sentence_bad", "linguistics_term"), ("good", "bad", "term"))


@dataclass(frozen=True)
class Pair:
    """A pair of BLiMP: the phenomenon, which of all pairs it is, the acceptable sentence and the other."""

    term: str
    unit: str
    good: str
    bad: str


def is_cute(head: str) -> bool:
    """Whether a file that begins like this is one of CUTE's."""
    return bool(_CUTE.match(head))


def is_cmudict(head: str) -> bool:
    """Whether a file that begins like this is one like CMUdict."""
    lines = [line for line in head.splitlines() if not line.startswith(";;;")]
    return len(lines) > 2 and all(map(_SPOKEN.fullmatch, lines)) and bool(_STRESSED.search(head))


def is_blimp(head: str) -> bool:
    """Whether a file that begins like this is one like BLiMP's."""
    return head.startswith("{") and any(f'"{good}"' in head and f'"{bad}"' in head for good, bad, _ in _KEYS)


def cute(name: str, data: bytes) -> tuple[str, list[dict[str, str]]] | None:
    """(task, rows) of a file of CUTE; None for others. Lines that lack a column are left out."""
    if not is_cute(beginning(data)):
        return None
    head, *lines = data.decode(errors="replace").splitlines()
    keys = head.split("\t")
    rows = (line.split("\t") for line in lines)
    return PurePath(name).name.split(".")[0], [
        dict(zip(keys, row, strict=True)) for row in rows if len(row) == len(keys)
    ]


def cmudict(data: bytes) -> dict[str, list[str]] | None:
    """Word → its pronunciations, of a file like CMUdict; None for others. Lines that are none are left out."""
    if not is_cmudict(beginning(data)):
        return None
    found: dict[str, list[str]] = {}
    for line in data.decode(errors="replace").splitlines():
        if spoken := _SPOKEN.fullmatch(line):
            found.setdefault(spoken[1], []).append(spoken[2])
    return found


def blimp(data: bytes) -> list[Pair] | None:
    """The pairs of a file like BLiMP's; None for others. Lines that are none are left out."""
    if not is_blimp(beginning(data)):
        return None
    lines = enumerate(data.decode(errors="replace").splitlines())
    return [pair for number, line in lines if (pair := pair_of(line, number))]


def pair_of(line: str, number: int) -> Pair | None:
    """The pair in a line; None where there is none."""
    try:
        found: Any = json.loads(line)
    except ValueError:
        return None
    if not isinstance(found, dict):
        return None
    row = cast(dict[str, Any], found)
    for good, bad, term in ((row.get(keys[0]), row.get(keys[1]), row.get(keys[2])) for keys in _KEYS):
        if isinstance(good, str) and isinstance(bad, str) and good and bad and good != bad:
            return Pair(str(term), f"{row.get('UID', '')} {row.get('pairID', number)}", good, bad)
    return None


def beginning(data: bytes) -> str:
    """The first whole lines of a file; "" where that is no text."""
    head = data[:HEAD] if len(data) <= HEAD else data[: data.rfind(b"\n", 0, HEAD) + 1]
    try:
        return head.decode()
    except UnicodeDecodeError:
        return ""


def holds_pairs(path: str) -> bool:
    """Whether the first file of a path is one like BLiMP's, whose lines are no documents. Raises DataError."""
    first = None if path == STDIN else next(documents([path], None), None)
    return first is not None and is_blimp(beginning(next(first.pieces)))


def texts(sources: Sources) -> Sources:
    """The documents that are none of these."""
    tests = (is_cute, is_cmudict, is_blimp)
    return Sources([one for one in sources.documents if not any(test(beginning(one[1])) for test in tests)])
