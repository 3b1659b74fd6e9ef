"""Windows read by the kernels of the host: the logits of the forward pass in fewer passes over memory.

Decoders are held to a model's forward pass (`testing.decoders`), and are bitwise identical in any batch and any chunks.
So what is measured depends neither on the batch nor on the number of threads.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from bytelm.decoding import Decoder, open_decoder, why_plain
from bytelm.evaluate.stream import CHUNK
from bytelm.interfaces.decoder import CHUNK as CACHED
from bytelm.interfaces.decoder import Reals
from bytelm.interfaces.model import ByteModel
from bytelm.machine import memory
from bytelm.threads import ThroughputTuner

AT_ONCE = 1024  # ids of a call, which saturate the kernels; with more, activations leave the caches


@dataclass(frozen=True)
class Window:
    """A window of a document: all ids but the last are read, and what follows the first `seen` of them is scored."""

    ids: Int[Tensor, " time"]
    opens: Bool[Tensor, " time"] | None
    """Whether the next id opens a patch, decided over the whole document; None without a patcher."""
    seen: int


def open_reader(model: ByteModel, *, rows: int, capacity: int) -> Decoder | None:
    """A decoder of up to `rows` windows of up to `capacity` ids; None where the forward pass has to read them.

    So it is on a device, for a model that the kernels do not know, and for parameters below float32, as caches would be
    rounded too. A model that was packed for inference is measured as it generates. Rows are as many as there is memory
    for, and no more than are read at once.
    """
    weights = {p.dtype for name, p in model.named_parameters() if not name.startswith("patcher.")}
    known = model.content is not None or weights <= {torch.float32, torch.float64}
    if model.device.type != "cpu" or not known or why_plain(model):
        return None
    rows = min(rows, AT_ONCE // CACHED)
    reader = open_decoder(model, rows=rows, capacity=capacity)
    while rows > 1 and rows * reader.row_bytes > (memory().free or math.inf):
        rows //= 2
        reader = open_decoder(model, rows=rows, capacity=capacity)
    return reader


def read_windows(reader: Decoder, windows: Sequence[Window], tuner: ThroughputTuner[int] | None = None) -> Reals:
    """What is predicted of the ids that windows score, one window's after another's: `[scored, vocab]`.

    `tuner` chooses the number of the kernels' threads, on which nothing depends but the time.
    """
    found: list[Reals] = []
    most = max(1, min(reader.rows, AT_ONCE // reader.chunk))
    for begin in range(0, len(windows), most):
        began = time.perf_counter()
        found += read_together(reader, windows[begin : begin + most])
        if tuner and reader.thread_pool:
            tuner.note(time.perf_counter() - began, most)
            reader.thread_pool.threads = tuner.option
    return np.concatenate(found)


def read_line(model: ByteModel, ids: Int[Tensor, " time"]) -> Iterator[Float[Tensor, "new vocab"]]:
    """The logits after each of some ids, piece by piece, each with all ids before it in one state."""
    reader = open_reader(model, rows=1, capacity=max(1, len(ids)))
    if reader is not None:
        for begin in range(0, len(ids), reader.chunk):
            part = ids[begin : begin + reader.chunk].numpy()
            yield torch.from_numpy(reader.read(np.zeros_like(part), part))
        return
    state = model.initial_state(1)
    for begin in range(0, len(ids), CHUNK):
        logits, state = model(ids[None, begin : begin + CHUNK], state)
        yield logits[0]


def read_together(reader: Decoder, windows: Sequence[Window]) -> list[Reals]:
    """The same of as many windows as the decoder has rows, all at once; in pieces, in order."""
    every = np.arange(len(windows))
    reader.rollback(every, np.zeros_like(every))
    lengths = np.array([len(window.ids) - 1 for window in windows])
    kept: list[list[Reals]] = [[] for _ in windows]
    for at in range(0, int(lengths.max()), reader.chunk):
        rows = every[lengths > at]
        ends = np.minimum(at + reader.chunk, lengths[rows])
        parts = [(windows[row], slice(at, end)) for row, end in zip(rows.tolist(), ends.tolist(), strict=True)]
        ids = torch.cat([window.ids[part] for window, part in parts]).numpy()
        cut = [window.opens[part] for window, part in parts if window.opens is not None]
        scored = [np.arange(part.start, part.stop) >= window.seen for window, part in parts]
        opens = torch.cat(cut).numpy() if cut else None
        logits = reader.read(rows.repeat(ends - at), ids, np.concatenate(scored), opens)
        pieces = np.split(logits, np.cumsum([int(these.sum()) for these in scored])[:-1])
        for row, piece in zip(rows.tolist(), pieces, strict=True):
            kept[row].append(piece)
    return [piece for row in kept for piece in row]
