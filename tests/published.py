"""Small random BLTs of transformers, saved as published ones are, for what is exchanged with them."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from bytelm import load
from bytelm.exchange.convert import convert
from bytelm.lm import LM
from bytelm.units import BOS, PAD

transformers = pytest.importorskip("transformers")

TEXTS = (
    b"The quick brown fox, jumps over\n\x00\xff the lazy dog: d\xc3\xa9j\xc3\xa0 vu, d\xc3\xa9j\xc3\xa0 lu; and so on.",
    b"short\n",
    b"def main(argv: list[str]) -> int:\n    return 0\n\x80\x81",
)
SHAPES: dict[str, dict[str, Any]] = {
    "k·d = global": {},
    "k·d ≠ global": {"global_dim": 48, "decoder_layers": 3},
    "three encoder layers, the last crossed": {"encoder_layers": 3},
    "three encoder layers, all crossed": {"encoder_layers": 3, "all_layers": True, "global_dim": 48},
    "k = 4, short n-grams, feed-forward widths of any size": {"queries": 4, "sizes": (2, 3), "inner": (21, 50, 37, 70)},
    "two hash functions, short windows": {"functions": 2, "sizes": (2, 5), "window": 5, "entropy_model_window": 3},
}
THEIRS = [(ours + 4) % 260 for ours in range(260)]
"""Their id of each of ours."""


def options(
    global_dim: int = 32,
    queries: int = 2,
    encoder_layers: int = 1,
    decoder_layers: int = 2,
    functions: int = 1,
    sizes: tuple[int, ...] = (3, 4, 5, 6, 7, 8),
    rows: int = 101,
    window: int = 8,
    entropy_model_window: int = 7,
    all_layers: bool = False,
    inner: tuple[int, int, int, int] | None = None,
) -> Any:
    """Their configuration; widths of 16 and 32 in the local models and the entropy model.

    `inner`: feed-forward widths of encoder, latent Transformer, decoder and entropy model.
    """
    inner = inner or (48, {32: 96, 48: 128}[global_dim], 48, 96)
    heads = {"num_attention_heads": 2}
    local = {"hidden_size": 16, "hidden_size_global": global_dim, "cross_attn_k": queries}
    config = transformers.BltConfig(
        vocab_size=260,
        cross_attn_k=queries,
        encoder_hash_byte_group_vocab=rows,
        encoder_hash_byte_group_size=list(sizes),
        encoder_hash_byte_group_nb_functions=functions,
        local_attention_window_len=window,
        encoder_config={
            **{**local, **heads, "num_hidden_layers": encoder_layers},
            **{"cross_attn_all_layers": all_layers, "intermediate_size": inner[0]},
        },
        decoder_config={**local, **heads, "num_hidden_layers": decoder_layers, "intermediate_size": inner[2]},
        global_config={
            **heads,
            "hidden_size": global_dim,
            "num_hidden_layers": 2,
            "intermediate_size": inner[1],
        },
        patcher_config={
            **heads,
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "intermediate_size": inner[3],
            "sliding_window": entropy_model_window,
        },
    )
    config.num_hidden_layers = 1  # version 5.23 looks for it and has not got it
    return config


def made(**shape: Any) -> torch.nn.Module:
    """A model with random weights that matter, which cuts about half of the bytes of `TEXTS`."""
    model = transformers.BltForCausalLM(options(**shape)).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in model.parameters():
            noise = torch.randn(weight.shape, generator=generator)
            weight.copy_(noise * weight.shape[-1] ** -0.5 if weight.ndim > 1 else 1 + 0.3 * noise)
        model.model.patcher.lm_head.weight.mul_(3)  # so that entropies are far apart
    model.config.patching_threshold = threshold(model)
    return model


def entropies(model: Any) -> Tensor:
    """What their entropy model says of all bytes of `TEXTS`, in nats."""
    with torch.no_grad():
        return torch.cat(
            [model.model.patcher(theirs(ids([text])), patch_size=4, threshold=0.0)[0][0] for text in TEXTS]
        )


def threshold(model: Any) -> float:
    """Near the median of the entropies, in the middle of the widest gap: no noise moves one over it."""
    values = entropies(model).sort().values
    middle = values[int(0.4 * len(values)) : int(0.6 * len(values))].double()
    widest = int(middle.diff().argmax())
    return float(middle[widest] + middle[widest + 1]) / 2


def ids(texts: list[bytes] | tuple[bytes, ...]) -> Tensor:
    """Our ids of documents side by side, shorter ones padded on the right."""
    rows = [torch.tensor([BOS, *text]) for text in texts]
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=PAD)


def theirs(ours: Tensor) -> Tensor:
    """Their ids of ours."""
    return (ours + 4) % 260


def logits(model: Any, ours: Tensor, **more: Any) -> Tensor:
    """Their logits after our ids, in our order of ids; computed without a cache, with which they are wrong."""
    with torch.no_grad():
        return model(input_ids=theirs(ours), **{"use_cache": False, **more}).logits[..., THEIRS]


def save(model: Any, folder: Path, **more: Any) -> Path:
    """Write a model as it is published."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(folder, **more)
    return folder


@dataclass(frozen=True)
class Pair:
    """A model of theirs, the folder it was saved in, and the run that the folder was converted to."""

    theirs: Any
    folder: Path
    run: Path
    lm: LM
    noise: float
    """How far float32 takes their logits from those of float64, at the most."""


def pair(folder: Path, **shape: Any) -> Pair:
    """A random model, published and converted."""
    model = made(**shape)
    save(model, folder / "hf")
    convert(folder / "hf", "hf", folder / "run", {})
    rounded = [logits(model, ids([text])) for text in TEXTS]
    exact = [logits(model.double(), ids([text])) for text in TEXTS]
    noise = max(float((a - b).abs().max()) for a, b in zip(exact, rounded, strict=True))
    return Pair(model.float(), folder / "hf", folder / "run", load(folder / "run"), noise)


def edit(file: Path, change: Callable[[Any], Any]) -> None:
    """Change what a JSON file holds, in place or by what `change` returns."""
    content = json.loads(file.read_text())
    new = change(content)
    file.write_text(json.dumps(content if new is None else new))
