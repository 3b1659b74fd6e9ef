"""Packed corpora as sources: found among paths, linked into runs, and verified."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from bytelm.data import places
from bytelm.data.boundaries import Boundaries
from bytelm.data.corpus import INDEX, TABLE, Corpus, Index
from bytelm.data.files import linked, sha256_of, shown, sync_folder
from bytelm.data.options import DataConfig
from bytelm.data.shards import shard_path
from bytelm.errors import ConfigError, DataError, ResourceError

_TAKEN = "packed:"  # how the fingerprint of sources begins that were a packed corpus


def is_pack(path: str | Path) -> bool:
    """Whether a folder is a packed corpus, here or elsewhere by its URL."""
    if places.is_url(url := str(path)):
        return places.may_be_folder(url) and all(places.there(f"{url.rstrip('/')}/{name}") for name in (INDEX, TABLE))
    return (Path(path) / INDEX).is_file() and (Path(path) / TABLE).is_file()


def pack_of(paths: Sequence[str | Path], run: Path, source: str = "") -> Path | str | None:
    """The packed corpus that `paths` name: the only one of them, or what `run` took over from it when it is gone.

    In a mixture `paths` are those of one `source`. Raises DataError for a packed corpus among other paths, whose shards
    would be read as files.
    """
    packs = [path for path in paths if is_pack(path)]
    if packs and len(paths) > 1:
        raise DataError(
            f"{shown(str(packs[0]))} is a packed corpus and cannot be combined with other paths: "
            + ("make it another source" if source else "leave them out")
        )
    if packs:
        return str(packs[0]) if places.is_url(str(packs[0])) else Path(packs[0])
    own = run / "data" / source
    if len(paths) == 1 and not os.path.lexists(paths[0]) and is_pack(own):
        taken = (Index.load(own).source_fingerprint or "").startswith(_TAKEN)
        return own if taken else None
    return None


def fingerprint(corpus: Corpus) -> str:
    """What the index of a run has as the fingerprint of its sources where they were this corpus."""
    taken = corpus.source_fingerprint
    return taken if taken and taken.startswith(_TAKEN) else _TAKEN + corpus.fingerprint


def link_corpus(pack: Path | str, directory: Path) -> Corpus:
    """Have the corpus in `pack` in `directory` too, by links to its shards, or copies where there can be no links.

    It stays there when the pack is removed or replaced. Raises DataError for a damaged one, ResourceError where
    `directory` cannot be written. Shards that lie elsewhere stay there.
    """
    corpus = Corpus.open(pack)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        for number in range(0 if corpus.index.url else len(corpus.index.shards)):
            linked(shard_path(Path(pack), number), shard_path(directory, number))
        linked(corpus.table, directory / TABLE)
        sync_folder(directory)
        replace(corpus.index, source_fingerprint=fingerprint(corpus)).write(directory)
    except OSError as error:
        where = shown(str(directory))
        raise ResourceError(f"cannot link the data into {where} ({error.strerror}): free some space") from error
    return Corpus.open(directory)


def check_options(corpus: Corpus, options: DataConfig, modality: Mapping[str, Any] | None) -> None:
    """Raise ConfigError where the settings conflict with those of a packed corpus."""
    index = corpus.index
    was = {"data": index.options and asdict(index.options), "modality": index.modality}
    asked = {"data": asdict(options), "modality": modality}
    for table, packed in was.items():
        if packed is None and table == "data":
            continue  # packed before options were kept
        old, new = packed or {"name": "none"}, asked[table] or {"name": "none"}
        for key in {**old, **new}:
            if old.get(key) != new.get(key):
                raise ConfigError(
                    f"{index.url or shown(str(corpus.directory))} was packed with {table}.{key} = {old.get(key)}, not "
                    f"{new.get(key)}: leave that out, or pack again"
                )


def faults(directory: Path) -> Iterator[str]:
    """What is wrong with the packed corpus in a folder or a run, a line each, after reading all of it."""
    where = directory if (directory / INDEX).exists() else directory / "data"
    try:
        index = Index.load(where)
    except DataError as error:
        yield str(error)
        return
    here = [] if index.url else index.shards
    shards = [(shard_path(where, number), shard.sha256) for number, shard in enumerate(here)]
    broken = False
    for path, wanted in [(where / TABLE, index.documents), *shards]:
        try:
            fault = "" if sha256_of(path) == wanted else "is not what was written (its SHA-256 differs)"
        except OSError as error:
            fault = f"cannot be read ({error.strerror})"
        if fault:
            broken = True
            yield f"{shown(str(path))} {fault}: pack the data again"
    try:
        if not broken:
            corpus = Corpus.open(where)
            if index.url:
                corpus.verify()
    except DataError as error:  # parts that do not fit each other
        yield str(error)
    for path in sorted(where.glob("boundaries-*.bits")):
        try:
            Boundaries.of(path)[0].verify()
        except DataError as error:
            yield str(error)
