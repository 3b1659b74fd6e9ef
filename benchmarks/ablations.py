"""MEGABYTE's ablations and inference modes at small scale: the paper's Tables 6, 9, 10 and 14, as ratios.

    python benchmarks/ablations.py --text FILE... --images FILE... --audio FILE...
    python benchmarks/ablations.py --text FILE... --only text --bytes 4000000 --json

Every variant is an ordinary run in DIR/<modality>-<variant>; an interrupted program resumes, finished runs are kept.
All variants of a modality train on the same bytes in the same windows. The number of layers of one stage is chosen so
that FLOPs per byte are nearest to the full model's (the paper matched the time per byte).

Data: the first 64 MB are divided into 16 parts; the beginning of each is for training, the end for evaluation.

Ratios are to the full model of the same modality, here and in the paper. "another seed" is the full model with another
initialisation and order of windows: ratios no further from 1 than its own are within noise.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pictures import MARGIN, page

from bytelm.checkpoint.assemble import load
from bytelm.config import build
from bytelm.data.convert import read
from bytelm.data.files import write_whole
from bytelm.data.sources import fingerprint
from bytelm.errors import BytelmError, DataError, UsageError
from bytelm.evaluate.bits import measure
from bytelm.evaluate.meter import Meter
from bytelm.evaluate.verdict import by_plane
from bytelm.evaluate.windowing import strided
from bytelm.interfaces.model import ByteModel
from bytelm.report.charts import Bar, bar_chart, line_chart
from bytelm.training.config import RunConfig
from bytelm.training.run import train

READ = 64 << 20  # bytes of the input that are used at most
PARTS = 16
HELD_OUT = 192 << 10  # bytes evaluated per modality
BYTES = 1_600_000  # training bytes: 75 to 110 s on one idle core

# Bits per byte, from the paper: Table 6 (arXiv, Audio, Image256), with Tables 10 and 14 for images; Table 9 (PG-19).
# Patch sizes are relative to the full model's: in the paper 48 and 768 to 192.
PAPER: dict[str, dict[str, float]] = {
    "text": {"full": 0.6871, "no local": 1.263, "no global": 1.373, "no cross": 0.6781, "cnn": 0.6871},
    "images": {"full": 3.158, "no local": 4.768, "no global": 3.181, "no cross": 3.259, "cnn": 3.155}
    | {"P / 4": 3.178, "P x 4": 3.186, "raster": 3.428},
    "audio": {"full": 3.477, "no local": 5.955, "no global": 3.659, "no cross": 3.481, "cnn": 3.475},
}
PAPER_MODES = {"basic": 0.9079, "sliding": 0.8918, "strided": 0.8926, "both": 0.8751}


@dataclass(frozen=True)
class Shape:
    """The full model of a modality, and how it is trained."""

    dims: tuple[int, int]
    heads: tuple[int, int]
    layers: tuple[int, int]
    patch: int
    reach: int
    window: int
    batch: int
    learning_rate: float = 4e-3
    modality: dict[str, Any] | None = None
    ratios: tuple[int, ...] = (2,)  # further patch sizes: the full model's divided by and times these
    blind: int = 2  # factor by which patches are smaller without a local model, as in the paper

    @property
    def channels(self) -> int:
        """Bytes of a pixel; 0 for what has none."""
        if self.modality is None or self.modality["name"] != "image":
            return 0
        return 1 if self.modality.get("grey") else 3

    def mapping(self) -> dict[str, Any]:
        stages = {key: list(getattr(self, key)) for key in ("dims", "heads", "layers")}
        return {"name": "megabyte", "sizes": [self.patch], "reach": self.reach, **stages}


SHAPES = {
    "text": Shape((256, 64), (4, 2), (2, 5), patch=8, reach=4, window=1024, batch=2, learning_rate=6e-3),
    "images": Shape(
        (256, 64), (4, 2), (2, 7), patch=16, reach=4, window=32 * 32 + 1, batch=1,
        modality={"name": "image", "width": 32, "height": 32, "grey": True, "block": 4}, ratios=(4,), blind=4,
    ),
    "audio": Shape(
        (256, 64), (4, 2), (3, 5), patch=32, reach=16, window=2048, batch=1,
        modality={"name": "audio", "rate": 16000, "bits": 16}, ratios=(), blind=4,
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Variant:
    """A variant of the full model: its changes, and the stage whose layers are fitted to the FLOPs."""

    name: str
    model: dict[str, Any] = field(default_factory=dict)
    modality: dict[str, Any] = field(default_factory=dict)
    free: int | None = 1
    seeds: int = 0

    @property
    def slug(self) -> str:
        return self.name.replace(" / ", "-by-").replace(" x ", "-times-").replace(" ", "-")


def variants(shape: Shape) -> Iterator[Variant]:
    """The full model first."""
    layers = shape.layers
    yield Variant("full", free=None)
    yield Variant("another seed", free=None, seeds=1)
    yield Variant("no local", {"layers": [layers[0], 0], "sizes": [shape.patch // shape.blind], "reach": 0}, free=0)
    yield Variant("no global", {"layers": [0, layers[1]]})
    yield Variant("neither", {"layers": [0, layers[1]], "reach": 0})
    yield Variant("no cross", {"reach": 0})
    yield Variant("cnn", {"filters": [3, 5, 7]})
    for ratio in shape.ratios:
        for name, patch in ((f"P / {ratio}", shape.patch // ratio), (f"P x {ratio}", shape.patch * ratio)):
            block = {"block": round((patch / shape.channels) ** 0.5)} if shape.channels else {}
            yield Variant(name, {"sizes": [patch]}, block)
    if shape.channels:
        yield Variant("raster", modality={"block": 1}, free=None)


def config_of(shape: Shape, variant: Variant, bytes: int, seed: int) -> RunConfig:
    """The run of a variant, with layers fitted to the FLOPs of the full model."""
    own = shape.mapping() | variant.model
    if variant.free is not None:
        own["layers"] = list(matched(own, variant.free, flops(shape.mapping(), shape.window), shape.window))
    mapping: dict[str, Any] = {
        "model": own,
        "data": {"valid": 0.0, "test": 0.0},
        "train": {
            "bytes": bytes,
            "context_length": shape.window,
            "batch": shape.batch,
            "learning_rate": shape.learning_rate,
            "seed": seed + variant.seeds,
            "eval_every_minutes": 1e6,
            "sample_bytes": 0,
        },
    }
    if shape.modality is not None:
        mapping["modality"] = shape.modality | variant.modality
    return build(RunConfig, mapping, variant.name)


def flops(model: dict[str, Any], window: int) -> float:
    """FLOPs per byte of a forward pass over a window."""
    with torch.device("meta"):
        built = build(RunConfig, {"model": model, "train": {"steps": 1}}, "benchmark").recipe.build()
    return built.flops(window, 0) / window


def matched(model: dict[str, Any], free: int, goal: float, window: int) -> tuple[int, ...]:
    """The layers of both stages; FLOPs are linear in those of the free one, which has at least one."""

    def with_layers(count: int) -> list[int]:
        return [count if stage == free else layers for stage, layers in enumerate(model["layers"])]

    one, two = (flops(model | {"layers": with_layers(count)}, window) for count in (1, 2))
    return tuple(with_layers(1 + max(0, round((goal - one) / (two - one)))))


# --- data -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Slices:
    """The training and evaluation bytes of a modality, as files that `bytelm` reads."""

    train: Path
    test: Path


def slices(name: str, shape: Shape, paths: Sequence[str], runs: Path, limit: int, held: int) -> Slices:
    """The slices of `paths`, written once. Raises UsageError if those in `runs` are of other files."""
    home = runs / "slices"
    suffix = {"image": ".npy", "audio": ".s16le"}.get(shape.modality["name"] if shape.modality else "", ".txt")
    found = Slices(home / f"{name}.train{suffix}", home / f"{name}.test")
    asked = {"sources": fingerprint(paths, (runs,)), "limit": limit, "held_out": held}
    note = home / f"{name}.json"
    if note.exists():
        if json.loads(note.read_text()) != asked:
            raise UsageError(f"{home} has slices of other files or sizes: give the same ones, or another --runs")
        return found
    found.test.mkdir(parents=True, exist_ok=True)
    learnt, held_out = divided(*whole_of(paths, shape, runs), limit, held)
    write_whole(found.train, b"".join(learnt) if suffix != ".npy" else as_array(learnt, shape))
    pieces = [as_array(held_out, shape)] if suffix == ".npy" else held_out
    for index, piece in enumerate(pieces):
        write_whole(found.test / f"{index:02}{suffix}", piece)
    write_whole(note, json.dumps(asked).encode())
    return found


def whole_of(paths: Sequence[str], shape: Shape, runs: Path) -> tuple[bytes, int]:
    """The documents of `paths` one after the other, in raster order if they are images, and what is never parted."""
    modality = None
    if shape.modality is not None:
        modality = config_of(
            shape, Variant("", modality={"block": 1} if shape.channels else {}, free=None), 1, 0
        ).modality
        modality = modality.build() if modality is not None else None
    held = bytearray()
    for document in read(paths, modality, exclude=(runs,)):
        for piece in document.pieces:
            held += piece
        if len(held) >= READ:
            break
    grain = modality.grain if modality is not None else 1
    return bytes(held[: min(len(held), READ) // grain * grain]), grain


def divided(whole: bytes, grain: int, limit: int, held: int) -> tuple[list[bytes], list[bytes]]:
    """The beginnings of the parts, for training, and their ends, held out. Raises DataError for too few bytes."""
    size, end, begin = (n // PARTS // grain * grain for n in (len(whole), held, limit))
    if not end or size < 2 * end:
        raise DataError(f"{len(whole)} bytes are too few to hold out {held} of them in {PARTS} parts: give more")
    begin = min(begin, size - end)
    parts = [whole[start : start + size] for start in range(0, PARTS * size, size)]
    return [part[:begin] for part in parts], [part[-end:] for part in parts]


def as_array(images: list[bytes], shape: Shape) -> bytes:
    """A .npy file of raster images."""
    assert shape.modality is not None
    file = io.BytesIO()
    sides = (shape.modality["height"], shape.modality["width"], shape.channels)
    np.save(file, np.frombuffer(b"".join(images), np.uint8).reshape(-1, *sides), allow_pickle=False)
    return file.getvalue()


# --- runs and measurements --------------------------------------------------------------------------------------------


class Stopped(Exception):
    """A signal ended a training early; what it reached is kept."""

    def __init__(self, signal: int) -> None:
        super().__init__("stopped; run the same command again to resume")
        self.signal = signal


def trained(config: RunConfig, data: Slices, run: Path) -> tuple[ByteModel, dict[str, Any]]:
    """The model of a finished run, and its cost. Raises Stopped."""
    result = train([data.train], config, run, quiet=True)
    if result.signal is not None or result.progress is None:
        raise Stopped(result.signal or 0)
    model, reached = load(run).model, result.progress
    return model, {
        "parameters": sum(p.numel() for p in model.parameters()),
        "flops_per_byte": model.flops(config.train.context_length, 0) / config.train.context_length,
        "steps": reached.step,
        "bytes": reached.bytes,
        "seconds": round(reached.seconds, 1),
    }


def documents_of(config: RunConfig, data: Slices) -> list[tuple[str, bytes]]:
    modality = config.modality.build() if config.modality is not None else None
    return [(document.name, b"".join(document.pieces)) for document in read([data.test], modality)]


def measured(model: ByteModel, documents: list[tuple[str, bytes]], context: int, stride: int, period: int) -> Any:
    """Bits per byte, and those of each place in a patch.

    Windows begin at multiples of the stride, and a document's first byte is the first of a patch: so byte i stands at
    place i % period of its patch, if the period divides the stride or a document is one window.
    """
    found = list(measure(model, documents, context=context, stride=stride, period=period))
    places = by_plane(found, tuple(map(str, range(period))))
    return Meter.of(found).bits_per_byte, list(places.values())


def modes(model: ByteModel, documents: list[tuple[str, bytes]], context: int) -> Iterator[tuple[str, float]]:
    """The paper's Table 9; documents that are one window have nothing to slide over."""
    long = max(len(data) for _, data in documents) > context
    asked = {"basic": (model, context), "strided": (strided(model), context)}
    if long:
        asked |= {"sliding": (model, context // 2), "both": (strided(model), context // 2)}
    for name in (mode for mode in PAPER_MODES if mode in asked):
        reader, stride = asked[name]
        yield name, measured(reader, documents, context, stride, 1)[0]


def agrees(ratio: float, paper: float | None) -> bool | None:
    """Whether both are better, or both are worse; None where the paper has no figure, or no difference."""
    return None if paper is None or paper == 1 else (ratio > 1) == (paper > 1)


def ablate(
    name: str, shape: Shape, paths: Sequence[str], runs: Path, bytes: int, seed: int, limit: int, held: int = HELD_OUT
) -> Iterator[dict[str, Any]]:
    """The rows of a modality: one a variant, then one a mode of inference of the full model."""
    data = slices(name, shape, paths, runs, limit, held)
    paper = PAPER[name]
    whole, inference = 0.0, list[dict[str, Any]]()
    for variant in variants(shape):
        config = config_of(shape, variant, bytes, seed)
        run = runs / f"{name}-{variant.slug}"
        model, cost = trained(config, data, run)
        documents, patch, window = documents_of(config, data), config.model.sizes[0], config.train.context_length
        bits, places = measured(model, documents, window, window, patch)
        row = {"modality": name, "variant": variant.name, "patch": patch, "layers": list(config.model.layers), **cost}
        whole = whole or bits  # the full model comes first
        theirs = paper[variant.name] / paper["full"] if variant.name in paper and variant.name != "full" else None
        row |= {"bits_per_byte": bits, "ratio": bits / whole, "paper": theirs}
        planes = list(config.modality.build().planes) if config.modality is not None else []
        yield row | {"agrees": agrees(bits / whole, theirs), "by_place": places, "planes": planes}
        if variant.name == "full":
            for mode, bits in modes(model, documents, window):
                theirs = PAPER_MODES[mode] / PAPER_MODES["basic"] if mode != "basic" and name == "text" else None
                found = {"bits_per_byte": bits, "ratio": bits / whole, "paper": theirs}
                inference.append({"modality": name, "mode": mode, **found, "agrees": agrees(bits / whole, theirs)})
    yield from inference


# --- what is shown ----------------------------------------------------------------------------------------------------


def line(row: dict[str, Any]) -> str:
    """A row of the table, in Markdown."""
    if "mode" in row:
        what = [row["modality"], f"full, {row['mode']} inference", "", "", "", "", ""]
    else:
        layers, cost = " + ".join(map(str, row["layers"])), row["flops_per_byte"] / 1e6
        what = [row["modality"], row["variant"], str(row["patch"]), layers, f"{row['parameters'] / 1e6:.2f} M"]
        what += [f"{cost:.2f}", f"{row['seconds']:.0f}"]
    paper = "–" if row["paper"] is None else f"{row['paper']:.3f}"
    sign = {True: "yes", False: "no", None: "–"}[row["agrees"]]
    return "| " + " | ".join([*what, f"{row['bits_per_byte']:.3f}", f"{row['ratio']:.3f}", paper, sign]) + " |"


def table(rows: Sequence[dict[str, Any]]) -> str:
    heads = ["data", "variant", "P", "layers", "parameters", "MFLOP/byte", "seconds", "bits/byte"]
    heads += ["to full", "paper's", "same sign"]
    return "\n".join(["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|", *map(line, rows)])


def picture(rows: Sequence[dict[str, Any]]) -> str:
    """Ratios as bars, the paper's below each, and bits per byte by the place in the patch: an SVG file by itself."""
    charts: list[tuple[int, int, str]] = []
    top = MARGIN
    for name in dict.fromkeys(row["modality"] for row in rows):
        own = [row for row in rows if row["modality"] == name and "variant" in row]
        bars = [bar for row in own[1:] for bar in bars_of(row)]
        labels = ("place in the patch", "bits/byte", f"{name}: bits per byte by the place in the patch")
        charts.append((0, top, bar_chart(bars, "to the full model", f"{name}: bits per byte, to the full model's")))
        charts.append((1, top, line_chart(curves(own[0]), *labels)))
        top += max(34 * len(bars) + 4, 270) + 2 * MARGIN
    return page(charts)


def curves(row: dict[str, Any]) -> dict[str, list[tuple[int, float]]]:
    """Bits by the place in the patch, a line for each of the planes that bytes stand for in turn."""
    bits, period = row["by_place"], max(1, len(row["planes"]))
    names = [f"{row['modality']}, {plane}" for plane in row["planes"]] if period > 1 else [row["modality"]]
    return {
        name: [(place + 1, bits[place]) for place in range(plane, len(bits), period)]
        for plane, name in enumerate(names)
    }


def bars_of(row: dict[str, Any]) -> Iterator[Bar]:
    yield Bar(row["variant"], row["ratio"], ours=True)
    if row["paper"] is not None:
        yield Bar("in the paper", row["paper"])


def options_of(arguments: Sequence[str] | None) -> argparse.Namespace:
    assert __doc__
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name in SHAPES:
        parser.add_argument(f"--{name}", nargs="+", metavar="FILE", default=[])
    parser.add_argument("--only", metavar="text,images,audio", help="of what is given, these alone")
    parser.add_argument("--bytes", type=int, default=BYTES, help="that each model learns from (default: %(default)s)")
    parser.add_argument("--limit", type=int, default=4 << 20, help="bytes of the slice they are drawn from")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--runs", type=Path, default=Path("runs/ablations"), metavar="DIR")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--svg", type=Path, metavar="FILE", help="write the picture")
    options = parser.parse_args(arguments)
    options.wanted = options.only.split(",") if options.only else [name for name in SHAPES if getattr(options, name)]
    if unknown := [name for name in options.wanted if name not in SHAPES or not getattr(options, name)]:
        parser.error(f"--only {','.join(unknown)}: no such data, or none given")
    if not options.wanted:
        parser.error("give at least one of --text, --images, --audio")
    return options


def main(arguments: Sequence[str] | None = None, shapes: dict[str, Shape] = SHAPES, held: int = HELD_OUT) -> int:
    options = options_of(arguments)
    rows: list[dict[str, Any]] = []
    try:
        for name in options.wanted:
            paths = getattr(options, name)
            job = ablate(name, shapes[name], paths, options.runs, options.bytes, options.seed, options.limit, held)
            for row in job:
                rows.append(row)
                print(line(row), file=sys.stderr, flush=True)
        if options.svg is not None:
            write_whole(options.svg, picture(rows).encode())
    except Stopped as stopped:
        print(stopped, file=sys.stderr)
        return 128 + stopped.signal
    except BytelmError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    if options.json:
        settings = {"bytes": options.bytes, "limit": options.limit, "seed": options.seed, "held_out": held}
        machine = {"cores": os.cpu_count(), "threads": torch.get_num_threads(), "torch": torch.__version__}
        described = {name: asdict(shapes[name]) for name in options.wanted}
        print(json.dumps({**settings, "machine": machine, "shapes": described, "rows": rows}))
    else:
        print(table(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
