"""A small application behind the guard, as a process: `python guarded.py KEY=VALUE...`; and how tests speak to it."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse

ROOT = Path(__file__).parents[1]
KEY = "a-key-of-a-test"
AUTHORIZATION = {"Authorization": f"Bearer {KEY}"}
JSON = {"Content-Type": "application/json"}


class Busy:
    """A service whose requests are the streams that run."""

    def __init__(self) -> None:
        self.draining, self.ended, self.streams = False, asyncio.Event(), 0
        self.finished = False  # streams end as if they had no more
        self.received = 0  # bodies that reached a route
        self.left = 0  # streams whose client left

    def drain(self) -> None:
        self.draining = True

    def active(self) -> int:
        return self.streams

    def cut(self) -> None:
        self.ended.set()


def build(service: Busy) -> FastAPI:
    """Routes like those of the server."""
    app = FastAPI()

    @app.get("/health")
    async def health() -> dict[str, Any]:
        return {"pid": os.getpid(), "received": service.received, "left": service.left, "streams": service.streams}

    @app.get("/ready")
    async def ready() -> Response:
        return JSONResponse({"draining": service.draining}, 503 if service.draining else 200)

    @app.get("/large")
    async def large() -> Response:
        return Response(b"x" * (1 << 26))

    @app.post("/echo")
    async def echo(body: dict[str, Any], request: Request) -> dict[str, Any]:
        service.received += 1
        names = sorted(name for name, _ in request.headers.items())
        return {"body": body, "client": request.state.client, "headers": names}

    @app.post("/finish")
    async def finish() -> None:
        service.finished = True

    @app.post("/stream")
    async def stream(body: dict[str, Any]) -> Response:
        if service.draining:
            return JSONResponse({"error": {"message": "shutting down"}}, 503)

        async def events() -> AsyncIterator[bytes]:
            service.streams += 1
            try:
                for number in range(body["events"]):
                    yield b"data: %d of %d\n\n" % (number, os.getpid())
                    if service.finished:
                        break
                    if service.ended.is_set():
                        yield b"data: cut\n\n"
                        return
                    await asyncio.sleep(body.get("pause", 0.01))
                yield b"data: [DONE]\n\n"
            except asyncio.CancelledError:
                service.left += 1
                raise
            finally:
                service.streams -= 1

        return StreamingResponse(events(), media_type="text/event-stream")

    return app


class Process:
    """A server that runs in a process, and its log."""

    def __init__(self, options: dict[str, Any]) -> None:
        command = [sys.executable, __file__, json.dumps(options)]
        environment = os.environ | {"PYTHONPATH": str(ROOT / "src")}
        self.process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
        )
        assert self.process.stdout is not None
        url = self.process.stdout.readline().strip()
        if not url:
            raise AssertionError(self.process.communicate(timeout=60)[1])
        self.port = int(url.rpartition(":")[2])

    def send(self, request: bytes) -> socket.socket:
        """A connection on which some bytes were sent."""
        connection = socket.create_connection(("127.0.0.1", self.port), timeout=60)
        connection.sendall(request)
        return connection

    def raw(self, request: bytes) -> bytes:
        """All that comes back until the server closes the connection."""
        with self.send(request) as connection:
            return rest(connection)

    def ask(self, method: str, path: str, body: bytes = b"", **headers: str) -> tuple[int, dict[str, str], bytes]:
        """(status, headers, body) of one request; `_` in the name of a header stands for a hyphen."""
        given = {"host": f"127.0.0.1:{self.port}", "connection": "close"}
        given |= {name.lower().replace("_", "-"): value for name, value in headers.items()}
        if body:
            given |= {"content-length": str(len(body))}
        lines = [f"{method} {path} HTTP/1.1", *(f"{name}: {value}" for name, value in given.items()), "", ""]
        return parsed(self.raw("\r\n".join(lines).encode("latin-1") + body))

    def stream(self, events: int, pause: float = 0.01) -> socket.socket:
        """A connection on which a stream was asked for."""
        body = json.dumps({"events": events, "pause": pause}).encode()
        head = f"POST /stream HTTP/1.1\r\nHost: a\r\nx-api-key: {KEY}\r\nContent-Type: application/json\r\n"
        return self.send(f"{head}Connection: close\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body)

    def health(self) -> dict[str, Any]:
        """What /health says, which needs no key."""
        return json.loads(self.ask("GET", "/health")[2])

    def stop(self, number: int | None = signal.SIGTERM) -> tuple[int, list[dict[str, Any]]]:
        """(exit code, lines of the log) after a signal, or after whatever ends it."""
        if number is not None:
            self.process.send_signal(number)
        log = self.process.communicate(timeout=120)[1]
        return self.process.returncode, [json.loads(line) for line in log.splitlines()]


@contextmanager
def running(**options: Any) -> Iterator[Process]:
    """A server. `key`: its key ("" for none); `drain`: seconds; `limits`: of connections; others: of `guarded`."""
    server = Process(options)
    try:
        yield server
    finally:
        server.process.kill()
        for pipe in (server.process.stdout, server.process.stderr):
            if pipe is not None:
                pipe.close()
        server.process.wait(60)


def until(true: Callable[[], Any]) -> None:
    """Wait for something that must happen."""
    end = time.monotonic() + 60
    while not true():
        assert time.monotonic() < end
        time.sleep(0.01)


def events_of(answer: bytes) -> list[bytes]:
    """The events in what has come of a stream."""
    return re.findall(rb"data: (.*)\n\n", answer)


def rest(connection: socket.socket) -> bytes:
    """What comes until the server closes a connection, or resets it."""
    found = bytearray()
    with suppress(ConnectionError):
        while piece := connection.recv(1 << 20):
            found += piece
    return bytes(found)


def parsed(answer: bytes) -> tuple[int, dict[str, str], bytes]:
    """(status, headers, body) of an answer."""
    head, _, body = answer.partition(b"\r\n\r\n")
    status, *lines = head.decode("latin-1").split("\r\n")
    headers: dict[str, str] = {}
    for line in lines:
        name, _, value = line.partition(": ")
        headers[name] = f"{headers[name]}; {value}" if name in headers else value
    if headers.get("transfer-encoding") == "chunked":
        body = b"".join(re.findall(rb"(?s)[0-9a-f]+\r\n(.*?)\r\n(?=[0-9a-f]+\r\n)", body))
    return int(status.split()[1]), headers, body


# --- without sockets --------------------------------------------------------------------------------------------------


class Reply:
    """What an application answered."""

    def __init__(self, sent: list[Any]) -> None:
        self.status: int = sent[0]["status"]
        self.headers = {name.decode().lower(): value.decode() for name, value in sent[0]["headers"]}
        self.body = b"".join(message.get("body", b"") for message in sent[1:])

    @property
    def error(self) -> dict[str, Any]:
        return json.loads(self.body)["error"]


def ask(
    app: Any, method: str, path: str, pieces: Sequence[bytes] = (), state: dict[str, Any] | None = None, **headers: str
) -> Reply:
    """Call an application; `_` in the name of a header stands for a hyphen. `state`: what the request's is put into."""
    given = {"host": "localhost:8000", **({"transfer_encoding": "chunked"} if pieces else {}), **headers}
    pairs = [(name.lower().replace("_", "-").encode(), value.encode("latin-1")) for name, value in given.items()]
    scope: dict[str, Any] = {"type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "scheme": "http"}
    scope |= {
        "method": method,
        "path": path,
        "raw_path": path.encode(errors="replace"),
        "query_string": b"",
        "root_path": "",
    }
    scope |= {"headers": pairs, "client": ("192.0.2.1", 5), "server": ("localhost", 8000), "state": state or {}}
    sent: list[Any] = []
    waiting = list(pieces) or [b""]

    async def receive() -> dict[str, Any]:
        if not waiting:
            return {"type": "http.disconnect"}
        return {"type": "http.request", "body": waiting.pop(0), "more_body": bool(waiting)}

    async def send(message: Any) -> None:
        sent.append(message)

    asyncio.run(app(scope, receive, send))
    if state is not None:
        state |= scope["state"]
    return Reply(sent)


METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "BREW")
ODD = (
    "/none",
    "//health",
    "/health/",
    "/Health",
    "/health/../ready",
    "/health?",
    "/health#",
    "/health;",
    "/health.json",
)
ODD += (
    "",
    "*",
    "/.env",
    "/static/../../etc/passwd",
    "/\n/health",
    "/health\x00",
    "/v1/models/\u202e",
    "/docs/oauth2-redirect",
)


