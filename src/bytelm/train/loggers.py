"""What others show of a training: tensorboard, trackio, wandb, told what metrics.jsonl is told.

    Journal.write("train", step=…, bits_per_byte=…) ─┬─▶ metrics.jsonl     which stays the truth
                                                     └─▶ Loggers ─▶ each    "train/bits_per_byte" at its step

A logger that fails is told of once and left out; the training goes on.
"""

from __future__ import annotations

import secrets
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from bytelm.data.files import write_whole
from bytelm.errors import MissingExtraError, UsageError
from bytelm.find import unknown

PROJECT = "bytelm"
IDENTITY = "log-id"
SHOWN = ("train", "valid")
"""Kinds of lines whose figures are curves."""


@runtime_checkable
class Logger(Protocol):
    """Somewhere that figures go."""

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Figures of one step. Steps only rise."""
        ...

    def close(self) -> None:
        """No more will come."""
        ...


class TensorBoard:
    """Event files in run/tensorboard: `tensorboard --logdir runs`."""

    def __init__(self, run: Path, config: Mapping[str, Any]) -> None:
        import tensorboard  # noqa: F401  # pyright: ignore  # torch's writer needs it, and says so less plainly
        from torch.utils.tensorboard.writer import SummaryWriter

        self.writer = SummaryWriter(str(run / "tensorboard"), flush_secs=10)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """See `Logger`."""
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)

    def close(self) -> None:
        """See `Logger`."""
        self.writer.close()


class Hosted:
    """wandb, or trackio, which has its interface: a project's run, taken up again where the training is."""

    def __init__(self, library: Any, run: Path, config: Mapping[str, Any], **more: Any) -> None:
        self.library = library
        name = f"{run.resolve().name}-{identity(run)}"
        with redirect_stdout(sys.stderr):  # where results stand, nothing else is said
            self.run = library.init(project=PROJECT, name=name, config=dict(config), resume="allow", **more)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """See `Logger`."""
        self.run.log(dict(values), step=step)

    def close(self) -> None:
        """See `Logger`."""
        with redirect_stdout(sys.stderr):
            self.library.finish()


def identity(run: Path) -> str:
    """What tells a run from another of its name, chosen once and kept."""
    path = run / IDENTITY
    if not path.exists():
        write_whole(path, secrets.token_hex(4).encode())
    return path.read_text(encoding="utf-8").strip()


def trackio(run: Path, config: Mapping[str, Any]) -> Logger:
    """Where trackio keeps its projects (TRACKIO_DIR): `trackio show --project bytelm`."""
    import trackio

    return Hosted(trackio, run, config)


def wandb(run: Path, config: Mapping[str, Any]) -> Logger:
    """As wandb is set up: with WANDB_MODE=offline it writes run/wandb and reaches nothing."""
    import wandb

    return Hosted(wandb, run, config, id=identity(run), dir=str(run))


KNOWN: dict[str, Callable[[Path, Mapping[str, Any]], Logger]] = {
    "tensorboard": TensorBoard,
    "trackio": trackio,
    "wandb": wandb,
}


def names_in(text: str | None) -> list[str]:
    """The loggers that a text such as "tensorboard,wandb" names. Raises UsageError for others."""
    names = [name.strip() for name in text.split(",")] if text else []
    for name in names:
        if name not in KNOWN:
            raise UsageError(unknown("logger", name, list(KNOWN)))
    return list(dict.fromkeys(names))


class Loggers:
    """All loggers of a training. `warn` is told, once for each, which one failed and why.

    `told` is the last step that they were told of in earlier sittings: what a resumed training computes again is not
    told again. Raises MissingExtraError for one that is not installed.
    """

    def __init__(
        self, names: Sequence[str], run: Path, config: Mapping[str, Any], told: int, warn: Callable[[str], None]
    ) -> None:
        self.told, self.warn = told, warn
        self.open: dict[str, Logger] = {}
        for name in names:
            try:
                self.open[name] = KNOWN[name](run, config)
            except ImportError as error:
                raise MissingExtraError(name, "logs", f"--log {name}") from error
            except Exception as error:
                self.fail(name, error)

    def write(self, kind: str, fields: Mapping[str, Any]) -> None:
        """A line of the journal."""
        step = fields.get("step", 0)
        if kind not in SHOWN or step <= self.told:
            return
        values = {f"{kind}/{key}": float(value) for key, value in fields.items() if is_figure(key, value)}
        for name in [*self.open]:
            self.tell(name, lambda logger: logger.log(step, values))

    def close(self) -> None:
        """No more will come."""
        for name in [*self.open]:
            self.tell(name, lambda logger: logger.close())

    def tell(self, name: str, what: Callable[[Logger], None]) -> None:
        """Do something with one logger, or leave it out from here on."""
        try:
            what(self.open[name])
        except Exception as error:
            del self.open[name]
            self.fail(name, error)

    def fail(self, name: str, error: Exception) -> None:
        """Say that a logger failed."""
        reason = (str(error) or type(error).__name__).splitlines()[0]
        self.warn(f"{name} failed and is told no more ({reason}); metrics.jsonl has everything")


def is_figure(key: str, value: Any) -> bool:
    """Whether a field is a curve over steps."""
    return key != "step" and isinstance(value, int | float) and not isinstance(value, bool)
