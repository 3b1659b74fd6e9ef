"""Windows of documents: how they are cut, as `evaluate.bits` draws them, and how they are read and scored."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from bytelm.device import fitting
from bytelm.errors import UsageError
from bytelm.evaluate import online
from bytelm.evaluate.dynamic import Dynamic
from bytelm.evaluate.reading import Window, open_reader, read_windows
from bytelm.evaluate.stream import Document, decisions
from bytelm.interfaces.decoder import Decoder
from bytelm.interfaces.model import ByteModel
from bytelm.interfaces.objective import nats_of
from bytelm.online.memory import Memory
from bytelm.threads import StepThreads, ThroughputTuner, all_or_one
from bytelm.transfer import to_device, to_host
from bytelm.units import PAD, UNWRITTEN

Precision = Literal["float32", "bfloat16"]


@dataclass(frozen=True)
class Windows:
    """How documents are cut into windows, and windows scored."""

    model: ByteModel
    context: int
    stride: int
    batch: int
    precision: Precision = "float32"
    threads: StepThreads = field(default_factory=StepThreads)
    reader: Decoder | None = None
    """What reads the windows instead of the forward pass, where it can."""
    tuner: ThroughputTuner[int] | None = None
    """Chooses how many threads of the reader do."""
    memory: Memory | None = None
    dynamic: Dynamic | None = None
    """What has `model` learn from each window after it was read; windows are then read one by one."""

    @classmethod
    def checked(
        cls,
        model: ByteModel,
        context: int,
        stride: int | None,
        batch: int,
        precision: Precision = "float32",
        dynamic: Dynamic | None = None,
    ) -> Windows:
        """Windows as the user wants them, if they can be had."""
        if context < 1 or batch < 1:
            raise UsageError(f"context = {context} and batch = {batch}: each must be at least 1")
        if stride is None:
            stride = max(1, context // 2)
        if not 1 <= stride <= context:
            raise UsageError(f"stride = {stride}: must be from 1 to the context, {context}, or bytes are left out")
        if dynamic is not None:  # whose results another number of threads would change
            model = dynamic.copy_of(model)
            return cls(model, context, stride, 1, precision, StepThreads(adaptive=False), dynamic=dynamic)
        reader = open_reader(model, rows=batch, capacity=context) if precision == "float32" else None
        pool = None if reader is None else reader.thread_pool
        tuner = all_or_one(pool.most) if pool and pool.most > 1 else None
        return cls(model, context, stride, batch, precision, StepThreads(model.device.type == "cpu"), reader, tuner)

    def of(self, document: Document | Int[Tensor, " ids"]) -> Iterator[Window]:
        """The windows of a document, or of ids that were made of one; none if it is empty."""
        ids, opens = torch.zeros(0, dtype=torch.long), None
        seen = 0
        whole = isinstance(document, Tensor)
        stream = [(document, None)] if whole else decisions(self.model.patcher, document, self.model.tokens)
        for new_ids, new_opens in stream:
            ids = torch.cat([ids, new_ids])
            opens = new_opens if opens is None or new_opens is None else torch.cat([opens, new_opens])
            while len(ids) > self.context:
                end = self.context + 1
                yield Window(ids[:end], None if opens is None else opens[:end], seen)
                ids, opens = ids[self.stride :], None if opens is None else opens[self.stride :]
                seen = self.context - self.stride
        if len(ids) - 1 > seen:
            yield Window(ids, opens, seen)

    @torch.inference_mode()
    def read(self, group: list[Window]) -> tuple[Float[Tensor, "scored vocab"], list[Int[Tensor, " _"]]]:
        """What is predicted of the ids that windows score, one window's after another's; and the ids of each.

        Without a reader all are read in one pass. Logits are where the model is, ids on the host. Raises ResourceError
        where there is no room for so many.
        """
        targets = [window.ids[window.seen + 1 :] for window in group]
        if self.reader is not None:
            return torch.from_numpy(read_windows(self.reader, group, self.tuner)), targets
        if self.dynamic is None:
            return self.forward(group), targets
        with torch.inference_mode(False), self.fitting(group):
            logits = self.forward(group)
            self.dynamic.learn(logits, torch.cat(targets))
        return logits.detach(), targets

    def forward(self, group: list[Window]) -> Float[Tensor, "scored vocab"]:
        """The same by the model's forward pass, with gradients where they are enabled."""
        ids = pad_sequence([window.ids for window in group], batch_first=True, padding_value=PAD)
        cut = [window.opens for window in group if window.opens is not None]
        boundaries = pad_sequence(cut, batch_first=True)[:, :-1] if cut else None
        low, device = self.precision == "bfloat16", self.model.device
        autocast = torch.autocast(device.type, torch.bfloat16, enabled=low)
        with autocast, self.fitting(group), self.threads.step(len(group)):
            logits, _ = self.model(ids[:, :-1], None, boundaries)
        width = logits.shape[1]
        places = [row * width + torch.arange(w.seen, len(w.ids) - 1) for row, w in enumerate(group)]
        return logits.flatten(0, 1).index_select(0, to_device(torch.cat(places), logits))

    def fitting(self, group: list[Window]) -> contextlib.AbstractContextManager[None]:
        """Raises ResourceError where there is no room for so many windows."""
        what, way_out = f"{len(group)} windows of {self.context} ids", f"take a context of {max(1, self.context // 2)}"
        return fitting(self.model.device, what, lambda: f"{way_out}, or --device cpu")

    @torch.inference_mode()
    def score(self, group: list[Window]) -> list[tuple[NDArray[np.float64], NDArray[np.int64], float | None]]:
        """The nats of what each window scores, the bytes of each of these ids, and the nats with the memory."""
        logits, targets = self.read(group)
        nats = nats_of(logits[None], to_device(torch.cat(targets), logits)[None])[0]
        each = to_host(nats).double().split([len(ids) for ids in targets])
        own = [None] * len(group) if self.memory is None else online.nats_online(self.memory, logits, targets)
        sizes = [self.model.byte_lengths(ids).numpy() for ids in targets]
        return [(nats.numpy(), size, cost) for nats, size, cost in zip(each, sizes, own, strict=True)]

    @torch.inference_mode()
    def judge(self, group: list[Window]) -> list[tuple[Float[Tensor, " scored"], Bool[Tensor, " scored"]]]:
        """The nats of what each window scores, and whether each of these ids is the most probable that is written."""
        if not group:
            return []
        logits, targets = self.read(group)
        sizes, wanted = [len(ids) for ids in targets], to_device(torch.cat(targets), logits)
        nats = to_host(nats_of(logits[None], wanted[None])[0]).split(sizes)
        written = logits.index_fill(-1, to_device(torch.tensor(UNWRITTEN), logits), float("-inf"))
        return list(zip(nats, to_host(written.argmax(-1) == wanted).split(sizes), strict=True))
