"""MEGABYTE against the paper: each equation by itself, what each prediction sees, and what its memory grows with."""

from __future__ import annotations

import dataclasses
import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from bytelm.config import nominal_size, preset, preset_names
from bytelm.errors import ConfigError, UsageError
from bytelm.evaluate.patches import patch_view
from bytelm.interfaces.objective import score
from bytelm.models.megabyte import model as megabyte
from bytelm.models.megabyte.model import Config, Megabyte
from bytelm.nn.attention import CausalPattern, RowPositions
from bytelm.nn.transformer import Stack
from bytelm.testing import models as invariants
from bytelm.testing.exact import exact
from bytelm.testing.pretend import moved, pretend
from bytelm.training.settings import describe
from bytelm.units import BOS, BYTES, EOS

SMALL = Config(sizes=(4,), dims=(32, 16), layers=(2, 2), heads=(2, 2), ffn_multiple=16, positions=64)
TEXT = bytes(range(250, 256)) + bytes(5) + b"any bytes"  # 20 of them: 5 patches of 4


def made(config: Config, seed: int = 0) -> Megabyte:
    model = config.build()
    model.init_weights(seed)
    return model


def whole(stack: Stack, x: Tensor) -> Tensor:
    """Causal blocks over `[batch, positions, dim]`, each row by itself."""
    batch, length, _ = x.shape
    starts = torch.zeros(batch, length, dtype=torch.bool)
    view = stack.view(torch.full((batch,), length), starts, RowPositions.zero(batch), None)
    assert isinstance(view, CausalPattern)
    return stack(x, view, None)[0]


class Paper:
    """The equations of section 2.2 on one sequence of bytes, K patches of P, written out one by one."""

    def __init__(self, model: Megabyte, text: bytes) -> None:
        self.model, self.x = model, torch.tensor(list(text))
        self.patch = model.config.patch
        self.patches = len(text) // self.patch

    def embedded(self) -> Tensor:
        """Eq. 1: h_embed[t] = E_global[x_t] + E_pos[t]. (Row 0 of our E_pos is BOS's, so that byte t has row t + 1.)"""
        embed: Any = self.model.embed[0]
        return embed.byte.weight[self.x] + embed.position.weight[1 : len(self.x) + 1]

    def pad(self) -> Tensor:
        """E_global-pad, P vectors of width D_G: the last one is BOS's own."""
        embed: Any = self.model.embed[0]
        return torch.cat([embed.pad.weight, embed.byte.weight[BOS][None] + embed.position.weight[:1]])

    def global_in(self) -> Tensor:
        """Eq. 2: the pad, then all patches but the last, each P·D_G wide."""
        patches = self.embedded().view(self.patches, -1)
        return torch.cat([self.pad().view(1, -1), patches[:-1]])

    def global_out(self) -> Tensor:
        """Eq. 3."""
        outer = self.model.outer
        return outer.norm(whole(outer.stack, self.global_in()[None]))[0]

    def local_in(self) -> Tensor:
        """Eq. 4: w_GL times the slice of each place, plus the byte before it, or the local pad at place 0."""
        inner: Any = self.model.inner[0]
        table = self.model.byte.weight
        found = torch.zeros(self.patches, self.patch, table.shape[1], dtype=table.dtype)
        for k, out in enumerate(self.global_out()):
            for p, part in enumerate(out.view(self.patch, -1)):
                before = table[BOS] if p == 0 else table[self.x[k * self.patch + p - 1]]
                found[k, p] = inner.condition.weight @ part + before
        return found

    def local_out(self) -> Tensor:
        """Eq. 5: each patch by itself."""
        inner: Any = self.model.inner[0]
        return torch.cat([inner.norm(whole(inner.stack, patch[None])) for patch in self.local_in()])

    def logits(self) -> Tensor:
        """Eq. 6: the output matrix is the table of the local bytes."""
        return self.local_out().flatten(0, 1) @ self.model.byte.weight.T


def inputs_of(module: torch.nn.Module, model: Megabyte, ids: Tensor) -> Tensor:
    """What a part of the model is given in a whole pass."""
    seen: list[Tensor] = []
    handle = module.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0]))
    model(ids)
    handle.remove()
    return seen[0]


