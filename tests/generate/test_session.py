"""Generation from small models whose every answer is known: a Markov chain, a script, and plain chance."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from bytelm.decoding import Decoder, open_decoder, why_plain
from bytelm.decoding.plain import PlainDecoder
from bytelm.errors import UsageError
from bytelm.generate import prompts, speculate
from bytelm.generate.prompts import generate, pieces, stream
from bytelm.generate.request import Chunk, Generation, Request
from bytelm.generate.sampling import Sampling
from bytelm.generate.session import Session
from bytelm.generate.speculate import LOCAL, MEMORY, NONE, SLOW, Draft, Speculation, drafts_of
from bytelm.generate.stop import release
from bytelm.generate.utf8 import decode
from bytelm.interfaces.model import ByteModel
from bytelm.native.online import kernel
from bytelm.online.memory import Memory
from bytelm.online.settings import Settings
from bytelm.testing import tiny_models
from bytelm.units import BOS, BYTES, EOS, PAD, RESERVED, VOCAB

GREEDY = Sampling(temperature=0.0)


@dataclass(frozen=True)
class History:
    """The newest ids of each row, and how many were read."""

    newest: Tensor
    count: Tensor


class Fake(ByteModel):
    """Keeps the last three ids and the count; `answer` gives the logits. Writes down the shapes it was called with."""

    def __init__(self) -> None:
        super().__init__()
        self.anchor = nn.Parameter(torch.zeros(1))
        self.shapes: list[tuple[int, int]] = []

    def init_weights(self, seed: int) -> None:
        """There is nothing to set."""

    def flops(self, ids: int, patches: int) -> int:
        return 0

    def initial_state(self, batch: int) -> History:
        return History(torch.full((batch, 3), PAD), torch.zeros(batch, dtype=torch.int64))

    def forward(self, ids: Tensor, state: Any = None, boundaries: Tensor | None = None) -> tuple[Tensor, History]:
        assert torch.is_inference_mode_enabled()
        self.shapes.append((ids.shape[0], ids.shape[1]))
        newest, count, logits = state.newest, state.count, list[Tensor]()
        for column in ids.unbind(1):
            real = column != PAD
            newest = torch.where(real[:, None], torch.cat([newest[:, 1:], column[:, None]], 1), newest)
            count = count + real
            logits.append(torch.where(real[:, None], self.answer(newest, count), torch.nan))
        return torch.stack(logits, 1), History(newest, count)

    def answer(self, newest: Tensor, count: Tensor) -> Tensor:
        """The logits [batch, vocab] of the next byte: here, all ids are equally likely."""
        return torch.zeros(len(count), VOCAB)


class Markov(Fake):
    """The next byte hangs on the last three ids and on the count."""

    def __init__(self) -> None:
        super().__init__()
        self.table = torch.randn(4, VOCAB, VOCAB, generator=torch.Generator().manual_seed(0))
        self.table[:, :, EOS] += 0.7

    def answer(self, newest: Tensor, count: Tensor) -> Tensor:
        return sum((self.table[i, newest[:, i]] for i in range(3)), self.table[3, count % VOCAB])


class Script(Fake):
    """Writes script r after the prompt bytes([r]), whatever it reads then, and EOS after its end."""

    def __init__(self, *scripts: bytes) -> None:
        super().__init__()
        self.scripts = scripts

    def initial_state(self, batch: int) -> History:
        return History(torch.full((batch, 1024), PAD), torch.zeros(batch, dtype=torch.int64))

    def answer(self, newest: Tensor, count: Tensor) -> Tensor:
        logits = torch.zeros(len(count), VOCAB)
        for row, read in enumerate(map(int, count)):
            if read >= 2:
                script = self.scripts[int(newest[row, 1 - read])]
                logits[row, script[read - 2] if read - 2 < len(script) else EOS] = 50
        return logits


def script(*scripts: bytes, **options: Any) -> list[Generation]:
    """What is generated from a model that writes these bytes."""
    return generate(Script(*scripts), [bytes([row]) for row in range(len(scripts))], sampling=GREEDY, **options)


PROMPTS = [b"", b"abc", b"\x00" * 9, b"a longer one, read in several chunks", b"\xff"]


@pytest.mark.fault("M3")
@pytest.mark.parametrize("options", [{}, {"stop": [b"e", b"th", b"\xc3\xa9"]}, {"utf8": True}])
@pytest.mark.parametrize("sampling", [GREEDY, Sampling(), Sampling(top_k=5)])
def test_a_row_is_the_same_in_any_company(
    sampling: Sampling, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = Markov()
    together = generate(model, PROMPTS, max_bytes=40, sampling=sampling, seed=3, **options)
    assert len({len(g.data) for g in together}) > 2
    monkeypatch.setattr(PlainDecoder, "chunk", 4)
    for row, prompt in enumerate(PROMPTS):
        others = [b"x" * i for i in range(row)]
        company = generate(model, [*others, prompt], max_bytes=40, sampling=sampling, seed=3, **options)
        assert company[row] == together[row]


def test_the_first_row_is_a_single_prompt_and_its_stream() -> None:
    for seed in range(5):
        single = generate(Markov(), [b"abc"], max_bytes=40, seed=seed)[0]
        assert generate(Markov(), [b"abc", b"", b"zz"], max_bytes=40, seed=seed)[0] == single
        assert b"".join(stream(Markov(), b"abc", max_bytes=40, seed=seed)) == single.data


def test_a_seed_is_reproducible_and_seeds_and_rows_differ() -> None:
    first = generate(Fake(), [b""] * 4, max_bytes=20, seed=1)
    assert generate(Fake(), [b""] * 4, max_bytes=20, seed=1) == first
    assert len({g.data for g in [*first, *generate(Fake(), [b""] * 4, max_bytes=20, seed=2)]}) == 8


def test_every_byte_value_is_written_and_read_as_it_is() -> None:
    data = bytes(range(BYTES)) + b"\x00\xff\x00"
    assert script(data, max_bytes=300) == [Generation(b"\x00", data, "eos")]
    shown = list(stream(Script(data), b"\x00", sampling=GREEDY, max_bytes=300))
    assert shown == [bytes([byte]) for byte in data]


def test_only_bytes_and_eos_are_generated() -> None:
    class Special(Fake):
        def answer(self, newest: Tensor, count: Tensor) -> Tensor:
            logits = super().answer(newest, count)
            logits[:, [PAD, BOS, RESERVED]] = 50
            return logits

    for sampling in (GREEDY, Sampling()):
        data = generate(Special(), [b"ab"], max_bytes=50, sampling=sampling)[0].data
        assert len(data) > 10


def test_how_rows_end() -> None:
    ended = script(b"abc", b"abcdefgh", b"xyz--", b"", max_bytes=5, stop=[b"--"])
    assert [(g.data, g.reason) for g in ended] == [
        (b"abc", "eos"),
        (b"abcde", "length"),
        (b"xyz", "stop"),
        (b"", "eos"),
    ]


def test_finished_rows_cost_nothing() -> None:
    model = Script(b"", b"abc", b"a", b"abcdefgh")
    generate(model, [bytes([row]) for row in range(4)], sampling=GREEDY, max_bytes=6)
    # BOS and the prompts, and then each byte that is followed by another draw; the last byte is never read.
    assert model.shapes == [(4, 2), (3, 1), (2, 1), (2, 1), (1, 1), (1, 1)]


def test_long_prompts_are_read_in_chunks() -> None:
    model = Fake()
    generate(model, [bytes(2500), b"ab"], sampling=GREEDY, max_bytes=1)
    assert model.shapes == [(2, 1024), (1, 1024), (1, 453)]


def test_nothing_to_do_reads_nothing() -> None:
    model = Fake()
    assert generate(model, [b"a", b""], max_bytes=0) == [
        Generation(b"a", b"", "length"),
        Generation(b"", b"", "length"),
    ]
    assert generate(model, []) == []
    assert list(stream(model, b"a", max_bytes=0)) == []
    assert model.shapes == []


@pytest.mark.parametrize(
    ("text", "stop", "shown", "reason"),
    [
        (b"aaab!", [b"aab"], [b"a"], "stop"),
        (b"aaaab!", [b"aab"], [b"a", b"a"], "stop"),
        (b"abac!", [b"abad"], [b"abac", b"!"], "eos"),
        (b"ab", [b"abc"], [b"ab"], "eos"),
        (b"xababc", [b"abc"], [b"x", b"ab"], "stop"),
        (b"abcd", [b"abcd", b"bc"], [b"a"], "stop"),
        (b"xyz", [b"z", b"yz"], [b"x"], "stop"),
        (b"\x00\xff\x00", [b"\xff\x00"], [b"\x00"], "stop"),
    ],
)
def test_stop_sequences(text: bytes, stop: list[bytes], shown: list[bytes], reason: str) -> None:
    assert list(stream(Script(text), b"\x00", sampling=GREEDY, stop=stop)) == shown
    assert [(g.data, g.reason) for g in script(text, stop=stop)] == [(b"".join(shown), reason)]


def test_bytes_held_back_are_given_out_at_the_limit() -> None:
    assert list(pieces(Script(b"xabc"), [b"\x00"], sampling=GREEDY, stop=[b"abc"], max_bytes=3)) == [
        Chunk(0, b"x", None),
        Chunk(0, b"ab", "length"),
    ]


def test_a_stop_sequence_in_the_prompt_does_not_count() -> None:
    assert generate(Script(b"bx"), [b"\x00"], stop=[b"\x00b"], sampling=GREEDY)[0].data == b"bx"


def first_stop(text: bytes, stop: Sequence[bytes]) -> bytes:
    """The text before the stop sequence that is complete first."""
    for end in range(len(text) + 1):
        starts = [end - len(s) for s in stop if text[:end].endswith(s)]
        if starts:
            return text[: min(starts)]
    return text


small = st.lists(st.sampled_from([b"a", b"b"]), min_size=1, max_size=4).map(b"".join)


@given(text=st.lists(st.sampled_from([b"a", b"b"]), max_size=12).map(b"".join), stop=st.lists(small, max_size=3))
def test_bytes_are_released_as_soon_as_they_are_decided(text: bytes, stop: list[bytes]) -> None:
    out, held = b"", b""
    for read, byte in enumerate(text, start=1):
        decided, rest = release(held + bytes([byte]), stop)
        out += decided
        if rest is None:
            held = b""
            break
        held = rest
        assert out + held == text[:read]
        assert not held or any(s.startswith(held) and s != held for s in stop)
    assert out + held == first_stop(text, stop)


def test_wrong_options_are_named_before_the_first_byte() -> None:
    with pytest.raises(UsageError, match="max_bytes -1"):
        pieces(Fake(), [b""], max_bytes=-1)
    with pytest.raises(UsageError, match="stop sequence is empty"):
        stream(Fake(), b"", stop=[b"a", b""])
    with pytest.raises(UsageError, match=r"b'\\xa9' is not UTF-8"):
        generate(Fake(), [b""], stop=[b"\xa9"], utf8=True)


def test_the_caller_of_a_stream_is_not_in_inference_mode() -> None:
    for _ in itertools.islice(stream(Fake(), b"a"), 3):
        assert not torch.is_inference_mode_enabled()


OPEN = {b"": 0, b"a": 0, b"\xff": 0, b"\xc3": 1, b"\xe2": 2, b"ab\xe0\xa0": 1, b"\xf0\x90": 2, b"\xf4": 3, b"\xed": 2}


@given(seed=st.integers(0, 2**64), prompts=st.lists(st.sampled_from(list(OPEN))), max_bytes=st.integers(0, 12))
def test_utf8_is_valid_whatever_the_model_says(seed: int, prompts: list[bytes], max_bytes: int) -> None:
    for made in generate(Fake(), prompts, max_bytes=max_bytes, seed=seed, utf8=True):
        if OPEN[made.prompt] > max_bytes:
            assert (made.data, made.reason) == (b"", "length")
        else:
            begun = made.prompt[made.prompt.rfind(b"b") + 1 :] if OPEN[made.prompt] else b""
            (begun + made.data).decode()
            assert made.reason == "eos" or len(made.data) == max_bytes


def test_utf8_writes_characters_of_every_length_and_streams_them_whole() -> None:
    class Opening(Fake):
        def answer(self, newest: Tensor, count: Tensor) -> Tensor:
            logits = super().answer(newest, count)
            logits[:, EOS] = -50
            logits[:, 0xC0:BYTES] = 1
            return logits

    made = list(stream(Opening(), b"", max_bytes=300, utf8=True))
    assert len(b"".join(made)) == 300
    text = "".join(decode(made))
    assert "\ufffd" not in text
    assert {len(character.encode()) for character in text} == {1, 2, 3, 4}


def test_utf8_rows_that_cannot_begin_leave_the_others_as_they_are() -> None:
    first = generate(Fake(), [b"\xf4", *[b"a"] * 6], max_bytes=2, utf8=True)
    assert first[0] == Generation(b"\xf4", b"", "length")
    assert first[1:] == generate(Fake(), [b"", *[b"a"] * 6], max_bytes=2, utf8=True)[1:]


# --- rows that come and go, and drafts --------------------------------------------------------------------------------

TINY = {name.split(" on ")[0]: model for name, model in reversed(dict(tiny_models()).items())}
TINY.pop("megabyte (projected, learned positions)")  # no document of it is longer than 256 ids
# Of the models that their forward pass reads, which cannot draft, the linear Transformer is enough.
TINY = {name: model for name, model in TINY.items() if not name.startswith("megabyte_pytorch")}


def local(*lengths: int) -> tuple[Draft, ...]:
    return tuple(Draft("local", length) if length else NONE for length in lengths)


def written(model: ByteModel, sampling: Sampling, drafts: Sequence[Draft], **options: Any) -> list[bytes]:
    """What three rows write with such drafts; also that drafts were made if they could be."""
    requests = [Request(prompt, sampling=sampling, seed=7, row=row, **options) for row, prompt in enumerate(PROMPTS)]
    decoder = open_decoder(model, rows=len(PROMPTS), capacity=3000)
    at_work = Session(decoder, drafts if decoder.drafts else [NONE])
    found = {at_work.submit(request): b"" for request in requests}
    while at_work.rows:
        for piece in at_work.step():
            found[piece.row] += piece.data
    assert (at_work.speculation.drafted > 0) == (decoder.drafts and drafts != (NONE,))
    return list(found.values())


# Guesses are verified in one way for all models: sampled ones of each kind of decoder are enough for a day.
SAMPLED = ("blt (last layer crossed)", "hnet (one stage)", "megabyte (three stages)", "transformer (full)")
DRAFTED = [(name, GREEDY) for name in TINY] + [
    pytest.param(name, drawn, marks=() if name in SAMPLED and drawn.top_p else pytest.mark.slow)
    for name, drawn in itertools.product(TINY, (Sampling(1.0), Sampling(1.5, top_p=0.9)))
]


@pytest.mark.fault("M2")
@pytest.mark.parametrize(("name", "sampling"), DRAFTED)
def test_drafts_change_nothing(name: str, sampling: Sampling, monkeypatch: pytest.MonkeyPatch) -> None:
    model = TINY[name]
    # Fewer where each byte is a forward pass over all before it, which is what a model without drafts is read by.
    options = {"max_bytes": 40 if why_plain(model) else 150, "stop": [b"\x11\x12", b"aa"]}
    plain = written(model, sampling, local(0), **options)
    assert plain == written(model, sampling, local(5), **options) == written(model, sampling, local(0, 3, 9), **options)
    monkeypatch.setattr(speculate, "LEAST", 0.0)  # also what is improbable is guessed
    for row, prompt in enumerate(PROMPTS):
        request = Request(prompt, sampling=sampling, seed=7, row=row, **options)
        decoder = open_decoder(model, rows=1, capacity=3000)
        session = Session(decoder, drafts_of(decoder)[-1:])  # a memory's, but for tokens
        assert finished(session, request) == plain[row]
        assert len(plain[row]) < 2 or (session.speculation.drafted > 0) == (MEMORY in drafts_of(decoder))


def finished(session: Session, request: Request) -> bytes:
    """What one request writes."""
    session.submit(request)
    found = b""
    while session.rows:
        found += b"".join(piece.data for piece in session.step())
    return found


def test_a_memory_guesses_what_was_written_before() -> None:
    """A model that goes round in a circle: after the first round nearly all is guessed, a dozen bytes a pass."""
    model, request = TINY["megabyte (two stages)"], Request(b"ab", 600, GREEDY, eos=False)
    plain = Session(open_decoder(model, rows=1, capacity=700), [NONE])
    session = Session(open_decoder(model, rows=1, capacity=700), [MEMORY])
    text = finished(plain, request)
    assert finished(session, request) == text
    assert session.speculation.accepted > 400
    read = Memory(Settings(memory=1 << 20))
    read.learn(b"ab" + text)
    before = read.identity()
    primed = Session(open_decoder(model, rows=1, capacity=700), [MEMORY], read_before=read.clone)
    assert finished(primed, request) == text
    assert primed.speculation.accepted > session.speculation.accepted
    assert read.identity() == before  # rows have copies of it


def test_a_wrong_guess_that_is_kept_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the test above is for: here every draft counts as right."""
    model = TINY["blt (no n-grams)"]
    plain = written(model, GREEDY, local(0), max_bytes=150)
    rollback = Decoder.rollback

    def half_way(self: Decoder, rows: Any, lengths: Any) -> None:
        rollback(self, rows, np.where(lengths > 0, np.maximum(lengths, self.lengths[rows] - 1), 0))

    monkeypatch.setattr(Decoder, "rollback", half_way)
    assert written(model, GREEDY, local(5), max_bytes=150) != plain


