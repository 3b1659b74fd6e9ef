"""How is a word pronounced? The phonemes of a word among those of words that are spelled like it.

After four examples, in the phonemes of the CMU Pronouncing Dictionary, of which a file must be given. The wrong answers
are those of the words around it in the dictionary, of about its length: a model must read to the end of the word.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from bytelm.evaluate.published import cmudict
from bytelm.evaluate.robustness.base import Item, Query, Sources, generator

TITLE = "phonemes of words"
NEEDS = "a file of the CMU Pronouncing Dictionary"

EXAMPLES = 4
SHORT = 6  # letters
WRONG = 3
AROUND = 16  # words on either side from which wrong answers come
SLACK = 2  # characters by which they may be shorter or longer before others are preferred


def items(sources: Sources, amount: int, seed: int) -> Iterator[Item]:
    """Up to `amount` words in each of two rows, short and longer words."""
    spoken: dict[str, list[str]] = {}
    for _, data in sources.documents:
        for word, found in (cmudict(data) or {}).items():
            if word.isalpha() and len(word) > 1:
                spoken.setdefault(word, []).extend(found)
    words = sorted(spoken)
    if len(words) <= EXAMPLES:
        return
    for row in ("short words", "longer words"):
        here = [place for place, word in enumerate(words) if (len(word) <= SHORT) == (row == "short words")]
        for chosen in generator(seed, "pronunciation", row).permutation(len(here))[:amount].tolist():
            place = here[chosen]
            if wrong := others(words, place, spoken):
                draw = generator(seed, "pronunciation", words[place])
                shown = [
                    words[at] for at in draw.choice(len(words), EXAMPLES + 1, replace=False).tolist() if at != place
                ]
                yield item(row, words[place], shown[:EXAMPLES], wrong, spoken)


def others(words: Sequence[str], place: int, spoken: Mapping[str, Sequence[str]]) -> list[str]:
    """Pronunciations of the nearest words to one whose length is about that of its own, of which they are none."""
    right, size = spoken[words[place]], len(spoken[words[place]][0])
    around = sorted(range(max(0, place - AROUND), min(place + AROUND + 1, len(words))), key=lambda at: abs(at - place))
    found = dict.fromkeys(spoken[words[at]][0] for at in around)
    near = sorted((one for one in found if one not in right), key=lambda one: max(0, abs(len(one) - size) - SLACK))
    return near[:WRONG] if len(near) >= WRONG else []


def item(row: str, word: str, shown: Sequence[str], wrong: Sequence[str], spoken: Mapping[str, Sequence[str]]) -> Item:
    """The question for a word, its first pronunciation first."""
    examples = "".join(f"{asked(one)} {spoken[one][0]}\n" for one in shown)
    prefix = (examples + asked(word)).encode()
    queries = (Query(prefix, f" {answer}\n".encode()) for answer in (spoken[word][0], *wrong))
    return Item(row, word, "choice", tuple(queries))


def asked(word: str) -> str:
    """The question for a word."""
    return f"Pronounce {word.lower()}:"
