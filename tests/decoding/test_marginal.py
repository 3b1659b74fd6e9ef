"""P(byte | bytes) of a token model: against a sum over all token sequences, made of encodings alone."""

from __future__ import annotations

import functools
import math
from typing import Any

import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose

from bytelm.compress.stream import compress, decompress
from bytelm.data.bpe import LONGEST, Bpe
from bytelm.data.canonical import Canonical
from bytelm.decoding import bytewise, open_decoder, why_plain
from bytelm.decoding.marginal import NEVER, ByteDecoder
from bytelm.decoding.plain import PlainDecoder
from bytelm.errors import UsageError
from bytelm.evaluate.bits import continuations, logprobs, measure, naive_continuations
from bytelm.evaluate.renormalised import allowed, lost, renormalisation
from bytelm.generate.prompts import generate
from bytelm.generate.sampling import Sampling
from bytelm.interfaces.decoder import Decoder
from bytelm.models.transformer import model as transformer
from bytelm.models.transformer.model import ByteTransformer
from bytelm.testing.decoders import DECODER_INVARIANTS
from bytelm.testing.models import MODEL_INVARIANTS
from bytelm.units import BOS, BYTES, EOS, UNWRITTEN, VOCAB
from token_texts import LITTLE, TEXT, noise


def small(tokens: Bpe, **options: Any) -> ByteTransformer:
    """A model in float64 whose opinions are strong."""
    shape = {"layers": 1, "dim": 16, "heads": 2, "ffn_multiple": 16} | options
    model = transformer.Config(**shape, vocabulary=tokens.vocabulary).build()
    model.init_weights(0)
    model.take_tokens(tokens)
    with torch.no_grad():
        model.embedding.weight.mul_(20)
        model.head.weight.mul_(20)
    return model.double().eval()


MIXED = Bpe.learn(
    [TEXT[:900], b"\n\n\n \n\n \n" * 20, b"    " * 30, b"12 123 1234 " * 9, b"the  cat\n  sat " * 9, b"!? !?!" * 9], 330
)
MODELS = {"little": small(LITTLE), "mixed": small(MIXED), "empty": small(Bpe.empty(300))}
AFTER = (b"", b"a", b"0", b"!", b"\n", b" ", b"\xff", b"\n!", b" !", b" a")
"""What follows a token, of which one makes it canonical if anything does, in these vocabularies."""


def of_tokens(model: ByteTransformer, ids: list[int]) -> np.ndarray:
    """log P of every id of the token model after each of some ids, in float64."""
    decoder = open_decoder(model, rows=1, capacity=len(ids))
    parts = [np.array(ids[at : at + decoder.chunk]) for at in range(0, len(ids), decoder.chunk)]
    logits = np.concatenate([decoder.read(np.zeros_like(part), part) for part in parts])
    return logits - np.logaddexp.reduce(logits, axis=-1, keepdims=True)


class Enumerated:
    """All token sequences, which are canonical by what `encode` gives."""

    def __init__(self, model: ByteTransformer) -> None:
        assert model.tokens is not None
        self.model, self.tokens = model, model.tokens

    @functools.cache  # noqa: B019
    def following(self, ids: tuple[int, ...]) -> dict[int, float]:
        """log P of what may follow, specials but EOS left out, as the definition has it."""
        data, kept = self.tokens.decode(ids), list[int]()
        for id, more in enumerate(self.tokens.data):
            wanted = [*ids, id]
            if more and any(self.tokens.encode(data + more + s)[: len(wanted)].tolist() == wanted for s in AFTER):
                kept.append(id)
        if self.tokens.encode(data).tolist() == list(ids):
            kept.append(EOS)
        scores = of_tokens(self.model, [BOS, *ids])[-1, kept]
        return dict(zip(kept, (scores - np.logaddexp.reduce(scores)).tolist(), strict=True))

    def chances(self, data: bytes) -> np.ndarray:
        """P(data then each byte, or EOS) `[VOCAB]`, a sum over all sequences of tokens."""
        found = np.zeros(VOCAB)
        waiting: list[tuple[tuple[int, ...], int, float]] = [((), 0, 0.0)]
        while waiting:
            ids, at, score = waiting.pop()
            rest = data[at:]
            for id, own in self.following(ids).items():
                more = self.tokens.data[id]
                if id == EOS:
                    found[EOS] += math.exp(score + own) * (not rest)
                elif len(more) > len(rest) and more.startswith(rest):
                    found[more[len(rest)]] += math.exp(score + own)
                elif rest.startswith(more):
                    waiting.append(((*ids, id), at + len(more), score + own))
        return found


