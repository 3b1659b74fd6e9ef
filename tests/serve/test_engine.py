"""The engine through HTTP: equal bytes in any company, fairness, full queues, disconnects, failing steps, reloads."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import shutil
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from bytelm.lm import load
from bytelm.serve import logs
from bytelm.serve.queue import FairQueue, FullError
from bytelm.serve.reload import Reloader, loaded
from bytelm.serve.served import Checkpoint
from serving import RUN, Live, events, live, served


@pytest.fixture(scope="module")
def server() -> Iterator[Live]:
    with live() as found:
        yield found


def slow(found: Live, seconds: float = 0.01) -> None:
    """Let each step of the batch take a while."""
    decoder = found.served.session.decoder
    plain = decoder.read
    decoder.read = lambda *given: (time.sleep(seconds), plain(*given))[1]  # type: ignore[method-assign]


def given(choice: dict[str, Any]) -> bytes:
    return base64.b64decode(choice["bytes_b64"])


def test_the_bytes_of_a_request_do_not_depend_on_its_company(server: Live) -> None:
    lm = load(RUN)
    prompts = [np.random.default_rng(seed).bytes(5 + 20 * seed) for seed in range(32)]

    def ask(seed: int) -> bytes:
        options: dict[str, Any] = {"temperature": 0.9, "top_p": 0.95, "seed": seed, "max_tokens": 60 + seed}
        body = {"prompt_b64": base64.b64encode(prompts[seed]).decode(), **options}
        if seed % 2:
            return given(server.complete(**body)["choices"][0])
        with httpx.stream("POST", server.url + "/v1/completions", json={**body, "stream": True}, timeout=60) as answer:
            return b"".join(given(choice) for event in events(answer.iter_lines()) for choice in event["choices"])

    with ThreadPoolExecutor(32) as pool:
        found = list(pool.map(ask, range(32)))
    for seed, prompt in enumerate(prompts):
        alone = lm.generate(prompt, temperature=0.9, top_p=0.95, seed=seed, max_bytes=60 + seed)
        assert found[seed] == alone, seed
    both = server.complete(prompt=["one", "two"], seed=9, temperature=0.8, max_tokens=20)["choices"]
    assert [given(choice) for choice in both] == lm.generate([b"one", b"two"], seed=9, max_bytes=20)
    several = server.complete(prompt="one", n=3, seed=9, temperature=0.8, max_tokens=20)["choices"]
    assert [given(choice) for choice in several] == lm.generate([b"one"] * 3, seed=9, max_bytes=20)


def test_a_prompt_that_comes_again_is_not_read_again(server: Live) -> None:
    prompt = "The same beginning, at some length. " * 5
    first = server.complete(prompt=prompt, seed=1, max_tokens=20)
    before = server.metric("reused_prefix_bytes_total", model=RUN.name)
    again = server.complete(prompt=prompt, seed=1, max_tokens=20)
    assert first["choices"] == again["choices"]
    assert again["usage"]["prompt_tokens_details"]["cached_tokens"] == len(prompt)  # BOS, and all but the last byte
    assert server.metric("reused_prefix_bytes_total", model=RUN.name) - before == len(prompt)


@pytest.mark.fault("S3")
def test_a_full_queue_answers_at_once_with_the_time_to_come_again() -> None:
    with live(served(rows=1, queue=2)) as found:
        slow(found)
        with ThreadPoolExecutor(12) as pool:
            answers = list(
                pool.map(lambda _: found.post("/v1/completions", prompt="a", max_tokens=30, ignore_eos=True), range(12))
            )
        codes = [answer.status_code for answer in answers]
        assert set(codes) == {200, 429} and codes.count(200) <= 12
        refused = next(answer for answer in answers if answer.status_code == 429)
        assert int(refused.headers["retry-after"]) >= 1 and refused.json()["error"]["type"] == "rate_limit_error"
        assert found.metric("refused_total", model=RUN.name) == codes.count(429)
        assert found.post("/v1/completions", prompt=["a"] * 3).status_code == 422  # would never fit
        assert found.idle()


def test_the_queue_is_fair_between_clients() -> None:
    queue: FairQueue[str] = FairQueue(8)
    queue.put("many", ["m1", "m2", "m3", "m4"])
    assert queue.take() == ("many", "m1")
    queue.put("few", ["f1", "f2"])
    queue.put("late", ["l1"])
    assert [queue.take()[1] for _ in range(3)] == ["f1", "l1", "m2"]
    queue.done("few")
    assert queue.take()[1] == "f2"
    with pytest.raises(FullError):
        queue.put("many", ["x"] * 7)
    assert len(queue) == 2 and queue.remove("many", "m3") and not queue.remove("many", "m3")
    assert queue.take()[1] == "m4"
    with pytest.raises(IndexError):
        queue.take()
    for name in ("many", "many", "many", "few", "late"):
        queue.done(name)
    assert not queue.running and not queue.waiting and not queue.served


@pytest.mark.fault("S4")
@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_frees_its_row_within_a_step(stream: bool) -> None:
    with live(served(rows=2)) as found:
        slow(found, 0.02)
        body = {"prompt": "a", "max_tokens": 3000, "ignore_eos": True, "stream": stream, "n": 2}
        url = found.url + "/v1/completions"
        with pytest.raises(httpx.ReadTimeout), httpx.stream("POST", url, json=body, timeout=0.6) as answer:
            for _ in answer.iter_lines():
                raise httpx.ReadTimeout("enough")
        assert found.idle()
        assert found.metric("sequences_total", model=RUN.name, reason="cancelled") == 2
        assert found.metric("generated_bytes_total", model=RUN.name) < 400
        assert found.complete(prompt="a", max_tokens=2)["choices"]  # and the row serves the next


def test_a_client_that_leaves_the_queue_is_never_admitted() -> None:
    with live(served(rows=1)) as found:
        slow(found)
        with ThreadPoolExecutor(1) as pool:
            first = pool.submit(found.complete, prompt="a", max_tokens=60, ignore_eos=True)
            while not found.served.running:
                time.sleep(0.005)
            with pytest.raises(httpx.ReadTimeout):
                httpx.post(found.url + "/v1/completions", json={"prompt": "left", "max_tokens": 9}, timeout=0.1)
            first.result()
        assert found.idle() and found.metric("sequences_total", model=RUN.name, reason="cancelled") == 1
        assert found.metric("queue_seconds_count", model=RUN.name) == 1


@pytest.mark.fault("S6")
def test_an_exception_inside_a_step_ends_that_request_alone(caplog: pytest.LogCaptureFixture) -> None:
    with live() as found:
        decoder = found.served.session.decoder
        plain = decoder.read

        def read(rows: Any, ids: Any, *rest: Any) -> Any:
            if any(decoder.ids[row, 1] == 7 for row in set(rows.tolist()) if decoder.lengths[row] > 12):
                raise RuntimeError("planted")
            return plain(rows, ids, *rest)

        decoder.read = read  # type: ignore[method-assign]
        prompts = ["good", "\x07 this fails", "also good"]
        with ThreadPoolExecutor(3) as pool:
            answers = list(
                pool.map(
                    lambda prompt: found.post(
                        "/v1/completions", prompt=prompt, seed=1, temperature=0.8, max_tokens=80, ignore_eos=True
                    ),
                    prompts,
                )
            )
        assert [answer.status_code for answer in answers] == [200, 500, 200]
        assert "RuntimeError" in answers[1].json()["error"]["message"] and "planted" not in answers[1].text
        for prompt, answer in zip(prompts, answers, strict=True):
            if answer.status_code == 200:
                alone = load(RUN).generate(prompt.encode(), seed=1, max_bytes=80, eos=False)
                assert given(answer.json()["choices"][0]) == alone
        assert found.idle() and httpx.get(found.url + "/health").status_code == 200
        assert found.metric("step_failures_total", model=RUN.name) == 1
        assert any("step failed" in record.message for record in caplog.records)
        (told,) = (record for record in caplog.records if record.message == "sequence failed")
        line = json.loads(logs.Lines().format(told))
        assert line["error"] == "RuntimeError" and line["index"] == 0 and "id" in line


@pytest.mark.fault("S6")
def test_a_batch_that_cannot_go_on_is_opened_again_or_health_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    with live() as found:
        model = found.served

        def lost(*_: Any) -> None:
            raise RuntimeError("planted")

        first = model.session
        first.decoder.read = first.recover = lost  # type: ignore[method-assign]
        assert found.post("/v1/completions", prompt="a").status_code == 500
        assert found.complete(prompt="a", max_tokens=3)["choices"] and model.session is not first
        monkeypatch.setattr(model, "opened", lost)
        model.session.decoder.read = model.session.recover = lost  # type: ignore[method-assign]
        assert found.post("/v1/completions", prompt="b").status_code == 500
        assert httpx.get(found.url + "/health").status_code == 503
        assert found.post("/v1/completions", prompt="b").status_code == 503


@pytest.mark.fault("S6")
def test_an_error_of_the_engine_ends_every_answer_and_health_says_so() -> None:
    with live() as found:

        def lost(*_: Any) -> None:
            raise KeyError("planted")

        found.service.engine.taken = lost  # type: ignore[method-assign]
        assert found.post("/v1/completions", prompt="a").status_code == 503
        assert httpx.get(found.url + "/health").status_code == 503
        assert found.post("/v1/completions", prompt="b").status_code == 503
        assert found.post("/v1/patches", prompt="b").status_code == 503


@pytest.mark.fault("S5")
def test_a_draining_service_finishes_what_runs_and_takes_nothing_new() -> None:
    with live() as found:
        slow(found)
        with ThreadPoolExecutor(1) as pool:
            first = pool.submit(found.complete, prompt="a", max_tokens=40, ignore_eos=True)
            while not found.served.running:
                time.sleep(0.005)
            assert httpx.get(found.url + "/ready").status_code == 200
            found.service.drain()
            assert httpx.get(found.url + "/ready").status_code == 503
            assert found.post("/v1/completions", prompt="b").status_code == 503
            assert len(given(first.result()["choices"][0])) == 40
        assert found.service.active() == 0


def test_streams_that_are_cut_end_with_an_error() -> None:
    with live() as found:
        slow(found)
        body = {"prompt": "a", "max_tokens": 3000, "ignore_eos": True, "stream": True}
        with httpx.stream("POST", found.url + "/v1/completions", json=body, timeout=60) as answer:
            lines = events(answer.iter_lines())
            next(lines)
            loop = found.service.engine.loop
            assert loop is not None
            loop.call_soon_threadsafe(found.service.cut)
            *_, last = lines
        assert "shutting down" in last["error"]["message"]
        assert found.idle()


@pytest.mark.fault("S9")
def test_a_newer_checkpoint_is_taken_over_and_running_requests_go_on_with_theirs(tmp_path: Path) -> None:
    run = tmp_path / RUN.name
    shutil.copytree(RUN, run)
    other = load(run)
    for parameter in other.model.parameters():
        parameter.data.mul_(0.9)
    with live(served(run)) as found:
        slow(found)
        newer = Checkpoint(other, run / "newer", 9)
        body: dict[str, Any] = {"prompt": "a", "max_tokens": 60, "ignore_eos": True, "temperature": 0.8, "seed": 4}
        with ThreadPoolExecutor(1) as pool:
            first = pool.submit(found.complete, **body)
            while not found.served.running:
                time.sleep(0.005)
            engine = found.service.engine
            assert engine.loop is not None
            swap = engine.run(lambda: engine.replace(found.served, newer))
            asyncio.run_coroutine_threadsafe(swap, engine.loop).result(30)
            second = found.complete(**body)
            assert given(first.result()["choices"][0]) == load(run).generate(b"a", max_bytes=60, eos=False, seed=4)
        assert given(second["choices"][0]) == other.generate(b"a", max_bytes=60, eos=False, seed=4)
        assert second["system_fingerprint"] == "step-9" and found.idle() and not found.served.retired


@pytest.mark.fault("S9")
def test_a_damaged_newer_checkpoint_is_refused_and_the_old_one_goes_on(tmp_path: Path) -> None:
    run = tmp_path / RUN.name
    shutil.copytree(RUN, run)
    with live(served(run)) as found:
        reloader = Reloader(found.service, found.served, run, loaded)
        engine = found.service.engine

        def look() -> bool:
            assert engine.loop is not None
            return asyncio.run_coroutine_threadsafe(reloader.look(), engine.loop).result(60)

        assert look()  # `served` has named the run as its checkpoint
        assert not look()
        newest = next((run / "checkpoints").glob("step-*"))
        newer = newest.with_name("step-00000004")
        shutil.copytree(newest, newer)
        tensors = newer / "model.safetensors"
        data = bytearray(tensors.read_bytes())
        data[-1] ^= 1
        tensors.write_bytes(data)
        assert not look() and not look()
        assert found.metric("reloads_total", model=RUN.name, outcome="refused") == 1
        assert found.metric("reloads_total", model=RUN.name, outcome="taken") == 1
        assert found.complete(prompt="a", max_tokens=3)["choices"]


def test_nothing_is_left_behind(server: Live) -> None:
    """Threads, answers and rows after many short requests, some of which are given up."""
    assert server.idle()
    threads = len(lasting())
    with ThreadPoolExecutor(16) as pool:

        def ask(index: int) -> None:
            timeout = 0.02 if index % 3 == 0 else 60
            with contextlib.suppress(httpx.TimeoutException):
                httpx.post(server.url + "/v1/completions", json={"prompt": "x" * index, "seed": 1}, timeout=timeout)

        list(pool.map(ask, range(90)))
    assert server.idle() and not server.service.engine.answers and not server.served.running
    assert len(lasting()) <= threads + 2, lasting()


def lasting() -> list[str]:
    """Threads, but for those of the event loop's pool: it is filled as it is used, up to a bound of asyncio's."""
    return [thread.name for thread in threading.enumerate() if not thread.name.startswith(("uvloop_", "asyncio_"))]
