"""A model of tokens is measured, trained and asked in bytes."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose
from torch import Tensor

import bytelm
from bytelm.checkpoint import store
from bytelm.checkpoint.metrics import METRICS, read_metrics
from bytelm.cli import run as cli
from bytelm.data.bpe import Bpe
from bytelm.data.corpus import Corpus
from bytelm.data.modalities import image
from bytelm.decoding import bytewise
from bytelm.errors import BytelmError, DataError, UsageError
from bytelm.evaluate import windows
from bytelm.evaluate.bits import DocumentBits, logprobs, measure, nats_of_document
from bytelm.evaluate.meter import Meter
from bytelm.evaluate.verdict import judge
from bytelm.generate.prompts import generate, stream
from bytelm.generate.sampling import Sampling
from bytelm.generate.session import Session
from bytelm.interfaces.objective import score
from bytelm.lm import LM
from bytelm.models.transformer import model as transformer
from bytelm.models.transformer.model import ByteTransformer
from bytelm.training import loop
from bytelm.training.config import RunConfig
from bytelm.training.run import train
from bytelm.training.settings import configure
from bytelm.units import BOS, EOS, PAD, RESERVED, VOCAB
from token_texts import LITTLE, TEXT, noise

GREEDY = Sampling(temperature=0.0)


# --- bits -------------------------------------------------------------------------------------------------------------


def small(tokens: Bpe) -> ByteTransformer:
    """A model whose opinions are strong, so that every id has a price of its own."""
    model = transformer.Config(layers=1, dim=16, heads=2, ffn_multiple=16, vocabulary=tokens.vocabulary).build()
    model.init_weights(0)
    model.take_tokens(tokens)
    with torch.no_grad():
        model.embedding.weight.mul_(20)
        model.head.weight.mul_(20)
    return model.eval()


MODEL = small(Bpe.learn([TEXT], 300))
DOCUMENTS = {"noise": noise(300), "text": TEXT[5:400], "one": b"\0", "mixed": noise(40, 1) + TEXT[:99] + noise(9, 2)}


def ids_of(data: bytes) -> list[int]:
    assert MODEL.tokens is not None
    return [BOS, *MODEL.tokens.encode(data).tolist()]


@torch.no_grad()
def price(ids: list[int]) -> float:
    """Nats of the last id after all before it."""
    return float(-MODEL(torch.tensor([ids[:-1]]))[0][0, -1].double().log_softmax(-1)[ids[-1]])


@pytest.mark.parametrize("name", DOCUMENTS)
def test_bits_are_those_of_the_tokens_that_the_data_is_made_of(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    data, scored = DOCUMENTS[name], list[Tensor]()
    exact = windows.nats_of

    def watched(logits: Tensor, targets: Tensor) -> Tensor:
        scored.append(targets)
        return exact(logits, targets)

    monkeypatch.setattr(windows, "nats_of", watched)
    (found,) = measure(MODEL, [(name, data)], context=10_000)
    assert MODEL.tokens is not None
    assert MODEL.tokens.decode(scored[0][0].tolist()) == data
    ids = ids_of(data)
    with torch.no_grad():
        lines = MODEL(torch.tensor([ids[:-1]]))[0][0].double().log_softmax(-1)
        nats, count = score(MODEL, torch.tensor([ids]))
    by_hand = -sum(float(lines[at, id]) for at, id in enumerate(ids[1:]))
    assert (found.bytes, int(count)) == (len(data), len(data))
    assert (found.nats, float(nats)) == pytest.approx((by_hand, by_hand), rel=1e-5)
    assert Meter.of([found]).bits_per_byte == pytest.approx(by_hand / math.log(2) / len(data), rel=1e-5)


@pytest.mark.parametrize(("context", "stride"), [(1, 1), (7, 3), (16, 16), (30, None), (25, 1)])
def test_every_token_is_priced_once_in_windows(context: int, stride: int | None) -> None:
    told: list[int] = []
    found = list(measure(MODEL, DOCUMENTS.items(), context=context, stride=stride, batch=3, progress=told.append))
    assert [document.bytes for document in found] == [len(data) for data in DOCUMENTS.values()]
    assert sum(told) == sum(map(len, DOCUMENTS.values()))
    step = stride or context // 2
    for document, data in zip(found, DOCUMENTS.values(), strict=True):
        ids = ids_of(data)
        begins = [0 if at < context else (1 + (at - context) // step) * step for at in range(len(ids) - 1)]
        prices = [price(ids[begin : at + 2]) for at, begin in enumerate(begins)]
        assert document.nats == pytest.approx(sum(prices), rel=1e-5)
        assert_allclose(nats_of_document(MODEL, data, context=context, stride=stride), prices, rtol=1e-4, atol=1e-5)


def test_chance_costs_the_logarithm_of_the_vocabulary_for_each_token() -> None:
    model = small(Bpe.learn([TEXT], 300))
    torch.nn.init.zeros_(model.head.weight)
    (nothing, found) = measure(model, [("", b""), ("", TEXT)], context=64)
    assert nothing == DocumentBits("", 0, 0.0)
    assert found.nats / math.log(2) == pytest.approx((len(ids_of(TEXT)) - 1) * math.log2(300), rel=1e-6)
    assert LM(model, 64).bits(TEXT) == (pytest.approx(found.nats / math.log(2)), len(TEXT))


def test_planes_are_not_told_apart_by_tokens() -> None:
    picture = image.Config(width=4, height=4).build()
    pixels = [("a", noise(48)), ("b", TEXT[:48])]
    of_bytes = transformer.Config(layers=1, dim=16, heads=2, ffn_multiple=16).build()
    of_bytes.init_weights(0)
    assert list(judge(of_bytes, pixels, context=64, modality=picture).planes) == ["red", "green", "blue"]
    verdict = judge(MODEL, pixels, context=64, modality=picture)
    assert (verdict.planes, verdict.bytes) == ({}, 96)
    assert verdict.bits_per_byte == pytest.approx(judge(MODEL, pixels, context=64).bits_per_byte)


# --- generation -------------------------------------------------------------------------------------------------------


def writer() -> ByteTransformer:
    """A model in float64 that likes ids best that may not be written: half of its tokens are not there."""
    model = small(LITTLE)
    generator = torch.Generator().manual_seed(1)
    forbidden = [PAD, BOS, RESERVED, *(np.flatnonzero(LITTLE.sizes[VOCAB:] == 0) + VOCAB).tolist()]
    liked = [*(np.flatnonzero(LITTLE.sizes > 1)).tolist(), *range(97, 123)]
    with torch.no_grad():
        model.head.weight[liked] *= 1.5
        model.head.weight[EOS] *= 2.3
        twins = torch.tensor(liked)[torch.randint(len(liked), (len(forbidden),), generator=generator)]
        model.head.weight[forbidden] = 2 * model.head.weight[twins]
    return model.double().eval()


WRITER = writer()
PROMPTS = [b"", b"the cat and", b"\xff\x00\xc3", b"th", b"another hat, another dog and then", b"q", b"dog"]


@torch.no_grad()
def naive(prompt: bytes, limit: int) -> tuple[list[bytes], bool, int]:
    """What the likeliest ids are, each from the whole prefix; whether EOS came; how often another was likelier yet."""
    ids, written, vain = [BOS, *LITTLE.encode(prompt).tolist()], list[bytes](), 0
    while sum(map(len, written)) < limit:
        logits = WRITER(torch.tensor([ids]))[0][0, -1]
        best = max((id for id in range(300) if id == EOS or LITTLE.data[id]), key=lambda id: float(logits[id]))
        vain += int(logits.argmax()) != best
        if best == EOS:
            return written, True, vain
        ids.append(best)
        written.append(LITTLE.data[best])
    return written, False, vain


NAIVE = {prompt: naive(prompt, 40) for prompt in PROMPTS}


def write(prompt: bytes, **options: Any) -> tuple[bytes, str]:
    """One generation, which its stream must agree with."""
    (found,) = generate(WRITER, [prompt], sampling=GREEDY, **options)
    assert b"".join(stream(WRITER, prompt, sampling=GREEDY, **options)) == found.data
    return found.data, found.reason


def test_the_decoder_writes_what_the_model_says() -> None:
    ended = {came for _, came, _ in NAIVE.values()}
    assert ended == {True, False} and sum(vain for *_, vain in NAIVE.values()) > 20
    assert sum(len(token) > 1 for tokens, *_ in NAIVE.values() for token in tokens) > 20
    together = generate(WRITER, PROMPTS, max_bytes=40, sampling=GREEDY)
    for found, (prompt, (tokens, came, _)) in zip(together, NAIVE.items(), strict=True):
        assert write(prompt, max_bytes=40) == (found.data, found.reason)
        assert (found.data, found.reason) == (b"".join(tokens)[:40], "eos" if came else "length")


def longest() -> tuple[bytes, list[bytes]]:
    """The prompt after which most different tokens are written without an end, and they."""
    return max(((p, tokens) for p, (tokens, came, _) in NAIVE.items() if not came), key=lambda found: len({*found[1]}))


def test_the_limit_holds_within_a_token() -> None:
    prompt, tokens = longest()
    whole = b"".join(tokens)
    assert len(tokens) < 38
    for limit in range(38):
        assert write(prompt, max_bytes=limit) == (whole[:limit], "length")


def test_a_stop_sequence_ends_within_a_token() -> None:
    prompt, tokens = longest()
    whole = b"".join(tokens)[:40]
    for size in (1, 2, 5):
        for at in range(len(whole) - size):
            stop = whole[at : at + size]
            assert write(prompt, max_bytes=40, stop=[stop, b"never seen"]) == (whole[: whole.find(stop)], "stop")
    begun = whole[38:] + b"!"  # what may be the beginning of one is held back, and given at the end
    assert write(prompt, max_bytes=40, stop=[begun]) == (whole, "length")


@pytest.mark.parametrize("sampling", [Sampling(1.0), Sampling(3.0, top_k=50)])
def test_what_stands_for_no_bytes_is_never_written(sampling: Sampling, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[int] = []
    take = Session.write

    def watched(session: Session, slots: Any, symbols: Any, *rest: Any) -> Any:
        drawn.extend(symbols.tolist())
        return take(session, slots, symbols, *rest)

    monkeypatch.setattr(Session, "write", watched)
    together = generate(WRITER, PROMPTS * 8, max_bytes=30, sampling=sampling, seed=1)
    assert all(id == EOS or LITTLE.data[id] for id in drawn) and EOS in drawn and max(drawn) >= VOCAB
    assert {found.reason for found in together} == {"eos", "length"}
    assert generate(WRITER, PROMPTS[:1], max_bytes=30, sampling=sampling, seed=1)[0] == together[0]
    endless = generate(WRITER, PROMPTS, max_bytes=30, sampling=sampling, eos=False)
    assert [len(found.data) for found in endless] == [30] * len(PROMPTS)


def test_characters_are_not_chosen_byte_by_byte() -> None:
    with pytest.raises(UsageError, match=r"utf8.*tokens"):
        generate(WRITER, [b"a"], max_bytes=5, utf8=True)


def test_a_model_of_tokens_slides() -> None:
    lm = LM(WRITER, 64)
    prompt, tokens = longest()
    assert lm.with_windowing("sliding").generate(prompt, max_bytes=38, temperature=0) == b"".join(tokens)[:38]
    assert len(LM(WRITER, 6).with_windowing("sliding").generate(prompt, max_bytes=50, eos=False)) == 50


# --- training ---------------------------------------------------------------------------------------------------------


NANO = ["model.layers=1", "model.dim=16", "model.heads=2", "model.ffn_multiple=16", "model.vocabulary=300"]
NANO += [
    "train.context_length=32",
    "train.batch=2",
    "train.warmup_steps=2",
    "train.precision=float32",
    "train.sample_bytes=12",
]
NANO += ["data.valid=0.2", "data.test=0.2"]
LETTERS = b"abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUV"


def nano(*sets: str) -> RunConfig:
    return configure("byte-tiny", sets=[*NANO, *sets], steps=6)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve documents without a letter in common: what tokens are made of tells where they were learnt."""
    folder = tmp_path_factory.mktemp("folder")
    for i in range(12):
        a, b, c, d = LETTERS[4 * i : 4 * i + 4]
        words = [bytes(word) for word in ((a, b, c, d), (a, b), (c, d, a), (b, d))]
        (folder / f"{i}.txt").write_bytes(b" ".join(words[at % 4] for at in range(60 + i)))
    return folder


