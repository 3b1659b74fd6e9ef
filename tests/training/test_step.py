"""A step of training on a device: what the host does meanwhile, what is waited for, and that it learns the same."""

from __future__ import annotations

import threading
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from bytelm.data.sampler import Batch
from bytelm.testing.pretend import Far, Pretend, moved, near, pretend
from bytelm.training.ahead import Ahead
from bytelm.training.draw import Drawn
from bytelm.training.journal import Journal
from bytelm.training.loop import Trainer
from trainable import Windows, made

HERE = torch.device("cpu")
SETS = [
    "train.precision=float32",
    "train.context_length=80",
    "train.batch=2",
    "train.gradient_accumulation_steps=2",
    "train.max_grad_norm=0.01",
]


def names() -> set[str]:
    return {thread.name for thread in threading.enumerate()}


def test_what_the_next_step_needs_is_made_by_a_thread_that_is_gone_at_the_end() -> None:
    made: list[tuple[int, bool]] = []

    def make(step: int) -> int:
        if step == 8:
            raise ValueError("not this one")
        made.append((step, threading.current_thread() is threading.main_thread()))
        return 10 * step

    with Ahead(make, HERE) as ahead:
        assert [ahead.take(step) for step in (0, 1, 2, 6)] == [0, 10, 20, 60]
        assert ahead.take(7) == 70
        assert any("ahead" in name for name in names())
        with pytest.raises(ValueError, match="not this one"):
            ahead.take(8)
        with pytest.raises(ValueError, match="not this one"):
            ahead.take(8)
    assert {(0, True), (1, False), (2, False), (6, True), (7, False)} <= set(made)
    assert not any("ahead" in name for name in names())


def test_several_steps_are_made_at_the_same_time_each_once() -> None:
    together, made = threading.Barrier(3), list[int]()

    def make(step: int) -> int:
        made.append(step)
        if 1 <= step <= 3:
            together.wait(60)  # which one thread after another would not get past
        return 10 * step

    with Ahead(make, HERE, steps=3) as ahead:
        assert [ahead.take(step) for step in range(6)] == [10 * step for step in range(6)]
    assert len(made) == len(set(made)) and set(range(6)) <= set(made) <= set(range(9))


def test_what_lies_elsewhere_is_asked_for_ahead_and_trains_the_same(tmp_path: Path) -> None:
    _, config = made("byte-tiny", *SETS)
    asked: dict[int, str] = {}

    class There(Windows):
        elsewhere = True

        def batch(self, step: int) -> Batch:
            asked[step] = threading.current_thread().name
            return super().batch(step)

    steps: dict[bool, dict[str, torch.Tensor]] = {}
    for there in (False, True):
        model, config = made("byte-tiny", *SETS)
        windows, run = (There if there else Windows)(config, False), tmp_path / str(there)
        run.mkdir()
        budget = replace(config, steps=3)
        Trainer(model, budget, windows, run, Journal(run / "metrics.jsonl", quiet=True)).fit()
        steps[there] = dict(model.named_parameters())
    assert all(torch.equal(steps[True][name], steps[False][name]) for name in steps[True])
    assert len([step for step, name in asked.items() if name.startswith("ahead")]) >= 5 and len(asked) >= 6


@pytest.mark.parametrize(
    ("preset", "sets", "waits"),
    [
        *((preset, (), 1) for preset in ("blt-tiny", "byte-tiny", "megabyte-tiny", "bpe-tiny")),
        ("blt-tiny", ("train.table_optimizer=rowwise_adam",), 1),
        # And for the gradient of tables in each of two micro-batches, and for the factor of clipping.
        ("blt-tiny", ("train.tables=host",), 4),
        ("blt-tiny", ("train.tables=host", "train.table_optimizer=rowwise_adam"), 4),
    ],
)
def test_a_step_waits_once_and_learns_what_it_does_on_a_cpu(
    preset: str, sets: tuple[str, ...], waits: int, tmp_path: Path
) -> None:
    """Gradients that are clipped, of micro-batches whose n-grams come again and again."""
    few = ["model.ngram_rows=2048"] if preset == "blt-tiny" else []
    model, config = made(preset, *SETS, *few, *sets)
    for table in model.lookup_tables():
        table.on_host = config.tables == "host"
    windows = Windows(config, model.patcher is not None)
    journal = Journal(tmp_path / "metrics.jsonl", quiet=True)
    norms: list[tuple[float, float]] = []

    class Watched(Trainer):
        def draw(self, step: int) -> Drawn:
            with (
                Pretend(seen) if self.ahead else nullcontext()
            ):  # a thread does not take over that of the one that began it
                return super().draw(step)

        def log_step(self, skip_reason: str | None, nats: float, *rest: float) -> None:  # pyright: ignore
            norms.append((nats, rest[-1]))

    with pretend() as seen:
        far = Watched(moved(model).train(), config, windows, tmp_path, journal)
        assert isinstance(next(far.model.parameters()), Far) and far.ahead is not None
        with far.ahead:
            for step in range(2):
                seen.fetches.clear()
                far.step()
                assert sum(seen.fetches.values()) == waits, (step, seen.fetches)
    here = Watched(model.train(), config, windows, tmp_path, journal)
    assert here.ahead is None
    for _ in range(2):
        here.step()
    for (nats, norm), (wanted, length) in zip(norms[:2], norms[2:], strict=True):
        assert nats == pytest.approx(wanted, rel=1e-5) and norm == pytest.approx(length, rel=1e-3)
        assert norm > config.max_grad_norm
    assert here.progress.bytes == far.progress.bytes > 0 and here.progress.step == far.progress.step == 2
    learnt = dict(model.named_parameters())
    for name, parameter in far.model.named_parameters():
        torch.testing.assert_close(near(parameter.detach()), learnt[name].detach(), rtol=1e-3, atol=1e-5, msg=name)
