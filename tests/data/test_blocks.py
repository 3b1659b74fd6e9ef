"""A packed corpus elsewhere: read in blocks, each byte about once, never a half one, never one of another content."""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import pytest

import stores
from bytelm.data import blocks, places
from bytelm.data.blocks import BlockReader, Cache
from bytelm.data.corpus import INDEX, TABLE, Corpus
from bytelm.data.pack import pack
from bytelm.data.packed import faults, is_pack, link_corpus, pack_of
from bytelm.errors import ConfigError, DataError, ResourceError

pytestmark = stores.LEFT_OPEN


@pytest.fixture
def packed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A corpus of 3 MB in shards of 1 MB, and an empty cache."""
    monkeypatch.setenv(blocks.FOLDER, str(tmp_path / "cache"))
    source = tmp_path / "source"
    source.mkdir()
    for number in range(30):
        (source / f"{number}.bin").write_bytes(np.random.default_rng(number).bytes(100_000))
    pack([source], tmp_path / "packed", shard_bytes=1_000_000)
    return tmp_path / "packed"


def uploaded(packed: Path) -> dict[str, bytes]:
    return {f"/packed/{path.name}": path.read_bytes() for path in packed.iterdir()}


def total(sent: dict[str, int]) -> int:
    return sum(size for name, size in sent.items() if "shard-" in name)


def test_every_byte_comes_once_where_all_can_be_held(packed: Path, tmp_path: Path) -> None:
    here, files = Corpus.open(packed), uploaded(packed)
    with stores.web(files) as web:
        url = f"{web.url}/packed/"
        assert is_pack(url)
        there = Corpus.open(url)
        assert there.elsewhere and not here.elsewhere
        assert total(web.sent) == 0
        starts = np.random.default_rng(0).integers(0, here.total - 9000, 100)
        for start in starts.tolist():
            assert np.array_equal(there.read(start, 9000), here.read(start, 9000))
        assert total(web.sent) <= here.total
        sent = total(web.sent)
        again = Corpus.open(url)
        assert np.array_equal(again.read(int(starts[0]), 9000), here.read(int(starts[0]), 9000))
        assert total(web.sent) == sent
        assert web.sent[f"/packed/{TABLE}"] == len(files[f"/packed/{TABLE}"])


def test_a_window_of_what_cannot_be_held_gets_few_times_its_bytes(
    packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(blocks.BOUND, "0.001")
    here, window, count = Corpus.open(packed), 60_000, 20
    with stores.web(uploaded(packed)) as web:
        there = Corpus.open(f"{web.url}/packed/")
        for start in np.random.default_rng(0).integers(0, here.total - window, count).tolist():
            assert np.array_equal(there.read(start, window), here.read(start, window))
            held = sum(path.stat().st_size for path in (tmp_path / "cache" / "blocks").rglob("*") if path.is_file())
            assert held <= 1_000_000
        assert window * count / 2 < total(web.sent) < 3 * window * count
        before = total(web.sent)
        assert np.array_equal(there.read(0, here.total), here.read(0, here.total))  # more than the cache holds
        assert total(web.sent) - before <= here.total


def test_a_run_keeps_where_the_shards_are(packed: Path, tmp_path: Path) -> None:
    here = Corpus.open(packed)
    with stores.web(uploaded(packed)) as web:
        url = f"{web.url}/packed/"
        assert pack_of([url], tmp_path / "run") == url
        corpus = link_corpus(url, tmp_path / "run" / "data")
        assert sorted(path.name for path in (tmp_path / "run" / "data").iterdir()) == [TABLE, INDEX]
        assert corpus.fingerprint == here.fingerprint
        assert np.array_equal(Corpus.open(tmp_path / "run" / "data").read(0, here.total), here.read(0, here.total))
        assert list(faults(tmp_path / "run")) == []
        name = "/packed/shard-00001.bin"
        web.files[name] = web.files[name][:-1] + bytes([web.files[name][-1] ^ 1])
        assert any("shard-00001.bin" in fault for fault in faults(tmp_path / "run"))


def test_a_shard_that_was_replaced_is_an_error(packed: Path) -> None:
    with stores.web(uploaded(packed)) as web:
        corpus = Corpus.open(f"{web.url}/packed/")
        web.files["/packed/shard-00001.bin"] = bytes(1_000_000)
        corpus.read(0, 1000)
        with pytest.raises(DataError, match=r"shard-00001\.bin was replaced"):
            corpus.read(1_500_000, 1000)
        web.files["/packed/shard-00001.bin"] = bytes(10)
        with pytest.raises(DataError, match=r"shard-00001\.bin has 10 bytes and not 1000000"):
            Corpus.open(f"{web.url}/packed/")
        web.files[f"/packed/{TABLE}"] += b"x"
        web.files["/packed/shard-00001.bin"] = bytes(1_000_000)
        next((blocks.cache().folder / "tables").iterdir()).unlink()
        with pytest.raises(DataError, match=rf"{TABLE} is not what was written"):
            Corpus.open(f"{web.url}/packed/")


def test_blocks_of_what_was_there_before_are_not_taken(tmp_path: Path) -> None:
    held, out = Cache(tmp_path, 10_000), np.zeros(10, np.uint8)
    with stores.web({"/x": bytes(100)}) as web:
        for content in (bytes(100), bytes([1] * 100)):
            web.files["/x"] = content
            BlockReader(f"{web.url}/x", places.status(f"{web.url}/x"), held, 64).read_into(60, out)
            assert out.tolist() == list(content[60:70])


def test_a_server_without_ranges_is_an_error(packed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(blocks.BOUND, "0.001")
    with stores.web(uploaded(packed), ranges=False) as web:
        corpus = Corpus.open(f"{web.url}/packed/")
        with pytest.raises(DataError, match="whole files"):
            corpus.read(0, 1000)


def test_half_a_block_is_not_believed(tmp_path: Path) -> None:
    held, out = Cache(tmp_path, 1000), np.zeros(10, np.uint8)
    held.write("ab", bytes(range(100)))
    assert held.read("ab", 100, 90, out) and out.tolist() == list(range(90, 100))
    next(tmp_path.rglob("ab/ab")).write_bytes(bytes(50))
    assert not held.read("ab", 100, 10, out)
    (tmp_path / "blocks" / "ab" / "cd.123.tmp").write_bytes(bytes(100))
    assert not held.read("cd", 100, 0, out)


def test_what_was_read_longest_ago_goes_first(tmp_path: Path) -> None:
    held, out = Cache(tmp_path, 1000), np.zeros(10, np.uint8)
    for number in range(9):
        held.write(f"{number}x", bytes(100))
    assert held.read("0x", 100, 0, out)
    for number in range(9, 12):
        held.write(f"{number}x", bytes(100))
    assert held.read("0x", 100, 0, out)
    assert not held.read("1x", 100, 0, out)


def test_threads_keep_to_the_bound_together(tmp_path: Path) -> None:
    held = Cache(tmp_path, 5000)

    def work(own: int) -> None:
        for number in range(60):
            held.write(f"{own}{number}", bytes(100))

    threads = [threading.Thread(target=work, args=(own,)) for own in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    left = [path for path in (tmp_path / "blocks").rglob("*") if path.is_file()]
    assert 0 < len(left) <= 50 + len(threads)
    assert not [path for path in left if path.suffix == ".tmp"]


def test_a_bound_that_is_none(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for text in ("many", "-1", "inf", "nan"):
        monkeypatch.setenv(blocks.BOUND, text)
        with pytest.raises(ConfigError, match=f"{blocks.BOUND}={text}"):
            blocks.cache()
    (tmp_path / "file").touch()
    with pytest.raises(ResourceError, match=blocks.FOLDER):
        Cache(tmp_path / "file", 1000).write("ab", b"x")


def test_a_training_on_s3(packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with stores.s3() as endpoint:
        for name, value in {**stores.KEYS, "AWS_ENDPOINT_URL": endpoint}.items():
            monkeypatch.setenv(name, value)
        monkeypatch.delenv("AWS_PROFILE", raising=False)
        stores.forget()
        bucket = stores.Bucket(endpoint, "corpora")
        for path in packed.iterdir():
            url = bucket.put(f"packed/{path.name}", path.read_bytes())
        url = url.rpartition("/")[0] + "/"
        here = Corpus.open(packed)
        assert is_pack(url) and not is_pack("s3://corpora/")
        corpus = link_corpus(url, tmp_path / "run" / "data")
        assert np.array_equal(corpus.read(900_000, 200_000), here.read(900_000, 200_000))
        known = places.status(f"{url}shard-00000.bin")
        bucket.put("packed/shard-00000.bin", bytes(1_000_000))
        reader = BlockReader(f"{url}shard-00000.bin", known, Cache(tmp_path / "new", 1 << 20), 1 << 16)
        with pytest.raises(DataError, match="was replaced"):
            reader.read_into(0, np.zeros(10, np.uint8))
