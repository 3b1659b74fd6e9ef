"""The routes: requests are checked, queued in the engine, and answered as JSON or as server-sent events."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import re
from collections import Counter
from collections.abc import AsyncGenerator
from typing import Any, TypeVar, cast

from bytelm.errors import BytelmError, DataError, MissingExtraError, UsageError
from bytelm.serve.answers import SPECIALS, base64_of
from bytelm.serve.engine import BusyError, StoppingError
from bytelm.serve.generating import Events, Generating, Problem, refused, unless_gone
from bytelm.serve.schema import (
    ChatRequest,
    CompletionRequest,
    DecodeRequest,
    DetokenizeRequest,
    EncodeRequest,
    PatchesRequest,
    Shared,
    TokenizeRequest,
    decoded,
    encoded,
)
from bytelm.serve.served import Served
from bytelm.serve.service import SHOWN, Service
from bytelm.units import BOS, BYTES, RESERVED

try:
    from fastapi import FastAPI
    from fastapi import Request as Http
    from fastapi.exceptions import RequestValidationError
    from fastapi.responses import HTMLResponse, JSONResponse, Response
    from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
    from starlette.exceptions import HTTPException
except ImportError as error:
    raise MissingExtraError("fastapi", "serve", "the server") from error

T = TypeVar("T")
NAME = re.compile(r"\w{1,64}")
"""A part of the place of an error; others are of the validator, as the kind of text that a field may hold."""
FIELDS = {"prompt_b64", "stop", "file_b64", "bytes_b64", "messages"}
"""What a message of the house may begin with; others are about the prompt."""
TYPES = {".png": "image/png", ".wav": "audio/wav"}


def build(service: Service) -> FastAPI:
    """The application of a service."""

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncGenerator[None]:
        service.engine.start(asyncio.get_running_loop())
        beside = [asyncio.ensure_future(task()) for task in service.beside]
        yield
        for task in beside:
            task.cancel()
        await asyncio.gather(*beside, return_exceptions=True)
        await asyncio.to_thread(service.close)

    app = FastAPI(
        title="bytelm",
        version=service.version,
        redoc_url=None,
        docs_url=None,
        description=DESCRIPTION,
        lifespan=lifespan,
    )
    add_errors(app)
    add_operation(app, service)
    add_models(app, service)
    add_generation(app, service)
    add_bytes(app, service)
    return app


DESCRIPTION = """Language models over raw bytes, by the OpenAI API. Lengths (`max_tokens`, `usage`) are **bytes**; ids 0
to 255 are the bytes, 257 is BOS, 258 EOS. `text` keeps characters whole and shows invalid UTF-8 as U+FFFD; `bytes_b64`
and the `bytes` of log-probabilities are exact."""
ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"description": what, "content": {"application/json": {"schema": {"type": "object"}}}}
    for status, what in {
        404: "No such model",
        422: "A field that cannot be used, named in error.param",
        429: "The queue is full: Retry-After says when to come again",
        500: "This request failed",
        503: "The server is shutting down",
    }.items()
}


def add_errors(app: FastAPI) -> None:
    """Every error in the form of the API."""

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Http, error: Exception) -> Response:
        found = cast(RequestValidationError, error).errors()[0]
        place = itertools.takewhile(NAME.fullmatch, (str(part) for part in found["loc"] if part != "body"))
        cause = found.get("ctx", {}).get("error")
        field = getattr(cause, "field", None) or ".".join(place) or None
        message = " ".join(str(found["msg"]).removeprefix("Value error, ").split())[:300]
        return refused(400 if found["type"] == "json_invalid" else 422, f"{field}: {message}", field)

    @app.exception_handler(Problem)
    async def problem(_: Http, error: Exception) -> Response:
        given = cast(Problem, error)
        return refused(given.status, given.message, given.param)

    @app.exception_handler(HTTPException)
    async def http(_: Http, error: Exception) -> Response:
        given = cast(HTTPException, error)
        return refused(given.status_code, str(given.detail), headers=dict(given.headers or {}))

    @app.exception_handler(BytelmError)
    async def usage_error(_: Http, error: Exception) -> Response:
        status = 422 if isinstance(error, UsageError | DataError) else 500
        first = str(error).split(" ", 1)[0]
        return refused(status, str(error), first if first in FIELDS else "prompt" if status == 422 else None)

    @app.exception_handler(Exception)
    async def unexpected(http: Http, _: Exception) -> Response:  # it is raised again after that, for the log
        request_id = http.scope.get("state", {}).get("request_id", "")
        return refused(500, f"internal error, in the log as {request_id}", headers={"x-request-id": request_id})

    @app.exception_handler(BusyError)
    async def busy(_: Http, error: Exception) -> Response:
        return refused(429, str(error), headers={"retry-after": str(cast(BusyError, error).retry)})

    @app.exception_handler(StoppingError)
    async def stopping(_: Http, error: Exception) -> Response:
        return refused(503, str(error), headers={"retry-after": "5"})


def add_operation(app: FastAPI, service: Service) -> None:
    """The page, health and metrics."""

    @app.get("/", include_in_schema=False)
    async def index() -> Response:
        from bytelm.serve import page

        document = page.document()
        return HTMLResponse(document.body, headers={"content-security-policy": document.policy})

    @app.get("/health")
    async def health() -> Response:
        """Whether models can be run; open to everybody."""
        broken = {name: str(one.broken) for name, one in service.engine.models.items() if one.broken}
        dead = not service.engine.thread.is_alive()
        return JSONResponse({"status": "failing" if broken or dead else "ok"}, 503 if broken or dead else 200)

    @app.get("/ready")
    async def ready() -> Response:
        """Whether new requests are taken."""
        state = "draining" if service.draining else "ready"
        return JSONResponse({"status": state}, 503 if service.draining else 200)

    @app.get("/metrics")
    async def metrics() -> Response:
        """Counters, in the text format of Prometheus."""
        return Response(generate_latest(service.metrics.registry), media_type=CONTENT_TYPE_LATEST)


def add_models(app: FastAPI, service: Service) -> None:
    """The models that are served."""

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        """All models, the default first."""
        return {"object": "list", "data": [service.card(served) for served in service.engine.models.values()]}

    @app.get("/v1/models/{name:path}", responses={404: ERRORS[404]})
    async def model(name: str) -> dict[str, Any]:
        """One model."""
        return service.card(found(service, name))


def found(service: Service, name: str | None) -> Served:
    """The model of a name, the first by default. Raises Problem."""
    models = service.engine.models
    if name is None or name == "":
        return next(iter(models.values()))
    if name not in models:
        raise Problem(404, f"model {ascii(name)[:100]} is not served here: {', '.join(models)} are", "model")
    return models[name]


def add_generation(app: FastAPI, service: Service) -> None:
    """Completions, and completions of conversations."""

    async def answered(http: Http, body: Shared, kind: str) -> Response:
        generating = Generating(service, found(service, body.model), body, kind)
        answer = await generating.submitted(http)
        if body.stream:
            return Events(generating.events(answer))
        done = await unless_gone(http.receive, generating.whole(answer))
        return Response(status_code=499) if done is None else JSONResponse(done)

    @app.post("/v1/completions", responses=ERRORS, response_model=None)
    async def completions(body: CompletionRequest, http: Http) -> Response:
        """Continue a prompt. With `echo`, `logprobs` and `max_tokens` 0: score it."""
        return await answered(http, body, "text_completion")

    @app.post("/v1/chat/completions", responses=ERRORS, response_model=None)
    async def chat(body: ChatRequest, http: Http) -> Response:
        """Answer the last message of a conversation."""
        return await answered(http, body, "chat.completion")


def add_bytes(app: FastAPI, service: Service) -> None:
    """Ids, patches, and files of a modality."""

    @app.post("/tokenize", responses=ERRORS)
    async def tokenize(body: TokenizeRequest) -> dict[str, Any]:
        """The ids of a text: its bytes."""
        served = found(service, body.model)
        text = [SPECIALS[body.prompt]] if body.prompt in SPECIALS else encoded("prompt", body.prompt)
        ids = [*([BOS] if body.add_special_tokens else []), *text]
        return {"tokens": ids, "count": len(ids), "max_model_len": served.capacity}

    @app.post("/detokenize", responses=ERRORS)
    async def detokenize(body: DetokenizeRequest) -> dict[str, Any]:
        """The text of ids, and its exact bytes; specials are left out."""
        for symbol in body.tokens:
            if not 0 <= symbol <= RESERVED:
                raise Problem(422, f"tokens: {symbol} is no id: give 0 to {RESERVED}", "tokens")
        data = bytes(symbol for symbol in body.tokens if symbol < BYTES)
        return {"prompt": data.decode(errors="replace"), "bytes_b64": base64_of(data)}

    @app.get("/tokenizer_info")
    async def tokenizer_info() -> dict[str, Any]:
        """What clients ask of a tokenizer."""
        return {
            "tokenizer_class": "bytes",
            "vocab_size": RESERVED + 1,
            **{f"{name[1:]}_token": name for name in SPECIALS},
            **{f"{name[1:]}_token_id": symbol for name, symbol in SPECIALS.items()},
            "add_bos_token": False,
            "chat_template": None,
        }

    @app.post("/v1/patches", responses=ERRORS)
    async def patches(body: PatchesRequest) -> dict[str, Any]:
        """How a model cuts bytes, the first 16 KiB, into patches, and the entropy before each byte."""
        served, data = found(service, body.model), body.data[:SHOWN]
        return {"model": served.name, "bytes": len(data), **(await service.patches(served, data))}

    @app.post("/v1/encode", responses=ERRORS)
    async def encode(body: EncodeRequest) -> dict[str, Any]:
        """The document of a file, in the model's modality."""
        from bytelm.generate.document import first_document

        served, data, notes = found(service, body.model), decoded("file_b64", body.file_b64), Counter[str]()
        modality = served.lm.modality
        made = data if modality is None else await asyncio.to_thread(first_document, modality, body.name, data, notes)
        return {"bytes_b64": base64_of(made), "bytes": len(made), "notes": dict(notes)}

    @app.post("/v1/decode", responses=ERRORS, response_model=None)
    async def decode(body: DecodeRequest) -> Response:
        """A document as a file."""
        served, data = found(service, body.model), decoded("bytes_b64", body.bytes_b64)
        modality = served.lm.modality
        if modality is None:
            return Response(data, media_type="application/octet-stream")
        made = await asyncio.to_thread(modality.decode, data)
        return Response(made, media_type=TYPES.get(modality.suffix, "application/octet-stream"))
