"""`bytelm serve` under load, beside its own engine, and beside peers that serve the same weights.

    python benchmarks/serve.py                                  load, overhead and peers, about 100M parameters
    python benchmarks/serve.py --parts overhead --rounds 5 --json
    python benchmarks/serve.py --parts none --soak 600 --vanish 200

The model is the BLT of `generate.py` with random weights, in bf16 where the processor multiplies it. Servers are
processes of their own and share the processor with this one, which is the client. What is compared alternates within a
round, every other round in reverse; medians over rounds. Prompts have 256 bytes and are never repeated.

load       bytes per second of 32 clients at once / of one; with 31 clients that write answers of various lengths:
           p95 / p50 of the time per byte (mean of an answer) and of the time between events, and the time to first
           byte of one client more / the same on an idle server
overhead   share of bytes per second lost from `generate.session` to the server, at as many sequences, prompts included:
           beside a session without a limit of prefill, and beside one with the server's; streamed and not
peers      bytes per second of 8 clients / of a peer: a FastAPI route around `generate` of transformers, without a cache
           (with one its logits are wrong), and `transformers serve`; about 10M parameters in float32. Greedy
           answers are the same, but where rounding moves a patch
--soak     200 clients for so many seconds: failures by kind, answers that differ from `LM.generate` with the same seed
--vanish   so many clients that disconnect at random; what is left of them in the server
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import random
import re
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import aiohttp
import servers
from converted import transformers_blt
from generate import SIZES, Shapes, recipe
from servers import BYTELM, LIMITS, Library, Server, free_port, serving

from bytelm.checkpoint import store
from bytelm.config import to_mapping
from bytelm.exchange.convert import convert, export
from bytelm.machine import instruction_sets, processor
from bytelm.serve.bench import Load, Run, summary

Row = dict[str, Any]
PARTS = ("load", "overhead", "peers")
CLIENTS, PEERS_CLIENTS, SOAK_CLIENTS = 32, 8, 200
PROMPT = 256
POOL = 64  # answers of a soak that are known beforehand
TARGETS = {"clients": "≥ 6", "per_byte": "≤ 3", "gap": "≤ 3", "first_byte": "≤ 10", "lost": "≤ 10 %", "peer": "≥ 100"}
EXACT = {"ignore_eos": True, "temperature": 1.0}


# --- loads ------------------------------------------------------------------------------------------------------------


class Varied(Load):
    """Answers of various lengths, so that clients of a closed loop do not fall into step."""

    def request(self, index: int, model: str) -> Row:
        most = self.max_tokens
        return super().request(index, model) | {"max_tokens": most // 2 + index * 37 % most}


class Pool(Load):
    """The same POOL requests in turn."""

    def request(self, index: int, model: str) -> Row:
        return super().request(index % POOL, model)


def measured(load: Load) -> Run:
    """A load, all of which must be answered."""
    run = Run(load)
    asyncio.run(run.measure())
    if wrong := [answer for answer in run.answers if not answer.complete]:
        sys.exit(f"{load.url}: {len(wrong)} of {len(run.answers)} requests failed ({wrong[0].error})")
    return run


async def beside(load: Load, probe: Load, wait: float) -> tuple[Run, Run]:
    """A load, and another that begins later."""
    runs = Run(load), Run(probe)

    async def later() -> None:
        await asyncio.sleep(wait)
        await runs[1].measure()

    await asyncio.gather(runs[0].measure(), later())
    return runs


def median_of(rows: Sequence[Row]) -> Row:
    """Of each figure."""
    return {name: statistics.median(row[name] for row in rows) for name in rows[0]}


def turns(rounds: int, jobs: Sequence[Callable[[int], Row]]) -> Row:
    """Medians of what jobs say, each once a round, forward and backward in turn."""
    found: list[Row] = []
    for turn in range(rounds):
        began, row = time.perf_counter(), Row()
        for job in jobs if turn % 2 == 0 else reversed(jobs):
            row |= job(turn)
        found.append(row)
        print(f"round {turn + 1} of {rounds}: {time.perf_counter() - began:.0f} s", file=sys.stderr, flush=True)
    return median_of(found)


def load_part(server: Server, count: int, seconds: float, rounds: int) -> Row:
    """Many clients and one."""
    own: Row = {"prompt_bytes": PROMPT, "max_tokens": count, "body": EXACT}

    def one(turn: int) -> Row:
        found = summary(measured(Load(server.url, concurrency=1, requests=4, seed=1000 * turn, **own)))
        return {"one_bytes_per_s": found["bytes_per_s"], "idle_first_byte_s": found["seconds"]["first_byte"]["p50"]}

    def many(turn: int) -> Row:
        load = Load(server.url, concurrency=CLIENTS, requests=2 * CLIENTS, seed=1000 * turn + 100, **own)
        return {"many_bytes_per_s": summary(measured(load))["bytes_per_s"]}

    def busy(turn: int) -> Row:
        wait = seconds / 4
        background = Varied(server.url, concurrency=CLIENTS - 1, seconds=seconds, seed=1000 * turn + 300, **own)
        short = own | {"max_tokens": 4}
        probe = Load(server.url, concurrency=1, seconds=seconds - wait, seed=1000 * turn + 900, **short)
        found, probed = (summary(run)["seconds"] for run in asyncio.run(beside(background, probe, wait)))
        spread = {f"{name}_p95_by_p50": found[name]["p95"] / found[name]["p50"] for name in ("per_byte", "gap")}
        return {**spread, "per_byte_s": found["per_byte"]["p50"], "busy_first_byte_s": probed["first_byte"]["p50"]}

    row = turns(rounds, [one, many, busy])
    row["clients_ratio"] = row["many_bytes_per_s"] / row["one_bytes_per_s"]
    row["first_byte_ratio"] = row["busy_first_byte_s"] / row["idle_first_byte_s"]
    return row


def overhead_part(server: Server, library: Library, count: int, rounds: int) -> list[Row]:
    """The server beside a session in a process of its own."""

    def row_of(batch: int) -> Row:
        def loaded(turn: int, stream: bool) -> Load:
            own: Row = {"prompt_bytes": PROMPT, "max_tokens": count, "body": EXACT, "stream": stream}
            return Load(
                server.url, concurrency=batch, requests=batch, seed=10000 * batch + 100 * turn + stream * 50, **own
            )

        texts: dict[int, list[bytes]] = {}

        def served(turn: int, stream: bool) -> Row:
            run = measured(loaded(turn, stream))
            if stream:
                given = [bytes(answer.data) for answer in sorted(run.answers, key=lambda answer: answer.index)]
                assert texts.setdefault(turn, given) == given, "the server wrote other bytes than the session"
            return {"streamed" if stream else "whole": batch * count / run.lasted}

        def own(turn: int, limit: int | None) -> Row:
            # Of the session with a limit other prompts: one whose prompts were read before would not read them again.
            seconds, given = library.write(loaded(turn, limit is None), batch, limit)
            if limit is None:
                assert texts.setdefault(turn, given) == given, "the server wrote other bytes than the session"
            return {"session" if limit is None else "limited": batch * count / seconds}

        jobs: list[Callable[[int], Row]] = [
            lambda turn: own(turn, None),
            lambda turn: served(turn, True),
            lambda turn: own(turn, LIMITS[1]),
            lambda turn: served(turn, False),
        ]
        row = turns(rounds, jobs)
        lost = {f"{a}_lost_of_{b}": 1 - row[a] / row[b] for a in ("streamed", "whole") for b in ("session", "limited")}
        return {"batch": batch, **row, **lost}

    return [row_of(batch) for batch in (8, CLIENTS)]


def peers_part(folder: Path, count: int, rounds: int) -> Row:
    """The same weights in three servers."""
    transformers_blt(folder / "theirs")
    convert(folder / "theirs", "hf", folder / "blt", {})
    export(folder / "blt", "hf", folder / "exported", {})  # with a tokenizer, which `transformers serve` needs
    port, exported = free_port(), str(folder / "exported")
    theirs = [str(Path(sys.executable).with_name("transformers")), "serve", "--device", "cpu", "--dtype", "float32"]
    os.environ["HF_HUB_OFFLINE"] = "1"
    log = folder / "log"
    with contextlib.ExitStack() as stack:
        running = {
            "bytelm": stack.enter_context(serving([*BYTELM, str(folder / "blt"), "--port", "0", "--quiet"], log)),
            "fastapi": stack.enter_context(serving([sys.executable, servers.__file__, "peer", exported], log)),
            "transformers_serve": stack.enter_context(
                serving([*theirs, "--port", str(port), exported], log, f"http://127.0.0.1:{port}", "/health")
            ),
        }
        models = {"bytelm": "blt", "fastapi": exported, "transformers_serve": exported}
        texts: dict[str, list[str]] = {}

        def served(name: str, turn: int) -> Row:
            own: Row = {"model": models[name], "stream": False, "max_tokens": count, "prompt_bytes": PROMPT}
            own["body"] = {"temperature": 0.0} | ({"ignore_eos": True} if name == "bytelm" else {})
            one = {"concurrency": PEERS_CLIENTS, "requests": PEERS_CLIENTS, "seed": 100 * turn}
            run = measured(Load(running[name].url, **one, **own))
            ordered = sorted(run.answers, key=lambda answer: answer.index)
            texts[name] = [answer.data.decode(errors="replace") for answer in ordered]
            return {f"{name}_bytes_per_s": PEERS_CLIENTS * count / run.lasted}

        jobs: list[Callable[[int], Row]] = [lambda turn, name=name: served(name, turn) for name in running]
        for warm_up in jobs:
            warm_up(-1)
        row = turns(rounds, jobs)
    for name in ("fastapi", "transformers_serve"):
        row[f"{name}_ratio"] = row["bytelm_bytes_per_s"] / row[f"{name}_bytes_per_s"]
        row[f"{name}_same"] = sum(a == b for a, b in zip(texts[name], texts["bytelm"], strict=True))
    return row


# --- steadiness -------------------------------------------------------------------------------------------------------


def settled(server: Server) -> Row:
    """The state of a server some seconds after its last request, and the sequences that it still has."""

    async def sequences() -> float:
        async with aiohttp.ClientSession() as session, session.get(f"{server.url}/metrics") as response:
            text = await response.text()
        return sum(float(value) for value in re.findall(r"(?m)^bytelm_(?:running|waiting)_sequences\S* (\S+)", text))

    end, left = time.monotonic() + 20, 1.0
    while left and time.monotonic() < end:
        time.sleep(2)
        left = asyncio.run(sequences())
    return {**server.state(), "sequences": left}


def soak(server: Server, library: Library, seconds: float, count: int) -> Row:
    """Many clients for long."""
    own: Row = {"prompt_bytes": PROMPT, "max_tokens": count, "body": EXACT, "seed": 77}
    known = library.write(Pool(server.url, concurrency=1, requests=1, **own), POOL, alone=True)[1]
    measured(Load(server.url, concurrency=CLIENTS, requests=CLIENTS, **own))  # caches and pools are filled
    before = settled(server)
    run = Run(Pool(server.url, concurrency=SOAK_CLIENTS, seconds=seconds, **own))
    asyncio.run(run.measure())
    complete = [answer for answer in run.answers if answer.complete]
    found = summary(run)
    told = {name: found[name] for name in ("requests", "complete", "errors", "retry_after", "bytes_per_s")}
    wrong = sum(bytes(answer.data) != known[answer.index % POOL] for answer in complete)
    return {"seconds": seconds, **told, "differ": wrong, "before": before, "after": settled(server)}


def vanish(server: Server, clients: int, count: int) -> Row:
    """Clients that disconnect at a random time, some before they have an answer."""
    draw = random.Random(0)
    load = Load(server.url, concurrency=1, requests=1, max_tokens=count, body=EXACT, seed=5000)

    async def client(index: int, session: aiohttp.ClientSession) -> None:
        await asyncio.sleep(draw.uniform(0, clients / 20))
        with contextlib.suppress(TimeoutError, aiohttp.ClientError):
            async with asyncio.timeout(draw.uniform(0, 2)):
                response = await session.post(load.endpoint, json=load.request(index, ""))
                try:
                    async for _ in response.content.iter_any():
                        pass
                finally:
                    response.close()  # the connection, not only the answer

    async def all_of_them() -> None:
        connector = aiohttp.TCPConnector(limit=0)
        async with aiohttp.ClientSession(connector=connector) as session:
            await asyncio.gather(*(client(index, session) for index in range(clients)))

    before = settled(server)
    asyncio.run(all_of_them())
    return {"clients": clients, "before": before, "after": settled(server)}


# --- the program ------------------------------------------------------------------------------------------------------


def made(shapes: Shapes, folder: Path) -> Path:
    """A run of a random BLT."""
    plan = recipe(shapes, "blt")
    model = plan.build()
    model.init_weights(0)
    state: Row = {"recipe": to_mapping(plan), "context": 1024, "bytes": 0, "seconds": 0.0, "skipped": 0}
    (folder / "model").mkdir()
    store.save(folder / "model", 0, {"model": model.state_dict()}, state)
    return folder / "model"


def show(found: Row) -> None:
    print(f"{found['processor']}, {found['weights']}, {found['parameters'] / 1e6:.0f}M parameters\n")
    if row := found.get("load"):
        print(f"{CLIENTS} clients / one, bytes/s   {row['clients_ratio']:8.2f}  ({TARGETS['clients']})")
        print(f"per byte, p95 / p50        {row['per_byte_p95_by_p50']:8.2f}  ({TARGETS['per_byte']})")
        print(f"between events, p95 / p50  {row['gap_p95_by_p50']:8.2f}  ({TARGETS['gap']})")
        print(f"first byte, busy / idle    {row['first_byte_ratio']:8.2f}  ({TARGETS['first_byte']})")
    for row in found.get("overhead", ()):
        for way in ("streamed", "whole"):
            lost = ", ".join(f"{row[f'{way}_lost_of_{b}']:.1%} of {b}" for b in ("session", "limited"))
            print(f"batch {row['batch']:<2} {way:<9} loses    {lost}  ({TARGETS['lost']})")
    if row := found.get("peers"):
        for name in ("fastapi", "transformers_serve"):
            same = f"{row[f'{name}_same']} of {PEERS_CLIENTS} answers the same"
            print(f"bytelm / {name:<18}{row[f'{name}_ratio']:8.1f}  ({TARGETS['peer']})  {same}")
    for name in ("soak", "vanish"):
        if name in found:
            print(f"{name}: {json.dumps(found[name])}")


def options_of(arguments: Sequence[str] | None, sizes: Sequence[str]) -> argparse.Namespace:
    assert __doc__
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=sizes, default="100M" if "100M" in sizes else sizes[0])
    parser.add_argument("--weights", choices=("bf16", "int8", "float32"), help="default: bf16 where it is fast")
    parser.add_argument("--parts", default=",".join(PARTS), help="of load, overhead, peers; or none")
    parser.add_argument("--bytes", type=int, default=128, help="of an answer (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=40.0, help="of the load with answers of various lengths")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--soak", type=float, metavar="SECONDS")
    parser.add_argument("--vanish", type=int, metavar="CLIENTS")
    parser.add_argument("--json", action="store_true")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None, sizes: dict[str, Shapes] = SIZES) -> int:
    options = options_of(arguments, tuple(sizes))
    fast = any("bf16" in name for name in instruction_sets())
    weights = options.weights or ("bf16" if fast else "float32")
    parts = [part for part in options.parts.split(",") if part != "none"]
    count, rounds = options.bytes, options.rounds
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        run = made(sizes[options.size], folder)
        parameters = sum(p.numel() for p in recipe(sizes[options.size], "blt").build_for_counting().parameters())
        found: Row = {"processor": processor(), "weights": weights, "parameters": parameters, "bytes": count}
        command = [
            *BYTELM,
            str(run),
            "--port",
            "0",
            "--quiet",
            *(["--weights", weights] if weights != "float32" else []),
        ]
        with serving(command, folder / "log") as server, Library(run, weights, CLIENTS) as library:
            measured(Load(server.url, concurrency=4, requests=4, max_tokens=16, seed=-100, body=EXACT))  # warm-up
            if "load" in parts:
                found["load"] = load_part(server, count, options.seconds, rounds)
            if "overhead" in parts:
                found["overhead"] = overhead_part(server, library, count, rounds)
            if options.soak:
                found["soak"] = soak(server, library, options.soak, count)
            if options.vanish:
                found["vanish"] = vanish(server, options.vanish, 4 * count)
        if "peers" in parts:
            found["peers"] = peers_part(folder, max(4, count // 4), rounds)
    print(json.dumps(found)) if options.json else show(found)
    return 0


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the servers end too
    sys.exit(main())
