"""Costs: what is executed is counted again by other instruments, what is published comes out, and the verb shows it."""

from __future__ import annotations

import json
import math
import random
import xml.etree.ElementTree as ET
from collections import Counter
from copy import copy
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from bytelm import decoding
from bytelm.checkpoint.assemble import Recipe
from bytelm.cli import run as cli
from bytelm.compare.figures import MEANS, Figure, figures
from bytelm.decoding import open_decoder
from bytelm.evaluate.costs import costs, counted
from bytelm.interfaces.model import ByteModel
from bytelm.models.blt import model as blt
from bytelm.models.blt.decoder import BLTDecoder
from bytelm.models.blt.model import BLT
from bytelm.models.hnet.model import HNet
from bytelm.models.linear import model as linear
from bytelm.models.megabyte import model as megabyte
from bytelm.models.megabyte.model import Megabyte
from bytelm.models.megabyte_pytorch import model as megabyte_pytorch
from bytelm.models.megabyte_pytorch.model import MegabytePyTorch
from bytelm.models.ngram import entropy_model as ngram
from bytelm.models.perceiver import model as perceiver
from bytelm.models.transformer import model as transformer
from bytelm.models.transformer.entropy_model import Config as EntropyModelConfig
from bytelm.nn import fused
from bytelm.nn.cross import CrossAttention
from bytelm.patching import entropy, fixed
from bytelm.report.charts import line_chart
from bytelm.testing import UniformModel, tiny_models
from bytelm.testing.examples import document
from bytelm.testing.tiny import initialized
from bytelm.training.settings import configure
from bytelm.units import BOS, VOCAB, show_count

MODELS = dict(tiny_models())
TWO = replace(blt.Config.tiny()["all layers crossed, widened"], encoder_cross="last")
MODELS["blt (two layers, the last crossed)"] = initialized(TWO.build(fixed.Config().build()), 0)
PLAIN = ("linear", "megabyte_pytorch", "hnet (published)")  # models that the kernels do not know
LENGTH = 48  # ids: whole patches of every tiny MEGABYTE, and more than every window


# --- what is executed -------------------------------------------------------------------------------------------------


