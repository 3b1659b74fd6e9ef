"""Several processes prepare a training together: the same files as one process writes, each piece made once."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

import worlds
from bytelm.data import sharing
from bytelm.data.boundaries import save_piece
from bytelm.data.bpe import Bpe
from bytelm.data.corpus import Corpus
from bytelm.data.options import DataConfig
from bytelm.data.pack import pack
from bytelm.patching import space
from bytelm.training.dist import init_distributed
from bytelm.training.journal import Journal
from bytelm.training.prepare import prepare
from bytelm.training.settings import configure
from bytelm.training.stages import boundaries as stage_module
from bytelm.training.stages.base import run_stage
from bytelm.training.stages.boundaries import BoundaryStage
from bytelm.training.stages.packing import PackingStage
from bytelm.training.stages.tokens import TokenStage
from bytelm.transfer import HOST
from small import BLT, TRAINED

RECIPE = configure("demo", sets=[*BLT, *TRAINED, "patching.name=space"], steps=1).recipe
QUIET = Journal(None, quiet=True)


@pytest.fixture(scope="module")
def notes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, rng = tmp_path_factory.mktemp("notes"), random.Random(0)
    for i in range(24):
        (folder / f"{i}.txt").write_text(" ".join(rng.choice(["the", "patch", "déjà", "x = 1\n"]) for _ in range(900)))
    return folder


def copied(pack: Path, home: Path) -> Corpus:
    return run_stage(PackingStage(home, [], DataConfig(), None, (), pack, join=True), QUIET)


def recorded(pack: Path, home: Path) -> list[int]:
    """Link a pack, cut it and encode it; the pieces of it that were cut here."""
    cut: list[int] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sharing, "SMALLEST", 4000)

        def saved(*args: Any) -> None:
            save_piece(*args)
            cut.append(1)

        patch.setattr(stage_module, "save_piece", saved)
        corpus = copied(pack, home)
        run_stage(BoundaryStage(space.Config().build(), RECIPE, corpus), QUIET)
        tokens = Bpe.learn([b"the patch and the patch of x = 1\n" * 9], 280)
        run_stage(TokenStage(corpus, tokens), QUIET)
    return cut


def held(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_three_processes_record_what_one_does(notes: Path, tmp_path: Path) -> None:
    pack([notes], tmp_path / "packed")
    whole = recorded(tmp_path / "packed", tmp_path / "one")
    shares = worlds.run(3, recorded, tmp_path / "packed", tmp_path / "three")
    assert held(tmp_path / "three") == held(tmp_path / "one")
    assert {name.partition("-")[0] for name in held(tmp_path / "one")} > {"boundaries", "tokens", "shard"}
    assert sum(map(sum, shares)) == sum(whole) > 20, "each piece is made once"


def prepared(notes: Path, run: Path, preset: str, sets: list[str]) -> list[Any]:
    with init_distributed(0.5) as dist:
        run.mkdir(exist_ok=True)
        config = configure(preset, sets=[*TRAINED, *sets], steps=1)
        found = prepare([notes], config, run, Journal(None, quiet=True), HOST, dist=dist)
        dist.total(0.0)  # nobody leaves, with the store, before the others have found what was made
        return [found.sampler.batch(step).ids.tolist() for step in range(2)]


@pytest.mark.parametrize(("preset", "sets"), [("demo", BLT), ("bpe-tiny", ["model.vocabulary=300", "model.dim=16"])])
def test_two_processes_prepare_the_run_that_one_does(preset: str, sets: list[str], notes: Path, tmp_path: Path) -> None:
    two = worlds.run(2, prepared, notes, tmp_path / "2", preset, sets)
    one = worlds.run(1, prepared, notes, tmp_path / "1", preset, sets)
    assert held(tmp_path / "2" / "data") == held(tmp_path / "1" / "data")
    assert held(tmp_path / "2").keys() == held(tmp_path / "1").keys()
    assert [a + b for a, b in zip(*two, strict=True)] == one[0]
