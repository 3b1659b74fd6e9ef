"""Training that starts from the weights of another run: what it takes from there, and how it goes on."""

from __future__ import annotations

import os
import random
import re
import shutil
import signal
from pathlib import Path

import pytest
import torch
from torch import Tensor

from bytelm.checkpoint import store
from bytelm.checkpoint.assemble import Recipe, load, resolve_checkpoint
from bytelm.checkpoint.metrics import METRICS, read_metrics
from bytelm.cli import run as cli
from bytelm.config import build, load_toml
from bytelm.data.boundaries import Boundaries
from bytelm.data.corpus import Corpus
from bytelm.errors import CheckpointError, ConfigError
from bytelm.interfaces.objective import score
from bytelm.training import loop
from bytelm.training.config import RunConfig, TrainConfig
from bytelm.training.run import train
from bytelm.training.settings import configure
from bytelm.training.stages.boundaries import fingerprint_of
from bytelm.units import bits_per_byte
from small import BLT, TRAINED

STAGES = ["model.sizes=[8]", "model.dims=[32,16]", "model.layers=[1,1]", "model.heads=[2,2]"]
PLAIN = ["model.layers=1", "model.dim=16", "model.heads=2"]
KINDS = {
    "entropy": ("demo", BLT),
    "spaces": ("demo", [*(s for s in BLT if not s.startswith("entropy_model")), "patching.name=space"]),
    "n-grams": (
        "demo",
        [*(s for s in BLT if not s.startswith("entropy_model.")), "entropy_model.name=ngram", "patching.rule=both"],
    ),
    "MEGABYTE": ("megabyte-tiny", STAGES),
    "tokens": ("bpe-tiny", [*PLAIN, "model.vocabulary=300"]),
}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return texts(tmp_path_factory.mktemp("corpus"), 0)


