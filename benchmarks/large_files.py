"""Files of the published BLTs' true shapes, with random weights: what is measured where the weights cannot be had.

    python benchmarks/large_files.py --size 1b --layout hf OUT      config.json, shards of 5 GB, their index: 9.1 GB
    python benchmarks/large_files.py --size 7b --layout meta OUT    params.json, consolidated.pth, entropy_model/: 21 GB

Both layouts of a size have the same weights, in bfloat16. Nothing larger than 100 MB is held in memory. Matrices are
normal with the usual deviation of 1 / sqrt(inputs), norms are 1. The entropy model's embedding and head are larger, so
that entropies differ from byte to byte; the threshold is the one at which patches of English text (the Apache licence)
have a mean of 4.5 bytes.

Values are one list of 4 million normal numbers, which each tensor reads from a place of its own on, round and round;
the list's length is a prime, so that no two rows of a matrix are equal.
"""

from __future__ import annotations

import argparse
import json
import mmap
import sys
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from bytelm.checkpoint import tensors
from bytelm.checkpoint.assemble import Recipe
from bytelm.config import build, preset
from bytelm.evaluate.stream import entropies
from bytelm.exchange.files import INDEX
from bytelm.models.blt import names
from bytelm.models.blt.formats import hf, meta
from bytelm.models.blt.names import ENTROPY_MODEL, Match
from bytelm.models.blt.published import PICKLED, WEIGHTS

SIZES = {"1b": preset("blt-1b"), "7b": preset("blt-8b")}  # the second is called 7B by its file, 8B by its paper
TINY = {"local_dim": 32, "local_heads": 2, "cross_heads": 2, "decoder_layers": 2, "ngram_rows": 1009}
TINY |= {"global_dim": 64, "global_heads": 2, "global_layers": 2}
SIZES["tiny"] = {**SIZES["1b"], "model": SIZES["1b"]["model"] | TINY}  # for the tests of this program
SIZES["tiny"]["entropy_model"] = SIZES["1b"]["entropy_model"] | {"layers": 2, "dim": 64, "heads": 2}
LAYOUTS = ("hf", "meta")
SHARD = 5_000_000_000  # bytes, as in transformers
PERIOD = (1 << 22) - 3  # a prime
PATCH = 4.5  # mean bytes
LICENCE = Path(__file__).parents[1] / "LICENSE"
PATCHER = "patcher.entropy_model.model."
LARGER = {f"{PATCHER}embedding.weight": 768**0.5, f"{PATCHER}head.weight": 4.0}
"""What the usual deviation is multiplied by."""


def recipe_of(size: str) -> Recipe:
    """The recipe of a size, its feed-forward widths written out, its threshold calibrated."""
    recipe = build(Recipe, {key: SIZES[size][key] for key in ("model", "patching", "entropy_model")}, size)
    model = recipe.model
    widths = tuple(stack.hidden() for stack in (model.encoder(), model.latent(), model.decoder()))
    patching = replace(recipe.patching, threshold=threshold(recipe))
    return replace(recipe, model=replace(model, ffn_dims=widths), patching=patching)


def threshold(recipe: Recipe) -> float:
    """The entropy above which a byte of English text opens a patch once in 4.5 bytes."""
    model = recipe.entropy_model.build()
    likes = {PATCHER + name: like for name, like in model.model.state_dict().items()}
    weights: dict[str, Tensor] = {}
    for match in names.matches(likes, recipe.model, "hf"):
        parts = [
            torch.cat([*values(match.ours, start, like)]).view(like.shape)
            for start, like in places(match, likes).values()
        ]
        weights[match.ours.removeprefix(PATCHER)] = match.join(parts).float()
    model.model.load_state_dict(weights, assign=True)
    found = torch.cat([*entropies(model.eval(), LICENCE.read_bytes()[:8000])])
    return round(float(found[1:-1].quantile(1 - 1 / PATCH)), 6)


# --- values -----------------------------------------------------------------------------------------------------------


def places(match: Match, likes: Mapping[str, Tensor]) -> dict[str, tuple[int, Tensor]]:
    """Of each of their tensors in one of ours where its values begin, and its shape in bfloat16, on the meta device."""
    found: dict[str, tuple[int, Tensor]] = {}
    start = zlib.crc32(match.ours.encode())
    for name, part in match.split(likes[match.ours]).items():
        found[name] = (start, torch.empty(part.shape, dtype=torch.bfloat16, device="meta"))
        start += part.numel()
    return found


