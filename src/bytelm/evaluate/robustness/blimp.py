"""Is an acceptable sentence more probable than one that is not, and differs little? BLiMP's minimal pairs.

Warstadt et al. 2020, "BLiMP: The Benchmark of Linguistic Minimal Pairs for English", of which files must be given.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator

from bytelm.evaluate.published import Pair, blimp
from bytelm.evaluate.robustness.base import Item, Query, Sources, generator

TITLE = "acceptable sentences against others, by phenomenon"
NEEDS = "files of BLiMP: JSON lines with sentence_good and sentence_bad"


def items(sources: Sources, amount: int, seed: int) -> Iterator[Item]:
    """Up to `amount` pairs of each phenomenon."""
    terms: defaultdict[str, dict[str, Pair]] = defaultdict(dict)
    for _, data in sources.documents:
        for pair in blimp(data) or []:
            terms[pair.term][pair.unit] = pair
    for term, pairs in sorted(terms.items()):
        units = sorted(pairs)
        for place in generator(seed, "blimp", term).permutation(len(units))[:amount].tolist():
            pair = pairs[units[place]]
            queries = (Query(b"", sentence.encode()) for sentence in (pair.good, pair.bad))
            yield Item(term.replace("_", " "), pair.unit, "choice", tuple(queries))
