"""The published models' true shapes on this machine: how soon, in how much memory, how fast, how near the floor.

    python benchmarks/large.py --files DIR                                  BLT-1B in bfloat16 and in int8
    python benchmarks/large.py --files DIR --models blt-1b,blt-8b --json
    python benchmarks/large.py --files DIR --tables mapped,memory --cold
    python benchmarks/large.py --files DIR --convert                        how long conversion takes, in what memory
    python benchmarks/large.py --files DIR --peer transformers              the same files with transformers

DIR keeps the files between runs: `blt-1b-hf` (as published, with random weights, see large_files.py) and `blt-1b-run`,
which `bytelm convert` makes of it; 18 GB for BLT-1B, 42 GB for BLT-8B. Each row is a process of its own, which loads
the run and writes greedily after 256 bytes of English.

load_s         of `bytelm.load`; cold: after the files were dropped from the page cache
rss_gib        memory of its own while it writes (RssAnon); file_gib: pages of files, which the system can take back;
               peak_gib: the most of its own since it began
first_byte_s   from the call of `stream` until the first byte, the prompt included
bytes_per_s    after the first byte; cpu_s_per_byte: processor time of all threads, for where others take their share
floor_share    the time to read the bytes that a step reads (`Decoder.traffic`) at the bandwidth of memory, measured
               after every 16 bytes as in generate.py, over the step's time: the median
patch_bytes    mean length of the patches of all that was read and written

"float32" among the weights is `bytelm.load` without options. transformers runs without a cache, because with one its
logits are wrong: each byte reads all before it again. ratio: our bytes per second in bfloat16 over its own.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import torch
from generate import read_rate
from large_files import LICENCE, write

from bytelm.exchange.convert import convert
from bytelm.lm import load
from bytelm.machine import memory, processor

SIZES = {"blt-1b": "1b", "blt-8b": "7b", "tiny": "tiny"}
WEIGHTS, TABLES = ("bf16", "int8", "float32"), ("mapped", "memory")
GIB = 1 << 30
STATUS = Path("/proc/self/status")  # on Linux; elsewhere memory is not measured
ROUND = 16  # bytes between two measurements of the bandwidth
ROOM = 0.5  # of the memory: larger files are not read into the page cache before a warm row

Row = dict[str, Any]


def prompt_of(length: int) -> bytes:
    return (LICENCE.read_bytes()[1000:] * (1 + length // 4096))[:length]


# --- memory and files -------------------------------------------------------------------------------------------------


def held() -> dict[str, float]:
    """GiB of this process: of its own, and of pages of files."""
    lines = STATUS.read_text().splitlines() if STATUS.exists() else []
    found = {
        name: int(rest.split()[0]) / (1 << 20)
        for name, _, rest in (line.partition(":") for line in lines)
        if rest.endswith(" kB")
    }
    return {key: found[name] for key, name in (("rss_gib", "RssAnon"), ("file_gib", "RssFile")) if name in found}


def highest(most: list[float], now: dict[str, float]) -> float | None:
    """The peak, of which samples may have missed the last moment."""
    return max(most[0], now.get("rss_gib", 0.0)) or None


@contextmanager
def peak() -> Iterator[list[float]]:
    """The most memory of its own in GiB that this process has within, in the list afterwards; empty if unknown."""
    most, over = [0.0], threading.Event()

    def look() -> None:
        while not over.wait(0.02):
            most[0] = max(most[0], held().get("rss_gib", 0.0))

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield most
    finally:
        over.set()
        thread.join()
        most[0] = max(most[0], held().get("rss_gib", 0.0))


def files_in(*folders: Path) -> list[Path]:
    return [path for folder in folders for path in sorted(folder.rglob("*")) if path.is_file()]


def drop(*folders: Path) -> None:
    """Drop files from the page cache."""
    for path in files_in(*folders):
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def warm(*folders: Path) -> None:
    """Read files once, unless they take most of the memory."""
    files = files_in(*folders)
    if sum(path.stat().st_size for path in files) > ROOM * memory().total:
        return
    buffer = bytearray(1 << 22)
    for path in files:
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass


# --- processes of their own -------------------------------------------------------------------------------------------


def ours(run: str, weights: str, tables: str, prompt: int, count: int) -> Row:
    """One row: load and write."""
    options = {} if weights == "float32" else {"weights": weights, "tables": tables}
    text, out = prompt_of(prompt), b""
    times: list[float] = []
    cpu = 0.0
    with peak() as most:
        began = time.perf_counter()
        lm = load(run, **options)
        loaded = time.perf_counter()
        now = held()
        for piece in lm.stream(text, max_bytes=count, temperature=0.0, eos=False):
            times += [time.perf_counter()] * len(piece)
            cpu = cpu or time.process_time()
            out += piece
            now = held()
    cpu = (time.process_time() - cpu) / (len(times) - 1)
    step = (times[-1] - times[0]) / (len(times) - 1)
    patches = len(lm.patches(text + out))
    found = {"load_s": loaded - began, **now, "peak_gib": highest(most, now)}
    found |= {"first_byte_s": times[0] - loaded, "bytes_per_s": 1 / step, "cpu_s_per_byte": cpu}
    found |= {"patch_bytes": (prompt + count) / patches}
    return found | floor(lm, text, text + out)


def floor(lm: Any, text: bytes, data: bytes) -> Row:
    """What a step reads after all of `data`, and its share: the median over rounds of some bytes and a measurement.

    They alternate, as the bandwidth of a machine that others use changes within seconds.
    """
    from bytelm.decoding import open_decoder
    from bytelm.interfaces.decoder import CHUNK
    from bytelm.units import BOS

    decoder = open_decoder(lm.model, rows=1, capacity=1 + len(data))
    ids = torch.tensor([BOS, *data]).numpy()
    for start in range(0, len(ids), CHUNK):  # for the length of its patches
        new = ids[start : start + CHUNK]
        decoder.read(0 * new, new)
    traffic = decoder.traffic(len(ids))
    buffer, shares, rates = torch.ones(GIB // 8), list[float](), list[float]()
    pieces = iter(lm.stream(text, max_bytes=len(data) - len(text), temperature=0.0, eos=False))
    next(pieces)
    for _ in range(max(1, (len(data) - len(text) - 1) // ROUND)):
        began = time.perf_counter()
        count = sum(len(piece) for piece in islice(pieces, ROUND))
        step = (time.perf_counter() - began) / max(1, count)
        rates.append(read_rate(buffer, 1))
        shares.append(traffic / rates[-1] / step)
    found = {"gib_per_byte": traffic / GIB, "bandwidth_gib_s": statistics.median(rates) / GIB}
    found |= {"floor_share": statistics.median(shares)}
    return found | {"state_mib_per_row": decoder.row_bytes / (1 << 20)}


def converted(source: str, run: str) -> Row:
    """How long conversion takes, and in what memory."""
    with peak() as most:
        began = time.perf_counter()
        convert(Path(source), "hf", Path(run), {})
        took = time.perf_counter() - began
    return {"convert_s": took, "convert_peak_gib": most[0] or None}


def copied(source: str, to: str) -> Row:
    """How long a plain copy of the files takes, on the disk in the end."""
    began = time.perf_counter()
    shutil.copytree(source, to)
    for path in files_in(Path(to)):
        with path.open("r+b") as file:
            os.fsync(file.fileno())
    took = time.perf_counter() - began
    shutil.rmtree(to)
    return {"copy_s": took}


def transformers(source: str, dtype: str, prompt: int, count: int) -> Row:
    """The same files with transformers, without a cache."""
    import transformers

    text = prompt_of(prompt)
    ids = torch.tensor([[1, *(byte + 4 for byte in text)]])
    times: list[float] = []
    lengths: list[int] = []
    cpu = 0.0
    with peak() as most:
        began = time.perf_counter()
        model = transformers.BltForCausalLM.from_pretrained(source, dtype=getattr(torch, dtype)).eval()
        times.append(time.perf_counter())
        model.model.patcher.register_forward_hook(lambda module, given, out: lengths.append(int((out[1] > 0).sum())))
        for _ in range(count):
            with torch.inference_mode():
                logits = model(input_ids=ids, use_cache=False, logits_to_keep=1).logits[0, -1]
            ids = torch.cat([ids, logits[4:].argmax()[None, None] + 4], 1)
            times.append(time.perf_counter())
            cpu = cpu or time.process_time()
            now = held()
    steps = [b - a for a, b in pairwise(times[1:])]  # without the first, which reads pages
    cpu = (time.process_time() - cpu) / (count - 1)
    found = {"load_s": times[0] - began, **now, "peak_gib": highest(most, now), "first_byte_s": times[1] - times[0]}
    found |= {"s_per_byte": statistics.median(steps), "cpu_s_per_byte": cpu}
    return found | {"patch_bytes": (ids.shape[1] - 1) / lengths[-1]}


JOBS = {job.__name__: job for job in (ours, converted, copied, transformers)}


def process(job: str, **options: Any) -> Row:
    """Run a job in a process of its own. Exits with its error if it fails."""
    arguments = [sys.executable, "-W", "ignore", __file__, "--job", json.dumps([job, options])]
    began = time.perf_counter()
    done = subprocess.run(arguments, stdout=subprocess.PIPE, text=True, check=False)
    print(f"{job} {options}: {time.perf_counter() - began:.0f} s", file=sys.stderr, flush=True)
    if done.returncode:
        sys.exit(f"{job} of {options} failed with exit code {done.returncode}")
    return json.loads(done.stdout.splitlines()[-1])


# --- rows -------------------------------------------------------------------------------------------------------------


def prepared(model: str, folder: Path, again: bool) -> tuple[Path, Path, Row]:
    """The files of a model and the run made of them, and how long that took if it was measured."""
    source, run = folder / f"{model}-hf", folder / f"{model}-run"
    if not source.exists():
        aside = folder / f"{model}-hf.tmp"
        shutil.rmtree(aside, ignore_errors=True)
        write(SIZES[model], "hf", aside)
        aside.rename(source)
    found: Row = {}
    if again or not run.exists():
        shutil.rmtree(run, ignore_errors=True)
        found = process("copied", source=str(source), to=str(folder / f"{model}-copy")) if again else {}
        found |= process("converted", source=str(source), run=str(run))
    return source, run, found if again else {}


def rows_of(model: str, options: argparse.Namespace) -> tuple[list[Row], list[Row], Row]:
    """The rows of a model, those of its peer, and its conversion."""
    source, run, made = prepared(model, options.files, options.convert)
    rows: list[Row] = []
    for weights in options.weights:
        for tables in ["memory"] if weights == "float32" else options.tables:
            for cache in ["cold", "warm"] if options.cold else ["warm"]:
                (drop if cache == "cold" else warm)(run)
                row = process(
                    "ours", run=str(run), weights=weights, tables=tables, prompt=options.prompt, count=options.bytes
                )
                rows.append({"model": model, "weights": weights, "tables": tables, "cache": cache, **row})
    peers: list[Row] = []
    for dtype in options.dtypes if options.peer else []:
        for cache in ["cold", "warm"] if options.cold else ["warm"]:
            (drop if cache == "cold" else warm)(source)
            row = process(
                "transformers", source=str(source), dtype=dtype, prompt=options.prompt, count=options.peer_bytes
            )
            ours = [own["bytes_per_s"] for own in rows if (own["weights"], own["cache"]) == ("bf16", "warm")]
            row["ratio"] = ours[0] * row["s_per_byte"] if ours else None
            peers.append({"model": model, "system": options.peer, "weights": dtype, "cache": cache, **row})
    return rows, peers, {"model": model, **made} if made else {}


def shown(row: Row, key: str, form: str) -> str:
    value = row.get(key)
    return f"{'–':>{form.split('.')[0]}}" if value is None else f"{value:>{form}}"


def show(rows: Sequence[Row], peers: Sequence[Row], conversions: Sequence[Row]) -> None:
    columns = {"load_s": "8.1f", "rss_gib": "9.2f", "file_gib": "10.2f", "peak_gib": "10.2f", "first_byte_s": "14.2f"}
    columns |= {"bytes_per_s": "13.2f", "floor_share": "13.0%", "patch_bytes": "13.1f", "state_mib_per_row": "19.1f"}
    names = "".join(f"{name:>{form.split('.')[0]}}" for name, form in columns.items())
    print(f"{'model':<9}{'weights':<10}{'tables':<8}{'cache':<6}{names}")
    for row in rows:
        what = f"{row['model']:<9}{row['weights']:<10}{row['tables']:<8}{row['cache']:<6}"
        print(what + "".join(shown(row, name, form) for name, form in columns.items()))
    for row in peers:
        numbers = ", ".join(f"{key} {value:.3g}" for key, value in row.items() if isinstance(value, float))
        print(f"{row['system']} / {row['model']} in {row['weights']}, {row['cache']}: {numbers}")
    for row in conversions:
        print(f"{row['model']}: " + ", ".join(f"{key} {shown(row, key, '.2f')}" for key in row if key != "model"))


def options_of(arguments: Sequence[str] | None) -> argparse.Namespace:
    def names(text: str) -> list[str]:
        return text.split(",")

    assert __doc__
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--files", type=Path, required=True, metavar="DIR", help="where the files are kept")
    parser.add_argument("--models", type=names, default="blt-1b", help=f"of {', '.join(SIZES)}; default %(default)s")
    parser.add_argument("--weights", type=names, default="bf16,int8", help=f"of {', '.join(WEIGHTS)}")
    parser.add_argument("--tables", type=names, default="mapped", help=f"of {', '.join(TABLES)}")
    parser.add_argument("--prompt", type=int, default=256, help="its length in bytes")
    parser.add_argument("--bytes", type=int, default=128, help="to be written")
    parser.add_argument("--cold", action="store_true", help="rows after the files were dropped from the page cache too")
    parser.add_argument("--convert", action="store_true", help="convert again, and measure it beside a plain copy")
    parser.add_argument("--peer", choices=["transformers"])
    parser.add_argument("--dtypes", type=names, default="bfloat16", help="of the peer: bfloat16, float32")
    parser.add_argument("--peer-bytes", type=int, default=4, help="written by the peer")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args(arguments)
    for given, known in ((options.models, SIZES), (options.weights, WEIGHTS), (options.tables, TABLES)):
        if unknown := set(given) - set(known):
            parser.error(f"unknown: {', '.join(sorted(unknown))}; known: {', '.join(known)}")
    if min(options.prompt, options.bytes - 1, options.peer_bytes - 1) < 1:
        parser.error("give a prompt of at least 1 byte, and at least 2 to be written")
    if options.cold and not hasattr(os, "posix_fadvise"):
        parser.error("--cold: this system cannot drop files from its page cache: leave --cold out")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    options = options_of(arguments)
    options.files.mkdir(parents=True, exist_ok=True)
    rows: list[Row] = []
    peers: list[Row] = []
    conversions: list[Row] = []
    for model in options.models:
        own, theirs, made = rows_of(model, options)
        rows, peers, conversions = rows + own, peers + theirs, conversions + [made] * bool(made)
    if options.json:
        machine = {"processor": processor(), "threads": torch.get_num_threads()}
        print(json.dumps({**machine, "rows": rows, "peers": peers, "conversions": conversions}))
    else:
        print(f"{processor()}, {torch.get_num_threads()} threads; {options.bytes} bytes after {options.prompt}")
        show(rows, peers, conversions)
    return 0


if __name__ == "__main__":
    if sys.argv[1:2] == ["--job"]:
        name, given = json.loads(sys.argv[2])
        print(json.dumps(JOBS[name](**given)))
        sys.exit(0)
    sys.exit(main())
