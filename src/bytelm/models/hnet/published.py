"""Published H-Net checkpoints as weights of `models.hnet`: whose names and rows are whose.

    described(JSON)      the recipe: arch_layout, d_model, ... as published
    theirs(our name)     their name: backbone.encoder.layers.0.mixer.in_proj.weight
    order(our name)      for each of our rows the number of theirs, -1 for zeros

Everything that differs is an order of rows: rotary halves are pairs here, gate and up are the other way round, queries
and keys of routers have changed their names, since theirs compare a position's key with the query before it.

Their vocabulary is the 256 bytes, of which their tokenizer takes two that UTF-8 never has for BOS (254) and EOS (255).
Ours are ids of their own: they have these rows, and byte 255, like the other ids that theirs does not have, a row of
zeros and a bias of -30 in the logits, so that the rest is as likely as it was.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from bytelm.checkpoint import store
from bytelm.checkpoint.assemble import Recipe
from bytelm.checkpoint.tensors import Stored, Streamed
from bytelm.errors import ConfigError
from bytelm.exchange import files
from bytelm.exchange.files import Options, Weight, Weights
from bytelm.models.hnet.layers import Published, kinds_of
from bytelm.models.hnet.model import Config
from bytelm.units import BOS, BYTES, EOS, VOCAB

UNLIKELY = -30.0  # the bias of ids that the checkpoint does not have
THEIR_BOS, THEIR_EOS = 254, 255
MULTIPLE = 128  # to which their feed-forward layers round widths up
LAYERS, STAGES, LONG = 1 << 10, 8, 1 << 30  # limits of layers in a network, of stages, of other counts
RATIOS = {1: (6.0,), 2: (3.0, 3.0)}  # of the paper's models; their JSON does not say

# Of a network, ours -> theirs; then of one of its layers.
NETWORK = {
    "widen.pad.weight": "pad_dimension",
    "encoder_norm.weight": "encoder.rmsnorm.weight",
    "norm.weight": "decoder.rmsnorm.weight",
    "router.query.weight": "routing_module.k_proj_layer.weight",
    "router.key.weight": "routing_module.q_proj_layer.weight",
    "residual.weight": "residual_proj.weight",
    "residual.bias": "residual_proj.bias",
}
LAYER = {
    "norm.weight": "norm1.weight",
    "mixer.qkv.weight": "mixer.Wqkv.weight",
    "mixer.project.weight": "mixer.in_proj.weight",
    "mixer.convolution.weight": "mixer.conv1d.weight",
    "mixer.convolution.bias": "mixer.conv1d.bias",
    "mixer.step_bias": "mixer.dt_bias",
    "mixer.log_decay": "mixer.A_log",
    "mixer.skip": "mixer.D",
    "mixer.norm.weight": "mixer.norm.weight",
    "mixer.out.weight": "mixer.out_proj.weight",
    "feed_forward_norm.weight": "norm2.weight",
    "feed_forward.gate_up.weight": "mlp.fc1.weight",
    "feed_forward.down.weight": "mlp.fc2.weight",
}
EMBEDDING, HEAD, BIAS = "embed.byte.weight", "head.weight", "head.bias"
TOP = {EMBEDDING: "embeddings.weight", HEAD: "lm_head.weight"}


# --- options ----------------------------------------------------------------------------------------------------------


def described(table: Mapping[str, Any], where: str) -> Recipe:
    """The recipe of a checkpoint. Raises ConfigError for an option that is missing, unknown or unsupported."""
    top = Options(dict(table), where)
    known(top, "arch_layout", "d_model", "d_intermediate", "vocab_size", "ssm_cfg", "attn_cfg", "tie_embeddings")
    top.only("vocab_size", BYTES)
    top.only("tie_embeddings", False)
    layers = flat(top)
    widths, (mamba, attention) = len(layers) // 2 + 1, (top.part(key) for key in ("ssm_cfg", "attn_cfg"))
    known(mamba, "chunk_size", "d_conv", "d_state", "expand")  # the first is only a kernel's
    known(attention, "num_heads", "rotary_emb_dim", "window_size")

    def each(part: Options, key: str, least: int) -> tuple[int, ...]:
        found = part.counts(key, (), LONG, least)
        if len(found) != widths:
            raise ConfigError(f"{part.where}: {key} has {len(found)} values: arch_layout needs {widths}")
        return found

    published = Published(
        layers=layers,
        ffn_dims=tuple(-(-one // MULTIPLE) * MULTIPLE for one in each(top, "d_intermediate", 0)),
        rotary_dims=each(attention, "rotary_emb_dim", 0),
        attention_windows=tuple(one + 1 for one in each(attention, "window_size", -1)),
        states=mamba.count("d_state", 128, LONG),
        expand=mamba.count("expand", 2, LONG),
        convolution=mamba.count("d_conv", 4, LONG),
    )
    ratios = RATIOS.get(widths - 1, (RATIOS[2][0],) * (widths - 1))
    dims, heads = each(top, "d_model", 1), each(attention, "num_heads", 1)
    try:
        return Recipe(Config(dims, heads, ratios=ratios, published=published))
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from None


def known(part: Options, *keys: str) -> None:
    """Refuse options that are none of `keys`."""
    if unknown := sorted(part.table.keys() - set(keys)):
        raise ConfigError(f"{part.where}: {unknown[0]} is not supported: known: {', '.join(keys)}")


def flat(top: Options) -> tuple[str, ...]:
    """The layers of all networks, in the order in which a byte passes through them."""
    inside: Any = top.get("arch_layout", list)
    before, after = list[str](), list[str]()
    while isinstance(inside, list) and len(inside) == 3 and len(before) < STAGES:
        first, inside, last = cast("list[Any]", inside)
        before, after = [*before, first], [last, *after]
    layers = (*before, inside[0], *after) if isinstance(inside, list) and len(inside) == 1 and before else ()
    if not layers or not all(isinstance(one, str) and len(one) <= LAYERS for one in layers):
        raise ConfigError(
            f"{top.where}: arch_layout = {top.table['arch_layout']!r:.80}: write layers around layers, at most "
            f'{STAGES} times, as in ["m4", ["T22"], "m4"]'
        )
    for one in layers:
        if len(kinds_of(one)) > LAYERS:
            raise ConfigError(f'{top.where}: arch_layout has "{one:.80}": at most {LAYERS} layers in a network')
    return layers


def options(config: Config) -> dict[str, Any]:
    """Their JSON of a model. Raises ConfigError for what it does not support."""
    own = config.published
    if own is None or config.ngram_sizes or own.state_head_dim != Published.state_head_dim:
        what = "of attention alone" if own is None else "with n-grams" if config.ngram_sizes else "with other heads"
        raise ConfigError(f"an H-Net {what} has no published layout: only models of model.published can be exported")
    if odd := [one for one in own.ffn_dims if one % MULTIPLE]:
        raise ConfigError(f"model.published.ffn_dims has {odd[0]}: theirs are multiples of {MULTIPLE}")
    if config.theta != Config.theta:
        raise ConfigError(f"model.theta = {config.theta}: theirs is {Config.theta:g}")
    layout: list[Any] = [own.layers[len(config.ratios)]]
    for stage in reversed(range(len(config.ratios))):
        layout = [own.layers[stage], layout, own.layers[-1 - stage]]
    return {
        "arch_layout": layout,
        "d_model": list(config.dims),
        "d_intermediate": list(own.ffn_dims),
        "vocab_size": BYTES,
        "ssm_cfg": {"chunk_size": 256, "d_conv": own.convolution, "d_state": own.states, "expand": own.expand},
        "attn_cfg": {
            "num_heads": list(config.heads),
            "rotary_emb_dim": list(own.rotary_dims),
            "window_size": [one - 1 for one in own.attention_windows],
        },
        "tie_embeddings": False,
    }


# --- names and rows ---------------------------------------------------------------------------------------------------


def place(name: str) -> tuple[int, str]:
    """In how many others a network of ours is, and a tensor's name in it."""
    rest, inside = name.removeprefix("stage."), 0
    while rest.startswith("inner."):
        rest, inside = rest.removeprefix("inner."), inside + 1
    return inside, rest


