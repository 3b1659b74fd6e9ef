"""Bits are exact: known models score what is known, every byte counts once, and windows see what the picture says."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from jaxtyping import Bool, Float, Int
from numpy.testing import assert_allclose
from torch import Tensor

from bytelm.decoding import Decoder, open_decoder
from bytelm.decoding.plain import PlainDecoder
from bytelm.errors import UsageError
from bytelm.evaluate import reading, stream, windows
from bytelm.evaluate.bits import DocumentBits, logprobs, measure, nats_of_document
from bytelm.evaluate.meter import Meter
from bytelm.evaluate.reading import open_reader
from bytelm.interfaces.model import ByteModel
from bytelm.interfaces.objective import score
from bytelm.models.blt import model as blt
from bytelm.models.ngram import entropy_model as ngram
from bytelm.models.transformer import model as transformer
from bytelm.patching import entropy, fixed
from bytelm.patching.base import Patcher
from bytelm.testing import tiny_models
from bytelm.testing.exact import exact
from bytelm.testing.pretend import moved, pretend
from bytelm.units import BOS, BYTES, PAD, VOCAB


class Fake(ByteModel):
    """A model of known answers, `answer(ids, boundaries)`; it remembers how many windows it was given, and no more."""

    def __init__(self, answer: Callable[[Tensor, Tensor | None], Tensor], patcher: Patcher | None = None) -> None:
        super().__init__()
        self.answer = answer
        self.patcher = patcher
        self.windows: list[int] = []

    @property
    def device(self) -> torch.device:
        return torch.device("cpu")

    def init_weights(self, seed: int) -> None:
        """There is nothing to set."""

    def flops(self, ids: int, patches: int) -> int:
        return 0

    def initial_state(self, batch: int) -> Any:
        return ()

    def forward(
        self, ids: Int[Tensor, "batch new"], state: Any = None, boundaries: Bool[Tensor, "batch new"] | None = None
    ) -> tuple[Float[Tensor, "batch new vocab"], Any]:
        self.windows.append(len(ids))
        return self.answer(ids, boundaries), state


def uniform(ids: Tensor, boundaries: Tensor | None) -> Tensor:
    return torch.zeros(*ids.shape, VOCAB)


BIGRAMS = torch.randn(VOCAB, VOCAB, generator=torch.Generator().manual_seed(1)).log_softmax(-1)


def bigrams(ids: Tensor, boundaries: Tensor | None) -> Tensor:
    return BIGRAMS[ids]


def zero_costs(nats: Tensor) -> Tensor:
    """Logits under which byte 0 costs these nats."""
    logits = torch.full((*nats.shape, VOCAB), float("-inf"))
    logits[..., 0] = 0.0
    logits[..., 1] = torch.expm1(nats.double()).log().float()
    return logits


def seen_costs(ids: Tensor, boundaries: Tensor | None) -> Tensor:
    """Byte 0 costs 0.1 nats for each id that is seen before it."""
    return zero_costs(0.1 * (ids != PAD).cumsum(1))


def tiny_transformer() -> ByteModel:
    model = transformer.Config(layers=2, dim=16, heads=2, ffn_multiple=16).build()
    model.init_weights(3)
    return model


def tiny_blt() -> ByteModel:
    entropy_model = ngram.Config(order=2, rows=4096).build()
    entropy_model.tables.uniform_(0, 5, generator=torch.Generator().manual_seed(4))
    shape = {"local_dim": 16, "local_heads": 2, "cross_heads": 2, "global_dim": 16, "global_heads": 2}
    depth = {"global_layers": 1, "decoder_layers": 1, "attention_window": 7, "ngram_sizes": (3,), "ngram_rows": 64}
    model = blt.Config(**shape, **depth).build(entropy.Config(threshold=3.0, max_length=9).build(entropy_model))
    model.init_weights(5)
    return model


REAL = {"transformer": tiny_transformer(), "blt": tiny_blt()}

contents = st.binary(max_size=60)
cuts = st.integers(1, 20).flatmap(lambda context: st.tuples(st.just(context), st.integers(1, context)))


@pytest.mark.fault("M4")
@settings(max_examples=50)
@given(documents=st.lists(contents, max_size=5), cut=cuts, batch=st.integers(1, 5))
def test_every_byte_is_scored_once_whatever_the_windows(
    documents: list[bytes], cut: tuple[int, int], batch: int
) -> None:
    named = [(str(number), document) for number, document in enumerate(documents)]
    found = list(measure(Fake(bigrams), named, context=cut[0], stride=cut[1], batch=batch))
    assert [(bits.name, bits.bytes) for bits in found] == [(name, len(document)) for name, document in named]
    for bits, document in zip(found, documents, strict=True):
        # A bigram needs no context: any cut gives each byte its own price, once.
        prices = [float(-BIGRAMS[a, b]) for a, b in pairwise([BOS, *document])]
        assert bits.nats == pytest.approx(sum(prices), rel=1e-6)
        assert_allclose(nats_of_document(Fake(bigrams), document, context=cut[0], stride=cut[1]), prices, rtol=1e-5)


@given(documents=st.lists(contents, max_size=4), cut=cuts, period=st.integers(1, 5))
def test_places_are_counted_from_the_beginning_of_each_document(
    documents: list[bytes], cut: tuple[int, int], period: int
) -> None:
    named = [("", document) for document in documents]
    found = list(measure(Fake(bigrams), named, context=cut[0], stride=cut[1], batch=3, period=period))
    for bits, document in zip(found, documents, strict=True):
        prices = [float(-BIGRAMS[a, b]) for a, b in pairwise([BOS, *document])]
        wanted = [sum(prices[place::period]) for place in range(period)] if period > 1 else []
        assert bits.by_place == pytest.approx(wanted, rel=1e-5)
        assert bits.nats == pytest.approx(sum(prices), rel=1e-6)


@given(size=st.integers(0, 80), cut=cuts)
def test_a_byte_sees_what_the_picture_says(size: int, cut: tuple[int, int]) -> None:
    context, stride = cut
    nats = nats_of_document(Fake(seen_costs), bytes(size), context=context, stride=stride)
    windows = [0 if at < context else 1 + (at - context) // stride for at in range(size)]
    seen = [at - window * stride + 1 for at, window in enumerate(windows)]
    assert_allclose(nats, 0.1 * np.array(seen), rtol=1e-5)
    assert all(context - stride < count <= context for at, count in enumerate(seen) if at >= context)


@pytest.mark.fault("M4")
def test_uniform_costs_the_logarithm_of_the_vocabulary() -> None:
    documents = [("long", bytes(range(256)) * 40), ("empty", b""), ("one", b"\0")]
    found = list(measure(Fake(uniform), documents, context=128))
    assert [bits.bytes for bits in found] == [10240, 0, 1]
    assert found[1] == DocumentBits("empty", 0, 0.0)
    assert Meter.of(found).bits_per_byte == pytest.approx(math.log2(260), rel=1e-7)


@pytest.mark.fault("M4")
def test_sums_are_those_of_float64() -> None:
    price = -math.log(1e-4)

    def cheap(ids: Tensor, boundaries: Tensor | None) -> Tensor:
        return zero_costs(torch.full(ids.shape, 1e-4, dtype=torch.float64))

    one = nats_of_document(Fake(cheap), b"\0", context=4096)
    assert 0 < one[0] < price
    (bits,) = measure(Fake(cheap), [("", bytes(300_000))], context=4096, stride=4096)
    # In float32, 300,000 times the same small number added in a row is off by 1e-4.
    assert bits.nats == pytest.approx(300_000 * one[0], rel=1e-11)


@pytest.mark.parametrize("name", REAL)
def test_a_document_within_the_context_costs_what_one_pass_says(name: str) -> None:
    model = REAL[name]
    data = bytes(np.random.default_rng(6).integers(97, 110, 200, np.uint8))
    ids = torch.tensor([[BOS, *data]])
    with torch.no_grad():
        nats, count = score(model, ids)
    for context in (200, 201, 1000):
        (bits,) = measure(model, [("", data)], context=context)
        assert (bits.bytes, bits.nats) == (int(count), pytest.approx(float(nats), rel=1e-6))


@pytest.mark.fault("M3")
@pytest.mark.parametrize("name", REAL)
@settings(max_examples=8)
@given(documents=st.lists(contents, min_size=1, max_size=4), cut=cuts)
def test_the_batch_does_not_matter(name: str, documents: list[bytes], cut: tuple[int, int]) -> None:
    model = REAL[name]
    named = [("", document) for document in documents]
    single = list(measure(model, named, context=cut[0], stride=cut[1], batch=1))
    for a, b in zip(single, measure(model, named, context=cut[0], stride=cut[1], batch=7), strict=True):
        assert (a.bytes, a.nats) == (b.bytes, pytest.approx(b.nats, rel=1e-5))


@pytest.mark.parametrize("name", REAL)
def test_in_bfloat16_bits_are_others_and_close(name: str) -> None:
    """Rounding is seen, so that products were rounded, and small."""
    documents = [("", bytes(range(256)) * 2), ("", b"the quick fox " * 20)]
    exact, low = (
        Meter.of(measure(REAL[name], documents, context=100, precision=p)).bits_per_byte
        for p in ("float32", "bfloat16")
    )
    assert exact != low == pytest.approx(exact, abs=0.02)


def test_on_a_device_a_group_of_windows_is_one_wait() -> None:
    documents = [("", b"the quick fox " * 20), ("", bytes(300))]
    model = REAL["transformer"]
    with pretend() as seen:
        found = [d.nats for d in measure(moved(model), documents, context=50, batch=4)]
    windows = 2 * -(-(300 - 50) // 25)
    assert sum(seen.fetches.values()) <= -(-windows // 4) + 1
    assert found == pytest.approx([d.nats for d in measure(model, documents, context=50, batch=4)], rel=1e-5)


@pytest.mark.fault("M4")
@pytest.mark.parametrize("name", REAL)
def test_the_probabilities_of_all_that_may_follow_are_one(name: str) -> None:
    """Bytes as they are scored, one after another, and what is left for the special ids, which are no bytes."""
    model, prefix = REAL[name], b"the byte"
    bytes_alone = sum(math.exp(logprobs(model, prefix, bytes([byte]))[0]) for byte in range(BYTES))
    with torch.no_grad():
        logits, _ = model(torch.tensor([[BOS, *prefix]]))
    special = float(logits[0, -1].double().softmax(-1)[BYTES:].sum())
    assert 0 < bytes_alone < 1 and bytes_alone + special == pytest.approx(1, rel=1e-5)


@pytest.mark.fault("M4")
@pytest.mark.parametrize("name", REAL)
@settings(max_examples=8)
@given(data=contents, middle=st.integers(0, 60))
def test_logprobs_are_the_terms_of_a_document_and_follow_the_chain_rule(name: str, data: bytes, middle: int) -> None:
    model = REAL[name]
    nats = nats_of_document(model, data, context=100)
    whole = logprobs(model, b"", data)
    assert_allclose(whole, -nats, rtol=1e-4, atol=1e-5)
    prefix, rest = data[:middle], data[middle:]
    after = logprobs(model, prefix, rest)
    assert (after <= 0).all()
    assert_allclose(np.concatenate([logprobs(model, b"", prefix), after]), whole, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", REAL)
@pytest.mark.parametrize("chunk", [1, 2, 7])
def test_logprobs_do_not_depend_on_how_the_stream_is_cut(
    name: str, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = REAL[name]
    whole = logprobs(model, b"the cat sat", b" on the mat")
    monkeypatch.setattr(reading, "open_reader", no_reader)
    monkeypatch.setattr(reading, "CHUNK", chunk)
    assert_allclose(logprobs(model, b"the cat sat", b" on the mat"), whole, rtol=1e-4)


def test_logprobs_see_all_that_was_read() -> None:
    model = tiny_transformer()
    data = b"x" * 30
    near, far = (logprobs(model, first + data, b"z") for first in (b"a", b"b"))
    assert near[0] != far[0]


def no_reader(model: ByteModel, **room: int) -> None:
    """In place of `open_reader`: the forward pass reads."""


def in_small_chunks(model: ByteModel, **room: int) -> Decoder | None:
    """What `open_reader` gives, with chunks that a window has several of."""
    if reader := open_reader(model, **room):
        reader.chunk = 60
    return reader


@pytest.mark.fault("M4")
@pytest.mark.parametrize("name, model", [(name, model.eval()) for name, model in tiny_models(7)])
def test_kernels_and_the_forward_pass_measure_the_same(
    name: str, model: ByteModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In windows of one chunk and of several, which start within patches, and in one stream."""
    data = (b"the quick brown fox, jumps over the lazy dog; " * 3 + bytes(range(0, 250, 2)))[:250]
    cuts = {"context": 200, "stride": 67}, {"context": 30, "stride": 11}

    def figures(model: ByteModel) -> list[np.ndarray]:
        found = [nats_of_document(model, data, **cut, batch=3) for cut in cuts]
        return found if model.tokens else [*found, logprobs(model, data[:90], data[90:])]

    with exact(model) as precise:
        plain = name.startswith(("linear", "megabyte_pytorch", "hnet (published)"))
        assert plain or windows.open_reader(precise, rows=1, capacity=9)
        for module in (windows, reading):
            monkeypatch.setattr(module, "open_reader", in_small_chunks)
        kernels = figures(precise)
        for module in (windows, reading):
            monkeypatch.setattr(module, "open_reader", no_reader)
        for one, other in zip(kernels, figures(precise), strict=True):
            assert_allclose(one, other, rtol=2e-6, atol=2e-6)


