"""Arithmetic by the number of digits, and with or without separators: addition, and which of two numbers is greater.

After four examples. The sum is chosen among four numbers of the same length that differ from it in a digit or two, and
written as a whole; the greater number is chosen of the two.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from numpy.random import Generator

from bytelm.data.tasks import distinct
from bytelm.evaluate.robustness.base import Item, Query, Sources, generator

TITLE = "addition and comparison by number of digits"
NEEDS = ""

EXAMPLES = 4
DIGITS = (1, 2, 3, 4, 6)
SEPARATED = (4, 6)  # digits with which numbers are written as 1,234 too
TRIES = 16  # draws of a question that was not asked before
Pair = tuple[int, int]


def items(sources: Sources, amount: int, seed: int) -> Iterator[Item]:
    """Up to `amount` questions in each row; fewer of a digit, of which there are 100."""
    for digits in DIGITS:
        yield from rows(f"{digits} digit{'s' * (digits > 1)}", str, digits, amount, seed)
        if digits in SEPARATED:
            yield from rows(f"{digits} digits, separated", "{:,}".format, digits, amount, seed)


def rows(title: str, write: Callable[[int], str], digits: int, amount: int, seed: int) -> Iterator[Item]:
    """The rows of one length and one way of writing; the numbers are the same whichever way that is."""
    for name, form in (("addition", added), ("comparison", compared)):
        draw = generator(seed, "numbers", name, digits)
        for pair, shown in questions(digits, amount, draw):
            examples = "".join(
                f"{question} {right}\n" for question, right, _ in (form(one, write, draw) for one in shown)
            )
            question, right, wrong = form(pair, write, draw)
            prefix = (examples + question).encode()
            queries = (Query(prefix, f" {answer}\n".encode()) for answer in (right, *wrong))
            yield Item(f"{name}, {title}", f"{name} {pair}", "choice", tuple(queries))
            if name == "addition":
                asked = Query(prefix, f" {right}".encode())
                yield Item(f"{name}, {title}, generated", f"{name} {pair}", "generation", (asked,))


def questions(digits: int, amount: int, draw: Generator) -> Iterator[tuple[Pair, list[Pair]]]:
    """Up to `amount` different pairs, with the pairs of their examples, which are other ones."""
    asked: set[Pair] = set()
    for _ in range(amount):
        found = (pair_of(digits, draw) for _ in range(TRIES))
        if (pair := next((pair for pair in found if pair not in asked), None)) is None:
            continue
        asked.add(pair)
        shown = [other for other in (pair_of(digits, draw) for _ in range(4 * EXAMPLES)) if other != pair]
        yield pair, shown[:EXAMPLES]


def pair_of(digits: int, draw: Generator) -> Pair:
    """Two different numbers of so many digits."""
    least = 10 ** (digits - 1) if digits > 1 else 0
    one, other = draw.integers(least, 10**digits), draw.integers(least, 10**digits - 1)
    return int(one), int(other + (other >= one))


def added(pair: Pair, write: Callable[[int], str], draw: Generator) -> tuple[str, str, list[str]]:
    """(question, sum, wrong sums) of two numbers."""
    total = sum(pair)
    size = len(str(total))

    def propose(draw: Generator) -> str:
        wrong = total + int(draw.choice([-1, 1])) * int(draw.integers(1, 10)) * 10 ** int(draw.integers(size))
        return write(wrong) if wrong >= 0 and len(str(wrong)) == size else write(total)

    return f"{write(pair[0])} + {write(pair[1])} =", write(total), distinct(write(total), propose, draw, 3)


def compared(pair: Pair, write: Callable[[int], str], draw: Generator) -> tuple[str, str, list[str]]:
    """(question, the greater, the smaller)."""
    return f"Greater of {write(pair[0])} and {write(pair[1])}:", write(max(pair)), [write(min(pair))]
