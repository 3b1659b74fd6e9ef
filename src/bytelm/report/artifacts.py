"""JSON files of evaluation and inspection in a run, for its report, each with the step of its checkpoint.

    held_out.json   bits per byte: an `evaluate.verdict.EvalReport`, its split and step
    model.json      description of the model, parameters
    patches.json    patch lengths by file type, passages with boundaries
    samples.json    generated text, or completions of pictures and sound

Bytes are {"base64": "..."}. Runs of older versions have the first file only, without a split and a step.
"""

from __future__ import annotations

import json
from base64 import b64decode, b64encode
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from bytelm.data.files import write_whole
from bytelm.errors import CheckpointError, DataError
from bytelm.report.media import Completion
from bytelm.report.page import Sample
from bytelm.report.patches import PatchView

EVALUATION, MODEL, PATCHES, SAMPLES = "held_out.json", "model.json", "patches.json", "samples.json"


@dataclass(frozen=True)
class Inspection:
    """An inspection of a model; fields of missing files are empty.

    `segmentation`: the patching scheme, "tokens", or empty. `lengths`: counts of patch lengths by file type. `note`:
    why no picture or sound was sampled.
    """

    step: int | None = None
    split: str = ""
    description: str = ""
    segmentation: str = ""
    parameters: int = 0
    ngram_parameters: int = 0
    lengths: Mapping[str, Mapping[int, int]] = field(default_factory=dict[str, Mapping[int, int]])
    passages: Sequence[PatchView] = ()
    samples: Sequence[Sample] = ()
    completions: Sequence[Completion] = ()
    free: Sequence[bytes] = ()
    note: str = ""


FILES = {
    MODEL: ("description", "segmentation", "parameters", "ngram_parameters"),
    PATCHES: ("split", "lengths", "passages"),
    SAMPLES: ("split", "samples", "completions", "free", "note"),
}
_LISTS = {"passages": PatchView, "samples": Sample, "completions": Completion}


def keep_inspection(run: Path, found: Inspection) -> None:
    """Write an inspection into its run. Raises ResourceError on disk errors."""
    values = asdict(found)
    for name, keys in FILES.items():
        _write(run / name, {"step": found.step, **{key: values[key] for key in keys}})


def read_inspection(run: Path) -> Inspection:
    """The inspection in a run; `step` is None unless all files are of one step. Raises CheckpointError if damaged."""
    try:
        files = [_read(run / name) for name in FILES]
        steps = {file.get("step") for file in files}
        values: dict[str, Any] = {key: value for file in files for key, value in file.items()}
        for key, kind in _LISTS.items():
            values[key] = [kind(**value) for value in values.get(key, [])]
        values["lengths"] = {
            name: {int(length): count for length, count in counts.items()}
            for name, counts in values.get("lengths", {}).items()
        }
        values["step"] = steps.pop() if len(steps) == 1 else None
        return Inspection(**values)
    except (ValueError, TypeError, AttributeError, DataError) as error:
        names = ", ".join(FILES)
        raise CheckpointError(f"{run}: {names} are damaged ({error}): delete them, and `bytelm report` again") from None


def keep_evaluation(run: Path, step: int, split: str, evaluation: Mapping[str, Any]) -> None:
    """Write an evaluation into its run. Raises ResourceError on disk errors."""
    _write(run / EVALUATION, {"step": step, "split": split, **evaluation})


def read_evaluation(run: Path) -> dict[str, Any]:
    """The evaluation in a run; empty if there is none. Raises CheckpointError if damaged."""
    try:
        return _read(run / EVALUATION)
    except ValueError as error:
        path = run / EVALUATION
        raise CheckpointError(f"{path} is damaged ({error}): evaluate again with `bytelm eval {run}`") from None


def _write(path: Path, value: Mapping[str, Any]) -> None:
    text = json.dumps(value, indent=1, default=lambda data: {"base64": b64encode(data).decode()})
    write_whole(path, f"{text}\n".encode())


def _read(path: Path) -> dict[str, Any]:
    def decoded(value: dict[str, Any]) -> Any:
        return b64decode(value["base64"]) if value.keys() == {"base64"} else value

    value = json.loads(path.read_text(encoding="utf-8"), object_hook=decoded) if path.exists() else {}
    if not isinstance(value, dict):
        raise ValueError("not a JSON object")
    return value