def test_drafts_leave_the_distribution_as_it_is() -> None:
    """The first bytes after many draws with drafts, beside the probabilities of the model itself."""
    model, sampling = TINY["blt (no n-grams)"], Sampling(1.0, top_k=6)
    count, prompt = 3000, b"the"
    at_work = Session(open_decoder(model, rows=count, capacity=9), local(3))
    for row in range(count):
        at_work.submit(Request(prompt, 4, sampling, seed=5, row=row, eos=False))
    found = [b""] * count
    while at_work.rows:
        for piece in at_work.step():
            found[piece.row] += piece.data
    assert 0 < at_work.speculation.accepted < at_work.speculation.drafted

    def probabilities(after: bytes) -> dict[int, float]:
        with torch.no_grad():
            logits = model(torch.tensor([[BOS, *after]]))[0][0, -1:].numpy()
        chances = sampling.filtered(logits, np.arange(VOCAB) < BYTES)[0]
        return {i: float(chances[i]) for i in chances.nonzero()[0]}

    for place in range(4):  # all but the first byte of a draft
        begun = found[0][:place]
        drawn = [text[place] for text in found if text[:place] == begun]
        expected = probabilities(prompt + begun)
        chi_square = sum((drawn.count(i) - len(drawn) * p) ** 2 / (len(drawn) * p) for i, p in expected.items())
        assert set(drawn) <= set(expected)
        assert chi_square < 26  # five degrees of freedom: one in ten thousand is larger


