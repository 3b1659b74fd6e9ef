#!/usr/bin/env bash
# An ASGI application that streams hears of a client that leaves by "http.disconnect" from receive(). With uvicorn's
# httptools protocol it does not if the client had sent a second request on the connection before it left (pipelining,
# which HTTP/1.1 allows): the message never comes, and the application generates to its end for nobody.
# Why it matters: a server of language models cancels the work of clients that are gone, and has rows for few of them.
# Watch the connection itself (connection_lost of the protocol), or bound every answer.
set -euo pipefail
cd "$(mktemp -d)"
trap 'rm -rf "$PWD"' EXIT
python3 -m venv venv
venv/bin/pip install -q uvicorn==0.54.0 httptools==0.9.0
cat > show.py <<'PY'
import asyncio
import socket
from importlib.metadata import version

import uvicorn

heard = {}


async def app(scope, receive, send):
    if scope["type"] != "http":
        return
    path = scope["path"]
    if path.startswith("/long"):
        heard[path] = False

        async def gone():
            while (await receive())["type"] != "http.disconnect":
                pass
            heard[path] = True

        watch = asyncio.ensure_future(gone())
        await asyncio.wait({watch}, timeout=3)
        watch.cancel()
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"0")]})
    await send({"type": "http.response.body", "body": b""})


async def leave(port, path, second):
    client = socket.create_connection(("127.0.0.1", port))
    client.sendall(f"GET {path} HTTP/1.1\r\nHost: a\r\n\r\n".encode())
    await asyncio.sleep(0.3)
    if second:
        client.sendall(b"GET /next HTTP/1.1\r\nHost: a\r\n\r\n")
        await asyncio.sleep(0.3)
    client.close()
    await asyncio.sleep(4)


async def main():
    server = uvicorn.Server(uvicorn.Config(app, port=0, http="httptools", log_level="error", lifespan="off"))
    task = asyncio.ensure_future(server.serve())
    while not server.started:
        await asyncio.sleep(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    await leave(port, "/long-alone", False)
    await leave(port, "/long-before-another", True)
    server.should_exit = True
    await task


asyncio.run(main())
print(f"uvicorn {version('uvicorn')}, httptools {version('httptools')}: heard that the client left: {heard}")
raise SystemExit(0 if heard == {"/long-alone": True, "/long-before-another": False} else 1)
PY
venv/bin/python show.py
