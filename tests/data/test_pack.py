"""Packing: what goes in is what is read, every byte is in one split, and damage is found and named."""

from __future__ import annotations

import json
import resource
import tempfile
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bytelm.data.corpus import SPLITS, Corpus, iterate_documents
from bytelm.data.joining import assign_splits
from bytelm.data.pack import pack
from bytelm.errors import ConfigError, DataError, ResourceError


def write(folder: Path, contents: list[bytes], suffix: str = ".txt") -> Path:
    folder.mkdir(exist_ok=True)
    for number, content in enumerate(contents):
        (folder / f"{number:03d}{suffix}").write_bytes(content)
    return folder


def split_of(corpus: Corpus) -> dict[bytes, set[str]]:
    found: defaultdict[bytes, set[str]] = defaultdict(set)
    for split in SPLITS:
        for _, data in iterate_documents(corpus, split):
            found[data.tobytes()].add(split)
    return found


@pytest.mark.fault("D4")
@settings(max_examples=25)
@given(
    st.lists(st.one_of(st.binary(max_size=40), st.binary(min_size=200, max_size=900)), min_size=1, max_size=8),
    st.integers(100, 600),
    st.integers(0, 3),
    st.sampled_from([(0.05, 0.05), (0.0, 0.2), (0.3, 0.0), (0.5, 0.45)]),
)
def test_what_is_packed_is_read_and_lies_in_exactly_one_split(
    contents: list[bytes], shard_bytes: int, seed: int, fractions: tuple[float, float]
) -> None:
    whole = b"".join(contents)
    if not whole:
        return
    valid, test = fractions
    with tempfile.TemporaryDirectory() as name:
        source = write(Path(name, "source"), contents)
        options = {"valid": valid, "test": test, "seed": seed}
        corpus = pack([source], Path(name, "packed"), shard_bytes=shard_bytes, **options)  # type: ignore[arg-type]
        assert corpus.total == len(whole)
        assert corpus.read(0, corpus.total).tobytes() == whole
        for start in range(0, len(whole), 97):
            assert corpus.read(start, min(131, len(whole) - start)).tobytes() == whole[start : start + 131]

        spans = [(s, s + len(d)) for split in SPLITS for s, d in iterate_documents(corpus, split)]
        assert sorted(spans)[0][0] == 0 and sorted(spans)[-1][1] == len(whole)
        assert all(a[1] == b[0] for a, b in zip(sorted(spans), sorted(spans)[1:], strict=False))
        assert spans != [] and max(stop - start for start, stop in spans) <= max(len(whole) // 16, 256)
        assert [corpus.bytes(s) for s in SPLITS] == [int(corpus.documents(s).sizes.sum()) for s in SPLITS]

        where = split_of(corpus)
        assert all(len(splits) == 1 for splits in where.values())  # equal contents stay together
        counts = Counter(split for splits in where.values() for split in splits)
        assert counts["train"] > 0
        assert (counts["valid"] == 0) if valid == 0 else (counts["valid"] > 0 or len(where) == 1)
        assert (counts["test"] == 0) if test == 0 else (counts["test"] > 0 or len(where) < 3)

        again = pack([source], Path(name, "again"), **options)  # type: ignore[arg-type]
        assert again.fingerprint == corpus.fingerprint
        assert split_of(again) == where


def test_a_large_file_is_cut_at_newlines_into_at_least_sixteen(tmp_path: Path) -> None:
    line = b"x" * 99 + b"\n"
    corpus = pack([write(tmp_path / "s", [line * 400])], tmp_path / "p")
    pieces = [data.tobytes() for _, data in iterate_documents(corpus)]
    assert len(pieces) >= 16
    assert all(piece.endswith(b"\n") and len(piece) > 2500 * 3 // 4 for piece in pieces[:-1])
    lone = b"y" * 1900 + b"\n" + b"y" * 38099  # the one newline lies just in the last quarter of the first piece
    corpus = pack([write(tmp_path / "t", [lone])], tmp_path / "p")
    assert list(corpus.documents().sizes[:3]) == [1901, 2500, 2500]


@settings(max_examples=50)
@given(st.lists(st.integers(50, 100), min_size=60, max_size=120), st.integers(0, 9))
def test_splits_have_their_share(sizes: list[int], seed: int) -> None:
    weights = np.array(sizes)
    orders = np.random.default_rng(seed).permutation(len(sizes)).astype(np.uint64)
    splits = assign_splits(weights, orders, 0.1, 0.2)
    for split, share in (("valid", 0.1), ("test", 0.2)):
        taken = int(weights[splits == SPLITS.index(split)].sum())
        assert share * sum(sizes) <= taken < share * sum(sizes) + 100
    assert orders[splits == SPLITS.index("test")].max() < orders[splits == SPLITS.index("train")].min()


def test_a_content_that_is_most_of_the_data_is_trained_on() -> None:
    sizes = np.array([5, 1000, 7, 1000, 9])
    orders = np.array([8, 1, 9, 1, 7], np.uint64)
    for valid, expected in ((0.05, ["valid", "train", "valid", "train", "valid"]), (0.001, ["train"] * 4 + ["valid"])):
        assert [SPLITS[code] for code in assign_splits(sizes, orders, valid, 0.0)] == expected


def test_another_seed_deals_otherwise(tmp_path: Path) -> None:
    source = write(tmp_path / "s", [bytes([n]) * 50 for n in range(60)])
    one, two = (split_of(pack([source], tmp_path / str(seed), seed=seed)) for seed in (1, 2))
    assert one != two


def test_kinds_of_files_are_kept_by_document(tmp_path: Path) -> None:
    source = write(tmp_path / "s", [b"a" * 5, b"b" * 6], ".py")
    (source / "LICENSE").write_bytes(b"c" * 7)
    (source / "z.MD").write_bytes(b"d" * 8)
    table = pack([source], tmp_path / "p").documents()
    kinds = [table.suffix_names[code] for code in table.suffixes]
    assert dict(zip(table.sizes.tolist(), kinds, strict=True)) == {5: ".py", 6: ".py", 7: "", 8: ".md"}


def test_documents_are_given_in_order_from_a_position_up_to_a_limit(tmp_path: Path) -> None:
    corpus = pack([write(tmp_path / "s", [b"aaa", b"bbbb", b"ccccc"])], tmp_path / "p", valid=0.0, test=0.0)

    def given(**options: int) -> list[tuple[int, bytes]]:
        return [(start, data.tobytes()) for start, data in iterate_documents(corpus, "train", **options)]

    assert given() == [(0, b"aaa"), (3, b"bbbb"), (7, b"ccccc")]
    assert given(limit_bytes=5) == [(0, b"aaa"), (3, b"bb")]
    assert given(limit_bytes=7, start=3) == [(3, b"bbbb"), (7, b"ccc")]
    assert given(limit_bytes=3) == [(0, b"aaa")]


@pytest.mark.fault("D1")
def test_nothing_to_pack_is_one_line_and_leaves_nothing(tmp_path: Path) -> None:
    source = write(tmp_path / "s", [b"", b""])
    (source / "gone").symlink_to("nothing")
    with pytest.raises(DataError, match=r"no bytes found in .*checked 2 files.*gone") as caught:
        pack([source], tmp_path / "p")
    assert caught.value.exit_code == 3 and "\n" not in str(caught.value)
    assert not (tmp_path / "p").exists()


@pytest.mark.fault("T9")
def test_a_pack_that_fails_leaves_nothing_and_a_bad_path_costs_nothing(tmp_path: Path) -> None:
    source = write(tmp_path / "s", [b"a" * 100, b"b" * 100])

    def stop(total: int) -> None:
        if total > 100:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pack([source], tmp_path / "p", shard_bytes=70, progress=stop)
    assert not (tmp_path / "p").exists()
    packed = pack([source], tmp_path / "p")
    for paths, options in ((["nowhere"], {}), ([source], {"valid": 0.5, "test": 0.5}), ([source], {"valid": -0.1})):
        with pytest.raises((DataError, ConfigError)):
            pack(paths, tmp_path / "p", **options)  # type: ignore[arg-type]
    assert Corpus.open(tmp_path / "p").fingerprint == packed.fingerprint


@pytest.mark.fault("T9")
def test_a_full_disk_is_a_resource_error_and_leaves_nothing(tmp_path: Path) -> None:
    source = write(tmp_path / "s", [b"a" * 5000])
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, before[1]))
    try:
        with pytest.raises(ResourceError, match=r"cannot pack into .*p "):
            pack([source], tmp_path / "p")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not (tmp_path / "p").exists()


