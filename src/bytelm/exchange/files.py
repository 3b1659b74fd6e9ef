"""Untrusted files of other projects: safetensors (single or sharded), PyTorch's own, JSON.

Names, shapes and dtypes are known before any weight is read; weights are read by rows. Nothing is executed: a
pickle that contains more than tensors is refused.
"""

from __future__ import annotations

import json
import math
import os
import re
import reprlib
import shutil
import tempfile
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.serialization import get_unsafe_globals_in_checkpoint, safe_globals

from bytelm.checkpoint import store
from bytelm.checkpoint.tensors import NAMED, located, rows_of
from bytelm.errors import CheckpointError, ConfigError

T = TypeVar("T")
INDEX = ".index.json"
SUFFIXES = (".safetensors", ".pt", ".pth", ".bin")
# Dtypes that no model here computes in, but that a file may use for unused tensors, such as tables of angles.
FOREIGN = {
    "C64": torch.complex64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "U16": torch.uint16,
    "U32": torch.uint32,
    "U64": torch.uint64,
}
KNOWN = NAMED | FOREIGN
# What a pickle names where OmegaConf's objects are in it.
SETTINGS = re.compile(
    r"omegaconf\.[\w.]+|typing\.Any|collections\.defaultdict|builtins\.(bool|bytes|dict|float|int|list|str|tuple)"
)
FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
MOST = 1 << 20  # limit of counts in options: more is a broken file, and the model is built before it is compared


@dataclass(frozen=True)
class Weight:
    """One tensor of a file."""

    like: Tensor
    """On the meta device, with its shape and dtype."""
    pieces: Callable[[], Iterable[Tensor]]
    """Its parts along the first axis, in order; read when they are asked for."""

    def read(self) -> Tensor:
        """The whole."""
        found = list(self.pieces())
        return found[0] if len(found) == 1 else torch.cat(found)


Weights = dict[str, Weight]


class Positions:
    """A file that is read by position, and must not change meanwhile.

    It is not mapped into memory: a mapped file that gets shorter kills the process.
    """

    def __init__(self, path: Path, stack: ExitStack) -> None:
        """Open a plain file as long as `stack`. Raises CheckpointError."""
        self.path = path
        try:
            if not path.is_file():  # opening a pipe would wait for ever
                raise CheckpointError(f"{path} is {'not a plain file' if path.exists() else 'missing'}")
            self.file = stack.enter_context(path.open("rb", buffering=0))
            self.state = self._state()
        except OSError as error:  # such as a name that the file system cannot represent
            raise CheckpointError(f"{path} cannot be read: {error.strerror}") from None

    @property
    def size(self) -> int:
        """Bytes."""
        return self.state[0]

    def read(self, start: int, like: Tensor) -> Tensor:
        """A contiguous tensor like `like` from its first byte. Raises CheckpointError if the file has changed."""
        found = torch.empty(like.shape, dtype=like.dtype)
        data, done = found.reshape(-1).view(torch.uint8).numpy().data, 0
        try:
            self.file.seek(start)
            while done < len(data) and (count := self.file.readinto(data[done:])):
                done += count
            changed = self._state() != self.state
        except OSError as error:
            raise CheckpointError(f"{self.path} cannot be read: {error.strerror}") from None
        if changed:
            raise CheckpointError(f"{self.path} changed while it was read: repeat the command when it is whole")
        if done < len(data):
            raise CheckpointError(f"{self.path} ends before the tensors that it describes: copy or download it again")
        return found

    def weight(self, start: int, like: Tensor) -> Weight:
        """The contiguous tensor from a byte on."""

        def pieces() -> Iterator[Tensor]:
            at = start
            for part in like.split(rows_of(like)) if like.ndim else (like,):
                yield self.read(at, part)
                at += part.nbytes

        return Weight(like, pieces)

    def _state(self) -> tuple[int, int]:
        found = os.fstat(self.file.fileno())
        return found.st_size, found.st_mtime_ns


def weights_in(path: Path, stack: ExitStack) -> Weights:
    """The tensors of a file, or of all files of an index; open as long as `stack`.

    Raises CheckpointError if one is missing, damaged, or contains more than tensors.
    """
    if path.name.endswith(INDEX):
        return sharded(path, stack)
    file = Positions(path, stack)
    return plain(file) if path.suffix == ".safetensors" else pickled(file)


def sharded(index: Path, stack: ExitStack) -> Weights:
    """The tensors of the shards that an index names."""
    where = json_in(index).get("weight_map")
    if not isinstance(where, dict) or not all(isinstance(file, str) for file in where.values()):
        raise CheckpointError(f"{index} has no weight_map: it is not the index of a checkpoint")
    found: Weights = {}
    for file in sorted(set(cast("dict[str, str]", where).values())):
        if Path(file).name != file or not file.endswith(".safetensors"):  # which an index itself does not
            raise CheckpointError(f"{index} names {file!r}: its files must be safetensors in the same folder")
        inside = weights_in(index.with_name(file), stack)
        found |= {name: weight for name, weight in inside.items() if where.get(name, file) == file}
    if missing := sorted(where.keys() - found.keys()):
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise CheckpointError(f"{index} names {missing[0]!r}{more}, which its files do not contain")
    return found