@pytest.fixture(scope="module")
def others(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Files that no start has seen."""
    return texts(tmp_path_factory.mktemp("others"), 1)


def texts(folder: Path, seed: int) -> Path:
    rng = random.Random(seed)
    words = ["the", "patch", "byte", "model", "of", "reads", "\x00", "déjà", "return", "x = 1\n"]
    for i in range(12):
        (folder / f"{i}.txt").write_text(" ".join(rng.choice(words) for _ in range(150)))
    return folder


@pytest.fixture(scope="module", params=KINDS)
def start(request: pytest.FixtureRequest, corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A short run of each kind of model."""
    return begin(corpus, tmp_path_factory.mktemp("start") / "run", request.param)


@pytest.fixture(scope="module")
def entropy(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A short run of a model whose patches an entropy model cuts."""
    return begin(corpus, tmp_path_factory.mktemp("entropy") / "run", "entropy")


def begin(corpus: Path, run: Path, kind: str, *more: str) -> Path:
    preset, sets = KINDS[kind]
    train([corpus], configure(preset, sets=[*sets, *TRAINED, *more], steps=4), run, quiet=True)
    return run


def going(start: Path, run: Path, *sets: str, steps: int = 4) -> RunConfig:
    return configure(init_from=start, run=run, sets=sets, steps=steps)


def weights(run: Path) -> dict[str, Tensor]:
    return store.read_tensors(store.newest(run), "model")


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def first_loss(run: Path) -> float:
    """In bits per byte, of the first step, before it changed anything."""
    return next(line["bits_per_byte"] for line in read_metrics(run / METRICS) if line["kind"] == "train")


def test_the_first_step_has_the_loss_of_the_start(
    start: Path, others: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On data of its own, before it learnt anything, the new run is the old model."""
    seen: list[float] = []
    step = loop.Trainer.step

    def watched(trainer: loop.Trainer) -> None:
        if not seen:
            ids, boundaries = loop.to_tensors(trainer.sampler.batch(0))
            old = load(start).model
            with torch.no_grad():
                nats, _ = score(old, ids, boundaries=boundaries)
            seen.append(bits_per_byte(float(nats), int(old.byte_lengths(ids[:, 1:]).sum())))
        step(trainer)

    monkeypatch.setattr(loop.Trainer, "step", watched)
    train([others], going(start, tmp_path / "run", steps=1), tmp_path / "run", quiet=True)
    assert first_loss(tmp_path / "run") == pytest.approx(seen[0], rel=1e-5)
    assert resolve_checkpoint(tmp_path / "run")[1]["recipe"] == resolve_checkpoint(start)[1]["recipe"]


def test_the_entropy_model_and_its_thresholds_are_kept(entropy: Path, others: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    train([others], going(entropy, run), run, quiet=True)
    assert not (run / "entropy_model").exists()
    assert load_toml(run / "recipe.toml")["patching"] == load_toml(entropy / "recipe.toml")["patching"]
    patcher, corpus = load(entropy).model.patcher, Corpus.open(run / "data")
    assert patcher is not None
    recipe = build(Recipe, resolve_checkpoint(entropy)[1]["recipe"], "the start")
    Boundaries.open(run / "data", fingerprint_of(patcher, recipe, corpus))  # those that the start itself would cut
    old, new = weights(entropy), weights(run)
    own = [name for name in old if name.startswith("patcher.")]
    assert own and all(torch.equal(old[name], new[name]) for name in own)
    assert not torch.equal(old["decoder.head.weight"], new["decoder.head.weight"])


@pytest.mark.fault("T6")
@pytest.mark.parametrize("deleted", [False, True], ids=["start kept", "start deleted"])
def test_a_run_that_was_stopped_equals_one_that_was_not(
    start: Path, others: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, deleted: bool
) -> None:
    """The same command goes on, with the start that it was given or without it."""
    step = loop.Trainer.step

    def interrupted(trainer: loop.Trainer) -> None:
        step(trainer)
        if trainer.run.name == "stopped" and trainer.progress.step == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    own = Path(shutil.copytree(start, tmp_path / "start"))
    runs = [tmp_path / "through", tmp_path / "stopped"]
    with monkeypatch.context() as patch:
        patch.setattr(loop.Trainer, "step", interrupted)
        signals = [train([others], going(own, run), run, quiet=True).signal for run in runs]
    assert signals == [None, signal.SIGTERM]
    if deleted:
        shutil.rmtree(own)
    train([others], going(own, runs[1]), runs[1], quiet=True)
    assert resolve_checkpoint(runs[1])[1]["step"] == 4
    assert equal(weights(runs[0]), weights(runs[1]))


@pytest.mark.fault("K1")
def test_a_damaged_checkpoint_is_passed_over(
    entropy: Path, others: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    for steps in (2, 3):
        train([others], going(entropy, run, steps=steps), run, quiet=True)
    file = store.newest(run) / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"\xaa")
    train([others], going(entropy, run, steps=4), run)
    assert "resuming from step 2" in capfd.readouterr().err


@pytest.mark.fault("K2")
def test_another_shape_is_a_table_of_differences(entropy: Path, others: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    with pytest.raises(CheckpointError) as caught:
        train([others], going(entropy, run, "model.decoder_layers=2", "model.ngram_rows=65"), run, quiet=True)
    assert str(entropy) in str(caught.value)
    assert "missing     decoder.cross.1.out.weight  float32 [16, 16]" in str(caught.value)
    assert "shape       encoder.embed.ngram.weight  float32 [320, 32], not float32 [325, 32]" in str(caught.value)


def test_how_a_start_learnt_goes_on_more_gently(entropy: Path, tmp_path: Path) -> None:
    """Windows, batches and data as there, a tenth of the rate, but no limit of there; what is given goes over it."""
    found = configure(init_from=entropy, run=tmp_path / "run", steps=7)
    old = configure("demo", sets=[*BLT, *TRAINED], steps=4).train
    assert found.train.learning_rate == pytest.approx(old.learning_rate / 10)
    assert (found.train.context_length, found.train.batch, found.train.embedding_lr_scale) == (
        64,
        2,
        old.embedding_lr_scale,
    )
    assert (found.train.steps, found.train.minutes, found.train.bytes) == (7, None, None)
    assert configure(init_from=entropy).train.minutes == 10.0 and configure(init_from=entropy).train.steps is None
    given = configure(init_from=entropy, sets=["train.learning_rate=0.5", "train.batch=3"], steps=7)
    assert (given.train.learning_rate, given.train.batch) == (0.5, 3)
    assert found.init_from == str(entropy)


def test_a_preset_says_how_to_learn_what_a_start_is(entropy: Path) -> None:
    """The bytes of a step are those of the preset, in windows of the start, which here is the shorter one."""
    usual = configure("blt-tiny").train
    found = configure("blt-tiny", init_from=entropy)
    assert found.train.context_length == 64
    assert found.train.batch == usual.context_length * usual.batch // 64
    assert found.train.learning_rate == pytest.approx(usual.learning_rate / 10)
    assert found.model == configure(init_from=entropy).model


def test_a_converted_run_is_a_start(corpus: Path, others: Path, tmp_path: Path) -> None:
    """It has no configuration of its own, and a context that may be longer than a step: the usual bytes of a step."""
    from bytelm.exchange.convert import convert, export

    bare = {"patching": {"max_length": "none", "max_single_byte_run": "none"}}
    export(begin(corpus, tmp_path / "first", "entropy", "model.ngram_output=false"), "hf", tmp_path / "hf", bare)
    config = tmp_path / "hf" / "config.json"
    config.write_text(config.read_text().replace('"max_position_embeddings": 64', '"max_position_embeddings": 1000000'))
    convert(tmp_path / "hf", "hf", tmp_path / "start", {})
    assert resolve_checkpoint(tmp_path / "start")[1]["context"] == 1_000_000
    usual = configure("blt-tiny").train
    found = configure(init_from=tmp_path / "start").train
    assert (found.context_length, found.batch) == (usual.context_length * usual.batch, 1)
    run = tmp_path / "run"
    train([others], going(tmp_path / "start", run, *TRAINED, steps=1), run, quiet=True)
    old, new = weights(tmp_path / "start"), weights(run)
    assert all(torch.equal(old[name], new[name]) for name in old if name.startswith("patcher."))
    moved = (old["decoder.head.weight"] - new["decoder.head.weight"]).abs().max()
    assert 0 < moved <= 1.1 * TrainConfig.learning_rate / 10


@pytest.mark.parametrize("what", ["nothing", "a file", "an empty folder"])
def test_a_start_that_is_not_there(others: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], what: str) -> None:
    place = tmp_path / "start"
    if what == "a file":
        place.write_text("")
    elif what == "an empty folder":
        place.mkdir()
    words = ["train", str(others), "--init-from", str(place), "--run", str(tmp_path / "run"), "--steps", "1"]
    assert cli(words) == 4
    said = capfd.readouterr().err
    assert str(place) in said and said.count("\n") == 1 and "Traceback" not in said
    assert not (tmp_path / "run").exists()


def test_the_command_starts_from_a_run_and_goes_on(
    entropy: Path, others: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Two sittings, the start deleted between them; the same run from another start is refused."""
    own, run = Path(shutil.copytree(entropy, tmp_path / "start")), tmp_path / "run"
    words = ["train", str(others), "--init-from", str(own), "--run", str(run)]
    assert cli([*words, "--steps", "2"]) == 0
    assert "starting from" in capfd.readouterr().err
    shutil.rmtree(own)
    assert cli([*words, "--steps", "3"]) == 0
    assert "resuming from step 2" in capfd.readouterr().err
    with pytest.raises(ConfigError, match="init_from was"):
        train([others], going(entropy, run), run, quiet=True)
    words[3] = str(tmp_path / "another")
    assert cli([*words, "--steps", "4"]) == 4


def test_a_configuration_that_was_spoilt_is_named(entropy: Path, tmp_path: Path) -> None:
    own = Path(shutil.copytree(entropy, tmp_path / "start"))
    text = (own / "config.toml").read_text()
    assert "\nlearning_rate = " in text
    (own / "config.toml").write_text(re.sub(r"\nlearning_rate = .*", '\nlearning_rate = "fast"', text))
    with pytest.raises(ConfigError, match=r"config\.toml: train\.learning_rate must be a number"):
        configure(init_from=own)
    (own / "config.toml").write_text("x = 1\n")
    with pytest.raises(ConfigError, match=r"config\.toml"):
        configure(init_from=own)