def test_the_forward_pass_reads_what_kernels_would_round() -> None:
    model = tiny_transformer()
    assert windows.open_reader(model, rows=1, capacity=9) is not None
    assert windows.open_reader(Fake(uniform), rows=1, capacity=9) is None
    with pretend():
        assert windows.open_reader(moved(model), rows=1, capacity=9) is None
    assert windows.open_reader(tiny_transformer().bfloat16(), rows=1, capacity=9) is None


@pytest.mark.parametrize("plain", [False, True])
def test_boundaries_that_are_given_are_those_of_the_forward_pass(plain: bool) -> None:
    """To a decoder of the kernels and to a plain one, two rows in chunks that end anywhere."""
    model, rng = REAL["blt"], np.random.default_rng(8)
    ids = rng.integers(97, 110, (2, 40))
    opens = rng.random((2, 40)) < 0.3
    with torch.inference_mode():
        wanted = model(torch.from_numpy(ids), None, torch.from_numpy(opens))[0].numpy()
    decoder = PlainDecoder(model, 2, 40) if plain else open_decoder(model, rows=2, capacity=40)
    for begin, end in pairwise((0, 1, 18, 19, 40)):
        rows, part = np.arange(2).repeat(end - begin), np.s_[:, begin:end]
        found = decoder.read(rows, ids[part].ravel(), opens=opens[part].ravel())
        assert_allclose(found.reshape(2, end - begin, -1), wanted[part], rtol=1e-4, atol=1e-4)


