"""What to train with so many hours on this machine: scaling laws of a fit, this machine's speed, and the files.

Each model of a fit is sized to the FLOPs that it does here in that time. Its speed is measured with a few steps, at a
size within the fit's budgets, then at that which follows. Its training bytes are what its law assumes, `EPOCHS` times
the files at the most, or `ONCE` where it has n-gram tables: where they are fewer, more hours would not help, and fewer
are used. If no shape is as small as that, the smallest is trained on these bytes, and what is expected is the law's
for them.

Bits per byte are of the fit's corpus. On other files they are carried over: multiplied by the square root of the ratio
of bzip2's bits, theirs to those of the fit's held-out bytes. Between the four text corpora of docs/results.md, with
nine models, 95 % of such guesses are within a factor of 1.36 and all within 1.41; without the factor within 1.58 and
1.59, with the ratio itself within 1.48 and 1.52. So intervals become wider by `CARRIED`.
"""

from __future__ import annotations

import math
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from bytelm.compare import laws
from bytelm.compare.candidates import candidate
from bytelm.compare.fitting import Law
from bytelm.compare.plan import RATIO, Budget, Planned, most_bytes, planned
from bytelm.config import build, merge, preset, preset_names, to_mapping
from bytelm.data.convert import modality_of, read
from bytelm.data.corpus import Corpus
from bytelm.data.options import DataConfig
from bytelm.data.packed import pack_of
from bytelm.data.scan import scan
from bytelm.data.selection import sample_evenly
from bytelm.data.sources import STDIN
from bytelm.device import AUTO, memory, resolve
from bytelm.errors import BytelmError, ConfigError, DataError, ResourceError, UsageError
from bytelm.evaluate.compressors import compressed
from bytelm.training.config import RunConfig
from bytelm.training.estimate import BESIDE, TRAINING, bytes_per_second
from bytelm.units import show_bytes

SHIPPED = "laws.json"  # in bytelm.presets
CARRIED = 1.4  # factor between bits that are carried over and those measured
PIECE = 1 << 14  # bytes of a sampled segment
MOST = 1 << 30  # bytes read to count and sample them; beyond, the sizes of files count
LEAST = 1 << 16  # bytes to train on
NEAR = 1.05  # largest budgets, up to which a law is not extrapolated
STEP = 1.5  # between budgets that are tried
LIMITS = ("train.steps", "train.minutes", "train.bytes")


@dataclass(frozen=True)
class Data:
    """The files to train on."""

    bytes: int
    train_bytes: int
    """What is left of them for training."""
    kind: str | None
    """A modality, by the names of the files; None for raw bytes."""
    bzip2: float
    """Bits per byte of a sample."""
    sampled: int
    """Its bytes."""
    own: bool
    """Whether they are the files of the fit."""


@dataclass(frozen=True)
class Choice:
    """A model sized to the time, and what its law expects of it."""

    model: str
    config: dict[str, Any]
    parameters: int
    tables: int
    patch_size: float | None
    bytes: int
    epochs: float
    flops: float
    hours: float
    flops_per_second: float
    memory: int
    bits: float
    low: float
    high: float
    limited: bool
    """Whether the data ends before the hours do."""
    beyond: float
    """FLOPs, in largest budgets of its law: above 1 extrapolated."""
    below: float
    """FLOPs, in smallest budgets of its law: below 1 extrapolated."""
    form: str
    """Of the law, see `fitting`: "power" knows no limit, and is too optimistic beyond its budgets."""


class Endless(Corpus):
    """A corpus that no plan exhausts: what there is to train on is compared afterwards."""

    def __init__(self) -> None:
        """Nothing is opened."""

    def bytes(self, split: str) -> int:
        """More than any budget processes."""
        return 1 << 60


# --- the fit and the files --------------------------------------------------------------------------------------------


def fit_of(place: Path | None) -> laws.Fit:
    """The fit in a folder or file, or that which comes with bytelm. Raises DataError and UsageError."""
    if place is not None:
        return laws.read(place)
    shipped = Path(str(files("bytelm.presets").joinpath(SHIPPED)))
    if not shipped.is_file():
        raise UsageError(
            "no fit comes with this version: make one with `bytelm compare PATH --models blt,bpe:4096 --budget "
            "1e11,3e11,1e12,3e12 --fit --run HOME`, and give it with --fit HOME"
        )
    return laws.read(shipped)


