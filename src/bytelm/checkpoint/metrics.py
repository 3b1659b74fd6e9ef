"""metrics.jsonl: the training metrics of a run, one JSON object per line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

METRICS = "metrics.jsonl"

# What older runs call it → what it is called now.
KINDS = {"sitting": "session_start", "valid": "validation"}
PHASES = {
    "looks": "validation",
    "scorer": "fitting entropy model",
    "calibrating": "calibrating thresholds",
    "cutting patches": "computing patch boundaries",
    "tokens": "encoding",
}


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl; none if there is no such file. A line truncated by a crash is skipped."""
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

    `seconds` are those in steps until then, `duration` those that a phase lasted.
    """
    return [current(line) for line in read_metrics(path)]


def current(line: dict[str, Any]) -> dict[str, Any]:
    """A line under the names of today."""

    def now(names: dict[str, str], key: str) -> dict[str, Any]:
        value = line.get(key)
        return {key: names[value]} if isinstance(value, str) and value in names else {}

    line = {**line, **now(KINDS, "kind")}
    if line.get("kind") == "phase":
        line = {**line, **now(PHASES, "name"), "duration": line.get("took", line.get("duration"))}
    if line.get("kind") == "memory" and "before" in line:
        line = {**line, "baseline": line["before"]}
    return line
