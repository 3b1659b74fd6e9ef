"""BLT in the layout of Hugging Face's transformers: config.json, model.safetensors.

transformers 5.23 ignores these or computes them differently from Meta's code: patching other than by an entropy
threshold (every byte is a patch), `max_patch_length` (not causal), and cross-attention after all of several encoder
layers (pooled again after each, so that only the last one matters).
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bytelm.checkpoint.assemble import Recipe
from bytelm.errors import CheckpointError, ConfigError, MissingExtraError
from bytelm.exchange import files
from bytelm.exchange.files import Options, Weight, Weights, json_in
from bytelm.exchange.format import Reading
from bytelm.find import name_of
from bytelm.interfaces.model import ByteModel
from bytelm.models.blt import model as blt
from bytelm.models.blt import published
from bytelm.models.blt.published import CONFIG, WEIGHTS
from bytelm.models.transformer import entropy_model as transformer
from bytelm.nn.ngrams import PUBLISHED_OFFSET
from bytelm.nn.norm import EPS
from bytelm.patching import entropy
from bytelm.units import VOCAB

CARD = "README.md"
TABLE = "encoder_hash_tok_embedding.weight"
THETA, ENTROPY_MODEL_THETA = 500_000.0, 10_000.0  # defaults
SIZES, ROWS, THRESHOLD = (3, 4, 5, 6, 7, 8), 500_002, 1.335442066192627
CONTEXT = 24_576
LAYERS, QUERIES, NGRAMS, LONG = 1 << 10, 1 << 10, 1 << 6, 1 << 30  # limits of layers, k, n, rows and bytes

CARD_TEXT = """---
library_name: transformers
pipeline_tag: text-generation
tags:
- blt
- byte-level
---

# A Byte Latent Transformer, for transformers

