"""Sockets, connections and signals: uvicorn, bounded where it waits without end, and an orderly shutdown."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import re
import secrets
import signal
import socket
from asyncio import TimerHandle, Transport
from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Any, Protocol, cast, runtime_checkable

from bytelm.errors import BytelmError, MissingExtraError, ResourceError, UsageError
from bytelm.serve import logs
from bytelm.serve.guard import HEADERS, App, Refusal, error_body

try:
    import uvicorn
    from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle
except ImportError as error:
    raise MissingExtraError("uvicorn", "serve", "the server") from error

SIGNALS = (signal.SIGINT, signal.SIGTERM)
TICK = 0.05  # seconds between two counts of the requests in progress
LAST = 3  # seconds in which the ends of answers must be sent
BACKLOG = 1024
UPGRADE = re.compile(rb"(?i)\r\nupgrade(?=[ \t]*:)")


@runtime_checkable
class Drainable(Protocol):
    """What the server asks of what it serves."""

    def drain(self) -> None:
        """Take no new work."""
        ...

    def active(self) -> int:
        """Requests in progress."""
        ...

    def cut(self) -> None:
        """End all requests in progress."""
        ...


@dataclass(frozen=True)
class Limits:
    """Bounds of connections. `header_timeout`: seconds in which the headers of a request must be complete.

    `write_timeout`: seconds for which a client may leave what it was sent unread; `keep_alive`: seconds between two
    requests; `connections`: how many there may be at once.
    """

    header_timeout: float = 10.0
    write_timeout: float = 60.0
    keep_alive: int = 65  # more than the 60 s for which nginx keeps its connections: who is kept decides who closes
    connections: int = 512


LIMITS = Limits()


class Config(uvicorn.Config):
    """The configuration that a connection sees."""

    limits: Limits


class Connection(HttpToolsProtocol):
    """A connection: uvicorn's, with limits where it has none.

    - No request begins for `header_timeout` seconds, or its headers are incomplete by then: closed.
    - More than `HEADERS` bytes arrive that are neither complete headers nor a body (endless headers, trailers): 431.
    - The client does not read for `write_timeout` seconds: closed.
    - Fields after a chunked body (trailers) are dropped; uvicorn appends them to the headers.
    - The header `Upgrade` is renamed: with it the parser drops the body (https://github.com/Kludex/uvicorn/issues/2722),
      and Java's HttpClient and `curl --http2` send it.
    - A client that sent a second request before the first was answered, and left: the first one hears of it too.
    """

    config: Config  # pyright: ignore[reportIncompatibleVariableOverride]
    transport: Transport

    def connection_made(self, transport: Transport) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """A client came."""
        super().connection_made(transport)
        self.limits = self.config.limits
        self.in_headers, self.in_body, self.unused = False, False, 0
        self.waiting: TimerHandle | None = None
        self.stalled: TimerHandle | None = None
        self.earlier: list[RequestResponseCycle] = []
        if len(self.connections) > self.limits.connections:
            self.end(503, f"more than {self.limits.connections} connections: try again later")
        else:
            self.wait()

    def wait(self) -> None:
        """Begin to wait for complete headers."""
        if self.waiting is None:
            self.waiting = self.loop.call_later(self.limits.header_timeout, self.timed_out)

    def timed_out(self) -> None:
        """The headers did not come."""
        if not self.transport.is_closing():
            logs.write("headers timed out", logging.WARNING, client=self.peer())
            self.transport.close()

    def data_received(self, data: bytes) -> None:
        """Some bytes of a request, or of several."""
        between = not self.in_headers and not self.in_body
        if self.transport.is_closing() or (between and not data.strip(b"\r\n")):
            return  # blank lines before a request say nothing, and are no reason to wait longer
        if between:
            head, end, rest = data.partition(b"\r\n\r\n")
            data = UPGRADE.sub(b"\r\nignored", head) + end + rest
        self.unused += len(data)
        super().data_received(data)
        if self.transport.is_closing():
            return
        if self.unused > HEADERS:
            self.end(431, f"more than {HEADERS} bytes of headers, or of fields after a body")
        elif self.in_headers:
            self.wait()

    def on_message_begin(self) -> None:
        """A request begins."""
        super().on_message_begin()
        self.in_headers = True

    def on_header(self, name: bytes, value: bytes) -> None:
        """A header is complete."""
        if not self.in_body:
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        """All headers of a request are complete."""
        self.in_headers, self.in_body, self.unused = False, True, 0
        self.stop_waiting()
        before = cast(RequestResponseCycle | None, self.cycle)
        self.earlier = [cycle for cycle in [*self.earlier, before] if cycle and not cycle.response_complete]
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        """A piece of a body."""
        self.unused = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        """A request is complete."""
        self.in_body, self.unused = False, 0
        super().on_message_complete()

    def pause_writing(self) -> None:
        """The client reads more slowly than it is sent to."""
        super().pause_writing()
        self.stalled = self.loop.call_later(self.limits.write_timeout, self.transport.abort)

    def resume_writing(self) -> None:
        """The client has read."""
        super().resume_writing()
        if self.stalled is not None:
            self.stalled.cancel()
            self.stalled = None

    def connection_lost(self, exc: Exception | None) -> None:
        """The client left."""
        super().connection_lost(exc)
        self.stop_waiting()
        if self.stalled is not None:
            self.stalled.cancel()
        for cycle in self.earlier:
            if not cycle.response_complete:
                cycle.disconnected = True
                cycle.message_event.set()

    def stop_waiting(self) -> None:
        """Stop to wait for headers."""
        if self.waiting is not None:
            self.waiting.cancel()
            self.waiting = None

    def send_400_response(self, msg: str) -> None:
        """What is no HTTP."""
        self.end(400, "this is no valid HTTP request")

    def end(self, status: int, message: str) -> None:
        """Send an error and close the connection; in the middle of an answer, just close it."""
        request_id = secrets.token_hex(12)
        logs.write("refused", logging.WARNING, id=request_id, client=self.peer(), status=status, reason=message)
        cycle = cast(RequestResponseCycle | None, self.cycle)
        if cycle is None or cycle.response_complete:
            body = error_body(Refusal(status, message))
            head = (
                f"HTTP/1.1 {status} \r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n"
                f"connection: close\r\nx-request-id: {request_id}\r\n\r\n"
            )
            self.transport.write(head.encode() + body)
        self.transport.close()

    def peer(self) -> str:
        """The address of the client."""
        return self.client[0] if self.client else "local"


class Server(uvicorn.Server):
    """uvicorn's server, which on SIGINT and SIGTERM lets answers finish and then ends with exit code 0."""

    def __init__(self, config: Config, service: Drainable, drain: float, ready: Callable[[], None]) -> None:
        super().__init__(config)
        self.service, self.seconds, self.ready = service, drain, ready
        self.draining: asyncio.Task[None] | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen, and say so."""
        await super().startup(sockets)
        logs.write("listening")
        self.ready()

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None, None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Hear signals as long as the server runs; uvicorn would raise them again afterwards."""
        loop = asyncio.get_running_loop()
        before = [(one, signal.getsignal(one)) for one in SIGNALS]
        for one in SIGNALS:
            loop.add_signal_handler(one, self.stop, one)
        try:
            yield
        finally:
            for one, handler in before:
                loop.remove_signal_handler(one)
                signal.signal(one, handler)

    def stop(self, number: int) -> None:
        """Begin to shut down; when that has begun, exit at once."""
        if self.draining is None:
            self.draining = asyncio.get_running_loop().create_task(self.shut_down(number))
        else:
            logs.write("exit", logging.WARNING, signal=signal.Signals(number).name)
            os._exit(128 + number)  # whatever a thread is at

    async def shut_down(self, number: int) -> None:
        """Take no new requests, wait for those in progress, end the rest."""
        loop = asyncio.get_running_loop()
        end = loop.time() + self.seconds
        logs.write("draining", signal=signal.Signals(number).name, active=self.service.active(), seconds=self.seconds)
        self.service.drain()
        while self.service.active() and loop.time() < end:
            await asyncio.sleep(TICK)
        if cut := self.service.active():
            logs.write("cut", logging.WARNING, active=cut)
            self.service.cut()
        self.should_exit = True


def listener(host: str, port: int) -> socket.socket:
    """A socket that listens at an address. Raises UsageError, ResourceError."""
    if not 0 <= port < 1 << 16:
        raise UsageError(f"--port {port}: give 0, for any free one, to 65535")
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family, backlog=BACKLOG)
    except OSError as error:
        reason = f"{error.strerror}; give another --port, or 0 for any free one"
        raise ResourceError(f"cannot listen at {host}, port {port}: {reason}") from None


