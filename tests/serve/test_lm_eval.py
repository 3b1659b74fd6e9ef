"""lm-eval's `local-completions` against the server: sums over the right bytes, windows, stops, every tokenizer."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bytelm.decoding import open_decoder
from bytelm.generate.sampling import logprobs
from bytelm.lm import LM, load
from bytelm.units import BOS
from serving import RUN, Live, live

pytestmark = pytest.mark.slow  # lm-eval takes seconds to be imported, in a process of its own

PAIRS = [("The quick", " brown fox"), ("é", "à\x00字"), ("", "from nothing"), ("a line\n\n", "A")]
LITERAL = [*PAIRS[:3], ("<bos>", "<eos>"), ("1 <bos>", " + 1")]
TEXT = "Twenty bytes, a text"
WINDOW = 8

PROGRAM = """
import json, sys, warnings
warnings.simplefilter("ignore")
from bytelm import hf
from lm_eval.api.instance import Instance
from lm_eval.models.openai_completions import LocalCompletionsAPI

found = {}
for name, kind, given, options in json.load(sys.stdin):
    requests = [Instance(kind, {}, tuple(one), index) for index, one in enumerate(given)]
    found[name] = getattr(LocalCompletionsAPI(**options), kind)(requests)
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def server() -> Iterator[Live]:
    with live() as found:
        yield found


@pytest.fixture(scope="module")
def lm() -> LM:
    return load(RUN)


@pytest.fixture(scope="module")
def folder(lm: LM, tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tmp_path_factory.mktemp("saved") / "model"
    lm.save_pretrained(found)
    return found


@pytest.fixture(scope="module")
def free(server: Live) -> str:
    """What the model writes greedily."""
    return server.complete(prompt=[[*b"The quick"]], max_tokens=30, temperature=0)["choices"][0]["text"]


@pytest.fixture(scope="module")
def stop(free: str) -> str:
    return next(char for char in free[3:] if char.isascii())


@pytest.fixture(scope="module")
def found(server: Live, folder: Path, free: str, stop: str) -> dict[str, Any]:
    """What the harness's model answers to each case, in a process of its own."""
    remote = {"tokenizer_backend": "remote"}
    ours = {"tokenizer_backend": "huggingface", "tokenizer": str(folder), "add_bos_token": True}
    windows = {**remote, "max_length": WINDOW + 1}
    text = free[:3]
    greedy = [("The quick", text), ("The quick", text[:-1] + chr(ord(text[-1]) ^ 1))]
    until = [("The quick", {"until": until, "max_gen_toks": 30, "do_sample": False}) for until in ([], [stop, "\n\n"])]
    cases: list[tuple[str, str, list[Any], dict[str, Any]]] = [
        ("pairs", "loglikelihood", PAIRS, {}),
        ("pairs in batches", "loglikelihood", PAIRS, {**remote, "batch_size": 3}),
        ("pairs at once", "loglikelihood", PAIRS, {**remote, "num_concurrent": 3}),
        ("pairs after BOS", "loglikelihood", LITERAL, ours),
        ("pairs as text", "loglikelihood", PAIRS[:3], {**remote, "tokenized_requests": False}),
        ("greedy", "loglikelihood", greedy, remote),
        ("windows", "loglikelihood_rolling", [(TEXT,)], windows),
        ("windows in batches", "loglikelihood_rolling", [(TEXT,)], {**windows, "batch_size": 2}),
        ("until", "generate_until", until, remote),
        ("until at once", "generate_until", until, {**remote, "num_concurrent": 2}),
    ]
    plain = {"base_url": f"{server.url}/v1/completions", "model": RUN.name, "max_length": 4096}
    asked = json.dumps([(name, kind, given, {**plain, **options}) for name, kind, given, options in cases])
    command = [sys.executable, "-c", PROGRAM]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        command, input=asked, capture_output=True, text=True, timeout=240, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def nats(lm: LM, context: list[int], continuation: list[int]) -> float:
    """The log-likelihood of ids after exactly these ids."""
    ids = np.array(context + continuation)
    logits = open_decoder(lm.model, rows=1, capacity=len(ids)).read(np.zeros(len(ids), np.int64), ids)
    return float(logprobs(logits)[np.arange(len(context) - 1, len(ids) - 1), ids[len(context) :]].sum())


def split(context: str, continuation: str) -> tuple[list[int], list[int]]:
    """As the harness has it: white space at the end of a context belongs to the continuation."""
    kept = context.rstrip()
    return [*kept.encode()], [*(context[len(kept) :] + continuation).encode()]


@pytest.mark.parametrize("case", ["pairs", "pairs in batches", "pairs at once"])
def test_a_continuation_costs_what_its_bytes_cost(found: dict[str, Any], lm: LM, case: str) -> None:
    """By ids of the server's tokenizer, which the harness finds by itself; a context has no BOS then."""
    for (context, continuation), (total, _) in zip(PAIRS, found[case], strict=True):
        before, after = split(context, continuation)
        assert total == pytest.approx(nats(lm, before or [BOS], after), rel=1e-4)


def test_greedy_is_what_the_server_would_write(found: dict[str, Any], free: str) -> None:
    assert free[:3].isascii()
    assert [greedy for _, greedy in found["greedy"]] == [True, False]


@pytest.mark.parametrize("case", ["windows", "windows in batches"])
def test_windows_are_scored_as_they_are_given(found: dict[str, Any], lm: LM, case: str) -> None:
    """Lists of ids, of which only the first begins with BOS: the server adds none."""
    ids, wanted = [BOS, *TEXT.encode()], 0.0
    for begin in range(1, len(ids), WINDOW - 1):
        end = min(begin + WINDOW - 1, len(ids))
        wanted += nats(lm, ids[max(0, end - WINDOW) : begin], ids[begin:end])
    assert found[case] == [pytest.approx(wanted, rel=1e-4)]


@pytest.mark.parametrize("case", ["until", "until at once"])
def test_text_is_cut_at_stops(found: dict[str, Any], free: str, stop: str, case: str) -> None:
    assert found[case] == [free, free.partition(stop)[0]]


def test_our_tokenizer_puts_bos_in_front(found: dict[str, Any], lm: LM) -> None:
    """And no text is read as a special id: the figures are those of our own model of the harness."""
    for (context, continuation), (total, _) in zip(LITERAL, found["pairs after BOS"], strict=True):
        wanted = lm.logprobs(context.encode(), continuation.encode()).sum()
        assert total == pytest.approx(float(wanted), rel=1e-4)


def test_texts_instead_of_ids(found: dict[str, Any], lm: LM) -> None:
    """The server puts BOS in front of a text. After no context the harness takes the first byte for the BOS it sent."""
    first, second, nothing = (total for total, _ in found["pairs as text"])
    wanted = [float(lm.logprobs(context.encode(), text.encode()).sum()) for context, text in PAIRS[:2]]
    assert [first, second] == pytest.approx(wanted, rel=1e-4)
    assert nothing == pytest.approx(float(lm.logprobs(b"", PAIRS[2][1].encode())[1:].sum()), rel=1e-4)
