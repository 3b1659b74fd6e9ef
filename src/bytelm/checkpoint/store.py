"""Checkpoints on disk: written atomically, and verified by checksums before they are read.

    run/checkpoints/
        step-00001000/           renamed to this name when it is complete
            model.safetensors    one file per group of tensors
            optimizer.safetensors
            state.json           all that is not a tensor
            MANIFEST.json        size and sha256 of the others, and sha256 of each tensor; written last
        step-00001000.old/       while a step is replaced: what it was before
        step-00002000.tmp-x1y2/  a write under way, or what a crash left of one: the next save removes it
        latest                   the name of the newest, for people and scripts: bytelm itself trusts manifests alone

A checkpoint is written aside, fsynced and renamed into place, so that a kill or a power cut leaves either the whole of
it or nothing. Nothing is ever pickled.
"""

from __future__ import annotations

import json
import re
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from bytelm.checkpoint import legacy, manifest
from bytelm.checkpoint.manifest import FORMAT, MANIFEST, check, check_size, entry_of, opened, verify
from bytelm.checkpoint.parts import is_sharded, own_tensors
from bytelm.checkpoint.tensors import Keep, Stored, as_it_is, header, like, pieces, read
from bytelm.checkpoint.writing import write
from bytelm.data.files import linked, sync_folder
from bytelm.device import out_of_memory
from bytelm.errors import CheckpointError, ConfigError, ResourceError
from bytelm.units import show_bytes

__all__ = ["FORMAT", "MANIFEST", "entry_of", "verify"]  # beside what is defined here

T = TypeVar("T")
STATE = "state.json"
OPTIMIZER = "optimizer"  # the group of tensors that only resuming reads
KEEP = 2  # the fewest to keep: the newest may turn out damaged
NEW = "new"  # what is to be published, in a folder of `begin`
ROWS = 20  # of a table of differences
PIECE = 1 << 20  # values that are checked together
TRIES = 10  # to read the newest of a training that goes on


# ---- writing ----


def save(run: Path, step: int, tensors: Mapping[str, Stored], state: Mapping[str, Any], keep: int = KEEP) -> Path:
    """Write `run/checkpoints/step-<step>` with one file per group of `tensors`, and return its path.

    Tensors may be on any device, share memory and have any strides, or be read while they are written. `state` is plain
    JSON; `step` is added to it. The `keep` newest checkpoints up to this step stay. Later ones are never deleted: where
    resuming skipped a damaged one, the run will come by and replace it. `run` must exist, and only one job may save in
    it at a time (`checkpoint.lock`). Raises ResourceError where the disk refuses; the checkpoints there were are then
    as before. A state that is not plain JSON (NaN is not) is a ValueError or TypeError before the disk is touched.
    """
    check_keep(keep)
    final = place(run, step)
    text = state_text(step, state)
    headers = {group: header(members) for group, members in tensors.items()}
    needed = (
        len(text) + sum(map(len, headers.values())) + sum(like(t).nbytes for g in tensors.values() for t in g.values())
    )
    aside: Path | None = None
    try:
        aside = begin(run, final)
        files = {STATE: write(aside / NEW / STATE, [("", text)])}
        for group, members in tensors.items():
            file = aside / NEW / f"{group}.safetensors"
            files[file.name] = write(file, pieces(headers[group], members))
        finish(aside, final, manifest.text(step, files), keep)
    except OSError as error:
        raise ResourceError(refusal(final, error, needed)) from error
    finally:
        discard(aside)
    return final


def keep_weights(run: Path) -> None:
    """Leave of a run's checkpoints the newest alone, and of that what loads the model: it cannot be resumed any more.

    For trainings that are over and are looked at from now on: moments are two thirds of a checkpoint. It is replaced as
    by `save`. Raises CheckpointError and ResourceError.
    """
    final = newest(run, closely=False)
    kept = {name: entry for name, entry in manifest.files(final).items() if not _is_of(name, OPTIMIZER)}
    aside: Path | None = None
    try:
        aside = begin(run, final)
        for name in kept:
            linked(final / name, aside / NEW / name)
        finish(aside, final, manifest.text(_step(final), kept), keep=1)
    except OSError as error:
        raise ResourceError(f"cannot reduce {final} to its weights: {error.strerror or error}") from error
    finally:
        discard(aside)


def check_keep(keep: int) -> None:
    """Raises ConfigError for too few checkpoints to keep."""
    if keep < KEEP:
        raise ConfigError(f"cannot keep {keep} checkpoints: at least {KEEP}, because the newest may be damaged")


def place(run: Path, step: int) -> Path:
    """Where the checkpoint of a step belongs."""
    return run / "checkpoints" / f"step-{step:08d}"


