"""Gather what `gpu.py` needs on a machine that has torch, and neither a network nor the rest, into build/gpu.

    python benchmarks/gpu_bundle.py                       data from ../shared/data
    python benchmarks/gpu_bundle.py --data DATA --into build/gpu

build/gpu/libs   pure Python packages as installed here; missing ones are reported and skipped
build/gpu/data   corpora of DATA, packed; those that are missing, or do not fit, are reported and skipped

Then, there: PYTHONPATH=build/gpu/libs:src python benchmarks/gpu.py --piece 1
"""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Iterable, Sequence
from importlib import metadata
from pathlib import Path

LIMIT = 55_000_000  # bytes of all
DATA_LIMIT = 40_000_000  # bytes of corpora
PACKAGES = ("cyclopts", "docstring-parser", "rich-rst", "beartype", "MEGABYTE-pytorch")
# In order of importance; held-out files are with their training files.
CORPORA = (
    "books/train.txt.xz",
    "books/test.txt.xz",
    "code/train.txt.xz",
    "code/test.txt.xz",
    "latex/train.tex.xz",
    "latex/test.tex.xz",
    "multilingual/ntrex.train.txt.xz",
    "multilingual/ntrex.test.txt.xz",
    "stories/train.txt.xz",
    "stories/test.txt.xz",
)


class BundleError(Exception):
    """A package that would not run on another machine."""


def files_of(package: str) -> list[tuple[Path, Path]]:
    """The files of a package with their relative paths; empty if not installed. Raises BundleError if compiled."""
    try:
        found = metadata.files(package) or []
    except metadata.PackageNotFoundError:
        return []
    wanted = [(Path(str(file.locate())), Path(*file.parts)) for file in found if ".." not in file.parts]
    if compiled := [path for _, path in wanted if path.suffix in (".so", ".pyd", ".dylib")]:
        raise BundleError(f"{package} is compiled ({compiled[0]}): it has to be installed there")
    return [(source, path) for source, path in wanted if "__pycache__" not in path.parts and source.is_file()]


def gather_packages(packages: Iterable[str], into: Path) -> int:
    """Copy packages; returns their bytes."""
    size = 0
    for package in packages:
        files = files_of(package)
        for source, path in files:
            (into / path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, into / path)
        own = sum(source.stat().st_size for source, _ in files)
        print(f"{package}: {own / 1e6:.1f} MB" if files else f"{package}: left out, it is not installed here")
        size += own
    return size


def gather_data(corpora: Iterable[str], data: Path, into: Path, limit: int) -> int:
    """Copy corpora while they fit; returns their bytes."""
    size = 0
    for name in corpora:
        source = data / name
        own = source.stat().st_size if source.exists() else None
        if own is None or size + own > limit:
            print(f"{name}: left out, {'it is not there' if own is None else f'{own / 1e6:.1f} MB do not fit'}")
            continue
        (into / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, into / name)
        print(f"{name}: {own / 1e6:.1f} MB")
        size += own
    return size


def main(arguments: Sequence[str] | None = None) -> int:
    assert __doc__
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=Path("../shared/data"), help="default: %(default)s")
    parser.add_argument("--into", type=Path, default=Path("build/gpu"), help="default: %(default)s")
    options = parser.parse_args(arguments)
    for part in ("libs", "data"):
        shutil.rmtree(options.into / part, ignore_errors=True)
    try:
        size = gather_packages(PACKAGES, options.into / "libs")
    except BundleError as error:
        print(f"gpu_bundle.py: {error}", file=sys.stderr)
        return 1
    size += gather_data(CORPORA, options.data, options.into / "data", min(DATA_LIMIT, LIMIT - size))
    print(f"{size / 1e6:.1f} MB of at most {LIMIT / 1e6:.0f} in {options.into}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
