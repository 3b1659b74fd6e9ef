"""Models of transformers in a comparison: not trained, and evaluated on the held-out segments that all others are.

HOME/foreign         the result of each, by the content of its folder and of the segments
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from bytelm.compare.held_out import kept
from bytelm.compare.worker import HELD_OUT
from bytelm.data.files import sha256_of, write_whole
from bytelm.data.names import after_prefix
from bytelm.device import called
from bytelm.errors import CheckpointError, UsageError
from bytelm.evaluate.bits import measure
from bytelm.evaluate.costs import sizes
from bytelm.robust.columns import foreign_identity
from bytelm.training.journal import Journal
from bytelm.training.stop import StopRequest
from bytelm.units import LN2, show_bytes

if TYPE_CHECKING:
    from bytelm.hf.foreign import Foreign

KEPT = "foreign"


def check(names: Sequence[str]) -> None:
    """Raises UsageError for a model that is named twice, MissingExtraError for one without transformers."""
    known: dict[str, str] = {}
    for name in names:
        path = Path(after_prefix(name) or name)
        place = str(path.resolve()) if path.is_dir() else name
        if place in known:
            raise UsageError(f"--models: {known[place]} and {name} are one model: name it once")
        known[place] = name
    if names:
        import bytelm.hf  # noqa: F401  # pyright: ignore[reportUnusedImport]


def evaluated(
    names: Sequence[str], home: Path, device: torch.device, journal: Journal, *, dry: bool
) -> list[dict[str, Any]]:
    """The results of models, kept or measured now; `dry`: only their sizes.

    Raises CheckpointError and ResourceError as `load_foreign` does, DataError for segments that a tokenizer cannot
    read, Interrupted by a signal.
    """
    from bytelm.hf.foreign import load_foreign

    found: list[dict[str, Any]] = []
    for name in names:
        StopRequest.check()
        journal.progress(f"loading {name}", force=True)
        model, context = load_foreign(name, device)
        counted = sizes(model)
        about = {"model": name, "parameters": counted.parameters, "tables": counted.tables}
        found.append(about if dry else about | result_of(name, model, context, home, journal))
        del model
        if device.type == "cuda":
            torch.cuda.empty_cache()  # for the trainings that follow
    return found


def result_of(name: str, model: Foreign, context: int, home: Path, journal: Journal) -> dict[str, Any]:
    """What was measured of a model on the segments: kept under a name that has whatever it depends on."""
    key = json.dumps([foreign_identity(name, model), context, sha256_of(home / HELD_OUT)])
    path = home / KEPT / f"{hashlib.sha256(key.encode()).hexdigest()[:16]}.json"
    if not path.exists():
        path.parent.mkdir(exist_ok=True)
        write_whole(path, json.dumps(measured(name, model, context, home, journal)).encode())
    return json.loads(path.read_bytes())


def measured(name: str, model: Foreign, context: int, home: Path, journal: Journal) -> dict[str, Any]:
    """Bits of each segment in windows of `context` tokens, and what the tokens do not give back of them."""
    from bytelm.hf.verdict import survey

    segments = kept(home / HELD_OUT)
    lost = survey(model.tokens, [(f"held-out document {number}", data) for number, data in segments])
    total = sum(len(data) for _, data in segments)
    documents = ((str(number), data) for number, data in segments)
    progress = progress_of(name, total, journal)
    found = list(measure(model, documents, context=context, batch=model.batch(context), progress=progress))
    bits = math.fsum(document.nats for document in found) / LN2
    if not math.isfinite(bits):
        raise CheckpointError(f"{name} gives probabilities that are not finite on the held-out bytes")
    bound = lost.bound(bits, total)
    return {
        "context": context,
        "tokenizer": type(model.tokens.tokenizer).__name__,
        "vocabulary": model.tokens.width,
        "patch_size": total / max(1, lost.tokens),
        "documents": [[document.name, document.bytes, document.nats] for document in found],
        "exact": not lost.changed,
        "bits_per_byte_bound": bound,
        "survey": asdict(lost),
        "lost": lost.lines(len(found), bound),
        "threads": torch.get_num_threads(),
        "device": called(model.device),
    }


def progress_of(name: str, total: int, journal: Journal) -> Callable[[int], None]:
    """What shows how many of `total` bytes are done. It raises Interrupted once a signal was received."""
    done = 0

    def progress(more: int) -> None:
        nonlocal done
        done += more
        journal.progress(f"evaluating {name}: {show_bytes(done)} of {show_bytes(total)}")
        StopRequest.check()

    return progress
