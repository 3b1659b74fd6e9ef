"""The outermost layer: keys on every route, hosts and origins, limits of bodies, the log."""

from __future__ import annotations

import asyncio
import base64
import hmac
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("fastapi")

from bytelm.errors import UsageError
from bytelm.serve import guard, logs
from guarded import AUTHORIZATION, JSON, KEY, Busy, ask, build, unlocked

OTHER = "another-key-of-a-test"
LIMIT = 1000


@pytest.fixture
def app() -> Any:
    return build(Busy())


@pytest.fixture
def closed(app: Any) -> guard.Guard:
    """The application with two keys."""
    return guard.guarded(app, keys=guard.Keys([KEY, OTHER], "a test"), max_body=LIMIT)


@pytest.fixture
def open_to_all(app: Any) -> guard.Guard:
    """The application without keys."""
    return guard.guarded(app, max_body=LIMIT)


@pytest.fixture(autouse=True)
def log(monkeypatch: pytest.MonkeyPatch) -> Iterator[io.StringIO]:
    """What is logged."""
    stream = io.StringIO()
    monkeypatch.setattr("sys.stderr", stream)
    with logs.lines():
        yield stream


def basic(text: str) -> str:
    return "Basic " + base64.b64encode(text.encode()).decode()


# --- keys -------------------------------------------------------------------------------------------------------------


@pytest.mark.fault("S1")
def test_every_route_needs_a_key_but_health(app: Any, closed: guard.Guard) -> None:
    assert unlocked(app, closed) == {("GET", "/health"), ("HEAD", "/health")}


@pytest.mark.fault("S1")
def test_every_route_of_the_server_needs_a_key_but_health() -> None:
    pytest.importorskip("prometheus_client")
    from bytelm.serve.app import build
    from bytelm.serve.service import Service
    from serving import served

    app = build(Service([served()]))
    found = unlocked(app, guard.guarded(app, keys=guard.Keys.of(KEY)))
    assert found == {("GET", "/health"), ("HEAD", "/health")}


def test_a_route_that_needs_no_key_is_found(app: Any) -> None:
    """By the test above."""
    assert ("GET", "/docs") in unlocked(app, app)


@pytest.mark.parametrize(
    "headers",
    [
        {"authorization": f"Bearer {KEY}"},
        {"authorization": f"bearer  {KEY} "},
        {"authorization": basic(f":{KEY}")},
        {"authorization": basic(f"anybody:{KEY}")},
        {"x_api_key": KEY},
        {"authorization": "Bearer of-something-else", "x_api_key": KEY},
    ],
)
def test_a_key_opens(closed: guard.Guard, headers: dict[str, str]) -> None:
    state: dict[str, Any] = {}
    assert ask(closed, "GET", "/ready", state=state, **headers).status == 200
    assert state["client"] == "0@192.0.2.1"


def test_clients_are_told_apart_by_key_and_address(closed: guard.Guard, open_to_all: guard.Guard) -> None:
    state: dict[str, Any] = {}
    ask(closed, "GET", "/ready", state=state, x_api_key=OTHER)
    assert state["client"] == "1@192.0.2.1"
    ask(open_to_all, "GET", "/ready", state=state)
    assert state["client"] == "192.0.2.1"


@pytest.mark.fault("S1")
@pytest.mark.parametrize(
    "value",
    [
        *("", "Bearer", "Bearer ", f"Bearer {KEY}x", f"Bearer {KEY[:-1]}", f"Token {KEY}", KEY, "Bearer \xff"),
        *("Basic !", "Basic " + "A" * 61, basic(KEY), basic(f"{KEY}:"), basic(f"a:{KEY}:"), f"Basic {KEY}"),
    ],
)
def test_what_is_no_key_does_not_open(closed: guard.Guard, value: str) -> None:
    assert ask(closed, "GET", "/ready", authorization=value).status == 401


def test_a_browser_is_asked_for_a_password(closed: guard.Guard) -> None:
    assert ask(closed, "GET", "/").headers["www-authenticate"].startswith("Basic realm=")  # the last of two