@pytest.mark.fault("T4")
def test_an_interrupted_pack_is_no_corpus_and_is_started_over(tmp_path: Path) -> None:
    packed = tmp_path / "p"
    pack([write(tmp_path / "s", [b"a" * 500])], packed, shard_bytes=100)
    (packed / "index.json").unlink()
    (packed / "mine.txt").write_text("not of the pack")
    with pytest.raises(DataError, match=r"index\.json"):
        Corpus.open(packed)
    corpus = pack([write(tmp_path / "t", [b"b" * 250])], packed, shard_bytes=100)
    assert corpus.read(0, 250).tobytes() == b"b" * 250
    names = sorted(path.name for path in packed.iterdir())
    assert names == ["documents.npy", "index.json", "mine.txt", *(f"shard-0000{n}.bin" for n in range(3))]


def test_a_folder_packed_into_itself_does_not_read_its_own_output(tmp_path: Path) -> None:
    write(tmp_path, [b"a" * 500])
    first = pack([tmp_path], tmp_path / "p")
    second = pack([tmp_path, tmp_path / "**/*"], tmp_path / "p")
    assert second.total == 500
    assert second.fingerprint == first.fingerprint and second.source_fingerprint == first.source_fingerprint


def test_the_report_and_the_fingerprint_of_the_sources_are_kept(tmp_path: Path) -> None:
    source = write(tmp_path / "s", [b"abc", b""])
    (source / "gone\n").symlink_to("nothing")
    corpus = pack([source], tmp_path / "p")
    opened = Corpus.open(tmp_path / "p")
    assert opened.source_report == corpus.source_report
    assert (opened.source_report.files, opened.source_report.empty) == (2, 1)
    assert opened.source_report.skipped == [(repr(str(source / "gone\n")), "no such file or directory")]
    assert opened.source_fingerprint == corpus.source_fingerprint is not None


