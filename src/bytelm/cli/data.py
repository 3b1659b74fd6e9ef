"""The data commands: data scan, data pack, data curriculum, data verify."""

from __future__ import annotations

import contextlib
import dataclasses
import shlex
import subprocess
import sys
from collections.abc import Generator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import App, Parameter

from bytelm.cli.common import Json, Quiet, Sets, Strict, paths_of, print_json, print_table
from bytelm.errors import BytelmError, ConfigError, DataError, UsageError
from bytelm.units import show_bytes

if TYPE_CHECKING:
    from bytelm.data.corpus import Corpus, Split
    from bytelm.data.options import DataConfig
    from bytelm.data.scan import Scan

app = App(name="data", help="Inspect files before training, pack them, verify packed corpora.")
SPLITS: tuple[Split, ...] = ("train", "valid", "test")
SPECS = {"image": "image:64", "audio": "audio:16k", "dna": "dna"}  # what is suggested for each modality


@app.command
def scan(*paths: str, set: Sets = None, strict: Strict = False, json: Json = False) -> int:
    """Report the contents of folders, what would be skipped and the split sizes, without opening any file.

    Example: bytelm data scan ~/notes

    Parameters
    ----------
    paths
        As `bytelm train` takes them.
    """
    from bytelm.data.scan import scan as look

    names = given(paths)
    options = options_of(set, strict)
    found = look(names)
    if not found.bytes and not found.streams:
        raise nothing(names, found)
    spec = SPECS.get(found.modality() or "")
    words = ["bytelm", "train", *names, *(["--as", spec] if spec else [])]
    command = shlex.join(words)
    if json:
        print_json(mapping(found, options, command))
    else:
        tell(found, options, command)
    if strict and found.skipped:
        count = sum(count for count, _ in found.skipped.values())
        why, (_, examples) = next(iter(found.skipped.items()))
        raise DataError(
            f"{count} would be skipped (the first {examples[0]}: {why}), and --strict allows none: remove them, "
            "or leave --strict out"
        )
    return 0


@app.command
def pack(
    *paths: str,
    out: Annotated[Path, Parameter(name=("--out", "-o"), help="The folder to write; an existing pack is replaced.")],
    modality: Annotated[str | None, Parameter(name="--as", help="Modality of the files, as for `train --as`.")] = None,
    set: Sets = None,
    strict: Strict = False,
    workers: Annotated[int, Parameter(help="Processes that pack here at the same time.")] = 1,
    join: Annotated[
        bool, Parameter(negative="", help="Take part in packing the same files into the same folder.")
    ] = False,
    quiet: Quiet = False,
    json: Json = False,
) -> int:
    """Pack files into one corpus, which `bytelm train` reads directly, any number of times.

    With `--join` any number of processes, here or on machines that share the folder, each pack the next part.

    The first one begins, and where all is done there is nothing to do. Their number does not change the corpus.

    Example: bytelm data pack ~/notes -o packed --set data.valid=0.1

    Parameters
    ----------
    paths
        As `bytelm train` takes them.
    """
    from bytelm.data.convert import modality_called
    from bytelm.training.journal import Journal
    from bytelm.training.stages.base import run_stage
    from bytelm.training.stages.packing import PackingStage
    from bytelm.training.stop import StopRequest

    names = given(paths)
    options = options_of(set, strict)
    chosen = None if modality is None else modality_called(modality)
    if out.is_dir() and any(out.iterdir()) and not any((*out.glob("shard-*.bin"), *out.glob("parts-*"))):
        raise UsageError(f"{out} is not empty and not a packed corpus: name a new folder")
    if workers < 1:
        raise UsageError(f"--workers {workers}: must be 1 or more")
    if workers > 1 and "-" in names:
        raise UsageError("standard input cannot be packed by several processes: leave --workers out")

    words = [*names, "--out", str(out), *(["--as", modality] if modality else []), *(["--strict"] if strict else [])]
    words += [word for setting in set or [] for word in ("--set", setting)]
    with StopRequest():
        journal = Journal(None, quiet or json or not sys.stderr.isatty())
        stage = PackingStage(out, names, options, chosen, anew=True, join=join)
        if workers > 1:
            stage.others = lambda: helping(words, workers - 1)
        corpus = run_stage(stage, journal)
    if json:
        print_json({"pack": str(out), **packed_mapping(corpus)})
    elif not quiet:
        tell_packed(corpus)
        print(f"next:    {shlex.join(['bytelm', 'train', str(out)])}")
    return 0