class Instrument(TorchDispatchMode):
    """Counts what torch is asked to do beside matrix products: rows looked up, and the work inside cross-attention."""

    def __init__(self, model: ByteModel) -> None:
        super().__init__()
        self.bags, self.cross, self.one_hot = 0, 0, 0
        self.inside: CrossAttention | None = None
        self.hooks: list[Any] = []
        for module in model.modules():
            if isinstance(module, CrossAttention):
                self.hooks.append(module.register_forward_pre_hook(self.enter))
                self.hooks.append(module.register_forward_hook(self.leave))

    def enter(self, module: nn.Module, _: Any) -> None:
        assert isinstance(module, CrossAttention)
        self.inside = module

    def leave(self, *_: Any) -> None:
        self.inside = None

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        for hook in self.hooks:
            hook.remove()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func.__name__
        if name.startswith("_embedding_bag"):
            self.bags += args[1].numel() * args[0].shape[1]  # index, table
        elif name.startswith("embedding.") and len(args[0]) in (VOCAB, 300):
            self.one_hot += 2 * args[1].numel() * args[0].numel()
        elif self.inside is not None and name == "mul.Tensor" and isinstance(out, Tensor):
            # Keys times queries and weights times values, `[..., k, heads, head_dim]`: each number is then added up.
            heads = self.inside.heads
            if out.ndim >= 4 and tuple(out.shape[-2:]) == (heads, self.inside.out.in_features // heads):
                self.cross += 2 * out.numel()
        return out


def read(model: ByteModel, ids: Tensor) -> int:
    """Read a document as a model that decides its own patches does. Returns how many there are."""
    if not isinstance(model, BLT):
        model(ids)
        return 1 if model.chunking is None else int(model.chunking.counts[0])
    opens, _ = model.patcher.extend(ids)
    model(ids, None, opens)
    return int(opens.sum())


def waiting(model: ByteModel) -> int:
    """What is not looked up in tables of bytes yet: BOS, and the bytes of patches that are still open."""
    if not isinstance(model, MegabytePyTorch):
        return 0
    whole = {part: (LENGTH - 1) // part.unit for part in model.outer}
    for part in model.outer[1:]:
        whole[part] -= whole[part] // part.size  # the last sub-patch of a patch never is
    return sum(2 * part.byte.weight.numel() * (LENGTH - count * part.unit) for part, count in whole.items())


def as_cut(model: ByteModel, depth: NDArray[np.int64] | None = None) -> ByteModel:
    """The model; of one that cuts its patches itself, one that aims at the lengths of what it has just read.

    `depth`: in how many stages each id opened a patch, if something else than `model` read them.
    """
    if not isinstance(model, HNet) or (depth is None and model.chunking is None):
        return model
    if depth is None:
        assert model.chunking is not None
        depth = model.chunking.depth[0].numpy()
    counts = [LENGTH, *(int((depth > stage).sum()) for stage in range(len(model.config.ratios)))]
    found = copy(model)
    found.config = replace(model.config, ratios=tuple(a / b for a, b in pairwise(counts)))
    return found


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_executed_is_what_other_instruments_count(name: str) -> None:
    """Matrix products, the scorer's too, by torch's counter; what is added to them by what torch was asked to do."""
    model = MODELS[name]
    ids = torch.tensor([[BOS, *document(random.Random(0), 10 * LENGTH)[: LENGTH - 1]]])
    counters = FlopCounterMode(display=False), Instrument(model)
    with fused.plain(), sdpa_kernel(SDPBackend.MATH), counters[0] as flops, counters[1] as seen:
        patches = read(model, ids)
    found = counted(as_cut(model), LENGTH, LENGTH / patches)
    size = LENGTH / patches if model.tokens is not None else 1
    products = flops.get_total_flops()
    assert found.executed * LENGTH * size == pytest.approx(products + seen.bags + seen.cross, rel=1e-12)
    one_hot = (found.hnet - found.executed) * LENGTH * size - waiting(model)
    assert one_hot == pytest.approx(seen.one_hot, rel=1e-12)
    assert seen.one_hot > 0
    if isinstance(model, BLT):
        assert seen.cross and (seen.bags or not model.config.ngram_sizes)


def test_a_entropy_model_that_is_a_table_costs_nothing() -> None:
    model = blt.Config.tiny()["last layer crossed"]
    some = [
        Recipe(model, entropy.Config(), entropy_model)  # not calibrated: it need not be
        for entropy_model in (ngram.Config(), EntropyModelConfig(layers=1, dim=16, heads=2))
    ]
    free, paid, fixed_ = (costs(recipe, 64, 4.0) for recipe in (*some, Recipe(model, fixed.Config())))
    assert free == fixed_
    assert paid.entropy_model > 0 and free.entropy_model == 0
    assert (paid.parameters, paid.tables, paid.paper) == (free.parameters, free.tables, free.paper)
    assert paid.executed > free.executed and paid.read > free.read
    assert paid.hnet - paid.executed == free.hnet - free.executed + 2 * VOCAB * 16


# --- parameters -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_parameters_are_tables_and_the_rest(name: str) -> None:
    """By their names: an output matrix is no table, and MEGABYTE's is what its last stage embeds bytes with."""
    model, found = MODELS[name], counted(MODELS[name], 64)
    own = {key: p.numel() for key, p in model.named_parameters() if not key.startswith("patcher.")}
    tied = "line.embed.byte.weight"
    ends = ("embedding.weight", ".byte.weight", ".ngram.weight", ".position.weight", ".pad.weight")
    tables = sum(count for key, count in own.items() if key != tied and (key.endswith(ends) or key.startswith("pads.")))
    assert (found.parameters, found.tables) == (sum(own.values()), tables)
    assert found.entropy_model == sum(p.numel() for p in model.parameters()) - found.parameters


# --- bytes read -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in MODELS if not name.startswith(PLAIN)])
def test_read_is_what_the_kernels_read(name: str) -> None:
    """To the byte, but for MEGABYTE's table, which is float32 in a model that is, though its layers are rounded."""
    model = MODELS[name]
    if reason := decoding.why_plain(model):
        pytest.skip(reason)
    decoder = open_decoder(model, rows=1, capacity=LENGTH, quantize="bf16")
    decoder.read(np.zeros(LENGTH, np.int64), np.array([BOS, *random.Random(0).randbytes(LENGTH - 1)]))
    mean = LENGTH / int(decoder.patches.closed[0, -1]) if isinstance(decoder, BLTDecoder) else 1.0
    table = 2 * model.table.weight.numel() if isinstance(model, Megabyte) else 0
    if isinstance(model, HNet):  # with rounded weights it cuts elsewhere than `model`
        model = as_cut(model, decoder.depth(0))
        mean = model.config.ratios[0]
    found = counted(model, 2 * LENGTH, mean).read
    assert found == pytest.approx(decoder.traffic(LENGTH) - table, rel=1e-12)


def test_a_linear_transformer_reads_its_weights_and_its_sums() -> None:
    name, model = next((name, model) for name, model in MODELS.items() if name.startswith("linear"))
    state = model(torch.tensor([[BOS, 1, 2]]), model.initial_state(1))[1]
    sums = sum(tensor.nbytes for layer in state.sums for tensor in (layer.products, layer.keys))
    weights = sum(2 * p.numel() for key, p in model.named_parameters() if p.ndim == 2 and "embedding" not in key)
    assert counted(model, 64).read == counted(model, 6400).read == weights + sums, name


# --- what is published ------------------------------------------------------------------------------------------------


def test_the_papers_figures_come_out() -> None:
    """BLT 8B at three patch sizes and Llama 3 8B, by App. B with feed-forward layers exactly four times as wide."""
    model = replace(configure("blt-8b").model, ffn_multiple=1)
    for mean, wanted in ((4.5, 3.45e9), (6.0, 2.63e9), (8.0, 2.03e9)):
        assert costs(Recipe(model, fixed.Config()), 16384, mean).paper == pytest.approx(wanted, rel=2e-3)
    llama = transformer.Config(32, 4096, 32, ffn_multiple=1, vocabulary=128256)
    assert costs(Recipe(llama), round(16384 / 4.4), 4.4).paper == pytest.approx(3.39e9, rel=2e-3)
    assert costs(Recipe(configure("blt-8b").model, fixed.Config()), 16384, 4.5).paper == pytest.approx(3.45e9, rel=0.01)


@pytest.mark.parametrize(
    ("layers", "stages", "wanted"), [(24, (24, 15), (705e6, 706e6)), (22, (14, 18), (646e6, 645e6))]
)
def test_megabytes_pairs_are_matched(layers: int, stages: tuple[int, int], wanted: tuple[float, float]) -> None:
    """Tables 5 and 1 on whole windows, which is what is executed; by the papers' formulas they are 6 % apart."""
    plain = costs(Recipe(transformer.Config(layers, 1024, 16, ffn_multiple=1)), 1024)
    ours = costs(Recipe(megabyte.Config((8,), (2048, 1024), stages, (32, 16), ffn_multiple=1)), 8192)
    assert (plain.executed, ours.executed) == pytest.approx(wanted, rel=1e-3)
    assert 1.05 < ours.paper / plain.paper < 1.07


def test_formulas_by_hand() -> None:
    """Each architecture's, at shapes small enough to do on paper; 3 x 16 is the feed-forward width of 16."""
    layer = 2 * (4 * 16**2 + 3 * 16 * 48)
    head = 2 * 16 * VOCAB
    full = transformer.Config(2, 16, 2, ffn_multiple=16)
    windowed, tokens = replace(full, attention_window=6), replace(full, vocabulary=300)
    assert costs(Recipe(full), 31).paper == 2 * (layer + 4 * 16 * 16) + head
    assert costs(Recipe(windowed), 31).paper == 2 * (layer + 4 * 16 * 3.5) + head
    assert costs(Recipe(tokens), 31, 4.0).paper == (2 * (layer + 4 * 16 * 16) + 2 * 16 * 300) / 4
    assert costs(Recipe(linear.Config(2, 16, 2, ffn_multiple=16)), 31).paper == 2 * (layer + 9 * 16) + head
    latents = perceiver.Config(5, 2, 16, 2, ffn_multiple=16)
    assert costs(Recipe(latents), 31).paper == layer + 4 * 16 * 16 + 2 * (layer + 4 * 16 * 3) + head
    two = megabyte.Config((4,), (16, 16), (3, 2), (2, 2), reach=3, ffn_multiple=16)
    outer, inner = 3 * (layer + 2 * 16 * 8) / 4, 2 * (layer + 2 * 16 * (4 + 3))
    assert costs(Recipe(two), 32).paper == outer + inner + head
    other = megabyte_pytorch.Config((4,), (16, 16), (3, 2), (2, 2), (4, 8), (2, 3))
    outer = 3 * (4 * 16 * (2 * 8 + 32) + 2 * 8 * 8) / 4
    inner = 2 * (4 * 16 * (2 * 16 + 48) + 2 * 16 * 4)
    assert costs(Recipe(other), 32).paper == outer + inner + head
    # 2 + 2 layers of 16 in windows of 6, 2 layers of 48, k = 2, feed-forward widths of 24, 16 and 56
    crossed = blt.Config.tiny()["all layers crossed, widened"]
    latent = 2 * (2 * (4 * 48**2 + 3 * 48 * 16) + 4 * 48 * (32 / 4 + 1) / 2) / 4
    local = 4 * (2 * (4 * 16**2 + 3 * 16 * (24 + 56) / 2) + 4 * 16 * 3.5) + head
    pooled = 2 * (4 * 16 * 5 / 2 + (2 * 2 + 2) * 2 * 16**2) * 2 / 4  # r = n_p / k = 2, and k / n_p queries a byte
    asked = 2 * (4 * 16 * 3 / 2 + (2 * 0.5 + 2) * 2 * 16**2)  # r = k / n_p = 1 / 2
    assert costs(Recipe(crossed, fixed.Config()), 32, 4.0).paper == latent + local + pooled + asked
    assert costs(Recipe(TWO, fixed.Config()), 32, 4.0).paper == latent + local + pooled / 2 + asked


def test_tokens_share_what_they_cost_among_their_bytes() -> None:
    recipe = Recipe(transformer.Config.tiny()["tokens"])
    one, four = costs(recipe, 40), costs(recipe, 40, 4.0)
    for name in ("paper", "executed", "hnet", "read"):
        assert getattr(one, name) == pytest.approx(4 * getattr(four, name))
    assert one.tables == four.tables == 300 * 16
    assert costs(Recipe(transformer.Config()), 40) == costs(Recipe(transformer.Config()), 40, 4.0)


def test_an_architecture_without_formulas_costs_what_it_multiplies() -> None:
    class Twice(UniformModel):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(8, 16)

        def flops(self, ids: int, patches: int) -> int:
            return 2 * ids * 8 * 16

    found = counted(Twice(), 64)
    assert (found.paper, found.executed, found.read) == (256, 256, 2 * 8 * 16)


# --- figures and verb -------------------------------------------------------------------------------------------------


def line(figure: Figure, name: str, convention: str) -> list[float]:
    return [getattr(point, convention) for point in figure.lines[name]]


@pytest.fixture(scope="module")
def drawn() -> list[Figure]:
    return figures()


@pytest.mark.parametrize("convention", ["paper", "executed"])
def test_figures_say_what_the_papers_say(drawn: list[Figure], convention: str) -> None:
    size, length, _ = drawn
    # MEGABYTE is cheaper than every other model of its size or more, from 100M to 100B and beyond.
    for point in size.lines["MEGABYTE"]:
        for name in ("Transformer", "linear"):
            above = [getattr(p, convention) for p in size.lines[name] if p.x > 0.95 * point.x]
            assert above and getattr(point, convention) < min(above)
    ours, plain, flat = (line(length, name, convention) for name in ("MEGABYTE", "Transformer", "linear"))
    assert len({point.x for points in length.lines.values() for point in points}) == len(ours) == 10
    assert all(a < b < c for a, b, c in zip(ours, flat, plain, strict=True))
    # Flat but for the first chunks, whose sums are added up in smaller products.
    assert max(flat) < 1.002 * min(flat) and plain[-1] > 20 * plain[0] and 2 * ours[0] < ours[-1] < 4 * ours[0]


def test_the_figure_of_patches(drawn: list[Figure]) -> None:
    found = drawn[2]
    alone, scored, tokens = (line(found, name, "paper") for name in ("BLT", "with entropy model", "BPE"))
    assert alone == sorted(alone, reverse=True) and len(set(tokens)) == 1
    at = dict(zip(MEANS, alone, strict=True))
    assert at[4.5] == pytest.approx(tokens[0], rel=0.03)  # matched, as the paper says
    assert at[8.0] == pytest.approx(0.6 * tokens[0], rel=0.03)  # and 40 % less
    assert scored[5] / alone[5] == pytest.approx(1.06, abs=0.005)
    config = configure("blt-8b")
    whole = [costs(config.recipe, 16384, mean).executed for mean in (4.5, 16.0)]
    assert [p.executed for p in found.lines["with entropy model"] if p.x in (4.5, 16.0)] == pytest.approx(whole)


NUMBERS = st.floats(1e-9, 1e12) | st.sampled_from([0.0, -1.0, math.nan, math.inf])


@given(st.lists(st.tuples(st.floats(0, 9), NUMBERS), max_size=12))
@settings(max_examples=100, deadline=None)
def test_any_points_can_be_drawn_with_a_logarithmic_axis(points: list[tuple[float, float]]) -> None:
    root = ET.fromstring(line_chart({"one": points}, "x", "y", "t", log_y=True))
    good = sorted(p for p in points if math.isfinite(p[1]) and p[1] > 0)
    circles = [float(circle.attrib["cy"]) for circle in root.iter("circle")]
    assert len(circles) == len(good)
    assert all(30 <= cy <= 240 for cy in circles)
    for (_, low), (_, high), below, above in zip(good, good[1:], circles, circles[1:], strict=False):
        assert low == high or (low < high) == (below > above) or abs(below - above) <= 0.1


def test_a_power_law_is_a_straight_line() -> None:
    root = ET.fromstring(line_chart({"": [(10.0**k, 10.0 ** (2 * k)) for k in range(5)]}, "", "", "", True, log_y=True))
    steps = np.diff([[float(circle.attrib[key]) for key in ("cx", "cy")] for circle in root.iter("circle")], axis=0)
    assert np.allclose(steps, steps[0], atol=0.11)


def test_the_verb_counts_everything(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert cli(["costs", "--json", "--svg", str(tmp_path / "costs.svg")]) == 0
    found = json.loads(capfd.readouterr().out)
    by_name = {row["preset"]: row for row in found["presets"]}
    row = by_name["blt-8b"]
    assert (row["context_length"], row["mean"]) == (8192, 4.5)
    assert row["paper"] < row["executed"] < row["hnet"] and row["parameters"] - row["tables"] < 7e9 < row["parameters"]
    assert [figure["title"].split(",")[0] for figure in found["figures"]] == [
        "Model size",
        "Sequence length",
        "Patch size",
    ]
    root = ET.fromstring((tmp_path / "costs.svg").read_text())
    tags = Counter(element.tag.rpartition("}")[2] for element in root.iter())
    points = sum(len(points) for figure in found["figures"] for points in figure["lines"].values())
    assert tags["polyline"] == 2 * 9 and tags["circle"] == 2 * points
    words = " ".join(text for element in root.iter() if (text := element.text))
    charts = iter(text for element in root.iter() if element.tag.endswith("desc") and (text := element.text))
    for figure in found["figures"]:
        for convention in ("paper", "executed"):
            said = next(charts)
            for name, points in figure["lines"].items():
                first, last = (f"{show_count(p[convention])} at {show_count(p['x'])}" for p in (points[0], points[-1]))
                assert f"{name}: {len(points)} points, from {first} to {last}." in said
    assert "BPE: a Transformer as large as" in words and "http" not in words


def test_the_verb_counts_what_it_is_asked(capfd: pytest.CaptureFixture[str]) -> None:
    assert cli(["costs", "byte-tiny", "blt-tiny"]) == 0
    out = capfd.readouterr().out
    assert "byte-tiny" in out and "blt-tiny" in out and "megabyte" not in out and "Sequence length" not in out
    assert cli(["costs", "blt-tny"]) == 2
    error = capfd.readouterr().err
    assert "did you mean 'blt-tiny'?" in error and error.count("\n") == 1