def weighed(paths: Sequence[str], fit: Mapping[str, Any]) -> Data:
    """Count and sample the files. Raises DataError, and UsageError for a kind that the fit says nothing of."""
    if STDIN in paths:
        raise UsageError("standard input cannot be read twice: name a file")
    modality, limit = fit["corpus"]["modality"], fit["corpus"]["measured_bytes"]
    known = None if modality is None else modality["name"]
    if (pack := pack_of(paths, Path())) is not None:
        corpus = Corpus.open(pack)
        kind = (corpus.index.modality or {}).get("name")
        train = corpus.bytes("train")
        total = train + corpus.bytes("valid") + corpus.bytes("test")
        segments = [data.tobytes() for _, data in sample_evenly(corpus, "train", limit)] if train else []
    else:
        found = scan(paths)
        kind = found.modality() or known
        total, segments = sampled(paths, modality, limit)
        total = max(total, found.bytes) if total >= MOST else total
        train = round(total * (1 - DataConfig.valid - DataConfig.test))
    if kind != known:
        raise UsageError(
            f"{', '.join(paths)}: {kind or 'raw bytes'}, and the fit is of {known or 'raw bytes'}: make one on such "
            "files with `bytelm compare PATH --as MODALITY --fit`, and give it with --fit"
        )
    if train < LEAST:
        raise DataError(f"{', '.join(paths)}: {train:,} bytes to train on are too few: give {LEAST:,} or more")
    own = resolved(paths) == resolved(fit["corpus"]["paths"])
    return Data(total, train, kind, compressed(segments)["bzip2"], sum(map(len, segments)), own)


def resolved(paths: Sequence[str]) -> set[str]:
    """Absolute paths, in no order."""
    return {str(Path(path).resolve()) for path in paths}