@contextlib.contextmanager
def helping(words: Sequence[str], count: int) -> Generator[None]:
    """Processes that join a packing, stopped in order at the end of a `with` block if they are not done."""
    command = [sys.executable, "-m", "bytelm", "data", "pack", *words, "--join", "--quiet"]
    others = [subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) for _ in range(count)]
    try:
        yield
    except BaseException:
        for other in others:
            other.terminate()
        raise
    finally:
        for other in others:
            other.wait()


@app.command
def curriculum(
    *,
    out: Annotated[Path, Parameter(name=("--out", "-o"), help="The file to write, NAME.jsonl; it is replaced.")],
    bytes: Annotated[int, Parameter(help="Size of the text in bytes.")] = 1 << 20,
    seed: Annotated[int, Parameter(help="Seed of the tasks.")] = 0,
    words: Annotated[
        list[str] | None,
        Parameter(negative="", help="Texts whose words are used, as `train` takes them. Default: random letters."),
    ] = None,
    quiet: Quiet = False,
    json: Json = False,
) -> int:
    """Write character tasks (spell, reverse, insert, ...), to be mixed into training.

    `bytelm robust --suite characters` then asks of other words: one in eight of up to 8 letters, and all longer ones.

    Example: bytelm data curriculum -o tasks.jsonl --words ~/notes
    """
    from bytelm.data.curriculum import random_words, training_words, write

    known = training_words(paths_of(words)) if words else random_words(seed)
    documents, size = write(out, known, bytes, seed)
    if json:
        print_json({"curriculum": str(out), "documents": documents, "bytes": size, "words": len(known)})
    elif not quiet:
        print(f"{show_bytes(size)} in {documents:,} documents, on {len(known):,} words")
        print(f"next:    bytelm train text=... tasks={shlex.quote(str(out))} --mix text=0.95,tasks=0.05")
    return 0


@app.command
def verify(folder: Path, /) -> int:
    """Verify the checksums of a packed corpus, or of a run's.

    Example: bytelm data verify runs/notes

    Parameters
    ----------
    folder
        A folder written by `bytelm data pack`, or a run.
    """
    from bytelm.data.corpora import folders_in, open_corpus
    from bytelm.data.packed import faults

    where, parts = folders_in(folder)
    found = False
    for fault in (fault for part in parts for fault in faults(part)):
        found = True
        print(f"bytelm: {DataError.code}: {fault}", file=sys.stderr)
    if found:
        return DataError.exit_code
    corpus = open_corpus(where)
    print(f"OK: {corpus.total:,} bytes in {corpus.count():,} documents")
    return 0


def packed_mapping(corpus: Corpus) -> dict[str, Any]:
    """A newly packed corpus as plain JSON."""
    index = corpus.index
    report = index.source
    return {
        "bytes": corpus.total,
        "documents": corpus.count(),
        "splits": {split: corpus.bytes(split) for split in SPLITS},
        "files": report.files,
        "empty": report.empty,
        "skipped": report.reasons,
        "malformed": report.bad,
        "duplicates": report.duplicates,
        "converted": report.converted,
        "contaminated_bytes": index.repeated,
        "checked_bytes": index.looked,
    }


