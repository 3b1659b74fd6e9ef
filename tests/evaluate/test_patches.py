"""Patches are counted as they are cut, and calibration reaches the size that it is asked for."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from bytelm.errors import ConfigError, DataError, UsageError
from bytelm.evaluate import calibrate as calibration
from bytelm.evaluate import stream
from bytelm.evaluate.calibrate import calibrate
from bytelm.evaluate.patches import lengths_by_kind, mean_length, opens_of, patch_lengths, patch_view, realised
from bytelm.models.blt import model as blt
from bytelm.models.ngram import entropy_model as ngram
from bytelm.models.transformer import entropy_model as transformer
from bytelm.models.transformer import model as byte_transformer
from bytelm.patching import entropy, fixed, space
from bytelm.patching.base import Patcher
from bytelm.units import BOS

WORDS = ("the", "of", "and", "to", "in", "patch", "byte", "model", "entropy", "a", "cat", "language", "raw", "length")


def text(size: int, seed: int) -> bytes:
    """Words in lines: as uneven in entropy as language."""
    generator = np.random.default_rng(seed)
    words = generator.choice(WORDS, size // 3)
    ends = np.where(generator.random(len(words)) < 0.1, "\n", " ")
    return "".join(word + end for word, end in zip(words, ends, strict=True)).encode()[:size]


def transformer_entropy_model() -> transformer.TransformerEntropyModel:
    """Untrained, but it has an opinion: no two of its entropies are equal."""
    entropy_model = transformer.Config(layers=1, dim=16, heads=2, attention_window=8, ffn_multiple=16).build()
    entropy_model.model.init_weights(1)
    with torch.no_grad():
        entropy_model.model.head.weight *= 4
    return entropy_model


def ngram_entropy_model(documents: list[np.ndarray]) -> ngram.NgramEntropyModel:
    entropy_model = ngram.Config(order=3, rows=4096).build()
    entropy_model.count(documents)
    return entropy_model


def tiny_blt(patcher: Patcher) -> blt.BLT:
    shape = {"local_dim": 16, "local_heads": 2, "cross_heads": 2, "global_dim": 16, "global_heads": 2}
    return blt.Config(**shape, global_layers=1, decoder_layers=1, ngram_sizes=(3,), ngram_rows=64).build(patcher)


def documents_of(data: bytes, sizes: list[int]) -> list[np.ndarray]:
    edges = np.cumsum([0, *sizes])
    return [np.frombuffer(data[a:b], np.uint8) for a, b in pairwise(edges)]


@given(opens=st.lists(st.booleans(), max_size=40), size=st.integers(1, 9))
def test_lengths_are_those_of_the_patches(opens: list[bool], size: int) -> None:
    opens[:1] = [True] * len(opens[:1])
    edges = [at for at, starts in enumerate(opens) if starts] + [len(opens)]
    pieces = [np.array(opens[at : at + size], bool) for at in range(0, len(opens), size)]
    assert patch_lengths(pieces) == Counter(b - a for a, b in pairwise(edges))


@pytest.mark.parametrize("chunk", [1, 4, 8192])
def test_opens_are_the_decisions_before_each_byte(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream, "CHUNK", chunk)
    patcher = space.Config().build()
    found = np.concatenate(list(opens_of(patcher, b"The quick fox, jumps")))
    assert np.flatnonzero(found).tolist() == [0, 4, 10, 14]  # |The |quick |fox,| jumps
    assert lengths_by_kind(patcher, [("", b"The quick fox, jumps")]) == {"": Counter({4: 2, 6: 2})}


def test_sizes_by_kind() -> None:
    patcher = fixed.Config(size=4).build()
    documents = [(".txt", bytes(8)), (".py", bytes(5)), (".txt", bytes(1)), ("", b""), (".txt", b"")]
    assert realised(patcher, documents) == {".py": 2.5, ".txt": 3.0}
    lengths = lengths_by_kind(patcher, documents)
    assert lengths[".txt"] == Counter({4: 2, 1: 1})
    assert mean_length(sum(lengths.values(), Counter())) == 14 / 5
    with pytest.raises(ValueError, match="at least one patch"):
        mean_length(Counter())


@pytest.mark.parametrize("chunk", [3, 8192])
@pytest.mark.parametrize("data", [b"", b"x", text(120, 2)])
def test_a_view_shows_the_patchers_own_decisions_and_its_entropy_models_entropies(
    data: bytes, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stream, "CHUNK", chunk)
    entropy_model = transformer_entropy_model()
    config = entropy.Config(threshold=1.8, max_length=None, max_single_byte_run=None)
    model = tiny_blt(config.build(entropy_model))
    view = patch_view(model, data)
    opens, _ = model.patcher.extend(torch.tensor([[BOS, *data]]))
    assert view.opens.tolist() == opens[0, : len(data)].tolist()
    assert view.entropies is not None
    # Byte 0 opens a patch whatever its entropy; the others where their own entropy is above the threshold.
    assert view.opens[1:].tolist() == (view.entropies[1:] > 1.8).tolist()
    assert len(view.entropies) == len(data)
    assert len(data) < 2 or 0 < view.opens[1:].mean() < 1


def test_a_view_of_other_patches_has_no_entropies() -> None:
    assert patch_view(tiny_blt(fixed.Config(size=2).build()), b"abc").entropies is None
    with pytest.raises(UsageError, match="ByteTransformer"):
        patch_view(byte_transformer.Config(layers=1, dim=16, heads=2).build(), b"abc")


def whole_mean(config: entropy.Config, entropy_model: Any, documents: list[np.ndarray]) -> float:
    return realised(config.build(entropy_model), [("", document) for document in documents])[""]


SIZES = [0, 1, 2, 700, 30, 2000, 6000, 3]


@pytest.mark.parametrize("rule", ["threshold", "relative", "both"])
@pytest.mark.parametrize("wanted", [1.5, 4.5, 12.0])
def test_calibration_meets_the_wanted_size(rule: str, wanted: float) -> None:
    entropy_model = transformer_entropy_model()
    documents = documents_of(text(sum(SIZES), 3), SIZES)
    config = calibrate(entropy.Config(target_mean_length=wanted, rule=rule), entropy_model, documents)
    assert whole_mean(config, entropy_model, documents) == pytest.approx(wanted, rel=0.01)
    assert (config.threshold is not None, config.relative_threshold is not None) == (
        rule != "relative",
        rule != "threshold",
    )


@pytest.mark.parametrize("rule", ["threshold", "relative", "both"])
@pytest.mark.parametrize("data", ["text", "random"])
def test_what_calibration_measures_is_what_the_patcher_does(rule: str, data: str) -> None:
    contents = text(6000, 4) if data == "text" else np.random.default_rng(4).bytes(6000)
    documents = documents_of(contents, [1500, 0, 3500, 1000])
    entropy_model = transformer_entropy_model()
    config = entropy.Config(rule=rule, max_length=20, max_single_byte_run=3)
    sample = calibration._Sample.of(entropy_model, documents)
    assert len(sample.entropies) == len(sample.rises) == 1499 + 3499 + 999
    for rank in (0, 1000, 3000, 5996, 5997):
        candidate = sample.cut(config, rank)
        # Nearly exact: a cut is amid its neighbours, but pieces of a document are not one pass to the last bit.
        assert sample.mean_length(candidate) == pytest.approx(whole_mean(candidate, entropy_model, documents), rel=2e-3)


@pytest.mark.parametrize("area", [1, 5000])
def test_how_the_sample_is_batched_does_not_matter(area: int, monkeypatch: pytest.MonkeyPatch) -> None:
    entropy_model, documents = transformer_entropy_model(), documents_of(text(sum(SIZES), 5), SIZES)
    config = entropy.Config(target_mean_length=3.0)
    once = calibrate(config, entropy_model, documents)
    monkeypatch.setattr(calibration, "AREA", area)
    assert calibrate(config, entropy_model, documents) == once


@pytest.mark.parametrize(
    ("wanted", "bounds"),
    [
        (3.5, {"max_length": None, "max_single_byte_run": 1}),  # drops many openings: more are needed than 1 in 3.5
        (3.5, {"max_length": 4, "max_single_byte_run": None}),  # adds many: fewer are needed
        (2.2, {"max_length": 6, "max_single_byte_run": 3}),
    ],
)
def test_the_guard_is_made_up_for(wanted: float, bounds: dict[str, int | None]) -> None:
    entropy_model, documents = transformer_entropy_model(), documents_of(np.random.default_rng(6).bytes(8000), [8000])
    held = calibrate(entropy.Config(target_mean_length=wanted, **bounds), entropy_model, documents)
    assert whole_mean(held, entropy_model, documents) == pytest.approx(wanted, rel=0.01)
    free = calibrate(
        entropy.Config(target_mean_length=wanted, max_length=None, max_single_byte_run=None), entropy_model, documents
    )
    assert whole_mean(free, entropy_model, documents) == pytest.approx(wanted, rel=0.01)
    bounded = entropy.Config(threshold=free.threshold, **bounds)
    assert whole_mean(bounded, entropy_model, documents) != pytest.approx(wanted, rel=0.01)


def test_a_size_that_the_guard_forbids_on_random_bytes_is_come_near_to() -> None:
    entropy_model, documents = transformer_entropy_model(), documents_of(np.random.default_rng(6).bytes(8000), [8000])
    config = entropy.Config(target_mean_length=1.2, max_single_byte_run=2)
    reached = whole_mean(calibrate(config, entropy_model, documents), entropy_model, documents)
    sample = calibration._Sample.of(entropy_model, documents)
    nearest = min(sample.mean_length(sample.cut(config, rank)) for rank in range(0, 8000, 200))
    assert nearest > 2
    assert reached == pytest.approx(nearest, rel=0.01)


def test_what_ties_forbid_is_not_claimed() -> None:
    documents = documents_of(np.random.default_rng(7).bytes(4000), [4000])
    constant = ngram.Config().build()  # as yet uncounted: every entropy is log 256
    config = calibrate(entropy.Config(target_mean_length=4.5, max_single_byte_run=None), constant, documents)
    # Everything opens, or nothing does but what the bound on length demands: patches of 1 are nearer than those of 32.
    assert whole_mean(config, constant, documents) == 1.0


def test_ngram_entropies_are_calibrated_as_near_as_their_ties_allow() -> None:
    documents = documents_of(text(20_000, 8), [10_000, 10_000])
    entropy_model = ngram_entropy_model(documents[:1])
    config = calibrate(entropy.Config(target_mean_length=4.0, rule="relative"), entropy_model, documents[:1])
    reached = whole_mean(config, entropy_model, documents[:1])
    sample = calibration._Sample.of(entropy_model, documents[:1])
    others = [sample.mean_length(sample.cut(config, rank)) for rank in range(0, 9999, 397)]
    assert abs(reached - 4.0) <= max(0.04, min(abs(other - 4.0) for other in others))
    # Held-out documents are reported as they are, not as they were wished.
    assert whole_mean(config, entropy_model, documents[1:]) == pytest.approx(reached, rel=0.1)


def test_calibration_refuses_what_cannot_be() -> None:
    entropy_model = ngram.Config().build()
    with pytest.raises(DataError, match="2 bytes"):
        calibrate(entropy.Config(), entropy_model, documents_of(b"a", [1, 0]))
    with pytest.raises(DataError, match="2 bytes"):
        calibrate(entropy.Config(), entropy_model, [])
    with pytest.raises(ConfigError, match="max_length = 4"):
        calibrate(entropy.Config(target_mean_length=4.5, max_length=4), entropy_model, documents_of(b"abcd", [4]))


@settings(max_examples=12)
@given(data=st.binary(min_size=2, max_size=300), wanted=st.floats(1.1, 30.0))
def test_calibration_comes_to_an_end_on_any_data(data: bytes, wanted: float) -> None:
    config = calibrate(
        entropy.Config(target_mean_length=wanted), transformer_entropy_model(), documents_of(data, [len(data)])
    )
    assert config.threshold is not None


def test_a_cut_lies_between_values() -> None:
    values: Tensor = torch.tensor([1.0, 2.0, 2.0, 4.0])
    cuts = [calibration._between(values, rank) for rank in range(5)]
    assert cuts == [0.5, 1.5, 2.0, 3.0, 4.5]
    assert [int((values > cut).sum()) for cut in cuts] == [4, 3, 1, 1, 0]
