"""BLT in Meta's two layouts: the hub's (config.json, model.safetensors, entropy_model/) and the download's (.pth).

blt-1b/                                     blt/
    config.json       {"args": …}               blt_1b/params.json, consolidated.pth
    model.safetensors                           entropy_model/params.json, consolidated.pth
    train_args.json   {"data": {"patcher_args": …}}
    entropy_model/params.json, consolidated.pth
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from bytelm.checkpoint.assemble import Recipe
from bytelm.errors import CheckpointError, ConfigError, UsageError
from bytelm.exchange import files
from bytelm.exchange.files import Options, Weights, json_in
from bytelm.exchange.format import Reading
from bytelm.interfaces.model import ByteModel
from bytelm.models.blt import model as blt
from bytelm.models.blt import published
from bytelm.models.blt.formats.hf import ENTROPY_MODEL_THETA, LAYERS, LONG, NGRAMS, QUERIES, SIZES, exported, theta
from bytelm.models.blt.names import ENTROPY_MODEL
from bytelm.models.blt.published import CONFIG, PICKLED, WEIGHTS
from bytelm.models.transformer import entropy_model as transformer
from bytelm.nn.norm import EPS
from bytelm.nn.transformer import StackConfig
from bytelm.patching import entropy, space
from bytelm.units import VOCAB

PARAMS = "params.json"
TRAINED = "train_args.json"
WINDOW, CONTEXT = 512, 24_576


def layout(folder: Path) -> tuple[Path, Path, Path]:
    """The files of a folder: options, weights, and the entropy model's folder. Raises CheckpointError."""
    if (folder / CONFIG).exists() and "model_type" in json_in(folder / CONFIG):
        raise CheckpointError(f"{folder} has a {CONFIG} of transformers: convert it with --format hf")
    for options, weights in ((CONFIG, WEIGHTS), (PARAMS, PICKLED)):
        if (folder / options).exists():
            inside, beside = folder / ENTROPY_MODEL, folder.resolve().parent / ENTROPY_MODEL
            return folder / options, folder / weights, inside if inside.exists() else beside
    raise CheckpointError(f"{folder} has neither {CONFIG} nor {PARAMS}: name the folder of one of Meta's checkpoints")


def described(folder: Path, weights: Weights) -> tuple[Recipe, int]:
    """The recipe and context length of a folder, with feed-forward widths from its `weights`.

    Raises CheckpointError, and ConfigError for an unsupported option.
    """
    file, _, home = layout(folder)
    table = json_in(file)
    inner = next((table[key] for key in ("args", "model") if isinstance(table.get(key), dict)), table)
    args = Options(inner, str(file))
    check(args)
    dim, latent = args.count("dim_local_encoder"), args.count("dim_global")
    model = blt.Config(
        local_dim=dim,
        local_heads=args.count("n_heads_local_encoder"),
        attention_window=args.count("local_attention_window_len", WINDOW, LONG),
        encoder_layers=args.count("n_layers_local_encoder", most=LAYERS),
        decoder_layers=args.count("n_layers_local_decoder", most=LAYERS),
        global_dim=latent,
        global_heads=args.count("n_heads_global"),
        global_layers=args.count("n_layers_global", most=LAYERS),
        queries=args.count("cross_attn_k", most=QUERIES),
        cross_heads=args.count("cross_attn_nheads"),
        encoder_cross="all" if args.get("cross_attn_all_layers_encoder", bool, False) else "last",
        ngram_sizes=args.counts("encoder_hash_byte_group_size", SIZES, NGRAMS),
        ngram_functions=args.count("encoder_hash_byte_group_nb_functions"),
        ngram_rows=args.count("encoder_hash_byte_group_vocab", most=LONG),
        theta=theta(args, None),
        ffn_dims=tuple(
            feed_forward(weights, f"{part}.layers.0", args.where)
            for part in ("local_encoder", "global_transformer", "local_decoder")
        ),
    )
    patching = cuts(folder, table, args, home)
    own = entropy_model(home, weights) if isinstance(patching, entropy.Config) else None
    return Recipe(model, patching, own), args.count("max_encoder_seq_length", CONTEXT, LONG)


