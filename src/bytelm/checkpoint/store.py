"""Checkpoints on disk: written atomically, and verified by checksums before they are read.

    run/checkpoints/
        step-00001000/           complete if and only if it has a MANIFEST.json
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

import contextlib
import hashlib
import importlib.metadata
import io
import json
import re
import shutil
import tempfile
from collections.abc import Generator, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from bytelm.checkpoint import legacy
from bytelm.checkpoint.tensors import Keep, Stored, as_it_is, header, like, pieces, read
from bytelm.checkpoint.writing import Entry, write
from bytelm.data.files import sync_folder
from bytelm.device import out_of_memory
from bytelm.errors import CheckpointError, ConfigError, ResourceError
from bytelm.units import show_bytes

FORMAT = 2  # of the directory; a reader refuses a higher one
MANIFEST = "MANIFEST.json"
STATE = "state.json"
KEEP = 2  # the fewest to keep: the newest may turn out damaged
ROWS = 20  # of a table of differences
PIECE = 1 << 20  # values that are checked together
MOST_TEXT = 1 << 26  # bytes of a JSON file: a larger one is not ours, and would be read whole


# ---- writing ----


def save(run: Path, step: int, tensors: Mapping[str, Stored], state: Mapping[str, Any], keep: int = KEEP) -> Path:
    """Write `run/checkpoints/step-<step>` with one file per group of `tensors`, and return its path.

    Tensors may be on any device, share memory and have any strides, or be read while they are written. `state` is plain
    JSON; `step` is added to it. The `keep` newest checkpoints up to this step stay. Later ones are never deleted: where
    resuming skipped a damaged one, the run will come by and replace it. `run` must exist, and only one job may save in
    it at a time (`checkpoint.lock`). Raises ResourceError where the disk refuses; the checkpoints there were are then
    as before. A state that is not plain JSON (NaN is not) is a ValueError or TypeError before the disk is touched.
    """
    if keep < KEEP:
        raise ConfigError(f"cannot keep {keep} checkpoints: at least {KEEP}, because the newest may be damaged")
    home = run / "checkpoints"
    final = home / f"step-{step:08d}"
    text = json.dumps({**state, "step": step}, indent=1, allow_nan=False).encode()
    headers = {group: header(members) for group, members in tensors.items()}
    needed = (
        len(text) + sum(map(len, headers.values())) + sum(like(t).nbytes for g in tensors.values() for t in g.values())
    )
    try:
        home.mkdir(exist_ok=True)
        sync_folder(run)
        for dead in home.glob("*.tmp-*"):
            shutil.rmtree(dead)
        with tempfile.TemporaryDirectory(prefix=f"{final.name}.tmp-", dir=home, ignore_cleanup_errors=True) as name:
            aside = Path(name)
            new = aside / "new"
            new.mkdir()
            files = {STATE: write(new / STATE, [("", text)])}
            for group, members in tensors.items():
                file = new / f"{group}.safetensors"
                files[file.name] = write(file, pieces(headers[group], members))
            write(new / MANIFEST, [("", _manifest_text(step, files))])
            sync_folder(new)
            # Written before anything is renamed: from here on the disk can no longer be too full.
            write(aside / "latest", [("", f"{final.name}\n".encode())])
            _publish(aside, final)
            for path in [p for p in checkpoints(run) if _step(p) <= step][:-keep]:
                path.rename(aside / path.name)  # in one move, so that half a checkpoint is never left standing
    except OSError as error:
        raise ResourceError(
            f"cannot save step {step} to {final}: {error.strerror or error}; it needs {show_bytes(needed)}: make room "
            f"or move the run to another disk (earlier checkpoints are intact)"
        ) from error
    return final


def _publish(aside: Path, final: Path) -> None:
    """Move `aside/new` to `final`, then `aside/latest` beside it; at every instant the old or the new one exists."""
    home = final.parent
    old = home / f"{final.name}.old"
    if final.exists():
        if old.exists():
            old.rename(aside / "older")
        final.rename(old)
    (aside / "new").rename(final)
    sync_folder(home)
    (aside / "latest").replace(home / "latest")
    sync_folder(home)
    if old.exists():
        old.rename(aside / "old")


def _manifest_text(step: int, files: Mapping[str, Entry]) -> bytes:
    try:
        version = importlib.metadata.version("bytelm")
    except importlib.metadata.PackageNotFoundError:  # run from a source tree
        version = "unknown"
    body: dict[str, Any] = {"format": FORMAT, "bytelm": version, "step": step}
    body["files"] = {name: entry.table() for name, entry in files.items()}
    return json.dumps({**body, "sha256": _digest(body)}, indent=1).encode()


def _digest(body: Mapping[str, Any]) -> str:
    """The manifest's checksum of itself: without it, damage there would be blamed on another file or go unseen."""
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