ENUMERATED = {name: Enumerated(model) for name, model in MODELS.items()}
DATA = [
    b"",
    b"t",
    b"the",
    b"the cat",
    b"th\x00",
    b"the\x00\x00",
    b"cat ",
    b" ",
    b"  ",
    b"   the",
    b"\n",
    b"\n ",
    b"\n\n",
    b"\n \n a",
    b"12 3",
    b"!? !",
    b"\xff\x00",
]


def logits_of(model: ByteTransformer, data: bytes, chunk: int = 1000) -> np.ndarray:
    """The logits before each byte and after the last one, `[bytes + 1, VOCAB]`."""
    decoder = open_decoder(bytewise(model), rows=1, capacity=len(data) + 1)
    ids = np.array([BOS, *data])
    parts = [ids[at : at + min(chunk, decoder.chunk)] for at in range(0, len(ids), min(chunk, decoder.chunk))]
    return np.concatenate([decoder.read(np.zeros_like(part), part) for part in parts])


@pytest.mark.parametrize("data", DATA)
@pytest.mark.parametrize("name", ["little", "mixed", "empty"])
def test_probabilities_are_sums_over_all_token_sequences(name: str, data: bytes) -> None:
    wanted = ENUMERATED[name].chances(data)
    assert wanted[:BYTES].all() and wanted[EOS]  # every byte may follow, and a document may end anywhere
    found = np.exp(logits_of(MODELS[name], data)[-1])
    assert found.sum() == pytest.approx(1, abs=1e-12) and not found[list(UNWRITTEN)].any()
    assert_allclose(found, wanted / wanted.sum(), rtol=1e-9)


def test_an_untrained_vocabulary_gives_the_model_itself() -> None:
    model, data = MODELS["empty"], noise(50)
    wanted = of_tokens(model, [BOS, *data])[:, [*range(BYTES), EOS]]
    wanted -= np.logaddexp.reduce(wanted, axis=-1, keepdims=True)
    assert_allclose(logits_of(model, data)[:, [*range(BYTES), EOS]], wanted, rtol=1e-9, atol=1e-9)


LONG = {
    "text": TEXT[:333],
    "noise": noise(150, 5),
    "every byte": bytes(range(BYTES)),
    "white": b"\n\n\n a  b \n \n\n\t\t  \r\n   x",
    "runs": b"".join(unit * (LONGEST + more) + b"a" for unit in (b" ", b"\n", b"a", b"7") for more in (-1, 0, 1, 2)),
    "nothing": b"",
}


@pytest.mark.parametrize("name", ["little", "mixed"])
@pytest.mark.parametrize("kind", LONG)
def test_the_bytes_of_a_document_cost_what_its_canonical_tokens_cost(name: str, kind: str) -> None:
    """The chain rule: the product over bytes and EOS is the probability of the tokens and EOS, conditioned."""
    model, data = MODELS[name], LONG[kind]
    assert model.tokens is not None
    found = logits_of(model, data)
    bytes_cost = -sum(float(line[id]) for line, id in zip(found, [*data, EOS], strict=True))
    ids = [*model.tokens.encode(data).tolist(), EOS]
    lines = of_tokens(model, [BOS, *ids[:-1]])
    gains = [lost(line, *kept) for line, kept in zip(lines, allowed(Canonical(model.tokens), ids), strict=True)]
    tokens_cost = -sum(float(line[id]) for line, id in zip(lines, ids, strict=True))
    assert bytes_cost == pytest.approx(tokens_cost - sum(gains), rel=1e-9)
    (gain,) = renormalisation(model, [("", data)], context=len(data) + 1)
    assert (gain.bytes, gain.nats) == (len(data), pytest.approx(sum(gains[:-1]), rel=1e-6))
    assert not data or gain.nats > 1e-9


@pytest.mark.parametrize("invariant", ["forward", "batch_invariance", "prefill", "again"])
@pytest.mark.parametrize("name", ["little", "mixed"])
def test_the_decoder_keeps_the_invariants_of_decoders(name: str, invariant: str) -> None:
    DECODER_INVARIANTS[invariant](bytewise(MODELS[name]), 0, 3)


@pytest.mark.parametrize("invariant", ["causality", "split", "state", "rows", "dynamic_batching", "documents", "sums"])
def test_the_model_keeps_the_invariants_of_models(invariant: str) -> None:
    MODEL_INVARIANTS[invariant](bytewise(MODELS["mixed"]), 0, 2)


