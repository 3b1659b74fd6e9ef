"""Suites as tasks of the lm-evaluation-harness, for any model that it knows: a folder for its `--include_path`.

    spelling_bytes_swapped_rare_words.yaml      a row of a suite; all of a suite have its tag, here spelling_bytes
    spelling_bytes_swapped_rare_words.jsonl     its questions
    questions.py                                what reads them, and counts

Texts of the harness are Unicode: items with other bytes are left out. Of cuts (see `robustness.base`) there is the
rest after its prompt alone, as a document that goes on is no request of the harness.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from bytelm.data.files import shown
from bytelm.errors import ResourceError
from bytelm.evaluate.robustness.base import Item

NAMES = {"characters": "cute"}  # suites that are known by another name
COUNTS = "questions"  # the module beside the tasks
LINE_END = "\n"

BITS = {"aggregation": "bits_per_byte", "higher_is_better": False}
MEAN = {"aggregation": "mean", "higher_is_better": True}
SCORED = {"bits_per_byte": BITS}
KINDS: Mapping[str, tuple[dict[str, Any], Mapping[str, Mapping[str, Any]]]] = {
    "bits": (
        {"output_type": "loglikelihood", "doc_to_text": "context", "doc_to_target": "continuation"},
        SCORED,
    ),
    "difference": (  # contexts are the choices, and a number for a text says so
        {
            "output_type": "multiple_choice",
            "doc_to_text": "label",
            "doc_to_choice": "contexts",
            "doc_to_target": "continuation",
        },
        {"difference": BITS, "changed": BITS, "original": BITS},
    ),
    "choice": (
        {
            "output_type": "multiple_choice",
            "doc_to_text": "context",
            "doc_to_choice": "choices",
            "doc_to_target": "label",
        },
        {"acc": MEAN, **SCORED},
    ),
    "generation": (
        {"output_type": "generate_until", "doc_to_text": "context", "doc_to_target": "answer"},
        {"exact_match": MEAN},
    ),
    "document": (
        {"output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "text"},
        SCORED,
    ),
}
"""Kind of item → what the harness asks, by the fields of a question, and the figures."""
SAME = {"cut": "bits"}  # kinds that are asked as another one is


def export(suites: Mapping[str, Iterable[Item]], folder: Path) -> list[str]:
    """Write suites, by name, as tasks into a folder; the names of the tasks, sorted. Raises ResourceError.

    Files of the same names are replaced. The same items make the same bytes.
    """
    rows: defaultdict[tuple[str, str, str], list[dict[str, Any]]] = defaultdict(list)
    for suite, items in suites.items():
        for item in items:
            if (question := question_of(item)) is not None:
                tag = f"{NAMES.get(suite, suite)}_bytes"
                rows[tag, slug(f"{tag} {item.row}"), SAME.get(item.kind, item.kind)].append(question)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for (tag, task, kind), questions in rows.items():
            lines = (json.dumps(question) + "\n" for question in questions)
            (folder / f"{task}.jsonl").write_text("".join(lines), encoding="utf-8")
            (folder / f"{task}.yaml").write_text(described(tag, task, kind, questions), encoding="utf-8")
        (folder / f"{COUNTS}.py").write_text(source(), encoding="utf-8")
    except OSError as error:
        raise ResourceError(
            f"cannot write tasks into {shown(str(folder))} ({error.strerror}): choose another place"
        ) from error
    return sorted(task for _, task, _ in rows)


def slug(name: str) -> str:
    """A name in letters, digits and _."""
    return re.sub(r"\W+", "_", name).strip("_")


def question_of(item: Item) -> dict[str, Any] | None:
    """An item as a question; None where its bytes are no UTF-8, or no document."""
    try:
        prefixes = [query.prefix.decode() for query in item.queries]
        texts = [query.continuation.decode() for query in item.queries]
    except UnicodeDecodeError:
        return None
    match item.kind:
        case "choice":
            return {"context": prefixes[0], "choices": texts, "label": 0} if len(set(prefixes)) == 1 else None
        case "difference":
            return {"contexts": prefixes, "continuation": texts[0], "label": 0}
        case "generation":
            return {"context": prefixes[0], "answer": texts[0].removesuffix(LINE_END)}
        case "document":
            return {"text": texts[0]}
        case _:
            return {"context": prefixes[0], "continuation": texts[0]}


def described(tag: str, task: str, kind: str, questions: list[dict[str, Any]]) -> str:
    """The YAML of a task. JSON is YAML too, but for the names of functions."""
    asks, figures = KINDS[kind]
    settings: dict[str, Any] = {"task": task, "tag": tag, "dataset_kwargs": {"file": f"{task}.jsonl"}, **asks}
    settings |= {"test_split": "test", "target_delimiter": "", "num_fewshot": 0, "metadata": {"version": 1}}
    settings["metric_list"] = [{"metric": name, **how} for name, how in figures.items()]
    if kind == "generation":
        most = max(len(question["answer"].encode()) for question in questions) + 1
        settings["generation_kwargs"] = {"until": [LINE_END], "max_gen_toks": most, "do_sample": False}
    functions = {"custom_dataset": "questions"} | ({} if kind == "document" else {"process_results": kind})
    lines = [f"{key}: {json.dumps(value)}\n" for key, value in settings.items()]
    lines += [f"{key}: !function {COUNTS}.{name}\n" for key, name in functions.items()]
    return "".join(lines)


def source() -> str:
    """The text of the module that goes with the tasks."""
    found = find_spec(f"bytelm.evaluate.{COUNTS}")
    assert found is not None and found.origin is not None
    return Path(found.origin).read_text(encoding="utf-8")
