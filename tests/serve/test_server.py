"""Sockets, connections and signals, against a server in a process."""

from __future__ import annotations

import contextlib
import json
import signal
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")

from bytelm.errors import ResourceError, UsageError
from bytelm.serve.server import listener, url_of
from guarded import KEY, Process, parsed, rest, running, until

HEAD = f"POST /echo HTTP/1.1\r\nHost: a\r\nx-api-key: {KEY}\r\nContent-Type: application/json\r\n".encode()
GET = b"GET /health HTTP/1.1\r\nHost: a\r\n"
CHUNKED = HEAD + b"Transfer-Encoding: chunked\r\n\r\n"
LIMIT = 1 << 20
OPTIONS = {"x_api_key": KEY, "content_type": "application/json"}


@pytest.fixture(scope="module")
def server() -> Iterator[Process]:
    """A server that is patient."""
    with running(max_body=LIMIT) as started:
        yield started


@pytest.fixture(scope="module")
def hasty() -> Iterator[Process]:
    """A server that waits for nobody."""
    limits = {"header_timeout": 0.3, "write_timeout": 0.3, "keep_alive": 1, "connections": 8}
    with running(max_body=LIMIT, body_timeout=0.3, limits=limits) as started:
        yield started


def sent(connection: socket.socket, piece: bytes, most: int) -> int:
    """Send a piece again and again until the server has enough of it; how many bytes it took."""
    count = 0
    try:
        while count < most:
            count += connection.send(piece)
    except OSError:
        pass
    return count


# --- bodies and headers without end -----------------------------------------------------------------------------------


@pytest.mark.fault("S2")
def test_a_huge_body_is_refused_in_bounded_memory_and_the_client_hears_of_it(server: Process) -> None:
    """The whole body is sent before the answer is read, as most clients do it."""
    status = Path(f"/proc/{server.process.pid}/status")
    before = peak(status) if status.exists() else 0
    for length in (LIMIT + 1, 40 * LIMIT):
        code, headers, body = server.ask("POST", "/echo", b" " * length, **OPTIONS)
        assert code == 413 and headers["x-request-id"] and json.loads(body)["error"]["code"] == "body_too_large"
    code, *_ = parsed(server.raw(CHUNKED + b"%x\r\n%b\r\n" % (40 * LIMIT, b" " * (40 * LIMIT))))
    assert code == 413
    assert not before or peak(status) - before < 16 * LIMIT
    assert server.health()["received"] == 0


def peak(status: Path) -> int:
    """The largest memory of a process so far, in bytes."""
    return int(status.read_text().partition("VmHWM:")[2].split()[0]) * 1024


@pytest.mark.fault("S2")
def test_a_body_without_end_is_cut_off(server: Process) -> None:
    for head in (CHUNKED, CHUNKED.replace(b"POST /echo", b"GET /ready"), CHUNKED.replace(KEY.encode(), b"none")):
        with server.send(head) as connection:
            assert sent(connection, b"10000\r\n" + b" " * 65536 + b"\r\n", 1 << 29) < 1 << 29


@pytest.mark.fault("S2")
@pytest.mark.parametrize(
    ("begin", "piece"),
    [
        (GET, b"a: " + b"b" * 1000 + b"\r\n"),
        (GET + b"a: ", b"b" * 1000),
        (b"GET /", b"a" * 1000),
        (b"G", b"G" * 1000),
        (CHUNKED + b"2\r\n{}\r\n0\r\n", b"a: " + b"b" * 1000 + b"\r\n"),
        (CHUNKED + b"2\r\n{}\r\n0\r\na: ", b"b" * 1000),
        (CHUNKED + b"2;", b"b" * 1000),
    ],
    ids=["headers", "header", "path", "method", "trailers", "trailer", "extension"],
)
def test_headers_without_end_are_cut_off(server: Process, begin: bytes, piece: bytes) -> None:
    with server.send(begin) as connection:
        assert sent(connection, piece, 1 << 26) < 1 << 26
    assert server.health()["received"] == 0


def test_large_headers_are_answered_with_an_error(server: Process) -> None:
    """Whether they are complete or not."""
    for end in (b"\r\n\r\n", b""):
        with server.send(GET + b"Connection: close\r\na: " + b"b" * 70_000 + end) as connection:
            code, headers, body = parsed(rest(connection))
            assert code == 431 and headers["x-request-id"]
            assert json.loads(body)["error"]["type"] == "invalid_request_error"