def test_rows_go_back_to_any_length() -> None:
    model, data = MODELS["mixed"], LONG["white"] + TEXT[:80]
    wanted, ids = logits_of(model, data), np.array([BOS, *data])
    decoder = open_decoder(bytewise(model), rows=2, capacity=len(ids))
    rng, row = np.random.default_rng(0), np.ones(1, np.int64)
    for _ in range(30):
        length = int(rng.integers(len(ids)))
        decoder.rollback(row, row * min(length, int(decoder.lengths[1])))
        at = int(decoder.lengths[1])
        part = ids[at : at + int(rng.integers(1, 40))]
        got = decoder.read(row.repeat(len(part)), part, rng.random(len(part)) < 0.5)
        assert len(got) <= len(part)
        decoder.rollback(row, row * at)
        assert np.array_equal(decoder.read(row.repeat(len(part)), part), wanted[at : at + len(part)])


class Counted:
    """A decoder's calls and ids."""

    def __init__(self, decoder: Decoder, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls = self.ids = 0
        read = decoder.read

        def counted(rows: Any, ids: Any, *rest: Any) -> Any:
            self.calls, self.ids = self.calls + 1, self.ids + len(ids)
            return read(rows, ids, *rest)

        monkeypatch.setattr(decoder, "read", counted)


@pytest.mark.parametrize(("kind", "each"), [("text", 1.0), ("noise", 1.0), ("white", 1.6), ("runs", 1.5)])
def test_each_history_is_read_once(kind: str, each: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """One for each byte, and another where whitespace has two readings."""
    model, ids = MODELS["mixed"], np.array([BOS, *LONG[kind]])
    decoder = open_decoder(bytewise(model), rows=1, capacity=len(ids))
    assert isinstance(decoder, ByteDecoder)
    count = Counted(decoder.inner, monkeypatch)
    for part in np.array_split(ids, 3):
        decoder.read(np.zeros_like(part), part)
    histories = {opened.node for some in decoder.trees[0].open for opened in some if opened.node.id >= 0}
    assert len(histories) - 3 <= count.ids <= len(histories) + 3 and count.ids <= each * len(ids) + 3
    assert count.calls < 0.8 * count.ids


def test_only_scores_of_open_histories_are_held() -> None:
    decoder = open_decoder(bytewise(MODELS["mixed"]), rows=1, capacity=200)
    assert isinstance(decoder, ByteDecoder)
    for id in [BOS, *TEXT[:30], *LONG["white"]]:
        decoder.read(np.zeros(1, np.int64), np.array([id]))
        nodes = {opened.node for some in decoder.trees[0].open for opened in some}
        now = {opened.node for opened in decoder.trees[0].open[-1]}
        assert {node for node in nodes if node.scores is not None} == now


def test_of_a_prompt_little_more_than_its_tokens_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = MODELS["little"], np.array([BOS, *b"the cat and the dog and another hat " * 6])
    decoder = open_decoder(bytewise(model), rows=1, capacity=len(ids))
    assert isinstance(decoder, ByteDecoder)
    count = Counted(decoder.inner, monkeypatch)
    decoder.read(np.zeros_like(ids), ids, np.arange(len(ids)) == len(ids) - 1)
    assert model.tokens is not None
    assert count.ids <= len(model.tokens.encode(bytes(ids[1:].tolist()))) + 4 and count.calls <= 4


def test_it_reads_with_a_windowed_model_and_without_kernels() -> None:
    for model in (small(MIXED, attention_window=5), MODELS["mixed"]):
        data = LONG["white"] + TEXT[:40]
        decoder = ByteDecoder(PlainDecoder(model, 1, 200), bytewise(model).words, 200)
        ids = np.array([BOS, *data])
        assert_allclose(decoder.read(np.zeros_like(ids), ids), logits_of(model, data), rtol=1e-4, atol=1e-4)


def test_a_document_within_one_is_read_from_a_word() -> None:
    """Without BOS the first token is any with equal probability, and what it is follows from the bytes after it."""
    model = MODELS["little"]
    assert model.tokens is not None
    decoder = open_decoder(bytewise(model), rows=1, capacity=9)
    zero = np.zeros(1, np.int64)
    found = np.exp(decoder.read(zero, np.array([ord("t")]))[0])
    (first,) = [id for id, data in enumerate(model.tokens.data) if data == b"t"]
    begun = [data for data in model.tokens.data if data.startswith(b"t") and len(data) > 1]
    after = of_tokens(model, [first])[0]
    enumerated = Enumerated(model)
    kept = list(enumerated.following((first,)))
    chance = np.exp(after[kept] - np.logaddexp.reduce(after[kept]))
    ended = sum(p for id, p in zip(kept, chance.tolist(), strict=True) if id == EOS)
    assert begun and math.log(found[EOS]) == pytest.approx(math.log(ended / (1 + len(begun))), rel=1e-9)
    assert found.sum() == pytest.approx(1)


def test_measures_of_bytes_are_those_of_the_chain_rule_in_any_windows() -> None:
    model, data = MODELS["mixed"], TEXT[:200] + LONG["white"]
    as_bytes = bytewise(model)
    lines = logits_of(model, data)
    by_hand = [-float(line[id]) for line, id in zip(lines, data, strict=False)]
    (whole,) = measure(as_bytes, [("", data)], context=1000)
    assert whole.bytes == len(data) and whole.nats == pytest.approx(sum(by_hand), rel=1e-5)
    assert_allclose(-logprobs(as_bytes, data[:50], data[50:]), by_hand[50:], rtol=1e-4, atol=1e-5)
    pairs = [(data[:at], data[at : at + 9]) for at in (0, 3, 4, 205, 210)]
    for (nats, _), (prefix, rest) in zip(continuations(as_bytes, pairs, context=1000), pairs, strict=True):
        at = len(prefix)
        assert nats == pytest.approx(sum(by_hand[at : at + len(rest)]), rel=1e-4)
    (cut,) = measure(as_bytes, [("", data)], context=40, stride=7)
    assert cut.bytes == len(data) and abs(cut.nats - whole.nats) < 0.5 * whole.nats
    assert next(measure(as_bytes, [("", b"")], context=40)).nats == 0


def test_the_naive_figure_is_that_of_the_harness() -> None:
    model = MODELS["little"]
    assert model.tokens is not None
    pairs = [
        (b"the cat ", b"and"),
        (b"the c", b"at"),
        (b"", b"the"),
        (b"the dog", b" and"),
        (b"x \n", b"hat"),
        (b"th", b"e"),
    ]
    for (nats, _), (prefix, continuation) in zip(naive_continuations(model, pairs, context=99), pairs, strict=True):
        whole = model.tokens.encode(prefix + continuation).tolist()
        first = len(model.tokens.encode(prefix.rstrip()))
        lines = of_tokens(model, [BOS, *whole])
        wanted = -sum(float(lines[at, id]) for at, id in enumerate(whole) if at >= first)
        assert nats == pytest.approx(wanted, rel=1e-5, abs=1e-9)
    assert next(naive_continuations(model, [(b"t", b"he")], context=99))[0] == 0  # "the" is a token, as "t" is
    with pytest.raises(UsageError, match="use continuations"):
        list(naive_continuations(bytewise(model), pairs, context=9))


def test_what_was_compressed_is_restored() -> None:
    model, data = bytewise(small(MIXED).float()), TEXT[:300] + noise(30) + LONG["white"]
    packed = compress(model, data, 64)
    assert decompress(model, packed) == data
    (found,) = measure(model, [("", data)], context=1000)
    assert len(packed) < 60 + 1.3 * found.nats / math.log(2) / 8


def test_a_prompt_may_end_anywhere() -> None:
    """Greedy bytes are the most probable ones of the enumeration, in a word, after a space and within a character."""
    model, enumerated = MODELS["little"], ENUMERATED["little"]
    for prompt in (b"the c", b"the ", b"an", b"\xc3", b""):
        (found,) = generate(bytewise(model), [prompt], max_bytes=3, sampling=Sampling(temperature=0))
        written = b""
        while len(written) < 3 and (best := int(enumerated.chances(prompt + written).argmax())) != EOS:
            written += bytes([best])
        assert found.data == written


def test_samples_are_those_of_a_batch() -> None:
    model = bytewise(MODELS["mixed"])
    prompts = [b"the patches", b"a  ", b"\n", b"", b"token"]
    together = generate(model, prompts, max_bytes=20, seed=3)
    assert together[0] == generate(model, prompts[:1], max_bytes=20, seed=3)[0]
    assert all(len(found.data) == 20 or found.reason == "eos" for found in together)


def test_a_model_of_bytes_is_refused() -> None:
    model = transformer.Config(layers=1, dim=16, heads=2, ffn_multiple=16).build()
    with pytest.raises(UsageError, match="ByteTransformer reads bytes, not tokens: use it as it is"):
        bytewise(model)
    with pytest.raises(UsageError, match="nothing to renormalise"):
        list(renormalisation(model, [], context=9))
    assert why_plain(bytewise(MODELS["mixed"])) == why_plain(MODELS["mixed"])
    assert math.exp(NEVER) == 0