def check(args: Options) -> None:
    """Refuse what our BLT does not support."""
    args.only("vocab_size", VOCAB)
    args.only("norm_eps", EPS)
    args.present("local_attention_window_len")
    args.only("encoder_enable_byte_ngrams", False, None)
    for name in ("use_rope", "cross_attn_encoder", "cross_attn_decoder", "cross_attn_init_by_pooling"):
        args.only(name, True)
    for name in ("cross_attn_window_encoder", "cross_attn_window_decoder"):
        args.only(name, None)
    crossed = (True,) if args.count("n_layers_local_decoder") > 1 else (True, False)
    args.only("cross_attn_all_layers_decoder", *crossed)
    args.only("downsampling_by_pooling", "max")
    for heads, kv in (("n_heads_local_encoder", "n_kv_heads"), ("n_heads_global", "n_kv_heads_global")):
        args.only(kv, None, args.get(heads, int))
    for shared in ("dim_local_{}", "n_heads_local_{}"):
        args.only(shared.format("decoder"), args.get(shared.format("encoder"), int))
    if args.get("dim_global", int) == args.get("dim_local_encoder", int):
        raise ConfigError(f"{args.where}: dim_global is dim_local_encoder, where the published code has no projection")


def feed_forward(weights: Weights, block: str, where: str) -> int:
    """The width of a block's feed-forward layer, from its weights."""
    name = f"{block}.feed_forward.w1.weight"
    if name not in weights or weights[name].like.ndim != 2:
        raise CheckpointError(f"the weights of {where} lack {name}, or it is not a matrix")
    return int(weights[name].like.shape[0])


def cuts(folder: Path, table: dict[str, Any], args: Options, home: Path) -> entropy.Config | space.Config:
    """The patching of a model, from its training arguments, else those of its entropy model."""
    tables: list[tuple[Path, dict[str, Any]]] = [(Path(args.where), table)]
    for file in (folder / TRAINED, home / PARAMS):
        if file.exists():
            tables.append((file, json_in(file)))
    for file, found in tables:
        data = found.get("data")
        if isinstance(data, dict) and isinstance(data.get("patcher_args"), dict):
            return cut(Options(data["patcher_args"], f"{file}: data: patcher_args"))
    if "patching_threshold" in args.table:
        return entropy.Config(args.number("patching_threshold"), max_length=None, max_single_byte_run=None)
    names = ", ".join(str(file) for file, _ in tables)
    raise ConfigError(f"{folder} does not contain its patching: none of {names} has data.patcher_args")


def cut(args: Options) -> entropy.Config | space.Config:
    """A patcher's arguments as our configuration."""
    args.only("patching_mode", "entropy", "space")
    longest = None if args.table.get("max_patch_length") is None else args.count("max_patch_length")
    if args.table.get("patching_mode") == "space":
        return space.Config(max_length=longest, max_single_byte_run=None)
    threshold = args.number("threshold")
    plain = entropy.Config(threshold, max_length=longest, max_single_byte_run=None)
    if args.get("monotonicity", bool, False):
        return replace(plain, threshold=None, relative_threshold=threshold, rule="relative")
    if args.table.get("threshold_add") is not None:
        return replace(plain, relative_threshold=args.number("threshold_add"), rule="both")
    return plain


def entropy_model(home: Path, weights: Weights) -> transformer.Config:
    """The entropy model in its folder."""
    table = json_in(home / PARAMS)
    args = Options(table.get("entropy_model", table), str(home / PARAMS))
    args.only("vocab_size", VOCAB)
    args.only("norm_eps", EPS)
    args.only("n_kv_heads", None, args.count("n_heads"))
    args.present("sliding_window")
    dim = args.count("dim")
    return transformer.Config(
        layers=args.count("n_layers", most=LAYERS),
        dim=dim,
        heads=args.count("n_heads"),
        attention_window=args.count("sliding_window", WINDOW, LONG),
        theta=theta(args, ENTROPY_MODEL_THETA),
        ffn_dim=feed_forward(weights, f"{ENTROPY_MODEL}.layers.0", args.where),
    )