def test_rows_join_and_leave_between_steps() -> None:
    model = TINY["blt (last layer crossed)"]
    options = {"max_bytes": 30, "seed": 1}
    wanted = [generate(model, [prompt], **options)[0].data for prompt in PROMPTS]
    at_work = Session(open_decoder(model, rows=2, capacity=100))
    found: dict[int, bytes] = {}
    waiting, left = list(PROMPTS), set[int]()
    while waiting or at_work.rows:
        while waiting and at_work.free:
            found[at_work.submit(Request(waiting.pop(0), **options))] = b""
            if len(found) == 2:
                with pytest.raises(UsageError, match="all 2 rows are in use"):
                    at_work.submit(Request(b""))
        for piece in at_work.step():
            found[piece.row] += piece.data
        if 3 in found and 3 not in left and len(found[3]) > 5:
            at_work.cancel(3)
            left.add(3)
            with pytest.raises(UsageError, match="no request has ticket 3"):
                at_work.cancel(3)
    for request_id, text in found.items():
        assert text == wanted[request_id][: len(text)]
        assert (text == wanted[request_id]) == (request_id not in left)
    said = "a prompt of 90 bytes and 256 more take 347 ids, and a sequence holds at most 100"
    with pytest.raises(UsageError, match=said):
        at_work.submit(Request(bytes(90)))


