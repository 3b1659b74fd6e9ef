"""The outermost layer of the application: who may ask, from where, and how much. Pure ASGI.

A request passes in this order: an id, a log line, its host (without keys) or its key, its origin, its content type, its
body. Whatever is not known to be allowed is refused, routes that do not exist included; `/health` alone is open.
A body is read before a route is called, so no route waits for a client, and memory is bounded.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import contextlib
import hashlib
import hmac
import ipaddress
import json
import logging
import re
import secrets
import time
from collections.abc import Awaitable, Callable, Iterable, MutableMapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from bytelm.errors import UsageError
from bytelm.serve import logs

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

SHORTEST = 8  # characters of a key
HEADERS = 1 << 16  # bytes of the headers of a request
BODIES = 8  # bodies of the largest size that may be in memory at once
LINGER_BYTES, LINGER_SECONDS = 1 << 26, 2.0  # of a refused body that are read and dropped, so that the answer arrives
REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
OPEN = ("GET", "/health"), ("HEAD", "/health")
WITHOUT_BODY = ("GET", "HEAD", "OPTIONS")


class Refusal(Exception):
    """A request that is answered with an error."""

    def __init__(self, status: int, message: str, code: str | None = None, headers: Iterable[tuple[str, str]] = ()):
        super().__init__(message)
        self.status, self.message, self.code, self.headers = status, message, code, tuple(headers)


class Gone(Exception):
    """The client left."""


# --- keys and addresses -----------------------------------------------------------------------------------------------


class Keys:
    """The keys of a server, as digests."""

    def __init__(self, keys: Iterable[str], source: str) -> None:
        self.digests: list[bytes] = []
        for number, key in enumerate(keys, 1):
            if len(key) < SHORTEST:
                raise UsageError(f"{source}: key {number} has {len(key)} characters: give {SHORTEST} or more")
            if not re.fullmatch("[!-~]+", key):
                raise UsageError(f"{source}: key {number} has a space or is not ASCII: no client can send it")
            self.digests.append(hashlib.sha256(key.encode()).digest())
        if not self.digests:
            raise UsageError(f"{source} has no key: write one per line")

    @classmethod
    def of(cls, key: str) -> Keys:
        """A single key. Raises UsageError."""
        return cls([key.strip()], "the API key")

    @classmethod
    def read(cls, path: Path) -> Keys:
        """The keys of a file: one per line; blank lines and those that begin with # are skipped. Raises UsageError."""
        try:
            found = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines()]
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "it is not a text"
            raise UsageError(f"key file {path} cannot be read: {reason}") from None
        return cls([line for line in found if line and not line.startswith("#")], f"key file {path}")

    def index(self, key: bytes) -> int | None:
        """Which of the keys this is, from 0, or None, in a time that depends on the number of keys alone."""
        digest, found = hashlib.sha256(key).digest(), None
        for index, known in enumerate(self.digests):
            if hmac.compare_digest(known, digest):
                found = index
        return found


def is_loopback(host: str) -> bool:
    """Whether a name or address, without a port, is of this machine alone."""
    if host.lower() == "localhost":
        return True
    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(host).is_loopback
    return False


def check_address(host: str, keys: Keys | None) -> None:
    """Refuse to listen where others can reach a server that has no keys. Raises UsageError."""
    if keys is None and not is_loopback(host):
        raise UsageError(
            f"--host {host} can be reached from other machines, and there is no key: give --api-key-file FILE or set "
            "BYTELM_API_KEY, or listen on 127.0.0.1"
        )


# --- a request --------------------------------------------------------------------------------------------------------


class Headers:
    """The headers of a request: each name has all its values."""

    def __init__(self, scope: Scope) -> None:
        self.values: dict[bytes, list[str]] = {}
        for name, value in scope["headers"]:
            self.values.setdefault(name.lower(), []).append(value.decode("latin-1"))
        self.size = sum(len(name) + len(value) + 4 for name, value in scope["headers"])
        self.size += len(scope.get("raw_path", b"")) + len(scope.get("query_string", b""))

    def get(self, name: bytes) -> str | None:
        """The value of a header that was sent exactly once."""
        found = self.values.get(name, [])
        return found[0] if len(found) == 1 else None

    @property
    def body(self) -> bool:
        """Whether a body follows."""
        return b"transfer-encoding" in self.values or self.get(b"content-length") not in (None, "0")

    def candidates(self) -> list[bytes]:
        """What may be a key: of a bearer, the password of a user (as browsers ask for it), or by itself."""
        found: list[bytes] = []
        scheme, _, given = (self.get(b"authorization") or "").partition(" ")
        if scheme.lower() == "bearer":
            found.append(given.strip().encode("latin-1"))
        elif scheme.lower() == "basic":
            with contextlib.suppress(binascii.Error, ValueError):
                found.append(base64.b64decode(given.strip(), validate=True).partition(b":")[2])
        if (given := self.get(b"x-api-key")) is not None:
            found.append(given.strip().encode("latin-1"))
        return found