def in_pieces(data: bytes, size: int) -> Iterator[bytes | np.ndarray]:
    for start in range(0, len(data), size):
        piece = data[start : start + size]
        yield piece if start % 2 else np.frombuffer(piece, np.uint8)


@pytest.mark.fault("M2")
@pytest.mark.parametrize("chunk", [1, 5, 64])
def test_patches_are_cut_once_over_the_whole_document(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream, "CHUNK", chunk)

    def boundary_costs(ids: Tensor, boundaries: Tensor | None) -> Tensor:
        assert boundaries is not None
        return zero_costs(torch.where(boundaries, 1.0, 2.0))

    patcher = fixed.Config(size=5).build()
    model = Fake(boundary_costs, patcher)
    nats = nats_of_document(model, in_pieces(bytes(53), 3), context=8, stride=3)
    opens, _ = patcher.extend(torch.tensor([[BOS, *bytes(52)]]))
    assert_allclose(nats, torch.where(opens[0], 1.0, 2.0).numpy(), rtol=1e-5)


@given(data=contents, size=st.integers(1, 9), chunk=st.integers(1, 12))
def test_chunks_do_not_depend_on_the_pieces(data: bytes, size: int, chunk: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stream, "CHUNK", chunk)
        whole = [ids.tolist() for ids in stream.chunks(data)]
        assert [ids.tolist() for ids in stream.chunks(in_pieces(data, size))] == whole
    assert [symbol for ids in whole for symbol in ids] == [BOS, *data]
    assert [len(ids) for ids in whole[:-1]] == [chunk] * (len(whole) - 1)
    assert all(whole)


