"""The laws on the decoder of every architecture, on the fallback beside it, and a bug for every law to catch."""

from __future__ import annotations

import copy
import ctypes
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch

from bytelm import decoding, models
from bytelm.decoding import ngrams, open_decoder, rounding
from bytelm.decoding.host import Host
from bytelm.decoding.plain import PlainDecoder
from bytelm.decoding.stacks import Layers
from bytelm.errors import UsageError
from bytelm.evaluate.windowing import sliding, strided
from bytelm.interfaces import decoder as base
from bytelm.interfaces.model import ByteModel
from bytelm.models.blt import boundaries as patches
from bytelm.models.megabyte import decoder as megabyte_decoder
from bytelm.models.megabyte import host_decoder as megabyte
from bytelm.models.megabyte.host_decoder import Stage
from bytelm.models.transformer import decoder as transformer
from bytelm.models.transformer.model import ByteTransformer
from bytelm.native import kernels, library
from bytelm.native.kernels import Kernels
from bytelm.testing import DECODER_INVARIANTS, InvariantError, ScriptedEntropyModel, UniformModel, decoders, tiny_models
from bytelm.units import BOS, VOCAB

MODELS = dict(tiny_models())
PUBLISHED = "hnet (published)"
COMPILED = library.library("kernels") is not None
needs_kernels = pytest.mark.skipif(not COMPILED, reason=f"no kernels: {library.reason('kernels')}")
CASES = [(name, invariant) for name in MODELS for invariant in DECODER_INVARIANTS]
WINDOWED, RESET = "transformer (windowed)", "blt (last layer crossed) on entropy (relative) of a Transformer by lines"
BLT = "blt (last layer crossed) on entropy (threshold) of a Transformer"
COUNTED = "blt (last layer crossed) on entropy (both) of n-grams by lines"
LINKED, THREE = "megabyte (cross-patch attention, convolutions)", "megabyte (three stages)"
ACROSS = "megabyte (across patches, n-grams)"


@pytest.mark.fault("M2")
@pytest.mark.parametrize(("name", "invariant"), CASES, ids=map(" · ".join, CASES))
def test_decoder(name: str, invariant: str) -> None:
    DECODER_INVARIANTS[invariant](MODELS[name], list(MODELS).index(name), 3)


@needs_kernels
@pytest.mark.parametrize("name", MODELS)
def test_known_models_have_kernels(name: str) -> None:
    """All but the linear Transformer, whose forward pass over one id is the recurrence already, and imported ones."""
    known = not name.startswith(("linear", "megabyte_pytorch", PUBLISHED))
    what = "the layers of model.published" if name == PUBLISHED else type(MODELS[name]).__name__
    plain = "" if known else f"the kernels do not know {what}"
    assert decoding.why_plain(MODELS[name]) == plain


@needs_kernels
@pytest.mark.parametrize("config", ["transformer", "blt"])
def test_feed_forward_layers_of_any_width(config: str) -> None:
    """Widths that fill neither a vector nor a group of rows."""
    patcher = MODELS[BLT].patcher
    assert isinstance(patcher, torch.nn.Module)
    if config == "transformer":
        model = replace(models.transformer.model.Config.tiny()["windowed"], ffn_dim=37).build()
    else:
        model = replace(models.blt.model.Config.tiny()["last layer crossed"], ffn_dims=(37, 21, 50)).build(patcher)
    model.init_weights(0)
    assert not decoding.why_plain(model)
    for invariant in DECODER_INVARIANTS.values():
        invariant(model.eval(), 0, 2)


OTHERS: dict[str, Callable[[], ByteModel]] = {
    "strided": lambda: strided(MODELS[LINKED]),
    "sliding": lambda: sliding(MODELS[WINDOWED], 20),
    "uniform": UniformModel,
}


@pytest.mark.fault("M2")
@pytest.mark.parametrize("invariant", DECODER_INVARIANTS)
@pytest.mark.parametrize("name", OTHERS)
def test_models_of_other_kinds_are_read_by_their_forward_pass(name: str, invariant: str) -> None:
    model = OTHERS[name]()
    assert decoding.why_plain(model)
    DECODER_INVARIANTS[invariant](model, 0, 3)


