"""Experiment trackers: tensorboard, trackio, wandb get what is written to metrics.jsonl.

    Journal.write("train", step=…, bits_per_byte=…) ─┬─▶ metrics.jsonl     the source of truth
                                                     └─▶ Loggers ─▶ each    "train/bits_per_byte" at its step

A logger that fails is reported once and dropped; training continues. What it lost when the process was killed (all
buffer) is sent again on resuming: each reports its last step, and the journal has everything.
"""

from __future__ import annotations

import os
import secrets
import struct
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from bytelm.data.files import write_whole
from bytelm.errors import MissingExtraError, UsageError
from bytelm.find import unknown

PROJECT = "bytelm"
IDENTITY = "log-id"
SHOWN = ("train", "validation")
"""Kinds of lines whose values are curves."""
BLOCK, FULL, FIRST, LAST = 1 << 15, 1, 2, 4  # of a LevelDB log: block size, record types


@runtime_checkable
class Logger(Protocol):
    """An experiment tracker."""

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Log values of one step. Steps only increase."""
        ...

    def held(self) -> Mapping[str, int] | None:
        """The last step of each kind that it has of this run; None if unknown: nothing is sent again."""
        ...

    def close(self) -> None:
        """No more will come."""
        ...


def latest(seen: Iterable[tuple[int, Iterable[str]]]) -> dict[str, int]:
    """The last step of each kind, of steps and the names ("train/bits_per_byte", or "train") that they have."""
    found: dict[str, int] = {}
    for step, names in seen:
        for kind in {name.partition("/")[0] for name in names}:
            found[kind] = max(step, found.get(kind, 0))
    return found


class TensorBoard:
    """Event files in run/tensorboard: `tensorboard --logdir runs`. Written every ten events or ten seconds."""

    def __init__(self, run: Path, config: Mapping[str, Any]) -> None:
        from torch.utils.tensorboard.writer import SummaryWriter

        self.folder = str(run / "tensorboard")
        self.writer = SummaryWriter(self.folder, flush_secs=10)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """See `Logger`."""
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)

    def held(self) -> Mapping[str, int]:
        """See `Logger`."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

            events: Any = EventAccumulator(self.folder)
            events.Reload()
        return latest((e.step, [tag]) for tag in events.Tags()["scalars"] for e in events.Scalars(tag))

    def close(self) -> None:
        """See `Logger`."""
        self.writer.close()


class Hosted:
    """wandb, or trackio, which has its interface: a run of a project, resumed with the training."""

    def __init__(self, library: Any, run: Path, config: Mapping[str, Any], **more: Any) -> None:
        self.library = library
        self.name = f"{run.resolve().name}-{identity(run)}"
        with redirect_stdout(sys.stderr):  # stdout is for results only
            self.run = library.init(project=PROJECT, name=self.name, config=dict(config), resume="allow", **more)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """See `Logger`."""
        self.run.log(dict(values), step=step)

    def close(self) -> None:
        """See `Logger`."""
        with redirect_stdout(sys.stderr):
            self.library.finish()


def identity(run: Path) -> str:
    """A unique id of the run, chosen once and kept."""
    path = run / IDENTITY
    if not path.exists():
        write_whole(path, secrets.token_hex(4).encode())
    return path.read_text(encoding="utf-8").strip()


class Trackio(Hosted):
    """Where trackio keeps its projects (TRACKIO_DIR): `trackio show --project bytelm`. It writes twice a second."""

    def __init__(self, run: Path, config: Mapping[str, Any]) -> None:
        import trackio

        super().__init__(trackio, run, config)

    def held(self) -> Mapping[str, int] | None:
        """See `Logger`."""
        from trackio.sqlite_storage import SQLiteStorage
        from trackio.utils import get_storage_mode

        if get_storage_mode() != "sqlite" or {"TRACKIO_SPACE_ID", "TRACKIO_SERVER_URL"} & os.environ.keys():
            return None  # it is elsewhere
        logs: list[dict[str, Any]] = SQLiteStorage.get_logs(PROJECT, self.name)
        return latest((line["step"], line) for line in logs)


class Wandb(Hosted):
    """As wandb is set up: with WANDB_MODE=offline it writes run/wandb, every 15 seconds, and reaches nothing."""

    def __init__(self, run: Path, config: Mapping[str, Any]) -> None:
        import wandb

        self.folder, own = run / "wandb", identity(run)
        super().__init__(wandb, run, config, id=own, dir=str(run))

    def held(self) -> Mapping[str, int]:
        """See `Logger`."""
        if not self.run.offline:
            return dict.fromkeys(SHOWN, self.run.starting_step - 1)  # from the server
        files = self.folder.glob(f"*run-*-{self.run.id}/run-*.wandb")
        return latest(seen for file in files for seen in history(file))