@pytest.mark.fault("S2")
def test_json_that_is_deep_or_wrong_is_refused(server: Process) -> None:
    for body in (b"[" * 100_000, b'{"a":' * 100_000, b"[" * 100_000 + b"]" * 100_000, b"\xff", b'{"a": 1', b"[]", b" "):
        code, *_ = server.ask("POST", "/echo", body, **OPTIONS)
        assert 400 <= code < 500, body[:10]


def test_fields_after_a_body_are_no_headers(server: Process) -> None:
    end = b"2\r\n{}\r\n0\r\nx-late: yes\r\n\r\n"
    raw = server.raw(CHUNKED.replace(b"Host: a", b"Host: a\r\nConnection: close") + end)
    assert json.loads(parsed(raw)[2])["headers"] == sorted(
        ["host", "connection", "x-api-key", "content-type", "transfer-encoding"]
    )


@pytest.mark.parametrize("protocol", ["h2c", "websocket"])
def test_another_protocol_is_not_taken_up_and_the_body_arrives(server: Process, protocol: str) -> None:
    """As Java's HttpClient and `curl --http2` ask."""
    asks = f"Connection: Upgrade, HTTP2-Settings\r\nuPgrade: {protocol}\r\nHTTP2-Settings: AAMAAABk\r\n".encode()
    first = HEAD + asks + b'Content-Length: 8\r\n\r\n{"a": 1}'
    second = HEAD + b'Connection: close\r\nContent-Length: 8\r\n\r\n{"a": 2}'
    found = server.raw(first + second)
    assert found.count(b"HTTP/1.1 200") == 2 and b'{"a":1}' in found and b'{"a":2}' in found


@pytest.mark.parametrize(
    "request_line",
    ["CONNECT a:443 HTTP/1.1", "GET http://a HTTP/1.1", "garbage", "GET /\xff HTTP/1.1", "PRI * HTTP/2.0", "\0"],
)
def test_what_is_no_request_is_refused(server: Process, request_line: str) -> None:
    code, headers, body = parsed(server.raw(request_line.encode("latin-1") + b"\r\nHost: a\r\n\r\n"))
    assert code == 400 and headers["x-request-id"] and json.loads(body)["error"]["message"]


# --- clients that are slow, and those that leave ----------------------------------------------------------------------


@pytest.mark.fault("S2")
@pytest.mark.parametrize(
    ("begin", "answered"),
    [(b"", 0), (b"\r\n", 0), (b"G", 0), (GET, 0), (GET + b"a: b", 0), (GET + b"\r\n" + GET, 1)],
    ids=["nothing", "blank", "method", "headers", "header", "second request"],
)
def test_a_client_that_does_not_finish_its_headers_is_left(hasty: Process, begin: bytes, answered: int) -> None:
    assert hasty.raw(begin).count(b"HTTP/1.1") == answered


@pytest.mark.fault("S2")
@pytest.mark.parametrize("begin", [b"", GET + b"\r\n"], ids=["at first", "between requests"])
def test_blank_lines_do_not_keep_a_connection(hasty: Process, begin: bytes) -> None:
    """In uvicorn they end the time for which it waits for another request, and nothing else begins."""
    with hasty.send(begin) as connection:
        end = time.monotonic() + 60
        with pytest.raises(ConnectionError):
            while time.monotonic() < end:
                connection.sendall(b"\r\n")
                time.sleep(0.05)


@pytest.mark.fault("S2")
def test_a_body_that_does_not_come_is_not_waited_for(hasty: Process) -> None:
    for begin in (CHUNKED, CHUNKED + b"2\r\n{", HEAD + b"Content-Length: 100\r\n\r\n{}"):
        code, headers, body = parsed(hasty.raw(begin))
        assert code == 408 and headers["connection"] == "close" and json.loads(body)["error"]["message"]


@pytest.mark.fault("S4")
def test_a_client_that_does_not_read_is_left(hasty: Process) -> None:
    with hasty.send(f"GET /large HTTP/1.1\r\nHost: a\r\nx-api-key: {KEY}\r\n\r\n".encode()) as connection:
        connection.recv(1)
        time.sleep(1)
        assert len(rest(connection)) < 1 << 26


