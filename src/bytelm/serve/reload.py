"""Loading, and newer checkpoints of a training that goes on: picked up without dropping a request."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bytelm.checkpoint.assemble import resolve_checkpoint
from bytelm.checkpoint.store import settled
from bytelm.errors import BytelmError
from bytelm.lm import load
from bytelm.serve import logs
from bytelm.serve.served import Checkpoint, Served
from bytelm.serve.service import Service

EVERY = 5.0  # seconds


def loaded(run: Path, **options: Any) -> Checkpoint:
    """The newest checkpoint of a run, by the options of `bytelm.load`. Raises as that does."""

    def read() -> Checkpoint:
        path, state = resolve_checkpoint(run, closely=False)
        return Checkpoint(load(path, **options), path, state.get("step"))

    return settled(run, read)


class Reloader:
    """Watches the run of a served model."""

    def __init__(self, service: Service, served: Served, run: Path, load: Callable[[Path], Checkpoint]) -> None:
        self.service, self.served, self.run, self.load = service, served, run, load
        self.refused: Path | None = None

    async def watch(self, every: float = EVERY) -> None:
        """Look for a newer checkpoint, for ever."""
        while True:
            await asyncio.sleep(every)
            await self.look()

    async def look(self) -> bool:
        """Take over a newer checkpoint if there is one; whether it was. A damaged one is refused, and told once."""
        outcome = self.service.metrics.reloads.labels
        name, path = self.served.name, self.run
        try:
            path, _ = await asyncio.to_thread(resolve_checkpoint, self.run, closely=False)
            if path in (self.served.checkpoint.path, self.refused):
                return False
            checkpoint = await asyncio.to_thread(self.load, self.run)
            await self.service.engine.run(lambda: self.service.engine.replace(self.served, checkpoint))
        except BytelmError as error:
            if path != self.refused:
                logs.write("checkpoint refused", logging.ERROR, model=name, reason=str(error))
                outcome(name, "refused").inc()
            self.refused = path
            return False
        logs.write("checkpoint taken over", model=name, step=checkpoint.step)
        outcome(name, "taken").inc()
        return True