class Answer:
    """What is sent to the client: with the id of the request, and counted."""

    def __init__(self, send: Send, request_id: str) -> None:
        self.to, self.request_id = send, request_id
        self.status, self.bytes, self.complete = 0, 0, False

    async def send(self, message: Message) -> None:
        """Pass a message on."""
        if message["type"] == "http.response.start":
            self.status = message["status"]
            kept = [pair for pair in message.get("headers", []) if pair[0].lower() != b"x-request-id"]
            message = {**message, "headers": [*kept, (b"x-request-id", self.request_id.encode())]}
        elif message["type"] == "http.response.body":
            self.bytes += len(message.get("body", b""))
            self.complete = not message.get("more_body", False)
        await self.to(message)

    async def refuse(self, refusal: Refusal, body: Body) -> None:
        """Send an error. With a body that nobody wants the connection is closed.

        A connection that is closed while data arrives is reset, and the error lost; so what arrives is dropped first,
        up to a limit; not that of a client that is slow (408).
        """
        content, unread = error_body(refusal), not body.over
        headers = [("content-type", "application/json"), ("content-length", str(len(content))), *refusal.headers]
        if unread:
            headers.append(("connection", "close"))
        pairs = [(name.encode(), value.encode()) for name, value in headers]
        await self.send({"type": "http.response.start", "status": refusal.status, "headers": pairs})
        await self.send({"type": "http.response.body", "body": content, "more_body": unread})
        if unread:
            if refusal.status != 408:
                await body.drop()
            await self.send({"type": "http.response.body", "body": b"", "more_body": False})


