"""A service: the models, the engine that runs them, and what the routes and the process ask of both."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

import numpy as np

from bytelm import __version__
from bytelm.evaluate.patches import patch_view
from bytelm.inspection import description, segmentation_of
from bytelm.serve.chat import Template
from bytelm.serve.engine import Engine
from bytelm.serve.metrics import Metrics
from bytelm.serve.served import Served
from bytelm.units import LN2

SHOWN = 1 << 14  # bytes of which patches are shown at most
KEPT = 64  # answers about patches that are kept: a page asks again as it is typed


class Service:
    """What is served. `draining`: no new requests are taken."""

    version = __version__

    def __init__(self, models: Sequence[Served], template: Template | None = None) -> None:
        self.metrics = Metrics()
        self.engine = Engine(models, self.metrics)
        self.template = template or Template()
        self.started = int(time.time())
        self.beside: list[Callable[[], Coroutine[Any, Any, None]]] = []
        """What runs beside the engine in the event loop, as long as the server does."""
        self.views: OrderedDict[tuple[str, int, bytes], dict[str, Any]] = OrderedDict()

    @property
    def draining(self) -> bool:
        """See `Service`."""
        return self.engine.draining

    def drain(self) -> None:
        """Take no new requests; those that run go on."""
        self.engine.draining = True

    def active(self) -> int:
        """Requests in progress."""
        return len(self.engine.answers)

    def cut(self) -> None:
        """End all requests in progress with an error. Of the event loop."""
        self.engine.cut()

    def close(self) -> None:
        """Stop the engine."""
        self.engine.close()

    def card(self, served: Served) -> dict[str, Any]:
        """What /v1/models says of a model."""
        lm, modality, recipe = served.lm, served.lm.modality, served.lm.recipe
        kind = None
        if modality is not None:
            kind = {name: getattr(modality, name) for name in ("name", "suffix", "size", "unit", "row", "text")}
        return {
            "id": served.name,
            "object": "model",
            "created": self.started,
            "owned_by": "bytelm",
            "max_model_len": served.capacity,
            "parameters": sum(parameter.numel() for parameter in lm.model.parameters()),
            "description": description(lm.model, recipe) if recipe else type(lm.model).__name__,
            "patches": segmentation_of(lm.model, recipe) or ("fixed" if lm.model.patch_size else "") if recipe else "",
            "step": served.step,
            "bits_per_byte": lm.bits_per_byte,
            "modality": kind,
        }

    async def patches(self, served: Served, data: bytes) -> dict[str, Any]:
        """The patches of bytes: where they start, and the entropy before each byte, in bits. Raises UsageError."""
        key = (served.name, id(served.lm), data)
        if key not in self.views:
            lm = served.lm
            view = await self.engine.run(lambda: patch_view(lm.model, data))
            entropies = None if view.entropies is None else [float(nats) / LN2 for nats in view.entropies]
            self.views[key] = {"patch_starts": np.flatnonzero(view.opens).tolist(), "entropy_bits": entropies}
            while len(self.views) > KEPT:
                self.views.popitem(last=False)
        return self.views[key]
