"""Training: what is promised of a run that is stopped, killed, damaged or fed what is not finite."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from bytelm.checkpoint import store
from bytelm.checkpoint.assemble import load
from bytelm.checkpoint.metrics import METRICS, read_metrics
from bytelm.errors import CheckpointError, ConfigError, DataError, TrainingError
from bytelm.interfaces import objective
from bytelm.models.megabyte import model as megabyte
from bytelm.training import loop
from bytelm.training.config import RunConfig, TrainConfig
from bytelm.training.optimise import learning_rate
from bytelm.training.run import train
from bytelm.training.settings import configure
from small import BLT, TRAINED

NANO = [*BLT, "entropy_model.heads=2", *TRAINED]


def nano(*sets: str, steps: int = 6) -> RunConfig:
    return configure("demo", sets=[*NANO, *sets], steps=steps)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    rng = random.Random(0)
    words = ["the", "patch", "byte", "model", "of", "reads", "\x00", "déjà", "return", "x = 1\n"]
    for i in range(12):
        text = " ".join(rng.choice(words) for _ in range(200))
        (folder / f"{i}.txt").write_bytes(text.encode())
    return folder


def weights(run: Path) -> dict[str, Tensor]:
    checkpoint = store.newest(run)
    return {
        f"{group}/{name}": tensor
        for group in ("model", "optimizer")
        for name, tensor in store.read_tensors(checkpoint, group).items()
    }


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def losses(run: Path) -> dict[int, float]:
    return {m["step"]: m["bits_per_byte"] for m in read_metrics(run / METRICS) if m["kind"] == "validation"}


@pytest.mark.fault("T6")
@pytest.mark.parametrize(
    "sets",
    [
        [],
        ["train.gradient_accumulation_steps=2", "train.activation_checkpointing=true", "train.dropout=0.3"],
        ["patching.name=space", "train.precision=bfloat16"],
        ["entropy_model.name=ngram", "patching.rule=both"],
    ],
    ids=["entropy", "accumulated, recomputed, with dropout", "space in bfloat16", "n-grams and both rules"],
)
def test_a_run_that_was_stopped_equals_one_that_was_not(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sets: list[str]
) -> None:
    if "entropy_model.name=ngram" in sets:
        base = [s for s in NANO if not s.startswith("entropy_model.")]
        monkeypatch.setattr(sys.modules[__name__], "NANO", base)
    through = train([corpus], nano(*sets), tmp_path / "through", quiet=True)
    assert through.progress is not None and through.progress.step == 6
    step = loop.Trainer.step

    def interrupted(trainer: loop.Trainer) -> None:
        step(trainer)
        if trainer.run.name == "stopped" and trainer.progress.step == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(loop.Trainer, "step", interrupted)
        stopped = train([corpus], nano(*sets), tmp_path / "stopped", quiet=True)
    assert stopped.signal == signal.SIGTERM
    assert store.read_state(store.newest(tmp_path / "stopped"))["step"] == 3
    train([corpus], nano(*sets), tmp_path / "stopped", quiet=True)
    assert equal(weights(tmp_path / "through"), weights(tmp_path / "stopped"))
    assert losses(tmp_path / "through") == losses(tmp_path / "stopped")


@pytest.mark.fault("M2")
def test_boundaries_in_training_are_those_in_generation(corpus: Path, tmp_path: Path) -> None:
    from bytelm.data.boundaries import Boundaries
    from bytelm.data.corpus import Corpus
    from bytelm.training.stages.boundaries import fingerprint_of
    from bytelm.units import BOS

    run = tmp_path / "run"
    train([corpus], nano(steps=1), run, quiet=True)
    loaded = load(run)
    patcher = loaded.model.patcher
    assert patcher is not None
    packed = Corpus.open(run / "data")
    from bytelm.checkpoint.assemble import Recipe
    from bytelm.config import build

    recipe = build(Recipe, loaded.state["recipe"], "test")
    recorded = Boundaries.open(run / "data", fingerprint_of(patcher, recipe, packed))
    table = packed.documents()
    for start, size in list(zip(table.starts.tolist(), table.sizes.tolist(), strict=True))[:2]:
        state, found = patcher.initial_state(1), []
        for symbol in [BOS, *packed.read(start, size).tolist()]:
            opens, state = patcher.extend(torch.tensor([[symbol]]), state)
            found.append(bool(opens[0, 0]))
        assert found[1:] == recorded.read(start, size).tolist()


@pytest.mark.fault("T1")
def test_what_is_not_finite_never_reaches_the_weights(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A loss that is not finite at step 2, a gradient that is not at step 3: both are skipped, and told."""
    calls = 0
    exact = objective.scored

    def poisoned(model: Any, prepared: Any) -> tuple[Tensor, Tensor]:
        nonlocal calls
        nats, count = exact(model, prepared)
        if torch.is_grad_enabled():
            calls += 1
            if calls == 2:
                return nats * float("nan"), count
            if calls == 3:
                hurt = next(p for p in model.parameters() if p.requires_grad)
                return nats + (hurt * 0).sum().sqrt(), count
        return nats, count

    seen: list[dict[str, Tensor]] = []
    step = loop.Trainer.step

    def watched(trainer: loop.Trainer) -> None:
        step(trainer)
        seen.append({k: v.clone() for k, v in trainer.model.state_dict().items()})

    monkeypatch.setattr(loop, "scored", poisoned)
    monkeypatch.setattr(loop.Trainer, "step", watched)
    train([corpus], nano("patching.name=space", steps=5), tmp_path / "run", quiet=True)
    assert equal(seen[0], seen[1]) and equal(seen[1], seen[2])
    assert not equal(seen[2], seen[3])
    skipped = [m["step"] for m in read_metrics(tmp_path / "run" / METRICS) if m["kind"] == "skipped"]
    assert skipped == [2, 3]
    assert all(bool(t.isfinite().all()) for t in weights(tmp_path / "run").values())


