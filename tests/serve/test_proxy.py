"""The page about operation: nginx shares requests among processes as it says, and its commands can be given."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import signal
import socket
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")

from bytelm.cli import app
from guarded import KEY, Process, events_of, parsed, rest, running, until

PAGE = (Path(__file__).parents[2] / "docs" / "serving-operation.md").read_text(encoding="utf-8")
NGINX = shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin")
OPTIONS = {"x_api_key": KEY, "content_type": "application/json"}


def block(language: str) -> str:
    """The block of the page in a language."""
    return re.findall(rf"(?ms)^```{language}\n(.*?)^```$", PAGE)[0]


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        return sock.getsockname()[1]


class Proxy(Process):
    """nginx, as the page has it, before some servers."""

    def __init__(self, folder: Path, servers: list[Process]) -> None:
        self.port = free_port()
        text = block("nginx").replace("listen 8000", f"listen 127.0.0.1:{self.port}")
        for number, server in enumerate(servers, 8001):
            text = text.replace(f":{number} ", f":{server.port} ")
        own = [f"{kind}_temp_path {folder}/{kind};" for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")]
        path = folder / "nginx.conf"
        path.write_text(f"events {{}}\nhttp {{\naccess_log off;\n{' '.join(own)}\n{text}}}\n")
        options = ["-e", "stderr", "-g", f"daemon off; pid {folder}/pid;"]
        self.process = subprocess.Popen([str(NGINX), "-p", str(folder), "-c", str(path), *options], text=True)
        until(self.listens)

    def listens(self) -> bool:
        assert self.process.poll() is None
        with suppress(ConnectionError):
            self.send(b"").close()
            return True
        return False


@pytest.fixture(scope="module")
def servers() -> Iterator[list[Process]]:
    with ExitStack() as stack:
        yield [stack.enter_context(running()) for _ in range(2)]


@pytest.fixture(scope="module")
def proxy(tmp_path_factory: pytest.TempPathFactory, servers: list[Process]) -> Iterator[Process]:
    if NGINX is None:
        pytest.skip("nginx is not installed")
    proxy = Proxy(tmp_path_factory.mktemp("nginx"), servers)
    try:
        yield proxy
    finally:
        proxy.process.terminate()
        proxy.process.wait(60)


def streaming(proxy: Process) -> tuple[socket.socket, int]:
    """A stream of which the first event has arrived, and the process it comes from; the second event takes its time."""
    stream = proxy.stream(2, pause=1000)
    found = b""
    while not events_of(found):
        found += stream.recv(1 << 16)
    return stream, int(events_of(found)[0].split()[-1])


@pytest.mark.fault("S4")
def test_streams_pass_unbuffered_to_the_process_with_the_fewest(servers: list[Process], proxy: Process) -> None:
    streams: list[tuple[socket.socket, int]] = []
    try:
        streams = [streaming(proxy) for _ in range(3)]
        of = [process for _, process in streams]
        alone = next(at for at, process in enumerate(of) if of.count(process) == 1)
        stream, process = streams.pop(alone)
        stream.close()  # nginx closes its own connection then
        until(lambda: [server.health()["streams"] for server in servers if server.process.pid == process] == [0])
        streams += [streaming(proxy) for _ in range(2)]
        assert [other for _, other in streams[2:]] == [process] * 2
    finally:
        for stream, _ in streams:
            stream.close()
    until(lambda: [server.health()["streams"] for server in servers] == [0, 0])


def test_keys_origins_and_ids_pass_nginx(servers: list[Process], proxy: Process) -> None:
    status, headers, body = proxy.ask("GET", "/ready")
    assert status == 401 and json.loads(body)["error"]["code"] == "invalid_api_key"
    assert headers["www-authenticate"].count("realm") == 2
    own = f"http://127.0.0.1:{proxy.port}"
    assert proxy.ask("GET", "/ready", origin=own, **OPTIONS)[0] == 200
    assert proxy.ask("GET", "/ready", origin=f"http://127.0.0.1:{servers[0].port}", **OPTIONS)[0] == 403
    assert (
        parsed(proxy.raw(b"GET /health HTTP/1.0\r\nHost: a\r\nX-Request-Id: mine\r\n\r\n"))[1]["x-request-id"] == "mine"
    )


@pytest.mark.fault("S5")
def test_a_process_is_restarted_without_an_error_for_anybody(servers: list[Process], proxy: Process) -> None:
    first, second = servers
    with first.stream(100_000) as stream:
        until(lambda: first.health()["streams"])
        first.process.send_signal(signal.SIGTERM)
        until(lambda: first.ask("GET", "/ready", **OPTIONS)[0] == 503)
        for _ in range(6):
            status, _, body = proxy.ask("POST", "/stream", b'{"events": 1}', **OPTIONS)
            assert status == 200 and f"of {second.process.pid}".encode() in body
        first.ask("POST", "/finish", b"{}", **OPTIONS)
        assert b"[DONE]" in rest(stream)
    first.process.wait(60)
    assert [proxy.ask("POST", "/stream", b'{"events": 1}', **OPTIONS)[0] for _ in range(4)] == [200] * 4


def test_commands_of_the_page_can_be_given() -> None:
    """Those of bytelm are parsed."""
    unit, entry, command = block("ini"), *re.findall(r"^(?:ENTRYPOINT|CMD) (.*)$", block("dockerfile"), re.MULTILINE)
    lines = [shlex.split(line)[1:] for line in re.findall(r"ExecStart=(.*)", unit.replace("%i", "8001"))]
    lines.append([*json.loads(entry), *json.loads(command)][1:])
    for words in lines:
        _, bound, _ = app.parse_args(words, exit_on_error=False, print_error=False)
        assert bound.arguments["port"] in (8000, 8001) and bound.arguments["runs"]


def test_the_unit_is_one_of_systemd(tmp_path: Path) -> None:
    analyze = shutil.which("systemd-analyze")
    if analyze is None:
        pytest.skip("systemd is not installed")
    unit = re.sub(r"ExecStart=\S+", "ExecStart=/bin/true", block("ini"))
    path = tmp_path / "bytelm@8001.service"
    path.write_text(unit)
    done = subprocess.run([analyze, "verify", "--man=no", str(path)], capture_output=True, text=True, check=False)
    assert str(path.name) not in done.stderr, done.stderr
