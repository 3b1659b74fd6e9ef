"""A run that was converted beside its source in the source's own library: are the logits the same?"""

from __future__ import annotations

import importlib
import warnings
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from bytelm.checkpoint.assemble import load
from bytelm.errors import CheckpointError, MissingExtraError, UsageError
from bytelm.exchange import files, megabyte
from bytelm.exchange.convert import KNOWN, hf_weights, megabyte_file
from bytelm.exchange.names import Dialect
from bytelm.models.megabyte_pytorch import Config
from bytelm.nn.embed import PUBLISHED_OFFSET
from bytelm.units import BOS, BYTES, VOCAB

TEXT = b"The quick brown fox, d\xc3\xa9j\xc3\xa0 vu: 0123456789\n" * 2 + bytes(range(BYTES))
NEAR = 1e-3
"""Of the largest logit. Float32 in another order of sums stays far below; anything done otherwise comes far above."""


@dataclass(frozen=True)
class Agreement:
    """How far logits are apart at the most, how large the largest is, and after how many bytes they were compared."""

    apart: float
    largest: float
    bytes: int


def check(source: Path, layout: Dialect | str, run: Path) -> Agreement:
    """Compare the logits of a source and of the run that `convert` made of it, in float32, on some text and every byte.

    Raises MissingExtraError without the source's library, UsageError where that has no such model, and CheckpointError
    where logits differ by more than rounding does.
    """
    loaded = load(run)
    model: Any = loaded.model
    text = TEXT[: int(loaded.state["context"])]
    ids = torch.tensor([[BOS, *text]])
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ours = model(ids)[0][0]
        if layout == "hf":
            theirs = of_transformers(source, ids)
        elif layout == "megabyte":
            theirs, ours = of_megabyte(source, cast("Config", model.config), ids), ours[1:, :BYTES]
        else:
            raise UsageError("--check: Meta's code is no package that can be installed: leave --check out")
    found = Agreement(float((ours - theirs).abs().max()), float(theirs.abs().max()), len(text))
    if not found.apart <= NEAR * found.largest:
        raise CheckpointError(
            f"{run}: logits are up to {found.apart:.3g} from those of {source} (the largest is {found.largest:.3g}): "
            "the source computes something that bytelm does not; do not use this run"
        )
    return found


def of_transformers(source: Path, ids: Tensor) -> Tensor:
    """The logits `[ids, vocab]` of transformers, in our order of ids."""
    try:
        from transformers import BltConfig, BltForCausalLM
    except ImportError as error:
        raise MissingExtraError("transformers", "hf", "--check") from error
    config: Any = BltConfig.from_pretrained(source)
    if getattr(config, "num_hidden_layers", None) is None:
        config.num_hidden_layers = 1  # version 5.23 looks for it and has not got it
    model: Any = BltForCausalLM(config).eval()
    with ExitStack() as stack:
        weights = files.unwrapped(files.weights_in(hf_weights(source), stack), KNOWN["hf"])
        left = model.load_state_dict({name: weight.read() for name, weight in weights.items()}, strict=False)
    if left.missing_keys:
        raise CheckpointError(f"{source} lacks {left.missing_keys[0]}, which transformers asks for")
    order = (torch.arange(VOCAB) + PUBLISHED_OFFSET) % VOCAB
    return model(input_ids=order[ids], use_cache=False).logits[0][:, order]


def of_megabyte(source: Path, config: Config, ids: Tensor) -> Tensor:
    """The logits `[bytes, 256]` of MEGABYTE-pytorch after each byte."""
    try:
        package: Any = importlib.import_module("MEGABYTE_pytorch")  # which no other part of bytelm needs
    except ImportError as error:
        raise MissingExtraError("MEGABYTE-pytorch", "bench", "--check") from error
    with ExitStack() as stack:
        tensors, mblm = megabyte.plain({n: w.read() for n, w in files.weights_in(megabyte_file(source), stack).items()})
    each = (config.heads, config.head_dims, config.ffn, config.rotary, config.positions)
    if mblm or config.ffn_dims or config.multi_query or any(len(set(one)) > 1 for one in each):
        raise UsageError("--check: MEGABYTE-pytorch's constructor makes no model of this shape: leave --check out")
    patches = config.patches or -(-ids.shape[1] // config.patch)
    theirs = package.MEGABYTE(
        num_tokens=megabyte.vocabulary_of(tensors),
        dim=config.dims,
        depth=config.layers,
        max_seq_len=(patches, *config.sizes),
        heads=config.heads[0],
        dim_head=config.head_dims[0],
        ff_mult=config.ffn[0],
        rel_pos=config.rotary[0],
        pos_emb=config.positions[0] == "learned",
    ).eval()
    theirs.load_state_dict(tensors)
    return theirs(ids[:, 1:])[0, :, :BYTES]