def multiple(*stacks: StackConfig) -> int:
    """The largest multiple_of that gives the feed-forward widths of all stacks. Raises ConfigError if none does."""
    # It divides all of them. Smaller divisors round up by less, so that if the largest is too small, all are.
    largest = math.gcd(*(stack.hidden() for stack in stacks))
    if all(0 <= stack.hidden() - 8 * stack.dim // 3 < largest for stack in stacks):
        return largest
    shown = ", ".join(f"{stack.hidden()} of width {stack.dim}" for stack in stacks)
    raise ConfigError(f"feed-forward layers are {shown}: Meta's are 8/3 of it, rounded up to one multiple for all")


def configs(made: Recipe, context: int) -> dict[str, dict[str, Any]]:
    """The JSON files of a recipe, by path in the folder. Raises ConfigError for what Meta's code does not support."""
    model, patching, entropy_model = exported(made)
    if patching.max_single_byte_run is not None:
        raise ConfigError(
            f"patching.max_single_byte_run = {patching.max_single_byte_run}: Meta's code does not support it: "
            "to leave it out, --set patching.max_single_byte_run=none"
        )
    multiples = (multiple(model.encoder(), model.latent(), model.decoder()), multiple(entropy_model.shape().stack()))
    args = {
        "vocab_size": VOCAB,
        "dim_local_encoder": model.local_dim,
        "dim_local_decoder": model.local_dim,
        "dim_global": model.global_dim,
        "n_layers_local_encoder": model.encoder_layers,
        "n_layers_local_decoder": model.decoder_layers,
        "n_layers_global": model.global_layers,
        "n_heads_local_encoder": model.local_heads,
        "n_heads_local_decoder": model.local_heads,
        "n_heads_global": model.global_heads,
        "norm_eps": EPS,
        "rope_theta": model.theta,
        "use_rope": True,
        "multiple_of": multiples[0],
        "local_attention_window_len": model.attention_window,
        "max_encoder_seq_length": context,
        "cross_attn_encoder": True,
        "cross_attn_decoder": True,
        "cross_attn_init_by_pooling": True,
        "downsampling_by_pooling": "max",
        "cross_attn_k": model.queries,
        "cross_attn_nheads": model.cross_heads,
        "cross_attn_all_layers_encoder": model.encoder_cross == "all",
        "cross_attn_all_layers_decoder": True,
        "encoder_hash_byte_group_size": list(model.ngram_sizes),
        "encoder_hash_byte_group_vocab": model.ngram_rows,
        "encoder_hash_byte_group_nb_functions": model.ngram_functions,
    }
    patcher: dict[str, Any] = {"patching_mode": "entropy", "max_patch_length": patching.max_length}
    patcher |= {"threshold": patching.relative_threshold if patching.rule == "relative" else patching.threshold}
    patcher |= {"monotonicity": patching.rule == "relative"}
    patcher |= {"threshold_add": patching.relative_threshold if patching.rule == "both" else None}
    own = {
        "vocab_size": VOCAB,
        "dim": entropy_model.dim,
        "n_layers": entropy_model.layers,
        "n_heads": entropy_model.heads,
        "norm_eps": EPS,
    }
    own |= {
        "rope_theta": entropy_model.theta,
        "sliding_window": entropy_model.attention_window,
        "multiple_of": multiples[1],
    }
    data = {"patcher_args": patcher}
    return {
        CONFIG: {"args": args},
        TRAINED: {"model": args, "data": data},
        f"{ENTROPY_MODEL}/{PARAMS}": {"entropy_model": own, "data": data},
    }


# --- the layout -------------------------------------------------------------------------------------------------------


def read(source: Path, sets: Mapping[str, Any], stack: ExitStack) -> Reading:
    """See `exchange.format.Format`."""
    files.check_folder(source)
    _, file, home = layout(source)
    weights = files.unwrapped(files.weights_in(file, stack), "local_encoder.tok_embeddings.weight")
    if (home / PICKLED).exists():
        own = files.unwrapped(files.weights_in(home / PICKLED, stack), "tok_embeddings.weight")
        weights |= {f"{ENTROPY_MODEL}.{name}": weight for name, weight in own.items()}
    return published.reading(source, "meta", described(source, weights), weights, sets)


def write(folder: Path, recipe: Recipe, context: int, ours: dict[str, Tensor]) -> None:
    """See `exchange.format.Format`."""
    published.write_folder(folder, recipe, configs(recipe, context), published.theirs(recipe, "meta", ours))


def compared(source: Path, model: ByteModel, ids: Tensor, ours: Tensor) -> tuple[Tensor, Tensor]:
    """See `exchange.format.Format`."""
    raise UsageError("--check: Meta's code is not an installable package: leave --check out")