@torch.no_grad()
def test_the_model_is_the_paper_equation_by_equation() -> None:
    """Each against what the model gives to the part that comes next."""
    with exact(made(SMALL)) as model:
        assert isinstance(model, Megabyte)
        paper, ids = Paper(model, TEXT), torch.tensor([[BOS, *TEXT[:-1]]])
        first: Any = model.outer.stack.blocks[0]
        inner: Any = model.inner[0]
        found = {
            "eqs. 1-2": (inputs_of(first, model, ids)[0], paper.global_in()),
            "eq. 3": (inputs_of(inner, model, ids), None),
            "eq. 4": (inputs_of(inner.stack.blocks[0], model, ids), paper.local_in()),
            "eq. 6": (model(ids)[0][0], paper.logits()),
        }
        parts = inputs_of(inner.condition, model, ids)
        found["eq. 3"] = parts[0], paper.global_out().view(paper.patches, paper.patch, -1)
        for equation, (ours, theirs) in found.items():
            assert (ours - theirs).abs().max() < 1e-12, equation
    assert ours.std() > 0.1


@torch.no_grad()
def test_the_local_model_reads_each_patch_by_itself() -> None:
    """Eq. 5: with all global outputs the same, equal patches have equal logits wherever they stand."""
    with exact(made(SMALL)) as model:
        assert isinstance(model, Megabyte)
        inner: Any = model.inner[0]
        inner.condition.weight.zero_()
        logits = model(torch.tensor([[BOS, *b"abcdxxxxabcdabc"]]))[0][0].view(4, 4, -1)
        assert torch.equal(logits[0], logits[2]) and torch.equal(logits[0], logits[3])
        assert not torch.equal(logits[0, 1:], logits[1, 1:])


def seen_by(config: Config, length: int, *, only_local: bool = False) -> list[str]:
    """Line i: "#" for each byte j that the prediction of byte i depends on, found by changing each byte in turn."""
    model = made(config)
    parts: list[Any] = [*model.inner, *([] if model.line is None else [model.line])]
    for inner in parts if only_local else ():
        torch.nn.init.zeros_(inner.condition.weight)
    text = torch.arange(length)
    ids = torch.cat([torch.tensor([BOS]), text])[None].repeat(length + 1, 1)
    for j in range(length):
        ids[1 + j, 1 + j] = 200
    with torch.no_grad(), exact(model) as precise:
        logits = precise(ids[:, :-1])[0]
    changed = ((logits[1:] - logits[0]).abs() > 1e-9).any(-1)  # [changed byte, prediction]
    return ["".join(".#"[int(mark)] for mark in line) for line in changed.T]


def test_which_bytes_each_prediction_sees() -> None:
    """Patches of 4. Through both models everything before; the first byte of a patch sees the whole patch before."""
    assert seen_by(SMALL, 12) == ["#" * i + "." * (12 - i) for i in range(12)]
    assert seen_by(SMALL, 12, only_local=True) == [
        "............",
        "#...........",
        "##..........",
        "###.........",
        "............",
        "....#.......",
        "....##......",
        "....###.....",
        "............",
        "........#...",
        "........##..",
        "........###.",
    ]


def test_which_bytes_cross_patch_attention_adds() -> None:
    """One local layer, reach 2: the cells of places 2 and 3, which hold bytes 1 and 2 of the patch before.

    Its last byte is in no cell of the local model: it opens the next patch, where the pad stands for it.
    """
    one = dataclasses.replace(SMALL, layers=(1, 1), reach=2)
    assert seen_by(one, 12, only_local=True) == [
        "............",
        "#...........",
        "##..........",
        "###.........",
        ".##.........",
        ".##.#.......",
        ".##.##......",
        ".##.###.....",
        ".....##.....",
        ".....##.#...",
        ".....##.##..",
        ".....##.###.",
    ]
    two = seen_by(dataclasses.replace(one, layers=(1, 2)), 12, only_local=True)
    assert two[8] == ".##.###....."  # a second layer reaches two patches back


def test_which_bytes_a_byte_stage_across_patches_sees() -> None:
    """One local layer, a window of 3 bytes, whatever the patches; n-grams of 4 reach three bytes further back."""
    one = dataclasses.replace(SMALL, layers=(1, 1), local_window=3)
    assert seen_by(one, 12) == ["#" * i + "." * (12 - i) for i in range(12)]
    window = ["".join(".#"[i - 3 <= j < i] for j in range(12)) for i in range(12)]
    assert seen_by(one, 12, only_local=True) == window
    reached = ["".join(".#"[i - 6 <= j < i] for j in range(12)) for i in range(12)]
    assert seen_by(dataclasses.replace(one, ngram_sizes=(4,)), 12, only_local=True) == reached


