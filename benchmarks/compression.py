"""Lossless compression beside gzip, bzip2, xz, zstd, brotli, PPMd and zpaq: size, time and memory, in one table.

    python benchmarks/compression.py FILE... --run runs/demo --out compression.json
    python benchmarks/compression.py more/ --run runs/other --name other --out compression.json    adds to it
    python benchmarks/compression.py --out compression.json                                        prints it again

The files, those in folders too, are joined in the order of their names, and the first `--bytes` of them are compressed
and restored by each method in a process of its own with one thread; what comes back must be equal. A row is written to
`--out` as soon as its size is known, and again when the bytes came back, which is done last and takes longest: the same
command goes on after an interruption, and measures again what was of other bytes or another checkpoint. Peers are the
Python packages brotli, zpaq and zstandard and the program 7z, whose PPMd it is; what is missing is named and left out.
There are three classes of rows:

nothing   has read nothing before
trained   the network was trained on the run's training split; the memory begins empty, peers have no such row
read      has read the training split of the run: the bytes that `bytelm prime` reads (see compressors.py)

A network counts as one that has read the training split: in the lines after the table both other classes are set
beside the best peer, whatever it has read. Less than SURE apart is no difference: one file and one run have no
interval.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from typing import Any

from compressors import METHODS, PRIMED, Ours, packed_file
from papers import table

from bytelm.checkpoint.store import checkpoints
from bytelm.data.corpora import open_corpus
from bytelm.data.files import write_whole
from bytelm.errors import BytelmError, DataError
from bytelm.online.saved import unread

CLASSES = ("nothing", "trained", "read")
SURE = 0.01  # of the larger
WEIGHTS, MEMORY = "model.safetensors", "memory.bin"  # in a checkpoint, in a run
HEAD = [
    "files",
    "has read",
    "method",
    "bytes",
    "bits/byte",
    "compress, s",
    "decompress, s",
    "MiB",
    "both sides need, MB",
]

Row = dict[str, Any]
Ask = Callable[[str, str, Path, Path], dict[str, float]]


def class_of(name: str) -> str:
    """What a method has read before, as a member of CLASSES."""
    if name.endswith(PRIMED):
        return "read"
    method = METHODS[name]
    return "trained" if isinstance(method, Ours) and method.network else "nothing"


def joined(paths: Sequence[Path], most: int) -> bytes:
    """The first bytes of files, and of those in folders by name. Raises OSError, and DataError if there are none."""
    parts: list[bytes] = []
    for path in paths:
        for file in sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]:
            if (left := most - sum(map(len, parts))) > 0:
                with file.open("rb") as opened:
                    parts.append(opened.read(left))
    if not any(parts):
        raise DataError(f"{', '.join(map(str, paths))}: no bytes to compress: name files that have some")
    return b"".join(parts)


def training_split(run: Path) -> bytes:
    """The bytes that `bytelm prime` reads, in its order. Raises BytelmError."""
    return b"".join(piece.tobytes() for piece in unread(open_corpus(run / "data"), 0))


def hashed(data: bytes) -> str:
    return sha256(data).hexdigest()[:16]


def ask(direction: str, name: str, folder: Path, run: Path) -> dict[str, float]:
    """Have `compressors.py` work in a process of its own. Raises BytelmError with its last line."""
    program = Path(__file__).with_name("compressors.py")
    words = [sys.executable, str(program), direction, name, str(folder), str(run)]
    done = subprocess.run(words, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}, check=False)
    if done.returncode:
        reason = (done.stderr.strip() or f"exit code {done.returncode}").splitlines()[-1]
        raise BytelmError(f"{name}: {direction} failed: {reason}")
    return json.loads(done.stdout)


class Job:
    """Some bytes, a run, and what each method makes of them."""

    def __init__(self, name: str, data: bytes, run: Path) -> None:
        """Raises BytelmError for a run without data."""
        self.name, self.data, self.run = name, data, run
        self.before = training_split(run)
        self.checkpoint = next(reversed(checkpoints(run)), None)
        self.marks = {"nothing": hashed(data)}
        self.marks["read"] = f"{self.marks['nothing']} {hashed(self.before)}"
        manifest = (self.checkpoint / "MANIFEST.json").read_bytes() if self.checkpoint else b""
        self.marks["trained"] = f"{self.marks['read']} {hashed(manifest)}"

    def mark(self, name: str) -> str:
        """What a figure depends on: the bytes, and of what was read before."""
        method = METHODS[name]
        mark = self.marks["trained" if isinstance(method, Ours) and method.network else class_of(name)]
        primed = isinstance(method, Ours) and name.endswith(PRIMED)
        return f"{mark} {(self.run / MEMORY).stat().st_size}" if primed and (self.run / MEMORY).exists() else mark

    def missing(self, name: str) -> str | None:
        """What to do before a method can be measured."""
        method = METHODS[name]
        if isinstance(method, Ours) and method.network and self.checkpoint is None:
            return f"{self.run} has no checkpoint: bytelm train ... --run {self.run}"
        if name.endswith(PRIMED) and isinstance(method, Ours):
            return None if (self.run / MEMORY).exists() else f"bytelm prime {self.run}"
        if not isinstance(method, Ours) and name.endswith(PRIMED) and len(self.before + self.data) > method.reach:
            return f"it looks back {method.reach:,} bytes, and the training split has {len(self.before):,}"
        return method.missing()

    def needs(self, name: str) -> int:
        """Bytes that whoever decompresses must have besides: weights, and what was read."""
        method, weights = METHODS[name], 0
        if isinstance(method, Ours) and method.network and self.checkpoint is not None:
            weights = (self.checkpoint / WEIGHTS).stat().st_size
        return weights + (len(self.before) if name.endswith(PRIMED) else 0)

    def compressed(self, name: str, folder: Path, ask: Ask) -> Row:
        """The row of a method as far as compressing tells it. Raises BytelmError where it fails."""
        found = ask("compress", name, folder, self.run)
        return {
            "files": self.name, "class": class_of(name), "method": name, "ours": isinstance(METHODS[name], Ours),
            "from": len(self.data), "bytes": found["bytes"], "bits_per_byte": 8 * found["bytes"] / len(self.data),
            "compress_seconds": found["seconds"], "compress_wall": found["wall"], "peak_bytes": found["peak_bytes"],
            "needs_bytes": self.needs(name), "read_bytes": len(self.before) if name.endswith(PRIMED) else 0,
            "mark": self.mark(name), "restored": False, "loss_bits": found.get("loss_bits"),
        }  # fmt: skip

    def restored(self, row: Row, folder: Path, ask: Ask) -> Row:
        """A row with what restoring took. Raises BytelmError where it fails or other bytes come back."""
        back, packed = ask("decompress", row["method"], folder, self.run), packed_file(row["method"], folder)
        if packed.with_suffix(".restored").read_bytes() != self.data:
            raise BytelmError(f"{row['method']}: other bytes came back than were compressed")
        for path in (packed, packed.with_suffix(".restored")):
            path.unlink()
        took = {"decompress_seconds": back["seconds"], "decompress_wall": back["wall"]}
        return row | took | {"peak_bytes": max(row["peak_bytes"], back["peak_bytes"]), "restored": True}

    def fill(self, folder: Path) -> None:
        """Write the bytes, and what is read before them, where processes find them."""
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(folder / "data", self.data)
        write_whole(folder / "before", self.before)


class Table:
    """Rows by files and method, in a file that always has all of them."""

    def __init__(self, out: Path | None) -> None:
        self.out, self.failed = out, list[str]()
        found = json.loads(out.read_bytes())["rows"] if out is not None and out.exists() else []
        self.rows: dict[tuple[str, str], Row] = {(row["files"], row["method"]): row for row in found}

    def put(self, row: Row) -> None:
        self.rows[row["files"], row["method"]] = row
        self.write()

    def write(self) -> None:
        if self.out is not None:
            write_whole(self.out, json.dumps({"rows": list(self.rows.values())}, indent=1).encode() + b"\n")

    def measure(self, job: Job, folder: Path, ask: Ask) -> None:
        """Measure all that is not measured yet: first what each method compresses to, then what comes back."""
        job.fill(folder)
        for name in METHODS:
            row = self.rows.get((job.name, name))
            if row and row["mark"] == job.mark(name) and (row["restored"] or packed_file(name, folder).exists()):
                continue
            if self.rows.pop((job.name, name), None):
                self.write()  # without what is no longer so
            if how := job.missing(name):
                print(f"{job.name}: {name} is left out: {how}", file=sys.stderr)
                continue
            with self.noting(job.name):
                self.put(row := job.compressed(name, folder, ask))
                print(f"{job.name}: {name}: {row['bits_per_byte']:.3f} bits/byte", file=sys.stderr)
        for row in [row for row in self.rows.values() if row["files"] == job.name and not row["restored"]]:
            with self.noting(job.name):
                self.put(row := job.restored(row, folder, ask))
                print(f"{job.name}: {row['method']}: restored in {row['decompress_wall']:.0f} s", file=sys.stderr)
        if all(row["restored"] for row in self.rows.values() if row["files"] == job.name):
            shutil.rmtree(folder)

    @contextmanager
    def noting(self, files: str) -> Iterator[None]:
        """Errors of one method are told, and the next one is measured."""
        try:
            yield
        except BytelmError as error:
            self.failed.append(f"{files}: {error}")
            print(self.failed[-1], file=sys.stderr)


def ordered(rows: Sequence[Row]) -> list[Row]:
    """By files as they were measured, then by class, then as METHODS has them."""
    files, names = list(dict.fromkeys(row["files"] for row in rows)), list(METHODS)
    return sorted(
        rows, key=lambda row: (files.index(row["files"]), CLASSES.index(row["class"]), names.index(row["method"]))
    )


def lines(rows: Sequence[Row]) -> Iterator[list[str]]:
    """The table's lines."""
    for row in ordered(rows):
        took = [f"{row['compress_seconds']:.2f}", f"{row['decompress_seconds']:.2f}" if row["restored"] else "not yet"]
        sizes = [f"{row['bytes']:,}", f"{row['bits_per_byte']:.3f}"]
        rest = [f"{row['peak_bytes'] / (1 << 20):.0f}", f"{row['needs_bytes'] / 1e6:.1f}"]
        yield [row["files"], row["class"], row["method"], *sizes, *took, *rest]


