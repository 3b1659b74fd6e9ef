"""MEGABYTE-pytorch's and MBLM's checkpoints: see `exchange.format`."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from torch import Tensor

from bytelm.checkpoint.assemble import Recipe
from bytelm.errors import MissingExtraError, UsageError
from bytelm.exchange import files
from bytelm.exchange.format import Reading
from bytelm.interfaces.model import ByteModel
from bytelm.models.megabyte_pytorch import published
from bytelm.models.megabyte_pytorch.model import Config
from bytelm.units import BYTES

CONTEXT = 8192  # bytes, the default: that of the MEGABYTE paper


def read(source: Path, sets: Mapping[str, Any], stack: ExitStack) -> Reading:
    """See `exchange.format.Format`. `sets` are the constructor's options that tensors do not determine."""
    file = files.file_at(source)
    found = {name: weight.read() for name, weight in files.weights_in(file, stack).items()}
    made = published.recipe(found, sets)
    ours, length = published.renamed(found, made), published.context(made.model, sets) or CONTEXT
    return Reading(file.resolve().name, made, length, published.rows(found, made), lambda: ours)


def write(folder: Path, recipe: Recipe, context: int, ours: dict[str, Tensor]) -> None:
    """See `exchange.format.Format`."""
    raise UsageError("--to megabyte: weights can only be imported from that layout; use hf or meta")


def compared(source: Path, model: ByteModel, ids: Tensor, ours: Tensor) -> tuple[Tensor, Tensor]:
    """See `exchange.format.Format`: `[bytes, 256]`, after each byte."""
    config: Config = model.config
    try:
        package: Any = importlib.import_module("MEGABYTE_pytorch")
    except ImportError as error:
        raise MissingExtraError("MEGABYTE-pytorch", "bench", "--check") from error
    with ExitStack() as stack:
        tensors, mblm = published.plain(
            {n: w.read() for n, w in files.weights_in(files.file_at(source), stack).items()}
        )
    each = (config.heads, config.head_dims, config.ffn, config.rotary, config.positions)
    if mblm or config.ffn_dims or config.multi_query or any(len(set(one)) > 1 for one in each):
        raise UsageError("--check: MEGABYTE-pytorch's constructor does not support this shape: leave --check out")
    patches = config.patches or -(-ids.shape[1] // config.patch)
    library = package.MEGABYTE(
        num_tokens=published.vocabulary_of(tensors),
        dim=config.dims,
        depth=config.layers,
        max_seq_len=(patches, *config.sizes),
        heads=config.heads[0],
        dim_head=config.head_dims[0],
        ff_mult=config.ffn[0],
        rel_pos=config.rotary[0],
        pos_emb=config.positions[0] == "learned",
    ).eval()
    library.load_state_dict(tensors)
    return library(ids[:, 1:])[0, :, :BYTES], ours[1:, :BYTES]
