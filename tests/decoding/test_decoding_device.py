"""Decoders on a device without one: their code on the CPU, on the pretend device, and with graphs played by hand."""

from __future__ import annotations

import contextlib
import gc
import weakref
from collections.abc import Callable, Generator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from bytelm import decoding
from bytelm.decoding import device, graphs, ngrams, open_decoder, rings, tensors
from bytelm.decoding.rings import Layers
from bytelm.errors import UsageError
from bytelm.generate.prompts import generate
from bytelm.generate.sampling import Sampling
from bytelm.models.blt import device_decoder as blt
from bytelm.models.transformer.model import ByteTransformer
from bytelm.native import library
from bytelm.testing import DECODER_INVARIANTS, InvariantError, decoders, tiny_models
from bytelm.testing.pretend import moved, pretend
from bytelm.units import BOS

MODELS = {
    name: model
    for name, model in tiny_models()
    if not decoding.why_plain(model) and not name.startswith("hnet")  # decides its boundaries on the host
}
WINDOWED, LINKED = "transformer (windowed)", "megabyte (cross-patch attention, convolutions)"
BLT = "blt (last layer crossed) on entropy (threshold) of a Transformer"
COUNTED = "blt (last layer crossed) on entropy (both) of n-grams by lines"
SOME = [
    WINDOWED,
    LINKED,
    "megabyte (across patches, n-grams)",
    BLT,
    COUNTED,
    "blt (all layers crossed, widened) on entropy (relative) of a Transformer by lines",
]
CASES = [(name, invariant) for name in MODELS for invariant in DECODER_INVARIANTS]
pytestmark = pytest.mark.skipif(library.library("kernels") is None, reason=f"no kernels: {library.reason('kernels')}")


@pytest.fixture(autouse=True)
def _on_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoding, "remote", lambda model: True)
    monkeypatch.setattr(decoders, "ROUNDED", ("bf16",))


@pytest.mark.parametrize(("name", "invariant"), CASES, ids=map(" · ".join, CASES))
def test_laws(name: str, invariant: str) -> None:
    DECODER_INVARIANTS[invariant](MODELS[name], list(MODELS).index(name), 3)


@pytest.mark.parametrize("invariant", DECODER_INVARIANTS)
@pytest.mark.parametrize("name", [WINDOWED, "transformer (full)", BLT])
def test_attention_of_one_position_by_products(name: str, invariant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rings, "SHORT", 0)
    DECODER_INVARIANTS[invariant](MODELS[name], 0, 3)


@pytest.mark.parametrize("name", SOME)
def test_greedy_bytes_are_those_of_the_kernels(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = [b"", b"The cat", b"one\ntwo\n", bytes(range(256)), b"a" * 300]
    options: dict[str, Any] = {"max_bytes": 256, "sampling": Sampling(temperature=0), "eos": False}
    far = generate(MODELS[name], prompts, **options)
    monkeypatch.setattr(decoding, "remote", lambda model: False)
    assert far == generate(MODELS[name], prompts, **options)
    assert {len(one.data) for one in far} == {256}


@pytest.mark.parametrize("name", MODELS)
def test_a_step_waits_once_and_once_more_for_a_entropy_model(name: str) -> None:
    model = MODELS[name]
    lines = [[BOS, *b"the cat\nsat on a mat"], [BOS, *b"on and on and on"]]
    with pretend() as seen:
        decoder = open_decoder(moved(model), rows=2, capacity=50)
        waits = 2 if "of a Transformer" in name else 1
        found: list[list[np.ndarray]] = [[], []]
        for step in range(16):
            before = seen.fetches.total()
            logits = decoder.read(np.arange(2), np.array([line[step] for line in lines]))
            assert seen.fetches.total() - before == waits
            for row in range(2):
                found[row].append(logits[row])
    for logits, wanted in zip(found, decoders.wanted(model, lines), strict=True):
        assert np.allclose(np.stack(logits), wanted[:16].numpy(), atol=1e-4)


def test_bf16_weights_and_caches_stay_so() -> None:
    model: Any = MODELS[WINDOWED]
    decoder: Any = open_decoder(model.bfloat16(), rows=2, capacity=30)
    try:
        layers = decoder.layers
        assert layers.rings[0].dtype == torch.bfloat16
        assert layers.blocks[0].qkv.weight.data_ptr() == model.stack.blocks[0].attention.qkv.weight.data_ptr()
        whole = open_decoder(MODELS[LINKED], rows=2, capacity=30)
        assert (decoder.chunk, decoder.repeats, decoder.thread_pool) == (whole.chunk, False, None)
    finally:
        model.float()


def test_a_device_without_float64_is_read_plainly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ByteTransformer, "device", property(lambda self: torch.device("mps")))
    assert decoding.why_plain(MODELS[WINDOWED]) == "the model is on mps, which has no float64 for angles"


def test_int8_is_refused() -> None:
    with pytest.raises(UsageError, match=r'quantize = "int8" on cpu: .* use "bf16"'):
        open_decoder(MODELS[WINDOWED], rows=1, capacity=3, quantize="int8")