@torch.no_grad()
def test_a_byte_stage_across_patches_reads_the_slices_of_eq_4() -> None:
    """What its blocks are given: the byte itself, also where a patch starts, and w_GL times the slice of its place."""
    config = dataclasses.replace(SMALL, local_window=5, ngram_sizes=(2,), ngram_rows=11)
    with exact(made(config)) as model:
        assert isinstance(model, Megabyte) and model.line is not None
        ids, line = torch.tensor([[BOS, *TEXT[:-1]]]), model.line
        stack: Any = line.stack.blocks
        outer = inputs_of(line.condition, model, ids)  # the slice of each byte
        wanted = Paper(model, TEXT).global_out().view(-1, outer.shape[-1])
        assert (outer[0] - wanted).abs().max() < 1e-12
        own = line.embed(ids, ids == BOS, line.embed.initial_state(1))
        assert (inputs_of(stack[0], model, ids) - own - line.condition(outer)).abs().max() < 1e-12


def test_which_bytes_three_stages_see() -> None:
    """Patches of 3 × 2 bytes. Without the global stage's share: the sub-patches of the own patch, and within them."""
    config = Config(sizes=(3, 2), dims=(24, 16, 16), layers=(1, 1, 1), heads=(2, 2, 2), ffn_multiple=16)
    assert seen_by(config, 12) == ["#" * i + "." * (12 - i) for i in range(12)]
    model = made(config)
    torch.nn.init.zeros_(model.inner[0].condition.weight)  # type: ignore[union-attr]
    ids = torch.tensor([[BOS, *range(12)], [BOS, *range(5), 200, *range(6, 12)], [BOS, 200, *range(1, 12)]])
    with torch.no_grad(), exact(model) as precise:
        logits = precise(ids)[0]
    changed = [((logits[row] - logits[0]).abs() > 1e-9).any(-1).int().tolist() for row in (1, 2)]
    assert changed[0] == [0] * 13  # the last byte of a patch reaches later ones through the global stage alone
    assert changed[1] == [0] + [1] * 5 + [0] * 7  # and the first one the rest of its own patch


@torch.no_grad()
def test_convolutions_see_the_bytes_before_across_patches() -> None:
    """Filters of 3 and 5 reach 2 + 4 bytes back; documents stay apart (the laws hold that)."""
    embed: Any = made(dataclasses.replace(SMALL, filters=(3, 5))).embed[0]
    ids = torch.arange(40)[None]
    slots, lengths = torch.arange(0, 40, 4)[None], torch.tensor([40])
    state = embed.initial_state(1, ids.device)
    base, _ = embed(ids, ids, slots, lengths, state)
    other = ids.clone()
    other[0, 13] = 200
    changed, _ = embed(other, ids, slots, lengths, state)
    # Byte 13 is in the patch that ends at slot 16 (13 to 16); what follows within 6 is in the next one (17 to 20).
    assert (changed != base)[0].any(-1).tolist() == [False] * 4 + [True] * 2 + [False] * 4


def test_nul_is_a_byte_like_any_other() -> None:
    """A window of nothing but NULs has a finite loss and a gradient, and every byte value counts and trains."""
    for config in Config.tiny().values():
        model = made(config)
        nats, count = score(model, torch.tensor([[BOS, *bytes(30), EOS]]))
        assert int(count) == 30 and 30 < nats.item() < math.inf
        nats.backward()
        table: Any = model.table.weight.grad
        assert table[0].abs().max() > 1e-3
        model.zero_grad()
        nats, count = score(model, torch.tensor([[BOS, *range(BYTES)]]))
        assert int(count) == BYTES
        nats.backward()
        embedded: Any = table if model.line is not None else model.embed[0].byte.weight.grad  # type: ignore[union-attr]
        # The last bytes of the last patch are predicted, and read by nobody.
        read = BYTES - BYTES % config.patch - (config.patch if BYTES % config.patch == 0 else 0)
        assert (embedded[:read].abs().amax(1) > 0).all()
        for pad in ("embed.0.pad.weight", *(["pads.0.weight"] if len(config.sizes) > 1 else [])):
            assert model.get_parameter(pad).grad.abs().max() > 0  # type: ignore[union-attr]
        assert table[BOS].abs().max() > 0  # the local pad


