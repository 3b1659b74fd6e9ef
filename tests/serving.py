"""A server of the test process, on a free port of loopback, without the guard and the process around it."""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import uvicorn

from bytelm.lm import load
from bytelm.serve.app import build
from bytelm.serve.served import Checkpoint, Served
from bytelm.serve.service import Service

RUN = Path(__file__).parent / "golden-run"


@dataclass
class Live:
    """A running server."""

    url: str
    service: Service

    @property
    def served(self) -> Served:
        """Its first model."""
        return next(iter(self.service.engine.models.values()))

    def post(self, path: str, **body: Any) -> httpx.Response:
        """Post JSON."""
        return httpx.post(self.url + path, json=body, timeout=60)

    def complete(self, **body: Any) -> dict[str, Any]:
        """The answer of /v1/completions."""
        found = self.post("/v1/completions", **body)
        assert found.status_code == 200, found.text
        return found.json()

    def metric(self, name: str, **labels: str) -> float:
        """The value of a metric."""
        return self.service.metrics.registry.get_sample_value(f"bytelm_{name}", labels) or 0.0

    def idle(self) -> bool:
        """Wait until nothing runs; whether that came."""
        until = time.monotonic() + 30
        while time.monotonic() < until:
            if not self.served.running and not len(self.served.queue) and not self.service.engine.answers:
                return len(self.served.session.free) == self.served.rows
            time.sleep(0.005)
        return False


def events(lines: Iterator[str]) -> Iterator[dict[str, Any]]:
    """The objects of server-sent events."""
    for line in lines:
        if line.startswith("data: ") and line != "data: [DONE]":
            yield json.loads(line.removeprefix("data: "))


def served(run: Path = RUN, rows: int = 32, queue: int = 64, capacity: int | None = None) -> Served:
    """A model of a run."""
    return Served(run.name, Checkpoint(load(run), run, 3), rows, queue, capacity)


@contextlib.contextmanager
def live(*models: Served) -> Iterator[Live]:
    """A server of these models, while the block runs."""
    service = Service(models or [served()])
    config = uvicorn.Config(build(service), port=0, log_config=None, access_log=False)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    until = time.monotonic() + 30
    while not server.started and time.monotonic() < until:
        time.sleep(0.005)
    try:
        yield Live(f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}", service)
    finally:
        server.should_exit = True
        thread.join(30)
        service.close()