def error_of(status: int, message: str, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    """An error as clients of the API read it."""
    kind = "server_error" if status >= 500 else "invalid_request_error"
    kind = {401: "authentication_error", 429: "rate_limit_error"}.get(status, kind)
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def error_body(refusal: Refusal) -> bytes:
    """A refusal as JSON."""
    return json.dumps(error_of(refusal.status, refusal.message, code=refusal.code)).encode()


class Body:
    """Where the body of a request comes from. `over`: nothing more will come."""

    def __init__(self, receive: Receive, over: bool) -> None:
        self.receive, self.over = receive, over

    async def next(self) -> bytes:
        """The next piece. Raises Gone."""
        message = await self.receive()
        self.over = message["type"] != "http.request" or not message.get("more_body", False)
        if message["type"] != "http.request":
            raise Gone
        return message.get("body", b"")

    async def drop(self) -> None:
        """Read and forget it, up to the limits above."""
        left = LINGER_BYTES
        with contextlib.suppress(TimeoutError, Gone):
            async with asyncio.timeout(LINGER_SECONDS):
                while left > 0 and not self.over:
                    left -= len(await self.next())

    def again(self, body: bytes) -> Receive:
        """A source that gives a body that was read, and then whatever else comes."""
        waiting: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

        async def received() -> Message:
            return waiting.pop() if waiting else await self.receive()

        return received


# --- the layer --------------------------------------------------------------------------------------------------------


def guarded(
    app: App, *, keys: Keys | None = None, max_body: int = 1 << 25, body_timeout: float = 30.0, bodies: int = BODIES
) -> Guard:
    """An application behind this layer; without keys everybody on this machine may ask.

    `max_body`: bytes of a request's body; `body_timeout`: seconds in which it must arrive; `bodies`: how many of the
    largest size may be in memory at once.
    """
    return Guard(app, keys, max_body, body_timeout, bodies * max_body)


class Guard:
    """See `guarded`."""

    def __init__(self, app: App, keys: Keys | None, max_body: int, body_timeout: float, max_held: int) -> None:
        self.app, self.keys = app, keys
        self.max_body, self.body_timeout, self.max_held = max_body, body_timeout, max_held
        self.held = 0  # bytes of the bodies of requests in progress

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let a request pass, or refuse it."""
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
        elif scope["type"] == "http":
            await self.http(scope, receive, send)
        else:  # there are no websockets
            await send({"type": "websocket.close", "code": 1008})

    async def http(self, scope: Scope, receive: Receive, send: Send) -> None:
        """A request, with its log line."""
        begun, headers, state = time.perf_counter(), Headers(scope), scope.setdefault("state", {})
        given = headers.get(b"x-request-id") or ""
        state["request_id"] = given if REQUEST_ID.fullmatch(given) else secrets.token_hex(12)
        state["client"] = (scope.get("client") or ("local", 0))[0]
        answer, body = Answer(send, state["request_id"]), Body(receive, over=not headers.body)
        try:
            await self.passed(scope, headers, body, answer)
        except Exception as error:
            logs.write("failure", logging.ERROR, error, id=state["request_id"])
            if not answer.status:
                await answer.refuse(Refusal(500, f"internal error, in the log as {answer.request_id}"), body)
        finally:
            logs.write(
                "request",
                id=state["request_id"],
                client=state["client"],
                method=scope["method"],
                path=scope["path"],
                status=answer.status,  # 0: the client left before there was one
                complete=answer.complete,
                seconds=round(time.perf_counter() - begun, 4),
                bytes=answer.bytes,
            )

    async def passed(self, scope: Scope, headers: Headers, body: Body, answer: Answer) -> None:
        """Check a request and call the application."""
        held: list[bytes] = []
        try:
            scope["state"]["client"] = self.client(scope, headers)
            self.check(scope, headers)
            receive = body.receive
            if not body.over:
                await self.read(headers, body, held)
                held[:] = [b"".join(held)]
                logs.prompt(answer.request_id, held[0])
                receive = body.again(held[0])
            await self.app(scope, receive, answer.send)
        except Refusal as refusal:
            await answer.refuse(refusal, body)
        except Gone:
            pass
        finally:
            self.held -= sum(map(len, held))

    def client(self, scope: Scope, headers: Headers) -> str:
        """Who asks: the index of the key, and the address. Raises Refusal."""
        host: str = scope["state"]["client"]
        if self.keys is None:
            # A page elsewhere may have a name that leads to this machine (DNS rebinding); the name gives it away.
            name = headers.get(b"host") or ""
            if not is_loopback(re.sub(r":\d*$", "", name).strip("[]")):
                raise Refusal(421, "without keys, this server is asked as localhost or 127.0.0.1: see --api-key-file")
            return host
        if (scope["method"], scope["path"]) in OPEN:
            return host
        found = [index for key in headers.candidates() if (index := self.keys.index(key)) is not None]
        if not found:
            schemes = ('Bearer realm="bytelm"', 'Basic realm="bytelm", charset="UTF-8"')
            wanted = [("www-authenticate", scheme) for scheme in schemes]
            raise Refusal(401, "no valid API key: send Authorization: Bearer KEY", "invalid_api_key", wanted)
        return f"{found[0]}@{host}"

    def check(self, scope: Scope, headers: Headers) -> None:
        """Headers that no request of ours has. Raises Refusal."""
        if headers.size > HEADERS:
            raise Refusal(431, f"the headers have {headers.size} bytes: {HEADERS} at most")
        if b"origin" in headers.values:
            origin, host = headers.get(b"origin"), headers.get(b"host")
            if not origin or not host or netloc(origin) != host.lower():
                raise Refusal(403, "a page of another origin may not ask this server")
        if scope["method"] not in WITHOUT_BODY:
            kind = (headers.get(b"content-type") or "").partition(";")[0].strip().lower()
            if kind != "application/json":
                raise Refusal(415, "the body must be JSON: send Content-Type: application/json")

    async def read(self, headers: Headers, body: Body, held: list[bytes]) -> None:
        """Read a body, within limits, into a list. Raises Refusal, Gone."""
        too_large = Refusal(413, f"the body has more than {self.max_body} bytes", "body_too_large")
        if int((headers.get(b"content-length") or "0")[:20]) > self.max_body:
            raise too_large
        size = 0
        try:
            async with asyncio.timeout(self.body_timeout):
                while not body.over:
                    held.append(await body.next())
                    self.held += len(held[-1])
                    size += len(held[-1])
                    if size > self.max_body:
                        raise too_large
                    if self.held > self.max_held:
                        raise Refusal(503, "too many large bodies at once", headers=[("retry-after", "1")])
        except TimeoutError:
            raise Refusal(408, f"the body took more than {self.body_timeout:g} s to arrive") from None


def netloc(origin: str) -> str | None:
    """The host and port of an origin, in lower case; None for one that is none."""
    with contextlib.suppress(ValueError):
        return urlsplit(origin).netloc.lower() or None
    return None
