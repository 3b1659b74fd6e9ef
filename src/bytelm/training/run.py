"""One whole training: a directory that any interruption leaves ready to be continued by the same command."""

from __future__ import annotations

import platform
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bytelm import __version__
from bytelm.checkpoint import legacy
from bytelm.checkpoint.lock import exclusive
from bytelm.checkpoint.metrics import METRICS
from bytelm.config import build, dump_toml, load_toml, to_mapping
from bytelm.data.corpus import iterate_documents
from bytelm.data.files import write_whole
from bytelm.device import fitting, use
from bytelm.errors import ConfigError, ResourceError
from bytelm.find import unknown
from bytelm.interfaces.model import ByteModel
from bytelm.training.config import RunConfig, TrainConfig
from bytelm.training.dist import DistContext, init_distributed
from bytelm.training.estimate import check, lighter, needs
from bytelm.training.journal import Journal
from bytelm.training.loggers import Loggers
from bytelm.training.loop import Progress, Trainer
from bytelm.training.prepare import Prepared, prepare
from bytelm.training.stop import Interrupted, StopRequest
from bytelm.units import show_count

# What may change between two sittings of one run: how long it goes on, where, and how often it tells and saves.
MUTABLE_SETTINGS = {
    *("steps", "minutes", "bytes", "device", "timeout_minutes"),
    *("eval_every_minutes", "eval_bytes", "checkpoint_every_minutes", "sample_bytes"),
}
Sample = Callable[[ByteModel, bytes, int, int], bytes]
"""From a model, a prompt, a number of bytes and a seed to the bytes that the model continues the prompt with."""
PROMPT = 48  # bytes of a held-out document that samples go on from


@dataclass(frozen=True)
class Result:
    """How a training ended. `signal` is the one that ended it early, None if it came to its end."""

    run: Path
    progress: Progress | None
    signal: int | None


def train(
    paths: Sequence[str | Path],
    config: RunConfig,
    run: str | Path,
    *,
    quiet: bool = False,
    exclude: Sequence[Path] = (),
    log: Sequence[str] = (),
    force: bool = False,
    allow_change: Sequence[str] = (),
    sample: Sample | None = None,
) -> Result:
    """Train on `paths` in the directory `run`, or resume what it holds; folders `exclude` are not read.

    `log` names experiment trackers (`training.loggers`). `force` starts even if the estimate exceeds memory or disk.
    `allow_change` are settings of [train], as in "train.learning_rate", that may differ from those of the existing run.
    `sample` generates a text sample at each validation.
    Raises DataError, ConfigError, CheckpointError, ResourceError or TrainingError; a signal is no error. And UsageError
    for a device that is not there.
    """
    run, device = Path(run), use(config.train.device)
    if not force:
        check(needs(paths, config, run, exclude), config, run)
    try:
        run.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ResourceError(f"cannot make {run} ({error.strerror}): choose another place with --run") from error
    with StopRequest(), init_distributed(config.train.timeout_minutes, device) as dist:
        journal = Journal(run / METRICS, quiet, mute=not dist.is_main_process)
        if not dist.is_main_process:
            return session(paths, config, run, journal, device, exclude, dist, sample)
        with exclusive(run):
            keep_config(config, run, allow_change, journal)
            with closing(Loggers(log, run, to_mapping(config), journal.lines, journal.say)) as journal.loggers:
                return session(paths, config, run, journal, device, exclude, dist, sample)


def session(
    paths: Sequence[str | Path],
    config: RunConfig,
    run: Path,
    journal: Journal,
    device: torch.device,
    exclude: Sequence[Path],
    dist: DistContext,
    sample: Sample | None,
) -> Result:
    """Prepare and fit, in a directory that is ours."""
    try:
        prepared = dist.main_process_first(lambda: prepare(paths, config, run, journal, device, exclude, dist))
    except Interrupted as stopped:
        return Result(run, None, stopped.signal)
    parameters = sum(p.numel() for p in prepared.model.parameters() if p.requires_grad)
    model, recipe = prepared.model, to_mapping(prepared.recipe)
    trainer = Trainer(
        model,
        config.train,
        prepared.sampler,
        run,
        journal,
        valid=prepared.valid,
        recipe=recipe,
        sample=sampler_of_text(prepared, config.train, sample),
        dist=dist,
    )
    journal.say(f"model: {recipe['model']['name']}, {show_count(parameters)} parameters, {trainer.precision}")
    begun = {"step": 0, "bytes": 0, "seconds": 0.0, "paths": [str(path) for path in paths]}
    journal.write("session_start", **begun, device=str(model.device), **versions())
    with fitting(device, "a step", lambda: lighter(config)):
        outcome = trainer.fit()
    return Result(run, outcome.progress, outcome.signal)


def versions() -> dict[str, str]:
    """What a sitting ran on."""
    return {"python": platform.python_version(), "torch": torch.__version__, "bytelm": __version__}


def keep_config(config: RunConfig, run: Path, allow_change: Sequence[str], journal: Journal) -> None:
    """Write the configuration into the run, or compare it with the one there.

    Raises ConfigError on a difference that is not free or allowed, and for a key that cannot be allowed.
    """
    asked = to_mapping(config)
    known = [f"train.{name}" for name in asked["train"]]
    for key in allow_change:
        if key not in known:  # what weights are of, and were made from, cannot change under them
            raise ConfigError(
                f"{unknown('key of --allow-change', key, known)}; for others start a run --init-from {run}"
            )
    path = run / "config.toml"
    if path.exists():
        differences = {
            key: f"{key} is {old!r} there and {new!r} here"
            for key, old, new in compare(
                to_mapping(build(RunConfig, legacy.current(load_toml(path)), str(path))), asked
            )
            if not (
                key.split(".")[0] in ("train", "entropy_model_train") and key.rpartition(".")[2] in MUTABLE_SETTINGS
            )
        }
        refused = [line for key, line in differences.items() if key not in allow_change]
        if refused:
            raise ConfigError(
                f"the configuration differs from that of {run}: {'; '.join(refused[:5])}: "
                "give the same one, another --run, or --allow-change KEY for a KEY of [train]"
            )
        for line in differences.values():
            journal.say(f"changed: {line}")
    write_whole(path, dump_toml(asked).encode())


def compare(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> list[tuple[str, Any, Any]]:
    """The leaves at which two mappings differ: dotted key, old, new."""
    found: list[tuple[str, Any, Any]] = []
    for key in sorted(old.keys() | new.keys()):
        a, b = old.get(key), new.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            found += compare(a, b, f"{prefix}{key}.")
        elif a != b:
            found.append((f"{prefix}{key}", a, b))
    return found


def sampler_of_text(
    prepared: Prepared, train: TrainConfig, sample: Sample | None
) -> Callable[[ByteModel], tuple[bytes, bytes]] | None:
    """A function that lets the model continue the beginning of a held-out document; None where there is no text."""
    corpus, modality = prepared.corpus, prepared.modality
    if sample is None or not train.sample_bytes or (modality is not None and not modality.text):
        return None
    split = "valid" if corpus.bytes("valid") else "train"
    _, document = next(iterate_documents(corpus, split))
    prompt = document[: min(PROMPT, max(1, len(document) // 2))].tobytes()
    return lambda model: (prompt, sample(model, prompt, train.sample_bytes, train.seed))
