"""Checkpoints of MEGABYTE-pytorch and MBLM as weights of `models.megabyte_pytorch`.

    recipe(tensors, options)    the shape: from tensor names and shapes where possible, else from their options
    renamed(tensors, recipe)    the same weights under our names

MBLM's names are read as MEGABYTE-pytorch's, whose classes it stacks. A state dict may be under a key, as trainers save
it. `options` are their constructors' arguments: `heads` or `dim_head` if no tensor determines them, and MBLM's `block`.
Options that tensors also determine are compared, those that change no logits are ignored (dropout, flash attention, the
id of padding), and any other option is refused.

Ids 0 to 255 are bytes. A checkpoint with 256 ids gets zero embeddings for our four specials, and an output bias of -30:
the bytes' logits are unchanged, and EOS can still be trained. In one with up to 260 ids those from 256 on are replaced
in the same way: no file says what they mean.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any, cast

import torch
from torch import Tensor

from bytelm.checkpoint.assemble import Recipe
from bytelm.checkpoint.store import check_keys, kind
from bytelm.errors import CheckpointError, ConfigError
from bytelm.exchange.files import unwrapped
from bytelm.models.megabyte_pytorch.model import THETA, Config, Positions
from bytelm.units import BOS, BYTES, VOCAB

UNLIKELY = -30.0  # the bias of ids that the checkpoint does not have
WRAPPERS = ("model", "state_dict", "MODEL")  # keys of a state dict in trainers' files; the last is MBLM's

# MBLM's names -> MEGABYTE-pytorch's; patch embeddings had its numbers in MBLM up to 0.3.
SPELLINGS = (
    (r"^token_embs_rev\.", "token_embs."),
    (r"^(token_embs\.0)\.embedding\.", r"\1."),
    (r"^(token_embs\.\d+)\.embedding\.", r"\1.0."),
    (r"^(token_embs\.\d+)\._post\.1\.", r"\1.2."),
    (r"^(token_embs\.\d+)\._post\.2\.", r"\1.3."),
    (r"^(token_embs\.\d+)\._post\.3\.", r"\1.4."),
    (r"^stage_models\.", "transformers."),
    (r"^to_next_stage_proj\.", "to_next_transformer_projections."),
)
# Of a layer, ours -> theirs.
LAYER = {
    "attention_norm.weight": "0.norm.g",
    "attention.query.weight": "0.to_q.weight",
    "attention.key_value.weight": "0.to_kv.weight",
    "attention.out.weight": "0.to_out.weight",
    "feed_forward_norm.weight": "1.0.g",
    "up.weight": "1.1.weight",
    "up.bias": "1.1.bias",
    "down.weight": "1.4.weight",
    "down.bias": "1.4.bias",
}
WITHOUT_EFFECT = ("attn_dropout", "ff_dropout", "flash_attn", "pad_id", "pad_token_id", "train_checkpoint_chunks")
# Of MBLM's blocks, their names -> MEGABYTE-pytorch's; and those that are handled otherwise, or ignored.
BLOCK = {
    "attn_num_heads": "heads",
    "attn_head_dims": "dim_head",
    "attn_use_rot_embs": "rel_pos",
    "ff_multiplier": "ff_mult",
}
BLOCK_TOO = ("block_type", "pos_emb_type", "attn_dropout", "ff_dropout", "use_flash_attn")


def recipe(tensors: Mapping[str, Any], options: Mapping[str, Any]) -> Recipe:
    """The recipe of a checkpoint's model.

    Raises ConfigError for an option that is missing, unknown, unsupported or contradicted by the tensors, and for a
    vocabulary that is not of bytes; CheckpointError if the shape cannot be read.
    """
    found, mblm = plain(tensors)
    given = by_stage(options, mblm, len(starts(found)))
    config, seen = seen_in(found, given, mblm)
    wrong = [
        f"{name} = {given[name]!r}, but the tensors have {have!r}"
        for name, have in seen.items()
        if differs(given, name, have)
    ]
    if wrong:
        raise ConfigError(f"options that are not the checkpoint's: {'; '.join(wrong)}")
    return Recipe(config)


def renamed(tensors: Mapping[str, Any], recipe: Recipe) -> dict[str, Tensor]:
    """The state dict, in float32, of the model of `recipe`, itself from the function above.

    Raises CheckpointError with a table, under their names, of tensors that are missing, unknown, of another shape, or
    not finite.
    """
    found, _ = plain(tensors)
    found = {name: x.float() if x.is_floating_point() else x for name, x in found.items()}
    config: Config = recipe.model
    ours = recipe.build_for_counting().state_dict()
    names = {name: theirs(name, config) for name in ours}
    vocabulary = vocabulary_of(found)
    expected: dict[str, Tensor] = {}
    for name, source in names.items():
        shape = list(ours[name].shape)
        if name.startswith("head.") or name.endswith(".byte.weight"):
            shape[0] = vocabulary
        expected[source] = torch.empty(shape[1:] if name.endswith(".pad.weight") else shape, device="meta")
    last = f"start_tokens.{len(config.sizes)}"
    expected[last] = torch.empty(config.dims[-1], device="meta")
    for stage, width in enumerate(config.head_dims):
        if config.rotary[stage]:
            expected[f"transformers.{stage}.rotary_emb.inv_freq"] = torch.empty(width // 2, device="meta")
    check_keys(expected, found, "the checkpoint")
    out = {name: moved(name, found[source], config) for name, source in names.items()}
    out["inner.byte.weight"][BOS] = found[last]
    return out


def rows(tensors: Mapping[str, Tensor], recipe: Recipe) -> list[tuple[str, str, str]]:
    """Of each tensor its name, dtype and shape, and our name; "" if it is left out."""
    ours = {theirs(name, recipe.model): name for name in recipe.build_for_counting().state_dict()}
    ours[f"start_tokens.{len(recipe.model.sizes)}"] = "inner.byte.weight"
    names = zip(tensors.items(), plain(tensors)[0], strict=True)
    return sorted((name, kind(tensor), ours.get(spelt, "")) for (name, tensor), spelt in names)


def context(config: Config, options: Mapping[str, Any]) -> int | None:
    """The context length in bytes, if options or learned positions determine it."""
    lengths = options.get("max_seq_len", options.get("seq_lens"))
    if isinstance(lengths, Sequence) and lengths:
        return math.prod(cast("Sequence[int]", lengths))
    return None if config.patches is None else config.patches * config.patch


# --- reading --------------------------------------------------------------------------------------------------------


def plain(tensors: Mapping[str, Any]) -> tuple[dict[str, Tensor], bool]:
    """The tensors under MEGABYTE-pytorch's names, and whether they had MBLM's. Raises CheckpointError."""
    for key in WRAPPERS:
        if isinstance(tensors.get(key), Mapping):
            tensors = tensors[key]
    other = sorted(name for name, x in tensors.items() if not isinstance(x, Tensor))
    if other:
        raise CheckpointError(f"the checkpoint has {other[0]!r}, which is not a tensor: give a state dict of tensors")
    tensors, found = unwrapped(tensors, "start_tokens.0"), dict[str, Tensor]()
    for name, tensor in tensors.items():
        for pattern, spelling in SPELLINGS:
            name = re.sub(pattern, spelling, name)
        found[name] = tensor
    if len(found) != len(tensors):
        raise CheckpointError("the checkpoint has a tensor twice, under an older and a newer name: keep one of them")
    mblm = any(re.match(r"(token_embs_rev|stage_models)\.", name) for name in tensors)
    if not starts(found):
        raise CheckpointError("the checkpoint has no start_tokens.0: it is neither of MEGABYTE-pytorch nor of MBLM")
    return found, mblm


def starts(found: Mapping[str, Tensor]) -> list[int]:
    """The widths of the stages, which are those of their start tokens."""
    widths: list[int] = []
    while (tensor := found.get(f"start_tokens.{len(widths)}")) is not None:
        widths.append(tensor.numel())
    return widths


def size(found: Mapping[str, Tensor], name: str, axis: int = 0) -> int:
    """A dimension of a tensor. Raises CheckpointError if it is missing."""
    if name not in found or found[name].ndim <= axis:
        have = f"of shape {list(found[name].shape)}" if name in found else "missing"
        raise CheckpointError(f"the checkpoint's shape cannot be read: {name} is {have}")
    return found[name].shape[axis]


def vocabulary_of(found: Mapping[str, Tensor]) -> int:
    """Ids of the checkpoint. Raises ConfigError if they are not the bytes and a few specials."""
    count = size(found, "to_logits.weight")
    if not BYTES <= count <= VOCAB:
        raise ConfigError(f"num_tokens = {count}: a model of bytes has {BYTES} ids, and up to {VOCAB} with specials")
    return count


def seen_in(found: Mapping[str, Tensor], given: Mapping[str, Any], mblm: bool) -> tuple[Config, dict[str, Any]]:
    """The shape, and the value in the tensors of each option that may be given."""
    vocabulary = vocabulary_of(found)
    dims = tuple(starts(found))
    stages = range(len(dims))
    if len(dims) < 2:
        raise ConfigError("a checkpoint of one stage is a plain Transformer, which is not supported: give two or more")
    mamba = [name for name in found if re.match(r"transformers\.\d+\.(?!layers\.\d+\.[01]\.|norm\.g|rotary_emb)", name)]
    if mamba:
        raise ConfigError(f"{mamba[0]}: stages are of Transformers, and Mamba stages are not supported")
    units = [size(found, f"token_embs.{k}.2.weight") // dims[-1] for k in stages[:0:-1]] + [1]
    sizes = tuple(one // max(1, other) for one, other in pairwise(units))
    layers = tuple(depth(found, stage) for stage in stages)
    turned = [frequencies(found, stage) for stage in stages]
    learned = [f"pos_embs.{stage}.weight" in found for stage in stages]
    if not mblm:  # all stages have them or none, so that a missing one is detected
        some = next((one for one in turned if one is not None), None)
        turned, learned = [some if one is None else one for one in turned], [any(learned)] * len(dims)
    shapes = [heads_of(found, stage, turned[stage], given) if layers[stage] else (1, 2, False) for stage in stages]
    wide = [size(found, f"transformers.{s}.layers.0.1.1.weight") if layers[s] else dims[s] for s in stages]
    ffn = tuple(max(1, inner // dim) for inner, dim in zip(wide, dims, strict=True))
    other = () if wide == [times * dim for times, dim in zip(ffn, dims, strict=True)] else tuple(wide)
    rotary = tuple(one is not None for one in turned)
    rope = given.get("rope", {})  # of MBLM, not visible in tensors
    positions: tuple[Positions, ...] = tuple(
        "learned" if one else "rotary" if rope.get(stage) else "none" for stage, one in enumerate(learned)
    )
    patches = size(found, "pos_embs.0.weight") if learned[0] else None
    heads, widths = (tuple(shape[index] for shape in shapes) for index in (0, 1))
    shared = any(one for _, _, one in shapes)
    config = Config(sizes, dims, layers, heads, widths, ffn, rotary, positions, patches, shared, other)
    seen = {"dim": dims, "depth": layers, "ff_mult": ffn, "rel_pos": rotary, "heads": heads, "dim_head": widths}
    return config, {**seen, "pos_emb": tuple(learned), "num_tokens": vocabulary, "max_seq_len": (patches, *sizes)}


def differs(given: Mapping[str, Any], name: str, seen: Any) -> bool:
    """Whether a given option contradicts the tensors; None is unknown."""
    if name not in given:
        return False
    if name == "max_seq_len":
        return given[name][1:] != seen[1:] or (seen[0] is not None and given[name][0] != seen[0])
    return given[name] != seen


def depth(found: Mapping[str, Tensor], stage: int) -> int:
    """Layers of a stage."""
    numbers = [re.match(rf"transformers\.{stage}\.layers\.(\d+)\.", name) for name in found]
    return max((int(match[1]) + 1 for match in numbers if match), default=0)


def heads_of(
    found: Mapping[str, Tensor], stage: int, turned: Tensor | None, given: Mapping[str, Any]
) -> tuple[int, int, bool]:
    """Heads of a stage, their width, whether they share one of keys. Raises ConfigError if unknown."""
    attention = f"transformers.{stage}.layers.0.0"
    inner, keys = size(found, f"{attention}.to_q.weight"), size(found, f"{attention}.to_kv.weight") // 2
    shared = keys < inner
    if shared:
        width = keys
    elif turned is not None:
        width = 2 * len(turned)
    elif "dim_head" in given:
        width = given["dim_head"][stage]
    elif "heads" in given:
        width = inner // max(1, given["heads"][stage])
    else:
        raise ConfigError(
            f"heads is missing: no tensor determines how many share the {inner} rows of {attention}.to_q.weight; "
            "give heads or dim_head (whose default is 64 in MEGABYTE-pytorch)"
        )
    if width < 1 or inner % width:
        raise ConfigError(f"heads of width {width} do not divide the {inner} rows of {attention}.to_q.weight")
    return inner // width, width, shared


def frequencies(found: Mapping[str, Tensor], stage: int) -> Tensor | None:
    """A stage's rotary frequencies. Raises ConfigError if they are not those of THETA."""
    have = found.get(f"transformers.{stage}.rotary_emb.inv_freq")
    if have is not None:
        wanted = THETA ** -(torch.arange(len(have), dtype=torch.float64) / max(1, len(have)))
        if not torch.allclose(have.double().cpu(), wanted, rtol=1e-2, atol=0):
            raise ConfigError(f"transformers.{stage}.rotary_emb.inv_freq: not the frequencies of theta = {THETA:g}")
    return have


