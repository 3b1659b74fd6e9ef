"""The cost figures of the two papers: MEGABYTE's Figure 3, and BLT's cost against its mean patch."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

from bytelm.checkpoint.assemble import Recipe
from bytelm.config import build, preset
from bytelm.evaluate.costs import costs, counted
from bytelm.patching import space
from bytelm.units import VOCAB

Shape = tuple[int, int, int]
"""Layers, width, heads."""

TEXT = 8192  # bytes: the context of MEGABYTE's models of text (Table 13)
SIXTEEN = 16384  # bytes: the context of BLT-1T (section 4.8)
PER_TOKEN = 4.4  # mean bytes per token of Llama 3 (BLT, Table 1), and its vocabulary:
LLAMA3 = 128_256
GPT3: tuple[Shape, ...] = (
    *((12, 768, 12), (24, 1024, 16), (24, 1536, 16), (24, 2048, 32), (32, 2560, 32), (32, 4096, 32)),
    *((40, 5120, 40), (96, 12288, 96)),
)
# (global, local). The second, fourth and last are 452M + 151M, 5.8B + 604M and 170B + 3.2B, whose shapes are not in the
# paper; the third is the paper's 1.3B + 350M; the others are extrapolated.
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
    """Lines by name; `x` is the axis label, `says` the caption."""

    title: str
    says: str
    x: str
    lines: dict[str, list[Point]]


def figures() -> list[Figure]:
    """The cost figures of both papers."""
    return [by_size(), by_length(), by_patch()]


def by_size() -> Figure:
    """MEGABYTE's Figure 3 against model size, at the context of its text models."""

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
    """MEGABYTE's Figure 3 against sequence length, at the middle one of its three sizes."""

    def line(recipe: Recipe) -> list[Point]:
        model = recipe.build_for_counting()
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
    """BLT 8B against mean patch length, with and without its entropy model, and a Transformer over tokens.

    The latter has the size of BLT's latent Transformer: Llama 3 8B with a wider feed-forward layer, no grouped queries.
    """
    table = preset("blt-8b")
    blt = build(Recipe, {part: table[part] for part in ("model", "patching", "entropy_model")}, "preset blt-8b")
    entropy_model = blt.entropy_model and costs(Recipe(blt.entropy_model.shape()), SIXTEEN)
    model = blt.model
    assert entropy_model is not None
    alone = replace(blt, patching=space.Config(), entropy_model=None).build_for_counting()
    found = [(mean, counted(alone, SIXTEEN, mean)) for mean in MEANS]
    tokens = _transformer((model.global_layers, model.global_dim, model.global_heads), LLAMA3)
    same = costs(tokens, round(SIXTEEN / PER_TOKEN), PER_TOKEN)
    lines = {
        "BLT": [Point(mean, c.paper, c.executed) for mean, c in found],
        "with entropy model": [
            Point(mean, c.paper + entropy_model.paper, c.executed + entropy_model.executed) for mean, c in found
        ],
        "BPE": [Point(mean, same.paper, same.executed) for mean in MEANS],
    }
    says = f"BPE: a Transformer as large as BLT's latent one, over tokens of {PER_TOKEN} bytes."
    return Figure(f"Patch size, BLT 8B reading {SIXTEEN:,} bytes", says, "bytes in a patch", lines)


def _transformer(shape: Shape, vocabulary: int = VOCAB) -> Recipe:
    layers, dim, heads = shape
    return recipe("transformer", layers=layers, dim=dim, heads=heads, vocabulary=vocabulary)


def _linear_transformer(shape: Shape) -> Recipe:
    return recipe("linear", **dict(zip(("layers", "dim", "heads"), shape, strict=True)))


def _in_eights(outer: Shape, inner: Shape) -> Recipe:
    layers, dims, heads = zip(outer, inner, strict=True)
    return recipe("megabyte", sizes=[8], dims=dims, layers=layers, heads=heads)


def recipe(name: str, **model: Any) -> Recipe:
    """A recipe with feed-forward widths rounded up to 256, as in published models."""
    return build(Recipe, {"model": {"name": name, "ffn_multiple": 256, **model}}, name)