def test_the_output_matrix_is_the_table_of_local_bytes() -> None:
    model = made(SMALL)
    names = [name for name, p in model.named_parameters() if BOS < p.shape[0] < 300]
    assert names == ["embed.0.byte.weight", "byte.weight"]  # E_global and E_local, and no third


@pytest.mark.parametrize("name", Config.tiny())
def test_patches_in_pieces_are_patches_at_once(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """For values with a state and without one, and for gradients when they are computed again."""
    model = made(Config.tiny()[name])
    ids = torch.randint(0, BYTES, (2, 90), generator=torch.Generator().manual_seed(1))
    ids[0, 0] = ids[1, 40] = BOS
    found: list[list[Tensor]] = []
    with exact(model) as precise:
        for piece, recompute in ((1 << 30, False), (700, True), (1, True)):
            monkeypatch.setattr(megabyte, "PIECE", piece)
            for module in precise.modules():
                if isinstance(module, Stack):
                    module.recompute = recompute
            precise.zero_grad()
            nats, _ = score(precise, ids)
            nats.backward()
            found.append([nats.detach(), *(p.grad for p in precise.parameters() if p.grad is not None)])
            invariants.split(precise, 5, 2)  # type: ignore[arg-type]
    assert len(found[0]) == len(list(model.parameters())) + 1
    for one, other in pairwise(found):
        assert all((a - b).abs().max() < 1e-10 * (1 + a.abs().max()) for a, b in zip(one, other, strict=True))


def kept_for_backward(patches: int, recompute: bool) -> int:
    """Numbers that a pass over so many patches of 16 keeps until its gradient is taken, logits not counted."""
    model = made(Config(sizes=(16,), dims=(64, 32), layers=(1, 2), heads=(2, 2), ffn_multiple=16))
    for module in model.modules():
        if isinstance(module, Stack):
            module.recompute = recompute
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        if tensor.is_floating_point() and not isinstance(tensor, torch.nn.Parameter):
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes() // tensor.element_size()
        return tensor

    ids = torch.zeros(1, 16 * patches, dtype=torch.long)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        logits, _ = model(ids)
    del logits
    return sum(kept.values())


def test_memory_grows_with_the_patches_when_it_is_spared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(megabyte, "PIECE", 1 << 12)
    spared = [kept_for_backward(patches, True) / patches for patches in (32, 64)]
    plain = [kept_for_backward(patches, False) / patches for patches in (32, 64)]
    assert spared[1] < 1.1 * spared[0] and spared[1] < plain[1] / 8


def test_a_device_reads_larger_pieces_where_no_gradients_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    model, sizes = made(SMALL), list[int]()
    piece = Megabyte.piece

    def seen(self: Megabyte, inner: Any, cells: Tensor, *rest: Any) -> Any:
        sizes.append(cells.shape[1])
        return piece(self, inner, cells, *rest)

    monkeypatch.setattr(Megabyte, "piece", seen)
    monkeypatch.setattr(megabyte, "PIECE", 1)
    with torch.no_grad(), pretend():
        moved(model)(torch.zeros(1, 16, dtype=torch.long))
    assert sizes == [4]
    with torch.no_grad():
        model(torch.zeros(1, 16, dtype=torch.long))
    assert sizes == [4, 1, 1, 1, 1]


def test_the_patches_that_are_shown_are_those_that_are_counted() -> None:
    """A patch opens after BOS and every four bytes: where the model takes a global step."""
    model = made(SMALL)
    view = patch_view(model, TEXT)
    steps: list[int] = []
    model.outer.norm.register_forward_hook(lambda *_: steps.append(1))
    with torch.inference_mode():
        state, taken = model.initial_state(1), list[int]()
        for symbol in (BOS, *TEXT[:-1]):
            steps.clear()
            _, state = model(torch.tensor([[symbol]]), state)
            taken.append(len(steps))
    assert taken == view.opens.astype(int).tolist() == [1, 0, 0, 0] * 5


def test_a_patch_is_fed_and_scored_in_one_call() -> None:
    """And a decode step takes no global step but where a patch opens."""
    model = made(SMALL)
    with torch.inference_mode():
        steps: list[int] = []
        model.outer.norm.register_forward_hook(lambda *_: steps.append(1))
        logits, state = model(torch.tensor([[BOS, *TEXT[:4]]]), model.initial_state(1))
        assert logits.shape[1] == 5 and len(steps) == 1
        again, _ = model(torch.tensor([[*TEXT[4:8]]]), state)
        steps.clear()
        alone: list[Tensor] = []
        for byte in TEXT[4:8]:
            logits, state = model(torch.tensor([[byte]]), state)
            alone.append(logits[0])
        assert len(steps) == 1 and torch.allclose(torch.cat(alone), again[0], atol=1e-5)


def test_a_document_longer_than_its_positions_is_refused_in_one_line() -> None:
    with pytest.raises(UsageError, match=r"a document of 65 ids is longer than model\.positions = 64"):
        made(SMALL)(torch.tensor([[BOS, *bytes(64)]]))
    ids = torch.tensor([[BOS, *bytes(50), BOS, *bytes(50)]])
    assert made(SMALL)(ids)[0].isfinite().all()  # each of the two is short enough


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dims": (32,)}, "1 dims, 2 layers and 2 heads for 1 sizes"),
        ({"sizes": (1,)}, r"model.sizes = \[1\]: each must be at least 2"),
        ({"reach": 5}, "model.reach = 5: must be from 0 to the smallest of sizes, 4"),
        ({"heads": (3, 2)}, "stage 0 of: 3 heads do not divide width 32"),
        ({"positions": 0}, "model.positions = 0"),
        ({"sizes": ()}, "for 0 sizes"),
        ({"local_window": 0}, "stage 1 of: window 0 must be at least 1"),
        ({"local_window": 8, "reach": 2}, "model.reach = 2: no stage is left inside patches with model.local_window"),
        ({"ngram_sizes": (3,)}, r"model.ngram_sizes = \[3\]: n-grams need model.local_window"),
        ({"local_window": 8, "ngram_sizes": (1,)}, "model.ngram_sizes must be at least 2"),
    ],
)
def test_impossible_shapes_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        dataclasses.replace(SMALL, **changes)