def theirs(name: str, config: Config) -> str:
    """Their name of one of our tensors but BIAS, which they have not got."""
    if name in TOP:
        return TOP[name]
    inside, rest = place(name)
    network = "backbone" + ".main_network" * inside
    if rest == "norm.weight" and inside == len(config.ratios):
        return f"{network}.main_network.rmsnorm.weight"
    if rest in NETWORK:
        return f"{network}.{NETWORK[rest]}"
    stack, _, number, tail = rest.split(".", 3)
    return f"{network}.{'main_network' if stack == 'stack' else stack}.layers.{number}.{LAYER[tail]}"


def order(name: str, config: Config) -> Tensor | None:
    """For each row of one of our tensors the number of theirs, -1 for zeros; None if they are the same."""
    if name in TOP:
        found = torch.cat([torch.arange(BYTES), torch.full((VOCAB - BYTES,), -1)])
        found[EOS] = THEIR_EOS
        found[BOS if name == EMBEDDING else THEIR_EOS] = THEIR_BOS if name == EMBEDDING else -1
        return found
    inside, rest = place(name)
    published = cast("Published", config.published)
    if rest.endswith("gate_up.weight"):
        up, gate = torch.arange(2 * published.ffn_dims[inside]).chunk(2)
        return torch.cat([gate, up])
    if rest.endswith("qkv.weight"):
        dim, heads, turned = config.dims[inside], config.heads[inside], published.rotary_dims[inside]
        pairs = torch.arange(turned).view(2, turned // 2).T.flatten()
        head = torch.cat([pairs, torch.arange(turned, dim // heads)])
        each = torch.arange(2 * heads)[:, None] * (dim // heads) + head
        return torch.cat([each.flatten(), torch.arange(2 * dim, 3 * dim)])
    return None


def moved(tensor: Tensor, rows: Tensor) -> Tensor:
    """The rows of a tensor in an order."""
    return tensor[rows.clamp(min=0)].masked_fill((rows < 0).view(-1, *(1,) * (tensor.ndim - 1)), 0)


def back(rows: Tensor, count: int) -> Tensor:
    """The order that leads back to `count` rows; of two that were one, to the later: to BOS and EOS."""
    real = (rows >= 0).nonzero()[:, 0]
    return torch.full((count,), -1).scatter_reduce(0, rows[real], real, "amax")


def unlikely() -> Tensor:
    """The bias of the logits."""
    known = torch.zeros(VOCAB, dtype=torch.bool)
    known[:BYTES] = known[EOS] = True
    known[THEIR_EOS] = False
    return torch.zeros(VOCAB).masked_fill(~known, UNLIKELY)


def shaped(name: str, like: Tensor) -> Tensor:
    """Of one of our tensors, theirs on the meta device."""
    shape = (BYTES, *like.shape[1:]) if name in TOP else like.shape[1:] if name.endswith("pad.weight") else like.shape
    return torch.empty(shape, dtype=like.dtype, device="meta")


# --- reading and writing ----------------------------------------------------------------------------------------------


def reading(recipe: Recipe, weights: Weights, where: Path) -> tuple[list[tuple[str, str, str]], Stored]:
    """The table of a `Reading`, and its tensors. Raises CheckpointError with a table of differences."""
    config, likes = cast("Config", recipe.model), recipe.build_on_meta().state_dict()
    names = {name: theirs(name, config) for name in likes if name != BIAS}
    files.check({source: shaped(name, likes[name]) for name, source in names.items()}, weights, where)
    ours = {source: name for name, source in names.items()}
    rows = [(source, store.kind(weight.like), ours[source]) for source, weight in sorted(weights.items())]
    found: dict[str, Tensor | Streamed] = {BIAS: unlikely()}
    for name, source in names.items():
        dtype = weights[source].like.dtype
        like = likes[name].to(torch.float32 if dtype == torch.float64 else dtype)
        found[name] = Streamed(like, partial(joined, name, config, weights[source], like, where))
    return rows, found


def joined(name: str, config: Config, weight: Weight, like: Tensor, where: Path) -> tuple[Tensor]:
    """One of our tensors. Raises CheckpointError unless finite."""
    source = theirs(name, config)
    whole = torch.cat([piece.to(like.dtype) for piece in files.finite(source, weight.pieces(), where)])
    rows = order(name, config)
    return ((whole if rows is None else moved(whole, rows)).view(like.shape),)


def exported(config: Config, ours: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """All tensors under their names. Raises ConfigError if logits of ids that theirs does not have matter."""
    if not torch.equal(ours[BIAS].float(), unlikely()):
        raise ConfigError(
            f"{BIAS} is not that of an imported checkpoint: the model has learned logits of ids that the published "
            "layout lacks: only a run that began with one (convert, train --init-from) can be exported"
        )
    found = dict[str, Tensor]()
    for name, tensor in ours.items():
        if name != BIAS:
            rows, like = order(name, config), shaped(name, tensor)
            same = tensor if rows is None else moved(tensor, back(rows, len(like)))
            found[theirs(name, config)] = same.reshape(like.shape).clone()
    return found
