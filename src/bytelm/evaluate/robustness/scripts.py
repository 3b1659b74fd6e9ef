"""The same articles in several languages: what an article costs in each, in bits, patches and seconds.

Bytes do not compare across scripts: a letter of Devanagari has three, and a model may well predict two of them. An
article says the same in every language, so that its bits do compare, and so do the patches and seconds that it takes.
Parity is the ratio to a reference language, English where it is there, over the same articles (Petrov et al. 2023,
arXiv:2305.15425, for tokens).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import PurePath

from bytelm.evaluate.robustness.base import Item, Query, Sources, generator

TITLE = "bits, patches and seconds per article, of the same articles in several languages"
NEEDS = "a folder FOLDER/LANGUAGE/ARTICLE, with the same names of articles in two languages or more"
PER = "article"
HEADLINE = "bits per article, max/min"
ENGLISH = ("eng", "en")
CODE = re.compile("[a-z]{2,3}([-_][A-Za-z0-9]+)*")


def languages(sources: Sources) -> dict[str, dict[str, bytes]]:
    """{language: {article: bytes}} of folders named by a code, such as "eng" or "zh-Hans", with the same articles.

    A language is one that has half of the reference's articles: folders that share the name of a file by chance are
    none. Empty where there are not two.
    """
    found: dict[str, dict[str, bytes]] = {}
    for name, data in sources.documents:
        parts = PurePath(name).parts
        if len(parts) > 1 and data and CODE.fullmatch(parts[-2]):
            found.setdefault(parts[-2], {}).setdefault(parts[-1], data)
    if not found:
        return {}
    wanted = found[reference(list(found))]
    found = {code: texts for code, texts in found.items() if 2 * len(texts.keys() & wanted.keys()) >= len(wanted)}
    return found if len(found) > 1 else {}


def reference(rows: Sequence[str]) -> str:
    """English where it is there, else the first language by name."""
    return next((language for language in ENGLISH if language in rows), min(rows))


def items(sources: Sources, amount: int, seed: int) -> Iterator[Item]:
    """Up to `amount` articles of the reference language, each in all languages that have it."""
    found = languages(sources)
    if not found:
        return
    names = sorted(found[reference(list(found))])
    chosen = generator(seed, "scripts").permutation(len(names))[:amount]
    for article in (names[index] for index in sorted(chosen.tolist())):
        for language, texts in sorted(found.items()):
            if article in texts:
                yield Item(language, article, "document", (Query(b"", texts[article]),))


def summary(rows: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """How unequal languages are: the dearest to the cheapest, and the Gini coefficient, of bits and of patches."""
    found: dict[str, float] = {}
    for what, figure in (("bits", "relative"), ("patches", "patches_per_unit"), ("seconds", "seconds_per_unit")):
        values = sorted(figures[figure] for figures in rows.values() if figure in figures)
        if values and values[0] > 0:
            found[f"{what} per article, max/min"] = values[-1] / values[0]
            found[f"{what} per article, Gini"] = gini(values)
    return found


def gini(values: Sequence[float]) -> float:
    """The Gini coefficient of positive values in ascending order: 0 where all are equal, near 1 where one has all."""
    count = len(values)
    ranked = sum((2 * rank - count - 1) * value for rank, value in enumerate(values, 1))
    return ranked / (count * sum(values))