@pytest.mark.fault("S4")
def test_a_client_that_asked_twice_and_left_is_missed(server: Process) -> None:
    """uvicorn tells the last request alone; the first would be generated to its end."""
    before = server.health()["left"]
    body = b'{"events": 100000}'
    begin = HEAD.replace(b"/echo", b"/stream") + b"Content-Length: %d\r\n\r\n" % len(body) + body
    with server.send(begin) as connection:
        connection.recv(1)
        connection.sendall(GET + b"\r\n")
        until(lambda: server.health()["streams"] == 1)
        time.sleep(0.1)
    until(lambda: server.health()["left"] == before + 1)


def test_two_requests_at_once_are_answered_in_order(server: Process) -> None:
    first = GET + b"x-request-id: first\r\n\r\n"
    second = GET + b"x-request-id: second\r\nConnection: close\r\n\r\n"
    found = server.raw(first + second)
    assert found.count(b"HTTP/1.1 200") == 2 and 0 < found.find(b"first") < found.find(b"second")


@pytest.mark.fault("S2")
def test_connections_are_bounded(hasty: Process) -> None:
    with contextlib.ExitStack() as held:
        for _ in range(8):
            held.enter_context(hasty.send(b"G"))
        code, headers, _ = parsed(hasty.raw(b""))
        assert code == 503 and headers["x-request-id"]
    until(lambda: b"200 OK" in hasty.raw(GET + b"Connection: close\r\n\r\n"))


# --- signals ----------------------------------------------------------------------------------------------------------


def streaming(server: Process, events: int) -> socket.socket:
    """A stream that has begun."""
    connection = server.stream(events)
    until(lambda: server.health()["streams"])
    return connection


@pytest.mark.fault("S5")
def test_at_sigterm_answers_finish_while_new_requests_are_refused() -> None:
    with running(drain=120) as server, streaming(server, 100_000) as stream:
        server.process.send_signal(signal.SIGTERM)
        until(lambda: server.ask("GET", "/ready", **OPTIONS)[0] == 503)
        assert server.ask("POST", "/stream", b'{"events": 1}', **OPTIONS)[0] == 503
        assert server.health()["streams"] == 1
        assert server.ask("POST", "/finish", b"{}", **OPTIONS)[0] == 200
        assert b"data: [DONE]" in rest(stream)
        code, log = server.stop(None)
        assert code == 0 and [line["event"] for line in log if line["event"] != "request"] == [
            *("listening", "draining", "stopped")
        ]


@pytest.mark.fault("S5")
def test_answers_that_take_too_long_are_cut() -> None:
    with running(drain=0.2) as server, streaming(server, 100_000) as stream:
        server.process.send_signal(signal.SIGTERM)
        end = rest(stream)
        assert b"data: cut" in end and b"[DONE]" not in end and end.endswith(b"0\r\n\r\n")
        code, log = server.stop(None)
        assert code == 0 and [line["active"] for line in log if line["event"] == "cut"] == [1]


@pytest.mark.fault("S5")
def test_a_second_signal_ends_at_once() -> None:
    with running(drain=120) as server, streaming(server, 100_000):
        server.process.send_signal(signal.SIGTERM)
        until(lambda: server.ask("GET", "/ready", **OPTIONS)[0] == 503)
        assert server.stop()[0] == 128 + signal.SIGTERM


@pytest.mark.fault("S5")
def test_without_requests_an_interrupt_ends_with_success() -> None:
    with running(key="") as server, server.send(b"G"):
        assert server.ask("GET", "/ready", host="localhost")[0] == 200
        assert server.stop(signal.SIGINT)[0] == 0


# --- addresses --------------------------------------------------------------------------------------------------------


def test_a_url_is_that_of_the_socket() -> None:
    with listener("127.0.0.1", 0) as sock:
        port = sock.getsockname()[1]
        assert url_of(sock) == f"http://127.0.0.1:{port}"
        with pytest.raises(ResourceError, match=f"cannot listen at 127.0.0.1, port {port}: Address already in use"):
            listener("127.0.0.1", port)


def test_a_port_that_is_none_is_refused() -> None:
    for port in (-1, 65_536):
        with pytest.raises(UsageError, match=f"--port {port}: give 0, for any free one, to 65535"):
            listener("127.0.0.1", port)