@pytest.mark.fault("M2")
@pytest.mark.parametrize("name", [WINDOWED, BLT, COUNTED, LINKED])
def test_without_a_compiler_the_result_is_the_same(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, lines = MODELS[name], decoders.documents(decoders.random.Random(0), 3)
    fast = decoders.read(open_decoder(model, rows=3, capacity=decoders.CAPACITY), lines, lambda: 5)
    monkeypatch.setattr(decoding, "reason", lambda name: "no C++ compiler")
    slow = open_decoder(model, rows=3, capacity=decoders.CAPACITY)
    assert isinstance(slow, PlainDecoder)
    for one, other in zip(fast, decoders.read(slow, lines, lambda: 5), strict=True):
        assert torch.allclose(one, other, atol=1e-4)


def test_what_fails_to_compile_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    library._attempt.cache_clear()
    library.library.cache_clear()
    try:
        monkeypatch.setenv("CXX", "/bin/false")
        assert library.library("kernels") is None
        assert "/bin/false could not compile" in library.reason("kernels")
        with pytest.raises(UsageError, match="could not compile"):
            Kernels.open()
    finally:
        library._attempt.cache_clear()
        library.library.cache_clear()


def test_rows_come_and_go_beside_each_other() -> None:
    """The fallback keeps rows that are read together in one state, whoever joins, leaves and starts anew."""
    model = MODELS[LINKED]
    decoder = PlainDecoder(model, 4, 100)
    rng = np.random.default_rng(0)
    texts: list[list[int]] = [[] for _ in range(4)]
    for _ in range(60):
        rows = np.sort(rng.permutation(4)[: rng.integers(1, 5)])
        for row in rows[rng.random(len(rows)) < 0.1]:
            decoder.rollback(np.array([row]), np.array([0]))
            texts[row] = []
        ids = [BOS if not texts[row] else int(rng.integers(256)) for row in rows]
        for row, symbol in zip(rows, ids, strict=True):
            texts[row].append(symbol)
        found = decoder.read(rows, np.array(ids))
        assert sorted(row for group in decoder.groups for row in group.rows) == [r for r in range(4) if texts[r]]
        for row, logits in zip(rows, found, strict=True):
            wanted = model(torch.tensor([texts[row]]))[0][0, -1].detach()
            assert torch.allclose(torch.from_numpy(logits), wanted, atol=1e-4)


def test_what_a_decoder_has_no_room_for_is_refused() -> None:
    row = np.zeros(1, np.int64)
    for model in (MODELS[WINDOWED], UniformModel()):
        decoder = open_decoder(model, rows=1, capacity=3)
        decoder.read(row.repeat(2), np.array([BOS, 5]))
        with pytest.raises(UsageError, match=r"4 ids in steps of up to 2: .* has room for 3"):
            decoder.read(row.repeat(2), np.array([5, 5]))
        assert decoder.read(row, np.array([5])).shape == (1, VOCAB)
        with pytest.raises(UsageError, match="ids from 260 to 260"):
            decoder.read(row, np.array([VOCAB]))
    with pytest.raises(UsageError, match="cannot be rolled back to 2"):
        decoder.rollback(row, np.array([2]))
    with pytest.raises(UsageError, match="0 rows"):
        open_decoder(MODELS[WINDOWED], rows=0, capacity=3)
    long = open_decoder(MODELS["megabyte (projected, learned positions)"], rows=1, capacity=1000)
    with pytest.raises(UsageError, match=r"longer than model.positions = 256"):
        for _ in range(5):
            long.read(row.repeat(60), np.full(60, 5))


def test_an_unknown_entropy_model_is_read_plainly() -> None:
    from bytelm.models.blt.model import BLT as Model
    from bytelm.models.blt.model import Config
    from bytelm.patching import entropy

    patcher = entropy.Config(threshold=1.0).build(ScriptedEntropyModel({32: 2.0}))
    model = Model(Config(**{**Config.tiny()["no n-grams"].__dict__}), patcher)
    assert "patching of Entropy" in decoding.why_plain(model)


@needs_kernels
def test_memory_and_traffic_are_what_arrays_say() -> None:
    """A row takes what was allocated for it, and a step reads all weights but tables once."""
    for name, model in MODELS.items():
        if decoding.why_plain(model):
            continue
        one, four = (open_decoder(model, rows=rows, capacity=50) for rows in (1, 4))
        assert one.row_bytes == four.row_bytes > 0
        own = {n: p for n, p in model.named_parameters() if "patcher" not in n}
        weights = sum(4 * p.numel() for n, p in own.items() if p.ndim == 2)
        # MEGABYTE's and BLT's global parts count for the share of bytes at which they run.
        assert 0 < one.traffic(1) < 1.2 * weights + 1e5, name
        if isinstance(model, ByteTransformer):
            config = model.config
            tables = sum(4 * m.weight.numel() for m in model.modules() if isinstance(m, torch.nn.Embedding))
            for length in (1, 5, 40):
                cached = min(length, config.attention_window or length) * config.layers * 2 * 4 * config.dim
                assert four.traffic(length) == weights - tables + 4 * cached
        assert four.traffic(40) > one.traffic(40) > one.traffic(1), name


@needs_kernels
def test_weights_that_were_trained_meanwhile_are_read_anew() -> None:
    model = copy.deepcopy(MODELS[WINDOWED])
    for _ in range(2):
        DECODER_INVARIANTS["rounding"](model, 0, 2)  # opens decoders of every kind
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1.5)


def test_a_model_that_was_made_in_inference_mode_has_weights_to_read() -> None:
    with torch.inference_mode():
        model = copy.deepcopy(MODELS[WINDOWED])
        DECODER_INVARIANTS["rounding"](model, 0, 2)


