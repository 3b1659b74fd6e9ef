"""Files elsewhere: read as those on disk, and never half or mixed."""

from __future__ import annotations

import gzip
import io
import os
import time
import zipfile
from collections.abc import Generator
from pathlib import Path

import pytest

import stores
from bytelm.data import places
from bytelm.data.pack import pack
from bytelm.data.scan import scan
from bytelm.data.sources import documents, fingerprint
from bytelm.errors import DataError, MissingExtraError

pytestmark = stores.LEFT_OPEN


@pytest.fixture(scope="module")
def endpoint() -> Generator[str]:
    with stores.s3() as url:
        yield url


@pytest.fixture
def bucket(endpoint: str, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> stores.Bucket:
    for name, value in {**stores.KEYS, "AWS_ENDPOINT_URL": endpoint}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("AWS_PROFILE", raising=False)
    stores.forget()
    return stores.Bucket(endpoint, "test-" + str(abs(hash(request.node.name))))


def zipped(files: dict[str, bytes]) -> bytes:
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return made.getvalue()


FILES = {
    "a.txt": b"first\n" * 1000,
    "b/c.txt.gz": gzip.compress(b"second\n" * 1000),
    "b/d.jsonl": b'{"text": "third"}\n{"text": "fourth"}\n',
    "e.zip": zipped({"x.txt": b"fifth", "y.txt": b"sixth"}),
    "f.bin": os.urandom(3 << 20),
}


def texts(*paths: str) -> list[bytes]:
    return [b"".join(document.pieces) for document in documents(paths)]


def test_a_bucket_is_read_as_a_folder_is(bucket: stores.Bucket, tmp_path: Path) -> None:
    for name, data in {**FILES, ".hidden/g.txt": b"no", "b/.h.txt": b"no"}.items():
        bucket.put(f"corpus/{name}", data)
        path = tmp_path / "corpus" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    bucket.put("corpus/b/", b"")  # as tools with folders make them
    bucket.put("corpus-2/x.txt", b"another")
    url = f"{bucket.url}/corpus"
    here = sorted(texts(str(tmp_path / "corpus")))
    assert sorted(texts(url)) == sorted(texts(url + "/")) == here
    assert len(here) == 7
    assert [document.name for document in documents([url])][:2] == [f"{url}/a.txt", f"{url}/b/c.txt.gz"]
    assert texts(f"{url}/*.txt") == texts(f"{url}/a.txt") == texts(f"{url}/a.txt", f"{url}/*.txt") == [FILES["a.txt"]]
    found = scan([url])
    assert (found.files, found.bytes) == (5, sum(map(len, FILES.values())))
    assert pack([url], tmp_path / "packed").fingerprint == pack([url], tmp_path / "again").fingerprint


def test_hidden_is_what_is_hidden_inside_of_what_is_named(bucket: stores.Bucket) -> None:
    """However many files there are: a folder may have one, and it may be the named folder that is hidden."""
    bucket.put("one/.h.txt", b"no")
    bucket.put(".kept/a.txt", b"1")
    assert texts(f"{bucket.url}/one/") == texts(f"{bucket.url}/one/*") == []
    assert texts(f"{bucket.url}/one/.h.txt") == [b"no"]
    assert texts(f"{bucket.url}/.kept") == [b"1"]
    bucket.put(".kept/b.txt", b"2")
    assert texts(f"{bucket.url}/.kept") == texts(f"{bucket.url}/.kept/") == [b"1", b"2"]


def test_a_listing_is_new_and_a_fingerprint_that_of_the_contents(bucket: stores.Bucket) -> None:
    url = bucket.put("a.txt", b"12345")
    before = fingerprint([bucket.url + "/"])
    assert fingerprint([bucket.url + "/"]) == before
    bucket.put("a.txt", b"123")
    assert texts(bucket.url + "/") == texts(url) == [b"123"]
    after = fingerprint([bucket.url + "/"])
    bucket.put("a.txt", b"456")
    assert len({before, after, fingerprint([bucket.url + "/"])}) == 3


def test_what_is_replaced_while_it_is_read_is_an_error(bucket: stores.Bucket) -> None:
    url = bucket.put("a.txt", b"x" * (20 << 20))
    bucket.put("b.txt", b"x")
    reading = documents([url])
    pieces = next(reading).pieces
    next(pieces)
    bucket.put("a.txt", b"y" * (20 << 20))
    with pytest.raises(DataError, match=r"a\.txt"):
        for _ in pieces:
            pass
        next(reading)


def test_errors_name_the_url_and_the_way_out_and_no_secret(
    bucket: stores.Bucket, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(DataError, match=f"no such file or folder: {bucket.url}/nothing/: check its name"):
        texts(f"{bucket.url}/nothing/")
    with pytest.raises(DataError, match="no such file or folder: s3://no-such-bucket/x"):
        texts("s3://no-such-bucket/x")
    with pytest.raises(DataError, match="nothing"):
        texts(f"{bucket.url}/nothing/*.txt")
    with pytest.raises(DataError, match="it must be s3, gs, az, https or http"):
        texts("ftp://example.org/x")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    monkeypatch.setattr("s3fs.S3FileSystem.retries", 1)
    stores.forget()
    with pytest.raises(DataError, match=r"s3://b/x cannot be read .*AWS_ACCESS_KEY_ID") as caught:
        texts("s3://b/x")
    assert stores.KEYS["AWS_SECRET_ACCESS_KEY"] not in str(caught.value)
    assert "\n" not in str(caught.value)


def test_without_the_package_the_error_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(places, "find_spec", lambda name: None)
    for url in ("s3://b/x", "gs://b/x", "az://b/x", "https://example.org/x"):
        with pytest.raises(MissingExtraError, match=r"pip install 'bytelm\[cloud\]'") as caught:
            texts(url)
        assert url in str(caught.value)


@pytest.mark.parametrize("ranges", [True, False])
def test_the_web_with_and_without_ranges(ranges: bool) -> None:
    with stores.web({f"/{name}": data for name, data in FILES.items()}, ranges) as web:
        assert texts(f"{web.url}/f.bin?key=secret") == [FILES["f.bin"]]
        assert web.sent["/f.bin"] == len(FILES["f.bin"])
        assert texts(f"{web.url}/b/c.txt.gz") == [b"second\n" * 1000]
        assert sorted(texts(f"{web.url}/e.zip")) == [b"fifth", b"sixth"]
        with pytest.raises(DataError, match=r"no such file or folder: http://.*/no\?…: ") as caught:
            texts(f"{web.url.replace('//', '//me:secret@')}/no?key=secret")
        assert "secret" not in str(caught.value)
        if ranges:
            assert places.read(f"{web.url}/f.bin", 100, 50) == FILES["f.bin"][100:150]
        else:
            with pytest.raises(DataError, match="whole files"):
                places.read(f"{web.url}/f.bin", 100, 50)


def test_a_file_of_the_web_that_is_replaced_while_it_is_read_is_an_error() -> None:
    with stores.web({"/f.bin": FILES["f.bin"]}) as web:
        reading = documents([f"{web.url}/f.bin"])
        pieces = next(reading).pieces
        web.files["/f.bin"] = bytes(len(FILES["f.bin"]))
        assert b"".join(pieces) == FILES["f.bin"]
        with pytest.raises(DataError, match=r"f\.bin was replaced"):
            next(reading)


def test_a_file_that_ends_early_is_an_error() -> None:
    with stores.web({"/f.bin": FILES["f.bin"]}, short=1000) as web, pytest.raises(DataError, match=r"f\.bin"):
        texts(f"{web.url}/f.bin")


def test_a_query_is_no_part_of_a_name_and_is_not_written_down() -> None:
    with stores.web({f"/{name}": data for name, data in FILES.items()}) as web:
        url = f"{web.url}/b/c.txt.gz?download=true&key=secret"
        assert texts(url) == [b"second\n" * 1000]
        assert sorted(texts(f"{web.url}/b/d.jsonl?key=secret")) == [b"fourth", b"third"]
        assert [document.name for document in documents([url])] == [f"{web.url}/b/c.txt.gz"]
        assert list(scan([url]).kinds) == [".txt.gz"]
        web.files["/b/c.txt.gz"] = b"not compressed"
        with pytest.raises(DataError, match=r"c\.txt\.gz") as caught:
            texts(url)
        assert "secret" not in str(caught.value)
        assert places.kept(f"code={url}") == f"code={web.url}/b/c.txt.gz?…"
    assert places.kept("s3://bucket/a?b") == "s3://bucket/a?b"


def test_a_web_server_that_is_busy_is_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(places, "_WAIT", 0.001)
    with stores.web({"/f.bin": FILES["f.bin"]}) as web:
        url = f"{web.url}/f.bin"
        for question in (
            lambda: texts(url) == [FILES["f.bin"]],
            lambda: places.read(url, 100, 50) == FILES["f.bin"][100:150],
            lambda: places.there(url),
        ):
            web.busy = 3
            assert question()
            assert web.busy == 0
        for question in (lambda: texts(url), lambda: places.read(url, 0, 5), lambda: places.there(url)):
            web.busy = 1000
            with pytest.raises(DataError, match=r"f\.bin cannot be read \(503"):
                question()
            assert web.busy > 900  # and not without an end
        web.busy = 0
        assert not places.there(f"{url}.no")


def test_a_file_of_the_web_may_take_long_to_be_read(monkeypatch: pytest.MonkeyPatch) -> None:
    http = pytest.importorskip("fsspec.implementations.http")
    monkeypatch.setattr("aiohttp.client.DEFAULT_TIMEOUT", http.aiohttp.ClientTimeout(total=0.3))  # 5 minutes
    http.HTTPFileSystem.clear_instance_cache()
    data = bytes(16 << 20)
    with stores.web({"/f.bin": data}) as web:
        size = 0
        for document in documents([f"{web.url}/f.bin"]):
            for piece in document.pieces:
                size += len(piece)
                time.sleep(0.04)
    assert size == len(data)


def test_any_store_of_fsspec_will_do() -> None:
    fsspec = pytest.importorskip("fsspec")
    memory = fsspec.filesystem("memory")
    memory.pipe("/bytelm-test/a.txt", b"in memory")
    try:
        assert texts("memory://bytelm-test") == texts("memory://bytelm-test/a.txt") == [b"in memory"]
    finally:
        memory.rm("/bytelm-test", recursive=True)
