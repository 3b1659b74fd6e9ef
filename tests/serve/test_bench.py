"""The load generator, on events written by hand and against a small server with known delays."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import itertools
import json
import os
import signal
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from aiohttp import web

from bytelm.cli import run as command
from bytelm.errors import MissingExtraError, ResourceError, UsageError
from bytelm.serve import bench
from bytelm.serve.bench import Load, Run, arrivals, percentiles, summary
from bytelm.serve.client import Answer, Events, seconds_of

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
DELAY = 0.05


# --- arrivals, statistics ---------------------------------------------------------------------------------------------


def test_arrivals_are_a_poisson_process_and_come_again() -> None:
    times = list(itertools.islice(arrivals(20.0, seed=3), 4000))
    gaps = np.diff([0.0, *times])
    assert times == list(itertools.islice(arrivals(20.0, seed=3), 4000))
    assert times != list(itertools.islice(arrivals(20.0, seed=4), 4000))
    assert np.mean(gaps) == pytest.approx(1 / 20, rel=0.05) and np.std(gaps) == pytest.approx(1 / 20, rel=0.1)
    assert min(gaps) > 0 and np.mean(gaps > 1 / 20) == pytest.approx(np.exp(-1), rel=0.1)


def test_percentiles_of_known_values() -> None:
    assert percentiles([]) is None
    assert percentiles(range(101)) == {"p50": 50.0, "p95": 95.0, "p99": 99.0, "mean": 50.0, "max": 100}
    assert percentiles([7.0]) == dict.fromkeys(("p50", "p95", "p99", "mean", "max"), 7.0)


def test_a_summary_of_known_answers() -> None:
    """Two streamed answers, one refused, one cut off, one in progress: every figure by hand."""
    one = Answer(0, 0.0, 0.01, 2.0, 200, pieces=[(0.5, 2), (1.0, 1), (2.0, 3)], data=bytearray(b"abcdef"), tokens=3)
    two = Answer(1, 1.0, 1.00, 4.0, 200, pieces=[(1.5, 4)], data=bytearray(b"abcd"), tokens=2)
    one.streamed = two.streamed = True
    refused = Answer(2, 1.0, 1.0, 1.1, 429, "429", retry_after=3.0)
    cut = Answer(3, 1.0, 1.0, 3.0, 200, "cut off", pieces=[(2.0, 9)], data=bytearray(9), streamed=True)
    found = summary(
        Run(Load("http://a", rate=1, requests=5), [one, two, refused, cut, Answer(4, 2, 2)], "m", lasted=5.0)
    )
    assert (found["requests"], found["complete"], found["unfinished"]) == (5, 2, 1)
    assert found["errors"] == {"429": 1, "cut off": 1} and found["retry_after"] == [3.0, 3.0]
    assert (found["bytes"], found["bytes_per_s"], found["tokens_per_s"]) == (10, 2.0, 1.0)
    times = found["seconds"]
    assert times["first_byte"]["mean"] == 0.5 and times["latency"]["max"] == 3.0 and times["latency"]["mean"] == 2.5
    assert times["per_byte"]["max"] == (2.0 - 0.5) / 4, "the mean per byte after the first event; none of one event"
    assert (times["gap"]["mean"], times["gap"]["max"]) == (0.75, 1.0)
    assert times["late"]["max"] == 0.01


# --- events -----------------------------------------------------------------------------------------------------------

STREAM = ': hello\r\n\r\ndata: {"a":\r\ndata: 1}\r\n\r\nevent: x\nid: 7\ndata:two é\n\ndata: \n\n\n'
STREAM += "data: a\rdata: b\r\rdata: end"
EVENTS = ['{"a":\n1}', "two é", "a\nb", "end"]


@pytest.mark.parametrize("size", [1, 2, 3, 7, 1000])
def test_events_are_found_however_they_are_cut(size: int) -> None:
    events, data = Events(), STREAM.encode()
    found = [event for at in range(0, len(data), size) for event in events.feed(data[at : at + size])]
    assert found == EVENTS[:-1]
    assert found + events.close() == EVENTS and events.close() == []


def test_an_event_is_there_as_soon_as_its_line_is_empty() -> None:
    events = Events()
    assert events.feed(b"data: a\n") == [] and events.feed(b"\n") == ["a"]
    assert events.feed(b"data: b\r\n") == [] and events.feed(b"\r\n") == ["b"]


def answered(*events: Any) -> Answer:
    answer = Answer(0, 0.0, 0.0, streamed=True)
    for at, event in enumerate(events):
        answer.take(event if isinstance(event, str) else json.dumps(event), float(at))
    return answer


def test_answers_of_every_kind_are_read() -> None:
    text = answered({"choices": [{"text": "aé"}]}, {"choices": [{"text": "", "finish_reason": "stop"}], "usage": None})
    assert (bytes(text.data), text.pieces, text.finished) == ("aé".encode(), [(0.0, 3)], True)
    exact = base64.b64encode(b"\xe2").decode()
    assert answered({"choices": [{"text": "", "bytes_b64": exact}]}).data == b"\xe2"
    assert answered({"choices": [{"text": "�", "bytes_b64": ""}]}).data == b"", "bytes count, where they are given"
    chat = answered(
        {"choices": [{"delta": {"role": "assistant", "content": ""}}]},
        {"choices": [{"delta": {"content": "hi"}}]},
        {"choices": [{"delta": {}, "finish_reason": "length"}]},
        {"choices": [], "usage": {"completion_tokens": 9}},
        "[DONE]",
    )
    assert (bytes(chat.data), chat.pieces, chat.tokens) == (b"hi", [(1.0, 2)], 9)
    assert answered({"choices": [{"message": {"content": "hi"}}, {"message": {"content": "ho"}}]}).data == b"hiho"
    assert answered({"error": {"message": "no"}}).error == "error event"
    assert answered('{"choices": [{"text": "\\ud800"}]}').data == b"\xed\xa0\x80"


@pytest.mark.parametrize("event", ["{", "[]", "7", '{"choices": [3]}', '{"choices": [{"text": 3}]}', '{"usage": [1]}'])
def test_what_is_no_answer_is_malformed(event: str) -> None:
    assert answered(event).error == "malformed"


def test_retry_after_in_seconds() -> None:
    found = [seconds_of(header) for header in ("2", "0.5", "-1", None, "Wed, 21 Oct 2026 07:28:00 GMT")]
    assert found == [2.0, 0.5, 0.0, None, None]


# --- a load against a server ------------------------------------------------------------------------------------------


@contextlib.asynccontextmanager
async def serving(handler: Handler) -> AsyncIterator[str]:
    """A server with one model, on any free port."""

    async def models(request: web.Request) -> web.Response:
        return web.json_response({"data": [{"id": "fake"}]})

    app = web.Application()
    app.router.add_get("/v1/models", models)
    app.router.add_post("/v1/completions", handler)
    app.router.add_post("/v1/chat/completions", handler)
    runner = web.AppRunner(app, shutdown_timeout=0.01)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    assert runner.addresses
    try:
        yield f"http://127.0.0.1:{runner.addresses[0][1]}"
    finally:
        await runner.cleanup()


def measured(handler: Handler, **load: Any) -> Run:
    async def main() -> Run:
        async with serving(handler) as url:
            run = Run(Load(url, **load))
            await run.measure()
            return run

    return asyncio.run(main())


async def events(request: web.Request, *pieces: bytes, delay: float = DELAY) -> web.StreamResponse:
    """Each piece after a delay."""
    response = web.StreamResponse(headers={"Content-Type": "text/event-stream; charset=utf-8"})
    await response.prepare(request)
    for piece in pieces:
        await asyncio.sleep(delay)
        await response.write(piece)
    return response


def said(text: str, reason: str | None = None) -> bytes:
    return b"data: " + json.dumps({"choices": [{"text": text, "finish_reason": reason}]}).encode() + b"\r\n\r\n"


USAGE = b'data: {"choices": [], "usage": {"completion_tokens": 5}}\n\n'


def test_a_closed_loop_times_the_pieces_of_a_stream() -> None:
    asked: list[dict[str, Any]] = []

    async def handler(request: web.Request) -> web.StreamResponse:
        asked.append(await request.json())
        assert request.headers["Authorization"] == "Bearer secret"
        return await events(request, said("ab"), b": still here\n\n", said("cde", "length"), USAGE)

    run = measured(handler, concurrency=2, requests=4, prompt_bytes=40, max_tokens=9, key="secret", body={"top_k": 3})
    found = summary(run)
    assert (found["model"], found["complete"], found["errors"], found["tokens"]) == ("fake", 4, {}, 20)
    assert all(bytes(answer.data) == b"abcde" for answer in run.answers)
    # The server waits so long at least; how long it took beyond that is the machine's affair.
    times = found["seconds"]
    assert times["first_byte"]["p50"] >= DELAY and times["latency"]["p50"] >= 4 * DELAY
    assert all(answer.pieces[-1][0] - answer.arrival >= 3 * DELAY for answer in run.answers)
    assert times["per_byte"]["mean"] == pytest.approx(times["gap"]["mean"] / 3) and times["gap"]["mean"] > 0
    assert found["bytes_per_s"] <= 2 * 5 / (4 * DELAY)
    fields = {"model": "fake", "max_tokens": 9, "stream": True, "stream_options": {"include_usage": True}, "top_k": 3}
    assert all(body.items() >= fields.items() and len(body["prompt"]) == 40 for body in asked)
    assert len({body["prompt"] for body in asked}) == 4 and {body["seed"] for body in asked} == {0, 1, 2, 3}


def test_an_open_loop_does_not_wait_for_answers_and_counts_from_the_arrival() -> None:
    """A server that answers nothing before it has eight requests would hang a loop that waits."""
    waiting, together = 0, asyncio.Event()

    async def handler(request: web.Request) -> web.StreamResponse:
        nonlocal waiting
        waiting += 1
        if waiting == 8:
            together.set()
        await together.wait()
        return await events(request, said("x", "stop"), b"data: [DONE]\n\n", delay=0)

    run = measured(handler, rate=100.0, requests=8, timeout=60.0)
    due = list(itertools.islice(arrivals(100.0, 0), 8))
    assert [answer.arrival for answer in run.answers] == due
    assert all(answer.complete and answer.arrival <= answer.sent for answer in run.answers)
    first = run.answers[0]
    assert first.pieces[0][0] >= due[-1], "answered when the last had arrived"
    assert summary(run)["seconds"]["first_byte"]["max"] >= due[-1] - due[0]


def test_arrivals_end_with_the_seconds() -> None:
    async def handler(request: web.Request) -> web.StreamResponse:
        return web.json_response({"choices": [{"text": "x"}]})

    run = measured(handler, rate=200.0, seconds=0.2, stream=False)
    expected = len(list(itertools.takewhile(lambda at: at < 0.2, arrivals(200.0, 0))))
    found = summary(run)
    assert found["complete"] == found["requests"] == expected
    assert found["seconds"]["first_byte"] is None and found["seconds"]["latency"]["p50"] > 0


def test_failures_are_counted_by_kind() -> None:
    async def handler(request: web.Request) -> web.StreamResponse:
        index = (await request.json())["seed"]
        if index == 0:
            return web.Response(status=429, headers={"Retry-After": "0.01"})
        if index == 1:
            return web.Response(status=500, text="oh")
        if index == 2:
            return await events(request, said("ab"), delay=0)  # and no word of its end
        if index == 3:
            return await events(request, said("ab"), b'data: {"error": {"message": "no"}}\n\n', delay=0)
        if index == 4:
            return web.Response(text="<html>")
        if index == 5:
            assert request.transport is not None
            request.transport.abort()
        if index == 6:
            await asyncio.sleep(10)
        return await events(request, said("whole", "stop"), delay=0)

    run = measured(handler, rate=50.0, requests=8, timeout=3.0)
    expected = {"429", "500", "cut off", "error event", "malformed", "connection", "timeout"}
    found = summary(run)
    assert found["errors"] == dict.fromkeys(expected, 1) and found["retry_after"] == [0.01, 0.01]
    assert (found["complete"], found["bytes"]) == (1, 5)


def test_a_refused_client_waits_as_it_was_asked_to(monkeypatch: pytest.MonkeyPatch) -> None:
    """In a closed loop Retry-After is obeyed; without it a failure is followed by a pause."""
    monkeypatch.setattr(bench, "PAUSE", DELAY)
    refusals: list[dict[str, str]] = [{"Retry-After": str(2 * DELAY)}, {}]

    async def handler(request: web.Request) -> web.StreamResponse:
        if refusals:
            return web.Response(status=429, headers=refusals.pop(0))
        return await events(request, said("x", "stop"), delay=0)

    one, two, three = measured(handler, concurrency=1, requests=3).answers
    assert one.end and two.end
    assert two.sent - one.end >= 2 * DELAY and three.sent - two.end >= DELAY and three.complete


def test_an_unreachable_server_and_a_bad_load_are_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ResourceError, match="cannot be reached"):
        asyncio.run(Run(Load("http://127.0.0.1:1", concurrency=1, requests=1)).measure())
    for wrong in ({"url": "localhost:8000"}, {"rate": 2.0}, {"requests": None}, {"requests": 0}, {"max_tokens": -1}):
        with pytest.raises(UsageError):
            Load(**{"url": "http://a", "concurrency": 1, "requests": 1, **wrong})
    monkeypatch.setitem(__import__("sys").modules, "aiohttp", None)
    with pytest.raises(MissingExtraError, match="aiohttp"):
        asyncio.run(Run(Load("http://127.0.0.1:1", concurrency=1, requests=1)).measure())


def test_addresses() -> None:
    for url in ("http://h:1", "http://h:1/", "http://h:1/v1", "http://h:1/v1/"):
        assert Load(url, concurrency=1, requests=1).endpoint == "http://h:1/v1/completions"
    assert Load("https://h/a", concurrency=1, requests=1, chat=True).endpoint == "https://h/a/v1/chat/completions"


# --- the command ------------------------------------------------------------------------------------------------------


def commanded(handler: Handler, *options: str) -> int:
    """`bytelm bench serve`, beside a server in a thread."""
    found: list[str] = []
    ready, over = threading.Event(), threading.Event()

    async def main() -> None:
        async with serving(handler) as url:
            found.append(url)
            ready.set()
            await asyncio.to_thread(over.wait)

    thread = threading.Thread(target=asyncio.run, args=(main(),))
    thread.start()
    assert ready.wait(60)
    try:
        return command(["bench", "serve", found[0], *options])
    finally:
        over.set()
        thread.join()


def test_the_command_prints_a_table_or_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked: list[str] = []

    async def handler(request: web.Request) -> web.StreamResponse:
        body = await request.json()
        asked.append(body["messages"][0]["content"])
        return await events(request, said("hé", "stop"), USAGE, delay=0)

    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "one"}\n\n{"prompt": "two"}\n')
    given = ["--concurrency", "1", "--requests", "3", "--chat", "--prompts", str(prompts)]
    assert commanded(handler, *given, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["complete"], found["bytes"], found["tokens"]) == (3, 9, 15)
    assert asked == ["one", "two", "one"]
    assert commanded(handler, *given) == 0
    shown = capsys.readouterr().out
    assert "3 complete, no errors" in shown and "time to first byte" in shown


def test_the_command_ends_with_1_if_nothing_is_answered(capsys: pytest.CaptureFixture[str]) -> None:
    async def handler(request: web.Request) -> web.StreamResponse:
        return web.Response(status=429, headers={"Retry-After": "0"})

    assert commanded(handler, "--requests", "3", "--concurrency", "1") == 1
    assert "0 complete, 3 429 (Retry-After 0 to 0 s)" in capsys.readouterr().out


def test_ctrl_c_prints_what_was_measured(capsys: pytest.CaptureFixture[str]) -> None:
    async def handler(request: web.Request) -> web.StreamResponse:
        if (await request.json())["seed"] < 2:
            return await events(request, said("ab", "stop"), delay=0)
        os.kill(os.getpid(), signal.SIGINT)
        await asyncio.sleep(60)
        raise AssertionError

    assert commanded(handler, "--requests", "3", "--concurrency", "1", "--json") == 130
    found = json.loads(capsys.readouterr().out)
    assert (found["complete"], found["unfinished"], found["bytes"]) == (2, 1, 4)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--body", "[1]"], "is not a JSON object"),
        (["--api-key-file", "/nowhere"], "name a file with the API key"),
        (["--prompts", "/nowhere"], "name a file of prompts"),
        (["--rate", "1", "--concurrency", "1"], "exclude each other"),
    ],
)
def test_options_that_cannot_be_used(options: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert command(["bench", "serve", "http://127.0.0.1:1", *options]) in (2, 3)
    assert words in capsys.readouterr().err


# --- benchmarks/serve.py ----------------------------------------------------------------------------------------------

TINY = {
    "tiny": {
        "blt": {"local_dim": 16, "local_heads": 2, "cross_heads": 2, "decoder_layers": 1, "attention_window": 16}
        | {"global_dim": 32, "global_heads": 2, "global_layers": 1, "ngram_rows": 64}
    }
}


@pytest.mark.slow
def test_the_benchmark_of_the_server(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """On a model of no size: every part runs, the bytes are the engine's, and nothing of a client stays."""
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parents[2] / "benchmarks"))
    import serve

    given = ["--parts", "load,overhead", "--bytes", "16", "--seconds", "4", "--rounds", "1", "--json"]
    assert serve.main([*given, "--soak", "5", "--vanish", "20"], TINY) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["load"]["clients_ratio"] > 0 and [row["batch"] for row in found["overhead"]] == [8, 32]
    soak, vanish = found["soak"], found["vanish"]
    assert soak["complete"] > 0 and soak["differ"] == 0 and set(soak["errors"]) <= {"429"}
    for part in (soak, vanish):
        assert part["after"]["sequences"] == 0 and part["after"]["files"] <= part["before"]["files"] + 2
