"""A server under mixed load for a while: memory, files and threads stay as they were. BYTELM_SOAK: seconds."""

from __future__ import annotations

import asyncio
import base64
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from bytelm.lm import load
from serving import RUN

SECONDS = float(os.environ.get("BYTELM_SOAK", "60"))
CLIENTS = 64
pytestmark = pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="looks into /proc")


def used(pid: int) -> dict[str, int]:
    """What a process holds."""
    folder = Path(f"/proc/{pid}")
    (resident,) = (line for line in (folder / "status").read_text().splitlines() if line.startswith("VmRSS"))
    count = {name: len(list((folder / name).iterdir())) for name in ("fd", "task")}
    return count | {"memory": int(resident.split()[1]) * 1024}


async def client(session: aiohttp.ClientSession, url: str, until: float, number: int, seen: dict[str, int]) -> None:
    """Requests of every kind, one after another; right answers are compared with the library's."""
    draw, lm = random.Random(number), load(RUN)
    while time.monotonic() < until:
        prompt, seed, kind = draw.randbytes(draw.randint(0, 300)), draw.randint(0, 9), draw.randint(0, 5)
        body: dict[str, Any] = {"prompt_b64": base64.b64encode(prompt).decode(), "seed": seed, "max_tokens": 40}
        body |= {"temperature": 0.8, "stream": kind == 1}
        if kind == 2:
            body["temperature"] = -1
        if kind == 3:
            body |= {"echo": True, "logprobs": 3, "max_tokens": 0}
        try:
            async with session.post(url + "/v1/completions", json=body) as answer:
                seen[str(answer.status)] = seen.get(str(answer.status), 0) + 1
                if kind == 4 or answer.status != 200:
                    await asyncio.sleep(0.05 if answer.status == 429 else 0)
                    continue  # leaves before the end
                text = await answer.read()
            if kind == 0:
                data = base64.b64decode(json.loads(text)["choices"][0]["bytes_b64"])
                assert data == await asyncio.to_thread(lm.generate, prompt, seed=seed, max_bytes=40)
        except aiohttp.ClientError as error:
            seen[type(error).__name__] = seen.get(type(error).__name__, 0) + 1


async def load_of(url: str, seconds: float) -> dict[str, int]:
    """All clients for so many seconds; the answers by status."""
    seen: dict[str, int] = {}
    timeout, connector = aiohttp.ClientTimeout(60), aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(timeout=timeout, connector=connector) as session:
        until = time.monotonic() + seconds
        await asyncio.gather(*(client(session, url, until, number, seen) for number in range(CLIENTS)))
    return seen


@pytest.mark.slow
@pytest.mark.fault("S10")
def test_mixed_load_leaves_nothing_behind() -> None:
    command = [sys.executable, "-m", "bytelm", "serve", str(RUN), "--port", "0", "--quiet", "--queue", "40"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        try:
            assert process.stdout is not None
            url = process.stdout.readline().strip()
            asyncio.run(load_of(url, SECONDS / 6))  # what is allocated once is allocated
            time.sleep(1)
            before = used(process.pid)
            seen = asyncio.run(load_of(url, SECONDS))
            time.sleep(6)  # the server closes idle connections
            after = used(process.pid)
        finally:
            process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
    assert set(seen) <= {"200", "422", "429"} and seen["200"] > CLIENTS, seen
    assert after["fd"] <= before["fd"] + 2 and after["task"] <= before["task"] + 1, (before, after)
    assert after["memory"] < 1.05 * before["memory"] + (16 << 20), (before, after)