def beside(rows: Sequence[Row]) -> Iterator[str]:
    """Each of ours beside the best peer that may be compared with it, in one line."""
    for row in ordered(rows):
        fair = ("nothing",) if row["class"] == "nothing" else CLASSES  # a peer that may read something need not
        peers = [p for p in rows if p["files"] == row["files"] and p["class"] in fair and not p["ours"]]
        if not row["ours"] or not peers:
            continue
        best = min(peers, key=lambda p: p["bytes"])
        apart = row["bytes"] / best["bytes"] - 1
        word = "not apart from" if abs(apart) < SURE else "below" if apart < 0 else "ABOVE"
        figures = f"{row['bits_per_byte']:.3f}", f"{best['bits_per_byte']:.3f}"
        yield f"{row['files']}: {row['method']}, {figures[0]}: {word} {best['method']}, {figures[1]} ({apart:+.1%})"


def coder(rows: Sequence[Row]) -> Iterator[str]:
    """What coding adds to the log-probabilities of ours, in one line each."""
    for row in ordered(rows):
        if (loss := row.get("loss_bits")) is not None:
            share = f"{loss:+.0f} bits, {loss / 8 / row['bytes']:+.4%}"
            yield f"{row['files']}: {row['method']}: coded, less the sum of log-probabilities: {share}"