# --- options --------------------------------------------------------------------------------------------------------


def by_stage(options: Mapping[str, Any], mblm: bool, stages: int) -> dict[str, Any]:
    """Their options under MEGABYTE-pytorch's names, with one value per stage."""
    same = {"hidden_dims": "dim", "num_layers": "depth", "seq_lens": "max_seq_len"} if mblm else {}
    known = {"num_tokens": False, "max_seq_len": True, "dim": True, "depth": True}
    known |= {"heads": True, "dim_head": True, "ff_mult": True, "rel_pos": True, "pos_emb": True}
    given: dict[str, Any] = {}
    for name, value in options.items():
        own = same.get(name, name)
        if own in known:
            given[own] = each(value, name, stages) if known[own] else value
        elif name not in WITHOUT_EFFECT and not (mblm and name == "block"):
            own_names = ["num_tokens", *same, "block"] if mblm else list(known)
            raise ConfigError(f"option {name} = {value!r} is not supported; those that are: {', '.join(own_names)}")
    if not mblm:
        return given
    if "block" not in options:
        raise ConfigError(
            "block is missing: MBLM's tensors do not contain pos_emb_type; give the block, or one per stage"
        )
    blocks = options["block"] if isinstance(options["block"], Sequence) else [options["block"]] * stages
    if len(blocks) != stages:
        raise ConfigError(f"block: {len(blocks)} blocks for {stages} stages: give one per stage, or one for all")
    return given | of_blocks([checked(block, stage) for stage, block in enumerate(blocks)])