def test_logits_of_a_plain_softmax_are_cross_entropies() -> None:
    """`score` is the sum over bytes of -log p, the first byte included."""
    model = made(SMALL)
    ids = torch.tensor([[BOS, *TEXT]])
    with torch.no_grad():
        nats, count = score(model, ids)
        logits = model(ids[:, :-1])[0]
    assert int(count) == len(TEXT)
    assert float(nats) == pytest.approx(float(F.cross_entropy(logits[0], ids[0, 1:], reduction="sum")), rel=1e-6)


def nominal_counts(dims: list[int], layers: list[int], patch: int) -> int:
    """Weights of attention and feed-forward layers and of w_GL and projections, by a formula of its own."""
    found = 0
    for dim, depth in zip(dims, layers, strict=True):
        hidden = -(-(8 * dim // 3) // 256) * 256
        found += depth * (4 * dim * dim + 3 * dim * hidden)
    part = -(-dims[0] // patch)
    projections = 0 if part * patch == dims[0] else 2 * part * patch * dims[0]
    return found + projections + part * dims[1]


@pytest.mark.parametrize("name", [name for name in preset_names() if nominal_size(name)])
def test_presets_of_the_paper_have_the_parameters_of_their_tables(name: str) -> None:
    """All but the tables of bytes and positions, the pads and the norms, which are a thousandth; and they assemble."""
    told = describe(name)
    model = preset(name)["model"]
    wanted = nominal_counts(model["dims"], model["layers"], model["sizes"][0])
    counts: Any = told
    rest = 260 * (-(-model["dims"][0] // model["sizes"][0]) + model["dims"][1])
    rest += model.get("positions", model["sizes"][0]) * -(-model["dims"][0] // model["sizes"][0])
    rest += sum((-(-model["dims"][0] // model["sizes"][0])) ** 2 * width for width in model.get("filters", ()))
    assert abs(counts["parameters"] - wanted - rest) < 0.002 * counts["parameters"]
    sizes = [float(n[:-1]) * {"M": 1e6, "B": 1e9}[n[-1]] for n in str(told["nominal"]).split(" + ")]
    # The paper names sizes after GPT-3's family, which counts a vocabulary of 50,000; ours have 256 bytes.
    assert 0.6 * sum(sizes) < wanted < 1.02 * sum(sizes)
    context = preset(name)["train"]["context_length"]
    assert model["positions"] == context
