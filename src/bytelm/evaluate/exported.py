"""Suites as tasks of the lm-evaluation-harness, for any model that it knows: a folder for its `--include_path`.

    spelling_bytes_swapped_rare_words.yaml      a row of a suite; all of a suite have its tag, here spelling_bytes
    spelling_bytes_swapped_rare_words.jsonl     its questions
    questions.py                                what reads them, and counts
    exported.json                               these files with their SHA-256, by which the next export removes them

Texts of the harness are Unicode: items with other bytes are left out. Of cuts (see `robustness.base`) there is the
rest after its prompt alone, as a document that goes on is no request of the harness.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from bytelm.data.files import sha256_of, shown, write_whole
from bytelm.errors import ResourceError, UsageError
from bytelm.evaluate.robustness.base import Item

NAMES = {"characters": "cute"}  # suites that are known by another name
COUNTS = "questions"  # the module beside the tasks
MANIFEST = "exported.json"
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
    """Write suites, by name, as tasks into a folder; the names of the tasks, sorted. Without any, nothing is written.

    The folder then holds these tasks: those of an earlier export are removed, and files that are not of one stay. The
    same items make the same bytes. Raises UsageError for an earlier export that was changed or has no manifest,
    ResourceError where the disk refuses.
    """
    rows: defaultdict[tuple[str, str, str], list[dict[str, Any]]] = defaultdict(list)
    for suite, items in suites.items():
        for item in items:
            if (question := question_of(item)) is not None:
                tag = f"{NAMES.get(suite, suite)}_bytes"
                rows[tag, slug(f"{tag} {item.row}"), SAME.get(item.kind, item.kind)].append(question)
    if not rows:
        return []
    files = {f"{COUNTS}.py": source()}
    for (tag, task, kind), questions in rows.items():
        files[f"{task}.jsonl"] = "".join(json.dumps(question) + "\n" for question in questions)
        files[f"{task}.yaml"] = described(tag, task, kind, questions)
    replace_export({name: text.encode() for name, text in files.items()}, folder)
    return sorted(task for _, task, _ in rows)


def replace_export(files: Mapping[str, bytes], folder: Path) -> None:
    """Write files by name into a folder, in the place of those of an earlier export. Raises as `export` does."""
    known = exported(folder)
    stale = {name: known[name] for name in known if name not in files and (folder / name).is_file()}
    for name, checksum in stale.items():
        if sha256_of(folder / name) != checksum:
            raise UsageError(
                f"{shown(str(folder / name))} was changed since it was exported, and the new tasks are without it: "
                "move it, or choose another folder"
            )
    own = {name: hashlib.sha256(data).hexdigest() for name, data in sorted(files.items())}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(folder / MANIFEST, written(stale | own))  # should it end halfway, the next export finds all of it
        for name in stale:
            (folder / name).unlink()
        for name, data in files.items():
            (folder / name).write_bytes(data)
    except OSError as error:
        raise ResourceError(
            f"cannot write tasks into {shown(str(folder))} ({error.strerror}): choose another place"
        ) from error
    write_whole(folder / MANIFEST, written(own))


def written(manifest: Mapping[str, str]) -> bytes:
    """A manifest as JSON."""
    return (json.dumps(manifest, indent=1) + "\n").encode()


def exported(folder: Path) -> dict[str, str]:
    """{file: SHA-256} of an earlier export into a folder; empty where there is none. Raises UsageError."""
    if not (folder / MANIFEST).exists() and not (folder / f"{COUNTS}.py").exists():
        return {}
    try:
        found: Any = json.loads((folder / MANIFEST).read_bytes())
        known = {str(name): str(checksum) for name, checksum in found.items()}
    except (OSError, ValueError, AttributeError):
        known = None
    # Nothing is removed but what may have been written beside the manifest.
    if known is None or any(re.fullmatch(r"\w+\.(yaml|jsonl|py)", name) is None for name in known):
        raise UsageError(
            f"{shown(str(folder))} has tasks of an export whose {MANIFEST} is missing or damaged, and they would stay: "
            "remove them, or choose another folder"
        )
    return known


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
