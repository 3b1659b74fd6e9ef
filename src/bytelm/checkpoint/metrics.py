"""metrics.jsonl: what a run recorded while it trained, one JSON object a line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

METRICS = "metrics.jsonl"

# What older runs call it → what it is called now.
KINDS = {"sitting": "session_start", "valid": "validation"}
PHASES = {"looks": "validation", "scorer": "entropy model"}


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl; none if there is no such file. A line that a crash cut short is left out."""
    if not path.exists():
        return []
    lines: list[dict[str, Any]] = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            lines.append(json.loads(line))
        except ValueError:
            continue
    return lines


def read_history(path: Path) -> list[dict[str, Any]]:
    """The same for readers that do not rewrite the file: lines of every version, under the names of today.

    The `seconds` of a phase are how long it lasted; those of any other line are the seconds in steps until then.
    """
    return [current(line) for line in read_metrics(path)]


def current(line: dict[str, Any]) -> dict[str, Any]:
    """A line under the names of today."""

    def now(names: dict[str, str], key: str) -> dict[str, Any]:
        value = line.get(key)
        return {key: names[value]} if isinstance(value, str) and value in names else {}

    line = {**line, **now(KINDS, "kind")}
    if line.get("kind") == "phase":
        line = {**line, **now(PHASES, "name"), "seconds": line.get("took", line.get("seconds"))}
    if line.get("kind") == "memory" and "before" in line:
        line = {**line, "baseline": line["before"]}
    return line
