"""n-gram tables that stay in main memory while the model is on a (pretended) device, and what their memory is."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from bytelm import decoding
from bytelm.checkpoint import assemble
from bytelm.decoding import open_decoder
from bytelm.errors import ResourceError, UsageError
from bytelm.generate.prompts import generate
from bytelm.generate.sampling import Sampling
from bytelm.interfaces.objective import score
from bytelm.models.blt.model import BLT
from bytelm.native import library
from bytelm.testing import tiny_models
from bytelm.testing.pretend import Far, moved, near, pretend
from bytelm.training import estimate
from bytelm.training.memory import predict
from bytelm.training.run import train
from bytelm.training.settings import configure
from bytelm.units import BOS, PAD
from trainable import made
from trainings import SPACES, held

MODELS = {name: model for name, model in tiny_models() if isinstance(model, BLT)}
NAME = "encoder.embed.ngram.weight"


def on_host(name: str) -> BLT:
    found = dict(tiny_models())[name]
    assert isinstance(found, BLT)
    found.encoder.embed.on_host = True
    return found


@pytest.mark.parametrize("name", MODELS)
def test_logits_loss_and_gradients_are_the_same_and_only_the_gradient_of_tables_comes_back(name: str) -> None:
    """Where there are no n-grams nothing comes back."""
    model = on_host(name).train()
    ids = torch.tensor([[BOS, *b"the cat sat on the mat"], [BOS, *b"on and on and on and o"]])
    opens = torch.arange(ids.shape[1]).remainder(4).eq(0).expand(ids.shape)
    with pretend() as seen:
        far = moved(model)
        tables = [table.weight for table in far.lookup_tables()]
        assert not any(isinstance(table, Far) for table in tables) and isinstance(far.decoder.head.weight, Far)
        logits, _ = far(ids, None, opens)
        loss, _ = score(far, ids, boundaries=opens)
        assert not seen.fetches  # nothing is waited for in the forward pass
        loss.backward()
        assert sum(seen.fetches.values()) == len(tables)
    model.encoder.embed.on_host = False
    wanted, _ = model(ids, None, opens)
    torch.testing.assert_close(near(logits.detach()), wanted.detach(), rtol=1e-4, atol=1e-4)
    score(model, ids, boundaries=opens)[0].backward()
    for key, parameter in model.named_parameters():
        if parameter.grad is not None:
            found = near(far.get_parameter(key).grad)
            torch.testing.assert_close(found, parameter.grad, rtol=1e-3, atol=1e-4, msg=key)


@pytest.mark.parametrize("name", MODELS)
def test_a_state_goes_on_from_piece_to_piece(name: str) -> None:
    """n-grams reach over the cuts, and do not end in padding."""
    model = on_host(name)
    ids = torch.tensor([[BOS, *b"the cat sat on the mat"], [BOS, *b"on and on and on", *[PAD] * 6]])
    cuts = [slice(0, 9), slice(9, 10), slice(10, None)]

    def through(one: BLT) -> Tensor:
        state, found = one.initial_state(len(ids)), list[Tensor]()
        for cut in cuts:
            logits, state = one(ids[:, cut], state)
            found.append(near(logits))
        return torch.cat(found, 1)[ids != PAD]

    with torch.no_grad():
        with pretend():
            found = through(moved(model))
        model.encoder.embed.on_host = False
        torch.testing.assert_close(found, through(model), rtol=1e-4, atol=1e-4)


def test_moved_a_model_leaves_its_tables_behind_in_its_dtype() -> None:
    model = on_host("blt (last layer crossed) on fixed (4)")
    table = model.encoder.embed.weight
    far = moved(model.to(torch.bfloat16))
    assert table.dtype == model.encoder.embed.byte.weight.dtype == torch.bfloat16 and table.device.type == "cpu"
    assert not isinstance(far.encoder.embed.weight, Far) and isinstance(far.encoder.embed.byte.weight, Far)
    model.encoder.embed.on_host = False
    assert isinstance(moved(model).encoder.embed.weight, Far)


@pytest.mark.skipif(library.library("kernels") is None, reason=f"no kernels: {library.reason('kernels')}")
@pytest.mark.parametrize("name", [name for name in MODELS if not decoding.why_plain(MODELS[name])])
def test_decoders_on_a_device_read_tables_on_the_host(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, options = on_host(name), dict[str, Any](max_bytes=64, sampling=Sampling(temperature=0), eos=False)
    prompts = [b"", b"The cat", bytes(range(256))]
    wanted = generate(model, prompts, **options)
    monkeypatch.setattr(decoding, "remote", lambda model: True)
    assert generate(model, prompts, **options) == wanted
    with pretend():
        far = moved(model)
        decoder: Any = open_decoder(far, rows=2, capacity=50)
        if model.encoder.embed.ngram is not None:
            assert not isinstance(decoder.ngrams.table, Far)
        rows, ids = np.repeat([0, 1], 8), np.array([BOS, *b"the cat", BOS, *b"and on "])
        logits = decoder.read(rows, ids)
    here = open_decoder(model, rows=2, capacity=50).read(rows, ids)
    np.testing.assert_allclose(logits, here, rtol=1e-4, atol=1e-4)


def test_what_tables_take_is_counted_where_they_are() -> None:
    """blt-tiny has tables of 6 · 32768 rows of 256 numbers, 201 MB, and as much of moments unless row-wise."""
    rows, dim = 6 * 32768, 256
    meta = torch.device("meta")
    model, config = made("blt-tiny")
    host, rowwise = replace(config, tables="host"), replace(config, table_optimizer="rowwise_adam")
    for device in (None, meta):
        where = {} if device is None else {"device": device}
        saved = predict(model, config, 5.0, **where).parameters - predict(model, rowwise, 5.0, **where).parameters
        assert saved == 4 * rows * (dim - 1)
    far, near = predict(model, config, 5.0, meta), predict(model, host, 5.0, meta)
    assert far.host == 0 and near.host == far.parameters - near.parameters == 2 * 4 * rows * dim
    assert predict(model, replace(rowwise, tables="host"), 5.0, meta).host == 4 * rows * (dim + 1)
    assert predict(model, host, 5.0).host == 0  # on a CPU there is one place


def test_tables_without_room_on_the_host_are_refused_and_told_of(tmp_path: Path) -> None:
    needed = estimate.Needs(1, 0, 2, 1 << 30, 0, 0, 1, host=2 << 30)
    message = r"tables on the host take 2.15 GB of memory and 1.07 GB are free: .*rowwise_adam.*--force"
    with pytest.raises(ResourceError, match=message):
        estimate.check(needed, configure("blt-tiny", sets=SPACES, steps=1), tmp_path)
    estimate.check(replace(needed, free_host=3 << 30), configure("blt-tiny", sets=SPACES, steps=1), tmp_path)
    found = estimate.Estimate(needed, "blt", 1, 1, "float32", 1.0, 1, 1.0, 0.0, 1.0, 1)
    assert "and 2.15 GB of 1.07 GB on the host" in dict(estimate.lines(found, tmp_path))["memory"]


def test_a_run_goes_on_with_the_other_optimizer_and_place_of_its_tables(tmp_path: Path) -> None:
    """The place may change freely; the optimizer is a setting that has to be named."""
    corpus, run = tmp_path / "text.txt", tmp_path / "run"
    corpus.write_bytes(b"the cat sat on the mat and the dog on the log. " * 200)

    def moment(steps: int, *sets: str, allow: tuple[str, ...] = ()) -> Tensor:
        config = configure("blt-tiny", sets=[*SPACES, *sets], steps=steps)
        train([corpus], config, run, quiet=True, allow_change=allow)
        moments = {name: value for name, value in held(run).items() if name.startswith(f"optimizer/{NAME}/")}
        assert set(moments) == {f"optimizer/{NAME}/step", f"optimizer/{NAME}/exp_avg_sq"}
        assert int(moments[f"optimizer/{NAME}/step"]) == steps
        return moments[f"optimizer/{NAME}/exp_avg_sq"]

    full = moment(2, "train.tables=host")
    assert full.shape == (6 * 64, 32)
    rowwise = "train.table_optimizer=rowwise_adam"
    with pytest.raises(UsageError, match=r"train\.table_optimizer was .*adam.*--allow-change"):
        moment(4, rowwise)
    assert moment(4, rowwise, allow=("train.table_optimizer",)).shape == (6 * 64, 1)
    far = assemble.load(run, torch.device("meta"), tables="memory").model
    assert {table.weight.device.type for table in far.lookup_tables()} == {"cpu"} and far.device.type == "meta"
