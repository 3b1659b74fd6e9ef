"""Import published weights as a run, and export them; see `exchange.format` for layouts."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bytelm.checkpoint import store
from bytelm.checkpoint.assemble import Recipe, resolve_checkpoint, weights_of
from bytelm.checkpoint.tensors import Stored, like
from bytelm.config import build, merge, to_mapping
from bytelm.errors import CheckpointError, ResourceError
from bytelm.exchange import files
from bytelm.exchange.format import Reading, find_layout
from bytelm.exchange.rounding import Kind, Precision, rounded
from bytelm.machine import disk
from bytelm.units import show_bytes


@dataclass(frozen=True)
class Converted:
    """A run that was converted, or would be: its parameters, and its context length in bytes."""

    parameters: int
    context: int
    table: list[tuple[str, str, str]]
    """Of each source tensor its name, dtype and shape, and our name; "" if it is left out."""


def convert(
    source: Path,
    layout: str,
    run: Path,
    sets: Mapping[str, Any],
    *,
    weights: Kind | None = None,
    tables: Kind | None = None,
    dry_run: bool = False,
) -> Converted:
    """Make a run from published weights, in their precision; it must not exist yet. They are never held as a whole.

    `sets` overrides or adds to what the source says of the recipe, or of what the layout names. `weights` and `tables`:
    the precision of linear layers and of n-gram tables, see `exchange.rounding`. A `dry_run` compares names and shapes,
    and writes nothing. Raises as `Format.read` does, and ResourceError on disk errors.
    """
    fresh(run)
    with ExitStack() as stack:
        reading = find_layout(layout).read(source, sets, stack)
        model = reading.recipe.build_on_meta()
        asked = Precision(weights, tables)
        kinds = asked.of(model)
        if not dry_run:
            origin = {"from": layout, "name": reading.name, **asked.said()}
            keep(run, reading, rounded(reading.tensors(), kinds), origin)
        count = sum(like.numel() for like in model.state_dict().values())
        return Converted(count, reading.context, reading.table)


def keep(run: Path, reading: Reading, ours: Stored, origin: Mapping[str, str]) -> None:
    """Write the one checkpoint of a run. Raises ResourceError, and then leaves nothing behind."""
    state = {"recipe": to_mapping(reading.recipe), "context": reading.context, "bytes": 0, "seconds": 0.0, "skipped": 0}
    state |= {"converted": dict(origin)}
    needed, free = sum(like(tensor).nbytes for tensor in ours.values()), disk(run)
    if needed > free:
        raise ResourceError(
            f"{run} would take {show_bytes(needed)}, and the disk has {show_bytes(free)}: make room, name another "
            "place, or store less (--weights int8, --tables int8)"
        )
    made = [folder for folder in (run, *run.parents) if not folder.exists()]
    try:
        run.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ResourceError(f"cannot make {run} ({error.strerror}): name another place") from error
    try:
        store.save(run, 0, {"model": ours}, state)
    except BaseException:
        shutil.rmtree(run / "checkpoints", ignore_errors=True)  # so that the command can be repeated
        with contextlib.suppress(OSError):
            for folder in made:
                folder.rmdir()
        raise


def fresh(path: Path) -> None:
    """Raises CheckpointError if the path exists."""
    if path.exists() and (not path.is_dir() or any(not store.unfinished(inside) for inside in path.iterdir())):
        raise CheckpointError(f"{path} already exists: name a new folder")


# --- export -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Exported:
    """An exported folder: its parameters, and its modality ("": raw bytes)."""

    parameters: int
    modality: str


def export(run: Path, layout: str, folder: Path, sets: Mapping[str, Any]) -> Exported:
    """Write the newest checkpoint of a run in another project's layout.

    `sets` is merged into the recipe first. Raises CheckpointError, ConfigError for what the layout does not support,
    and ResourceError; `folder` is then unchanged.
    """
    fresh(folder)
    written = find_layout(layout)
    checkpoint, state = resolve_checkpoint(run)
    recipe = build(Recipe, merge(state["recipe"], sets), str(checkpoint / store.STATE))
    ours = weights_of(checkpoint)
    build_on_meta = recipe.build_on_meta().state_dict()
    expected = {name: like.to(ours[name].dtype) if name in ours else like for name, like in build_on_meta.items()}
    store.check_keys(expected, ours, str(checkpoint))
    try:
        written.write(folder, recipe, int(state["context"]), ours)
    except (OSError, RuntimeError) as error:  # RuntimeError: torch.save where the disk is full
        reason = getattr(error, "strerror", None) or files.first_line(error)
        raise ResourceError(f"cannot write {folder} ({reason}): make room, or name another place") from error
    return Exported(
        sum(t.numel() for t in ours.values()), to_mapping(recipe)["modality"]["name"] if recipe.modality else ""
    )