def by_files(rows: Sequence[Row]) -> str:
    """Bits per byte: a line for each method, a column for each of the files."""
    files = list(dict.fromkeys(row["files"] for row in rows))
    found: dict[tuple[str, str], dict[str, float]] = {}
    for row in sorted(ordered(rows), key=lambda row: CLASSES.index(row["class"])):
        found.setdefault((row["class"], row["method"]), {})[row["files"]] = row["bits_per_byte"]
    cells = [[*key, *(f"{own[f]:.3f}" if f in own else "–" for f in files)] for key, own in found.items()]
    return table(["has read", "method", *files], cells)


def main(words: Sequence[str] | None = None, ask: Ask = ask) -> int:
    assert __doc__
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", type=Path, nargs="*")
    parser.add_argument("--run", type=Path)
    parser.add_argument("--name", help="of the files, in the table (default: the run's)")
    parser.add_argument("--bytes", type=int, default=1 << 18)
    parser.add_argument("--out", type=Path, help="JSON to go on with, and to write")
    given = parser.parse_args(words)
    if bool(given.files) != bool(given.run):
        parser.error("files and --run go together")
    try:
        found = Table(given.out)
        if given.run:
            job = Job(given.name or given.run.name, joined(given.files, given.bytes), given.run)
            if given.out:
                found.measure(job, given.out.with_suffix(".work") / job.name, ask)
            else:
                with tempfile.TemporaryDirectory() as folder:
                    found.measure(job, Path(folder) / "work", ask)
    except (BytelmError, OSError) as error:
        print(error, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    rows = list(found.rows.values())
    print(table(HEAD, list(lines(rows))))
    if len({row["files"] for row in rows}) > 1:
        print(f"\n{by_files(rows)}")
    print("", *beside(rows), "", *coder(rows), sep="\n")
    return 1 if found.failed else 0


if __name__ == "__main__":
    sys.exit(main())