@pytest.mark.fault("T1")
def test_a_run_that_stays_not_finite_ends_and_keeps_its_weights(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    exact = objective.scored

    def poisoned(model: Any, prepared: Any) -> tuple[Tensor, Tensor]:
        nats, count = exact(model, prepared)
        return nats * float("inf"), count

    monkeypatch.setattr(loop, "scored", poisoned)
    with pytest.raises(TrainingError, match=r"10 consecutive steps.*learning_rate"):
        train([corpus], nano("patching.name=space", steps=50), tmp_path / "run", quiet=True)
    assert all(bool(t.isfinite().all()) for t in weights(tmp_path / "run").values())


def test_accumulation_sums_before_it_divides(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of very different length: a mean of the micro-batches' means would weigh their bytes differently."""
    norms: dict[int, float] = {}
    log_step = loop.Trainer.log_step

    def watched(self: loop.Trainer, skip_reason: str | None, nats: float, *rest: Any) -> None:
        norms.setdefault(self.config.gradient_accumulation_steps, rest[-1])
        log_step(self, skip_reason, nats, *rest)

    monkeypatch.setattr(loop.Trainer, "log_step", watched)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "a.txt").write_bytes((corpus / "0.txt").read_bytes()[:700])
    for batch, accumulate in ((12, 1), (1, 12)):  # more rows than windows: the short last one is among them
        sets = [
            f"train.batch={batch}",
            f"train.gradient_accumulation_steps={accumulate}",
            "patching.name=space",
            "train.context_length=50",
        ]
        train([tmp_path / "data"], nano(*sets, steps=1), tmp_path / f"run{batch}", quiet=True)
    assert norms[12] == pytest.approx(norms[1], rel=1e-4)


@pytest.mark.fault("C4")
def test_a_resumed_run_must_be_the_same_run(corpus: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    train([corpus], nano("patching.name=space", steps=1), run, quiet=True)
    with pytest.raises(ConfigError, match=r"train\.learning_rate was 0\.004, now 0\.01.*another --run"):
        train([corpus], nano("patching.name=space", "train.learning_rate=0.01", steps=2), run, quiet=True)
    written = (run / "config.toml").read_text()
    assert "seed = 0" in written
    (run / "config.toml").write_text(written.replace("seed = 0\n", ""))  # as if by a bytelm that had no such key
    longer = train([corpus], nano("patching.name=space", steps=2), run, quiet=True)
    assert longer.progress is not None and longer.progress.step == 2
    (corpus / "new.txt").write_text("more")
    try:
        with pytest.raises(DataError, match="has changed since it was packed"):
            train([corpus], nano("patching.name=space", steps=3), run, quiet=True)
    finally:
        (corpus / "new.txt").unlink()


@pytest.mark.fault("K1")
def test_resume_falls_back_to_the_newest_sound_checkpoint(
    corpus: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    for steps in (2, 4):
        train([corpus], nano("patching.name=space", steps=steps), run, quiet=True)
    file = store.newest(run) / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    train([corpus], nano("patching.name=space", steps=5), run)
    said = capfd.readouterr().err
    assert "skipping corrupt checkpoint" in said and "model.safetensors is damaged" in said
    assert "resuming from step 2" in said
    assert store.read_state(run / "checkpoints" / "step-00000005")["step"] == 5
    steps = [m["step"] for m in read_metrics(run / METRICS) if m["kind"] == "train"]
    assert steps == sorted(steps)


def test_a_run_that_has_weights_alone_is_not_resumed_without_its_moments(corpus: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    train([corpus], nano("patching.name=space", steps=2), run, quiet=True)
    store.keep_weights(run)
    with pytest.raises(CheckpointError, match=f"has weights alone.*--init-from {run}"):
        train([corpus], nano("patching.name=space", steps=3), run, quiet=True)


@pytest.mark.parametrize("reading", ["read_state", "read_tensors"])
def test_a_run_is_loaded_while_its_checkpoints_are_replaced(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reading: str
) -> None:
    """What was resolved is gone, twice, when it is to be read; for ever, it is an error."""
    run, exact, left = tmp_path / "run", getattr(store, reading), 2
    train([corpus], nano("patching.name=space", steps=2), run, quiet=True)

    def overtaken(path: Path, *arguments: Any) -> Any:
        nonlocal left
        if left:
            left -= 1
            path.rename(store.place(run, int(path.name.removeprefix("step-")) + 1))
        return exact(path, *arguments)

    monkeypatch.setattr(store, reading, overtaken)
    assert load(run).checkpoint == store.place(run, 4) and left == 0
    left = 2
    assert store.newest_state(run)[1]["step"] == 2
    left = 10_000
    with pytest.raises(CheckpointError, match=r"MANIFEST\.json is missing"):
        load(run)


def test_the_rate_warms_up_and_falls_to_its_end() -> None:
    config = TrainConfig(learning_rate=1.0, warmup_steps=4, min_lr_ratio=0.1, steps=10)
    assert [learning_rate(config, step, 0.0) for step in (0, 1, 3, 9)] == [0.25, 0.5, 1.0, 1.0]
    assert [learning_rate(config, 9, used) for used in (0.25, 0.5, 1.0, 1.2)] == pytest.approx([0.775, 0.55, 0.1, 0.1])


COMMAND = """
import sys
from bytelm.training.run import train
from bytelm.training.settings import configure
train([sys.argv[1]], configure("demo", sets=sys.argv[3:], steps=100000), sys.argv[2], quiet=True)
"""


@pytest.mark.fault("T6")
def test_models_without_a_patcher_resume_too(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Byte Transformers; and a MEGABYTE that recomputes its patches two at a time, on windows aligned to clips."""
    monkeypatch.setattr(megabyte, "PIECE", 512)
    common = [
        "train.context_length=64",
        "train.batch=2",
        "train.precision=float32",
        "train.sample_bytes=0",
        "train.warmup_steps=2",
    ]
    plain = ["model.layers=2", "model.dim=16", "model.heads=2"]
    stages = ["model.sizes=[8]", "model.dims=[32,16]", "model.layers=[1,1]", "model.heads=[2,2]", "model.reach=4"]
    clips = tmp_path / "clips"
    clips.mkdir()
    for file in corpus.iterdir():
        (clips / file.with_suffix(".s16le").name).write_bytes(file.read_bytes()[:1000])
    for preset, shape, files in (
        ("byte-tiny", plain, corpus),
        ("byte-window-tiny", plain, corpus),
        ("megabyte-audio", [*stages, "train.activation_checkpointing=true"], clips),
    ):
        # The schedule follows the budget, so both runs are told the same number of bytes and only one is cut short.
        whole = configure(preset, sets=[*shape, *common], steps=4)
        train([files], whole, tmp_path / preset / "through", quiet=True)
        killed = tmp_path / preset / "killed"
        with pytest.MonkeyPatch.context() as patch:
            step = loop.Trainer.step

            def dies(trainer: loop.Trainer, step: Any = step) -> None:
                step(trainer)
                if trainer.progress.step == 2:
                    trainer.save()
                    raise KeyError("the machine is gone")

            patch.setattr(loop.Trainer, "step", dies)
            with pytest.raises(KeyError):
                train([files], whole, killed, quiet=True)
        train([files], whole, killed, quiet=True)
        assert equal(weights(tmp_path / preset / "through"), weights(killed))


@pytest.mark.slow
def test_a_compiled_run_learns_what_an_eager_one_does(corpus: Path, tmp_path: Path) -> None:
    """In processes of their own: torch cannot compile functions whose shapes are checked, as they are here."""
    found: list[dict[str, Tensor]] = []
    for compiled in ("false", "true"):
        run = tmp_path / compiled
        sets = [*NANO, "patching.name=space", f"train.compile={compiled}"]
        code = COMMAND.replace("steps=100000", "steps=3")
        subprocess.run([sys.executable, "-c", code, str(corpus), str(run), *sets], check=True, timeout=900)
        found.append(weights(run))
    for name, eager in found[0].items():
        assert torch.allclose(eager, found[1][name], rtol=1e-3, atol=1e-5), name


@pytest.mark.fault("T4")
@pytest.mark.slow
def test_a_run_killed_at_any_instant_goes_on(corpus: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    sets = [*NANO, "patching.name=space", "train.checkpoint_every_minutes=0.002"]
    rng = random.Random(1)
    reached = 0
    for _ in range(12):
        job = subprocess.Popen([sys.executable, "-c", COMMAND, str(corpus), str(run), *sets])
        deadline = time.monotonic() + 120
        while not store.checkpoints(run) and time.monotonic() < deadline:
            time.sleep(0.05)
        time.sleep(rng.uniform(4.0, 7.0))
        job.send_signal(signal.SIGKILL)
        job.wait()
        step = store.read_state(store.newest(run))["step"]
        assert step >= reached
        reached = step
        load(run)
    assert reached > 0


def test_metrics_are_json_lines(corpus: Path, tmp_path: Path) -> None:
    train([corpus], nano("patching.name=space", steps=3), tmp_path / "run", quiet=True)
    lines = [json.loads(line) for line in (tmp_path / "run" / METRICS).read_text().splitlines()]
    assert {line["kind"] for line in lines} == {"session_start", "phase", "train", "validation", "memory"}
    assert all({"step", "bytes", "seconds"} <= line.keys() for line in lines)
    assert all("bits_per_byte" in line for line in lines if line["kind"] in ("train", "validation"))
