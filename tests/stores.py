"""A real S3 server on loopback, and web servers with and without ranges, for tests of files elsewhere."""

from __future__ import annotations

import contextlib
import gc
import threading
import warnings
from collections import Counter
from collections.abc import Generator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

# aiobotocore leaves the connection of an answer that it gave up on to the garbage collector.
LEFT_OPEN = pytest.mark.filterwarnings("ignore:Unclosed connection:ResourceWarning")

KEYS = {"AWS_ACCESS_KEY_ID": "someone", "AWS_SECRET_ACCESS_KEY": "a-secret-of-tests", "AWS_DEFAULT_REGION": "us-east-1"}


class Bucket:
    """A bucket, by the client that comes with the server, not the one that is tested."""

    def __init__(self, endpoint: str, name: str) -> None:
        import boto3

        self.name, self.url = name, f"s3://{name}"
        names = {"aws_access_key_id": KEYS["AWS_ACCESS_KEY_ID"], "aws_secret_access_key": KEYS["AWS_SECRET_ACCESS_KEY"]}
        self.client: Any = boto3.client("s3", endpoint_url=endpoint, region_name="us-east-1", **names)
        self.client.create_bucket(Bucket=name)

    def put(self, key: str, data: bytes) -> str:
        """Write an object; its URL."""
        self.client.put_object(Bucket=self.name, Key=key, Body=data)
        return f"{self.url}/{key}"

    def remove(self, key: str) -> None:
        """Remove an object."""
        self.client.delete_object(Bucket=self.name, Key=key)


def forget() -> None:
    """Have fsspec look at the variables again."""
    import s3fs

    s3fs.S3FileSystem.clear_instance_cache()


@contextlib.contextmanager
def s3() -> Generator[str]:
    """The endpoint of a new S3 server. Skips the test where a package is not installed."""
    pytest.importorskip("s3fs")
    server = pytest.importorskip("moto.server").ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    try:
        host, port = server.get_host_and_port()
        yield f"http://{host}:{port}"
    finally:
        server.stop()
        _collect()


def _collect() -> None:
    """Have what the clients leave open collected here, where its warnings are nobody's."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        gc.collect()


class Web:
    """Files of a web server by path; `sent` counts the bytes that it sent of each, by GET.

    To the next `busy` requests it answers with 503.
    """

    def __init__(self, files: dict[str, bytes], ranges: bool, short: int = 0) -> None:
        self.files, self.ranges, self.short = files, ranges, short
        self.sent: Counter[str] = Counter()
        self.url, self.busy = "", 0

    def answer(self, request: BaseHTTPRequestHandler, body: bool) -> None:
        path = request.path.partition("?")[0]
        if self.busy or path not in self.files:
            request.send_error(503 if self.busy else 404)
            self.busy = max(0, self.busy - 1)
            return
        data, asked = self.files[path], request.headers.get("Range")
        part = data
        if asked and self.ranges:
            first, last = asked.removeprefix("bytes=").split("-")
            part = data[int(first) : int(last) + 1]
        status = 206 if part is not data else 200
        part = part[: len(part) - (self.short if body else 0)]
        request.send_response(status)
        request.send_header("Content-Length", str(len(part)))
        request.send_header("ETag", f'"{hash(data)}"')
        request.end_headers()
        if body:
            self.sent[path] += len(part)
            request.wfile.write(part)


@contextlib.contextmanager
def web(files: dict[str, bytes], ranges: bool = True, short: int = 0) -> Generator[Web]:
    """A web server of some files, which sends `short` bytes fewer than it says they have. Skips without the package."""
    pytest.importorskip("aiohttp")
    pytest.importorskip("fsspec")
    served = Web(files, ranges, short)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            served.answer(self, body=True)

        def do_HEAD(self) -> None:
            served.answer(self, body=False)

        def log_message(self, format: str, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    served.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield served
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
        _collect()