@pytest.mark.fault("S1")
def test_a_key_is_compared_with_all_in_constant_time(monkeypatch: pytest.MonkeyPatch) -> None:
    compared: list[tuple[bytes, bytes]] = []
    compare = hmac.compare_digest
    monkeypatch.setattr(hmac, "compare_digest", lambda a, b: compared.append((a, b)) or compare(a, b))
    keys = guard.Keys([f"key number {n}".replace(" ", "-") for n in range(5)], "a test")
    assert [keys.index(key) for key in (b"key-number-0", b"key-number-4", b"none")] == [0, 4, None]
    assert len(compared) == 15 and {len(one) for pair in compared for one in pair} == {32}


def test_keys_are_read_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "keys.txt"
    path.write_bytes(f"\ufeff# of Ada\n{KEY}\n\n  {OTHER}\r\n# of nobody\n".encode())
    keys = guard.Keys.read(path)
    assert [keys.index(key.encode()) for key in (KEY, OTHER, "# of Ada", "")] == [0, 1, None, None]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "has no key"),
        (b"# none yet\n\n", "has no key"),
        (b"long-enough\nshort\n", "key 2 has 5 characters: give 8 or more"),
        (b"two words of it", "key 1 has a space"),
        ("schlüssel-schlüssel".encode(), "key 1 has a space or is not ASCII"),
        (b"\xff\xfe\x00", "it is not a text"),
        (None, "No such file"),
    ],
)
def test_a_file_without_usable_keys_is_refused(tmp_path: Path, content: bytes | None, message: str) -> None:
    path = tmp_path / "keys.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UsageError, match=message) as caught:
        guard.Keys.read(path)
    assert "short" not in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.fault("S1")
@pytest.mark.parametrize("host", ["0.0.0.0", "::", "", "192.0.2.1", "example.com", "localhost.example.com", "127.1"])
def test_an_address_that_others_reach_needs_a_key(host: str) -> None:
    with pytest.raises(UsageError, match="there is no key"):
        guard.check_address(host, None)
    guard.check_address(host, guard.Keys.of(KEY))


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.8.8", "localhost", "::1"])
def test_a_loopback_address_needs_none(host: str) -> None:
    guard.check_address(host, None)


# --- where a request comes from ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("host", ["localhost", "LocalHost:80", "127.0.0.1:8000", "127.3.2.1", "[::1]:8000", "[::1]"])
def test_without_keys_a_host_of_this_machine_is_answered(open_to_all: guard.Guard, host: str) -> None:
    assert ask(open_to_all, "GET", "/ready", host=host).status == 200


@pytest.mark.fault("S8")
@pytest.mark.parametrize(
    "host", ["example.com", "127.0.0.1.example.com", "localhost.", "192.0.2.1", "", "[::2]:80", "a:b:c"]
)
def test_without_keys_another_host_is_refused(open_to_all: guard.Guard, closed: guard.Guard, host: str) -> None:
    """A page of somebody else whose name leads to this machine (DNS rebinding)."""
    for path in ("/ready", "/health"):
        assert ask(open_to_all, "GET", path, host=host).status == 421
    assert ask(closed, "GET", "/ready", host=host, x_api_key=KEY).status == 200


@pytest.mark.parametrize("origin", ["http://localhost:8000", "https://LOCALHOST:8000"])
def test_a_page_of_this_server_may_ask(open_to_all: guard.Guard, origin: str) -> None:
    assert ask(open_to_all, "GET", "/ready", origin=origin).status == 200


@pytest.mark.fault("S8")
@pytest.mark.parametrize(
    "origin",
    [
        *("http://example.com", "http://localhost", "http://localhost:8001", "http://127.0.0.1:8000", "null", ""),
        *("http://[", "http://localhost:8000.example.com", "http://a@localhost:8000", "localhost:8000"),
    ],
)
def test_a_page_elsewhere_may_not_ask(open_to_all: guard.Guard, closed: guard.Guard, origin: str) -> None:
    assert ask(open_to_all, "GET", "/ready", origin=origin).status == 403
    assert ask(closed, "GET", "/ready", origin=origin, x_api_key=KEY).status == 403