def url_of(sock: socket.socket) -> str:
    """The URL of a listening socket."""
    host, port = sock.getsockname()[:2]
    return f"http://[{host}]:{port}" if sock.family == socket.AF_INET6 else f"http://{host}:{port}"


def serve(
    app: App,
    service: Drainable,
    host: str,
    port: int,
    *,
    drain: float,
    ready: Callable[[str], None],
    limits: Limits = LIMITS,
    log_prompts: bool = False,
) -> int:
    """Serve an application until SIGINT or SIGTERM; the exit code, 0. Raises BytelmError.

    `drain`: seconds that requests in progress have from then on; `ready`: called with the URL once it is listened to.
    """
    with listener(host, port) as sock, logs.lines(prompts=log_prompts):
        url = url_of(sock)
        options: dict[str, Any] = {"lifespan": "on", "interface": "asgi3", "ws": "none", "http": Connection}
        options |= {"proxy_headers": False, "server_header": False, "log_config": None, "access_log": False}
        options |= {"timeout_graceful_shutdown": LAST, "timeout_keep_alive": limits.keep_alive}
        config = Config(cast(Any, app), **options)
        config.limits = limits
        server = Server(config, service, drain, lambda: ready(url))
        try:
            server.run(sockets=[sock])
        except SystemExit:
            raise BytelmError("the application did not start: the log has the reason") from None
        logs.write("stopped")
        return 0