def each(value: Any, name: str, stages: int) -> tuple[Any, ...]:
    """One value per stage. Raises ConfigError for another number of values, and for non-numbers."""
    values = tuple(cast("Sequence[Any]", value)) if isinstance(value, list | tuple) else (value,) * stages
    if len(values) != stages or any(not isinstance(one, int) for one in values):
        raise ConfigError(f"{name} = {value!r}: give an integer, or {stages} of them, one per stage")
    return values


def checked(block: Any, stage: int) -> Mapping[str, Any]:
    """A stage's block. Raises ConfigError if it is not a causal Transformer, and for unknown options."""
    if not isinstance(block, Mapping):
        raise ConfigError(f"block of stage {stage} = {block!r}: give its settings as a table")
    block = cast("Mapping[str, Any]", block)
    kind = block.get("block_type", "mamba" if "d_state" in block else "transformer")
    if kind != "transformer":
        raise ConfigError(f"block_type = {kind!r} of stage {stage} is not supported: only 'transformer' is")
    unknown = sorted(block.keys() - {*BLOCK, *BLOCK_TOO})
    if unknown:
        raise ConfigError(f"block of stage {stage}: option {unknown[0]} = {block[unknown[0]]!r} is not supported")
    if block.get("pos_emb_type") not in (None, "fixed", "rope"):
        kind = block["pos_emb_type"]
        raise ConfigError(f"pos_emb_type = {kind!r} of stage {stage} is not supported: 'fixed', 'rope' and none are")
    return block