def state_text(step: int, state: Mapping[str, Any]) -> bytes:
    """The content of state.json. Raises ValueError or TypeError where it is not plain JSON."""
    return json.dumps({**state, "step": step}, indent=1, allow_nan=False).encode()


def begin(run: Path, final: Path) -> Path:
    """A folder beside `final` to write in, with an empty one `NEW` inside; what dead saves left is removed.

    `finish` publishes it; `discard` removes what is left of it, and is called in any case. Raises OSError.
    """
    home = final.parent
    home.mkdir(exist_ok=True)
    sync_folder(run)
    for dead in home.glob("*.tmp-*"):
        shutil.rmtree(dead)
    aside = Path(tempfile.mkdtemp(prefix=f"{final.name}.tmp-", dir=home))
    try:
        (aside / NEW).mkdir()
    except OSError:
        discard(aside)
        raise
    return aside


def finish(aside: Path, final: Path, text: bytes, keep: int) -> None:
    """Add the manifest, publish `aside / NEW` as `final`, and remove all but the `keep` newest up to it.

    All its other files must be on the disk. Raises OSError.
    """
    write(aside / NEW / MANIFEST, [("", text)])
    sync_folder(aside / NEW)
    # Written before anything is renamed: from here on the disk can no longer be too full.
    write(aside / "latest", [("", f"{final.name}\n".encode())])
    _publish(aside, final)
    for path in [p for p in checkpoints(final.parent.parent) if _step(p) <= _step(final)][:-keep]:
        path.rename(aside / path.name)  # in one move, so that half a checkpoint is never left standing


def discard(aside: Path | None) -> None:
    """Remove what is left of a folder of `begin`; None: there is none."""
    if aside is not None:
        shutil.rmtree(aside, ignore_errors=True)


def refusal(final: Path, error: OSError, needed: int, who: str = "") -> str:
    """The message of a save that the disk refused."""
    return (
        f"cannot save step {_step(final)} to {final}: {who}{error.strerror or error}; it needs {show_bytes(needed)}: "
        "make room or move the run to another disk (earlier checkpoints are intact)"
    )


def _publish(aside: Path, final: Path) -> None:
    """Move `aside / NEW` to `final`, then `aside/latest` beside it; at every instant the old or the new one exists."""
    home = final.parent
    old = home / f"{final.name}.old"
    if final.exists():
        if old.exists():
            old.rename(aside / "older")
        final.rename(old)
    (aside / NEW).rename(final)
    sync_folder(home)
    (aside / "latest").replace(home / "latest")
    sync_folder(home)
    if old.exists():
        old.rename(aside / "old")


# ---- finding ----


def checkpoints(run: Path) -> list[Path]:
    """The published checkpoints of a run, oldest first, sound or not: one without a manifest is damaged as well."""
    home = run / "checkpoints"
    found = [p for p in home.iterdir() if _step(p) >= 0 and p.is_dir()] if home.is_dir() else []
    return sorted(found, key=lambda path: (_step(path), path.suffix != ".old"))


def unfinished(path: Path) -> bool:
    """Whether a path is the folder of checkpoints of a run that was ended while it saved its first."""
    return path.name == "checkpoints" and path.is_dir() and all(".tmp-" in inside.name for inside in path.iterdir())


def newest_good(run: Path, *, closely: bool = True) -> tuple[Path, list[str]]:
    """The newest checkpoint that verifies, and one line for each newer one that does not: what resuming wants.

    `closely`: see `verify`. Raises CheckpointError if there is none.
    """
    return first_good(run, checkpoints(run), lambda path: verify(path, closely=closely))


def first_good(run: Path, found: Sequence[Path], verify: Callable[[Path], None]) -> tuple[Path, list[str]]:
    """See `newest_good`: the last of the checkpoints `found` for which `verify` raises no CheckpointError."""
    passed_over: list[str] = []
    for path in reversed(found):
        try:
            verify(path)
        except CheckpointError as error:
            passed_over.append(str(error))
        else:
            return path, passed_over
    if passed_over:
        raise CheckpointError(f"no intact checkpoint in {run}: retrain ({'; '.join(passed_over)})")
    raise CheckpointError(f"no checkpoint in {run}: name the directory of a run that has saved one")


def newest(run: Path, *, closely: bool = True) -> Path:
    """The newest checkpoint; CheckpointError if it does not verify, rather than an older model unasked."""
    path, passed_over = newest_good(run, closely=closely)
    if passed_over:
        raise CheckpointError(f"{passed_over[0]}; the latest intact one is {path}: name it instead, or resume the run")
    return path


def settled(run: Path, read: Callable[[], T]) -> T:
    """What `read` gives of the newest checkpoint; again, a few times, where a training has removed it meanwhile."""
    for _ in range(TRIES - 1):
        before = checkpoints(run)
        try:
            return read()
        except (CheckpointError, OSError):
            if all(path.is_dir() for path in before):
                raise
    return read()