@pytest.fixture(scope="module")
def run(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("runs") / "run"
    train([folder], nano(), run, quiet=True)
    return run


def texts(corpus: Corpus, split: Any) -> list[bytes]:
    table = corpus.documents(split)
    return [corpus.read(int(a), int(n)).tobytes() for a, n in zip(table.starts, table.sizes, strict=True)]


def test_a_run_keeps_its_tokens_and_the_loaded_model_has_them(run: Path) -> None:
    corpus = Corpus.open(run / "data")
    assert len(list((run / "data").glob("tokens-*.bin"))) == len(list((run / "data").glob("tokens-*.npy"))) == 1
    lm = bytelm.load(run)
    tokens = lm.model.tokens
    assert tokens is not None and np.array_equal(np.load(run / "merges.npy"), tokens.merges)
    assert np.array_equal(Bpe.learn(texts(corpus, "train"), 300).merges, tokens.merges)
    data = (b" ".join(texts(corpus, None)) + noise(99))[:700]
    patches = lm.patches(data)
    assert patches == [tokens.data[id] for id in tokens.encode(data)] and b"".join(patches) == data
    assert lm.patches(b"") == []
    (measured,) = measure(lm.model, [("", data)], context=32)
    assert lm.bits(data) == (pytest.approx(measured.nats / math.log(2)), 700)
    assert len(lm.generate(b"ab", max_bytes=9, eos=False)) == 9
    exact = lm.logprobs(b"ab a", b"bc")
    assert exact.shape == (2,) and np.allclose(exact, logprobs(bytewise(lm.model), b"ab a", b"bc"))
    with pytest.raises(UsageError, match="tokens"):
        logprobs(lm.model, b"ab", b"cd")


def test_a_run_is_evaluated_by_bytes_and_by_tokens(run: Path, tmp_path: Path, capsys: Any) -> None:
    data, file = texts(Corpus.open(run / "data"), "train")[0] + noise(40), tmp_path / "data.txt"
    file.write_bytes(data)
    assert cli(["eval", str(run), str(file), "--bytewise", "--context", "2000", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    lm = bytelm.load(run)
    assert found["tokens"]["tokens"] == pytest.approx(lm_bits(lm.model, data), rel=1e-5)
    assert found["bits_per_byte"] == pytest.approx(lm_bits(bytewise(lm.model), data), rel=1e-5)
    assert found["bits_per_byte"] != pytest.approx(found["tokens"]["tokens"], rel=1e-3)
    canonical = found["tokens"]["canonical_tokens"]
    assert (
        found["bits_per_byte"] < canonical + 1e-5 and canonical < found["tokens"]["tokens"] and found["context"] > 2000
    )
    assert cli(["eval", str(run), str(file), "--bytewise"]) == 0
    assert re.search(r"canonical tokens +\d", capsys.readouterr().out)
    assert cli(["eval", str(run), str(file), "--bytewise", "--precision", "bfloat16"]) == 2
    assert cli(["eval", str(run), "--bytewise", "--tasks", "any"]) == 2
    assert "--bytewise applies to files only" in capsys.readouterr().err


def lm_bits(model: Any, data: bytes) -> float:
    return Meter.of(measure(model, [("", data)], context=5000)).bits_per_byte


def test_tokens_are_learnt_from_training_documents_only(run: Path) -> None:
    corpus = Corpus.open(run / "data")
    tokens = bytelm.load(run).model.tokens
    assert tokens is not None
    made_of = {*b"".join(tokens.data[VOCAB:])} - {*b" "}
    held_out = {*b"".join(texts(corpus, "valid") + texts(corpus, "test"))} - {*b" "}
    assert made_of and held_out and not held_out & {*b"".join(texts(corpus, "train"))}
    assert not made_of & held_out


def test_a_run_counts_bytes(folder: Path, tmp_path: Path) -> None:
    """A window holds all training documents, so that each step reads each byte of them once."""
    result = train([folder], nano("train.context_length=3000", "train.batch=1"), tmp_path / "run", quiet=True)
    corpus, tokens = Corpus.open(tmp_path / "run" / "data"), bytelm.load(tmp_path / "run").model.tokens
    assert tokens is not None
    documents, size = texts(corpus, "train"), corpus.bytes("train")
    assert result.progress is not None and result.progress.bytes == 6 * size
    ids = sum(len(tokens.encode(document)) for document in documents)
    assert ids < size / 2
    first = next(m for m in read_metrics(tmp_path / "run" / METRICS) if m["kind"] == "train")
    assert (first["step"], first["bytes"]) == (1, size)
    assert first["mean_patch"] == pytest.approx(size / ids)
    # A model that has learnt nothing is near to chance; each EOS is a symbol too, and no byte.
    assert first["bits_per_byte"] == pytest.approx((ids + len(documents)) * math.log2(300) / size, rel=0.1)


def weights(run: Path) -> dict[str, Tensor]:
    return {k: v for group in ("model", "optimizer") for k, v in store.read_tensors(store.newest(run), group).items()}


def test_a_run_of_tokens_that_was_stopped_equals_one_that_was_not(
    folder: Path, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = loop.Trainer.step

    def interrupted(trainer: loop.Trainer) -> None:
        step(trainer)
        if trainer.progress.step == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(loop.Trainer, "step", interrupted)
        assert train([folder], nano(), tmp_path / "run", quiet=True).signal == signal.SIGTERM
    monkeypatch.delattr(Bpe, "learn")
    train([folder], nano(), tmp_path / "run", quiet=True)
    whole, parts = weights(run), weights(tmp_path / "run")
    assert whole.keys() == parts.keys() and all(torch.equal(whole[name], parts[name]) for name in whole)
    validations = [
        [m["bits_per_byte"] for m in read_metrics(r / METRICS) if m["kind"] == "validation"]
        for r in (run, tmp_path / "run")
    ]
    assert validations[0] == validations[1] != []


DAMAGE: dict[str, Callable[[Path], Any]] = {
    "cut": lambda path: path.write_bytes(path.read_bytes()[:-3]),
    "emptied": lambda path: path.write_bytes(b""),
    "scrambled": lambda path: path.write_bytes(noise(500)),
    "shortened": lambda path: np.save(path, np.load(path)[:3]),
    "of ids not made": lambda path: np.save(path, np.full_like(np.load(path), 299)),
    "not those of the checkpoint": lambda path: np.save(path, np.load(path)[:, ::-1].copy()),
    "gone": Path.unlink,
}
FILES = {"merges.npy": list(DAMAGE)[:-1], "data/tokens-*.npy": list(DAMAGE)[:4], "data/tokens-*.bin": ["cut", "gone"]}


@pytest.mark.parametrize(("name", "damage"), [(name, damage) for name in FILES for damage in FILES[name]])
def test_damage_is_told_in_a_line(name: str, damage: str, folder: Path, run: Path, tmp_path: Path) -> None:
    damaged = shutil.copytree(run, tmp_path / "run")
    (file,) = damaged.glob(name)
    DAMAGE[damage](file)
    with pytest.raises(BytelmError) as caught:
        train([folder], nano(), damaged, quiet=True)
    assert "\n" not in str(caught.value)
    if damage != "not those of the checkpoint":  # which may be found when that is read
        assert isinstance(caught.value, DataError) and str(file) in str(caught.value)
