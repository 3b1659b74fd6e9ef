"""The processes of `serve.py`: servers, the library on its own, and a peer.

python benchmarks/servers.py session RUN WEIGHTS ROWS       a session: lines of JSON in, a line out for each
python benchmarks/servers.py peer FOLDER                    transformers behind a route
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import torch

from bytelm.decoding import open_decoder
from bytelm.generate.sampling import Sampling
from bytelm.generate.session import Request, Session
from bytelm.lm import load
from bytelm.serve.bench import Load
from bytelm.serve.served import PREFILL

Row = dict[str, Any]
BYTELM = [sys.executable, "-m", "bytelm", "serve"]
LIMITS = (None, PREFILL)  # of what a session reads beside rows that write: none, and the server's


@dataclass(frozen=True)
class Server:
    url: str
    pid: int

    def state(self) -> Row:
        """Memory, open files and threads of the process."""
        status = Path(f"/proc/{self.pid}/status").read_text()
        found = {name: int(value) for name, value in re.findall(r"(VmRSS|Threads):\s+(\d+)", status)}
        files = len(os.listdir(f"/proc/{self.pid}/fd"))  # noqa: PTH208
        return {"rss_mib": found["VmRSS"] / 1024, "files": files, "threads": found["Threads"]}


@contextlib.contextmanager
def serving(command: Sequence[str], log: Path, url: str = "", ready: str = "/ready") -> Iterator[Server]:
    """A server in a process; without a `url` it prints its own. Exits if it does not start."""
    with log.open("ab") as errors:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True)
    assert process.stdout is not None
    try:
        url = url or process.stdout.readline().strip()
        if not asyncio.run(answering(f"{url}{ready}", process)):
            sys.exit(f"{' '.join(command)} does not serve:\n{log.read_text()[-2000:]}")
        yield Server(url, process.pid)
    finally:
        process.terminate()  # SIGINT is ignored by what was started in the background
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


async def answering(url: str, process: subprocess.Popen[str], most: float = 300.0) -> bool:
    """Whether a server is ready, within so many seconds."""
    end = time.monotonic() + most
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(10)) as session:
        while process.poll() is None and time.monotonic() < end:
            with contextlib.suppress(aiohttp.ClientError, TimeoutError):
                async with session.get(url) as response:
                    if response.status == 200:
                        return True
            await asyncio.sleep(0.2)
    return False


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def session_job(run: str, weights: str, rows: str) -> None:
    """A process with a session: lines of JSON in, a line out for each."""
    lm = load(run, weights=None if weights == "float32" else weights)  # pyright: ignore[reportArgumentType]
    sessions = {
        limit: Session(open_decoder(lm.model, rows=int(rows), capacity=4096), prefill=limit) for limit in LIMITS
    }
    for line in sys.stdin:
        asked = json.loads(line)
        given = [(prompt.encode(), asked["bytes"], asked["seed"] + i) for i, prompt in enumerate(asked["prompts"])]
        began = time.perf_counter()
        if asked["alone"]:
            options: Row = {"temperature": 1.0, "eos": False}
            texts = [lm.generate(prompt, max_bytes=count, seed=seed, **options) for prompt, count, seed in given]
        else:
            session = sessions[asked["prefill"]]
            requests = [Request(prompt, count, Sampling(1.0), seed, eos=False) for prompt, count, seed in given]
            tickets = {session.submit(request): bytearray() for request in requests}
            while session.rows:
                for chunk in session.step():
                    tickets[chunk.row] += chunk.data
            texts = [bytes(text) for text in tickets.values()]
        seconds = time.perf_counter() - began
        print(
            json.dumps({"seconds": seconds, "texts": [base64.b64encode(text).decode() for text in texts]}), flush=True
        )


class Library:
    """`session_job`, as long as it is entered."""

    def __init__(self, run: Path, weights: str, rows: int) -> None:
        command = [sys.executable, __file__, "session", str(run), weights, str(rows)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def __enter__(self) -> Library:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.communicate()

    def write(
        self, load: Load, count: int, prefill: int | None = None, alone: bool = False
    ) -> tuple[float, list[bytes]]:
        """Seconds, and what `count` requests of a load should be answered."""
        prompts = [load.request(index, "")["prompt"] for index in range(count)]
        asked = {"prompts": prompts, "bytes": load.max_tokens, "seed": load.seed, "prefill": prefill, "alone": alone}
        assert self.process.stdin is not None and self.process.stdout is not None
        print(json.dumps(asked), file=self.process.stdin, flush=True)
        found = json.loads(self.process.stdout.readline())
        return found["seconds"], [base64.b64decode(text) for text in found["texts"]]


def peer_job(folder: str) -> None:
    """What is served where nobody thought of it: a route, a lock, `generate`."""
    import fastapi
    import transformers
    import uvicorn

    model: Any = transformers.BltForCausalLM.from_pretrained(folder).eval()
    app, lock = fastapi.FastAPI(), asyncio.Lock()

    def generated(text: str, count: int) -> bytes:
        ids = torch.tensor([[1, *(byte + 4 for byte in text.encode())]])
        options: Row = {"use_cache": False, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
        with torch.inference_mode():
            written = model.generate(ids, max_new_tokens=count, **options)
        return bytes(max(0, symbol - 4) for symbol in written[0, ids.shape[1] :].tolist())

    @app.post("/v1/completions")
    async def complete(body: dict[str, Any]) -> dict[str, Any]:
        async with lock:
            data = await asyncio.to_thread(generated, body["prompt"], body["max_tokens"])
        choice = {"text": data.decode(errors="replace"), "bytes_b64": base64.b64encode(data).decode()}
        return {"choices": [{**choice, "finish_reason": "length"}]}

    @app.get("/ready")
    async def ready() -> dict[str, Any]:
        return {}

    listening = socket.socket()
    listening.bind(("127.0.0.1", 0))
    print(f"http://127.0.0.1:{listening.getsockname()[1]}", flush=True)
    uvicorn.Server(uvicorn.Config(app, log_level="warning")).run(sockets=[listening])


if __name__ == "__main__":
    {"session": session_job, "peer": peer_job}[sys.argv[1]](*sys.argv[2:])