def of_blocks(blocks: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Options from the blocks under MEGABYTE-pytorch's names; only those that all blocks have."""
    given = {
        name: each([block[own] for block in blocks], own, len(blocks))
        for own, name in BLOCK.items()
        if all(own in block for block in blocks)
    }
    kinds = [block.get("pos_emb_type") for block in blocks]
    rope = {stage: kind == "rope" for stage, kind in enumerate(kinds)}
    return {**given, "pos_emb": tuple(kind == "fixed" for kind in kinds), "rope": rope}


# --- writing --------------------------------------------------------------------------------------------------------


def theirs(name: str, config: Config) -> str:
    """Their name of one of our tensors."""
    if name.startswith("head."):
        return f"to_logits.{name.removeprefix('head.')}"
    last = len(config.sizes)
    part, _, rest = name.partition(".")
    level, rest = (last, rest) if part == "inner" else (int(rest.partition(".")[0]), rest.partition(".")[2])
    back = last - level  # their byte tables are in reverse order
    if rest.startswith("stack.blocks."):
        number, _, tail = rest.removeprefix("stack.blocks.").partition(".")
        return f"transformers.{level}.layers.{number}.{LAYER[tail]}"
    if rest.startswith("widen."):
        number, _, tail = rest.removeprefix("widen.").partition(".")
        return f"token_embs.{back}.{int(number) + 2}.{tail}"
    return {
        "byte.weight": f"token_embs.{back}.0.weight" if back else "token_embs.0.weight",
        "pad.weight": f"start_tokens.{level}",
        "position.weight": f"pos_embs.{level}.weight",
        "norm.weight": f"transformers.{level}.norm.g",
        "parts.weight": f"to_next_transformer_projections.{level}.1.weight",
        "parts.bias": f"to_next_transformer_projections.{level}.1.bias",
    }[rest]


def moved(name: str, tensor: Tensor, config: Config) -> Tensor:
    """Their tensor as ours: padded to our vocabulary, rotary pairs interleaved."""
    if name.startswith("head.") or name.endswith(".byte.weight"):
        fill = UNLIKELY if name == "head.bias" else 0.0
        out = torch.full((VOCAB, *tensor.shape[1:]), fill)
        out[:BYTES] = tensor[:BYTES]
        return out
    if name.endswith(".pad.weight"):
        return tensor[None].clone()
    level = len(config.sizes) if name.startswith("inner.") else int(name.split(".")[1])
    width = config.head_dims[level]
    if name.endswith("attention.query.weight") and config.rotary[level]:
        return paired(tensor, width)
    if name.endswith("attention.key_value.weight") and config.rotary[level]:
        keys, values = tensor.chunk(2)
        return torch.cat([paired(keys, width), values])
    return tensor.clone()


def paired(rows: Tensor, width: int) -> Tensor:
    """Rows of heads from rotary halves to interleaved pairs."""
    return rows.unflatten(0, (-1, 2, width // 2)).transpose(1, 2).reshape(rows.shape)
