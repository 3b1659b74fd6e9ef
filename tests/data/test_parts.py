"""A corpus of parts: the same bytes by any number of packers, killed at any instant."""

from __future__ import annotations

import json
import os
import random
import socket
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import worlds
from bytelm.cli import run as cli
from bytelm.data import claims, joining
from bytelm.data.corpus import SPLITS, Corpus, iterate_documents
from bytelm.data.pack import pack
from bytelm.data.parts import Packing
from bytelm.data.sampler import Sampler
from bytelm.data.selection import sample_evenly
from bytelm.data.sharing import SharedWork
from bytelm.errors import DataError, ResourceError

LINES = [b"the patch of byte %d\n" % n for n in range(40)]


def written(folder: Path, count: int = 48, seed: int = 0) -> Path:
    """Files of some hundred bytes, so that none is cut, a few of them equal."""
    rng = random.Random(seed)
    folder.mkdir()
    for number in range(count):
        text = b"".join(rng.choices(LINES, k=rng.randint(20, 30)))
        (folder / f"{number:03d}.{rng.choice(['txt', 'py', 'md'])}").write_bytes(text)
    for number in (5, 17, 40):
        (folder / f"{number:03d}.same").write_bytes(LINES[0] * 30)
    return folder


def held(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def joined(source: Path, out: Path, wait: float = 0.0, **options: Any) -> str:
    """Take part in a packing, by what each process of a test calls."""
    corpus = pack([source], out, part_bytes=2000, join=True, progress=lambda bytes: time.sleep(wait), **options)
    return corpus.fingerprint


def made(monkeypatch: pytest.MonkeyPatch) -> list[Sequence[str]]:
    """The files of each part that is packed from now on."""
    found: list[Sequence[str]] = []
    exact = Packing.part

    def part(self: Packing, files: Sequence[str], *rest: Any) -> None:
        exact(self, files, *rest)
        found.append(files)

    monkeypatch.setattr(Packing, "part", part)
    return found


@pytest.mark.parametrize("options", [{}, {"deduplicate": True, "shard_bytes": 700}])
def test_one_two_and_three_packers_make_the_same_bytes(options: dict[str, Any], tmp_path: Path) -> None:
    source = written(tmp_path / "s")
    one = pack([source], tmp_path / "1", part_bytes=2000, **options)
    for world in (2, 3):
        assert {*worlds.run(world, packs, source, tmp_path / str(world), options)} == {one.fingerprint}
        assert held(tmp_path / str(world)) == held(tmp_path / "1")
    assert len(one.index.shards) > 5 and one.read(0, one.total).tobytes() == b"".join(
        path.read_bytes() for path in sorted(source.iterdir())
    )


def packs(source: Path, out: Path, options: dict[str, Any]) -> str:
    return joined(source, out, 0.001, **options)


@settings(max_examples=6)
@given(st.integers(1500, 40000), st.integers(0, 3), st.booleans(), st.booleans(), st.sampled_from([0.0, 0.1, 0.4]))
def test_documents_splits_and_contamination_do_not_depend_on_the_parts(
    part_bytes: int, seed: int, deduplicate: bool, grouped: bool, valid: float
) -> None:
    with tempfile.TemporaryDirectory() as name, pytest.MonkeyPatch.context() as patch:
        source = written(Path(name, "s"), seed=seed)
        options: dict[str, Any] = {"seed": seed, "deduplicate": deduplicate, "valid": valid, "test": 0.2}
        whole = pack([source], Path(name, "whole"), **options)
        if grouped:
            patch.setattr(joining, "EXACT", 0)
        patch.setattr(joining, "HELD", 7)
        parts = pack([source], Path(name, "parts"), part_bytes=part_bytes, **options)
        assert parts.fingerprint == whole.fingerprint and parts.index.looked == whole.index.looked > 0
        assert parts.index.repeated == whole.index.repeated
        assert parts.source_report == whole.source_report and parts.index.suffixes == whole.index.suffixes
        for split in SPLITS:
            assert [d.tobytes() for _, d in iterate_documents(parts, split)] == [
                d.tobytes() for _, d in iterate_documents(whole, split)
            ]
        ids = [Sampler(c, "train", 64, 4, seed=1).batch(3).ids for c in (whole, parts)]
        np.testing.assert_array_equal(*ids)


def test_what_is_repeated_is_found_in_the_training_documents_of_every_part(tmp_path: Path) -> None:
    rng, source = np.random.default_rng(0), tmp_path / "s"
    source.mkdir()
    blocks = [rng.bytes(512) for _ in range(40)]
    for number in range(60):  # each block is in several documents, which are all different
        (source / f"{number:02d}").write_bytes(b"".join(blocks[(number + k) % 40] for k in (0, 7, 19)) + b"%d" % number)
    whole, parts = pack([source], tmp_path / "w"), pack([source], tmp_path / "p", part_bytes=7000)
    assert parts.index.repeated == whole.index.repeated > 5000


@settings(max_examples=30)
@given(
    st.lists(st.sampled_from([b"a", b"bb", b"ccc", b"d" * 90]), min_size=1, max_size=30),
    st.integers(1, 200),
    st.integers(1, 9),
)
def test_of_equal_documents_the_first_one_stays(contents: list[bytes], part_bytes: int, at_once: int) -> None:
    with tempfile.TemporaryDirectory() as name, pytest.MonkeyPatch.context() as patch:
        patch.setattr(joining, "HELD", at_once)
        source = Path(name, "s")
        source.mkdir()
        for number, content in enumerate(contents):
            (source / f"{number:02d}").write_bytes(content)
        corpus = pack([source], Path(name, "p"), part_bytes=part_bytes, deduplicate=True)
        firsts = [sum(map(len, contents[:n])) for n, c in enumerate(contents) if c not in contents[:n]]
        kept = sorted(position for split in SPLITS for position, _ in iterate_documents(corpus, split))
        assert kept == firsts and corpus.total == sum(map(len, contents))
        assert corpus.source_report.duplicates == len(contents) - len(firsts)
        assert sum(corpus.bytes(split) for split in SPLITS) == sum(map(len, {*contents}))


def test_a_long_document_counts_as_a_duplicate_only_as_a_whole(tmp_path: Path) -> None:
    source, text = tmp_path / "s", b"".join(LINES) * 20
    source.mkdir()
    for name, content in {"a": text, "b": text, "c": text + b"and more"}.items():
        (source / name).write_bytes(content)
    corpus = pack([source], tmp_path / "p", deduplicate=True)
    rows = [position for split in SPLITS for position, _ in iterate_documents(corpus, split)]
    assert corpus.source_report.duplicates == 1 and corpus.count() > len(rows) > 10
    assert not any(len(text) <= position < 2 * len(text) for position in rows)
    assert any(position >= 2 * len(text) for position in rows)


def read_all(corpus: Corpus) -> list[Any]:
    found: list[Any] = [[corpus.bytes(split) for split in SPLITS], corpus.count()]
    for split in (None, *SPLITS):
        found += [[*map(str, iterate_documents(corpus, split, start=n))] for n in (0, 1, 700, corpus.total)]
        found += [corpus.documents(split).starts.tolist(), corpus.count(split)]
    return found + [[*map(str, sample_evenly(corpus, "train", limit))] for limit in (None, 3000, 100)]


def test_a_table_is_read_in_any_chunks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = read_all(pack([written(tmp_path / "s")], tmp_path / "p"))
    for chunk in (1, 3, 51):
        monkeypatch.setattr("bytelm.data.corpus.CHUNK", chunk)
        assert read_all(Corpus.open(tmp_path / "p")) == whole


# --- killed packers, and claims ---


def killed(source: Path, out: Path, after: float, world: int) -> set[str]:
    """The parts that were done when all packers were killed some time after the first part was begun."""
    with worlds.started(world, joined, source, out, 0.004):
        while not [*out.glob("parts-*/part-*")]:
            time.sleep(0.001)
        time.sleep(after)
    return {path.name for path in out.glob("parts-*/part-?????")}


def kills(tmp_path: Path, rounds: int, monkeypatch: pytest.MonkeyPatch) -> None:
    source, rng = written(tmp_path / "s"), random.Random(1)
    one = pack([source], tmp_path / "one", part_bytes=2000)
    packed, seen = made(monkeypatch), 0
    for number in range(rounds):
        out = tmp_path / str(number)
        done = killed(source, out, rng.uniform(0, 0.35), 1 + number % 2)
        if (out / "index.json").exists():
            continue
        packed.clear()
        corpus = pack([source], out, part_bytes=2000, join=number % 3 > 0)
        assert corpus.fingerprint == one.fingerprint and held(out) == held(tmp_path / "one")
        total = len({path.name for path in source.iterdir()})
        assert sum(map(len, packed)) < total or not done, "what was done is not packed again"
        seen += bool(done)
    assert seen, "no packer was killed in between"


@pytest.mark.fault("T4")
def test_a_killed_packer_loses_the_part_in_hand_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kills(tmp_path, 4, monkeypatch)


@pytest.mark.slow
def test_packers_killed_at_many_instants(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kills(tmp_path, 40, monkeypatch)


@pytest.mark.fault("T4")
def test_one_of_two_packers_is_killed_and_the_other_takes_its_part(tmp_path: Path) -> None:
    source = written(tmp_path / "s")
    one = pack([source], tmp_path / "one", part_bytes=2000)
    with worlds.started(2, joined, source, tmp_path / "two", 0.03) as processes:  # one begins a second after the other
        while len([*tmp_path.glob("two/parts-*/part-*.tmp")]) < 2:
            assert processes[0][0].is_alive(), "it was done before the other began"
            time.sleep(0.001)
        processes[0][0].kill()
        assert worlds.results(processes[1:]) == [one.fingerprint]
    assert held(tmp_path / "two") == held(tmp_path / "one")


def claim(folder: Path, **owner: Any) -> Path:
    path = folder / "piece-00000.claim-0"
    folder.mkdir(exist_ok=True)
    path.write_text(json.dumps({"host": "another", "machine": "another", "pid": 1, "id": "x"} | owner))
    return path


def test_the_claim_of_a_lost_process_is_taken_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here: dict[str, Any] = {"host": socket.gethostname(), "machine": claims.machine()}
    dead = worlds.run(1, os.getpid)[0]
    for name, owner in (("ended", here | {"pid": dead}), ("reused", here | {"pid": os.getpid(), "started": "0"})):
        claim(tmp_path / name, **owner)
        (tmp_path / name / "piece-00000.x.tmp").write_bytes(b"half")
        SharedWork(tmp_path / name, lambda: False, pytest.fail).do("piece", 1, lambda n, aside: aside.touch())
        assert {path.name for path in (tmp_path / name).iterdir()} == {"piece-00000", "piece-00000.claim-0"}
    waited: list[int] = []
    monkeypatch.setattr(claims, "LOST", 0.3)
    path = claim(tmp_path / "silent")

    def waiting(done: int) -> None:
        waited.append(done)
        assert len(waited) < 60, "it is never taken over"
        if len(waited) < 3:
            os.utime(path, (len(waited), len(waited)))  # still at it, by a clock that is years behind

    SharedWork(tmp_path / "silent", lambda: False, waiting).do("piece", 2, lambda n, aside: aside.touch())
    assert (tmp_path / "silent/piece-00000").exists() and len(waited) >= 3 and {*waited} == {1}


@pytest.mark.parametrize("links", [True, False])
def test_a_claim_says_whose_it_is_from_its_first_moment(
    links: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    claim, exact = tmp_path / "piece-00000.claim-0", os.link

    linked: list[Path] = []

    def link(source: Path, to: Path) -> None:
        linked.append(to)
        assert source.read_bytes() in (b"{}", b"[]") and (claim.exists() or claims.held_by(tmp_path) is None)
        if not links:
            raise PermissionError("this disk knows none")
        exact(source, to)

    monkeypatch.setattr(os, "link", link)
    claims.create(claim, b"{}")
    assert linked == [claim]
    assert held(tmp_path) == {claim.name: b"{}"} and claims.held_by(tmp_path) is not None
    with pytest.raises(FileExistsError):
        claims.create(claim, b"[]")
    assert held(tmp_path) == {claim.name: b"{}"}


def test_a_piece_made_twice_stays_that_of_the_first(tmp_path: Path) -> None:
    work = SharedWork(tmp_path / "w", lambda: False, lambda done: None)

    def slow(number: int, aside: Path) -> None:
        for path in (aside, work.path("piece", 0)):  # as if it were taken over and done meanwhile
            path.mkdir()
            (path / "file").write_text(path.name)

    work.do("piece", 1, slow)
    assert held(tmp_path / "w") == {"piece-00000/file": b"piece-00000"}


def test_an_error_gives_the_claim_back(tmp_path: Path) -> None:
    def fails(number: int, aside: Path) -> None:
        aside.write_bytes(b"half")
        raise DataError("damaged")

    with pytest.raises(DataError, match="damaged"):
        SharedWork(tmp_path / "w", lambda: False, lambda done: None).do("piece", 1, fails)
    assert not [*(tmp_path / "w").iterdir()]


# --- commands ---


def test_a_folder_in_use_and_one_of_other_data_are_refused(tmp_path: Path) -> None:
    source, out = written(tmp_path / "s"), tmp_path / "p"
    with worlds.started(1, joined, source, out, 0.02):
        while not [*out.glob("parts-*/*.claim-0")]:
            time.sleep(0.001)
        with pytest.raises(ResourceError, match=r"is being packed by process \d+ on .*: --join takes part"):
            pack([source], out, part_bytes=2000)
        with pytest.raises(ResourceError, match="wait for it"):
            pack([source / "000.md", source], out, part_bytes=1000, join=True)
    first = pack([source], out, part_bytes=2000)
    assert pack([source], out, part_bytes=2000, join=True).fingerprint == first.fingerprint
    with pytest.raises(DataError, match="of other files or options"):
        pack([source], out, seed=1, join=True)
    with pytest.raises(DataError, match="standard input"):
        pack(["-"], tmp_path / "q", join=True)


def test_the_command_packs_with_several_processes_and_verifies(tmp_path: Path, capfd: Any) -> None:
    source = written(tmp_path / "s")
    words = ["data", "pack", str(source), "-o", str(tmp_path / "p"), "--set", "data.deduplicate=true"]
    assert cli([*words, "--workers", "2"]) == 0
    assert "51 files, 2 duplicates left out: " in capfd.readouterr().out
    assert cli([*words, "--join", "--json"]) == 0 and json.loads(capfd.readouterr().out)["duplicates"] == 2
    assert held(tmp_path / "p") == held_of_one(source, tmp_path)
    assert cli(["data", "verify", str(tmp_path / "p")]) == 0
    assert cli([*words, "--workers", "0"]) == 2 and cli(["data", "pack", "-", *words[3:], "--workers", "2"]) == 2


def held_of_one(source: Path, tmp_path: Path) -> dict[str, bytes]:
    pack([source], tmp_path / "one", deduplicate=True)
    return held(tmp_path / "one")
