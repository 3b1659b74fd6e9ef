"""What a model costs, counted from its shape without training it, and the cost figures of the two papers.

    paper      the formula of the architecture's own paper: attention over the causal half, what surrounds it left out
    executed   everything that a pass here multiplies: masked parts of attention, the scorer, hash tables
    hnet       ... and the lookup of a byte, or token, as if it were a product with a one-hot vector (as H-Net counts)

All three are operations of a forward pass, two for a multiplication and its addition; a step of training is three times
that. None counts norms, softmax, activations, rotations, residuals or hashing.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from bytelm.checkpoint.assemble import Recipe
from bytelm.config import build, preset
from bytelm.errors import UsageError
from bytelm.models import blt, linear, megabyte, megabyte_pytorch, perceiver, transformer
from bytelm.models.base import ByteModel
from bytelm.nn.cross import CrossAttention
from bytelm.nn.transformer import StackConfig
from bytelm.patching import entropy, space
from bytelm.units import VOCAB

TOKEN = 3.4  # bytes: the mean token of a vocabulary of 4096 on English novels
INPUTS = ("byte", "embedding")  # what the tables of bytes and of tokens are called in models


@dataclass(frozen=True)
class Costs:
    """What a model costs. FLOPs are of a forward pass, per byte; see the file for the conventions."""

    parameters: int
    """Trained ones, of the model itself: the patcher's scorer is not among them."""
    tables: int
    """Of them in embedding tables: bytes or tokens, n-grams, learned positions, pads. No output matrix is one."""
    scorer: int
    """Parameters of the patcher's scorer."""
    paper: float
    """FLOPs by the formula of the paper, to which the scorer is free."""
    executed: float
    """FLOPs of all matrix products, the scorer's too; additions of hash-table rows; BLT's cross-attention."""
    hnet: float
    """FLOPs executed, and those of the input embeddings as products. n-gram tables stay lookups."""
    read: float
    """Bytes of weights and caches read for one more byte, in bfloat16, one row, in the middle of a window."""


def usual_mean(recipe: Recipe) -> float:
    """Bytes of a patch or token where nothing was read yet: what patching is to be calibrated to, or TOKEN."""
    if isinstance(recipe.patching, entropy.Config):
        return recipe.patching.mean_size
    return TOKEN if getattr(recipe.model, "vocabulary", VOCAB) > VOCAB else 1.0


def costs(recipe: Recipe, window: int, mean: float = 1.0) -> Costs:
    """The costs of a recipe's model that reads `window` ids in a row, built without memory.

    `mean`: bytes of a patch, or of a token for a model of tokens; models of bytes, and MEGABYTE, which counts its own
    patches, do not look at it. Patching need not be calibrated. Raises UsageError for an architecture without formula.
    """
    return counted(recipe.sketch(), window, mean)


