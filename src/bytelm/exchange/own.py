"""Our own runs and folders of `save_pretrained`, to be stored in another precision: see `exchange.format`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bytelm.checkpoint import legacy, pretrained, store
from bytelm.checkpoint.assemble import Recipe, load, resolve_checkpoint, spec_file
from bytelm.checkpoint.parts import is_sharded, own_tensors
from bytelm.checkpoint.tensors import Streamed, scales
from bytelm.config import build, merge
from bytelm.errors import UsageError
from bytelm.exchange import files
from bytelm.exchange.files import Weight, Weights
from bytelm.exchange.format import Reading
from bytelm.interfaces.model import ByteModel


def read(source: Path, sets: Mapping[str, Any], stack: ExitStack) -> Reading:
    """See `exchange.format.Format`. The source is a run, of which the newest checkpoint is taken, or one checkpoint."""
    ours = source.is_dir() and not pretrained.found(source)
    place = store.newest(source, closely=False) if ours and not (source / store.MANIFEST).exists() else source
    checkpoint, state = resolve_checkpoint(place)
    if ours:
        store.verify(checkpoint)
    recipe = build(Recipe, merge(state["recipe"], sets), str(checkpoint / spec_file(checkpoint)))
    theirs, weights = {}, Weights()
    for name, weight in weights_in(checkpoint, stack).items():
        own = legacy.tensor_name(name.removeprefix("" if ours else pretrained.PREFIX))
        theirs[own], weights[own] = name, weight
    rounded = scales((name, weight.like.dtype, list(weight.like.shape)) for name, weight in weights.items())
    plain = {name: weight for name, weight in weights.items() if name not in rounded.values()}
    plain |= {name: Weight(plain[name].like.to(torch.float32), plain[name].pieces) for name in rounded}
    files.check(recipe.build_on_meta().state_dict(), plain, checkpoint)
    return Reading(
        source.resolve().name,
        recipe,
        int(state["context"]),
        sorted((theirs[name], store.kind(weight.like), name) for name, weight in weights.items()),
        lambda: {name: finite(name, weight, checkpoint) for name, weight in weights.items()},
    )


def weights_in(checkpoint: Path, stack: ExitStack) -> Weights:
    """The tensors of the file of weights, of those that an index names, or of those that several processes wrote."""
    one, index = checkpoint / pretrained.WEIGHTS, checkpoint / pretrained.INDEX
    if not pretrained.found(checkpoint) and is_sharded(checkpoint, "model"):
        return {name: Weight(tensor.like, tensor.pieces) for name, tensor in own_tensors(checkpoint).items()}
    return files.weights_in(index if index.exists() and not one.exists() else one, stack)


def finite(name: str, weight: Weight, checkpoint: Path) -> Streamed:
    """A weight that is checked while it is read."""

    def pieces() -> Iterator[Tensor]:
        whole = not weight.like.is_floating_point()
        return iter(weight.pieces()) if whole else files.finite(name, weight.pieces(), checkpoint)

    return Streamed(weight.like, pieces)


def write(folder: Path, recipe: Recipe, context: int, ours: dict[str, Tensor]) -> None:
    """See `exchange.format.Format`."""
    raise UsageError("--to bytelm: a run is one already; LM.save_pretrained writes a folder; use hf or meta")


def compared(source: Path, model: ByteModel, ids: Tensor, ours: Tensor) -> tuple[Tensor, Tensor]:
    """See `exchange.format.Format`."""
    return load(source).model(ids)[0][0], ours
