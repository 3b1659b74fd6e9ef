#!/usr/bin/env bash
# One would guess that cat_file(url, start=, end=) of fsspec gives end - start bytes or raises, and that isfile() asks for
# the headers of a file, as it does on a store.
# Where a web server has no ranges, and answers 200 instead of 206, cat_file gives the whole file without a word; and
# isfile() is a GET, whose body the server begins to send.
# It matters because a reader that takes block 7 of a shard gets all of it, with its first bytes where those of block 7
# should be, and a question about a file of a terabyte starts its transfer. Count what comes, and ask info() instead.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install -q fsspec==2026.9.0 aiohttp==3.14.5
venv/bin/python - <<'PYTHON'
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import aiohttp
import fsspec

DATA = bytes(range(256)) * 4
asked = []

class NoRanges(BaseHTTPRequestHandler):
    def do_HEAD(self):
        asked.append(self.command)
        self.send_response(200)
        self.send_header("Content-Length", str(len(DATA)))
        self.end_headers()

    def do_GET(self):
        self.do_HEAD()
        self.wfile.write(DATA)

    def log_message(self, *_):
        pass

server = ThreadingHTTPServer(("127.0.0.1", 0), NoRanges)
threading.Thread(target=server.serve_forever, daemon=True).start()
url = f"http://127.0.0.1:{server.server_address[1]}/x.bin"
web = fsspec.filesystem("http")
print("fsspec", fsspec.__version__, "aiohttp", aiohttp.__version__)
data = web.cat_file(url, start=100, end=110)
print(f"cat_file of 10 bytes of {len(DATA)} from a server without ranges: {len(data)} bytes, and no error")
asked.clear()
there = web.isfile(url)
print(f"isfile: {there}, by {asked}")
asked.clear()
web.info(url)
print(f"info: by {asked}")
assert data == DATA, "cat_file changed"
assert there and asked == ["HEAD"], "info changed"
asked.clear()
web.isfile(url)
assert asked == ["GET"], "isfile changed"
PYTHON