def unlocked(app: FastAPI, guarded: Any) -> set[tuple[str, str]]:
    """(method, path) of all that a guarded application with keys answers to somebody with a wrong key, or with none.

    Every route of the application is tried, by every method, and paths that are no routes.
    """
    paths = {getattr(route, "path", "") for route in app.routes} | set(app.openapi()["paths"]) | {*ODD, "/health"}
    found: set[tuple[str, str]] = set()
    for path in paths:
        for method in METHODS:
            for headers in ({}, {"authorization": "Bearer not-the-key"}, {"x_api_key": "", "authorization": "Basic "}):
                reply = ask(guarded, method, path, content_type="application/json", **headers)
                if reply.status != 401 or reply.error["code"] != "invalid_api_key":
                    found.add((method, path))
    return found


def main(options: dict[str, Any]) -> int:
    from bytelm.serve import guard, server

    key, drain, prompts = options.pop("key", KEY), options.pop("drain", 30), options.pop("log_prompts", False)
    limits = server.Limits(**options.pop("limits", {}))
    service = Busy()
    app = guard.guarded(build(service), keys=guard.Keys.of(key) if key else None, **options)
    return server.serve(
        app,
        service,
        "127.0.0.1",
        0,
        drain=drain,
        ready=lambda url: print(url, flush=True),
        limits=limits,
        log_prompts=prompts,
    )


if __name__ == "__main__":
    sys.exit(main(json.loads(sys.argv[1])))