Exported by bytelm. Its tokens are bytes: byte b is the id b + 4, and the tokenizer prepends `<s>` (1).

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("path/to/this/folder")
tokenizer = AutoTokenizer.from_pretrained("path/to/this/folder")
ids = model.generate(**tokenizer("# Monday", return_tensors="pt"), max_new_tokens=80)
print(tokenizer.decode(ids[0], skip_special_tokens=True))
```

**Generate from one text at a time.** transformers' BLT (5.23) does not mask padding in byte hashes, patch boundaries
and positions. Padded on the left, a batch has wrong logits without a warning, and the text-generation pipeline pads so
with `batch_size` above 1. With right padding, the default of this tokenizer, the logits of each text and the training
loss are right; those at padding, from which `generate` would continue, are undefined.

**Without a cache.** Version 5.23 computes wrong logits with one; `use_cache` is false in the configuration here.
"""


def described(folder: Path) -> tuple[Recipe, int, int]:
    """The recipe, context length and cross-attended encoder layer in a config.json.

    Raises CheckpointError, and ConfigError for an unsupported option.
    """
    top = Options(json_in(folder / CONFIG), str(folder / CONFIG))
    top.only("model_type", "blt")
    top.only("vocab_size", VOCAB)
    top.only("patching_mode", "entropy")
    top.only("patch_in_forward", True)
    top.only("max_patch_length", None)
    top.only("tie_word_embeddings", False)
    for key in ("patch_size", "local_attention_window_len"):  # null: patches of one byte; no window
        top.present(key)
    parts = {name: top.part(f"{name}_config") for name in ("encoder", "global", "decoder", "patcher")}
    for part in parts.values():
        check_block(part)
    encoder, latent, decoder = parts["encoder"], parts["global"], parts["decoder"]
    for key in ("hidden_size", "num_attention_heads"):
        if encoder.count(key) != decoder.count(key):
            raise ConfigError(f"{decoder.where}: {key} differs from the encoder's: bytelm's local models share it")
    layers = decoder.count("num_hidden_layers", most=LAYERS)
    decoder.only("cross_attn_all_layers", *((True,) if layers > 1 else (True, False)))
    depth = encoder.count("num_hidden_layers", 1, LAYERS)
    heads = encoder.count("num_attention_heads")
    model = blt.Config(
        local_dim=encoder.count("hidden_size"),
        local_heads=heads,
        attention_window=top.count("local_attention_window_len", 512, LONG),
        encoder_layers=depth,
        decoder_layers=layers,
        global_dim=latent.count("hidden_size"),
        global_heads=latent.count("num_attention_heads"),
        global_layers=latent.count("num_hidden_layers", most=LAYERS),
        queries=top.count("cross_attn_k", 2, QUERIES),
        cross_heads=heads,
        ngram_sizes=top.counts("encoder_hash_byte_group_size", SIZES, NGRAMS),
        ngram_functions=top.count("encoder_hash_byte_group_nb_functions", 1),
        ngram_rows=top.count("encoder_hash_byte_group_vocab", ROWS, LONG),
        theta=same([theta(part, THETA) for part in (encoder, latent, decoder)], f"{top.where}: rope_theta"),
        ffn_dims=(hidden(encoder), hidden(latent), hidden(decoder)),
    )
    threshold = top.number("patching_threshold", THRESHOLD)
    patching = entropy.Config(threshold=threshold, max_length=None, max_single_byte_run=None)
    crossed = depth - 1 if encoder.get("cross_attn_all_layers", bool, False) else 0
    context = encoder.count("max_position_embeddings", CONTEXT, LONG)
    return Recipe(model, patching, entropy_model(parts["patcher"])), context, crossed


def entropy_model(part: Options) -> transformer.Config:
    """The entropy model."""
    part.present("sliding_window")
    return transformer.Config(
        layers=part.count("num_hidden_layers", most=LAYERS),
        dim=part.count("hidden_size"),
        heads=part.count("num_attention_heads"),
        attention_window=part.count("sliding_window", 512, LONG),
        theta=theta(part, ENTROPY_MODEL_THETA),
        ffn_dim=hidden(part),
    )


def check_block(part: Options) -> None:
    """Refuse what our blocks do not support."""
    heads = part.count("num_attention_heads")
    part.only("vocab_size", VOCAB)
    part.only("num_key_value_heads", heads, None)
    part.only("hidden_act", "silu")
    part.only("rms_norm_eps" if "rms_norm_eps" in part.table else "norm_eps", EPS)
    part.only("rope_scaling", None, {"rope_type": "default"})
    rope = part.table.get("rope_parameters")
    if rope is not None:
        Options(rope, f"{part.where}: rope_parameters").only("rope_type", "default")


def theta(part: Options, default: float | None) -> float:
    """The rotary base of one part; required if there is no `default`."""
    rope: dict[str, Any] = part.table.get("rope_parameters") or part.table
    base = Options(rope, part.where).number("rope_theta", default)
    if base <= 0:
        raise ConfigError(f"{part.where}: rope_theta = {base} must be above 0")
    return base


def hidden(part: Options) -> int:
    """The width of a part's feed-forward layers."""
    return part.count("intermediate_size", 8 * part.count("hidden_size") // 3, LONG)


def same(values: list[float], what: str) -> float:
    """The common value. Raises ConfigError if they differ."""
    if len(set(values)) > 1:
        raise ConfigError(f"{what} = {', '.join(map(str, values))}: bytelm's BLT has one for all its parts")
    return values[0]


def config_of(made: Recipe, context: int) -> dict[str, Any]:
    """The config.json of a recipe. Raises ConfigError for what transformers does not support."""
    model, patching, entropy_model = exported(made)
    if patching.rule != "threshold" or patching.max_length is not None or patching.max_single_byte_run is not None:
        raise ConfigError(
            f"transformers only supports a global threshold without bounds, not patching.rule={patching.rule}, "
            f"max_length={patching.max_length}, max_single_byte_run={patching.max_single_byte_run}: "
            "to leave bounds out, --set patching.max_length=none --set patching.max_single_byte_run=none"
        )
    if model.encoder_cross == "all" and model.encoder_layers > 1:
        raise ConfigError("model.encoder_cross = 'all' with several encoder layers: transformers differs there")
    if model.cross_heads != model.local_heads:
        raise ConfigError(f"model.cross_heads = {model.cross_heads}: must be local_heads = {model.local_heads}")
    if not model.ngram_sizes:
        raise ConfigError("model.ngram_sizes = []: transformers' BLT always has n-gram tables")

    def part(layers: int, dim: int, heads: int, inner: int, theta: float, **more: Any) -> dict[str, Any]:
        sizes = {"hidden_size": dim, "intermediate_size": inner, "num_hidden_layers": layers}
        counts = {"num_attention_heads": heads, "num_key_value_heads": heads, "rms_norm_eps": EPS}
        return {**sizes, **counts, "rope_parameters": {"rope_type": "default", "rope_theta": theta}, **more}

    local = (model.local_dim, model.local_heads)
    latent = (model.global_dim, model.global_heads, model.latent().hidden(), model.theta)
    encoder, decoder = ((*local, stack.hidden(), model.theta) for stack in (model.encoder(), model.decoder()))
    ids = {"vocab_size": VOCAB}
    cross = {"cross_attn_k": model.queries, "hidden_size_global": model.global_dim, "max_position_embeddings": context}
    hidden = entropy_model.shape().stack().hidden()
    own = (entropy_model.layers, entropy_model.dim, entropy_model.heads, hidden, entropy_model.theta)
    return {
        "model_type": "blt",
        "architectures": ["BltForCausalLM"],
        # Version 5.23 reads it for the length of caches, common to encoder and decoder.
        "num_hidden_layers": max(model.encoder_layers, model.decoder_layers),
        "use_cache": False,  # wrong logits with one
        **ids,
        "tie_word_embeddings": False,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "patch_in_forward": True,
        "patching_mode": "entropy",
        "patching_threshold": patching.threshold,
        "max_patch_length": None,
        "cross_attn_k": model.queries,
        "local_attention_window_len": model.attention_window,
        "max_position_embeddings": context,
        "encoder_hash_byte_group_size": list(model.ngram_sizes),
        "encoder_hash_byte_group_vocab": model.ngram_rows,
        "encoder_hash_byte_group_nb_functions": model.ngram_functions,
        "encoder_config": part(model.encoder_layers, *encoder, **ids, **cross, cross_attn_all_layers=False),
        "global_config": part(model.global_layers, *latent, max_position_embeddings=context),
        "decoder_config": part(model.decoder_layers, *decoder, **ids, **cross, cross_attn_all_layers=True),
        "patcher_config": part(*own, **ids, sliding_window=entropy_model.attention_window),
    }


def exported(made: Recipe) -> tuple[blt.Config, entropy.Config, transformer.Config]:
    """The parts of a recipe that both published layouts support. Raises ConfigError."""
    if not isinstance(made.model, blt.Config):
        name = name_of(made.model)
        raise ConfigError(f"a {name} cannot be exported: both layouts are those of BLT")
    if not isinstance(made.patching, entropy.Config) or not isinstance(made.entropy_model, transformer.Config):
        raise ConfigError(
            "only entropy patching with a Transformer entropy model can be exported: "
            "train with patching.name=entropy and entropy_model.name=transformer"
        )
    if made.entropy_model.reset_newline:
        raise ConfigError("entropy_model.reset_newline = true: neither layout supports it")
    if made.model.ngram_output:
        raise ConfigError("model.ngram_output = true: neither layout supports it: train with model.ngram_output=false")
    return made.model, made.patching, made.entropy_model


def tokenizer_json() -> dict[str, Any]:
    """A tokenizer.json for transformers and tokenizers: bytes are ids from 4 on, BOS is prepended."""
    # Bytes that are not printable Latin-1 are characters from U+0100 on, as ByteLevel of the library requires.
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in plain]
    shown = {byte: chr(byte) for byte in plain} | {byte: chr(256 + i) for i, byte in enumerate(others)}
    specials = ("<boe>", "<s>", "</s>", "<reserved>")
    vocabulary = {word: i for i, word in enumerate(specials)} | {shown[byte]: byte + 4 for byte in range(256)}
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    first = {"SpecialToken": {"id": "<s>", "type_id": 0}}
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": i, "content": word, **flags} for i, word in enumerate(specials)],
        "normalizer": None,
        "pre_tokenizer": level,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [first, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [first, {"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
            "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}},
        },
        "decoder": level,
        "model": {"type": "BPE", "vocab": vocabulary, "merges": [], "fuse_unk": False, "byte_fallback": False}
        | dict.fromkeys(("dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix")),
    }


# --- the layout -------------------------------------------------------------------------------------------------------


def read(source: Path, sets: Mapping[str, Any], stack: ExitStack) -> Reading:
    """See `exchange.format.Format`."""
    files.check_folder(source)
    recipe, context, layer = described(source)
    return published.reading(source, "hf", (recipe, context), weights_in(source, stack), sets, layer)


def weights_in(source: Path, stack: ExitStack) -> Weights:
    """The weights of a folder, from one file or the index of several."""
    index = source / f"{WEIGHTS}{files.INDEX}"
    return files.unwrapped(files.weights_in(index if index.exists() else source / WEIGHTS, stack), "lm_head.weight")


def write(folder: Path, recipe: Recipe, context: int, ours: dict[str, Tensor]) -> None:
    """See `exchange.format.Format`."""
    published.write_folder(folder, recipe, texts(recipe, context), published.theirs(recipe, "hf", ours))


def texts(recipe: Recipe, context: int) -> dict[str, Any]:
    """The JSON files of a folder, and its card."""
    config = config_of(recipe, context)
    generation = {key: config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id", "use_cache")}
    tokenizer = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": context, "padding_side": "right"}
    tokenizer |= {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<boe>"}
    tokenizer["split_special_tokens"] = True  # otherwise "</s>" in a text would become EOS
    return {
        CONFIG: config,
        "generation_config.json": generation,
        "tokenizer.json": tokenizer_json(),
        "tokenizer_config.json": tokenizer,
        CARD: CARD_TEXT,
    }


def compared(source: Path, model: ByteModel, ids: Tensor, ours: Tensor) -> tuple[Tensor, Tensor]:
    """See `exchange.format.Format`: `[ids, vocab]`, in our order of ids."""
    try:
        from transformers import BltConfig, BltForCausalLM
        from transformers.initialization import no_init_weights
    except ImportError as error:
        raise MissingExtraError("transformers", "hf", "--check") from error
    config: Any = BltConfig.from_pretrained(source)
    if getattr(config, "num_hidden_layers", None) is None:
        config.num_hidden_layers = 1  # version 5.23 reads it, but does not define it
    with no_init_weights():
        theirs: Any = BltForCausalLM(config).eval()
    with ExitStack() as stack:
        weights = weights_in(source, stack)
        for name, parameter in theirs.named_parameters():
            if name not in weights:
                raise CheckpointError(f"{source} lacks {name}, which transformers requires")
            fill(parameter.data, weights[name], read_rows(model, ids) if name.endswith(TABLE) else None)
    order = (torch.arange(VOCAB) + PUBLISHED_OFFSET) % VOCAB
    return theirs(input_ids=order[ids], use_cache=False).logits[0][:, order], ours


def read_rows(model: ByteModel, ids: Tensor) -> Tensor:
    """The rows of the n-gram tables that our model reads, sorted."""
    embed: Any = model.get_submodule("encoder.embed")
    return embed.hashes(ids, torch.arange(ids.shape[1])[None] == 0, embed.initial_state(1)).unique()


def fill(parameter: Tensor, weight: Weight, rows: Tensor | None) -> None:
    """Put a weight into a parameter, or only some rows of it.

    Tables take memory where they are written to. If transformers reads other rows than we do, its logits differ.
    """
    start = 0
    for piece in weight.pieces():
        if rows is None:
            parameter[start : start + len(piece)] = piece
        else:
            some = rows[(rows >= start) & (rows < start + len(piece))]
            parameter[some] = piece[some - start].to(parameter.dtype)
        start += len(piece)