def plain(file: Positions) -> Weights:
    """The tensors of a safetensors file."""
    try:
        found = {name: file.weight(at, like) for name, like, at in located(partial(text_of, file), file.size, KNOWN)}
    except (ValueError, RuntimeError, OverflowError) as error:  # RuntimeError: a shape that torch refuses
        raise CheckpointError(f"{file.path} is not a safetensors file that can be read: {first_line(error)}") from error
    return found


def text_of(file: Positions, start: int, size: int) -> bytes:
    """Some bytes of a file."""
    return file.read(start, torch.empty(size, dtype=torch.uint8, device="meta")).numpy().tobytes()


def pickled(file: Positions) -> Weights:
    """The tensors of a file from torch.save, at top level or under "model" or "state_dict"."""
    zipped = text_of(file, 0, min(2, file.size)) == b"PK"  # what older versions wrote is read into memory
    try:
        if zipped:
            with FakeTensorMode(), safe_globals(settings(file)):  # only shapes, and where each tensor's bytes are
                file.file.seek(0)
                content: Any = torch.load(file.file, weights_only=True)
        else:
            content = torch.load(file.path, map_location="cpu", weights_only=True)
    except Exception as error:  # a hostile file can make torch raise anything
        raise CheckpointError(
            f"{file.path} cannot be read, and nothing in it was executed: it must hold tensors alone, "
            f"as torch.save writes a state_dict ({first_line(error)})"
        ) from error
    for key in ("model", "state_dict", "model_state_dict", "MODEL"):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    if not isinstance(content, dict) or not all(map(dense, content.values())):
        raise CheckpointError(f"{file.path} holds no table of tensors: save a state_dict")
    tensors = cast("dict[str, Tensor]", content)
    return {str(name): zip_weight(file, tensor) if zipped else held(tensor) for name, tensor in tensors.items()}


class Skipped:
    """Stands for an object of another library in a pickle, of which nothing is made."""

    def __new__(cls, *args: object) -> Skipped:
        """Whatever it was made of."""
        return super().__new__(cls)

    def __init__(self, *args: object) -> None: ...

    def __setstate__(self, state: object) -> None:
        """Whatever it held."""


def settings(file: Positions) -> list[Any]:
    """What stands for settings that a trainer has left on its weights, if a pickle has nothing else beside tensors."""
    file.file.seek(0)
    names = get_unsafe_globals_in_checkpoint(file.file)
    return [(Skipped, name) for name in names] if all(map(SETTINGS.fullmatch, names)) else []


def held(tensor: Tensor) -> Weight:
    """A tensor that is in memory."""
    return Weight(torch.empty_like(tensor, device="meta"), lambda: (tensor.detach(),))


def zip_weight(file: Positions, tensor: Tensor) -> Weight:
    """The tensor of a zipped file, of which torch gave the shape, and the position of its storage."""
    storage: Any = tensor.untyped_storage()
    start = int(storage._checkpoint_offset) + int(tensor.storage_offset()) * tensor.element_size()
    like = torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
    if tensor.is_contiguous():
        return file.weight(start, like)
    # Strides other than of rows: all that they span is read, at once.
    steps = tuple(tensor.stride())
    span = 1 + sum((size - 1) * step for size, step in zip(like.shape, steps, strict=True))
    flat = torch.empty(span, dtype=tensor.dtype, device="meta")
    return Weight(like, lambda: (file.read(start, flat).as_strided(like.shape, steps),))


def unwrapped(tensors: Mapping[str, T], known: str) -> dict[str, T]:
    """Strip prefixes of wrappers from tensor names.

    `known` is a name of the model itself: its prefix (module., model., net., from DDP and trainers) is removed from all
    names, and torch.compile's `_orig_mod.` anywhere. Raises CheckpointError if two names become one.
    """
    bare = {".".join(part for part in name.split(".") if part != "_orig_mod"): name for name in tensors}
    wrapped = re.compile(rf"((?:(?:module|model|net)\.)*){re.escape(known)}")
    root = min((found[1] for name in bare if (found := wrapped.fullmatch(name))), key=len, default="")
    names = {name.removeprefix(root): own for name, own in bare.items()}
    if len(names) != len(tensors):
        twice = next(name for name in tensors if name not in names.values())
        raise CheckpointError(f"{twice!r} is there twice, in a model and in its wrapper: save one of them")
    return {name: tensors[own] for name, own in names.items()}


def dense(value: object) -> bool:
    """Whether something is a dense tensor."""
    return isinstance(value, Tensor) and value.layout == torch.strided and value.device.type == "cpu"


def json_in(path: Path) -> dict[str, Any]:
    """The object of a JSON file. Raises CheckpointError."""
    try:
        found = json.loads(path.read_bytes())
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not JSON: {first_line(error)}") from None
    if not isinstance(found, dict):
        raise CheckpointError(f"{path} is not a JSON object")
    return cast("dict[str, Any]", found)


