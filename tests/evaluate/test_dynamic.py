"""Dynamic evaluation: the weights learn what was scored, and nothing else; the model stays as it is."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import cast

import numpy as np
import pytest
import torch

import bytelm
from bytelm.checkpoint.assemble import load
from bytelm.cli import run as cli
from bytelm.errors import UsageError
from bytelm.evaluate import windows
from bytelm.evaluate.bits import measure, nats_of_document
from bytelm.evaluate.dynamic import Dynamic, Learning
from bytelm.evaluate.verdict import judge
from bytelm.interfaces.model import ByteModel
from bytelm.interfaces.objective import score
from bytelm.online.memory import Memory
from bytelm.online.settings import Settings
from bytelm.testing import UniformModel, tiny_models
from bytelm.units import BOS

GOLDEN = Path(__file__).parents[1] / "golden-run"
TEXT = b"the cat sat on the mat. the cat sat on the hat. the rat."
CONTEXT, STRIDE = 24, 12
SMALL = Settings(memory=1 << 20)
GROUPS: tuple[Learning, ...] = ("head", "tables", "all")


def one_of_each() -> Iterator[tuple[str, ByteModel]]:
    """A tiny model of each architecture, and those with n-gram tables."""
    seen: set[type] = set()
    for name, model in tiny_models():
        if type(model) not in seen or "n-grams to" in name or "across patches, n" in name or "tokens" in name:
            seen.add(type(model))
            yield name, model.eval()


MODELS = dict(one_of_each())
BLT = next(model for name, model in MODELS.items() if "n-grams to" in name)
TOKENS = next(model for model in MODELS.values() if model.tokens is not None)


def groups_of(model: ByteModel) -> tuple[Learning, ...]:
    """The weights of a model that can learn."""
    return GROUPS if model.lookup_tables() else ("head", "all")


def costs(model: ByteModel, data: bytes, dynamic: Dynamic | None = None) -> list[float]:
    """Of each byte, in nats."""
    return nats_of_document(model, data, context=CONTEXT, stride=STRIDE, batch=1, dynamic=dynamic).tolist()


@pytest.mark.parametrize("name", MODELS)
def test_a_rate_of_0_is_the_frozen_model_bit_by_bit(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the same forward pass: kernels that read windows faster round otherwise."""
    monkeypatch.setattr(windows, "open_reader", lambda *_, **__: None)
    model = MODELS[name]
    frozen, dynamic = costs(model, TEXT), Dynamic(model, rate=0.0)
    assert costs(model, TEXT, dynamic) == frozen and dynamic.steps > 1
    assert costs(model, TEXT, Dynamic(model)) != frozen


@pytest.mark.parametrize("name", MODELS)
def test_only_what_was_chosen_learns_and_the_model_stays(name: str) -> None:
    model = MODELS[name]
    before = {key: value.clone() for key, value in model.state_dict().items()}
    flags = [(p.requires_grad, p.grad) for p in model.parameters()]
    head = {id(p) for p in model.output_weights()}
    tables = {id(table.weight) for table in model.lookup_tables()}
    own = {id(p) for p in model.parameters() if p.requires_grad}
    assert head and head <= own
    for learning in groups_of(model):
        dynamic = Dynamic(model, learning)
        costs(model, TEXT, dynamic)
        pairs = list(zip(model.parameters(), dynamic.model.parameters(), strict=True))
        changed = {id(p) for p, q in pairs if not torch.equal(p, q)}
        assert changed == {"head": head, "tables": head | tables, "all": changed & own}[learning]
        assert len(changed) > len(own) // 2 or learning != "all"
        apart = {id(p) for p, q in pairs if p.data_ptr() != q.data_ptr()}
        assert apart == {"head": head, "tables": head | tables, "all": own}[learning], "memory for no more than learns"
        assert dynamic.copied_bytes == sum(p.nbytes for p in model.parameters() if id(p) in apart)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert flags == [(p.requires_grad, p.grad) for p in model.parameters()] and not model.training
    assert not any(table.sparse for table in model.lookup_tables())