def counted(model: ByteModel, window: int, mean: float = 1.0) -> Costs:
    """The same of a model that is there."""
    patcher = getattr(model, "patcher", nn.Identity())
    scorer = next((part for part in patcher.modules() if isinstance(part, ByteModel)), None)
    scored = sum(p.numel() for p in patcher.parameters())
    tables = {name: m.weight.numel() for name, m in model.named_modules() if isinstance(m, nn.Embedding)}
    inputs = sum(count for name, count in tables.items() if name.rpartition(".")[2] in INPUTS)
    own = sum(count for name, count in tables.items() if not name.startswith("patcher."))
    output = model.byte.weight.numel() if isinstance(model, megabyte.Megabyte) else 0  # a table that is multiplied too

    size = mean if model.vocabulary > VOCAB else 1.0  # bytes of an id
    executed = model.flops(window, max(1, round(window / mean))) / window / size + _beside_products(model)
    read = _read(model, window // 2, mean) / size
    if scorer is not None:
        executed += scorer.flops(window, 0) / window
        read += 2 * _read(scorer, window // 2, 1.0)  # in float32 whatever the model is in: a boundary is decided once
    return Costs(
        parameters=sum(p.numel() for p in model.parameters()) - scored,
        tables=own - output,
        scorer=scored,
        paper=_paper(model.config, window, mean),
        executed=executed,
        hnet=executed + 2 * inputs / size,
        read=read,
    )


def _beside_products(model: ByteModel) -> float:
    """Operations per byte that are no matrix products: of BLT, which has `dim` additions for each n-gram.

    And the scores and mixes of its cross-attention, which cost bytes × k: each byte of a patch is met by the k queries
    of that patch, and each byte queries the k parts of one; both in every crossed layer.
    """
    if not isinstance(model, blt.BLT):
        return 0.0
    config = model.config
    ngrams = len(config.ngram_sizes) * config.ngram_functions
    crossed = len(model.encoder.cross) + config.decoder_layers
    return (ngrams + 4 * config.queries * crossed) * config.local_dim


# --- the papers' formulas ---------------------------------------------------------------------------------------------


def _paper(config: Any, window: int, mean: float) -> float:
    """FLOPs per byte of an architecture by its paper, on the layers of `config`. Raises UsageError for others.

    Where a paper's layer has two matrices four times as wide as it is, ours have three of 8/3: it is these that count.
    """
    match config:
        case transformer.Config():
            found = _appendix_b(config.stack(), window) + _output(config.dim, config.vocabulary)
            return found / (mean if config.vocabulary > VOCAB else 1.0)
        case blt.Config():
            return _blt(config, window, mean)
        case megabyte.Config():
            return _megabyte(config, window)
        case megabyte_pytorch.Config():
            return _megabyte_pytorch(config, window)
        case linear.Config():
            return _linear(config.stack()) + _output(config.dim)
        case perceiver.Config():
            # Its paper has no formula: the layer that reads all inputs, and those over latents, as Transformers count.
            found = _appendix_b(config.cross(), window) + _appendix_b(config.inner(), window)
            return found + _output(config.dim)
        case _:
            raise UsageError(f"no cost formula for {type(config).__module__}: there is one for each of bytelm.models")


def _appendix_b(stack: StackConfig, context: float) -> float:
    """A position of a Transformer (BLT, App. B): feed-forward, QKVO, and attention 4 l h (m + 1) / 2."""
    seen = min(context, stack.window or context)
    return stack.layers * (stack.products(1) + 4 * stack.dim * (seen + 1) / 2)


def _output(dim: int, vocabulary: int = VOCAB) -> float:
    """The logits of a position (BLT, App. B, "De-Embedding"; the same in Kaplan et al. 2020, Table 1)."""
    return 2 * dim * vocabulary


def _cross(layers: int, dim: int, keys: float, ratio: float) -> float:
    """A query of cross-attention (BLT, App. B): Attn(l, h, m=keys), halved as if causal, and QKVO(l, h, r=ratio)."""
    return layers * (4 * dim * (keys + 1) / 2 + (2 * ratio + 2) * 2 * dim**2)


def _blt(config: blt.Config, window: int, mean: float) -> float:
    """BLT per byte (App. B, its last equation), n_p = `mean`. Its projections between widths are not in it."""
    k, dim = config.queries, config.local_dim
    crossed = config.encoder_layers if config.encoder_cross == "all" else 1
    found = _appendix_b(config.latent(), window / mean) / mean
    found += _appendix_b(config.encoder(), window) + _appendix_b(config.decoder(), window) + _output(dim)
    found += _cross(crossed, dim, keys=mean, ratio=mean / k) * k / mean
    return found + _cross(config.decoder_layers, dim, keys=k, ratio=k / mean)


def _kaplan(stack: StackConfig, context: float) -> float:
    """A position of a Transformer (Kaplan et al. 2020, Table 1): 2 m + 2 l n_ctx h, m without embeddings."""
    return stack.layers * (stack.products(1) + 2 * stack.heads * stack.head_dim * context)


def _megabyte(config: megabyte.Config, window: int) -> float:
    """MEGABYTE per byte (its section 3.1): 2 (m_g / P + m_l), and attention as Kaplan counts it.

    The global context is T / P patches, that of a stage inside is a patch and what it sees of the one before.
    """
    found = _kaplan(config.stack(0), window / config.patch) / config.patch
    for level, size in enumerate(config.sizes, 1):
        found += _kaplan(config.stack(level), size + config.reach) / config.unit(level)
    return found + _output(config.dims[-1])


def _megabyte_pytorch(config: megabyte_pytorch.Config, window: int) -> float:
    """The same for its other form: start tokens, and what is made of patches and of outputs, are left out there too."""
    contexts = (window / config.patch, *config.sizes)
    found = (_kaplan(config.stack(level), seen) / config.unit(level) for level, seen in enumerate(contexts))
    return sum(found) + _output(config.dims[-1])


def _linear(stack: StackConfig) -> float:
    """A position of a linear Transformer (MEGABYTE, section 3.1): attention is taken for 9 D a layer."""
    return stack.layers * (stack.products(1) + 9 * stack.dim)


# --- bytes read -------------------------------------------------------------------------------------------------------


def _read(model: ByteModel, length: int, mean: float) -> float:
    """Bytes read for one more id after `length`, weights and caches in bfloat16. Tables, where a row is read, are free.

    What is done once a patch counts for its share, as in `decoding.Decoder.traffic`. Raises UsageError.
    """
    match model:
        case transformer.ByteTransformer():
            return 2 * (_weights(model) + _cached(model.config.stack(), length))
        case perceiver.PerceiverAR():
            caches = _cached(model.config.cross(), length)
            caches += _cached(model.config.inner(), min(length, model.config.latents / 2))  # in the middle of a block
            return 2 * (_weights(model) + caches)
        case linear.LinearTransformer():
            config = model.config
            sums = config.layers * config.dim * (config.dim // config.heads + 1)
            return 2 * _weights(model) + 4 * sums  # sums are float32 whatever weights are
        case blt.BLT():
            return _blt_read(model, length, mean)
        case megabyte.Megabyte():
            return _megabyte_read(model, length)
        case megabyte_pytorch.MegabytePyTorch():
            return _megabyte_pytorch_read(model, length)
        case _:
            raise UsageError(f"no count of the bytes that a {type(model).__name__} reads: bytelm.models have one")


def _weights(*modules: nn.Module) -> int:
    """Numbers in the linear layers of modules."""
    return sum(part.weight.numel() for m in modules for part in m.modules() if isinstance(part, nn.Linear))


def _cached(stack: StackConfig, seen: float) -> float:
    """Numbers in the keys and values of what a position sees."""
    return 2 * stack.layers * stack.key_heads * stack.head_dim * min(seen, stack.window or seen)


def _blt_read(model: blt.BLT, length: int, mean: float) -> float:
    config, encoder, decoder = model.config, model.encoder, model.decoder
    keys = [part.key_value for part in decoder.cross if isinstance(part, CrossAttention)]  # of patches, kept with them
    patchwise = _weights(encoder.split, encoder.cross, model.widen, model.latent, decoder.split, *keys)
    bytewise = _weights(encoder, model.widen, model.latent, decoder) - patchwise
    bytewise += _cached(config.encoder(), length) + _cached(config.decoder(), length)
    return 2 * (bytewise + (patchwise + _cached(config.latent(), length / mean)) / mean)


def _megabyte_read(model: megabyte.Megabyte, length: int) -> float:
    config = model.config
    found = (_weights(model.outer) + _cached(config.stack(0), length / config.patch)) / config.patch
    for level, (embed, inner) in enumerate(zip(model.embed, model.inner, strict=True)):
        # As a position opens, what it stands for is embedded, and its output is cut for the stage below.
        found += _weights(embed, inner.narrow, inner.condition) / config.unit(level)
        stage = _weights(inner.stack) + _cached(config.stack(level + 1), inner.size / 2 + inner.reach)
        found += stage / config.unit(level + 1)
    return 2 * (found + model.byte.weight.numel())


def _megabyte_pytorch_read(model: megabyte_pytorch.MegabytePyTorch, length: int) -> float:
    """A start token is read beside the position after it, for which the weights are read anyhow."""
    config = model.config
    found = float(_weights(model.head))
    for level, part in enumerate((*model.outer, model.inner)):
        stack, between = config.stack(level), 0 < level < len(config.sizes)
        seen = config.sizes[level - 1] / 2 if level else length / config.patch
        read = 1 - 1 / config.sizes[level - 1] if between else 1.0  # the last sub-patch of a patch is left out
        found += read * (_weights(part) + _cached(stack, seen)) / config.unit(level)
    return 2 * found


# --- the papers' figures ----------------------------------------------------------------------------------------------

Shape = tuple[int, int, int]
"""Layers, width, heads."""

TEXT = 8192  # bytes: the context of MEGABYTE's models of text (Table 13)
SIXTEEN = 16384  # bytes: the context of BLT's largest runs, BLT-1T (section 4.8)
PER_TOKEN = 4.4  # bytes of a token of Llama 3 (BLT, Table 1), whose ids are so many:
LLAMA3 = 128_256
GPT3: tuple[Shape, ...] = (
    *((12, 768, 12), (24, 1024, 16), (24, 1536, 16), (24, 2048, 32), (32, 2560, 32), (32, 4096, 32)),
    *((40, 5120, 40), (96, 12288, 96)),
)
# (global, local). The second, fourth and last are 452M + 151M, 5.8B + 604M and 170B + 3.2B, of which the paper tells no
# shapes; the third is the paper's 1.3B + 350M; the others go on in the same way.
MEGABYTES: tuple[tuple[Shape, Shape], ...] = (
    ((12, 768, 12), (12, 512, 8)),
    ((9, 2048, 32), (12, 1024, 16)),
    ((24, 2048, 32), (24, 1024, 16)),
    ((29, 4096, 32), (12, 2048, 32)),
    ((40, 5120, 40), (24, 2048, 32)),
    ((94, 12288, 96), (16, 4096, 32)),
)
MIDDLE, MIDDLE_MEGABYTE = GPT3[5], MEGABYTES[3]  # 6.7B, and 5.8B + 604M
LENGTHS = (1_000, 2_000, 5_000, 10_000, 20_000, 50_000, 100_000, 200_000, 500_000, 1_000_000)
MEANS = (1.0, 1.5, 2.0, 3.0, 4.0, 4.5, 6.0, 8.0, 12.0, 16.0)


@dataclass(frozen=True)
class Point:
    """FLOPs per byte of a forward pass at `x`, in two conventions."""

    x: float
    paper: float
    executed: float


@dataclass(frozen=True)
class Figure:
    """Lines by their names; `x` says what stands on the axis, `says` what the lines are."""

    title: str
    says: str
    x: str
    lines: dict[str, list[Point]]


def figures() -> list[Figure]:
    """Both papers' figures of costs."""
    return [by_size(), by_length(), by_patch()]


def by_size() -> Figure:
    """MEGABYTE's Figure 3 against model size, at the context of its models of text."""

    def line(recipes: Iterable[Recipe]) -> list[Point]:
        found = [costs(recipe, TEXT) for recipe in recipes]
        return [Point(c.parameters, c.paper, c.executed) for c in found]

    lines = {
        "Transformer": line(map(_transformer, GPT3)),
        "linear": line(map(_linear_transformer, GPT3)),
        "MEGABYTE": line(_in_eights(*shapes) for shapes in MEGABYTES),
    }
    says = "Transformers, linear ones too, in GPT-3's shapes; MEGABYTE with patches of 8 bytes."
    return Figure(f"Model size, reading {TEXT:,} bytes", says, "parameters", lines)


def by_length() -> Figure:
    """MEGABYTE's Figure 3 against the bytes in a sequence, at the middle one of its three sizes."""

    def line(recipe: Recipe) -> list[Point]:
        model = recipe.sketch()
        found = [(length, counted(model, length)) for length in LENGTHS]
        return [Point(length, c.paper, c.executed) for length, c in found]

    lines = {
        "Transformer": line(_transformer(MIDDLE)),
        "linear": line(_linear_transformer(MIDDLE)),
        "MEGABYTE": line(_in_eights(*MIDDLE_MEGABYTE)),
    }
    says = "Transformers, linear ones too, in GPT-3's shape 6.7B; MEGABYTE 5.8B + 604M with patches of 8 bytes."
    return Figure("Sequence length, at 6.5B parameters", says, "bytes in a sequence", lines)


def by_patch() -> Figure:
    """BLT 8B against its mean patch, its scorer counted or not, beside a Transformer over tokens.

    That one is as large as BLT's latent Transformer, which is the shape of Llama 3 8B but for grouped queries and
    a feed-forward layer that is wider instead.
    """
    table = preset("blt-8b")
    recipe = build(Recipe, {part: table[part] for part in ("model", "patching", "scorer")}, "preset blt-8b")
    model, scorer = recipe.model, costs(Recipe(recipe.scorer.shape()), SIXTEEN)  # pyright: ignore[reportOptionalMemberAccess]
    alone = replace(recipe, patching=space.Config(), scorer=None).sketch()
    found = [(mean, counted(alone, SIXTEEN, mean)) for mean in MEANS]
    tokens = _transformer((model.global_layers, model.global_dim, model.global_heads), LLAMA3)
    same = costs(tokens, round(SIXTEEN / PER_TOKEN), PER_TOKEN)
    lines = {
        "BLT": [Point(mean, c.paper, c.executed) for mean, c in found],
        "with scorer": [Point(mean, c.paper + scorer.paper, c.executed + scorer.executed) for mean, c in found],
        "BPE": [Point(mean, same.paper, same.executed) for mean in MEANS],
    }
    says = f"BPE: a Transformer as large as BLT's latent one, over tokens of {PER_TOKEN} bytes."
    return Figure(f"Patch size, BLT 8B reading {SIXTEEN:,} bytes", says, "bytes in a patch", lines)


def _transformer(shape: Shape, vocabulary: int = VOCAB) -> Recipe:
    layers, dim, heads = shape
    return Recipe(transformer.Config(layers, dim, heads, ffn_multiple=256, vocabulary=vocabulary))


def _linear_transformer(shape: Shape) -> Recipe:
    return Recipe(linear.Config(*shape, ffn_multiple=256))


def _in_eights(outer: Shape, inner: Shape) -> Recipe:
    layers, dims, heads = zip(outer, inner, strict=True)
    return Recipe(megabyte.Config((8,), dims, layers, heads, ffn_multiple=256))