def test_websockets_are_refused(app: Any) -> None:
    sent: list[Any] = []

    async def receive() -> dict[str, Any]:
        return {"type": "websocket.connect"}

    async def send(message: Any) -> None:
        sent.append(message)

    asyncio.run(guard.guarded(app)({"type": "websocket", "path": "/ready", "headers": []}, receive, send))
    assert [message["type"] for message in sent] == ["websocket.close"]


# --- bodies -----------------------------------------------------------------------------------------------------------


def test_a_body_arrives_whole(closed: guard.Guard) -> None:
    reply = ask(
        closed, "POST", "/echo", [b'{"a"', b": ", b"1}"], content_type="application/json; charset=utf-8", x_api_key=KEY
    )
    assert reply.status == 200 and json.loads(reply.body)["body"] == {"a": 1}
    assert closed.held == 0


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", "", "application/jsonp"])
def test_only_json_is_taken(closed: guard.Guard, kind: str) -> None:
    reply = ask(closed, "POST", "/echo", [b"{}"], x_api_key=KEY, content_type=kind)
    assert reply.status == 415 and reply.error["type"] == "invalid_request_error"


@pytest.mark.fault("S2")
@pytest.mark.parametrize("length", [str(LIMIT + 1), "9" * 30, "1" + "0" * 4000])
def test_a_body_that_is_said_to_be_too_long_is_not_read(closed: guard.Guard, length: str) -> None:
    reply = ask(closed, "POST", "/echo", x_api_key=KEY, content_length=length, content_type="application/json")
    assert reply.status == 413 and reply.headers["connection"] == "close"
    assert closed.held == 0


@pytest.mark.fault("S2")
@pytest.mark.parametrize("method", ["POST", "GET", "PUT"])
def test_a_body_that_grows_too_long_is_refused(closed: guard.Guard, method: str) -> None:
    reply = ask(closed, method, "/echo", [b" " * 100] * 11, x_api_key=KEY, content_type="application/json")
    assert reply.status == 413 and str(LIMIT) in reply.error["message"]
    assert closed.held == 0


@pytest.mark.fault("S2")
def test_bodies_of_all_requests_are_bounded_together(app: Any) -> None:
    """One body waits, and takes up what there is; a second one is refused until the first is gone."""
    closed = guard.guarded(app, max_body=LIMIT, bodies=1)
    statuses: list[int] = []

    async def main() -> None:
        come = asyncio.Event()

        async def request(size: int, wait: bool) -> None:
            waiting: list[dict[str, Any]] = [{"type": "http.request", "body": b" " * size, "more_body": wait}]

            async def receive() -> dict[str, Any]:
                if not waiting:
                    await come.wait()
                    return {"type": "http.disconnect"}
                return waiting.pop()

            async def send(message: Any) -> None:
                statuses.extend([message["status"]] if "status" in message else [])

            headers = [
                (b"host", b"localhost"),
                (b"transfer-encoding", b"chunked"),
                (b"content-type", b"application/json"),
            ]
            scope = {"type": "http", "method": "POST", "path": "/none", "headers": headers, "client": None}
            await closed(scope | {"raw_path": b"/none", "query_string": b""}, receive, send)

        first = asyncio.create_task(request(900, wait=True))
        await asyncio.sleep(0)
        await request(200, wait=False)
        come.set()
        await first
        await request(200, wait=False)

    asyncio.run(main())
    assert statuses == [503, 404] and closed.held == 0


@pytest.mark.fault("S2")
def test_headers_are_bounded(closed: guard.Guard) -> None:
    assert ask(closed, "GET", "/ready", x_api_key=KEY, x_long="a" * guard.HEADERS).status == 431


# --- answers and the log ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("given", ["a", "3f.B_-9", "x" * 64])
def test_the_id_of_a_client_is_kept(closed: guard.Guard, given: str) -> None:
    state: dict[str, Any] = {}
    assert ask(closed, "GET", "/health", state=state, x_request_id=given).headers["x-request-id"] == given
    assert state["request_id"] == given