def tell_packed(corpus: Corpus) -> None:
    """Print a newly packed corpus."""
    index = corpus.index
    told = ", ".join([f"{index.source.files} files", *index.source.losses()])
    print(f"{told}: {show_bytes(corpus.total)} in {corpus.count():,} documents")
    print("split:   " + ", ".join(f"{show_bytes(corpus.bytes(split))} {split}" for split in SPLITS))
    if warning := index.warning():
        print(f"note:    {warning}")


def given(paths: Sequence[str]) -> list[str]:
    """The paths given to a command that reads files. Raises UsageError for none, and for packed corpora."""
    from bytelm.data.packed import is_pack

    names = paths_of(paths)
    if not names:
        raise UsageError("no paths: name files or folders, as in `bytelm data scan ~/notes`")
    for name in names:
        if is_pack(name):
            raise UsageError(f"{name} is already packed: `bytelm train {name}`, or `bytelm data verify {name}`")
    return names


def options_of(sets: Sequence[str] | None, strict: bool) -> DataConfig:
    """The table [data] of --set and --strict. Raises ConfigError."""
    from bytelm.config import assignments, build
    from bytelm.data.options import DataConfig

    tables = assignments(sets or [], "--set")
    if other := next((key for key in tables if key != "data"), None):
        raise ConfigError(f"--set {other}: only data.… can be set here, as in --set data.valid=0.1")
    return build(DataConfig, {**tables.get("data", {}), **({"strict": True} if strict else {})}, "--set data")


def nothing(names: Sequence[str], found: Scan) -> BytelmError:
    """The error for paths without any bytes, as in `bytelm train`."""
    from bytelm.data.report import SourceReport

    report = SourceReport(files=found.files)
    for why, (count, examples) in found.skipped.items():
        for i in range(count):
            report.skip(examples[min(i, len(examples) - 1)], why)
    return report.nothing(names)


def shares(found: Scan, options: DataConfig) -> dict[str, int]:
    """The approximate bytes of each split, before documents are assigned."""
    valid, test = (round(found.bytes * share) for share in (options.valid, options.test))
    return {"train": found.bytes - valid - test, "valid": valid, "test": test}


def mapping(found: Scan, options: DataConfig, command: str) -> dict[str, Any]:
    """A scan as plain JSON."""
    skipped = [{"reason": why, "count": count, "first": names} for why, (count, names) in found.skipped.items()]
    return {
        "files": found.files,
        "bytes": found.bytes,
        "documents": found.documents,
        "kinds": {suffix: dataclasses.asdict(kind) for suffix, kind in found.kinds.items()},
        "streams": found.streams,
        "skipped": skipped,
        "raw": found.raw(),
        "split": shares(found, options),
        "next": command,
    }


def tell(found: Scan, options: DataConfig, command: str) -> None:
    """Print a scan."""
    kinds = sorted(found.kinds.items(), key=lambda item: -item[1].bytes)
    rows = [
        (suffix or "no suffix", f"{kind.files:,}", show_bytes(kind.bytes), kind.told_documents())
        for suffix, kind in kinds
    ]
    if len(rows) > 1:
        documents = "" if found.documents is None else f"{found.documents:,}"
        rows.append(("all", f"{found.files:,}", show_bytes(found.bytes), documents))
    if rows:
        print_table(["kind", "files", "on disk", "documents"], rows)
    for name in found.streams:
        print(f"{name}: size unknown until it is read")
    for why, (count, names) in found.skipped.items():
        more = f" and {count - len(names):,} more" if count > len(names) else ""
        print(f"skipped: {count:,} ({why}): {', '.join(names)}{more}")
    if raw := found.raw():
        files = ", ".join(f"{count:,} {suffix}" for suffix, count in raw.items())
        print(f"note:    compressed or encoded, read as raw bytes: {files}; unpack them, or leave them out")
    if found.bytes:
        print("split:   " + ", ".join(f"{show_bytes(size)} {split}" for split, size in shares(found, options).items()))
    print(f"next:    {command}")
