"""Each stage of preparing a training alone: interrupted, resumed, found again, and asked for other inputs."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from bytelm.checkpoint.assemble import Recipe
from bytelm.checkpoint.budget import Budget
from bytelm.cli import run as cli
from bytelm.data.bpe import Bpe
from bytelm.data.corpus import Corpus
from bytelm.data.files import aside_of
from bytelm.data.options import DataConfig
from bytelm.errors import DataError
from bytelm.models.ngram import entropy_model as ngram
from bytelm.models.transformer import entropy_model as transformer
from bytelm.patching import entropy, space
from bytelm.training.config import RunConfig, TrainConfig
from bytelm.training.journal import Journal
from bytelm.training.recalibrate import recalibrate
from bytelm.training.run import train
from bytelm.training.settings import configure
from bytelm.training.stages.base import Stage, run_stage
from bytelm.training.stages.boundaries import BoundaryStage
from bytelm.training.stages.entropy_model import EntropyModelStage
from bytelm.training.stages.packing import PackingStage
from bytelm.training.stages.thresholds import ThresholdStage
from bytelm.training.stages.tokens import TokenizerStage, TokenStage
from bytelm.training.stop import Interrupted, StopRequest
from small import BLT, TRAINED

VOCABULARY = 300
STEPS = TrainConfig(steps=4, context_length=32, batch=2, precision="float32", sample_bytes=0)
NGRAM = [
    *(setting for setting in BLT if "entropy_model." not in setting),
    "entropy_model.name=ngram",
    "entropy_model.rows=512",
]
RECIPE = configure("demo", sets=[*NGRAM, *TRAINED], steps=1).recipe
QUIET = Journal(None, quiet=True)


class Stopping(Journal):
    """A journal during whose n-th line of progress a signal comes."""

    def __init__(self, number: int) -> None:
        super().__init__(None, quiet=True)
        self.left = number

    def progress(self, line: str, force: bool = False) -> None:
        self.left -= 1
        if self.left == 0:
            os.kill(os.getpid(), signal.SIGTERM)


@dataclass(frozen=True)
class Alone:
    """A stage by itself: made for a home, from one corpus; stopped at a line of progress; what it leaves there."""

    made: Callable[[Path, Corpus, Journal], Stage[Any]]
    stop: int
    kept: str


def copied(corpus: Corpus, home: Path) -> Corpus:
    """The same corpus in a folder of its own, where what is recorded about it goes."""
    return run_stage(PackingStage(home / "data", [], DataConfig(), None, (), corpus.directory), QUIET)


def packing(home: Path, corpus: Corpus, journal: Journal) -> Stage[Any]:
    return PackingStage(home / "data", [corpus.directory.parent / "notes"], DataConfig(), None)


def counted(home: Path, corpus: Corpus, journal: Journal) -> Stage[Any]:
    return EntropyModelStage(home / "entropy_model", ngram.Config(rows=512), STEPS, 0, corpus, journal)


def trained(home: Path, corpus: Corpus, journal: Journal) -> Stage[Any]:
    config = transformer.Config(layers=1, dim=16, heads=2, attention_window=16)
    return EntropyModelStage(home / "entropy_model", config, STEPS, 0, corpus, journal)


def entropy_model(corpus: Corpus, home: Path) -> Any:
    return run_stage(counted(home, corpus, QUIET), QUIET)


def thresholds(home: Path, corpus: Corpus, journal: Journal) -> Stage[Any]:
    return ThresholdStage(home / "recipe.toml", RECIPE, entropy_model(corpus, home), corpus)


def boundaries(home: Path, corpus: Corpus, journal: Journal) -> Stage[Any]:
    recipe = replace(RECIPE, patching=entropy.Config(threshold=2.0))
    return BoundaryStage(entropy.Config(threshold=2.0).build(entropy_model(corpus, home)), recipe, copied(corpus, home))


def tokenizer(home: Path, corpus: Corpus, journal: Journal) -> Stage[Any]:
    return TokenizerStage(home / "merges.npy", VOCABULARY, corpus)


def tokens(home: Path, corpus: Corpus, journal: Journal) -> Stage[Any]:
    learnt = run_stage(TokenizerStage(home / "merges.npy", VOCABULARY, corpus), QUIET)
    return TokenStage(copied(corpus, home), learnt)


STAGES = {
    "packing": Alone(packing, 4, "data/*"),
    "an entropy model that is counted": Alone(counted, 4, "entropy_model/**/model.safetensors"),
    "an entropy model that is trained": Alone(trained, 1, "entropy_model/**/step-00000004/model.safetensors"),
    "thresholds": Alone(thresholds, 4, "recipe.toml"),
    "patch boundaries": Alone(boundaries, 4, "data/boundaries-*"),
    "a tokenizer": Alone(tokenizer, 4, "merges.npy"),
    "tokens": Alone(tokens, 4, "data/tokens-*"),
}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    folder, rng = tmp_path_factory.mktemp("corpus"), random.Random(0)
    words = ["the", "patch", "byte", "model", "of", "reads", "déjà", "return", "x = 1\n"]
    (folder / "notes").mkdir()
    for i in range(20):
        (folder / "notes" / f"{i}.txt").write_text(" ".join(rng.choice(words) for _ in range(800)))
    return run_stage(PackingStage(folder / "data", [folder / "notes"], DataConfig(), None), QUIET)


def held(home: Path, alone: Alone) -> dict[str, bytes]:
    """What a stage left, by name."""
    return {str(path.relative_to(home)): path.read_bytes() for path in sorted(home.glob(alone.kept))}


@pytest.mark.parametrize("name", STAGES)
def test_a_stage_alone_is_resumed_to_the_same_result_and_found_again(name: str, corpus: Corpus, tmp_path: Path) -> None:
    alone, whole, home = STAGES[name], tmp_path / "whole", tmp_path / "home"
    whole.mkdir()
    home.mkdir()
    run_stage(alone.made(whole, corpus, QUIET), QUIET)
    stopping = Stopping(alone.stop)
    with StopRequest(), pytest.raises(Interrupted) as stopped:
        run_stage(alone.made(home, corpus, stopping), stopping)
    assert stopped.value.signal == signal.SIGTERM and stopping.left == 0
    assert not alone.made(home, corpus, QUIET).done()
    run_stage(alone.made(home, corpus, QUIET), QUIET)
    assert held(home, alone) == held(whole, alone) != {}
    again = alone.made(home, corpus, QUIET)
    assert again.done() and again.path.exists()
    journal = Stopping(1)
    run_stage(again, journal)
    assert journal.left == 1, "what is done shows no progress"


@pytest.mark.parametrize("name", STAGES)
def test_what_is_loaded_is_what_was_made(name: str, corpus: Corpus, tmp_path: Path) -> None:
    made = run_stage(STAGES[name].made(tmp_path, corpus, QUIET), QUIET)
    stage = STAGES[name].made(tmp_path, corpus, QUIET)
    loaded = stage.load()
    assert type(loaded) is type(made) and stage.summary(loaded) == stage.summary(made)
    if isinstance(made, Recipe):
        assert made == loaded and made.patching.calibrated  # pyright: ignore[reportOptionalMemberAccess]
    if isinstance(made, Bpe):
        assert (made.merges == loaded.merges).all()


def test_a_phase_a_stage_and_one_way_of_progress(corpus: Corpus, tmp_path: Path, capfd: Any) -> None:
    journal = Journal(tmp_path / "metrics.jsonl")
    for number, alone in enumerate(STAGES.values()):
        (tmp_path / str(number)).mkdir()
        run_stage(alone.made(tmp_path / str(number), corpus, journal), journal)
    phases = [line["name"] for line in journal.lines if line["kind"] == "phase"]
    names, shown = [name for name in phases if name not in ("validation", "saving")], capfd.readouterr().err
    assert names[:3] == ["packing", *["fitting entropy model"] * 2] and len(names) == len(STAGES)
    assert all(f"{name}: " in shown for name in {*names})
    assert "data: 20 files" in shown and "patches: " in shown and "tokens: " in shown


# --- other inputs ---


def test_other_files_are_refused_and_packed_anew_where_that_is_asked(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "0.txt").write_text("one\n" * 500)
    stage = PackingStage(tmp_path / "data", [tmp_path / "a"], DataConfig(), None)
    run_stage(stage, QUIET)
    (tmp_path / "a" / "1.txt").write_text("two\n" * 500)
    with pytest.raises(DataError, match="has changed since it was packed"):
        run_stage(stage, QUIET)
    assert run_stage(replace(stage, anew=True), QUIET).total == 4000


def test_a_copy_of_the_files_with_other_times_and_another_place_counts_by_its_content(tmp_path: Path) -> None:
    folder = tmp_path / "a"
    folder.mkdir()
    (folder / "0.txt").write_text("one\n" * 500)
    stage = PackingStage(tmp_path / "run" / "data", [folder], DataConfig(), None)
    first = run_stage(stage, QUIET).index
    os.utime(folder / "0.txt", ns=(5, 5))
    touched = run_stage(stage, QUIET).index
    moved = replace(stage, paths=[folder.rename(tmp_path / "b")])
    shutil.copytree(stage.path, aside_of(stage.path))  # of a command that was killed while it compared
    assert replace(touched, source_fingerprint=first.source_fingerprint) == first != touched
    assert run_stage(moved, QUIET).index.shards == first.shards and moved.done()
    (tmp_path / "b" / "0.txt").write_text("two\n" * 500)
    with pytest.raises(DataError, match="has changed since it was packed"):
        run_stage(moved, QUIET)
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["data"]


def test_boundaries_and_tokens_of_others_are_made_beside_the_first(corpus: Corpus, tmp_path: Path) -> None:
    first, own = boundaries(tmp_path, corpus, QUIET), copied(corpus, tmp_path)
    run_stage(first, QUIET)
    recipe = replace(RECIPE, patching=space.Config(), entropy_model=None)
    other = BoundaryStage(space.Config().build(), recipe, own)
    assert other.fingerprint() != first.fingerprint() and first.done() and not other.done()
    run_stage(other, QUIET)
    assert first.done() and other.done() and first.path != other.path
    learnt = run_stage(TokenizerStage(tmp_path / "merges.npy", VOCABULARY, corpus), QUIET)
    run_stage(TokenStage(own, learnt), QUIET)
    assert not TokenStage(own, Bpe(learnt.merges[:-1])).done()
    with pytest.raises(DataError, match="of another vocabulary"):
        run_stage(TokenizerStage(tmp_path / "merges.npy", VOCABULARY + 1, corpus), QUIET)


def test_an_entropy_model_with_more_steps_is_trained_on(corpus: Corpus, tmp_path: Path) -> None:
    stage = trained(tmp_path, corpus, QUIET)
    assert isinstance(stage, EntropyModelStage)
    run_stage(stage, QUIET)
    further = replace(stage, train=replace(STEPS, steps=6))
    assert stage.done() and not further.done()
    run_stage(further, QUIET)
    assert further.done() and len([*(tmp_path / "entropy_model" / "checkpoints").glob("step-*")]) == 2


# --- for commands ---


def small(steps: int = 1) -> RunConfig:
    return configure("demo", sets=[*BLT, *TRAINED], steps=steps)


def test_data_pack_and_calibrate_hear_a_signal(
    corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    notes, out, run = corpus.directory.parent / "notes", tmp_path / "packed", tmp_path / "run"
    train([notes], small(), run, quiet=True)
    found = recalibrate(run, 6.0)
    exact = Journal.progress

    def stopping(self: Journal, line: str, force: bool = False) -> None:
        exact(self, line, force)
        os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(Journal, "progress", stopping)
        for words in (["data", "pack", str(notes), "-o", str(out)], ["calibrate", str(run), "6"]):
            assert cli(words) == 128 + signal.SIGTERM
            assert capfd.readouterr().err.endswith("bytelm: interrupted by signal 15\n")
    assert not out.exists() and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    assert cli(["data", "pack", str(notes), "-o", str(out)]) == 0
    assert Corpus.open(out).fingerprint == corpus.fingerprint
    assert recalibrate(run, 6.0) == found


def test_a_comparison_hears_a_signal_while_it_packs(
    corpus: Corpus, tmp_path: Path, monkeypatch: Any, capfd: Any
) -> None:
    words = ["compare", str(corpus.directory.parent / "notes"), "--models", "byte-window", "--match", "bytes"]
    words += ["--budget", "1e6", "--run", str(tmp_path / "home"), "--dry-run"]
    with monkeypatch.context() as patch:
        patch.setattr(Journal, "progress", lambda *_, **__: os.kill(os.getpid(), signal.SIGTERM))
        assert cli(words) == 128 + signal.SIGTERM
    assert "run the same command again to resume" in capfd.readouterr().err
    assert cli([*words, "--json"]) == 0 and json.loads(capfd.readouterr().out)["models"]


# --- the budget ---


def test_the_fraction_of_a_budget_is_the_largest() -> None:
    assert Budget().fraction(9, 9, 9.0) == 0
    assert Budget(steps=10).fraction(5, 10**9, 1e9) == 0.5
    assert Budget(10, 1000, 2.0).fraction(1, 200, 90.0) == 0.75
    assert Budget.of({"steps": "none", "bytes": 10, "minutes": "none"}) == Budget(bytes=10) == Budget.of({"bytes": 10})


def test_what_is_read_until_a_budget_is_used_up() -> None:
    assert Budget(10, 10**9, None).expected_bytes(100, 5.0) == 1000
    assert Budget(10, None, 1.0).expected_bytes(100, 5.0) == 300
    with pytest.raises(ValueError):
        Budget().expected_bytes(100, 5.0)