def first_line(error: BaseException) -> str:
    """The message of an error in one line."""
    return (str(error) or type(error).__name__).splitlines()[0]


def file_at(source: Path) -> Path:
    """The file of weights at a path, or the only one in it. Raises CheckpointError."""
    found = [file for file in sorted(source.iterdir()) if file.suffix in SUFFIXES] if source.is_dir() else [source]
    if len(found) != 1:
        names_found = ", ".join(file.name for file in found) or "none"
        raise CheckpointError(f"{source} has {len(found)} files of weights ({names_found}): name the one to convert")
    return found[0]


@contextmanager
def written(folder: Path) -> Generator[Path]:
    """A folder to write to, which becomes `folder` once all is written; `folder` must be empty, or not exist."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f"{folder.name}.tmp-", dir=folder.parent) as name:
        aside = Path(name) / folder.name
        aside.mkdir()
        yield aside
        if folder.exists():
            folder.rmdir()
        shutil.move(aside, folder)


def check_folder(source: Path) -> None:
    """Raises CheckpointError if the source is not a folder."""
    if not source.is_dir():
        way = "name the one with the weights and their config.json"
        if not source.exists() and len(source.parts) == 2:
            way += f", or get it first, as in: hf download {source} --local-dir {source.name}"
        raise CheckpointError(f"{source} is not a folder: {way}")


def check(expected: Mapping[str, Tensor], found: Weights, where: Path) -> None:
    """Compare names, shapes and kinds of dtype with `expected`, before reading. Raises CheckpointError with a table."""
    likes = {name: weight.like for name, weight in found.items()}
    wanted = {
        name: torch.empty(tensor.shape, dtype=likes[name].dtype, device="meta")
        if name in likes and likes[name].dtype in FLOATS
        else tensor
        for name, tensor in expected.items()
    }
    store.check_keys(wanted, likes, where)


def finite(name: str, pieces: Iterable[Tensor], where: Path) -> Iterator[Tensor]:
    """The pieces of a tensor up to the first that is not finite, whereupon CheckpointError says how many values are."""
    bad = count = 0
    for piece in pieces:
        bad, count = bad + store.not_finite(piece), count + piece.numel()
        if not bad:
            yield piece
    if bad:
        store.refuse(where, [store.bad_values(name, bad, count)])


class Options:
    """The options of another project's model; errors name the file and key."""

    def __init__(self, table: Any, where: str) -> None:
        if not isinstance(table, dict):
            raise ConfigError(f"{where} is not a table of options")
        self.table = cast("dict[str, Any]", table)
        self.where = where

    def part(self, key: str) -> Options:
        """The options under a key."""
        return Options(self.table.get(key), f"{self.where}: {key}")

    def get(self, key: str, kind: type | tuple[type, ...], default: Any = None) -> Any:
        """One option, or `default` if missing or null. Raises ConfigError if it is required and missing."""
        value = self.table.get(key)
        if value is None:
            value = default
        if value is None:
            raise ConfigError(f"{self.where} lacks {key}")
        if isinstance(value, bool) != (kind is bool) or not isinstance(value, kind):
            raise ConfigError(f"{self.where}: {key} = {reprlib.repr(value)} has the wrong type")
        return value

    def count(self, key: str, default: int | None = None, most: int = MOST) -> int:
        """An option that is a count. Raises ConfigError if it is not from 1 to `most`."""
        value = self.get(key, int, default)
        if not 1 <= value <= most:
            raise ConfigError(f"{self.where}: {key} = {reprlib.repr(value)} is not from 1 to {most}")
        return value

    def counts(self, key: str, default: Sequence[int], most: int, least: int = 1) -> tuple[int, ...]:
        """An option that is a list of at most `most` counts, each from `least` to `most`."""
        values = self.get(key, list, list(default))
        if len(values) > most or not all(type(value) is int and least <= value <= most for value in values):
            raise ConfigError(
                f"{self.where}: {key} = {reprlib.repr(values)} is not a list of counts from {least} to {most}"
            )
        return tuple(values)

    def number(self, key: str, default: float | None = None) -> float:
        """An option that is a finite number. Raises ConfigError."""
        value = self.get(key, (int, float), default)
        try:
            if math.isfinite(value):
                return float(value)
        except OverflowError:
            pass
        raise ConfigError(f"{self.where}: {key} = {reprlib.repr(value)} is not a finite number")

    def present(self, key: str) -> None:
        """Refuse null where it means something else than a missing option."""
        if key in self.table and self.table[key] is None:
            raise ConfigError(f"{self.where}: {key} = null is not supported")

    def only(self, key: str, *known: Any) -> None:
        """Refuse any value of an option but those `known`; the first is the default."""
        value = self.table.get(key, known[0])
        if not any(value == one and isinstance(value, bool) == isinstance(one, bool) for one in known):
            shown = " or ".join(repr(one) for one in known)
            raise ConfigError(f"{self.where}: {key} = {reprlib.repr(value)} is not supported: bytelm has {shown}")
