"""What a model knows of the characters of words: to spell, join, reverse, search, insert, delete, substitute and swap.

The tasks are those of CUTE (Edman, Schmid, Fraser 2024, "CUTE: Measuring LLMs' Understanding of Their Tokens"), and
reversing, about the words of the texts, each after four examples. The right answer is chosen among four that are alike
in form and length (yes and no: among two), and written as a whole. Wrong answers are the right rule in the wrong place.

Words are in three rows each. A curriculum (`data.curriculum`) asks of training words, and so a model that was trained
with it may know these; of held-out and of longer words it was never asked, and there the rule alone helps.

Where files of CUTE are given, their questions are asked instead, in our words and with examples from the same file.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TypeVar

from numpy.random import Generator

from bytelm.data.tasks import TASKS, Task, near, task_of
from bytelm.data.words import GROUPS, Vocabulary, group_of
from bytelm.evaluate.published import cute, texts
from bytelm.evaluate.robustness.base import Item, Query, Sources, generator

TITLE = "tasks on the characters of words"
NEEDS = "texts with words that occur at least 3 times, or files of CUTE"

T = TypeVar("T")
LEAST = 3  # occurrences of a word
EXAMPLES = 4
WRONG = 3
FEWEST = 8  # training words: below there are no items
DECIDED = ("yes", "no")
ASKED: Mapping[str, str] = {
    "spell": "Spell {0}",
    "spell_inverse": "Join {0}",
    "contains_char": "Does {1} contain {0}",
    "contains_word": 'Does "{1}" contain {0}',
    "orth": "Spelled more like {0}, {1} or {2}",
    "sem": "Closer in meaning to {0}, {1} or {2}",
    "ins_char": "Insert {0} after {1} in {2}",
    "ins_word": 'Insert "{0}" after "{1}" in "{2}"',
    "del_char": "Delete {0} in {1}",
    "del_word": 'Delete "{0}" in "{1}"',
    "sub_char": "Replace {0} by {1} in {2}",
    "sub_word": 'Replace "{0}" by "{1}" in "{2}"',
    "swap_char": "Swap {0} and {1} in {2}",
    "swap_word": 'Swap "{0}" and "{1}" in "{2}"',
}
"""A task of CUTE, by the name of its file without a final _rand → how its columns are asked for, all of them."""


def items(sources: Sources, amount: int, seed: int) -> Iterator[Item]:
    """Up to `amount` words in each row, a task and a group of words; or questions, of each file of CUTE."""
    files = [found for name, data in sources.documents if (found := cute(name, data))]
    if files:
        for name, rows in files:
            yield from published(name, rows, amount, seed)
        return
    groups: defaultdict[str, list[str]] = defaultdict(list)
    for word in Vocabulary.of(data for _, data in texts(sources).documents).words(LEAST):
        groups[group_of(word) or ""].append(word)
    known = groups["training words"]
    if len(known) < FEWEST:
        return
    for name in TASKS:
        for group in GROUPS:
            order = generator(seed, "characters", name, group).permutation(len(groups[group]))[:amount].tolist()
            for word in (groups[group][place] for place in order):
                draw = generator(seed, "characters", name, word)
                task = task_of(name, word, known, draw)
                examples = [task_of(name, other, known, draw) for other in some(known, draw)]
                examples = [example for example in examples if example.question != task.question]
                yield from asked(f"{name}, {group}", word, task, examples[:EXAMPLES], draw)


def asked(row: str, unit: str, task: Task, examples: Sequence[Task], draw: Generator) -> Iterator[Item]:
    """A task as a choice, and as generation where the answer is not yes or no."""
    prefix = ("".join(example.line for example in examples) + task.asked).encode()
    if wrong := task.wrong(draw, 1 if task.answer in DECIDED else WRONG):
        queries = (Query(prefix, f" {answer}\n".encode()) for answer in (task.answer, *wrong))
        yield Item(row, unit, "choice", tuple(queries))
    if task.answer not in DECIDED:
        yield Item(f"{row}, generated", unit, "generation", (Query(prefix, f" {task.answer}".encode()),))


def published(name: str, rows: Sequence[Mapping[str, str]], amount: int, seed: int) -> Iterator[Item]:
    """Up to `amount` questions of a file of CUTE; none of a task that is unknown, and of too few rows."""
    kind = name.removesuffix("_rand")
    if kind not in ASKED or len(rows) <= EXAMPLES or len(rows[0]) - 1 != ASKED[kind].count("{"):
        return
    tasks = [task_from(kind, row) for row in rows]
    for place in generator(seed, "cute", name).permutation(len(tasks))[:amount].tolist():
        draw = generator(seed, "cute", name, place)
        shown = [other for other in some(tasks, draw) if other is not tasks[place]]
        yield from asked(f"CUTE {name}", f"{name} {place}", tasks[place], shown[:EXAMPLES], draw)


def some(known: Sequence[T], draw: Generator) -> list[T]:
    """Different ones of many, one more than there are examples."""
    return [known[place] for place in draw.choice(len(known), EXAMPLES + 1, replace=False).tolist()]


def task_from(kind: str, row: Mapping[str, str]) -> Task:
    """A row of CUTE as a task, with wrong answers: the other one of two, or what is near the right one."""
    inputs, label = [value for key, value in row.items() if key != "label"], row["label"]
    question = ASKED[kind].format(*inputs)
    if kind.startswith("contains"):
        others = [other for other in DECIDED if other != label.lower()]
        return Task(question, label.lower(), lambda _: others[0])
    if kind in ("orth", "sem"):
        others = [other for other in inputs[1:] if other != label] or [label]
        return Task(question, label, lambda _: others[0])
    return Task(question, label, near_to(label))


def near_to(answer: str) -> Callable[[Generator], str]:
    """What is near an answer: of letters with spaces the letters differ, of a sentence two neighbouring words."""
    parts = answer.split(" ")
    if len(parts) == 1:
        return near(answer, answer)
    if all(len(part) == 1 for part in parts):
        letters = near("".join(parts), "".join(parts))
        return lambda draw: " ".join(letters(draw))

    def reordered(draw: Generator) -> str:
        place = int(draw.integers(len(parts) - 1))
        return " ".join([*parts[:place], parts[place + 1], parts[place], *parts[place + 2 :]])

    return reordered
