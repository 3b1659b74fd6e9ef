"""Strided and sliding reading: what they take from where, and that the laws hold for them as for any model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import bytelm
from bytelm.cli import run as cli
from bytelm.errors import UsageError
from bytelm.evaluate.bits import logprobs, nats_of_document
from bytelm.evaluate.windowing import Sliding, Strided, sliding, strided
from bytelm.interfaces.model import ByteModel
from bytelm.models.blt import model as blt
from bytelm.models.megabyte import model as megabyte
from bytelm.models.transformer import model as transformer
from bytelm.patching import fixed
from bytelm.testing import MODEL_INVARIANTS, UniformModel
from bytelm.units import BOS, BYTES

SMALL = megabyte.Config(sizes=(4,), dims=(32, 16), layers=(2, 2), heads=(2, 2), ffn_multiple=16, reach=2)
LAWS = ("causality", "split", "state", "dynamic_batching", "documents", "sums")


def made() -> ByteModel:
    model = SMALL.build()
    model.init_weights(0)
    return model


def wrapped(name: str) -> ByteModel:
    return {
        "strided": lambda: strided(made()),
        "sliding": lambda: sliding(made(), 24),
        "both": lambda: sliding(strided(made()), 21),
    }[name]()


@pytest.mark.parametrize("invariant", LAWS)
@pytest.mark.parametrize("name", ["strided", "sliding", "both"])
def test_the_laws_hold(name: str, invariant: str) -> None:
    MODEL_INVARIANTS[invariant](wrapped(name), 3, 2)


def read(model: ByteModel, text: bytes) -> Tensor:
    with torch.no_grad():
        return model(torch.tensor([[BOS, *text]]))[0][0]


def test_late_places_come_from_the_reading_that_begins_half_a_patch_later() -> None:
    text = bytes(range(40, 70))
    inner = made()
    first, second = read(inner, text), read(inner, text[2:])
    found = read(strided(inner), text)
    # Offset t predicts byte t. From the second patch on, places 2 and 3 are places 0 and 1 of the other reading.
    for t in range(len(text) + 1):
        late = t >= 4 and t % 4 >= 2
        assert torch.allclose(found[t], second[t - 2] if late else first[t], atol=1e-5), t
        assert not late or not torch.allclose(found[t], first[t], atol=1e-3)


def test_a_window_is_predicted_from_what_it_holds() -> None:
    """And sliding over a document in one stream is measuring it in windows that overlap by half."""
    inner, text = made(), bytes(np.random.default_rng(0).integers(0, 256, 90, np.uint8))
    windows = nats_of_document(inner, text, context=24, stride=12)
    streamed = -logprobs(sliding(inner, 24), b"", text)
    assert np.allclose(windows, streamed, atol=1e-5)
    assert not np.allclose(windows, -logprobs(inner, b"", text), atol=1e-3)


def test_no_row_reads_more_than_its_context() -> None:
    """So learned positions are never used up."""
    model = megabyte.Config(**{**SMALL.__dict__, "positions": 24}).build()
    model.init_weights(0)
    assert len(logprobs(sliding(model, 24), b"", bytes(200))) == 200
    with pytest.raises(UsageError, match="positions = 24"):
        logprobs(model, b"", bytes(200))


def test_the_cost_of_windows_is_counted() -> None:
    inner = made()
    assert strided(inner).flops(40, 0) == inner.flops(40, 0) + inner.flops(38, 0)
    assert sliding(inner, 16).flops(30, 0) == inner.flops(16, 0) * 2 + inner.flops(14, 0)


def test_what_cannot_be_read_so_is_refused_in_one_line() -> None:
    plain = transformer.Config(layers=1, dim=16, heads=2, ffn_multiple=16).build()
    with pytest.raises(UsageError, match="ByteTransformer has none: use basic or sliding"):
        strided(plain)
    patched = blt.Config.tiny()["no n-grams"].build(fixed.Config(4).build())
    with pytest.raises(UsageError, match="BLT would place other patch boundaries: use basic"):
        sliding(patched, 64)
    with pytest.raises(UsageError, match="context = 1"):
        sliding(plain, 1)
    assert isinstance(sliding(plain, 8), Sliding) and isinstance(strided(made()), Strided)
    assert sliding(UniformModel(), 4).device == torch.device("cpu")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of a small MEGABYTE, trained for thirty steps as a user would: long enough never to end a line of text."""
    home = tmp_path_factory.mktemp("inference")
    (home / "text.txt").write_bytes(b"".join(b"line %d of a text\n" % i for i in range(400)))
    shape = ["sizes=[4]", "dims=[32,16]", "layers=[1,1]", "heads=[2,2]", "reach=2", "positions=64", "ffn_multiple=16"]
    sets = [*(f"model.{s}" for s in shape), "train.context_length=64", "train.batch=2", "train.sample_bytes=0"]
    words = ["train", str(home / "text.txt"), "--preset", "megabyte-tiny", "--steps", "30", "--run", str(home / "run")]
    assert cli([*words, *(word for s in sets for word in ("--set", s)), "--quiet"]) == 0
    return home / "run"


def test_eval_takes_each_way_to_read(run: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """The stride is what was told, and no two ways say the same; all count every byte once."""
    found: dict[str, Any] = {}
    for mode in ("basic", "sliding", "strided", "both"):
        assert cli(["eval", str(run), str(run.parent / "text.txt"), "--windowing", mode, "--json"]) == 0
        found[mode] = json.loads(capfd.readouterr().out)
    assert [verdict["stride"] for verdict in found.values()] == [64, 32, 64, 32]
    assert len({verdict["bits"] for verdict in found.values()}) == 4
    assert {verdict["bytes"] for verdict in found.values()} == {(run.parent / "text.txt").stat().st_size}
    assert cli(["eval", str(run), "--windowing", "both", "--stride", "8"]) == 2
    assert "--windowing both cannot be combined with --stride" in capfd.readouterr().err


def test_generation_goes_on_beyond_the_positions_where_it_slides(run: Path, capfd: pytest.CaptureFixture[str]) -> None:
    words = ["generate", str(run), "line", "--max-bytes", "200", "--json", "--temperature", "0"]
    assert cli(words) == 2
    assert "longer than model.positions = 64" in capfd.readouterr().err
    texts: dict[str, str] = {}
    for mode in ("sliding", "both"):
        assert cli([*words, "--windowing", mode]) == 0
        texts[mode] = json.loads(capfd.readouterr().out)["hex"]
    lm = bytelm.load(run)
    greedy = lm.with_windowing("sliding").generate(b"line", max_bytes=200, temperature=0)
    assert texts["sliding"] == greedy.hex()
    ids, out = [BOS, *b"line"], bytearray()  # by hand: a window of 64, then ever 32 of it and what came since
    with torch.no_grad():
        for _ in range(len(greedy)):
            seen = ids if len(ids) <= 64 else ids[32 * (-(-(len(ids) - 64) // 32)) :]
            logits = lm.model(torch.tensor([seen]))[0][0, -1, :BYTES]
            out.append(int(logits.argmax()))
            ids.append(out[-1])
    assert bytes(out) == greedy
