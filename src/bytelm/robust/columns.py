"""The columns of a result: each a model, and how it is asked for the likelihood of bytes after bytes."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from bytelm.checkpoint import pretrained
from bytelm.checkpoint.assemble import Loaded, load, resolve_checkpoint
from bytelm.checkpoint.manifest import MANIFEST
from bytelm.data.files import sha256_of
from bytelm.data.names import after_prefix
from bytelm.decoding import bytewise, over_bytes_context
from bytelm.decoding.bytewise import TOKEN
from bytelm.errors import UsageError
from bytelm.evaluate.bits import continuations, naive_continuations, prompted_continuations
from bytelm.interfaces.model import ByteModel

if TYPE_CHECKING:
    from bytelm.hf.foreign import Foreign

Pairs = Iterable[tuple[bytes, bytes]]
"""(prefix, continuation)."""
Likelihood = Callable[[ByteModel, Pairs, int], Iterator[float]]
"""(model, pairs, context) -> the nats of each continuation after its prefix."""
Writes = Callable[[bytes, bytes, bytes], bool | None]
"""(prompt, text, end) -> whether the model writes the text and then the end; None: too many tokens for it."""


def of_bytes(model: ByteModel, pairs: Pairs, context: int) -> Iterator[float]:
    """Exact: the two are one document. For a model over bytes."""
    return (nats for nats, _ in continuations(model, pairs, context=context))


def of_tokens(model: ByteModel, pairs: Pairs, context: int) -> Iterator[float]:
    """Naive: see `naive_continuations`. For a model over tokens."""
    return (nats for nats, _ in naive_continuations(model, pairs, context=context))


def after_prompts(model: ByteModel, pairs: Pairs, context: int) -> Iterator[float]:
    """Naive: see `prompted_continuations`. For a model over tokens."""
    return (nats for nats, _ in prompted_continuations(model, pairs, context=context))


@dataclass(frozen=True)
class Column:
    """A model as it is asked, under the name by which it is shown."""

    name: str
    identity: str
    """What its answers depend on, besides the queries and the context: a hash of its weights, and how it is asked."""
    model: ByteModel
    context: int
    likelihood: Likelihood = of_bytes
    prompted: Likelihood = of_bytes
    """The same where the prefix is a prompt that ends there: a tokenizer encodes it alone, and the continuation too."""
    segmented: ByteModel | None = None
    """Whose patches or tokens are counted; None: the model's."""
    writes: Writes | None = None
    """How it is asked to write; None: by `generate`."""

    @property
    def naive(self) -> bool:
        """Whether its likelihoods are those of tokens."""
        return self.likelihood is of_tokens


def columns_of(name: str, loaded: Loaded, context: int | None) -> list[Column]:
    """The columns of a run. Raises UsageError for one that cannot be asked.

    A run over tokens has two columns: NAME, exact over bytes, by the model of bytes made of it, and "NAME, naive", the
    likelihoods of tokens that are commonly published.
    """
    if loaded.modality is not None and not loaded.modality.text:
        raise UsageError(f"{name} models {loaded.modality.name} data, and the suites are of texts: name runs on texts")
    model, identity, length = loaded.model, identity_of(loaded.checkpoint), context or loaded.state["context"]
    if model.tokens is None:
        return [Column(name, identity, model, length)]
    exact = Column(
        name, f"{identity} bytewise", bytewise(model), context or over_bytes_context(model, length), segmented=model
    )
    return [exact, naive(name, identity, model, max(1, context // TOKEN) if context else length)]


def foreign(name: str, device: torch.device, context: int | None) -> Column:
    """The column of a model of transformers, "hf:FOLDER" or "hf:OWNER/NAME". Raises as `load_foreign` does."""
    from bytelm.hf.foreign import load_foreign
    from bytelm.hf.writing import writes

    model, _ = load_foreign(name, device)
    column = naive(name, foreign_identity(name, model), model, model.context(context))
    return replace(column, identity=f"{column.identity}, written as text", writes=partial(writes, model))


def naive(name: str, identity: str, model: ByteModel, context: int) -> Column:
    """The column of a model over tokens as it is commonly asked; `context` in tokens."""
    return Column(f"{name}, naive", f"{identity} naive", model, context, of_tokens, after_prompts)


def opened(name: str, path: str, device: torch.device, context: int | None) -> list[Column]:
    """The columns of a run, of one checkpoint of it or of a model of transformers, loaded.

    Raises CheckpointError, ResourceError, UsageError.
    """
    if after_prefix(path) is not None:
        return [foreign(path, device, context)]
    return columns_of(name, load(path, device), context)


def is_model(argument: str) -> bool:
    """Whether an argument names a run, a checkpoint, a folder of `save_pretrained` or "hf:MODEL", rather than texts."""
    if after_prefix(argument) is not None:
        return True
    path = Path(argument)
    if (path / MANIFEST).is_file() or (path / "checkpoints").is_dir():
        return True
    return pretrained.found(path) and any(path.glob("*.safetensors"))


def named(runs: Sequence[str]) -> dict[str, str]:
    """{name: run}: the last part of each path, RUN/step-N for a checkpoint; the whole path where two would be the same.

    Raises UsageError for a run that is given twice, CheckpointError for one that is none.
    """
    known: dict[Path, str] = {}
    short: list[str] = []
    for run in runs:
        if after_prefix(run) is not None:
            if run in short:
                raise UsageError(f"{run} is given twice: name it once")
            short.append(run)
            continue
        path, (checkpoint, _) = Path(run).resolve(), resolve_checkpoint(run, closely=False)
        if (twice := known.setdefault(checkpoint.resolve(), run)) is not run:
            raise UsageError(f"{run} and {twice} are one model: name it once")
        short.append(f"{path.parents[1].name}/{path.name}" if (path / MANIFEST).exists() else path.name)
    return {name if short.count(name) == 1 else run: run for name, run in zip(short, runs, strict=True)}


def identity_of(checkpoint: Path) -> str:
    """A hash of a checkpoint's content, from the checksums in its manifest; of its files where it has none."""
    if (manifest := checkpoint / MANIFEST).exists():
        return sha256_of(manifest)
    files = sorted(path for path in checkpoint.iterdir() if path.is_file())
    return hashlib.sha256("".join(path.name + sha256_of(path) for path in files).encode()).hexdigest()


def foreign_identity(name: str, model: Foreign) -> str:
    """What the answers of a model of transformers depend on: the files of its folder, or its commit on the hub."""
    folder = Path(after_prefix(name) or name)
    return identity_of(folder) if folder.is_dir() else f"{name} {getattr(model.model.config, '_commit_hash', '')}"
