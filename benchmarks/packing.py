"""Packing by one process and by several: seconds, memory, the ratio, and whether the bytes are the same.

    python benchmarks/packing.py                              256 MB, one process and two, three times in turn
    python benchmarks/packing.py --bytes 10e9 --rounds 3      what docs/data.md reports
    python benchmarks/packing.py --workers 1 2 4 --document 4000 --kill

The text is generated: words with the frequencies of a language, in files of 8 MB, one of sixteen of which repeats parts
of another. Runs are interleaved, and what the system has cached is the same for all of them. Where the machine does
other work too, the processor seconds of the busiest process say how the work was shared. With `--kill` one of the last
number of processes is killed in the middle of each run, and another one is started in its place.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np

from bytelm import machine
from bytelm.data.corpus import Corpus

FILE = 8_000_000  # bytes
PACK = """
import resource, sys
from bytelm.data.pack import pack
corpus = pack([sys.argv[1]], sys.argv[2], part_bytes=int(float(sys.argv[3])), join=True)
used = resource.getrusage(resource.RUSAGE_SELF)
print(used.ru_maxrss, used.ru_utime + used.ru_stime)
"""


def words_of(number: int) -> bytes:
    """A file's worth of text."""
    rng = np.random.default_rng(number)
    words = [
        bytes(word) + b" " for word in np.split(np.random.default_rng(0).integers(97, 123, 60000, np.uint8), 12000)
    ]
    words[::40] = [word[:-1] + b"\n" for word in words[::40]]
    chosen = np.minimum(rng.zipf(1.3, FILE // 5), len(words)) - 1
    return b"".join(words[i] for i in chosen.tolist())[:FILE]


def text(folder: Path, document: int, number: int) -> None:
    """Write a file of text, in documents of so many bytes where that is not 0: one for each file."""
    data = words_of(number)
    if number % 16 == 1:
        data = data[: FILE // 2] + words_of(number - 1)[: FILE // 2]
    if document:
        inner = folder / f"{number:05d}"
        inner.mkdir()
        for start in range(0, len(data), document):
            (inner / f"{start:08d}.txt").write_bytes(data[start : start + document])
    else:
        (folder / f"{number:05d}.txt").write_bytes(data)


def generated(folder: Path, total: int, document: int) -> None:
    """So many bytes of text."""
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(partial(text, folder, document), range(-(-total // FILE))))


def packed(source: Path, out: Path, workers: int, part: float, kill: bool) -> tuple[float, float, int]:
    """Seconds that so many processes take, processor seconds of the busiest, and KiB of the largest."""
    command = [sys.executable, "-c", PACK, str(source), str(out), str(part)]
    began = time.perf_counter()
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(workers)]
    if kill:
        while not [*out.glob("parts-*/part-?????")]:
            time.sleep(0.01)
        processes[0].kill()
        processes[0].wait()
        processes[0] = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    found = [process.communicate()[0].split() for process in processes]
    took = time.perf_counter() - began
    if any(process.returncode for process in processes):
        raise SystemExit("a packer failed")
    return took, max(float(used) for _, used in found), max(int(peak) for peak, _ in found)


def main(arguments: Sequence[str] | None = None) -> int:
    assert __doc__
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--bytes", type=float, default=256e6, help="of text (default: %(default)g)")
    parser.add_argument("--document", type=int, default=0, help="bytes of a document (default: a file of 8 MB)")
    parser.add_argument("--part", type=float, default=1 << 28, help="bytes of a part (default: %(default)d)")
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2], help="numbers of processes")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--kill", action="store_true", help="kill one process of the last number")
    parser.add_argument("--folder", type=Path, help="where to work (default: a temporary folder)")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        source, total = Path(name, "source"), int(options.bytes)
        source.mkdir()
        generated(source, total, options.document)
        size = sum(path.stat().st_size for path in source.rglob("*.txt"))
        load = os.getloadavg()[0]
        print(f"{size / 1e9:.2f} GB on {machine.processor()}, {os.cpu_count()} CPUs, load {load:.1f} before")
        seconds: dict[int, list[float]] = {workers: [] for workers in options.workers}
        work: dict[int, list[float]] = {workers: [] for workers in options.workers}
        prints: set[str] = set()
        for _ in range(options.rounds):
            for workers in options.workers:
                out, kill = Path(name, "packed"), options.kill and workers == options.workers[-1]
                took, used, peak = packed(source, out, workers, options.part, kill)
                seconds[workers].append(took)
                work[workers].append(used)
                corpus = Corpus.open(out)
                prints.add(f"{corpus.fingerprint} {corpus.index.repeated}")
                rate = f"{size / took / 1e6:.0f} MB/s, {used:.1f} s of a core, {peak / 1024:.0f} MiB"
                print(f"{workers} {'process' if workers == 1 else 'processes'}: {took:.1f} s, {rate}", flush=True)
                shutil.rmtree(out)
    first = [statistics.median(found[options.workers[0]]) for found in (seconds, work)]
    for workers in options.workers:
        time_of, work_of = (statistics.median(found[workers]) for found in (seconds, work))
        ratios = f"{first[0] / time_of:.2f} times as fast, the busiest works 1/{first[1] / work_of:.2f} of it"
        print(f"{workers}: median {time_of:.1f} s, {work_of:.1f} s of a core at most; {ratios}")
    print("the same bytes" if len(prints) == 1 else f"DIFFERENT: {prints}")
    return int(len(prints) != 1)


if __name__ == "__main__":
    sys.exit(main())
