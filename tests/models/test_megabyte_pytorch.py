"""MEGABYTE in its public form against MEGABYTE-pytorch and MBLM with the same random weights, and their checkpoints.

Tolerance: both sides round float32 in other orders, through a dozen layers whose sums are of order 1: differences of
some 1e-7 each. 1e-5 is far above what they add up to and far below what any error of ours would leave.
"""

from __future__ import annotations

import functools
import math
import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bytelm.checkpoint.assemble import Recipe
from bytelm.cli import run as cli
from bytelm.config import build, to_mapping
from bytelm.errors import CheckpointError, ConfigError, UsageError
from bytelm.interfaces.model import ByteModel
from bytelm.interfaces.objective import score
from bytelm.lm import load
from bytelm.models.megabyte_pytorch import published as exchange
from bytelm.models.megabyte_pytorch.model import Config
from bytelm.units import BOS, BYTES, EOS, PAD, VOCAB

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from MEGABYTE_pytorch import MEGABYTE

NEAR = 1e-5
PREFIXES = (1, 2, 3, 4, 5, 7, 8, 11, 12, 13, 23, 24, 25, 47, 60, 95, 96)
TWO: dict[str, Any] = {"dim": (32, 16), "depth": (2, 2), "max_seq_len": (24, 4)}
THREE: dict[str, Any] = {"dim": (24, 32, 16), "depth": (1, 2, 2), "max_seq_len": (8, 3, 4)}
SHAPES = {
    f"{name}, pos_emb={pos_emb}, rel_pos={rel_pos}": {**shape, "pos_emb": pos_emb, "rel_pos": rel_pos}
    for name, shape in (("two stages", TWO), ("three stages", THREE))
    for pos_emb in (False, True)
    for rel_pos in (False, True)
}


