"""A multilingual corpus of one file as a folder LANGUAGE/ARTICLE, which the suite `scripts` of `bytelm robust` reads.

    python benchmarks/articles.py ntrex.test.txt.xz ntrex.index.tsv.xz OUT --split test
    bytelm robust RUN... OUT --suite scripts

The index has a head, with split, name, offset and length among its columns, and a line per article in a language. Its
name is ARTICLE|LANGUAGE, and more after another |; offsets are in bytes of the text. Files may be compressed with xz.
"""

from __future__ import annotations

import argparse
import csv
import lzma
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path


def read(path: Path) -> bytes:
    """A file, decompressed where its name says so."""
    return lzma.decompress(path.read_bytes()) if path.suffix == ".xz" else path.read_bytes()


def indexed(text: bytes, index: str, split: str) -> Iterator[tuple[str, bytes]]:
    """(name, bytes) of each document of a split. Raises ValueError for an index of another text."""
    for row in csv.DictReader(index.splitlines(), delimiter="\t", quoting=csv.QUOTE_NONE):
        if row["split"] != split:
            continue
        begin, size = int(row["offset"]), int(row["length"])
        if begin < 0 or begin + size > len(text):
            raise ValueError(f"{row['name']}: bytes {begin} to {begin + size} of a file of {len(text)}")
        yield row["name"], text[begin : begin + size]


def cut(text: bytes, index: str, split: str, out: Path, most: int | None = None) -> int:
    """Write each article of a split to OUT/LANGUAGE/ARTICLE.txt, the first `most` titles; the number of files.

    Raises ValueError for another index.
    """
    count, titles = 0, dict[str, None]()
    for name, article in indexed(text, index, split):
        title, language, *_ = name.split("|")
        if title not in titles and len(titles) == most:
            continue
        titles[title] = None
        folder, title = (re.sub(r"[^\w.-]", "_", part).lstrip(".") for part in (language, title))
        (out / folder).mkdir(parents=True, exist_ok=True)
        (out / folder / f"{title}.txt").write_bytes(article)
        count += 1
    return count


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", type=Path)
    parser.add_argument("index", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--split", default="test")
    given = parser.parse_args(words)
    count = cut(read(given.text), read(given.index).decode(), given.split, given.out)
    print(f"{count} articles in {given.out}")
    return 0 if count else 1


if __name__ == "__main__":
    sys.exit(main())