@pytest.mark.parametrize("name", ["shard-00001.bin", "documents.npy", "index.json"])
@pytest.mark.parametrize("damage", ["missing", "shorter", "longer", "flipped", "nonsense"])
def test_damage_is_found_and_the_file_is_named(name: str, damage: str, tmp_path: Path) -> None:
    pack([write(tmp_path / "s", [bytes(range(200))])], tmp_path / "p", shard_bytes=100)
    path = tmp_path / "p" / name
    data = path.read_bytes()
    changed = {
        "shorter": data[:-1],
        "longer": data + b"}",
        "flipped": data[:10] + bytes([data[10] ^ 1]) + data[11:],
        "nonsense": b"[1]",
    }
    path.unlink()
    if damage != "missing":
        path.write_bytes(changed[damage])
    if (name, damage) == ("index.json", "shorter"):
        path.write_bytes(data[: len(data) // 2])  # the last byte is but a newline
    if (name, damage) == ("shard-00001.bin", "flipped"):
        corpus = Corpus.open(tmp_path / "p")  # would take reading everything
        with pytest.raises(DataError, match=name):
            corpus.verify()
    else:
        with pytest.raises(DataError, match=name):
            Corpus.open(tmp_path / "p")


def test_a_sound_corpus_verifies_and_one_of_another_version_is_refused(tmp_path: Path) -> None:
    corpus = pack([write(tmp_path / "s", [b"abc" * 99])], tmp_path / "p", shard_bytes=100)
    corpus.verify()
    index = tmp_path / "p" / "index.json"
    index.write_text(json.dumps(json.loads(index.read_text()) | {"version": 99}))
    with pytest.raises(DataError, match="version 99"):
        Corpus.open(tmp_path / "p")


@pytest.mark.fault("D7")
def test_a_shard_that_gets_shorter_while_in_use_is_an_error_and_no_crash(tmp_path: Path) -> None:
    corpus = pack([write(tmp_path / "s", [b"a" * 300])], tmp_path / "p", shard_bytes=100)
    with (tmp_path / "p/shard-00001.bin").open("r+b") as file:
        file.truncate(50)
    assert corpus.read(0, 150).tobytes() == b"a" * 150
    with pytest.raises(DataError, match=r"shard-00001\.bin changed"):
        corpus.read(0, 200)


def test_more_shards_than_may_be_open_at_once(tmp_path: Path) -> None:
    content = np.random.default_rng(0).bytes(300)
    corpus = pack([write(tmp_path / "s", [content])], tmp_path / "p", shard_bytes=1)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    own = Path("/proc/self/fd")
    there = len(list(own.iterdir())) if own.is_dir() else 65  # of the first corpus, and of all else
    resource.setrlimit(resource.RLIMIT_NOFILE, (there + 85, hard))
    try:
        assert Corpus.open(tmp_path / "p").read(0, 300).tobytes() == content == corpus.read(0, 300).tobytes()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