def text(length: int = 96) -> Tensor:
    """Two rows of every kind of byte, NULs and the largest among them."""
    rows = torch.randint(0, BYTES, (2, length), generator=torch.Generator().manual_seed(1))
    rows[0, : length // 3] = torch.arange(length // 3) % 3 * 127
    rows[1, length // 2 :] = 0
    return rows


@functools.cache
def theirs(name: str, tokens: int = BYTES) -> nn.Module:
    """Theirs with random weights, all of them: biases and norms too, which start as zeros and ones."""
    torch.manual_seed(0)
    return stirred(MEGABYTE(num_tokens=tokens, dim_head=8, heads=3, **SHAPES[name]))


def stirred(model: nn.Module) -> nn.Module:
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn_like(weight) * 0.1)
    return model.eval()


def imported(tensors: dict[str, Any], **options: Any) -> ByteModel:
    recipe = exchange.recipe(tensors, options)
    model = recipe.build()
    model.load_state_dict(exchange.renamed(tensors, recipe))
    return model.eval()


def opened(rows: Tensor) -> Tensor:
    return F.pad(rows, (1, 0), value=BOS)


def apart(one: Tensor, other: Tensor) -> float:
    return float((one - other).abs().max())


@pytest.mark.parametrize("name", SHAPES)
@torch.no_grad()
def test_logits_are_theirs_at_every_prefix(name: str) -> None:
    """Start tokens, token shift, norms, which output a patch is predicted from, positions: all, or logits differ."""
    model, rows = theirs(name), text()
    ours = imported(model.state_dict(), heads=3)
    found = ours(opened(rows))[0]
    worst = max(apart(found[:, 1 : n + 1, :BYTES], model(rows[:, :n])) for n in PREFIXES)
    assert worst < NEAR
    for n in PREFIXES:
        assert apart(ours(opened(rows[:, :n]))[0], found[:, : n + 1]) < NEAR


@pytest.mark.parametrize("name", ["two stages, pos_emb=True, rel_pos=True", "three stages, pos_emb=True, rel_pos=True"])
@torch.no_grad()
def test_the_first_byte_and_the_loss_are_theirs(name: str) -> None:
    """What the start tokens predict scores byte 0: the sum of nats is their loss, if no id is padding."""
    model, rows = theirs(name), text()
    model.pad_id = -100
    ours = imported(model.state_dict(), heads=3)
    first = model.to_logits(model.transformers[-1](model.start_tokens[-1][None, None]))
    assert apart(ours(torch.tensor([[BOS]]))[0][..., :BYTES], first) < NEAR
    nats, count = score(ours, opened(rows))
    loss = model(rows.view(2, *model.max_seq_len), return_loss=True)
    model.pad_id = 0
    assert int(count) == rows.numel()
    assert float(nats) / rows.numel() == pytest.approx(float(loss), rel=1e-6)


@pytest.mark.parametrize("name", SHAPES)
@torch.no_grad()
def test_reading_byte_by_byte_is_reading_whole(name: str) -> None:
    ours, rows = imported(theirs(name).state_dict(), heads=3), opened(text())
    whole, nothing = ours(rows)
    assert nothing is None
    state = ours.initial_state(2)
    for t in range(rows.shape[1]):
        logits, state = ours(rows[:, t : t + 1], state)
        assert apart(logits[:, 0], whole[:, t]) < NEAR


@torch.no_grad()
def test_a_new_byte_does_not_run_the_prefix_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Positions that go through blocks: one or two for a byte, and in the global stage only where a patch ends."""
    ours = imported(theirs("three stages, pos_emb=False, rel_pos=True").state_dict(), heads=3)
    seen: list[tuple[int, int]] = []
    for level, part in enumerate((*ours.outer, ours.inner)):
        part.stack.blocks[0].register_forward_pre_hook(lambda _, x, level=level: seen.append((level, x[0].shape[1])))
    state = ours.initial_state(1)
    seen.clear()
    for t, symbol in enumerate(opened(text(96))[0]):
        seen.clear()
        _, state = ours(symbol[None, None], state)
        between = t > 0 and t % 4 == 0 and t % 12 != 0
        wanted = {0} if t > 0 and t % 12 == 0 else set()
        assert {level for level, _ in seen} == wanted | ({1} if between else set()) | {2}
        assert max(width for _, width in seen) <= 2


# --- older checkpoints ------------------------------------------------------------------------------------------------


def of_one_head(tensors: dict[str, Tensor], width: int = 8) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """A checkpoint with one head of keys and values, as before 0.3.0; and the same, that head repeated for each."""
    one, many = dict(tensors), dict(tensors)
    for name, tensor in tensors.items():
        if name.endswith("to_kv.weight"):
            keys, values = (part[:width] for part in tensor.chunk(2))
            one[name] = torch.cat([keys, values])
            many[name] = torch.cat([keys.repeat(3, 1), values.repeat(3, 1)])
    return one, many


@pytest.mark.parametrize("name", SHAPES)
@torch.no_grad()
def test_one_head_of_keys_for_all_queries(name: str) -> None:
    model, rows = theirs(name), text()
    one, many = of_one_head(model.state_dict())
    other = MEGABYTE(num_tokens=BYTES, dim_head=8, heads=3, **SHAPES[name]).eval()
    other.load_state_dict(many)
    ours = imported(one)
    assert ours.config.multi_query and ours.config.heads[0] == 3
    found = ours(opened(rows))[0][:, :, :BYTES]
    assert max(apart(found[:, 1 : n + 1], other(rows[:, :n])) for n in PREFIXES) < NEAR
    _, state = ours(opened(rows), ours.initial_state(2))
    assert state.caches[-1][0].keys.shape[2] == 1  # one head is kept, not three of the same


# --- MBLM -------------------------------------------------------------------------------------------------------------

KINDS = {
    "two stages": ((32, 16), (2, 2), (24, 4), (None, None), (False, False)),
    "three stages": ((24, 32, 16), (1, 2, 2), (8, 3, 4), (None, None, None), (True, True, True)),
    "three stages, positions of every kind": (
        *((24, 32, 16), (1, 2, 2), (8, 3, 4)),
        *(("rope", "fixed", None), (False, True, False)),
    ),
    "two stages, positions": ((32, 16), (1, 2), (24, 4), ("fixed", "rope"), (True, False)),
}


def mblm(name: str) -> tuple[nn.Module, list[dict[str, Any]], dict[str, Any]]:
    """Theirs with random weights, its blocks, and what else it was built from."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        package = pytest.importorskip("mblm")
    dims, layers, lengths, positions, turned = KINDS[name]
    blocks = [
        {"attn_head_dims": 4 + 4 * stage, "attn_num_heads": 3 - stage, "attn_use_rot_embs": turn, "pos_emb_type": kind}
        for stage, (kind, turn) in enumerate(zip(positions, turned, strict=True))
    ]
    shape = {"num_tokens": 256, "pad_token_id": 0, "hidden_dims": dims, "num_layers": layers, "seq_lens": lengths}
    torch.manual_seed(0)
    made = [package.TransformerBlock(**block) for block in blocks]
    model = package.MBLM(package.MBLMModelConfig(**shape, train_checkpoint_chunks=None, block=made))
    return stirred(model), [block.model_dump() for block in made], shape


def mblm_logits(model: nn.Module, rows: Tensor) -> Tensor:
    import mblm as package

    return model(rows, return_type=package.MBLMReturnType.LOGITS)


@pytest.mark.parametrize("name", KINDS)
@torch.no_grad()
def test_mblm(name: str) -> None:
    """Blocks of their own a stage, and positions by which vectors of bytes or patches are turned."""
    model, blocks, shape = mblm(name)
    rows = text()
    found = imported(model.state_dict(), block=blocks, **shape)(opened(rows))[0][:, :, :BYTES]
    assert max(apart(found[:, 1 : n + 1], mblm_logits(model, rows[:, :n])) for n in PREFIXES) < NEAR


@torch.no_grad()
def test_older_mblm_names_patch_embeddings_by_numbers() -> None:
    model, blocks, _ = mblm("three stages")
    old = model.state_dict()
    for k in range(3):
        for new, number in (("embedding", "0"), ("_post.1", "2"), ("_post.2", "3"), ("_post.3", "4")):
            for part in ("weight", "bias"):
                if (tensor := old.pop(f"token_embs_rev.{k}.{new}.{part}", None)) is not None:
                    old[f"token_embs_rev.{k}.{number}.{part}" if k else f"token_embs_rev.0.{part}"] = tensor
    rows = text()
    found = imported({"MODEL": old, "LOSS": 1.0}, block=blocks)(opened(rows))[0][:, 1:, :BYTES]
    assert apart(found, mblm_logits(model, rows)) < NEAR


def test_mamba_stages_and_what_else_of_mblm_is_refused() -> None:
    model, blocks, _ = mblm("two stages")
    good = model.state_dict()
    mamba = {**good, "stage_models.0.layers.0.mixer.A_log": torch.zeros(3)}
    refused(ConfigError, mamba, r"layers.0.mixer.A_log: .* Mamba stages are not supported", block=blocks)
    for block, words in (
        ({"d_state": 16, "d_conv": 4, "expand": 2, "headdim": 4}, "block_type = 'mamba' of stage 1 is not supported"),
        ({**blocks[1], "block_type": "transformerEncoder"}, "'transformerEncoder' of stage 1 is not supported"),
        ({**blocks[1], "pos_emb_type": "alibi"}, "pos_emb_type = 'alibi' of stage 1 is not supported"),
        ({**blocks[1], "qk_norm": True}, "stage 1: option qk_norm = True is not supported"),
        ({**blocks[1], "attn_num_heads": 1}, r"heads = \(3, 1\), but the tensors have \(3, 2\)"),
        ("transformer", "block of stage 1 = 'transformer': give its settings as a table"),
    ):
        refused(ConfigError, good, words, block=[blocks[0], block])
    refused(ConfigError, good, "block is missing: MBLM's tensors do not contain pos_emb_type")
    refused(ConfigError, good, "block: 1 blocks for 2 stages", block=blocks[:1])
    refused(ConfigError, good, "option mask_token_id = 3 is not supported", block=blocks, mask_token_id=3)


# --- ids, lengths, recipes --------------------------------------------------------------------------------------------


@torch.no_grad()
def test_specials_that_are_not_known_are_unlikely_and_can_be_learnt() -> None:
    model = imported(theirs("two stages, pos_emb=False, rel_pos=False").state_dict(), heads=3)
    logits = model(opened(text()))[0]
    assert (logits[..., BYTES:] == exchange.UNLIKELY).all()
    assert float(logits.softmax(-1)[..., BYTES:].sum(-1).max()) < 1e-10
    with torch.enable_grad():
        score(model, torch.tensor([[BOS, 0, EOS]]))[0].backward()
    assert float(model.head.bias.grad[EOS]) < -0.9 and float(model.head.weight.grad[EOS].abs().max()) > 0


@pytest.mark.parametrize("tokens", [257, 260])
@torch.no_grad()
def test_ids_beyond_bytes_are_left_out(tokens: int) -> None:
    name = "three stages, pos_emb=False, rel_pos=True"
    model, rows = theirs(name, tokens), text()
    ours = imported(model.state_dict(), heads=3)
    logits = ours(opened(rows))[0]
    assert apart(logits[:, 1:, :BYTES], model(rows)[..., :BYTES]) < NEAR
    assert (logits[..., BYTES:] == exchange.UNLIKELY).all()
    for part in ours.outer:
        assert not part.byte.weight[BYTES:].any()
    assert not ours.inner.byte.weight[[PAD, EOS, VOCAB - 1]].any()


@pytest.mark.parametrize("tokens", [8, 255, 261, 16000])
def test_a_vocabulary_that_is_not_of_bytes_is_refused(tokens: int) -> None:
    model = theirs("two stages, pos_emb=False, rel_pos=False", tokens)
    refused(ConfigError, model.state_dict(), f"num_tokens = {tokens}: a model of bytes has 256 ids, and up to 260")


@torch.no_grad()
def test_learned_positions_bound_a_document_and_others_do_not() -> None:
    long = torch.zeros(1, 200, dtype=torch.long)
    bound = imported(theirs("two stages, pos_emb=True, rel_pos=False").state_dict(), heads=3)
    bound(opened(long[:, :96]))
    with pytest.raises(
        UsageError, match=r"a document of 97 bytes is longer than the 96 .*model.patches = 24, of 4 bytes"
    ):
        bound(opened(long[:, :97]))
    _, state = bound(opened(long[:, :90]), bound.initial_state(1))
    with pytest.raises(UsageError, match="a document of 97 bytes"):
        bound(long[:, :7], state)
    bound(torch.cat([opened(long[:, :96]), opened(long[:, :96])], 1))  # each of two documents fits
    free = imported(theirs("two stages, pos_emb=False, rel_pos=True").state_dict(), heads=3)
    assert free(opened(long))[0].isfinite().all()


def test_a_recipe_survives_being_written_down() -> None:
    tensors = theirs("three stages, pos_emb=True, rel_pos=True").state_dict()
    recipe = exchange.recipe(tensors, {})
    assert recipe.model == Config(
        *((3, 4), (24, 32, 16), (1, 2, 2), (3, 3, 3), (8, 8, 8), (4, 4, 4), (True,) * 3, ("learned",) * 3, 8)
    )
    assert build(Recipe, to_mapping(recipe), "here") == recipe


@pytest.mark.parametrize("key", ["model", "state_dict"])
@torch.no_grad()
def test_a_state_dict_under_a_key_in_half_precision_from_several_devices(key: str) -> None:
    name = "two stages, pos_emb=False, rel_pos=True"
    tensors = theirs(name).state_dict()
    wrapped = {key: {f"module.{n}": x.half() for n, x in tensors.items()}, "step": 7}
    plain, other = imported(tensors), imported(wrapped)
    rows = opened(text())
    assert 0 < apart(plain(rows)[0], other(rows)[0]) < 0.05
    assert {p.dtype for p in other.parameters()} == {torch.float32}


@pytest.mark.parametrize("root", ["_orig_mod.", "net.", "model.", "module._orig_mod.", "model.net."])
@torch.no_grad()
def test_a_state_dict_of_a_wrapped_model(root: str) -> None:
    tensors, rows = theirs("two stages, pos_emb=False, rel_pos=True").state_dict(), opened(text())
    wrapped = {f"{root}{name}": tensor for name, tensor in tensors.items()}
    assert torch.equal(imported(wrapped)(rows)[0], imported(tensors)(rows)[0])


@torch.no_grad()
def test_feed_forward_layers_of_any_width() -> None:
    model = MEGABYTE(num_tokens=BYTES, dim_head=8, heads=3, **TWO, rel_pos=True)
    for width, dim, transformer in zip((50, 21), TWO["dim"], model.transformers, strict=True):
        for _, feed_forward in transformer.layers:
            feed_forward[1], feed_forward[4] = nn.Linear(dim, width), nn.Linear(width, dim)
    rows, ours = text(), imported(stirred(model).state_dict())
    assert ours.config.ffn_dims == (50, 21)
    assert apart(ours(opened(rows))[0][:, 1:, :BYTES], model(rows)) < NEAR


# --- bad input --------------------------------------------------------------------------------------------------------


def refused(kind: type[Exception], tensors: dict[str, Any], words: str, **options: Any) -> None:
    with pytest.raises(kind, match=words) as caught:
        imported(tensors, **options)
    assert isinstance(caught.value, CheckpointError) or "\n" not in str(caught.value)


def test_what_is_no_such_checkpoint_is_refused() -> None:
    good = theirs("two stages, pos_emb=False, rel_pos=False").state_dict()
    refused(CheckpointError, {}, "no start_tokens.0: it is neither of MEGABYTE-pytorch nor of MBLM")
    refused(CheckpointError, {"weight": torch.zeros(3)}, "no start_tokens.0")
    refused(CheckpointError, {**good, "step": 7}, "'step', which is not a tensor")
    one = {n: x for n, x in good.items() if n != "start_tokens.1"}
    refused(ConfigError, one, "one stage is a plain Transformer", heads=3)
    extra = {**good, "surprise.weight": torch.zeros(3), "transformers.0.layers.0.0.to_gate.weight": torch.zeros(1)}
    refused(CheckpointError, extra, r"unexpected  surprise.weight  float32 \[3\]\n.*unexpected  .*to_gate", heads=3)


@pytest.mark.parametrize(
    "name", ["two stages, pos_emb=False, rel_pos=False", "three stages, pos_emb=True, rel_pos=True"]
)
def test_every_missing_tensor_is_noticed(name: str) -> None:
    """Whichever it is; most of them by name."""
    good = theirs(name).state_dict()
    named = 0
    for lost in good:
        rest = {n: x for n, x in good.items() if n != lost}
        with pytest.raises((CheckpointError, ConfigError)) as caught:
            imported(rest, heads=3)
        named += lost in str(caught.value)
    assert named >= len(good) - 8


def test_every_wrong_shape_and_every_nan_is_noticed() -> None:
    good = theirs("three stages, pos_emb=True, rel_pos=True").state_dict()
    for name, tensor in good.items():
        if name != "pos_embs.0.weight":  # whose length is that of the longest document
            with pytest.raises((CheckpointError, ConfigError)):
                imported({**good, name: torch.cat([tensor, tensor[:1]])}, heads=3)
        with pytest.raises((CheckpointError, ConfigError)):
            imported({**good, name: tensor[None]}, heads=3)
        sick = tensor.clone()
        sick.view(-1)[0] = math.nan
        with pytest.raises((CheckpointError, ConfigError), match=f"not finite  {name}|inv_freq"):
            imported({**good, name: sick}, heads=3)


def test_options_that_are_missing_or_not_theirs_are_refused() -> None:
    good = theirs("two stages, pos_emb=False, rel_pos=False").state_dict()
    refused(ConfigError, good, "heads is missing: .*the 24 rows of transformers.0.*give heads or dim_head")
    for options, words in (
        ({"heads": 5}, "heads of width 4 do not divide the 24 rows|heads"),
        ({"heads": (3, 3, 3)}, r"heads = \(3, 3, 3\): give an integer, or 2 of them, one per stage"),
        ({"heads": "3"}, "heads = '3': give an integer"),
        ({"heads": 0}, "heads"),
        ({"dim_head": 0}, "heads of width 0"),
        ({"heads": 3, "dim_head": 4}, r"heads = \(3, 3\), but the tensors have \(6, 6\)"),
        ({"heads": 3, "max_seq_len": (24, 8)}, r"max_seq_len = \(24, 8\), but the tensors have \(None, 4\)"),
        ({"heads": 3, "dim": (32, 32)}, r"dim = \(32, 32\), but the tensors have \(32, 16\)"),
        ({"heads": 3, "depth": 3}, r"depth = \(3, 3\), but the tensors have \(2, 2\)"),
        ({"heads": 3, "ff_mult": 2}, "ff_mult"),
        ({"heads": 3, "rel_pos": True}, "rel_pos"),
        ({"heads": 3, "pos_emb": True}, "pos_emb"),
        ({"heads": 3, "num_tokens": 300}, "num_tokens = 300, but the tensors have 256"),
        ({"heads": 3, "alibi": True}, "option alibi = True is not supported; those that are: num_tokens, max_seq_len"),
    ):
        refused(ConfigError, good, words, **options)
    fine = {"dim": (32, 16), "depth": 2, "max_seq_len": [9, 4], "ff_mult": 4, "flash_attn": True, "attn_dropout": 0.1}
    imported(good, heads=3, dim_head=8, rel_pos=False, pos_emb=False, num_tokens=256, pad_id=0, ff_dropout=0.1, **fine)


def test_other_frequencies_are_refused() -> None:
    good = theirs("two stages, pos_emb=False, rel_pos=True").state_dict()
    name = "transformers.1.rotary_emb.inv_freq"
    refused(ConfigError, {**good, name: good[name] * 1.1}, f"{name}: not the frequencies of theta = 10000")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"sizes": ()}, "give one each per stage"),
        ({"dims": (32,)}, "1 dims, 2 layers"),
        ({"sizes": (1,)}, r"model.sizes = \[1\]: each must be at least 2"),
        ({"rotary": (True, False), "head_dims": (7, 8)}, r"model.head_dims\[0\] = 7: rotary needs an even width"),
        ({"positions": ("none", "rotary"), "dims": (32, 15)}, r"model.dims\[1\] = 15: rotary positions need an even"),
        ({"positions": ("learned", "none")}, r'model.patches = none: give at least 1 .*; it is "learned"'),
        ({"patches": 9}, r'model.patches = 9: give at least 1 .*; it is "none"'),
    ],
)
def test_impossible_shapes_are_refused(change: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        Config(**change)


# ---- the command


def test_convert_makes_a_run_that_writes_the_same(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    theirs = MEGABYTE(num_tokens=256, dim=(32, 16), depth=(2, 1), max_seq_len=(64, 4), heads=2, dim_head=8).eval()
    folder = tmp_path / "theirs"
    folder.mkdir()
    torch.save({"model": theirs.state_dict(), "step": 7}, folder / "model.pt")
    words = ["--format", "megabyte", "--set", "heads=2", "--set", "max_seq_len=[64,4]"]
    assert cli(["convert", str(folder), str(tmp_path / "run"), *words]) == 0
    ids = torch.tensor([[*b"\x00any\xffbytes"]])
    for _ in range(9):
        with torch.no_grad():
            ids = torch.cat([ids, theirs(ids)[:, -1].argmax(-1, keepdim=True)], 1)
    lm = load(tmp_path / "run")
    assert lm.generate(b"\x00any\xffbytes", max_bytes=9, temperature=0.0, eos=False) == bytes(ids[0, -9:].tolist())
    assert lm.context == 256
    assert cli(["convert", str(folder), str(tmp_path / "other"), "--format", "megabyte"]) == 2
    assert "heads is missing" in capsys.readouterr().err and not (tmp_path / "other").exists()
    torch.save(theirs.state_dict(), folder / "older.pt")
    assert cli(["convert", str(folder), str(tmp_path / "other"), *words]) == 4
    assert "2 files of weights (model.pt, older.pt)" in capsys.readouterr().err
    assert cli(["convert", str(tmp_path / "none.pt"), str(tmp_path / "other"), *words]) == 4
    assert "missing" in capsys.readouterr().err
    (folder / "older.pt").write_bytes(b"\x80\x02cos\nsystem\nq\x00X\x05\x00\x00\x00falseq\x01\x85q\x02Rq\x03.")
    assert cli(["convert", str(folder / "older.pt"), str(tmp_path / "other"), *words]) == 4
    assert "nothing in it was executed" in capsys.readouterr().err


@pytest.mark.parametrize("name", SHAPES)
def test_a_dry_run_and_a_check(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save(theirs(name).state_dict(), tmp_path / "model.pt")
    words = ["convert", str(tmp_path / "model.pt"), str(tmp_path / "run"), "--format", "megabyte", "--set", "heads=3"]
    assert cli([*words, "--dry-run"]) == 0
    assert "to_logits.weight" in (out := capsys.readouterr().out) and "inner.byte.weight" in out
    assert not (tmp_path / "run").exists()
    assert cli([*words, "--check"]) == 0
    assert re.search(r"logits:  equal to \d\.\de-0[5-9] ", capsys.readouterr().out)