def newest_state(run: Path, *, closely: bool = True) -> tuple[Path, dict[str, Any]]:
    """The newest checkpoint and its state, also while a training saves; it raises as `newest` and `read_state` do."""

    def found() -> tuple[Path, dict[str, Any]]:
        path = newest(run, closely=closely)
        return path, read_state(path)

    return settled(run, found)


def _step(path: Path) -> int:
    """The step in a checkpoint's name; -1 for any other name."""
    match = re.fullmatch(r"step-(\d{8,})(\.old)?", path.name)
    return int(match[1]) if match else -1


# ---- reading ----


def read_tensors(path: Path, group: str, keep: Keep = as_it_is) -> dict[str, Tensor]:
    """The tensors of one group, on the CPU, each in memory of its own, or what is to `keep` of each; nothing beside.

    Weights in int8 with the scales of their rows are restored to float32. Raises CheckpointError if the file differs
    from the manifest or is not a safetensors file. What is returned are the very bytes that were checked.
    """
    if is_sharded(path, group):
        return {name: keep(name, tensor.read()) for name, tensor in own_tensors(path, group).items()}
    name = f"{group}.safetensors"
    entry = entry_of(path, name)
    with opened(path / name) as stream:
        check_size(path / name, stream, entry)
        try:
            tensors, digest = read(stream, entry.size, keep)
        except (ValueError, RuntimeError, OverflowError) as error:  # RuntimeError: a shape that torch refuses
            if out_of_memory(error):
                raise
            stream.seek(0)
            check(path / name, stream, entry)  # of a file that was damaged, this says so
            raise CheckpointError(
                f"{path / name} is not a safetensors file that can be read: {str(error).splitlines()[0]}"
            ) from error
    if digest != entry.sha256:
        raise CheckpointError(f"{path / name} is damaged: its checksum is not that in {MANIFEST}")
    return {legacy.tensor_name(name): tensor for name, tensor in tensors.items()}


def resumable(path: Path) -> bool:
    """Whether a checkpoint has more than weights (see `keep_weights`). Raises CheckpointError without a manifest."""
    return any(_is_of(name, OPTIMIZER) for name in manifest.files(path))


def _is_of(name: str, group: str) -> bool:
    """Whether a file has tensors of a group, or the index of such a file."""
    return re.match(rf"{group}[.-]", name) is not None


def read_state(path: Path) -> dict[str, Any]:
    """What was given to `save` as `state`, and `step`. Raises CheckpointError as `read_tensors` does."""
    return legacy.state(manifest.json_object(path / STATE, manifest.read(path, STATE)))


# ---- comparing ----


def check_keys(expected: Mapping[str, Tensor], found: Mapping[str, Tensor], where: Path | str) -> None:
    """Check that the tensors `found` in `where` are those `expected` in names, shapes and dtypes, and all finite.

    Tensors without memory are not asked for their values.
    Raises CheckpointError with a table of at most 20 differences.
    """
    rows: list[str] = []
    for name in sorted(expected.keys() | found.keys()):
        want, have = expected.get(name), found.get(name)
        if have is None:
            rows.append(f"missing     {name}  {kind(want)}")
        elif want is None:
            rows.append(f"unexpected  {name}  {kind(have)}")
        elif want.shape != have.shape:
            rows.append(f"shape       {name}  {kind(have)}, not {kind(want)}")
        elif want.dtype != have.dtype:
            rows.append(f"dtype       {name}  {kind(have)}, not {kind(want)}")
        elif not have.is_meta and have.is_floating_point() and (bad := not_finite(have)):
            rows.append(bad_values(name, bad, have.numel()))
    if rows:
        refuse(where, rows)


def refuse(where: Path | str, rows: list[str]) -> None:
    """Raises CheckpointError with a table of what is wrong with the tensors of a model."""
    if len(rows) > ROWS:
        rows[ROWS - 1 :] = [f"… and {len(rows) - ROWS + 1} more"]
    raise CheckpointError("\n  ".join([f"{where} does not hold the weights of this model:", *rows]))


def bad_values(name: str, bad: int, count: int) -> str:
    """The row of a tensor of which some values are not finite."""
    return f"not finite  {name}  NaN or Inf in {bad} of {count} values"


def not_finite(tensor: Tensor) -> int:
    """How many values are NaN or infinite, counted piece by piece: a table of all answers would double a large one."""
    bad = 0
    for piece in tensor.detach().reshape(-1).split(PIECE):
        # The extremes tell it at memory bandwidth: a NaN is both.
        if piece.numel() and not torch.stack(torch.aminmax(piece)).isfinite().all():
            bad += int((~piece.isfinite()).sum())
    return bad


def kind(tensor: Tensor | None) -> str:
    """The dtype and shape of a tensor, in words."""
    return "" if tensor is None else f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"
