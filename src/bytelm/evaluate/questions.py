"""The questions of exported tasks, and what counts of the answers.

`bytelm.evaluate.exported` copies this file beside the tasks, where the lm-evaluation-harness imports it: it must do
without bytelm. Figures are those of `bytelm robust`: bits per byte of the UTF-8, and of ties nobody is right.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

Doc = Mapping[str, Any]
Scored = tuple[float, bool]
"""(nats gained, whether greedy decoding would write it)."""

# That questions come from a function is a reason for the harness to say of each task how to pass it arguments.
logging.getLogger("lm_eval.api.task").addFilter(
    lambda record: not ("_bytes_" in str(record.msg) and "Custom kwargs" in str(record.msg))
)


def questions(file: str, **_: Any) -> dict[str, Any]:
    """The rows of a file beside this one. From a list they are as they were written: text stays text, dates too."""
    from datasets import Dataset

    lines = Path(__file__).with_name(file).read_text(encoding="utf-8").splitlines()
    return {"test": Dataset.from_list([json.loads(line) for line in lines])}


def choice(doc: Doc, results: Sequence[Scored]) -> dict[str, Any]:
    """Whether the right one, which is the first, is more probable than every other; and its bits."""
    first, *others = (nats for nats, _ in results)
    return {"acc": float(first > max(others)), "bits_per_byte": (first, size(doc["choices"][0]))}


def bits(doc: Doc, results: Sequence[Scored]) -> dict[str, Any]:
    """The bits of a continuation."""
    return {"bits_per_byte": (results[0][0], size(doc["continuation"]))}


def difference(doc: Doc, results: Sequence[Scored]) -> dict[str, Any]:
    """The bits of a continuation after the changed context and after the original one, and how much more that is."""
    (changed, _), (original, _) = results
    weight = size(doc["continuation"])
    return {"changed": (changed, weight), "original": (original, weight), "difference": (changed - original, weight)}


def generation(doc: Doc, results: Sequence[str]) -> dict[str, Any]:
    """Whether the answer was written, but for white space around it: some tokenizers drop that."""
    return {"exact_match": float(results[0].split("\n")[0].strip() == doc["answer"].strip())}


def size(text: str) -> int:
    """Bytes of a text."""
    return len(text.encode())
