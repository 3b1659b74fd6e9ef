"""Character tasks about words, a line each, as curricula train them and the suite `characters` asks them:

    Spell house: h o u s e              Insert t after s in house: houste
    Join h o u s e: house               Delete u in house: hose
    Reverse house: esuoh                Replace s by r in house: houre
    Does house contain u: yes           Swap h and s in house: souhe
    Does old house door contain house: yes

These are the tasks of CUTE (Edman, Schmid, Fraser 2024, "CUTE: Measuring LLMs' Understanding of Their Tokens"), and
reversing, in words of our own. What is said of a letter is said of each time it occurs: Delete e in these: ths.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from numpy.random import Generator

TRIES = 64  # proposals of wrong answers, before there are too few
Proposal = Callable[[Generator], str]


@dataclass(frozen=True)
class Task:
    """A question, the right answer, and a source of answers of the same form that are near it."""

    question: str
    answer: str
    propose: Proposal

    @property
    def asked(self) -> str:
        """The line up to the answer. No white space ends it: tokenizers would join that and the answer."""
        return f"{self.question}:"

    @property
    def line(self) -> str:
        """The whole line, as a curriculum has it."""
        return f"{self.asked} {self.answer}\n"

    def wrong(self, draw: Generator, count: int) -> list[str]:
        """Up to `count` different wrong answers: fewer where there are no more."""
        return distinct(self.answer, self.propose, draw, count)


def distinct(answer: str, propose: Proposal, draw: Generator, count: int) -> list[str]:
    """Up to `count` proposals that differ from the answer and from each other; of its size in bytes if possible."""
    size, found = len(answer.encode()), dict[str, int]()
    for _ in range(TRIES):
        if (wrong := propose(draw)) != answer:
            found[wrong] = abs(len(wrong.encode()) - size)
        if list(found.values()).count(0) == count:
            break
    return sorted(found, key=found.__getitem__)[:count]


def pick(letters: Sequence[str], draw: Generator) -> str:
    """One of several strings, or of the letters of one, at random."""
    return letters[int(draw.integers(len(letters)))]


def near(text: str, letters: str) -> Proposal:
    """Texts of the same length that differ from one in two neighbours that are swapped, or in one letter."""

    def propose(draw: Generator) -> str:
        place = int(draw.integers(len(text)))
        if draw.random() < 0.5 and len(text) > 1:
            place = min(place, len(text) - 2)
            return text[:place] + text[place + 1] + text[place] + text[place + 2 :]
        return text[:place] + pick(letters, draw) + text[place + 1 :]

    return propose


def either(*proposals: Proposal) -> Proposal:
    """Proposals of several sources."""
    return lambda draw: proposals[int(draw.integers(len(proposals)))](draw)


def spaced(word: str) -> str:
    """The letters of a word with spaces between them."""
    return " ".join(word)


def spell(word: str, others: Sequence[str], draw: Generator) -> Task:
    """The letters of a word."""
    wrong = near(word, word + others[0])
    return Task(f"Spell {word}", spaced(word), lambda draw: spaced(wrong(draw)))


def join(word: str, others: Sequence[str], draw: Generator) -> Task:
    """The word of letters."""
    return Task(f"Join {spaced(word)}", word, near(word, word + others[0]))


def reverse(word: str, others: Sequence[str], draw: Generator) -> Task:
    """The letters from the last one on; among wrong answers is the word as it is."""
    turned = word[::-1]
    return Task(f"Reverse {word}", turned, either(near(turned, word + others[0]), lambda _: word))


def contains(word: str, others: Sequence[str], draw: Generator) -> Task:
    """Whether a letter is in a word: half of the time it is.

    It is a letter in which the word differs from another one. So of two words as likely, no letter says yes or no by
    itself, as a frequent one would if it came from the word and a rare one if it did not.
    """
    apart = ((sorted(set(word) - set(other)), sorted(set(other) - set(word))) for other in others)
    own, foreign = next(((own, foreign) for own, foreign in apart if own and foreign), (list(word), []))
    inside = draw.random() < 0.5 or not foreign
    return decided(f"Does {word} contain {pick(own if inside else foreign, draw)}", inside)


def contains_word(word: str, others: Sequence[str], draw: Generator) -> Task:
    """Whether a word is among three, half of the time: what a model of words knows without its letters."""
    inside = draw.random() < 0.5
    three = [*others[:2], word if inside else others[2]]
    return decided(f"Does {' '.join(pick_order(three, draw))} contain {word}", inside)


def decided(question: str, yes: bool) -> Task:
    """A question that is answered by yes or no."""
    return Task(question, "yes" if yes else "no", lambda _: "no" if yes else "yes")


def pick_order(words: Sequence[str], draw: Generator) -> list[str]:
    """Several in an order of chance."""
    return [words[int(place)] for place in draw.permutation(len(words))]


def insert(word: str, others: Sequence[str], draw: Generator) -> Task:
    """A letter after a letter; wrong: in other places, or another one."""
    after, letter = pick(word, draw), pick(others[0], draw)
    answer = word.replace(after, after + letter)
    places = len(answer) - len(word)

    def elsewhere(draw: Generator) -> str:
        found = word
        for place in sorted(draw.choice(len(word) + 1, places, replace=False).tolist(), reverse=True):
            found = found[:place] + letter + found[place:]
        return found

    other = lambda draw: word.replace(after, after + pick(others[1], draw))  # noqa: E731
    return Task(f"Insert {letter} after {after} in {word}", answer, either(elsewhere, elsewhere, other))


def delete(word: str, others: Sequence[str], draw: Generator) -> Task:
    """A word without a letter; wrong: without others, as many."""
    letter = pick(word, draw)
    answer = word.replace(letter, "")
    left = len(answer)

    def elsewhere(draw: Generator) -> str:
        return "".join(word[place] for place in sorted(draw.choice(len(word), left, replace=False).tolist()))

    wrong = either(elsewhere, elsewhere, near(answer, word + others[0]))
    return Task(f"Delete {letter} in {word}", answer, wrong)


def substitute(word: str, others: Sequence[str], draw: Generator) -> Task:
    """A letter by a letter; wrong: others by it, as many, or it by another one."""
    letter = pick(word, draw)
    by = pick([other for other in word + "".join(others) if other != letter], draw)
    answer = word.replace(letter, by)

    def elsewhere(draw: Generator) -> str:
        places = draw.choice(len(word), word.count(letter), replace=False).tolist()
        return "".join(by if place in places else own for place, own in enumerate(word))

    other = lambda draw: word.replace(letter, pick(others[1], draw))  # noqa: E731
    return Task(f"Replace {letter} by {by} in {word}", answer, either(elsewhere, other))


def swap(word: str, others: Sequence[str], draw: Generator) -> Task:
    """Two letters for each other; wrong: two others."""
    one = pick(word, draw)
    two = pick([letter for letter in word if letter != one], draw)

    def elsewhere(draw: Generator) -> str:
        return swapped(word, pick(word, draw), pick(word, draw))

    answer = swapped(word, one, two)
    return Task(f"Swap {one} and {two} in {word}", answer, either(elsewhere, elsewhere, near(word, word)))


def swapped(word: str, one: str, two: str) -> str:
    """Each of two letters where the other was."""
    return word.translate({ord(one): two, ord(two): one})


TASKS: Mapping[str, Callable[[str, Sequence[str], Generator], Task]] = {
    "spell": spell,
    "join": join,
    "reverse": reverse,
    "contains": contains,
    "contains word": contains_word,
    "insert": insert,
    "delete": delete,
    "substitute": substitute,
    "swap": swap,
}
"""Name → what makes such a task of a word of two different letters at least, of three other words, and by chance."""


def task_of(name: str, word: str, words: Sequence[str], draw: Generator) -> Task:
    """A task about a word; the other words that it may need are drawn from `words`, which have four at least."""
    others: list[str] = []
    while len(others) < 3:
        if (other := pick(words, draw)) not in (word, *others):
            others.append(other)
    return TASKS[name](word, others, draw)