def sampled(paths: Sequence[str], modality: Mapping[str, Any] | None, limit: int) -> tuple[int, list[bytes]]:
    """The bytes of all documents, up to `MOST`, and segments evenly over them, `limit` bytes at most.

    Every n-th segment is kept; when they become too many, every second one of these, and n doubles.
    """
    kept: list[bytes] = []
    total, number, every = 0, 0, 1
    documents = read(paths, None if modality is None else modality_of(modality, "advise"))
    for piece in (piece for document in documents for piece in document.pieces):
        total += len(piece)
        for start in range(0, len(piece), PIECE):
            if number % every == 0:
                kept.append(piece[start : start + PIECE])
            number += 1
            if len(kept) > max(2, 2 * limit // PIECE):
                kept, every = kept[::2], 2 * every
        if total >= MOST:
            break
    while len(kept) > 1 and sum(map(len, kept)) > limit:
        kept = kept[::2]
    return total, kept


# --- models -----------------------------------------------------------------------------------------------------------


def advise(
    paths: Sequence[str], hours: float, fit: laws.Fit, device: str = "auto", most_memory: float | None = None
) -> dict[str, Any]:
    """Every model of the fit, sized to the hours, best first: JSON. Raises BytelmError if none can be trained."""
    if not (hours > 0 and math.isfinite(hours)):
        raise UsageError(f"--hours {hours:g}: must be above 0 and finite")
    if most_memory is not None and not (most_memory > 0 and math.isfinite(most_memory)):
        raise UsageError(f"--memory {most_memory / 1e9:g}: must be above 0 and finite, in gigabytes")
    data = weighed(paths, fit)
    free = memory(resolve(device)).free if most_memory is None else round(most_memory)
    choices: list[Choice] = []
    excluded: dict[str, str] = {}
    for model in fit["models"]:
        if model["law"] is None:
            excluded[model["model"]] = f"no scaling law ({model['why']})"
            continue
        try:
            choices.append(choice(model, 3600 * hours, data, free, device, fit))
        except BytelmError as error:
            excluded[model["model"]] = str(error)
    if not choices:
        reasons = "; ".join(f"{name}: {why}" for name, why in excluded.items()) or "the fit has no models"
        raise ResourceError(f"no model of the fit can be trained here in {hours:g} hours: {reasons}")
    # What is extrapolated without a limit comes last: held-out budgets were worse than such laws said (docs/log.md).
    choices.sort(key=lambda one: (one.form == "power" and one.beyond > NEAR, one.bits))
    return {
        "paths": list(paths),
        "hours": hours,
        "data": asdict(data),
        "fit": {"paths": fit["corpus"]["paths"], "budgets": fit["budgets"]},
        "memory": free,
        "choices": [asdict(one) for one in choices],
        "excluded": excluded,
    }


def choice(
    model: Mapping[str, Any], seconds: float, data: Data, free: int, device: str, fit: Mapping[str, Any]
) -> Choice:
    """One model sized to so many seconds. Raises BytelmError if it cannot be trained."""
    law, one = Law.of(model["law"]), candidate(model["model"])
    patch = model["points"][-1]["patch_size"]

    def sized(flops: float) -> Planned:
        try:
            found = planned(one, Budget("flops", flops), Endless(), patch or 1.0, fit["corpus"]["modality"])
        except ConfigError:
            raise ConfigError(f"no shape of it suits {flops:.2g} FLOPs: give more --hours") from None
        needed = found.memory + BESIDE
        if needed > free:
            raise ResourceError(
                f"a step of it takes {show_bytes(needed)} of memory, and {show_bytes(free)} are allowed: give fewer "
                "--hours, or more --memory"
            )
        return found

    def speed(found: Planned) -> float:
        config = found.run(0, device=device)
        return TRAINING * found.costs.executed * bytes_per_second(config, found.mean)

    most = most_bytes(one, data.train_bytes)
    enough = TRAINING * (2 * most / (one.ratio or RATIO)) * most  # FLOPs that process so many at its ratio
    rate = speed(least(sized, first := min(law.at, enough), law.highest))
    useful = min(rate * seconds, enough)
    if not 0.5 < useful / first < 2:
        rate = speed(least(sized, useful, rate * seconds))
        useful = min(rate * seconds, enough)
    plan = least(sized, useful, rate * seconds)
    limited = useful < rate * seconds or (plan.bytes or 0) > most
    read = min(most, plan.bytes or most)
    flops = TRAINING * plan.costs.executed * read
    bits, low, high = expected(law, min(flops, useful), data, fit)
    return Choice(
        model=one.name,
        config={**plan.config, "train": {**plan.config["train"], "bytes": read}},
        parameters=plan.costs.parameters - plan.costs.tables,
        tables=plan.costs.tables,
        patch_size=patch,
        bytes=read,
        epochs=read / data.train_bytes,
        flops=flops,
        hours=flops / rate / 3600,
        flops_per_second=rate,
        memory=plan.memory + BESIDE,
        bits=bits,
        low=low,
        high=high,
        limited=limited,
        beyond=flops / law.highest,
        below=flops / law.lowest,
        form=law.form,
    )


def least(sized: Callable[[float], Planned], low: float, high: float) -> Planned:
    """The plan for the fewest FLOPs from `low` on, up to `high`, that have a shape: small ones have none."""
    while low < high:
        try:
            return sized(low)
        except ConfigError:
            low *= STEP
    return sized(high)


def expected(law: Law, flops: float, data: Data, fit: Mapping[str, Any]) -> tuple[float, float, float]:
    """Bits per byte of one run on the files, and their interval: carried over if they are not those of the fit."""
    bits, (low, high) = law.bits(flops), law.interval(flops, runs=1)
    if data.own:
        return bits, low, high
    factor = math.sqrt(data.bzip2 / fit["corpus"]["compressors"]["bzip2"])
    wider = math.log(CARRIED)
    below, above = (math.exp(math.hypot(math.log(end / bits), wider)) for end in (low, high))
    return factor * bits, factor * bits / below, factor * bits * above


# --- what to do -------------------------------------------------------------------------------------------------------


def run_of(chosen: Mapping[str, Any]) -> RunConfig:
    """The configuration of a choice, as JSON or not: it ends after its hours, or its bytes if `limited`."""
    kept = {name: value for name, value in chosen["config"]["train"].items() if name not in ("bytes", "sample_bytes")}
    limit = {"bytes": chosen["bytes"]} if chosen["limited"] else {"minutes": minutes(chosen)}
    return build(RunConfig, {**chosen["config"], "train": {**kept, **limit}}, "advise")


def minutes(chosen: Mapping[str, Any]) -> float:
    """Its training time, with four digits."""
    return float(f"{60 * chosen['hours']:.4g}")


def settings(run: RunConfig) -> tuple[str, list[str]]:
    """The preset that is nearest to a configuration, and the settings that make it of the preset."""
    wanted = to_mapping(run)
    found = [(name, differing(to_mapping(of_preset(name)), wanted)) for name in preset_names()]
    return min(found, key=lambda one: (len(one[1]), one[0]))


def of_preset(name: str) -> RunConfig:
    """A preset's configuration, of any length."""
    return build(RunConfig, merge({"train": {"steps": 1}}, preset(name)), f"preset {name}")


def differing(base: Mapping[str, Any], wanted: Mapping[str, Any], place: str = "") -> list[str]:
    """`a.b=c` settings by which `base` becomes `wanted`, the limits of a training left out."""
    kept = base if base.get("name") == wanted.get("name") else {}
    found = [] if kept is base else [f"{place}name={wanted['name']}"]
    for key in (*wanted, *(key for key in kept if key not in wanted)):
        value, old = wanted.get(key, "none"), kept.get(key, "none")
        if key == "name" or f"{place}{key}" in LIMITS or value == old:
            continue
        if isinstance(value, Mapping):
            found += differing(old if isinstance(old, Mapping) else {}, value, f"{place}{key}.")
        else:
            found.append(f"{place}{key}={shown(value)}")
    return found


def shown(value: Any) -> str:
    """A value as --set takes it."""
    return {True: "true", False: "false"}[value] if isinstance(value, bool) else f"{value}".replace(" ", "")


def command(paths: Sequence[str], chosen: Mapping[str, Any], device: str = "auto", file: Path | None = None) -> str:
    """The command that trains a choice: of a preset and settings, or of a written file."""
    limit = ["--bytes", str(chosen["bytes"])] if chosen["limited"] else ["--minutes", f"{minutes(chosen):g}"]
    limit += [] if device == AUTO else ["--device", device]
    if file is not None:
        return shlex.join(["bytelm", "train", *paths, "--config", str(file), *limit])
    preset, sets = settings(run_of(chosen))
    words = [word for one in sets for word in ("--set", one)]
    return shlex.join(["bytelm", "train", *paths, "--preset", preset, *words, *limit])