@pytest.mark.fault("S8")
@pytest.mark.parametrize("given", ["", "x" * 65, "a b", "é", 'a"', "a\r\nx: y"])
def test_an_odd_id_is_replaced(closed: guard.Guard, given: str) -> None:
    for path in ("/health", "/ready"):
        found = ask(closed, "GET", path, x_request_id=given).headers["x-request-id"]
        assert guard.REQUEST_ID.fullmatch(found) and found != given


@pytest.mark.fault("S6", "S8")
def test_an_application_that_fails_is_answered_for_and_no_prompt_is_logged(log: io.StringIO) -> None:
    async def failing(scope: Any, receive: Any, send: Any) -> None:
        raise ValueError(f"cannot use {(await receive())['body']}")

    reply = ask(guard.guarded(failing), "POST", "/", [b'"the prompt"'], content_type="application/json")
    assert reply.status == 500 and reply.error["type"] == "server_error"
    assert reply.headers["x-request-id"] in reply.error["message"]
    failure, request = map(json.loads, log.getvalue().splitlines())
    assert failure["id"] == request["id"] == reply.headers["x-request-id"]
    assert failure["error"] == "ValueError" and "failing" in failure["at"][-1]
    assert "prompt" not in log.getvalue()


def test_an_error_about_the_machine_is_logged_with_its_text(log: io.StringIO) -> None:
    async def failing(scope: Any, receive: Any, send: Any) -> None:
        raise RuntimeError("out of memory")

    ask(guard.guarded(failing), "GET", "/")
    assert json.loads(log.getvalue().splitlines()[0])["text"] == "out of memory"


def test_a_request_is_a_line_of_the_log(closed: guard.Guard, log: io.StringIO) -> None:
    reply = ask(
        closed, "POST", "/echo", [b'{"secret": 1}'], x_api_key=OTHER, x_request_id="7", content_type="application/json"
    )
    line = json.loads(log.getvalue())
    assert line.pop("time").endswith("Z") and line.pop("seconds") >= 0
    assert line == {"level": "info", "event": "request", "id": "7", "client": "1@192.0.2.1", "method": "POST"} | {
        "path": "/echo",
        "status": 200,
        "complete": True,
        "bytes": len(reply.body),
    }


@pytest.mark.fault("S8")
def test_what_a_client_sends_stays_in_its_line_of_the_log(closed: guard.Guard, log: io.StringIO) -> None:
    path = '/\n{"event": "forged"}\r\x1b[2J\u2028\x85\ud800' + "x" * 1000
    ask(closed, "GET\nforged", path, authorization=f"Bearer {KEY}x\n", x_request_id="a\nforged")
    text = log.getvalue()
    assert text.isascii() and text.count("\n") == 1 and text.endswith("\n") and text[:-1].isprintable()
    assert json.loads(text)["path"] == path[: logs.SHOWN]


@pytest.mark.fault("S1")
def test_keys_are_not_logged(closed: guard.Guard, log: io.StringIO) -> None:
    for headers in (AUTHORIZATION, {"authorization": basic(f":{KEY}")}, {"x_api_key": KEY}, {"x_api_key": KEY + "x"}):
        ask(closed, "GET", "/ready", **headers)
        ask(closed, "POST", "/echo", [b"{"], **headers, content_type=JSON["Content-Type"])
    assert len(log.getvalue().splitlines()) == 8 and KEY not in log.getvalue()


def test_prompts_are_logged_where_that_was_asked_for(closed: guard.Guard, capsys: pytest.CaptureFixture[str]) -> None:
    body = json.dumps({"prompt": "é" * 400}, ensure_ascii=False).encode()
    for prompts in (False, True):
        with logs.lines(prompts):
            ask(closed, "POST", "/echo", [body], x_api_key=KEY, content_type="application/json")
    events = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    assert [event["event"] for event in events] == ["request", "prompt", "request"]
    assert events[1]["body"].encode() == body and events[1]["id"] == events[2]["id"]


def test_a_log_that_cannot_be_written_stops_nothing(closed: guard.Guard, log: io.StringIO) -> None:
    log.close()
    assert ask(closed, "GET", "/health").status == 200
