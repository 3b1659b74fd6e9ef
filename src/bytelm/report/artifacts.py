"""What evaluation leaves in a run for its report: small JSON files, each with the step of the checkpoint it is of.

    held_out.json   bits per byte (an `evaluate.verdict.Verdict`, its split and step)
    model.json      what the model is, and its parameters
    patches.json    patch lengths by type of file, and passages with their boundaries
    samples.json    generated text, or completions of pictures and sound

Bytes are base64. Runs of older versions have the first file only, without a split and a step.
"""

from __future__ import annotations

import json
from base64 import b64decode, b64encode
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bytelm.data.files import write_whole
from bytelm.errors import CheckpointError
from bytelm.report.media import Completion
from bytelm.report.page import Sample
from bytelm.report.patches import PatchView

EVALUATION, MODEL, PATCHES, SAMPLES = "held_out.json", "model.json", "patches.json", "samples.json"


@dataclass(frozen=True)
class Inspection:
    """What a model is and does, from one look at it; fields of files that are not there are empty.

    `segmentation` is the patching scheme, "tokens", or empty; `lengths` are counts of patch lengths by type of file.
    `note` says why no picture or sound was sampled.
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


def keep_inspection(run: Path, found: Inspection) -> None:
    """Write an inspection into its run. Raises ResourceError where the disk refuses."""
    model = ("description", "segmentation", "parameters", "ngram_parameters")
    _write(run / MODEL, {"step": found.step, **{key: getattr(found, key) for key in model}})
    passages = [
        {
            "bytes": _text(view.data),
            "starts": view.starts,
            "entropies": view.entropies,
            "threshold": view.threshold,
        }
        for view in found.passages
    ]
    lengths = {"lengths_by_type": found.lengths, "passages": passages}
    _write(run / PATCHES, {"step": found.step, "split": found.split, **lengths})
    samples = {
        "continuations": [{"prompt": _text(s.prompt), "text": _text(s.text)} for s in found.samples],
        "completions": [
            {"original": _text(c.original), "prompt_bytes": c.given, "generated": _text(c.added)}
            for c in found.completions
        ],
        "unconditional": [_text(data) for data in found.free],
        "note": found.note,
    }
    _write(run / SAMPLES, {"step": found.step, "split": found.split, **samples})


def read_inspection(run: Path) -> Inspection:
    """The inspection in a run; what is not there is empty, and `step` is None unless all of it is of one step.

    Raises CheckpointError for a damaged file.
    """
    try:
        model, patches, samples = (_read(run / name) for name in (MODEL, PATCHES, SAMPLES))
        steps = {file.get("step") for file in (model, patches, samples)}
        return Inspection(
            steps.pop() if len(steps) == 1 else None,
            patches.get("split", samples.get("split", "")),
            **{key: value for key, value in model.items() if key != "step"},
            lengths={
                name: {int(length): count for length, count in counts.items()}
                for name, counts in patches.get("lengths_by_type", {}).items()
            },
            passages=[_passage(view) for view in patches.get("passages", [])],
            samples=[Sample(None, _bytes(s["prompt"]), _bytes(s["text"])) for s in samples.get("continuations", [])],
            completions=[
                Completion(_bytes(c["original"]), c["prompt_bytes"], _bytes(c["generated"]))
                for c in samples.get("completions", [])
            ],
            free=[_bytes(data) for data in samples.get("unconditional", [])],
            note=samples.get("note", ""),
        )
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        names = f"{MODEL}, {PATCHES} and {SAMPLES}"
        raise CheckpointError(f"{run}: {names} are damaged ({error}): delete them, and `bytelm report` again") from None


def keep_evaluation(run: Path, step: int, split: str, evaluation: Mapping[str, Any]) -> None:
    """Write an evaluation into its run. Raises ResourceError where the disk refuses."""
    _write(run / EVALUATION, {"step": step, "split": split, **evaluation})


def read_evaluation(run: Path) -> dict[str, Any]:
    """The evaluation in a run; empty if there is none. Raises CheckpointError for a damaged file."""
    try:
        return _read(run / EVALUATION)
    except ValueError as error:
        path = run / EVALUATION
        raise CheckpointError(f"{path} is damaged ({error}): evaluate again with `bytelm eval {run}`") from None


def _passage(view: Mapping[str, Any]) -> PatchView:
    data, starts = _bytes(view["bytes"]), set(view["starts"])
    return PatchView(data, [at in starts for at in range(len(data))], view["entropies"], view["threshold"])


def _write(path: Path, value: Mapping[str, Any]) -> None:
    write_whole(path, (json.dumps(value, indent=1) + "\n").encode())


def _read(path: Path) -> dict[str, Any]:
    value = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    if not isinstance(value, dict):
        raise ValueError("not a JSON object")
    return value


def _text(data: bytes) -> str:
    return b64encode(data).decode()


def _bytes(text: str) -> bytes:
    return b64decode(text)
