"""What a server needs of a session: prefixes not read again, scores, ids, rows that fail alone, short steps."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from bytelm.decoding import open_decoder
from bytelm.errors import UsageError
from bytelm.evaluate.bits import logprobs
from bytelm.generate.prompts import generate
from bytelm.generate.request import Chunk, Request, Score
from bytelm.generate.sampling import Sampling
from bytelm.generate.session import Session
from bytelm.generate.speculate import NONE
from bytelm.interfaces.model import ByteModel
from bytelm.testing import tiny_models
from bytelm.units import BOS

# But for models of few positions: TEXT is longer.
CASES = [pytest.param(model, id=name) for name, model in tiny_models() if "learned positions" not in name]
BYTEWISE = [case for case in CASES if case.values[0].tokens is None]
FIRST: ByteModel = CASES[0].values[0]
TEXT = b"the quick brown fox jumps over the lazy dog. " * 9


def finished(session: Session, *requests: Request) -> list[list[Chunk]]:
    """All chunks of each request."""
    tickets = [session.submit(request) for request in requests]
    found: dict[int, list[Chunk]] = {ticket: [] for ticket in tickets}
    while session.rows:
        for chunk in session.step():
            found[chunk.row].append(chunk)
    return [found[ticket] for ticket in tickets]


def data(chunks: list[Chunk]) -> bytes:
    return b"".join(chunk.data for chunk in chunks)


def opened(model: ByteModel, rows: int = 2, **options: Any) -> Session:
    return Session(open_decoder(model, rows=rows, capacity=600), **options)


@pytest.mark.parametrize("model", CASES)
def test_a_prefix_that_a_row_has_read_is_not_read_again_and_changes_nothing(model: ByteModel) -> None:
    session = opened(model, rows=1, drafts=[NONE])  # whose guesses would be read too
    read: list[int] = []
    plain = session.decoder.read
    session.decoder.read = lambda rows, ids, *rest: (read.append(len(ids)), plain(rows, ids, *rest))[1]  # type: ignore[method-assign]
    prompts = [TEXT, TEXT + b"And", TEXT[:350] + b"Otherwise", b"New"]
    for seed, prompt in enumerate(prompts):
        read.clear()
        (chunks,) = finished(session, Request(prompt, 20, Sampling(1.0), seed, eos=False))
        (expected,) = generate(model, [prompt], max_bytes=20, sampling=Sampling(1.0), seed=seed, eos=False)
        assert data(chunks) == expected.data
        if seed in (1, 2) and session.decoder.repeats:
            least = 0 if type(session.decoder).__name__ == "MegabyteDecoder" else 340
            assert sum(read) <= len(prompt) + 21 - least, seed


def test_a_row_that_shares_most_is_chosen_and_else_the_emptiest() -> None:
    session = opened(FIRST, rows=3)
    finished(session, Request(b"abcdef", 1), Request(b"abcxyz", 1))
    slot, reused = session.place(np.array([BOS, *b"abcxy", 1, 2]))
    assert session.decoder.ids[slot, :reused].tolist() == [BOS, *b"abcxy"]
    slot, reused = session.place(np.array([BOS + 1, 3]))
    assert (session.decoder.lengths[slot], reused) == (0, 0)
    # A prompt that was read whole: its last id is read again, as what follows it is asked for.
    assert session.place(np.array([BOS, *b"abcdef"]))[1] == 6


@pytest.mark.parametrize("model", BYTEWISE)
def test_scores_are_the_models_own(model: ByteModel) -> None:
    session = opened(model)
    request = Request(TEXT[:300], 5, Sampling(0.0), eos=False, logprobs=3, score_prompt=True)
    other = Request(b"beside it", 40, Sampling(1.0), eos=False)
    (chunks, _) = finished(session, request, other)
    prompt = [score for chunk in chunks for score in chunk.prompt_scores]
    written = [score for chunk in chunks for score in chunk.scores]
    assert [score.id for score in prompt] == list(TEXT[:300])
    assert [score.id for score in written] == list(data(chunks))
    nats = logprobs(model, b"", TEXT[:300] + data(chunks))
    found = [score.logprob for score in (*prompt, *written)]
    np.testing.assert_allclose(found, nats, atol=2e-4)
    for score in written:  # greedy, EOS left out: the most probable id that is a byte
        best = next(pair for pair in score.top if pair[0] < 256)
        assert best == (score.id, score.logprob)


def test_a_prompt_may_be_scored_without_writing_and_given_as_ids() -> None:
    model: ByteModel = FIRST
    ids = (BOS, *TEXT[:50])
    session = opened(model)
    (scored, bare) = finished(
        session,
        Request(ids, 0, logprobs=0, score_prompt=True),
        Request(ids[1:], 0, logprobs=0, score_prompt=True),
    )
    assert [chunk.reason for chunk in scored][-1] == "length" and data(scored) == b""
    own = [score for chunk in scored for score in chunk.prompt_scores]
    np.testing.assert_allclose([s.logprob for s in own], logprobs(model, b"", TEXT[:50]), atol=2e-4)
    without = [score for chunk in bare for score in chunk.prompt_scores]
    assert len(without) == 49 and without[0].id == TEXT[1]
    for wrong in (256, 259, 260, -1):
        with pytest.raises(UsageError, match=f"{wrong} is not an id of a prompt"):
            Request((BOS, wrong), 1)


def test_scores_stay_with_their_bytes_where_a_stop_sequence_holds_them_back() -> None:
    model: ByteModel = FIRST
    plain = Request(b"a", 30, Sampling(1.0), 3, eos=False, logprobs=0)
    (free,) = finished(opened(model), plain)
    text = data(free)
    stop = text[10:13]
    at = text.index(stop)
    cut = Request(b"a", 30, Sampling(1.0), 3, eos=False, logprobs=0, stop=(stop, text[5:7] + b"never"))
    (chunks,) = finished(opened(model), cut)
    assert data(chunks) == text[:at] and chunks[-1].reason == "stop"
    assert all(len(chunk.scores) == len(chunk.data) for chunk in chunks)
    assert [s.id for chunk in chunks for s in chunk.scores] == list(text[:at])


def test_a_row_that_fails_ends_alone_and_the_others_write_what_they_would_have() -> None:
    model: ByteModel = FIRST
    session = opened(model, rows=4)
    plain, calls = session.decoder.read, 0

    def read(rows: Any, ids: Any, *rest: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls > 8 and 7 in session.decoder.ids[rows[ids == ids], :2]:
            raise RuntimeError("planted")
        return plain(rows, ids, *rest)

    session.decoder.read = read  # type: ignore[method-assign]
    prompts = [b"first", b"\x07 fails", b"third"]
    tickets = [session.submit(Request(p, 40, Sampling(1.0), 5, i, eos=False)) for i, p in enumerate(prompts)]
    found: dict[int, list[Chunk]] = {ticket: [] for ticket in tickets}
    while session.rows:
        try:
            chunks = session.step()
        except RuntimeError:
            chunks = session.recover()
        for chunk in chunks:
            found[chunk.row].append(chunk)
    expected = generate(model, prompts, max_bytes=40, sampling=Sampling(1.0), seed=5, eos=False)
    assert data(found[tickets[0]]) == expected[0].data
    assert data(found[tickets[2]]) == expected[2].data
    failed = found[tickets[1]]
    assert failed[-1].reason == "error" and str(failed[-1].error) == "planted"
    assert expected[1].data.startswith(data(failed)) and data(failed)


def test_a_constraint_that_fails_ends_its_row_alone() -> None:
    class Broken:
        def __init__(self, when: str) -> None:
            self.when = when

        def allowed(self, left: int) -> Any:
            if self.when == "allowed":
                raise ValueError("planted")
            return np.arange(260) < 256

        def extend(self, symbol: int) -> None:
            raise ValueError("planted")

    model: ByteModel = FIRST
    for when in ("allowed", "extend"):
        session = opened(model)
        good = session.submit(Request(b"good", 9, eos=False))
        bad = session.submit(Request(b"bad", 9, constraint=lambda when=when: Broken(when)))
        found: list[Chunk] = []
        while session.rows:
            try:
                found += session.step()
            except ValueError:
                found += session.recover()
        assert [c.reason for c in found if c.row == bad] == ["error"]
        (expected,) = generate(model, [b"good"], max_bytes=9, eos=False)
        assert data([c for c in found if c.row == good]) == expected.data


def test_a_row_that_ends_in_the_step_in_which_another_fails_is_not_lost() -> None:
    class Broken:
        def allowed(self, left: int) -> Any:
            raise ValueError("planted")

        def extend(self, symbol: int) -> None:
            raise NotImplementedError

    session = opened(FIRST)
    ends = session.submit(Request(b"scored", 0, logprobs=0, score_prompt=True))
    fails = session.submit(Request(b"broken", 5, constraint=Broken))
    with pytest.raises(ValueError, match="planted"):
        session.step()
    found = session.recover()
    assert {c.row: c.reason for c in found if c.reason} == {ends: "length", fails: "error"}
    assert [s.id for c in found if c.row == ends for s in c.prompt_scores] == list(b"scored")


def test_steps_beside_writing_rows_read_little_of_a_prompt() -> None:
    model: ByteModel = FIRST
    session = opened(model, rows=4, prefill=16)
    sizes: list[int] = []
    plain = session.decoder.read
    session.decoder.read = lambda rows, ids, *rest: (sizes.append(len(ids)), plain(rows, ids, *rest))[1]  # type: ignore[method-assign]
    first = session.submit(Request(b"a", 60, eos=False))
    found = session.step()
    later = [session.submit(Request(TEXT[:100], 5, eos=False)) for _ in range(2)]
    while session.rows:
        found += session.step()
    assert max(sizes[1:]) <= 16 + 3
    (alone,) = generate(model, [b"a"], max_bytes=60, eos=False)
    assert data([c for c in found if c.row == first]) == alone.data
    order = [c.row for c in found if c.row in later]
    assert order[0] == later[0] and set(order) == set(later)


def test_score_is_of_the_model_and_not_of_the_sampling() -> None:
    model: ByteModel = FIRST
    cold, hot = (
        finished(opened(model), Request(b"a", 1, Sampling(t, top_k=1), eos=False, logprobs=2))[0] for t in (0.1, 5.0)
    )
    assert cold[0].scores == hot[0].scores and isinstance(cold[0].scores[0], Score)
