"""The command that generates: bytes from a prompt, as they come, with how fast they came."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, cast

from cyclopts import Parameter

from bytelm.cli.common import Device, Json, Quiet, Tables, Weights, counter, lone, print_json
from bytelm.cli.media import check_file, collected, task_of, write_file
from bytelm.cli.online import Online, beside
from bytelm.units import show_bytes

if TYPE_CHECKING:
    from bytelm.generate.request import Chunk
    from bytelm.lm import LM


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class SamplingOptions:
    """Sampling options."""

    max_bytes: int | None = None
    """Maximum number of bytes to generate (default: a whole image, the rest of the clip, or 256)."""
    temperature: float = 0.8
    """Sampling temperature; 0 is greedy decoding."""
    top_k: int | None = None
    """Sample from the k most probable bytes."""
    top_p: float | None = None
    """Nucleus sampling: from the smallest set with this total probability."""
    min_p: float | None = None
    """Sample from bytes with at least this fraction of the highest probability."""
    seed: int = 0
    """Random seed; the same seed generates the same bytes."""
    stop: Annotated[list[str] | None, Parameter(negative="")] = None
    r"""Stop sequence, not part of the output. \n, \r, \t, \\ and \xHH (hex) are escapes. May be repeated."""
    utf8: Annotated[bool, Parameter(negative="")] = False
    """Constrain the output to valid UTF-8."""


def generate(
    run: Path,
    prompt: str = "",
    /,
    *,
    drawing: SamplingOptions | None = None,
    out: Annotated[Path | None, Parameter(name=("--out", "--png", "--wav"))] = None,
    keep: float | None = None,
    hex: Annotated[bool, Parameter(negative="", help="The prompt is given as hex digits.")] = False,
    windowing: Literal["basic", "sliding", "strided", "both"] = "basic",
    online: Online = None,
    weights: Weights = None,
    tables: Tables = None,
    device: Device = "auto",
    quiet: Quiet = False,
    json: Json = False,
) -> int:
    """Generate from a prompt, streaming bytes.

    Example: bytelm generate runs/demo "def main(" --temperature 0.5 --stop "\\n\\n"
    Example: bytelm generate runs/pictures @photo.png --png completed.png

    Parameters
    ----------
    run
        A run, or one checkpoint of it.
    prompt
        Text, @file, or - for standard input.
    out
        Write prompt and continuation to this file, in the format of the run's modality (--as).
    keep
        Fraction of an image or clip, given as @file, that is the prompt (default: 0.5).
    windowing
        sliding never exceeds the training context length; strided makes two offset passes; both combines them.
    """
    from bytelm.device import use
    from bytelm.generate.prompts import pieces
    from bytelm.generate.stop import unescape
    from bytelm.lm import Options, load, split

    drawing = drawing or SamplingOptions()
    watch = partial(counter, quiet=quiet or json)
    lm = load(run, use(device), weights=weights, tables=tables, watch=watch).with_windowing(windowing)
    if out is not None:
        check_file(out, lm.modality, for_text=bool(drawing.stop or drawing.utf8))
    task = task_of(lm.modality, prompt, hex, keep, drawing.max_bytes)
    stop = [unescape(lone(text)) for text in drawing.stop or []]
    asked = {**vars(drawing), **beside(run, online), "stop": stop, "max_bytes": task.max_bytes, "eos": task.eos}
    generating = Generating(len(task.prompt), pieces(lm.model, [task.prompt], **split(cast(Options, asked))))
    if json or out is not None:
        written = collected(generating.stream(), task.max_bytes, quiet=quiet or json)
    else:
        written = shown(generating.stream())
    if out is not None and lm.modality is not None:
        write_file(out, lm.modality, task.prompt + written)
    tell(generating, written, memory_of(lm, len(task.prompt) + len(written)), out, quiet, json)
    return 0


@dataclass
class Generating:
    """A generation, its finish reason, and when its first and last bytes came."""

    prompt_bytes: int
    chunks: Iterable[Chunk]
    reason: str = ""
    first_bytes: int = 0
    """Those that came at once after the prompt was read: one, or more that were drafted."""
    times: list[float] = field(default_factory=list[float])
    """Of the beginning, of the first bytes, of the end; in seconds."""

    def stream(self) -> Iterator[bytes]:
        """The bytes as they come."""
        self.times = [time.perf_counter()]
        for chunk in self.chunks:
            if chunk.data and not self.first_bytes:
                self.first_bytes = len(chunk.data)
                self.times.append(time.perf_counter())
            self.reason = chunk.reason or self.reason
            if chunk.data:
                yield chunk.data
        self.times.append(time.perf_counter())

    def mapping(self, bytes: int) -> dict[str, Any]:
        """What `--json` says of it: the time of all and to the first byte, and the speed after that one."""
        began, *first, end = self.times
        later, seconds = bytes - self.first_bytes, end - (first or self.times)[0]
        return {
            "finish_reason": self.reason,
            "prompt_bytes": self.prompt_bytes,
            "seconds": end - began,
            "first_byte_seconds": first[0] - began if first else None,
            "bytes_per_second": later / max(1e-9, seconds) if later else None,
        }


def memory_of(lm: LM, bytes: int) -> dict[str, int]:
    """Memory of a model that was loaded for inference: its weights, and the caches of a sequence. Empty for others."""
    if lm.model.content is None:
        return {}
    from bytelm.decoding import open_decoder
    from bytelm.nn.packed import PackedLinear

    weights = sum(part.matrix.bytes for part in lm.model.modules() if isinstance(part, PackedLinear))
    return {"weight_bytes": weights, "cache_bytes": open_decoder(lm.model, rows=1, capacity=1 + bytes).row_bytes}


def tell(
    generating: Generating, written: bytes, memory: dict[str, int], out: Path | None, quiet: bool, json: bool
) -> None:
    """Print the size and speed of what was generated, why it ended, and the memory that it took."""
    found = generating.mapping(len(written))
    if json:
        content = {"text": written.decode(errors="replace"), "hex": written.hex(), "bytes": len(written)}
        file = {} if out is None else {"file": str(out)}
        print_json({**content, **file, **found, **memory})
        return
    if not quiet:
        speed, first = found["bytes_per_second"], found["first_byte_seconds"]
        parts = [
            f"{len(written)} bytes ({found['finish_reason']})",
            *([f"{speed:.0f} bytes/s"] if speed else []),
            *([f"the first after {first:.2f} s"] if first else []),
        ]
        shown = ", ".join(f"{name.removesuffix('_bytes')}s {show_bytes(size)}" for name, size in memory.items())
        print(f"\n{', '.join(parts)}{shown and f'; {shown}'}", file=sys.stderr)
    if out is not None:
        print(out)


def shown(pieces: Iterable[bytes]) -> bytes:
    """Stream to standard output: to a terminal as text, to a file or another program as raw bytes."""
    return show_bytes_as_text(pieces) if sys.stdout.isatty() else copy_bytes(pieces)


def copy_bytes(pieces: Iterable[bytes]) -> bytes:
    """Raw bytes to standard output, for a file or another program."""
    written = bytearray()
    for piece in pieces:
        written += piece
        sys.stdout.buffer.write(piece)
        sys.stdout.buffer.flush()
    return bytes(written)


def show_bytes_as_text(pieces: Iterable[bytes]) -> bytes:
    """Text to the terminal: characters are kept whole, control characters other than line ends and tabs escaped."""
    from bytelm.generate.utf8 import decode

    written = bytearray()

    def kept() -> Iterator[bytes]:
        for piece in pieces:
            written.extend(piece)
            yield piece

    for text in decode(kept()):
        sys.stdout.write("".join(c if c in "\n\t" or c.isprintable() else repr(c)[1:-1] for c in text))
        sys.stdout.flush()
    return bytes(written)