@pytest.mark.parametrize("name", MODELS)
def test_rows_take_what_was_allocated_for_them(name: str) -> None:
    one, four = (open_decoder(MODELS[name], rows=rows, capacity=50) for rows in (1, 4))
    assert one.row_bytes == four.row_bytes > 0
    assert four.traffic(40) > one.traffic(40) > one.traffic(1) > 0


def test_memory_is_free_when_a_decoder_is_gone() -> None:
    """Not only when Python looks for cycles: there may be gigabytes of it."""
    gc.disable()
    try:
        for name in SOME:
            decoder = open_decoder(MODELS[name], rows=1, capacity=50)
            decoder.read(np.zeros(1, np.int64), np.array([BOS]))
            gone = weakref.ref(decoder)
            rings = [weakref.ref(x) for x in gc.get_objects() if type(x) is Layers]
            del decoder
            assert gone() is None
            assert [ring() for ring in rings] == [None] * len(rings)
    finally:
        gc.enable()


# --- graphs -----------------------------------------------------------------------------------------------------------


class Played:
    """In place of a CUDA graph: operators on the memory that they were recorded with."""

    played = 0

    def __init__(self) -> None:
        self.calls: list[tuple[Callable[..., Any], Any, Any, Any]] = []

    def replay(self) -> None:
        Played.played += 1
        for function, args, kwargs, out in self.calls:
            for old, new in zip(tree_leaves(out), tree_leaves(function(*args, **kwargs)), strict=True):
                if old.data_ptr() != new.data_ptr():  # neither a view nor in place
                    old.copy_(new)


class Recording(TorchDispatchMode):
    def __init__(self, graph: Played) -> None:
        super().__init__()
        self.graph = graph

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.graph.calls.append((func, args, kwargs or {}, out))
        return out


@contextlib.contextmanager
def recording(graph: Played, pool: object, stream: object) -> Generator[None]:
    with Recording(graph):
        yield


class Stream:
    def wait_stream(self, other: object) -> None:
        """All is done in order here."""


@pytest.fixture
def played(monkeypatch: pytest.MonkeyPatch) -> None:
    init = graphs.Recorder.__init__

    def records(self: graphs.Recorder, where: torch.device) -> None:
        init(self, where)
        self.records, self.stream, self.pool = True, Stream(), None  # pyright: ignore[reportAttributeAccessIssue]

    monkeypatch.setattr(graphs.Recorder, "__init__", records)
    monkeypatch.setattr(torch.cuda, "current_stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", contextlib.nullcontext)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Played)
    monkeypatch.setattr(torch.cuda, "graph", recording)
    monkeypatch.setattr(Tensor, "pin_memory", lambda self: self)
    monkeypatch.setattr(Played, "played", 0)


@pytest.mark.usefixtures("played")
@pytest.mark.parametrize("invariant", ["forward", "batch_invariance", "again"])
@pytest.mark.parametrize("name", SOME)
def test_laws_with_graphs(name: str, invariant: str) -> None:
    DECODER_INVARIANTS[invariant](MODELS[name], 0, 3)
    assert Played.played > 20


def test_without_graphs_bytes_are_the_same_and_it_is_said(played: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a device does not let them be recorded."""

    @contextlib.contextmanager
    def refused(graph: Played, pool: object, stream: object) -> Generator[None]:
        yield
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    monkeypatch.setattr(torch.cuda, "graph", refused)
    with pytest.warns(RuntimeWarning, match="CUDA graph capture failed.*: operation not permitted.*ing$"):
        DECODER_INVARIANTS["forward"](MODELS[WINDOWED], 0, 2)
    assert Played.played == 0


# --- bugs -------------------------------------------------------------------------------------------------------------


def caught(invariant: str, name: str) -> None:
    with pytest.raises(InvariantError, match=f"'{invariant}'"):
        for seed in range(4):
            DECODER_INVARIANTS[invariant](MODELS[name], seed, 4)


def test_a_number_that_a_graph_keeps(played: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphs.Graph, "replay", lambda self, plan, activations: (self.graph.replay(), self.out)[1])
    caught("forward", BLT)


def test_what_fills_up_written_into_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    init = rings.Layers.__init__

    def no_spare(self: Any, *args: Any, **options: Any) -> None:
        init(self, *args, **options)
        self.rows = 0

    monkeypatch.setattr(rings.Layers, "__init__", no_spare)
    caught("batch_invariance", WINDOWED)


def test_rings_without_room_for_what_is_taken_back(monkeypatch: pytest.MonkeyPatch) -> None:
    layers = device.Device.layers
    monkeypatch.setattr(device.Device, "layers", lambda self, stack, rows, seen: layers(self, stack, rows, seen - 64))
    monkeypatch.setattr(tensors, "CHUNK", 64)
    monkeypatch.setattr(device.Device, "chunk", 64)
    caught("forward", WINDOWED)


def test_ngrams_of_other_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ngrams, "PUBLISHED_OFFSET", 0)
    caught("forward", BLT)


def test_a_patcher_that_is_rounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device.Device, "precise", lambda self: replace(self, weights="bf16"))
    caught("forward", BLT)


def test_lines_of_masks_of_another_patch(monkeypatch: pytest.MonkeyPatch) -> None:
    filled = graphs.filled
    monkeypatch.setattr(blt, "filled", lambda index: filled(index)[::-1].copy())
    caught("batch_invariance", COUNTED)