# --- bugs -------------------------------------------------------------------------------------------------------------


def caught(invariant: str, name: str) -> None:
    with pytest.raises(InvariantError, match=f"'{invariant}'"):
        for seed in range(4):
            DECODER_INVARIANTS[invariant](MODELS[name], seed, 4)


def one_more(cls: type[ctypes.Structure], field: int) -> Callable[..., ctypes.Structure]:
    """A structure one of whose numbers is too large by one."""

    def make(*values: object) -> ctypes.Structure:
        changed = list(values)
        changed[field] = int(changed[field]) + 1  # pyright: ignore[reportArgumentType]
        return cls(*changed)

    return make


@needs_kernels
class TestForward:
    def test_a_window_too_wide(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(kernels, "Heads", one_more(kernels.Heads, 3))
        caught("forward", WINDOWED)

    def test_lines_that_are_not_reset(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(transformer, "NEWLINE", 0)
        caught("forward", RESET)

    def test_ngrams_of_other_rows(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(ngrams, "PUBLISHED_OFFSET", 0)
        caught("forward", BLT)
        caught("forward", ACROSS)

    def test_counted_contexts_that_reach_over_a_newline(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(kernels, "Counted", one_more(kernels.Counted, 5))
        caught("forward", COUNTED)

    def test_another_rule(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(patches.RULES, "both", 2)
        caught("forward", COUNTED)

    def test_patches_without_a_bound(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(kernels, "Rule", one_more(kernels.Rule, 3))
        caught("forward", "blt (last layer crossed) on space (bounded)")

    def test_a_link_that_is_missing(self, monkeypatch: pytest.MonkeyPatch) -> None:
        init = Stage.__init__

        def short(self: Stage, kernels: Kernels, inner: object, rows: int) -> None:
            init(self, kernels, inner, rows)  # pyright: ignore[reportArgumentType]
            self.inner = type("Inner", (), {"reach": self.inner.reach - 1})()

        monkeypatch.setattr(Stage, "__init__", short)
        caught("forward", LINKED)

    def test_convolutions_that_reach_over_the_start(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(megabyte.Embedding, "reach", property(lambda self: 2, lambda self, value: None), False)
        caught("forward", LINKED)

    def test_a_window_that_ends_at_the_patch(self, monkeypatch: pytest.MonkeyPatch) -> None:
        read = Stage.read

        def inside(self: Stage, *arguments: object, **options: object) -> object:
            self.window = None
            return read(self, *arguments, **options)  # pyright: ignore[reportArgumentType]

        monkeypatch.setattr(Stage, "read", inside)
        caught("forward", ACROSS)

    def test_pads_of_another_stage(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(megabyte_decoder, "BOS", 0)
        caught("forward", THREE)


@needs_kernels
def test_products_that_a_batch_rounds_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    """What any library's matrix product does."""
    linear = Kernels.linear

    def other(self: Kernels, matrix: kernels.Matrix, x: np.ndarray, *norm: object) -> np.ndarray:
        found = linear(self, matrix, x, *norm)  # pyright: ignore[reportArgumentType]
        return np.nextafter(found, np.float32(0)) if len(x) > 1 else found

    monkeypatch.setattr(Kernels, "linear", other)
    caught("batch_invariance", THREE)


@needs_kernels
def test_rings_without_room_for_what_is_taken_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Host, "layers", lambda self, stack, rows, seen: Layers(self, stack, rows, seen - Host.chunk))
    caught("again", WINDOWED)


@needs_kernels
def test_a_draft_that_is_left_standing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base.Decoder, "rollback", lambda self, rows, lengths: None)
    with pytest.raises(UsageError):
        DECODER_INVARIANTS["again"](MODELS[BLT], 0, 3)


@needs_kernels
def test_a_patcher_that_is_rounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Host, "precise", lambda self: Host.open(self.exact, "int8"))
    caught("rounding", BLT)


@needs_kernels
def test_a_scale_that_is_off(monkeypatch: pytest.MonkeyPatch) -> None:
    quantised = rounding.quantised
    monkeypatch.setattr(rounding, "quantised", lambda w: (quantised(w)[0], quantised(w)[1] * 128 / 127))
    caught("rounding", WINDOWED)


@pytest.mark.parametrize("remote", [False, True])
def test_a_model_in_bfloat16_is_so_beside_a_entropy_model_in_float32(
    remote: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which is how it is loaded: boundaries are decided in float32."""
    monkeypatch.setattr(decoding, "remote", lambda model: remote)
    name = next(name for name in MODELS if "of a Transformer" in name)
    model = copy.deepcopy(MODELS[name])
    wanted = open_decoder(model, rows=2, capacity=300, quantize="bf16").row_bytes
    assert wanted < open_decoder(model, rows=2, capacity=300).row_bytes
    model.bfloat16().patcher.float()  # pyright: ignore[reportCallIssue]
    assert open_decoder(model, rows=2, capacity=300).row_bytes == wanted