def test_an_endless_document_is_read_only_as_far_as_it_is_scored() -> None:
    drawn = 0

    def endless() -> Iterator[bytes]:
        nonlocal drawn
        while True:
            drawn += 1
            yield bytes(1000)

    class Enough(Exception):
        pass

    scored: list[int] = []

    def progress(bytes: int) -> None:
        scored.append(bytes)
        if sum(scored) >= 100_000:
            raise Enough

    with pytest.raises(Enough):
        list(measure(Fake(uniform), [("", endless())], context=500, batch=4, progress=progress))
    assert drawn * 1000 < sum(scored) + 3 * stream.CHUNK


def test_windows_of_several_documents_share_a_batch_and_progress_adds_up() -> None:
    model, scored = Fake(uniform), []
    documents = [("", bytes(size)) for size in (10, 0, 3, 25)]
    list(measure(model, documents, context=10, stride=5, batch=3, progress=scored.append))
    assert model.windows == [3, 3]  # windows: 1 + 0 + 1 + 4
    assert sum(scored) == 38


@pytest.mark.parametrize("options", [{"context": 0}, {"context": 4, "stride": 5}, {"context": 4, "stride": 0}])
def test_windows_that_leave_bytes_out_are_refused(options: dict[str, int]) -> None:
    with pytest.raises(UsageError, match="must be"):
        measure(Fake(uniform), [("", b"a")], **options)
    with pytest.raises(UsageError, match="batch = 0"):
        nats_of_document(Fake(uniform), b"a", context=4, batch=0)


def test_ids_of_bytes_are_the_bytes() -> None:
    assert next(stream.chunks(bytes(range(256)))).tolist() == [BOS, *range(BYTES)]
