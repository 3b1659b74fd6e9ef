"""Requests for generation: their sequences in the engine, and what becomes of them, as JSON or server-sent events."""

from __future__ import annotations

import asyncio
import json
import logging
import secrets
import time
from collections.abc import AsyncIterator, Coroutine
from typing import Any, TypeVar, cast

from bytelm.errors import MissingExtraError, UsageError
from bytelm.generate.request import Chunk, Request
from bytelm.serve import constraints, logs
from bytelm.serve.answers import Choice, merged, usage
from bytelm.serve.engine import StoppingError, failure
from bytelm.serve.guard import error_of
from bytelm.serve.schema import DEFAULT_BYTES, ChatRequest, CompletionRequest, Shared
from bytelm.serve.served import Answer, Served
from bytelm.serve.service import Service

try:
    from fastapi import Request as Http
    from fastapi.responses import JSONResponse, Response
    from starlette.types import Receive, Scope, Send
except ImportError as error:
    raise MissingExtraError("fastapi", "serve", "the server") from error

T = TypeVar("T")
CHAT_BYTES = 1024  # of an answer in a conversation, where the request names no limit


class Problem(Exception):
    """An answer that is an error."""

    def __init__(self, status: int, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.param = status, message, param


def refused(status: int, message: str, param: str | None = None, headers: dict[str, str] | None = None) -> JSONResponse:
    """An error as a response."""
    code = "model_not_found" if status == 404 and param == "model" else None
    return JSONResponse(error_of(status, message, param, code), status, headers)


class Events(Response):
    """Server-sent events; when the client leaves, what makes them is cancelled."""

    def __init__(self, source: AsyncIterator[bytes]) -> None:
        self.source, self.background = source, None
        self.status_code = 200
        self.body = b""
        self.init_headers({"cache-control": "no-cache", "x-accel-buffering": "no"})
        self.raw_headers.append((b"content-type", b"text/event-stream; charset=utf-8"))
        self.raw_headers = [pair for pair in self.raw_headers if pair[0] != b"content-length"]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send each event as soon as it is there."""

        async def sent() -> None:
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            async for event in self.source:
                await send({"type": "http.response.body", "body": event, "more_body": True})
            await send({"type": "http.response.body", "body": b"", "more_body": False})

        await unless_gone(receive, sent())


async def unless_gone(receive: Receive, work: Coroutine[Any, Any, T]) -> T | None:
    """Finish some work unless the client disconnects, which cancels it; None then."""

    async def gone() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    task, watch = asyncio.ensure_future(work), asyncio.ensure_future(gone())
    try:
        await asyncio.wait({task, watch}, return_when=asyncio.FIRST_COMPLETED)
        return task.result() if task.done() else None
    finally:
        for one in (task, watch):
            one.cancel()
        await asyncio.gather(task, watch, return_exceptions=True)


class Generating:
    """One request for generation, from its checked body to its answer."""

    def __init__(self, service: Service, served: Served, body: Shared, kind: str) -> None:
        self.service, self.served, self.body, self.kind = service, served, body, kind
        self.chat = kind == "chat.completion"
        self.id = f"{'chatcmpl' if self.chat else 'cmpl'}-{secrets.token_hex(12)}"
        self.created = int(time.time())
        self.choices: list[Choice] = []
        self.prompts = 1
        self.request_id = ""

    async def submitted(self, http: Http) -> Answer:
        """Queue the sequences. Raises Problem."""
        body, template = self.body, self.service.template
        try:
            make = await constraints.of(body)
        except UsageError as error:
            raise Problem(422, str(error), "response_format") from None
        echo = bool(isinstance(body, CompletionRequest) and body.echo)
        if isinstance(body, CompletionRequest):
            prompts, logprobs, most, stop = body.prompts, body.logprobs, body.max_tokens, body.stops
            most = DEFAULT_BYTES if most is None else most
        else:
            chat = cast(ChatRequest, body)
            prompts = [template.prompt(chat.messages)]
            logprobs = (chat.top_logprobs or 0) if chat.logprobs else None
            most, stop = chat.max_completion_tokens, chat.stops or template.stop
            most = chat.max_tokens if most is None else most
        self.prompts = len(prompts)
        seed = secrets.randbits(63) if body.seed is None else body.seed
        requests: list[Request] = []
        if body.online and echo and logprobs is not None:
            raise Problem(422, "a prompt's scores are the model's own: leave online out, or echo or logprobs", "online")
        try:
            online = await asyncio.to_thread(self.served.memory_for, body.online)
        except UsageError as error:
            raise Problem(422, str(error), "online") from None
        for prompt in prompts:
            for _ in range(body.n or 1):
                room = max(0, self.served.capacity - 1 - len(prompt))
                options = (min(CHAT_BYTES, room) if most is None else most, body.sampling, seed, len(requests), stop)
                flags = (bool(body.utf8), not body.ignore_eos, make, logprobs, echo and logprobs is not None)
                requests.append(Request(prompt, *options, *flags, online))
        self.choices = [Choice(index, one, echo, self.chat) for index, one in enumerate(requests)]
        state = http.scope.get("state", {})
        self.request_id = state.get("request_id", "")
        return self.service.engine.submit(self.served, requests, state.get("client", ""))

    def enveloped(self, choices: list[dict[str, Any]], kind: str) -> dict[str, Any]:
        """The object of the API around choices."""
        return {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self.served.name,
            "system_fingerprint": self.served.fingerprint,
            "choices": choices,
        }

    def pieces(self, found: list[tuple[int, Chunk]]) -> list[dict[str, Any]]:
        """What a batch of chunks adds to each choice. Raises Problem for a sequence that failed."""
        by_index: dict[int, list[Chunk]] = {}
        for index, chunk in found:
            by_index.setdefault(index, []).append(chunk)
            if chunk.reason == "error":
                gone, known = isinstance(chunk.error, StoppingError), isinstance(chunk.error, UsageError)
                if not (gone or known):
                    logs.write("sequence failed", logging.ERROR, chunk.error, id=self.request_id, index=index)
                raise Problem(503 if gone else 422 if known else 500, failure(chunk.error))
        entries = [self.choices[index].piece(chunks) for index, chunks in by_index.items()]
        return [entry for entry in entries if entry is not None]

    async def whole(self, answer: Answer) -> dict[str, Any]:
        """The answer in one piece."""
        entries: list[list[dict[str, Any]]] = [[] for _ in self.choices]
        try:
            async for found in answer.batches():
                for entry in self.pieces(found):
                    entries[entry["index"]].append(entry)
        finally:
            self.service.engine.cancel(answer)
        body = self.enveloped([merged(one, self.chat) for one in entries], self.kind)
        return body | {"usage": usage(self.choices, answer.reused, self.prompts)}

    async def events(self, answer: Answer) -> AsyncIterator[bytes]:
        """The answer as server-sent events; an error is the last one."""
        kind = "chat.completion.chunk" if self.chat else self.kind
        options = self.body.stream_options
        counted = bool(options and options.include_usage)
        extra = {"usage": None} if counted else {}
        try:
            if self.chat:
                first = [{"index": c.index, "delta": {"role": "assistant", "content": ""}} for c in self.choices]
                blank = {"finish_reason": None, "logprobs": None}
                yield event(self.enveloped([one | blank for one in first], kind) | extra)
            async for found in answer.batches():
                if entries := self.pieces(found):
                    yield event(self.enveloped(entries, kind) | extra)
            if counted:
                yield event(self.enveloped([], kind) | {"usage": usage(self.choices, answer.reused, self.prompts)})
            yield b"data: [DONE]\n\n"
        except GeneratorExit:  # it is left half read, perhaps when names are gone
            raise
        except Problem as problem:
            yield event(error_of(problem.status, problem.message))
        finally:
            self.service.engine.cancel(answer)


def event(body: dict[str, Any]) -> bytes:
    """A server-sent event: JSON in ASCII, in one line."""
    return b"data: " + json.dumps(body, separators=(",", ":")).encode() + b"\n\n"
