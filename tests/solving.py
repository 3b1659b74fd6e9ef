"""Texts for the suites that ask about words, and models by hand that answer them."""

from __future__ import annotations

import hashlib
import re
from collections import defaultdict
from collections.abc import Callable, Iterable

import numpy as np

from bytelm.evaluate.robustness.base import Item, Query, Sources

Likelihood = Callable[[Query], float]
"""What a model says of a query: the more, the more probable."""
SYLLABLES = [one + two + three for one in "bdfgklmnprstv" for two in "aeiou" for three in ("", "", "n", "r", "s")]


def words(count: int = 600, seed: int = 0) -> list[str]:
    """Words that can be pronounced, of 2 to 5 syllables."""
    draw = np.random.default_rng(seed)
    return ["".join(draw.choice(SYLLABLES, int(draw.integers(2, 6)))) for _ in range(count)]


def text(size: int = 20_000, seed: int = 0) -> bytes:
    """Lines of so many words, frequent and rare ones, with names, commas and full stops among them."""
    draw, known = np.random.default_rng(seed), words()
    weights = 1 / np.arange(10, len(known) + 10)
    chosen = [known[n] for n in draw.choice(len(known), size, p=weights / weights.sum())]
    for place in range(0, size, 9):
        chosen[place] = chosen[place].capitalize()
        chosen[place - 1] += "." if place % 2 else ","
    return b"\n".join(" ".join(chosen[n : n + 12]).encode() for n in range(0, size, 12))


TEXTS = Sources([("a.txt", text()), ("b.txt", text(seed=1))])


def by_row(items: Iterable[Item]) -> dict[str, list[Item]]:
    """Items by their rows."""
    rows: defaultdict[str, list[Item]] = defaultdict(list)
    for item in items:
        rows[item.row].append(item)
    return dict(rows)


def accuracy(items: Iterable[Item], likelihood: Likelihood) -> float:
    """How often the right one is more probable than all others; of generation, how often it is above 0."""
    right = [
        likelihood(item.queries[0]) > max(map(likelihood, item.queries[1:]), default=0.0)
        for item in items
        if item.kind in ("choice", "generation")
    ]
    return sum(right) / len(right)


def guess(query: Query) -> float:
    """A model that knows nothing."""
    return hashlib.sha256(query.prefix + b"\0" + query.continuation).digest()[0] / 256 + query.continuation[0] / 1e6


def solved(question: str) -> str:
    """The answer to a character task or an addition, by other ways than those that made it."""
    for pattern, answer in RULES:
        if found := re.fullmatch(pattern, question):
            return answer(*found.groups())
    raise AssertionError(f"nobody knows {question}")


RULES: list[tuple[str, Callable[..., str]]] = [
    (r"Spell (\S+)", lambda word: re.sub(r"(?<=.)(?=.)", " ", word)),
    (r"Join (.+)", lambda letters: letters.replace(" ", "")),
    (r"Reverse (\S+)", lambda word: "".join(reversed(word))),
    (r"Does (\S+) contain (\S)", lambda word, letter: "no" if word.find(letter) < 0 else "yes"),
    (r"Does (.+) contain (\S+)", lambda phrase, word: "yes" if f" {word} " in f" {phrase} " else "no"),
    (r"Insert (.) after (.) in (\S+)", lambda new, old, word: "".join(c + new * (c == old) for c in word)),
    (r"Delete (.) in (\S+)", lambda old, word: "".join(c for c in word if c != old)),
    (r"Replace (.) by (.) in (\S+)", lambda old, new, word: "".join(new if c == old else c for c in word)),
    (r"Swap (.) and (.) in (\S+)", lambda a, b, word: "".join({a: b, b: a}.get(c, c) for c in word)),
    (r"([\d,]+) \+ ([\d,]+) =", lambda a, b: str(int(a.replace(",", "")) + int(b.replace(",", "")))),
    (r"Greater of ([\d,]+) and ([\d,]+)", lambda a, b: str(max(int(a.replace(",", "")), int(b.replace(",", ""))))),
]


def knows(query: Query) -> float:
    """A model that knows every answer, and how numbers are written."""
    question = query.prefix.decode().split("\n")[-1].removesuffix(":")
    return float(query.continuation.decode().strip().replace(",", "") == solved(question))