def test_more_prompts_than_rows_wait_their_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    together = generate(Markov(), PROMPTS, max_bytes=40, seed=3)
    monkeypatch.setattr(prompts, "ROWS", 2)
    assert generate(Markov(), PROMPTS, max_bytes=40, seed=3) == together


def test_a_memory_that_does_not_suffice_takes_fewer_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    opened = list[int]()

    def small(model: ByteModel, *, rows: int, **options: Any) -> Any:
        opened.append(rows)
        if rows > 2:
            raise MemoryError
        return open_decoder(model, rows=rows, **options)

    monkeypatch.setattr(prompts, "open_decoder", small)
    assert len(generate(Markov(), PROMPTS, max_bytes=4)) == 5
    assert opened == [5, 2]


def test_the_faster_draft_is_taken() -> None:
    tuner, (four, eight) = Speculation((NONE, *LOCAL)).together, LOCAL
    speed = {NONE: 10.0, four: 25.0, eight: 20.0}
    used = list[Draft]()
    for turn in range(2000):
        if turn == 1000:
            speed[NONE] = 100.0
        used.append(tuner.option)
        tuner.note(1 / speed[tuner.option], 1)
    assert used[:16] == [NONE] * 16  # what is short is not worth a trial
    assert used[30:90] == [four] * 60
    assert used.count(eight) < 80
    assert used[-100:].count(NONE) > 80


@pytest.mark.parametrize("seconds", [1e-3, 5e-3])
def test_a_memory_is_tried_beside_slow_models_alone(seconds: float) -> None:
    speculation = Speculation((NONE, MEMORY))
    used = set[Draft]()
    for _ in range(200):
        used.add(speculation.tuner(1).option)
        speculation.tuner(1).note(seconds, 1)
    assert (MEMORY in used) == (seconds > SLOW and kernel() is not None)
    assert speculation.tuner(2).options == (NONE,)


def test_the_continuation_of_a_continuation_is_the_same() -> None:
    """Draws hang on places in the document: who goes on later with the same seed goes on the same."""
    model = TINY["blt (last layer crossed)"]
    whole = generate(model, [b"the"], max_bytes=60, seed=2, eos=False)[0].data
    assert generate(model, [b"the" + whole[:25]], max_bytes=35, seed=2, eos=False)[0].data == whole[25:]