def history(file: Path) -> Iterator[tuple[int, list[str]]]:
    """Steps and the names of their figures in a file that wandb wrote: a LevelDB log of protocol buffers.

    It ends with the file, or at a truncated record.
    """
    from wandb.proto import wandb_internal_pb2

    parse: Callable[[bytes], Any] = vars(wandb_internal_pb2)["Record"].FromString
    data, at, record = file.read_bytes(), 7, b""  # after wandb's own mark
    while at + 7 <= len(data):
        left = BLOCK - at % BLOCK
        if left < 7:  # no room for another header
            at += left
            continue
        _, size, part = struct.unpack_from("<IHB", data, at)
        record = (b"" if part in (FULL, FIRST) else record) + data[at + 7 : at + 7 + size]
        at += 7 + size
        if part not in (FULL, LAST):
            continue
        try:
            found = parse(record)
        except Exception:  # its errors are of protobuf's package, in one of several
            return
        if found.HasField("history"):
            yield found.history.step.num, [item.key or ".".join(item.nested_key) for item in found.history.item]


KNOWN: dict[str, Callable[[Path, Mapping[str, Any]], Logger]] = {
    "tensorboard": TensorBoard,
    "trackio": Trackio,
    "wandb": Wandb,
}


def names_in(text: str | None) -> list[str]:
    """The loggers that a text such as "tensorboard,wandb" names. Raises UsageError for others."""
    names = [name.strip() for name in text.split(",")] if text else []
    for name in names:
        if name not in KNOWN:
            raise UsageError(unknown("logger", name, list(KNOWN)))
    return list(dict.fromkeys(names))


class Loggers:
    """All loggers of a training. `warn` is called once for each that fails.

    `lines` are the journal's of earlier sessions. A logger is sent those that it lacks; what it has, and what a
    resumed training computes again, is not sent twice. Raises MissingExtraError for one that is not installed.
    """

    def __init__(
        self,
        names: Sequence[str],
        run: Path,
        config: Mapping[str, Any],
        lines: Sequence[Mapping[str, Any]],
        warn: Callable[[str], None],
    ) -> None:
        self.warn = warn
        self.open: dict[str, Logger] = {}
        self.told: dict[str, dict[str, int]] = {}
        """Of each logger, the last step of each kind that it has."""
        for name in names:
            try:
                self.open[name] = KNOWN[name](run, config)
            except ImportError as error:
                raise MissingExtraError(name, "logs", f"--log {name}") from error
            except Exception as error:
                self.fail(name, error)
            else:
                self.told[name] = self.held(name, lines)
        for line in lines:
            self.write(line.get("kind", ""), line)

    def held(self, name: str, lines: Sequence[Mapping[str, Any]]) -> dict[str, int]:
        """The last step of each kind that a logger has of earlier sessions; if unknown, all of them."""
        try:
            found = self.open[name].held() if lines else {}
        except Exception:  # another version of the library, or its files are damaged
            found = None
        return latest((line.get("step", 0), [line.get("kind", "")]) for line in lines) if found is None else dict(found)

    def write(self, kind: str, fields: Mapping[str, Any]) -> None:
        """A line of the journal."""
        step = fields.get("step", 0)
        if kind not in SHOWN:
            return
        values = {f"{kind}/{key}": float(value) for key, value in fields.items() if is_figure(key, value)}
        for name in [*self.open]:
            if step > self.told[name].get(kind, 0):
                self.told[name][kind] = step
                self.tell(name, lambda logger: logger.log(step, values))

    def close(self) -> None:
        """No more will come."""
        for name in [*self.open]:
            self.tell(name, lambda logger: logger.close())

    def tell(self, name: str, what: Callable[[Logger], None]) -> None:
        """Call one logger, and drop it if it fails."""
        try:
            what(self.open[name])
        except Exception as error:
            del self.open[name]
            self.fail(name, error)

    def fail(self, name: str, error: Exception) -> None:
        """Report a failed logger."""
        reason = (str(error) or type(error).__name__).splitlines()[0]
        self.warn(f"{name} failed and is dropped ({reason}); metrics.jsonl is complete")


def is_figure(key: str, value: Any) -> bool:
    """Whether a field is a curve over steps."""
    return key != "step" and isinstance(value, int | float) and not isinstance(value, bool)