def values(ours: str, start: int, like: Tensor) -> Iterator[Tensor]:
    """The values of a tensor, some at a time."""
    deviation = 0.0 if like.ndim == 1 else like.shape[-1] ** -0.5 * LARGER.get(ours, 1.0)
    period, left, start = numbers(deviation), like.numel(), start % PERIOD
    while left:
        piece = period[start : start + left]
        yield piece
        left, start = left - len(piece), 0


@cache
def numbers(deviation: float) -> Tensor:
    """The list that all values of this deviation are from; of none: ones."""
    if not deviation:
        return torch.ones(PERIOD, dtype=torch.bfloat16)
    return (torch.randn(PERIOD, generator=torch.Generator().manual_seed(0)) * deviation).bfloat16()


# --- files ------------------------------------------------------------------------------------------------------------

Tensors = dict[str, tuple[str, int, Tensor]]  # by their name: our name, where the values begin, the shape


def write(size: str, layout: str, folder: Path) -> None:
    """Write a folder, which must not exist yet."""
    recipe = recipe_of(size)
    likes = recipe.build_on_meta().state_dict()
    found: Tensors = {}
    for match in names.matches(likes, recipe.model, "hf" if layout == "hf" else "meta"):
        found |= {name: (match.ours, *place) for name, place in places(match, likes).items()}
    if layout == "hf":
        texts = hf.texts(recipe, hf.CONTEXT)
    else:
        texts = meta.configs(recipe, hf.CONTEXT)
        texts = {meta.PARAMS: texts[meta.TRAINED], **{name: texts[name] for name in texts if ENTROPY_MODEL in name}}
    folder.mkdir(parents=True)
    for name, text in texts.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text if isinstance(text, str) else json.dumps(text, indent=1), encoding="utf-8")
    if layout == "hf":
        write_shards(folder, found)
    else:
        own = {name: found.pop(name) for name in [*found] if name.startswith(f"{ENTROPY_MODEL}.")}
        write_pickled(folder / PICKLED, found)
        bare = {name.removeprefix(f"{ENTROPY_MODEL}."): place for name, place in own.items()}
        write_pickled(folder / ENTROPY_MODEL / PICKLED, bare)


def write_shards(folder: Path, found: Tensors) -> None:
    """safetensors files of up to 5 GB each (a tensor is in one of them whole), and their index."""
    shards: list[Tensors] = [{}]
    room = SHARD
    for name, place in found.items():
        room -= place[2].nbytes
        if room < 0 and shards[-1]:
            shards.append({})
            room = SHARD - place[2].nbytes
        shards[-1][name] = place
    where: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        file = WEIGHTS.replace(".", f"-{number:05}-of-{len(shards):05}.")
        likes = {name: like for name, (_, _, like) in shard.items()}
        with (folder / file).open("xb") as out:
            out.write(tensors.header(likes, {"format": "pt"}))
            for name in tensors.order(likes):
                for piece in values(*shard[name]):
                    out.write(piece.view(torch.uint8).numpy().data)
        where |= dict.fromkeys(likes, file)
    total = {"total_size": sum(like.nbytes for _, _, like in found.values())}
    (folder / f"{WEIGHTS}{INDEX}").write_text(json.dumps({"metadata": total, "weight_map": where}, indent=1))


def write_pickled(file: Path, found: Tensors) -> None:
    """A file of `torch.save`, with room for the values, which are then written into its mapping."""
    with torch.serialization.skip_data():
        empty = {name: torch.empty(like.shape, dtype=like.dtype) for name, (_, _, like) in found.items()}  # no pages
        torch.save({"model": empty}, file)
    with torch.serialization.set_default_mmap_options(mmap.MAP_SHARED):
        held = torch.load(file, mmap=True)["model"]
    for name, place in found.items():
        flat, at = held[name].view(-1), 0
        for piece in values(*place):
            flat[at : at + len(piece)] = piece
            at += len(piece)


def main(arguments: Sequence[str] | None = None) -> int:
    assert __doc__
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=SIZES, default="1b")
    parser.add_argument("--layout", choices=LAYOUTS, default="hf")
    parser.add_argument("out", type=Path, help="a folder that does not exist yet")
    options = parser.parse_args(arguments)
    write(options.size, options.layout, options.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
