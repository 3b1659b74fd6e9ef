"""Files that lie elsewhere, named by URLs: s3://, gs://, az://, https://, through fsspec.

A listing, sizes and marks are never taken from a cache: an object is another one as soon as its mark is. What is opened
here holds no connection of ours, since those do not survive a fork; fsspec keeps them, one for each process.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import re
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from importlib.util import find_spec
from pathlib import PurePosixPath
from typing import Any, cast
from urllib.parse import urlsplit

from bytelm.data.files import PIECE, shown
from bytelm.errors import BytelmError, DataError, MissingExtraError, ResourceError

_READ_AHEAD = 8 * PIECE  # bytes of a file that is read from its beginning to its end
# Where the packages look for what gives access.
_ACCESS = {
    "s3": "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY or AWS_PROFILE, and AWS_ENDPOINT_URL where it is not Amazon's",
    "gs": "GOOGLE_APPLICATION_CREDENTIALS",
    "az": "AZURE_STORAGE_ACCOUNT_NAME and AZURE_STORAGE_ACCOUNT_KEY",
}
_WEB = ("http", "https")
_KNOWN = (*_ACCESS, *_WEB, "memory")
# A web server is asked again after what may pass; the packages of the other stores do so themselves.
_TRIES = 5
_WAIT = 0.5  # seconds before the second time, doubled each time
_PASSING = (408, 425, 429, 500, 502, 503, 504)
_SILENCE = 60  # seconds without a byte until a web server is given up
# What tells one content from another: a tag where the server has one, else when it was written.
_MARKS = ("ETag", "etag", "Content-MD5", "LastModified", "last_modified", "Last-Modified", "mtime", "created")


@dataclass(frozen=True)
class Status:
    """What is known of a file elsewhere: its size in bytes, and a mark that another content of it does not have."""

    st_size: int
    mark: str
    sized: bool = True
    """Whether the size is known; some web servers do not say, and it is 0 then."""


def is_url(path: str) -> bool:
    """Whether a path names something elsewhere. "hf:NAME" is a dataset, see `hub`."""
    return re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", path) is not None


def plain(url: str) -> str:
    """A URL without a user, a password or a query, which may be a signature: what a file is called."""
    if url.partition("://")[0].lower() not in _WEB:
        return url
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"


def named(url: str) -> str:
    """A URL fit for a message: `plain`, and a mark where there is a query."""
    web = url.partition("://")[0].lower() in _WEB
    return shown(plain(url) + ("?…" if web and urlsplit(url).query else ""))


def kept(path: str) -> str:
    """A path fit to be written down: a URL of the web in it, as in NAME=URL, is `named`."""
    at = re.search(r"https?://", path, re.IGNORECASE)
    return path if at is None else path[: at.start()] + named(path[at.start() :])


def found(url: str) -> Iterator[tuple[str, Status]]:
    """The files of a URL, each with its status: itself, those below it, or those that it matches as a pattern.

    In order of names, without hidden ones. On the web it is always one file: pages list no files. Raises DataError for
    nothing, MissingExtraError without the package.
    """
    store = _Store(url)
    if store.protocol in _WEB:
        yield url, status(url)
        return
    details = store.listed()
    if not details:
        raise DataError(f"no such file or folder: {named(url)}: check its name, and the account it is looked for in")
    whole = store.path.rstrip("/")
    pattern = not all(name == whole or name.startswith(f"{whole}/") for name in details)
    named_by = PurePosixPath(re.split(r"[*?\[]", whole)[0].rpartition("/")[0] if pattern else whole)
    for name, detail in sorted(details.items()):
        if detail.get("type") != "file" or name.endswith("/"):
            continue
        if any(part.startswith(".") for part in PurePosixPath(name).relative_to(named_by).parts):
            continue
        yield store.url_of(name), _status(detail)


def status(url: str) -> Status:
    """What is known of one file now. Raises DataError where it is not to be had."""
    store = _Store(url)
    detail = store.ask(lambda fs: fs.info(store.path))
    if detail.get("type") != "file":
        raise DataError(f"{named(url)} is a folder: name a file in it")
    return _status(detail)


def opened(url: str, known: Status) -> io.BufferedReader:
    """A file from its beginning to its end, forwards. Raises DataError where it has another length than `known`."""
    return io.BufferedReader(_Stream(url, known), PIECE)


def fetched(url: str, known: Status) -> io.BufferedIOBase:
    """A copy of a file that is gone when it is closed, to read in any order. Raises as `opened`, and ResourceError."""
    with contextlib.ExitStack() as closing:
        try:
            copy = cast(io.BufferedIOBase, closing.enter_context(tempfile.TemporaryFile()))
            with opened(url, known) as stream:
                while piece := stream.read(PIECE):
                    copy.write(piece)
            copy.seek(0)
        except OSError as error:
            where = shown(tempfile.gettempdir())
            raise ResourceError(
                f"cannot keep a copy of {named(url)} in {where} ({error.strerror}): set TMPDIR to another folder"
            ) from error
        closing.pop_all()
    return copy


def statuses(folder: str, names: Sequence[str]) -> list[Status]:
    """What is known of some files in a folder. Raises DataError naming one that is not there."""
    store = _Store(folder)
    if store.protocol in _WEB:
        return [status(f"{folder}/{name}") for name in names]
    details = store.ask(lambda fs: fs.find(store.path, detail=True))
    path = store.path.rstrip("/")
    if missing := next((name for name in names if f"{path}/{name}" not in details), None):
        raise DataError(f"no such file: {named(folder)}/{missing}: upload the whole folder")
    return [_status(details[f"{path}/{name}"]) for name in names]


def check_unchanged(url: str, known: Status) -> None:
    """Raise DataError where a file is another one than it was."""
    now = status(url)
    if now != known:
        raise DataError(
            f"{named(url)} was replaced while it was in use, from {known.st_size} bytes to {now.st_size} "
            f"(mark {shown(known.mark)}, now {shown(now.mark)}): wait until it is complete, or give a copy"
        )


def read(url: str, start: int, count: int) -> bytes:
    """`count` bytes from `start` on, and no others. Raises DataError where there are not so many."""
    store = _Store(url)
    data: bytes = store.ask(
        lambda fs: fs.cat_file(store.path, start=start, end=start + count)
    )  # others differ in order
    if len(data) > count:
        raise DataError(f"{named(url)}: its server gives whole files, not parts of them: name a downloaded copy")
    if len(data) < count:
        raise DataError(f"{named(url)} gave {len(data)} of {count} bytes from {start} on: it is not what was written")
    return data


def whole(url: str) -> bytes:
    """All bytes of a file. Raises DataError where it is not to be had."""
    with opened(url, status(url)) as stream:
        return stream.read()


def sha256_at(url: str, known: Status) -> str:
    """The SHA-256 of a file, in hex, after reading all of it."""
    with opened(url, known) as stream:
        digest = hashlib.sha256()
        while piece := stream.read(PIECE):
            digest.update(piece)
    check_unchanged(url, known)
    return digest.hexdigest()


def may_be_folder(url: str) -> bool:
    """Whether a URL may name a folder, and no pattern; one of the web does so with a slash at its end."""
    return not set(url) & set("*?[") and (url.endswith("/") or url.partition("://")[0].lower() not in _WEB)


def there(url: str) -> bool:
    """Whether there is a file of that name."""
    store = _Store(url)

    def look(fs: Any) -> bool:
        try:
            return fs.info(store.path).get("type") == "file"  # isfile takes any error for an answer, and may fetch it
        except FileNotFoundError as error:
            if store.protocol in _WEB and _passing(error):
                raise
            return False

    return store.ask(look)


class _Store:
    """The file system of a URL, as fsspec has it for this process."""

    def __init__(self, url: str) -> None:
        """Raises DataError for one that is not known, MissingExtraError without its package."""
        self.url, scheme = url, url.partition("://")[0]
        self.protocol = scheme.lower()
        if self.protocol not in _KNOWN:
            raise DataError(f"{shown(url)}: no files are read by {scheme}://: it must be s3, gs, az, https or http")
        fsspec = _library(self.protocol, named(url))
        options: dict[str, Any] = {"client_kwargs": {"timeout": _patience()}} if self.protocol in _WEB else {}
        self._fs: Any = self.ask(lambda _: fsspec.filesystem(self.protocol, use_listings_cache=False, **options))
        self.path: str = self._fs._strip_protocol(url)

    def ask(self, question: Callable[[Any], Any], tries: int = _TRIES) -> Any:
        """The answer of the file system. Raises DataError that names the URL and the way out.

        A web server is asked up to `tries` times.
        """
        tried = 1
        while True:
            try:
                return question(getattr(self, "_fs", None))
            except (GeneratorExit, BytelmError):
                raise
            except Exception as error:  # the packages raise what they run into: of networks, accounts, formats
                if self.protocol not in _WEB or tried >= tries or not _passing(error):
                    raise failed(self.url, error) from error
            time.sleep(_WAIT * 2 ** (tried - 1))
            tried += 1

    def listed(self) -> dict[str, dict[str, Any]]:
        """The files of the path, by name, with details."""
        path = self.path.rstrip("/")
        magic = set(path) & set("*?[")
        if magic and not self.ask(lambda fs: fs.exists(path)):
            return self.ask(lambda fs: fs.glob(path, detail=True))
        return self.ask(lambda fs: fs.find(path, detail=True))

    def url_of(self, name: str) -> str:
        """The URL of a name in a listing."""
        return f"{self.protocol}://{name.lstrip('/')}"

    def open(self) -> Any:
        """The file, to be read forwards."""
        # A web server may have no ranges: its file comes as one stream.
        size = 0 if self.protocol in _WEB else _READ_AHEAD
        return self.ask(lambda fs: fs.open(self.path, "rb", block_size=size))


class _Stream(io.RawIOBase):
    """A file that is read forwards, and whose bytes are counted: a connection may end before they are all there."""

    def __init__(self, url: str, known: Status) -> None:
        self._store, self._known, self._count = _Store(url), known, 0
        self.size = known.st_size
        self._file = self._store.open()

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any, /) -> int:
        data: bytes = self._store.ask(lambda _: self._file.read(len(buffer)), tries=1)  # what came is gone
        self._count += len(data)
        size = self._known.st_size
        if self._known.sized and (self._count > size or (not data and self._count < size)):
            raise DataError(
                f"{named(self._store.url)} gave {self._count} bytes and not its {size}: wait until it is complete, or "
                "give a copy"
            )
        buffer[: len(data)] = data
        return len(data)

    def close(self) -> None:
        if not self.closed:
            self._file.close()
        super().close()


def failed(url: str, error: Exception) -> DataError:
    """What an error of a store comes to: the URL, the reason, and the way out."""
    name, protocol = named(url), url.partition("://")[0].lower()
    error = _reason(error) if protocol in _WEB else error
    code = getattr(error, "status", None)
    if isinstance(error, FileNotFoundError) or code == 404:
        return DataError(f"no such file or folder: {name}: check its name, and the account it is looked for in")
    if code is not None:  # of a web server; the text of the error has the whole URL
        reason = f"{code} {getattr(error, 'message', '')}".strip()
    else:
        reason = " ".join(str(error).replace(url, name).split())[:200] or type(error).__name__
    way = f"check the network and {_ACCESS[protocol]}" if protocol in _ACCESS else "check the network and the address"
    return DataError(f"{name} cannot be read ({shown(reason)}): {way}")


def _reason(error: Exception) -> Exception:
    """What kept a web server from answering: fsspec takes all of it for a file that is not there."""
    cause = error.__cause__
    return cause if isinstance(error, FileNotFoundError) and isinstance(cause, Exception) else error


def _passing(error: Exception) -> bool:
    """Whether an error of a web server may be gone when it is asked again."""
    import aiohttp

    error = _reason(error)
    code = getattr(error, "status", None)
    return code in _PASSING if code is not None else isinstance(error, TimeoutError | aiohttp.ClientError)


def _patience() -> Any:
    """How long is waited for a web server: not, as aiohttp has it, 5 minutes for a whole file, however large."""
    import aiohttp

    return aiohttp.ClientTimeout(total=None, sock_connect=_SILENCE / 2, sock_read=_SILENCE)


def _status(detail: dict[str, Any]) -> Status:
    mark = next((detail[key] for key in _MARKS if detail.get(key)), "")
    mark = str(mark.timestamp() if isinstance(mark, datetime) else mark)
    size = detail.get("size")
    return Status(int(size or 0), mark.removeprefix("W/").strip('"'), size is not None)


def _library(protocol: str, url: str) -> Any:
    package = {"s3": "s3fs", "gs": "gcsfs", "az": "adlfs"}.get(protocol, "aiohttp" if protocol in _WEB else "fsspec")
    if missing := next((name for name in ("fsspec", package) if find_spec(name) is None), None):
        raise MissingExtraError(missing, "cloud", f"reading {url} ({protocol}://)")
    import fsspec

    return fsspec
