"""Trainings on weighted mixtures, from the command line, by one process and by two."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import stores
import worlds
from bytelm.cli import run as cli
from bytelm.data.corpora import Corpora, open_corpus
from bytelm.data.mixture import Mixture
from bytelm.data.pack import pack
from bytelm.errors import ConfigError
from bytelm.training.dist import init_distributed
from bytelm.training.journal import Journal
from bytelm.training.prepare import prepare
from bytelm.training.recalibrate import recalibrate
from bytelm.training.run import train
from bytelm.training.settings import configure
from bytelm.transfer import HOST
from small import BLT, TRAINED
from trainings import PLAIN, SPACES, of_kind

pytestmark = stores.LEFT_OPEN
QUIET = Journal(None, quiet=True)
HELD = ["data.valid=0.2", "data.test=0.05"]


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("sources")
    (home / "books").mkdir()
    (home / "code").mkdir()
    for i in range(40):
        (home / "books" / f"{i}.txt").write_text(f"This is chapter {i} of many. " * (4 + i % 9))
        (home / "code" / f"{i}.py").write_text(f"def function_{i}():\n    return {i}\n\n\n" * (3 + i % 9))
    return home


def given(sources: Path) -> list[str]:
    return [f"books={sources / 'books'}", f"code={sources / 'code'}"]


def commanded(words: list[str]) -> int:
    return cli(words)


def test_the_command_trains_on_a_mixture_and_two_processes_resume_it(
    sources: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    sets = [word for setting in (*SPACES, *HELD) for word in ("--set", setting)]
    words = ["train", *given(sources), "--preset", "demo", "--run", str(run), "--quiet", *sets]
    assert cli([*words, "--mix", "books=0.75,code=0.25", "--steps", "2"]) == 0
    assert worlds.run(2, commanded, [*words, "--mix", "books=0.75,code=0.25", "--steps", "4"]) == [0, 0]
    valid = of_kind(run, "validation")
    assert [line["step"] for line in valid] == [2, 4]
    for line in valid:
        each = line["sources"]
        assert line["bits_per_byte"] == pytest.approx(0.75 * each["books"] + 0.25 * each["code"])
        assert each["books"] != each["code"]
    assert {path.parent.name for path in (run / "data").glob("*/boundaries-*.bits")} == {"books", "code"}
    assert "code" in (run / "report.html").read_text() and ".py" in (run / "report.html").read_text()
    capfd.readouterr()
    assert cli(["eval", str(run)]) == 0
    assert ".txt" in capfd.readouterr().out
    assert cli(["data", "verify", str(run)]) == 0
    assert capfd.readouterr().out.startswith("OK: ")
    shard = next((run / "data" / "code").glob("*.bin"))
    shard.write_bytes(bytes(shard.stat().st_size))
    assert cli(["data", "verify", str(run)]) == 3
    assert "code" in capfd.readouterr().err
    assert cli([*words, "--mix", "books=0.5,code=0.5", "--steps", "6"]) != 0
    assert "mix was ['books=0.75', 'code=0.25']" in capfd.readouterr().err


def drawn(sources: list[str], run: Path, steps: int) -> list[np.ndarray]:
    """The samples of this process in some steps, of a model over tokens."""
    sets = ["model.layers=1", "model.dim=16", "model.heads=2", "model.vocabulary=300", *TRAINED, "train.batch=4"]
    config = configure("bpe-tiny", sets=sets, mix=["books=2", "code=1"], steps=steps)
    with init_distributed(1.0, HOST) as dist:
        prepared = prepare(sources, config, run, QUIET, HOST, dist=dist)
        dist.total(0.0)  # nobody leaves, and the store with it, before all are here
        return [prepared.sampler.batch(step).ids for step in range(steps)]


def test_processes_draw_the_samples_of_one(sources: Path, tmp_path: Path) -> None:
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    one = drawn(given(sources), tmp_path / "one", 9)
    first, second = worlds.run(2, drawn, given(sources), tmp_path / "two", 9)
    for alone, *shared in zip(one, first, second, strict=True):
        np.testing.assert_array_equal(alone, np.concatenate(shared))


def test_a_training_ends_where_the_epochs_of_all_sources_do(sources: Path, tmp_path: Path) -> None:
    pack([sources / "code"], tmp_path / "packed", valid=0.05, test=0.05)
    given_ = [f"books={sources / 'books'}", f"code={tmp_path / 'packed'}"]
    config = configure("byte-tiny", sets=PLAIN, mix=["books=1@0.1", "code=1@0.05"], steps=10**6)
    found = train(given_, config, tmp_path / "run", quiet=True, force=True)
    corpus = open_corpus(tmp_path / "run" / "data")
    assert isinstance(corpus, Corpora) and found.progress is not None
    (tmp_path / "packed").rename(tmp_path / "gone")  # the run has links to it
    sampler = prepare(given_, config, tmp_path / "run", QUIET, HOST).sampler
    assert isinstance(sampler, Mixture) and sampler.steps
    assert found.progress.step == sampler.steps
    assert train(given_, config, tmp_path / "run", quiet=True, force=True).progress == found.progress


def test_sources_of_any_kind_are_resumed(sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BYTELM_CACHE_FOLDER", str(tmp_path / "cache"))
    pack([sources / "code"], tmp_path / "packed", valid=0.05, test=0.05)
    files = {f"/packed/{path.name}": path.read_bytes() for path in (tmp_path / "packed").iterdir()}
    with stores.web({**files, "/more.txt": b"more of the web\n" * 900}) as web:
        given_ = [f"books={sources / 'books'}/*.txt", f"web={web.url}/more.txt?key=secret", f"code={web.url}/packed/"]
        for steps in (1, 2):
            config = configure("byte-tiny", sets=PLAIN, mix=["books=1", "web=1", "code=1"], steps=steps)
            found = train(given_, config, tmp_path / "run", quiet=True, force=True)
            assert found.progress is not None and found.progress.step == steps
    assert not list((tmp_path / "run" / "data" / "code").glob("*.bin"))
    written = [path for path in (tmp_path / "run").rglob("*.json*") if "secret" in path.read_text()]
    assert not written


def test_an_entropy_model_learns_from_all_sources(sources: Path, tmp_path: Path) -> None:
    mix = ["books=1", "code=3@0.5"]
    config = configure("demo", sets=[*BLT, *TRAINED, *HELD], mix=mix, steps=1)
    train(given(sources), config, tmp_path / "run", quiet=True)
    journal = of_kind(tmp_path / "run" / "entropy_model", "validation")
    assert set(journal[-1]["sources"]) == {"books", "code"}
    assert set(recalibrate(tmp_path / "run", 5.0).by_kind) == {".py", ".txt"}


def test_a_configuration_names_what_cannot_be_mixed() -> None:
    with pytest.raises(ConfigError, match="the least is 1 in 65,536"):
        configure(mix=["books=1", "code=0.000001"])
    assert configure(sets=['mix=["a=1", "b=2"]']).shares[1].weight == 2