# ---- finding ----


def checkpoints(run: Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first; that they are complete does not say that they are sound."""
    home = run / "checkpoints"
    found = [p for p in home.iterdir() if _step(p) >= 0 and (p / MANIFEST).exists()] if home.is_dir() else []
    return sorted(found, key=lambda path: (_step(path), path.suffix != ".old"))


def unfinished(path: Path) -> bool:
    """Whether a path is the folder of checkpoints of a run that was ended while it saved its first."""
    return path.name == "checkpoints" and path.is_dir() and all(".tmp-" in inside.name for inside in path.iterdir())


def newest_good(run: Path, *, closely: bool = True) -> tuple[Path, list[str]]:
    """The newest checkpoint that verifies, and one line for each newer one that does not: what resuming wants.

    `closely`: see `verify`. Raises CheckpointError if there is none.
    """
    passed_over: list[str] = []
    for path in reversed(checkpoints(run)):
        try:
            verify(path, closely=closely)
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


def _step(path: Path) -> int:
    """The step in a checkpoint's name; -1 for any other name."""
    match = re.fullmatch(r"step-(\d{8,})(\.old)?", path.name)
    return int(match[1]) if match else -1


# ---- reading ----


def verify(path: Path, *, closely: bool = True) -> None:
    """Check every file of a checkpoint against its manifest. Raises CheckpointError naming the file and its fault.

    `closely`: by checksums. Otherwise the manifest by its own, and of other files their sizes, which reads no weights:
    whoever reads them then checks what it reads.
    """
    files = _files(path)
    # Desktops and network disks create dot files anywhere; they are ignored.
    found = {p.name for p in path.iterdir() if not p.name.startswith(".")} - {MANIFEST}
    for name in sorted(files.keys() - found):
        raise CheckpointError(f"{path / name} is missing, though {MANIFEST} names it")
    for name in sorted(found - files.keys()):
        raise CheckpointError(f"{path / name} is not listed in {MANIFEST}: remove it")
    for name, entry in files.items():
        with _open(path / name) as stream:
            (_check if closely else _check_size)(path / name, stream, entry)


def read_tensors(path: Path, group: str, keep: Keep = as_it_is) -> dict[str, Tensor]:
    """The tensors of one group, on the CPU, each in memory of its own, or what is to `keep` of each; nothing beside.

    Weights in int8 with the scales of their rows are restored to float32. Raises CheckpointError if the file differs
    from the manifest or is not a safetensors file. What is returned are the very bytes that were checked.
    """
    name = f"{group}.safetensors"
    entry = entry_of(path, name)
    with _open(path / name) as stream:
        _check_size(path / name, stream, entry)
        try:
            tensors, digest = read(stream, entry.size, keep)
        except (ValueError, RuntimeError, OverflowError) as error:  # RuntimeError: a shape that torch refuses
            if out_of_memory(error):
                raise
            stream.seek(0)
            _check(path / name, stream, entry)  # of a file that was damaged, this says so
            raise CheckpointError(
                f"{path / name} is not a safetensors file that can be read: {str(error).splitlines()[0]}"
            ) from error
    if digest != entry.sha256:
        raise CheckpointError(f"{path / name} is damaged: its checksum is not that in {MANIFEST}")
    return {legacy.tensor_name(name): tensor for name, tensor in tensors.items()}


def read_state(path: Path) -> dict[str, Any]:
    """What was given to `save` as `state`, and `step`. Raises CheckpointError as `read_tensors` does."""
    return legacy.state(_object(path / STATE, _read(path, STATE)))


def _read(path: Path, name: str) -> bytes:
    """One file of a checkpoint, checked."""
    entry = entry_of(path, name)
    with _open(path / name) as stream:
        _check_size(path / name, stream, entry)
        data = _whole(path / name, stream)
    _check(path / name, io.BytesIO(data), entry)
    return data


def entry_of(path: Path, name: str) -> Entry:
    """What the manifest of a checkpoint says of one of its files. Raises CheckpointError, also if it has no such file.

    Of each tensor the checksum is that of its bytes; older checkpoints have none.
    """
    files = _files(path)
    if name not in files:
        raise CheckpointError(f"{path} has no {name}: it has {', '.join(sorted(files))}")
    return files[name]


def _files(path: Path) -> dict[str, Entry]:
    """The manifest of a checkpoint: name → size and checksum."""
    file = path / MANIFEST
    with _open(file) as stream:
        body = _object(file, _whole(file, stream))
    version = body.get("format")
    if isinstance(version, int) and version > FORMAT:
        raise CheckpointError(
            f"{path} was made by a newer bytelm: format {version}, this one reads up to {FORMAT}: upgrade bytelm"
        )
    if body.pop("sha256", None) != _digest(body):
        raise CheckpointError(f"{file} is damaged: its own checksum does not fit")
    try:
        return {name: Entry.of(entry) for name, entry in body["files"].items()}
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{file} is not a manifest: {error!r}") from error


def _check(file: Path, stream: io.BufferedReader | io.BytesIO, entry: Entry) -> None:
    """Compare size and checksum of a file, of which `stream` gives the bytes, with its entry in the manifest."""
    _check_size(file, stream, entry)
    if hashlib.file_digest(stream, "sha256").hexdigest() != entry.sha256:
        raise CheckpointError(f"{file} is damaged: its checksum is not that in {MANIFEST}")


def _check_size(file: Path, stream: io.BufferedReader | io.BytesIO, entry: Entry) -> None:
    """Compare the size of a file alone, and go back to its start."""
    size = stream.seek(0, io.SEEK_END)
    if size != entry.size:
        which = "cut short" if size < entry.size else "too long"
        raise CheckpointError(f"{file} is {which}: {MANIFEST} says {entry.size} bytes")
    stream.seek(0)


@contextlib.contextmanager
def _open(file: Path) -> Generator[io.BufferedReader]:
    """Open a file of a checkpoint; whatever the disk refuses is a CheckpointError that names the file."""
    try:
        if not file.is_file():  # opening a pipe would wait for ever
            raise CheckpointError(f"{file} is {'not a plain file' if file.exists() else 'missing'}")
        with file.open("rb") as stream:
            yield stream
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read: {error.strerror or error}") from error


def _whole(file: Path, stream: io.BufferedReader) -> bytes:
    """All of a JSON file, if it is of a size that one has."""
    data = stream.read(MOST_TEXT + 1)
    if len(data) > MOST_TEXT:
        raise CheckpointError(f"{file} is too long: more than {show_bytes(MOST_TEXT)}, which no {file.name} has")
    return data


def _object(file: Path, data: bytes) -> dict[str, Any]:
    """The JSON object in `data`, which was read from `file`."""
    try:
        value = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{file} is damaged: it is not JSON ({error})") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{file} is damaged: it is not a JSON object")
    return cast("dict[str, Any]", value)


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