@pytest.mark.parametrize("name", MODELS)
def test_no_byte_changes_a_cost_before_it(name: str) -> None:
    """Within a window, at its ends, and across steps; what comes after learns from it, in later documents too."""
    model = MODELS[name]
    if model.tokens is not None:
        return  # a byte changes the tokens around it
    found = costs(model, TEXT, Dynamic(model, rate=1e-2))
    for t in (CONTEXT - 1, CONTEXT, CONTEXT + STRIDE - 1, len(TEXT) - 1):
        dynamic = Dynamic(model, rate=1e-2)
        other = costs(model, TEXT[:t] + b"\xff" + TEXT[t + 1 :], dynamic)
        assert other[:t] == found[:t] and other[t] != found[t]
    assert costs(model, b"x", dynamic) != costs(model, b"x", Dynamic(model)), "it is learned for later documents"


def test_the_same_twice_and_with_any_batch() -> None:
    documents = [("a", TEXT), ("b", TEXT[:30])]
    found = [list(measure(BLT, documents, context=CONTEXT, batch=batch, dynamic=Dynamic(BLT))) for batch in (1, 8, 8)]
    assert found[0] == found[1] == found[2]


def test_steps_are_between_windows_and_repeats_get_cheaper() -> None:
    dynamic = Dynamic(BLT)
    found = costs(BLT, 2 * TEXT, dynamic)
    assert dynamic.steps == 1 + -(-(2 * len(TEXT) - CONTEXT) // STRIDE)
    assert sum(found) < sum(costs(BLT, 2 * TEXT)) and sum(found[-24:]) < 0.9 * sum(found[:24])


def test_a_step_is_adams_without_momentum() -> None:
    """By hand: the first moves a weight by the rate, and a row of a table by ten times that over its mean square."""
    dynamic, data = Dynamic(BLT, rate=1e-3), TEXT[:CONTEXT]
    nats_of_document(BLT, data, context=CONTEXT, dynamic=dynamic)
    ids = torch.tensor([[BOS, *data]])
    nats, count = score(BLT, ids)
    own = [p for p in BLT.parameters() if p.requires_grad]
    found = torch.autograd.grad(nats / count, own, allow_unused=True)
    gradients = cast("tuple[torch.Tensor | None, ...]", found)
    tables = {id(table.weight) for table in BLT.lookup_tables()}
    moved = [q.detach() - p.detach() for p, q in zip(BLT.parameters(), dynamic.model.parameters(), strict=True)]
    changes = {id(p): change for p, change in zip(BLT.parameters(), moved, strict=True)}
    for parameter, gradient in zip(own, gradients, strict=True):
        if gradient is None:
            continue
        row = id(parameter) in tables
        second = gradient.square().mean(1, keepdim=True) if row else gradient.square()
        wanted = -1e-3 * (10 if row else 1) * gradient / second.sqrt()
        clear = second.sqrt().expand_as(gradient) > 1e-5
        torch.testing.assert_close(changes[id(parameter)][clear], wanted[clear], rtol=0.02, atol=2e-6)


@pytest.mark.parametrize(("data", "steps"), [(b"", 0), (b"x", 1)])
def test_documents_of_no_byte_and_of_one(data: bytes, steps: int) -> None:
    dynamic = Dynamic(BLT)
    (found,) = measure(BLT, [("", data)], context=CONTEXT, dynamic=dynamic)
    (frozen,) = measure(BLT, [("", data)], context=CONTEXT)
    assert found.bytes == len(data) and found.nats == pytest.approx(frozen.nats, rel=1e-6) and dynamic.steps == steps
    (again,) = measure(BLT, [("", data)], context=CONTEXT, dynamic=dynamic)
    assert again.nats < found.nats or not data


def test_the_report_has_both_figures() -> None:
    documents = [("a", TEXT), ("b", TEXT[:30])]
    plain = judge(BLT, documents, CONTEXT, memory=Memory(SMALL))
    both = judge(BLT, documents, CONTEXT, memory=Memory(SMALL), dynamic=Dynamic(BLT, "tables", 1e-2))
    assert "dynamic" not in plain.mapping()
    assert plain.mapping() == {name: value for name, value in both.mapping().items() if name != "dynamic"}
    found = both.dynamic
    assert found is not None and found.bits_per_byte < both.bits_per_byte and found.low is not None
    assert (found.learning, found.rate) == ("tables", 1e-2) and found.bytes_per_second > 0
    assert sum(file.bits for file in found.files) == pytest.approx(found.bits)
    assert found.state_bytes > 0 and found.copied_bytes > 0
    online = found.online
    assert online is not None and both.online is not None and online.bits != both.online.bits
    (alone,) = measure(BLT, documents[:1], context=CONTEXT, memory=Memory(SMALL), dynamic=Dynamic(BLT, "tables", 1e-2))
    assert alone.online is not None and online.files[0].bits == alone.online / np.log(2), "a memory of its own"
    without = judge(BLT, documents, CONTEXT, dynamic=Dynamic(BLT, "head")).mapping()
    assert "online" not in without and "online" not in without["dynamic"]


def test_tokens_learn_too() -> None:
    (found,) = measure(TOKENS, [("", TEXT)], context=CONTEXT, stride=STRIDE, dynamic=Dynamic(TOKENS, rate=1e-2))
    (frozen,) = measure(TOKENS, [("", TEXT)], context=CONTEXT, stride=STRIDE)
    assert found.bytes == frozen.bytes == len(TEXT) and found.nats < frozen.nats


def test_what_cannot_learn_is_refused_in_one_line() -> None:
    lm = bytelm.load(GOLDEN, weights="int8")
    refused: list[tuple[ByteModel, Learning, str]] = [
        (lm.model, "all", "packed for inference"),
        (bytelm.load(GOLDEN, dtype=torch.bfloat16).model, "all", "too coarse to learn: load the model in float32"),
        (next(m for m in MODELS.values() if not m.lookup_tables()), "tables", "no n-gram tables"),
        (UniformModel(), "head", "no parameters that head names"),
        (UniformModel().to("meta"), "all", "take --device cpu"),
    ]
    for model, learning, why in refused:
        with pytest.raises(UsageError, match=why) as error:
            Dynamic(model, learning)
        assert "\n" not in str(error.value)
    with pytest.raises(UsageError, match="must be at least 0"):
        Dynamic(BLT, rate=-1.0)
    with pytest.raises(UsageError, match="another model"):
        list(measure(UniformModel(), [("", TEXT)], context=8, dynamic=Dynamic(BLT)))
    with pytest.raises(UsageError, match="reads tokens"):
        list(measure(TOKENS, [("", TEXT)], context=8, memory=Memory(SMALL), dynamic=Dynamic(TOKENS)))


def test_the_command_and_the_python_api(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "page.txt"
    file.write_bytes(3 * TEXT)
    words = ["eval", str(GOLDEN), str(file), "--quiet"]
    assert cli([*words, "--json"]) == 0
    plain = json.loads(capsys.readouterr().out)
    assert cli([*words, "--json", "--dynamic", "all", "--online", "cold"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert "dynamic" not in plain and found["bits"] == plain["bits"]
    lm = bytelm.load(GOLDEN)
    bits, count = lm.bits(3 * TEXT, dynamic=Dynamic(lm.model, "all"))
    assert (found["dynamic"]["bits"], found["bytes"]) == (bits, count) and bits < found["bits"]
    assert found["dynamic"]["online"]["bits"] < found["online"]["bits"]
    assert cli([*words, "--dynamic", "head"]) == 0
    shown = capsys.readouterr().out
    assert "this model" in shown and "with dynamic evaluation (head)" in shown and "of optimizer state" in shown
    for more, why in (
        (["--dynamic", "all", "--weights", "int8"], "packed for inference"),
        (["--dynamic", "all", "--tables", "memory"], "packed for inference"),
        (["--dynamic", "all", "--bytewise"], "predicts bytes already"),
    ):
        assert cli([*words, *more]) == 2
        assert why in capsys.readouterr().err
    assert cli(["eval", str(GOLDEN), "--tasks", "mine", "--dynamic", "all"]) == 2
    assert "--dynamic applies to files only" in capsys.readouterr().err


def test_a_runs_own_report_keeps_the_frozen_figure(monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[object] = []
    monkeypatch.setattr("bytelm.cli.evaluating.keep", lambda *_: kept.append(_))
    assert cli(["eval", str(GOLDEN), "--quiet", "--dynamic", "head"]) == 0 and not kept
    assert load(GOLDEN).model is not None
