"""A curriculum of character tasks (`data.tasks`), to be mixed into training: does a model learn to take words apart?

Each document is a JSON line with 32 tasks on lines of their own. They are about training words alone (`data.words`),
so that the suite `characters` can ask of held-out and of longer words, where nothing but the rule helps.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np

from bytelm.data.files import shown, write_whole
from bytelm.data.sources import documents
from bytelm.data.tasks import TASKS, pick, task_of
from bytelm.data.words import LONGEST, SHORTEST, Vocabulary, group_of
from bytelm.errors import DataError, ResourceError, UsageError

LINES = 32  # tasks of a document
FEWEST = 16  # words
RANDOM_WORDS = 20_000
BYTES = 1 << 20


def lessons(words: Sequence[str], size: int, seed: int) -> Iterator[str]:
    """Documents of together `size` bytes, or up to one document more, about words of which each is as likely."""
    draw, names = np.random.default_rng(seed), list(TASKS)
    while size > 0:
        text = "".join(task_of(pick(names, draw), pick(words, draw), words, draw).line for _ in range(LINES))
        size -= len(text.encode())
        yield text


def training_words(paths: Sequence[str | Path]) -> list[str]:
    """The training words of texts, or of a list of words. Raises DataError for too few, and what `documents` raises."""
    words = of_training(Vocabulary.of(b"".join(document.pieces) for document in documents(paths)).words())
    if len(words) < FEWEST:
        raise DataError(
            f"--words {shown(str(paths[0]))}: {len(words)} words of {SHORTEST} to {LONGEST} lower-case letters, no "
            f"held-out words, and {FEWEST} is the least: give more text"
        )
    return words


def random_words(seed: int, count: int = RANDOM_WORDS) -> list[str]:
    """Training words of random letters, for want of texts."""
    draw = np.random.default_rng([seed, count])
    sizes = draw.integers(SHORTEST, LONGEST + 1, count)
    return of_training({"".join(map(chr, draw.integers(ord("a"), ord("z") + 1, size))) for size in sizes})


def of_training(words: Iterable[str]) -> list[str]:
    """The training words among words, in alphabetical order."""
    return sorted(word for word in words if group_of(word) == "training words")


def write(out: Path, words: Sequence[str], size: int, seed: int) -> tuple[int, int]:
    """Write a curriculum as JSON lines; the documents and bytes of text in it. Raises UsageError and ResourceError."""
    if out.suffix != ".jsonl":
        raise UsageError(f"--out {shown(str(out))}: call it ….jsonl, so that each line is read as a document")
    if size < 1:
        raise UsageError(f"--bytes {size}: must be 1 or more")
    texts = list(lessons(words, size, seed))
    lines = (json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ResourceError(f"cannot make {shown(str(out.parent))} ({error.strerror}): choose another place") from error
    write_whole(out, "".join(lines).encode())
    return len(texts), sum(len(text.encode()) for text in texts)
